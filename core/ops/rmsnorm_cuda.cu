/* core/ops/rmsnorm_cuda.cu: residual addition and RMSNorm on CUDA (rmsnorm.h).
 *
 * Bound by memory. Forward: one block per row, which stays in registers between the two passes, so
 * that 4 + 4 + 2*sizeof(T) bytes per element move. Backward: kStrips blocks, each over a strip of
 * rows; a thread keeps its columns of grad_w in registers over the strip and leaves them in
 * scratch, where a second kernel adds the strips in order: no atomics, the same bits on every run.
 *
 * A thread holds kHold elements of a row in groups of W (4, or 1 where rows are not aligned):
 * group g of thread t is columns (g * kThreads + t) * W. 256 threads cover d_model up to 4096,
 * 1024 threads up to 16384.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
}

constexpr int kHold = 16;
constexpr int kStrips = 256; // blocks of the backward: about two per multiprocessor of an H100
constexpr int kMaxColumns = 1024 * kHold;

template <typename T, int kThreads, int W>
static __global__ void __launch_bounds__(kThreads)
    rmsnorm_forward_kernel(T *y, float *r_out, float *rstd, const float *r_in, const T *branch,
                           const float *w, int n, float eps, float branch_scale,
                           bool round_residual)
{
    const int64_t row = (int64_t)blockIdx.x * n;
    float r[kHold / W][W], sum = 0.0f;

#pragma unroll
    for (int g = 0; g < kHold / W; g++) {
        const int i = (g * kThreads + (int)threadIdx.x) * W;
        if (i >= n) break;
        load_n<W>(r[g], r_in + row + i);
        if (branch) {
            float b[W];
            load_n<W>(b, branch + row + i);
            for (int k = 0; k < W; k++) r[g][k] += branch_scale * b[k];
        }
        if (round_residual)
            for (int k = 0; k < W; k++) r[g][k] = round_to<bf16>(r[g][k]);
        if (r_out) store_n<W>(r_out + row + i, r[g]);
        for (int k = 0; k < W; k++) sum += r[g][k] * r[g][k];
    }
    const float scale = 1.0f / sqrtf(block_sum<kThreads>(sum) / (float)n + eps);
    if (rstd && threadIdx.x == 0) rstd[blockIdx.x] = scale;
#pragma unroll
    for (int g = 0; g < kHold / W; g++) {
        const int i = (g * kThreads + (int)threadIdx.x) * W;
        if (i >= n) break;
        float v[W];
        load_n<W>(v, w + i);
        for (int k = 0; k < W; k++) v[k] *= r[g][k] * scale;
        store_n<W>(y + row + i, v);
    }
}

struct backward_args {
    const float *w, *r, *rstd, *grad_r_out;
    const void *grad_y;
    float *grad_r_in, *part; // part (blocks, n)
    void *grad_branch;
    int64_t n_rows, rows_per_block;
    int n;
    float branch_scale;
};

/* grad_r_in may be grad_r_out: each element is read before it is written, by the same thread. */
template <typename T, int kThreads, int W>
static __global__ void __launch_bounds__(kThreads) rmsnorm_backward_kernel(struct backward_args a)
{
    const int64_t t0 = (int64_t)blockIdx.x * a.rows_per_block;
    const int64_t t1 = t0 + a.rows_per_block < a.n_rows ? t0 + a.rows_per_block : a.n_rows;
    const int n = a.n;
    float grad_w[kHold / W][W];

    for (int g = 0; g < kHold / W; g++)
        for (int k = 0; k < W; k++) grad_w[g][k] = 0.0f;
    for (int64_t t = t0; t < t1; t++) {
        const float rstd = a.rstd[t];
        float xh[kHold / W][W], e[kHold / W][W], sum = 0.0f;
#pragma unroll
        for (int g = 0; g < kHold / W; g++) {
            const int i = (g * kThreads + (int)threadIdx.x) * W;
            if (i >= n) break;
            float gy[W], wt[W];
            load_n<W>(xh[g], a.r + t * n + i);
            load_n<W>(gy, (const T *)a.grad_y + t * n + i);
            load_n<W>(wt, a.w + i);
            for (int k = 0; k < W; k++) {
                xh[g][k] *= rstd;
                e[g][k] = wt[k] * gy[k];
                sum += e[g][k] * xh[g][k];
                grad_w[g][k] += gy[k] * xh[g][k];
            }
        }
        const float c = block_sum<kThreads>(sum) / (float)n; // mean(e xh)
#pragma unroll
        for (int g = 0; g < kHold / W; g++) {
            const int i = (g * kThreads + (int)threadIdx.x) * W;
            if (i >= n) break;
            float out[W];
            for (int k = 0; k < W; k++) out[k] = 0.0f;
            if (a.grad_r_out) load_n<W>(out, a.grad_r_out + t * n + i);
            for (int k = 0; k < W; k++) out[k] += rstd * (e[g][k] - c * xh[g][k]);
            store_n<W>(a.grad_r_in + t * n + i, out);
            if (!a.grad_branch) continue;
            for (int k = 0; k < W; k++) out[k] *= a.branch_scale;
            store_n<W>((T *)a.grad_branch + t * n + i, out);
        }
    }
#pragma unroll
    for (int g = 0; g < kHold / W; g++) {
        const int i = (g * kThreads + (int)threadIdx.x) * W;
        if (i < n) store_n<W>(a.part + (int64_t)blockIdx.x * n + i, grad_w[g]);
    }
}

/* grad_w[j] += part[0][j] + part[1][j] + ...: 32 columns per block, 8 ranges of strips side by
 * side. */
static __global__ void __launch_bounds__(256)
    rmsnorm_strips_kernel(float *grad_w, const float *part, int n_strips, int n)
{
    HT_SHARED(float, sums, [8][32]);
    const int j = (int)(blockIdx.x * 32 + threadIdx.x % 32), range = (int)threadIdx.x / 32;
    const int per = (n_strips + 7) / 8, end = min((range + 1) * per, n_strips);
    float sum = 0.0f;

    if (j < n)
        for (int s = range * per; s < end; s++) sum += part[(int64_t)s * n + j];
    sums[range][threadIdx.x % 32] = sum;
    __syncthreads();
    if (range > 0 || j >= n) return;
    for (int r = 1; r < 8; r++) sum += sums[r][threadIdx.x];
    grad_w[j] += sum;
}

/* ---- launchers ---- */

static enum ht_status check_columns(int64_t n, const char *op)
{
    if (n <= kMaxColumns) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: d_model is %lld; the CUDA kernel takes up to %d", op,
                   (long long)n, kMaxColumns);
}

template <typename T, int kThreads, int W>
static void launch_forward(struct ht_backend *be, const struct ht_rmsnorm_args *a)
{
    HT_LAUNCH(be, (rmsnorm_forward_kernel<T, kThreads, W>), (unsigned)a->n_rows, kThreads, 0,
              (T *)a->y, a->r_out, a->rstd, a->r_in, (const T *)a->branch, a->w, (int)a->d_model,
              a->eps, a->branch_scale, a->round_residual);
}

template <typename T>
static enum ht_status forward(struct ht_backend *be, const struct ht_rmsnorm_args *a)
{
    const int64_t n = a->d_model;
    const bool aligned = rows_aligned(a->r_in, n) && rows_aligned(a->r_out, n) &&
                         rows_aligned(a->w, n) &&
                         rows_aligned((const T *)a->branch, n, 4 * sizeof(T)) &&
                         rows_aligned((const T *)a->y, n, 4 * sizeof(T));
    HT_TRY(check_columns(n, "rmsnorm"));
    if (n <= 256 * kHold)
        aligned ? launch_forward<T, 256, 4>(be, a) : launch_forward<T, 256, 1>(be, a);
    else
        aligned ? launch_forward<T, 1024, 4>(be, a) : launch_forward<T, 1024, 1>(be, a);
    return ht_cuda_check_launch(be, "rmsnorm_forward");
}

template <typename T, int kThreads, int W>
static void launch_backward(struct ht_backend *be, const struct backward_args *a, int n_blocks)
{
    HT_LAUNCH(be, (rmsnorm_backward_kernel<T, kThreads, W>), (unsigned)n_blocks, kThreads, 0, *a);
}

template <typename T>
static enum ht_status backward(struct ht_backend *be, const struct ht_rmsnorm_args *a)
{
    const size_t mark = ht_arena_mark(&be->scratch);
    const int64_t n = a->d_model, per = ceil_div(a->n_rows, kStrips);
    const int n_blocks = (int)ceil_div(a->n_rows, per);
    const bool aligned = rows_aligned(a->r_out, n) && rows_aligned(a->w, n) &&
                         rows_aligned(a->grad_r_out, n) && rows_aligned(a->grad_r_in, n) &&
                         rows_aligned((const T *)a->grad_y, n, 4 * sizeof(T)) &&
                         rows_aligned((const T *)a->grad_branch, n, 4 * sizeof(T));
    void *part;

    HT_TRY(check_columns(n, "rmsnorm"));
    HT_TRY(ht_arena_take(&part, &be->scratch, (size_t)(n_blocks * n) * sizeof(float)));
    const struct backward_args k = { a->w,      a->r_out,     a->rstd,       a->grad_r_out,
                                     a->grad_y, a->grad_r_in, (float *)part, a->grad_branch,
                                     a->n_rows, per,          (int)n,        a->branch_scale };
    if (n <= 256 * kHold)
        aligned ? launch_backward<T, 256, 4>(be, &k, n_blocks)
                : launch_backward<T, 256, 1>(be, &k, n_blocks);
    else
        aligned ? launch_backward<T, 1024, 4>(be, &k, n_blocks)
                : launch_backward<T, 1024, 1>(be, &k, n_blocks);
    HT_LAUNCH(be, rmsnorm_strips_kernel, (unsigned)ceil_div(n, 32), 256, 0, a->grad_w,
              (const float *)part, n_blocks, (int)n);
    ht_arena_reset(&be->scratch, mark); // whoever takes it next comes later on the stream
    return ht_cuda_check_launch(be, "rmsnorm_backward");
}

extern "C" enum ht_status ht_rmsnorm_forward_cuda(struct ht_backend *be,
                                                  const struct ht_rmsnorm_args *a)
{
    return HT_DISPATCH(a->dtype, "rmsnorm", forward, be, a);
}

extern "C" enum ht_status ht_rmsnorm_backward_cuda(struct ht_backend *be,
                                                   const struct ht_rmsnorm_args *a)
{
    return HT_DISPATCH(a->dtype, "rmsnorm", backward, be, a);
}
