/* core/ops/quant_cpu.c: y = x W^T with W packed in strips of 16 rows (quant_impl.h).
 *
 *   y[i, j] = sum_g ws[j, g] xs[i, g] (sum_k u[j, k] xq[i, k] - z[j, g] sum_k xq[i, k]),  k in g
 *
 * u is the unsigned code, z its offset, xq the int8 code of x. The inner difference is exact in
 * int32: the accumulator starts at its second term. Rows of x are packed in blocks of a few rows,
 * four neighbours of k (two in bf16) of all rows together, so that a tile reads both operands in
 * order.
 *
 * Few rows: bound by reading W once. A tile takes STRIPS strips (that many streams of memory)
 * against one block; further blocks find the strips in L2, and fetch the next strips into L2
 * meanwhile (16 rows from memory on one Zen 5 core: bf16 429 instead of 290 GFLOP/s, int8 582
 * instead of 410, int4 646 instead of 500). Many rows: bound by the dot products, 24 sums (integer
 * formats 12) in 32 registers. Sums over groups (over k in bf16) go in one order whatever the tile,
 * so a row's result depends on that row alone.
 */
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
enum {
    V = HT_Q_STRIP / HT_VLEN, // vectors per strip
    AHEAD_BYTES = 700 << 10,  // this and the next strips in L2 together, of 1 MiB
    PARALLEL_MIN = 1 << 15, // elements of W below which a parallel region costs more than the work
    PACK_MIN = 1 << 17      // the same for elements of x
};

/* One block of R rows of x. */
struct x_block {
    const void *codes;    // (k_padded/4, R, 4) int8, or (k_padded/2, R, 2) bf16
    const float *scales;  // (n_groups, R)
    const int32_t *fixes; // (n_groups, R): minus the sum of codes, times z where that is constant
};

struct tile {
    const unsigned char *strip; // the first of S
    size_t strip_bytes, zeros_at, codes_at;
    int64_t n_groups, k_padded;
    int pieces; // of 32 elements per group
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

    EACH_R EACH_V sum[r * S * V + v] = vf_set(0.0f);
    for (int64_t g = 0; g < t->n_groups; g++) {
        if (t->ahead) fetch_ahead(t, &done, &due, t->n_groups, S);
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

    EACH_R EACH_V acc[r * S * V + v] = vf_set(0.0f);
    for (int64_t k = 0; k < t->k_padded; k += 8) {
        if (t->ahead) fetch_ahead(t, &done, &due, t->k_padded / 8, S);
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

/* ---- x ---- */

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

/* ---- y ---- */

/* A tile's sums (R, S * 16) to y, whose columns begin at j0. */
static void write_back(const struct ht_qgemm_args *a, const float *out, int digits, int64_t row0,
                       int R, int S, int64_t j0)
{
    const int64_t n = a->w->n - j0 < S * HT_Q_STRIP ? a->w->n - j0 : S * HT_Q_STRIP;

    for (int r = 0; r < R; r += digits, row0++) {
        const float *o = out + r * S * HT_Q_STRIP;
        for (int64_t j = 0; j < n; j += HT_VLEN) {
            const int64_t left = n - j, y = row0 * a->ldy + j0 + j;
            ht_vf v = vf_load(o + j);
            if (digits == 2) v += vf_load(o + S * HT_Q_STRIP + j);
            v *= a->alpha;
            if (left >= HT_VLEN) {
                if (a->beta != 0.0f) v += vf_load_any(a->y, y, a->y_dtype);
                vf_store_any(a->y, y, a->y_dtype, v);
            } else if (a->y_dtype == HT_DTYPE_F32) {
                if (a->beta != 0.0f) v += vf_load_n((float *)a->y + y, left);
                vf_store_n((float *)a->y + y, v, left);
            } else {
                if (a->beta != 0.0f) v += vf_load_bf16_n((ht_bf16 *)a->y + y, left);
                vf_store_bf16_n((ht_bf16 *)a->y + y, v, left);
            }
        }
    }
}

/* Strips s0 .. s0 + S - 1 against all rows; `ahead`: the S strips behind them come next. */
static void strips(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0, int S,
                   bool ahead)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t n_blocks = (p->n_rows + p->max_r - 1) / p->max_r;
    const int64_t n_lines = (int64_t)(w->strip_bytes / 64);
    _Alignas(64) float out[MAX_R * STRIPS * HT_Q_STRIP];
    struct tile t = { .strip = w->data + (size_t)s0 * w->strip_bytes,
                      .strip_bytes = w->strip_bytes,
                      .zeros_at = ht_q_zeros_at(w),
                      .codes_at = ht_q_codes_at(w),
                      .n_groups = ht_q_groups(w->format, w->group, w->k),
                      .k_padded = w->k_padded,
                      .pieces = w->group / 32,
                      .out = out };

    for (int64_t b = 0; b < n_blocks; b++) {
        const int R = block_rows(p, b);
        const int64_t from = n_lines * b / n_blocks;
        t.x = block_at(p, w, b);
        t.ahead = ahead ? t.strip + (size_t)S * w->strip_bytes + (size_t)from * 64 : NULL;
        t.ahead_lines = n_lines * (b + 1) / n_blocks - from;
        (S == STRIPS ? wide_tiles : edge_tiles)[w->format][R](&t);
        write_back(a, out, p->digits, b * p->max_r / p->digits, R, S, s0 * HT_Q_STRIP);
    }
}

/* Strips s0 .. s1 - 1, whose number is a multiple of STRIPS except at the end of the matrix. */
static void strip_range(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0,
                        int64_t s1)
{
    // with one row the loop is no more than loads: there it gains with 4 bits only
    const bool worth = p->n_rows > 1 || a->w->format == HT_Q_INT4 || a->w->format == HT_Q_INT4Z;
    const bool ahead = worth && 2 * STRIPS * a->w->strip_bytes <= AHEAD_BYTES;

    for (; s0 + STRIPS <= s1; s0 += STRIPS)
        strips(a, p, s0, STRIPS, ahead && s0 + 2 * STRIPS <= s1);
    for (; s0 < s1; s0++) strips(a, p, s0, 1, false);
}

enum ht_status HT_ISA_FN(ht_qgemm_cpu)(struct ht_backend *be, const struct ht_qgemm_args *a)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t n_groups = ht_q_groups(w->format, w->group, w->k);
    const int64_t n_strips = ht_q_n_strips(w), n_blocks = (n_strips + STRIPS - 1) / STRIPS;
    const size_t mark = ht_arena_mark(&be->scratch);
    const bool parallel = w->n * w->k > PARALLEL_MIN;
    // eight turns per thread: one that shares its core with another program takes fewer
    const int64_t blocks = n_blocks / (8 * be->n_threads);
    const int64_t turn = STRIPS * (blocks < 1 ? 1 : blocks);
    struct packed p = { .digits = a->precise && w->format != HT_Q_BF16 ? 2 : 1,
                        .max_r = w->format == HT_Q_BF16 ? MAX_R : INT_R };
    void *base;

    p.n_rows = a->m * p.digits;
    p.block_bytes = (int64_t)ht_arena_bytes((
        size_t)(p.max_r * (w->format == HT_Q_BF16 ? 2 * w->k_padded : w->k_padded + 8 * n_groups)));
    HT_TRY(ht_arena_take(&base, &be->scratch,
                         (size_t)((p.n_rows + p.max_r - 1) / p.max_r * p.block_bytes)));
    p.base = base;
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (a->m * w->k > PACK_MIN)
    for (int64_t i = 0; i < a->m; i++) pack_row(&p, a, i);
#pragma omp parallel for num_threads(be->n_threads) schedule(dynamic, 1) if (parallel)
    for (int64_t s0 = 0; s0 < n_strips; s0 += turn)
        strip_range(a, &p, s0, s0 + turn < n_strips ? s0 + turn : n_strips);
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
