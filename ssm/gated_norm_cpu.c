/* ssm/gated_norm_cpu.c: gated RMSNorm, forward and backward (gated_norm.h has the equations).
 *
 * Bound by memory and by one exponential per element, which the first pass over a row leaves in a
 * buffer on the stack for the second (rows wider than the buffer compute it twice). grad_w is
 * summed over blocks of HT_GATED_NORM_BLOCK tokens, then over blocks in order, whatever the thread
 * count.
 */
#include "ssm/ssd_cpu.h"

enum { BUFFER = 8192 }; // floats, 32 KiB

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* One group of one row, element offsets j counted from the group's start. */
struct row {
    const struct ht_gated_norm_args *a;
    int64_t y_at, z_at, grad_z_at, j0, width;
    bool more; // another row follows: the second pass fetches it while this one's values are in L1
    enum ht_dtype d;
};

static ALWAYS_INLINE struct row row_at(const struct ht_gated_norm_args *a, int64_t t, int64_t g,
                                       int64_t width, const enum ht_dtype d)
{
    return (struct row){ .a = a,
                         .y_at = t * a->d_inner + g * width,
                         .z_at = t * a->z_stride + g * width,
                         .grad_z_at = t * a->grad_z_stride + g * width,
                         .j0 = g * width,
                         .width = width,
                         .more = t + 1 < a->n_tokens,
                         .d = d };
}

static ALWAYS_INLINE void fetch(const void *p, int64_t i, enum ht_dtype d)
{
    __builtin_prefetch((const char *)p + i * (int64_t)ht_dtype_bytes(d), 0, 3);
}

/* sigmoid(z) of n elements at j: the first pass leaves it in `gates`, the second takes it from
 * there. */
static ALWAYS_INLINE ht_vf gate_put(float *gates, int64_t j, ht_vf z, const int64_t n)
{
    const ht_vf gate = vf_sigmoid(z);
    if (j + n <= BUFFER) ssd_store_n(gates, j, gate, n, HT_DTYPE_F32);
    return gate;
}

static ALWAYS_INLINE ht_vf gate_get(const float *gates, int64_t j, ht_vf z, const int64_t n)
{
    return j + n <= BUFFER ? ssd_load_n(gates, j, n, HT_DTYPE_F32) : vf_sigmoid(z);
}

/* q^2 of n elements at j */
static ALWAYS_INLINE ht_vf forward_square(const struct row *r, float *gates, int64_t j,
                                          const int64_t n)
{
    const ht_vf z = ssd_load_n(r->a->z, r->z_at + j, n, r->d);
    const ht_vf q = ssd_load_n(r->a->y, r->y_at + j, n, r->d) * (z * gate_put(gates, j, z, n));
    return q * q;
}

static ALWAYS_INLINE void forward_store(const struct row *r, const float *gates, int64_t j,
                                        float rstd, const int64_t n)
{
    const struct ht_gated_norm_args *a = r->a;
    const ht_vf z = ssd_load_n(a->z, r->z_at + j, n, r->d);
    const ht_vf q = ssd_load_n(a->y, r->y_at + j, n, r->d) * (z * gate_get(gates, j, z, n));

    if (r->more) {
        fetch(a->z, r->z_at + a->z_stride + j, r->d);
        fetch(a->y, r->y_at + a->d_inner + j, r->d);
    }
    ssd_store_n(a->o, r->y_at + j, ssd_load_n(a->w, r->j0 + j, n, HT_DTYPE_F32) * (q * rstd), n,
                r->d);
}

/* rstd of the group */
static ALWAYS_INLINE float forward_group(const struct ht_gated_norm_args *a, int64_t t, int64_t g,
                                         int64_t width, const enum ht_dtype d)
{
    const struct row r = row_at(a, t, g, width, d);
    ht_vf sum = vf_set(0.0f);
    float gates[BUFFER];
    int64_t j = 0;

    for (; j + HT_VLEN <= width; j += HT_VLEN) sum += forward_square(&r, gates, j, HT_VLEN);
    if (j < width) sum += forward_square(&r, gates, j, width - j);
    const float rstd = 1.0f / sqrtf(ssd_sum(sum) / (float)width + a->eps);
    for (j = 0; j + HT_VLEN <= width; j += HT_VLEN) forward_store(&r, gates, j, rstd, HT_VLEN);
    if (j < width) forward_store(&r, gates, j, rstd, width - j);
    return rstd;
}

enum ht_status HT_ISA_FN(ht_gated_norm_forward_cpu)(struct ht_backend *be,
                                                    const struct ht_gated_norm_args *a)
{
    const int64_t groups = a->full ? 1 : a->n_groups, width = a->d_inner / groups;
    const bool parallel = a->n_tokens * a->d_inner > 4096;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_tokens; t++)
        for (int64_t g = 0; g < groups; g++) {
            const float rstd = a->dtype == HT_DTYPE_F32 // a constant type: loops without branches
                                   ? forward_group(a, t, g, width, HT_DTYPE_F32)
                                   : forward_group(a, t, g, width, HT_DTYPE_BF16);
            if (a->rstd) a->rstd[t * groups + g] = rstd;
        }
    return HT_OK;
}

/* e xh of n elements at j */
static ALWAYS_INLINE ht_vf backward_product(const struct row *r, float *gates, int64_t j,
                                            float rstd, const int64_t n)
{
    const struct ht_gated_norm_args *a = r->a;
    const ht_vf z = ssd_load_n(a->z, r->z_at + j, n, r->d);
    const ht_vf q = ssd_load_n(a->y, r->y_at + j, n, r->d) * (z * gate_put(gates, j, z, n));
    const ht_vf w = ssd_load_n(a->w, r->j0 + j, n, HT_DTYPE_F32);
    return (w * ssd_load_n(a->grad_o, r->y_at + j, n, r->d)) * (q * rstd);
}

static ALWAYS_INLINE void backward_store(const struct row *r, float *grad_w, const float *gates,
                                         int64_t j, float rstd, float c, const int64_t n)
{
    const struct ht_gated_norm_args *a = r->a;
    const ht_vf z = ssd_load_n(a->z, r->z_at + j, n, r->d), gate = gate_get(gates, j, z, n);
    const ht_vf y = ssd_load_n(a->y, r->y_at + j, n, r->d), silu = z * gate, xh = y * silu * rstd;
    const ht_vf w = ssd_load_n(a->w, r->j0 + j, n, HT_DTYPE_F32);
    const ht_vf grad_o = ssd_load_n(a->grad_o, r->y_at + j, n, r->d);
    const ht_vf grad_q = (w * grad_o - xh * c) * rstd;

    if (r->more) {
        fetch(a->z, r->z_at + a->z_stride + j, r->d);
        fetch(a->y, r->y_at + a->d_inner + j, r->d);
        fetch(a->grad_o, r->y_at + a->d_inner + j, r->d);
        fetch(a->grad_z, r->grad_z_at + a->grad_z_stride + j, r->d);
    }
    ssd_store_n(grad_w, r->j0 + j, ssd_load_n(grad_w, r->j0 + j, n, HT_DTYPE_F32) + grad_o * xh, n,
                HT_DTYPE_F32);
    if (a->o) ssd_store_n(a->o, r->y_at + j, w * xh, n, r->d);
    ssd_store_n(a->grad_y, r->y_at + j, grad_q * silu, n, r->d);
    ssd_store_n(a->grad_z, r->grad_z_at + j, grad_q * y * (gate * (1.0f + z * (1.0f - gate))), n,
                r->d);
}

static ALWAYS_INLINE void backward_group(const struct ht_gated_norm_args *a, float *grad_w,
                                         int64_t t, int64_t g, int64_t width, float rstd,
                                         const enum ht_dtype d)
{
    const struct row r = row_at(a, t, g, width, d);
    ht_vf sum = vf_set(0.0f);
    float gates[BUFFER];
    int64_t j = 0;

    for (; j + HT_VLEN <= width; j += HT_VLEN) sum += backward_product(&r, gates, j, rstd, HT_VLEN);
    if (j < width) sum += backward_product(&r, gates, j, rstd, width - j);
    const float c = ssd_sum(sum) / (float)width; // mean(e xh)
    for (j = 0; j + HT_VLEN <= width; j += HT_VLEN)
        backward_store(&r, grad_w, gates, j, rstd, c, HT_VLEN);
    if (j < width) backward_store(&r, grad_w, gates, j, rstd, c, width - j);
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
                        backward_group(a, grad_w, t, g, width, rstd, HT_DTYPE_F32);
                    else
                        backward_group(a, grad_w, t, g, width, rstd, HT_DTYPE_BF16);
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
