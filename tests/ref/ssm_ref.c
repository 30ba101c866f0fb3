/* tests/ref/ssm_ref.c: see ssm_ref.h. */
#include "tests/ref/ssm_ref.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/dtype.h"

static double sigmoid(double v)
{
    return 1.0 / (1.0 + exp(-v));
}

static double silu(double v)
{
    return v * sigmoid(v);
}

static double silu_grad(double v)
{
    const double s = sigmoid(v);
    return s * (1.0 + v * (1.0 - s));
}

static double softplus(double v)
{
    return v > 20.0 ? v : log1p(exp(v));
}

static double clamp(double v, double lo, double hi)
{
    return fmin(fmax(v, lo), hi);
}

static double rounded(const struct ssm_ref_scan *a, double v)
{
    return a->round16 ? (double)ht_bf16_to_f32(ht_f32_to_bf16((float)v)) : v;
}

/* One head of one sequence, forwards. S (T+1, P, N) of the sequence: S[0] enters, S[i+1] is after
 * token i. */
static void states_of(const struct ssm_ref_scan *a, int64_t s, int64_t h, double *S)
{
    const int64_t P = a->P, N = a->N, g = h / (a->H / a->G), begin = a->starts[s];
    const double A = -exp(a->A_log[h]);

    for (int64_t i = 0; i < P * N; i++) S[i] = a->init ? a->init[(s * a->H + h) * P * N + i] : 0.0;
    for (int64_t t = begin; t < a->starts[s + 1]; t++) {
        const double *old = S + (t - begin) * P * N;
        double *now = S + (t - begin + 1) * P * N;
        const double dt =
            clamp(softplus(a->dt_raw[t * a->H + h] + a->dt_bias[h]), a->dt_min, a->dt_max);
        for (int64_t p = 0; p < P; p++)
            for (int64_t n = 0; n < N; n++)
                now[p * N + n] =
                    exp(dt * A) * old[p * N + n] + rounded(a, dt * a->x[t * a->H * P + h * P + p]) *
                                                       a->B[t * a->G * N + g * N + n];
    }
}

static double *states_alloc(const struct ssm_ref_scan *a, int64_t copies)
{
    return calloc((size_t)((a->T + 1) * a->P * a->N * copies), sizeof(double));
}

void ssm_ref_scan_forward(const struct ssm_ref_scan *a)
{
    const int64_t H = a->H, P = a->P, N = a->N, G = a->G;
    double *S = states_alloc(a, 1);

    for (int64_t s = 0; s < a->n_seqs; s++)
        for (int64_t h = 0; h < H; h++) {
            const int64_t g = h / (H / G), begin = a->starts[s], end = a->starts[s + 1];
            states_of(a, s, h, S);
            for (int64_t t = begin; t < end; t++)
                for (int64_t p = 0; p < P; p++) {
                    const double *row = S + (t - begin + 1) * P * N + p * N;
                    double y = a->D[h] * a->x[t * H * P + h * P + p];
                    for (int64_t n = 0; n < N; n++)
                        y += rounded(a, row[n]) * a->C[t * G * N + g * N + n];
                    a->y[t * H * P + h * P + p] = rounded(a, y);
                }
            if (a->final)
                memcpy(a->final + (s * H + h) * P * N, S + (end - begin) * P * N,
                       (size_t)(P * N) * sizeof(double));
        }
    free(S);
}

/* One token of the adjoint: L is the gradient of the state after token t, and becomes that of the
 * state before it. */
static void adjoint_token(const struct ssm_ref_scan *a, int64_t h, int64_t t, double *L,
                          const double *before, const double *after)
{
    const int64_t H = a->H, P = a->P, N = a->N, G = a->G, g = h / (H / G);
    const double A = -exp(a->A_log[h]), v = a->dt_raw[t * H + h] + a->dt_bias[h];
    const double soft = softplus(v), dt = clamp(soft, a->dt_min, a->dt_max), decay = exp(dt * A);
    const double *x = a->x + t * H * P + h * P, *gy = a->grad_y + t * H * P + h * P;
    const double *B = a->B + (t * G + g) * N, *C = a->C + (t * G + g) * N;
    double grad_dt = 0.0, grad_da = 0.0;

    for (int64_t p = 0; p < P; p++) {
        double grad_u = 0.0;
        for (int64_t n = 0; n < N; n++) {
            const int64_t i = p * N + n;
            a->grad_C[(t * G + g) * N + n] += rounded(a, after[i]) * gy[p];
            L[i] += gy[p] * C[n];
            grad_u += rounded(a, L[i]) * B[n];
            a->grad_B[(t * G + g) * N + n] += rounded(a, L[i]) * rounded(a, dt * x[p]);
            grad_da += decay * rounded(a, L[i]) * rounded(a, before[i]);
            L[i] *= decay;
        }
        a->grad_x[t * H * P + h * P + p] = rounded(a, dt * grad_u + a->D[h] * gy[p]);
        a->grad_D[h] += gy[p] * x[p];
        grad_dt += grad_u * x[p];
    }
    a->grad_A_log[h] += A * dt * grad_da;
    grad_dt += A * grad_da;
    if (soft < a->dt_min || soft > a->dt_max) grad_dt = 0.0;
    grad_dt *= v > 20.0 ? 1.0 : sigmoid(v);
    a->grad_dt_raw[t * H + h] = rounded(a, grad_dt);
    a->grad_dt_bias[h] += grad_dt;
}

void ssm_ref_scan_backward(const struct ssm_ref_scan *a)
{
    const int64_t H = a->H, size = a->P * a->N;
    double *S = states_alloc(a, 1), *L = calloc((size_t)size, sizeof *L);

    memset(a->grad_B, 0, (size_t)(a->T * a->G * a->N) * sizeof(double));
    memset(a->grad_C, 0, (size_t)(a->T * a->G * a->N) * sizeof(double));
    for (int64_t s = 0; s < a->n_seqs; s++)
        for (int64_t h = 0; h < H; h++) {
            const int64_t begin = a->starts[s];
            states_of(a, s, h, S);
            for (int64_t i = 0; i < size; i++)
                L[i] = a->grad_final ? a->grad_final[(s * H + h) * size + i] : 0.0;
            for (int64_t t = a->starts[s + 1] - 1; t >= begin; t--)
                adjoint_token(a, h, t, L, S + (t - begin) * size, S + (t - begin + 1) * size);
            for (int64_t i = 0; a->grad_init && i < size; i++)
                a->grad_init[(s * H + h) * size + i] = rounded(a, L[i]);
        }
    for (int64_t i = 0; i < a->T * a->G * a->N; i++) {
        a->grad_B[i] = rounded(a, a->grad_B[i]);
        a->grad_C[i] = rounded(a, a->grad_C[i]);
    }
    free(S);
    free(L);
}

/* Row t of channel c, t counted from the flat start; rows before the sequence from state or zero.
 */
static double conv_row(const struct ssm_ref_conv *a, int64_t s, int64_t t, int64_t c)
{
    const int64_t begin = a->starts[s];
    if (t >= begin) return a->x[t * a->CD + c];
    return a->state ? a->state[(s * (a->W - 1) + t - begin + a->W - 1) * a->CD + c] : 0.0;
}

static double conv_pre(const struct ssm_ref_conv *a, int64_t s, int64_t t, int64_t c)
{
    double pre = a->bias ? a->bias[c] : 0.0;
    for (int64_t k = 0; k < a->W; k++)
        pre += a->w[c * a->W + k] * conv_row(a, s, t - (a->W - 1) + k, c);
    return pre;
}

void ssm_ref_conv_forward(const struct ssm_ref_conv *a)
{
    for (int64_t s = 0; s < a->n_seqs; s++)
        for (int64_t c = 0; c < a->CD; c++) {
            for (int64_t t = a->starts[s]; t < a->starts[s + 1]; t++)
                a->y[t * a->CD + c] = silu(conv_pre(a, s, t, c));
            for (int64_t r = 0; a->new_state && r < a->W - 1; r++)
                a->new_state[(s * (a->W - 1) + r) * a->CD + c] =
                    conv_row(a, s, a->starts[s + 1] - (a->W - 1) + r, c);
        }
}

void ssm_ref_conv_backward(const struct ssm_ref_conv *a)
{
    memset(a->grad_x, 0, (size_t)(a->T * a->CD) * sizeof(double));
    for (int64_t s = 0; s < a->n_seqs; s++)
        for (int64_t c = 0; c < a->CD; c++)
            for (int64_t t = a->starts[s]; t < a->starts[s + 1]; t++) {
                const double dpre = a->grad_y[t * a->CD + c] * silu_grad(conv_pre(a, s, t, c));
                for (int64_t k = 0; k < a->W; k++) {
                    const int64_t from = t - (a->W - 1) + k;
                    a->grad_w[c * a->W + k] += dpre * conv_row(a, s, from, c);
                    if (from >= a->starts[s])
                        a->grad_x[from * a->CD + c] += dpre * a->w[c * a->W + k];
                }
                if (a->grad_bias) a->grad_bias[c] += dpre;
            }
}

void ssm_ref_norm_forward(const struct ssm_ref_norm *a)
{
    const int64_t n = a->d_inner / a->groups;

    for (int64_t t = 0; t < a->T; t++)
        for (int64_t g = 0; g < a->groups; g++) {
            double sum = 0.0;
            for (int64_t i = t * a->d_inner + g * n, e = i + n; i < e; i++)
                sum += pow(a->y[i] * silu(a->z[i]), 2.0);
            const double r = 1.0 / sqrt(sum / (double)n + a->eps);
            a->rstd[t * a->groups + g] = r;
            for (int64_t j = g * n; j < (g + 1) * n; j++) {
                const int64_t i = t * a->d_inner + j;
                a->o[i] = a->w[j] * (a->y[i] * silu(a->z[i])) * r;
            }
        }
}

void ssm_ref_norm_backward(const struct ssm_ref_norm *a)
{
    const int64_t n = a->d_inner / a->groups;

    for (int64_t t = 0; t < a->T; t++)
        for (int64_t g = 0; g < a->groups; g++) {
            const double r = a->rstd[t * a->groups + g];
            double c = 0.0;
            for (int64_t j = g * n; j < (g + 1) * n; j++) {
                const int64_t i = t * a->d_inner + j;
                c += a->w[j] * a->grad_o[i] * (a->y[i] * silu(a->z[i]) * r) / (double)n;
            }
            for (int64_t j = g * n; j < (g + 1) * n; j++) {
                const int64_t i = t * a->d_inner + j;
                const double xh = a->y[i] * silu(a->z[i]) * r;
                const double dq = (a->w[j] * a->grad_o[i] - xh * c) * r;
                a->grad_w[j] += a->grad_o[i] * xh;
                a->grad_y[i] = dq * silu(a->z[i]);
                a->grad_z[i] = dq * a->y[i] * silu_grad(a->z[i]);
            }
        }
}
