/* tests/emu/test_adamw_cuda.c: the optimiser on the CUDA backend against fp64. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/adamw.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ref/ops_ref.h"

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct update {
    struct tensor master, m, v, grad, weight;
    struct ht_adamw_args args; // device
};

static struct update update_make(struct ht_backend *be, int64_t n, enum ht_dtype dtype)
{
    struct update c = { .master = tensor_normal(n, HT_DTYPE_F32, 0.02, 1),
                        .m = tensor_normal(n, HT_DTYPE_F32, 1e-3, 2),
                        .v = tensor_normal(n, HT_DTYPE_F32, 1e-3, 3),
                        .grad = tensor_normal(n, HT_DTYPE_F32, 0.3, 4),
                        .weight = tensor_make(n, dtype) };
    for (int64_t i = 0; i < n; i++) {
        ((float *)c.v.p)[i] *= ((float *)c.v.p)[i]; // a second moment is not negative
        c.v.d[i] = tensor_at(&c.v, i);
    }
    c.args = (struct ht_adamw_args){ .n = n,
                                     .step = 3,
                                     .lr = 3e-4f,
                                     .beta1 = 0.9f,
                                     .beta2 = 0.95f,
                                     .eps = 1e-8f,
                                     .weight_decay = 0.1f,
                                     .grad_scale = 0.125f,
                                     .master = to_gpu(be, &c.master),
                                     .exp_avg = to_gpu(be, &c.m),
                                     .exp_avg_sq = to_gpu(be, &c.v),
                                     .grad = to_gpu(be, &c.grad),
                                     .weight = to_gpu(be, &c.weight),
                                     .weight_dtype = dtype };
    return c;
}

static void update_get(struct ht_backend *be, struct update *c)
{
    from_gpu(be, &c->master, c->args.master);
    from_gpu(be, &c->m, c->args.exp_avg);
    from_gpu(be, &c->v, c->args.exp_avg_sq);
    from_gpu(be, &c->weight, c->args.weight);
}

static void update_free(struct update *c)
{
    tensor_free(&c->master);
    tensor_free(&c->m);
    tensor_free(&c->v);
    tensor_free(&c->grad);
    tensor_free(&c->weight);
}

static const int64_t sizes[] = { 1, 5, 16, 67, 4096, 40001 }; // the last: blocks go round

START_TEST(steps_match_reference)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < 6; s++) {
        struct ht_backend be;
        gpu_start(&be, 0);
        struct update c = update_make(&be, sizes[s], dtype);
        const float factor = 0.5f;
        c.args.clip = gpu_put(&be, &factor, sizeof factor);
        for (int step = 1; step <= 5; step++) {
            c.args.step = step;
            const struct ops_ref_adamw ref = { .n = sizes[s],
                                               .step = step,
                                               .lr = (double)c.args.lr,
                                               .beta1 = (double)c.args.beta1,
                                               .beta2 = (double)c.args.beta2,
                                               .eps = (double)c.args.eps,
                                               .weight_decay = (double)c.args.weight_decay,
                                               .grad_scale = 0.5 * (double)c.args.grad_scale,
                                               .master = c.master.d,
                                               .exp_avg = c.m.d,
                                               .exp_avg_sq = c.v.d,
                                               .grad = c.grad.d };
            ops_ref_adamw(&ref);
            gpu_ok(ht_adamw_step(&be, &c.args));
        }
        update_get(&be, &c);
        const double f = 5 * 4 * FLT_EPSILON; // 5 steps of about 4 roundings
        check_close(&c.m, c.m.d, f * max_abs(c.m.d, c.m.n), "exp_avg");
        check_close(&c.v, c.v.d, f * max_abs(c.v.d, c.v.n), "exp_avg_sq");
        check_close(&c.master, c.master.d, f * max_abs(c.master.d, c.master.n), "master");
        for (int64_t i = 0; i < c.weight.n; i++) { // the copy is the rounded master exactly
            const float w = ((float *)c.master.p)[i];
            if (ht_load_f32(c.weight.p, i, dtype) !=
                (dtype == HT_DTYPE_F32 ? w : ht_bf16_to_f32(ht_f32_to_bf16(w))))
                ck_abort_msg("weight[%lld] is not the rounded master", (long long)i);
        }
        update_free(&c);
        gpu_end(&be);
    }
}
END_TEST

/* Sharding over ranks must not change a bit: any cut, aligned or not. */
START_TEST(slices_do_not_change_bits)
{
    const enum ht_dtype dtype = dtypes[_i];
    const int64_t n = 5001, cut = 1777;
    struct ht_backend be;

    gpu_start(&be, 0);
    struct update whole = update_make(&be, n, dtype), parts = update_make(&be, n, dtype);
    gpu_ok(ht_adamw_step(&be, &whole.args));
    for (int part = 0; part < 2; part++) {
        struct ht_adamw_args a = parts.args;
        const int64_t at = part ? cut : 0;
        a.n = part ? n - cut : cut;
        a.master += at, a.exp_avg += at, a.exp_avg_sq += at, a.grad += at;
        a.weight = (char *)a.weight + (size_t)at * ht_dtype_bytes(dtype);
        gpu_ok(ht_adamw_step(&be, &a));
    }
    update_get(&be, &whole);
    update_get(&be, &parts);
    check_same_bits(&whole.master, &parts.master, "master");
    check_same_bits(&whole.weight, &parts.weight, "weight");
    check_same_bits(&whole.m, &parts.m, "exp_avg");
    check_same_bits(&whole.v, &parts.v, "exp_avg_sq");
    update_free(&whole);
    update_free(&parts);
    gpu_end(&be);
}
END_TEST

START_TEST(a_norm_that_is_not_finite_changes_nothing)
{
    struct ht_backend be;
    const float factor = NAN;

    gpu_start(&be, 0);
    struct update c = update_make(&be, 100, dtypes[_i]);
    struct tensor before = tensor_copy(&c.master);
    c.args.clip = gpu_put(&be, &factor, sizeof factor);
    gpu_ok(ht_adamw_step(&be, &c.args));
    update_get(&be, &c);
    check_same_bits(&c.master, &before, "master");
    tensor_free(&before);
    update_free(&c);
    gpu_end(&be);
}
END_TEST

START_TEST(sum_of_squares_and_clip_factor)
{
    static const int64_t counts[] = { 0, 1, 4095, 4097, 50000 };

    for (int k = 0; k < 5; k++) {
        struct ht_backend be;
        const int64_t n = counts[k];
        double sum = 0.0, got;
        float clip[3];
        gpu_start(&be, 16384);
        struct tensor x = tensor_normal(n, HT_DTYPE_F32, 3.0, 9);
        float *d = to_gpu(&be, &x), *factor = gpu_new(&be, sizeof clip);
        double *out = gpu_new(&be, sizeof *out);
        for (int64_t i = 0; i < n; i++) sum += x.d[i] * x.d[i];
        gpu_ok(ht_sum_squares(&be, out, d, n));
        gpu_ok(ht_clip_factor(&be, factor, out, NULL, 0.5, 1.0));
        gpu_ok(ht_clip_factor(&be, factor + 1, out, NULL, 0.5, 0.0)); // no limit
        gpu_ok(ht_clip_factor(&be, factor + 2, out, NULL, 0.5, 1e9));
        gpu_get(&be, &got, out, sizeof got);
        gpu_get(&be, clip, factor, sizeof clip);
        ck_assert_double_le(fabs(got - sum), 1e-12 * sum);
        const double norm = 0.5 * sqrt(sum);
        ck_assert_double_eq_tol((double)clip[0], norm > 1.0 ? 1.0 / norm : 1.0, 1e-7);
        ck_assert_float_eq(clip[1], 1.0f);
        ck_assert_float_eq(clip[2], 1.0f);
        if (n > 0) {
            ((float *)x.p)[n / 2] = INFINITY;
            d = to_gpu(&be, &x);
            gpu_ok(ht_sum_squares(&be, out, d, n));
            gpu_ok(ht_clip_factor(&be, factor, out, NULL, 1.0, 1.0));
            gpu_get(&be, clip, factor, sizeof *clip);
            ck_assert_float_nan(clip[0]);
        }
        ck_assert_uint_eq(be.scratch.used_bytes, 0);
        tensor_free(&x);
        gpu_end(&be);
    }
}
END_TEST

/* Of no row, one, fewer and more than a block has threads; on both backends. */
START_TEST(sums_of_rows)
{
    static const int64_t counts[] = { 0, 1, 7, 700 };
    enum { COLUMNS = 3 };
    double x[700 * COLUMNS], want[COLUMNS], got[COLUMNS], on_cpu[COLUMNS];
    struct ht_backend be, cpu;

    gpu_start(&be, 0);
    gpu_ok(ht_backend_create_cpu(&cpu, 1, 64));
    for (int i = 0; i < 700 * COLUMNS; i++) x[i] = cos(i) * (i % 5 ? 1.0 : 1e3);
    double *d = gpu_put(&be, x, sizeof x), *out = gpu_new(&be, sizeof got);
    for (int k = 0; k < 4; k++) {
        for (int c = 0; c < COLUMNS; c++) want[c] = 0.0;
        for (int64_t i = 0; i < counts[k] * COLUMNS; i++) want[i % COLUMNS] += x[i];
        gpu_ok(ht_sum_rows(&be, out, d, counts[k], COLUMNS));
        gpu_get(&be, got, out, sizeof got);
        gpu_ok(ht_sum_rows(&cpu, on_cpu, x, counts[k], COLUMNS));
        for (int c = 0; c < COLUMNS; c++) {
            ck_assert_double_eq_tol(got[c], want[c], 1e-9);
            ck_assert_double_eq(on_cpu[c], want[c]);
        }
    }
    ck_assert_int_eq(ht_sum_rows(&be, out, d, -1, COLUMNS), HT_ERR_ARG);
    ck_assert_int_eq(ht_sum_rows(&be, out, d, 1, 0), HT_ERR_ARG);
    ht_backend_free(&cpu);
    gpu_end(&be);
}
END_TEST

/* A loss that is not finite skips the step too. */
START_TEST(clip_factor_looks_at_the_loss)
{
    static const double losses[] = { 3.0, NAN, INFINITY, -INFINITY };
    const double squares = 4.0;
    struct ht_backend be, cpu;

    gpu_start(&be, 0);
    gpu_ok(ht_backend_create_cpu(&cpu, 1, 64));
    double *d_squares = gpu_put(&be, &squares, sizeof squares);
    float *d_clip = gpu_new(&be, sizeof *d_clip);
    for (int k = 0; k < 4; k++) {
        double *d_loss = gpu_put(&be, &losses[k], sizeof *losses);
        float clip[2];
        gpu_ok(ht_clip_factor(&be, d_clip, d_squares, d_loss, 1.0, 1.0));
        gpu_get(&be, clip, d_clip, sizeof *clip);
        gpu_ok(ht_clip_factor(&cpu, clip + 1, &squares, &losses[k], 1.0, 1.0));
        for (int i = 0; i < 2; i++)
            if (k == 0)
                ck_assert_float_eq(clip[i], 0.5f);
            else
                ck_assert_float_nan(clip[i]);
    }
    ht_backend_free(&cpu);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("adamw_cuda");
    TCase *t = tcase_create("adamw_cuda");

    tcase_add_loop_test(t, steps_match_reference, 0, 2);
    tcase_add_loop_test(t, slices_do_not_change_bits, 0, 2);
    tcase_add_loop_test(t, a_norm_that_is_not_finite_changes_nothing, 0, 2);
    tcase_add_test(t, sum_of_squares_and_clip_factor);
    tcase_add_test(t, sums_of_rows);
    tcase_add_test(t, clip_factor_looks_at_the_loss);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
