/* tests/emu/test_gated_norm_cuda.c: the CUDA gated norm against fp64 loops. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ssm/ssm_ops.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ref/ssm_ref.h"

enum { PAD = 8 };

// one vector; one group; groups, and over all of them; past one block of rows (64); widths of the
// three compiled variants (1024, 8192, 32768)
static const struct shape {
    int64_t T, d_inner, n_groups;
    bool full;
} shapes[] = {
    { 1, 8, 1, false },   { 5, 40, 1, false },   { 3, 192, 8, false },  { 3, 192, 8, true },
    { 70, 48, 2, false }, { 2, 2104, 1, false }, { 2, 8200, 1, false },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct norm_case {
    const struct shape *s;
    int64_t groups, stride, n;
    struct tensor w, y, z, o, rstd, grad_o, grad_y, grad_z, grad_w;
    double *fp64; // z without padding, then results of the reference
    struct ssm_ref_norm ref;
};

static struct norm_case case_make(const struct shape *s, enum ht_dtype dtype)
{
    const int64_t n = s->T * s->d_inner, stride = s->d_inner + PAD;
    struct norm_case k = { .s = s, .groups = s->full ? 1 : s->n_groups, .stride = stride, .n = n };

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
                                   .grad_o = k.grad_o.d,
                                   .grad_y = k.fp64 + 2 * n,
                                   .grad_z = k.fp64 + 3 * n,
                                   .rstd = k.fp64 + 4 * n,
                                   .grad_w = k.grad_w.d };
    return k;
}

static void case_free(struct norm_case *k)
{
    struct tensor *all[] = { &k->w,      &k->y,      &k->z,      &k->o,     &k->rstd,
                             &k->grad_o, &k->grad_y, &k->grad_z, &k->grad_w };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    free(k->fp64);
}

/* in_place: grad_y over grad_o, and neither o nor (forward) rstd is asked for. */
static void run(struct norm_case *k, bool backward, bool in_place)
{
    const enum ht_dtype dtype = k->y.dtype;
    struct ht_backend be;

    gpu_start(&be, backward ? ht_gated_norm_scratch_bytes(k->s->T, k->s->d_inner) : 0);
    void *o = to_gpu(&be, &k->o), *grad_o = to_gpu(&be, &k->grad_o),
         *grad_z = to_gpu(&be, &k->grad_z);
    void *grad_y = in_place ? grad_o : to_gpu(&be, &k->grad_y);
    float *rstd = to_gpu(&be, &k->rstd), *grad_w = to_gpu(&be, &k->grad_w);
    const struct ht_gated_norm_args a = { .n_tokens = k->s->T,
                                          .d_inner = k->s->d_inner,
                                          .n_groups = k->s->n_groups,
                                          .full = k->s->full,
                                          .eps = 1e-5f,
                                          .dtype = dtype,
                                          .w = to_gpu(&be, &k->w),
                                          .y = to_gpu(&be, &k->y),
                                          .z = to_gpu(&be, &k->z),
                                          .z_stride = k->stride,
                                          .o = backward && in_place ? NULL : o,
                                          .rstd = !backward && in_place ? NULL : rstd,
                                          .grad_o = grad_o,
                                          .grad_y = grad_y,
                                          .grad_z = grad_z,
                                          .grad_z_stride = k->stride,
                                          .grad_w = grad_w };
    gpu_ok(backward ? ht_gated_norm_backward(&be, &a) : ht_gated_norm_forward(&be, &a));
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    from_gpu(&be, &k->o, o);
    from_gpu(&be, &k->rstd, rstd);
    from_gpu(&be, &k->grad_y, grad_y);
    from_gpu(&be, &k->grad_z, grad_z);
    from_gpu(&be, &k->grad_w, grad_w);
    gpu_end(&be);
}

/* grad_z without the columns behind it, which must be untouched. */
static struct tensor dense_grad_z(const struct norm_case *k)
{
    struct tensor t = tensor_make(k->n, k->z.dtype), fresh = tensor_make(PAD, k->z.dtype);
    const size_t e = ht_dtype_bytes(k->z.dtype), width = (size_t)k->s->d_inner * e;

    for (int64_t i = 0; i < k->s->T; i++) {
        const char *row = (const char *)k->grad_z.p + (size_t)(i * k->stride) * e;
        memcpy((char *)t.p + (size_t)i * width, row, width);
        ck_assert_mem_eq(row + width, fresh.p, PAD * e);
    }
    tensor_free(&fresh);
    return t;
}

START_TEST(matches_fp64)
{
    const enum ht_dtype dtype = _i / N_SHAPES ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    struct norm_case k = case_make(&shapes[_i % N_SHAPES], dtype);
    const int64_t n = k.n;
    const double eps = 32.0 * (double)FLT_EPSILON;

    run(&k, false, false);
    ssm_ref_norm_forward(&k.ref);
    check_close(&k.o, k.ref.o, eps * max_abs(k.ref.o, n), "o");
    check_close(&k.rstd, k.ref.rstd, eps * max_abs(k.ref.rstd, k.s->T * k.groups), "rstd");

    memset(k.o.p, 0, (size_t)n * ht_dtype_bytes(dtype)); // backward writes it again
    run(&k, true, false);
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

/* Twice; with grad_y over grad_o; without o and rstd. */
START_TEST(same_bits_however_called)
{
    const enum ht_dtype dtype = _i / N_SHAPES ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    struct norm_case one = case_make(&shapes[_i % N_SHAPES], dtype);
    struct norm_case two = case_make(&shapes[_i % N_SHAPES], dtype);

    run(&one, false, false);
    run(&two, false, true);
    check_same_bits(&one.o, &two.o, "o");
    memcpy(two.rstd.p, one.rstd.p, (size_t)one.rstd.n * sizeof(float));
    run(&one, true, false);
    run(&two, true, true);
    check_same_bits(&one.o, &two.o, "o");
    check_same_bits(&one.grad_y, &two.grad_y, "grad_y in place");
    check_same_bits(&one.grad_z, &two.grad_z, "grad_z");
    check_same_bits(&one.grad_w, &two.grad_w, "grad_w");
    case_free(&one);
    case_free(&two);
}
END_TEST

START_TEST(refusals_name_the_cause)
{
    struct norm_case k = case_make(&shapes[1], HT_DTYPE_BF16);
    struct ht_backend be;

    gpu_start(&be, 0);
    void *y = to_gpu(&be, &k.y), *z = to_gpu(&be, &k.z), *o = to_gpu(&be, &k.o);
    struct ht_gated_norm_args a = { .n_tokens = k.s->T,
                                    .d_inner = k.s->d_inner,
                                    .n_groups = 1,
                                    .dtype = HT_DTYPE_BF16,
                                    .w = to_gpu(&be, &k.w),
                                    .y = y,
                                    .z = z,
                                    .z_stride = k.s->d_inner + 1,
                                    .o = o };
    ck_assert_int_eq(ht_gated_norm_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "rows of z"));
    a.n_tokens = 1;
    a.d_inner = 40000;
    a.z_stride = 40000;
    ck_assert_int_eq(ht_gated_norm_forward(&be, &a), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "40000"));
    gpu_end(&be);
    case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gated_norm_cuda");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_fp64, 0, 2 * N_SHAPES);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, same_bits_however_called, 0, 2 * N_SHAPES);
    tcase_add_test(property, refusals_name_the_cause);
    suite_add_tcase(s, property);
    return gpu_run_suite(s);
}
