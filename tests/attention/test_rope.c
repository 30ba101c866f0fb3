/* tests/attention/test_rope.c: rotary tables and their application. */
#include <check.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/rope.h"
#include "core/base/rng.h"
#include "tests/ref/attention_ref.h"

struct shape {
    int64_t n_tokens, n_heads, n_kv_heads, d_head, rope_dims;
    double theta;
    bool llama3;
};

static const struct shape shapes[] = {
    { 1, 1, 1, 8, 8, 1e4, false },     { 5, 2, 1, 8, 2, 1e4, false },
    { 9, 4, 2, 40, 40, 1e4, false },   { 17, 3, 1, 80, 20, 1e4, false },
    { 7, 4, 4, 64, 64, 5e5, true },    { 11, 4, 1, 128, 64, 1e4, false },
    { 13, 2, 2, 128, 128, 5e5, true }, { 3, 1, 1, 256, 256, 1e7, false },
    { 4, 2, 1, 16, 0, 1e4, false },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], N_POSITIONS = 9000 };

static const struct ht_rope_scaling llama3 = { 8.0, 1.0, 4.0, 8192 };
static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct rope_case {
    struct ht_backend be;
    struct ht_rope_args args;
    int64_t row, stride, n; // used and allocated width; elements
    double *before, *want;  // dense rows of `row`
    float *tables;
    int32_t *pos;
};

static void rope_case_make(struct rope_case *c, const struct shape *s, enum ht_dtype dtype,
                           enum ht_isa isa, int n_threads)
{
    const int64_t half = s->rope_dims / 2;
    *c = (struct rope_case){ .row = (s->n_heads + 2 * s->n_kv_heads) * s->d_head };
    c->stride = c->row + 8;
    c->n = s->n_tokens * c->stride;
    c->tables = calloc((size_t)(2 * N_POSITIONS * half + 1), sizeof(float));
    c->pos = calloc((size_t)s->n_tokens, sizeof(int32_t));
    c->before = calloc((size_t)(s->n_tokens * c->row), sizeof(double));
    c->want = calloc((size_t)(s->n_tokens * c->row), sizeof(double));
    void *qkv = calloc((size_t)c->n, ht_dtype_bytes(dtype));
    for (int64_t i = 0; i < c->n; i++)
        ht_store_f32(qkv, i, dtype, ht_rng_normal(11, 1, (uint64_t)i));
    for (int64_t i = 0; i < s->n_tokens * c->row; i++)
        c->want[i] = c->before[i] =
            (double)ht_load_f32(qkv, i / c->row * c->stride + i % c->row, dtype);
    for (int64_t t = 0; t < s->n_tokens; t++)
        c->pos[t] = (int32_t)(ht_rng_u64(11, 2, (uint64_t)t) % N_POSITIONS);
    c->pos[0] = N_POSITIONS - 1;
    ht_rope_table(c->tables, c->tables + N_POSITIONS * half, N_POSITIONS, s->rope_dims, s->theta,
                  s->llama3 ? &llama3 : NULL);
    c->args = (struct ht_rope_args){ s->n_tokens,
                                     s->n_heads,
                                     s->n_kv_heads,
                                     s->d_head,
                                     s->rope_dims,
                                     dtype,
                                     qkv,
                                     c->stride,
                                     c->pos,
                                     c->tables,
                                     c->tables + N_POSITIONS * half,
                                     N_POSITIONS,
                                     false };
    const struct rope_ref r = {
        s->n_tokens, s->n_heads + s->n_kv_heads, s->d_head, s->rope_dims, c->row,
        s->theta,    s->llama3 ? 8.0 : 0.0,      1.0,       4.0,          8192.0,
        1.0
    };
    rope_ref(&r, c->want, c->pos);
    ck_assert_int_eq(ht_backend_create_cpu(&c->be, n_threads, 0), HT_OK);
    c->be.isa = isa;
}

static void rope_case_free(struct rope_case *c)
{
    free(c->args.qkv);
    free(c->tables);
    free(c->pos);
    free(c->before);
    free(c->want);
    ht_backend_free(&c->be);
}

static double error(const struct rope_case *c, const double *want)
{
    double e = 0.0;
    for (int64_t i = 0; i < c->args.n_tokens * c->row; i++) {
        const int64_t at = i / c->row * c->stride + i % c->row;
        e = fmax(e, fabs((double)ht_load_f32(c->args.qkv, at, c->args.dtype) - want[i]));
    }
    return e;
}

/* One rounding of two products of values up to 4.5, or of the bf16 store. */
static double tolerance(enum ht_dtype dtype, double roundings)
{
    return roundings * 4.5 * (dtype == HT_DTYPE_F32 ? 4.0 * (double)FLT_EPSILON : 1.0 / 256.0);
}

#define FOR_EACH_LEVEL(isa, dtype)                                                                 \
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++)                                            \
        for (int dtype = 0; dtype < 2; dtype++)

START_TEST(apply_matches_reference)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct rope_case c;
        rope_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 2);
        ck_assert_msg(ht_rope_apply(&c.be, &c.args) == HT_OK, "%s", ht_error_message());
        ck_assert_double_le(error(&c, c.want), tolerance(dtypes[dtype], 1.0));
        rope_case_free(&c);
    }
}
END_TEST

START_TEST(inverse_undoes_and_reference_agrees)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct rope_case c;
        rope_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 1);
        ck_assert_int_eq(ht_rope_apply(&c.be, &c.args), HT_OK);
        c.args.inverse = true;
        ck_assert_int_eq(ht_rope_apply(&c.be, &c.args), HT_OK);
        ck_assert_double_le(error(&c, c.before), tolerance(dtypes[dtype], 2.0));
        rope_case_free(&c);
    }
}
END_TEST

/* Dims from rope_dims on, all of v, and the space between rows keep their bits. */
START_TEST(other_dims_pass_through)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct rope_case c;
        rope_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 1);
        const size_t bytes = (size_t)c.n * ht_dtype_bytes(c.args.dtype);
        void *before = malloc(bytes);
        memcpy(before, c.args.qkv, bytes);
        ck_assert_int_eq(ht_rope_apply(&c.be, &c.args), HT_OK);
        const int64_t rotated = (c.args.n_heads + c.args.n_kv_heads) * c.args.d_head;
        for (int64_t i = 0; i < c.n; i++) {
            const int64_t at = i % c.stride;
            if (at < rotated && at % c.args.d_head < c.args.rope_dims) continue;
            ck_assert(ht_load_f32(before, i, c.args.dtype) ==
                      ht_load_f32(c.args.qkv, i, c.args.dtype));
        }
        free(before);
        rope_case_free(&c);
    }
}
END_TEST

/* <R(m) q, R(n) k> depends on m - n only. */
START_TEST(scores_depend_on_distance)
{
    enum { D = 64, ROW = 3 * D };
    const int32_t pairs[][2] = { { 0, 7 }, { 100, 107 }, { 2000, 2007 }, { 8000, 8007 } };
    float tables[2][N_POSITIONS * (D / 2)], *cos_table = tables[0];
    double first = 0.0;

    ht_rope_table(cos_table, tables[1], N_POSITIONS, D, 1e4, NULL);
    for (int p = 0; p < 4; p++) {
        float qkv[2 * ROW];
        struct ht_backend be;
        for (int i = 0; i < 2 * ROW; i++) qkv[i] = ht_rng_normal(13, 1, (uint64_t)i);
        const struct ht_rope_args a = { 2,    1,   1,        D,         D,         HT_DTYPE_F32,
                                        qkv,  ROW, pairs[p], cos_table, tables[1], N_POSITIONS,
                                        false };
        ck_assert_int_eq(ht_backend_create_cpu(&be, 1, 0), HT_OK);
        ck_assert_int_eq(ht_rope_apply(&be, &a), HT_OK);
        ht_backend_free(&be);
        double score = 0.0;
        for (int i = 0; i < D; i++) score += (double)qkv[ROW + i] * (double)qkv[D + i];
        if (p == 0) first = score;
        ck_assert_double_eq_tol(score, first, 1e-5);
    }
    // and it does depend on it
    double unrotated = 0.0;
    for (int i = 0; i < D; i++)
        unrotated += (double)ht_rng_normal(13, 1, (uint64_t)(ROW + i)) *
                     (double)ht_rng_normal(13, 1, (uint64_t)(D + i));
    ck_assert_double_gt(fabs(first - unrotated), 0.1);
}
END_TEST

/* Llama 3.1 (theta 5e5, 128 dims, factor 8): short waves stay, long ones are stretched 8 times. */
START_TEST(llama3_scaling_keeps_short_waves)
{
    enum { D = 128, HALF = D / 2 };
    float plain[2][2 * HALF], scaled[2][2 * HALF]; // positions 0 and 1; sin(f) at position 1
    ht_rope_table(plain[0], plain[1], 2, D, 5e5, NULL);
    ht_rope_table(scaled[0], scaled[1], 2, D, 5e5, &llama3);
    int kept = 0, blended = 0, stretched = 0;
    for (int i = 0; i < HALF; i++) {
        const double f = asin((double)plain[1][HALF + i]), g = asin((double)scaled[1][HALF + i]);
        const double wavelength = 2.0 * acos(-1.0) / pow(5e5, -2.0 * i / D);
        if (wavelength < 8192.0 / 4.0) {
            ck_assert(plain[1][HALF + i] == scaled[1][HALF + i]);
            kept++;
        } else if (wavelength > 8192.0) {
            ck_assert_double_eq_tol(g / f, 1.0 / 8.0, 1e-6);
            stretched++;
        } else {
            ck_assert_double_gt(g / f, 1.0 / 8.0);
            ck_assert_double_lt(g / f, 1.0);
            blended++;
        }
    }
    ck_assert_int_eq(kept, 29);
    ck_assert_int_eq(blended, 6);
    ck_assert_int_eq(stretched, 29);

    const struct ht_rope_scaling none = { 1.0, 1.0, 4.0, 8192 };
    ht_rope_table(scaled[0], scaled[1], 2, D, 5e5, &none);
    ck_assert_mem_eq(plain, scaled, sizeof plain);
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    struct rope_case c;
    rope_case_make(&c, &shapes[2], HT_DTYPE_F32, ht_isa_best(), 1);
    const size_t bytes = (size_t)c.n * sizeof(float);
    void *before = malloc(bytes);
    memcpy(before, c.args.qkv, bytes);

    struct ht_rope_args a = c.args;
    a.n_positions = N_POSITIONS - 1;
    ck_assert_int_eq(ht_rope_apply(&c.be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "token 0 has position 8999"));
    c.pos[3] = -1;
    ck_assert_int_eq(ht_rope_apply(&c.be, &c.args), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "token 3 has position -1"));
    c.pos[3] = 0;
    a = c.args, a.rope_dims = 7;
    ck_assert_int_eq(ht_rope_apply(&c.be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "rope_dims is 7"));
    a = c.args, a.rope_dims = 42;
    ck_assert_int_eq(ht_rope_apply(&c.be, &a), HT_ERR_ARG);
    a = c.args, a.qkv_stride = c.row - 1;
    ck_assert_int_eq(ht_rope_apply(&c.be, &a), HT_ERR_ARG);
    a = c.args, a.dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_rope_apply(&c.be, &a), HT_ERR_UNSUPPORTED);
    ck_assert_mem_eq(before, c.args.qkv, bytes);
    free(before);
    rope_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rope");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property"),
          *refusal = tcase_create("refusal");
    tcase_add_loop_test(reference, apply_matches_reference, 0, N_SHAPES);
    tcase_add_loop_test(property, inverse_undoes_and_reference_agrees, 0, N_SHAPES);
    tcase_add_loop_test(property, other_dims_pass_through, 0, N_SHAPES);
    tcase_add_test(property, scores_depend_on_distance);
    tcase_add_test(property, llama3_scaling_keeps_short_waves);
    tcase_add_test(refusal, bad_arguments_are_refused);
    suite_add_tcase(s, reference);
    suite_add_tcase(s, property);
    suite_add_tcase(s, refusal);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
