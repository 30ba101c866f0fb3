/* core/model/packed.h: the matrices of a model for inference: dense as in training, or packed and
 * quantised (core/ops/quant.h).
 *
 * A packed model has no `matrix`; its products of q|k|v and of gate|up are one matrix each, found
 * under the first role of the group. The three functions below are the only places that ask.
 */
#ifndef HT_MODEL_PACKED_H
#define HT_MODEL_PACKED_H

#include "core/model/linear.h"
#include "core/model/model.h"
#include "core/ops/quant.h"

struct ht_packed {
    struct ht_backend *be; // whose memory embed is
    int64_t n_layers;
    struct ht_qmatrix *matrix; // (n_layers + 1, HT_T_ROLE_COUNT); row n_layers: outside of layers
    ht_bf16 *embed; // (vocab_size, d_model), of ht_backend_alloc; NULL: rows of the tied head
};

/* Forward only; dtype is that of activations. Its packed matrices are empty until the loader fills
 * ht_packed_matrix(...) and, without a tied head, `embed`. */
enum ht_status ht_model_create_packed(struct ht_model **out, struct ht_backend *be,
                                      const struct ht_model_config *cfg, enum ht_dtype dtype,
                                      int64_t n_positions);

enum ht_status ht_packed_create(struct ht_packed **out, struct ht_backend *be, int64_t n_layers);
void ht_packed_free(struct ht_packed *p);
struct ht_qmatrix *ht_packed_matrix(const struct ht_packed *p, int layer, enum ht_tensor_role role);
int64_t ht_packed_bytes(const struct ht_packed *p, const struct ht_model_config *cfg);

/* residual (n_tokens, d_model) = multiplier * embedding rows. HT_ERR_ARG: an id outside of the
 * vocabulary. */
enum ht_status ht_model_embed(struct ht_model *m, int64_t n_tokens, const int32_t *ids,
                              float *residual);

/* y = x W^T with the matrix, or group of matrices, of that role. */
enum ht_status ht_model_linear(struct ht_model *m, int layer, enum ht_tensor_role role,
                               const struct ht_linear *l, void *y, const void *x);

/* logits (n_rows, vocab_size), fp32, of normalised rows u (n_rows, d_model) of the model's dtype. A
 * row of them depends on its row of u alone where n_rows is at most ht_model_free_rows(m). */
enum ht_status ht_model_logits(struct ht_model *m, int64_t n_rows, const void *u, float *logits);

/* Rows of a product that do not see each other: any number of them when packed, 16 in fp32, 32 in
 * bf16 (core/ops/gemm.h). */
int64_t ht_model_free_rows(const struct ht_model *m);

#endif
