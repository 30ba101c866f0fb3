/* core/ops/adamw_cuda.cu: AdamW, sum of squares and clipping on CUDA (adamw.h).
 *
 * The step is bound by memory: 16 bytes read and 12 + sizeof(weight) written per parameter. Its
 * clipping factor is read from device memory, so nothing waits for the gradient's norm. The sum of
 * squares has two stages in a fixed order: kPartials ranges of whole SQUARE_BLOCKs, then one block.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
}

constexpr int kThreads = 256;
constexpr int kPartials = 1024;
constexpr int64_t kSquareBlock = 4096; // elements: ranges begin at multiples of it

struct constants {
    float scale, b1, b2, one_b1, one_b2, rate, c2_inv, eps, decay;
};

template <typename T, int W>
static __global__ void __launch_bounds__(kThreads)
    adamw_step_kernel(float *master, float *exp_avg, float *exp_avg_sq, T *weight,
                      const float *grad, int64_t n, struct constants c, const float *clip)
{
    const int64_t stride = (int64_t)gridDim.x * kThreads * W;

    if (clip) {
        c.scale *= *clip;
        if (!isfinite(c.scale)) return; // a gradient without a norm changes nothing
    }
    for (int64_t i = ((int64_t)blockIdx.x * kThreads + threadIdx.x) * W; i < n; i += stride) {
        float w[W], m[W], v[W], g[W];
        load_n<W>(w, master + i);
        load_n<W>(m, exp_avg + i);
        load_n<W>(v, exp_avg_sq + i);
        load_n<W>(g, grad + i);
        for (int k = 0; k < W; k++) {
            // fma by name: the compiler's choice could differ between the kernels of a slice
            const float s = g[k] * c.scale;
            m[k] = fmaf(c.b1, m[k], c.one_b1 * s);
            v[k] = fmaf(c.b2, v[k], c.one_b2 * s * s);
            const float update = c.rate * m[k] / (sqrtf(v[k] * c.c2_inv) + c.eps);
            w[k] -= fmaf(c.decay, w[k], update);
        }
        store_n<W>(master + i, w);
        store_n<W>(exp_avg + i, m);
        store_n<W>(exp_avg_sq + i, v);
        store_n<W>(weight + i, w);
    }
}

template <typename T>
static enum ht_status step(struct ht_backend *be, const struct ht_adamw_args *a)
{
    const double c1 = 1.0 - pow((double)a->beta1, (double)a->step);
    const double c2 = 1.0 - pow((double)a->beta2, (double)a->step);
    const struct constants c = { a->grad_scale,
                                 a->beta1,
                                 a->beta2,
                                 (float)(1.0 - (double)a->beta1),
                                 (float)(1.0 - (double)a->beta2),
                                 (float)((double)a->lr / c1),
                                 (float)(1.0 / c2),
                                 a->eps,
                                 (float)((double)a->lr * (double)a->weight_decay) };
    T *weight = (T *)a->weight;
    const bool aligned = rows_aligned(a->master, 4) && rows_aligned(a->exp_avg, 4) &&
                         rows_aligned(a->exp_avg_sq, 4) && rows_aligned(a->grad, 4) &&
                         rows_aligned(weight, 4, 4 * sizeof(T));
    const int64_t most = (int64_t)ht_cuda_device_of(be)->n_sms * 8; // 8 blocks of 256 fill an SM
    const int64_t whole = aligned ? a->n / 4 * 4 : 0, rest = a->n - whole;

    if (whole > 0)
        HT_LAUNCH(be, (adamw_step_kernel<T, 4>), (unsigned)min(ceil_div(whole, 4 * kThreads), most),
                  kThreads, 0, a->master, a->exp_avg, a->exp_avg_sq, weight, a->grad, whole, c,
                  a->clip);
    if (rest > 0) // what does not fill four, or all of an unaligned slice
        HT_LAUNCH(be, (adamw_step_kernel<T, 1>), (unsigned)min(ceil_div(rest, kThreads), most),
                  kThreads, 0, a->master + whole, a->exp_avg + whole, a->exp_avg_sq + whole,
                  weight + whole, a->grad + whole, rest, c, a->clip);
    return ht_cuda_check_launch(be, "adamw_step");
}

extern "C" enum ht_status ht_adamw_step_cuda(struct ht_backend *be, const struct ht_adamw_args *a)
{
    return HT_DISPATCH(a->weight_dtype, "adamw", step, be, a);
}

/* ---- sum of squares ---- */

static __global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(double *part, const float *x, int64_t n, int64_t per_block)
{
    const int64_t i0 = (int64_t)blockIdx.x * per_block, i1 = min(i0 + per_block, n);
    double sum = 0.0;

    for (int64_t i = i0 + threadIdx.x; i < i1; i += kThreads) sum += (double)x[i] * (double)x[i];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

static __global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(double *out, const double *part, int n)
{
    double sum = 0.0;

    for (int i = (int)threadIdx.x; i < n; i += kThreads) sum += part[i];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) *out = sum;
}

extern "C" enum ht_status ht_sum_squares_cuda(struct ht_backend *be, double *out, const float *x,
                                              int64_t n)
{
    const size_t mark = ht_arena_mark(&be->scratch);
    const int64_t per_block = ceil_div(ceil_div(n, kSquareBlock), kPartials) * kSquareBlock;
    const int n_blocks = (int)ceil_div(n, per_block);
    void *part;

    HT_TRY(ht_arena_take(&part, &be->scratch, kPartials * sizeof(double)));
    HT_LAUNCH(be, sum_squares_kernel, (unsigned)n_blocks, kThreads, 0, (double *)part, x, n,
              per_block);
    HT_LAUNCH(be, sum_partials_kernel, 1, kThreads, 0, out, (const double *)part, n_blocks);
    ht_arena_reset(&be->scratch, mark);
    return ht_cuda_check_launch(be, "sum_squares");
}

/* One block per column. */
static __global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(double *out, const double *x, int64_t n_rows, int64_t n_columns)
{
    double sum = 0.0;

    for (int64_t r = threadIdx.x; r < n_rows; r += kThreads) sum += x[r * n_columns + blockIdx.x];
    sum = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

extern "C" enum ht_status ht_sum_rows_cuda(struct ht_backend *be, double *out, const double *x,
                                           int64_t n_rows, int64_t n_columns)
{
    HT_LAUNCH(be, sum_rows_kernel, (unsigned)n_columns, kThreads, 0, out, x, n_rows, n_columns);
    return ht_cuda_check_launch(be, "sum_rows");
}

static __global__ void clip_factor_kernel(float *clip, const double *squares, const double *loss,
                                          double grad_scale, double max_norm)
{
    const double norm = sqrt(*squares) * grad_scale;
    *clip = !isfinite(norm) || (loss && !isfinite(*loss)) ? NAN
            : max_norm > 0.0 && norm > max_norm           ? (float)(max_norm / norm)
                                                          : 1.0f;
}

extern "C" enum ht_status ht_clip_factor_cuda(struct ht_backend *be, float *clip,
                                              const double *squares, const double *loss,
                                              double grad_scale, double max_norm)
{
    HT_LAUNCH(be, clip_factor_kernel, 1, 1, 0, clip, squares, loss, grad_scale, max_norm);
    return ht_cuda_check_launch(be, "clip_factor");
}
