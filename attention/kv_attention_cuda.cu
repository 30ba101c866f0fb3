/* attention/kv_attention_cuda.cu: new tokens over a KV cache: decode and continued prefill
 * (spec 3.4, 4.4).
 *
 * Sequences with several new rows: the tiles of flash_fwd_cuda.cu with `past` keys before the first
 * query. One new row (decode) is bound by memory, 2 * keys * n_kv_heads * d_head * sizeof(T) bytes:
 *
 *   a block     one kv head (at most 16 of its query heads, the rows of a product) and one split of
 *               a sequence's keys, whose number depends on the sequence's length alone
 *   a warp      every fourth group of 16 (fp32: 8) keys of the split, in a ring of two stages of
 * its own; warps meet once, at the end, when their (o, offset, sum) are added in order combine one
 * block per head adds the splits in order:  w = exp2(offset - max offset)
 *
 * A row's bits therefore do not depend on the batch around it. Grids are as large as any lengths
 * need (starts, past and the caches' addresses are on the device): blocks without work end at once.
 */
#include "attention/flash_cuda.h"

extern "C" {
#include "attention/attention_cuda.h"
}

constexpr int kMaxSplits = HT_DECODE_MAX_SPLITS, kMinSplitKeys = 128, kSplitUnit = 64;
constexpr int kHeadRows = 16, kCombineThreads = 128;

template <typename T>
struct decode_params {
    const T *q;
    const void *const *k_cache, *const *v_cache;
    const int64_t *past;
    const int32_t *starts;
    T *o;
    float *partial; // (n_seqs, n_heads, kMaxSplits) slots: o (d_head), offset, sum
    int64_t q_stride;
    int n_heads, n_kv_heads, group, d_head, slot;
    float scale_log2;
};

/* Keys per split of a row that sees n_keys keys. */
static __device__ __forceinline__ int split_keys(int n_keys)
{
    const int even = (n_keys + kMaxSplits - 1) / kMaxSplits;
    return max(kMinSplitKeys, (even + kSplitUnit - 1) / kSplitUnit * kSplitUnit);
}

template <typename T, int kD>
struct decode_tiling {
    static constexpr int kKeys = sizeof(T) == 2 ? 16 : 8; // of a warp, at a time
    static constexpr int kWarps = kD == 256 ? 2 : 4, kThreads = kWarps * kWarp;
    static constexpr int kStage = 2 * kKeys * kD; // K and V, elements
    static constexpr int kBytesShared = (kHeadRows * kD + 2 * kWarps * kStage) * (int)sizeof(T);
    static constexpr int kPartRow = kD + 8; // floats; 8: rows of a half-warp in different banks
    static_assert(kWarps * kHeadRows * kPartRow * 4 <= 2 * kWarps * kStage * (int)sizeof(T),
                  "the warps' sums take the place of the ring");
};

template <typename T, int kD>
static __global__ void __launch_bounds__((decode_tiling<T, kD>::kThreads))
    kv_decode_kernel(const decode_params<T> p)
{
    using C = decode_tiling<T, kD>;
    constexpr int kKeys = C::kKeys, kWarps = C::kWarps, kThreads = C::kThreads;
    HT_SHARED_DYNAMIC(unsigned char, smem);
    HT_SHARED(float2, warp_rows, [kWarps][kHeadRows]); // offset, sum
    T *const q_tile = reinterpret_cast<T *>(smem), *const ring = q_tile + kHeadRows * kD;

    const int n_chunks = (p.group + kHeadRows - 1) / kHeadRows;
    const int split = (int)(blockIdx.x % kMaxSplits);
    const int chunk = (int)(blockIdx.x / kMaxSplits % (unsigned)(p.n_kv_heads * n_chunks));
    const int seq = (int)(blockIdx.x / kMaxSplits / (unsigned)(p.n_kv_heads * n_chunks));
    const int token = p.starts[seq];
    if (p.starts[seq + 1] - token != 1) return; // through the tiles
    const int n_keys = (int)p.past[seq] + 1, per_split = split_keys(n_keys);
    const int key0 = split * per_split, key1 = min(n_keys, key0 + per_split);
    if (key0 >= n_keys) return;
    const int kv_head = chunk / n_chunks, in_group = chunk % n_chunks * kHeadRows;
    const int head0 = kv_head * p.group + in_group, n_rows = min(kHeadRows, p.group - in_group);
    const int64_t kv_stride = (int64_t)p.n_kv_heads * p.d_head;
    const T *const k = static_cast<const T *>(p.k_cache[seq]) + (int64_t)kv_head * p.d_head;
    const T *const v = static_cast<const T *>(p.v_cache[seq]) + (int64_t)kv_head * p.d_head;

    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    const int warp_key = key0 + warp * kKeys; // keys warp_key + i * kWarps * kKeys ..
    const int n_steps =
        warp_key < key1 ? (key1 - warp_key + kWarps * kKeys - 1) / (kWarps * kKeys) : 0;
    T *const stages = ring + 2 * warp * C::kStage;

    const auto load_stage = [&](int step) {
        if (step >= n_steps) return;
        const int key = warp_key + step * kWarps * kKeys;
        T *const to = stages + step % 2 * C::kStage;
        load_tile<T, kD, kKeys, kWarp>(to, k + key * kv_stride, kv_stride, key1 - key, p.d_head,
                                       lane);
        load_tile<T, kD, kKeys, kWarp>(to + kKeys * kD, v + key * kv_stride, kv_stride, key1 - key,
                                       p.d_head, lane);
    };

    float out[1][kD / 8][4];
    softmax_rows rows;
    clear(out);
    softmax_start(rows);
    load_tile<T, kD, kHeadRows, kThreads>(q_tile,
                                          p.q + token * p.q_stride + (int64_t)head0 * p.d_head,
                                          p.d_head, n_rows, p.d_head, (int)threadIdx.x);
    load_stage(0);
    cp_async_commit();
    load_stage(1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads(); // Q is there, and this warp's first stage
    for (int step = 0; step < n_steps; step++) {
        const int key = warp_key + step * kWarps * kKeys;
        const T *const k_tile = stages + step % 2 * C::kStage;
        float s[1][kKeys / 8][4];
        cp_async_wait<1>();
        __syncwarp(); // this stage is there
        multiply_rows<T, kD>(s, q_tile, 0, k_tile);
        if (key + kKeys > key1) {
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (key + 8 * n + lane % 4 * 2 + i % 2 >= key1) s[0][n][i] = -INFINITY;
        }
        softmax_step(s[0], rows, out[0], p.scale_log2);
        multiply_add<T, kD>(out, s, k_tile + kKeys * kD, 0);
        __syncwarp(); // no lane reads this stage any more
        load_stage(step + 2);
        cp_async_commit();
    }

    // the warps' sums, one after the other
    cp_async_wait<0>();
    __syncthreads();
    float *const part = reinterpret_cast<float *>(ring); // (kWarps, kHeadRows, kPartRow)
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = lane / 4 + 8 * i;
        const float sum = row_sum(rows.sum[i]);
        if (lane % 4 == 0) warp_rows[warp][row] = make_float2(rows.offset[i], sum);
#pragma unroll
        for (int n = 0; n < kD / 8; n++)
            *reinterpret_cast<float2 *>(part + (warp * kHeadRows + row) * C::kPartRow + 8 * n +
                                        lane % 4 * 2) =
                make_float2(out[0][n][2 * i], out[0][n][2 * i + 1]);
    }
    __syncthreads();
    for (int at = (int)threadIdx.x; at < n_rows * p.d_head; at += kThreads) {
        const int row = at / p.d_head, column = at - row * p.d_head, head = head0 + row;
        float offset = warp_rows[0][row].x, sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int w = 1; w < kWarps; w++) offset = fmaxf(offset, warp_rows[w][row].x);
#pragma unroll
        for (int w = 0; w < kWarps; w++) {
            const float weight = fast_exp2(warp_rows[w][row].x - offset);
            sum += weight * warp_rows[w][row].y;
            value += weight * part[(w * kHeadRows + row) * C::kPartRow + column];
        }
        if (n_keys <= per_split) { // the only split
            p.o[((int64_t)token * p.n_heads + head) * p.d_head + column] = from_f32<T>(value / sum);
        } else {
            float *const slot =
                p.partial + (((int64_t)seq * p.n_heads + head) * kMaxSplits + split) * p.slot;
            slot[column] = value;
            if (column == 0) slot[p.d_head] = offset, slot[p.d_head + 1] = sum;
        }
    }
}

template <typename T>
static __global__ void __launch_bounds__(kCombineThreads)
    kv_combine_kernel(const decode_params<T> p)
{
    const int head = (int)(blockIdx.x % (unsigned)p.n_heads);
    const int seq = (int)(blockIdx.x / (unsigned)p.n_heads), token = p.starts[seq];
    if (p.starts[seq + 1] - token != 1) return;
    const int n_keys = (int)p.past[seq] + 1, per_split = split_keys(n_keys);
    const int n_splits = (n_keys + per_split - 1) / per_split;
    if (n_splits == 1) return; // written already
    const float *const slots = p.partial + ((int64_t)seq * p.n_heads + head) * kMaxSplits * p.slot;
    float offset = slots[p.d_head];
    for (int i = 1; i < n_splits; i++) offset = fmaxf(offset, slots[i * p.slot + p.d_head]);
    for (int column = (int)threadIdx.x; column < p.d_head; column += kCombineThreads) {
        float sum = 0.0f, value = 0.0f;
        for (int i = 0; i < n_splits; i++) {
            const float *const slot = slots + i * p.slot;
            const float weight = fast_exp2(slot[p.d_head] - offset);
            sum += weight * slot[p.d_head + 1];
            value += weight * slot[column];
        }
        p.o[((int64_t)token * p.n_heads + head) * p.d_head + column] = from_f32<T>(value / sum);
    }
}

template <typename T, int kD>
static enum ht_status launch(struct ht_backend *be, const decode_params<T> &p, int64_t n_seqs)
{
    using C = decode_tiling<T, kD>;
    const int64_t chunks = p.n_kv_heads * ceil_div(p.group, kHeadRows);
    const int64_t blocks = n_seqs * chunks * kMaxSplits;
    if (blocks > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "kv_attention: %lld sequences of %d heads in one call",
                       (long long)n_seqs, p.n_heads);
    HT_LAUNCH(be, (kv_decode_kernel<T, kD>), (unsigned)blocks, C::kThreads, C::kBytesShared, p);
    HT_TRY(ht_cuda_check_launch(be, "kv_decode"));
    HT_LAUNCH(be, kv_combine_kernel<T>, (unsigned)(n_seqs * p.n_heads), kCombineThreads, 0, p);
    return ht_cuda_check_launch(be, "kv_combine");
}

template <typename T>
static enum ht_status decode(struct ht_backend *be, const struct ht_kv_attention_args *a)
{
    const size_t mark = ht_arena_mark(&be->scratch);
    decode_params<T> p = {};
    void *partial;

    p.slot = (int)ht_attention_cuda_slot(a->d_head);
    HT_TRY(ht_arena_take(&partial, &be->scratch, ht_attention_cuda_decode_bytes(a)));
    ht_arena_reset(&be->scratch, mark); // the stream keeps later operations off until it is used
    p.q = static_cast<const T *>(a->q);
    p.k_cache = a->k_cache;
    p.v_cache = a->v_cache;
    p.past = a->past;
    p.starts = a->seqs.starts;
    p.o = static_cast<T *>(a->o);
    p.partial = static_cast<float *>(partial);
    p.q_stride = a->q_stride;
    p.n_heads = (int)a->n_heads;
    p.n_kv_heads = (int)a->n_kv_heads;
    p.group = (int)(a->n_heads / a->n_kv_heads);
    p.d_head = (int)a->d_head;
    p.scale_log2 = a->scale * kLog2e;
    return HT_D_HEAD_SWITCH(p.d_head, launch, T, be, p, a->seqs.n_seqs);
}

template <typename T>
static enum ht_status extend(struct ht_backend *be, const struct ht_kv_attention_args *a)
{
    flash_forward_params<T> p = {};
    p.q = static_cast<const T *>(a->q);
    p.k_cache = a->k_cache;
    p.v_cache = a->v_cache;
    p.past = a->past;
    p.o = static_cast<T *>(a->o);
    p.q_stride = a->q_stride;
    p.kv_stride = a->n_kv_heads * a->d_head;
    p.o_stride = a->n_heads * a->d_head;
    p.starts = a->seqs.starts;
    p.n_seqs = (int)a->seqs.n_seqs;
    p.n_heads = (int)a->n_heads;
    p.group = (int)(a->n_heads / a->n_kv_heads);
    p.d_head = (int)a->d_head;
    p.skip = 1;
    p.scale_log2 = a->scale * kLog2e;
    return flash_forward_launch(be, p, a->n_tokens);
}

template <typename T>
static enum ht_status kv_attention(struct ht_backend *be, const struct ht_kv_attention_args *a)
{
    HT_TRY(check_rows("kv_attention", "q", a->q, a->q_stride, a->dtype));
    HT_TRY(check_rows("kv_attention", "o", a->o, a->n_heads * a->d_head, a->dtype));
    // every sequence has a row; what the host cannot know is which ones have several
    const bool some_extend = a->n_tokens > a->seqs.n_seqs;
    const bool some_decode = !some_extend || a->seqs.n_seqs > 1;
    if (some_extend) HT_TRY(extend<T>(be, a));
    if (some_decode) HT_TRY(decode<T>(be, a));
    return HT_OK;
}

extern "C" enum ht_status ht_kv_attention_cuda(struct ht_backend *be,
                                               const struct ht_kv_attention_args *a)
{
    return HT_DISPATCH(a->dtype, "kv_attention", kv_attention, be, a);
}
