/* core/model/mamba_layer.c: the Mamba-2 mixer of one layer (spec 3.3).
 *
 *   [z | xBC | dt] = in_proj(u)   xBC = silu(conv(xBC))   y = scan(x, B, C, dt)   o = gated_norm(y,
 * z) branch = out_proj(o)
 */
#include <string.h>

#include "core/model/fp8.h"
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

/* Both states of a slot into another one. */
static enum ht_status copy_slot(const struct ht_model *m, const struct ht_mixer_state *state,
                                int32_t from, int32_t to)
{
    enum { PIECE = 1 << 16 }; // bytes
    const struct ht_model_config *c = &m->cfg;
    const int64_t conv_n = (c->d_conv - 1) * ht_conv_channels(c);
    const int64_t ssm_bytes =
        c->ssm_heads * c->ssm_d_head * c->d_state * (int64_t)ht_dtype_bytes(state->ssm.dtype);
    const char *src = (const char *)state->ssm.p + from * ssm_bytes;
    char *dst = (char *)state->ssm.p + to * ssm_bytes;

    HT_TRY(ht_backend_copy(m->be, state->conv + to * conv_n, state->conv + from * conv_n,
                           (size_t)conv_n * sizeof *state->conv));
    if (m->be->kind != HT_BACKEND_CPU) return ht_backend_copy(m->be, dst, src, (size_t)ssm_bytes);
#pragma omp parallel for num_threads(m->be->n_threads) schedule(static) if (ssm_bytes > 4 * PIECE)
    for (int64_t i = 0; i < ssm_bytes; i += PIECE) {
        const int64_t n = ssm_bytes - i < PIECE ? ssm_bytes - i : PIECE;
        memcpy(dst + i, src + i, (size_t)n);
    }
    return HT_OK;
}

/* Convolution and scan of the rows, group by group. */
static enum ht_status step_groups(struct ht_model *m, const struct ht_conv1d_args *all_conv,
                                  const struct ht_ssd_args *all_ssd, const struct ht_layer_acts *a,
                                  const struct ht_model_batch *b,
                                  const struct ht_mixer_state *state)
{
    const struct ht_model_config *c = &m->cfg;
    const struct ht_row_groups *groups = state->groups;
    const int64_t width = ht_saved_width(c);
    const size_t saved_bytes = (size_t)width * ht_dtype_bytes(m->dtype);

    for (int64_t row = groups->start[1]; row < b->n_tokens; row++)
        HT_TRY(ht_backend_copy(
            m->be, (char *)groups->saved + (size_t)(row - groups->start[1]) * saved_bytes,
            ht_column(a->zxbcdt, row * ht_in_proj_width(c) + c->d_inner, m->dtype), saved_bytes));
    for (int64_t g = 0; g < groups->n; g++) {
        const int64_t first = groups->start[g], n = groups->start[g + 1] - first;
        struct ht_conv1d_args conv = *all_conv;
        struct ht_ssd_args ssd = *all_ssd;
        struct ht_ssm_states ssm = state->ssm;
        conv.seqs.n_seqs = ssd.seqs.n_seqs = conv.n_tokens = ssd.n_tokens = n;
        conv.x = ht_column(conv.x, first * conv.x_stride, m->dtype);
        conv.y = ht_column(conv.y, first * conv.y_stride, m->dtype);
        conv.state = state->conv;
        conv.slot = state->slot + first;
        ssd.x = ht_column(ssd.x, first * ssd.x_stride, m->dtype);
        ssd.B = ht_column(ssd.B, first * ssd.x_stride, m->dtype);
        ssd.C = ht_column(ssd.C, first * ssd.x_stride, m->dtype);
        ssd.dt_raw = ht_column(ssd.dt_raw, first * ssd.dt_stride, m->dtype);
        ssd.y = ht_column(ssd.y, first * ssd.y_stride, m->dtype);
        HT_TRY(ht_conv1d_forward(m->be, &conv));
        ssm.position = state->past + first;
        HT_TRY(ht_ssd_step(m->be, &ssd, &ssm, state->slot + first));
        for (int64_t i = 0; g == 0 && i < groups->n_copies; i++)
            HT_TRY(copy_slot(m, state, groups->copy_from[i], groups->copy_to[i]));
    }
    return HT_OK;
}

enum ht_status ht_mamba_replay(struct ht_model *m, int layer, struct ht_layer_acts *a,
                               const struct ht_mixer_state *state, int32_t slot, int64_t position,
                               const void *saved)
{
    const struct ht_model_batch b = { .n_tokens = 1, .seqs = { 1, state->numbers } };
    struct ht_conv1d_args conv = conv_args(m, layer, a, &b);
    struct ht_ssd_args ssd = ssd_args(m, layer, a, &b);
    struct ht_ssm_states ssm = state->ssm;

    ssm.position = NULL;
    ssm.first_position = position;
    conv.state = state->conv;
    conv.slot = state->numbers + slot;
    conv.x = saved;
    conv.x_stride = ssd.dt_stride = ht_saved_width(&m->cfg);
    ssd.dt_raw = ht_column(saved, ht_conv_channels(&m->cfg), m->dtype);
    HT_TRY(ht_conv1d_forward(m->be, &conv));
    return ht_ssd_step(m->be, &ssd, &ssm, state->numbers + slot);
}

/* Scan of several tokens of one sequence, from its state and into it. */
static enum ht_status scan_on(struct ht_model *m, struct ht_ssd_args *ssd,
                              const struct ht_mixer_state *state)
{
    const struct ht_model_config *c = &m->cfg;
    const int64_t n = c->ssm_heads * c->ssm_d_head * c->d_state;
    const size_t mark = ht_arena_mark(&m->be->scratch);
    struct ht_ssm_states ssm = state->ssm;
    enum ht_status st = HT_OK;
    void *whole = NULL;

    if (ssm.dtype == HT_DTYPE_F32) {
        ssd->init_state = ssd->final_state = (float *)ssm.p + state->first_slot * n;
        return ht_ssd_forward(m->be, ssd);
    }
    ssm.position = NULL;
    ssm.first_position = state->first_past + ssd->n_tokens - 1;
    HT_TRY(ht_arena_take(&whole, &m->be->scratch, (size_t)n * sizeof(float)));
    ssd->init_state = ssd->final_state = whole;
    HT_TRY_GOTO(st, done, ht_ssm_state_load(m->be, whole, &ssm, state->first_slot, n));
    HT_TRY_GOTO(st, done, ht_ssd_forward(m->be, ssd));
    HT_TRY_GOTO(st, done, ht_ssm_state_store(m->be, &ssm, state->first_slot, n, whole));
done:
    ht_arena_reset(&m->be->scratch, mark);
    return st;
}

/* One token of each sequence. */
static enum ht_status step_on(struct ht_model *m, const struct ht_ssd_args *ssd,
                              const struct ht_mixer_state *state)
{
    struct ht_ssm_states ssm = state->ssm;

    ssm.position = state->past;
    return ht_ssd_step(m->be, ssd, &ssm, state->slot);
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
    if (state && state->groups) {
        HT_TRY(step_groups(m, &conv, &ssd, a, b, state));
    } else {
        if (state) {
            conv.state = state->conv;
            conv.slot = state->slot;
        }
        HT_TRY(ht_conv1d_forward(m->be, &conv));
    }
    if (!state)
        HT_TRY(ht_ssd_forward(m->be, &ssd));
    else if (!state->one_each)
        HT_TRY(scan_on(m, &ssd, state));
    else if (!state->groups)
        HT_TRY(step_on(m, &ssd, state));
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

    HT_TRY(
        ht_model_linear_backward_x(m, layer, HT_T_OUT_PROJ, &out, s->grad_inner, s->grad_branch));
    if (acts->recompute != HT_RECOMPUTE_SELECTIVE)
        norm.o = NULL; // still there from the forward pass
    norm.grad_o = norm.grad_y = s->grad_inner;
    norm.grad_z = s->grad_wide;
    norm.grad_z_stride = width;
    norm.grad_w = ht_grad_of(m, grads, layer, HT_T_GATED_NORM);
    HT_TRY(ht_gated_norm_backward(m->be, &norm));
    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_OUT_PROJ, &out, grads, s->grad_branch, a->o));

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

    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_IN_PROJ, &in, grads, s->grad_wide, a->u1));
    return ht_model_linear_backward_x(m, layer, HT_T_IN_PROJ, &in, s->grad_u, s->grad_wide);
}
