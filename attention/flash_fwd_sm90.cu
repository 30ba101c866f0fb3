/* attention/flash_fwd_sm90.cu: the forward of flash_fwd_cuda.cu for Hopper (spec 3.4; Shah et al.
 * 2024): TMA, wgmma, warp specialisation. bf16, d_head 128, no cache.
 *
 * IT HAS NEVER RUN: no Hopper GPU was at hand, and the emulation knows neither TMA nor wgmma. It is
 * taken only with HT_FLASH_SM90=1 in the environment, on a device of architecture 9.0.
 *
 *   warpgroup 0       producer, 24 registers: one thread asks TMA for Q once, then K and V tiles,
 *                     and waits for empty stages
 *   warpgroups 1, 2   consumers, 240 registers: 64 query rows each. While S of the next keys and
 *                     P V of these run on the tensor cores, nothing waits but this warpgroup; the
 *                     other does its softmax meanwhile (ping-pong by named barriers)
 *
 *   shared memory     | Q 128 x 128 | K 128 x 128 | V | K | V |       160 KiB, two stages
 *                     each as two halves of 64 columns: rows of 128 bytes, TMA's 128-byte swizzle
 *
 * Tiles are 128 rows by 128 keys, both counted from the sequence's start, so that only the last one
 * is masked. TMA reads rows beyond a sequence's end from the next one, where the mask hides them.
 */
#include <cuda.h>

#include "attention/flash_cuda.h"

extern "C" {
#include "attention/attention_cuda.h"
}

constexpr int kD = 128, kRows = 128, kKeys = 128, kHalf = 64, kStages = 2;
constexpr int kGroup = 128, kThreads = 3 * kGroup; // threads of a warpgroup, of a block
constexpr int kConsumerWarps = 8;
constexpr int kTileBytes = 128 * kD * 2, kHalfBytes = kTileBytes / 2;
constexpr int kBytesShared = (1 + 2 * kStages) * kTileBytes;

struct flash_sm90_params {
    bf16 *o;
    float *lse; // (T, n_heads) or NULL
    const int32_t *starts;
    int n_seqs, n_heads, n_kv_heads;
    float scale_log2;
};

/* ---- instructions ---- */

static __device__ __forceinline__ void barrier_init(uint64_t *bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_address(bar)), "r"(arrivals)
                 : "memory");
}

static __device__ __forceinline__ void barrier_expect(uint64_t *bar, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_address(bar)),
        "r"(bytes)
        : "memory");
}

static __device__ __forceinline__ void barrier_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_address(bar)) : "memory");
}

/* Until the phase of that parity is complete. */
static __device__ __forceinline__ void barrier_wait(uint64_t *bar, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(smem_address(bar)),
                 "r"(parity)
                 : "memory");
}

/* 64 columns x 128 rows of the matrix from (column, row) on; rows beyond its end are zero. */
static __device__ __forceinline__ void tma_load(unsigned char *to, const CUtensorMap *map,
                                                uint64_t *bar, int column, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(smem_address(to)),
                 "l"(map), "r"(smem_address(bar)), "r"(column), "r"(row)
                 : "memory");
}

/* Of a tile with rows of 128 swizzled bytes: 8 rows are 1024 bytes. `leading`: bytes between blocks
 * of 64 columns, for a tile whose rows are the summed dimension. */
static __device__ __forceinline__ uint64_t tile_descriptor(const unsigned char *tile, int leading)
{
    return (uint64_t)((smem_address(tile) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define ACC4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define ACC64(c)                                                                                   \
    ACC4(c, 0), ACC4(c, 1), ACC4(c, 2), ACC4(c, 3), ACC4(c, 4), ACC4(c, 5), ACC4(c, 6),            \
        ACC4(c, 7), ACC4(c, 8), ACC4(c, 9), ACC4(c, 10), ACC4(c, 11), ACC4(c, 12), ACC4(c, 13),    \
        ACC4(c, 14), ACC4(c, 15)
#define REGS64                                                                                     \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

/* c (64 x 128) = or += A B^T, 16 deep; both tiles have rows of the summed dimension's columns. */
static __device__ __forceinline__ void wgmma_rows(float (&c)[16][4], uint64_t a, uint64_t b,
                                                  int add)
{
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGS64
                 ", %64, %65, add, 1, 1, 0, 0;\n"
                 "}\n"
                 : ACC64(c)
                 : "l"(a), "l"(b), "r"(add));
}

/* c (64 x 128) += A B, 16 deep; A in registers, B's rows are the summed dimension. */
static __device__ __forceinline__ void wgmma_add(float (&c)[16][4], const uint32_t (&a)[4],
                                                 uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " REGS64
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : ACC64(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

static __device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/* Until at most kPending groups run; c is theirs until then. */
template <int kPending>
static __device__ __forceinline__ void wgmma_wait(float (&c)[16][4])
{
    asm volatile("wgmma.wait_group.sync.aligned %64;\n" : ACC64(c) : "n"(kPending) : "memory");
}

static __device__ __forceinline__ void bar_arrive(int id, int n_threads)
{
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(n_threads) : "memory");
}

/* ---- the kernel ---- */

struct flash_barriers {
    uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
};

static __device__ __forceinline__ void produce(unsigned char *smem, flash_barriers *bars,
                                               const CUtensorMap *map, int q_column, int k_column,
                                               int v_column, int q_row, int first, int n_tiles)
{
    const auto load = [&](unsigned char *to, uint64_t *bar, int column, int row) {
        barrier_expect(bar, kTileBytes);
        tma_load(to, map, bar, column, row);
        tma_load(to + kHalfBytes, map, bar, column + kHalf, row);
    };
    load(smem, &bars->q_full, q_column, q_row);
    for (int tile = 0; tile < n_tiles; tile++) {
        const int stage = tile % kStages, parity = tile / kStages % 2 ^ 1;
        unsigned char *const to = smem + (1 + 2 * stage) * kTileBytes;
        barrier_wait(&bars->k_empty[stage], parity); // the first round passes at once
        load(to, &bars->k_full[stage], k_column, first + tile * kKeys);
        barrier_wait(&bars->v_empty[stage], parity);
        load(to + kTileBytes, &bars->v_full[stage], v_column, first + tile * kKeys);
    }
}

/* Scores become probabilities, still in fp32; returns what older sums are to be multiplied by. */
static __device__ __forceinline__ void softmax_scores(float (&s)[16][4], softmax_rows &r,
                                                      float (&older)[2], float scale_log2)
{
    float none[1][4] = { { 1.0f, 1.0f, 1.0f, 1.0f } }; // takes the factor of each row
    softmax_step(s, r, none, scale_log2);
    older[0] = none[0][0];
    older[1] = none[0][2];
}

/* Rows row0 .. row0 + 64 of the tile (this warpgroup's); keys tile by tile. */
static __device__ __forceinline__ void consume(float (&out)[16][4], softmax_rows &rows,
                                               const unsigned char *smem, flash_barriers *bars,
                                               int group, int n_tiles, float scale_log2)
{
    const int lane = (int)threadIdx.x % kWarp, warp_row = (int)threadIdx.x / kWarp % 4 * 16;
    const int row = group * 64 + warp_row + lane / 4; // of the tile, and of the last keys
    const unsigned char *const q = smem + group * 64 * 128;
    float s[16][4], older[2];
    uint32_t p[8][4];

    const auto scores = [&](int tile) { // S = Q K^T, asynchronous
        const unsigned char *const k = smem + (1 + 2 * (tile % kStages)) * kTileBytes;
#pragma unroll
        for (int i = 0; i < kD / 16; i++) {
            const int at = i / 4 * kHalfBytes + i % 4 * 32;
            wgmma_rows(s, tile_descriptor(q + at, 16), tile_descriptor(k + at, 16), i > 0);
        }
        wgmma_commit();
    };
    const auto mask = [&]() { // of the last tile
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (8 * n + lane % 4 * 2 + i % 2 > row + i / 2 * 8) s[n][i] = -INFINITY;
    };
    const auto pack = [&]() {
#pragma unroll
        for (int i = 0; i < 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                p[i][j] = pack_bf16(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1]);
    };

    const auto add_values = [&](int tile) { // out += P V, asynchronous
        const unsigned char *const v = smem + (2 + 2 * (tile % kStages)) * kTileBytes;
#pragma unroll
        for (int i = 0; i < 8; i++)
            wgmma_add(out, p[i], tile_descriptor(v + i * 16 * 128, kHalfBytes));
        wgmma_commit();
    };

    barrier_wait(&bars->q_full, 0);
    barrier_wait(&bars->k_full[0], 0);
    wgmma_fence();
    scores(0);
    wgmma_wait<0>(s);
    if (lane == 0) barrier_arrive(&bars->k_empty[0]);
    if (n_tiles == 1) mask();
    softmax_scores(s, rows, older, scale_log2);
    pack();
    for (int tile = 0; tile + 1 < n_tiles; tile++) {
        const int stage = tile % kStages, next = tile + 1;
        barrier_wait(&bars->k_full[next % kStages], next / kStages % 2);
        barrier_wait(&bars->v_full[stage], tile / kStages % 2);
        bar_sync(1 + group, 2 * kGroup); // this warpgroup's turn on the tensor cores
        wgmma_fence();
        scores(next);
        add_values(tile);
        // the first warpgroup gets no more turns after the last round
        if (group == 0 || tile + 2 < n_tiles) bar_arrive(1 + (group ^ 1), 2 * kGroup);
        wgmma_wait<1>(s);
        if (lane == 0) barrier_arrive(&bars->k_empty[next % kStages]);
        if (next == n_tiles - 1) mask();
        softmax_scores(s, rows, older, scale_log2);
        wgmma_wait<0>(out);
        if (lane == 0) barrier_arrive(&bars->v_empty[stage]);
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= older[i / 2];
        pack();
    }
    barrier_wait(&bars->v_full[(n_tiles - 1) % kStages], (n_tiles - 1) / kStages % 2);
    wgmma_fence();
    add_values(n_tiles - 1);
    wgmma_wait<0>(out);
}

static __global__ void __launch_bounds__(kThreads, 1)
    flash_forward_sm90_kernel(const __grid_constant__ CUtensorMap map, const flash_sm90_params p)
{
    HT_SHARED_DYNAMIC(unsigned char, smem);
    HT_SHARED(flash_barriers, bars, [1]);
    tile_place place;
    const int head = (int)(blockIdx.x % (unsigned)p.n_heads);
    if (!find_tile<kRows>(place, p.starts, p.n_seqs, (int)(blockIdx.x / (unsigned)p.n_heads), 0))
        return;
    const int kv_head = head / (p.n_heads / p.n_kv_heads);
    const int tile = place.n_tiles - 1 - place.tile, row0 = tile * kRows; // long ones first
    const int n_rows = min(kRows, place.n_rows - row0), token = place.first + row0;
    const int warpgroup = (int)threadIdx.x / kGroup;

    if (threadIdx.x == 0) {
        barrier_init(&bars->q_full, 1);
        for (int i = 0; i < kStages; i++) {
            barrier_init(&bars->k_full[i], 1);
            barrier_init(&bars->v_full[i], 1);
            barrier_init(&bars->k_empty[i], kConsumerWarps);
            barrier_init(&bars->v_empty[i], kConsumerWarps);
        }
        asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
        asm volatile("fence.proxy.async;\n" ::: "memory");
    }
    __syncthreads();
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;\n");
        if (threadIdx.x == 0)
            produce(smem, bars, &map, head * kD, (p.n_heads + kv_head) * kD,
                    (p.n_heads + p.n_kv_heads + kv_head) * kD, token, place.first, tile + 1);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;\n");
    const int group = warpgroup - 1, lane = (int)threadIdx.x % kWarp;
    float out[1][16][4];
    softmax_rows rows;
    clear(out);
    softmax_start(rows);
    if (group == 1 && tile > 0) bar_arrive(1, 2 * kGroup); // the first warpgroup begins
    consume(out[0], rows, smem, bars, group, tile + 1, p.scale_log2);

    // o through this warp's own rows of Q, so that 16 bytes go out at a time
    const int warp_row = group * 64 + (int)threadIdx.x / kWarp % 4 * 16;
    const auto chunk = [&](int row, int c) {
        return smem + c / 8 * kHalfBytes + row * 128 + (c % 8 ^ (row & 7)) * 16;
    };
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = warp_row + lane / 4 + 8 * i;
        const float sum = row_sum(rows.sum[i]), inverse = 1.0f / sum;
        if (p.lse && lane % 4 == 0 && row < n_rows)
            p.lse[(int64_t)(token + row) * p.n_heads + head] = rows.offset[i] * kLn2 + logf(sum);
#pragma unroll
        for (int n = 0; n < 16; n++)
            *reinterpret_cast<uint32_t *>(chunk(row, n) + lane % 4 * 4) =
                pack_bf16(out[0][n][2 * i] * inverse, out[0][n][2 * i + 1] * inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = warp_row + 2 * i + lane / 16, c = lane % 16;
        if (row < n_rows)
            *reinterpret_cast<uint4 *>(p.o + ((int64_t)(token + row) * p.n_heads + head) * kD +
                                       8 * c) = *reinterpret_cast<const uint4 *>(chunk(row, c));
    }
}

/* ---- launch ---- */

typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                           const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                           const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                           CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* The qkv rows as a matrix of which boxes of 64 columns x 128 rows are read. */
static enum ht_status describe(CUtensorMap *map, const struct ht_flash_args *a)
{
    void *entry = NULL;
    cudaDriverEntryPointQueryResult found;
    HT_TRY(ht_cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                          cudaEnableDefault, &found),
                         "cuTensorMapEncodeTiled"));
    if (!entry)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "flash_forward: the driver has no tensor maps; unset "
                                           "HT_FLASH_SM90");
    const cuuint64_t size[2] = { (cuuint64_t)((a->n_heads + 2 * a->n_kv_heads) * a->d_head),
                                 (cuuint64_t)a->n_tokens };
    const cuuint64_t stride[1] = { (cuuint64_t)a->qkv_stride * 2 };
    const cuuint32_t box[2] = { kHalf, kRows }, step[2] = { 1, 1 };
    const CUresult r = reinterpret_cast<encode_fn *>(entry)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(a->qkv), size, stride, box,
        step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return HT_FAIL(HT_ERR_CUDA, "flash_forward: cuTensorMapEncodeTiled fails with %d", (int)r);
    return HT_OK;
}

extern "C" enum ht_status ht_flash_forward_sm90(struct ht_backend *be,
                                                const struct ht_flash_args *a)
{
    const int64_t blocks = tile_slots(a->n_tokens, a->seqs.n_seqs, kRows) * a->n_heads;
    CUtensorMap map;
    flash_sm90_params p = {};
    if (blocks > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "flash_forward: %lld tokens of %lld heads in one call",
                       (long long)a->n_tokens, (long long)a->n_heads);
    HT_TRY(describe(&map, a));
    p.o = static_cast<bf16 *>(a->o);
    p.lse = a->lse;
    p.starts = a->seqs.starts;
    p.n_seqs = (int)a->seqs.n_seqs;
    p.n_heads = (int)a->n_heads;
    p.n_kv_heads = (int)a->n_kv_heads;
    p.scale_log2 = a->scale * kLog2e;
    HT_LAUNCH(be, flash_forward_sm90_kernel, (unsigned)blocks, kThreads, kBytesShared, map, p);
    return ht_cuda_check_launch(be, "flash_forward_sm90");
}
