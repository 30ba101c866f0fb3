/* core/model/attention_layer.c: the attention mixer of one layer (spec 3.4, 3.5).
 *
 *   qkv = u [Wq; Wk; Wv]^T   q, k = rope(q, k)   heads = softmax(scale q k^T) v   branch = heads
 * Wo^T
 */
#include "attention/flash.h"
#include "attention/rope.h"
#include "core/model/fp8.h"
#include "core/model/layers.h"
#include "core/model/linear.h"
#include "core/model/packed.h"

static enum ht_status rotate(struct ht_model *m, void *qkv, const struct ht_model_batch *b,
                             bool inverse)
{
    const struct ht_model_config *c = &m->cfg;

    if (c->rope_dims == 0) return HT_OK;
    return ht_rope_apply(m->be, &(struct ht_rope_args){ .n_tokens = b->n_tokens,
                                                        .n_heads = c->n_heads,
                                                        .n_kv_heads = c->n_kv_heads,
                                                        .d_head = c->d_head,
                                                        .rope_dims = c->rope_dims,
                                                        .dtype = m->dtype,
                                                        .qkv = qkv,
                                                        .qkv_stride = ht_qkv_width(c),
                                                        .pos = b->pos,
                                                        .cos_table = m->cos_table,
                                                        .sin_table = m->sin_table,
                                                        .n_positions = c->max_position,
                                                        .inverse = inverse });
}

static struct ht_flash_args flash_args(const struct ht_model *m, const struct ht_layer_acts *a,
                                       const struct ht_model_batch *b)
{
    const struct ht_model_config *c = &m->cfg;

    return (struct ht_flash_args){ .seqs = b->seqs,
                                   .n_tokens = b->n_tokens,
                                   .n_heads = c->n_heads,
                                   .n_kv_heads = c->n_kv_heads,
                                   .d_head = c->d_head,
                                   .dtype = m->dtype,
                                   .scale = c->attention_scale,
                                   .qkv = a->qkv,
                                   .qkv_stride = ht_qkv_width(c),
                                   .o = a->heads,
                                   .lse = a->lse };
}

/* Append the new k and v rows of every sequence to its cache, then attend over the cache. */
static enum ht_status attend_cached(struct ht_model *m, struct ht_layer_acts *a,
                                    const struct ht_model_batch *b,
                                    const struct ht_mixer_state *state)
{
    const struct ht_model_config *c = &m->cfg;
    const int64_t q_width = c->n_heads * c->d_head, kv_width = c->n_kv_heads * c->d_head;
    const struct ht_kv_append_args append = { .seqs = b->seqs,
                                              .n_tokens = b->n_tokens,
                                              .width = kv_width,
                                              .dtype = m->dtype,
                                              .k = ht_column(a->qkv, q_width, m->dtype),
                                              .v = ht_column(a->qkv, q_width + kv_width, m->dtype),
                                              .stride = ht_qkv_width(c),
                                              .k_cache = state->k_cache,
                                              .v_cache = state->v_cache,
                                              .past = state->past };

    HT_TRY(ht_kv_append(m->be, &append));
    struct ht_kv_attention_args kv = { .seqs = b->seqs,
                                       .n_tokens = b->n_tokens,
                                       .n_heads = c->n_heads,
                                       .n_kv_heads = c->n_kv_heads,
                                       .d_head = c->d_head,
                                       .dtype = m->dtype,
                                       .scale = c->attention_scale,
                                       .q = a->qkv,
                                       .q_stride = ht_qkv_width(c),
                                       .k_cache = (const void *const *)state->k_cache,
                                       .v_cache = (const void *const *)state->v_cache,
                                       .past = state->past,
                                       .o = a->heads };
    if (!state->groups) return ht_kv_attention(m->be, &kv);
    for (int64_t g = 0; g < state->groups->n; g++) {
        const int64_t first = state->groups->start[g];
        kv.seqs.n_seqs = kv.n_tokens = state->groups->start[g + 1] - first;
        kv.q = ht_column(a->qkv, first * ht_qkv_width(c), m->dtype);
        kv.k_cache = (const void *const *)state->k_cache + first;
        kv.v_cache = (const void *const *)state->v_cache + first;
        kv.past = state->past + first;
        kv.o = ht_column(a->heads, first * q_width, m->dtype);
        HT_TRY(ht_kv_attention(m->be, &kv));
    }
    return HT_OK;
}

enum ht_status ht_attention_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                                    const struct ht_model_batch *b, void *branch,
                                    const struct ht_mixer_state *state)
{
    const struct ht_model_config *c = &m->cfg;
    const struct ht_linear in = { b->n_tokens, c->d_model, ht_qkv_width(c), m->dtype };
    const struct ht_linear out = { b->n_tokens, c->n_heads * c->d_head, c->d_model, m->dtype };

    // q, k and v stand one after the other in the flat buffer: one product
    HT_TRY(ht_model_linear(m, layer, HT_T_Q, &in, a->qkv, a->u1));
    HT_TRY(rotate(m, a->qkv, b, false));
    if (state) {
        HT_TRY(attend_cached(m, a, b, state));
    } else {
        const struct ht_flash_args flash = flash_args(m, a, b);
        HT_TRY(ht_flash_forward(m->be, &flash));
    }
    if (!branch) return HT_OK; // recomputation: only the activations are wanted
    return ht_model_linear(m, layer, HT_T_O, &out, branch, a->heads);
}

enum ht_status ht_attention_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                                     const struct ht_model_batch *b, float *grads)
{
    const struct ht_model_config *c = &m->cfg;
    struct ht_layer_acts *a = &acts->layer[layer];
    struct ht_shared_acts *s = &acts->shared;
    const struct ht_linear in = { b->n_tokens, c->d_model, ht_qkv_width(c), m->dtype };
    const struct ht_linear out = { b->n_tokens, c->n_heads * c->d_head, c->d_model, m->dtype };
    struct ht_flash_args flash = flash_args(m, a, b);

    HT_TRY(ht_model_linear_backward_x(m, layer, HT_T_O, &out, s->grad_inner, s->grad_branch));
    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_O, &out, grads, s->grad_branch, a->heads));
    flash.grad_o = s->grad_inner;
    flash.grad_qkv = s->grad_wide;
    flash.grad_qkv_stride = ht_qkv_width(c);
    HT_TRY(ht_flash_backward(m->be, &flash));
    HT_TRY(rotate(m, s->grad_wide, b, true));
    HT_TRY(ht_model_linear_backward_w(m, layer, HT_T_Q, &in, grads, s->grad_wide, a->u1));
    return ht_model_linear_backward_x(m, layer, HT_T_Q, &in, s->grad_u, s->grad_wide);
}
