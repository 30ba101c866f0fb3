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
    int64_t conv_bytes, ssm_bytes, kv_row_bytes; // per slot and layer; of k of a token
    char **conv, **ssm; // (n_layers): of all slots; NULL for attention layers
    char **k, **v;      // (n_layers): (kv_tokens, n_kv_heads, d_head)
    struct ht_acts *acts;
    struct ht_mixer_state *mixer; // (n_layers)
    // of a pass of at most n_rows rows
    int64_t n_rows;
    int32_t *pos, *ids, *starts, *slots; // (n_rows), starts one more
    int64_t *past;                       // (n_rows)
    void **k_of, **v_of;                 // (attention layers, n_rows)
    int64_t *kv_at;                      // (n_layers): where a layer's rows of them begin
    int32_t *numbers;                    // 0, 1, 2, ...
    char *tables, *tables_there;         // all of these, and where the backend reads them
    size_t tables_bytes;
    int64_t n_logits;             // rows
    float *logits;                // (n_logits, vocab_size) on a device; else NULL
    struct ht_pool_run *runs;     // (n_slots) of a pass without guesses
    int32_t *copy_from, *copy_to; // (n_drafts)
    void **saved;                 // (n_layers) rows of ht_saved_width elements
    int64_t saved_bytes;          // of such a row
    struct ht_row_groups *groups; // (n_layers)
    struct ht_arena arena;
};

int64_t ht_pool_slot_bytes(const struct ht_model_config *c, enum ht_dtype ssm_dtype)
{
    int64_t sum = 0;

    for (int64_t i = 0; i < c->n_layers; i++)
        if (c->layer_kind[i] == HT_LAYER_MAMBA)
            sum += (c->d_conv - 1) * ht_conv_channels(c) * 4 +
                   c->ssm_heads * c->ssm_d_head * c->d_state * (int64_t)ht_dtype_bytes(ssm_dtype);
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
    const size_t conv_bytes = slots * (size_t)p->conv_bytes;
    const size_t ssm_bytes = slots * (size_t)p->ssm_bytes;
    const size_t kv_bytes = (size_t)(p->o.kv_tokens * p->kv_row_bytes);
    const size_t saved_bytes = (size_t)(p->o.n_drafts * (HT_POOL_RUN - 1)) * (size_t)p->saved_bytes;
    size_t total = 64;

    for (int64_t i = 0; i < c->n_layers; i++)
        total += c->layer_kind[i] == HT_LAYER_MAMBA
                     ? ht_arena_bytes(conv_bytes) + ht_arena_bytes(ssm_bytes) +
                           ht_arena_bytes(saved_bytes)
                     : 2 * ht_arena_bytes(kv_bytes);
    HT_TRY(ht_backend_arena_create(&p->arena, p->m->be, "sequence states", total));
    for (int64_t i = 0; i < c->n_layers; i++) {
        if (c->layer_kind[i] == HT_LAYER_MAMBA) {
            p->conv[i] = ht_arena_get(&p->arena, conv_bytes);
            p->ssm[i] = ht_arena_get(&p->arena, ssm_bytes);
            p->saved[i] = ht_arena_get(&p->arena, saved_bytes);
        } else {
            p->k[i] = ht_arena_get(&p->arena, kv_bytes);
            p->v[i] = ht_arena_get(&p->arena, kv_bytes);
        }
    }
    return HT_OK;
}

/* What a pass reads, in one piece, so that one copy takes it to a device. */
static enum ht_status allocate_pass_tables(struct ht_pool *p)
{
    const struct ht_model_config *c = &p->m->cfg;
    const size_t rows = (size_t)p->n_rows, slots = (size_t)p->o.n_slots;
    const size_t n_numbers = (rows > slots ? rows : slots) + 2;
    size_t kv_rows = 0;

    for (int64_t l = 0; l < c->n_layers; l++) {
        p->kv_at[l] = (int64_t)kv_rows;
        if (c->layer_kind[l] == HT_LAYER_ATTENTION) kv_rows += rows;
    }
    const size_t wide = rows * sizeof *p->past + 2 * kv_rows * sizeof *p->k_of;
    p->tables_bytes = wide + (4 * rows + 1 + n_numbers) * sizeof *p->pos;
    p->tables = calloc(1, p->tables_bytes);
    if (!p->tables)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the tables of %zu sequences", slots);
    p->past = (int64_t *)(void *)p->tables;
    p->k_of = (void **)(p->past + rows);
    p->v_of = p->k_of + kv_rows;
    p->pos = (int32_t *)(void *)(p->tables + wide);
    p->ids = p->pos + rows;
    p->slots = p->ids + rows;
    p->starts = p->slots + rows;
    p->numbers = p->starts + rows + 1;
    for (size_t i = 0; i < n_numbers; i++) p->numbers[i] = (int32_t)i;
    p->tables_there = p->tables;
    if (p->m->be->kind == HT_BACKEND_CPU) return HT_OK;
    void *there;
    HT_TRY(ht_backend_alloc(&there, p->m->be, "tables of sequences", p->tables_bytes));
    p->tables_there = there;
    HT_TRY(ht_backend_alloc(&there, p->m->be, "logits",
                            (size_t)(p->n_logits * c->vocab_size) * sizeof *p->logits));
    p->logits = there;
    return HT_OK;
}

/* Where the backend has the entry of a table that the host has at p. */
static void *there(const struct ht_pool *p, const void *entry)
{
    return p->tables_there + ((const char *)entry - p->tables);
}

static enum ht_status allocate_tables(struct ht_pool *p)
{
    const size_t n_layers = (size_t)p->m->cfg.n_layers, slots = (size_t)p->o.n_slots;

    p->conv = calloc(n_layers, sizeof *p->conv);
    p->ssm = calloc(n_layers, sizeof *p->ssm);
    p->k = calloc(n_layers, sizeof *p->k);
    p->v = calloc(n_layers, sizeof *p->v);
    p->mixer = calloc(n_layers, sizeof *p->mixer);
    p->kv_at = calloc(n_layers, sizeof *p->kv_at);
    p->runs = calloc(slots, sizeof *p->runs);
    p->copy_from = calloc((size_t)p->o.n_drafts + 1, sizeof *p->copy_from);
    p->copy_to = calloc((size_t)p->o.n_drafts + 1, sizeof *p->copy_to);
    p->saved = calloc(n_layers, sizeof *p->saved);
    p->groups = calloc(n_layers, sizeof *p->groups);
    if (!p->conv || !p->ssm || !p->k || !p->v || !p->mixer || !p->kv_at || !p->runs ||
        !p->copy_from || !p->copy_to || !p->saved || !p->groups)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the tables of %zu sequences", slots);
    return allocate_pass_tables(p);
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
    const int64_t rows = p->n_rows;

    if (p->o.ssm_dtype !=
        HT_DTYPE_F32) // a prompt's scan has its state in fp32 beside its own scratch
        HT_TRY(ht_backend_reserve_scratch(
            m->be, m->be->scratch.size_bytes +
                       ht_arena_bytes((size_t)p->ssm_bytes / ht_dtype_bytes(p->o.ssm_dtype) * 4)));
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
    p->conv_bytes = (c->d_conv - 1) * ht_conv_channels(c) * (int64_t)sizeof(float);
    p->ssm_bytes =
        c->ssm_heads * c->ssm_d_head * c->d_state * (int64_t)ht_dtype_bytes(o->ssm_dtype);
    p->kv_row_bytes = c->n_kv_heads * c->d_head * (int64_t)ht_dtype_bytes(m->dtype);
    p->n_rows = o->n_slots + o->n_drafts * (HT_POOL_RUN - 1);
    p->n_logits = p->n_rows;
    if (p->n_rows < o->block_tokens) p->n_rows = o->block_tokens;
    p->saved_bytes = ht_saved_width(c) * (int64_t)ht_dtype_bytes(m->dtype);
    HT_TRY_GOTO(st, done, allocate_tables(p));
    HT_TRY_GOTO(st, done, allocate_states(p));
    HT_TRY_GOTO(st, done, ht_acts_create(&p->acts, m, HT_RECOMPUTE_NONE, true, p->n_rows));
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
    ht_backend_arena_free(&p->arena, p->m->be);
    if (p->tables_there != p->tables) ht_backend_free_memory(p->m->be, p->tables_there);
    ht_backend_free_memory(p->m->be, p->logits);
    free(p->tables);
    free(p->kv_at);
    free(p->conv);
    free(p->ssm);
    free(p->k);
    free(p->v);
    free(p->mixer);
    free(p->runs);
    free(p->copy_from);
    free(p->copy_to);
    free(p->saved);
    free(p->groups);
    free(p);
}

/* ---- whole states ---- */

enum ht_status ht_pool_reset(struct ht_pool *p, struct ht_place *at)
{
    struct ht_backend *be = p->m->be;

    at->n_tokens = 0;
    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (!p->conv[i]) continue;
        HT_TRY(ht_backend_zero(be, p->conv[i] + at->slot * p->conv_bytes, (size_t)p->conv_bytes));
        HT_TRY(ht_backend_zero(be, p->ssm[i] + at->slot * p->ssm_bytes, (size_t)p->ssm_bytes));
    }
    return HT_OK;
}

int64_t ht_pool_export_bytes(const struct ht_pool *p, int64_t n_tokens)
{
    return ht_pool_slot_bytes(&p->m->cfg, p->o.ssm_dtype) +
           n_tokens * ht_pool_token_bytes(&p->m->cfg, p->m->dtype);
}

enum direction { OUT, IN };

static enum ht_status move(const struct ht_pool *p, char **bytes, void *state, int64_t n,
                           enum direction d)
{
    char *const at = *bytes;

    *bytes += n;
    if (d == OUT) return ht_backend_download(p->m->be, at, state, (size_t)n);
    return ht_backend_upload(p->m->be, state, at, (size_t)n);
}

static enum ht_status move_state(const struct ht_pool *p, const struct ht_place *at,
                                 int64_t n_tokens, char *bytes, enum direction d)
{
    const int64_t kv_at = at->kv_start * p->kv_row_bytes, kv_n = n_tokens * p->kv_row_bytes;

    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (!p->conv[i]) continue;
        HT_TRY(move(p, &bytes, p->conv[i] + at->slot * p->conv_bytes, p->conv_bytes, d));
        HT_TRY(move(p, &bytes, p->ssm[i] + at->slot * p->ssm_bytes, p->ssm_bytes, d));
    }
    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (!p->k[i]) continue;
        HT_TRY(move(p, &bytes, p->k[i] + kv_at, kv_n, d));
        HT_TRY(move(p, &bytes, p->v[i] + kv_at, kv_n, d));
    }
    return HT_OK;
}

enum ht_status ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out)
{
    return move_state(p, at, at->n_tokens, out, OUT);
}

enum ht_status ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens,
                              const void *in)
{
    HT_TRY(move_state(p, at, n_tokens, (char *)(uintptr_t)in, IN));
    at->n_tokens = n_tokens;
    return HT_OK;
}

enum ht_status ht_pool_fill(struct ht_pool *p, struct ht_place *at, int64_t n_tokens)
{
    static uint32_t block[1 << 14]; // two bf16 or one fp32 of that magnitude in every word
    const int64_t bytes = n_tokens * p->kv_row_bytes, from = at->kv_start * p->kv_row_bytes;

    if (p->o.kv_tokens > 0 && n_tokens > at->kv_n)
        return HT_FAIL(HT_ERR_ARG, "%lld tokens; the sequence has room for %lld",
                       (long long)n_tokens, (long long)at->kv_n);
    for (size_t i = 0; i < sizeof block / sizeof *block; i++)
        block[i] = ((uint32_t)(i + 1) * 2654435761u & 0x807f807fu) | 0x3e803e80u;
    HT_TRY(ht_pool_reset(p, at));
    for (int64_t i = 0; i < p->m->cfg.n_layers; i++)
        for (int64_t done = 0, n; p->k[i] && done < bytes; done += n) {
            n = bytes - done < (int64_t)sizeof block ? bytes - done : (int64_t)sizeof block;
            HT_TRY(ht_backend_upload(p->m->be, p->k[i] + from + done, block, (size_t)n));
            HT_TRY(ht_backend_upload(p->m->be, p->v[i] + from + done, block, (size_t)n));
        }
    at->n_tokens = n_tokens;
    return HT_OK;
}

enum ht_status ht_pool_copy(struct ht_pool *p, struct ht_place *to, const struct ht_place *from)
{
    struct ht_backend *be = p->m->be;
    const size_t kv_n = (size_t)(from->n_tokens * p->kv_row_bytes);

    for (int64_t i = 0; i < p->m->cfg.n_layers; i++) {
        if (p->conv[i]) {
            HT_TRY(ht_backend_copy(be, p->conv[i] + to->slot * p->conv_bytes,
                                   p->conv[i] + from->slot * p->conv_bytes, (size_t)p->conv_bytes));
            HT_TRY(ht_backend_copy(be, p->ssm[i] + to->slot * p->ssm_bytes,
                                   p->ssm[i] + from->slot * p->ssm_bytes, (size_t)p->ssm_bytes));
        } else {
            HT_TRY(ht_backend_copy(be, p->k[i] + to->kv_start * p->kv_row_bytes,
                                   p->k[i] + from->kv_start * p->kv_row_bytes, kv_n));
            HT_TRY(ht_backend_copy(be, p->v[i] + to->kv_start * p->kv_row_bytes,
                                   p->v[i] + from->kv_start * p->kv_row_bytes, kv_n));
        }
    }
    to->n_tokens = from->n_tokens;
    return HT_OK;
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

/* The tables of a pass for one sequence of a row, or of one row where rows are sequences. */
static void set_row(struct ht_pool *p, int64_t row, const struct ht_place *at, int32_t slot,
                    int64_t past)
{
    const int64_t first = at->kv_start * p->kv_row_bytes;

    p->past[row] = past;
    p->slots[row] = slot;
    for (int64_t l = 0; l < p->m->cfg.n_layers; l++) {
        if (!p->k[l]) continue;
        p->k_of[p->kv_at[l] + row] = p->k[l] + first;
        p->v_of[p->kv_at[l] + row] = p->v[l] + first;
    }
}

/* One pass whose tables, starts and positions are set. groups: NULL, or without `saved`. */
static enum ht_status pass(struct ht_pool *p, const struct ht_model_batch *b, bool one_each,
                           const struct ht_row_groups *groups, int64_t n_saved)
{
    for (int64_t l = 0; l < p->m->cfg.n_layers; l++) {
        if (groups) {
            p->groups[l] = *groups;
            p->groups[l].saved = (char *)p->saved[l] + n_saved * p->saved_bytes;
        }
        p->mixer[l] = (struct ht_mixer_state){
            .conv = (float *)(void *)p->conv[l],
            .ssm = { .p = p->ssm[l], .dtype = p->o.ssm_dtype, .stream = (uint32_t)l },
            .first_past = p->past[0],
            .slot = there(p, p->slots),
            .first_slot = p->slots[0],
            .numbers = there(p, p->numbers),
            .k_cache = there(p, p->k_of + p->kv_at[l]),
            .v_cache = there(p, p->v_of + p->kv_at[l]),
            .past = there(p, p->past),
            .one_each = one_each,
            .groups = groups ? &p->groups[l] : NULL
        };
    }
    // a plain copy: the tables may be changed when it returns
    if (p->tables_there != p->tables)
        HT_TRY(ht_backend_upload(p->m->be, p->tables_there, p->tables, p->tables_bytes));
    return ht_stack_forward(p->m, p->acts, b, p->mixer);
}

/* Logits of n rows to the host's memory. */
static enum ht_status take_logits(struct ht_pool *p, const void *u, int64_t n, float *logits)
{
    const int64_t vocab_size = p->m->cfg.vocab_size;

    if (!p->logits) return ht_model_logits(p->m, n, u, logits);
    HT_TRY(ht_model_logits(p->m, n, u, p->logits));
    return ht_backend_download(p->m->be, logits, p->logits,
                               (size_t)(n * vocab_size) * sizeof *logits);
}

static enum ht_status check_ids(const struct ht_pool *p, const int32_t *ids, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= p->m->cfg.vocab_size)
            return HT_FAIL(HT_ERR_ARG, "token id %d; the vocabulary has 0 to %lld", ids[i],
                           (long long)p->m->cfg.vocab_size - 1);
    return HT_OK;
}

static enum ht_status check_runs(const struct ht_pool *p, const struct ht_pool_run *runs, int64_t n)
{
    int64_t n_drafts = 0;

    if (n < 1 || n > p->o.n_slots)
        return HT_FAIL(HT_ERR_ARG, "%lld sequences to extend; 1 to %lld", (long long)n,
                       (long long)p->o.n_slots);
    for (int64_t i = 0; i < n; i++) {
        if (runs[i].n < 1 || runs[i].n > HT_POOL_RUN)
            return HT_FAIL(HT_ERR_ARG, "a run of %lld tokens; 1 to %d", (long long)runs[i].n,
                           HT_POOL_RUN);
        n_drafts += runs[i].n > 1;
        HT_TRY(check_token(p, runs[i].at, runs[i].n));
        HT_TRY(check_ids(p, runs[i].ids, runs[i].n));
    }
    if (n_drafts > p->o.n_drafts)
        return HT_FAIL(HT_ERR_ARG, "%lld sequences with guesses; this pool takes %lld",
                       (long long)n_drafts, (long long)p->o.n_drafts);
    return HT_OK;
}

/* Runs whose rows do not see each other in a product, in one pass: first the known tokens, then
 * everyone's first guesses, and so on. *n_saved counts the rows of guesses. */
static enum ht_status decode_some(struct ht_pool *p, struct ht_pool_run *runs, int64_t n,
                                  int64_t *n_saved, float *logits)
{
    const int64_t vocab_size = p->m->cfg.vocab_size;
    int64_t start[HT_POOL_RUN + 1] = { 0 }, row = 0;
    struct ht_row_groups groups = { .start = start,
                                    .copy_from = p->copy_from,
                                    .copy_to = p->copy_to };

    for (int64_t j = 0; j < HT_POOL_RUN; j++) {
        for (int64_t i = 0; i < n; i++) {
            struct ht_pool_run *r = &runs[i];
            if (r->n <= j) continue;
            if (j == 1) {
                p->copy_from[groups.n_copies] = r->at->slot;
                p->copy_to[groups.n_copies++] = r->spare;
            }
            if (j > 0) r->saved[j] = *n_saved + row - start[1];
            r->logits[j] = logits + row * vocab_size;
            p->ids[row] = r->ids[j];
            p->pos[row] = (int32_t)(r->at->n_tokens + j);
            p->starts[row] = (int32_t)row;
            set_row(p, row, r->at, j > 0 ? r->spare : r->at->slot, r->at->n_tokens + j);
            row++;
        }
        if (row == start[j]) break;
        start[j + 1] = row;
        groups.n = j + 1;
    }
    p->starts[row] = (int32_t)row;
    const struct ht_model_batch b = {
        .n_tokens = row,
        .ids = there(p, p->ids),
        .pos = there(p, p->pos),
        .seqs = { row, there(p, p->starts) },
    };
    HT_TRY(pass(p, &b, true, groups.n > 1 ? &groups : NULL, *n_saved));
    HT_TRY(take_logits(p, p->acts->u_final, row, logits));
    for (int64_t i = 0; i < n; i++) runs[i].n_before = runs[i].at->n_tokens++;
    *n_saved += row - start[1];
    return HT_OK;
}

enum ht_status ht_pool_decode_runs(struct ht_pool *p, struct ht_pool_run *runs, int64_t n,
                                   float *logits)
{
    const int64_t most = ht_model_free_rows(p->m);
    int64_t n_saved = 0;

    HT_TRY(check_runs(p, runs, n));
    for (int64_t done = 0; done < n;) {
        int64_t rows = runs[done].n, m = 1;
        while (done + m < n && rows + runs[done + m].n <= most) rows += runs[done + m++].n;
        HT_TRY(decode_some(p, runs + done, m, &n_saved, logits));
        logits += rows * p->m->cfg.vocab_size;
        done += m;
    }
    return HT_OK;
}

enum ht_status ht_pool_accept(struct ht_pool *p, struct ht_pool_run *run, int64_t n)
{
    const int32_t slot = run->at->slot;

    run->at->n_tokens = run->n_before + n;
    if (n == 1) return HT_OK; // as the known token left it
    if (n == run->n) {
        run->at->slot = run->spare;
        run->spare = slot;
        return HT_OK;
    }
    // the spare state has gone too far: the steps again, from their saved inputs
    for (int64_t l = 0; l < p->m->cfg.n_layers; l++)
        for (int64_t j = 1; p->ssm[l] && j < n; j++)
            HT_TRY(ht_mamba_replay(p->m, (int)l, &p->acts->layer[l], &p->mixer[l], slot,
                                   run->n_before + j,
                                   (char *)p->saved[l] + run->saved[j] * p->saved_bytes));
    return HT_OK;
}

enum ht_status ht_pool_decode(struct ht_pool *p, struct ht_place *const *at, const int32_t *ids,
                              int64_t n, float *logits)
{
    for (int64_t i = 0; i < n && i < p->o.n_slots; i++) {
        p->runs[i].at = at[i];
        p->runs[i].ids[0] = ids[i];
        p->runs[i].n = 1;
    }
    return ht_pool_decode_runs(p, p->runs, n, logits); // row i is that of run i: all are first rows
}

enum ht_status ht_pool_prompt(struct ht_pool *p, struct ht_place *at, const int32_t *ids, int64_t n)
{
    if (n < 1 || n > p->o.block_tokens)
        return HT_FAIL(HT_ERR_ARG, "%lld prompt tokens; 1 to %lld", (long long)n,
                       (long long)p->o.block_tokens);
    HT_TRY(check_token(p, at, n));
    HT_TRY(check_ids(p, ids, n));
    memcpy(p->ids, ids, (size_t)n * sizeof *ids);
    p->starts[0] = 0;
    p->starts[1] = (int32_t)n;
    for (int64_t t = 0; t < n; t++) p->pos[t] = (int32_t)(at->n_tokens + t);
    set_row(p, 0, at, at->slot, at->n_tokens);
    const struct ht_model_batch b = {
        .n_tokens = n,
        .ids = there(p, p->ids),
        .pos = there(p, p->pos),
        .seqs = { 1, there(p, p->starts) },
    };
    HT_TRY(pass(p, &b, n == 1, NULL, 0));
    at->n_tokens += n;
    return HT_OK;
}

enum ht_status ht_pool_prompt_logits(struct ht_pool *p, int64_t first, int64_t n, float *logits)
{
    const struct ht_model_config *c = &p->m->cfg;
    int64_t most = ht_model_free_rows(p->m);

    if (p->logits && most > p->n_logits) most = p->n_logits;
    for (int64_t done = 0; done < n; done += most) {
        const int64_t rows = n - done < most ? n - done : most;
        HT_TRY(take_logits(p, ht_column(p->acts->u_final, (first + done) * c->d_model, p->m->dtype),
                           rows, logits + done * c->vocab_size));
        if (most == INT64_MAX) break;
    }
    return HT_OK;
}
