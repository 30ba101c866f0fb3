/* core/ops/adamw_cpu.c: AdamW step and sum of squares (adamw.h). Bound by memory:
 * the step reads 16 and writes 14 (bf16 weights) or 16 bytes per parameter.
 *
 * The last elements that do not fill a vector go through the same vector instructions, so where a
 * slice begins or ends does not change the result.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum {
    BLOCK = 4096, // elements per unit of work and per partial sum
    SUMS = 1024   // partial sums per pass over the threads: 8 KiB of stack, 16 MiB of input
};

struct constants {
    float scale, b1, b2, one_b1, one_b2, rate, c2_inv, eps, decay;
};

static inline ht_vf vf_sqrt(ht_vf v)
{
    for (int i = 0; i < HT_VLEN; i++) v[i] = sqrtf(v[i]); // one instruction after the compiler
    return v;
}

/* New master; m and v are updated in place.  rate = lr / c1, decay = lr * weight_decay */
static inline ht_vf update(ht_vf w, ht_vf *m, ht_vf *v, ht_vf g, const struct constants *c)
{
    g *= c->scale;
    *m = c->b1 * *m + c->one_b1 * g;
    *v = c->b2 * *v + c->one_b2 * g * g;
    return w - (c->rate * *m / (vf_sqrt(*v * c->c2_inv) + c->eps) + c->decay * w);
}

static void step_block(const struct ht_adamw_args *a, const struct constants *k, int64_t i0,
                       int64_t i1, const enum ht_dtype d)
{
    int64_t i = i0;

    for (; i + HT_VLEN <= i1; i += HT_VLEN) {
        ht_vf m = vf_load(a->exp_avg + i), v = vf_load(a->exp_avg_sq + i);
        const ht_vf w = update(vf_load(a->master + i), &m, &v, vf_load(a->grad + i), k);
        vf_store(a->exp_avg + i, m);
        vf_store(a->exp_avg_sq + i, v);
        vf_store(a->master + i, w);
        vf_store_any(a->weight, i, d, w);
    }
    if (i < i1) {
        const int64_t n = i1 - i;
        ht_vf m = vf_load_n(a->exp_avg + i, n), v = vf_load_n(a->exp_avg_sq + i, n);
        const ht_vf w = update(vf_load_n(a->master + i, n), &m, &v, vf_load_n(a->grad + i, n), k);
        vf_store_n(a->exp_avg + i, m, n);
        vf_store_n(a->exp_avg_sq + i, v, n);
        vf_store_n(a->master + i, w, n);
        if (d == HT_DTYPE_F32)
            vf_store_n((float *)a->weight + i, w, n);
        else
            vf_store_bf16_n((ht_bf16 *)a->weight + i, w, n);
    }
}

enum ht_status HT_ISA_FN(ht_adamw_step_cpu)(struct ht_backend *be, const struct ht_adamw_args *a)
{
    const double c1 = 1.0 - pow((double)a->beta1, (double)a->step);
    const double c2 = 1.0 - pow((double)a->beta2, (double)a->step);
    const float scale = a->clip ? a->grad_scale * *a->clip : a->grad_scale;
    if (a->clip && !isfinite(scale)) return HT_OK;
    const struct constants k = {
        .scale = scale,
        .b1 = a->beta1,
        .b2 = a->beta2,
        .one_b1 = (float)(1.0 - (double)a->beta1),
        .one_b2 = (float)(1.0 - (double)a->beta2),
        .rate = (float)((double)a->lr / c1),
        .c2_inv = (float)(1.0 / c2),
        .eps = a->eps,
        .decay = (float)((double)a->lr * (double)a->weight_decay),
    };
    const int64_t n_blocks = (a->n + BLOCK - 1) / BLOCK;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (n_blocks > 2)
    for (int64_t b = 0; b < n_blocks; b++) {
        const int64_t i0 = b * BLOCK, i1 = i0 + BLOCK < a->n ? i0 + BLOCK : a->n;
        if (a->weight_dtype == HT_DTYPE_F32)
            step_block(a, &k, i0, i1, HT_DTYPE_F32);
        else
            step_block(a, &k, i0, i1, HT_DTYPE_BF16);
    }
    return HT_OK;
}

/* Half a vector of floats fills a vector of doubles. */
enum { DLEN = HT_VLEN / 2 };
typedef float ht_vf_half __attribute__((vector_size(4 * DLEN)));
typedef double ht_vd __attribute__((vector_size(8 * DLEN)));

static inline ht_vd load_double(const float *p)
{
    ht_vf_half v;
    memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, ht_vd);
}

static double block_sum(const float *x, int64_t n)
{
    ht_vd s[4] = { { 0 }, { 0 }, { 0 }, { 0 } };
    double sum = 0.0;
    int64_t i = 0;

    for (; i + 4 * DLEN <= n; i += 4 * DLEN)
        for (int j = 0; j < 4; j++) {
            const ht_vd v = load_double(x + i + j * DLEN);
            s[j] += v * v;
        }
    for (; i < n; i++) sum += (double)x[i] * (double)x[i];
    s[0] = (s[0] + s[1]) + (s[2] + s[3]);
    for (int j = 0; j < DLEN; j++) sum += s[0][j];
    return sum;
}

enum ht_status HT_ISA_FN(ht_sum_squares_cpu)(struct ht_backend *be, double *out, const float *x,
                                             int64_t n)
{
    const int64_t n_blocks = (n + BLOCK - 1) / BLOCK;
    double sums[SUMS], total = 0.0;

    for (int64_t b0 = 0; b0 < n_blocks; b0 += SUMS) {
        const int64_t count = n_blocks - b0 < SUMS ? n_blocks - b0 : SUMS;
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (count > 2)
        for (int64_t b = 0; b < count; b++) {
            const int64_t i0 = (b0 + b) * BLOCK;
            sums[b] = block_sum(x + i0, n - i0 < BLOCK ? n - i0 : BLOCK);
        }
        for (int64_t b = 0; b < count; b++) total += sums[b];
    }
    *out = total;
    return HT_OK;
}
