/* core/model/mamba_layer.c: the Mamba-2 mixer of one layer (spec 3.3).
 *
 *   [z | xBC | dt] = in_proj(u)   xBC = silu(conv(xBC))   y = scan(x, B, C, dt)   o = gated_norm(y,
 * z) branch = out_proj(o)
 */
#include "core/model/layers.h"
#include "core/model/linear.h"
#include "core/model/packed.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

static struct ht_conv1d_args conv_args(const struct ht_model *m, int layer,
                                       const struct ht_layer_acts *a,
                                       const struct ht_model_batch *b)
{
    const struct ht_model_config *c = &m->cfg;

    return (struct ht_conv1d_args){
        .seqs = b->seqs,
        .n_tokens = b->n_tokens,
        .n_channels = ht_conv_channels(c),
        .d_conv = c->d_conv,
        .dtype = m->dtype,
        .x = ht_column(a->zxbcdt, c->d_inner, m->dtype),
        .x_stride = ht_in_proj_width(c),
        .w = ht_model_vector(m, layer, HT_T_CONV_W),
        .bias = ht_model_vector(m, layer, HT_T_CONV_B),
        .y = a->conv,
        .y_stride = ht_conv_channels(c),
    };
}

static struct ht_ssd_args ssd_args(const struct ht_model *m, int layer,
                                   const struct ht_layer_acts *a, const struct ht_model_batch *b)
{
    const struct ht_model_config *c = &m->cfg;
    const int64_t gn = c->n_groups * c->d_state;

    return (struct ht_ssd_args){
        .seqs = b->seqs,
        .n_tokens = b->n_tokens,
        .n_heads = c->ssm_heads,
        .d_head = c->ssm_d_head,
        .d_state = c->d_state,
        .n_groups = c->n_groups,
        .chunk = c->chunk,
        .dtype = m->dtype,
        .dt_min = c->dt_limit_min,
        .dt_max = c->dt_limit_max,
        .x = a->conv,
        .B = ht_column(a->conv, c->d_inner, m->dtype),
        .C = ht_column(a->conv, c->d_inner + gn, m->dtype),
        .x_stride = ht_conv_channels(c),
        .dt_raw = ht_column(a->zxbcdt, ht_in_proj_width(c) - c->ssm_heads, m->dtype),
        .dt_stride = ht_in_proj_width(c),
        .dt_bias = ht_model_vector(m, layer, HT_T_DT_BIAS),
        .A_log = ht_model_vector(m, layer, HT_T_A_LOG),
        .D = ht_model_vector(m, layer, HT_T_D),
        .y = a->y,
        .y_stride = c->d_inner,
    };
}

static struct ht_gated_norm_args norm_args(const struct ht_model *m, int layer,
                                           const struct ht_layer_acts *a, int64_t n_tokens)
{
    const struct ht_model_config *c = &m->cfg;

    return (struct ht_gated_norm_args){
        .n_tokens = n_tokens,
        .d_inner = c->d_inner,
        .n_groups = c->n_groups,
        .full = c->gated_norm_full,
        .eps = c->norm_eps,
        .dtype = m->dtype,
        .w = ht_model_vector(m, layer, HT_T_GATED_NORM),
        .y = a->y,
        .z = a->zxbcdt,
        .z_stride = ht_in_proj_width(c),
        .o = a->o,
        .rstd = a->gated_rstd,
    };
}

enum ht_status ht_mamba_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                                const struct ht_model_batch *b, void *branch,
                                const struct ht_mixer_state *state)
{
    const struct ht_model_config *c = &m->cfg;
    const struct ht_linear in = { b->n_tokens, c->d_model, ht_in_proj_width(c), m->dtype };
    const struct ht_linear out = { b->n_tokens, c->d_inner, c->d_model, m->dtype };
    struct ht_conv1d_args conv = conv_args(m, layer, a, b);
    struct ht_ssd_args ssd = ssd_args(m, layer, a, b);
    const struct ht_gated_norm_args norm = norm_args(m, layer, a, b->n_tokens);

    HT_TRY(ht_model_linear(m, layer, HT_T_IN_PROJ, &in, a->zxbcdt, a->u1));
    if (state) {
        conv.state = state->conv;
        conv.slot = state->slot;
    }
    HT_TRY(ht_conv1d_forward(m->be, &conv));
    if (state && state->one_each) {
        HT_TRY(ht_ssd_step(m->be, &ssd, state->ssm, state->slot));
    } else {
        if (state)
            ssd.init_state = ssd.final_state = state->ssm + (state->slot ? state->slot[0] : 0) *
                                                                c->ssm_heads * c->ssm_d_head *
                                                                c->d_state;
        HT_TRY(ht_ssd_forward(m->be, &ssd));
    }
    HT_TRY(ht_gated_norm_forward(m->be, &norm));
    if (!branch) return HT_OK; // recomputation: only the activations are wanted
    return ht_model_linear(m, layer, HT_T_OUT_PROJ, &out, branch, a->o);
}

enum ht_status ht_mamba_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                                 const struct ht_model_batch *b, float *grads)
{
    const struct ht_model_config *c = &m->cfg;
    struct ht_layer_acts *a = &acts->layer[layer];
    struct ht_shared_acts *s = &acts->shared;
    const int64_t width = ht_in_proj_width(c), channels = ht_conv_channels(c);
    const int64_t gn = c->n_groups * c->d_state;
    const struct ht_linear in = { b->n_tokens, c->d_model, width, m->dtype };
    const struct ht_linear out = { b->n_tokens, c->d_inner, c->d_model, m->dtype };
    struct ht_conv1d_args conv = conv_args(m, layer, a, b);
    struct ht_ssd_args ssd = ssd_args(m, layer, a, b);
    struct ht_gated_norm_args norm = norm_args(m, layer, a, b->n_tokens);

    if (acts->recompute == HT_RECOMPUTE_SELECTIVE) HT_TRY(ht_conv1d_forward(m->be, &conv));

    HT_TRY(ht_linear_backward_x(m->be, &out, s->grad_inner, s->grad_branch,
                                ht_model_matrix(m, layer, HT_T_OUT_PROJ)));
    if (acts->recompute != HT_RECOMPUTE_SELECTIVE)
        norm.o = NULL; // still there from the forward pass
    norm.grad_o = norm.grad_y = s->grad_inner;
    norm.grad_z = s->grad_wide;
    norm.grad_z_stride = width;
    norm.grad_w = ht_grad_of(m, grads, layer, HT_T_GATED_NORM);
    HT_TRY(ht_gated_norm_backward(m->be, &norm));
    HT_TRY(ht_linear_backward_w(m->be, &out, ht_grad_of(m, grads, layer, HT_T_OUT_PROJ),
                                s->grad_branch, a->o));

    ssd.grad_y = s->grad_inner;
    ssd.grad_y_stride = c->d_inner;
    ssd.grad_x = s->grad_conv;
    ssd.grad_B = ht_column(s->grad_conv, c->d_inner, m->dtype);
    ssd.grad_C = ht_column(s->grad_conv, c->d_inner + gn, m->dtype);
    ssd.grad_x_stride = channels;
    ssd.grad_dt_raw = ht_column(s->grad_wide, width - c->ssm_heads, m->dtype);
    ssd.grad_dt_stride = width;
    ssd.grad_dt_bias = ht_grad_of(m, grads, layer, HT_T_DT_BIAS);
    ssd.grad_A_log = ht_grad_of(m, grads, layer, HT_T_A_LOG);
    ssd.grad_D = ht_grad_of(m, grads, layer, HT_T_D);
    HT_TRY(ht_ssd_backward(m->be, &ssd));

    conv.grad_y = s->grad_conv;
    conv.grad_y_stride = channels;
    conv.grad_x = ht_column(s->grad_wide, c->d_inner, m->dtype);
    conv.grad_x_stride = width;
    conv.grad_w = ht_grad_of(m, grads, layer, HT_T_CONV_W);
    conv.grad_bias = ht_grad_of(m, grads, layer, HT_T_CONV_B);
    HT_TRY(ht_conv1d_backward(m->be, &conv));

    HT_TRY(ht_linear_backward_w(m->be, &in, ht_grad_of(m, grads, layer, HT_T_IN_PROJ), s->grad_wide,
                                a->u1));
    return ht_linear_backward_x(m->be, &in, s->grad_u, s->grad_wide,
                                ht_model_matrix(m, layer, HT_T_IN_PROJ));
}
