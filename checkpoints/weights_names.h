/* checkpoints/weights_names.h: which tensors of the model a stored tensor holds (spec 2).
 *
 * Hugging Face names are ours. The state-spaces names of training checkpoints (spec 2.3) differ,
 * and two of their tensors hold several of ours, one after the other in rows:
 *
 *   backbone.layers.I.mlp.fc1.weight         up, then gate
 *   backbone.layers.I.mixer.in_proj.weight   q, then k, then v, when layer I is attention
 */
#ifndef HT_CHECKPOINTS_WEIGHTS_NAMES_H
#define HT_CHECKPOINTS_WEIGHTS_NAMES_H

#include "core/config/config.h"
#include "core/config/tensor_list.h"

#define HT_WEIGHT_IGNORED (-1) // a buffer, or the head of a tied model
#define HT_WEIGHT_UNKNOWN 0

/* The number of tensors (1 to 3) that `name` holds, in row order; or IGNORED, UNKNOWN. */
int ht_weights_targets(const struct ht_tensor_info *targets[3], const char *name,
                       const struct ht_tensor_list *list, const struct ht_model_config *m);

#endif
