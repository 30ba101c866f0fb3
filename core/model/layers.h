/* core/model/layers.h: the three kinds of sub-layer, forward and backward, inside core/model only
 * [6].
 *
 * Each reads a normalised input u (T, d_model) and writes a branch (T, d_model); the stack adds
 * branches to the residual. Backward receives grad_branch and writes grad_u; weight gradients are
 * added in grads (flat). Activations that a recipe does not keep stand in shared buffers and are
 * computed again.
 */
#ifndef HT_MODEL_LAYERS_H
#define HT_MODEL_LAYERS_H

#include "core/model/model.h"
#include "ssm/ssd.h"

/* Buffers of one layer. Which are kept per layer and which are shared: acts.c. */
struct ht_layer_acts {
    float *r_in, *rstd1; // (T, d_model) residual entering, (T)
    void *u1;            // (T, d_model)
    void *zxbcdt;        // (T, in_proj width) z | x B C | dt
    void *conv;          // (T, CD) after convolution and SiLU: x | B | C
    void *y, *o;         // (T, d_inner) scan output, gated and normalised
    float *gated_rstd;   // (T, n_groups)
    void *qkv;           // (T, qkv width) after RoPE
    void *heads;         // (T, n_heads*d_head) attention output
    float *lse;          // (T, n_heads)
    float *r_mid, *rstd2;
    void *u2;
    void *gate_up; // (T, 2*d_ff)
    void *act;     // (T, d_ff)
};

/* Buffers shared by all layers. */
struct ht_shared_acts {
    void *branch; // (T, d_model)
    // backward
    float *grad_r;              // (T, d_model)
    void *grad_branch, *grad_u; // (T, d_model)
    void *grad_wide;            // (T, max(in_proj width, qkv width))
    void *grad_inner;           // (T, max(d_inner, n_heads*d_head))
    void *grad_conv;            // (T, CD)
    void *grad_act;             // (T, d_ff)
};

struct ht_acts {
    enum ht_recompute recompute;
    bool forward_only;
    int64_t max_tokens;
    struct ht_layer_acts *layer; // (n_layers)
    struct ht_shared_acts shared;
    float *r_final, *rstd_final;  // (T, d_model), (T)
    void *u_final, *grad_u_final; // (T, d_model)
    struct ht_arena arena;
    struct ht_backend *be; // whose memory it is
};

/* Carried state of the layers of a batch of sequences (prefill and decode); NULL in training. */
struct ht_mixer_state {
    float *conv;              // (n_slots, W-1, CD), updated in place
    struct ht_ssm_states ssm; // (n_slots, H, P, N), updated in place; position is `past` here
    const int32_t *slot;      // (n_seqs) place of each sequence in both; NULL: in order
    int32_t first_slot;     // with several tokens of a sequence, which is the only one: its place,
    int64_t first_past;     // and how many tokens it has
    const int32_t *numbers; // 0, 1, 2, ... as many as slots: for ht_mamba_replay
    void **k_cache, **v_cache;          // per sequence: (capacity, n_kv_heads, d_head)
    const int64_t *past;                // (n_seqs) tokens before the new ones
    bool one_each;                      // every sequence has exactly one new token
    const struct ht_row_groups *groups; // NULL: one pass over all rows
};

/* Rows of a decoding pass that follow each other: products run over all rows at once, states go
 * from group to group as if each were a pass of its own, with its bits. A sequence has at most one
 * row in a group; slot, k_cache, v_cache and past of the mixer's state are per row. */
struct ht_row_groups {
    int64_t n;
    const int64_t *start;               // (n + 1) first row of each
    int64_t n_copies;                   // states that are also kept, between the groups 0 and 1
    const int32_t *copy_from, *copy_to; // (n_copies) slots
    void *saved; // (rows from start[1] on, ht_saved_width): what the states' steps read; per layer
};

/* x B C before the convolution, and dt, of one row. */
static inline int64_t ht_saved_width(const struct ht_model_config *c)
{
    return ht_conv_channels(c) + c->ssm_heads;
}

/* The convolution and SSM state of `slot` after one more token, at that position, whose saved row
 * this is. */
enum ht_status ht_mamba_replay(struct ht_model *m, int layer, struct ht_layer_acts *a,
                               const struct ht_mixer_state *state, int32_t slot, int64_t position,
                               const void *saved);

enum ht_status ht_mamba_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                                const struct ht_model_batch *b, void *branch,
                                const struct ht_mixer_state *state);
enum ht_status ht_mamba_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                                 const struct ht_model_batch *b, float *grads);

enum ht_status ht_attention_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                                    const struct ht_model_batch *b, void *branch,
                                    const struct ht_mixer_state *state);
enum ht_status ht_attention_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                                     const struct ht_model_batch *b, float *grads);

enum ht_status ht_mlp_forward(struct ht_model *m, int layer, struct ht_layer_acts *a,
                              int64_t n_tokens, void *branch);
enum ht_status ht_mlp_backward(struct ht_model *m, int layer, struct ht_acts *acts,
                               int64_t n_tokens, float *grads);

/* Gradient of a tensor in the flat buffer. */
static inline float *ht_grad_of(const struct ht_model *m, float *grads, int layer,
                                enum ht_tensor_role role)
{
    const struct ht_tensor_info *t = ht_tensor_find(&m->list, layer, role);

    if (!t || !m->units || !m->units->grads) return t ? grads + t->offset : NULL;
    if (!t->matrix) return m->units->vector_grads + (t->offset - m->list.n_matrix);
    const int unit = ht_tensor_unit(&m->list, t);
    return m->units->grads[unit] + (t->offset - m->list.unit_start[unit]);
}

/* Say that a unit is needed in this pass, and next after it, or done with (struct ht_model_units).
 */
static inline enum ht_status ht_unit_needed(const struct ht_model *m, int unit, int next,
                                            bool backward)
{
    return m->units ? m->units->needed(m->units->user, unit, next, backward) : HT_OK;
}
static inline enum ht_status ht_unit_done(const struct ht_model *m, int unit, bool backward)
{
    return m->units ? m->units->done(m->units->user, unit, backward) : HT_OK;
}

/* Address of column c of the first row of a dtype matrix. */
static inline void *ht_column(const void *base, int64_t c, enum ht_dtype d)
{
    return (char *)(uintptr_t)base + (size_t)c * ht_dtype_bytes(d);
}

/* Layer buffers into arena (which may only count), see acts.c. */
enum ht_status ht_acts_layout(struct ht_acts *a, const struct ht_model_config *c,
                              enum ht_dtype dtype, int64_t n_tokens);

/* Scratch that the operations of this model take from the backend for n_tokens. */
int64_t ht_model_scratch_bytes(const struct ht_model_config *c, enum ht_dtype dtype,
                               bool forward_only, int64_t n_tokens, int n_threads);

#endif
