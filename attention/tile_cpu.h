/* attention/tile_cpu.h: register tiles and exp2 for the attention kernels; kernel files only.
 *
 * Every product of attention is C[row, lane] += sum_k A[row, k] * B[k, lane]: A is broadcast, B is
 * a vector. The unit of k is a *word* of 32 bits, which holds `pair` elements: one fp32 (pair = 1),
 * or two bf16 neighbours (pair = 2, only where the level has vdpbf16ps, which multiplies both and
 * adds in fp32). bf16 tensors on lower levels are widened to fp32 when packed. So one source serves
 * all levels and dtypes; `pair` is a constant at every call and disappears.
 *
 * Layouts (words, slowest first)
 *   panel   B  (k, TILE_PANEL)     columns of queries; TILE_PANEL = lanes of one register tile
 *   block8  A  (row/8, k, 8)       8 rows interleaved: one pointer walks the whole tile
 *   strip   B  (k, d_pad)          lanes run over the head's dims, padded to whole vectors
 *
 * Register tile 8 x 48 on AVX-512 (24 accumulators + 3 + 1 of 32 registers), 4 x 24 on AVX2,
 * 4 x 8 plain.
 */
#ifndef HT_ATTENTION_TILE_CPU_H
#define HT_ATTENTION_TILE_CPU_H

#include "core/base/simd.h"

#if HT_VLEN == 16
#define TILE_MR 8
#define TILE_NV 3
#elif HT_VLEN == 8
#define TILE_MR 4
#define TILE_NV 3
#else
#define TILE_MR 4
#define TILE_NV 2
#endif
#define TILE_PANEL (TILE_NV * HT_VLEN) // 48, 24 or 8: all divide HT_ATTENTION_QUERY_TILE

#if defined(__AVX512BF16__)
#define TILE_HAS_PAIRS 1
#else
#define TILE_HAS_PAIRS 0
#endif

#define TILE_INLINE static inline __attribute__((always_inline))

#define TILE_MASKED (-1e30f) // a score no sum reaches, finite so that differences stay finite
#define TILE_LOG2E 1.44269504088896341f
#define TILE_LN2 0.69314718055994531f

struct tile_acc {
    ht_vf v[TILE_MR][TILE_NV];
};

TILE_INLINE int64_t tile_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}
TILE_INLINE int64_t tile_round_up(int64_t n, int64_t m)
{
    return (n + m - 1) / m * m;
}

/* One word in every lane. Integer arithmetic, because two bf16 may look like a signalling NaN. */
TILE_INLINE ht_vf tile_broadcast(const float *word)
{
    int32_t w;
    memcpy(&w, word, sizeof w);
    return (ht_vf)((ht_vi){ 0 } + w);
}

TILE_INLINE ht_vf tile_dot(ht_vf acc, ht_vf a, ht_vf b, int pair)
{
#if TILE_HAS_PAIRS
    if (pair == 2) return (ht_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#endif
    (void)pair;
    return acc + a * b;
}

/* Larger of a and b; a NaN in a gives b. */
TILE_INLINE ht_vf tile_max(ht_vf a, ht_vf b)
{
#if HT_VLEN == 16
    return (ht_vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif HT_VLEN == 8
    return (ht_vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return vf_max(a, b);
#endif
}

/* v, but TILE_MASKED in lanes whose query position is before the key. */
TILE_INLINE ht_vf tile_causal(ht_vf v, ht_vi query_pos, int32_t key)
{
    return vf_select(query_pos < key, (ht_vf){ 0 } + TILE_MASKED, v);
}

/* 2^x for x <= about 0 (a score minus its row's maximum): 2^round(x) * p(x - round(x)). Relative
 * error of p 9.2e-8 at degree 5, and 2.6e-6 (a thousandth of a bf16 step) at degree 4, for pair
 * = 2. Exactly 0 for masked scores; NaN gives NaN. vf_exp covers all of fp32 at twice the
 * instructions. */
TILE_INLINE ht_vf tile_exp2(ht_vf x, int pair)
{
#if HT_VLEN == 16
    const ht_vf n = (ht_vf)_mm512_roundscale_ps((__m512)x, 0);
    const ht_vf f = x - n;
#else
    const ht_vf floor_x = (ht_vf){ 0 } - 126.0f, magic = (ht_vf){ 0 } + 12582912.0f;
    const ht_vi tiny = x < floor_x;
    const ht_vf clamped = vf_select(tiny, floor_x, x); // NaN passes
    const ht_vf shifted = clamped + magic;
    const ht_vf f = clamped - (shifted - magic);
#endif
    ht_vf p;
    if (pair == 2) { // both: least relative error on [-1/2, 1/2] (Remez)
        p = f * 9.57010191e-3f + 5.59178603e-2f;
        p = p * f + 2.40247448e-1f;
        p = p * f + 6.93121815e-1f;
        p = p * f + 9.99999261e-1f;
    } else {
        p = f * 1.32647272e-3f + 9.67151264e-3f;
        p = p * f + 5.55073374e-2f;
        p = p * f + 2.40222421e-1f;
        p = p * f + 6.93146978e-1f;
        p = p * f + 1.0f;
    }
#if HT_VLEN == 16
    return (ht_vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const ht_vi exponent = (ht_vi)shifted - (ht_vi)magic;
    const ht_vf y = p * (ht_vf)((exponent + 127) << 23);
    return vf_select(tiny, (ht_vf){ 0 }, y);
#endif
}

/* acc += A (TILE_MR rows at a, a + a_row, ...; k-steps a_k apart) * B (n_words >= 1 rows of nv
 * vectors). */
TILE_INLINE void tile_multiply(struct tile_acc *acc, int nv, const float *a, int64_t a_row,
                               int64_t a_k, const float *b, int64_t b_row, int64_t n_words,
                               int pair)
{
    const float *const end = b + n_words * b_row;
    do { // not a for loop: the untaken zero-trip path made GCC 12 spill every accumulator
        ht_vf lane[TILE_NV];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) lane[v] = vf_load(b + v * HT_VLEN);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_MR; r++) {
            const ht_vf word = tile_broadcast(a + r * a_row);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++) acc->v[r][v] = tile_dot(acc->v[r][v], word, lane[v], pair);
        }
        a += a_k;
        b += b_row;
    } while (b != end);
}

TILE_INLINE void tile_zero(struct tile_acc *acc, int nv)
{
#pragma GCC unroll 8
    for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) acc->v[r][v] = (ht_vf){ 0 };
}

TILE_INLINE void tile_load(struct tile_acc *acc, int nv, const float *c, int64_t c_row)
{
#pragma GCC unroll 8
    for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) acc->v[r][v] = vf_load(c + r * c_row + v * HT_VLEN);
}

TILE_INLINE void tile_store(const struct tile_acc *acc, int nv, float *c, int64_t c_row)
{
#pragma GCC unroll 8
    for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) vf_store(c + r * c_row + v * HT_VLEN, acc->v[r][v]);
}

/* Two rows of fp32 lanes (even and odd k) to one row of bf16 pairs. */
#if TILE_HAS_PAIRS
TILE_INLINE ht_vf tile_pair_rows(ht_vf even, ht_vf odd)
{
    const __m512i order =
        (__m512i)(__v32hi){ 0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31 };
    return (ht_vf)_mm512_permutexvar_epi16(order,
                                           (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
}
#endif

#endif
