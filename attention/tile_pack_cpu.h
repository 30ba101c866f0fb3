/* attention/tile_pack_cpu.h: token rows to the layouts of tile_cpu.h and back; kernel files only.
 *
 * Rows come as pointers to words: straight into the tensor where its elements already are words,
 * else widened into a temporary. Missing rows (beyond a ragged end) are zero rows.
 */
#ifndef HT_ATTENTION_TILE_PACK_CPU_H
#define HT_ATTENTION_TILE_PACK_CPU_H

#include "attention/attention_cpu.h"
#include "attention/tile_cpu.h"

/* Rows of one head: row c is token c / group, head c % group (group = 1 for keys and values). */
struct tile_rows {
    const char *base;
    int64_t stride, group, d_head, n_rows; // row n_rows and later are zero
    enum ht_dtype dtype;
};

static const float tile_zero_row[HT_ATTENTION_MAX_D_HEAD];

/* Row c as words; `widened` (d_head floats) is used if bf16 has to become fp32. */
static inline const char *tile_row(const struct tile_rows *t, int64_t c, float *widened, int pair)
{
    if (c >= t->n_rows) return (const char *)tile_zero_row;
    const int64_t at = c / t->group * t->stride + c % t->group * t->d_head;
    const char *row = t->base + at * (int64_t)ht_dtype_bytes(t->dtype);
    if (t->dtype == HT_DTYPE_F32 || pair == 2) return row;
    const ht_bf16 *h = (const ht_bf16 *)row;
    for (int64_t i = 0; i < t->d_head; i++) widened[i] = ht_bf16_to_f32(h[i]);
    return (const char *)widened;
}

/* Ask for rows that will be packed soon: their stride defeats the hardware's prefetcher. */
static inline void tile_prefetch(const struct tile_rows *t, int64_t first, int64_t n_rows)
{
    const int64_t element = (int64_t)ht_dtype_bytes(t->dtype);
    for (int64_t r = first; r < tile_min(first + n_rows, t->n_rows); r++)
        for (int64_t i = 0; i < t->d_head * element; i += 64)
            __builtin_prefetch(t->base + r * t->stride * element + i);
}

/* dst[k * dst_row + r] = word k of row r, 8 rows. */
static inline void tile_transpose8(float *dst, int64_t dst_row, const char *const rows[8],
                                   int64_t n_words)
{
    int64_t blocks = 0;
#if HT_VLEN >= 8
    blocks = n_words / 8;
    for (int64_t k = 0; k < 8 * blocks; k += 8) {
        __m256 a[8], b[8];
#pragma GCC unroll 8
        for (int r = 0; r < 8; r++) a[r] = _mm256_loadu_ps((const float *)(rows[r] + 4 * k));
#pragma GCC unroll 4
        for (int r = 0; r < 8; r += 2) {
            b[r] = _mm256_unpacklo_ps(a[r], a[r + 1]);
            b[r + 1] = _mm256_unpackhi_ps(a[r], a[r + 1]);
        }
#pragma GCC unroll 2
        for (int r = 0; r < 8; r += 4) {
            a[r] = _mm256_shuffle_ps(b[r], b[r + 2], 0x44);
            a[r + 1] = _mm256_shuffle_ps(b[r], b[r + 2], 0xee);
            a[r + 2] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0x44);
            a[r + 3] = _mm256_shuffle_ps(b[r + 1], b[r + 3], 0xee);
        }
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            _mm256_storeu_ps(dst + (k + r) * dst_row, _mm256_permute2f128_ps(a[r], a[r + 4], 0x20));
            _mm256_storeu_ps(dst + (k + r + 4) * dst_row,
                             _mm256_permute2f128_ps(a[r], a[r + 4], 0x31));
        }
    }
#endif
    for (int64_t k = 8 * blocks; k < n_words; k++)
        for (int r = 0; r < 8; r++) memcpy(dst + k * dst_row + r, rows[r] + 4 * k, 4);
}

/* Rows first .. first + n_rows (a multiple of 8) to dst: row r's word k at
 * (r / 8) * block + k * dst_row + r % 8. Panels: dst_row = TILE_PANEL, block = 8; block8: 8, 8 *
 * n_words. */
static inline void tile_pack_transposed(float *dst, int64_t dst_row, int64_t block,
                                        const struct tile_rows *t, int64_t first, int64_t n_rows,
                                        float *tmp, int pair)
{
    for (int64_t r = 0; r < n_rows; r += 8) {
        const char *rows[8];
        for (int64_t i = 0; i < 8; i++)
            rows[i] = tile_row(t, first + r + i, tmp + i * t->d_head, pair);
        tile_transpose8(dst + r / 8 * block, dst_row, rows, t->d_head / pair);
    }
}

/* Rows first .. first + n_rows (even) as k: each run of 8 dims of word row k goes to
 * dst + k * k_step + (dim / 8) * block. Strips: k_step = d_pad, block = 8; block8 of the transpose:
 * k_step = 8, block = 8 * words of a key tile. */
static inline void tile_pack_interleaved(float *dst, int64_t k_step, int64_t block,
                                         const struct tile_rows *t, int64_t first, int64_t n_rows,
                                         float *tmp, int pair)
{
    for (int64_t r = 0; r < n_rows; r += pair, dst += k_step) {
        const char *even = tile_row(t, first + r, tmp, pair);
#if TILE_HAS_PAIRS
        if (pair == 2) {
            const char *odd = tile_row(t, first + r + 1, tmp, pair);
            for (int64_t i = 0; i < t->d_head; i += 8) {
                const __m128i lo = _mm_loadu_si128((const __m128i *)(even + 2 * i));
                const __m128i hi = _mm_loadu_si128((const __m128i *)(odd + 2 * i));
                float *out = dst + i / 8 * block;
                _mm_storeu_si128((__m128i *)out, _mm_unpacklo_epi16(lo, hi));
                _mm_storeu_si128((__m128i *)(out + 4), _mm_unpackhi_epi16(lo, hi));
            }
            continue;
        }
#endif
        for (int64_t i = 0; i < t->d_head; i += 8) memcpy(dst + i / 8 * block, even + 4 * i, 32);
    }
}

/* factor * n floats to elements of `dtype`. */
static inline void tile_store_row(char *dst, enum ht_dtype dtype, const float *src, int64_t n,
                                  float factor)
{
    int64_t i = 0;
    for (; i + HT_VLEN <= n; i += HT_VLEN) vf_store_any(dst, i, dtype, vf_load(src + i) * factor);
    for (; i < n; i++) ht_store_f32(dst, i, dtype, src[i] * factor);
}

/* A panel (d_head, TILE_PANEL) back to rows (TILE_PANEL, d_head). */
static inline void tile_unpack_panel(float *rows_out, const float *panel, int64_t d_head)
{
    for (int64_t dim = 0; dim < d_head; dim += 8) {
        const char *rows[8];
        for (int64_t i = 0; i < 8; i++) rows[i] = (const char *)(panel + (dim + i) * TILE_PANEL);
        tile_transpose8(rows_out + dim, d_head, rows, TILE_PANEL);
    }
}

/* The next n floats of a thread's scratch; n is a multiple of 16, so pieces stay 64-byte aligned.
 */
static inline float *tile_take(float **scratch, int64_t n)
{
    float *p = *scratch;
    *scratch = p + n;
    return p;
}

#endif
