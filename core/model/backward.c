/* core/model/backward.c: loss and gradients, top to bottom (spec 3.7, 4.2). */
#include "core/model/stack.h"
#include "core/ops/embedding.h"
#include "core/ops/loss.h"
#include "core/ops/rmsnorm.h"

/* Gradient through y = norm(r_in + m_res * branch): shared.grad_r becomes the gradient of r_in
 * (added to what comes down the residual, unless first), shared.grad_branch that of the branch. */
static enum ht_status norm_backward(struct ht_model *m, struct ht_acts *a, int64_t n_tokens,
                                    int layer, enum ht_tensor_role role, float *residual,
                                    float *rstd, const void *grad_y, bool first, bool has_branch,
                                    float *grads)
{
    struct ht_shared_acts *s = &a->shared;

    return ht_rmsnorm_backward(
        m->be, &(struct ht_rmsnorm_args){ .n_rows = n_tokens,
                                          .d_model = m->cfg.d_model,
                                          .dtype = m->dtype,
                                          .eps = m->cfg.norm_eps,
                                          .branch_scale = m->cfg.residual_multiplier,
                                          .w = ht_model_vector(m, layer, role),
                                          .r_out = residual,
                                          .rstd = rstd,
                                          .grad_y = grad_y,
                                          .grad_r_out = first ? NULL : s->grad_r,
                                          .grad_r_in = s->grad_r,
                                          .grad_branch = has_branch ? s->grad_branch : NULL,
                                          .grad_w = ht_grad_of(m, grads, layer, role) });
}

static enum ht_status norm_again(struct ht_model *m, int64_t n_tokens, int layer,
                                 enum ht_tensor_role role, const float *residual, void *y,
                                 float *rstd)
{
    return ht_rmsnorm_forward(m->be,
                              &(struct ht_rmsnorm_args){ .n_rows = n_tokens,
                                                         .d_model = m->cfg.d_model,
                                                         .dtype = m->dtype,
                                                         .eps = m->cfg.norm_eps,
                                                         .w = ht_model_vector(m, layer, role),
                                                         .r_in = residual,
                                                         .y = y,
                                                         .rstd = rstd });
}

static enum ht_status layer_backward(struct ht_model *m, int layer, struct ht_acts *a,
                                     const struct ht_model_batch *b, float *grads)
{
    struct ht_layer_acts *l = &a->layer[layer];
    const int64_t n = b->n_tokens;
    const bool selective = a->recompute == HT_RECOMPUTE_SELECTIVE;

    if (a->recompute == HT_RECOMPUTE_FULL) {
        HT_TRY(norm_again(m, n, layer, HT_T_NORM1, l->r_in, l->u1, l->rstd1));
        HT_TRY(ht_layer_forward(m, layer, a, b, NULL, false));
    }
    if (m->cfg.d_ff) {
        if (selective) HT_TRY(norm_again(m, n, layer, HT_T_NORM2, l->r_mid, l->u2, l->rstd2));
        HT_TRY(ht_mlp_backward(m, layer, a, n, grads));
        HT_TRY(norm_backward(m, a, n, layer, HT_T_NORM2, l->r_mid, l->rstd2, a->shared.grad_u,
                             false, true, grads));
    }
    if (selective) HT_TRY(norm_again(m, n, layer, HT_T_NORM1, l->r_in, l->u1, l->rstd1));
    if (m->cfg.layer_kind[layer] == HT_LAYER_MAMBA)
        HT_TRY(ht_mamba_backward(m, layer, a, b, grads));
    else
        HT_TRY(ht_attention_backward(m, layer, a, b, grads));
    return norm_backward(m, a, n, layer, HT_T_NORM1, l->r_in, l->rstd1, a->shared.grad_u, false,
                         layer > 0, grads);
}

static enum ht_status loss_backward(struct ht_model *m, struct ht_acts *a,
                                    const struct ht_model_batch *b, float loss_scale, float z_coef,
                                    float *grads, struct ht_loss *loss)
{
    struct ht_linear_ce_args ce = { .n_tokens = b->n_tokens,
                                    .d_model = m->cfg.d_model,
                                    .vocab_size = m->cfg.vocab_size,
                                    .dtype = m->dtype,
                                    .logit_scale = 1.0f / m->cfg.logits_scaling,
                                    .loss_scale = loss_scale,
                                    .z_coef = z_coef,
                                    .u = a->u_final,
                                    .weight = ht_model_matrix(m, -1, ht_head_role(m)),
                                    .labels = b->labels,
                                    .sums = b->loss_sums,
                                    .grad_u = a->grad_u_final,
                                    .grad_weight = ht_grad_of(m, grads, -1, ht_head_role(m)) };
    HT_TRY(ht_linear_ce(m->be, &ce));
    *loss = (struct ht_loss){ ce.loss_sum, ce.z_sum, ce.n_counted };
    return HT_OK;
}

enum ht_status ht_model_train(struct ht_model *m, struct ht_acts *a, const struct ht_model_batch *b,
                              float loss_scale, float z_coef, float *grads, struct ht_loss *loss,
                              ht_grads_hook *hook, void *user)
{
    const int64_t *start = m->list.layer_start;

    const int n_layers = (int)m->cfg.n_layers, head = ht_head_unit(m);

    HT_TRY(ht_stack_forward(m, a, b, NULL));
    HT_TRY(ht_unit_needed(m, head, n_layers, true));
    HT_TRY(loss_backward(m, a, b, loss_scale, z_coef, grads, loss));
    if (head != 0) HT_TRY(ht_unit_done(m, head, true)); // a tied one waits for the embedding
    if (hook) HT_TRY(hook(user, start[n_layers], false));
    HT_TRY(norm_backward(m, a, b->n_tokens, -1, HT_T_FINAL_NORM, a->r_final, a->rstd_final,
                         a->grad_u_final, true, true, grads));
    for (int i = n_layers - 1; i >= 0; i--) {
        HT_TRY(ht_unit_needed(m, 1 + i, i > 0 ? i : -1, true)); // the embedding's is no product
        HT_TRY(layer_backward(m, i, a, b, grads));
        HT_TRY(ht_unit_done(m, 1 + i, true));
        if (hook) HT_TRY(hook(user, start[i], false));
    }
    if (head != 0) HT_TRY(ht_unit_needed(m, 0, -1, true));
    HT_TRY(ht_embedding_backward(
        m->be, &(struct ht_embedding_args){ .n_tokens = b->n_tokens,
                                            .d_model = m->cfg.d_model,
                                            .vocab_size = m->cfg.vocab_size,
                                            .dtype = m->dtype,
                                            .multiplier = m->cfg.embedding_multiplier,
                                            .ids = b->ids,
                                            .grad_residual = a->shared.grad_r,
                                            .grad_weight = ht_grad_of(m, grads, -1, HT_T_EMBED) }));
    HT_TRY(ht_unit_done(m, 0, true));
    return hook ? hook(user, 0, true) : HT_OK;
}
