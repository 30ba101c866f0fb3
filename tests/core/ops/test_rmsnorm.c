/* tests/core/ops/test_rmsnorm.c: residual addition and RMSNorm against fp64, forward and backward.
 */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/rmsnorm.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ops_ref.h"

struct shape {
    int64_t n_rows, d_model;
};
// one element, ragged ends of every vector width, past a block of rows and of columns
static const struct shape shapes[] = { { 1, 1 },   { 3, 7 },    { 2, 16 },  { 5, 33 },
                                       { 65, 67 }, { 130, 64 }, { 70, 200 } };
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct norm_case {
    struct tensor w, r_in, branch, r_out, y, rstd;                    // forward
    struct tensor grad_y, grad_r_out, grad_r_in, grad_branch, grad_w; // backward
    struct ht_rmsnorm_args args;
};

static struct norm_case case_make(struct shape s, enum ht_dtype dtype)
{
    const int64_t n = s.n_rows * s.d_model;
    struct norm_case c = {
        .w = tensor_normal(s.d_model, HT_DTYPE_F32, 1.0, 1),
        .r_in = tensor_normal(n, HT_DTYPE_F32, 2.0, 2),
        .branch = tensor_normal(n, dtype, 1.5, 3),
        .r_out = tensor_make(n, HT_DTYPE_F32),
        .y = tensor_make(n, dtype),
        .rstd = tensor_make(s.n_rows, HT_DTYPE_F32),
        .grad_y = tensor_normal(n, dtype, 1.0, 4),
        .grad_r_out = tensor_normal(n, HT_DTYPE_F32, 0.5, 5),
        .grad_r_in = tensor_make(n, HT_DTYPE_F32),
        .grad_branch = tensor_make(n, dtype),
        .grad_w = tensor_normal(s.d_model, HT_DTYPE_F32, 1.0, 6),
    };
    c.args = (struct ht_rmsnorm_args){ .n_rows = s.n_rows,
                                       .d_model = s.d_model,
                                       .dtype = dtype,
                                       .eps = 1e-5f,
                                       .branch_scale = 0.22f,
                                       .w = c.w.p,
                                       .r_in = c.r_in.p,
                                       .branch = c.branch.p,
                                       .r_out = c.r_out.p,
                                       .y = c.y.p,
                                       .rstd = c.rstd.p,
                                       .grad_y = c.grad_y.p,
                                       .grad_r_out = c.grad_r_out.p,
                                       .grad_r_in = c.grad_r_in.p,
                                       .grad_branch = c.grad_branch.p,
                                       .grad_w = c.grad_w.p };
    return c;
}

static void case_free(struct norm_case *c)
{
    tensor_free(&c->w);
    tensor_free(&c->r_in);
    tensor_free(&c->branch);
    tensor_free(&c->r_out);
    tensor_free(&c->y);
    tensor_free(&c->rstd);
    tensor_free(&c->grad_y);
    tensor_free(&c->grad_r_out);
    tensor_free(&c->grad_r_in);
    tensor_free(&c->grad_branch);
    tensor_free(&c->grad_w);
}

/* The reference on the case's values; its outputs land in the fp64 twins of the output tensors. */
static struct ops_ref_rmsnorm reference(struct norm_case *c)
{
    return (struct ops_ref_rmsnorm){ .n_rows = c->args.n_rows,
                                     .d_model = c->args.d_model,
                                     .eps = (double)c->args.eps,
                                     .branch_scale = (double)c->args.branch_scale,
                                     .w = c->w.d,
                                     .r_in = c->r_in.d,
                                     .branch = c->args.branch ? c->branch.d : NULL,
                                     .r_out = c->r_out.d,
                                     .y = c->y.d,
                                     .rstd = c->rstd.d,
                                     .grad_y = c->grad_y.d,
                                     .grad_r_out = c->args.grad_r_out ? c->grad_r_out.d : NULL,
                                     .grad_r_in = c->grad_r_in.d,
                                     .grad_branch = c->args.grad_branch ? c->grad_branch.d : NULL,
                                     .grad_w = c->grad_w.d };
}

/* 16 roundings of the largest value: a few products, a sum of d_model positive terms, a root. */
static double slack(const double *ref, int64_t n)
{
    return 16 * FLT_EPSILON * max_abs(ref, n);
}

START_TEST(forward_matches_reference)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < N_SHAPES; s++)
        for (int mode = 0; mode < 3; mode++) { // branch; no branch; no branch, no r_out, no rstd
            struct norm_case c = case_make(shapes[s], v.dtype);
            if (mode > 0) c.args.branch = NULL;
            if (mode == 2) c.args.r_out = NULL, c.args.rstd = NULL;
            const struct ops_ref_rmsnorm ref = reference(&c);
            ops_ref_rmsnorm_forward(&ref);
            ck_assert_msg(ht_rmsnorm_forward(&be, &c.args) == HT_OK, "%s", ht_error_message());
            check_close(&c.y, c.y.d, slack(c.y.d, c.y.n), "y");
            if (mode < 2) {
                check_close(&c.r_out, c.r_out.d, slack(c.r_out.d, c.r_out.n), "r_out");
                check_close(&c.rstd, c.rstd.d, slack(c.rstd.d, c.rstd.n), "rstd");
            }
            case_free(&c);
        }
    ht_backend_free(&be);
}
END_TEST

START_TEST(residual_can_be_updated_in_place_and_rounded)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < N_SHAPES; s++) {
        struct norm_case c = case_make(shapes[s], v.dtype);
        struct ops_ref_rmsnorm ref = reference(&c);
        struct tensor plain = tensor_make(c.r_in.n, HT_DTYPE_F32);

        c.args.r_out = plain.p;
        ck_assert_int_eq(ht_rmsnorm_forward(&be, &c.args), HT_OK);
        c.args.r_out = c.r_in.p; // in place, rounded
        c.args.round_residual = true;
        ck_assert_int_eq(ht_rmsnorm_forward(&be, &c.args), HT_OK);
        for (int64_t i = 0; i < plain.n; i++)
            ck_assert_float_eq(((float *)c.r_in.p)[i],
                               ht_bf16_to_f32(ht_f32_to_bf16(((float *)plain.p)[i])));
        for (int64_t i = 0; i < c.r_in.n; i++) c.r_in.d[i] = tensor_at(&c.r_in, i);
        ref.branch = NULL; // r_in is r_out now
        ops_ref_rmsnorm_forward(&ref);
        check_close(&c.y, c.y.d, slack(c.y.d, c.y.n), "y of the rounded residual");
        tensor_free(&plain);
        case_free(&c);
    }
    ht_backend_free(&be);
}
END_TEST

START_TEST(backward_matches_reference)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < N_SHAPES; s++)
        for (int mode = 0; mode < 3; mode++) { // everything; no branch, no incoming; in place
            struct norm_case c = case_make(shapes[s], v.dtype);
            if (mode == 1) c.args.grad_branch = NULL, c.args.grad_r_out = NULL;
            if (mode == 2) c.args.grad_r_in = c.grad_r_out.p;
            const struct ops_ref_rmsnorm ref = reference(&c);
            ops_ref_rmsnorm_forward(&ref);
            for (int64_t i = 0; i < c.r_out.n; i++) ((float *)c.r_out.p)[i] = (float)c.r_out.d[i];
            for (int64_t i = 0; i < c.rstd.n; i++) ((float *)c.rstd.p)[i] = (float)c.rstd.d[i];
            ops_ref_rmsnorm_backward(&ref);
            ck_assert_int_eq(ht_rmsnorm_backward(&be, &c.args), HT_OK);
            const double m = max_abs(c.grad_r_in.d, c.grad_r_in.n);
            const double terms = max_abs(c.grad_y.d, c.grad_y.n) * max_abs(c.w.d, c.w.n) *
                                 max_abs(c.rstd.d, c.rstd.n);
            check_close(mode == 2 ? &c.grad_r_out : &c.grad_r_in, c.grad_r_in.d,
                        16 * FLT_EPSILON * (m + terms), "grad_r_in");
            if (c.args.grad_branch)
                check_close(&c.grad_branch, c.grad_branch.d, 16 * FLT_EPSILON * (m + terms),
                            "grad_branch");
            check_close(&c.grad_w, c.grad_w.d,
                        FLT_EPSILON * sqrt((double)shapes[s].n_rows) * 4 *
                            (max_abs(c.grad_w.d, c.grad_w.n) + 4.0),
                        "grad_w");
            case_free(&c);
        }
    ht_backend_free(&be);
}
END_TEST

START_TEST(thread_count_does_not_change_bits)
{
    const struct variant v = variant_at(_i);
    struct norm_case c[2];

    for (int t = 0; t < 2; t++) {
        struct ht_backend be = backend_make(v.isa, t + 1, 0);
        c[t] = case_make((struct shape){ 150, 210 }, v.dtype); // above the threshold for threads
        ck_assert_int_eq(ht_rmsnorm_forward(&be, &c[t].args), HT_OK);
        ck_assert_int_eq(ht_rmsnorm_backward(&be, &c[t].args), HT_OK);
        ht_backend_free(&be);
    }
    check_same_bits(&c[0].y, &c[1].y, "y");
    check_same_bits(&c[0].rstd, &c[1].rstd, "rstd");
    check_same_bits(&c[0].grad_r_in, &c[1].grad_r_in, "grad_r_in");
    check_same_bits(&c[0].grad_branch, &c[1].grad_branch, "grad_branch");
    check_same_bits(&c[0].grad_w, &c[1].grad_w, "grad_w");
    case_free(&c[0]);
    case_free(&c[1]);
}
END_TEST

/* loss(r_in, branch, w) = sum y*gy + sum r_out*gr in fp64, for central differences */
static double loss_of(struct norm_case *c)
{
    const struct ops_ref_rmsnorm ref = reference(c);
    double sum = 0.0;

    ops_ref_rmsnorm_forward(&ref);
    for (int64_t i = 0; i < c->y.n; i++)
        sum += c->y.d[i] * c->grad_y.d[i] + c->r_out.d[i] * c->grad_r_out.d[i];
    return sum;
}

static void check_gradient(struct norm_case *c, double *x, int64_t n, const double *grad)
{
    const double h = 1e-5;

    for (int64_t i = 0; i < n; i++) {
        const double old = x[i];
        x[i] = old + h;
        const double up = loss_of(c);
        x[i] = old - h;
        const double down = loss_of(c);
        x[i] = old;
        ck_assert_double_eq_tol((up - down) / (2 * h), grad[i], 1e-7);
    }
}

START_TEST(reference_backward_matches_central_differences)
{
    struct norm_case c = case_make((struct shape){ 3, 7 }, HT_DTYPE_F32);
    const struct ops_ref_rmsnorm ref = reference(&c);

    memset(c.grad_w.d, 0, 7 * sizeof(double));
    ops_ref_rmsnorm_forward(&ref);
    ops_ref_rmsnorm_backward(&ref);
    check_gradient(&c, c.r_in.d, c.r_in.n, c.grad_r_in.d);
    check_gradient(&c, c.branch.d, c.branch.n, c.grad_branch.d);
    check_gradient(&c, c.w.d, c.w.n, c.grad_w.d);
    case_free(&c);
}
END_TEST

START_TEST(not_a_number_stays_in_its_row)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 1, 0);
    struct norm_case c = case_make((struct shape){ 3, 40 }, v.dtype);

    ((float *)c.r_in.p)[45] = NAN;
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &c.args), HT_OK);
    for (int64_t i = 0; i < c.y.n; i++) ck_assert(isnan(tensor_at(&c.y, i)) == (i / 40 == 1));
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    struct norm_case c = case_make((struct shape){ 2, 8 }, HT_DTYPE_F32);
    struct ht_rmsnorm_args a;

    a = c.args, a.n_rows = -2;
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "-2"));
    a = c.args, a.r_out = NULL;
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "r_out"));
    a = c.args, a.dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_ERR_UNSUPPORTED);
    a = c.args, a.eps = NAN;
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_ERR_ARG);
    a = c.args, a.grad_branch = c.grad_y.p;
    ck_assert_int_eq(ht_rmsnorm_backward(&be, &a), HT_ERR_ARG);
    a = c.args, a.grad_w = NULL;
    ck_assert_int_eq(ht_rmsnorm_backward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "grad_w"));
    a = c.args, a.n_rows = 0, a.y = NULL; // no rows: nothing to do
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_OK);
    ck_assert_int_eq(ht_rmsnorm_backward(&be, &a), HT_OK);
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rmsnorm");
    TCase *t = tcase_create("rmsnorm");

    tcase_add_loop_test(t, forward_matches_reference, 0, n_variants());
    tcase_add_loop_test(t, residual_can_be_updated_in_place_and_rounded, 0, n_variants());
    tcase_add_loop_test(t, backward_matches_reference, 0, n_variants());
    tcase_add_loop_test(t, thread_count_does_not_change_bits, 0, n_variants());
    tcase_add_test(t, reference_backward_matches_central_differences);
    tcase_add_loop_test(t, not_a_number_stays_in_its_row, 0, n_variants());
    tcase_add_test(t, bad_arguments_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
