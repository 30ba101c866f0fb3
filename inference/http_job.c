/* inference/http_job.c: a request for text, from its submission until the engine has let go of it.
 */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/file.h"
#include "inference/grammar.h"
#include "inference/http_impl.h"

static void free_job(struct ht_job *j)
{
    struct ht_http *h = j->h;
    if (j->next) j->next->previous = j->previous;
    if (j->previous)
        j->previous->next = j->next;
    else
        h->jobs = j->next;
    ht_api_answer_free(j->answer);
    free(j->pending.p);
    free(j->prompts);
    free(j);
}

static void cancel(struct ht_job *j)
{
    for (int i = 0; i < j->n_prompts; i++)
        if (j->prompts[i].n_open > 0) ht_engine_cancel(j->h->engine, j->prompts[i].id);
}

static void log_end(const struct ht_job *j)
{
    struct ht_api_usage u;
    const double now = ht_time_s();
    ht_api_answer_usage(j->answer, &u);
    HT_INFO(j->h->o.log,
            "%s %d prompt %" PRId64 " (%" PRId64 " cached) generated %" PRId64
            " first %.3f s total %.3f s",
            j->id, j->status, u.prompt_tokens, u.cached_tokens, u.completion_tokens,
            j->first_s > 0 ? j->first_s - j->begin_s : 0.0, now - j->begin_s);
}

/* The connection ends while an answer is made: the engine stops working for it. */
static void client_gone(struct evhttp_connection *c, void *arg)
{
    struct ht_job *j = arg;
    (void)c;
    // evhttp frees a request that is still on its list; one that it took off is ours
    if (j->http && !evhttp_request_get_connection(j->http)) evhttp_request_free(j->http);
    j->http = NULL;
    if (j->status == 200) j->status = 499;
    cancel(j);
}

static void detach(struct ht_job *j)
{
    struct evhttp_connection *c = j->http ? evhttp_request_get_connection(j->http) : NULL;
    if (c) evhttp_connection_set_closecb(c, NULL, NULL);
}

/* Close the connection in the middle of an answer. */
static void cut_off(struct ht_job *j)
{
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    detach(j);
    j->http = NULL;
    cancel(j);
    if (c) evhttp_connection_free(c); // frees the request, too
}

static size_t unsent(struct ht_job *j)
{
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    return c ? evbuffer_get_length(bufferevent_get_output(evhttp_connection_get_bufferevent(c)))
             : 0;
}

void ht_job_send(struct ht_job *j)
{
    struct ht_http *h = j->h;
    if (!j->http || j->pending.n == 0) return;
    struct evbuffer *b = evbuffer_new();
    if (b) {
        evbuffer_add(b, j->pending.p, j->pending.n);
        evhttp_send_reply_chunk(j->http, b);
        evbuffer_free(b);
    }
    j->pending.n = 0;
    j->sent_s = ht_time_s();
    if (unsent(j) <= (size_t)h->o.max_output_bytes) return;
    j->status = 499;
    h->metrics.rejected[HT_REJECT_SLOW_READER]++;
    HT_INFO(h->o.log, "%s 499 more than %" PRId64 " bytes wait for a client that does not read",
            j->id, h->o.max_output_bytes);
    cut_off(j);
}

/* All choices have ended. */
static void finish_job(struct ht_job *j)
{
    struct ht_http *h = j->h;
    struct ht_api_text body = { 0 };

    if (j->http && j->stream) {
        ht_api_answer_finish(j->answer, &j->pending);
        ht_job_send(j);
        if (j->http) {
            detach(j);
            evhttp_send_reply_end(j->http);
        }
    } else if (j->http) {
        detach(j);
        if (ht_api_answer_finish(j->answer, &body) == HT_OK) {
            ht_http_reply_json(h, j->http, 200, j->id, &body);
        } else {
            const struct ht_api_error e = { .http = 500, .type = "server_error" };
            j->status = 500;
            free(body.p);
            ht_http_reply_error(h, j->http, j->id, &e, HT_REJECT_ERROR);
        }
    }
    if (j->status == 200) ht_histogram_add(&h->metrics.end_to_end, ht_time_s() - j->begin_s);
    log_end(j);
    free_job(j);
}

static void take_event(struct ht_http *h, const struct ht_engine_event *ev, struct ht_job **dirty)
{
    struct ht_job_prompt *p = ev->user;
    struct ht_job *j = p->job;
    const double now = ht_time_s();

    if (ev->id >= 0 && !ev->from_prompt && ev->choice >= 0 && ev->choice < HT_ENGINE_MAX_CHOICES) {
        double *last = &p->last_s[ev->choice];
        if (*last > 0) ht_histogram_add(&h->metrics.inter_token, now - *last);
        *last = now;
        if (j->first_s <= 0) {
            j->first_s = now;
            ht_histogram_add(&h->metrics.first_token, now - j->begin_s);
        }
    }
    if (ht_api_answer_event(j->answer, p->index, ev, j->stream ? &j->pending : NULL) != HT_OK &&
        j->http) {
        HT_WARN(h->o.log, "%s %s", j->id, ht_error_message());
        j->status = 500;
        cut_off(j);
    }
    if (ev->finish != HT_FINISH_NONE) {
        if (ev->choice <= 0) ht_histogram_add(&h->metrics.queue, ev->queue_s);
        h->metrics.finished[ev->finish]++;
        p->n_open--;
        j->n_open--;
    }
    if (!j->dirty) {
        j->dirty = true;
        j->next_dirty = *dirty;
        *dirty = j;
    }
}

void ht_http_take_events(struct ht_http *h)
{
    struct ht_job *dirty = NULL, *next;
    struct ht_engine_event *list = ht_engine_take_events(h->engine);

    for (const struct ht_engine_event *ev = list; ev; ev = ev->next) take_event(h, ev, &dirty);
    ht_engine_event_free(list);
    for (struct ht_job *j = dirty; j; j = next) {
        next = j->next_dirty;
        j->dirty = false;
        if (j->n_open > 0)
            ht_job_send(j);
        else
            finish_job(j);
    }
}

// ---- a request for text ----

static enum ht_status make_grammar(struct ht_http *h, const struct ht_api_request *r,
                                   struct ht_grammar **out, struct ht_api_error *e)
{
    *out = NULL;
    if (r->format == HT_API_TEXT) return HT_OK;
    *e = (struct ht_api_error){ .http = 400,
                                .type = "invalid_request_error",
                                .param = "response_format" };
    if (!h->context.tokenizer)
        return HT_FAIL(HT_ERR_ARG, "response_format needs a model with a tokenizer");
    if (!h->vocab)
        HT_TRY(ht_grammar_vocab_create(&h->vocab, h->context.tokenizer, h->context.vocab_size,
                                       ht_engine_eos(h->engine)));
    if (r->format == HT_API_JSON_OBJECT) return ht_grammar_create_json(out, h->vocab);
    return ht_grammar_create_schema(out, h->vocab, r->schema);
}

/* What the engine refuses: a full queue is a matter of now, the rest the request's. */
static enum ht_rejection blame(enum ht_status st, struct ht_api_error *e)
{
    if (st == HT_ERR_STOPPED) {
        *e = (struct ht_api_error){ .http = 503, .type = "service_unavailable" };
        return HT_REJECT_UNAVAILABLE;
    }
    if (st == HT_ERR_MEMORY) {
        *e = (struct ht_api_error){ .http = 429, .type = "rate_limit_error", .code = "queue_full" };
        return HT_REJECT_QUEUE;
    }
    if (st == HT_ERR_ARG) {
        *e = (struct ht_api_error){ .http = 400, .type = "invalid_request_error" };
        return HT_REJECT_BAD_REQUEST;
    }
    *e = (struct ht_api_error){ .http = 500, .type = "server_error" };
    return HT_REJECT_ERROR;
}

/* All prompts into the engine, or none. */
static enum ht_status submit(struct ht_job *j, struct ht_api_request *r, struct ht_api_error *e,
                             enum ht_rejection *why)
{
    struct ht_http *h = j->h;
    struct ht_request q = r->request;

    q.deadline_s = h->o.answer_s > 0 ? j->begin_s + h->o.answer_s : 0;
    if (q.n > r->n && q.logprobs < 0) q.logprobs = 0; // the best are chosen by them
    for (int i = 0; i < r->n_prompts; i++) {
        struct ht_job_prompt *p = &j->prompts[i];
        enum ht_status st;
        *p = (struct ht_job_prompt){ .job = j, .index = i };
        q.ids = r->prompts[i].ids;
        q.n_ids = r->prompts[i].n;
        q.user = p;
        *why = HT_REJECT_BAD_REQUEST;
        st = make_grammar(h, r, &q.grammar, e);
        if (st == HT_OK && (st = ht_engine_submit(h->engine, &q, &p->id)) != HT_OK) {
            ht_grammar_free(q.grammar);
            *why = blame(st, e);
        }
        if (st != HT_OK) {
            cancel(j);
            return st;
        }
        p->n_open = q.n;
        j->n_open += q.n;
        j->n_prompts = i + 1;
    }
    return HT_OK;
}

static void start_answer(struct ht_job *j)
{
    struct ht_http *h = j->h;
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    struct bufferevent *bev = evhttp_connection_get_bufferevent(c);
    bufferevent_data_cb on_read, on_write;
    bufferevent_event_cb on_event;
    void *arg;

    evhttp_connection_set_closecb(c, client_gone, j);
    ht_http_set_waiting(h, j->http, true);
    evhttp_request_set_on_complete_cb(j->http, ht_http_answered, h);
    if (!j->stream) { // evhttp stops reading while an answer is made; only reading tells that a
                      // client has gone
        bufferevent_getcb(bev, &on_read, &on_write, &on_event, &arg);
        bufferevent_setcb(bev, NULL, on_write, on_event, arg);
        bufferevent_enable(bev, EV_READ);
        return;
    }
    ht_http_headers(h, j->http, j->id);
    evhttp_add_header(evhttp_request_get_output_headers(j->http), "Content-Type",
                      "text/event-stream");
    evhttp_add_header(evhttp_request_get_output_headers(j->http), "X-Accel-Buffering",
                      "no"); // of reverse proxies
    evhttp_send_reply_start(j->http, 200, "OK");
    ht_api_answer_start(j->answer, &j->pending);
    ht_job_send(j);
}

void ht_http_generate(struct ht_http *h, struct evhttp_request *http, enum ht_api_kind kind)
{
    struct evbuffer *in = evhttp_request_get_input_buffer(http);
    const size_t n = evbuffer_get_length(in);
    enum ht_rejection why = HT_REJECT_BAD_REQUEST;
    struct ht_engine_stats stats;
    struct ht_api_request r;
    struct ht_api_error e = { .http = 500, .type = "server_error" };
    struct ht_job *j = calloc(1, sizeof *j);

    if (!j) {
        (void)HT_FAIL(HT_ERR_MEMORY, "no memory for a request");
        ht_http_reply_error(h, http, NULL, &e, HT_REJECT_ERROR);
        return;
    }
    j->h = h;
    j->http = http;
    j->fd = ht_http_socket(http);
    j->begin_s = ht_time_s();
    j->status = 200;
    snprintf(j->id, sizeof j->id, "%s-%08" PRIx64 "%08" PRIx64,
             kind == HT_API_CHAT ? "chatcmpl" : "cmpl", h->salt & 0xffffffffu, ++h->n_requests);
    j->next = h->jobs;
    if (j->next) j->next->previous = j;
    h->jobs = j;

    const char *body = n ? (const char *)evbuffer_pullup(in, -1) : "";
    if (!body || ht_api_parse(&r, kind, body, n, &h->context, &e) != HT_OK) {
        ht_http_reply_error(h, http, j->id, &e, why);
        free_job(j);
        return;
    }
    ht_engine_get_stats(h->engine, &stats);
    j->stream = r.stream;
    j->prompts = calloc((size_t)r.n_prompts, sizeof *j->prompts);
    enum ht_status st =
        j->prompts ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for %d prompts", r.n_prompts);
    if (st == HT_OK)
        st = ht_api_answer_create(&j->answer, &r, &h->context, j->id, (int64_t)time(NULL));
    if (st == HT_OK && stats.waiting + r.n_prompts > h->o.max_queue) {
        e = (struct ht_api_error){ .http = 429, .type = "rate_limit_error", .code = "queue_full" };
        why = HT_REJECT_QUEUE;
        st = HT_FAIL(HT_ERR_MEMORY, "%lld requests are waiting; try again later",
                     (long long)stats.waiting);
    }
    if (st == HT_OK) st = submit(j, &r, &e, &why);
    ht_api_request_free(&r);
    if (st != HT_OK) {
        j->status = e.http;
        j->http = NULL;
        ht_http_reply_error(h, http, j->id, &e, why);
        if (j->n_open == 0) free_job(j); // else with the last event of what was cancelled
        return;
    }
    start_answer(j);
}

// ---- the end ----

/* The engine may still hold requests whose events point to jobs: they are cancelled and waited for.
 */
void ht_http_let_go(struct ht_http *h)
{
    const double until = ht_time_s() + 10;
    for (struct ht_job *j = h->jobs; j; j = j->next) {
        detach(j);
        j->http = NULL;
        cancel(j);
    }
    while (h->jobs && ht_time_s() < until) {
        struct ht_job *dirty = NULL, *next;
        struct ht_engine_event *list = ht_engine_wait_events(h->engine, 0.1);
        for (const struct ht_engine_event *ev = list; ev; ev = ev->next) take_event(h, ev, &dirty);
        ht_engine_event_free(list);
        for (struct ht_job *j = dirty; j; j = next) {
            next = j->next_dirty;
            j->dirty = false;
            if (j->n_open == 0) free_job(j);
        }
    }
    while (h->jobs) free_job(h->jobs); // an engine that hangs: it is freed without being read again
}
