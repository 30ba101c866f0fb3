/* core/ops/embedding_cuda.cu: token embedding on CUDA (embedding.h). Bound by memory.
 *
 * Backward without atomics: the block of a token's first occurrence adds all its occurrences in
 * order; blocks of later occurrences end at once. Finding them is a scan of the ids, which fit L2:
 * n_tokens / kThreads steps per block, about 0.1 ms of an H100 for 16384 tokens on paper, beside
 * 0.2 ms for moving the gradients of d_model 4096.
 *
 * An id outside of the vocabulary, which the CPU refuses, gives a NaN row (forward) and is left out
 * (backward): the host cannot look without waiting for the device.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
}

constexpr int kThreads = 256;

template <typename T, int W>
static __global__ void __launch_bounds__(kThreads)
    embedding_forward_kernel(float *residual, const T *weight, const int32_t *ids, int64_t n,
                             int64_t vocab_size, float multiplier)
{
    const int64_t t = blockIdx.x, id = ids[t];
    const bool valid = id >= 0 && id < vocab_size;

    for (int64_t i = (int64_t)threadIdx.x * W; i < n; i += kThreads * W) {
        float v[W];
        for (int k = 0; k < W; k++) v[k] = NAN;
        if (valid) load_n<W>(v, weight + id * n + i);
        for (int k = 0; k < W; k++) v[k] *= multiplier;
        store_n<W>(residual + t * n + i, v);
    }
}

/* Block (token, slab of kThreads * W columns). */
template <int W>
static __global__ void __launch_bounds__(kThreads)
    embedding_backward_kernel(float *grad_weight, const float *grad_residual, const int32_t *ids,
                              int n_tokens, int64_t n, int64_t vocab_size, float multiplier)
{
    HT_SHARED(int, count, [kThreads / kWarp]);
    HT_SHARED(int, found, [kThreads]);
    const int t = (int)blockIdx.x, tid = (int)threadIdx.x, warp = tid / kWarp, lane = tid % kWarp;
    const int id = ids[t];
    const int64_t i = ((int64_t)blockIdx.y * kThreads + tid) * W;
    float sum[W];

    if (id < 0 || id >= vocab_size) return;
    for (int s = 0; s < t; s += kThreads)
        if (__syncthreads_or(s + tid < t && ids[s + tid] == id)) return; // not the first

    for (int k = 0; k < W; k++) sum[k] = 0.0f;
    if (i < n) load_n<W>(sum, grad_weight + id * n + i);
    // two barriers a turn suffice: count is read before the second and found before the next first
    for (int s = t; s < n_tokens; s += kThreads) {
        const bool mine = s + tid < n_tokens && ids[s + tid] == id;
        const unsigned in_warp = __ballot_sync(kAllLanes, mine);
        if (lane == 0) count[warp] = __popc(in_warp);
        __syncthreads();
        int before = 0, total = 0;
        for (int w = 0; w < kThreads / kWarp; w++) {
            if (w < warp) before += count[w];
            total += count[w];
        }
        if (mine) found[before + __popc(in_warp & ((1u << lane) - 1))] = s + tid;
        __syncthreads();
        if (i < n)
            for (int f = 0; f < total; f++) {
                float g[W];
                load_n<W>(g, grad_residual + found[f] * n + i);
                for (int k = 0; k < W; k++) sum[k] += multiplier * g[k];
            }
    }
    if (i < n) store_n<W>(grad_weight + id * n + i, sum);
}

template <typename T>
static enum ht_status forward(struct ht_backend *be, const struct ht_embedding_args *a)
{
    const int64_t n = a->d_model;
    const T *weight = (const T *)a->weight;

    if (rows_aligned(weight, n, 4 * sizeof(T)) && rows_aligned(a->residual, n))
        HT_LAUNCH(be, (embedding_forward_kernel<T, 4>), (unsigned)a->n_tokens, kThreads, 0,
                  a->residual, weight, a->ids, n, a->vocab_size, a->multiplier);
    else
        HT_LAUNCH(be, (embedding_forward_kernel<T, 1>), (unsigned)a->n_tokens, kThreads, 0,
                  a->residual, weight, a->ids, n, a->vocab_size, a->multiplier);
    return ht_cuda_check_launch(be, "embedding_forward");
}

extern "C" enum ht_status ht_embedding_forward_cuda(struct ht_backend *be,
                                                    const struct ht_embedding_args *a)
{
    return HT_DISPATCH(a->dtype, "embedding", forward, be, a);
}

extern "C" enum ht_status ht_embedding_backward_cuda(struct ht_backend *be,
                                                     const struct ht_embedding_args *a)
{
    const int64_t n = a->d_model;
    const unsigned tokens = (unsigned)a->n_tokens;

    if (a->n_tokens > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "embedding: %lld tokens at once; at most %d",
                       (long long)a->n_tokens, INT_MAX);
    if (rows_aligned(a->grad_weight, n) && rows_aligned(a->grad_residual, n))
        HT_LAUNCH(be, embedding_backward_kernel<4>,
                  dim3(tokens, (unsigned)ceil_div(n, 4 * kThreads)), kThreads, 0, a->grad_weight,
                  a->grad_residual, a->ids, (int)a->n_tokens, n, a->vocab_size, a->multiplier);
    else
        HT_LAUNCH(be, embedding_backward_kernel<1>, dim3(tokens, (unsigned)ceil_div(n, kThreads)),
                  kThreads, 0, a->grad_weight, a->grad_residual, a->ids, (int)a->n_tokens, n,
                  a->vocab_size, a->multiplier);
    return ht_cuda_check_launch(be, "embedding_backward");
}
