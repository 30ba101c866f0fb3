/* inference/engine_step.c: one step of the engine: a token for everyone who decodes, then prompt
 * blocks while the step has room for their tokens. */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "inference/engine_impl.h"

enum {
    COSTLY_ROWS = 32,  // rows of a product beyond which it is bound by arithmetic
    SMALL_VOCAB = 4096 // below, a parallel region costs more than the draws
};

/* ---- what follows a row of logits ---- */

/* The next token of a choice from its logits. thread: whose row of `changed` is free. */
static enum ht_status draw(const struct ht_engine *e, const struct ht_choice *c,
                           const float *logits, int thread, int32_t *id, struct ht_logprobs *lp)
{
    const int64_t vocab_size = ht_engine_vocab_size(e);
    const int n_top = c->request->o.logprobs;
    float *changed = e->changed + thread * vocab_size;

    memcpy(changed, logits, (size_t)vocab_size * sizeof *logits);
    if (c->grammar) HT_TRY(ht_grammar_mask(c->grammar, changed));
    HT_TRY(ht_sampler_pick(c->sampler, changed, c->n_ids, id));
    // they are of the model's own distribution, before mask and penalties
    if (n_top >= 0) ht_logprobs_of(lp, logits, vocab_size, *id, n_top);
    return HT_OK;
}

/* The drawn token becomes the choice's. *why: how the choice ends with it. */
static enum ht_status take_token(struct ht_engine *e, struct ht_choice *c, int32_t id,
                                 const struct ht_logprobs *lp, enum ht_finish *why)
{
    struct ht_open_request *r = c->request;
    bool stopped = false;

    if (r->first_token_s == 0.0) r->first_token_s = ht_time_s();
    c->ids[c->n_ids++] = id;
    c->n_generated++;
    e->stats.generated_tokens++;
    if (id == e->loaded.eos && !r->o.ignore_eos) {
        *why = HT_FINISH_STOP;
        return HT_OK;
    }
    ht_sampler_accept_generated(c->sampler, id);
    if (c->grammar) HT_TRY(ht_grammar_accept(c->grammar, id));
    HT_TRY(ht_choice_emit(e, c, id, false, r->o.logprobs >= 0 ? lp : NULL, &stopped));
    if (stopped || (c->grammar && ht_grammar_must_end(c->grammar)))
        *why = HT_FINISH_STOP;
    else if (c->n_generated == r->o.max_tokens)
        *why = HT_FINISH_LENGTH;
    return HT_OK;
}

/* Draws for row i from the first logits of its run. */
static void draw_row(struct ht_engine *e, int64_t i, int thread)
{
    struct ht_engine_row *row = &e->row[i];

    row->error = NULL;
    if (draw(e, row->choice, e->run[i].logits[0], thread, &row->id, &row->lp) != HT_OK)
        row->error = strdup(ht_error_message()); // it is this thread's
}

/* Draws for all rows. Grammars build their tables as they go and may share them: one by one. */
static void draw_all(struct ht_engine *e, int64_t n)
{
#pragma omp parallel for schedule(dynamic, 1)                                                      \
    num_threads(e->draw_threads) if (n > 1 && ht_engine_vocab_size(e) > SMALL_VOCAB)
    for (int64_t i = 0; i < n; i++)
        if (!e->row[i].choice->grammar) draw_row(e, i, omp_get_thread_num());
    for (int64_t i = 0; i < n; i++)
        if (e->row[i].choice->grammar) draw_row(e, i, 0);
}

/* What was drawn for row i becomes its choice's, and so on through the run as long as its guesses
 * are what is drawn. A failure is the choice's own. */
static enum ht_status advance(struct ht_engine *e, int64_t i)
{
    struct ht_engine_row *row = &e->row[i];
    struct ht_pool_run *run = &e->run[i];
    struct ht_choice *c = row->choice;
    enum ht_finish why = HT_FINISH_NONE;
    enum ht_status st = HT_OK;
    int64_t n = 0;

    if (row->error) {
        ht_scheduler_end_choice(e, c, HT_FINISH_ERROR, row->error);
        free(row->error);
        return HT_OK;
    }
    do {
        if (n > 0) st = draw(e, c, run->logits[n], 0, &row->id, &row->lp);
        n++;
        if (st == HT_OK) st = take_token(e, c, row->id, &row->lp, &why);
    } while (st == HT_OK && why == HT_FINISH_NONE && n < run->n && run->ids[n] == row->id);
    if (st != HT_OK) {
        ht_scheduler_end_choice(e, c, HT_FINISH_ERROR, ht_error_message());
        return HT_OK;
    }
    if (run->n > 1) {
        e->stats.speculated += run->n - 1;
        e->stats.accepted += n - 1;
        ht_draft_learn(&c->draft, run->n - 1, n - 1);
    }
    if (why == HT_FINISH_NONE) return run->n > 0 ? ht_pool_accept(e->pool, run, n) : HT_OK;
    ht_scheduler_end_choice(e, c, why, NULL);
    return HT_OK;
}

/* ---- decoding rows ---- */

/* Guesses into the run, at most `most`. The last token that may be made needs none after it. */
static void guess(struct ht_choice *c, struct ht_pool_run *run, int64_t most)
{
    const int64_t left = c->request->o.max_tokens - c->n_generated - 1;

    if (most > left) most = left;
    if (most > HT_POOL_RUN - 1) most = HT_POOL_RUN - 1;
    if (most > 0) run->n += ht_draft_guess(&c->draft, c->ids, c->n_ids, most, run->ids + 1);
}

static enum ht_status decode_all(struct ht_engine *e)
{
    int64_t n = 0, rows, n_drafts = 0;

    for (int i = 0; i < e->n_running; i++) {
        struct ht_choice *c = e->running[i];
        if (c->phase != HT_PHASE_DECODE) continue;
        e->row[n].choice = c;
        e->run[n].at = &c->place;
        e->run[n].ids[0] = c->ids[c->n_ids - 1];
        e->run[n++].n = 1;
    }
    if (n == 0) return HT_OK;
    rows = n;
    for (int64_t i = 0; i < n && n_drafts < e->o.max_drafts && rows < COSTLY_ROWS; i++) {
        struct ht_choice *c = e->row[i].choice;
        if (!c->request->o.speculate) continue;
        guess(c, &e->run[i], COSTLY_ROWS - rows);
        if (e->run[i].n == 1) continue;
        rows += e->run[i].n - 1;
        e->run[i].spare = e->spare_slots[n_drafts++];
    }
    HT_TRY(ht_pool_decode_runs(e->pool, e->run, n, e->logits));
    draw_all(e, n);
    enum ht_status st = HT_OK;
    n_drafts = 0;
    for (int64_t i = 0; i < n; i++) {
        const bool drafted = e->run[i].n > 1;
        const enum ht_status one = advance(e, i); // the other rows' errors are theirs to free
        if (st == HT_OK) st = one;
        if (drafted) e->spare_slots[n_drafts++] = e->run[i].spare;
    }
    return st;
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

static enum ht_status keep_snapshot(struct ht_engine *e, struct ht_open_request *r,
                                    const struct ht_place *at)
{
    const int64_t n = at->n_tokens;

    if (!e->cache || n == 0 || (n != r->snapshot_at[0] && n != r->snapshot_at[1])) return HT_OK;
    void *state = ht_prefix_cache_add(e->cache, r->o.ids, n, ht_pool_export_bytes(e->pool, n));
    const enum ht_status st = state ? ht_pool_export(e->pool, at, state) : HT_OK;
    if (st != HT_OK) ht_prefix_cache_drop_newest(e->cache);
    return st;
}

/* The prompt is read: forks, and everyone's first token. */
static enum ht_status finish_prompt(struct ht_engine *e, struct ht_open_request *r, int64_t rows)
{
    const int n = r->o.n;
    struct ht_choice *first = &r->choices[0];
    int left = r->n_live;

    if (r->o.max_tokens == 0) {
        for (int i = 0; left > 0; i++)
            if (r->choices[i].phase != HT_PHASE_OVER) {
                left--;
                ht_scheduler_end_choice(e, &r->choices[i], HT_FINISH_LENGTH, NULL);
            }
        return HT_OK;
    }
    HT_TRY(ht_pool_prompt_logits(e->pool, rows - 1, 1, e->logits));
    for (int i = 1; i < n; i++) {
        struct ht_choice *c = &r->choices[i];
        HT_TRY(ht_pool_copy(e->pool, &c->place, &first->place));
        if (first->grammar) HT_TRY(ht_grammar_clone(&c->grammar, first->grammar));
        c->phase = HT_PHASE_DECODE;
    }
    first->phase = HT_PHASE_DECODE;
    for (int i = 0; i < n; i++) { // a run of no token: the logits are there
        e->row[i].choice = &r->choices[i];
        e->run[i].n = 0;
        e->run[i].logits[0] = e->logits;
    }
    draw_all(e, n);
    for (int i = 0; i < n; i++) HT_TRY(advance(e, i)); // the last end frees r
    return HT_OK;
}

/* One block of a prompt, to the next multiple of prefill_chunk or to its end. */
static enum ht_status read_block(struct ht_engine *e, struct ht_choice *c, int64_t n)
{
    struct ht_open_request *r = c->request;
    const int64_t first = c->place.n_tokens;

    HT_TRY(ht_pool_prompt(e->pool, &c->place, r->o.ids + first, n));
    e->stats.prompt_tokens += n;
    HT_TRY(keep_snapshot(e, r, &c->place));
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
