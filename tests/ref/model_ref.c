/* tests/ref/model_ref.c: spec 3 in double precision, written for reading, not for speed. */
#include "tests/ref/model_ref.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct ref {
    const struct ht_model_config *c;
    const struct ht_tensor_list *l;
    const double *params;
    const struct ht_model_batch *b;
};

static const double *param(const struct ref *m, int layer, enum ht_tensor_role role)
{
    const struct ht_tensor_info *t = ht_tensor_find(m->l, layer, role);
    return t ? m->params + t->offset : NULL;
}

static double *zeros(int64_t n)
{
    return calloc((size_t)(n ? n : 1), sizeof(double));
}

static double sigmoid(double v)
{
    return 1.0 / (1.0 + exp(-v));
}

/* y (n_out) = W (n_out, n_in) x */
static void linear(double *y, const double *w, const double *x, int64_t n_out, int64_t n_in)
{
    for (int64_t o = 0; o < n_out; o++) {
        double sum = 0.0;
        for (int64_t i = 0; i < n_in; i++) sum += w[o * n_in + i] * x[i];
        y[o] = sum;
    }
}

static void rmsnorm(double *y, const double *w, const double *x, int64_t n, double eps)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
    const double r = 1.0 / sqrt(sum / (double)n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = w[i] * x[i] * r;
}

/* One sequence of a Mamba-2 mixer: u and out are (n, d_model). */
static void mamba(const struct ref *m, int layer, const double *u, double *out, int64_t n)
{
    const struct ht_model_config *c = m->c;
    const int64_t width = ht_in_proj_width(c), channels = ht_conv_channels(c), dI = c->d_inner;
    const int64_t H = c->ssm_heads, P = c->ssm_d_head, N = c->d_state, G = c->n_groups;
    const double *conv_w = param(m, layer, HT_T_CONV_W), *conv_b = param(m, layer, HT_T_CONV_B);
    const double *dt_bias = param(m, layer, HT_T_DT_BIAS), *a_log = param(m, layer, HT_T_A_LOG);
    const double *skip = param(m, layer, HT_T_D), *norm_w = param(m, layer, HT_T_GATED_NORM);
    double *zxbcdt = zeros(n * width), *xbc = zeros(channels), *state = zeros(H * P * N);
    double *y = zeros(dI);

    for (int64_t t = 0; t < n; t++)
        linear(zxbcdt + t * width, param(m, layer, HT_T_IN_PROJ), u + t * c->d_model, width,
               c->d_model);
    for (int64_t t = 0; t < n; t++) {
        const double *row = zxbcdt + t * width;
        for (int64_t ch = 0; ch < channels; ch++) {
            double pre = conv_b ? conv_b[ch] : 0.0;
            for (int64_t k = 0; k < c->d_conv; k++) {
                const int64_t from = t - (c->d_conv - 1) + k;
                if (from >= 0) pre += conv_w[ch * c->d_conv + k] * zxbcdt[from * width + dI + ch];
            }
            xbc[ch] = pre * sigmoid(pre);
        }
        for (int64_t h = 0; h < H; h++) {
            const double v = row[width - H + h] + dt_bias[h];
            double dt = v > 20.0 ? v : log1p(exp(v));
            if (dt < (double)c->dt_limit_min) dt = (double)c->dt_limit_min;
            if (dt > (double)c->dt_limit_max) dt = (double)c->dt_limit_max;
            const double decay = exp(-exp(a_log[h]) * dt);
            const double *B = xbc + dI + h / (H / G) * N, *C = B + G * N;
            for (int64_t p = 0; p < P; p++) {
                const double x = xbc[h * P + p];
                double *s = state + (h * P + p) * N, sum = 0.0;
                for (int64_t i = 0; i < N; i++) {
                    s[i] = decay * s[i] + dt * x * B[i];
                    sum += s[i] * C[i];
                }
                y[h * P + p] = (sum + skip[h] * x) * row[h * P + p] * sigmoid(row[h * P + p]);
            }
        }
        for (int64_t g = 0; g < G; g++)
            rmsnorm(y + g * dI / G, norm_w + g * dI / G, y + g * dI / G, dI / G,
                    (double)c->norm_eps);
        linear(out + t * c->d_model, param(m, layer, HT_T_OUT_PROJ), y, c->d_model, dI);
    }
    free(zxbcdt);
    free(xbc);
    free(state);
    free(y);
}

static void rope(const struct ht_model_config *c, double *head, int64_t pos)
{
    const int64_t half = c->rope_dims / 2;
    for (int64_t i = 0; i < half; i++) {
        const double a = (double)pos * pow(c->rope_theta, -2.0 * (double)i / (double)c->rope_dims);
        const double v = head[i], w = head[i + half];
        head[i] = v * cos(a) - w * sin(a);
        head[i + half] = w * cos(a) + v * sin(a);
    }
}

static void attention(const struct ref *m, int layer, const double *u, double *out, int64_t n)
{
    const struct ht_model_config *c = m->c;
    const int64_t hd = c->d_head, q_width = c->n_heads * hd, kv_width = c->n_kv_heads * hd;
    double *q = zeros(n * q_width), *k = zeros(n * kv_width), *v = zeros(n * kv_width);
    double *heads = zeros(q_width), *p = zeros(n);

    for (int64_t t = 0; t < n; t++) {
        linear(q + t * q_width, param(m, layer, HT_T_Q), u + t * c->d_model, q_width, c->d_model);
        linear(k + t * kv_width, param(m, layer, HT_T_K), u + t * c->d_model, kv_width, c->d_model);
        linear(v + t * kv_width, param(m, layer, HT_T_V), u + t * c->d_model, kv_width, c->d_model);
        for (int64_t j = 0; j < c->n_heads; j++) rope(c, q + t * q_width + j * hd, t);
        for (int64_t j = 0; j < c->n_kv_heads; j++) rope(c, k + t * kv_width + j * hd, t);
        memset(heads, 0, (size_t)q_width * sizeof *heads);
        for (int64_t j = 0; j < c->n_heads; j++) {
            const int64_t kv = j / (c->n_heads / c->n_kv_heads) * hd;
            double top = -INFINITY, sum = 0.0;
            for (int64_t s = 0; s <= t; s++) {
                p[s] = 0.0;
                for (int64_t i = 0; i < hd; i++)
                    p[s] += q[t * q_width + j * hd + i] * k[s * kv_width + kv + i];
                p[s] *= (double)c->attention_scale;
                top = fmax(top, p[s]);
            }
            for (int64_t s = 0; s <= t; s++) sum += p[s] = exp(p[s] - top);
            for (int64_t s = 0; s <= t; s++)
                for (int64_t i = 0; i < hd; i++)
                    heads[j * hd + i] += p[s] / sum * v[s * kv_width + kv + i];
        }
        linear(out + t * c->d_model, param(m, layer, HT_T_O), heads, c->d_model, q_width);
    }
    free(q);
    free(k);
    free(v);
    free(heads);
    free(p);
}

static void mlp(const struct ref *m, int layer, const double *u, double *out)
{
    const int64_t d_ff = m->c->d_ff;
    double *gate = zeros(d_ff), *up = zeros(d_ff);

    linear(gate, param(m, layer, HT_T_GATE), u, d_ff, m->c->d_model);
    linear(up, param(m, layer, HT_T_UP), u, d_ff, m->c->d_model);
    for (int64_t i = 0; i < d_ff; i++) gate[i] *= sigmoid(gate[i]) * up[i];
    linear(out, param(m, layer, HT_T_DOWN), gate, m->c->d_model, d_ff);
    free(gate);
    free(up);
}

static double token_loss(const double *logits, int64_t n, int32_t label, double z_coef)
{
    double top = -INFINITY, sum = 0.0;

    if (label < 0) return 0.0;
    for (int64_t i = 0; i < n; i++) top = fmax(top, logits[i]);
    for (int64_t i = 0; i < n; i++) sum += exp(logits[i] - top);
    const double lse = top + log(sum);
    return lse - logits[label] + z_coef * lse * lse;
}

double model_ref_loss(const struct ht_model_config *c, const struct ht_tensor_list *l,
                      const double *params, const struct ht_model_batch *b, double z_coef,
                      double *logits)
{
    const struct ref m = { c, l, params, b };
    const int64_t h = c->d_model, T = b->n_tokens, V = c->vocab_size;
    double *r = zeros(T * h), *u = zeros(T * h), *branch = zeros(T * h), *row = zeros(V);
    double loss = 0.0;

    for (int64_t t = 0; t < T; t++)
        for (int64_t i = 0; i < h; i++)
            r[t * h + i] = (double)c->embedding_multiplier *
                           param(&m, -1, HT_T_EMBED)[(int64_t)b->ids[t] * h + i];
    for (int layer = 0; layer < (int)c->n_layers; layer++) {
        for (int64_t t = 0; t < T; t++)
            rmsnorm(u + t * h, param(&m, layer, HT_T_NORM1), r + t * h, h, (double)c->norm_eps);
        for (int64_t s = 0; s < b->seqs.n_seqs; s++) {
            const int64_t start = b->seqs.starts[s], n = b->seqs.starts[s + 1] - start;
            if (c->layer_kind[layer] == HT_LAYER_MAMBA)
                mamba(&m, layer, u + start * h, branch + start * h, n);
            else
                attention(&m, layer, u + start * h, branch + start * h, n);
        }
        for (int64_t i = 0; i < T * h; i++) r[i] += (double)c->residual_multiplier * branch[i];
        for (int64_t t = 0; c->d_ff && t < T; t++) {
            rmsnorm(u, param(&m, layer, HT_T_NORM2), r + t * h, h, (double)c->norm_eps);
            mlp(&m, layer, u, branch);
            for (int64_t i = 0; i < h; i++)
                r[t * h + i] += (double)c->residual_multiplier * branch[i];
        }
    }
    for (int64_t t = 0; t < T; t++) {
        rmsnorm(u, param(&m, -1, HT_T_FINAL_NORM), r + t * h, h, (double)c->norm_eps);
        linear(row, param(&m, -1, c->tied_head ? HT_T_EMBED : HT_T_HEAD), u, V, h);
        for (int64_t i = 0; i < V; i++) row[i] /= (double)c->logits_scaling;
        if (logits) memcpy(logits + t * V, row, (size_t)V * sizeof *row);
        if (b->labels) loss += token_loss(row, V, b->labels[t], z_coef);
    }
    free(r);
    free(u);
    free(branch);
    free(row);
    return loss;
}
