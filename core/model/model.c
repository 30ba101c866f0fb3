/* core/model/model.c: weights of a model and where each tensor stands. */
#include "core/model/model.h"

#include <stdlib.h>

#include "attention/rope.h"
#include "core/model/fp8.h"
#include "core/model/packed.h"

/* Computed on the host, so that every backend has the same bits. */
static enum ht_status fill_tables(struct ht_model *m, size_t table_bytes)
{
    enum ht_status st = HT_OK;
    const struct ht_model_config *c = &m->cfg;
    const struct ht_rope_scaling scaling = { c->rope_factor, c->rope_low_freq, c->rope_high_freq,
                                             c->rope_original_max };
    float *host = malloc(2 * table_bytes), *sin_table = host + table_bytes / sizeof *host;

    if (!host) return HT_FAIL(HT_ERR_MEMORY, "no memory for RoPE tables (%zu bytes)", table_bytes);
    ht_rope_table(host, sin_table, c->max_position, c->rope_dims, c->rope_theta, &scaling);
    HT_TRY_GOTO(st, done, ht_backend_upload(m->be, m->cos_table, host, table_bytes));
    HT_TRY_GOTO(st, done, ht_backend_upload(m->be, m->sin_table, sin_table, table_bytes));
    HT_TRY_GOTO(st, done, ht_backend_synchronize(m->be)); // before the host copy goes
done:
    free(host);
    return st;
}

/* The arena of a model whose matrices take matrix_bytes. */
static enum ht_status create(struct ht_model **out, struct ht_backend *be,
                             const struct ht_model_config *cfg, enum ht_dtype dtype,
                             enum ht_decay_rule decay, int64_t matrix_room, int64_t vector_room,
                             int64_t n_positions, bool dense)
{
    enum ht_status st = HT_OK;
    struct ht_model *m = calloc(1, sizeof *m);

    *out = NULL;
    if (!m) return HT_FAIL(HT_ERR_MEMORY, "no memory for a model");
    m->cfg = *cfg;
    m->be = be;
    m->dtype = dtype;
    m->cfg.max_position = n_positions;
    HT_TRY_GOTO(st, done, ht_tensor_list_create(&m->list, cfg, decay));

    const int64_t n_vector = m->list.n_total - m->list.n_matrix;
    const size_t matrix_bytes =
        dense ? (size_t)(matrix_room > m->list.n_matrix ? matrix_room : m->list.n_matrix) *
                    ht_dtype_bytes(dtype)
              : 0;
    const size_t vector_bytes = (size_t)(vector_room > n_vector ? vector_room : n_vector) * 4;
    const size_t table_bytes = (size_t)(n_positions * cfg->rope_dims / 2) * 4;
    HT_TRY_GOTO(st, done,
                ht_backend_arena_create(&m->arena, be, "weights",
                                        ht_arena_bytes(matrix_bytes) +
                                            ht_arena_bytes(vector_bytes) +
                                            2 * ht_arena_bytes(table_bytes)));
    if (dense) m->matrix = ht_arena_get(&m->arena, matrix_bytes);
    m->vector = ht_arena_get(&m->arena, vector_bytes);
    if (table_bytes) {
        m->cos_table = ht_arena_get(&m->arena, table_bytes);
        m->sin_table = ht_arena_get(&m->arena, table_bytes);
        HT_TRY_GOTO(st, done, fill_tables(m, table_bytes));
    }
    *out = m;
    m = NULL;
done:
    ht_model_free(m);
    return st;
}

enum ht_status ht_model_create(struct ht_model **out, struct ht_backend *be,
                               const struct ht_model_config *cfg, enum ht_dtype dtype,
                               enum ht_decay_rule decay, int64_t matrix_room, int64_t vector_room,
                               int64_t n_positions)
{
    return create(out, be, cfg, dtype, decay, matrix_room, vector_room, n_positions,
                  matrix_room != HT_MODEL_NO_MATRIX);
}

enum ht_status ht_model_create_packed(struct ht_model **out, struct ht_backend *be,
                                      const struct ht_model_config *cfg, enum ht_dtype dtype,
                                      int64_t n_positions)
{
    enum ht_status st = create(out, be, cfg, dtype, HT_DECAY_MATRICES, 0, 0, n_positions, false);

    if (st == HT_OK) st = ht_packed_create(&(*out)->packed, be, cfg->n_layers);
    if (st == HT_OK) return HT_OK;
    ht_model_free(*out);
    *out = NULL;
    return st;
}

void ht_model_free(struct ht_model *m)
{
    if (!m) return;
    ht_model_fp8_free(m);
    ht_packed_free(m->packed);
    ht_tensor_list_free(&m->list);
    if (m->be) ht_backend_arena_free(&m->arena, m->be);
    free(m);
}

const void *ht_model_matrix(const struct ht_model *m, int layer, enum ht_tensor_role role)
{
    const struct ht_tensor_info *t = ht_tensor_find(&m->list, layer, role);

    if (t && m->units && m->units->weights) {
        const int unit = ht_tensor_unit(&m->list, t);
        return (const char *)m->units->weights[unit] +
               (size_t)(t->offset - m->list.unit_start[unit]) * ht_dtype_bytes(m->dtype);
    }
    return t && m->matrix ? (const char *)m->matrix + (size_t)t->offset * ht_dtype_bytes(m->dtype)
                          : NULL;
}

const float *ht_model_vector(const struct ht_model *m, int layer, enum ht_tensor_role role)
{
    const struct ht_tensor_info *t = ht_tensor_find(&m->list, layer, role);
    return t ? m->vector + (t->offset - m->list.n_matrix) : NULL;
}
