/* inference/loaded_random.c: weights drawn at random, for measurements of speed. */
#include <stdlib.h>

#include "checkpoints/weights_quant.h"
#include "core/base/rng.h"
#include "core/config/recipe.h"
#include "core/model/packed.h"
#include "core/model/stack.h"
#include "inference/loaded.h"

enum { BLOCK_ROWS = 256 };

/* What one product serves: roles whose rows stand one after the other in its matrix. */
static const enum ht_tensor_role products[][3] = {
    { HT_T_IN_PROJ, HT_T_ROLE_COUNT, HT_T_ROLE_COUNT },
    { HT_T_OUT_PROJ, HT_T_ROLE_COUNT, HT_T_ROLE_COUNT },
    { HT_T_Q, HT_T_K, HT_T_V },
    { HT_T_O, HT_T_ROLE_COUNT, HT_T_ROLE_COUNT },
    { HT_T_GATE, HT_T_UP, HT_T_ROLE_COUNT },
    { HT_T_DOWN, HT_T_ROLE_COUNT, HT_T_ROLE_COUNT },
};

static enum ht_status fill(struct ht_loaded *l, struct ht_qmatrix *q, uint64_t stream)
{
    float *block = malloc((size_t)(BLOCK_ROWS * q->k) * sizeof *block);
    enum ht_status st = HT_OK;

    if (!block) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d rows of weights", BLOCK_ROWS);
    for (int64_t row = 0; row < q->n && st == HT_OK; row += BLOCK_ROWS) {
        const int64_t n = q->n - row < BLOCK_ROWS ? q->n - row : BLOCK_ROWS;
#pragma omp parallel for num_threads(l->backend.n_threads)
        for (int64_t i = 0; i < n * q->k; i++)
            block[i] = 0.04f * ht_rng_uniform(3, stream, (uint64_t)(row * q->k + i)) - 0.02f;
        st = ht_qmatrix_set_rows(q, &l->backend, row, n, block, HT_DTYPE_F32, q->k);
    }
    free(block);
    return st;
}

static enum ht_status make(struct ht_loaded *l, int layer, const enum ht_tensor_role role[3],
                           enum ht_qformat format)
{
    struct ht_model *m = l->model;
    struct ht_qmatrix *q = ht_packed_matrix(m->packed, layer, role[0]);
    int64_t n = 0, k = 0;

    for (int i = 0; i < 3 && role[i] != HT_T_ROLE_COUNT; i++) {
        const struct ht_tensor_info *t = ht_tensor_find(&m->list, layer, role[i]);
        if (!t) return HT_OK; // a layer of the other kind
        n += t->shape[0];
        k = t->shape[1];
    }
    HT_TRY(ht_qmatrix_create(q, NULL, ht_weights_format(format, role[0], m->cfg.tied_head),
                             HT_Q_DEFAULT_GROUP, n, k));
    return fill(l, q, (uint64_t)(layer + 1) * HT_T_ROLE_COUNT + role[0]);
}

static enum ht_status draw(struct ht_loaded *l, enum ht_qformat format)
{
    struct ht_model *m = l->model;
    const enum ht_tensor_role head[3] = { ht_head_role(m), HT_T_ROLE_COUNT, HT_T_ROLE_COUNT };
    const int64_t n_embed = m->cfg.vocab_size * m->cfg.d_model;

    for (int i = 0; i < (int)m->cfg.n_layers; i++)
        for (size_t j = 0; j < sizeof products / sizeof *products; j++)
            HT_TRY(make(l, i, products[j], format));
    HT_TRY(make(l, -1, head, format));
    for (int64_t i = 0; i < m->list.n_total - m->list.n_matrix; i++)
        m->vector[i] = 0.5f + 0.5f * ht_rng_uniform(4, 0, (uint64_t)i);
    if (m->cfg.tied_head) return HT_OK;
    void *embed;
    HT_TRY(ht_backend_alloc(&embed, &l->backend, "embedding", (size_t)n_embed * sizeof(ht_bf16)));
    m->packed->embed = embed;
#pragma omp parallel for num_threads(l->backend.n_threads)
    for (int64_t i = 0; i < n_embed; i++)
        m->packed->embed[i] = ht_f32_to_bf16(ht_rng_uniform(5, 0, (uint64_t)i) - 0.5f);
    return HT_OK;
}

enum ht_status ht_loaded_random(struct ht_loaded *l, const char *recipe, const char *format,
                                int threads, int64_t n_positions)
{
    enum ht_qformat f = HT_Q_BF16;
    struct ht_recipe *r = NULL;
    struct ht_config cfg;

    *l = (struct ht_loaded){ .eos = -1, .bos = -1 };
    HT_TRY(ht_qformat_parse(&f, format));
    HT_TRY(ht_recipe_load(&cfg, &r, recipe, 0, NULL, 1));
    ht_recipe_free(r);
    HT_TRY(ht_backend_create_cpu(&l->backend, threads, 1 << 20));
    HT_TRY(ht_model_create_packed(&l->model, &l->backend, &cfg.model, HT_DTYPE_BF16, n_positions));
    HT_TRY(draw(l, f));
    l->team.most = l->backend.n_threads;
    l->model->team = &l->team;
    return HT_OK;
}
