/* core/model/decode.c: sequence states and the passes that extend them. */
#include "core/model/decode.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/flash.h"
#include "core/model/packed.h"
#include "core/model/stack.h"
#include "core/ops/gemm.h"
#include "core/ops/loss.h"

struct ht_state {
    const struct ht_model_config *cfg; // of the model, borrowed
    int64_t n_tokens, capacity;
    int64_t conv_n, ssm_n; // floats per Mamba layer
    float **conv, **ssm;   // (n_layers), NULL for attention layers
    void **k, **v;         // (n_layers), NULL for Mamba layers
    struct ht_arena arena;
};

enum { SCORE_ROWS = 32 };

struct ht_decoder {
    struct ht_model *m;
    struct ht_acts *acts;
    struct ht_mixer_state *mixer; // (n_layers)
    int32_t *pos;                 // (block_tokens)
    float *logits;                // (SCORE_ROWS, vocab_size), packed models only
    int64_t block_tokens;
};

static void *zeros(size_t n, size_t size)
{
    return calloc(n ? n : 1, size);
}

enum ht_status ht_state_create(struct ht_state **out, const struct ht_model *m, int64_t capacity)
{
    const struct ht_model_config *c = &m->cfg;
    const size_t n_layers = (size_t)c->n_layers;
    const size_t kv_bytes =
        (size_t)(capacity * c->n_kv_heads * c->d_head) * ht_dtype_bytes(m->dtype);
    enum ht_status st = HT_OK;
    size_t total = 64;
    struct ht_state *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "no memory for a sequence state");
    s->cfg = c;
    s->capacity = capacity;
    s->conv_n = (c->d_conv - 1) * ht_conv_channels(c);
    s->ssm_n = c->ssm_heads * c->ssm_d_head * c->d_state;
    s->conv = zeros(n_layers, sizeof *s->conv);
    s->ssm = zeros(n_layers, sizeof *s->ssm);
    s->k = zeros(n_layers, sizeof *s->k);
    s->v = zeros(n_layers, sizeof *s->v);
    if (!s->conv || !s->ssm || !s->k || !s->v) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for the states of %zu layers", n_layers);
        goto done;
    }
    for (size_t i = 0; i < n_layers; i++)
        total += c->layer_kind[i] == HT_LAYER_MAMBA
                     ? ht_arena_bytes((size_t)s->conv_n * 4) + ht_arena_bytes((size_t)s->ssm_n * 4)
                     : 2 * ht_arena_bytes(kv_bytes);
    HT_TRY_GOTO(st, done, ht_arena_create(&s->arena, "sequence state", total));
    for (size_t i = 0; i < n_layers; i++) {
        if (c->layer_kind[i] == HT_LAYER_MAMBA) {
            s->conv[i] = ht_arena_get(&s->arena, (size_t)s->conv_n * 4);
            s->ssm[i] = ht_arena_get(&s->arena, (size_t)s->ssm_n * 4);
        } else {
            s->k[i] = ht_arena_get(&s->arena, kv_bytes);
            s->v[i] = ht_arena_get(&s->arena, kv_bytes);
        }
    }
    *out = s;
    s = NULL;
done:
    ht_state_free(s);
    return st;
}

void ht_state_free(struct ht_state *s)
{
    if (!s) return;
    ht_arena_free(&s->arena);
    free(s->conv);
    free(s->ssm);
    free(s->k);
    free(s->v);
    free(s);
}

void ht_state_reset(struct ht_state *s)
{
    s->n_tokens = 0;
    for (int64_t i = 0; i < s->cfg->n_layers; i++)
        if (s->conv[i]) {
            memset(s->conv[i], 0, (size_t)s->conv_n * 4);
            memset(s->ssm[i], 0, (size_t)s->ssm_n * 4);
        }
}

int64_t ht_state_n_tokens(const struct ht_state *s)
{
    return s->n_tokens;
}

int64_t ht_state_bytes(const struct ht_state *s)
{
    return (int64_t)s->arena.used_bytes;
}

enum ht_status ht_decoder_create(struct ht_decoder **out, struct ht_model *m, int64_t block_tokens)
{
    enum ht_status st = HT_OK;
    struct ht_decoder *d = calloc(1, sizeof *d);

    *out = NULL;
    if (!d) return HT_FAIL(HT_ERR_MEMORY, "no memory for a decoder");
    if (m->cfg.chunk > 0) // whole chunks, so that a split prompt is rounded as an unsplit one
        block_tokens = (block_tokens + m->cfg.chunk - 1) / m->cfg.chunk * m->cfg.chunk;
    d->m = m;
    d->block_tokens = block_tokens;
    d->mixer = calloc((size_t)m->cfg.n_layers, sizeof *d->mixer);
    d->pos = calloc((size_t)block_tokens, sizeof *d->pos);
    if (!d->mixer || !d->pos) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for %lld positions", (long long)block_tokens);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_acts_create(&d->acts, m, HT_RECOMPUTE_NONE, true, block_tokens));
    // the largest need is one new row behind the longest past (attention/flash.h)
    static const int32_t one_row[2] = { 0, 1 };
    const struct ht_kv_attention_args kv = { .seqs = { 1, one_row },
                                             .n_tokens = 1,
                                             .n_heads = m->cfg.n_heads,
                                             .n_kv_heads = m->cfg.n_kv_heads,
                                             .d_head = m->cfg.d_head,
                                             .dtype = m->dtype,
                                             .past = &m->cfg.max_position };
    if (m->cfg.n_heads > 0)
        HT_TRY_GOTO(st, done,
                    ht_backend_reserve_scratch(
                        m->be, ht_kv_attention_scratch_bytes(&kv, m->be->n_threads)));
    HT_TRY_GOTO(st, done,
                ht_backend_reserve_scratch(
                    m->be, ht_gemm_scratch_bytes(1, m->cfg.vocab_size, m->cfg.d_model, m->dtype)));
    if (m->packed) {
        d->logits = malloc(SCORE_ROWS * (size_t)m->cfg.vocab_size * sizeof *d->logits);
        if (!d->logits) {
            st = HT_FAIL(HT_ERR_MEMORY, "no memory for %d rows of logits", SCORE_ROWS);
            goto done;
        }
        const int64_t inner = m->cfg.d_inner > m->cfg.d_ff ? m->cfg.d_inner : m->cfg.d_ff;
        const int64_t k = inner > m->cfg.d_model ? inner : m->cfg.d_model;
        HT_TRY_GOTO(st, done,
                    ht_backend_reserve_scratch(m->be, ht_qgemm_scratch_bytes(block_tokens, k)));
    }
    *out = d;
    d = NULL;
done:
    ht_decoder_free(d);
    return st;
}

void ht_decoder_free(struct ht_decoder *d)
{
    if (!d) return;
    ht_acts_free(d->acts);
    free(d->mixer);
    free(d->pos);
    free(d->logits);
    free(d);
}

static enum ht_status extend_block(struct ht_decoder *d, struct ht_state *s, const int32_t *ids,
                                   int64_t n)
{
    const int32_t starts[2] = { 0, (int32_t)n };
    const struct ht_model_batch b = {
        .n_tokens = n, .ids = ids, .pos = d->pos, .seqs = { 1, starts }
    };

    for (int64_t t = 0; t < n; t++) d->pos[t] = (int32_t)(s->n_tokens + t);
    for (int64_t i = 0; i < d->m->cfg.n_layers; i++)
        d->mixer[i] = (struct ht_mixer_state){ .conv = s->conv[i],
                                               .ssm = { .p = s->ssm[i] },
                                               .first_past = s->n_tokens,
                                               .k_cache = &s->k[i],
                                               .v_cache = &s->v[i],
                                               .past = &s->n_tokens,
                                               .one_each = n == 1 };
    HT_TRY(ht_stack_forward(d->m, d->acts, &b, d->mixer));
    s->n_tokens += n;
    return HT_OK;
}

/* Rows of the next block of n tokens: the first block ends where a chunk of the whole sequence
 * ends, so that a split prompt is rounded as an unsplit one. */
static int64_t next_block(const struct ht_decoder *d, const struct ht_state *s, int64_t n)
{
    const int64_t chunk = d->m->cfg.chunk;
    const int64_t room = chunk > 0 ? d->block_tokens - s->n_tokens % chunk : d->block_tokens;
    return n < room ? n : room;
}

static enum ht_status check_room(const struct ht_decoder *d, const struct ht_state *s, int64_t n)
{
    const struct ht_model_config *c = &d->m->cfg;

    if (n > s->capacity - s->n_tokens)
        return HT_FAIL(HT_ERR_ARG, "%lld tokens after %lld; the context holds %lld", (long long)n,
                       (long long)s->n_tokens, (long long)s->capacity);
    if (c->rope_dims && s->n_tokens + n > c->max_position)
        return HT_FAIL(HT_ERR_ARG, "position %lld; the model has %lld",
                       (long long)(s->n_tokens + n), (long long)c->max_position);
    return HT_OK;
}

enum ht_status ht_decoder_extend(struct ht_decoder *d, struct ht_state *s, const int32_t *ids,
                                 int64_t n, float *logits)
{
    const struct ht_model_config *c = &d->m->cfg;
    int64_t last = 0; // rows of the last block

    if (n < 1) return HT_FAIL(HT_ERR_ARG, "%lld tokens to append; at least 1", (long long)n);
    HT_TRY(check_room(d, s, n));
    for (int64_t done = 0; done < n; done += last) {
        last = next_block(d, s, n - done);
        HT_TRY(extend_block(d, s, ids + done, last));
    }
    if (!logits) return HT_OK;
    return ht_model_logits(
        d->m, 1, ht_column(d->acts->u_final, (last - 1) * c->d_model, d->m->dtype), logits);
}

/* Log-probabilities of labels (n) from the first n rows of the last block, a few rows at a time. */
static enum ht_status score_packed(struct ht_decoder *d, const int32_t *labels, int64_t n,
                                   float *logprobs)
{
    const struct ht_model_config *c = &d->m->cfg;

    for (int64_t first = 0, rows; first < n; first += rows) {
        rows = n - first < SCORE_ROWS ? n - first : SCORE_ROWS;
        HT_TRY(ht_model_logits(
            d->m, rows, ht_column(d->acts->u_final, first * c->d_model, d->m->dtype), d->logits));
#pragma omp parallel for num_threads(d->m->be->n_threads)
        for (int64_t t = 0; t < rows; t++) {
            const float *x = d->logits + t * c->vocab_size;
            float top = x[0], sum = 0.0f;
            double total = 0.0;
            for (int64_t i = 1; i < c->vocab_size; i++) top = x[i] > top ? x[i] : top;
            for (int64_t i = 0; i < c->vocab_size; i++) {
                sum += expf(x[i] - top);
                if (i % 1024 == 1023 || i + 1 == c->vocab_size) { // short sums in fp32
                    total += (double)sum;
                    sum = 0.0f;
                }
            }
            logprobs[first + t] = (float)((double)x[labels[first + t]] - (double)top - log(total));
        }
    }
    return HT_OK;
}

enum ht_status ht_decoder_score(struct ht_decoder *d, struct ht_state *s, const int32_t *ids,
                                int64_t n, float *logprobs)
{
    const struct ht_model_config *c = &d->m->cfg;

    HT_TRY(check_room(d, s, n));
    if (s->n_tokens > 0)
        return HT_FAIL(HT_ERR_ARG, "scoring starts with an empty state; %lld tokens are in it",
                       (long long)s->n_tokens);
    if (n > 0) logprobs[0] = 0.0f;
    for (int64_t done = 0, rows; done < n; done += rows) {
        rows = next_block(d, s, n - done);
        HT_TRY(extend_block(d, s, ids + done, rows));
        // row i predicts token i + 1; the very last row predicts nothing
        const int64_t labelled = done + rows < n ? rows : rows - 1;
        if (d->m->packed) {
            HT_TRY(score_packed(d, ids + done + 1, labelled, logprobs + done + 1));
            continue;
        }
        struct ht_linear_ce_args ce = { .n_tokens = labelled,
                                        .d_model = c->d_model,
                                        .vocab_size = c->vocab_size,
                                        .dtype = d->m->dtype,
                                        .logit_scale = 1.0f / c->logits_scaling,
                                        .loss_scale = 1.0f,
                                        .u = d->acts->u_final,
                                        .weight = ht_model_matrix(d->m, -1, ht_head_role(d->m)),
                                        .labels = ids + done + 1,
                                        .logprobs = logprobs + done + 1 };
        HT_TRY(ht_linear_ce(d->m->be, &ce));
    }
    return HT_OK;
}
