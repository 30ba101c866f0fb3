/* tests/ref/attention_ref.c: fp64 loops. */
#include "tests/ref/attention_ref.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/dtype.h"

static double rounded(const struct attention_ref *a, double x)
{
    return a->round16 ? (double)ht_bf16_to_f32(ht_f32_to_bf16((float)x)) : x;
}

static double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

/* Probabilities of query t over keys first..t into p[0..t-first]; returns logsumexp. */
static double probabilities(const struct attention_ref *a, int64_t first, int64_t t, int64_t head,
                            double *p)
{
    const int64_t d = a->d_head, width = (a->n_heads + 2 * a->n_kv_heads) * d;
    const int64_t kv = head / (a->n_heads / a->n_kv_heads);
    const double *q = a->qkv + t * width + head * d;
    double max = -INFINITY, sum = 0.0;

    for (int64_t s = first; s <= t; s++) {
        const double *k = a->qkv + s * width + (a->n_heads + kv) * d;
        p[s - first] = rounded(a, a->scale * dot(q, k, d));
        max = fmax(max, p[s - first]);
    }
    for (int64_t s = first; s <= t; s++) sum += exp(p[s - first] - max);
    for (int64_t s = first; s <= t; s++) p[s - first] = rounded(a, exp(p[s - first] - max) / sum);
    return max + log(sum);
}

void attention_ref_forward(const struct attention_ref *a)
{
    const int64_t d = a->d_head, width = (a->n_heads + 2 * a->n_kv_heads) * d;
    const int64_t group = a->n_heads / a->n_kv_heads, n_tokens = a->starts[a->n_seqs];
    double *p = malloc((size_t)n_tokens * sizeof *p);

    for (int64_t seq = 0; seq < a->n_seqs; seq++)
        for (int64_t t = a->starts[seq]; t < a->starts[seq + 1]; t++)
            for (int64_t h = 0; h < a->n_heads; h++) {
                const int64_t first = a->starts[seq];
                const double lse = probabilities(a, first, t, h, p);
                if (a->lse) a->lse[t * a->n_heads + h] = lse;
                for (int64_t i = 0; i < d; i++) {
                    double sum = 0.0;
                    for (int64_t s = first; s <= t; s++)
                        sum += p[s - first] *
                               a->qkv[s * width + (a->n_heads + a->n_kv_heads + h / group) * d + i];
                    a->o[(t * a->n_heads + h) * d + i] = rounded(a, sum);
                }
            }
    free(p);
}

void attention_ref_backward(const struct attention_ref *a)
{
    const int64_t d = a->d_head, width = (a->n_heads + 2 * a->n_kv_heads) * d;
    const int64_t group = a->n_heads / a->n_kv_heads, n_tokens = a->starts[a->n_seqs];
    double *p = malloc((size_t)n_tokens * sizeof *p),
           *grad_p = malloc((size_t)n_tokens * sizeof *p);

    memset(a->grad_qkv, 0, (size_t)(n_tokens * width) * sizeof(double));
    for (int64_t seq = 0; seq < a->n_seqs; seq++)
        for (int64_t t = a->starts[seq]; t < a->starts[seq + 1]; t++)
            for (int64_t h = 0; h < a->n_heads; h++) {
                const int64_t first = a->starts[seq], q_at = t * width + h * d;
                const double *grad_o = a->grad_o + (t * a->n_heads + h) * d;
                double mean = 0.0; // sum_s p_s grad_p_s, the softmax Jacobian's second term
                probabilities(a, first, t, h, p);
                for (int64_t s = first; s <= t; s++) {
                    const int64_t v_at = s * width + (a->n_heads + a->n_kv_heads + h / group) * d;
                    grad_p[s - first] = rounded(a, dot(grad_o, a->qkv + v_at, d));
                    mean += p[s - first] * grad_p[s - first];
                    for (int64_t i = 0; i < d; i++)
                        a->grad_qkv[v_at + i] += p[s - first] * grad_o[i];
                }
                for (int64_t s = first; s <= t; s++) {
                    const int64_t k_at = s * width + (a->n_heads + h / group) * d;
                    const double grad_s =
                        rounded(a, p[s - first] * (grad_p[s - first] - mean) * a->scale);
                    for (int64_t i = 0; i < d; i++) {
                        a->grad_qkv[q_at + i] += grad_s * a->qkv[k_at + i];
                        a->grad_qkv[k_at + i] += grad_s * a->qkv[q_at + i];
                    }
                }
            }
    for (int64_t i = 0; i < n_tokens * width; i++) a->grad_qkv[i] = rounded(a, a->grad_qkv[i]);
    free(p);
    free(grad_p);
}

void rope_ref(const struct rope_ref *r, double *qkv, const int32_t *pos)
{
    const double pi = acos(-1.0);
    const int64_t half = r->rope_dims / 2;

    for (int64_t t = 0; t < r->n_tokens; t++)
        for (int64_t h = 0; h < r->n_heads; h++)
            for (int64_t i = 0; i < half; i++) {
                double f = pow(r->theta, -2.0 * (double)i / (double)r->rope_dims);
                if (r->factor > 0.0) {
                    // the same blend, from the number of turns within the original context
                    const double turns = r->original_max_position * f / (2.0 * pi);
                    double keep =
                        (turns - r->low_freq_factor) / (r->high_freq_factor - r->low_freq_factor);
                    keep = fmin(1.0, fmax(0.0, keep));
                    f *= keep + (1.0 - keep) / r->factor;
                }
                const double a = r->sign * pos[t] * f;
                double *x = qkv + t * r->row_width + h * r->d_head + i;
                const double v0 = x[0], v1 = x[half];
                x[0] = v0 * cos(a) - v1 * sin(a);
                x[half] = v1 * cos(a) + v0 * sin(a);
            }
}
