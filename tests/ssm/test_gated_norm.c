/* tests/ssm/test_gated_norm.c: the gated norm against fp64 loops, forward and backward. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ssm/ssm_ops.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ssm_ref.h"

enum { PAD = 8 };

// one group; ragged vectors; eight groups of d_inner / 8, and over all of it; past one block of
// sums; wider than the buffer of one row
static const struct shape {
    int64_t T, d_inner, n_groups;
    bool full;
} shapes[] = {
    { 1, 8, 1, false },  { 5, 40, 1, false },   { 3, 192, 8, false },
    { 3, 192, 8, true }, { 150, 48, 2, false }, { 2, 8312, 1, false },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct norm_case {
    const struct shape *s;
    int64_t groups, stride;
    struct tensor w, y, z, o, rstd, grad_o, grad_y, grad_z, grad_w;
    double *fp64; // the reference's tensors, one after the other
    struct ht_gated_norm_args args;
    struct ssm_ref_norm ref;
};

static struct norm_case case_make(const struct shape *s, enum ht_dtype dtype)
{
    const int64_t n = s->T * s->d_inner, stride = s->d_inner + PAD;
    struct norm_case k = { .s = s, .groups = s->full ? 1 : s->n_groups, .stride = stride };

    k.w = tensor_normal(s->d_inner, HT_DTYPE_F32, 1.0, 1);
    k.y = tensor_normal(n, dtype, 1.0, 2);
    k.z = tensor_normal(s->T * stride, dtype, 1.5, 3);
    k.o = tensor_make(n, dtype);
    k.rstd = tensor_make(s->T * k.groups, HT_DTYPE_F32);
    k.grad_o = tensor_normal(n, dtype, 1.0, 4);
    k.grad_y = tensor_make(n, dtype);
    k.grad_z = tensor_make(s->T * stride, dtype);
    k.grad_w = tensor_normal(s->d_inner, HT_DTYPE_F32, 1.0, 5); // is added to
    k.fp64 = calloc((size_t)(4 * n + s->T * k.groups), sizeof(double));
    ck_assert_ptr_nonnull(k.fp64);
    for (int64_t t = 0; t < s->T; t++)
        memcpy(k.fp64 + t * s->d_inner, k.z.d + t * stride, (size_t)s->d_inner * sizeof(double));
    k.ref = (struct ssm_ref_norm){ .T = s->T,
                                   .d_inner = s->d_inner,
                                   .groups = k.groups,
                                   .eps = (double)1e-5f,
                                   .w = k.w.d,
                                   .y = k.y.d,
                                   .z = k.fp64,
                                   .o = k.fp64 + n,
                                   .rstd = k.fp64 + 4 * n,
                                   .grad_o = k.grad_o.d,
                                   .grad_y = k.fp64 + 2 * n,
                                   .grad_z = k.fp64 + 3 * n,
                                   .grad_w = k.grad_w.d };
    k.args = (struct ht_gated_norm_args){ .n_tokens = s->T,
                                          .d_inner = s->d_inner,
                                          .n_groups = s->n_groups,
                                          .full = s->full,
                                          .eps = 1e-5f,
                                          .dtype = dtype,
                                          .w = k.w.p,
                                          .y = k.y.p,
                                          .z = k.z.p,
                                          .z_stride = stride,
                                          .o = k.o.p,
                                          .rstd = k.rstd.p,
                                          .grad_o = k.grad_o.p,
                                          .grad_y = k.grad_y.p,
                                          .grad_z = k.grad_z.p,
                                          .grad_z_stride = stride,
                                          .grad_w = k.grad_w.p };
    return k;
}

static void case_free(struct norm_case *k)
{
    struct tensor *all[] = { &k->w,      &k->y,      &k->z,      &k->o,     &k->rstd,
                             &k->grad_o, &k->grad_y, &k->grad_z, &k->grad_w };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    free(k->fp64);
}

static void run(struct norm_case *k, enum ht_isa isa, int threads, bool backward)
{
    const struct ht_gated_norm_args *a = &k->args;
    struct ht_backend be =
        backend_make(isa, threads, ht_gated_norm_scratch_bytes(a->n_tokens, a->d_inner));

    ck_assert_msg((backward ? ht_gated_norm_backward(&be, a) : ht_gated_norm_forward(&be, a)) ==
                      HT_OK,
                  "%s", ht_error_message());
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    ht_backend_free(&be);
}

/* grad_z without the columns behind it, which must be untouched. */
static struct tensor dense_grad_z(const struct norm_case *k)
{
    struct tensor t = tensor_make(k->s->T * k->s->d_inner, k->z.dtype);
    const struct tensor fresh = tensor_make(PAD, k->z.dtype);
    const size_t e = ht_dtype_bytes(k->z.dtype), width = (size_t)k->s->d_inner * e;

    for (int64_t i = 0; i < k->s->T; i++) {
        const char *row = (const char *)k->grad_z.p + (size_t)(i * k->stride) * e;
        memcpy((char *)t.p + (size_t)i * width, row, width);
        ck_assert_mem_eq(row + width, fresh.p, PAD * e);
    }
    tensor_free((struct tensor *)(uintptr_t)&fresh);
    return t;
}

START_TEST(matches_fp64)
{
    const struct variant v = variant_at(_i / N_SHAPES);
    struct norm_case k = case_make(&shapes[_i % N_SHAPES], v.dtype);
    const int64_t n = k.s->T * k.s->d_inner;
    const double eps = 32.0 * (double)FLT_EPSILON;

    run(&k, v.isa, 1, false);
    ssm_ref_norm_forward(&k.ref);
    check_close(&k.o, k.ref.o, eps * max_abs(k.ref.o, n), "o");
    check_close(&k.rstd, k.ref.rstd, eps * max_abs(k.ref.rstd, k.s->T * k.groups), "rstd");

    memset(k.o.p, 0, (size_t)n * ht_dtype_bytes(v.dtype)); // backward writes it again
    run(&k, v.isa, 1, true);
    ssm_ref_norm_backward(&k.ref);
    struct tensor grad_z = dense_grad_z(&k);
    check_close(&k.o, k.ref.o, eps * max_abs(k.ref.o, n), "o, from backward");
    check_close(&k.grad_y, k.ref.grad_y, eps * max_abs(k.ref.grad_y, n), "grad_y");
    check_close(&grad_z, k.ref.grad_z, eps * max_abs(k.ref.grad_z, n), "grad_z");
    check_close(&k.grad_w, k.ref.grad_w, eps * (max_abs(k.ref.grad_w, k.s->d_inner) + 1.0),
                "grad_w");
    tensor_free(&grad_z);
    case_free(&k);
}
END_TEST

/* 1 and 2 threads; grad_y over grad_o; o and rstd not asked for. */
START_TEST(same_bits_however_called)
{
    const struct variant v = variant_at(_i / N_SHAPES);
    const struct shape *s = &shapes[_i % N_SHAPES];
    struct norm_case one = case_make(s, v.dtype), two = case_make(s, v.dtype);

    run(&one, v.isa, 1, false);
    run(&two, v.isa, 2, false);
    check_same_bits(&one.o, &two.o, "o");
    check_same_bits(&one.rstd, &two.rstd, "rstd");
    two.args.rstd = NULL;
    run(&two, v.isa, 1, false);
    check_same_bits(&one.o, &two.o, "o without rstd");
    two.args.rstd = two.rstd.p;

    two.args.grad_y = two.grad_o.p;
    two.args.o = NULL;
    run(&one, v.isa, 1, true);
    run(&two, v.isa, 2, true);
    check_same_bits(&one.grad_y, &two.grad_o, "grad_y in place");
    check_same_bits(&one.grad_z, &two.grad_z, "grad_z");
    check_same_bits(&one.grad_w, &two.grad_w, "grad_w");
    check_same_bits(&one.o, &two.o, "o");
    case_free(&one);
    case_free(&two);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gated_norm");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_fp64, 0, n_variants() * N_SHAPES);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, same_bits_however_called, 0, n_variants() * N_SHAPES);
    suite_add_tcase(s, property);
    return run_suite(s);
}
