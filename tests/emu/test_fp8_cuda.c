/* tests/emu/test_fp8_cuda.c: fp8 copies of bf16 matrices, and products of them. */
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/gemm_fp8.h"
#include "tests/emu/gpu_case.h"

/* A device with fp8; skipped where the GPU has none. */
static void start(struct ht_backend *be)
{
    gpu_start(be, HT_FP8_QUANTISE_SCRATCH_BYTES);
    if (ht_fp8_check_backend(be) == HT_OK) return;
    fprintf(stderr, "skipped: %s\n", ht_error_message());
    exit(77);
}

/* Values over many binades, with a few of the largest size. */
static ht_bf16 *values(int64_t n, float size, uint64_t seed)
{
    ht_bf16 *v = malloc((size_t)n * sizeof *v);

    for (int64_t i = 0; i < n; i++) {
        const float wide = ldexpf(1.0f, -(int)(ht_rng_uniform(seed, 1, (uint64_t)i) * 20.0f));
        v[i] = ht_f32_to_bf16(size * wide * ht_rng_normal(seed, 0, (uint64_t)i));
    }
    return v;
}

/* Scale and codes as the header defines them. */
static float reference(uint8_t *codes, const ht_bf16 *x, int64_t n, enum ht_fp8 f)
{
    const double largest = f == HT_FP8_E4M3 ? 448.0 : 57344.0;
    double most = 0.0, scale = 1.0;

    for (int64_t i = 0; i < n; i++) {
        const double v = fabs((double)ht_bf16_to_f32(x[i]));
        if (!isfinite(v)) scale = NAN;
        most = fmax(most, v);
    }
    if (most > 0.0 && isfinite(scale)) {
        scale = ldexp(1.0, -126);
        while (most / scale > largest) scale *= 2.0;
    }
    for (int64_t i = 0; i < n; i++)
        codes[i] = ht_fp8_from_f32((float)((double)ht_bf16_to_f32(x[i]) / scale), f);
    return (float)scale;
}

struct on_device {
    uint8_t *codes, *codes_t;
    float *scale;
};

static struct on_device quantise(struct ht_backend *be, const ht_bf16 *x, int64_t rows,
                                 int64_t cols, enum ht_fp8 f)
{
    const size_t n = (size_t)(rows * cols);
    struct on_device d = { gpu_new(be, n), gpu_new(be, n), gpu_new(be, sizeof(float)) };

    gpu_ok(ht_fp8_quantise(be, &(struct ht_fp8_quantise_args){ .rows = rows,
                                                               .cols = cols,
                                                               .format = f,
                                                               .x = gpu_put(be, x, 2 * n),
                                                               .codes = d.codes,
                                                               .codes_t = d.codes_t,
                                                               .scale = d.scale }));
    ck_assert_uint_eq(be->scratch.used_bytes, 0);
    return d;
}

static const int64_t sizes[][2] = { { 16, 16 },  { 64, 64 },  { 16, 208 }, { 208, 16 },
                                    { 80, 144 }, { 112, 64 }, { 256, 336 } };
enum { N_SIZES = sizeof sizes / sizeof *sizes };

static void check_codes(struct ht_backend *be, const ht_bf16 *x, int64_t rows, int64_t cols,
                        enum ht_fp8 f)
{
    const size_t n = (size_t)(rows * cols);
    uint8_t *want = malloc(n), *got = malloc(n), *got_t = malloc(n);
    const struct on_device d = quantise(be, x, rows, cols, f);
    const float scale = reference(want, x, rows * cols, f);
    float got_scale;

    gpu_get(be, got, d.codes, n);
    gpu_get(be, got_t, d.codes_t, n);
    gpu_get(be, &got_scale, d.scale, sizeof got_scale);
    ck_assert_msg(got_scale == scale || (isnan(got_scale) && isnan(scale)), "scale %g, not %g",
                  (double)got_scale, (double)scale);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) {
            const int64_t at = i * cols + j;
            ck_assert_msg(got[at] == want[at] && got_t[j * rows + i] == want[at],
                          "(%lld, %lld) of %lld x %lld: code %02x, transposed %02x, not %02x",
                          (long long)i, (long long)j, (long long)rows, (long long)cols, got[at],
                          got_t[j * rows + i], want[at]);
        }
    // one order alone
    uint8_t *only = gpu_new(be, n);
    float *again = gpu_new(be, sizeof *again);
    struct ht_fp8_quantise_args a = { .rows = rows,
                                      .cols = cols,
                                      .format = f,
                                      .x = gpu_put(be, x, 2 * n),
                                      .codes_t = only,
                                      .scale = again };
    gpu_ok(ht_fp8_quantise(be, &a));
    gpu_get(be, got, only, n);
    ck_assert_mem_eq(got, got_t, n);
    a.codes = only, a.codes_t = NULL;
    gpu_ok(ht_fp8_quantise(be, &a));
    gpu_get(be, got, only, n);
    ck_assert_mem_eq(got, want, n);
    free(want);
    free(got);
    free(got_t);
}

START_TEST(codes_are_those_of_the_host)
{
    const enum ht_fp8 f = (enum ht_fp8)(_i % 2);
    static const float magnitudes[] = { 1.0f, 3e-6f, 2e4f };
    struct ht_backend be;

    start(&be);
    for (int s = 0; s < N_SIZES; s++) {
        ht_bf16 *x = values(sizes[s][0] * sizes[s][1], magnitudes[s % 3], (uint64_t)s + 1);
        check_codes(&be, x, sizes[s][0], sizes[s][1], f);
        free(x);
    }
    gpu_end(&be);
}
END_TEST

/* Every finite bf16 number below some size, of either sign: each rounding there is. */
START_TEST(every_number_is_rounded_as_on_the_host)
{
    enum { ROWS = 128, COLS = 256 };
    const enum ht_fp8 f = (enum ht_fp8)(_i % 2);
    ht_bf16 *x = malloc(ROWS * COLS * sizeof *x);
    struct ht_backend be;

    start(&be);
    for (int i = 0; i < ROWS * COLS; i++) {
        const int size = i % 16384,
                  from = f == HT_FP8_E4M3 ? 0x43e0 : 0x4760; // down from the largest
        x[i] = (ht_bf16)((i / 16384 << 15) | (from - size > 0 ? from - size : 0));
    }
    check_codes(&be, x, ROWS, COLS, f);
    free(x);
    gpu_end(&be);
}
END_TEST

START_TEST(zeros_and_extremes)
{
    enum { N = 48 };
    const enum ht_fp8 f = (enum ht_fp8)(_i % 2);
    static const float only[] = { 0.0f, -0.0f, 3.3e38f, 1e-38f, 448.0f, 57344.0f, INFINITY, NAN };
    struct ht_backend be;

    start(&be);
    for (size_t v = 0; v < sizeof only / sizeof *only; v++)
        for (int filled = 0; filled < 2; filled++) {
            ht_bf16 x[N * N] = { 0 };
            for (int i = 0; i < N * N; i++)
                if (filled || i == 1117) x[i] = ht_f32_to_bf16(only[v]);
            check_codes(&be, x, N, N, f);
        }
    gpu_end(&be);
}
END_TEST

struct product {
    int64_t m, n, k;
    enum ht_fp8 a, b;
    enum ht_dtype c;
    float beta;
};
static const struct product products[] = {
    { 16, 16, 16, HT_FP8_E4M3, HT_FP8_E4M3, HT_DTYPE_BF16, 0.0f },
    { 48, 80, 112, HT_FP8_E4M3, HT_FP8_E4M3, HT_DTYPE_F32, 0.0f },
    { 64, 32, 208, HT_FP8_E5M2, HT_FP8_E4M3, HT_DTYPE_BF16, 0.0f },
    { 32, 96, 64, HT_FP8_E5M2, HT_FP8_E4M3, HT_DTYPE_F32, 1.0f },
};

/* Against fp64 sums of the values that the codes stand for. */
START_TEST(products_match_fp64)
{
    const struct product *p = &products[_i];
    const int64_t m = p->m, n = p->n, k = p->k;
    ht_bf16 *a = values(m * k, 3.0f, 11), *b = values(n * k, 0.02f, 12);
    uint8_t *ca = malloc((size_t)(m * k)), *cb = malloc((size_t)(n * k));
    float *c = malloc((size_t)(m * n) * sizeof *c), *old = malloc((size_t)(m * n) * sizeof *old);
    struct ht_backend be;

    start(&be);
    for (int64_t i = 0; i < m * n; i++) old[i] = ht_rng_normal(13, 0, (uint64_t)i);
    const struct on_device da = quantise(&be, a, m, k, p->a), db = quantise(&be, b, n, k, p->b);
    void *dc = gpu_put_as(&be, p->c, old, m * n);
    gpu_ok(ht_gemm_fp8(&be, &(struct ht_gemm_fp8_args){ .m = m,
                                                        .n = n,
                                                        .k = k,
                                                        .a_format = p->a,
                                                        .b_format = p->b,
                                                        .a = da.codes,
                                                        .b = db.codes,
                                                        .scale_a = da.scale,
                                                        .scale_b = db.scale,
                                                        .c_dtype = p->c,
                                                        .c = dc,
                                                        .beta = p->beta }));
    gpu_get_as(&be, p->c, c, dc, m * n);
    const double sa = (double)reference(ca, a, m * k, p->a);
    const double sb = (double)reference(cb, b, n * k, p->b);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            double sum = 0.0, size = 0.0;
            for (int64_t e = 0; e < k; e++) {
                const double v = sa * (double)ht_fp8_to_f32(ca[i * k + e], p->a) * sb *
                                 (double)ht_fp8_to_f32(cb[j * k + e], p->b);
                sum += v;
                size += fabs(v);
            }
            const double want = sum + (double)p->beta * (double)old[i * n + j];
#ifdef HT_CUDA_EMU
            double bound = 16.0 * (double)FLT_EPSILON * (size + fabs(want));
#else
            double bound = 0x1p-13 * size; // products of sm_90 keep 14 bits within a short sum
#endif
            if (p->c == HT_DTYPE_BF16) bound += fabs(want) / 256.0;
            ck_assert_msg(fabs((double)c[i * n + j] - want) <= bound, "(%lld, %lld): %g, not %g",
                          (long long)i, (long long)j, (double)c[i * n + j], want);
        }
    free(a);
    free(b);
    free(ca);
    free(cb);
    free(c);
    free(old);
    gpu_end(&be);
}
END_TEST

START_TEST(what_is_not_finite_spoils_the_product)
{
    enum { N = 32 };
    ht_bf16 x[N * N];
    float c[N * N];
    struct ht_backend be;

    start(&be);
    for (int i = 0; i < N * N; i++) x[i] = ht_f32_to_bf16(1.0f);
    const struct on_device good = quantise(&be, x, N, N, HT_FP8_E4M3);
    x[77] = ht_f32_to_bf16(_i ? INFINITY : NAN);
    const struct on_device bad = quantise(&be, x, N, N, HT_FP8_E5M2);
    void *dc = gpu_new(&be, sizeof c);
    gpu_ok(ht_gemm_fp8(&be, &(struct ht_gemm_fp8_args){ .m = N,
                                                        .n = N,
                                                        .k = N,
                                                        .a_format = HT_FP8_E5M2,
                                                        .a = bad.codes,
                                                        .b = good.codes,
                                                        .scale_a = bad.scale,
                                                        .scale_b = good.scale,
                                                        .c_dtype = HT_DTYPE_F32,
                                                        .c = dc }));
    gpu_get(&be, c, dc, sizeof c);
    for (int i = 0; i < N * N; i++) ck_assert(isnan(c[i]));
    gpu_end(&be);
}
END_TEST

static void refused(enum ht_status st, enum ht_status want, const char *text)
{
    ck_assert_int_eq(st, want);
    ck_assert_msg(strstr(ht_error_message(), text) != NULL, "'%s' lacks '%s'", ht_error_message(),
                  text);
}

START_TEST(misuse_is_refused)
{
    struct ht_backend be, cpu;

#ifdef HT_CUDA_EMU
    setenv("HT_EMU_ARCH", "80", 1);
    gpu_start(&be, 0);
    refused(ht_fp8_check_backend(&be), HT_ERR_UNSUPPORTED, "emulated has 8.0");
    gpu_end(&be);
    setenv("HT_EMU_ARCH", "89", 1);
#endif
    start(&be);
    gpu_ok(ht_backend_create_cpu(&cpu, 1, 0));
    unsigned char *p = gpu_new(&be, 4096);
    const struct ht_fp8_quantise_args q = { .rows = 16,
                                            .cols = 32,
                                            .x = (const ht_bf16 *)p,
                                            .codes = p + 2048,
                                            .scale = (float *)(p + 4000) };
    struct ht_fp8_quantise_args bad;
    refused(ht_fp8_quantise(&cpu, &q), HT_ERR_UNSUPPORTED, "not on the CPU backend");
    bad = q, bad.cols = 40, refused(ht_fp8_quantise(&be, &bad), HT_ERR_ARG, "cols is 40");
    bad = q, bad.codes = NULL, refused(ht_fp8_quantise(&be, &bad), HT_ERR_ARG, "codes is NULL");
    bad = q, bad.codes++, refused(ht_fp8_quantise(&be, &bad), HT_ERR_ARG, "multiple of 16 bytes");
    struct ht_gemm_fp8_args g = { .m = 16,
                                  .n = 16,
                                  .k = 16,
                                  .a = p,
                                  .b = p + 256,
                                  .scale_a = q.scale,
                                  .scale_b = q.scale,
                                  .c_dtype = HT_DTYPE_BF16,
                                  .c = p + 512 };
    g.k = 24;
    refused(ht_gemm_fp8(&be, &g), HT_ERR_ARG, "k is 24");
    g.k = 16, g.beta = 0.5f;
    refused(ht_gemm_fp8(&be, &g), HT_ERR_ARG, "beta is 0.5");
    g.beta = 0.0f, g.a_format = g.b_format = HT_FP8_E5M2;
    refused(ht_gemm_fp8(&be, &g), HT_ERR_UNSUPPORTED, "both e5m2");
    ht_backend_free(&cpu);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("fp8_cuda");
    TCase *t = tcase_create("fp8_cuda");

#ifdef HT_CUDA_EMU
    setenv("HT_EMU_ARCH", "89", 1);
#endif
    tcase_add_loop_test(t, codes_are_those_of_the_host, 0, 2);
    tcase_add_loop_test(t, every_number_is_rounded_as_on_the_host, 0, 2);
    tcase_add_loop_test(t, zeros_and_extremes, 0, 2);
    tcase_add_loop_test(t, products_match_fp64, 0, (int)(sizeof products / sizeof *products));
    tcase_add_loop_test(t, what_is_not_finite_spoils_the_product, 0, 2);
    tcase_add_test(t, misuse_is_refused);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
