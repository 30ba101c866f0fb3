/* core/ops/quant_rows.c: quantisation of rows, and back.
 *
 * int8   scale = max |w| / 127, rounded up to bf16, so that |q| <= 127; q = round(w / scale)
 * fp8    scale = the smallest power of two with which max |w| is at most 448
 * int4   for a few divisors d around 8: q = round(-d w / top), clamped to -8..7, where top is the
 *        element of largest magnitude; with the least-squares scale of these q, the d of least
 *        squared error wins (as llama.cpp's formats do it)
 * int4z  the range [min(0, w), max(0, w)] times a few factors around 1, two zero points each: the
 *        pair of least squared error wins
 *
 * Compiled once, without fused multiply-add: files must not depend on the CPU that wrote them.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "core/ops/fp8.h"
#include "core/ops/quant.h"

enum { MAX_GROUP = 64, LANES = 4 };
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t mask __attribute__((vector_size(4 * LANES)));

static ht_bf16 bf16_up(float positive) // the smallest bf16 that is not below
{
    ht_bf16 b = ht_f32_to_bf16(positive);
    if (ht_bf16_to_f32(b) < positive) b++;
    return b;
}

static int clamp(int v, int low, int high)
{
    return v < low ? low : v > high ? high : v;
}

static int nearest(float v) // of moderate size; ties to even
{
    return (int)lrintf(v);
}

static float clampf(float v, float low, float high)
{
    v = v > low ? v : low;
    return v < high ? v : high;
}

/* Ties to even for |v| < 2^22; one addition each, which compilers turn into vectors. */
static float round_near(float v)
{
    return (v + 12582912.0f) - 12582912.0f;
}

static void group_int8(int8_t *q, ht_bf16 *scale, const float *w, int64_t n)
{
    float most = 0.0f;

    for (int64_t i = 0; i < n; i++) most = fmaxf(most, fabsf(w[i]));
    *scale = bf16_up(most / 127.0f);
    const float s = ht_bf16_to_f32(*scale), inverse = s > 0.0f ? 1.0f / s : 0.0f;
    if (!isfinite(inverse)) { // subnormal: as good as zero
        *scale = 0;
        memset(q, 0, (size_t)n);
        return;
    }
    for (int64_t i = 0; i < n; i++)
        q[i] = (int8_t)clampf(round_near(w[i] * inverse), -127.0f, 127.0f);
}

static void group_fp8(uint8_t *q, ht_bf16 *scale, const float *w, int64_t n)
{
    float most = 0.0f;

    for (int64_t i = 0; i < n; i++) most = fmaxf(most, fabsf(w[i]));
    const int s = ht_fp8_scale_log2(most, HT_FP8_E4M3);
    if (s < -100) { // as good as zero, and bf16 numbers end near
        *scale = 0;
        memset(q, 0, (size_t)n);
        return;
    }
    *scale = ht_f32_to_bf16(ht_fp8_power(s));
    const float inverse = ht_fp8_power(-s);
    for (int64_t i = 0; i < n; i++) q[i] = ht_fp8_from_f32(w[i] * inverse, HT_FP8_E4M3);
}

/* Searches are over w / unit, padded with zeros to whole vectors, in partial sums per lane: the
 * same bits wherever it is compiled. Returns the number of vectors. */
static int normalise(vec u[MAX_GROUP / LANES], const float *w, int64_t n, float unit)
{
    const int n_vectors = (int)((n + LANES - 1) / LANES);
    const float inverse = 1.0f / unit;
    float scaled[MAX_GROUP] = { 0 };

    for (int64_t i = 0; i < n; i++) scaled[i] = w[i] * inverse;
    memcpy(u, scaled, (size_t)n_vectors * sizeof *u);
    return n_vectors;
}

static inline vec vec_clamp(vec v, float low, float high)
{
    const vec l = low - (vec){ 0 }, h = high - (vec){ 0 };
    const mask above = v > l, below = v < h;
    const mask raised = ((mask)v & above) | ((mask)l & ~above);
    return (vec)((raised & below) | ((mask)h & ~below));
}

static inline vec vec_round(vec v) // as round_near
{
    return (v + 12582912.0f) - 12582912.0f;
}

static float sum_of(vec v)
{
    return (v[0] + v[1]) + (v[2] + v[3]);
}

static void group_int4(uint8_t *q, ht_bf16 *scale, const float *w, int64_t n)
{
    static const float divisors[] = { 8.0f, 7.0f, 7.4f, 7.7f, 8.3f, 8.6f, 9.0f };
    float top = 0.0f, best = -1.0f, best_scale = 0.0f;
    vec u[MAX_GROUP / LANES];

    for (int64_t i = 0; i < n; i++)
        if (fabsf(w[i]) > fabsf(top)) top = w[i];
    if (fabsf(top) > 1e-30f) {
        const int n_vectors = normalise(u, w, n, top);
        for (size_t d = 0; d < sizeof divisors / sizeof *divisors; d++) {
            vec uq = { 0 }, qq = { 0 };
            for (int v = 0; v < n_vectors; v++) {
                const vec q4 = vec_clamp(vec_round(u[v] * -divisors[d]), -8.0f, 7.0f);
                uq += u[v] * q4;
                qq += q4 * q4;
            }
            const float a = sum_of(uq), c = sum_of(qq);
            // with the best scale a / c the squared error is sum u^2 - a^2 / c
            if (c > 0.0f && a * a / c > best) {
                best = a * a / c;
                best_scale = a / c * top;
            }
        }
    }
    *scale = ht_f32_to_bf16(best_scale);
    const float s = ht_bf16_to_f32(*scale), inverse = s != 0.0f ? 1.0f / s : 0.0f;
    for (int64_t i = 0; i < n; i++)
        q[i] = (uint8_t)(8 + (int)clampf(round_near(w[i] * inverse), -8.0f, 7.0f));
}

static void group_int4z(uint8_t *q, ht_bf16 *scale, uint8_t *zero, const float *w, int64_t n)
{
    static const float factors[] = { 1.05f, 1.02f, 1.0f, 0.97f, 0.94f, 0.91f, 0.88f, 0.84f };
    float low = 0.0f, high = 0.0f, best = INFINITY;
    vec u[MAX_GROUP / LANES];

    *scale = 0;
    *zero = 0;
    for (int64_t i = 0; i < n; i++) {
        low = fminf(low, w[i]);
        high = fmaxf(high, w[i]);
    }
    const float range = high - low;
    if (range > 1e-30f && isfinite(range)) {
        const int n_vectors = normalise(u, w, n, range);
        for (size_t c = 0; c < sizeof factors / sizeof *factors; c++) {
            const ht_bf16 b = ht_f32_to_bf16(range * factors[c] / 15.0f);
            const float s = ht_bf16_to_f32(b) / range, inverse = 1.0f / s;
            // the zero point that cuts the range on both sides alike, and the next best
            const float middle = 7.5f - (low + high) / (2.0f * range) * inverse;
            const int z0 = nearest(middle), z1 = middle > (float)z0 ? z0 + 1 : z0 - 1;
            for (int side = 0; side < 2; side++) {
                const float zf = (float)clamp(side ? z1 : z0, 0, 15);
                vec error = { 0 };
                for (int v = 0; v < n_vectors; v++) {
                    const vec q4 = vec_clamp(vec_round(u[v] * inverse) + zf, 0.0f, 15.0f);
                    const vec e = u[v] - s * (q4 - zf);
                    error += e * e;
                }
                const float sum = sum_of(error);
                if (sum < best) {
                    best = sum;
                    *scale = b;
                    *zero = (uint8_t)zf;
                }
            }
        }
    }
    const float s = ht_bf16_to_f32(*scale), inverse = s > 0.0f ? 1.0f / s : 0.0f, zf = *zero;
    for (int64_t i = 0; i < n; i++)
        q[i] = (uint8_t)clampf(round_near(w[i] * inverse) + zf, 0.0f, 15.0f);
}

static void quantise_row(enum ht_qformat f, int group, const float *w, int64_t k,
                         unsigned char *codes, ht_bf16 *scales, uint8_t *zeros)
{
    const int64_t n_groups = ht_q_groups(f, group, k);

    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t from = g * group, n = k - from < group ? k - from : group;
        uint8_t q[MAX_GROUP + 1];
        if (f == HT_Q_INT8) {
            group_int8((int8_t *)codes + from, &scales[g], w + from, n);
            continue;
        }
        if (f == HT_Q_FP8) {
            group_fp8(codes + from, &scales[g], w + from, n);
            continue;
        }
        if (f == HT_Q_INT4)
            group_int4(q, &scales[g], w + from, n);
        else
            group_int4z(q, &scales[g], &zeros[g], w + from, n);
        q[n] = f == HT_Q_INT4 ? 8 : zeros[g]; // half a byte behind an odd k
        for (int64_t i = 0; i < n; i += 2)
            codes[(from + i) / 2] = (unsigned char)(q[i] | q[i + 1] << 4);
    }
}

enum { BLOCK = 4096 }; // elements converted at a time; a multiple of every group

/* -1, or the first column that is not finite. */
static int64_t row(enum ht_qformat f, int group, const char *w, enum ht_dtype dtype, int64_t k,
                   unsigned char *codes, ht_bf16 *scales, uint8_t *zeros)
{
    for (int64_t at = 0; at < k; at += BLOCK) {
        const int64_t n = k - at < BLOCK ? k - at : BLOCK, g = at / group;
        float values[BLOCK];
        ht_convert(values, HT_DTYPE_F32, w + (size_t)at * ht_dtype_bytes(dtype), dtype, n);
        for (int64_t i = 0; i < n; i++)
            if (!isfinite(values[i])) return at + i;
        if (f == HT_Q_BF16)
            ht_convert(codes + 2 * at, HT_DTYPE_BF16, values, HT_DTYPE_F32, n);
        else
            quantise_row(f, group, values, n, codes + ht_q_code_bytes(f, at), scales + g,
                         zeros ? zeros + g : NULL);
    }
    return -1;
}

enum ht_status ht_quantise_rows(int n_threads, enum ht_qformat f, int group, const void *w,
                                enum ht_dtype dtype, int64_t ldw, int64_t n_rows, int64_t k,
                                void *codes, ht_bf16 *scales, uint8_t *zeros)
{
    const int64_t code = ht_q_code_bytes(f, k), n_groups = ht_q_groups(f, group, k);
    int64_t bad_row = INT64_MAX, bad_column = 0;

    if ((unsigned)f >= HT_Q_COUNT || (f != HT_Q_BF16 && group != 32 && group != 64))
        return HT_FAIL(HT_ERR_ARG, "quantise: format %d, group %d; group must be 32 or 64", (int)f,
                       group);
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t column =
            row(f, group, (const char *)w + (size_t)(i * ldw) * ht_dtype_bytes(dtype), dtype, k,
                (unsigned char *)codes + i * code, scales + i * n_groups,
                zeros ? zeros + i * n_groups : NULL);
        if (column < 0) continue;
#pragma omp critical(ht_quantise_rows)
        if (i < bad_row) {
            bad_row = i;
            bad_column = column;
        }
    }
    if (bad_row == INT64_MAX) return HT_OK;
    return HT_FAIL(HT_ERR_NUMERIC,
                   "quantise: the element at row %" PRId64 ", column %" PRId64 " is not finite",
                   bad_row, bad_column);
}

void ht_dequantise_rows(const struct ht_qrows *r, float *out, int64_t ldo)
{
    const int64_t code = ht_q_code_bytes(r->format, r->k);
    const int64_t n_groups = ht_q_groups(r->format, r->group, r->k);

    for (int64_t i = 0; i < r->n_rows; i++) {
        const unsigned char *c = (const unsigned char *)r->codes + i * code;
        float *o = out + i * ldo;
        if (r->format == HT_Q_BF16) {
            ht_convert(o, HT_DTYPE_F32, c, HT_DTYPE_BF16, r->k);
            continue;
        }
        for (int64_t k = 0; k < r->k; k++) {
            const int64_t g = i * n_groups + k / r->group;
            if (r->format == HT_Q_FP8) {
                o[k] = ht_bf16_to_f32(r->scales[g]) * ht_fp8_to_f32(c[k], HT_FP8_E4M3);
                continue;
            }
            const int half = c[r->format == HT_Q_INT8 ? k : k / 2] >> (k % 2 ? 4 : 0) & 15;
            const int q = r->format == HT_Q_INT8   ? (int8_t)c[k]
                          : r->format == HT_Q_INT4 ? half - 8
                                                   : half - r->zeros[g];
            o[k] = ht_bf16_to_f32(r->scales[g]) * (float)q;
        }
    }
}
