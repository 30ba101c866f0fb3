/* core/ops/rmsnorm_cpu.c: residual addition and RMSNorm, forward and backward (rmsnorm.h).
 *
 * Bound by memory. Forward: a row is read from memory once, then again from L1 for y. Backward
 * works on blocks of ROW_BLOCK rows: first row by row (grad_r_in, grad_branch), then column by
 * column over the same block while it is in cache (grad_w). Each column's sum runs over rows in
 * order within a block and blocks are added in order, so the bits do not depend on the thread
 * count, and no scratch is needed.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum {
    ROW_BLOCK = 64,     // 64 rows x 4096 x 6 bytes = 1.5 MiB: L2 of two cores
    COL_BLOCK = 64,     // floats of grad_w that stay in registers over a block of rows
    PARALLEL_MIN = 8192 // elements below which a parallel region costs more than the work
};

static inline ht_vf load_n(const void *p, int64_t i, int64_t n, enum ht_dtype d)
{
    return d == HT_DTYPE_F32 ? vf_load_n((const float *)p + i, n)
                             : vf_load_bf16_n((const ht_bf16 *)p + i, n);
}

static inline void store_n(void *p, int64_t i, ht_vf v, int64_t n, enum ht_dtype d)
{
    if (d == HT_DTYPE_F32)
        vf_store_n((float *)p + i, v, n);
    else
        vf_store_bf16_n((ht_bf16 *)p + i, v, n);
}

/* r_out of HT_VLEN elements */
static inline ht_vf residual(ht_vf r, ht_vf branch, ht_vf scale, bool round)
{
    const ht_vf sum = r + scale * branch;
    return round ? vf_from_bf16(vf_to_bf16(sum)) : sum;
}

static void forward_row(const struct ht_rmsnorm_args *a, int64_t t, const enum ht_dtype d)
{
    const int64_t n = a->d_model, row = t * n, whole = n - n % HT_VLEN;
    const float *r_in = a->r_in + row;
    float *r_out = a->r_out ? a->r_out + row : NULL;
    const float *r = r_out ? r_out : r_in;
    const ht_vf scale = vf_set(a->branch_scale), zero = vf_set(0.0f);
    ht_vf sum = zero;
    int64_t i;

    for (i = 0; i < whole; i += HT_VLEN) {
        ht_vf v = vf_load(r_in + i);
        if (r_out) {
            v = residual(v, a->branch ? vf_load_any(a->branch, row + i, d) : zero, scale,
                         a->round_residual);
            vf_store(r_out + i, v);
        }
        sum += v * v;
    }
    if (i < n) {
        ht_vf v = vf_load_n(r_in + i, n - i);
        if (r_out) {
            v = residual(v, a->branch ? load_n(a->branch, row + i, n - i, d) : zero, scale,
                         a->round_residual);
            vf_store_n(r_out + i, v, n - i);
        }
        sum += v * v;
    }
    const float rstd = 1.0f / sqrtf(vf_sum(sum) / (float)n + a->eps);
    if (a->rstd) a->rstd[t] = rstd;
    for (i = 0; i < whole; i += HT_VLEN)
        vf_store_any(a->y, row + i, d, vf_load(a->w + i) * (vf_load(r + i) * rstd));
    if (i < n)
        store_n(a->y, row + i, vf_load_n(a->w + i, n - i) * (vf_load_n(r + i, n - i) * rstd), n - i,
                d);
}

enum ht_status HT_ISA_FN(ht_rmsnorm_forward_cpu)(struct ht_backend *be,
                                                 const struct ht_rmsnorm_args *a)
{
    const bool parallel = a->n_rows * a->d_model > PARALLEL_MIN;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_rows; t++) {
        if (a->dtype == HT_DTYPE_F32) // a constant type makes a loop without branches
            forward_row(a, t, HT_DTYPE_F32);
        else
            forward_row(a, t, HT_DTYPE_BF16);
    }
    return HT_OK;
}

static inline ht_vf grad_residual(ht_vf gr, ht_vf e, ht_vf xh, float rstd, float c)
{
    return gr + rstd * (e - c * xh);
}

/* grad_r_in and grad_branch of one row. */
static void backward_row(const struct ht_rmsnorm_args *a, int64_t t, const enum ht_dtype d)
{
    const int64_t n = a->d_model, row = t * n, whole = n - n % HT_VLEN;
    const float *r = a->r_out + row, *gr = a->grad_r_out ? a->grad_r_out + row : NULL;
    const float rstd = a->rstd[t];
    const ht_vf zero = vf_set(0.0f);
    ht_vf sum = zero;
    int64_t i;

    for (i = 0; i < whole; i += HT_VLEN)
        sum += vf_load(a->w + i) * vf_load_any(a->grad_y, row + i, d) * vf_load(r + i);
    if (i < n)
        sum += vf_load_n(a->w + i, n - i) * load_n(a->grad_y, row + i, n - i, d) *
               vf_load_n(r + i, n - i);
    const float c = vf_sum(sum) * rstd / (float)n; // mean(e xh)
    for (i = 0; i < whole; i += HT_VLEN) {
        const ht_vf e = vf_load(a->w + i) * vf_load_any(a->grad_y, row + i, d);
        const ht_vf g =
            grad_residual(gr ? vf_load(gr + i) : zero, e, vf_load(r + i) * rstd, rstd, c);
        vf_store(a->grad_r_in + row + i, g);
        if (a->grad_branch) vf_store_any(a->grad_branch, row + i, d, a->branch_scale * g);
    }
    if (i < n) {
        const int64_t left = n - i;
        const ht_vf e = vf_load_n(a->w + i, left) * load_n(a->grad_y, row + i, left, d);
        const ht_vf g = grad_residual(gr ? vf_load_n(gr + i, left) : zero, e,
                                      vf_load_n(r + i, left) * rstd, rstd, c);
        vf_store_n(a->grad_r_in + row + i, g, left);
        if (a->grad_branch) store_n(a->grad_branch, row + i, a->branch_scale * g, left, d);
    }
}

/* grad_w[j0 .. j0+COL_BLOCK) += rows t0 .. t1-1 of grad_y * xh */
static void backward_columns(const struct ht_rmsnorm_args *a, int64_t t0, int64_t t1, int64_t j0,
                             const enum ht_dtype d)
{
    const int64_t n = a->d_model, j1 = j0 + COL_BLOCK < n ? j0 + COL_BLOCK : n;
    ht_vf sum[COL_BLOCK / HT_VLEN];

    for (int v = 0; v < COL_BLOCK / HT_VLEN; v++) sum[v] = vf_set(0.0f);
    if (j1 - j0 == COL_BLOCK) {
        for (int64_t t = t0; t < t1; t++)
            for (int v = 0; v < COL_BLOCK / HT_VLEN; v++) {
                const int64_t i = t * n + j0 + v * HT_VLEN;
                sum[v] += vf_load_any(a->grad_y, i, d) * (vf_load(a->r_out + i) * a->rstd[t]);
            }
        for (int v = 0; v < COL_BLOCK / HT_VLEN; v++) {
            float *gw = a->grad_w + j0 + v * HT_VLEN;
            vf_store(gw, vf_load(gw) + sum[v]);
        }
        return;
    }
    for (int64_t j = j0; j < j1; j++) { // the ragged end of d_model
        float s = 0.0f;
        for (int64_t t = t0; t < t1; t++)
            s += ht_load_f32(a->grad_y, t * n + j, d) * (a->r_out[t * n + j] * a->rstd[t]);
        a->grad_w[j] += s;
    }
}

enum ht_status HT_ISA_FN(ht_rmsnorm_backward_cpu)(struct ht_backend *be,
                                                  const struct ht_rmsnorm_args *a)
{
    const bool f32 = a->dtype == HT_DTYPE_F32, parallel = a->n_rows * a->d_model > PARALLEL_MIN;

#pragma omp parallel num_threads(be->n_threads) if (parallel)
    for (int64_t t0 = 0; t0 < a->n_rows; t0 += ROW_BLOCK) {
        const int64_t t1 = t0 + ROW_BLOCK < a->n_rows ? t0 + ROW_BLOCK : a->n_rows;
        // no barrier between the loops: the second only reads what neither writes
#pragma omp for schedule(static) nowait
        for (int64_t t = t0; t < t1; t++) {
            if (f32)
                backward_row(a, t, HT_DTYPE_F32);
            else
                backward_row(a, t, HT_DTYPE_BF16);
        }
#pragma omp for schedule(static) nowait
        for (int64_t j = 0; j < a->d_model; j += COL_BLOCK) {
            if (f32)
                backward_columns(a, t0, t1, j, HT_DTYPE_F32);
            else
                backward_columns(a, t0, t1, j, HT_DTYPE_BF16);
        }
    }
    return HT_OK;
}
