/* tests/core/ops/test_loss.c: output head, cross-entropy and z-loss against fp64. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/loss.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ops_ref.h"

struct shape {
    int64_t n_tokens, d_model, vocab_size;
};
// one of each; ragged; few rows (the matrix-vector product); more than one block of 512 tokens
static const struct shape shapes[] = { { 1, 1, 1 },     { 3, 5, 7 },      { 10, 16, 33 },
                                       { 70, 24, 301 }, { 40, 32, 2100 }, { 1100, 8, 20 } };
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct loss_case {
    struct tensor u, weight, grad_u, grad_weight, logprobs;
    int32_t *labels;
    struct ht_linear_ce_args args;
    struct ops_ref_linear_ce ref;
};

static struct loss_case case_make(struct shape s, enum ht_dtype dtype)
{
    struct loss_case c = {
        .u = tensor_normal(s.n_tokens * s.d_model, dtype, 1.0, 1),
        .weight = tensor_normal(s.vocab_size * s.d_model, dtype, 0.7, 2),
        .grad_u = tensor_make(s.n_tokens * s.d_model, dtype),
        .grad_weight = tensor_normal(s.vocab_size * s.d_model, HT_DTYPE_F32, 1e-3, 3),
        .logprobs = tensor_make(s.n_tokens, HT_DTYPE_F32),
        .labels = malloc((size_t)s.n_tokens * sizeof(int32_t)),
    };
    for (int64_t t = 0; t < s.n_tokens; t++) // every fourth token is not counted
        c.labels[t] =
            t % 4 == 3 ? -100 : (int32_t)(ht_rng_u64(4, 0, (uint64_t)t) % (uint64_t)s.vocab_size);
    c.args = (struct ht_linear_ce_args){ .n_tokens = s.n_tokens,
                                         .d_model = s.d_model,
                                         .vocab_size = s.vocab_size,
                                         .dtype = dtype,
                                         .logit_scale = 0.4f,
                                         .loss_scale = 0.01f,
                                         .z_coef = 0.03f,
                                         .u = c.u.p,
                                         .weight = c.weight.p,
                                         .labels = c.labels,
                                         .grad_u = c.grad_u.p,
                                         .grad_weight = c.grad_weight.p,
                                         .logprobs = c.logprobs.p };
    c.ref = (struct ops_ref_linear_ce){ .n_tokens = s.n_tokens,
                                        .d_model = s.d_model,
                                        .vocab_size = s.vocab_size,
                                        .logit_scale = (double)c.args.logit_scale,
                                        .loss_scale = (double)c.args.loss_scale,
                                        .z_coef = (double)c.args.z_coef,
                                        .u = c.u.d,
                                        .weight = c.weight.d,
                                        .labels = c.labels,
                                        .grad_u = c.grad_u.d,
                                        .grad_weight = c.grad_weight.d,
                                        .logprobs = c.logprobs.d };
    return c;
}

static void case_free(struct loss_case *c)
{
    tensor_free(&c->u);
    tensor_free(&c->weight);
    tensor_free(&c->grad_u);
    tensor_free(&c->grad_weight);
    tensor_free(&c->logprobs);
    free(c->labels);
}

static size_t scratch_for(struct shape s, enum ht_dtype dtype)
{
    return ht_linear_ce_scratch_bytes(s.n_tokens, s.d_model, s.vocab_size, dtype);
}

/* What 16-bit code loses: the reference again with the gradient of every logit rounded to bf16, as
 * a plain bf16 pipeline stores it. Returns the largest change of grad_u and grad_weight. */
static void plain_bf16_loss(const struct loss_case *c, double *lost_u, double *lost_w)
{
    const int64_t d = c->args.d_model, n = c->args.vocab_size;
    double *gw = calloc((size_t)(n * d), sizeof *gw), *exact = calloc((size_t)(n * d), sizeof *gw);

    *lost_u = *lost_w = 0.0;
    for (int64_t t = 0; t < c->args.n_tokens; t++) {
        double sum = 0.0, lse;
        if (c->labels[t] < 0) continue;
        double *l = malloc((size_t)n * sizeof *l), *gu = calloc((size_t)d, sizeof *gu);
        for (int64_t v = 0; v < n; v++) {
            l[v] = 0.0;
            for (int64_t i = 0; i < d; i++)
                l[v] += c->ref.logit_scale * c->weight.d[v * d + i] * c->u.d[t * d + i];
            sum += exp(l[v]);
        }
        lse = log(sum);
        for (int64_t v = 0; v < n; v++) {
            const double p = exp(l[v] - lse), hit = v == c->labels[t] ? 1.0 : 0.0;
            const double g = c->ref.logit_scale * c->ref.loss_scale *
                             ((p - hit) + 2.0 * c->ref.z_coef * lse * p);
            const double rounded = (double)ht_bf16_to_f32(ht_f32_to_bf16((float)g));
            for (int64_t i = 0; i < d; i++) {
                gu[i] += (rounded - g) * c->weight.d[v * d + i];
                gw[v * d + i] += (rounded - g) * c->u.d[t * d + i];
            }
        }
        *lost_u = fmax(*lost_u, max_abs(gu, d));
        free(l);
        free(gu);
    }
    *lost_w = max_abs(gw, n * d);
    free(gw);
    free(exact);
}

START_TEST(loss_and_gradients_match_reference)
{
    const struct variant v = variant_at(_i);

    for (int s = 0; s < N_SHAPES; s++) {
        struct loss_case c = case_make(shapes[s], v.dtype);
        struct ht_backend be = backend_make(v.isa, 2, scratch_for(shapes[s], v.dtype));
        double lost_u = 0.0, lost_w = 0.0;

        if (v.dtype == HT_DTYPE_BF16) plain_bf16_loss(&c, &lost_u, &lost_w);
        ops_ref_linear_ce(&c.ref);
        ck_assert_msg(ht_linear_ce(&be, &c.args) == HT_OK, "%s", ht_error_message());
        ck_assert_int_eq(c.args.n_counted, c.ref.n_counted);
        // inputs are exact, so the loss is right to fp32 sums of d_model products in both types
        const double per_token = 32 * FLT_EPSILON * sqrt((double)shapes[s].d_model);
        ck_assert_double_eq_tol(c.args.loss_sum, c.ref.loss_sum,
                                per_token * (double)(c.ref.n_counted + 1));
        ck_assert_double_eq_tol(c.args.z_sum, c.ref.z_sum,
                                per_token * 20 * (double)(c.ref.n_counted + 1));
        check_close(&c.logprobs, c.logprobs.d,
                    per_token + 2 * FLT_EPSILON * max_abs(c.logprobs.d, c.logprobs.n), "logprobs");
        const double f = 64 * FLT_EPSILON;
        check_close(&c.grad_u, c.grad_u.d, 2 * lost_u + f * max_abs(c.grad_u.d, c.grad_u.n),
                    "grad_u");
        check_close(&c.grad_weight, c.grad_weight.d,
                    2 * lost_w + f * max_abs(c.grad_weight.d, c.grad_weight.n), "grad_weight");
        ck_assert_uint_eq(be.scratch.used_bytes, 0);
        case_free(&c);
        ht_backend_free(&be);
    }
}
END_TEST

START_TEST(without_gradients_the_loss_is_the_same)
{
    const struct variant v = variant_at(_i);
    const struct shape s = { 70, 24, 301 };
    struct ht_backend be = backend_make(v.isa, 2, scratch_for(s, v.dtype));
    struct loss_case with = case_make(s, v.dtype), without = case_make(s, v.dtype);

    without.args.grad_u = NULL;
    without.args.grad_weight = NULL;
    ck_assert_int_eq(ht_linear_ce(&be, &with.args), HT_OK);
    ck_assert_int_eq(ht_linear_ce(&be, &without.args), HT_OK);
    ck_assert_double_eq_tol(with.args.loss_sum, without.args.loss_sum, 1e-12);
    check_same_bits(&with.logprobs, &without.logprobs, "logprobs");
    without.args.logprobs = NULL;
    const double loss = without.args.loss_sum;
    ck_assert_int_eq(ht_linear_ce(&be, &without.args), HT_OK);
    ck_assert_double_eq(without.args.loss_sum, loss);
    case_free(&with);
    case_free(&without);
    ht_backend_free(&be);
}
END_TEST

/* Blocks of up to 512 tokens: one without labels is skipped, and its outputs are zeros all the
 * same. */
START_TEST(tokens_without_labels_cost_nothing_and_give_zeros)
{
    const struct variant v = variant_at(_i);
    const struct shape s = { 1500, 8, 20 };
    struct ht_backend be = backend_make(v.isa, 2, scratch_for(s, v.dtype));
    struct loss_case c = case_make(s, v.dtype);

    for (int64_t t = 100; t < 1300; t++) c.labels[t] = -1;
    ops_ref_linear_ce(&c.ref);
    ck_assert_int_eq(ht_linear_ce(&be, &c.args), HT_OK);
    ck_assert_int_eq(c.args.n_counted, c.ref.n_counted);
    ck_assert_double_eq_tol(c.args.loss_sum, c.ref.loss_sum, 1e-5 * c.ref.loss_sum);
    for (int64_t t = 100; t < 1300; t++) {
        ck_assert_double_eq(tensor_at(&c.logprobs, t), 0.0);
        for (int64_t i = 0; i < 8; i++) ck_assert_double_eq(tensor_at(&c.grad_u, t * 8 + i), 0.0);
    }
    check_close(&c.grad_u, c.grad_u.d, 1e-2 * max_abs(c.grad_u.d, c.grad_u.n), "grad_u");
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

START_TEST(thread_count_does_not_change_bits)
{
    const struct variant v = variant_at(_i);
    const struct shape s = { 90, 40, 500 };
    struct loss_case c[2];

    for (int t = 0; t < 2; t++) {
        struct ht_backend be = backend_make(v.isa, t + 1, scratch_for(s, v.dtype));
        c[t] = case_make(s, v.dtype);
        ck_assert_int_eq(ht_linear_ce(&be, &c[t].args), HT_OK);
        ht_backend_free(&be);
    }
    ck_assert(memcmp(&c[0].args.loss_sum, &c[1].args.loss_sum, sizeof(double)) == 0);
    ck_assert(memcmp(&c[0].args.z_sum, &c[1].args.z_sum, sizeof(double)) == 0);
    check_same_bits(&c[0].logprobs, &c[1].logprobs, "logprobs");
    check_same_bits(&c[0].grad_u, &c[1].grad_u, "grad_u");
    check_same_bits(&c[0].grad_weight, &c[1].grad_weight, "grad_weight");
    case_free(&c[0]);
    case_free(&c[1]);
}
END_TEST

static double total(struct ops_ref_linear_ce *r)
{
    struct ops_ref_linear_ce only = *r;
    only.grad_u = only.grad_weight = only.logprobs = NULL;
    ops_ref_linear_ce(&only);
    return only.loss_scale * (only.loss_sum + only.z_coef * only.z_sum);
}

START_TEST(reference_gradients_match_central_differences)
{
    const double h = 1e-5;
    struct loss_case c = case_make((struct shape){ 5, 4, 7 }, HT_DTYPE_F32);

    memset(c.grad_weight.d, 0, (size_t)c.grad_weight.n * sizeof(double));
    ops_ref_linear_ce(&c.ref);
    for (int which = 0; which < 2; which++) {
        struct tensor *x = which ? &c.weight : &c.u, *g = which ? &c.grad_weight : &c.grad_u;
        for (int64_t i = 0; i < x->n; i++) {
            const double old = x->d[i];
            x->d[i] = old + h;
            const double up = total(&c.ref);
            x->d[i] = old - h;
            const double down = total(&c.ref);
            x->d[i] = old;
            ck_assert_double_eq_tol((up - down) / (2 * h), g->d[i], 1e-9);
        }
    }
    case_free(&c);
}
END_TEST

/* Every element of a within part * max|b| of b. */
static void check_same(const struct tensor *a, const struct tensor *b, double part,
                       const char *what)
{
    double max = 0.0;

    for (int64_t i = 0; i < b->n; i++) max = fmax(max, fabs(tensor_at(b, i)));
    for (int64_t i = 0; i < b->n; i++) {
        const double err = fabs(tensor_at(a, i) - tensor_at(b, i));
        if (!(err <= part * max))
            ck_abort_msg("%s[%lld]: %.9g and %.9g", what, (long long)i, tensor_at(a, i),
                         tensor_at(b, i));
    }
}

/* Blocks add up: all tokens at once equal two calls. */
START_TEST(split_calls_add_up)
{
    const struct variant v = variant_at(_i);
    const bool bf16 = v.dtype == HT_DTYPE_BF16;
    const struct shape s = { 50, 24, 90 };
    struct ht_backend be = backend_make(v.isa, 2, scratch_for(s, v.dtype));
    struct loss_case all = case_make(s, v.dtype), parts = case_make(s, v.dtype);
    double loss = 0.0;

    ck_assert_int_eq(ht_linear_ce(&be, &all.args), HT_OK);
    for (int p = 0; p < 2; p++) {
        const int64_t from = p ? 20 : 0;
        const size_t skip = (size_t)(from * 24) * ht_dtype_bytes(v.dtype);
        struct ht_linear_ce_args a = parts.args;
        a.n_tokens = p ? 30 : 20;
        a.u = (const char *)a.u + skip;
        a.grad_u = (char *)a.grad_u + skip;
        a.labels += from;
        a.logprobs += from;
        ck_assert_int_eq(ht_linear_ce(&be, &a), HT_OK);
        loss += a.loss_sum;
    }
    // 20 rows and 50 may take different products: fp32 sums in another order, one bit of a bf16
    // gradient
    ck_assert_double_eq_tol(loss, all.args.loss_sum, 1e-5);
    check_same(&parts.logprobs, &all.logprobs, 1e-6, "logprobs");
    check_same(&parts.grad_u, &all.grad_u, bf16 ? 1.0 / 128 : 1e-6, "grad_u");
    check_same(&parts.grad_weight, &all.grad_weight, bf16 ? 1.0 / 128 : 1e-6, "grad_weight");
    case_free(&all);
    case_free(&parts);
    ht_backend_free(&be);
}
END_TEST

START_TEST(far_logits_are_stable)
{
    const struct variant v = variant_at(_i);
    const struct shape s = { 3, 4, 40 };
    struct ht_backend be = backend_make(v.isa, 1, scratch_for(s, v.dtype));
    struct loss_case c = case_make(s, v.dtype);

    tensor_fill(&c.u, 100.0);
    for (int64_t i = 0; i < c.weight.n; i++) { // logits 0, 160, 320, ...: exp would overflow
        ht_store_f32(c.weight.p, i, v.dtype, (float)(i / 4));
        c.weight.d[i] = (double)(i / 4);
    }
    ops_ref_linear_ce(&c.ref);
    ck_assert_int_eq(ht_linear_ce(&be, &c.args), HT_OK);
    ck_assert_double_eq_tol(c.args.loss_sum, c.ref.loss_sum, 1e-6 * (1.0 + c.ref.loss_sum));
    check_close(&c.grad_u, c.grad_u.d, 1e-2 * max_abs(c.grad_u.d, c.grad_u.n), "grad_u");
    case_free(&c);
    ht_backend_free(&be);
}
END_TEST

START_TEST(non_finite_input_gives_a_non_finite_loss)
{
    const struct variant v = variant_at(_i);
    const float bad[3] = { NAN, INFINITY, -INFINITY };
    const struct shape many = { 40, 24, 90 }, few = { 5, 24, 90 };

    for (int b = 0; b < 6; b++) {
        const struct shape s = b < 3 ? many : few;
        struct ht_backend be = backend_make(v.isa, 2, scratch_for(s, v.dtype));
        struct loss_case c = case_make(s, v.dtype);
        ht_store_f32(c.u.p, 2 * 24 + 5, v.dtype, bad[b % 3]);
        ck_assert_int_eq(ht_linear_ce(&be, &c.args), HT_OK);
        ck_assert(!isfinite(c.args.loss_sum));
        ck_assert(!isfinite(((float *)c.logprobs.p)[2]));
        ck_assert(isfinite(((float *)c.logprobs.p)[1]));
        case_free(&c);
        ht_backend_free(&be);
    }
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    const struct shape s = { 5, 4, 7 };
    struct ht_backend be = backend_make(ht_isa_best(), 1, scratch_for(s, HT_DTYPE_F32));
    struct ht_backend small = backend_make(ht_isa_best(), 1, 64);
    struct loss_case c = case_make(s, HT_DTYPE_F32);
    struct ht_linear_ce_args a;

    c.labels[2] = 7;
    a = c.args;
    ck_assert_int_eq(ht_linear_ce(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "label 7 at position 2"));
    c.labels[2] = 6;
    a = c.args, a.grad_weight = NULL;
    ck_assert_int_eq(ht_linear_ce(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "grad_weight"));
    a = c.args, a.logit_scale = 0.0f;
    ck_assert_int_eq(ht_linear_ce(&be, &a), HT_ERR_ARG);
    a = c.args, a.dtype = HT_DTYPE_F16;
    ck_assert_int_eq(ht_linear_ce(&be, &a), HT_ERR_UNSUPPORTED);
    a = c.args;
    ck_assert_int_eq(ht_linear_ce(&small, &a), HT_ERR_MEMORY);
    ck_assert_uint_eq(small.scratch.used_bytes, 0);
    check_close(&c.grad_weight, c.grad_weight.d, 0.0, "grad_weight after refusals");
    a = c.args, a.n_tokens = 0;
    ck_assert_int_eq(ht_linear_ce(&be, &a), HT_OK);
    ck_assert_int_eq(a.n_counted, 0);
    case_free(&c);
    ht_backend_free(&be);
    ht_backend_free(&small);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loss");
    TCase *t = tcase_create("loss");

    tcase_add_loop_test(t, loss_and_gradients_match_reference, 0, n_variants());
    tcase_add_loop_test(t, without_gradients_the_loss_is_the_same, 0, n_variants());
    tcase_add_loop_test(t, tokens_without_labels_cost_nothing_and_give_zeros, 0, n_variants());
    tcase_add_loop_test(t, thread_count_does_not_change_bits, 0, n_variants());
    tcase_add_test(t, reference_gradients_match_central_differences);
    tcase_add_loop_test(t, split_calls_add_up, 0, n_variants());
    tcase_add_loop_test(t, far_logits_are_stable, 0, n_variants());
    tcase_add_loop_test(t, non_finite_input_gives_a_non_finite_loss, 0, n_variants());
    tcase_add_test(t, bad_arguments_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
