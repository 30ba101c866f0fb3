/* core/model/acts.c: the activation buffers of a micro-batch and the sizes of everything.
 *
 * recompute   kept per layer                                          shared by all layers
 *   none      all of struct ht_layer_acts                             -
 *   selective residuals, rstd, in_proj output, scan output, qkv,      u1, u2, conv, o, act
 *             attention output, gate_up
 *   full      residual entering the layer                             the rest
 * Without a backward pass everything is shared, the residual too.
 */
#include <stdlib.h>

#include "attention/flash.h"
#include "core/model/layers.h"
#include "core/ops/gemm.h"
#include "core/ops/loss.h"
#include "core/ops/rmsnorm.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

static int64_t max64(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

/* n elements per token of the run's dtype, or of fp32. */
struct taker {
    struct ht_arena *arena;
    int64_t n_tokens;
    enum ht_dtype dtype;
    enum ht_status st;
};

static void *take(struct taker *t, int64_t per_token)
{
    void *p = NULL;
    if (t->st == HT_OK && per_token > 0)
        t->st = ht_arena_take(&p, t->arena,
                              (size_t)(t->n_tokens * per_token) * ht_dtype_bytes(t->dtype));
    return p;
}

static float *take_f32(struct taker *t, int64_t per_token)
{
    struct taker f = *t;
    f.dtype = HT_DTYPE_F32;
    float *p = take(&f, per_token);
    t->st = f.st;
    return p;
}

/* What recompute = selective computes again. */
static void take_cheap(struct taker *t, struct ht_layer_acts *l, const struct ht_model_config *c,
                       bool mamba)
{
    l->u1 = take(t, c->d_model);
    if (mamba) {
        l->conv = take(t, ht_conv_channels(c));
        l->o = take(t, c->d_inner);
    }
    if (c->d_ff) {
        l->u2 = take(t, c->d_model);
        l->act = take(t, c->d_ff);
    }
}

static void take_costly(struct taker *t, struct ht_layer_acts *l, const struct ht_model_config *c,
                        bool mamba, bool attention)
{
    l->rstd1 = take_f32(t, 1);
    if (mamba) {
        l->zxbcdt = take(t, ht_in_proj_width(c));
        l->y = take(t, c->d_inner);
        l->gated_rstd = take_f32(t, c->n_groups);
    }
    if (attention) {
        l->qkv = take(t, ht_qkv_width(c));
        l->heads = take(t, c->n_heads * c->d_head);
        l->lse = take_f32(t, c->n_heads);
    }
    if (c->d_ff) {
        l->rstd2 = take_f32(t, 1);
        l->gate_up = take(t, 2 * c->d_ff);
    }
}

/* Pointers of `from` for what `to` has not got of its own. */
static void share(struct ht_layer_acts *to, const struct ht_layer_acts *from)
{
    if (!to->u1) to->u1 = from->u1;
    if (!to->conv) to->conv = from->conv;
    if (!to->o) to->o = from->o;
    if (!to->u2) to->u2 = from->u2;
    if (!to->act) to->act = from->act;
    if (!to->rstd1) to->rstd1 = from->rstd1;
    if (!to->zxbcdt) to->zxbcdt = from->zxbcdt;
    if (!to->y) to->y = from->y;
    if (!to->gated_rstd) to->gated_rstd = from->gated_rstd;
    if (!to->qkv) to->qkv = from->qkv;
    if (!to->heads) to->heads = from->heads;
    if (!to->lse) to->lse = from->lse;
    if (!to->rstd2) to->rstd2 = from->rstd2;
    if (!to->gate_up) to->gate_up = from->gate_up;
    if (!to->r_in) to->r_in = from->r_in;
    if (!to->r_mid) to->r_mid = from->r_mid;
}

static void take_backward(struct taker *t, struct ht_shared_acts *s,
                          const struct ht_model_config *c, bool mamba, bool attention)
{
    const int64_t wide = max64(mamba ? ht_in_proj_width(c) : 0, attention ? ht_qkv_width(c) : 0);
    const int64_t inner = max64(mamba ? c->d_inner : 0, attention ? c->n_heads * c->d_head : 0);

    s->grad_r = take_f32(t, c->d_model);
    s->grad_branch = take(t, c->d_model);
    s->grad_u = take(t, c->d_model);
    s->grad_wide = take(t, wide);
    s->grad_inner = take(t, inner);
    if (mamba) s->grad_conv = take(t, ht_conv_channels(c));
    s->grad_act = take(t, c->d_ff);
}

enum ht_status ht_acts_layout(struct ht_acts *a, const struct ht_model_config *c,
                              enum ht_dtype dtype, int64_t n_tokens)
{
    struct taker t = { &a->arena, n_tokens, dtype, HT_OK };
    struct ht_layer_acts common = { 0 };
    bool mamba = false, attention = false;
    const bool keep_all = !a->forward_only && a->recompute == HT_RECOMPUTE_NONE;
    const bool keep_costly = !a->forward_only && a->recompute != HT_RECOMPUTE_FULL;

    for (int64_t i = 0; i < c->n_layers; i++) {
        mamba |= c->layer_kind[i] == HT_LAYER_MAMBA;
        attention |= c->layer_kind[i] == HT_LAYER_ATTENTION;
    }
    if (!keep_all) take_cheap(&t, &common, c, mamba);
    if (!keep_costly) {
        take_costly(&t, &common, c, mamba, attention);
        common.r_mid = take_f32(&t, c->d_model);
    }
    if (a->forward_only) common.r_in = common.r_mid; // one residual, updated in place
    for (int64_t i = 0; i < c->n_layers; i++) {
        struct ht_layer_acts *l = &a->layer[i];
        const bool is_mamba = c->layer_kind[i] == HT_LAYER_MAMBA;
        if (!a->forward_only) l->r_in = take_f32(&t, c->d_model);
        if (keep_all) take_cheap(&t, l, c, is_mamba);
        if (keep_costly) take_costly(&t, l, c, is_mamba, !is_mamba);
        if (keep_costly && c->d_ff) l->r_mid = take_f32(&t, c->d_model);
        share(l, &common);
    }
    a->shared.branch = take(&t, c->d_model);
    a->r_final = a->forward_only ? common.r_in : take_f32(&t, c->d_model);
    a->rstd_final = take_f32(&t, 1);
    a->u_final = take(&t, c->d_model);
    if (!a->forward_only) {
        a->grad_u_final = take(&t, c->d_model);
        take_backward(&t, &a->shared, c, mamba, attention);
    }
    return t.st;
}

int64_t ht_model_scratch_bytes(const struct ht_model_config *c, enum ht_dtype dtype,
                               bool forward_only, int64_t n_tokens, int n_threads)
{
    const int32_t starts[2] = { 0, (int32_t)n_tokens };
    const struct ht_seqs one = { 1, starts };
    size_t need = ht_linear_ce_scratch_bytes(n_tokens, c->d_model, c->vocab_size, dtype);

#define AT_LEAST(expression)                                                                       \
    do {                                                                                           \
        const size_t n_ = (expression);                                                            \
        if (n_ > need) need = n_;                                                                  \
    } while (0)
    AT_LEAST(ht_gemm_scratch_bytes(n_tokens, c->vocab_size, c->d_model, dtype));
    AT_LEAST(ht_gemm_scratch_bytes(n_tokens, 2 * c->d_ff, c->d_model, dtype));
    AT_LEAST(ht_gemm_scratch_bytes(2 * c->d_ff, c->d_model, n_tokens, dtype));
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->layer_kind[i] == HT_LAYER_MAMBA) {
            const struct ht_ssd_args ssd = { .seqs = one,
                                             .n_tokens = n_tokens,
                                             .n_heads = c->ssm_heads,
                                             .d_head = c->ssm_d_head,
                                             .d_state = c->d_state,
                                             .n_groups = c->n_groups,
                                             .chunk = c->chunk,
                                             .dtype = dtype };
            AT_LEAST(ht_gemm_scratch_bytes(n_tokens, ht_in_proj_width(c), c->d_model, dtype));
            AT_LEAST(ht_gemm_scratch_bytes(ht_in_proj_width(c), c->d_model, n_tokens, dtype));
            AT_LEAST(ht_conv1d_scratch_bytes(n_tokens, ht_conv_channels(c), c->d_conv));
            AT_LEAST(ht_ssd_forward_scratch_bytes(&ssd));
            if (!forward_only) AT_LEAST(ht_ssd_backward_scratch_bytes(&ssd));
            AT_LEAST(ht_gated_norm_scratch_bytes(n_tokens, c->d_inner));
        } else {
            const struct ht_flash_args flash = { .seqs = one,
                                                 .n_tokens = n_tokens,
                                                 .n_heads = c->n_heads,
                                                 .n_kv_heads = c->n_kv_heads,
                                                 .d_head = c->d_head,
                                                 .dtype = dtype };
            AT_LEAST(ht_gemm_scratch_bytes(n_tokens, ht_qkv_width(c), c->d_model, dtype));
            AT_LEAST(ht_gemm_scratch_bytes(ht_qkv_width(c), c->d_model, n_tokens, dtype));
            AT_LEAST(ht_flash_scratch_bytes(&flash, n_threads));
        }
    }
#undef AT_LEAST
    return (int64_t)need;
}

/* What the CUDA operations take where it differs from the CPU's. */
static int64_t scratch_bytes_cuda(const struct ht_model_config *c, enum ht_dtype dtype,
                                  bool forward_only, int64_t n_tokens)
{
    const int32_t starts[2] = { 0, (int32_t)n_tokens };
    const struct ht_ssd_args ssd = { .seqs = { 1, starts },
                                     .n_tokens = n_tokens,
                                     .n_heads = c->ssm_heads,
                                     .d_head = c->ssm_d_head,
                                     .d_state = c->d_state,
                                     .n_groups = c->n_groups,
                                     .chunk = c->chunk,
                                     .dtype = dtype };
    // logits of 4096 tokens or 1 GiB of them, whichever is less (loss_cuda.cu takes what is there)
    const int64_t rows = n_tokens < 4096 ? n_tokens : 4096;
    int64_t need = rows * (4 * c->vocab_size + 16) + 1024;

    if (need > (int64_t)1 << 30) need = (int64_t)1 << 30;
    need = max64(need, (int64_t)ht_rmsnorm_scratch_bytes(n_tokens, c->d_model));
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->layer_kind[i] != HT_LAYER_MAMBA) continue;
        need = max64(need, (int64_t)ht_ssd_forward_scratch_bytes_cuda(&ssd));
        if (!forward_only) need = max64(need, (int64_t)ht_ssd_backward_scratch_bytes_cuda(&ssd));
        break; // all Mamba layers have one shape
    }
    return need;
}

enum ht_status ht_model_sizes(struct ht_model_sizes *out, const struct ht_model_config *cfg,
                              enum ht_dtype dtype, enum ht_recompute recompute, bool forward_only,
                              int64_t n_tokens, int n_threads)
{
    struct ht_layer_acts *layers = calloc((size_t)cfg->n_layers, sizeof *layers);
    struct ht_acts counting = { .recompute = recompute,
                                .forward_only = forward_only,
                                .layer = layers };

    *out = (struct ht_model_sizes){ 0 };
    if (!layers)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld layers", (long long)cfg->n_layers);
    // an arena that only counts: addresses are computed, never used
    counting.arena = (struct ht_arena){ .base = (unsigned char *)64,
                                        .size_bytes = SIZE_MAX / 4,
                                        .name = "activations" };
    const enum ht_status st = ht_acts_layout(&counting, cfg, dtype, n_tokens);
    free(layers);
    out->activation_bytes = (int64_t)counting.arena.used_bytes;
    out->scratch_bytes = ht_model_scratch_bytes(cfg, dtype, forward_only, n_tokens, n_threads);
    out->scratch_cuda_bytes =
        max64(out->scratch_bytes, scratch_bytes_cuda(cfg, dtype, forward_only, n_tokens));
    return st;
}

enum ht_status ht_acts_create(struct ht_acts **out, const struct ht_model *m,
                              enum ht_recompute recompute, bool forward_only, int64_t n_tokens)
{
    enum ht_status st = HT_OK;
    struct ht_model_sizes sizes;
    struct ht_acts *a = calloc(1, sizeof *a);

    *out = NULL;
    if (!a) return HT_FAIL(HT_ERR_MEMORY, "no memory for activations");
    a->be = m->be;
    a->recompute = recompute;
    a->forward_only = forward_only;
    a->max_tokens = n_tokens;
    a->layer = calloc((size_t)m->cfg.n_layers, sizeof *a->layer);
    if (!a->layer) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for %lld layers", (long long)m->cfg.n_layers);
        goto done;
    }
    HT_TRY_GOTO(st, done,
                ht_model_sizes(&sizes, &m->cfg, m->dtype, recompute, forward_only, n_tokens,
                               m->be->n_threads));
    HT_TRY_GOTO(
        st, done,
        ht_backend_arena_create(&a->arena, m->be, "activations", (size_t)sizes.activation_bytes));
    HT_TRY_GOTO(st, done, ht_acts_layout(a, &m->cfg, m->dtype, n_tokens));
    const bool cuda = m->be->kind == HT_BACKEND_CUDA;
    HT_TRY_GOTO(st, done,
                ht_backend_reserve_scratch(
                    m->be, (size_t)(cuda ? sizes.scratch_cuda_bytes : sizes.scratch_bytes)));
    *out = a;
    a = NULL;
done:
    ht_acts_free(a);
    return st;
}

void ht_acts_free(struct ht_acts *a)
{
    if (!a) return;
    if (a->be) ht_backend_arena_free(&a->arena, a->be);
    free(a->layer);
    free(a);
}
