/* core/config/tensor_list.c: names, shapes and offsets of a model's tensors (spec 2.2, 2.4, 2.5).
 */
#include "core/config/tensor_list.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What stands before ".weight" and the like, by naming scheme. */
struct names {
    const char *embed, *layer, *final_norm; // layer: prefix with the layer's number
    const char *norm1, *norm2, *mamba, *attention, *mlp;
};

static const struct names all_names[] = {
    [HT_NAMING_BAMBA] = { "model.embed_tokens", "model.layers", "model.final_layernorm",
                          "input_layernorm", "pre_ff_layernorm", "mamba", "self_attn",
                          "feed_forward" },
    [HT_NAMING_LLAMA] = { "model.embed_tokens", "model.layers", "model.norm", "input_layernorm",
                          "post_attention_layernorm", "mamba", "self_attn", "mlp" },
    [HT_NAMING_MAMBA2] = { "backbone.embeddings", "backbone.layers", "backbone.norm_f", "norm",
                           "norm2", "mixer", "mixer", "mlp" },
};

static const char *const role_names[HT_T_ROLE_COUNT] = {
    [HT_T_IN_PROJ] = "in_proj.weight",
    [HT_T_OUT_PROJ] = "out_proj.weight",
    [HT_T_CONV_W] = "conv1d.weight",
    [HT_T_CONV_B] = "conv1d.bias",
    [HT_T_DT_BIAS] = "dt_bias",
    [HT_T_A_LOG] = "A_log",
    [HT_T_D] = "D",
    [HT_T_GATED_NORM] = "norm.weight",
    [HT_T_Q] = "q_proj.weight",
    [HT_T_K] = "k_proj.weight",
    [HT_T_V] = "v_proj.weight",
    [HT_T_O] = "o_proj.weight",
    [HT_T_GATE] = "gate_proj.weight",
    [HT_T_UP] = "up_proj.weight",
    [HT_T_DOWN] = "down_proj.weight",
};

struct builder {
    struct ht_tensor_list *list;
    const struct names *names;
    enum ht_decay_rule rule;
    int64_t next; // first free offset
};

/* Spec 5: the authors' marks, the rule of the Bamba runs, and the later variant. */
static bool decays(enum ht_decay_rule rule, enum ht_tensor_role role)
{
    const bool ssm = role == HT_T_A_LOG || role == HT_T_D || role == HT_T_DT_BIAS;

    switch (rule) {
    case HT_DECAY_ALL: return true;
    case HT_DECAY_SSM_EXEMPT: return !ssm;
    case HT_DECAY_MATRICES: break;
    }
    return !ssm && role != HT_T_CONV_B && role != HT_T_NORM1 && role != HT_T_NORM2 &&
           role != HT_T_FINAL_NORM && role != HT_T_GATED_NORM;
}

static void set_name(struct ht_tensor_info *t, const struct names *n)
{
    const char *const base = role_names[t->role];

    switch (t->role) {
    case HT_T_EMBED: snprintf(t->name, sizeof t->name, "%s.weight", n->embed); return;
    case HT_T_HEAD: snprintf(t->name, sizeof t->name, "lm_head.weight"); return;
    case HT_T_FINAL_NORM: snprintf(t->name, sizeof t->name, "%s.weight", n->final_norm); return;
    case HT_T_NORM1:
    case HT_T_NORM2:
        snprintf(t->name, sizeof t->name, "%s.%d.%s.weight", n->layer, t->layer,
                 t->role == HT_T_NORM1 ? n->norm1 : n->norm2);
        return;
    default: break;
    }
    const char *part = n->mamba;
    if (t->role >= HT_T_Q && t->role <= HT_T_O) part = n->attention;
    if (t->role >= HT_T_GATE && t->role <= HT_T_DOWN) part = n->mlp;
    snprintf(t->name, sizeof t->name, "%s.%d.%s.%s", n->layer, t->layer, part, base);
}

/* rows x cols; cols 0 for a vector. The convolution keeps the middle dimension of its file format.
 */
static void add(struct builder *b, int layer, enum ht_tensor_role role, bool matrix, int64_t rows,
                int64_t cols)
{
    struct ht_tensor_list *l = b->list;
    struct ht_tensor_info *t = &l->tensors[l->n_tensors];

    t->role = role;
    t->layer = layer;
    t->matrix = matrix;
    t->shape[0] = rows;
    t->n_dims = 1;
    t->n = rows;
    if (role == HT_T_CONV_W) t->shape[t->n_dims++] = 1;
    if (cols) {
        t->shape[t->n_dims++] = cols;
        t->n *= cols;
    }
    t->offset = b->next;
    t->decay = decays(b->rule, role);
    set_name(t, b->names);
    l->n_params += t->n;
    b->next += (t->n + 63) / 64 * 64;
    l->index[layer][role] = l->n_tensors++;
}

static void add_layer_matrices(struct builder *b, const struct ht_model_config *m, int i)
{
    if (m->layer_kind[i] == HT_LAYER_MAMBA) {
        add(b, i, HT_T_IN_PROJ, true, ht_in_proj_width(m), m->d_model);
        add(b, i, HT_T_OUT_PROJ, true, m->d_model, m->d_inner);
    } else {
        add(b, i, HT_T_Q, true, m->n_heads * m->d_head, m->d_model);
        add(b, i, HT_T_K, true, m->n_kv_heads * m->d_head, m->d_model);
        add(b, i, HT_T_V, true, m->n_kv_heads * m->d_head, m->d_model);
        add(b, i, HT_T_O, true, m->d_model, m->n_heads * m->d_head);
    }
    if (m->d_ff) {
        add(b, i, HT_T_GATE, true, m->d_ff, m->d_model);
        add(b, i, HT_T_UP, true, m->d_ff, m->d_model);
        add(b, i, HT_T_DOWN, true, m->d_model, m->d_ff);
    }
}

static void add_layer_vectors(struct builder *b, const struct ht_model_config *m, int i)
{
    add(b, i, HT_T_NORM1, false, m->d_model, 0);
    if (m->layer_kind[i] == HT_LAYER_MAMBA) {
        add(b, i, HT_T_CONV_W, false, ht_conv_channels(m), m->d_conv);
        if (m->conv_bias) add(b, i, HT_T_CONV_B, false, ht_conv_channels(m), 0);
        add(b, i, HT_T_DT_BIAS, false, m->ssm_heads, 0);
        add(b, i, HT_T_A_LOG, false, m->ssm_heads, 0);
        add(b, i, HT_T_D, false, m->ssm_heads, 0);
        add(b, i, HT_T_GATED_NORM, false, m->d_inner, 0);
    }
    if (m->d_ff) add(b, i, HT_T_NORM2, false, m->d_model, 0);
}

/* q, k, v and gate, up are read as one matrix each, so no padding may fall between them. */
static enum ht_status check_adjacent(const struct ht_model_config *m)
{
    const struct {
        const char *what;
        int64_t n;
    } sizes[] = { { "n_heads * d_head * d_model", m->n_heads * m->d_head * m->d_model },
                  { "n_kv_heads * d_head * d_model", m->n_kv_heads * m->d_head * m->d_model },
                  { "d_ff * d_model", m->d_ff * m->d_model } };

    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].n % 64)
            return HT_FAIL(HT_ERR_ARG, "model: %s is %" PRId64 "; it must be a multiple of 64",
                           sizes[i].what, sizes[i].n);
    return HT_OK;
}

enum ht_status ht_tensor_list_create(struct ht_tensor_list *out, const struct ht_model_config *m,
                                     enum ht_decay_rule decay)
{
    const size_t n_rows = (size_t)m->n_layers + 1;
    const size_t most = (size_t)m->n_layers * 13 + 3; // 13: a Mamba layer with an MLP
    struct ht_tensor_list l = { .n_layers = (int)m->n_layers };
    struct builder b = { .list = &l, .names = &all_names[m->naming], .rule = decay };

    *out = (struct ht_tensor_list){ 0 };
    HT_TRY(check_adjacent(m));
    l.tensors = calloc(most, sizeof *l.tensors);
    l.layer_start = calloc(n_rows, sizeof *l.layer_start);
    l.index = calloc(n_rows, sizeof *l.index);
    l.unit_start = calloc(n_rows + 2, sizeof *l.unit_start);
    if (!l.tensors || !l.layer_start || !l.index || !l.unit_start) {
        ht_tensor_list_free(&l);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a list of %zu tensors", most);
    }
    for (size_t i = 0; i < n_rows; i++)
        for (int r = 0; r < HT_T_ROLE_COUNT; r++) l.index[i][r] = -1;

    const int outside = (int)m->n_layers;
    add(&b, outside, HT_T_EMBED, true, m->vocab_size, m->d_model);
    for (int i = 0; i < outside; i++) {
        l.layer_start[i] = b.next;
        add_layer_matrices(&b, m, i);
    }
    l.layer_start[outside] = b.next;
    if (!m->tied_head) add(&b, outside, HT_T_HEAD, true, m->vocab_size, m->d_model);
    l.n_matrix = b.next;
    l.n_units = 1 + outside + !m->tied_head;
    memcpy(l.unit_start + 1, l.layer_start, n_rows * sizeof *l.unit_start);
    l.unit_start[l.n_units] = l.n_matrix;
    for (int i = 0; i < outside; i++) add_layer_vectors(&b, m, i);
    add(&b, outside, HT_T_FINAL_NORM, false, m->d_model, 0);
    l.n_total = b.next;
    assert((size_t)l.n_tensors <= most);
    for (int k = 0; k < l.n_tensors; k++)
        if (l.tensors[k].layer == outside) l.tensors[k].layer = -1;
    *out = l;
    return HT_OK;
}

void ht_tensor_list_free(struct ht_tensor_list *l)
{
    if (!l) return;
    free(l->tensors);
    free(l->layer_start);
    free(l->unit_start);
    free(l->index);
    *l = (struct ht_tensor_list){ 0 };
}

int ht_tensor_unit(const struct ht_tensor_list *l, const struct ht_tensor_info *t)
{
    if (t->layer >= 0) return 1 + t->layer;
    return t->role == HT_T_HEAD ? 1 + l->n_layers : 0;
}

const struct ht_tensor_info *ht_tensor_find(const struct ht_tensor_list *l, int layer,
                                            enum ht_tensor_role role)
{
    const int row = layer < 0 ? l->n_layers : layer;
    const int k = l->index[row][role];

    return k < 0 ? NULL : &l->tensors[k];
}

const struct ht_tensor_info *ht_tensor_find_name(const struct ht_tensor_list *l, const char *name)
{
    if (!strcmp(name, "backbone.embedding.weight")) name = "backbone.embeddings.weight";
    for (int k = 0; k < l->n_tensors; k++)
        if (!strcmp(l->tensors[k].name, name)) return &l->tensors[k];
    return NULL;
}
