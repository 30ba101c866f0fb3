/* core/model/stack.h: the residual stack's forward pass, shared by training, evaluation and
 * decoding. */
#ifndef HT_MODEL_STACK_H
#define HT_MODEL_STACK_H

#include "core/model/layers.h"

/* Embedding, all layers and the final norm: a->u_final holds the normalised output. states: one per
 * layer, or NULL in training. */
enum ht_status ht_stack_forward(struct ht_model *m, struct ht_acts *a,
                                const struct ht_model_batch *b,
                                const struct ht_mixer_state *states);

/* Everything of one layer after its first norm's addition; the MLP's (or the mixer's) last product
 * goes to `branch`, or is left out when branch_out is false (recomputation). */
enum ht_status ht_layer_forward(struct ht_model *m, int layer, struct ht_acts *a,
                                const struct ht_model_batch *b, const struct ht_mixer_state *state,
                                bool branch_out);

/* The residual that leaves a layer before its last branch is added. */
static inline float *ht_layer_residual(const struct ht_model *m, struct ht_layer_acts *l)
{
    return m->cfg.d_ff ? l->r_mid : l->r_in;
}

/* The output head's weight: [vocab_size, d_model]. */
static inline enum ht_tensor_role ht_head_role(const struct ht_model *m)
{
    return m->cfg.tied_head ? HT_T_EMBED : HT_T_HEAD;
}

/* The unit (core/config/tensor_list.h) that it belongs to. */
static inline int ht_head_unit(const struct ht_model *m)
{
    return m->cfg.tied_head ? 0 : 1 + (int)m->cfg.n_layers;
}

#endif
