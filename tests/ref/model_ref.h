/* tests/ref/model_ref.h: the whole hybrid model's loss in double precision, by the plainest loops there are:
 * token-by-token recurrence, full attention rows, full logits. Parameters are one flat double array in the
 * index space of core/config/tensor_list.h. */
#ifndef HT_TESTS_MODEL_REF_H
#define HT_TESTS_MODEL_REF_H

#include "core/config/tensor_list.h"
#include "core/model/model.h"

/* sum over counted labels of (lse - logit) + z_coef * lse^2; logits (n_tokens, vocab_size) or NULL. */
double model_ref_loss(const struct ht_model_config *c, const struct ht_tensor_list *l,
                      const double *params, const struct ht_model_batch *b, double z_coef,
                      double *logits);

#endif
