/* core/ops/loss.h: output head with cross-entropy and z-loss, without the full logits (spec 3.7).
 *
 *   logits[t, :] = logit_scale * W u[t]                (logit_scale = 1 / logits_scaling)
 *   lse[t] = logsumexp(logits[t])
 *   loss = sum_t (lse[t] - logits[t, label[t]])        over labels >= 0
 *   zsum = sum_t lse[t]^2                              over the same t
 *   total = loss_scale * (loss + z_coef * zsum)        what the gradients belong to
 *   d total / d logit = loss_scale * ((softmax - onehot) + 2 z_coef lse softmax)
 *
 * loss_scale is usually 1 / (labels of the whole global batch), so accumulation and ranks do not
 * change it. Tokens are done in blocks: block x vocab_size logits live in scratch, gradients are
 * formed in the same pass, nothing is recomputed. A block without any label is skipped.
 */
#ifndef HT_OPS_LOSS_H
#define HT_OPS_LOSS_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_linear_ce_args {
    int64_t n_tokens, d_model, vocab_size;
    enum ht_dtype dtype; // of u, weight, grad_u
    float logit_scale, loss_scale, z_coef;
    const void *u;         // (n_tokens, d_model)
    const void *weight;    // (vocab_size, d_model)
    const int32_t *labels; // (n_tokens), negative = not counted
    void *grad_u;          // (n_tokens, d_model), or NULL: no gradients at all
    float *grad_weight;    // (vocab_size, d_model), added to; NULL when grad_u is NULL
    float *logprobs;       // (n_tokens) log p(label), natural; 0 where label < 0; or NULL
    double *sums; // (3) loss_sum, z_sum, n_counted, written in memory of the backend; or NULL
    // results, written (on CUDA with `sums` they stay 0 and nothing waits)
    double loss_sum, z_sum; // natural logarithms
    int64_t n_counted;
};

/* HT_ERR_ARG: a label >= vocab_size (names position and value); on CUDA it makes the loss NaN. */
enum ht_status ht_linear_ce(struct ht_backend *be, struct ht_linear_ce_args *a);

/* Taken from be->scratch during the call. On CUDA more scratch makes larger chunks of tokens, up to
 * 4096 (then 4 * vocab_size bytes per token), and faster products. */
size_t ht_linear_ce_scratch_bytes(int64_t n_tokens, int64_t d_model, int64_t vocab_size,
                                  enum ht_dtype dtype);

#endif
