/* attention/flash_fwd_sm90.cu: the forward of flash_fwd_cuda.cu for Hopper (spec 3.4; Shah et al.
 * 2024): TMA, wgmma, warp specialisation. bf16, d_head 128, no cache.
 *
 * IT HAS NEVER RUN ON A GPU. The emulation checks addresses, swizzles, phases and sums as the
 * documentation has them, but not that waits suffice. It is taken only with HT_FLASH_SM90=1 in the
 * environment, on a device of architecture 9.0.
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
#include "attention/flash_cuda.h"
#include "core/base/cuda_hopper.h"

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

/* ---- the kernel ---- */

struct flash_barriers {
    uint64_t q_full, k_full[kStages], v_full[kStages], k_empty[kStages], v_empty[kStages];
};

static __device__ __forceinline__ void produce(unsigned char *smem, flash_barriers *bars,
                                               const ht_tensor_map *map, int q_column, int k_column,
                                               int v_column, int q_row, int first, int n_tiles)
{
    const auto load = [&](unsigned char *to, uint64_t *bar, int column, int row) {
        mbarrier_expect(bar, kTileBytes);
        tma_load(to, map, bar, column, row);
        tma_load(to + kHalfBytes, map, bar, column + kHalf, row);
    };
    load(smem, &bars->q_full, q_column, q_row);
    for (int tile = 0; tile < n_tiles; tile++) {
        const int stage = tile % kStages, parity = tile / kStages % 2 ^ 1;
        unsigned char *const to = smem + (1 + 2 * stage) * kTileBytes;
        mbarrier_wait(&bars->k_empty[stage], parity); // the first round passes at once
        load(to, &bars->k_full[stage], k_column, first + tile * kKeys);
        mbarrier_wait(&bars->v_empty[stage], parity);
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
            wgmma_rows(s, wgmma_tile(q + at, 16), wgmma_tile(k + at, 16), i > 0);
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
        for (int i = 0; i < 8; i++) wgmma_add(out, p[i], wgmma_tile(v + i * 16 * 128, kHalfBytes));
        wgmma_commit();
    };

    mbarrier_wait(&bars->q_full, 0);
    mbarrier_wait(&bars->k_full[0], 0);
    wgmma_fence();
    scores(0);
    wgmma_wait<0>(s);
    if (lane == 0) mbarrier_arrive(&bars->k_empty[0]);
    if (n_tiles == 1) mask();
    softmax_scores(s, rows, older, scale_log2);
    pack();
    for (int tile = 0; tile + 1 < n_tiles; tile++) {
        const int stage = tile % kStages, next = tile + 1;
        mbarrier_wait(&bars->k_full[next % kStages], next / kStages % 2);
        mbarrier_wait(&bars->v_full[stage], tile / kStages % 2);
        bar_sync(1 + group, 2 * kGroup); // this warpgroup's turn on the tensor cores
        wgmma_fence();
        scores(next);
        add_values(tile);
        // the first warpgroup gets no more turns after the last round
        if (group == 0 || tile + 2 < n_tiles) bar_arrive(1 + (group ^ 1), 2 * kGroup);
        wgmma_wait<1>(s);
        if (lane == 0) mbarrier_arrive(&bars->k_empty[next % kStages]);
        if (next == n_tiles - 1) mask();
        softmax_scores(s, rows, older, scale_log2);
        wgmma_wait<0>(out);
        if (lane == 0) mbarrier_arrive(&bars->v_empty[stage]);
#pragma unroll
        for (int n = 0; n < 16; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] *= older[i / 2];
        pack();
    }
    mbarrier_wait(&bars->v_full[(n_tiles - 1) % kStages], (n_tiles - 1) / kStages % 2);
    wgmma_fence();
    add_values(n_tiles - 1);
    wgmma_wait<0>(out);
}

static __global__ void __launch_bounds__(kThreads, 1)
    flash_forward_sm90_kernel(const __grid_constant__ ht_tensor_map map, const flash_sm90_params p)
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
        mbarrier_init(&bars->q_full, 1);
        for (int i = 0; i < kStages; i++) {
            mbarrier_init(&bars->k_full[i], 1);
            mbarrier_init(&bars->v_full[i], 1);
            mbarrier_init(&bars->k_empty[i], kConsumerWarps);
            mbarrier_init(&bars->v_empty[i], kConsumerWarps);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (warpgroup == 0) {
        registers_fewer<24>();
        if (threadIdx.x == 0)
            produce(smem, bars, &map, head * kD, (p.n_heads + kv_head) * kD,
                    (p.n_heads + p.n_kv_heads + kv_head) * kD, token, place.first, tile + 1);
        return;
    }
    registers_more<240>();
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

extern "C" enum ht_status ht_flash_forward_sm90(struct ht_backend *be,
                                                const struct ht_flash_args *a)
{
    const int64_t blocks = tile_slots(a->n_tokens, a->seqs.n_seqs, kRows) * a->n_heads;
    ht_tensor_map map;
    flash_sm90_params p = {};
    if (blocks > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "flash_forward: %lld tokens of %lld heads in one call",
                       (long long)a->n_tokens, (long long)a->n_heads);
    HT_TRY(tensor_map_make(&map, a->qkv, (a->n_heads + 2 * a->n_kv_heads) * kD, a->n_tokens,
                           a->qkv_stride, kHalf, kRows));
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
