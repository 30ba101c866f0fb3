/* core/model/mlp_layer.c: the SwiGLU MLP of one layer (spec 3.6): branch = (silu(u Wg^T) * (u
 * Wu^T)) Wd^T */
#include "core/model/fp8.h"
#include "core/model/layers.h"
#include "core/model/linear.h"
#include "core/model/packed.h"
#include "core/ops/mlp.h"

enum ht_status ht_mlp_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                              int64_t n_tokens, void *branch)
{
    const struct ht_model_config *c = &m->cfg;
    const struct ht_linear in = { n_tokens, c->d_model, 2 * c->d_ff, m->dtype };
    const struct ht_linear out = { n_tokens, c->d_ff, c->d_model, m->dtype };
    const struct ht_swiglu_args swiglu = {
        .n_rows = n_tokens, .d_ff = c->d_ff, .dtype = m->dtype, .gate_up = a->gate_up, .y = a->act
    };

    // gate and up stand one after the other in the flat buffer: one product
    HT_TRY(ht_model_linear(m, layer, HT_T_GATE, &in, a->gate_up, a->u2));
    HT_TRY(ht_swiglu_forward(m->be, &swiglu));
    if (!branch) return HT_OK; // recomputation: only the activations are wanted
    return ht_model_linear(m, layer, HT_T_DOWN, &out, branch, a->act);
}

enum ht_status ht_mlp_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                               int64_t n_tokens, float *grads)
{
    const struct ht_model_config *c = &m->cfg;
    struct ht_layer_acts *a = &acts->layer[layer];
    struct ht_shared_acts *s = &acts->shared;
    const struct ht_linear in = { n_tokens, c->d_model, 2 * c->d_ff, m->dtype };
    const struct ht_linear out = { n_tokens, c->d_ff, c->d_model, m->dtype };

    HT_TRY(ht_model_linear_backward_x(m, layer, HT_T_DOWN, &out, s->grad_act, s->grad_branch));
    // gate_up is not needed afterwards: its gradient takes its place
    const bool act_is_lost = acts->recompute == HT_RECOMPUTE_SELECTIVE;
    const struct ht_swiglu_args swiglu = { .n_rows = n_tokens,
                                           .d_ff = c->d_ff,
                                           .dtype = m->dtype,
                                           .gate_up = a->gate_up,
                                           .y = act_is_lost ? a->act : NULL,
                                           .grad_y = s->grad_act,
                                           .grad_gate_up = a->gate_up };
    HT_TRY(ht_swiglu_backward(m->be, &swiglu));
    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_DOWN, &out, grads, s->grad_branch, a->act));
    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_GATE, &in, grads, a->gate_up, a->u2));
    return ht_model_linear_backward_x(m, layer, HT_T_GATE, &in, s->grad_u, a->gate_up);
}
