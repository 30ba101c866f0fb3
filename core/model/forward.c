/* core/model/forward.c: the residual stack, bottom to top (spec 3.1). */
#include "core/base/file.h"
#include "core/base/team.h"
#include "core/model/packed.h"
#include "core/model/stack.h"
#include "core/ops/loss.h"
#include "core/ops/rmsnorm.h"

/* r_out = r_in + m_res * branch; y = norm(r_out). branch NULL: r_in is normalised as it stands. */
static enum ht_status add_and_norm(struct ht_model *m, int64_t n_tokens, const float *w,
                                   const float *r_in, const void *branch, float *r_out, void *y,
                                   float *rstd)
{
    return ht_rmsnorm_forward(m->be,
                              &(struct ht_rmsnorm_args){ .n_rows = n_tokens,
                                                         .d_model = m->cfg.d_model,
                                                         .dtype = m->dtype,
                                                         .eps = m->cfg.norm_eps,
                                                         .branch_scale = m->cfg.residual_multiplier,
                                                         .round_residual = !m->cfg.residual_fp32,
                                                         .w = w,
                                                         .r_in = r_in,
                                                         .branch = branch,
                                                         .r_out = branch ? r_out : NULL,
                                                         .y = y,
                                                         .rstd = rstd });
}

enum ht_status ht_layer_forward(struct ht_model *m, int layer, struct ht_acts *acts,
                                const struct ht_model_batch *b, const struct ht_mixer_state *state,
                                bool branch_out)
{
    struct ht_layer_acts *a = &acts->layer[layer];
    void *branch = acts->shared.branch;
    void *mixer_branch = m->cfg.d_ff || branch_out ? branch : NULL;

    if (m->cfg.layer_kind[layer] == HT_LAYER_MAMBA)
        HT_TRY(ht_mamba_forward(m, layer, a, b, mixer_branch, state));
    else
        HT_TRY(ht_attention_forward(m, layer, a, b, mixer_branch, state));
    if (!m->cfg.d_ff) return HT_OK;
    HT_TRY(add_and_norm(m, b->n_tokens, ht_model_vector(m, layer, HT_T_NORM2), a->r_in, branch,
                        a->r_mid, a->u2, a->rstd2));
    return ht_mlp_forward(m, layer, a, b->n_tokens, branch_out ? branch : NULL);
}

enum ht_status ht_stack_forward(struct ht_model *m, struct ht_acts *a,
                                const struct ht_model_batch *b, const struct ht_mixer_state *states)
{
    const int n_layers = (int)m->cfg.n_layers;
    const float *residual = a->layer[0].r_in;
    const void *branch = NULL;

    if (b->n_tokens > a->max_tokens)
        return HT_FAIL(HT_ERR_ARG, "%lld tokens in a micro-batch; room was planned for %lld",
                       (long long)b->n_tokens, (long long)a->max_tokens);
    if (m->team && states)
        m->be->n_threads = ht_team_begin(m->team, b->n_tokens, ht_time_s(), ht_team_lost_cores());
    HT_TRY(ht_unit_needed(m, 0, 1, false));
    HT_TRY(ht_model_embed(m, b->n_tokens, b->ids, a->layer[0].r_in));
    HT_TRY(ht_unit_done(m, 0, false));
    for (int i = 0; i < n_layers; i++) {
        struct ht_layer_acts *l = &a->layer[i];
        HT_TRY(add_and_norm(m, b->n_tokens, ht_model_vector(m, i, HT_T_NORM1), residual, branch,
                            l->r_in, l->u1, l->rstd1));
        HT_TRY(ht_unit_needed(m, 1 + i, i + 1 < n_layers ? 2 + i : ht_head_unit(m), false));
        HT_TRY(ht_layer_forward(m, i, a, b, states ? &states[i] : NULL, true));
        HT_TRY(ht_unit_done(m, 1 + i, false));
        residual = ht_layer_residual(m, l);
        branch = a->shared.branch;
    }
    HT_TRY(add_and_norm(m, b->n_tokens, ht_model_vector(m, -1, HT_T_FINAL_NORM), residual, branch,
                        a->r_final, a->u_final, a->rstd_final));
    if (m->team && states) ht_team_end(m->team, ht_time_s(), ht_team_lost_cores());
    return HT_OK;
}

enum ht_status ht_model_evaluate(struct ht_model *m, struct ht_acts *a,
                                 const struct ht_model_batch *b, struct ht_loss *loss,
                                 float *logprobs)
{
    HT_TRY(ht_stack_forward(m, a, b, NULL));
    HT_TRY(ht_unit_needed(m, ht_head_unit(m), -1, false));
    struct ht_linear_ce_args ce = { .n_tokens = b->n_tokens,
                                    .d_model = m->cfg.d_model,
                                    .vocab_size = m->cfg.vocab_size,
                                    .dtype = m->dtype,
                                    .logit_scale = 1.0f / m->cfg.logits_scaling,
                                    .loss_scale = 1.0f,
                                    .u = a->u_final,
                                    .weight = ht_model_matrix(m, -1, ht_head_role(m)),
                                    .labels = b->labels,
                                    .sums = b->loss_sums,
                                    .logprobs = logprobs };
    HT_TRY(ht_linear_ce(m->be, &ce));
    HT_TRY(ht_unit_done(m, ht_head_unit(m), false));
    *loss = (struct ht_loss){ ce.loss_sum, ce.z_sum, ce.n_counted };
    return HT_OK;
}
