/* core/ops/gemv_cpu.c: C = alpha * A W^T + beta * C for a few rows of A: the products of decoding.
 *
 * W (n, k) is read once from memory and everything else stays in cache, so the floor is the time
 * to read W: 2*n*k bytes in bf16. A tile holds R rows of W against M rows of A in registers:
 *
 *               k ->                         acc[r][i] += W[j+r, k..] * A[i, k..]
 *   W rows j..  [ R vectors loaded once ]
 *   A rows i..  [ M vectors from L1     ]    R + M loads for R*M multiply-adds
 *
 * A thread takes GROUP rows of W and goes over k in blocks short enough that M rows of A stay in
 * L1; the accumulators rest in memory between blocks. A is copied into that order first: its rows
 * are often 4096 bytes apart, where they would push each other out of L1.
 *
 * Every element of C is one chain of vector sums over k in the same order, whatever the tile, the
 * block and the number of threads: a sequence decoded alone and in a batch gets the same bits.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum {
    GROUP = 12,            // rows of W that a thread takes at a time; a multiple of every R
    BLOCK_BYTES = 16384,   // of A per tile and block of k: a third of L1
    PARALLEL_MIN = 1 << 15 // elements of W below which a parallel region costs more than the work
};

#if HT_VLEN == 16
enum { MAX_M = 8 };                                                       // rows of A per tile
static const int rows_of_tile[MAX_M + 1] = { 0, 6, 6, 6, 6, 4, 4, 3, 3 }; // R for M; 32 registers
#else
enum { MAX_M = 4 };
static const int rows_of_tile[MAX_M + 1] = { 0, 6, 4, 3, 3 }; // 16 registers
#endif

/* ---- one tile: R and M are constants where these are inlined ---- */

#define EACH_R _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define EACH_M _Pragma("GCC unroll 8") for (int i = 0; i < M; i++)

/* With AVX512-BF16, A stays bf16 and vdpbf16ps adds 32 products at once in fp32. Elsewhere a bf16 A
 * is widened while it is packed, so that only W is widened in the loop. */
#if defined(__AVX512BF16__)
enum { STEP_BF16 = 32, A_DTYPE_BF16 = HT_DTYPE_BF16 };
typedef __m512bh vec_bf16;
typedef ht_bf16 a_bf16;

static inline vec_bf16 load_w(const ht_bf16 *p)
{
    return (vec_bf16)_mm512_loadu_si512(p);
}

static inline vec_bf16 load_w_n(const ht_bf16 *p, int64_t n)
{
    return (vec_bf16)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), p);
}

#define load_a load_w
#define load_a_n load_w_n

static inline ht_vf madd_bf16(ht_vf acc, vec_bf16 a, vec_bf16 b)
{
    return (ht_vf)_mm512_dpbf16_ps((__m512)acc, a, b);
}
#else
enum { STEP_BF16 = HT_VLEN, A_DTYPE_BF16 = HT_DTYPE_F32 };
typedef ht_vf vec_bf16;
typedef float a_bf16;

#define load_w vf_load_bf16
#define load_w_n vf_load_bf16_n
#define load_a vf_load
#define load_a_n vf_load_n

static inline ht_vf madd_bf16(ht_vf acc, vec_bf16 a, vec_bf16 b)
{
    return acc + a * b;
}
#endif

/* The rows of the next tile: it starts where the prefetcher of the CPU has not been. An address
 * past W is not an error, and below AVX2 a cache line takes too many steps for this to pay. */
static inline void prefetch(const void *p)
{
#if HT_VLEN > 4
    __builtin_prefetch(p, 0, 3);
#else
    (void)p;
#endif
}

/* acc (R, M) += W (R, k) A (M, k)^T, in lanes; rows of A are ldx apart */
static inline __attribute__((always_inline)) void tile_bf16(ht_vf *acc, const ht_bf16 *w,
                                                            int64_t ldw, const a_bf16 *x,
                                                            int64_t ldx, int64_t k, const int R,
                                                            const int M)
{
    ht_vf s[6][MAX_M];
    vec_bf16 wv[6];
    int64_t p = 0;

    EACH_R EACH_M s[r][i] = acc[r * M + i];
    for (; p + STEP_BF16 <= k; p += STEP_BF16) {
        EACH_R
        {
            wv[r] = load_w(w + r * ldw + p);
            prefetch(w + (R + r) * ldw + p);
        }
        EACH_M
        {
            const vec_bf16 xv = load_a(x + i * ldx + p);
            EACH_R s[r][i] = madd_bf16(s[r][i], wv[r], xv);
        }
    }
    if (p < k) {
        EACH_R wv[r] = load_w_n(w + r * ldw + p, k - p);
        EACH_M
        {
            const vec_bf16 xv = load_a_n(x + i * ldx + p, k - p);
            EACH_R s[r][i] = madd_bf16(s[r][i], wv[r], xv);
        }
    }
    EACH_R EACH_M acc[r * M + i] = s[r][i];
}

static inline __attribute__((always_inline)) void tile_f32(ht_vf *acc, const float *w, int64_t ldw,
                                                           const float *x, int64_t ldx, int64_t k,
                                                           const int R, const int M)
{
    ht_vf s[6][MAX_M], wv[6];
    int64_t p = 0;

    EACH_R EACH_M s[r][i] = acc[r * M + i];
    for (; p + HT_VLEN <= k; p += HT_VLEN) {
        EACH_R
        {
            wv[r] = vf_load(w + r * ldw + p);
            prefetch(w + (R + r) * ldw + p);
        }
        EACH_M
        {
            const ht_vf xv = vf_load(x + i * ldx + p);
            EACH_R s[r][i] += wv[r] * xv;
        }
    }
    if (p < k) {
        EACH_R wv[r] = vf_load_n(w + r * ldw + p, k - p);
        EACH_M
        {
            const ht_vf xv = vf_load_n(x + i * ldx + p, k - p);
            EACH_R s[r][i] += wv[r] * xv;
        }
    }
    EACH_R EACH_M acc[r * M + i] = s[r][i];
}

typedef void tile_fn(ht_vf *acc, const void *w, int64_t ldw, const void *x, int64_t ldx, int64_t k);

/* One function per (R, M) and type. */
#define TILE(R, M)                                                                                 \
    static void tile_f32_##R##_##M(ht_vf *acc, const void *w, int64_t ldw, const void *x,          \
                                   int64_t ldx, int64_t k)                                         \
    {                                                                                              \
        tile_f32(acc, w, ldw, x, ldx, k, R, M);                                                    \
    }                                                                                              \
    static void tile_bf16_##R##_##M(ht_vf *acc, const void *w, int64_t ldw, const void *x,         \
                                    int64_t ldx, int64_t k)                                        \
    {                                                                                              \
        tile_bf16(acc, w, ldw, x, ldx, k, R, M);                                                   \
    }
#if HT_VLEN == 16
#define EDGE_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4) X(1, 5) X(1, 6) X(1, 7) X(1, 8)
#define WIDE_TILES(X) X(6, 1) X(6, 2) X(6, 3) X(6, 4) X(4, 5) X(4, 6) X(3, 7) X(3, 8)
#else
#define EDGE_TILES(X) X(1, 1) X(1, 2) X(1, 3) X(1, 4)
#define WIDE_TILES(X) X(6, 1) X(4, 2) X(3, 3) X(3, 4)
#endif
WIDE_TILES(TILE)
EDGE_TILES(TILE)

#define CELL_F32(R, M) [M] = tile_f32_##R##_##M,
#define CELL_BF16(R, M) [M] = tile_bf16_##R##_##M,
static tile_fn *const edge_tiles[2][MAX_M + 1] = { { EDGE_TILES(CELL_F32) },
                                                   { EDGE_TILES(CELL_BF16) } };
static tile_fn *const wide_tiles[2][MAX_M + 1] = { { WIDE_TILES(CELL_F32) },
                                                   { WIDE_TILES(CELL_BF16) } };

/* ---- sums over lanes ---- */

/* out[i] = sum of the lanes of v[i], for n vectors. The tree is the same for each. */
static void lane_sums(float *out, const ht_vf *v, int n)
{
#if HT_VLEN == 16
    // four rounds that add neighbours of two vectors into one: 16 sums for 30 shuffles and 15
    // additions
    for (; n >= 16; n -= 16, v += 16, out += 16) {
        __m512 s[16];
        for (int i = 0; i < 16; i++) s[i] = (__m512)v[i];
#define ROUND(width, lo, hi)                                                                       \
    _Pragma("GCC unroll 8") for (int i = 0; i < (width); i++) s[i] =                               \
        _mm512_add_ps(_mm512_permutex2var_ps(s[2 * i], lo, s[2 * i + 1]),                          \
                      _mm512_permutex2var_ps(s[2 * i], hi, s[2 * i + 1]))
        const __m512i lane =
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#define FROM(bit, l) /* lanes with `bit` clear from the first vector, set from the second */       \
    _mm512_mask_add_epi32(l, _mm512_test_epi32_mask(lane, _mm512_set1_epi32(bit)), l,              \
                          _mm512_set1_epi32(16))
#define LOW(bit) FROM(bit, _mm512_andnot_si512(_mm512_set1_epi32(bit), lane))
#define HIGH(bit) FROM(bit, _mm512_or_si512(_mm512_set1_epi32(bit), lane))
        ROUND(8, LOW(1), HIGH(1));
        ROUND(4, LOW(2), HIGH(2));
        ROUND(2, LOW(4), HIGH(4));
        ROUND(1, LOW(8), HIGH(8));
        _mm512_storeu_ps(out, s[0]);
#undef ROUND
#undef FROM
#undef LOW
#undef HIGH
    }
    for (int i = 0; i < n;
         i++) { // the same tree for one vector: neighbours, then neighbours of those
        float a[16];
        memcpy(a, &v[i], sizeof a);
        for (int w = 1; w < 16; w *= 2)
            for (int l = 0; l < 16; l += 2 * w) a[l] += a[l + w];
        out[i] = a[0];
    }
#else
    for (int i = 0; i < n; i++) out[i] = vf_sum(v[i]);
#endif
}

/* ---- */

struct packed { // A by blocks of k: block b holds (m, block) at b * m * block
    enum ht_dtype dtype;
    const char *x;
    int64_t block;  // elements of k per block
    int64_t stride; // elements between rows within a block
};

/* Rows j0 .. j1-1 of W against rows i0 .. i0+M-1 of A. */
static void group(const struct ht_gemm_args *a, const struct packed *x, int64_t i0, int64_t j0,
                  int64_t j1)
{
    const int type = a->ab_dtype == HT_DTYPE_BF16;
    const int64_t w_bytes = (int64_t)ht_dtype_bytes(a->ab_dtype), n = j1 - j0;
    const int64_t x_bytes = (int64_t)ht_dtype_bytes(x->dtype);
    const int M = a->m - i0 < MAX_M ? (int)(a->m - i0) : MAX_M, R = rows_of_tile[M];
    ht_vf acc[GROUP * MAX_M]; // (n, M)
    float sums[GROUP * MAX_M];

    for (int i = 0; i < n * M; i++) acc[i] = vf_set(0.0f);
    for (int64_t k0 = 0; k0 < a->k; k0 += x->block) {
        const int64_t k = a->k - k0 < x->block ? a->k - k0 : x->block;
        const char *xb = x->x + (k0 * a->m + i0 * x->stride) * x_bytes;
        for (int64_t j = 0; j < n;) {
            const char *w = (const char *)a->b + ((j0 + j) * a->ldb + k0) * w_bytes;
            const bool wide = n - j >= R;
            tile_fn *const tile = wide ? wide_tiles[type][M] : edge_tiles[type][M];
            tile(acc + j * M, w, a->ldb, xb, x->stride, k);
            j += wide ? R : 1;
        }
    }
    lane_sums(sums, acc, (int)n * M);
    for (int i = 0; i < M; i++)
        for (int64_t j = 0; j < n; j++) {
            const int64_t o = (i0 + i) * a->ldc + j0 + j;
            const float sum = a->alpha * sums[j * M + i];
            const float old = a->beta != 0.0f ? ht_load_f32(a->c, o, a->c_dtype) : 0.0f;
            ht_store_f32(a->c, o, a->c_dtype, sum + old);
        }
}

/* A as it is when one row needs neither order nor another type, else a copy in the gemm cache. */
static enum ht_status pack(struct packed *x, struct ht_backend *be, const struct ht_gemm_args *a)
{
    const enum ht_dtype to =
        a->ab_dtype == HT_DTYPE_BF16 ? (enum ht_dtype)A_DTYPE_BF16 : HT_DTYPE_F32;
    const int64_t bytes = (int64_t)ht_dtype_bytes(to), rows = a->m < MAX_M ? a->m : MAX_M;
    void *copy;

    *x = (struct packed){ .dtype = to, .x = a->a, .block = a->k, .stride = a->k };
    if (a->m == 1 && to == a->ab_dtype) return HT_OK;
    x->block = x->stride = BLOCK_BYTES / (rows * bytes) / 64 * 64;
    const int64_t n_blocks = (a->k + x->block - 1) / x->block;
    HT_TRY(ht_gemm_own_scratch(&copy, be, (size_t)(n_blocks * x->block * a->m * bytes)));
    for (int64_t k0 = 0; k0 < a->k; k0 += x->block) {
        const int64_t k = a->k - k0 < x->block ? a->k - k0 : x->block;
        for (int64_t i = 0; i < a->m; i++) {
            const size_t from = (size_t)(i * a->lda + k0) * ht_dtype_bytes(a->ab_dtype);
            char *dst = (char *)copy + (k0 * a->m + i * x->stride) * bytes;
            if (to == a->ab_dtype)
                memcpy(dst, (const char *)a->a + from, (size_t)(k * bytes));
            else
                ht_convert(dst, to, (const char *)a->a + from, a->ab_dtype, k);
        }
    }
    x->x = copy;
    return HT_OK;
}

enum ht_status HT_ISA_FN(ht_gemv_cpu)(struct ht_backend *be, const struct ht_gemm_args *a)
{
    const int64_t n_groups = (a->n + GROUP - 1) / GROUP;
    struct packed x;

    HT_TRY(pack(&x, be, a));
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (a->n * a->k > PARALLEL_MIN)
    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t j0 = g * GROUP, j1 = j0 + GROUP < a->n ? j0 + GROUP : a->n;
        for (int64_t i0 = 0; i0 < a->m; i0 += MAX_M) group(a, &x, i0, j0, j1);
    }
    return HT_OK;
}
