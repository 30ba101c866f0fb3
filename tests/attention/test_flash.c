/* tests/attention/test_flash.c: attention forward and backward: fp64, properties, refusals. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "tests/attention/attention_case.h"

/* heads, kv heads, d_head, lengths: one token, ragged, several tiles, every ratio */
static const struct attention_shape shapes[] = {
    { 1, 1, 8, { 1 } },
    { 2, 1, 16, { 7 } },
    { 3, 3, 24, { 1, 2, 65, 8 } },
    { 4, 1, 32, { 33, 97 } },
    { 2, 2, 40, { 64, 63 } },
    { 8, 1, 48, { 100 } },
    { 4, 4, 64, { 193 } },
    { 8, 2, 64, { 130, 1 } },
    { 2, 1, 80, { 71, 5, 96 } },
    { 4, 1, 96, { 50 } },
    { 8, 8, 8, { 29, 31 } },
    { 4, 1, 128, { 140 } },
    { 8, 1, 128, { 25 } },
    { 1, 1, 256, { 70 } },
    { 1, 1, 16, { 700 } }, // more than one block of 512 keys
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

/* Every level and dtype of one shape. */
#define FOR_EACH_LEVEL(isa, dtype)                                                                 \
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++)                                            \
        for (int dtype = 0; dtype < 2; dtype++)

START_TEST(reference_backward_matches_differences)
{
    const int32_t starts[] = { 0, 3, 9 };
    enum { NH = 4, NKV = 2, D = 8, T = 9, WIDTH = (NH + 2 * NKV) * D };
    double qkv[T * WIDTH], o[T * NH * D], grad_o[T * NH * D], grad[T * WIDTH];
    struct attention_ref r = { 2, starts, NH, NKV, D, 0.4, qkv, o, NULL, grad_o, grad, false };

    for (int i = 0; i < T * WIDTH; i++) qkv[i] = (double)ht_rng_normal(3, 1, (uint64_t)i);
    for (int i = 0; i < T * NH * D; i++) grad_o[i] = (double)ht_rng_normal(3, 2, (uint64_t)i);
    attention_ref_backward(&r);
    for (int i = 0; i < T * WIDTH; i++) {
        const double at = qkv[i], step = 1e-5;
        double difference = 0.0;
        for (int sign = -1; sign <= 1; sign += 2) {
            qkv[i] = at + sign * step;
            attention_ref_forward(&r);
            for (int j = 0; j < T * NH * D; j++) difference += sign * o[j] * grad_o[j];
        }
        qkv[i] = at;
        ck_assert_double_eq_tol(grad[i], difference / (2.0 * step), 1e-6);
    }
}
END_TEST

START_TEST(forward_matches_reference)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 2, 1, false);
        attention_case_forward(&c);
        const int64_t n = c.n_tokens * c.args.n_heads;
        const double e = attention_case_o_error(&c, c.args.o, c.ref.o);
        const double tol =
            attention_case_tolerance(&c, c.ref.o, c.plain16.o, n * c.args.d_head, 8.0);
        ck_assert_msg(e <= tol, "shape %d, %s, %s: error %g, allowed %g", _i,
                      ht_isa_name((enum ht_isa)isa), ht_dtype_name(dtypes[dtype]), e, tol);
        for (int64_t i = 0; i < n; i++) // scores and their sum are fp32 in both dtypes
            ck_assert_double_eq_tol((double)c.args.lse[i], c.ref.lse[i], 4e-6);
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(backward_matches_reference)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 2, 2, true);
        attention_case_forward(&c);
        attention_case_backward(&c);
        const double e = attention_case_qkv_error(&c, c.args.grad_qkv, c.ref.grad_qkv);
        const double tol =
            attention_case_tolerance(&c, c.ref.grad_qkv, c.plain16.grad_qkv, c.n_tokens * c.width,
                                     16.0); // sums of up to 1600 terms
        ck_assert_msg(e <= tol, "shape %d, %s, %s: error %g, allowed %g", _i,
                      ht_isa_name((enum ht_isa)isa), ht_dtype_name(dtypes[dtype]), e, tol);
        for (int64_t t = 0; t < c.n_tokens; t++) // nothing outside the rows' width is written
            for (int64_t i = 0; i < c.pad; i++)
                ck_assert(ht_load_f32(c.args.grad_qkv, t * c.args.qkv_stride + c.width + i,
                                      c.args.dtype) == 42.0f);
        attention_case_free(&c);
    }
}
END_TEST

/* Scores of up to 2^19, exact in fp32: equal ones share the weight, all others get none. */
START_TEST(large_scores_do_not_overflow)
{
    const struct attention_shape s = { 2, 1, 64, { 150 } };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &s, dtypes[dtype], (enum ht_isa)isa, 2, 3, true);
        double *qkv64 = (double *)c.ref.qkv;
        for (int64_t i = 0; i < c.n_tokens * c.width; i++) {
            const int64_t at = i / c.width * c.args.qkv_stride + i % c.width;
            const bool is_v = i % c.width >= 3 * s.d_head;
            const float x = floorf(ht_rng_uniform(4, 1, (uint64_t)i) * 7.0f) - 3.0f;
            ht_store_f32((void *)c.args.qkv, at, dtypes[dtype], is_v ? x : 32.0f * x);
            qkv64[i] = (double)(is_v ? x : 32.0f * x);
        }
        attention_ref_forward(&c.ref);
        attention_ref_backward(&c.ref);
        attention_case_forward(&c);
        attention_case_backward(&c);
        // o: a mean of small integers, rounded once to the dtype. lse is about 1e5, where an fp32
        // step is 0.008: P, and with it the gradients, are only as exact as that step
        const double o_max = attention_case_max(c.ref.o, c.n_tokens * s.n_heads * s.d_head);
        ck_assert_double_le(attention_case_o_error(&c, c.args.o, c.ref.o),
                            dtype == 0 ? 1e-6 : o_max / 256.0);
        for (int64_t i = 0; i < c.n_tokens * s.n_heads; i++)
            ck_assert_double_eq_tol((double)c.args.lse[i], c.ref.lse[i],
                                    1e-7 * fabs(c.ref.lse[i]) + 1e-6);
        const double g_max = attention_case_max(c.ref.grad_qkv, c.n_tokens * c.width);
        ck_assert_double_le(attention_case_qkv_error(&c, c.args.grad_qkv, c.ref.grad_qkv),
                            g_max * 0.02);
        attention_case_free(&c);
    }
}
END_TEST

/* Packed sequences give the bits of each sequence run alone. */
START_TEST(sequences_are_independent)
{
    const struct attention_shape s = { 4, 2, 40, { 70, 1, 33, 129 } };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &s, dtypes[dtype], (enum ht_isa)isa, 2, 5, false);
        attention_case_forward(&c);
        attention_case_backward(&c);
        const size_t element = ht_dtype_bytes(dtypes[dtype]);
        const size_t o_row = (size_t)(s.n_heads * s.d_head) * element;
        const size_t g_row = (size_t)c.args.grad_qkv_stride * element;
        for (int64_t seq = 0; seq < c.n_seqs; seq++) {
            const size_t n = (size_t)s.lengths[seq], first = (size_t)c.starts[seq];
            const int32_t alone[] = { 0, (int32_t)n };
            struct ht_flash_args a = c.args;
            a.seqs = (struct ht_seqs){ 1, alone };
            a.n_tokens = (int64_t)n;
            a.qkv = (const char *)c.args.qkv + first * g_row;
            a.o = calloc(n, o_row);
            a.lse = calloc(n * (size_t)s.n_heads, sizeof(float));
            a.grad_o = (const char *)c.args.grad_o + first * o_row;
            a.grad_qkv = calloc(n, g_row);
            ck_assert_int_eq(ht_flash_forward(&c.be, &a), HT_OK);
            ck_assert_int_eq(ht_flash_backward(&c.be, &a), HT_OK);
            ck_assert_mem_eq(a.o, (char *)c.args.o + first * o_row, n * o_row);
            for (size_t t = 0; t < n; t++)
                ck_assert_mem_eq((char *)a.grad_qkv + t * g_row,
                                 (char *)c.args.grad_qkv + (first + t) * g_row,
                                 (size_t)c.width * element);
            free(a.o);
            free(a.lse);
            free(a.grad_qkv);
        }
        attention_case_free(&c);
    }
}
END_TEST

/* Rows before a changed token keep their bits: nothing looks ahead. */
START_TEST(output_ignores_the_future)
{
    const struct attention_shape s = { 2, 1, 32, { 150 } };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &s, dtypes[dtype], (enum ht_isa)isa, 1, 6, false);
        attention_case_forward(&c);
        const int64_t changed = 77, row = s.n_heads * s.d_head;
        const size_t kept = (size_t)(changed * row) * ht_dtype_bytes(dtypes[dtype]);
        void *before = malloc(c.o_bytes);
        memcpy(before, c.args.o, c.o_bytes);
        for (int64_t i = 0; i < c.width; i++)
            ht_store_f32((void *)c.args.qkv, changed * c.args.qkv_stride + i, dtypes[dtype], 9.0f);
        attention_case_forward(&c);
        ck_assert_mem_eq(before, c.args.o, kept);
        ck_assert_mem_ne((char *)before + kept, (char *)c.args.o + kept, c.o_bytes - kept);
        free(before);
        attention_case_free(&c);
    }
}
END_TEST

/* Repeats and 1, 2, 3, 8 threads: the same bits. One head: 8 threads take the two-pass backward. */
START_TEST(bits_do_not_depend_on_threads)
{
    static const struct attention_shape several[] = { { 1, 1, 24, { 700 } },
                                                      { 4, 1, 32, { 300 } },
                                                      { 6, 3, 16, { 90, 200, 1, 40 } } };
    static const int threads[] = { 1, 1, 2, 3, 8 };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &several[_i], dtypes[dtype], (enum ht_isa)isa, 1, 7, false);
        void *o = malloc(c.o_bytes), *grad = malloc(c.qkv_bytes);
        for (int run = 0; run < 5; run++) {
            c.be.n_threads = threads[run];
            ck_assert_int_eq(
                ht_backend_reserve_scratch(&c.be, ht_flash_scratch_bytes(&c.args, threads[run])),
                HT_OK);
            attention_case_forward(&c);
            attention_case_backward(&c);
            if (run == 0) {
                memcpy(o, c.args.o, c.o_bytes);
                memcpy(grad, c.args.grad_qkv, c.qkv_bytes);
            }
            ck_assert_mem_eq(o, c.args.o, c.o_bytes);
            ck_assert_mem_eq(grad, c.args.grad_qkv, c.qkv_bytes);
        }
        free(o);
        free(grad);
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(nan_is_not_hidden)
{
    const struct attention_shape s = { 1, 1, 16, { 20 } };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &s, dtypes[dtype], (enum ht_isa)isa, 1, 8, false);
        ht_store_f32((void *)c.args.qkv, 12 * c.args.qkv_stride + 16, dtypes[dtype], NAN); // a key
        attention_case_forward(&c);
        ck_assert(!isnan(ht_load_f32(c.args.o, 11 * 16, dtypes[dtype])));
        for (int64_t t = 12; t < 20; t++)
            ck_assert(isnan(ht_load_f32(c.args.o, t * 16, dtypes[dtype])));
        attention_case_free(&c);
    }
}
END_TEST

static void refuse(struct attention_case *c, const struct ht_flash_args *a, bool backward,
                   enum ht_status want, const char *text)
{
    const enum ht_status st = backward ? ht_flash_backward(&c->be, a) : ht_flash_forward(&c->be, a);
    ck_assert_int_eq(st, want);
    ck_assert_msg(strstr(ht_error_message(), text) != NULL, "'%s' lacks '%s'", ht_error_message(),
                  text);
}

START_TEST(bad_arguments_are_refused)
{
    const struct attention_shape s = { 4, 2, 16, { 5, 4 } };
    const int32_t gap[] = { 0, 5, 8 }, empty[] = { 0, 9, 9 };
    struct attention_case c;
    attention_case_make(&c, &s, HT_DTYPE_F32, ht_isa_best(), 1, 9, false);
    for (int backward = 0; backward < 2; backward++) {
        struct ht_flash_args a = c.args;
        a.n_kv_heads = 3;
        refuse(&c, &a, backward, HT_ERR_ARG, "4 heads over 3 kv heads");
        a = c.args, a.d_head = 12;
        refuse(&c, &a, backward, HT_ERR_ARG, "d_head is 12");
        a = c.args, a.d_head = 264;
        refuse(&c, &a, backward, HT_ERR_ARG, "d_head is 264");
        a = c.args, a.scale = 0.0f;
        refuse(&c, &a, backward, HT_ERR_ARG, "scale is 0");
        a = c.args, a.scale = NAN;
        refuse(&c, &a, backward, HT_ERR_ARG, "scale is nan");
        a = c.args, a.dtype = HT_DTYPE_F16;
        refuse(&c, &a, backward, HT_ERR_UNSUPPORTED, "fp16");
        a = c.args, a.seqs.starts = gap;
        refuse(&c, &a, backward, HT_ERR_ARG, "rows 0 to 9");
        a = c.args, a.seqs.starts = empty;
        refuse(&c, &a, backward, HT_ERR_ARG, "sequence 1 starts at row 9");
        a = c.args, a.qkv_stride = 127;
        refuse(&c, &a, backward, HT_ERR_ARG, "qkv_stride is 127");
    }
    struct ht_flash_args a = c.args;
    a.lse = NULL;
    refuse(&c, &a, true, HT_ERR_ARG, "lse");
    a = c.args, a.grad_qkv_stride = 1;
    refuse(&c, &a, true, HT_ERR_ARG, "grad_qkv_stride is 1");
    attention_case_free(&c);
}
END_TEST

START_TEST(short_scratch_is_reported)
{
    const struct attention_shape s = { 2, 1, 16, { 20 } };
    struct attention_case c;
    attention_case_make(&c, &s, HT_DTYPE_F32, ht_isa_best(), 1, 10, false);
    ht_arena_free(&c.be.scratch);
    ck_assert_int_eq(ht_arena_create(&c.be.scratch, "scratch", 4096), HT_OK);
    refuse(&c, &c.args, false, HT_ERR_MEMORY, "scratch");
    refuse(&c, &c.args, true, HT_ERR_MEMORY, "scratch");
    ck_assert_uint_eq(c.be.scratch.used_bytes, 0);
    attention_case_free(&c);
}
END_TEST

START_TEST(lse_is_optional_in_forward)
{
    const struct attention_shape s = { 2, 1, 16, { 20 } };
    struct attention_case c;
    attention_case_make(&c, &s, HT_DTYPE_F32, ht_isa_best(), 1, 11, false);
    struct ht_flash_args a = c.args;
    a.lse = NULL;
    ck_assert_int_eq(ht_flash_forward(&c.be, &a), HT_OK);
    ck_assert_double_le(attention_case_o_error(&c, a.o, c.ref.o), 4e-6);
    attention_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("flash");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property"),
          *refusal = tcase_create("refusal");
    tcase_add_test(reference, reference_backward_matches_differences);
    tcase_add_loop_test(reference, forward_matches_reference, 0, N_SHAPES);
    tcase_add_loop_test(reference, backward_matches_reference, 0, N_SHAPES);
    tcase_add_test(reference, large_scores_do_not_overflow);
    tcase_add_test(property, sequences_are_independent);
    tcase_add_test(property, output_ignores_the_future);
    tcase_add_loop_test(property, bits_do_not_depend_on_threads, 0, 3);
    tcase_add_test(property, nan_is_not_hidden);
    tcase_add_test(property, lse_is_optional_in_forward);
    tcase_add_test(refusal, bad_arguments_are_refused);
    tcase_add_test(refusal, short_scratch_is_reported);
    suite_add_tcase(s, reference);
    suite_add_tcase(s, property);
    suite_add_tcase(s, refusal);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
