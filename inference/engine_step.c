/* inference/engine_step.c: one step of the engine: a token for everyone who decodes, then prompt
 * blocks while the step has room for their tokens. */
#include <string.h>

#include "core/base/file.h"
#include "inference/engine_impl.h"

/* ---- what follows a row of logits ---- */

/* The next token of a choice from its logits (changed in place). Ends the choice where it ends. */
static enum ht_status take_logits(struct ht_engine *e, struct ht_choice *c, float *logits)
{
    struct ht_open_request *r = c->request;
    const int64_t vocab_size = ht_engine_vocab_size(e);
    const bool wants_lp = r->o.logprobs >= 0;
    float *changed = logits;
    struct ht_logprobs lp;
    bool stopped = false;
    int32_t id;

    if (wants_lp) { // they are of the model's own distribution, before mask and penalties
        changed = e->logits + e->o.max_seqs * vocab_size;
        memcpy(changed, logits, (size_t)vocab_size * sizeof *logits);
    }
    if (c->grammar) HT_TRY(ht_grammar_mask(c->grammar, changed));
    HT_TRY(ht_sampler_pick(c->sampler, changed, c->n_ids, &id));
    if (wants_lp) ht_logprobs_of(&lp, logits, vocab_size, id, r->o.logprobs);
    if (r->first_token_s == 0.0) r->first_token_s = ht_time_s();
    c->ids[c->n_ids++] = id;
    c->n_generated++;
    e->stats.generated_tokens++;
    if (id == e->loaded.eos && !r->o.ignore_eos) {
        ht_scheduler_end_choice(e, c, HT_FINISH_STOP, NULL);
        return HT_OK;
    }
    ht_sampler_accept_generated(c->sampler, id);
    if (c->grammar) HT_TRY(ht_grammar_accept(c->grammar, id));
    HT_TRY(ht_choice_emit(e, c, id, false, wants_lp ? &lp : NULL, &stopped));
    if (stopped || (c->grammar && ht_grammar_must_end(c->grammar)))
        ht_scheduler_end_choice(e, c, HT_FINISH_STOP, NULL);
    else if (c->n_generated == r->o.max_tokens)
        ht_scheduler_end_choice(e, c, HT_FINISH_LENGTH, NULL);
    return HT_OK;
}

/* take_logits whose failure is the choice's own. */
static void advance(struct ht_engine *e, struct ht_choice *c, float *logits)
{
    if (take_logits(e, c, logits) != HT_OK)
        ht_scheduler_end_choice(e, c, HT_FINISH_ERROR, ht_error_message());
}

/* ---- decoding rows ---- */

static enum ht_status decode_all(struct ht_engine *e)
{
    const int64_t vocab_size = ht_engine_vocab_size(e);
    int64_t n = 0;

    for (int i = 0; i < e->n_running; i++) {
        struct ht_choice *c = e->running[i];
        if (c->phase != HT_PHASE_DECODE) continue;
        e->row_choice[n] = c;
        e->row_place[n] = &c->place;
        e->row_ids[n++] = c->ids[c->n_ids - 1];
    }
    if (n == 0) return HT_OK;
    HT_TRY(ht_pool_decode(e->pool, e->row_place, e->row_ids, n, e->logits));
    for (int64_t i = 0; i < n; i++) advance(e, e->row_choice[i], e->logits + i * vocab_size);
    return HT_OK;
}

/* ---- prompts ---- */

/* Events of prompt tokens first .. first + n - 1, whose rows are those of the last pass. Token t is
 * predicted by row t - 1; the last row of a block is kept for the next. */
static enum ht_status echo_block(struct ht_engine *e, struct ht_open_request *r, int64_t first,
                                 int64_t n)
{
    const int64_t vocab_size = ht_engine_vocab_size(e);
    struct ht_logprobs lp;
    bool stopped;

    for (int64_t t = 0; t < n; t++) {
        const int32_t id = r->o.ids[first + t];
        const bool known = r->o.logprobs >= 0 && first + t > 0;
        if (known) ht_logprobs_of(&lp, r->last_row, vocab_size, id, r->o.logprobs);
        for (int i = 0; i < r->o.n; i++)
            HT_TRY(ht_choice_emit(e, &r->choices[i], id, true, known ? &lp : NULL, &stopped));
        if (r->o.logprobs >= 0) HT_TRY(ht_pool_prompt_logits(e->pool, t, 1, r->last_row));
    }
    return HT_OK;
}

static void keep_snapshot(struct ht_engine *e, struct ht_open_request *r, const struct ht_place *at)
{
    const int64_t n = at->n_tokens;

    if (!e->cache || n == 0 || (n != r->snapshot_at[0] && n != r->snapshot_at[1])) return;
    void *state = ht_prefix_cache_add(e->cache, r->o.ids, n, ht_pool_export_bytes(e->pool, n));
    if (state) ht_pool_export(e->pool, at, state);
}

/* The prompt is read: forks, and everyone's first token. */
static enum ht_status finish_prompt(struct ht_engine *e, struct ht_open_request *r, int64_t rows)
{
    const int64_t vocab_size = ht_engine_vocab_size(e);
    const int n = r->o.n;
    struct ht_choice *first = &r->choices[0];
    float *logits = e->logits;
    int left = r->n_live;

    if (r->o.max_tokens == 0) {
        for (int i = 0; left > 0; i++)
            if (r->choices[i].phase != HT_PHASE_OVER) {
                left--;
                ht_scheduler_end_choice(e, &r->choices[i], HT_FINISH_LENGTH, NULL);
            }
        return HT_OK;
    }
    HT_TRY(ht_pool_prompt_logits(e->pool, rows - 1, 1, logits));
    for (int i = 1; i < n; i++) {
        struct ht_choice *c = &r->choices[i];
        ht_pool_copy(e->pool, &c->place, &first->place);
        memcpy(logits + i * vocab_size, logits, (size_t)vocab_size * sizeof *logits);
        if (first->grammar) HT_TRY(ht_grammar_clone(&c->grammar, first->grammar));
        c->phase = HT_PHASE_DECODE;
    }
    first->phase = HT_PHASE_DECODE;
    for (int i = 0; i < n; i++) { // the last end frees r
        struct ht_choice *c = &r->choices[i];
        const bool was_last = r->n_live == 1;
        advance(e, c, logits + i * vocab_size);
        if (was_last) break;
    }
    return HT_OK;
}

/* One block of a prompt, to the next multiple of prefill_chunk or to its end. */
static enum ht_status read_block(struct ht_engine *e, struct ht_choice *c, int64_t n)
{
    struct ht_open_request *r = c->request;
    const int64_t first = c->place.n_tokens;

    HT_TRY(ht_pool_prompt(e->pool, &c->place, r->o.ids + first, n));
    e->stats.prompt_tokens += n;
    keep_snapshot(e, r, &c->place);
    if (r->o.echo) {
        // cached beginnings have no rows; without log-probabilities none are needed
        if (first == r->cached_tokens && first > 0) HT_TRY(echo_block(e, r, 0, first));
        HT_TRY(echo_block(e, r, first, n));
    }
    if (c->place.n_tokens == r->o.n_ids) return finish_prompt(e, r, n);
    return HT_OK;
}

static enum ht_status read_prompts(struct ht_engine *e)
{
    int64_t room = e->o.max_step_tokens;

    for (int i = 0; i < e->n_running && room > 0;) {
        struct ht_choice *c = e->running[i];
        if (c->phase != HT_PHASE_PROMPT) {
            i++;
            continue;
        }
        const int64_t at = c->place.n_tokens, left = c->request->o.n_ids - at;
        const int64_t border = e->o.prefill_chunk - at % e->o.prefill_chunk;
        const int64_t n = left < border ? left : border;
        if (n > room) break; // prompts are read in order: none overtakes
        HT_TRY(read_block(e, c, n));
        room -= n;
        // the choice may be over and its place in the list taken by another: look again
    }
    return HT_OK;
}

enum ht_status ht_engine_step(struct ht_engine *e)
{
    HT_TRY(decode_all(e));
    HT_TRY(read_prompts(e));
    e->stats.steps++;
    return HT_OK;
}
