/* core/ops/quant_x_cpu.h: for quant_cpu.c: rows of x rounded, and packed in blocks for the tiles.
 *
 * A block of R rows holds four neighbours of k (two in bf16) of all rows, then the next four;
 * behind them the scales and fixes of all groups.
 */
#ifndef HT_OPS_QUANT_X_CPU_H
#define HT_OPS_QUANT_X_CPU_H

#include "core/ops/quant_tile_cpu.h"

struct packed {
    unsigned char *base; // blocks of max_r rows, block_bytes apart
    int64_t block_bytes, n_rows;
    int max_r, digits; // a row of x becomes `digits` rows
};

/* Codes of -127..127 as bytes, and two reductions over lanes. gcc 12 takes the generic forms apart.
 */
static inline void store_codes(int8_t *q, ht_vi c)
{
#if HT_VLEN == 16
    _mm_storeu_si128((void *)q, _mm512_cvtepi32_epi8((__m512i)c));
#else
    for (int l = 0; l < HT_VLEN; l++) q[l] = (int8_t)c[l];
#endif
}

static inline int32_t lanes_added(ht_vi v)
{
#if HT_VLEN == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t sum = 0;
    for (int l = 0; l < HT_VLEN; l++) sum += v[l];
    return sum;
#endif
}

static inline int32_t largest(ht_vi v)
{
#if HT_VLEN == 16
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int l = 1; l < HT_VLEN; l++) most = v[l] > most ? v[l] : most;
    return most;
#endif
}

/* One group of x as int8: codes to q (and the rest's to q2), scale and sums. Lanes behind n are 0.
 */
static void quantise_group(int8_t *q, int8_t *q2, float *scale, int32_t sums[2], const void *x,
                           enum ht_dtype dtype, int64_t from, int64_t n)
{
    const ht_vf magic = vf_set(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const ht_vi magic_bits = (ht_vi)magic;
    ht_vf part[64 / HT_VLEN];
    ht_vi top = { 0 };
    const int n_parts = (int)(n + HT_VLEN - 1) / HT_VLEN;

    for (int i = 0; i < n_parts; i++) {
        const int64_t left = n - i * HT_VLEN, p = from + i * HT_VLEN;
        if (left >= HT_VLEN)
            part[i] = vf_load_any(x, p, dtype);
        else
            part[i] = dtype == HT_DTYPE_F32 ? vf_load_n((const float *)x + p, left)
                                            : vf_load_bf16_n((const ht_bf16 *)x + p, left);
        const ht_vi a = (ht_vi)part[i] & 0x7fffffff; // bits of magnitudes are in their order
        const ht_vi larger = a > top;
        top = (a & larger) | (top & ~larger);
    }
    const int32_t most = largest(top);
    float amax;
    memcpy(&amax, &most, sizeof amax);
    const bool finite = most < 0x7f800000;
    const float unit = finite && amax > 1e-30f ? amax / 127.0f : 0.0f;
    const ht_vf inverse = vf_set(unit > 0.0f ? 127.0f / amax : 0.0f);
    ht_vi sum = { 0 }, sum2 = { 0 };
    for (int i = 0; i < n_parts; i++) {
        const ht_vf value = finite ? part[i] : vf_set(0.0f);
        const ht_vi c = (ht_vi)(value * inverse + magic) - magic_bits;
        store_codes(q + i * HT_VLEN, c);
        sum += c;
        if (!q2) continue;
        const ht_vf rest = (value - __builtin_convertvector(c, ht_vf) * unit) * inverse;
        ht_vi c2 = (ht_vi)(rest * 254.0f + magic) - magic_bits;
        const ht_vi high = c2 > 127, low = c2 < -127;
        c2 = (c2 & ~(high | low)) | (high & 127) | (low & -127);
        store_codes(q2 + i * HT_VLEN, c2);
        sum2 += c2;
    }
    sums[0] = lanes_added(sum);
    sums[1] = lanes_added(sum2);
    *scale = finite ? unit : NAN;
}

/* Rows of block b. */
static int block_rows(const struct packed *p, int64_t b)
{
    const int64_t left = p->n_rows - b * p->max_r;
    return left < p->max_r ? (int)left : p->max_r;
}

static struct x_block block_at(const struct packed *p, const struct ht_qmatrix *w, int64_t b)
{
    const int64_t R = block_rows(p, b), n_groups = ht_q_groups(w->format, w->group, w->k);
    const unsigned char *base = p->base + b * p->block_bytes;
    const int64_t code_bytes = w->k_padded * R * (w->format == HT_Q_BF16 ? 2 : 1);
    return (struct x_block){ .codes = base,
                             .scales = (const float *)(const void *)(base + code_bytes),
                             .fixes = (const int32_t *)(const void *)(base + code_bytes +
                                                                      n_groups * R * 4) };
}

static void pack_row_int(const struct packed *p, const struct ht_qgemm_args *a, int64_t row)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t first = row * p->digits, b = first / p->max_r, R = block_rows(p, b),
                  r = first % p->max_r;
    const int64_t n_groups = ht_q_groups(w->format, w->group, w->k);
    const struct x_block blk = block_at(p, w, b);
    const int offset = w->format == HT_Q_INT8 ? -128 : w->format == HT_Q_INT4 ? -8 : -1;
    const char *x = (const char *)a->x + (size_t)(row * a->ldx) * ht_dtype_bytes(a->x_dtype);
    // the block is this call's scratch: constness above is for the tiles
    unsigned char *codes = (unsigned char *)(uintptr_t)blk.codes;
    float *scales = (float *)(uintptr_t)blk.scales;
    int32_t *fixes = (int32_t *)(uintptr_t)blk.fixes;

    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t from = g * w->group, n = w->k - from < w->group ? w->k - from : w->group;
        int8_t q[2][64] = { { 0 }, { 0 } };
        int32_t sums[2];
        float scale;
        quantise_group(q[0], p->digits == 2 ? q[1] : NULL, &scale, sums, x, a->x_dtype, from, n);
        for (int d = 0; d < p->digits; d++) {
            if (R == 1)
                memcpy(codes + from, q[d], (size_t)w->group);
            else
                for (int64_t i = 0; i < w->group; i += 4)
                    memcpy(codes + ((from + i) / 4 * R + r + d) * 4, q[d] + i, 4);
            scales[g * R + r + d] = d ? scale / 254.0f : scale;
            fixes[g * R + r + d] = offset * sums[d];
        }
    }
}

static void pack_row_bf16(const struct packed *p, const struct ht_qgemm_args *a, int64_t row)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t b = row / p->max_r, R = block_rows(p, b), r = row % p->max_r;
    const char *x = (const char *)a->x + (size_t)(row * a->ldx) * ht_dtype_bytes(a->x_dtype);
    unsigned char *codes = p->base + b * p->block_bytes;

    for (int64_t k = 0; k < w->k_padded; k += 32) {
        const int64_t n = w->k - k < 32 ? w->k - k : 32;
        ht_bf16 v[32] = { 0 };
        if (a->x_dtype == HT_DTYPE_BF16)
            memcpy(v, (const ht_bf16 *)(const void *)x + k, (size_t)n * 2);
        else if (n == 32)
            for (int i = 0; i < 32; i += HT_VLEN)
                vf_store_bf16(v + i, vf_load((const float *)(const void *)x + k + i));
        else
            for (int64_t i = 0; i < n; i++)
                v[i] = ht_f32_to_bf16(((const float *)(const void *)x)[k + i]);
        for (int64_t i = 0; i < 32; i += 2) memcpy(codes + ((k + i) / 2 * R + r) * 4, v + i, 4);
    }
}

static void pack_row(const struct packed *p, const struct ht_qgemm_args *a, int64_t row)
{
    if (a->w->format == HT_Q_BF16)
        pack_row_bf16(p, a, row);
    else
        pack_row_int(p, a, row);
}

#endif
