/* core/model/pool.c: memory of the pools, and passes over it. */
#include "core/model/pool.h"

#include <stdlib.h>
#include <string.h>

#include "attention/flash.h"
#include "core/model/packed.h"
#include "core/model/stack.h"
#include "core/ops/gemm.h"

struct ht_pool {
    struct ht_model *m;
    struct ht_pool_options o;
    int64_t conv_n, ssm_n, kv_row_bytes; // floats per slot and layer; bytes of k of a token
    float **conv, **ssm;                 // (n_layers): of all slots; NULL for attention layers
    char **k, **v;                       // (n_layers): (kv_tokens, n_kv_heads, d_head)
    struct ht_acts *acts;
    struct ht_mixer_state *mixer; // (n_layers)
    // of a pass
    int32_t *pos, *starts, *slots; // (block_tokens), (n_slots + 1), (n_slots)
    int64_t *past;                 // (n_slots)
    void **k_of, **v_of;           // (n_layers, n_slots)
    struct ht_arena arena;
};

int64_t ht_pool_slot_bytes(const struct ht_model_config *c)
{
    int64_t sum = 0;

    for (int64_t i = 0; i < c->n_layers; i++)
        if (c->layer_kind[i] == HT_LAYER_MAMBA)
            sum += 4 * ((c->d_conv - 1) * ht_conv_channels(c) +
                        c->ssm_heads * c->ssm_d_head * c->d_state);
    return sum;
}

int64_t ht_pool_token_bytes(const struct ht_model_config *c, enum ht_dtype dtype)
{
    int64_t sum = 0;

    for (int64_t i = 0; i < c->n_layers; i++)
        if (c->layer_kind[i] == HT_LAYER_ATTENTION)
            sum += 2 * c->n_kv_heads * c->d_head * (int64_t)ht_dtype_bytes(dtype);
    return sum;
}

static enum ht_status allocate_states(struct ht_pool *p)
{
    const struct ht_model_config *c = &p->m->cfg;
    const size_t slots = (size_t)p->o.n_slots;
    const size_t conv_bytes = slots * (size_t)p->conv_n * 4,
                 ssm_bytes = slots * (size_t)p->ssm_n * 4;
    const size_t kv_bytes = (size_t)(p->o.kv_tokens * p->kv_row_bytes);
    size_t total = 64;

    for (int64_t i = 0; i < c->n_layers; i++)
        total += c->layer_kind[i] == HT_LAYER_MAMBA
                     ? ht_arena_bytes(conv_bytes) + ht_arena_bytes(ssm_bytes)
                     : 2 * ht_arena_bytes(kv_bytes);
    HT_TRY(ht_arena_create(&p->arena, "sequence states", total));
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->layer_kind[i] == HT_LAYER_MAMBA) {
            p->conv[i] = ht_arena_get(&p->arena, conv_bytes);
            p->ssm[i] = ht_arena_get(&p->arena, ssm_bytes);
        } else {
            p->k[i] = ht_arena_get(&p->arena, kv_bytes);
            p->v[i] = ht_arena_get(&p->arena, kv_bytes);
        }
    }
    return HT_OK;
}

static enum ht_status allocate_tables(struct ht_pool *p)
{
    const size_t n_layers = (size_t)p->m->cfg.n_layers, slots = (size_t)p->o.n_slots;

    p->conv = calloc(n_layers, sizeof *p->conv);
    p->ssm = calloc(n_layers, sizeof *p->ssm);
    p->k = calloc(n_layers, sizeof *p->k);
    p->v = calloc(n_layers, sizeof *p->v);
    p->mixer = calloc(n_layers, sizeof *p->mixer);
    p->pos = calloc((size_t)(p->o.block_tokens > p->o.n_slots ? p->o.block_tokens : p->o.n_slots),
                    sizeof *p->pos);
    p->starts = calloc(slots + 1, sizeof *p->starts);
    p->slots = calloc(slots, sizeof *p->slots);
    p->past = calloc(slots, sizeof *p->past);
    p->k_of = calloc(n_layers * slots, sizeof *p->k_of);
    p->v_of = calloc(n_layers * slots, sizeof *p->v_of);
    if (!p->conv || !p->ssm || !p->k || !p->v || !p->mixer || !p->pos || !p->starts || !p->slots ||
        !p->past || !p->k_of || !p->v_of)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the tables of %zu sequences", slots);
    return HT_OK;
}

/* Scratch beyond what the forward pass of acts takes. */
static enum ht_status reserve_scratch(struct ht_pool *p)
{
    static const int32_t one_row[2] = { 0, 1 };
    struct ht_model *m = p->m;
    const struct ht_model_config *c = &m->cfg;
    const struct ht_kv_attention_args kv = { .seqs = { 1, one_row },
                                             .n_tokens = 1,
                                             .n_heads = c->n_heads,
                                             .n_kv_heads = c->n_kv_heads,
                                             .d_head = c->d_head,
                                             .dtype = m->dtype,
                                             .past = &c->max_position };
    const int64_t widest = c->d_inner > c->d_ff ? c->d_inner : c->d_ff;
    const int64_t k = widest > c->d_model ? widest : c->d_model;
    const int64_t rows = p->o.block_tokens > p->o.n_slots ? p->o.block_tokens : p->o.n_slots;

    if (p->o.kv_tokens > 0)
        HT_TRY(ht_backend_reserve_scratch(
            m->be, (size_t)p->o.n_slots * ht_kv_attention_scratch_bytes(&kv, m->be->n_threads)));
    if (m->packed) return ht_backend_reserve_scratch(m->be, ht_qgemm_scratch_bytes(rows, k));
    return ht_backend_reserve_scratch(
        m->be, ht_gemm_scratch_bytes(rows, c->vocab_size, c->d_model, m->dtype));
}

enum ht_status ht_pool_create(struct ht_pool **out, struct ht_model *m,
                              const struct ht_pool_options *o)
{
    const struct ht_model_config *c = &m->cfg;
    enum ht_status st = HT_OK;
    struct ht_pool *p = calloc(1, sizeof *p);

    *out = NULL;
    if (!p) return HT_FAIL(HT_ERR_MEMORY, "no memory for the pools of sequence states");
    p->m = m;
    p->o = *o;
    p->conv_n = (c->d_conv - 1) * ht_conv_channels(c);
    p->ssm_n = c->ssm_heads * c->ssm_d_head * c->d_state;
    p->kv_row_bytes = c->n_kv_heads * c->d_head * (int64_t)ht_dtype_bytes(m->dtype);
    HT_TRY_GOTO(st, done, allocate_tables(p));
    HT_TRY_GOTO(st, done, allocate_states(p));
    HT_TRY_GOTO(st, done,
                ht_acts_create(&p->acts, m, HT_RECOMPUTE_NONE, true,
                               o->block_tokens > o->n_slots ? o->block_tokens : o->n_slots));
    HT_TRY_GOTO(st, done, reserve_scratch(p));
    *out = p;
    p = NULL;
done:
    ht_pool_free(p);
    return st;
}

void ht_pool_free(struct ht_pool *p)
{
    if (!p) return;
    ht_acts_free(p->acts);
    ht_arena_free(&p->arena);
    free(p->conv);
    free(p->ssm);
    free(p->k);
    free(p->v);
    free(p->mixer);
    free(p->pos);
    free(p->starts);
    free(p->slots);
    free(p->past);
    free(p->k_of);
    free(p->v_of);
    free(p);
}

/* ---- whole states ---- */

void ht_pool_reset(struct ht_pool *p, struct ht_place *at)
{
    at->n_tokens = 0;
    for (int64_t i = 0; i < p->m->cfg.n_layers; i++)
        if (p->conv[i]) {
            memset(p->conv[i] + at->slot * p->conv_n, 0, (size_t)p->conv_n * 4);
            memset(p->ssm[i] + at->slot * p->ssm_n, 0, (size_t)p->ssm_n * 4);
        }
}

int64_t ht_pool_export_bytes(const struct ht_pool *p, int64_t n_tokens)
{
    return ht_pool_slot_bytes(&p->m->cfg) + n_tokens * ht_pool_token_bytes(&p->m->cfg, p->m->dtype);
}

enum direction { OUT, IN };

static char *move(char *bytes, void *state, int64_t n, enum direction d)
{
    if (d == OUT)
        memcpy(bytes, state, (size_t)n);
    else
        memcpy(state, bytes, (size_t)n);
    return bytes + n;
}

static void move_state(const struct ht_pool *p, const struct ht_place *at, int64_t n_tokens,
                       char *bytes, enum direction d)
{
    const int64_t kv_at = at->kv_start * p->kv_row_bytes, kv_n = n_tokens * p->kv_row_bytes;

    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (!p->conv[i]) continue;
        bytes = move(bytes, p->conv[i] + at->slot * p->conv_n, p->conv_n * 4, d);
        bytes = move(bytes, p->ssm[i] + at->slot * p->ssm_n, p->ssm_n * 4, d);
    }
    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (!p->k[i]) continue;
        bytes = move(bytes, p->k[i] + kv_at, kv_n, d);
        bytes = move(bytes, p->v[i] + kv_at, kv_n, d);
    }
}

void ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out)
{
    move_state(p, at, at->n_tokens, out, OUT);
}

void ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens, const void *in)
{
    move_state(p, at, n_tokens, (char *)(uintptr_t)in, IN);
    at->n_tokens = n_tokens;
}

void ht_pool_copy(struct ht_pool *p, struct ht_place *to, const struct ht_place *from)
{
    const size_t kv_n = (size_t)(from->n_tokens * p->kv_row_bytes);

    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (p->conv[i]) {
            memcpy(p->conv[i] + to->slot * p->conv_n, p->conv[i] + from->slot * p->conv_n,
                   (size_t)p->conv_n * 4);
            memcpy(p->ssm[i] + to->slot * p->ssm_n, p->ssm[i] + from->slot * p->ssm_n,
                   (size_t)p->ssm_n * 4);
        } else {
            memcpy(p->k[i] + to->kv_start * p->kv_row_bytes,
                   p->k[i] + from->kv_start * p->kv_row_bytes, kv_n);
            memcpy(p->v[i] + to->kv_start * p->kv_row_bytes,
                   p->v[i] + from->kv_start * p->kv_row_bytes, kv_n);
        }
    }
    to->n_tokens = from->n_tokens;
}

/* ---- passes ---- */

static enum ht_status check_token(const struct ht_pool *p, const struct ht_place *at, int64_t n)
{
    const struct ht_model_config *c = &p->m->cfg;

    if (p->o.kv_tokens > 0 && at->n_tokens + n > at->kv_n)
        return HT_FAIL(HT_ERR_ARG, "%lld tokens after %lld; the sequence has room for %lld",
                       (long long)n, (long long)at->n_tokens, (long long)at->kv_n);
    if (c->rope_dims && at->n_tokens + n > c->max_position)
        return HT_FAIL(HT_ERR_ARG, "position %lld; the model has %lld",
                       (long long)(at->n_tokens + n), (long long)c->max_position);
    return HT_OK;
}

/* One pass over n sequences of n_tokens rows in all, whose starts and positions are set. */
static enum ht_status pass(struct ht_pool *p, struct ht_place *const *at, int64_t n,
                           const int32_t *ids, int64_t n_tokens, bool one_each)
{
    const struct ht_model_batch b = {
        .n_tokens = n_tokens, .ids = ids, .pos = p->pos, .seqs = { n, p->starts }
    };

    for (int64_t i = 0; i < n; i++) {
        p->past[i] = at[i]->n_tokens;
        p->slots[i] = at[i]->slot;
    }
    for (int64_t l = 0; l < p->m->cfg.n_layers; l++) {
        void **k = p->k_of + l * p->o.n_slots, **v = p->v_of + l * p->o.n_slots;
        for (int64_t i = 0; i < n && p->k[l]; i++) {
            k[i] = p->k[l] + at[i]->kv_start * p->kv_row_bytes;
            v[i] = p->v[l] + at[i]->kv_start * p->kv_row_bytes;
        }
        p->mixer[l] = (struct ht_mixer_state){ .conv = p->conv[l],
                                               .ssm = p->ssm[l],
                                               .slot = p->slots,
                                               .k_cache = k,
                                               .v_cache = v,
                                               .past = p->past,
                                               .one_each = one_each };
    }
    return ht_stack_forward(p->m, p->acts, &b, p->mixer);
}

enum ht_status ht_pool_decode(struct ht_pool *p, struct ht_place *const *at, const int32_t *ids,
                              int64_t n, float *logits)
{
    const struct ht_model_config *c = &p->m->cfg;
    const int64_t most = ht_model_free_rows(p->m);

    if (n < 1 || n > p->o.n_slots)
        return HT_FAIL(HT_ERR_ARG, "%lld sequences to extend; 1 to %lld", (long long)n,
                       (long long)p->o.n_slots);
    for (int64_t i = 0; i < n; i++) {
        HT_TRY(check_token(p, at[i], 1));
        if (ids[i] < 0 || ids[i] >= c->vocab_size)
            return HT_FAIL(HT_ERR_ARG, "token id %d; the vocabulary has 0 to %lld", ids[i],
                           (long long)c->vocab_size - 1);
    }
    for (int64_t done = 0; done < n; done += most) {
        const int64_t rows = n - done < most ? n - done : most;
        for (int64_t i = 0; i <= rows; i++) p->starts[i] = (int32_t)i;
        for (int64_t i = 0; i < rows; i++) p->pos[i] = (int32_t)at[done + i]->n_tokens;
        HT_TRY(pass(p, at + done, rows, ids + done, rows, true));
        HT_TRY(ht_model_logits(p->m, rows, p->acts->u_final, logits + done * c->vocab_size));
        for (int64_t i = 0; i < rows; i++) at[done + i]->n_tokens++;
        if (most == INT64_MAX) break;
    }
    return HT_OK;
}

enum ht_status ht_pool_prompt(struct ht_pool *p, struct ht_place *at, const int32_t *ids, int64_t n)
{
    if (n < 1 || n > p->o.block_tokens)
        return HT_FAIL(HT_ERR_ARG, "%lld prompt tokens; 1 to %lld", (long long)n,
                       (long long)p->o.block_tokens);
    HT_TRY(check_token(p, at, n));
    p->starts[0] = 0;
    p->starts[1] = (int32_t)n;
    for (int64_t t = 0; t < n; t++) p->pos[t] = (int32_t)(at->n_tokens + t);
    HT_TRY(pass(p, &at, 1, ids, n, n == 1));
    at->n_tokens += n;
    return HT_OK;
}

enum ht_status ht_pool_prompt_logits(struct ht_pool *p, int64_t first, int64_t n, float *logits)
{
    const struct ht_model_config *c = &p->m->cfg;
    const int64_t most = ht_model_free_rows(p->m);

    for (int64_t done = 0; done < n; done += most) {
        const int64_t rows = n - done < most ? n - done : most;
        HT_TRY(ht_model_logits(
            p->m, rows, ht_column(p->acts->u_final, (first + done) * c->d_model, p->m->dtype),
            logits + done * c->vocab_size));
        if (most == INT64_MAX) break;
    }
    return HT_OK;
}
