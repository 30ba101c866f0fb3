/* tests/core/ops/test_mlp.c: SwiGLU against fp64, forward and backward. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/mlp.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ops_ref.h"

struct shape {
    int64_t n_rows, d_ff;
};
static const struct shape shapes[] = { { 1, 1 }, { 3, 5 }, { 2, 16 }, { 4, 37 }, { 90, 70 } };
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct mlp_case {
    struct tensor gate_up, y, grad_y, grad_gate_up;
    struct ht_swiglu_args args;
};

static struct mlp_case case_make(struct shape s, enum ht_dtype dtype)
{
    const int64_t n = s.n_rows * s.d_ff;
    struct mlp_case c = { .gate_up = tensor_normal(2 * n, dtype, 3.0, 1),
                          .y = tensor_make(n, dtype),
                          .grad_y = tensor_normal(n, dtype, 1.0, 2),
                          .grad_gate_up = tensor_make(2 * n, dtype) };
    c.args = (struct ht_swiglu_args){ s.n_rows, s.d_ff,     dtype,           c.gate_up.p,
                                      c.y.p,    c.grad_y.p, c.grad_gate_up.p };
    ops_ref_swiglu_forward(s.n_rows, s.d_ff, c.gate_up.d, c.y.d);
    ops_ref_swiglu_backward(s.n_rows, s.d_ff, c.gate_up.d, c.grad_y.d, c.grad_gate_up.d);
    return c;
}

static void case_free(struct mlp_case *c)
{
    tensor_free(&c->gate_up);
    tensor_free(&c->y);
    tensor_free(&c->grad_y);
    tensor_free(&c->grad_gate_up);
}

START_TEST(forward_and_backward_match_reference)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < N_SHAPES; s++)
        for (int mode = 0; mode < 3; mode++) { // with y, without, gradients in place
            struct mlp_case c = case_make(shapes[s], v.dtype);
            const double slack = 8 * FLT_EPSILON; // 4 products, 1 exp, 1 division
            ck_assert_int_eq(ht_swiglu_forward(&be, &c.args), HT_OK);
            check_close(&c.y, c.y.d, slack * max_abs(c.y.d, c.y.n), "y");
            struct tensor forward = tensor_copy(&c.y);
            tensor_fill(&c.y, NAN);
            if (mode == 1) c.args.y = NULL;
            if (mode == 2) c.args.grad_gate_up = c.gate_up.p;
            ck_assert_int_eq(ht_swiglu_backward(&be, &c.args), HT_OK);
            if (mode != 1) check_close(&c.y, forward.d, slack * max_abs(forward.d, c.y.n), "y");
            check_close(mode == 2 ? &c.gate_up : &c.grad_gate_up, c.grad_gate_up.d,
                        2 * slack * max_abs(c.grad_gate_up.d, c.grad_gate_up.n), "grad_gate_up");
            tensor_free(&forward);
            case_free(&c);
        }
    ht_backend_free(&be);
}
END_TEST

START_TEST(thread_count_does_not_change_bits)
{
    const struct variant v = variant_at(_i);
    struct mlp_case c[2];

    for (int t = 0; t < 2; t++) {
        struct ht_backend be = backend_make(v.isa, t + 1, 0);
        c[t] = case_make((struct shape){ 90, 70 }, v.dtype);
        ck_assert_int_eq(ht_swiglu_forward(&be, &c[t].args), HT_OK);
        ck_assert_int_eq(ht_swiglu_backward(&be, &c[t].args), HT_OK);
        ht_backend_free(&be);
    }
    check_same_bits(&c[0].y, &c[1].y, "y");
    check_same_bits(&c[0].grad_gate_up, &c[1].grad_gate_up, "grad_gate_up");
    case_free(&c[0]);
    case_free(&c[1]);
}
END_TEST

START_TEST(large_gates_do_not_overflow)
{
    const struct variant v = variant_at(_i);
    const float gates[4] = { 1e4f, -1e4f, 80.0f, -80.0f };
    struct ht_backend be = backend_make(v.isa, 1, 0);
    struct mlp_case c = case_make((struct shape){ 1, 4 }, v.dtype);

    for (int i = 0; i < 4; i++) {
        ht_store_f32(c.gate_up.p, i, v.dtype, gates[i]);
        ht_store_f32(c.gate_up.p, 4 + i, v.dtype, 2.0f);
    }
    ck_assert_int_eq(ht_swiglu_forward(&be, &c.args), HT_OK);
    ck_assert_int_eq(ht_swiglu_backward(&be, &c.args), HT_OK);
    ck_assert_double_eq_tol(tensor_at(&c.y, 0), 2e4, 2e4 / 128);
    ck_assert_double_eq_tol(tensor_at(&c.y, 1), 0.0, 1e-6);
    for (int64_t i = 0; i < 8; i++) ck_assert(isfinite(tensor_at(&c.grad_gate_up, i)));
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

START_TEST(reference_backward_matches_central_differences)
{
    const double h = 1e-5;
    struct mlp_case c = case_make((struct shape){ 2, 5 }, HT_DTYPE_F32);

    for (int64_t i = 0; i < c.gate_up.n; i++) {
        const double old = c.gate_up.d[i];
        double diff = 0.0;
        for (int side = 1; side >= -1; side -= 2) {
            c.gate_up.d[i] = old + side * h;
            ops_ref_swiglu_forward(2, 5, c.gate_up.d, c.y.d);
            for (int64_t j = 0; j < c.y.n; j++) diff += side * c.y.d[j] * c.grad_y.d[j];
        }
        c.gate_up.d[i] = old;
        ck_assert_double_eq_tol(diff / (2 * h), c.grad_gate_up.d[i], 1e-8);
    }
    case_free(&c);
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    struct mlp_case c = case_make((struct shape){ 2, 5 }, HT_DTYPE_F32);
    struct ht_swiglu_args a;

    a = c.args, a.d_ff = -5;
    ck_assert_int_eq(ht_swiglu_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "d_ff is -5"));
    a = c.args, a.y = NULL;
    ck_assert_int_eq(ht_swiglu_forward(&be, &a), HT_ERR_ARG);
    a = c.args, a.grad_y = NULL;
    ck_assert_int_eq(ht_swiglu_backward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "grad_y"));
    a = c.args, a.dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_swiglu_backward(&be, &a), HT_ERR_UNSUPPORTED);
    a = c.args, a.n_rows = 0;
    ck_assert_int_eq(ht_swiglu_forward(&be, &a), HT_OK);
    ck_assert_int_eq(ht_swiglu_backward(&be, &a), HT_OK);
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("mlp");
    TCase *t = tcase_create("mlp");

    tcase_add_loop_test(t, forward_and_backward_match_reference, 0, n_variants());
    tcase_add_loop_test(t, thread_count_does_not_change_bits, 0, n_variants());
    tcase_add_loop_test(t, large_gates_do_not_overflow, 0, n_variants());
    tcase_add_test(t, reference_backward_matches_central_differences);
    tcase_add_test(t, bad_arguments_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
