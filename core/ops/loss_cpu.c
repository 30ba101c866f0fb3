/* core/ops/loss_cpu.c: softmax, cross-entropy and gradient of a block of logits (core_ops.h).
 *
 * One thread takes a row, which stays in its L2 (128k entries are 512 KiB): a pass for the maximum,
 * a pass for the exponentials (kept in place when the gradient is wanted), a pass that scales and
 * converts. Partial sums of SUM_BLOCK exponentials are fp32, their total fp64: lse does not lose
 * bits with the vocabulary. A NaN or infinity among the logits gives a NaN lse (the maximum may
 * skip a NaN, the sum cannot; inf - inf is NaN).
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum { SUM_BLOCK = 2048 };

static float row_max(const float *x, int64_t n)
{
    ht_vf m0 = vf_set(-INFINITY), m1 = m0;
    int64_t i = 0;

    for (; i + 2 * HT_VLEN <= n; i += 2 * HT_VLEN) {
        m0 = vf_max(m0, vf_load(x + i));
        m1 = vf_max(m1, vf_load(x + i + HT_VLEN));
    }
    float m = vf_max_lane(vf_max(m0, m1));
    for (; i < n; i++) m = x[i] > m ? x[i] : m;
    return m;
}

/* sum_i exp(scale * (x[i] - max)); with `keep` the exponentials replace x. */
static double row_exp_sum(float *x, int64_t n, float scale, float max, const bool keep)
{
    double total = 0.0;

    for (int64_t b = 0; b < n; b += SUM_BLOCK) {
        const int64_t end = b + SUM_BLOCK < n ? b + SUM_BLOCK : n;
        ht_vf s0 = vf_set(0.0f), s1 = s0;
        int64_t i = b;
        for (; i + 2 * HT_VLEN <= end; i += 2 * HT_VLEN) {
            const ht_vf e0 = vf_exp((vf_load(x + i) - max) * scale);
            const ht_vf e1 = vf_exp((vf_load(x + i + HT_VLEN) - max) * scale);
            s0 += e0;
            s1 += e1;
            if (keep) {
                vf_store(x + i, e0);
                vf_store(x + i + HT_VLEN, e1);
            }
        }
        total += (double)vf_sum(s0 + s1);
        for (; i < end; i++) {
            const float e = vf_exp(vf_set((x[i] - max) * scale))[0];
            total += (double)e;
            if (keep) x[i] = e;
        }
    }
    return total;
}

/* The row times factor, in place: bf16 fills the first half. A store never passes a later load,
 * because element i of the result starts at or before element i of the source. */
static void row_scale(float *x, int64_t n, float factor, const enum ht_dtype d)
{
    int64_t i = 0;

    for (; i + HT_VLEN <= n; i += HT_VLEN) vf_store_any(x, i, d, vf_load(x + i) * factor);
    for (; i < n; i++) ht_store_f32(x, i, d, x[i] * factor);
}

static void softmax_row(const struct ht_softmax_ce_args *a, int64_t r, const enum ht_dtype d)
{
    const int64_t n = a->vocab_size;
    const int32_t label = a->labels[r];
    float *x = a->logits + r * n;

    a->lse[r] = a->logprob[r] = 0.0;
    if (label < 0) {
        if (a->want_grad) memset(x, 0, (size_t)n * ht_dtype_bytes(d));
        return;
    }
    const float of_label = x[label], max = row_max(x, n);
    const double sum = a->want_grad ? row_exp_sum(x, n, a->logit_scale, max, true)
                                    : row_exp_sum(x, n, a->logit_scale, max, false);
    const double scale = (double)a->logit_scale;
    const double log_sum = log(sum);
    a->lse[r] = scale * (double)max + log_sum;
    a->logprob[r] = scale * ((double)of_label - (double)max) - log_sum;
    if (!a->want_grad) return;

    // the label's entry on its own, in fp64: softmax - 1 would cancel in the type of the gradient
    const double z = 2.0 * (double)a->z_coef * a->lse[r], p = exp(a->logprob[r]);
    const float at_label = (float)((double)a->grad_scale * (p * (1.0 + z) - 1.0));
    row_scale(x, n, (float)((double)a->grad_scale * (1.0 + z) / sum), d);
    ht_store_f32(x, label, d, at_label);
}

enum ht_status HT_ISA_FN(ht_softmax_ce_cpu)(struct ht_backend *be,
                                            const struct ht_softmax_ce_args *a)
{
    const bool parallel = a->n_rows * a->vocab_size > 4096;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t r = 0; r < a->n_rows; r++) {
        if (a->dtype == HT_DTYPE_F32)
            softmax_row(a, r, HT_DTYPE_F32);
        else
            softmax_row(a, r, HT_DTYPE_BF16);
    }
    return HT_OK;
}
