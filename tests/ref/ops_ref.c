/* tests/ref/ops_ref.c: see ops_ref.h. */
#include "tests/ref/ops_ref.h"

#include <math.h>
#include <stdlib.h>

void ops_ref_gemm(const struct ops_ref_gemm *g)
{
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t j = 0; j < g->n; j++) {
            double sum = 0.0;
            for (int64_t p = 0; p < g->k; p++)
                sum += (g->trans_a ? g->a[p * g->lda + i] : g->a[i * g->lda + p]) *
                       (g->trans_b ? g->b[j * g->ldb + p] : g->b[p * g->ldb + j]);
            double *c = &g->c[i * g->ldc + j];
            *c = g->alpha * sum + (g->beta != 0.0 ? g->beta * *c : 0.0);
        }
}

void ops_ref_rmsnorm_forward(const struct ops_ref_rmsnorm *a)
{
    for (int64_t t = 0; t < a->n_rows; t++) {
        double sum = 0.0;
        for (int64_t i = 0; i < a->d_model; i++) {
            const int64_t o = t * a->d_model + i;
            a->r_out[o] = a->r_in[o] + (a->branch ? a->branch_scale * a->branch[o] : 0.0);
            sum += a->r_out[o] * a->r_out[o];
        }
        a->rstd[t] = 1.0 / sqrt(sum / (double)a->d_model + a->eps);
        for (int64_t i = 0; i < a->d_model; i++) {
            const int64_t o = t * a->d_model + i;
            a->y[o] = a->w[i] * a->r_out[o] * a->rstd[t];
        }
    }
}

void ops_ref_rmsnorm_backward(const struct ops_ref_rmsnorm *a)
{
    for (int64_t t = 0; t < a->n_rows; t++) {
        const int64_t row = t * a->d_model;
        double c = 0.0;
        for (int64_t i = 0; i < a->d_model; i++)
            c += a->w[i] * a->grad_y[row + i] * a->r_out[row + i] * a->rstd[t];
        c /= (double)a->d_model;
        for (int64_t i = 0; i < a->d_model; i++) {
            const double xh = a->r_out[row + i] * a->rstd[t], e = a->w[i] * a->grad_y[row + i];
            const double g =
                (a->grad_r_out ? a->grad_r_out[row + i] : 0.0) + a->rstd[t] * (e - c * xh);
            a->grad_r_in[row + i] = g;
            if (a->grad_branch) a->grad_branch[row + i] = a->branch_scale * g;
            a->grad_w[i] += a->grad_y[row + i] * xh;
        }
    }
}

static double sigmoid(double x)
{
    return 1.0 / (1.0 + exp(-x));
}

void ops_ref_swiglu_forward(int64_t n_rows, int64_t d_ff, const double *gate_up, double *y)
{
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t j = 0; j < d_ff; j++) {
            const double gate = gate_up[t * 2 * d_ff + j], up = gate_up[t * 2 * d_ff + d_ff + j];
            y[t * d_ff + j] = gate * sigmoid(gate) * up;
        }
}

void ops_ref_swiglu_backward(int64_t n_rows, int64_t d_ff, const double *gate_up,
                             const double *grad_y, double *grad_gate_up)
{
    for (int64_t t = 0; t < n_rows; t++)
        for (int64_t j = 0; j < d_ff; j++) {
            const int64_t g = t * 2 * d_ff + j, u = g + d_ff;
            const double gate = gate_up[g], s = sigmoid(gate), gy = grad_y[t * d_ff + j];
            grad_gate_up[g] = gy * gate_up[u] * s * (1.0 + gate * (1.0 - s));
            grad_gate_up[u] = gy * gate * s;
        }
}

static double dot(const double *a, const double *b, int64_t n)
{
    double s = 0.0;
    for (int64_t i = 0; i < n; i++) s += a[i] * b[i];
    return s;
}

void ops_ref_linear_ce(struct ops_ref_linear_ce *a)
{
    const int64_t d = a->d_model, n = a->vocab_size;
    double *logits = malloc((size_t)n * sizeof *logits);

    a->loss_sum = a->z_sum = 0.0;
    a->n_counted = 0;
    for (int64_t t = 0; t < a->n_tokens; t++) {
        const double *u = a->u + t * d;
        for (int64_t i = 0; a->grad_u && i < d; i++) a->grad_u[t * d + i] = 0.0;
        if (a->logprobs) a->logprobs[t] = 0.0;
        if (a->labels[t] < 0) continue;
        double max = -INFINITY, sum = 0.0;
        for (int64_t v = 0; v < n; v++) {
            logits[v] = a->logit_scale * dot(a->weight + v * d, u, d);
            max = fmax(max, logits[v]);
        }
        for (int64_t v = 0; v < n; v++) sum += exp(logits[v] - max);
        const double lse = max + log(sum);
        a->loss_sum += lse - logits[a->labels[t]];
        a->z_sum += lse * lse;
        a->n_counted++;
        if (a->logprobs) a->logprobs[t] = logits[a->labels[t]] - lse;
        for (int64_t v = 0; a->grad_u && v < n; v++) {
            const double p = exp(logits[v] - lse), hit = v == a->labels[t] ? 1.0 : 0.0;
            const double g =
                a->logit_scale * a->loss_scale * ((p - hit) + 2.0 * a->z_coef * lse * p);
            for (int64_t i = 0; i < d; i++) {
                a->grad_u[t * d + i] += g * a->weight[v * d + i];
                a->grad_weight[v * d + i] += g * u[i];
            }
        }
    }
    free(logits);
}

void ops_ref_adamw(const struct ops_ref_adamw *a)
{
    const double c1 = 1.0 - pow(a->beta1, (double)a->step);
    const double c2 = 1.0 - pow(a->beta2, (double)a->step);

    for (int64_t i = 0; i < a->n; i++) {
        const double g = a->grad_scale * a->grad[i];
        a->exp_avg[i] = a->beta1 * a->exp_avg[i] + (1.0 - a->beta1) * g;
        a->exp_avg_sq[i] = a->beta2 * a->exp_avg_sq[i] + (1.0 - a->beta2) * g * g;
        a->master[i] -= a->lr * (a->exp_avg[i] / c1 / (sqrt(a->exp_avg_sq[i] / c2) + a->eps) +
                                 a->weight_decay * a->master[i]);
    }
}
