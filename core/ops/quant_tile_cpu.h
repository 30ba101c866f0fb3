/* core/ops/quant_tile_cpu.h: for quant_cpu.c: products of a few strips with a few rows of x.
 *
 * A tile takes S strips (each a stream of memory) and R rows of x, packed so that both are read in
 * order. With AVX-512 R * S = 24 sums in 32 registers; integer formats need two accumulators per
 * sum and take 12.
 */
#ifndef HT_OPS_QUANT_TILE_CPU_H
#define HT_OPS_QUANT_TILE_CPU_H

#include "core/base/simd.h"
#include "core/ops/quant_impl.h"

// Rows of x per tile. Integer tiles need two accumulators per sum, so they are half as high: 12
// sums in 32 registers. With 8 rows and the fp32 sums in L1 they were slower: 475 GFLOP/s beside
// 610 on one Zen 5 core.
#if HT_VLEN == 16
enum { MAX_R = 8, INT_R = 4, STRIPS = 3 };
#elif HT_VLEN == 8
enum { MAX_R = 4, INT_R = 4, STRIPS = 1 }; // 16 registers
#else
enum { MAX_R = 2, INT_R = 2, STRIPS = 1 };
#endif
enum { V = HT_Q_STRIP / HT_VLEN }; // vectors per strip

/* One block of R rows of x. */
struct x_block {
    const void *codes;    // (k_padded/4, R, 4) int8, or (k_padded/2, R, 2) bf16
    const float *scales;  // (n_groups, R)
    const int32_t *fixes; // (n_groups, R): minus the sum of codes, times z where that is constant
};

struct tile {
    const unsigned char *strip; // the first of S
    size_t strip_bytes, zeros_at, codes_at;
    int64_t first, n_units; // of k: groups, or 32 elements in bf16
    int pieces;             // of 32 elements per group
    bool go_on;             // out holds the sums of the units before
    // the strips that come next are fetched into L2 meanwhile: this tile's share of their lines
    const unsigned char *ahead; // NULL: none
    int64_t ahead_lines;
    struct x_block x;
    float *out; // (R, S * 16)
};

#define EACH_R _Pragma("GCC unroll 8") for (int r = 0; r < R; r++)
#define EACH_V _Pragma("GCC unroll 8") for (int v = 0; v < S * V; v++)

/* ---- dot products of four int8, or two bf16, per lane ---- */

#if defined(__AVX512VNNI__)
typedef ht_vi codes4;
typedef ht_vi acts4;
static inline codes4 split_codes(ht_vi u)
{
    return u;
}
static inline acts4 load_acts(const int32_t *p)
{
    return (ht_vi)_mm512_set1_epi32(*p);
}
static inline ht_vi dot4(ht_vi acc, codes4 u, acts4 a)
{
    return (ht_vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)a);
}
#else
/* Even and odd bytes as int16: a product is at most 255 * 127, which int16 holds. */
typedef int16_t v16 __attribute__((vector_size(4 * HT_VLEN)));
typedef uint16_t vu16 __attribute__((vector_size(4 * HT_VLEN)));
typedef struct {
    v16 even, odd;
} codes4;
typedef codes4 acts4;
static inline codes4 split_codes(ht_vi u)
{
    return (codes4){ (v16)((vu16)u & 0xff), (v16)((vu16)u >> 8) };
}
static inline acts4 load_acts(const int32_t *p)
{
    const ht_vi a = *p - (ht_vi){ 0 };
    return (acts4){ (v16)((vu16)a << 8) >> 8, (v16)a >> 8 };
}
static inline ht_vi dot4(ht_vi acc, codes4 u, acts4 a)
{
#if HT_VLEN == 16
    return acc + (ht_vi)_mm512_madd_epi16((__m512i)u.even, (__m512i)a.even) +
           (ht_vi)_mm512_madd_epi16((__m512i)u.odd, (__m512i)a.odd);
#elif HT_VLEN == 8
    return acc + (ht_vi)_mm256_madd_epi16((__m256i)u.even, (__m256i)a.even) +
           (ht_vi)_mm256_madd_epi16((__m256i)u.odd, (__m256i)a.odd);
#else
    const ht_vi p = (ht_vi)(u.even * a.even), q = (ht_vi)(u.odd * a.odd);
    return acc + ((p << 16) >> 16) + (p >> 16) + ((q << 16) >> 16) + (q >> 16);
#endif
}
#endif

static inline ht_vf dot2(ht_vf acc, ht_vi w, ht_vi x)
{
#if defined(__AVX512BF16__)
    return (ht_vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#else
    acc += (ht_vf)((ht_vu)w << 16) * (ht_vf)((ht_vu)x << 16);
    return acc + (ht_vf)((ht_vu)w & 0xffff0000u) * (ht_vf)((ht_vu)x & 0xffff0000u);
#endif
}

static inline ht_vi load_line(const unsigned char *p)
{
    ht_vi v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline ht_vf to_float(ht_vi v)
{
    return __builtin_convertvector(v, ht_vf);
}

/* Vector v of a tile: strip v / V, lanes from (v % V) * HT_VLEN. */
static inline const unsigned char *at(const struct tile *t, int v, size_t line_at)
{
    return t->strip + (size_t)(v / V) * t->strip_bytes + line_at + (size_t)(v % V) * 4 * HT_VLEN;
}

static inline void prefetch(const void *p)
{
#if HT_VLEN > 4
    __builtin_prefetch(p, 0, 2);
#else
    (void)p;
#endif
}

/* Called in each of `steps` steps of a tile: spreads its share of lines evenly over them. */
static inline __attribute__((always_inline)) void
fetch_ahead(const struct tile *t, int64_t *done, int64_t *due, int64_t steps, const int S)
{
    for (*due += t->ahead_lines; *due >= steps; *due -= steps, (*done)++)
        for (int s = 0; s < S; s++)
            prefetch(t->ahead + (size_t)s * t->strip_bytes + (size_t)*done * 64);
}

/* ---- tiles: R, S and the format are constants where these are inlined ---- */

/* 32 elements of k: acc (R, S * V) += codes * x */
static inline __attribute__((always_inline)) void piece(ht_vi *acc, const struct tile *t,
                                                        size_t code_at, const int32_t *x,
                                                        const int format, const int R, const int S)
{
    if (format == HT_Q_INT8) {
        _Pragma("GCC unroll 8") for (int quad = 0; quad < 8; quad++)
        {
            codes4 u[STRIPS * V];
            EACH_V
            {
                const unsigned char *p = at(t, v, code_at + 64 * (size_t)quad);
                u[v] = split_codes(load_line(p));
            }
            EACH_R
            {
                const acts4 a = load_acts(x + quad * R + r);
                EACH_V acc[r * S * V + v] = dot4(acc[r * S * V + v], u[v], a);
            }
        }
    } else {
        _Pragma("GCC unroll 4") for (int pair = 0; pair < 4; pair++)
        {
            codes4 low[STRIPS * V], high[STRIPS * V];
            EACH_V
            {
                const unsigned char *p = at(t, v, code_at + 64 * (size_t)pair);
                const ht_vi line = load_line(p);
                low[v] = split_codes(line & 0x0f0f0f0f);
                high[v] = split_codes((line >> 4) & 0x0f0f0f0f);
            }
            EACH_R
            {
                const acts4 a = load_acts(x + 2 * pair * R + r);
                EACH_V acc[r * S * V + v] = dot4(acc[r * S * V + v], low[v], a);
            }
            EACH_R
            {
                const acts4 a = load_acts(x + (2 * pair + 1) * R + r);
                EACH_V acc[r * S * V + v] = dot4(acc[r * S * V + v], high[v], a);
            }
        }
    }
}

static inline __attribute__((always_inline)) void tile_int(const struct tile *t, const int format,
                                                           const int R, const int S)
{
    const int32_t *x = t->x.codes;
    const size_t piece_bytes = format == HT_Q_INT8 ? 512 : 256;
    size_t code_at = t->codes_at;
    int64_t done = 0, due = 0;
    ht_vf sum[INT_R * STRIPS * V];

    EACH_R EACH_V sum[r * S * V + v] =
        t->go_on ? vf_load(t->out + (r * S * V + v) * HT_VLEN) : vf_set(0.0f);
    x += t->first * t->pieces * 8 * R;
    code_at += (size_t)(t->first * t->pieces) * piece_bytes;
    for (int64_t g = t->first; g < t->first + t->n_units; g++) {
        if (t->ahead) fetch_ahead(t, &done, &due, t->n_units, S);
        const float *xs = t->x.scales + g * R;
        const int32_t *fix = t->x.fixes + g * R;
        ht_vi acc[INT_R * STRIPS * V];
        ht_vf ws[STRIPS * V];

        if (format == HT_Q_INT4Z) {
            EACH_V
            {
                uint8_t z[HT_VLEN];
                ht_vi zero;
                memcpy(z,
                       t->strip + (size_t)(v / V) * t->strip_bytes + t->zeros_at +
                           (size_t)(g * HT_Q_STRIP + (v % V) * HT_VLEN),
                       sizeof z);
#if HT_VLEN == 16
                zero = (ht_vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)z));
#else
                for (int i = 0; i < HT_VLEN; i++) zero[i] = z[i];
#endif
                EACH_R acc[r * S * V + v] = zero * fix[r];
            }
        } else {
            EACH_R EACH_V acc[r * S * V + v] = fix[r] - (ht_vi){ 0 };
        }
        for (int h = 0; h < t->pieces; h++) {
            piece(acc, t, code_at, x, format, R, S);
            code_at += piece_bytes;
            x += 8 * R;
        }
        EACH_V ws[v] = vf_load_bf16(
            (const ht_bf16 *)(const void *)(t->strip + (size_t)(v / V) * t->strip_bytes) +
            g * HT_Q_STRIP + (v % V) * HT_VLEN);
        EACH_R EACH_V
        {
            sum[r * S * V + v] += to_float(acc[r * S * V + v]) * (ws[v] * xs[r]);
        }
    }
    EACH_R EACH_V vf_store(t->out + (r * S * V + v) * HT_VLEN, sum[r * S * V + v]);
}

static inline __attribute__((always_inline)) void tile_bf16(const struct tile *t, const int R,
                                                            const int S)
{
    const int32_t *x = t->x.codes;
    size_t code_at = t->codes_at;
    int64_t done = 0, due = 0;
    ht_vf acc[MAX_R * STRIPS * V];

    EACH_R EACH_V acc[r * S * V + v] =
        t->go_on ? vf_load(t->out + (r * S * V + v) * HT_VLEN) : vf_set(0.0f);
    x += t->first * 16 * R;
    code_at += (size_t)t->first * 1024;
    for (int64_t q = 0; q < 4 * t->n_units; q++) { // 8 elements of k
        if (t->ahead) fetch_ahead(t, &done, &due, 4 * t->n_units, S);
        _Pragma("GCC unroll 4") for (int pair = 0; pair < 4; pair++)
        {
            ht_vi w[STRIPS * V];
            EACH_V
            {
                const unsigned char *p = at(t, v, code_at);
                w[v] = load_line(p);
            }
            EACH_R
            {
                const ht_vi xv = x[r] - (ht_vi){ 0 };
                EACH_V acc[r * S * V + v] = dot2(acc[r * S * V + v], w[v], xv);
            }
            x += R;
            code_at += 64;
        }
    }
    EACH_R EACH_V vf_store(t->out + (r * S * V + v) * HT_VLEN, acc[r * S * V + v]);
}

typedef void tile_fn(const struct tile *t);

#define TILE_BF16(R, S)                                                                            \
    static void bf16_##R##_##S(const struct tile *t)                                               \
    {                                                                                              \
        tile_bf16(t, R, S);                                                                        \
    }
#define TILE_INT(R, S)                                                                             \
    static void int8_##R##_##S(const struct tile *t)                                               \
    {                                                                                              \
        tile_int(t, HT_Q_INT8, R, S);                                                              \
    }                                                                                              \
    static void int4_##R##_##S(const struct tile *t)                                               \
    {                                                                                              \
        tile_int(t, HT_Q_INT4, R, S);                                                              \
    }                                                                                              \
    static void int4z_##R##_##S(const struct tile *t)                                              \
    {                                                                                              \
        tile_int(t, HT_Q_INT4Z, R, S);                                                             \
    }
#if HT_VLEN == 16
#define BF16_TILES(X, S) X(1, S) X(2, S) X(3, S) X(4, S) X(5, S) X(6, S) X(7, S) X(8, S)
#define INT_TILES(X, S) X(1, S) X(2, S) X(3, S) X(4, S)
#define WIDE 3
BF16_TILES(TILE_BF16, 3)
INT_TILES(TILE_INT, 3)
#else
#if HT_VLEN == 8
#define BF16_TILES(X, S) X(1, S) X(2, S) X(3, S) X(4, S)
#else
#define BF16_TILES(X, S) X(1, S) X(2, S)
#endif
#define INT_TILES BF16_TILES
#define WIDE 1
#endif
BF16_TILES(TILE_BF16, 1)
INT_TILES(TILE_INT, 1)

#define CELL_(name, r, s) name##_##r##_##s
#define CELL(name, r, s) [r] = CELL_(name, r, s),
#define CELL_BF16(r, s) CELL(bf16, r, s)
#define CELL_INT8(r, s) CELL(int8, r, s)
#define CELL_INT4(r, s) CELL(int4, r, s)
#define CELL_INT4Z(r, s) CELL(int4z, r, s)
#define TABLE(s)                                                                                   \
    {                                                                                              \
        { BF16_TILES(CELL_BF16, s) }, { INT_TILES(CELL_INT8, s) }, { INT_TILES(CELL_INT4, s) },    \
        {                                                                                          \
            INT_TILES(CELL_INT4Z, s)                                                               \
        }                                                                                          \
    }
static tile_fn *const edge_tiles[HT_Q_COUNT][MAX_R + 1] = TABLE(1);
static tile_fn *const wide_tiles[HT_Q_COUNT][MAX_R + 1] = TABLE(WIDE);

#endif
