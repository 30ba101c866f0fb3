/* tests/attention/test_kv_attention.c: attention over a cache equals attention over the whole
 * sequence. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "tests/attention/attention_case.h"

static const struct attention_shape shapes[] = {
    { 1, 1, 8, { 1 } },          { 2, 1, 16, { 70 } },        { 4, 4, 24, { 33, 60 } },
    { 8, 1, 32, { 40 } },        { 4, 1, 40, { 90, 3, 17 } }, { 8, 2, 64, { 75 } },
    { 6, 2, 80, { 20, 21 } },    { 4, 1, 128, { 110 } },      { 5, 1, 136, { 30 } },
    { 1, 1, 256, { 50, 1, 2 } }, { 2, 1, 16, { 2100 } }, // nine blocks of 256 keys
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], LONG_SHAPE = N_SHAPES - 1 };

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct caches { // per sequence (tokens, n_kv_heads, d_head), copied out of the case's qkv
    void *k[CASE_MAX_SEQS], *v[CASE_MAX_SEQS];
};

static void caches_make(struct caches *out, const struct attention_case *c)
{
    const struct ht_flash_args *a = &c->args;
    const size_t element = ht_dtype_bytes(a->dtype);
    const size_t row = (size_t)(a->n_kv_heads * a->d_head) * element;
    for (int64_t s = 0; s < c->n_seqs; s++) {
        const int64_t n = c->starts[s + 1] - c->starts[s];
        out->k[s] = malloc((size_t)n * row);
        out->v[s] = malloc((size_t)n * row);
        for (int64_t t = 0; t < n; t++) {
            const char *k =
                (const char *)a->qkv +
                (size_t)((c->starts[s] + t) * a->qkv_stride + a->n_heads * a->d_head) * element;
            memcpy((char *)out->k[s] + (size_t)t * row, k, row);
            memcpy((char *)out->v[s] + (size_t)t * row, k + row, row);
        }
    }
}

static void caches_free(struct caches *m, const struct attention_case *c)
{
    for (int64_t s = 0; s < c->n_seqs; s++) {
        free(m->k[s]);
        free(m->v[s]);
    }
}

/* Feed each sequence in pieces: `piece` tokens at a time, or token by token from `decode_from` on.
 * Sequences that are finished drop out of the call. */
static void run_in_pieces(struct attention_case *c, int64_t piece, int64_t decode_from)
{
    const struct ht_flash_args *a = &c->args;
    const size_t element = ht_dtype_bytes(a->dtype);
    const int64_t q_row = a->n_heads * a->d_head;
    int64_t done[CASE_MAX_SEQS] = { 0 };
    struct caches m;

    caches_make(&m, c);
    memset(a->o, 0xff, c->o_bytes);
    for (;;) {
        int32_t starts[CASE_MAX_SEQS + 1] = { 0 };
        int64_t past[CASE_MAX_SEQS], which[CASE_MAX_SEQS], n_seqs = 0;
        const void *k[CASE_MAX_SEQS], *v[CASE_MAX_SEQS];
        for (int64_t s = 0; s < c->n_seqs; s++) {
            const int64_t left = c->starts[s + 1] - c->starts[s] - done[s];
            const int64_t want = done[s] >= decode_from ? 1 : piece;
            const int64_t n = want < left ? want : left;
            if (n == 0) continue;
            starts[n_seqs + 1] = starts[n_seqs] + (int32_t)n;
            past[n_seqs] = done[s];
            k[n_seqs] = m.k[s];
            v[n_seqs] = m.v[s];
            which[n_seqs++] = s;
        }
        if (n_seqs == 0) break;
        char *q = malloc((size_t)(starts[n_seqs] * (q_row + 8)) * element);
        char *o = malloc((size_t)(starts[n_seqs] * q_row) * element);
        for (int64_t i = 0; i < n_seqs; i++)
            for (int32_t t = starts[i]; t < starts[i + 1]; t++) {
                const int64_t from = c->starts[which[i]] + past[i] + t - starts[i];
                memcpy(q + (size_t)(t * (q_row + 8)) * element,
                       (const char *)a->qkv + (size_t)(from * a->qkv_stride) * element,
                       (size_t)q_row * element);
            }
        const struct ht_kv_attention_args kv = { { n_seqs, starts },
                                                 starts[n_seqs],
                                                 a->n_heads,
                                                 a->n_kv_heads,
                                                 a->d_head,
                                                 a->dtype,
                                                 a->scale,
                                                 q,
                                                 q_row + 8,
                                                 k,
                                                 v,
                                                 past,
                                                 o };
        ck_assert_int_eq(
            ht_backend_reserve_scratch(&c->be, ht_kv_attention_scratch_bytes(&kv, c->be.n_threads)),
            HT_OK);
        ck_assert_msg(ht_kv_attention(&c->be, &kv) == HT_OK, "%s", ht_error_message());
        ck_assert_uint_eq(c->be.scratch.used_bytes, 0);
        for (int64_t i = 0; i < n_seqs; i++) {
            memcpy((char *)a->o + (size_t)((c->starts[which[i]] + past[i]) * q_row) * element,
                   o + (size_t)(starts[i] * q_row) * element,
                   (size_t)((starts[i + 1] - starts[i]) * q_row) * element);
            done[which[i]] += starts[i + 1] - starts[i];
        }
        free(q);
        free(o);
    }
    caches_free(&m, c);
}

#define FOR_EACH_LEVEL(isa, dtype)                                                                 \
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++)                                            \
        for (int dtype = 0; dtype < 2; dtype++)

static void check_output(const struct attention_case *c, const char *what)
{
    const int64_t n = c->n_tokens * c->args.n_heads * c->args.d_head;
    const double e = attention_case_o_error(c, c->args.o, c->ref.o);
    const double tol = attention_case_tolerance(c, c->ref.o, c->plain16.o, n, 8.0);
    ck_assert_msg(e <= tol, "%s, %s, %s: error %g, allowed %g", what, ht_isa_name(c->be.isa),
                  ht_dtype_name(c->args.dtype), e, tol);
}

START_TEST(prefill_split_anywhere_equals_whole)
{
    static const int64_t pieces[] = { 1000000, 64, 29, 5 };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 1, 21, false);
        for (int i = 0; i < 4; i++) {
            run_in_pieces(&c, pieces[i], INT64_MAX);
            check_output(&c, "prefill");
        }
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(decode_steps_equal_forward)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &shapes[_i], dtypes[dtype], (enum ht_isa)isa, 1, 22, false);
        run_in_pieces(&c, 50, 50); // a prefill of 50, then one by one
        check_output(&c, "prefill and decode");
        run_in_pieces(&c, 1, 0);
        check_output(&c, "decode");
        attention_case_free(&c);
    }
}
END_TEST

/* The long one last: 2090 tokens of prefill, then ten decode steps over nine key blocks. */
START_TEST(long_cache_matches_reference)
{
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &shapes[LONG_SHAPE], dtypes[dtype], (enum ht_isa)isa, 1, 23, false);
        run_in_pieces(&c, 2090, 2090);
        check_output(&c, "long");
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(bits_do_not_depend_on_threads)
{
    const struct attention_shape s = { 6, 2, 24, { 90, 1100, 7 } };
    static const int threads[] = { 1, 1, 2, 5 };
    FOR_EACH_LEVEL(isa, dtype)
    {
        struct attention_case c;
        attention_case_make(&c, &s, dtypes[dtype], (enum ht_isa)isa, 1, 24, false);
        void *first = malloc(c.o_bytes);
        for (int run = 0; run < 4; run++) {
            c.be.n_threads = threads[run];
            run_in_pieces(&c, 1096, 1096);
            if (run == 0) memcpy(first, c.args.o, c.o_bytes);
            ck_assert_mem_eq(first, c.args.o, c.o_bytes);
        }
        free(first);
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    const struct attention_shape s = { 4, 2, 16, { 5, 4 } };
    struct attention_case c;
    struct caches m;
    attention_case_make(&c, &s, HT_DTYPE_F32, ht_isa_best(), 1, 25, false);
    caches_make(&m, &c);
    int64_t past[2] = { 0, 0 };
    const void *k[2] = { m.k[0], m.k[1] }, *v[2] = { m.v[0], m.v[1] };
    const struct ht_kv_attention_args good = {
        { 2, c.starts },   9, 4, 2,    16,      HT_DTYPE_F32, 0.25f, c.args.qkv,
        c.args.qkv_stride, k, v, past, c.args.o
    };
    ck_assert_int_eq(ht_backend_reserve_scratch(&c.be, ht_kv_attention_scratch_bytes(&good, 1)),
                     HT_OK);
    ck_assert_int_eq(ht_kv_attention(&c.be, &good), HT_OK);
    struct ht_kv_attention_args a = good;
    a.n_kv_heads = 3;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "4 heads over 3 kv heads"));
    a = good, a.d_head = 20;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "d_head is 20"));
    a = good, a.n_tokens = 8;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_ARG);
    a = good, a.q_stride = 63;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "q_stride is 63"));
    a = good, a.scale = -1.0f;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_ARG);
    a = good, a.dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_kv_attention(&c.be, &a), HT_ERR_UNSUPPORTED);
    past[1] = -3;
    ck_assert_int_eq(ht_kv_attention(&c.be, &good), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "sequence 1 has -3 past tokens"));
    past[1] = 0;
    ht_arena_free(&c.be.scratch);
    ck_assert_int_eq(ht_arena_create(&c.be.scratch, "scratch", 4096), HT_OK);
    ck_assert_int_eq(ht_kv_attention(&c.be, &good), HT_ERR_MEMORY);
    ck_assert_uint_eq(c.be.scratch.used_bytes, 0);
    caches_free(&m, &c);
    attention_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("kv_attention");
    TCase *reference = tcase_create("reference"), *refusal = tcase_create("refusal");
    tcase_add_loop_test(reference, prefill_split_anywhere_equals_whole, 0, LONG_SHAPE);
    tcase_add_loop_test(reference, decode_steps_equal_forward, 0, LONG_SHAPE);
    tcase_add_test(reference, long_cache_matches_reference);
    tcase_add_test(reference, bits_do_not_depend_on_threads);
    tcase_add_test(refusal, bad_arguments_are_refused);
    suite_add_tcase(s, reference);
    suite_add_tcase(s, refusal);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
