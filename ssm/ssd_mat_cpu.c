/* ssm/ssd_mat_cpu.c: the scan's small matrix products and operand layouts (ssd_cpu.h).
 *
 * Register tiles: 16 sums of 16 lanes (AVX-512), 8 of 8 or 4 otherwise; per step of k a tile loads
 * its columns once and broadcasts one element (fp32) or pair (bf16) per row. Operands of one chunk
 * and head are at most a few dozen KiB, so no further blocking is needed.
 */
#include "ssm/ssd_cpu.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* acc[r*nv + v] += A[row+r, k0..k1) B[k0..k1, col + v*VLEN ..) */
static ALWAYS_INLINE void multiply_f32(ht_vf *acc, const struct ssd_gemm *g, const int mr,
                                       const int nv, int64_t row, int64_t col, int64_t k0,
                                       int64_t k1)
{
    const float *a = (const float *)g->a + row * g->lda;
    const float *b = (const float *)g->b + col;
    const int64_t lda = g->lda, ldb = g->ldb;

    for (int64_t k = k0; k < k1; k++) {
        ht_vf bv[4];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) bv[v] = vf_load(b + k * ldb + v * HT_VLEN);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            const ht_vf av = vf_set(a[r * lda + k]);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++) acc[r * nv + v] += av * bv[v];
        }
    }
}

#if defined(__AVX512BF16__)
static ALWAYS_INLINE void multiply_bf16(ht_vf *acc, const struct ssd_gemm *g, const int mr,
                                        const int nv, int64_t row, int64_t col, int64_t k0,
                                        int64_t k1)
{
    const ht_bf16 *a = (const ht_bf16 *)g->a + row * g->lda;
    const ht_bf16 *b = (const ht_bf16 *)g->b + 2 * col;
    const int64_t lda = g->lda, ldb = g->ldb;

    for (int64_t k = k0; k < k1; k += 2) {
        __m512bh bv[4];
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++)
            bv[v] = (__m512bh)_mm512_loadu_si512(b + k * ldb + v * 2 * HT_VLEN);
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            int32_t pair;
            memcpy(&pair, a + r * lda + k, sizeof pair);
            const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int v = 0; v < nv; v++)
                acc[r * nv + v] = (ht_vf)_mm512_dpbf16_ps((__m512)acc[r * nv + v], av, bv[v]);
        }
    }
}
#endif

enum { AHEAD_LINES = 8 }; // per tile: 128 to 512 cycles of products cover them

static inline void look_ahead(struct ssd_ahead *next)
{
    for (int i = 0; i < AHEAD_LINES && next->n_rows > 0; next->n_rows--) {
        for (int64_t at = 0; at < next->row_bytes; at += 64, i++)
            __builtin_prefetch((const char *)next->p + at, 0, 2);
        next->p = (const char *)next->p + next->pitch_bytes;
    }
}

static ALWAYS_INLINE void tile(const struct ssd_gemm *g, const bool half, const int mr,
                               const int nv, int64_t row, int64_t col)
{
    const int64_t k0 = g->region == SSD_UPPER_K ? row : 0;
    const int64_t k1 = g->region == SSD_LOWER_K ? row + mr : g->k;
    ht_vf acc[16];

#pragma GCC unroll 16
    for (int i = 0; i < mr * nv; i++) acc[i] = vf_set(0.0f);
#if defined(__AVX512BF16__)
    if (half)
        multiply_bf16(acc, g, mr, nv, row, col, k0, k1);
    else
#endif
        multiply_f32(acc, g, mr, nv, row, col, k0, k1);

    if (g->row_scale) {
#pragma GCC unroll 16
        for (int i = 0; i < mr * nv; i++) acc[i] *= g->row_scale[row + i / nv];
    }
    if (g->dot) {
        const enum ht_dtype type = half ? HT_DTYPE_BF16 : HT_DTYPE_F32;
#pragma GCC unroll 4
        for (int v = 0; v < nv; v++) {
            ht_vf sum = vf_load(g->dot + col + v * HT_VLEN);
#pragma GCC unroll 16
            for (int r = 0; r < mr; r++)
                sum += acc[r * nv + v] *
                       vf_load_any(g->t, (row + r) * g->ldt + col + v * HT_VLEN, type);
            vf_store(g->dot + col + v * HT_VLEN, sum);
        }
    }
    if (g->col_scale) {
#pragma GCC unroll 16
        for (int i = 0; i < mr * nv; i++) acc[i] *= vf_load(g->col_scale + col + i % nv * HT_VLEN);
    }
    if (g->c_in) {
        const float *c_in = g->c_in + row * g->ldc + col;
#pragma GCC unroll 16
        for (int i = 0; i < mr * nv; i++)
            acc[i] += g->beta * vf_load(c_in + i / nv * g->ldc + i % nv * HT_VLEN);
    }
    float *c = g->c + row * g->ldc + col;
#pragma GCC unroll 16
    for (int i = 0; i < mr * nv; i++) vf_store(c + i / nv * g->ldc + i % nv * HT_VLEN, acc[i]);
}

/* Rows row0..row1-1 (a multiple of 16 of them), columns col0..col1-1. */
static ALWAYS_INLINE void region(const struct ssd_gemm *g, struct ssd_ahead *next, const bool half,
                                 int64_t row0, int64_t row1, int64_t col0, int64_t col1)
{
    int64_t col = col0;

#if HT_VLEN == 16
    for (; col1 - col >= 64; col += 64)
        for (int64_t row = row0; row < row1; row += 4, look_ahead(next))
            tile(g, half, 4, 4, row, col);
    if (col1 - col >= 48) {
        for (int64_t row = row0; row < row1; row += 4, look_ahead(next))
            tile(g, half, 4, 3, row, col);
        col += 48;
    }
    if (col1 - col >= 32) {
        for (int64_t row = row0; row < row1; row += 8, look_ahead(next))
            tile(g, half, 8, 2, row, col);
        col += 32;
    }
    for (; col < col1; col += 16)
        for (int64_t row = row0; row < row1; row += 16, look_ahead(next))
            tile(g, half, 16, 1, row, col);
#else
    for (; col < col1; col += 2 * HT_VLEN)
        for (int64_t row = row0; row < row1; row += 4, look_ahead(next))
            tile(g, half, 4, 2, row, col);
#endif
}

static ALWAYS_INLINE void run(const struct ssd_gemm *g, const bool half)
{
    struct ssd_ahead next = g->ahead;

    if (g->region == SSD_LOWER_OUT || g->region == SSD_UPPER_OUT) {
        for (int64_t row = 0; row < g->m; row += SSD_BLOCK) {
            if (g->region == SSD_LOWER_OUT)
                region(g, &next, half, row, row + SSD_BLOCK, 0, row + SSD_BLOCK);
            else
                region(g, &next, half, row, row + SSD_BLOCK, row, g->n);
        }
    } else {
        region(g, &next, half, 0, g->m, 0, g->n);
    }
}

void ssd_gemm_run(const struct ssd_gemm *g)
{
#if defined(__AVX512BF16__)
    if (g->half) {
        run(g, true);
        return;
    }
#endif
    run(g, false);
}

/* Columns c..c+n-1 of the source row that starts at element `at`, scaled; zeros above n. */
static ALWAYS_INLINE ht_vf source_at(const struct ssd_source *src, int64_t at, int64_t c, int64_t n,
                                     float scale, const bool scaled, const enum ht_dtype d)
{
    const ht_vf v = ssd_load_n(src->p, at + c, n, d);
    return scaled ? v * scale : v;
}

#if defined(__AVX512BF16__)
/* (low, high) as interleaved bf16 pairs */
static ALWAYS_INLINE __m512i interleave(ht_vf low, ht_vf high)
{
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* Rows r and r+1 as a row of pairs; c_end - columns there are, whole vectors first. */
static ALWAYS_INLINE void pair_rows(ht_bf16 *dst, const struct ssd_source *src, int64_t r,
                                    const bool scaled, const enum ht_dtype d)
{
    const int64_t low = r * src->stride, high = low + src->stride, n = src->n_cols;
    const bool both = r + 1 < src->n_rows;
    const float s0 = scaled ? src->scale[r] : 1.0f, s1 = scaled && both ? src->scale[r + 1] : 1.0f;
    int64_t c = 0;

    if (both)
        for (; c + HT_VLEN <= n; c += HT_VLEN)
            _mm512_storeu_si512(dst + 2 * c,
                                interleave(source_at(src, low, c, HT_VLEN, s0, scaled, d),
                                           source_at(src, high, c, HT_VLEN, s1, scaled, d)));
    for (; c < n; c += HT_VLEN)
        _mm512_storeu_si512(
            dst + 2 * c,
            interleave(source_at(src, low, c, n - c, s0, scaled, d),
                       both ? source_at(src, high, c, n - c, s1, scaled, d) : vf_set(0.0f)));
}

/* Unscaled bf16 rows: integers only. */
static ALWAYS_INLINE void pair_rows_bf16(ht_bf16 *dst, const struct ssd_source *src, int64_t r)
{
    const ht_bf16 *low = (const ht_bf16 *)src->p + r * src->stride, *high = low + src->stride;
    const int64_t n = src->n_cols;
    int64_t c = 0;

    if (r + 1 >= src->n_rows || n % HT_VLEN != 0) {
        pair_rows(dst, src, r, false, HT_DTYPE_BF16);
        return;
    }
    for (; c < n; c += HT_VLEN) {
        const __m512i l = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(low + c)));
        const __m512i h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(high + c)));
        _mm512_storeu_si512(dst + 2 * c, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
    }
}

static void pack_pairs_half(ht_bf16 *dst, int64_t rows, int64_t cols,
                            const struct ssd_source *source)
{
    const struct ssd_source copy = *source, *src = &copy; // a store to dst cannot change it
    // columns behind the end of the source are zero, whole vectors of them at most
    if (src->n_cols % HT_VLEN != 0 || src->n_cols + HT_VLEN <= cols)
        memset(dst, 0, (size_t)(rows * cols) * sizeof *dst);
    for (int64_t r = 0; r < src->n_rows; r += 2) {
        ht_bf16 *to = dst + r * cols;
        if (src->dtype == HT_DTYPE_BF16 && !src->scale)
            pair_rows_bf16(to, src, r);
        else if (src->dtype == HT_DTYPE_BF16)
            pair_rows(to, src, r, true, HT_DTYPE_BF16);
        else if (src->scale)
            pair_rows(to, src, r, true, HT_DTYPE_F32);
        else
            pair_rows(to, src, r, false, HT_DTYPE_F32);
    }
    const int64_t end = (src->n_rows + 1) / 2 * 2;
    memset(dst + end * cols, 0, (size_t)((rows - end) * cols) * sizeof *dst);
}
#endif

/* One row; `to` is the type of the operand. */
static ALWAYS_INLINE void pack_row(void *dst, int64_t at, int64_t cols,
                                   const struct ssd_source *src, int64_t r, const enum ht_dtype to,
                                   const bool scaled, const enum ht_dtype d)
{
    const float scale = scaled ? src->scale[r] : 1.0f;
    const int64_t n = src->n_cols;
    int64_t c = 0;

    for (; c + HT_VLEN <= n; c += HT_VLEN)
        vf_store_any(dst, at + c, to,
                     source_at(src, r * src->stride, c, HT_VLEN, scale, scaled, d));
    for (; c < cols; c += HT_VLEN)
        vf_store_any(dst, at + c, to, source_at(src, r * src->stride, c, n - c, scale, scaled, d));
}

void ssd_pack_rows(bool half, void *dst, int64_t rows, int64_t cols,
                   const struct ssd_source *source)
{
    const struct ssd_source copy = *source, *src = &copy; // a store to dst cannot change it
    const size_t e = ssd_operand_bytes(half);

    for (int64_t r = 0; r < src->n_rows; r++) {
        if (half && src->dtype == HT_DTYPE_BF16 && src->n_cols == cols && !src->scale)
            memcpy((ht_bf16 *)dst + r * cols, (const ht_bf16 *)src->p + r * src->stride,
                   (size_t)cols * e);
        else if (half && src->dtype == HT_DTYPE_BF16)
            pack_row(dst, r * cols, cols, src, r, HT_DTYPE_BF16, src->scale, HT_DTYPE_BF16);
        else if (half)
            pack_row(dst, r * cols, cols, src, r, HT_DTYPE_BF16, src->scale, HT_DTYPE_F32);
        else if (src->dtype == HT_DTYPE_BF16)
            pack_row(dst, r * cols, cols, src, r, HT_DTYPE_F32, src->scale, HT_DTYPE_BF16);
        else
            pack_row(dst, r * cols, cols, src, r, HT_DTYPE_F32, src->scale, HT_DTYPE_F32);
    }
    memset((char *)dst + (size_t)(src->n_rows * cols) * e, 0,
           (size_t)((rows - src->n_rows) * cols) * e);
}

void ssd_pack_pairs(bool half, void *dst, int64_t rows, int64_t cols, const struct ssd_source *src)
{
#if defined(__AVX512BF16__)
    if (half) {
        pack_pairs_half(dst, rows, cols, src);
        return;
    }
#endif
    ssd_pack_rows(half, dst, rows, cols, src); // kp = 1: the same layout
}

#if defined(__AVX2__)
static ALWAYS_INLINE void transpose_8x8(float *dst, int64_t ldd, const float *src, int64_t lds)
{
    __m256 r[8], s[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(src + i * lds);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        s[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(s[4 * i], s[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(s[4 * i + 1], s[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(dst + i * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(dst + (i + 4) * ldd, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}
#else
static inline void transpose_8x8(float *dst, int64_t ldd, const float *src, int64_t lds)
{
    uint32_t word;
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) {
            memcpy(&word, src + i * lds + j, sizeof word); // pairs of bf16 may look like NaN
            memcpy(dst + j * ldd + i, &word, sizeof word);
        }
}
#endif

static void transpose_strided(float *dst, int64_t ldd, const float *src, int64_t lds, int64_t rows,
                              int64_t cols)
{
    for (int64_t r = 0; r < rows; r += 8)
        for (int64_t c = 0; c < cols; c += 8)
            transpose_8x8(dst + c * ldd + r, ldd, src + r * lds + c, lds);
}

void ssd_transpose(void *dst, const void *src, int64_t lds, int64_t rows, int64_t cols)
{
    transpose_strided(dst, rows, src, lds, rows, cols);
}

void ssd_state_in(float *dst, const float *src, int64_t d_head, int64_t d_state)
{
    const int64_t Pp = ht_ssd_pad(d_head), Np = ht_ssd_pad(d_state);

    if (!src || Pp != d_head || Np != d_state) memset(dst, 0, (size_t)(Pp * Np) * sizeof *dst);
    if (src) transpose_strided(dst, Pp, src, d_state, d_head, d_state);
}

void ssd_state_out(float *dst, const float *src, int64_t d_head, int64_t d_state)
{
    transpose_strided(dst, d_state, src, ht_ssd_pad(d_head), d_state, d_head);
}
