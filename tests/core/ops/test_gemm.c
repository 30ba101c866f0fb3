/* tests/core/ops/test_gemm.c: products against fp64 loops, in every layout, level and type. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/core_ops.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ops_ref.h"

struct shape {
    int64_t m, n, k;
};
// one element; matrix-vector sizes around its tiles; ragged; past one tile of the widened path
static const struct shape shapes[] = {
    { 1, 1, 1 },    { 1, 13, 67 },  { 2, 25, 32 }, { 3, 40, 100 },   { 5, 31, 33 },
    { 7, 12, 129 }, { 8, 37, 64 },  { 9, 24, 31 }, { 15, 50, 97 },   { 16, 29, 3000 },
    { 17, 5, 3 },   { 33, 65, 31 }, { 64, 1, 40 }, { 70, 130, 257 }, { 300, 530, 70 },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct gemm_case {
    struct tensor a, b, c;
    struct ht_gemm_args args;
    double *ref;
    double slack;
};

/* pad: elements between the end of a stored row and the next. */
static struct gemm_case case_make(struct shape s, int layout, enum ht_dtype dtype,
                                  enum ht_dtype c_dtype, float alpha, float beta, int64_t pad)
{
    struct gemm_case g = { .args = { .m = s.m,
                                     .n = s.n,
                                     .k = s.k,
                                     .trans_a = layout & 1,
                                     .trans_b = layout & 2,
                                     .ab_dtype = dtype,
                                     .c_dtype = c_dtype,
                                     .alpha = alpha,
                                     .beta = beta } };
    struct ht_gemm_args *a = &g.args;

    a->lda = (a->trans_a ? s.m : s.k) + pad;
    a->ldb = (a->trans_b ? s.k : s.n) + pad;
    a->ldc = s.n + pad;
    g.a = tensor_normal((a->trans_a ? s.k : s.m) * a->lda, dtype, 1.0, 1);
    g.b = tensor_normal((a->trans_b ? s.n : s.k) * a->ldb, dtype, 1.0, 2);
    g.c = tensor_normal(s.m * a->ldc, c_dtype, 3.0, 3);
    a->a = g.a.p;
    a->b = g.b.p;
    a->c = g.c.p;
    g.ref = malloc((size_t)g.c.n * sizeof *g.ref);
    memcpy(g.ref, g.c.d, (size_t)g.c.n * sizeof *g.ref);
    const struct ops_ref_gemm r = { .m = s.m,
                                    .n = s.n,
                                    .k = s.k,
                                    .lda = a->lda,
                                    .ldb = a->ldb,
                                    .ldc = a->ldc,
                                    .trans_a = a->trans_a,
                                    .trans_b = a->trans_b,
                                    .alpha = (double)alpha,
                                    .beta = (double)beta,
                                    .a = g.a.d,
                                    .b = g.b.d,
                                    .c = g.ref };
    ops_ref_gemm(&r);
    // k terms of size max|a| max|b|, rounded in fp32: the error grows like sqrt(k)
    g.slack = 2.0 * (double)FLT_EPSILON * sqrt((double)s.k + 1.0) *
              (fabs((double)alpha) * max_abs(g.a.d, g.a.n) * max_abs(g.b.d, g.b.n) + 10.0);
    return g;
}

static void case_free(struct gemm_case *g)
{
    tensor_free(&g->a);
    tensor_free(&g->b);
    tensor_free(&g->c);
    free(g->ref);
}

static size_t scratch_for(struct shape s, enum ht_dtype dtype)
{
    return ht_gemm_scratch_bytes(s.m, s.n, s.k,
                                 dtype); // exactly what the header promises is enough
}

START_TEST(matches_reference_in_every_layout)
{
    const struct variant v = variant_at(_i);

    for (int s = 0; s < N_SHAPES; s++) {
        struct ht_backend be = backend_make(v.isa, 1 + s % 2, scratch_for(shapes[s], v.dtype));
        for (int layout = 0; layout < 4; layout++)
            for (int mode = 0; mode < 3; mode++) { // C: AB type; fp32 added to; AB type added to
                const enum ht_dtype c_dtype = mode == 1 ? HT_DTYPE_F32 : v.dtype;
                struct gemm_case g =
                    case_make(shapes[s], layout, v.dtype, c_dtype, mode ? 0.75f : 1.0f,
                              mode ? 1.0f : 0.0f, /* pad */ 3 * mode);
                ck_assert_msg(ht_gemm(&be, &g.args) == HT_OK, "%s", ht_error_message());
                check_close(&g.c, g.ref, g.slack, "C"); // the padding must keep its values
                case_free(&g);
            }
        ck_assert_uint_eq(be.scratch.used_bytes, 0);
        ht_backend_free(&be);
    }
}
END_TEST

/* More than one tile in each direction, and tiles that are kept while others change. */
START_TEST(tiles_of_widened_products_add_up)
{
    const struct shape some[] = { { 40, 520, 2100 }, { 1030, 70, 40 } };
    const enum ht_isa isa = (enum ht_isa)_i;

    for (int s = 0; s < 2; s++)
        for (int layout = 1; layout < 3; layout++)
            for (int c32 = 0; c32 < 2; c32++) {
                struct ht_backend be = backend_make(isa, 2, scratch_for(some[s], HT_DTYPE_BF16));
                struct gemm_case g =
                    case_make(some[s], layout, HT_DTYPE_BF16, c32 ? HT_DTYPE_F32 : HT_DTYPE_BF16,
                              0.5f, 1.0f, /* pad */ 5);
                ck_assert_msg(ht_gemm(&be, &g.args) == HT_OK, "%s", ht_error_message());
                check_close(&g.c, g.ref, g.slack, "C");
                case_free(&g);
                ht_backend_free(&be);
            }
}
END_TEST

START_TEST(not_initialised_c_is_not_read_without_beta)
{
    const struct variant v = variant_at(_i);
    const struct shape some[] = { { 3, 20, 40 }, { 40, 20, 30 }, { 4, 3, 0 } };

    for (int s = 0; s < 3; s++)
        for (int layout = 0; layout < 4; layout++) {
            struct ht_backend be = backend_make(v.isa, 2, scratch_for(some[s], v.dtype));
            struct gemm_case g = case_make(some[s], layout, v.dtype, v.dtype, 1.0f, 0.0f, 0);
            tensor_fill(&g.c, NAN);
            ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
            check_close(&g.c, g.ref, g.slack, "C");
            case_free(&g);
            ht_backend_free(&be);
        }
}
END_TEST

/* Few rows against W: the bits do not depend on the threads. Otherwise (oneDNN may divide k among
 * them) the same thread count gives the same bits, also from a fresh cache. */
START_TEST(bits_repeat)
{
    const struct variant v = variant_at(_i);
    const struct shape few[] = { { 1, 4000, 70 }, { 8, 3000, 90 }, { 16, 2500, 200 } };
    const struct shape more[] = { { 33, 300, 513 }, { 256, 40, 900 }, { 40, 30, 5000 } };

    for (int s = 0; s < 6; s++)
        for (int layout = 0; layout < 4; layout++) {
            const bool gemv = s < 3 && layout == 2;
            const struct shape shape = s < 3 ? few[s] : more[s - 3];
            struct gemm_case g[2];
            for (int t = 0; t < 2; t++) {
                struct ht_backend be =
                    backend_make(v.isa, gemv ? t + 1 : 2, scratch_for(shape, v.dtype));
                g[t] = case_make(shape, layout, v.dtype, HT_DTYPE_F32, 1.0f, 1.0f, 0);
                ck_assert_int_eq(ht_gemm(&be, &g[t].args), HT_OK);
                ht_backend_free(&be);
            }
            check_same_bits(&g[0].c, &g[1].c, gemv ? "C with 1 and 2 threads" : "C repeated");
            case_free(&g[0]);
            case_free(&g[1]);
        }
}
END_TEST

/* A sequence decoded alone and in a batch: row i of a product does not depend on the other rows. */
START_TEST(small_batches_agree_bit_for_bit)
{
    const struct variant v = variant_at(_i);
    const struct shape whole = { v.dtype == HT_DTYPE_F32 ? HT_GEMV_MAX_M_F32 : HT_GEMV_MAX_M_BF16,
                                 37, 5000 };
    struct ht_backend be = backend_make(v.isa, 2, 0);
    struct gemm_case g = case_make(whole, 2, v.dtype, HT_DTYPE_F32, 1.0f, 0.0f, 0);

    ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
    for (int64_t m = 1; m < whole.m; m++) {
        struct gemm_case part =
            case_make((struct shape){ m, whole.n, whole.k }, 2, v.dtype, HT_DTYPE_F32, 1.0f, 0, 0);
        part.args.a = g.a.p; // the same rows, fewer of them
        ck_assert_int_eq(ht_gemm(&be, &part.args), HT_OK);
        ck_assert_msg(memcmp(part.c.p, g.c.p, (size_t)(m * whole.n) * sizeof(float)) == 0,
                      "%d rows alone differ from the same rows of %d", (int)m, (int)whole.m);
        case_free(&part);
    }
    case_free(&g);
    ht_backend_free(&be);
}
END_TEST

/* More shapes than the cache holds: evicted ones are made again and stay right. */
START_TEST(many_shapes_pass_through_the_cache)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);

    for (int round = 0; round < 2; round++)
        for (int64_t m = 1; m <= 36; m++)
            for (int64_t n = 1; n <= 36; n++) {
                struct gemm_case g = case_make((struct shape){ m, n, 3 }, 0, HT_DTYPE_F32,
                                               HT_DTYPE_F32, 1.0f, 0.0f, 0);
                ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
                check_close(&g.c, g.ref, g.slack, "C");
                case_free(&g);
            }
    ht_backend_free(&be);
}
END_TEST

START_TEST(not_a_number_comes_through)
{
    const struct variant v = variant_at(_i);
    const struct shape some[] = { { 2, 40, 70 }, { 40, 40, 70 } };

    for (int s = 0; s < 2; s++) {
        struct ht_backend be = backend_make(v.isa, 2, scratch_for(some[s], v.dtype));
        struct gemm_case g = case_make(some[s], 2, v.dtype, v.dtype, 1.0f, 0.0f, 0);
        ht_store_f32(g.a.p, 70 + 3, v.dtype, NAN);
        ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
        for (int64_t j = 0; j < 40; j++) {
            ck_assert(isfinite(tensor_at(&g.c, j)));
            ck_assert(isnan(tensor_at(&g.c, 40 + j)));
        }
        case_free(&g);
        ht_backend_free(&be);
    }
}
END_TEST

START_TEST(empty_sizes_are_no_work)
{
    struct ht_backend be = backend_make(ht_isa_best(), 2, 0);
    struct gemm_case g =
        case_make((struct shape){ 3, 4, 0 }, 2, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 1.0f, 2);
    struct ht_gemm_args none = g.args;

    ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK); // k = 0, beta = 1: C stays
    check_close(&g.c, g.c.d, 0.0, "C");
    g.args.beta = 0.0f; // k = 0: zeros, but not in the padding
    ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
    for (int64_t i = 0; i < g.c.n; i++)
        ck_assert_double_eq(tensor_at(&g.c, i), i % 6 < 4 ? 0.0 : g.c.d[i]);
    none.m = 0;
    none.a = none.c = NULL;
    ck_assert_int_eq(ht_gemm(&be, &none), HT_OK);
    case_free(&g);
    ht_backend_free(&be);
}
END_TEST

static void refused(struct ht_gemm_args a, enum ht_status want, const char *word)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);

    ck_assert_int_eq(ht_gemm(&be, &a), want);
    ck_assert_msg(strstr(ht_error_message(), word) != NULL, "\"%s\" does not name %s",
                  ht_error_message(), word);
    ht_backend_free(&be);
}

START_TEST(bad_arguments_are_refused)
{
    struct gemm_case g =
        case_make((struct shape){ 3, 4, 5 }, 0, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 0.0f, 0);
    struct ht_gemm_args a;

    a = g.args, a.n = -4, refused(a, HT_ERR_ARG, "-4");
    a = g.args, a.lda = 4, refused(a, HT_ERR_ARG, "lda is 4");
    a = g.args, a.ldb = 3, refused(a, HT_ERR_ARG, "ldb is 3");
    a = g.args, a.ldc = 2, refused(a, HT_ERR_ARG, "ldc is 2");
    a = g.args, a.beta = 0.5f, refused(a, HT_ERR_ARG, "0.5");
    a = g.args, a.a = NULL, refused(a, HT_ERR_ARG, "A is NULL");
    a = g.args, a.c = g.b.p, refused(a, HT_ERR_ARG, "overlap");
    a = g.args, a.ab_dtype = HT_DTYPE_F16, refused(a, HT_ERR_UNSUPPORTED, "dtype 2");
    a = g.args, a.ab_dtype = HT_DTYPE_F32, refused(a, HT_ERR_UNSUPPORTED, "bf16");
    check_close(&g.c, g.c.d, 0.0, "C after refusals");
    case_free(&g);
}
END_TEST

START_TEST(short_scratch_is_refused_and_given_back)
{
    const struct shape s = { 40, 30, 20 };
    struct ht_backend be = backend_make(HT_ISA_PLAIN, 1, 64);
    struct gemm_case g = case_make(s, 0, HT_DTYPE_BF16, HT_DTYPE_BF16, 1.0f, 0.0f, 0);

    ck_assert_int_eq(ht_gemm(&be, &g.args), HT_ERR_MEMORY);
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    ck_assert_int_eq(ht_backend_reserve_scratch(&be, scratch_for(s, HT_DTYPE_BF16)), HT_OK);
    ck_assert_int_eq(ht_gemm(&be, &g.args), HT_OK);
    check_close(&g.c, g.ref, g.slack, "C");
    case_free(&g);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gemm");
    TCase *t = tcase_create("gemm");

    tcase_add_loop_test(t, matches_reference_in_every_layout, 0, n_variants());
    tcase_add_loop_test(t, tiles_of_widened_products_add_up, 0, (int)ht_isa_best() + 1);
    tcase_add_loop_test(t, not_initialised_c_is_not_read_without_beta, 0, n_variants());
    tcase_add_loop_test(t, bits_repeat, 0, n_variants());
    tcase_add_loop_test(t, small_batches_agree_bit_for_bit, 0, n_variants());
    tcase_add_loop_test(t, not_a_number_comes_through, 0, n_variants());
    tcase_add_test(t, many_shapes_pass_through_the_cache);
    tcase_add_test(t, empty_sizes_are_no_work);
    tcase_add_test(t, bad_arguments_are_refused);
    tcase_add_test(t, short_scratch_is_refused_and_given_back);
    suite_add_tcase(s, t);
    return run_suite(s);
}
