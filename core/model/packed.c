/* core/model/packed.c: products with dense or packed weights. */
#include "core/model/packed.h"

#include <stdlib.h>

#include "core/model/fp8.h"
#include "core/model/stack.h"
#include "core/ops/embedding.h"

enum ht_status ht_packed_create(struct ht_packed **out, struct ht_backend *be, int64_t n_layers)
{
    struct ht_packed *p = calloc(1, sizeof *p);

    *out = NULL;
    if (p) p->matrix = calloc((size_t)(n_layers + 1) * HT_T_ROLE_COUNT, sizeof *p->matrix);
    if (!p || !p->matrix) {
        free(p);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the matrices of %lld layers",
                       (long long)n_layers);
    }
    p->be = be;
    p->n_layers = n_layers;
    *out = p;
    return HT_OK;
}

void ht_packed_free(struct ht_packed *p)
{
    if (!p) return;
    for (int64_t i = 0; i < (p->n_layers + 1) * HT_T_ROLE_COUNT; i++)
        ht_qmatrix_free(&p->matrix[i]);
    free(p->matrix);
    ht_backend_free_memory(p->be, p->embed);
    free(p);
}

struct ht_qmatrix *ht_packed_matrix(const struct ht_packed *p, int layer, enum ht_tensor_role role)
{
    const int64_t row = layer < 0 ? p->n_layers : layer;

    return &p->matrix[row * HT_T_ROLE_COUNT + role];
}

int64_t ht_packed_bytes(const struct ht_packed *p, const struct ht_model_config *cfg)
{
    int64_t sum = p->embed ? cfg->vocab_size * cfg->d_model * 2 : 0;

    for (int64_t i = 0; i < (p->n_layers + 1) * HT_T_ROLE_COUNT; i++)
        sum += (int64_t)p->matrix[i].bytes;
    return sum;
}

enum ht_status ht_model_embed(struct ht_model *m, int64_t n_tokens, const int32_t *ids,
                              float *residual)
{
    if (m->packed && !m->packed->embed) // rows of the tied head
        return ht_qmatrix_embed(m->be, ht_packed_matrix(m->packed, -1, ht_head_role(m)), n_tokens,
                                ids, m->cfg.embedding_multiplier, residual);
    return ht_embedding_forward(
        m->be, &(struct ht_embedding_args){
                   .n_tokens = n_tokens,
                   .d_model = m->cfg.d_model,
                   .vocab_size = m->cfg.vocab_size,
                   .dtype = m->packed ? HT_DTYPE_BF16 : m->dtype,
                   .multiplier = m->cfg.embedding_multiplier,
                   .ids = ids,
                   .weight = m->packed ? m->packed->embed : ht_model_matrix(m, -1, HT_T_EMBED),
                   .residual = residual });
}

enum ht_status ht_model_linear(struct ht_model *m, int layer, enum ht_tensor_role role,
                               const struct ht_linear *l, void *y, const void *x)
{
    if (ht_fp8_applies(m, l)) return ht_fp8_forward(m, layer, role, l, y, x);
    if (!m->packed) return ht_linear_forward(m->be, l, y, x, ht_model_matrix(m, layer, role));
    return ht_qgemm(m->be, &(struct ht_qgemm_args){ .m = l->n_tokens,
                                                    .w = ht_packed_matrix(m->packed, layer, role),
                                                    .x_dtype = l->dtype,
                                                    .y_dtype = l->dtype,
                                                    .x = x,
                                                    .ldx = l->n_in,
                                                    .y = y,
                                                    .ldy = l->n_out,
                                                    .alpha = 1.0f });
}

enum ht_status ht_model_logits(struct ht_model *m, int64_t n_rows, const void *u, float *logits)
{
    const struct ht_model_config *c = &m->cfg;

    if (m->packed)
        return ht_qgemm(
            m->be, &(struct ht_qgemm_args){ .m = n_rows,
                                            .w = ht_packed_matrix(m->packed, -1, ht_head_role(m)),
                                            .x_dtype = m->dtype,
                                            .y_dtype = HT_DTYPE_F32,
                                            .x = u,
                                            .ldx = c->d_model,
                                            .y = logits,
                                            .ldy = c->vocab_size,
                                            .alpha = 1.0f / c->logits_scaling });
    return ht_gemm(m->be, &(struct ht_gemm_args){ .m = n_rows,
                                                  .n = c->vocab_size,
                                                  .k = c->d_model,
                                                  .trans_b = true,
                                                  .ab_dtype = m->dtype,
                                                  .c_dtype = HT_DTYPE_F32,
                                                  .a = u,
                                                  .lda = c->d_model,
                                                  .b = ht_model_matrix(m, -1, ht_head_role(m)),
                                                  .ldb = c->d_model,
                                                  .c = logits,
                                                  .ldc = c->vocab_size,
                                                  .alpha = 1.0f / c->logits_scaling });
}

int64_t ht_model_free_rows(const struct ht_model *m)
{
    return m->packed ? INT64_MAX : m->dtype == HT_DTYPE_F32 ? 16 : 32;
}
