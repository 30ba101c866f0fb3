/* tests/core/ops/test_quant.c: quantised matrices and their products against fp64 loops. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/fp8.h"
#include "core/ops/quant.h"
#include "tests/core/ops/ops_case.h"

struct shape {
    int64_t m, n, k;
};
// one element; k below, at and past a group; n around strips and blocks of 3 strips; many rows;
// several blocks per turn of a thread
static const struct shape shapes[] = {
    { 1, 1, 1 },      { 1, 13, 67 },     { 2, 16, 32 },    { 3, 48, 64 },   { 4, 49, 100 },
    { 5, 31, 33 },    { 8, 97, 129 },    { 9, 24, 31 },    { 16, 29, 700 }, { 17, 5, 3 },
    { 33, 65, 95 },   { 64, 1, 40 },     { 70, 130, 257 }, { 200, 50, 96 }, { 6, 800, 40 },
    { 50, 1650, 33 }, { 139, 70, 1100 }, { 1, 7, 4000 },   { 2, 9, 2400 },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes, N_FORMATS = 2 * HT_Q_COUNT };

static enum ht_qformat format_at(int i)
{
    return (enum ht_qformat)(i % HT_Q_COUNT);
}
static int group_at(int i)
{
    return i / HT_Q_COUNT ? 64 : 32;
}

/* ---- a matrix in all its forms ---- */

struct weights {
    struct tensor w; // (n, k)
    struct ht_qmatrix q;
    float *values; // (n, k) what q stands for
    // as files hold it
    unsigned char *codes;
    ht_bf16 *scales;
    uint8_t *zeros;
    struct ht_qrows rows;
};

static struct weights weights_of(struct tensor w, enum ht_qformat f, int group, int64_t n,
                                 int64_t k)
{
    struct weights x = { .w = w };
    const int64_t n_groups = ht_q_groups(f, group, k);

    x.codes = malloc((size_t)(n * ht_q_code_bytes(f, k)));
    x.scales = calloc((size_t)(n * n_groups + 1), sizeof *x.scales);
    x.zeros = calloc((size_t)(n * n_groups + 1), 1);
    x.values = malloc((size_t)(n * k) * sizeof *x.values);
    ck_assert_int_eq(
        ht_quantise_rows(1, f, group, w.p, w.dtype, k, n, k, x.codes, x.scales, x.zeros), HT_OK);
    x.rows = (struct ht_qrows){ f, group, n, k, x.codes, x.scales, x.zeros };
    ht_dequantise_rows(&x.rows, x.values, k);
    ck_assert_int_eq(ht_qmatrix_create(&x.q, NULL, f, group, n, k), HT_OK);
    ck_assert_int_eq(ht_qmatrix_set_rows(&x.q, NULL, 0, n, w.p, w.dtype, k), HT_OK);
    return x;
}

static struct weights weights_make(enum ht_qformat f, int group, int64_t n, int64_t k, double sd,
                                   uint64_t seed)
{
    return weights_of(tensor_normal(n * k, HT_DTYPE_F32, sd, seed), f, group, n, k);
}

static void weights_free(struct weights *x)
{
    tensor_free(&x->w);
    ht_qmatrix_free(&x->q);
    free(x->values);
    free(x->codes);
    free(x->scales);
    free(x->zeros);
}

/* ---- formats ---- */

START_TEST(packed_rows_hold_what_files_hold)
{
    for (int s = 0; s < N_SHAPES; s++) {
        const int64_t n = shapes[s].n, k = shapes[s].k;
        struct weights x = weights_make(format_at(_i), group_at(_i), n, k, 0.02, (uint64_t)s + 1);
        struct ht_qmatrix q;
        float *out = malloc((size_t)(n * k) * sizeof *out);

        ck_assert_int_eq(ht_qmatrix_get_rows(&x.q, 0, n, out, k), HT_OK);
        ck_assert_mem_eq(out, x.values, (size_t)(n * k) * sizeof *out);
        // the file's rows, packed, are the same bytes; and so are rows set piece by piece
        ck_assert_int_eq(ht_qmatrix_create(&q, NULL, x.rows.format, x.rows.group, n, k), HT_OK);
        ck_assert_int_eq(ht_qmatrix_set_qrows(&q, NULL, 0, &x.rows), HT_OK);
        ck_assert_mem_eq(q.data, x.q.data, q.bytes);
        for (int64_t i = n; i-- > 0;)
            ck_assert_int_eq(
                ht_qmatrix_set_rows(&q, NULL, i, 1, (const float *)x.w.p + i * k, HT_DTYPE_F32, k),
                HT_OK);
        ck_assert_mem_eq(q.data, x.q.data, q.bytes);
        ht_qmatrix_free(&q);
        free(out);
        weights_free(&x);
    }
}
END_TEST

/* Every code there and back, and every place between two neighbours: nearest, ties to even. */
START_TEST(fp8_is_rounded_to_nearest)
{
    const enum ht_fp8 f = _i ? HT_FP8_E5M2 : HT_FP8_E4M3;
    const int largest = f == HT_FP8_E4M3 ? 0x7e : 0x7b, bias = f == HT_FP8_E4M3 ? 7 : 15;
    const int n_fraction = f == HT_FP8_E4M3 ? 3 : 2;

    for (int c = 0; c <= largest; c++) {
        const int e = c >> n_fraction, m = c & ((1 << n_fraction) - 1);
        const double want =
            e ? ldexp(1.0 + ldexp(m, -n_fraction), e - bias) : ldexp(m, 1 - bias - n_fraction);
        const float v = ht_fp8_to_f32((uint8_t)c, f);
        ck_assert_double_eq((double)v, want);
        ck_assert_float_eq(ht_fp8_to_f32((uint8_t)(c | 0x80), f), -v);
        ck_assert_int_eq(ht_fp8_from_f32(v, f), c);
        ck_assert_int_eq(ht_fp8_from_f32(-v, f), c | 0x80);
        if (c == largest) break;
        const float next = ht_fp8_to_f32((uint8_t)(c + 1), f), middle = 0.5f * (v + next);
        ck_assert_int_eq(ht_fp8_from_f32(middle, f), c % 2 ? c + 1 : c);
        ck_assert_int_eq(ht_fp8_from_f32(nextafterf(middle, 0.0f), f), c);
        ck_assert_int_eq(ht_fp8_from_f32(nextafterf(middle, 1e9f), f), c + 1);
    }
    ck_assert_int_eq(ht_fp8_from_f32(1e9f, f), largest);
    ck_assert_int_eq(ht_fp8_from_f32(-INFINITY, f), largest | 0x80);
    ck_assert_int_eq(ht_fp8_from_f32(NAN, f), HT_FP8_NAN);
    ck_assert_int_eq(ht_fp8_from_f32(1e-30f, f), 0);
    ck_assert(isnan(ht_fp8_to_f32(0x7f, f)) && isnan(ht_fp8_to_f32(0xff, f)));
    if (f == HT_FP8_E5M2) ck_assert(ht_fp8_to_f32(0xfc, f) == -INFINITY);
    // scales: the largest value fits, and half the scale would not do
    for (int i = 0; i < 1000; i++) {
        const float most = ldexpf(1.0f + (float)(i % 100) / 99.0f, i % 200 - 90);
        const double scaled = (double)most / (double)ht_fp8_power(ht_fp8_scale_log2(most, f));
        const double top = (double)ht_fp8_to_f32((uint8_t)largest, f);
        ck_assert_msg(scaled <= top && scaled * 2.0 > top, "%g becomes %g", (double)most, scaled);
    }
}
END_TEST

/* Elements against bounds that follow from the format, and the mean square against plain rounding
 * to the largest magnitude (or to the range), which the search must not lose to. */
START_TEST(quantisation_error_is_bounded)
{
    const enum ht_qformat f = format_at(_i);
    const int group = group_at(_i);
    const int64_t n = 200, k = 333;
    struct weights x = weights_make(f, group, n, k, 0.02, 5);
    double error = 0.0, plain = 0.0, total = 0.0;

    for (int64_t i = 0; i < n; i++)
        for (int64_t g = 0; g < k; g += group) {
            const int64_t len = k - g < group ? k - g : group;
            const double *w = x.w.d + i * k + g;
            double low = 0.0, high = 0.0, most = 0.0;
            for (int64_t e = 0; e < len; e++) {
                low = fmin(low, w[e]);
                high = fmax(high, w[e]);
                most = fmax(most, fabs(w[e]));
            }
            for (int64_t e = 0; e < len; e++) {
                const double d = fabs(w[e] - (double)x.values[i * k + g + e]);
                double step = 0.0, p = 0.0;
                switch (f) {
                case HT_Q_BF16: ck_assert_double_le(d, fabs(w[e]) / 256.0); break;
                case HT_Q_INT8:
                    step = most / 127.0 * (1.0 + 1.0 / 128.0); // the scale is rounded up
                    ck_assert_double_le(d, 0.5001 * step);
                    break;
                case HT_Q_INT4:
                    step = most / 7.0;
                    ck_assert_double_le(d, 2.0 * step); // clamped at worst from 9 to 7 steps
                    p = w[e] - step * rint(w[e] / step);
                    break;
                case HT_Q_FP8: // 3 bits of fraction; subnormal steps are 2^-17 of the largest
                    ck_assert_double_le(d, fmax(fabs(w[e]) / 16.0, most * 0x1p-17));
                    break;
                default:
                    step = (high - low) / 15.0;
                    ck_assert_double_le(d, 2.0 * step); // clamped at worst by 0.1 of the range
                    p = w[e] - (step * rint((w[e] - low) / step) + low);
                }
                error += d * d;
                plain += p * p;
                total += w[e] * w[e];
            }
        }
    const double relative = sqrt(error / total);
    // root mean square over that of w, normal values: measured 0.0017, 0.0054 0.0059, 0.085 0.095,
    // 0.079 0.09, 0.026
    const double bound[] = { 0.002, 0.0068, 0.11, 0.1, 0.03 };
    ck_assert_msg(relative < bound[f], "%s group %d: %g", ht_qformat_name(f), group, relative);
    if (f == HT_Q_INT4 || f == HT_Q_INT4Z) ck_assert_double_lt(error, plain);
    weights_free(&x);
}
END_TEST

START_TEST(special_rows_survive)
{
    const enum ht_qformat f = format_at(_i);
    const int64_t n = 5, k = 70;
    struct tensor w = tensor_make(n * k, HT_DTYPE_F32);
    float *p = w.p;

    for (int64_t i = 0; i < k; i++) {
        p[0 * k + i] = 0.0f;                     // zeros
        p[1 * k + i] = 0.5f;                     // all the same
        p[2 * k + i] = i == 33 ? -3.0f : 0.0f;   // one element
        p[3 * k + i] = 1e-40f;                   // subnormal
        p[4 * k + i] = (i % 2 ? 1e30f : -1e30f); // huge
    }
    struct weights x = weights_of(w, f, group_at(_i), n, k);
    for (int64_t i = 0; i < k; i++) {
        ck_assert_float_eq(x.values[i], 0.0f);
        ck_assert_float_eq_tol(x.values[k + i], 0.5f, 0.005f);
        ck_assert_float_eq_tol(x.values[2 * k + i], p[2 * k + i], 0.02f);
        ck_assert_float_eq_tol(x.values[3 * k + i], 0.0f, 2e-40f);
        // an even range has its ends at 7.5 steps: the worst of 16 levels
        ck_assert_float_eq_tol(x.values[4 * k + i], p[4 * k + i], 0.075f * 1e30f);
    }
    weights_free(&x);
}
END_TEST

START_TEST(threads_and_types_do_not_change_codes)
{
    const enum ht_qformat f = format_at(_i);
    const int64_t n = 37, k = 333;
    struct tensor w = tensor_normal(n * k, HT_DTYPE_BF16, 0.02, 9);
    float *wide = malloc((size_t)(n * k) * sizeof *wide);
    struct ht_backend be = backend_make(HT_ISA_PLAIN, 2, 0);
    struct ht_qmatrix a, b;

    ht_convert(wide, HT_DTYPE_F32, w.p, HT_DTYPE_BF16, n * k);
    ck_assert_int_eq(ht_qmatrix_create(&a, NULL, f, group_at(_i), n, k), HT_OK);
    ck_assert_int_eq(ht_qmatrix_create(&b, NULL, f, group_at(_i), n, k), HT_OK);
    ck_assert_int_eq(ht_qmatrix_set_rows(&a, NULL, 0, n, w.p, HT_DTYPE_BF16, k), HT_OK);
    ck_assert_int_eq(ht_qmatrix_set_rows(&b, &be, 0, n, wide, HT_DTYPE_F32, k), HT_OK);
    ck_assert_mem_eq(a.data, b.data, a.bytes);
    ht_qmatrix_free(&a);
    ht_qmatrix_free(&b);
    ht_backend_free(&be);
    free(wide);
    tensor_free(&w);
}
END_TEST

/* ---- products ---- */

static struct ht_qgemm_args args_of(const struct weights *w, int64_t m, const struct tensor *x,
                                    struct tensor *y)
{
    return (struct ht_qgemm_args){ .m = m,
                                   .w = &w->q,
                                   .x_dtype = x->dtype,
                                   .y_dtype = y->dtype,
                                   .x = x->p,
                                   .ldx = w->q.k,
                                   .y = y->p,
                                   .ldy = w->q.n,
                                   .alpha = 1.0f };
}

/* What rounding x may cost y[i, j], from the format: half a step of x times |w|, and fp32 sums. */
static double bound_of(const struct weights *w, const double *x, int64_t j, bool precise)
{
    const int64_t k = w->q.k, group = w->q.group;
    double b = 0.0;

    for (int64_t g = 0; g < k; g += group) {
        const int64_t len = k - g < group ? k - g : group;
        double most = 0.0, sum_w = 0.0, sum_wx = 0.0;
        for (int64_t e = g; e < g + len; e++) {
            const double v = fabs((double)w->values[j * k + e]);
            most = fmax(most, fabs(x[e]));
            sum_w += v;
            sum_wx += v * fabs(x[e]);
        }
        if (w->q.format == HT_Q_BF16)
            b += sum_wx / 256.0;
        else
            b += most / 127.0 * (precise ? 0.502 / 254.0 : 0.501) * sum_w;
        b += sum_wx * (double)FLT_EPSILON * (double)(k / 8 + 16);
    }
    return b;
}

static double product(const struct weights *w, const double *x, int64_t j)
{
    double sum = 0.0;
    for (int64_t e = 0; e < w->q.k; e++) sum += (double)w->values[j * w->q.k + e] * x[e];
    return sum;
}

/* Case index -> level, format and group. */
static enum ht_isa level_at(int i)
{
    return (enum ht_isa)(i / N_FORMATS);
}
static int n_products(void)
{
    return ((int)ht_isa_best() + 1) * N_FORMATS;
}

static void check_product(struct ht_backend *be, struct shape s, enum ht_qformat f, int group,
                          enum ht_dtype x_dtype, enum ht_dtype y_dtype, bool precise)
{
    struct weights w = weights_make(f, group, s.n, s.k, 0.5, 11);
    struct tensor x = tensor_normal(s.m * s.k, x_dtype, 1.0, 12);
    struct tensor y = tensor_normal(s.m * s.n, y_dtype, 2.0, 13), old = tensor_copy(&y);
    struct ht_qgemm_args a = args_of(&w, s.m, &x, &y);
    double error = 0.0, total = 0.0;

    a.precise = precise;
    a.alpha = 0.5f;
    a.beta = s.m % 2 ? 1.0f : 0.0f;
    ck_assert_msg(ht_qgemm(be, &a) == HT_OK, "%s", ht_error_message());
    for (int64_t i = 0; i < s.m; i++)
        for (int64_t j = 0; j < s.n; j++) {
            const int64_t at = i * s.n + j;
            const double p = 0.5 * product(&w, x.d + i * s.k, j);
            const double want = p + (a.beta != 0.0f ? old.d[at] : 0.0);
            double slack = 0.5 * bound_of(&w, x.d + i * s.k, j, precise) +
                           2.0 * (double)FLT_EPSILON * (fabs(want) + fabs(old.d[at]));
            if (y_dtype == HT_DTYPE_BF16) slack += (fabs(want) + slack) / 256.0;
            const double got = tensor_at(&y, at);
            ck_assert_msg(fabs(got - want) <= slack,
                          "%s group %d m %d n %d k %d: y[%d, %d] is %g, not %g within %g",
                          ht_qformat_name(f), group, (int)s.m, (int)s.n, (int)s.k, (int)i, (int)j,
                          got, want, slack);
            error += (got - want) * (got - want);
            total += p * p;
        }
    // the header's figures for random data, with room for small samples
    if (s.m * s.n > 1000 && y_dtype == HT_DTYPE_F32 && a.beta == 0.0f && s.k > 90) {
        const double r = sqrt(error / total);
        const double most = w.q.format == HT_Q_BF16 ? (x_dtype == HT_DTYPE_BF16 ? 1e-5 : 0.0025)
                            : precise               ? 4e-5
                                                    : 0.0075;
        ck_assert_msg(r < most, "%s group %d precise %d: error %g of y", ht_qformat_name(f), group,
                      precise, r);
    }
    ck_assert_uint_eq(be->scratch.used_bytes, 0);
    tensor_free(&x);
    tensor_free(&y);
    tensor_free(&old);
    weights_free(&w);
}

static size_t scratch_for(int64_t m, int64_t k)
{
    return ht_qgemm_scratch_bytes(m, k);
}

START_TEST(matches_reference)
{
    for (int s = 0; s < N_SHAPES; s++) {
        struct ht_backend be =
            backend_make(level_at(_i), 1 + s % 2, scratch_for(shapes[s].m, shapes[s].k));
        for (int t = s % 3; t < 8; t += 3) // types of x and y, precise: all of them over the shapes
            check_product(&be, shapes[s], format_at(_i % N_FORMATS), group_at(_i % N_FORMATS),
                          t & 1 ? HT_DTYPE_BF16 : HT_DTYPE_F32,
                          t & 2 ? HT_DTYPE_BF16 : HT_DTYPE_F32, t & 4);
        ht_backend_free(&be);
    }
}
END_TEST

/* Every row of every batch size, at every place, on one and two threads: the bits of the row alone.
 */
START_TEST(rows_do_not_depend_on_batch_nor_threads)
{
    enum { MOST = 70, N = 97, K = 1121 };
    static const int64_t sizes[] = { 2, 3, 4, 5, 7, 8, 9, 12, 16, 31, 33, 48, 49, MOST };
    const enum ht_qformat f = format_at(_i % N_FORMATS);
    struct weights w = weights_make(f, group_at(_i % N_FORMATS), N, K, 0.5, 21);
    struct tensor x = tensor_normal(MOST * K, HT_DTYPE_F32, 1.0, 22);
    float *alone = malloc(sizeof(float) * MOST * N), *y = malloc(sizeof(float) * MOST * N);

    for (int precise = 0; precise < 2; precise++) {
        for (int threads = 1; threads <= 2; threads++) {
            struct ht_backend be = backend_make(level_at(_i), threads, scratch_for(MOST, K));
            struct ht_qgemm_args a = {
                .m = 1, .w = &w.q, .ldx = K, .ldy = N, .alpha = 1.0f, .precise = precise
            };
            if (threads == 1)
                for (int64_t i = 0; i < MOST; i++) {
                    a.x = (const float *)x.p + i * K;
                    a.y = alone + i * N;
                    ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
                }
            a.y = y;
            for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
                a.m = sizes[s];
                for (int64_t first = 0; first + a.m <= MOST; first += a.m + 3) {
                    a.x = (const float *)x.p + first * K;
                    ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
                    ck_assert_mem_eq(y, alone + first * N, sizeof(float) * (size_t)(a.m * N));
                }
            }
            ht_backend_free(&be);
        }
    }
    free(alone);
    free(y);
    tensor_free(&x);
    weights_free(&w);
}
END_TEST

START_TEST(strides_are_kept)
{
    const int64_t m = 6, n = 37, k = 50, ldx = k + 5, ldy = n + 3;
    struct ht_backend be = backend_make(level_at(_i), 2, scratch_for(m, k));
    struct weights w =
        weights_make(format_at(_i % N_FORMATS), group_at(_i % N_FORMATS), n, k, 0.5, 31);
    struct tensor x = tensor_normal(m * ldx, HT_DTYPE_F32, 1.0, 32);
    struct tensor y = tensor_make(m * ldy, HT_DTYPE_F32), dense = tensor_make(m * n, HT_DTYPE_F32);
    float *packed = malloc(sizeof(float) * (size_t)(m * k));

    for (int64_t i = 0; i < m; i++)
        memcpy(packed + i * k, (const float *)x.p + i * ldx, sizeof(float) * (size_t)k);
    struct ht_qgemm_args a = args_of(&w, m, &x, &y);
    a.ldx = ldx;
    a.ldy = ldy;
    ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
    a.x = packed;
    a.y = dense.p;
    a.ldx = k;
    a.ldy = n;
    ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
    for (int64_t i = 0; i < m; i++) {
        const unsigned char *row = (const unsigned char *)y.p + i * ldy * 4;
        ck_assert_mem_eq(row, (const float *)dense.p + i * n, sizeof(float) * (size_t)n);
        for (int64_t b = n * 4; b < ldy * 4; b++) ck_assert_uint_eq(row[b], 0xa5);
    }
    free(packed);
    tensor_free(&x);
    tensor_free(&y);
    tensor_free(&dense);
    weights_free(&w);
    ht_backend_free(&be);
}
END_TEST

START_TEST(zeros_and_not_a_number)
{
    const int64_t m = 5, n = 40, k = 70;
    struct ht_backend be = backend_make(level_at(_i), 1, scratch_for(m, k));
    struct weights w =
        weights_make(format_at(_i % N_FORMATS), group_at(_i % N_FORMATS), n, k, 0.5, 41);
    struct tensor x = tensor_normal(m * k, HT_DTYPE_F32, 1.0, 42),
                  y = tensor_make(m * n, HT_DTYPE_F32);
    struct ht_qgemm_args a = args_of(&w, m, &x, &y);

    memset((float *)x.p + k, 0, sizeof(float) * (size_t)k);
    ((float *)x.p)[2 * k + 69] = NAN;
    ((float *)x.p)[3 * k + 5] = -INFINITY;
    for (int precise = 0; precise < 2; precise++) {
        a.precise = precise;
        ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
        for (int64_t j = 0; j < n; j++) {
            const float *v = y.p;
            ck_assert(isfinite(v[j]) && isfinite(v[4 * n + j]));
            ck_assert_float_eq(v[n + j], 0.0f);
            ck_assert(isnan(v[2 * n + j]));
            ck_assert(!isfinite(v[3 * n + j]));
        }
    }
    tensor_free(&x);
    tensor_free(&y);
    weights_free(&w);
    ht_backend_free(&be);
}
END_TEST

/* ---- memory and refusals ---- */

START_TEST(lives_in_an_arena)
{
    struct ht_arena arena;
    struct ht_qmatrix q, r;
    const size_t need = ht_qmatrix_bytes(format_at(_i), group_at(_i), 33, 65);

    ck_assert_int_eq(ht_arena_create(&arena, "weights", 2 * need), HT_OK);
    ck_assert_int_eq(ht_qmatrix_create(&q, &arena, format_at(_i), group_at(_i), 33, 65), HT_OK);
    ck_assert_uint_eq(arena.used_bytes, need);
    ck_assert_int_eq(ht_qmatrix_create(&r, &arena, format_at(_i), group_at(_i), 33, 65), HT_OK);
    ck_assert_int_eq(ht_qmatrix_create(&r, &arena, format_at(_i), group_at(_i), 33, 65),
                     HT_ERR_MEMORY);
    ck_assert_ptr_null(r.data);
    float row[65];
    ck_assert_int_eq(ht_qmatrix_get_rows(&q, 32, 1, row, 65), HT_OK);
    for (int i = 0; i < 65; i++) ck_assert_float_eq(row[i], 0.0f); // a new matrix is zero
    ht_qmatrix_free(&q);
    ht_arena_free(&arena);
}
END_TEST

static void refused(enum ht_status st, enum ht_status want, const char *message)
{
    ck_assert_int_eq(st, want);
    ck_assert_msg(strstr(ht_error_message(), message), "'%s' not in '%s'", message,
                  ht_error_message());
}

START_TEST(bad_matrices_are_refused)
{
    struct ht_qmatrix q;
    float w[64] = { 0 };
    unsigned char codes[64];
    ht_bf16 scales[4];

    refused(ht_qmatrix_create(&q, NULL, HT_Q_INT8, 48, 4, 4), HT_ERR_ARG, "group is 48");
    refused(ht_qmatrix_create(&q, NULL, HT_Q_COUNT, 32, 4, 4), HT_ERR_ARG, "format 5");
    refused(ht_qmatrix_create(&q, NULL, HT_Q_INT8, 32, 0, 4), HT_ERR_ARG, "0 x 4");
    refused(ht_qmatrix_set_rows(&q, NULL, 0, 1, w, HT_DTYPE_F32, 4), HT_ERR_ARG, "no data");
    ck_assert_int_eq(ht_qmatrix_create(&q, NULL, HT_Q_INT8, 32, 4, 16), HT_OK);
    refused(ht_qmatrix_set_rows(&q, NULL, 3, 2, w, HT_DTYPE_F32, 16), HT_ERR_ARG, "rows 3 to 4");
    refused(ht_qmatrix_set_rows(&q, NULL, 0, 2, w, HT_DTYPE_F32, 15), HT_ERR_ARG, "ldw is 15");
    refused(ht_qmatrix_set_rows(&q, NULL, 0, 2, w, HT_DTYPE_F16, 16), HT_ERR_UNSUPPORTED, "dtype");
    refused(ht_qmatrix_set_rows(&q, NULL, 0, 2, NULL, HT_DTYPE_F32, 16), HT_ERR_ARG, "w is NULL");
    w[21] = NAN;
    refused(ht_qmatrix_set_rows(&q, NULL, 0, 4, w, HT_DTYPE_F32, 16), HT_ERR_NUMERIC,
            "row 1, column 5");
    refused(ht_qmatrix_get_rows(&q, -1, 1, w, 16), HT_ERR_ARG, "rows -1");
    refused(ht_qmatrix_get_rows(&q, 0, 1, w, 8), HT_ERR_ARG, "ldo is 8");
    const struct ht_qrows rows = { HT_Q_INT8, 64, 1, 16, codes, scales, NULL };
    refused(ht_qmatrix_set_qrows(&q, NULL, 0, &rows), HT_ERR_ARG, "group 64");
    ht_qmatrix_free(&q);
    ck_assert_int_eq(ht_qmatrix_create(&q, NULL, HT_Q_FP8, 32, 4, 16), HT_OK);
    const struct ht_qrows fp8 = { HT_Q_FP8, 32, 2, 16, codes, scales, NULL };
    memset(codes, 0x7e, sizeof codes);
    memset(scales, 0, sizeof scales);
    ck_assert_int_eq(ht_qmatrix_set_qrows(&q, NULL, 0, &fp8), HT_OK);
    codes[19] = 0xff;
    refused(ht_qmatrix_set_qrows(&q, NULL, 0, &fp8), HT_ERR_NUMERIC, "row 1, column 3 is NaN");
    const struct ht_qrows held = { HT_Q_BF16, 32, 1, 16, codes, NULL, NULL };
    refused(ht_qmatrix_set_qrows(&q, NULL, 0, &held), HT_ERR_ARG, "for a matrix of fp8, group 32");
    ht_qmatrix_free(&q);
    ht_qmatrix_free(NULL);
    enum ht_qformat f;
    refused(ht_qformat_parse(&f, "q4_0"), HT_ERR_ARG, "int4z");
    for (int i = 0; i < HT_Q_COUNT; i++) {
        ck_assert_int_eq(ht_qformat_parse(&f, ht_qformat_name((enum ht_qformat)i)), HT_OK);
        ck_assert_int_eq(f, i);
    }
}
END_TEST

START_TEST(bad_products_are_refused)
{
    struct ht_backend be = backend_make(HT_ISA_PLAIN, 1, 64);
    struct weights w = weights_make(HT_Q_INT8, 32, 20, 40, 0.5, 51);
    struct tensor x = tensor_normal(3 * 40, HT_DTYPE_F32, 1.0, 52),
                  y = tensor_make(60, HT_DTYPE_F32);
    const struct ht_qmatrix none = { 0 };
    const struct ht_qgemm_args good = args_of(&w, 3, &x, &y);
    struct ht_qgemm_args a;

    a = good, a.m = -1, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "m is -1");
    a = good, a.w = &none, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "no data");
    a = good, a.ldx = 39, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "ldx is 39");
    a = good, a.ldy = 19, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "ldy is 19");
    a = good, a.beta = 0.5f, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "beta is 0.5");
    a = good, a.x_dtype = HT_DTYPE_F16, refused(ht_qgemm(&be, &a), HT_ERR_UNSUPPORTED, "dtype");
    a = good, a.x = NULL, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "x is NULL");
    a = good, a.y = NULL, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "y is NULL");
    a = good, a.y = x.p, refused(ht_qgemm(&be, &a), HT_ERR_ARG, "same buffer");
    refused(ht_qgemm(&be, &good), HT_ERR_MEMORY, "scratch"); // 64 bytes are too few
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    a = good, a.m = 0, a.x = a.y = NULL;
    ck_assert_int_eq(ht_qgemm(&be, &a), HT_OK);
    for (int64_t i = 0; i < 240; i++) ck_assert_uint_eq(((unsigned char *)y.p)[i], 0xa5);
    be.kind = HT_BACKEND_COUNT;
    refused(ht_qgemm(&be, &good), HT_ERR_UNSUPPORTED, "backend");
    be.kind = HT_BACKEND_CPU;
    ht_backend_free(&be);
    tensor_free(&x);
    tensor_free(&y);
    weights_free(&w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("quant");
    TCase *t = tcase_create("quant");

    tcase_add_loop_test(t, fp8_is_rounded_to_nearest, 0, 2);
    tcase_add_loop_test(t, packed_rows_hold_what_files_hold, 0, N_FORMATS);
    tcase_add_loop_test(t, quantisation_error_is_bounded, 0, N_FORMATS);
    tcase_add_loop_test(t, special_rows_survive, 0, N_FORMATS);
    tcase_add_loop_test(t, threads_and_types_do_not_change_codes, 0, N_FORMATS);
    tcase_add_loop_test(t, matches_reference, 0, n_products());
    tcase_add_loop_test(t, rows_do_not_depend_on_batch_nor_threads, 0, n_products());
    tcase_add_loop_test(t, strides_are_kept, 0, n_products());
    tcase_add_loop_test(t, zeros_and_not_a_number, 0, n_products());
    tcase_add_loop_test(t, lives_in_an_arena, 0, N_FORMATS);
    tcase_add_test(t, bad_matrices_are_refused);
    tcase_add_test(t, bad_products_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
