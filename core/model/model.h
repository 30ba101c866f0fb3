/* core/model/model.h: the layer stack: weights, activations, forward and backward of a hybrid model
 * [5].
 *
 *   r = multiplier * E[token]
 *   for each layer:  r += m_res * mixer(rms(r, w1));   r += m_res * mlp(rms(r, w2))     (no MLP:
 * d_ff = 0) loss = linear_ce(rms(r, wf)) (spec 3.1)
 *
 * On CUDA weights, activations, gradients and everything in a batch are device memory; n_seqs and
 * n_tokens are the host's. The mixer is Mamba-2 or attention, layer by layer; only this folder
 * knows. All memory is sized by ht_model_sizes and taken once; a step allocates nothing.
 */
#ifndef HT_MODEL_MODEL_H
#define HT_MODEL_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/seqs.h"
#include "core/config/config.h"
#include "core/config/tensor_list.h"

/* Matrices and their gradients that come and go unit by unit (tensor_list.h) where a rank has no
 * room for all: ZeRO-2 and -3. The model says when; whoever set it (training/units.c) keeps the two
 * lists of addresses. */
struct ht_model_units {
    void *user;
    void **weights; // (n_units) where the unit's first matrix element is; NULL: whole, m->matrix
    float **grads;  // (n_units) the same of its gradient; NULL: whole, the caller's grads
    float *vector_grads; // gradients of the vector part, whole; used with grads
    // Before the first use of a unit in a pass and after the last one. Backward: weights and a
    // gradient that is zero before the pass. `next` is the unit that the pass needs then, or -1.
    enum ht_status (*needed)(void *user, int unit, int next, bool backward);
    enum ht_status (*done)(void *user, int unit, bool backward);
};

struct ht_model {
    struct ht_model_config cfg;
    struct ht_tensor_list list;
    struct ht_backend *be;        // borrowed
    enum ht_dtype dtype;          // of the matrices and of activations
    void *matrix;                 // (list.n_matrix + padding) working copies, dtype
    float *vector;                // (list.n_total - list.n_matrix + padding) working copies
    float *cos_table, *sin_table; // (max_position, rope_dims/2), NULL without RoPE
    struct ht_arena arena;
    const struct ht_model_units *units; // borrowed; NULL: everything is whole
    struct ht_packed *packed; // packed.h: the matrices instead of `matrix`, forward only; or NULL
    struct ht_model_fp8 *fp8; // fp8.h: the projections multiply in fp8; or NULL
    struct ht_team *team; // borrowed: chooses be->n_threads of passes that extend states; or NULL
};

/* Weights are zero until ht_params_* or ht_weights_load fills them. matrix_room and vector_room are
 * the lengths that the two buffers must have (ZeRO pads them); 0 for the plain lengths. n_positions
 * is the longest sequence that RoPE tables are made for. matrix_room HT_MODEL_NO_MATRIX: no working
 * copies of the matrices, m->units has them. */
enum { HT_MODEL_NO_MATRIX = -1 };
enum ht_status ht_model_create(struct ht_model **out, struct ht_backend *be,
                               const struct ht_model_config *cfg, enum ht_dtype dtype,
                               enum ht_decay_rule decay, int64_t matrix_room, int64_t vector_room,
                               int64_t n_positions);
void ht_model_free(struct ht_model *m);

/* Working copy of the tensor of that role in that layer (-1: outside); NULL when the model has
 * none. */
const void *ht_model_matrix(const struct ht_model *m, int layer, enum ht_tensor_role role);
const float *ht_model_vector(const struct ht_model *m, int layer, enum ht_tensor_role role);

/* The matrices are others than before: to be said after every update where m->fp8 is set. */
void ht_model_weights_changed(struct ht_model *m);

/* One micro-batch: flat tokens, their labels, positions and sequences (data/loader.h). */
struct ht_model_batch {
    int64_t n_tokens;
    const int32_t *ids, *labels, *pos; // (n_tokens), like seqs.starts in the backend's memory;
                                       // labels may be NULL for hidden states only
    struct ht_seqs seqs;
    double *loss_sums; // (3) in the backend's memory: loss_sum, z_sum, n_counted are written there
                       // too, and on CUDA nothing waits: struct ht_loss stays zero; or NULL
};

struct ht_acts; // activations of one micro-batch

/* What ht_acts_create and the operations need for micro-batches of up to n_tokens. forward_only: no
 * backward pass will follow. */
struct ht_model_sizes {
    int64_t activation_bytes, scratch_bytes, scratch_cuda_bytes; // scratch on the CPU, on CUDA
};
enum ht_status ht_model_sizes(struct ht_model_sizes *out, const struct ht_model_config *cfg,
                              enum ht_dtype dtype, enum ht_recompute recompute, bool forward_only,
                              int64_t n_tokens, int n_threads);

enum ht_status ht_acts_create(struct ht_acts **out, const struct ht_model *m,
                              enum ht_recompute recompute, bool forward_only, int64_t n_tokens);
void ht_acts_free(struct ht_acts *a);

struct ht_loss { // sums over the counted labels of one micro-batch; natural logarithms
    double loss_sum, z_sum;
    int64_t n_counted;
};

/* Forward pass and loss, no gradients. logprobs: (n_tokens) or NULL. */
enum ht_status ht_model_evaluate(struct ht_model *m, struct ht_acts *a,
                                 const struct ht_model_batch *b, struct ht_loss *loss,
                                 float *logprobs);

/* Called during the backward pass when all gradients with flat offset >= done (matrix part) are
 * final. */
typedef enum ht_status ht_grads_hook(void *user, int64_t done, bool vectors_done);

/* Forward and backward of one micro-batch. Gradients of loss_scale * (loss_sum + z_coef * z_sum)
 * are added to grads (n_total, flat index space; unused where m->units has grads). hook may be
 * NULL. */
enum ht_status ht_model_train(struct ht_model *m, struct ht_acts *a, const struct ht_model_batch *b,
                              float loss_scale, float z_coef, float *grads, struct ht_loss *loss,
                              ht_grads_hook *hook, void *user);

#endif
