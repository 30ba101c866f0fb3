/* tests/core/model/test_model.c: the whole stack: loss and gradients against the double reference,
 * recompute levels, packing, prefill and decode against the forward pass, repeatability. */
#include <check.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/config/recipe.h"
#include "core/model/decode.h"
#include "core/model/params.h"
#include "core/ops/gemm.h"
#include "tests/ref/model_ref.h"

#define T 41 // tokens: ragged against every tile

/* Four layers: Mamba, attention, Mamba, attention; two groups, grouped queries, half RoPE. */
static struct ht_model_config small_config(int variant)
{
    struct ht_model_config c = { .naming = HT_NAMING_BAMBA,
                                 .vocab_size = 97,
                                 .d_model = 32,
                                 .n_layers = 4,
                                 .n_heads = 4,
                                 .n_kv_heads = 2,
                                 .d_head = 16,
                                 .rope_dims = 8,
                                 .rope_theta = 10000.0,
                                 .max_position = 64,
                                 .attention_scale = 0.25f,
                                 .d_inner = 64,
                                 .ssm_heads = 4,
                                 .ssm_d_head = 16,
                                 .d_state = 16,
                                 .n_groups = 2,
                                 .d_conv = 4,
                                 .chunk = 16,
                                 .conv_bias = true,
                                 .dt_limit_max = INFINITY,
                                 .dt_init_min = 0.001f,
                                 .dt_init_max = 0.1f,
                                 .dt_init_floor = 1e-4f,
                                 .d_ff = 64,
                                 .norm_eps = 1e-5f,
                                 .embedding_multiplier = 1.0f,
                                 .residual_multiplier = 1.0f,
                                 .logits_scaling = 1.0f,
                                 .residual_fp32 = true,
                                 .residual_init_div = 2.0 };
    c.layer_kind[1] = c.layer_kind[3] = HT_LAYER_ATTENTION;
    if (variant == 1) { // Granite's multipliers and a tied head
        c.tied_head = true;
        c.embedding_multiplier = 3.0f;
        c.residual_multiplier = 0.5f;
        c.logits_scaling = 2.0f;
    }
    if (variant == 2) { // pure Mamba-2, no MLP
        c.naming = HT_NAMING_MAMBA2;
        memset(c.layer_kind, HT_LAYER_MAMBA, sizeof c.layer_kind);
        c.d_ff = 0;
        c.n_heads = c.n_kv_heads = c.d_head = c.rope_dims = 0;
        c.conv_bias = true;
    }
    if (variant == 3) { // a plain transformer with full RoPE
        c.naming = HT_NAMING_LLAMA;
        memset(c.layer_kind, HT_LAYER_ATTENTION, sizeof c.layer_kind);
        c.rope_dims = 16;
    }
    return c;
}

struct world {
    struct ht_backend be;
    struct ht_model *m;
    float *flat; // (n_total) parameters in fp32
    double *flat64;
    int32_t ids[T], labels[T], pos[T];
    int32_t starts[4];
    struct ht_model_batch b;
};

static struct world *make_world(int variant, enum ht_dtype dtype, int threads)
{
    struct world *w = calloc(1, sizeof *w); // the model keeps the address of its backend
    struct ht_model_config c = small_config(variant);

    ck_assert_int_eq(ht_backend_create_cpu(&w->be, threads, 1 << 20), HT_OK);
    ck_assert_msg(ht_model_create(&w->m, &w->be, &c, dtype, HT_DECAY_MATRICES, 0, 0, 64) == HT_OK,
                  "%s", ht_error_message());
    const struct ht_tensor_list *l = &w->m->list;
    w->flat = calloc((size_t)l->n_total, sizeof(float));
    w->flat64 = calloc((size_t)l->n_total, sizeof(double));
    ht_params_init(w->flat, &c, l, 7, 0, l->n_total);
    for (int k = 0; k < l->n_tensors;
         k++) { // norms off 1, D off 1, a larger embedding: nothing hides
        const struct ht_tensor_info *t = &l->tensors[k];
        for (int64_t i = 0; i < t->n; i++) {
            float *v = &w->flat[t->offset + i];
            if (t->role == HT_T_EMBED) *v *= 20.0f;
            if (!t->matrix && t->role != HT_T_A_LOG && t->role != HT_T_DT_BIAS)
                *v += 0.3f * ht_rng_normal(1, (uint64_t)k, (uint64_t)i);
            if (dtype == HT_DTYPE_BF16 && t->matrix) *v = ht_bf16_to_f32(ht_f32_to_bf16(*v));
        }
    }
    ht_convert(w->m->matrix, dtype, w->flat, HT_DTYPE_F32, l->n_matrix);
    memcpy(w->m->vector, w->flat + l->n_matrix, (size_t)(l->n_total - l->n_matrix) * sizeof(float));
    for (int64_t i = 0; i < l->n_total; i++) w->flat64[i] = (double)w->flat[i];

    w->starts[1] = 18, w->starts[2] = 19, w->starts[3] = T; // three documents: 18, 1 and 22 tokens
    int s = 0;
    for (int t = 0; t < T; t++) {
        if (t == w->starts[s + 1]) s++;
        w->ids[t] = (int32_t)(ht_rng_u64(3, 1, (uint64_t)t) % (uint64_t)c.vocab_size);
        w->pos[t] = t - w->starts[s];
    }
    for (int t = 0; t < T; t++) {
        const bool last = t + 1 == T || t + 1 == w->starts[1] || t + 1 == w->starts[2];
        w->labels[t] = last ? -1 : w->ids[t + 1];
    }
    return w;
}

static void bind(struct world *w)
{
    w->b = (struct ht_model_batch){ T, w->ids, w->labels, w->pos, { 3, w->starts }, NULL };
}

static void free_world(struct world *w)
{
    ht_model_free(w->m);
    ht_backend_free(&w->be);
    free(w->flat);
    free(w->flat64);
    free(w);
}

static float *train(struct world *w, enum ht_recompute recompute, struct ht_loss *loss)
{
    struct ht_acts *acts;
    float *grads = calloc((size_t)w->m->list.n_total, sizeof(float));

    ck_assert_msg(ht_acts_create(&acts, w->m, recompute, false, T) == HT_OK, "%s",
                  ht_error_message());
    ck_assert_msg(ht_model_train(w->m, acts, &w->b, 0.1f, 1e-2f, grads, loss, NULL, NULL) == HT_OK,
                  "%s", ht_error_message());
    ht_acts_free(acts);
    return grads;
}

/* _i: variant. Up to five elements of every tensor against central differences of the double
 * reference. */
START_TEST(gradients_match_central_differences)
{
    struct world *w = make_world(_i, HT_DTYPE_F32, 1);
    struct ht_loss loss;
    bind(w);
    float *grads = train(w, HT_RECOMPUTE_NONE, &loss);
    const double ref = model_ref_loss(&w->m->cfg, &w->m->list, w->flat64, &w->b, 0.0, NULL);

    ck_assert_double_le(fabs(loss.loss_sum - ref), 1e-5 * fabs(ref));
    ck_assert_int_eq(loss.n_counted, T - 3);
    for (int k = 0; k < w->m->list.n_tensors; k++) {
        const struct ht_tensor_info *t = &w->m->list.tensors[k];
        double scale = 0.0;
        for (int64_t i = 0; i < t->n; i++) scale = fmax(scale, fabs((double)grads[t->offset + i]));
        ck_assert_msg(scale > 0.0, "gradient of %s is all zero", t->name);
        for (int j = 0; j < 5; j++) {
            const int64_t i =
                t->offset + (int64_t)(ht_rng_u64(5, (uint64_t)k, (uint64_t)j) % (uint64_t)t->n);
            const double at = w->flat64[i], step = 1e-5 * fmax(1.0, fabs(at));
            w->flat64[i] = at + step;
            const double up = model_ref_loss(&w->m->cfg, &w->m->list, w->flat64, &w->b, 1e-2, NULL);
            w->flat64[i] = at - step;
            const double down =
                model_ref_loss(&w->m->cfg, &w->m->list, w->flat64, &w->b, 1e-2, NULL);
            w->flat64[i] = at;
            const double want = 0.1 * (up - down) / (2.0 * step);
            ck_assert_msg(fabs(want - (double)grads[i]) <= 2e-4 * scale + 2e-7,
                          "%s[%lld]: gradient %.9g, reference %.9g, largest of the tensor %.3g",
                          t->name, (long long)(i - t->offset), (double)grads[i], want, scale);
        }
    }
    free(grads);
    free_world(w);
}
END_TEST

START_TEST(recompute_levels_give_the_same_bits)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct world *w = make_world(_i, (enum ht_dtype)dtype, 2);
        struct ht_loss loss[3];
        float *grads[3];
        bind(w);
        for (int r = 0; r < 3; r++) grads[r] = train(w, (enum ht_recompute)r, &loss[r]);
        for (int r = 1; r < 3; r++) {
            ck_assert(loss[r].loss_sum == loss[0].loss_sum);
            ck_assert_int_eq(memcmp(grads[r], grads[0], (size_t)w->m->list.n_total * sizeof(float)),
                             0);
        }
        for (int r = 0; r < 3; r++) free(grads[r]);
        free_world(w);
    }
}
END_TEST

/* Only activations differ: about twenty roundings of 2^-9 lie between a weight and the loss, in
 * random directions: 2^-9 * sqrt(20) = 1 % over all gradients together, of which three times is
 * allowed. Vectors of a few elements (D, A_log, dt_bias) are sums of cancelling terms and may lose
 * more: 15 %. */
START_TEST(bf16_loss_and_gradients_are_close)
{
    struct world *w = make_world(_i, HT_DTYPE_BF16, 1);
    struct world *f = make_world(_i, HT_DTYPE_F32, 1);
    struct ht_loss loss, loss32;
    bind(w);
    bind(f);
    // the fp32 model gets the bf16 model's rounded weights: only activations differ
    memcpy(f->m->matrix, w->flat, (size_t)w->m->list.n_matrix * sizeof(float));
    float *g16 = train(w, HT_RECOMPUTE_NONE, &loss), *g32 = train(f, HT_RECOMPUTE_NONE, &loss32);

    ck_assert_double_le(fabs(loss.loss_sum - loss32.loss_sum) / 38.0, 0.02);
    double all_diff = 0.0, all_norm = 0.0;
    for (int k = 0; k < w->m->list.n_tensors; k++) {
        const struct ht_tensor_info *t = &w->m->list.tensors[k];
        double diff = 0.0, norm = 0.0;
        for (int64_t i = t->offset; i < t->offset + t->n; i++) {
            diff += pow((double)g16[i] - (double)g32[i], 2.0);
            norm += pow((double)g32[i], 2.0);
        }
        all_diff += diff;
        all_norm += norm;
        ck_assert_msg(diff <= 0.15 * 0.15 * norm, "%s: relative error of the gradient %.3f",
                      t->name, sqrt(diff / norm));
    }
    ck_assert_msg(all_diff <= 0.03 * 0.03 * all_norm, "relative error of all gradients %.3f",
                  sqrt(all_diff / all_norm));
    free(g16);
    free(g32);
    free_world(w);
    free_world(f);
}
END_TEST

/* Accumulated gradients of separate documents equal those of the packed row. */
START_TEST(packed_row_equals_separate_sequences)
{
    struct world *w = make_world(_i, HT_DTYPE_F32, 1);
    struct ht_loss packed, part;
    struct ht_acts *acts;
    float *sum = calloc((size_t)w->m->list.n_total, sizeof(float));
    double total = 0.0;
    bind(w);
    float *grads = train(w, HT_RECOMPUTE_NONE, &packed);

    ck_assert_int_eq(ht_acts_create(&acts, w->m, HT_RECOMPUTE_NONE, false, T), HT_OK);
    for (int s = 0; s < 3; s++) {
        const int32_t from = w->starts[s], one[2] = { 0, w->starts[s + 1] - from };
        const struct ht_model_batch b = { one[1],        w->ids + from, w->labels + from,
                                          w->pos + from, { 1, one },    NULL };
        ck_assert_int_eq(ht_model_train(w->m, acts, &b, 0.1f, 1e-2f, sum, &part, NULL, NULL),
                         HT_OK);
        total += part.loss_sum;
    }
    ck_assert_double_le(fabs(total - packed.loss_sum), 1e-5 * fabs(total));
    for (int k = 0; k < w->m->list.n_tensors; k++) {
        const struct ht_tensor_info *t = &w->m->list.tensors[k];
        double scale = 0.0;
        for (int64_t i = t->offset; i < t->offset + t->n; i++)
            scale = fmax(scale, fabs((double)grads[i]));
        for (int64_t i = t->offset; i < t->offset + t->n; i++)
            ck_assert_double_le(fabs((double)grads[i] - (double)sum[i]), 2e-5 * scale + 1e-9);
    }
    ht_acts_free(acts);
    free(sum);
    free(grads);
    free_world(w);
}
END_TEST

START_TEST(threads_and_repeats_give_the_same_bits)
{
    struct world *a = make_world(_i, HT_DTYPE_BF16, 2), *b = make_world(_i, HT_DTYPE_BF16, 2);
    struct ht_loss la, lb;
    bind(a);
    bind(b);
    float *ga = train(a, HT_RECOMPUTE_SELECTIVE, &la), *gb = train(b, HT_RECOMPUTE_SELECTIVE, &lb);
    ck_assert(la.loss_sum == lb.loss_sum);
    ck_assert_int_eq(memcmp(ga, gb, (size_t)a->m->list.n_total * sizeof(float)), 0);
    free(ga);
    free(gb);
    free_world(a);
    free_world(b);
}
END_TEST

/* Logits after any split of a prompt, and after single steps, equal the reference's last row. */
START_TEST(prefill_and_decode_match_the_forward_pass)
{
    static const int splits[][6] = {
        { T }, { 1, 40 }, { 16, 16, 9 }, { 5, 1, 2, 1, 1, 31 }, { 40, 1 }
    };
    struct world *w = make_world(_i, HT_DTYPE_F32, 2);
    const int64_t V = w->m->cfg.vocab_size;
    const int32_t whole[2] = { 0, T };
    double *logits = calloc((size_t)(T * V), sizeof *logits);
    float *got = calloc((size_t)V, sizeof *got);
    struct ht_decoder *d;
    struct ht_state *s;

    for (int t = 0; t < T; t++) w->pos[t] = t;
    w->b = (struct ht_model_batch){ T, w->ids, NULL, w->pos, { 1, whole }, NULL };
    model_ref_loss(&w->m->cfg, &w->m->list, w->flat64, &w->b, 0.0, logits);
    ck_assert_int_eq(ht_decoder_create(&d, w->m, 32), HT_OK);
    ck_assert_int_eq(ht_state_create(&s, w->m, 64), HT_OK);
    for (size_t k = 0; k < sizeof splits / sizeof *splits; k++) {
        int64_t done = 0;
        ht_state_reset(s);
        for (int j = 0; j < 6 && splits[k][j]; j++) {
            ck_assert_msg(ht_decoder_extend(d, s, w->ids + done, splits[k][j], got) == HT_OK, "%s",
                          ht_error_message());
            done += splits[k][j];
            double top = 0.0, err = 0.0;
            for (int64_t v = 0; v < V; v++) {
                const double ref = logits[(done - 1) * V + v];
                top = fmax(top, fabs(ref));
                err = fmax(err, fabs(ref - (double)got[v]));
            }
            ck_assert_msg(err <= 2e-5 * top, "split %zu, after %lld tokens: error %.3g of %.3g", k,
                          (long long)done, err, top);
        }
        ck_assert_int_eq(done, T);
        ck_assert_int_eq(ht_state_n_tokens(s), T);
    }
    // beyond the capacity, and an id outside the vocabulary
    ck_assert_int_eq(ht_decoder_extend(d, s, w->ids, 24, got), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "64"));
    const int32_t bad = (int32_t)V;
    ck_assert_int_eq(ht_decoder_extend(d, s, &bad, 1, got), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "97"));
    ht_state_free(s);
    ht_decoder_free(d);
    free(logits);
    free(got);
    free_world(w);
}
END_TEST

/* Scores of a sequence longer than a block equal the reference's log-probabilities. */
START_TEST(scores_match_the_reference)
{
    struct world *w = make_world(_i, HT_DTYPE_F32, 2);
    const int64_t V = w->m->cfg.vocab_size;
    const int32_t whole[2] = { 0, T };
    double *logits = calloc((size_t)(T * V), sizeof *logits);
    float got[T];
    struct ht_decoder *d;
    struct ht_state *s;

    for (int t = 0; t < T; t++) w->pos[t] = t;
    w->b = (struct ht_model_batch){ T, w->ids, NULL, w->pos, { 1, whole }, NULL };
    model_ref_loss(&w->m->cfg, &w->m->list, w->flat64, &w->b, 0.0, logits);
    ck_assert_int_eq(ht_decoder_create(&d, w->m, 16), HT_OK);
    ck_assert_int_eq(ht_state_create(&s, w->m, 64), HT_OK);
    ck_assert_msg(ht_decoder_score(d, s, w->ids, T, got) == HT_OK, "%s", ht_error_message());
    ck_assert(got[0] == 0.0f);
    for (int t = 1; t < T; t++) {
        const double *row = logits + (t - 1) * V;
        double sum = 0.0;
        for (int64_t v = 0; v < V; v++) sum += exp(row[v]);
        const double want = row[w->ids[t]] - log(sum);
        ck_assert_double_le(fabs(want - (double)got[t]), 1e-4 * fmax(1.0, fabs(want)));
    }
    ck_assert_int_eq(ht_decoder_score(d, s, w->ids, 1, got), HT_ERR_ARG); // not empty any more
    ht_state_free(s);
    ht_decoder_free(d);
    free(logits);
    free_world(w);
}
END_TEST

/* The initial values of any range equal those of the whole. */
START_TEST(initial_values_do_not_depend_on_the_range)
{
    struct world *w = make_world(0, HT_DTYPE_F32, 1);
    const int64_t n = w->m->list.n_total;
    float *whole = calloc((size_t)n, sizeof *whole), *parts = calloc((size_t)n, sizeof *parts);

    ht_params_init(whole, &w->m->cfg, &w->m->list, 11, 0, n);
    for (int64_t at = 0, k = 1; at < n; at += 1000 + k * 37, k++)
        ht_params_init(parts + at, &w->m->cfg, &w->m->list, 11, at,
                       n - at < 1000 + k * 37 ? n - at : 1000 + k * 37);
    ck_assert_int_eq(memcmp(whole, parts, (size_t)n * sizeof *whole), 0);
    free(whole);
    free(parts);
    free_world(w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("model");
    TCase *c = tcase_create("model");
    SRunner *r = srunner_create(s);

    tcase_set_timeout(c, 120);
    suite_add_tcase(s, c);
    tcase_add_loop_test(c, gradients_match_central_differences, 0, 4);
    tcase_add_loop_test(c, recompute_levels_give_the_same_bits, 0, 4);
    tcase_add_loop_test(c, bf16_loss_and_gradients_are_close, 0, 4);
    tcase_add_loop_test(c, packed_row_equals_separate_sequences, 0, 4);
    tcase_add_loop_test(c, threads_and_repeats_give_the_same_bits, 0, 4);
    tcase_add_loop_test(c, prefill_and_decode_match_the_forward_pass, 0, 4);
    tcase_add_loop_test(c, scores_match_the_reference, 0, 4);
    tcase_add_test(c, initial_values_do_not_depend_on_the_range);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
