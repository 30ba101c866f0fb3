/* distributed/wire_cuda.cu: what a reduction computes on the device besides NCCL's own sums: the
 * sum over micro-batches, and the way from fp32 to a bf16 wire and back.
 *
 *   dst[i] += src[i]            out[i] = bf16(in[i])            out[i] = fp32(in[i])
 *
 * Bound by memory: 12 and 6 bytes a value. Each thread has W values, 16 bytes of fp32 at a time.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "distributed/reduce.h"
}

constexpr int kThreads = 256;

template <int W>
static __global__ void __launch_bounds__(kThreads)
    wire_add_kernel(float *dst, const float *src, int64_t n)
{
    const int64_t i = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * W;
    float a[W], b[W];

    if (i >= n) return;
    load_n<W>(a, dst + i);
    load_n<W>(b, src + i);
    for (int k = 0; k < W; k++) a[k] += b[k];
    store_n<W>(dst + i, a);
}

template <int W, typename To, typename From>
static __global__ void __launch_bounds__(kThreads)
    wire_convert_kernel(To *out, const From *in, int64_t n)
{
    const int64_t i = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * W;
    float v[W];

    if (i >= n) return;
    load_n<W>(v, in + i);
    store_n<W>(out + i, v);
}

static unsigned blocks_of(int64_t n, int w)
{
    return (unsigned)ceil_div(n, (int64_t)kThreads * w);
}

extern "C" enum ht_status ht_reduce_add_cuda(struct ht_backend *be, float *dst, const float *src,
                                             int64_t n)
{
    if (n == 0) return HT_OK;
    if (rows_aligned(dst, n) && rows_aligned(src, n))
        HT_LAUNCH(be, wire_add_kernel<4>, blocks_of(n, 4), kThreads, 0, dst, src, n);
    else
        HT_LAUNCH(be, wire_add_kernel<1>, blocks_of(n, 1), kThreads, 0, dst, src, n);
    return ht_cuda_check_launch(be, "adding gradients");
}

template <typename To, typename From>
static enum ht_status convert(struct ht_backend *be, To *out, const From *in, int64_t n)
{
    constexpr int kWide = 8;

    if (n == 0) return HT_OK;
    if (n % kWide == 0 && rows_aligned(out, n) && rows_aligned(in, n))
        HT_LAUNCH(be, (wire_convert_kernel<kWide, To, From>), blocks_of(n, kWide), kThreads, 0, out,
                  in, n);
    else
        HT_LAUNCH(be, (wire_convert_kernel<1, To, From>), blocks_of(n, 1), kThreads, 0, out, in, n);
    return ht_cuda_check_launch(be, "converting gradients");
}

extern "C" enum ht_status ht_reduce_round_cuda(struct ht_backend *be, void *out, const float *in,
                                               int64_t n)
{
    return convert(be, (bf16 *)out, in, n);
}

extern "C" enum ht_status ht_reduce_widen_cuda(struct ht_backend *be, float *out, const void *in,
                                               int64_t n)
{
    return convert(be, out, (const bf16 *)in, n);
}
