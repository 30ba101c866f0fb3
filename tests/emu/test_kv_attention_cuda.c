/* tests/emu/test_kv_attention_cuda.c: attention over a cache on the device: decode and extend. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/attention/attention_case.h"
#include "tests/emu/gpu_case.h"

/* One and several splits (128 keys and more), ragged groups of keys, more query heads than one
 * block takes (16), each compiled width. */
static const struct attention_shape shapes[] = {
    { 1, 1, 8, { 1 } },          { 2, 1, 16, { 70 } },      { 4, 4, 24, { 33, 60 } },
    { 4, 2, 40, { 90, 3 } },     { 8, 2, 64, { 75, 131 } }, { 6, 2, 80, { 20, 21 } },
    { 4, 1, 128, { 140 } },      { 5, 1, 136, { 30 } },     { 18, 1, 32, { 150 } },
    { 1, 1, 256, { 50, 1, 2 } },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };
static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct caches { // per sequence (tokens, n_kv_heads, d_head), on the device
    void *k[CASE_MAX_SEQS], *v[CASE_MAX_SEQS];
};

static void caches_make(struct caches *out, const struct attention_case *c, struct ht_backend *be)
{
    const struct ht_flash_args *a = &c->args;
    const size_t element = ht_dtype_bytes(a->dtype);
    const size_t row = (size_t)(a->n_kv_heads * a->d_head) * element;
    for (int64_t s = 0; s < c->n_seqs; s++) {
        const size_t n = (size_t)(c->starts[s + 1] - c->starts[s]);
        char *k = malloc(n * row), *v = malloc(n * row);
        for (size_t t = 0; t < n; t++) {
            const char *from =
                (const char *)a->qkv +
                (size_t)((c->starts[s] + (int64_t)t) * a->qkv_stride + a->n_heads * a->d_head) *
                    element;
            memcpy(k + t * row, from, row);
            memcpy(v + t * row, from + row, row);
        }
        out->k[s] = gpu_put(be, k, n * row);
        out->v[s] = gpu_put(be, v, n * row);
        free(k);
        free(v);
    }
}

/* Rows past[s] .. past[s] + n_new[s] of the sequences with n_new[s] > 0, in one call; o of the case
 * gets them. */
static void run_rows(struct attention_case *c, struct ht_backend *be, const struct caches *m,
                     const int64_t *past, const int64_t *n_new)
{
    const struct ht_flash_args *a = &c->args;
    const size_t element = ht_dtype_bytes(a->dtype);
    const int64_t q_row = a->n_heads * a->d_head;
    int32_t starts[CASE_MAX_SEQS + 1] = { 0 };
    int64_t pasts[CASE_MAX_SEQS], which[CASE_MAX_SEQS], n_seqs = 0;
    void *k[CASE_MAX_SEQS], *v[CASE_MAX_SEQS];

    for (int64_t s = 0; s < c->n_seqs; s++) {
        if (n_new[s] == 0) continue;
        starts[n_seqs + 1] = starts[n_seqs] + (int32_t)n_new[s];
        pasts[n_seqs] = past[s];
        k[n_seqs] = m->k[s];
        v[n_seqs] = m->v[s];
        which[n_seqs++] = s;
    }
    const size_t n = (size_t)starts[n_seqs], q_bytes = (size_t)(q_row + 8) * element;
    const size_t o_bytes = (size_t)q_row * element;
    char *q = calloc(n, q_bytes), *o = calloc(n, o_bytes);
    for (int64_t i = 0; i < n_seqs; i++)
        for (int64_t t = 0; t < n_new[which[i]]; t++) {
            const int64_t from = c->starts[which[i]] + pasts[i] + t;
            memcpy(q + (size_t)(starts[i] + t) * q_bytes,
                   (const char *)a->qkv + (size_t)(from * a->qkv_stride) * element, o_bytes);
        }
    const struct ht_kv_attention_args kv = {
        { n_seqs, gpu_put(be, starts, sizeof starts) },
        starts[n_seqs],
        a->n_heads,
        a->n_kv_heads,
        a->d_head,
        a->dtype,
        a->scale,
        gpu_put(be, q, n * q_bytes),
        q_row + 8,
        gpu_put(be, k, sizeof k),
        gpu_put(be, v, sizeof v),
        gpu_put(be, pasts, sizeof pasts),
        gpu_new(be, n * o_bytes),
    };
    gpu_ok(ht_kv_attention(be, &kv));
    ck_assert_uint_eq(be->scratch.used_bytes, 0);
    gpu_get(be, o, kv.o, n * o_bytes);
    for (int64_t i = 0; i < n_seqs; i++)
        memcpy((char *)a->o + (size_t)(c->starts[which[i]] + pasts[i]) * o_bytes,
               o + (size_t)starts[i] * o_bytes, (size_t)n_new[which[i]] * o_bytes);
    free(q);
    free(o);
}

static void start(struct attention_case *c, struct ht_backend *be, struct caches *m,
                  const struct attention_shape *s, enum ht_dtype dtype)
{
    attention_case_make(c, s, dtype, ht_isa_best(), 1, 21, false);
    int64_t past[CASE_MAX_SEQS] = { 0 };
    const struct ht_kv_attention_args most = { .seqs = { c->n_seqs, c->starts },
                                               .n_tokens = c->n_tokens,
                                               .n_heads = s->n_heads,
                                               .n_kv_heads = s->n_kv_heads,
                                               .d_head = s->d_head,
                                               .dtype = dtype,
                                               .past = past };
    gpu_start(be, ht_kv_attention_scratch_bytes(&most, 1));
    caches_make(m, c, be);
    memset(c->args.o, 0xff, c->o_bytes);
}

static void check_output(const struct attention_case *c, const char *what)
{
    const int64_t n = c->n_tokens * c->args.n_heads * c->args.d_head;
    const double e = attention_case_o_error(c, c->args.o, c->ref.o);
    const double tol = attention_case_tolerance(c, c->ref.o, c->plain16.o, n, 24.0);
    ck_assert_msg(e <= tol, "%s, %s: error %g, allowed %g", what, ht_dtype_name(c->args.dtype), e,
                  tol);
}

/* Pieces of any length, then token by token, in the same calls: one sequence may extend while
 * another decodes. */
static void run_in_pieces(struct attention_case *c, struct ht_backend *be, const struct caches *m,
                          int64_t piece, int64_t decode_from)
{
    int64_t done[CASE_MAX_SEQS] = { 0 }, n_new[CASE_MAX_SEQS];
    for (;;) {
        int64_t any = 0;
        for (int64_t s = 0; s < c->n_seqs; s++) {
            const int64_t left = c->starts[s + 1] - c->starts[s] - done[s];
            const int64_t want = done[s] >= decode_from + s ? 1 : piece;
            n_new[s] = want < left ? want : left;
            any += n_new[s];
        }
        if (any == 0) return;
        run_rows(c, be, m, done, n_new);
        for (int64_t s = 0; s < c->n_seqs; s++) done[s] += n_new[s];
    }
}

START_TEST(prefill_split_anywhere_equals_whole)
{
    static const int64_t pieces[] = { 1000000, 64, 29 };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct attention_case c;
        struct ht_backend be;
        struct caches m;
        start(&c, &be, &m, &shapes[_i], dtypes[dtype]);
        for (int i = 0; i < 3; i++) {
            run_in_pieces(&c, &be, &m, pieces[i], INT64_MAX - CASE_MAX_SEQS);
            check_output(&c, "extend");
        }
        gpu_end(&be);
        attention_case_free(&c);
    }
}
END_TEST

/* The first rows in one piece, the last 12 one by one, past lengths that are not multiples of
 * anything. */
START_TEST(prefill_then_decode_equals_whole)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct attention_case c;
        struct ht_backend be;
        struct caches m;
        start(&c, &be, &m, &shapes[_i], dtypes[dtype]);
        int64_t longest = 0;
        for (int64_t s = 0; s < c.n_seqs; s++)
            longest = longest > shapes[_i].lengths[s] ? longest : shapes[_i].lengths[s];
        const int64_t first = longest > 12 ? longest - 12 : 1;
        run_in_pieces(&c, &be, &m, first, first);
        check_output(&c, "decode");
        gpu_end(&be);
        attention_case_free(&c);
    }
}
END_TEST

/* Longer than the most splits of the smallest size: splits grow with the sequence. */
START_TEST(long_sequence_decodes)
{
    const struct attention_shape s = { 2, 1, 16, { 4200, 300 } };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct attention_case c;
        struct ht_backend be;
        struct caches m;
        start(&c, &be, &m, &s, dtypes[dtype]);
        for (int64_t i = 0; i < c.n_tokens * s.n_heads * s.d_head; i++) // the rows not computed
            ht_store_f32(c.args.o, i, dtypes[dtype], (float)c.ref.o[i]);
        const int64_t past[] = { 4199, 299 }, one[] = { 1, 1 };
        run_rows(&c, &be, &m, past, one);
        check_output(&c, "long decode");
        gpu_end(&be);
        attention_case_free(&c);
    }
}
END_TEST

/* A sequence decodes to the same bits alone and among others. */
START_TEST(bits_do_not_depend_on_the_batch)
{
    const struct attention_shape s = { 4, 2, 64, { 300, 77, 140 } };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct attention_case c;
        struct ht_backend be;
        struct caches m;
        start(&c, &be, &m, &s, dtypes[dtype]);
        const int64_t past[] = { 299, 76, 130 }, all[] = { 1, 1, 10 }, alone[] = { 0, 1, 0 };
        const size_t row = (size_t)(s.n_heads * s.d_head) * ht_dtype_bytes(dtypes[dtype]);
        char *at = (char *)c.args.o + (size_t)(c.starts[1] + 76) * row, *before = malloc(row);
        run_rows(&c, &be, &m, past, all);
        memcpy(before, at, row);
        memset(at, 0, row);
        run_rows(&c, &be, &m, past, alone);
        ck_assert_mem_eq(before, at, row);
        free(before);
        gpu_end(&be);
        attention_case_free(&c);
    }
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    const struct attention_shape s = { 2, 1, 16, { 5 } };
    struct attention_case c;
    struct ht_backend be;
    struct caches m;
    start(&c, &be, &m, &s, HT_DTYPE_BF16);
    struct ht_kv_attention_args kv = { .seqs = { 1, gpu_put(&be, c.starts, 8) },
                                       .n_tokens = 5,
                                       .n_heads = 2,
                                       .n_kv_heads = 1,
                                       .d_head = 16,
                                       .dtype = HT_DTYPE_BF16,
                                       .scale = 1.0f,
                                       .q_stride = 36 };
    ck_assert_int_eq(ht_kv_attention(&be, &kv), HT_ERR_ARG);
    ck_assert(strstr(ht_error_message(), "q at") != NULL);
    kv.q_stride = 40, kv.n_heads = 3, kv.n_kv_heads = 2;
    ck_assert_int_eq(ht_kv_attention(&be, &kv), HT_ERR_ARG);
    ck_assert(strstr(ht_error_message(), "3 heads over 2 kv heads") != NULL);
    gpu_end(&be);
    attention_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("kv_attention_cuda");
    TCase *all = tcase_create("kv_attention");
    tcase_add_loop_test(all, prefill_split_anywhere_equals_whole, 0, N_SHAPES);
    tcase_add_loop_test(all, prefill_then_decode_equals_whole, 0, N_SHAPES);
    tcase_add_test(all, long_sequence_decodes);
    tcase_add_test(all, bits_do_not_depend_on_the_batch);
    tcase_add_test(all, bad_arguments_are_refused);
    suite_add_tcase(s, all);
    return gpu_run_suite(s);
}
