/* tests/core/config/test_tensor_list.c: counts of published models, names, shapes, the flat order.
 */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/tensor_list.h"
#include "tests/core/config/config_case.h"

static struct ht_config c;

static struct ht_tensor_list list_of(const char *model, enum ht_decay_rule rule)
{
    struct ht_tensor_list l;

    case_config(&c, model);
    ck_assert_msg(ht_tensor_list_create(&l, &c.model, rule) == HT_OK, "%s", ht_error_message());
    return l;
}

START_TEST(totals_are_the_published_ones)
{
    struct ht_tensor_list l = list_of(published[_i].model, HT_DECAY_MATRICES);

    ck_assert_int_eq(l.n_params, published[_i].n_params);
    ck_assert_int_eq(l.n_tensors, published[_i].n_tensors);
    ht_tensor_list_free(&l);
}
END_TEST

static const struct {
    int model;
    const char *name;
    int64_t shape[3];
} named[] = {
    { 0, "model.embed_tokens.weight", { 128256, 4096 } },
    { 0, "model.layers.0.mamba.in_proj.weight", { 16768, 4096 } },
    { 0, "model.layers.0.mamba.conv1d.weight", { 8448, 1, 4 } },
    { 0, "model.layers.0.mamba.conv1d.bias", { 8448 } },
    { 0, "model.layers.31.mamba.dt_bias", { 128 } },
    { 0, "model.layers.31.mamba.A_log", { 128 } },
    { 0, "model.layers.31.mamba.D", { 128 } },
    { 0, "model.layers.31.mamba.norm.weight", { 8192 } },
    { 0, "model.layers.31.mamba.out_proj.weight", { 4096, 8192 } },
    { 0, "model.layers.9.self_attn.q_proj.weight", { 4096, 4096 } },
    { 0, "model.layers.18.self_attn.k_proj.weight", { 1024, 4096 } },
    { 0, "model.layers.27.self_attn.v_proj.weight", { 1024, 4096 } },
    { 0, "model.layers.27.self_attn.o_proj.weight", { 4096, 4096 } },
    { 0, "model.layers.5.feed_forward.gate_proj.weight", { 14336, 4096 } },
    { 0, "model.layers.5.feed_forward.up_proj.weight", { 14336, 4096 } },
    { 0, "model.layers.5.feed_forward.down_proj.weight", { 4096, 14336 } },
    { 0, "model.layers.5.input_layernorm.weight", { 4096 } },
    { 0, "model.layers.5.pre_ff_layernorm.weight", { 4096 } },
    { 0, "model.final_layernorm.weight", { 4096 } },
    { 0, "lm_head.weight", { 128256, 4096 } },
    { 1, "backbone.embeddings.weight", { 32768, 4096 } },
    { 1, "backbone.embedding.weight", { 32768, 4096 } }, // older files
    { 1, "backbone.layers.63.norm.weight", { 4096 } },
    { 1, "backbone.layers.63.mixer.norm.weight", { 8192 } },
    { 1, "backbone.layers.63.mixer.in_proj.weight", { 18560, 4096 } },
    { 1, "backbone.norm_f.weight", { 4096 } },
    { 3, "model.layers.0.mlp.gate_proj.weight", { 14336, 4096 } },
    { 3, "model.layers.0.post_attention_layernorm.weight", { 4096 } },
    { 3, "model.norm.weight", { 4096 } },
};

START_TEST(names_and_shapes_are_hugging_faces)
{
    struct ht_tensor_list l = list_of(published[named[_i].model].model, HT_DECAY_MATRICES);
    const struct ht_tensor_info *t = ht_tensor_find_name(&l, named[_i].name);
    int64_t n = 1;
    int n_dims = 0;

    ck_assert_msg(t != NULL, "%s is not in the list", named[_i].name);
    for (; n_dims < 3 && named[_i].shape[n_dims]; n_dims++) {
        ck_assert_int_eq(t->shape[n_dims], named[_i].shape[n_dims]);
        n *= named[_i].shape[n_dims];
    }
    ck_assert_int_eq(t->n_dims, n_dims);
    ck_assert_int_eq(t->n, n);
    ck_assert_ptr_eq(ht_tensor_find(&l, t->layer, t->role), t);
    ck_assert_ptr_null(ht_tensor_find_name(&l, "model.layers.32.input_layernorm.weight"));
    ht_tensor_list_free(&l);
}
END_TEST

/* Small sizes whose element counts are not multiples of 64. */
static const char *const ragged[] = {
    "arch = \"bamba\"; vocab_size = 97; d_model = 40; n_layers = 5; n_heads = 4; d_head = 16;"
    "n_kv_heads = 2; attention_layers = [1, 4]; ssm_d_head = 8; d_state = 8; d_ff = 72;",
    "arch = \"bamba\"; vocab_size = 97; d_model = 40; n_layers = 3; ssm_d_head = 8; d_state = 8;"
    "d_ff = 72; tied_head = true; conv_bias = false;",
    "arch = \"mamba2\"; vocab_size = 5; d_model = 20; n_layers = 2; ssm_d_head = 8; d_state = 8;",
    "arch = \"llama\"; vocab_size = 7; d_model = 24; n_layers = 3; n_heads = 4; d_head = 8;"
    "n_kv_heads = 4; d_ff = 40;",
};

static int64_t up64(int64_t n)
{
    return (n + 63) / 64 * 64;
}

START_TEST(flat_order_has_no_overlap_and_no_needless_gap)
{
    struct ht_tensor_list l = list_of(ragged[_i], HT_DECAY_MATRICES);
    int64_t next = 0, n_params = 0;
    bool vectors = false;

    for (int k = 0; k < l.n_tensors; k++) {
        const struct ht_tensor_info *t = &l.tensors[k];
        if (!t->matrix && !vectors) {
            ck_assert_int_eq(next, l.n_matrix);
            vectors = true;
        }
        ck_assert(t->matrix == !vectors);
        ck_assert_int_eq(t->offset % 64, 0);
        ck_assert_int_eq(t->offset, next);
        next = up64(t->offset + t->n);
        n_params += t->n;
    }
    ck_assert_int_eq(next, l.n_total);
    ck_assert_int_eq(n_params, l.n_params);
    ck_assert_int_eq(l.n_matrix % 64, 0);
    ht_tensor_list_free(&l);
}
END_TEST

START_TEST(layers_stand_in_order_between_embedding_and_head)
{
    struct ht_tensor_list l = list_of(ragged[_i], HT_DECAY_MATRICES);
    const int n_layers = (int)c.model.n_layers;
    const struct ht_tensor_info *head = ht_tensor_find(&l, -1, HT_T_HEAD);

    ck_assert_int_eq(ht_tensor_find(&l, -1, HT_T_EMBED)->offset, 0);
    ck_assert(c.model.tied_head == (head == NULL));
    ck_assert_int_eq(l.layer_start[n_layers], head ? head->offset : l.n_matrix);
    for (int i = 0; i < n_layers; i++) {
        const bool attention = c.model.layer_kind[i] == HT_LAYER_ATTENTION;
        ck_assert_int_lt(l.layer_start[i], l.layer_start[i + 1]);
        for (int role = 0; role < HT_T_ROLE_COUNT; role++) {
            const struct ht_tensor_info *t = ht_tensor_find(&l, i, (enum ht_tensor_role)role);
            if (!t) continue;
            ck_assert_int_eq(t->layer, i);
            ck_assert_int_eq((int)t->role, role);
            if (!t->matrix) continue;
            ck_assert_int_ge(t->offset, l.layer_start[i]);
            ck_assert_int_le(t->offset + t->n, l.layer_start[i + 1]);
        }
        ck_assert(attention == (ht_tensor_find(&l, i, HT_T_Q) != NULL));
        ck_assert(attention == (ht_tensor_find(&l, i, HT_T_IN_PROJ) == NULL));
        ck_assert((c.model.d_ff > 0) == (ht_tensor_find(&l, i, HT_T_NORM2) != NULL));
    }
    ht_tensor_list_free(&l);
}
END_TEST

START_TEST(joint_matrices_have_no_gap)
{
    struct ht_tensor_list l = list_of(ragged[0], HT_DECAY_MATRICES);
    const struct ht_tensor_info *q = ht_tensor_find(&l, 1, HT_T_Q),
                                *k = ht_tensor_find(&l, 1, HT_T_K);
    const struct ht_tensor_info *v = ht_tensor_find(&l, 1, HT_T_V);
    const struct ht_tensor_info *gate = ht_tensor_find(&l, 0, HT_T_GATE);

    ck_assert_int_eq(k->offset, q->offset + q->n);
    ck_assert_int_eq(v->offset, k->offset + k->n);
    ck_assert_int_eq(ht_tensor_find(&l, 0, HT_T_UP)->offset, gate->offset + gate->n);
    ht_tensor_list_free(&l);
}
END_TEST

START_TEST(sizes_that_would_leave_a_gap_are_refused)
{
    struct ht_tensor_list l;

    case_config(&c, ragged[0]);
    c.model.d_ff = 71;
    ck_assert_int_eq(ht_tensor_list_create(&l, &c.model, HT_DECAY_ALL), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "d_ff * d_model is 2840"));
    ck_assert_ptr_null(l.tensors);
}
END_TEST

/* Spec 5. */
START_TEST(decay_follows_the_rule)
{
    static const enum ht_tensor_role ssm[] = { HT_T_A_LOG, HT_T_D, HT_T_DT_BIAS };
    static const enum ht_tensor_role plain[] = { HT_T_NORM1, HT_T_NORM2, HT_T_GATED_NORM,
                                                 HT_T_CONV_B };
    static const enum ht_tensor_role decays[] = { HT_T_IN_PROJ, HT_T_OUT_PROJ, HT_T_GATE,
                                                  HT_T_CONV_W };
    struct ht_tensor_list m = list_of(ragged[0], HT_DECAY_MATRICES);
    struct ht_tensor_list a = list_of(ragged[0], HT_DECAY_ALL);
    struct ht_tensor_list s = list_of(ragged[0], HT_DECAY_SSM_EXEMPT);

    for (int k = 0; k < a.n_tensors; k++) ck_assert(a.tensors[k].decay);
    for (size_t i = 0; i < 3; i++) {
        ck_assert(!ht_tensor_find(&m, 0, ssm[i])->decay);
        ck_assert(!ht_tensor_find(&s, 0, ssm[i])->decay);
    }
    for (size_t i = 0; i < 4; i++) {
        ck_assert(!ht_tensor_find(&m, 0, plain[i])->decay);
        ck_assert(ht_tensor_find(&s, 0, plain[i])->decay);
        ck_assert(ht_tensor_find(&m, 0, decays[i])->decay);
    }
    ck_assert(ht_tensor_find(&m, -1, HT_T_EMBED)->decay);
    ck_assert(!ht_tensor_find(&m, -1, HT_T_FINAL_NORM)->decay);
    ht_tensor_list_free(&m);
    ht_tensor_list_free(&a);
    ht_tensor_list_free(&s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tensor_list");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_loop_test(t, totals_are_the_published_ones, 0, n_published);
    tcase_add_loop_test(t, names_and_shapes_are_hugging_faces, 0, sizeof named / sizeof *named);
    tcase_add_loop_test(t, flat_order_has_no_overlap_and_no_needless_gap, 0, 4);
    tcase_add_loop_test(t, layers_stand_in_order_between_embedding_and_head, 0, 4);
    tcase_add_test(t, joint_matrices_have_no_gap);
    tcase_add_test(t, sizes_that_would_leave_a_gap_are_refused);
    tcase_add_test(t, decay_follows_the_rule);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
