/* tests/core/ops/test_embedding.c: rows picked, scaled and added back exactly. */
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/embedding.h"
#include "tests/core/ops/ops_case.h"

struct shape {
    int64_t n_tokens, d_model, vocab_size;
};
static const struct shape shapes[] = {
    { 1, 1, 1 }, { 5, 3, 2 }, { 9, 16, 4 }, { 7, 37, 11 }, { 40, 700, 9 }
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct embedding_case {
    struct tensor weight, residual, grad_residual, grad_weight;
    int32_t *ids;
    struct ht_embedding_args args;
};

static struct embedding_case case_make(struct shape s, enum ht_dtype dtype)
{
    struct embedding_case c = {
        .weight = tensor_normal(s.vocab_size * s.d_model, dtype, 1.0, 1),
        .residual = tensor_make(s.n_tokens * s.d_model, HT_DTYPE_F32),
        .grad_residual = tensor_normal(s.n_tokens * s.d_model, HT_DTYPE_F32, 1.0, 2),
        .grad_weight = tensor_normal(s.vocab_size * s.d_model, HT_DTYPE_F32, 1.0, 3),
        .ids = malloc((size_t)s.n_tokens * sizeof(int32_t)),
    };
    for (int64_t t = 0; t < s.n_tokens; t++) // repeated ids, ends of the table among them
        c.ids[t] = (int32_t)(ht_rng_u64(4, 0, (uint64_t)t) % (uint64_t)s.vocab_size);
    c.args = (struct ht_embedding_args){ .n_tokens = s.n_tokens,
                                         .d_model = s.d_model,
                                         .vocab_size = s.vocab_size,
                                         .dtype = dtype,
                                         .multiplier = 12.0f,
                                         .ids = c.ids,
                                         .weight = c.weight.p,
                                         .residual = c.residual.p,
                                         .grad_residual = c.grad_residual.p,
                                         .grad_weight = c.grad_weight.p };
    return c;
}

static void case_free(struct embedding_case *c)
{
    tensor_free(&c->weight);
    tensor_free(&c->residual);
    tensor_free(&c->grad_residual);
    tensor_free(&c->grad_weight);
    free(c->ids);
}

START_TEST(forward_is_exact)
{
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 2, 0);

    for (int s = 0; s < N_SHAPES; s++) {
        struct embedding_case c = case_make(shapes[s], v.dtype);
        const int64_t d = shapes[s].d_model;
        ck_assert_int_eq(ht_embedding_forward(&be, &c.args), HT_OK);
        for (int64_t i = 0; i < c.residual.n; i++)
            ck_assert_float_eq(((float *)c.residual.p)[i],
                               12.0f * (float)c.weight.d[c.ids[i / d] * d + i % d]);
        case_free(&c);
    }
    ht_backend_free(&be);
}
END_TEST

/* fp64 sums, and the same bits with 1 and 2 threads */
START_TEST(backward_adds_in_token_order)
{
    const struct variant v = variant_at(_i);

    for (int s = 0; s < N_SHAPES; s++) {
        struct embedding_case c[2];
        const int64_t d = shapes[s].d_model;
        for (int t = 0; t < 2; t++) {
            struct ht_backend be = backend_make(v.isa, t + 1, 0);
            c[t] = case_make(shapes[s], v.dtype);
            ck_assert_int_eq(ht_embedding_backward(&be, &c[t].args), HT_OK);
            ht_backend_free(&be);
        }
        double *ref = c[0].grad_weight.d;
        for (int64_t i = 0; i < c[0].grad_residual.n; i++)
            ref[c[0].ids[i / d] * d + i % d] += 12.0 * c[0].grad_residual.d[i];
        // each of up to n_tokens additions rounds the running sum once
        check_close(&c[0].grad_weight, ref,
                    1.2e-7 * (double)shapes[s].n_tokens * max_abs(ref, c[0].grad_weight.n),
                    "grad_weight");
        check_same_bits(&c[0].grad_weight, &c[1].grad_weight, "grad_weight");
        case_free(&c[0]);
        case_free(&c[1]);
    }
}
END_TEST

START_TEST(ids_outside_the_table_are_refused)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    struct embedding_case c = case_make((struct shape){ 5, 8, 4 }, HT_DTYPE_F32);
    struct ht_embedding_args a = c.args;

    c.ids[3] = 4;
    ck_assert_int_eq(ht_embedding_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "id 4 at position 3"));
    c.ids[3] = -1;
    ck_assert_int_eq(ht_embedding_backward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "id -1 at position 3"));
    c.ids[3] = 0;
    a.weight = NULL;
    ck_assert_int_eq(ht_embedding_forward(&be, &a), HT_ERR_ARG);
    a.n_tokens = 0;
    a.ids = NULL;
    ck_assert_int_eq(ht_embedding_forward(&be, &a), HT_OK);
    ck_assert_int_eq(ht_embedding_backward(&be, &a), HT_OK);
    check_close(&c.grad_weight, c.grad_weight.d, 0.0, "grad_weight after refusals");
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("embedding");
    TCase *t = tcase_create("embedding");

    tcase_add_loop_test(t, forward_is_exact, 0, n_variants());
    tcase_add_loop_test(t, backward_adds_in_token_order, 0, n_variants());
    tcase_add_test(t, ids_outside_the_table_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
