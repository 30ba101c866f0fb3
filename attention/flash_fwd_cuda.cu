/* attention/flash_fwd_cuda.cu: causal attention of new rows over all keys up to themselves
 * (spec 3.4; Dao 2023), on mma.sync: sm_80 and up.
 *
 *   S = Q K^T    P = exp2(S scale log2 e - offset)    O = (O exp2(old - offset) + P V) / sum P
 *
 * A block owns kRows query rows of one head and walks the keys from the first to its last row, in
 * tiles of kKeys; each of four warps owns kRows / 4 rows, so that no sum crosses a warp. Only tiles
 * that reach beyond a warp's first row are masked, and those beyond its last are skipped. Blocks
 * run in the order long to short within a sequence, and the heads of one kv head beside each other,
 * so that they share K and V in L2.
 *
 *   shared memory   | Q (kRows) | K (kKeys) | V (kKeys) |     bf16, d 128: 64 KiB, 2 blocks per SM
 *   cp.async          V of this tile arrives under S, K of the next under softmax and P V
 *
 * Cost: 2 T^2 d_head n_heads FLOP (the causal half); from DRAM q, k, v once, o and lse once.
 * The order of all sums depends on the sequence alone, so packing and repeats change no bit.
 */
#include "attention/flash_cuda.h"

extern "C" {
#include "attention/attention_cuda.h"
}

constexpr int kWarps = 4, kThreads = kWarps * kWarp;

/* kM: blocks of 16 rows per warp. Two, where the registers allow it: a fragment of K or V then
 * serves two products, which halves the traffic from shared memory. fp32 needs the registers for
 * the two halves of each factor. */
template <typename T, int kD>
struct forward_tiling;
template <>
struct forward_tiling<bf16, 64> {
    static constexpr int kM = 2, kKeys = 64;
};
template <>
struct forward_tiling<bf16, 128> {
    static constexpr int kM = 2, kKeys = 64;
};
template <>
struct forward_tiling<bf16, 256> {
    static constexpr int kM = 1, kKeys = 64;
};
template <>
struct forward_tiling<float, 64> {
    static constexpr int kM = 1, kKeys = 64;
};
template <>
struct forward_tiling<float, 128> {
    static constexpr int kM = 1, kKeys = 64;
};
template <>
struct forward_tiling<float, 256> {
    static constexpr int kM = 1, kKeys = 16;
};

/* Scores of keys beyond a row's position to -infinity. `row`: position of the warp's first row. */
template <int kM, int kN>
static __device__ __forceinline__ void mask_scores(float (&s)[kM][kN][4], int row, int key0)
{
    const int lane = (int)threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (key0 + 8 * n + 2 * t + i % 2 > row + 16 * m + g + i / 2 * 8)
                    s[m][n][i] = -INFINITY;
}

template <typename T, int kD>
static __global__ void __launch_bounds__(kThreads)
    flash_forward_kernel(const flash_forward_params<T> p)
{
    constexpr int kM = forward_tiling<T, kD>::kM, kKeys = forward_tiling<T, kD>::kKeys;
    constexpr int kWarpRows = 16 * kM, kRows = kWarps * kWarpRows;
    HT_SHARED_DYNAMIC(unsigned char, smem);
    T *const q_tile = reinterpret_cast<T *>(smem);
    T *const k_tile = q_tile + kRows * kD, *const v_tile = k_tile + kKeys * kD;

    tile_place place;
    const int head = (int)(blockIdx.x % (unsigned)p.n_heads);
    if (!find_tile<kRows>(place, p.starts, p.n_seqs, (int)(blockIdx.x / (unsigned)p.n_heads),
                          p.skip))
        return;
    const int row0 = (place.n_tiles - 1 - place.tile) * kRows; // of the sequence; long ones first
    const int n_rows = min(kRows, place.n_rows - row0);
    const int past = p.past ? (int)p.past[place.seq] : 0;
    const int n_keys = past + row0 + n_rows;
    const int64_t token = place.first + row0, kv_head = head / p.group;
    const T *k, *v;
    if (p.k_cache) {
        k = static_cast<const T *>(p.k_cache[place.seq]);
        v = static_cast<const T *>(p.v_cache[place.seq]);
    } else {
        k = p.k + place.first * p.kv_stride;
        v = p.v + place.first * p.kv_stride;
    }
    k += kv_head * p.d_head;
    v += kv_head * p.d_head;

    const int lane = (int)threadIdx.x % kWarp;
    const int warp_row = (int)threadIdx.x / kWarp * kWarpRows; // of the tile
    const int warp_pos = past + row0 + warp_row;
    float out[kM][kD / 8][4];
    softmax_rows rows[kM];
    clear(out);
#pragma unroll
    for (int m = 0; m < kM; m++) softmax_start(rows[m]);

    load_tile<T, kD, kRows, kThreads>(q_tile, p.q + token * p.q_stride + (int64_t)head * p.d_head,
                                      p.q_stride, n_rows, p.d_head, (int)threadIdx.x);
    load_tile<T, kD, kKeys, kThreads>(k_tile, k, p.kv_stride, n_keys, p.d_head, (int)threadIdx.x);
    cp_async_commit();
    for (int key0 = 0; key0 < n_keys; key0 += kKeys) {
        const bool beyond = key0 >= warp_pos + kWarpRows; // of all rows of this warp
        float s[kM][kKeys / 8][4];
        cp_async_wait<0>();
        __syncthreads(); // K is there; no warp reads the old V any more
        load_tile<T, kD, kKeys, kThreads>(v_tile, v + key0 * p.kv_stride, p.kv_stride,
                                          n_keys - key0, p.d_head, (int)threadIdx.x);
        cp_async_commit();
        if (!beyond) {
            multiply_rows<T, kD>(s, q_tile, warp_row, k_tile);
            if (key0 + kKeys - 1 > warp_pos) mask_scores(s, warp_pos, key0);
        }
        cp_async_wait<0>();
        __syncthreads(); // V is there; no warp reads K any more
        if (key0 + kKeys < n_keys)
            load_tile<T, kD, kKeys, kThreads>(k_tile, k + (key0 + kKeys) * p.kv_stride, p.kv_stride,
                                              n_keys - key0 - kKeys, p.d_head, (int)threadIdx.x);
        cp_async_commit();
        if (beyond) continue;
#pragma unroll
        for (int m = 0; m < kM; m++) softmax_step(s[m], rows[m], out[m], p.scale_log2);
        multiply_add<T, kD>(out, s, v_tile, 0);
    }

    // o through the warp's own rows of the Q tile, so that 16 bytes go out at a time
#pragma unroll
    for (int m = 0; m < kM; m++) {
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float sum = row_sum(rows[m].sum[i]);
            const int row = warp_row + 16 * m + lane / 4 + 8 * i;
            inverse[i] = 1.0f / sum;
            if (p.lse && lane % 4 == 0 && row < n_rows)
                p.lse[(token + row) * p.n_heads + head] = rows[m].offset[i] * kLn2 + logf(sum);
        }
        __syncwarp();
        store_tile<T, kD>(q_tile, warp_row + 16 * m, 0, out[m], inverse);
    }
    __syncwarp();
    constexpr int kChunks = kD / kVec<T>;
#pragma unroll
    for (int i = 0; i < kWarpRows * kChunks / kWarp; i++) {
        const int at = i * kWarp + lane, row = warp_row + at / kChunks, chunk = at % kChunks;
        if (row < n_rows && chunk * kVec<T> < p.d_head)
            *reinterpret_cast<uint4 *>(p.o + (token + row) * p.o_stride + (int64_t)head * p.d_head +
                                       chunk * kVec<T>) =
                *reinterpret_cast<const uint4 *>(chunk_at<T, kD>(q_tile, row, chunk));
    }
}

template <typename T, int kD>
static enum ht_status launch(struct ht_backend *be, const flash_forward_params<T> &p,
                             int64_t n_tokens)
{
    constexpr int kKeys = forward_tiling<T, kD>::kKeys,
                  kRows = kWarps * 16 * forward_tiling<T, kD>::kM;
    const int64_t blocks = tile_slots(n_tokens, p.n_seqs, kRows) * p.n_heads;
    if (blocks > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "flash_forward: %lld tokens of %d heads in one call",
                       (long long)n_tokens, p.n_heads);
    HT_LAUNCH(be, (flash_forward_kernel<T, kD>), (unsigned)blocks, kThreads,
              (kRows + 2 * kKeys) * kD * sizeof(T), p);
    return ht_cuda_check_launch(be, "flash_forward");
}

template <typename T>
enum ht_status flash_forward_launch(struct ht_backend *be, const flash_forward_params<T> &p,
                                    int64_t n_tokens)
{
    return HT_D_HEAD_SWITCH(p.d_head, launch, T, be, p, n_tokens);
}
template enum ht_status flash_forward_launch(struct ht_backend *,
                                             const flash_forward_params<float> &, int64_t);
template enum ht_status flash_forward_launch(struct ht_backend *,
                                             const flash_forward_params<bf16> &, int64_t);

/* Hopper's own kernel (flash_fwd_sm90.cu) is taken on demand until it has been tried on one. */
static bool pick_sm90(const struct ht_backend *be, const struct ht_flash_args *a)
{
    const char *wanted = getenv("HT_FLASH_SM90");
    return wanted && strcmp(wanted, "1") == 0 && ht_cuda_device_of(be)->arch == 90 &&
           a->dtype == HT_DTYPE_BF16 && a->d_head == 128;
}

template <typename T>
static enum ht_status forward(struct ht_backend *be, const struct ht_flash_args *a)
{
    const T *row = static_cast<const T *>(a->qkv);
    flash_forward_params<T> p = {};
    HT_TRY(check_rows("flash_forward", "qkv", a->qkv, a->qkv_stride, a->dtype));
    HT_TRY(check_rows("flash_forward", "o", a->o, a->n_heads * a->d_head, a->dtype));
    if (pick_sm90(be, a)) return ht_flash_forward_sm90(be, a);
    p.q = row;
    p.k = row + a->n_heads * a->d_head;
    p.v = p.k + a->n_kv_heads * a->d_head;
    p.o = static_cast<T *>(a->o);
    p.lse = a->lse;
    p.q_stride = p.kv_stride = a->qkv_stride;
    p.o_stride = a->n_heads * a->d_head;
    p.starts = a->seqs.starts;
    p.n_seqs = (int)a->seqs.n_seqs;
    p.n_heads = (int)a->n_heads;
    p.group = (int)(a->n_heads / a->n_kv_heads);
    p.d_head = (int)a->d_head;
    p.scale_log2 = a->scale * kLog2e;
    return flash_forward_launch(be, p, a->n_tokens);
}

extern "C" enum ht_status ht_flash_forward_cuda(struct ht_backend *be,
                                                const struct ht_flash_args *a)
{
    return HT_DISPATCH(a->dtype, "flash_forward", forward, be, a);
}
