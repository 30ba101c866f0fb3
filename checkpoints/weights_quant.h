/* checkpoints/weights_quant.h: weights tensor by tensor, dense or quantised, from any source.
 *
 * Works on every folder that ht_weights_open takes. In a folder that hybridconvert --quantize wrote
 * (weights.json + weights.h5, docs/checkpoints.md) matrices are stored quantised and come out with
 * their stored codes when the stored format is asked for; from any other folder they are quantised
 * while they are read, row block by row block, so no dense copy of the model exists.
 *
 * For a model in format F:
 *   projections (in, out, q, k, v, o, gate, up, down)  F
 *   head                                               int8 where F is int4, int4z or fp8, else F: its
 *                                                      errors reach the logits directly
 *   embedding                                          bf16: looked up, never multiplied by. A tied
 *                                                      head is the embedding: then as the head
 *   norms, convolution, A_log, D, dt_bias              fp32
 * ht_weights_format is this table.
 *
 * Typical use (q|k|v in one matrix):
 *   const struct ht_tensor_info *qkv[] = { find(HT_T_Q), find(HT_T_K), find(HT_T_V) };
 *   HT_TRY(ht_weights_load_qmatrix(&m->qkv, w, &list, qkv, 3, HT_Q_INT4, 32, &arena, be));
 *   HT_TRY(ht_weights_load_vectors(w, &list, vector));
 */
#ifndef HT_CHECKPOINTS_WEIGHTS_QUANT_H
#define HT_CHECKPOINTS_WEIGHTS_QUANT_H

#include "checkpoints/weights.h"
#include "core/ops/quant.h"

enum { HT_Q_DEFAULT_GROUP = 32 };

/* The format of a matrix of that role in a model of format f. */
enum ht_qformat ht_weights_format(enum ht_qformat f, enum ht_tensor_role role, bool tied_head);

/* True when the folder's projections are int8, int4, int4z or fp8 (bf16 is dense:
 * ht_weights_stored_dtype); format and group are those of its projections (either may be NULL). */
bool ht_weights_quantised(const struct ht_weights *w, enum ht_qformat *format, int *group);

/* Rows row0 .. row0 + n_rows - 1 of tensor t of `list` as dense values (fp32 or bf16; dequantised
 * where they are stored quantised). A row is everything behind the first dimension; a vector has
 * rows of one element. */
enum ht_status ht_weights_read_rows(struct ht_weights *w, const struct ht_tensor_list *list,
                                    const struct ht_tensor_info *t, int64_t row0, int64_t n_rows,
                                    void *out, enum ht_dtype dtype);

/* The rows of parts[0], parts[1], ... one after the other as one packed matrix (same k), created in
 * arena (NULL: own memory). Stored codes are taken as they are when format and group are the stored
 * ones; otherwise values are quantised (again). be gives threads; NULL: one. */
enum ht_status ht_weights_load_qmatrix(struct ht_qmatrix *out, struct ht_weights *w,
                                       const struct ht_tensor_list *list,
                                       const struct ht_tensor_info *const *parts, int n_parts,
                                       enum ht_qformat format, int group, struct ht_arena *arena,
                                       struct ht_backend *be);

/* The vector part, fp32, indexed by offset - n_matrix. */
enum ht_status ht_weights_load_vectors(struct ht_weights *w, const struct ht_tensor_list *list,
                                       float *vector);

#endif
