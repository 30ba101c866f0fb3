/* ssm/ssd_chunk_cpu.c: time steps, decays and decayed scores of one head's chunk (spec 4.1 stage 0,
 * 4.2 B3 to B5). See ssd_cpu.h for why there are no differences of running sums.
 */
#include "ssm/ssd_cpu.h"

/* log(1 + exp(v)) = max(v, 0) + log1p(u), u = exp(-|v|), and log1p(u) = 2 atanh(u / (2 + u)) by its
 * series; u / (2 + u) <= 1/3, so 9 terms leave 3e-10. Relative error below 4e-7 for v > -87. */
static ht_vf softplus(ht_vf v)
{
    const ht_vf positive = vf_max(v, vf_set(0.0f));
    const ht_vf u = vf_exp(v - 2.0f * positive);
    const ht_vf s = u / (2.0f + u), q = s * s;
    ht_vf p = vf_set(1.0f / 17.0f);
    p = p * q + 1.0f / 15.0f;
    p = p * q + 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    p = p * q + 1.0f;
    return positive + 2.0f * s * p;
}

void ssd_decay_fill(struct ssd_decay *d, const struct ht_ssd_args *a, int64_t head, int64_t t0,
                    int64_t n_tokens)
{
    const int64_t n = ht_ssd_pad(n_tokens);
    const ht_vf lo = vf_set(a->dt_min), hi = vf_set(a->dt_max);
    const float bias = a->dt_bias[head];

    d->n = n;
    d->n_blocks = n / SSD_BLOCK;
    d->A = -expf(a->A_log[head]);
    for (int64_t i = 0; i < n_tokens; i++)
        d->v[i] = ssd_load(a->dt_raw, (t0 + i) * a->dt_stride + head, a->dtype) + bias;
    for (int64_t i = n_tokens; i < n; i++) d->v[i] = 0.0f;
    for (int64_t i = 0; i < n; i += HT_VLEN) {
        const ht_vf soft = softplus(vf_load(d->v + i));
        vf_store(d->soft + i, soft);
        // bounds first: a NaN fails both comparisons and passes through
        vf_store(d->dt + i, vf_min(hi, vf_max(lo, soft)));
    }
    for (int64_t i = n_tokens; i < n; i++) d->dt[i] = 0.0f;
    for (int64_t i = 0; i < n; i += HT_VLEN) vf_store(d->da + i, d->A * vf_load(d->dt + i));

    // sums within each block from either end, then between blocks
    for (int64_t b = 0; b < d->n_blocks; b++) {
        const int64_t i0 = b * SSD_BLOCK;
        float head_sum = 0.0f, tail_sum = 0.0f;
        for (int64_t i = 0; i < SSD_BLOCK; i++) {
            head_sum += d->da[i0 + i];
            d->head[i0 + i] = head_sum;
            d->tail[i0 + SSD_BLOCK - 1 - i] = tail_sum;
            tail_sum += d->da[i0 + SSD_BLOCK - 1 - i];
        }
        d->total[b] = head_sum;
    }
    float before = 0.0f, after = 0.0f;
    for (int64_t b = 0; b < d->n_blocks; b++) {
        for (int64_t i = b * SSD_BLOCK; i < (b + 1) * SSD_BLOCK; i += HT_VLEN)
            vf_store(d->in + i, vf_exp(before + vf_load(d->head + i)));
        before += d->total[b];
    }
    for (int64_t b = d->n_blocks - 1; b >= 0; b--) {
        for (int64_t i = b * SSD_BLOCK; i < (b + 1) * SSD_BLOCK; i += HT_VLEN) {
            const ht_vf out = vf_exp(vf_load(d->tail + i) + after);
            vf_store(d->out + i, out);
            vf_store(d->dt_out + i, out * vf_load(d->dt + i));
        }
        after += d->total[b];
    }
    d->gamma = d->in[n - 1];
}

/* 0 .. VLEN-1, plus the first lane's number */
static inline ht_vi lanes_from(int first)
{
    ht_vi v;
    for (int i = 0; i < HT_VLEN; i++) v[i] = first + i;
    return v;
}

static inline void store_operand(bool half, void *p, int64_t i, ht_vf v)
{
    vf_store_any(p, i, half ? HT_DTYPE_BF16 : HT_DTYPE_F32, v);
}

void ssd_decay_scores(bool half, void *M, const float *K, const struct ssd_decay *d)
{
    const int64_t n = d->n;
    float sum[SSD_MAX_CHUNK], column[SSD_MAX_CHUNK], row[SSD_BLOCK];

    for (int64_t b = 0; b < d->n_blocks; b++) {
        const int64_t i0 = b * SSD_BLOCK;

        // columns j left of the block: dt_j exp(sum of da after j up to the block)
        for (int64_t j = 0; j < i0; j += HT_VLEN) {
            const ht_vf s =
                j >= i0 - SSD_BLOCK ? vf_load(d->tail + j) : vf_load(sum + j) + d->total[b - 1];
            vf_store(sum + j, s);
            vf_store(column + j, vf_exp(s) * vf_load(d->dt + j));
        }
        for (int64_t r = 0; r < SSD_BLOCK; r += HT_VLEN)
            vf_store(row + r, vf_exp(vf_load(d->head + i0 + r)));
        for (int64_t r = 0; r < SSD_BLOCK; r++) {
            const int64_t at = (i0 + r) * n;
            for (int64_t j = 0; j < i0; j += HT_VLEN)
                store_operand(half, M, at + j,
                              vf_load(K + at + j) * (row[r] * vf_load(column + j)));
        }

        for (int l = 0; l < SSD_BLOCK; l += HT_VLEN) { // the diagonal block
            const ht_vi lane = lanes_from(l);
            const ht_vf zero = vf_set(0.0f), dt = vf_load(d->dt + i0 + l);
            ht_vf s = zero;
            for (int r = 0; r < SSD_BLOCK; r++) {
                const int64_t at = (i0 + r) * n + i0 + l;
                s = vf_select(lane < r, s + d->da[i0 + r], zero);
                store_operand(half, M, at,
                              vf_select(lane <= r, vf_load(K + at) * (vf_exp(s) * dt), zero));
            }
        }
    }
}

/* M, grad_K, and T = dt_j M G over G, for row j and the VLEN columns at `at`; returns M G. */
static inline ht_vf score_backward(bool half, void *M, float *grad_K, float *G, const float *K,
                                   int64_t at, ht_vf L, float dt)
{
    const ht_vf m = vf_load(K + at) * L, g = vf_load(G + at);
    const ht_vf mg = m * g;

    store_operand(half, M, at, m);
    vf_store(grad_K + at, vf_load(grad_K + at) + dt * (L * g));
    vf_store(G + at, dt * mg);
    return mg;
}

/* grad_da[k] = sum_{i>=k} sum_{j<k} T[j,i]: running sums over rows j, then along each row from its
 * end. No differences: the terms may differ by many orders of magnitude. */
static void rectangle_sums(float *grad_da, const float *T, const struct ssd_decay *d)
{
    const int64_t n = d->n;
    float above[SSD_MAX_CHUNK]; // sum_{j<k} T[j,i]

    memset(above, 0, (size_t)n * sizeof *above);
    for (int64_t b = 0; b < d->n_blocks; b++) {
        const int64_t i0 = b * SSD_BLOCK;
        for (int k = 0; k < SSD_BLOCK; k++) {
            ht_vf s = vf_set(0.0f);
            for (int l = 0; l < SSD_BLOCK; l += HT_VLEN)
                s += vf_select(lanes_from(l) >= k, vf_load(above + i0 + l), vf_set(0.0f));
            for (int64_t i = i0 + SSD_BLOCK; i < n; i += HT_VLEN) s += vf_load(above + i);
            grad_da[i0 + k] = ssd_sum(s);
            for (int64_t i = i0; i < n; i += HT_VLEN)
                vf_store(above + i, vf_load(above + i) + vf_load(T + (i0 + k) * n + i));
        }
    }
}

float ssd_decay_scores_backward(bool half, void *M, float *grad_K, float *G, float *grad_dt,
                                float *grad_da, const float *K, const struct ssd_decay *d)
{
    const int64_t n = d->n;
    float sum[SSD_MAX_CHUNK], column[SSD_MAX_CHUNK], row[SSD_BLOCK];
    ht_vf diagonal = vf_set(0.0f);

    for (int64_t b = d->n_blocks - 1; b >= 0; b--) {
        const int64_t j0 = b * SSD_BLOCK, right = j0 + SSD_BLOCK;

        // columns i right of the block: exp(sum of da from the block's end to i)
        for (int64_t i = right; i < n; i += HT_VLEN) {
            const ht_vf s =
                i < right + SSD_BLOCK ? vf_load(d->head + i) : vf_load(sum + i) + d->total[b + 1];
            vf_store(sum + i, s);
            vf_store(column + i, vf_exp(s));
        }
        for (int64_t r = 0; r < SSD_BLOCK; r += HT_VLEN)
            vf_store(row + r, vf_exp(vf_load(d->tail + j0 + r)));
        for (int64_t r = 0; r < SSD_BLOCK; r++) {
            const int64_t at = (j0 + r) * n;
            const float dt = d->dt[j0 + r];
            ht_vf mg = vf_set(0.0f);
            for (int64_t i = right; i < n; i += HT_VLEN)
                mg +=
                    score_backward(half, M, grad_K, G, K, at + i, row[r] * vf_load(column + i), dt);
            grad_dt[j0 + r] = ssd_sum(mg);
        }

        for (int l = 0; l < SSD_BLOCK; l += HT_VLEN) { // the diagonal block
            const ht_vi lane = lanes_from(l);
            const ht_vf zero = vf_set(0.0f);
            ht_vf s = zero;
            for (int r = SSD_BLOCK - 1; r >= 0; r--) {
                const int64_t at = (j0 + r) * n + j0 + l;
                if (r < SSD_BLOCK - 1) s = vf_select(lane > r, s + d->da[j0 + r + 1], zero);
                const ht_vf L = vf_select(lane >= r, vf_exp(s), zero);
                diagonal += vf_select(lane == r, vf_load(G + at), zero);
                grad_dt[j0 + r] +=
                    ssd_sum(score_backward(half, M, grad_K, G, K, at, L, d->dt[j0 + r]));
            }
        }
    }
    rectangle_sums(grad_da, G, d);
    return ssd_sum(diagonal);
}
