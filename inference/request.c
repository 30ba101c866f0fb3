/* inference/request.c: a request's copy, its choices, their text. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "inference/engine_impl.h"

/* ---- checks ---- */

static enum ht_status check_prompt(const struct ht_engine *e, const struct ht_request *r)
{
    const int64_t vocab_size = ht_engine_vocab_size(e), context = e->o.max_context;

    if (r->n_ids < 1) return HT_FAIL(HT_ERR_ARG, "prompt: no tokens; at least 1 is needed");
    if (r->n_ids + (r->max_tokens > 0) > context)
        return HT_FAIL(HT_ERR_ARG, "prompt: %lld tokens; the context holds %lld%s",
                       (long long)r->n_ids, (long long)context,
                       r->max_tokens > 0 ? ", the answer included" : "");
    for (int64_t i = 0; i < r->n_ids; i++)
        if (r->ids[i] < 0 || r->ids[i] >= vocab_size)
            return HT_FAIL(HT_ERR_ARG, "prompt: token %lld is %d; the vocabulary has 0 to %lld",
                           (long long)i, r->ids[i], (long long)vocab_size - 1);
    return HT_OK;
}

static enum ht_status check_limits(const struct ht_engine *e, const struct ht_request *r)
{
    if (r->max_tokens < 0 || (r->max_tokens == 0 && !r->echo))
        return HT_FAIL(HT_ERR_ARG, "max_tokens is %lld; at least 1 (0 with echo)",
                       (long long)r->max_tokens);
    if (r->n < 1 || r->n > HT_ENGINE_MAX_CHOICES || r->n > e->o.max_seqs)
        return HT_FAIL(HT_ERR_ARG, "n is %d; 1 to %lld", r->n,
                       (long long)(e->o.max_seqs < HT_ENGINE_MAX_CHOICES ? e->o.max_seqs
                                                                         : HT_ENGINE_MAX_CHOICES));
    if (r->logprobs < -1 || r->logprobs > HT_ENGINE_MAX_LOGPROBS)
        return HT_FAIL(HT_ERR_ARG, "logprobs is %d; 0 to %d", r->logprobs, HT_ENGINE_MAX_LOGPROBS);
    if (r->n_bias < 0 || r->n_bias > HT_ENGINE_MAX_BIASES)
        return HT_FAIL(HT_ERR_ARG, "logit_bias names %lld tokens; at most %d", (long long)r->n_bias,
                       HT_ENGINE_MAX_BIASES);
    if (r->n_stops < 0 || r->n_stops > HT_ENGINE_MAX_STOPS)
        return HT_FAIL(HT_ERR_ARG, "stop has %d strings; at most %d", r->n_stops,
                       HT_ENGINE_MAX_STOPS);
    if (r->n_stops > 0 && !e->loaded.tokenizer)
        return HT_FAIL(HT_ERR_ARG, "stop: this model has no tokenizer");
    for (int i = 0; i < r->n_stops; i++) {
        const size_t n = strlen(r->stops[i]);
        if (n < 1 || n > HT_ENGINE_MAX_STOP_BYTES)
            return HT_FAIL(HT_ERR_ARG, "stop: string %d has %zu bytes; 1 to %d", i, n,
                           HT_ENGINE_MAX_STOP_BYTES);
    }
    if (isnan(r->deadline_s)) return HT_FAIL(HT_ERR_ARG, "deadline_s is not a number");
    return HT_OK;
}

/* ---- copy ---- */

static enum ht_status copy_arrays(struct ht_open_request *r, const struct ht_request *from)
{
    const size_t ids_bytes = (size_t)from->n_ids * sizeof *from->ids;
    int32_t *ids = malloc(ids_bytes);
    struct ht_logit_bias *bias = calloc((size_t)from->n_bias + 1, sizeof *bias);
    char **stops = calloc((size_t)from->n_stops + 1, sizeof *stops);

    r->o = *from;
    r->o.ids = ids;
    r->o.bias = bias;
    r->o.stops = (const char *const *)stops;
    if (!ids || !bias || !stops) return HT_FAIL(HT_ERR_MEMORY, "no memory for a request");
    memcpy(ids, from->ids, ids_bytes);
    if (from->n_bias > 0) memcpy(bias, from->bias, (size_t)from->n_bias * sizeof *bias);
    for (int i = 0; i < from->n_stops; i++)
        if (!(stops[i] = strdup(from->stops[i])))
            return HT_FAIL(HT_ERR_MEMORY, "no memory for a stop string");
    return HT_OK;
}

static enum ht_status create_choice(const struct ht_engine *e, struct ht_open_request *r, int i)
{
    struct ht_choice *c = &r->choices[i];
    const struct ht_sampler_options sampling = { .temperature = r->o.temperature,
                                                 .top_k = r->o.top_k,
                                                 .top_p = r->o.top_p,
                                                 .min_p = r->o.min_p,
                                                 .repetition_penalty = r->o.repetition_penalty,
                                                 .frequency_penalty = r->o.frequency_penalty,
                                                 .presence_penalty = r->o.presence_penalty,
                                                 .seed = r->o.seed + (uint64_t)i };

    *c = (struct ht_choice){ .request = r, .number = i };
    ht_draft_init(&c->draft);
    c->phase = i == 0 ? HT_PHASE_PROMPT : HT_PHASE_FORK;
    c->ids = malloc((size_t)(r->o.n_ids + r->o.max_tokens) * sizeof *c->ids);
    if (!c->ids) return HT_FAIL(HT_ERR_MEMORY, "no memory for the tokens of a request");
    memcpy(c->ids, r->o.ids, (size_t)r->o.n_ids * sizeof *c->ids);
    c->n_ids = r->o.n_ids;
    HT_TRY(ht_sampler_create(&c->sampler, &sampling, ht_engine_vocab_size(e)));
    for (int64_t b = 0; b < r->o.n_bias; b++)
        HT_TRY(ht_sampler_bias(c->sampler, r->o.bias[b].id, r->o.bias[b].bias));
    for (int64_t t = 0; t < r->o.n_ids; t++) ht_sampler_accept(c->sampler, r->o.ids[t]);
    if (e->loaded.tokenizer) HT_TRY(ht_token_decoder_create(&c->text, e->loaded.tokenizer, true));
    return HT_OK;
}

enum ht_status ht_open_request_create(struct ht_open_request **out, const struct ht_engine *e,
                                      const struct ht_request *from)
{
    enum ht_status st = HT_OK;
    struct ht_open_request *r = NULL;
    const int64_t kv_room = e->token_bytes ? e->extents.n_tokens : INT64_MAX;

    *out = NULL;
    HT_TRY(check_limits(e, from));
    HT_TRY(check_prompt(e, from));
    r = calloc(1, sizeof *r);
    if (!r) return HT_FAIL(HT_ERR_MEMORY, "no memory for a request");
    HT_TRY_GOTO(st, done, copy_arrays(r, from));
    if (r->o.max_tokens > e->o.max_context - r->o.n_ids)
        r->o.max_tokens = e->o.max_context - r->o.n_ids;
    r->kv_tokens = e->token_bytes ? r->o.n_ids + r->o.max_tokens : 0;
    if (r->kv_tokens > kv_room / r->o.n) {
        st = HT_FAIL(HT_ERR_ARG,
                     "%d choices of %lld tokens each need keys and values of %lld tokens; the "
                     "engine's memory holds %lld",
                     r->o.n, (long long)r->kv_tokens, (long long)(r->o.n * r->kv_tokens),
                     (long long)kv_room);
        goto done;
    }
    if (r->o.echo && r->o.logprobs >= 0) {
        r->last_row = malloc((size_t)ht_engine_vocab_size(e) * sizeof *r->last_row);
        if (!r->last_row) {
            st = HT_FAIL(HT_ERR_MEMORY, "no memory for a row of logits");
            goto done;
        }
    }
    r->arrived_s = ht_time_s();
    r->n_live = r->o.n;
    r->choices = calloc((size_t)r->o.n, sizeof *r->choices);
    if (!r->choices) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for %d choices", r->o.n);
        goto done;
    }
    for (int i = 0; i < r->o.n; i++) HT_TRY_GOTO(st, done, create_choice(e, r, i));
    r->choices[0].grammar = r->o.grammar;
    *out = r;
    r = NULL;
done:
    ht_open_request_free(r, true);
    return st;
}

void ht_open_request_free(struct ht_open_request *r, bool keep_grammar)
{
    if (!r) return;
    for (int i = 0; r->choices && i < r->o.n; i++) {
        struct ht_choice *c = &r->choices[i];
        if (!(keep_grammar && c->grammar == r->o.grammar)) ht_grammar_free(c->grammar);
        ht_sampler_free(c->sampler);
        ht_token_decoder_free(c->text);
        free(c->swapped);
        free(c->ids);
        free(c->held);
    }
    for (int i = 0; r->o.stops && i < r->o.n_stops; i++) free((char *)(uintptr_t)r->o.stops[i]);
    free((void *)(uintptr_t)r->o.stops);
    free((void *)(uintptr_t)r->o.bias);
    free((void *)(uintptr_t)r->o.ids);
    free(r->choices);
    free(r->last_row);
    free(r);
}

/* ---- log-probabilities ---- */

void ht_logprobs_of(struct ht_logprobs *out, const float *logits, int64_t vocab_size, int32_t id,
                    int n_top)
{
    double sum = 0.0;
    float top = -INFINITY;
    bool has_id = false;

    for (int64_t i = 0; i < vocab_size; i++)
        if (logits[i] > top) top = logits[i];
    for (int64_t i = 0; i < vocab_size; i++) sum += exp((double)logits[i] - (double)top);
    const double log_sum = (double)top + log(sum);
    out->chosen = (float)((double)logits[id] - log_sum);
    out->n_top = 0;
    for (int64_t i = 0; i < vocab_size && n_top > 0; i++) {
        const float v = (float)((double)logits[i] - log_sum);
        if (out->n_top == n_top && !(v > out->top[n_top - 1].logprob)) continue;
        int at = out->n_top < n_top ? out->n_top++ : n_top - 1;
        for (; at > 0 && v > out->top[at - 1].logprob; at--) out->top[at] = out->top[at - 1];
        out->top[at] = (struct ht_token_logprob){ (int32_t)i, v };
    }
    for (int i = 0; i < out->n_top; i++) has_id |= out->top[i].id == id;
    if (n_top > 0 && !has_id) out->top[out->n_top++] = (struct ht_token_logprob){ id, out->chosen };
}

/* ---- text and events ---- */

/* An event of the choice at the end of this step's; NULL without memory. */
static struct ht_engine_event *add_event(struct ht_engine *e, const struct ht_choice *c,
                                         const char *text, size_t n_text, int n_top)
{
    const size_t top_bytes = (size_t)n_top * sizeof(struct ht_token_logprob);
    struct ht_engine_event *v = calloc(1, sizeof *v + top_bytes + n_text + 1);

    if (!v) return NULL;
    struct ht_token_logprob *top = (struct ht_token_logprob *)(v + 1);
    char *copy = (char *)top + top_bytes;
    if (n_text) memcpy(copy, text, n_text);
    v->request = c->request->id;
    v->user = c->request->o.user;
    v->choice = c->number;
    v->id = -1;
    v->text = copy;
    v->text_bytes = n_text;
    v->top = top;
    *e->fresh_end = v;
    e->fresh_end = &v->next;
    return v;
}

static enum ht_status hold(struct ht_choice *c, const char *text, size_t n)
{
    if (c->n_held + n + 1 > c->held_capacity) {
        const size_t capacity = 2 * (c->n_held + n) + 64;
        char *grown = realloc(c->held, capacity);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes of text", capacity);
        c->held = grown;
        c->held_capacity = capacity;
    }
    if (n) memcpy(c->held + c->n_held, text, n);
    c->n_held += n;
    c->held[c->n_held] = '\0';
    return HT_OK;
}

/* Bytes of the held text that may go out; *stopped when a stop string is in it, which they end at.
 */
static size_t releasable(const struct ht_choice *c, bool *stopped)
{
    const struct ht_request *o = &c->request->o;
    size_t first = c->n_held, keep = 0;

    *stopped = false;
    for (int i = 0; i < o->n_stops; i++) {
        const size_t n = strlen(o->stops[i]);
        const char *found = c->n_held ? memmem(c->held, c->n_held, o->stops[i], n) : NULL;
        if (found && (size_t)(found - c->held) <= first) {
            first = (size_t)(found - c->held);
            *stopped = true;
        }
        for (size_t m = n - 1; m > keep; m--) // the longest beginning of it at the end of the text
            if (m <= c->n_held && memcmp(c->held + c->n_held - m, o->stops[i], m) == 0) keep = m;
    }
    return *stopped ? first : c->n_held - keep;
}

enum ht_status ht_choice_emit(struct ht_engine *e, struct ht_choice *c, int32_t id,
                              bool from_prompt, const struct ht_logprobs *lp, bool *stopped)
{
    const char *text = "";
    size_t n_text = 0, out;

    *stopped = false;
    if (c->text) HT_TRY(ht_token_decoder_push(c->text, id, &text, &n_text));
    HT_TRY(hold(c, text, n_text));
    out = from_prompt ? c->n_held : releasable(c, stopped); // stops are looked for in answers only
    struct ht_engine_event *v = add_event(e, c, c->held, out, lp ? lp->n_top : 0);
    if (!v) return HT_FAIL(HT_ERR_MEMORY, "no memory for an event");
    memmove(c->held, c->held + out, c->n_held - out);
    c->n_held -= out;
    if (*stopped) { // the stop string and what follows it are no text
        c->n_held = 0;
        ht_token_decoder_free(c->text);
        c->text = NULL;
    }
    v->id = id;
    v->from_prompt = from_prompt;
    if (lp) {
        v->has_logprob = true;
        v->logprob = lp->chosen;
        v->n_top = lp->n_top;
        memcpy((struct ht_token_logprob *)(v + 1), lp->top, (size_t)lp->n_top * sizeof *lp->top);
    }
    return HT_OK;
}

void ht_choice_end(struct ht_engine *e, struct ht_choice *c, enum ht_finish why,
                   const char *message)
{
    const struct ht_open_request *r = c->request;
    const double now_s = ht_time_s();
    const char *rest = "";
    size_t n_rest = 0;

    // what is held is text after all; a stop string is gone already
    if (c->text && why != HT_FINISH_ERROR && why != HT_FINISH_CANCELLED &&
        ht_token_decoder_finish(c->text, &rest, &n_rest) == HT_OK)
        hold(c, rest, n_rest);
    const size_t n_text = c->n_held;
    const char *said = message ? message : "";
    const size_t n_said = strlen(said);
    char *joined = malloc(n_text + n_said + 2);
    if (joined) {
        if (n_text) memcpy(joined, c->held, n_text);
        joined[n_text] = '\0';
        memcpy(joined + n_text + 1, said, n_said + 1);
    }
    struct ht_engine_event *v =
        add_event(e, c, joined ? joined : "", joined ? n_text + 1 + n_said : 0, 0);
    free(joined);
    if (!v) return; // the caller's stream ends with the engine; nothing else can be said
    v->text_bytes = n_text;
    v->finish = why;
    v->message = n_said ? v->text + n_text + 1 : NULL;
    v->prompt_tokens = r->o.n_ids;
    v->cached_tokens = r->cached_tokens;
    v->generated_tokens = c->n_generated;
    v->queue_s = (r->admitted_s > 0 ? r->admitted_s : now_s) - r->arrived_s;
    v->first_token_s = r->first_token_s > 0 ? r->first_token_s - r->arrived_s : 0.0;
    v->total_s = now_s - r->arrived_s;
}
