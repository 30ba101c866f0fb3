/* tests/golden/test_hf_models.c: logits, loss and gradients of Hugging Face transformers on small
 * random models (tests/golden/hf/generate.py; versions beside the fixtures), computed in fp32 by
 * both. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "checkpoints/safetensors.h"
#include "checkpoints/weights.h"
#include "core/model/decode.h"

static const char *const folders[] = { "bamba", "mamba2", "llama" };

struct golden {
    struct ht_weights *weights;
    struct ht_safetensors *expected;
    struct ht_backend be;
    struct ht_model *m;
    int64_t n_tokens;
    int32_t ids[256], labels[256], pos[256];
};

static const struct ht_safetensors_tensor *want(const struct golden *g, const char *name)
{
    const struct ht_safetensors_tensor *t = ht_safetensors_find(g->expected, name);
    ck_assert_msg(t && t->dtype == HT_DTYPE_F32, "no %s in expected.safetensors", name);
    return t;
}

static struct golden *open_golden(const char *name)
{
    struct golden *g = calloc(1, sizeof *g); // the model keeps the address of its backend
    char path[1024];

    snprintf(path, sizeof path, "%s/tests/golden/hf/%s", HT_SOURCE_DIR, name);
    ck_assert_msg(ht_weights_open(&g->weights, path, NULL) == HT_OK, "%s", ht_error_message());
    snprintf(path, sizeof path, "%s/tests/golden/hf/%s/expected.safetensors", HT_SOURCE_DIR, name);
    ck_assert_msg(ht_safetensors_open(&g->expected, path) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_backend_create_cpu(&g->be, 2, 1 << 20), HT_OK);
    ck_assert_msg(ht_model_create(&g->m, &g->be, ht_weights_model(g->weights), HT_DTYPE_F32,
                                  HT_DECAY_MATRICES, 0, 0, 128) == HT_OK,
                  "%s", ht_error_message());
    ck_assert_msg(ht_weights_load(g->weights, &g->m->list, g->m->matrix, HT_DTYPE_F32, g->m->vector,
                                  NULL) == HT_OK,
                  "%s", ht_error_message());
    const struct ht_safetensors_tensor *ids = want(g, "ids");
    g->n_tokens = ids->n;
    for (int64_t t = 0; t < ids->n; t++) {
        g->ids[t] = (int32_t)((const float *)ids->data)[t];
        g->pos[t] = (int32_t)t;
    }
    for (int64_t t = 0; t < ids->n; t++) g->labels[t] = t + 1 < ids->n ? g->ids[t + 1] : -1;
    return g;
}

static void close_golden(struct golden *g)
{
    ht_model_free(g->m);
    ht_backend_free(&g->be);
    ht_safetensors_close(g->expected);
    ht_weights_close(g->weights);
    free(g);
}

/* Largest difference against the tensor's largest value. */
static double error_of(const float *got, const struct ht_safetensors_tensor *t)
{
    const float *ref = t->data;
    double err = 0.0, top = 1e-30;
    for (int64_t i = 0; i < t->n; i++) {
        err = fmax(err, fabs((double)got[i] - (double)ref[i]));
        top = fmax(top, fabs((double)ref[i]));
    }
    return err / top;
}

/* Both sides sum in fp32 in different orders through a few layers: 1e-5 of the largest value. */
START_TEST(loss_and_gradients_match)
{
    struct golden *g = open_golden(folders[_i]);
    float *grads = calloc((size_t)g->m->list.n_total, sizeof(float));
    const int32_t starts[2] = { 0, (int32_t)g->n_tokens };
    const struct ht_model_batch b = { g->n_tokens, g->ids, g->labels, g->pos, { 1, starts }, NULL };
    struct ht_acts *acts;
    struct ht_loss loss;

    ck_assert_int_eq(ht_acts_create(&acts, g->m, HT_RECOMPUTE_NONE, false, g->n_tokens), HT_OK);
    ck_assert_msg(ht_model_train(g->m, acts, &b, 1.0f / (float)(g->n_tokens - 1), 0.0f, grads,
                                 &loss, NULL, NULL) == HT_OK,
                  "%s", ht_error_message());
    const double mean = loss.loss_sum / (double)loss.n_counted;
    const double ref = (double)*(const float *)want(g, "loss")->data;
    ck_assert_msg(fabs(mean - ref) <= 1e-5 * ref, "loss %.7f, Hugging Face %.7f", mean, ref);
    for (int k = 0; k < g->m->list.n_tensors; k++) {
        const struct ht_tensor_info *t = &g->m->list.tensors[k];
        char name[128];
        snprintf(name, sizeof name, "grad.%s", t->name);
        const struct ht_safetensors_tensor *w = want(g, name);
        ck_assert_int_eq(w->n, t->n);
        const double err = error_of(grads + t->offset, w);
        ck_assert_msg(err <= 5e-5, "%s: relative error of the gradient %.2e", t->name, err);
    }
    ht_acts_free(acts);
    free(grads);
    close_golden(g);
}
END_TEST

START_TEST(logits_match_step_by_step_and_as_prefill)
{
    struct golden *g = open_golden(folders[_i]);
    const struct ht_safetensors_tensor *logits = want(g, "logits");
    const int64_t V = g->m->cfg.vocab_size;
    float *got = calloc((size_t)logits->n, sizeof(float));
    struct ht_decoder *d;
    struct ht_state *s;

    ck_assert_int_eq(ht_decoder_create(&d, g->m, 32), HT_OK);
    ck_assert_int_eq(ht_state_create(&s, g->m, 128), HT_OK);
    for (int64_t t = 0; t < g->n_tokens; t++)
        ck_assert_int_eq(ht_decoder_extend(d, s, g->ids + t, 1, got + t * V), HT_OK);
    ck_assert_msg(error_of(got, logits) <= 2e-5, "decode: error %.2e", error_of(got, logits));
    ht_state_reset(s);
    ck_assert_int_eq(ht_decoder_extend(d, s, g->ids, g->n_tokens, got), HT_OK);
    struct ht_safetensors_tensor last = *logits;
    last.data = (const float *)logits->data + (g->n_tokens - 1) * V;
    last.n = V;
    ck_assert_msg(error_of(got, &last) <= 2e-5, "prefill: error %.2e", error_of(got, &last));
    ht_state_free(s);
    ht_decoder_free(d);
    free(got);
    close_golden(g);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("Hugging Face models");
    TCase *c = tcase_create("golden");
    SRunner *r = srunner_create(s);

    suite_add_tcase(s, c);
    tcase_add_loop_test(c, loss_and_gradients_match, 0, 3);
    tcase_add_loop_test(c, logits_match_step_by_step_and_as_prefill, 0, 3);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
