/* tests/emu/test_quant_cuda.c: packed matrices on the device and their products. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/quant.h"
#include "tests/emu/gpu_case.h"

enum { N_FORMATS = 2 * HT_Q_COUNT };

static enum ht_qformat format_at(int i)
{
    return (enum ht_qformat)(i % HT_Q_COUNT);
}
static int group_at(int i)
{
    return i / HT_Q_COUNT ? 64 : 32;
}

static float *normal(int64_t n, float sd, uint64_t seed)
{
    float *v = malloc((size_t)n * sizeof *v);
    for (int64_t i = 0; i < n; i++) v[i] = sd * ht_rng_normal(seed, 0, (uint64_t)i);
    return v;
}

static float round_bf16(float v)
{
    return ht_bf16_to_f32(ht_f32_to_bf16(v));
}

struct pair { // the same weights on both sides
    struct ht_backend cpu;
    struct ht_qmatrix host, device;
    float *values; // (n, k) what they stand for
};

/* Rows of the device's matrix are set in uneven pieces, which begin and end within strips. */
static void pair_make(struct pair *p, struct ht_backend *gpu, int format, int64_t n, int64_t k)
{
    const enum ht_qformat f = format_at(format);
    const int group = group_at(format);
    float *w = normal(n * k, 0.5f, (uint64_t)(n + k));

    gpu_ok(ht_backend_create_cpu(&p->cpu, 1, 1 << 22));
    gpu_ok(ht_qmatrix_create(&p->host, NULL, f, group, n, k));
    gpu_ok(ht_qmatrix_set_rows(&p->host, NULL, 0, n, w, HT_DTYPE_F32, k));
    gpu_ok(ht_qmatrix_create_on(&p->device, gpu, f, group, n, k));
    for (int64_t row = 0, turn = 5; row < n; row += turn, turn = 2 * turn + 3)
        gpu_ok(ht_qmatrix_set_rows(&p->device, gpu, row, n - row < turn ? n - row : turn,
                                   w + row * k, HT_DTYPE_F32, k));
    p->values = malloc((size_t)(n * k) * sizeof *p->values);
    gpu_ok(ht_qmatrix_get_rows(&p->host, 0, n, p->values, k));
    free(w);
}

static void pair_free(struct pair *p)
{
    ht_qmatrix_free(&p->host);
    ht_qmatrix_free(&p->device);
    ht_backend_free(&p->cpu);
    free(p->values);
}

START_TEST(rows_are_what_the_host_has)
{
    static const int64_t sizes[][2] = { { 1, 1 }, { 16, 64 }, { 37, 65 }, { 50, 200 } };
    struct ht_backend be;

    gpu_start(&be, 1 << 20);
    for (int s = 0; s < 4; s++) {
        const int64_t n = sizes[s][0], k = sizes[s][1];
        struct pair p;
        const int32_t ids[5] = { 0, (int32_t)n - 1, (int32_t)n, -1, (int32_t)(n / 2) };
        float *out = malloc((size_t)(n * k) * sizeof *out);
        float *rows = malloc((size_t)(5 * k) * sizeof *rows);

        pair_make(&p, &be, _i, n, k);
        gpu_ok(ht_qmatrix_get_rows(&p.device, 0, n, out, k));
        ck_assert_mem_eq(out, p.values, (size_t)(n * k) * sizeof *out);
        float *embedded = gpu_new(&be, (size_t)(5 * k) * sizeof(float));
        gpu_ok(ht_qmatrix_embed(&be, &p.device, 5, gpu_put(&be, ids, sizeof ids), 3.0f, embedded));
        gpu_get(&be, rows, embedded, (size_t)(5 * k) * sizeof(float));
        for (int t = 0; t < 5; t++)
            for (int64_t i = 0; i < k; i++) {
                if (ids[t] < 0 || ids[t] >= n)
                    ck_assert(isnan(rows[t * k + i]));
                else
                    ck_assert(rows[t * k + i] == 3.0f * p.values[ids[t] * k + i]);
            }
        free(out);
        free(rows);
        pair_free(&p);
    }
    gpu_end(&be);
}
END_TEST

struct product {
    int64_t m, n, k, pad; // pad: elements between rows of x and of y
    enum ht_dtype x, y;
    float alpha, beta;
};

/* Every kernel (1 to 8, to 16, to 32 and more rows), ragged in each direction; fewer units of k
 * than parts, and more. */
static const struct product products[] = {
    { 1, 16, 64, 0, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 0.0f },
    { 1, 1, 1, 0, HT_DTYPE_F32, HT_DTYPE_F32, 1.0f, 0.0f },
    { 3, 37, 100, 0, HT_DTYPE_BF16, HT_DTYPE_F32, 0.5f, 0.0f },
    { 8, 20, 640, 8, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 1.0f },
    { 11, 33, 1280, 3, HT_DTYPE_BF16, HT_DTYPE_F32, 1.0f, 1.0f },
    { 16, 48, 257, 0, HT_DTYPE_F32, HT_DTYPE_BF16, 2.0f, 0.0f },
    { 21, 70, 704, 0, HT_DTYPE_BF16, HT_DTYPE_F32, 1.0f, 0.0f },
    { 70, 90, 192, 8, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 1.0f },
};
enum { N_PRODUCTS = sizeof products / sizeof *products };

/* y (m, n) on the device, rows packed; x and y0 are padded here. */
static float *multiply(struct ht_backend *be, const struct ht_qmatrix *w, const struct product *p,
                       int64_t m, const float *x, const float *y0)
{
    const int64_t k = w->k, n = w->n, ldx = k + p->pad, ldy = n + p->pad;
    float *xs = calloc((size_t)(m * ldx), sizeof *xs), *ys = calloc((size_t)(m * ldy), sizeof *ys);
    float *y = malloc((size_t)(m * n) * sizeof *y);

    for (int64_t i = 0; i < m; i++) {
        memcpy(xs + i * ldx, x + i * k, (size_t)k * sizeof *xs);
        memcpy(ys + i * ldy, y0 + i * n, (size_t)n * sizeof *ys);
        for (int64_t j = n; j < ldy; j++) ys[i * ldy + j] = 77.0f;
    }
    void *on_device = p->beta != 0.0f || p->pad ? gpu_put_as(be, p->y, ys, m * ldy)
                                                : gpu_new(be, (size_t)(m * ldy) * 4);
    const struct ht_qgemm_args a = { .m = m,
                                     .w = w,
                                     .x_dtype = p->x,
                                     .y_dtype = p->y,
                                     .x = gpu_put_as(be, p->x, xs, m * ldx),
                                     .ldx = ldx,
                                     .y = on_device,
                                     .ldy = ldy,
                                     .alpha = p->alpha,
                                     .beta = p->beta };
    gpu_ok(ht_qgemm(be, &a));
    gpu_get_as(be, p->y, ys, on_device, m * ldy);
    for (int64_t i = 0; i < m; i++) {
        memcpy(y + i * n, ys + i * ldy, (size_t)n * sizeof *y);
        for (int64_t j = n; j < ldy; j++) ck_assert(ys[i * ldy + j] == 77.0f);
    }
    free(xs);
    free(ys);
    return y;
}

/* Against fp64 of the same rounded x and the same values of W: what is left is fp32 sums, and the
 * rounding of y. */
START_TEST(products_match_fp64)
{
    struct ht_backend be;

    gpu_start(&be, 1 << 22);
    for (int s = 0; s < N_PRODUCTS; s++) {
        const struct product *p = &products[s];
        struct pair w;
        float *x = normal(p->m * p->k, 1.0f, 3), *y0 = normal(p->m * p->n, 1.0f, 4);

        pair_make(&w, &be, _i, p->n, p->k);
        float *y = multiply(&be, &w.device, p, p->m, x, y0);
        for (int64_t i = 0; i < p->m; i++)
            for (int64_t j = 0; j < p->n; j++) {
                double sum = 0.0, size = 0.0;
                for (int64_t e = 0; e < p->k; e++) {
                    const double v =
                        (double)round_bf16(x[i * p->k + e]) * (double)w.values[j * p->k + e];
                    sum += v;
                    size += fabs(v);
                }
                const float old =
                    p->y == HT_DTYPE_BF16 ? round_bf16(y0[i * p->n + j]) : y0[i * p->n + j];
                const double want = (double)p->alpha * sum + (double)p->beta * (double)old;
                const double bound = 8 * (double)FLT_EPSILON * (size + fabs((double)old)) * 2 +
                                     (p->y == HT_DTYPE_BF16 ? 0x1p-8 * fabs(want) : 0.0);
                ck_assert_msg(fabs((double)y[i * p->n + j] - want) <= bound,
                              "%s, product %d, row %lld, column %lld: %g, not %g",
                              ht_qformat_name(w.device.format), s, (long long)i, (long long)j,
                              (double)y[i * p->n + j], want);
            }
        free(x);
        free(y0);
        free(y);
        pair_free(&w);
    }
    gpu_end(&be);
}
END_TEST

/* Against the CPU backend, which quantises x to 8 bits where the weights are integers: half a
 * percent of y's size (quant.h). */
START_TEST(products_are_near_the_cpu)
{
    enum { M = 5, N = 60, K = 640 };
    const struct product p = { M, N, K, 0, HT_DTYPE_BF16, HT_DTYPE_F32, 1.0f, 0.0f };
    struct ht_backend be;
    struct pair w;
    float *x = normal(M * K, 1.0f, 9), *y0 = calloc(M * N, sizeof *y0), *cpu = calloc(M * N, 4);
    double diff = 0.0, size = 0.0;

    gpu_start(&be, 1 << 20);
    pair_make(&w, &be, _i, N, K);
    for (int i = 0; i < M * K; i++) x[i] = round_bf16(x[i]);
    float *y = multiply(&be, &w.device, &p, M, x, y0);
    gpu_ok(ht_qgemm(
        &w.cpu, &(struct ht_qgemm_args){
                    .m = M, .w = &w.host, .x = x, .ldx = K, .y = cpu, .ldy = N, .alpha = 1.0f }));
    for (int i = 0; i < M * N; i++) {
        diff += ((double)y[i] - (double)cpu[i]) * ((double)y[i] - (double)cpu[i]);
        size += (double)cpu[i] * (double)cpu[i];
    }
    ck_assert_double_le(sqrt(diff / size), w.host.format == HT_Q_BF16 ? 2e-6 : 0.008);
    free(x);
    free(y0);
    free(y);
    free(cpu);
    pair_free(&w);
    gpu_end(&be);
}
END_TEST

/* Rows one by one, in batches of every kernel and at other places: the same bits. */
START_TEST(a_row_does_not_depend_on_its_batch)
{
    enum { M = 70, N = 35, K = 768 };
    static const int64_t batches[] = { 1, 7, 8, 13, 20, 40, 70 };
    const struct product p = { M, N, K, 0, HT_DTYPE_BF16, HT_DTYPE_F32, 1.0f, 0.0f };
    struct ht_backend be;
    struct pair w;
    float *x = normal(M * K, 1.0f, 11), *y0 = calloc(M * N, sizeof *y0);

    gpu_start(&be, 1 << 20);
    pair_make(&w, &be, _i, N, K);
    float *all = multiply(&be, &w.device, &p, M, x, y0);
    for (size_t b = 0; b < sizeof batches / sizeof *batches; b++) {
        const int64_t m = batches[b], first = M - m < 4 ? M - m : 4;
        float *y = multiply(&be, &w.device, &p, m, x + first * K, y0);
        ck_assert_mem_eq(y, all + first * N, (size_t)(m * N) * sizeof *y);
        free(y);
    }
    free(all);
    free(x);
    free(y0);
    pair_free(&w);
    gpu_end(&be);
}
END_TEST

START_TEST(a_bad_row_spoils_no_other)
{
    enum { M = 19, N = 20, K = 128 };
    const struct product p = { M, N, K, 0, HT_DTYPE_BF16, HT_DTYPE_F32, 1.0f, 0.0f };
    struct ht_backend be;
    struct pair w;
    float *x = normal(M * K, 1.0f, 12), *y0 = calloc(M * N, sizeof *y0);

    gpu_start(&be, 1 << 20);
    pair_make(&w, &be, _i, N, K);
    float *clean = multiply(&be, &w.device, &p, M, x, y0);
    x[3 * K + 5] = NAN;
    x[17 * K + 90] = INFINITY;
    float *y = multiply(&be, &w.device, &p, M, x, y0);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) {
            if (i == 3)
                ck_assert(isnan(y[i * N + j]));
            else if (i == 17)
                ck_assert(!isfinite(y[i * N + j]));
            else
                ck_assert(y[i * N + j] == clean[i * N + j]);
        }
    free(clean);
    free(y);
    free(x);
    free(y0);
    pair_free(&w);
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
    struct ht_backend be;
    struct pair w;

    gpu_start(&be, 1 << 10);
    pair_make(&w, &be, HT_Q_INT4, 20, 100);
    float *x = gpu_new(&be, 100 * 4), *y = gpu_new(&be, 20 * 4);
    struct ht_qgemm_args a = {
        .m = 1, .w = &w.host, .x = x, .ldx = 100, .y = y, .ldy = 20, .alpha = 1.0f
    };
    refused(ht_qgemm(&be, &a), HT_ERR_ARG, "packed for cpu");
    a.w = &w.device;
    refused(ht_qgemm(&w.cpu, &a), HT_ERR_ARG, "packed for cuda");
    a.precise = true;
    refused(ht_qgemm(&be, &a), HT_ERR_UNSUPPORTED, "precise");
    a.precise = false;
    a.ldx = 99;
    refused(ht_qgemm(&be, &a), HT_ERR_ARG, "ldx is 99");
    refused(ht_qmatrix_create_on(&w.host, &be, HT_Q_INT4, 48, 4, 4), HT_ERR_ARG, "group is 48");
    pair_free(&w);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("quant_cuda");
    TCase *t = tcase_create("quant_cuda");

    tcase_add_loop_test(t, rows_are_what_the_host_has, 0, N_FORMATS);
    tcase_add_loop_test(t, products_match_fp64, 0, N_FORMATS);
    tcase_add_loop_test(t, products_are_near_the_cpu, 0, N_FORMATS);
    tcase_add_loop_test(t, a_row_does_not_depend_on_its_batch, 0, N_FORMATS);
    tcase_add_loop_test(t, a_bad_row_spoils_no_other, 0, N_FORMATS);
    tcase_add_test(t, misuse_is_refused);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
