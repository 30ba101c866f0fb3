/* core/config/tensor_list.h: the named tensors of a model and their places in the flat buffers.
 *
 * One flat index space of n_total elements; every tensor starts at a multiple of 64. Matrices
 * (embedding, projections, head) come first, [0, n_matrix): their working copy has the run's
 * precision. Vectors (norm weights, convolution, A_log, D, dt_bias) follow, [n_matrix, n_total):
 * always fp32. Gradients, master weights and moments are fp32 over the same index space. Within
 * each part: embedding, layers in order, final norm, head, so that the backward pass finishes
 * ranges from the end. q, k, v and gate, up are adjacent without gaps (their sizes must be
 * multiples of 64): one product serves them.
 */
#ifndef HT_CONFIG_TENSOR_LIST_H
#define HT_CONFIG_TENSOR_LIST_H

#include "core/base/status.h"
#include "core/config/config.h"

enum ht_tensor_role {
    HT_T_EMBED,
    HT_T_HEAD,
    HT_T_FINAL_NORM,
    HT_T_NORM1,
    HT_T_NORM2, // before the mixer, before the MLP
    HT_T_IN_PROJ,
    HT_T_OUT_PROJ,
    HT_T_CONV_W,
    HT_T_CONV_B,
    HT_T_DT_BIAS,
    HT_T_A_LOG,
    HT_T_D,
    HT_T_GATED_NORM,
    HT_T_Q,
    HT_T_K,
    HT_T_V,
    HT_T_O,
    HT_T_GATE,
    HT_T_UP,
    HT_T_DOWN,
    HT_T_ROLE_COUNT
};

struct ht_tensor_info {
    char name[96]; // Hugging Face name
    enum ht_tensor_role role;
    int layer; // -1 outside of layers
    int n_dims;
    int64_t shape[3]; // slowest first
    int64_t n;        // elements
    int64_t offset;   // first element in the flat index space
    bool matrix;      // working copy in the run's precision; otherwise fp32
    bool decay;       // weight decay applies
};

struct ht_tensor_list {
    int n_tensors;
    struct ht_tensor_info *tensors;
    int64_t n_params;              // sum of n: what people call the parameter count
    int64_t n_matrix, n_total;     // padded to multiples of 64
    int64_t *layer_start;          // (n_layers + 1) offsets of each layer's first matrix element
    int (*index)[HT_T_ROLE_COUNT]; // (n_layers + 1): tensor number or -1; row n_layers = outside
                                   // layers
    int n_layers;
    // The matrix part once more, as what a pass uses together: unit 0 the embedding, 1..n_layers
    // the layers, then the head where it is not tied
    int n_units;
    int64_t *unit_start; // (n_units + 1) offsets, the last one n_matrix
};

enum ht_status ht_tensor_list_create(struct ht_tensor_list *out, const struct ht_model_config *m,
                                     enum ht_decay_rule decay);
void ht_tensor_list_free(struct ht_tensor_list *l);

/* The unit that a matrix belongs to. */
int ht_tensor_unit(const struct ht_tensor_list *l, const struct ht_tensor_info *t);

/* The tensor of that role in layer (or layer = -1); NULL when the model has none. */
const struct ht_tensor_info *ht_tensor_find(const struct ht_tensor_list *l, int layer,
                                            enum ht_tensor_role role);

/* By name; accepts the synonyms of spec 2.4 (backbone.embedding.weight). NULL when unknown. */
const struct ht_tensor_info *ht_tensor_find_name(const struct ht_tensor_list *l, const char *name);

#endif
