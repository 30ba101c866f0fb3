/* inference/loaded.c: weights from a folder into a dense or a packed model. */
#include "inference/loaded.h"

#include <stdlib.h>
#include <string.h>

#include "checkpoints/weights_quant.h"
#include "core/model/packed.h"
#include "core/model/stack.h"

struct group { // tensors that one product serves
    enum ht_tensor_role role[3];
    int n;
};

static const struct group mamba_groups[] = { { { HT_T_IN_PROJ }, 1 }, { { HT_T_OUT_PROJ }, 1 } };
static const struct group attention_groups[] = { { { HT_T_Q, HT_T_K, HT_T_V }, 3 },
                                                 { { HT_T_O }, 1 } };
static const struct group mlp_groups[] = { { { HT_T_GATE, HT_T_UP }, 2 }, { { HT_T_DOWN }, 1 } };

static enum ht_status load_group(struct ht_loaded *l, int layer, const struct group *g,
                                 enum ht_qformat format, int group_size)
{
    struct ht_model *m = l->model;
    const struct ht_tensor_info *parts[3];

    for (int i = 0; i < g->n; i++) {
        parts[i] = ht_tensor_find(&m->list, layer, g->role[i]);
        if (!parts[i])
            return HT_FAIL(HT_ERR_FORMAT, "layer %d lacks tensor %d of a product", layer, i);
    }
    const enum ht_qformat f = ht_weights_format(format, g->role[0], m->cfg.tied_head);
    return ht_weights_load_qmatrix(ht_packed_matrix(m->packed, layer, g->role[0]), l->weights,
                                   &m->list, parts, g->n, f, group_size, NULL, &l->backend);
}

static enum ht_status load_embedding(struct ht_loaded *l)
{
    struct ht_model *m = l->model;
    const struct ht_tensor_info *t = ht_tensor_find(&m->list, -1, HT_T_EMBED);

    const size_t bytes = (size_t)t->n * sizeof *m->packed->embed;
    enum ht_status st = HT_OK;
    void *embed;

    if (m->cfg.tied_head) return HT_OK; // rows of the head serve
    HT_TRY(ht_backend_alloc(&embed, &l->backend, "embedding", bytes));
    m->packed->embed = embed;
    if (l->backend.kind == HT_BACKEND_CPU)
        return ht_weights_read_rows(l->weights, &m->list, t, 0, t->shape[0], embed, HT_DTYPE_BF16);
    void *host = malloc(bytes);
    if (!host) return HT_FAIL(HT_ERR_MEMORY, "no memory to read an embedding of %zu bytes", bytes);
    HT_TRY_GOTO(st, done,
                ht_weights_read_rows(l->weights, &m->list, t, 0, t->shape[0], host, HT_DTYPE_BF16));
    HT_TRY_GOTO(st, done, ht_backend_upload(&l->backend, embed, host, bytes));
    HT_TRY_GOTO(st, done, ht_backend_synchronize(&l->backend)); // before the host copy goes
done:
    free(host);
    return st;
}

/* Vectors, and with `dense` fp32 matrices, into the model. */
static enum ht_status load_plain(struct ht_loaded *l, bool dense)
{
    struct ht_model *m = l->model;
    const size_t matrix_bytes = dense ? (size_t)m->list.n_matrix * sizeof(float) : 0;
    const size_t vector_bytes = (size_t)(m->list.n_total - m->list.n_matrix) * sizeof(float);
    const bool on_cpu = l->backend.kind == HT_BACKEND_CPU;
    enum ht_status st = HT_OK;
    char *host = on_cpu ? NULL : malloc(matrix_bytes + vector_bytes);
    void *matrix = on_cpu ? m->matrix : host;
    float *vector = on_cpu ? m->vector : (float *)(void *)(host + matrix_bytes);

    if (!on_cpu && !host)
        return HT_FAIL(HT_ERR_MEMORY, "no memory to read weights of %zu bytes",
                       matrix_bytes + vector_bytes);
    if (dense)
        HT_TRY_GOTO(st, done,
                    ht_weights_load(l->weights, &m->list, matrix, HT_DTYPE_F32, vector, NULL));
    else
        HT_TRY_GOTO(st, done, ht_weights_load_vectors(l->weights, &m->list, vector));
    if (on_cpu) return HT_OK;
    HT_TRY_GOTO(st, done, ht_backend_upload(&l->backend, m->vector, vector, vector_bytes));
    if (dense) HT_TRY_GOTO(st, done, ht_backend_upload(&l->backend, m->matrix, host, matrix_bytes));
    HT_TRY_GOTO(st, done, ht_backend_synchronize(&l->backend)); // before the host copy goes
done:
    free(host);
    return st;
}

static enum ht_status load_packed(struct ht_loaded *l, enum ht_qformat format, int group_size)
{
    struct ht_model *m = l->model;
    const struct group head = { { ht_head_role(m) }, 1 };

    for (int i = 0; i < (int)m->cfg.n_layers; i++) {
        const bool mamba = m->cfg.layer_kind[i] == HT_LAYER_MAMBA;
        const struct group *g = mamba ? mamba_groups : attention_groups;
        for (int j = 0; j < 2; j++) HT_TRY(load_group(l, i, &g[j], format, group_size));
        for (int j = 0; m->cfg.d_ff && j < 2; j++)
            HT_TRY(load_group(l, i, &mlp_groups[j], format, group_size));
    }
    HT_TRY(load_group(l, -1, &head, format, group_size));
    HT_TRY(load_embedding(l));
    return load_plain(l, false);
}

/* The token that ends a text: the folder's, else one of the usual names, else the only special
 * token when it has no other usual meaning (run folders of our own). */
static int64_t find_eos(const struct ht_weights *weights, const struct ht_tokenizer *tokenizer)
{
    static const char *const ends[] = { "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>",
                                        "[EOS]" };
    static const char *const others[] = { "<unk>", "<pad>", "<s>",    "<bos>",
                                          "[UNK]", "[PAD]", "<mask>", "[MASK]" };
    const int64_t vocab_size = ht_weights_model(weights)->vocab_size;
    int64_t only = -1;

    if (ht_weights_eos_id(weights) >= 0 || !tokenizer) return ht_weights_eos_id(weights);
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        const int32_t id = ht_tokenizer_find(tokenizer, ends[i]);
        if (id >= 0 && id < vocab_size && ht_tokenizer_is_special(tokenizer, id)) return id;
    }
    for (int64_t id = 0; id < ht_tokenizer_vocab_size(tokenizer); id++) {
        if (!ht_tokenizer_is_special(tokenizer, (int32_t)id)) continue;
        if (only >= 0) return -1;
        only = id;
    }
    if (only < 0 || only >= vocab_size) return -1;
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (strcmp(ht_tokenizer_token(tokenizer, (int32_t)only), others[i]) == 0) return -1;
    return only;
}

static enum ht_status open_device(struct ht_backend *be, const char *device, int threads)
{
    const size_t scratch = 1 << 20; // whoever runs passes asks for what they need

    if (strcmp(device, "cpu") == 0) return ht_backend_create_cpu(be, threads, scratch);
    if (strcmp(device, "cuda") == 0) return ht_backend_create_cuda(be, 0, scratch);
    if (strcmp(device, "auto") != 0)
        return HT_FAIL(HT_ERR_ARG, "device '%.40s'; it must be cpu, cuda or auto", device);
    const enum ht_status st = ht_backend_create_cuda(be, 0, scratch);
    return st == HT_ERR_UNSUPPORTED ? ht_backend_create_cpu(be, threads, scratch) : st;
}

enum ht_status ht_loaded_open(struct ht_loaded *l, struct ht_weights *w, const char *tokenizer,
                              const char *format, int threads, int64_t n_positions)
{
    return ht_loaded_open_on(l, "cpu", w, tokenizer, format, threads, n_positions);
}

enum ht_status ht_loaded_open_on(struct ht_loaded *l, const char *device, struct ht_weights *w,
                                 const char *tokenizer, const char *format_name, int threads,
                                 int64_t n_positions)
{
    enum ht_qformat format = HT_Q_BF16;
    int group_size = HT_Q_DEFAULT_GROUP;

    *l = (struct ht_loaded){ .weights = w, .eos = -1, .bos = -1 };
    const struct ht_model_config *c = ht_weights_model(l->weights);
    HT_TRY(open_device(&l->backend, device, threads));

    const bool stored = strcmp(format_name, "stored") == 0;
    const bool quantised = ht_weights_quantised(l->weights, &format, &group_size);
    const bool dense =
        strcmp(format_name, "fp32") == 0 ||
        (stored && !quantised && ht_weights_stored_dtype(l->weights) == HT_DTYPE_F32);
    if (stored && !quantised) format = HT_Q_BF16;
    if (!stored && !dense) HT_TRY(ht_qformat_parse(&format, format_name));
    if (dense) {
        HT_TRY(ht_model_create(&l->model, &l->backend, c, HT_DTYPE_F32, HT_DECAY_MATRICES, 0, 0,
                               n_positions));
        HT_TRY(load_plain(l, true));
    } else {
        HT_TRY(ht_model_create_packed(&l->model, &l->backend, c, HT_DTYPE_BF16, n_positions));
        HT_TRY(load_packed(l, format, group_size));
    }
    l->team.most = l->backend.n_threads;
    l->model->team = &l->team;
    if (!tokenizer) tokenizer = ht_weights_tokenizer_path(l->weights);
    if (tokenizer) HT_TRY(ht_tokenizer_load(&l->tokenizer, tokenizer));
    l->eos = (int32_t)find_eos(l->weights, l->tokenizer);
    l->bos = (int32_t)ht_weights_bos_id(l->weights);
    return HT_OK;
}

void ht_loaded_close(struct ht_loaded *l)
{
    ht_tokenizer_free(l->tokenizer);
    ht_model_free(l->model);
    ht_backend_free(&l->backend);
    ht_weights_close(l->weights);
    *l = (struct ht_loaded){ 0 };
}

int64_t ht_loaded_weight_bytes(const struct ht_loaded *l)
{
    const struct ht_model *m = l->model;
    const int64_t vectors = 4 * (m->list.n_total - m->list.n_matrix);

    if (m->packed) return vectors + ht_packed_bytes(m->packed, &m->cfg);
    return vectors + m->list.n_matrix * (int64_t)ht_dtype_bytes(m->dtype);
}
