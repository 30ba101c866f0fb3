/* ssm/gated_norm_cpu.c: gated RMSNorm, forward and backward (gated_norm.h has the equations).
 *
 * Bound by memory and by one exponential per element, which the first pass over a row leaves in a
 * buffer on the stack for the second (rows wider than the buffer compute it twice). grad_w is
 * summed over blocks of HT_GATED_NORM_BLOCK tokens, then over blocks in order, whatever the thread
 * count.
 */
#include "ssm/ssd_cpu.h"

enum { BUFFER = 8192 }; // floats, 32 KiB

/* sigmoid(z) of elements j.. of a row; ws holds what the first pass stored. */
static inline ht_vf gate_at(const float *ws, int64_t j, ht_vf z, int64_t n)
{
    return j + n <= BUFFER ? ssd_load_n(ws, j, n, HT_DTYPE_F32) : vf_sigmoid(z);
}

static void forward_group(const struct ht_gated_norm_args *a, int64_t t, int64_t j0, int64_t width,
                          int64_t group, int64_t groups, const enum ht_dtype d)
{
    const int64_t y_at = t * a->d_inner + j0, z_at = t * a->z_stride + j0;
    ht_vf sum = vf_set(0.0f);
    float ws[BUFFER];

    for (int64_t j = 0; j < width; j += HT_VLEN) {
        const int64_t n = width - j < HT_VLEN ? width - j : HT_VLEN;
        const ht_vf z = ssd_load_n(a->z, z_at + j, n, d), gate = vf_sigmoid(z);
        const ht_vf q = ssd_load_n(a->y, y_at + j, n, d) * (z * gate);
        if (j + n <= BUFFER) ssd_store_n(ws, j, gate, n, HT_DTYPE_F32);
        sum += q * q;
    }
    const float rstd = 1.0f / sqrtf(ssd_sum(sum) / (float)width + a->eps);
    if (a->rstd) a->rstd[t * groups + group] = rstd;
    for (int64_t j = 0; j < width; j += HT_VLEN) {
        const int64_t n = width - j < HT_VLEN ? width - j : HT_VLEN;
        const ht_vf z = ssd_load_n(a->z, z_at + j, n, d);
        const ht_vf q = ssd_load_n(a->y, y_at + j, n, d) * (z * gate_at(ws, j, z, n));
        const ht_vf w = ssd_load_n(a->w, j0 + j, n, HT_DTYPE_F32);
        ssd_store_n(a->o, y_at + j, w * (q * rstd), n, d);
    }
}

enum ht_status HT_ISA_FN(ht_gated_norm_forward_cpu)(struct ht_backend *be,
                                                    const struct ht_gated_norm_args *a)
{
    const int64_t groups = a->full ? 1 : a->n_groups, width = a->d_inner / groups;
    const bool parallel = a->n_tokens * a->d_inner > 4096;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_tokens; t++)
        for (int64_t g = 0; g < groups; g++) {
            if (a->dtype == HT_DTYPE_F32) // a constant type makes loops without branches
                forward_group(a, t, g * width, width, g, groups, HT_DTYPE_F32);
            else
                forward_group(a, t, g * width, width, g, groups, HT_DTYPE_BF16);
        }
    return HT_OK;
}

static void backward_group(const struct ht_gated_norm_args *a, float *grad_w, int64_t t, int64_t j0,
                           int64_t width, float rstd, const enum ht_dtype d)
{
    const int64_t y_at = t * a->d_inner + j0, z_at = t * a->z_stride + j0;
    ht_vf sum = vf_set(0.0f);
    float ws[BUFFER];

    for (int64_t j = 0; j < width; j += HT_VLEN) {
        const int64_t n = width - j < HT_VLEN ? width - j : HT_VLEN;
        const ht_vf z = ssd_load_n(a->z, z_at + j, n, d), gate = vf_sigmoid(z);
        const ht_vf q = ssd_load_n(a->y, y_at + j, n, d) * (z * gate);
        const ht_vf w = ssd_load_n(a->w, j0 + j, n, HT_DTYPE_F32);
        if (j + n <= BUFFER) ssd_store_n(ws, j, gate, n, HT_DTYPE_F32);
        sum += (w * ssd_load_n(a->grad_o, y_at + j, n, d)) * (q * rstd);
    }
    const float c = ssd_sum(sum) / (float)width; // mean(e xh)
    for (int64_t j = 0; j < width; j += HT_VLEN) {
        const int64_t n = width - j < HT_VLEN ? width - j : HT_VLEN;
        const ht_vf z = ssd_load_n(a->z, z_at + j, n, d), gate = gate_at(ws, j, z, n);
        const ht_vf y = ssd_load_n(a->y, y_at + j, n, d), silu = z * gate, xh = y * silu * rstd;
        const ht_vf w = ssd_load_n(a->w, j0 + j, n, HT_DTYPE_F32);
        const ht_vf grad_o = ssd_load_n(a->grad_o, y_at + j, n, d);
        const ht_vf grad_q = (w * grad_o - xh * c) * rstd;
        ssd_store_n(grad_w, j0 + j, ssd_load_n(grad_w, j0 + j, n, HT_DTYPE_F32) + grad_o * xh, n,
                    HT_DTYPE_F32);
        if (a->o) ssd_store_n(a->o, y_at + j, w * xh, n, d);
        ssd_store_n(a->grad_y, y_at + j, grad_q * silu, n, d);
        ssd_store_n(a->grad_z, t * a->grad_z_stride + j0 + j,
                    grad_q * y * (gate * (1.0f + z * (1.0f - gate))), n, d);
    }
}

enum ht_status HT_ISA_FN(ht_gated_norm_backward_cpu)(struct ht_backend *be,
                                                     const struct ht_gated_norm_args *a)
{
    const int64_t groups = a->full ? 1 : a->n_groups, width = a->d_inner / groups;
    const int64_t blocks = (a->n_tokens + HT_GATED_NORM_BLOCK - 1) / HT_GATED_NORM_BLOCK;
    const size_t mark = ht_arena_mark(&be->scratch);
    void *p;

    HT_TRY(ht_arena_take(&p, &be->scratch, ht_gated_norm_scratch_bytes(a->n_tokens, a->d_inner)));
    float *partial = p; // (blocks, d_inner)
#pragma omp parallel num_threads(be->n_threads) if (blocks > 1)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t t1 = (b + 1) * HT_GATED_NORM_BLOCK;
            float *grad_w = partial + b * a->d_inner;
            memset(grad_w, 0, (size_t)a->d_inner * sizeof *grad_w);
            for (int64_t t = b * HT_GATED_NORM_BLOCK; t < t1 && t < a->n_tokens; t++)
                for (int64_t g = 0; g < groups; g++) {
                    const float rstd = a->rstd[t * groups + g];
                    if (a->dtype == HT_DTYPE_F32)
                        backward_group(a, grad_w, t, g * width, width, rstd, HT_DTYPE_F32);
                    else
                        backward_group(a, grad_w, t, g * width, width, rstd, HT_DTYPE_BF16);
                }
        }
#pragma omp for schedule(static)
        for (int64_t j = 0; j < a->d_inner; j += HT_VLEN) {
            const int64_t n = a->d_inner - j;
            ht_vf sum = vf_set(0.0f);
            for (int64_t b = 0; b < blocks; b++)
                sum += ssd_load_n(partial + b * a->d_inner, j, n, HT_DTYPE_F32);
            ssd_store_n(a->grad_w, j, ssd_load_n(a->grad_w, j, n, HT_DTYPE_F32) + sum, n,
                        HT_DTYPE_F32);
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
