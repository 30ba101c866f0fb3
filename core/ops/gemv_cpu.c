/* core/ops/gemv_cpu.c: C = alpha * A W^T + beta * C for a few rows of A: the linear layers of
 * decoding.
 *
 * W (n, k) is read once from memory and everything else stays in cache, so the floor is the time to
 * read W: 2*n*k bytes in bf16. A tile holds R rows of W against M rows of A in registers:
 *
 *               k ->                         acc[r][i] += W[j+r, k..] * A[i, k..]    R*M
 * accumulators W rows j..  [ R vectors loaded once ]    (R + M) loads for R*M multiply-adds A rows
 * i..  [ M vectors from L1     ]
 *
 * Every element of C is one chain of vector sums over k in the same order, whatever the tile and
 * the number of threads: a sequence decoded alone and in a batch of 16 gets the same bits.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

#if HT_VLEN == 16
enum { GROUP = 12 }; // rows of W that a thread takes at a time; a multiple of every R
static const int rows_of_tile[9] = { 0, 6, 6, 6, 6, 4, 4, 3, 3 }; // R for M = 1..8; 32 registers
#else
enum { GROUP = 12 };
static const int rows_of_tile[9] = { 0, 6, 4, 3, 3, 2, 2, 1, 1 }; // 16 registers
#endif

/* Elements of k per vector step. */
#if defined(__AVX512BF16__)
enum { STEP_BF16 = 32 }; // vdpbf16ps: 32 products in one instruction, fp32 sums
#else
enum { STEP_BF16 = HT_VLEN };
#endif

#if defined(__AVX512BF16__)
static inline __m512bh load_pairs(const ht_bf16 *p, int64_t n)
{
    const __mmask32 mask = n >= 32 ? 0xffffffffu : (1u << n) - 1u;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}
#endif

static inline float lane_sum(ht_vf v)
{
#if HT_VLEN == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    return vf_sum(v);
#endif
}

/* R rows of W by M rows of A; R and M are constants where this is inlined. */
static inline __attribute__((always_inline)) void tile_bf16(float *out, const ht_bf16 *w,
                                                            int64_t ldw, const ht_bf16 *x,
                                                            int64_t ldx, int64_t k, const int R,
                                                            const int M)
{
    ht_vf acc[6][8];

#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) acc[r][i] = vf_set(0.0f);
    int64_t p = 0;
#if defined(__AVX512BF16__)
    for (; p < k; p += STEP_BF16) {
        __m512bh wv[6];
        if (p + STEP_BF16 <= k) {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                wv[r] = (__m512bh)_mm512_loadu_si512((const void *)(w + r * ldw + p));
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const __m512bh xv = (__m512bh)_mm512_loadu_si512((const void *)(x + i * ldx + p));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    acc[r][i] = (ht_vf)_mm512_dpbf16_ps((__m512)acc[r][i], wv[r], xv);
            }
        } else {
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) wv[r] = load_pairs(w + r * ldw + p, k - p);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                const __m512bh xv = load_pairs(x + i * ldx + p, k - p);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    acc[r][i] = (ht_vf)_mm512_dpbf16_ps((__m512)acc[r][i], wv[r], xv);
            }
        }
    }
#else
    for (; p + STEP_BF16 <= k; p += STEP_BF16) {
        ht_vf wv[6];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) wv[r] = vf_load_bf16(w + r * ldw + p);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ht_vf xv = vf_load_bf16(x + i * ldx + p);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][i] += wv[r] * xv;
        }
    }
    if (p < k)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ht_vf xv = vf_load_bf16_n(x + i * ldx + p, k - p);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][i] += vf_load_bf16_n(w + r * ldw + p, k - p) * xv;
        }
#endif
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) out[r * M + i] = lane_sum(acc[r][i]);
}

static inline __attribute__((always_inline)) void tile_f32(float *out, const float *w, int64_t ldw,
                                                           const float *x, int64_t ldx, int64_t k,
                                                           const int R, const int M)
{
    ht_vf acc[6][8];
    int64_t p = 0;

#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) acc[r][i] = vf_set(0.0f);
    for (; p + HT_VLEN <= k; p += HT_VLEN) {
        ht_vf wv[6];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) wv[r] = vf_load(w + r * ldw + p);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ht_vf xv = vf_load(x + i * ldx + p);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][i] += wv[r] * xv;
        }
    }
    if (p < k)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const ht_vf xv = vf_load_n(x + i * ldx + p, k - p);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) acc[r][i] += vf_load_n(w + r * ldw + p, k - p) * xv;
        }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) out[r * M + i] = lane_sum(acc[r][i]);
}

typedef void tile_fn(float *out, const void *w, int64_t ldw, const void *x, int64_t ldx, int64_t k);

/* One function per (R, M) and type. */
#define TILE(R, M)                                                                                 \
    static void tile_f32_##R##_##M(float *out, const void *w, int64_t ldw, const void *x,          \
                                   int64_t ldx, int64_t k)                                         \
    {                                                                                              \
        tile_f32(out, w, ldw, x, ldx, k, R, M);                                                    \
    }                                                                                              \
    static void tile_bf16_##R##_##M(float *out, const void *w, int64_t ldw, const void *x,         \
                                    int64_t ldx, int64_t k)                                        \
    {                                                                                              \
        tile_bf16(out, w, ldw, x, ldx, k, R, M);                                                   \
    }
#if HT_VLEN == 16
#define FULL_TILES(X) X(6, 1) X(6, 2) X(6, 3) X(6, 4) X(4, 5) X(4, 6) X(3, 7) X(3, 8)
#else
#define FULL_TILES(X) X(6, 1) X(4, 2) X(3, 3) X(3, 4) X(2, 5) X(2, 6)
#endif
#define EDGE_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8)
FULL_TILES(TILE)
EDGE_TILES(TILE)

#define CELL_F32(R, M) [M] = tile_f32_##R##_##M,
#define CELL_BF16(R, M) [M] = tile_bf16_##R##_##M,
static tile_fn *const edge_tiles[2][9] = { { EDGE_TILES(CELL_F32) }, { EDGE_TILES(CELL_BF16) } };
#if HT_VLEN == 16
static tile_fn *const full_tiles[2][9] = { { FULL_TILES(CELL_F32) }, { FULL_TILES(CELL_BF16) } };
#else
static tile_fn *const full_tiles[2][9] = {
    { FULL_TILES(CELL_F32) CELL_F32(1, 7) CELL_F32(1, 8) },
    { FULL_TILES(CELL_BF16) CELL_BF16(1, 7) CELL_BF16(1, 8) },
};
#endif

static void store(const struct ht_gemm_args *a, int64_t i, int64_t j, float sum)
{
    const int64_t o = i * a->ldc + j;
    const float old = a->beta != 0.0f ? ht_load_f32(a->c, o, a->c_dtype) : 0.0f;
    ht_store_f32(a->c, o, a->c_dtype, a->alpha * sum + old);
}

/* Rows j0 .. j1-1 of W against all rows of A. */
static void group(const struct ht_gemm_args *a, int64_t j0, int64_t j1)
{
    const int type = a->ab_dtype == HT_DTYPE_BF16;
    const size_t bytes = ht_dtype_bytes(a->ab_dtype);
    float out[6 * 8];

    for (int64_t i0 = 0; i0 < a->m; i0 += 8) {
        const int n_rows = a->m - i0 < 8 ? (int)(a->m - i0) : 8;
        const int wide = rows_of_tile[n_rows];
        const char *x = (const char *)a->a + (size_t)(i0 * a->lda) * bytes;
        for (int64_t j = j0; j < j1;) {
            const int rows = j1 - j >= wide ? wide : 1;
            const char *w = (const char *)a->b + (size_t)(j * a->ldb) * bytes;
            tile_fn *const tile = rows == 1 ? edge_tiles[type][n_rows] : full_tiles[type][n_rows];
            tile(out, w, a->ldb, x, a->lda, a->k);
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < n_rows; i++) store(a, i0 + i, j + r, out[r * n_rows + i]);
            j += rows;
        }
    }
}

enum ht_status HT_ISA_FN(ht_gemv_cpu)(struct ht_backend *be, const struct ht_gemm_args *a)
{
    const int64_t n_groups = (a->n + GROUP - 1) / GROUP;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (a->n * a->k > 32768)
    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t end = (g + 1) * GROUP;
        group(a, g * GROUP, end < a->n ? end : a->n);
    }
    return HT_OK;
}
