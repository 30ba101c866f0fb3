/* core/ops/embedding.h: token embedding into the fp32 residual stream (spec 3.1).
 *
 *   forward   r[t, :] = multiplier * E[id[t], :]
 *   backward  grad_E[id[t], :] += multiplier * grad_r[t, :]
 * The backward adds in token order: the same bits on every run and thread count.
 */
#ifndef HT_OPS_EMBEDDING_H
#define HT_OPS_EMBEDDING_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_embedding_args {
    int64_t n_tokens, d_model, vocab_size;
    enum ht_dtype dtype; // of weight
    float multiplier;
    const int32_t *ids;         // (n_tokens)
    const void *weight;         // (vocab_size, d_model)        forward
    float *residual;            // (n_tokens, d_model)          forward: written
    const float *grad_residual; // (n_tokens, d_model)    backward
    float *grad_weight;         // (vocab_size, d_model)        backward: added to
};

/* HT_ERR_ARG: an id outside 0..vocab_size-1 (names position and id); on CUDA such a token gets NaN
 * (forward) and nothing is added (backward). */
enum ht_status ht_embedding_forward(struct ht_backend *be, const struct ht_embedding_args *a);
enum ht_status ht_embedding_backward(struct ht_backend *be, const struct ht_embedding_args *a);

#endif
