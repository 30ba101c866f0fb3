/* tests/core/ops/test_adamw.c: the optimiser's step and the sum of squares against fp64. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/adamw.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ops_ref.h"

struct adamw_case {
    struct tensor master, m, v, grad, weight;
    struct ht_adamw_args args;
};

static struct adamw_case case_make(int64_t n, enum ht_dtype dtype)
{
    struct adamw_case c = { .master = tensor_normal(n, HT_DTYPE_F32, 0.02, 1),
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
                                     .master = c.master.p,
                                     .exp_avg = c.m.p,
                                     .exp_avg_sq = c.v.p,
                                     .grad = c.grad.p,
                                     .weight = c.weight.p,
                                     .weight_dtype = dtype };
    return c;
}

static void case_free(struct adamw_case *c)
{
    tensor_free(&c->master);
    tensor_free(&c->m);
    tensor_free(&c->v);
    tensor_free(&c->grad);
    tensor_free(&c->weight);
}

static void reference_step(struct adamw_case *c)
{
    const struct ops_ref_adamw ref = { .n = c->args.n,
                                       .step = c->args.step,
                                       .lr = (double)c->args.lr,
                                       .beta1 = (double)c->args.beta1,
                                       .beta2 = (double)c->args.beta2,
                                       .eps = (double)c->args.eps,
                                       .weight_decay = (double)c->args.weight_decay,
                                       .grad_scale = (double)c->args.grad_scale,
                                       .master = c->master.d,
                                       .exp_avg = c->m.d,
                                       .exp_avg_sq = c->v.d,
                                       .grad = c->grad.d };
    ops_ref_adamw(&ref);
}

static const int64_t sizes[] = { 1, 5, 16, 67, 4096, 12345 };

START_TEST(steps_match_reference)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < 6; s++) {
        struct adamw_case c = case_make(sizes[s], v.dtype);
        for (int step = 1; step <= 5; step++) {
            c.args.step = step;
            reference_step(&c);
            ck_assert_int_eq(ht_adamw_step(&be, &c.args), HT_OK);
        }
        const double f = 5 * 4 * FLT_EPSILON; // 5 steps of about 4 roundings
        check_close(&c.m, c.m.d, f * max_abs(c.m.d, c.m.n), "exp_avg");
        check_close(&c.v, c.v.d, f * max_abs(c.v.d, c.v.n), "exp_avg_sq");
        check_close(&c.master, c.master.d, f * max_abs(c.master.d, c.master.n), "master");
        check_close(&c.weight, c.master.d, f * max_abs(c.master.d, c.master.n), "weight");
        for (int64_t i = 0; i < c.weight.n; i++) { // the copy is the rounded master exactly
            const float w = ((float *)c.master.p)[i];
            ck_assert_float_eq(ht_load_f32(c.weight.p, i, v.dtype),
                               v.dtype == HT_DTYPE_F32 ? w : ht_bf16_to_f32(ht_f32_to_bf16(w)));
        }
        case_free(&c);
    }
    ht_backend_free(&be);
}
END_TEST

/* Sharding over ranks must not change a bit: any cut, any thread count. */
START_TEST(slices_and_threads_do_not_change_bits)
{
    const struct variant v = variant_at(_i);
    const int64_t n = 20011, cut = 7777;
    struct adamw_case whole = case_make(n, v.dtype), cut_up = case_make(n, v.dtype);
    struct ht_backend be1 = backend_make(v.isa, 1, 0), be2 = backend_make(v.isa, 2, 0);

    ck_assert_int_eq(ht_adamw_step(&be1, &whole.args), HT_OK);
    for (int part = 0; part < 2; part++) {
        struct ht_adamw_args a = cut_up.args;
        const int64_t from = part ? cut : 0;
        a.n = part ? n - cut : cut;
        a.master += from, a.exp_avg += from, a.exp_avg_sq += from, a.grad += from;
        a.weight = (char *)a.weight + (size_t)from * ht_dtype_bytes(v.dtype);
        ck_assert_int_eq(ht_adamw_step(&be2, &a), HT_OK);
    }
    check_same_bits(&whole.master, &cut_up.master, "master");
    check_same_bits(&whole.m, &cut_up.m, "exp_avg");
    check_same_bits(&whole.v, &cut_up.v, "exp_avg_sq");
    check_same_bits(&whole.weight, &cut_up.weight, "weight");
    case_free(&whole);
    case_free(&cut_up);
    ht_backend_free(&be1);
    ht_backend_free(&be2);
}
END_TEST

START_TEST(first_step_moves_by_the_learning_rate)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    struct adamw_case c = case_make(67, HT_DTYPE_F32);
    struct tensor before = tensor_copy(&c.master);

    tensor_fill(&c.m, 0.0);
    tensor_fill(&c.v, 0.0);
    c.args.step = 1;
    c.args.weight_decay = 0.0f;
    ck_assert_int_eq(ht_adamw_step(&be, &c.args), HT_OK);
    for (int64_t i = 0; i < 67; i++) { // m/c1 = g, v/c2 = g^2
        const double g = fabs(0.125 * c.grad.d[i]);
        ck_assert_double_eq_tol(fabs(tensor_at(&c.master, i) - before.d[i]), 3e-4 * g / (g + 1e-8),
                                1e-8); // the step is lost below the last bit of a weight near 0.05
    }
    tensor_free(&before);
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

START_TEST(sum_of_squares_matches_fp64)
{
    const struct variant v = variant_at(_i);
    const int64_t lengths[] = { 0, 1, 7, 4096, 4097, 50021, 5000000 };
    struct ht_backend be1 = backend_make(v.isa, 1, 0), be2 = backend_make(v.isa, 2, 0);

    for (int s = 0; s < 7; s++) {
        struct tensor x = tensor_normal(lengths[s], HT_DTYPE_F32, 1e20, 5); // squares pass fp32
        double one = -1.0, two = -2.0, ref = 0.0;
        for (int64_t i = 0; i < x.n; i++) ref += x.d[i] * x.d[i];
        ck_assert_int_eq(ht_sum_squares(&be1, &one, x.p, x.n), HT_OK);
        ck_assert_int_eq(ht_sum_squares(&be2, &two, x.p, x.n), HT_OK);
        ck_assert_double_le(fabs(one - ref), 1e-12 * ref);
        ck_assert(memcmp(&one, &two, sizeof one) == 0);
        if (x.n) {
            ((float *)x.p)[x.n / 2] = INFINITY;
            ck_assert_int_eq(ht_sum_squares(&be2, &two, x.p, x.n), HT_OK);
            ck_assert(isinf(two));
            ((float *)x.p)[x.n - 1] = NAN;
            ck_assert_int_eq(ht_sum_squares(&be2, &two, x.p, x.n), HT_OK);
            ck_assert(isnan(two));
        }
        tensor_free(&x);
    }
    ht_backend_free(&be1);
    ht_backend_free(&be2);
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    struct adamw_case c = case_make(5, HT_DTYPE_F32);
    struct ht_adamw_args a;
    double sum;

    a = c.args, a.step = 0;
    ck_assert_int_eq(ht_adamw_step(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "step is 0"));
    a = c.args, a.beta2 = 1.0f;
    ck_assert_int_eq(ht_adamw_step(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "beta2 is 1"));
    a = c.args, a.grad = NULL;
    ck_assert_int_eq(ht_adamw_step(&be, &a), HT_ERR_ARG);
    a = c.args, a.weight_dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_adamw_step(&be, &a), HT_ERR_UNSUPPORTED);
    a = c.args, a.n = 0, a.master = NULL;
    ck_assert_int_eq(ht_adamw_step(&be, &a), HT_OK);
    ck_assert_int_eq(ht_sum_squares(&be, &sum, NULL, -1), HT_ERR_ARG);
    ck_assert_int_eq(ht_sum_squares(&be, &sum, NULL, 3), HT_ERR_ARG);
    check_close(&c.master, c.master.d, 0.0, "master after refusals");
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("adamw");
    TCase *t = tcase_create("adamw");

    tcase_add_loop_test(t, steps_match_reference, 0, n_variants());
    tcase_add_loop_test(t, slices_and_threads_do_not_change_bits, 0, n_variants());
    tcase_add_test(t, first_step_moves_by_the_learning_rate);
    tcase_add_loop_test(t, sum_of_squares_matches_fp64, 0, n_variants());
    tcase_add_test(t, bad_arguments_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
