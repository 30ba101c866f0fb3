/* inference/http_server.c: requests in, engine events out. */
#include "inference/http_server.h"

#include <errno.h>
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/keyvalq_struct.h>
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"
#include "inference/grammar.h"
#include "inference/http_impl.h"

struct job_prompt { // what engine events point to
    struct job *job;
    int index;
    uint64_t id;
    int n_open;                           // choices that have not ended
    double last_s[HT_ENGINE_MAX_CHOICES]; // when the choice's last token came
};

struct job { // one completion request, from submission until the engine has let go of it
    struct job *next, *previous, *next_dirty;
    struct ht_http *h;
    struct evhttp_request *http; // NULL: the client is gone
    int fd;
    char id[40];
    struct ht_api_answer *answer;
    struct job_prompt *prompts;
    int n_prompts, n_open; // choices that have not ended
    bool stream, dirty;
    struct ht_api_text pending; // to be sent
    double begin_s, first_s, sent_s;
    int status; // for the log
};

struct ht_http {
    struct ht_http_options o;
    int port;
    struct event_base *base;
    struct evhttp *http;
    struct evhttp_bound_socket *listening;
    struct event *wake, *tick, *engine_events, *term, *interrupt;
    int wake_fd;
    struct ht_peers *peers;
    // written by other threads, read after a wake-up
    struct ht_engine *volatile coming_engine;
    struct ht_api_context *volatile coming_context;
    volatile bool want_stop, want_drain;

    struct ht_engine *engine;       // NULL while loading
    struct ht_grammar_vocab *vocab; // of answers that must be JSON; NULL until the first
    struct ht_api_context context;
    struct job *jobs;
    struct ht_http_metrics metrics;
    int64_t started; // since 1970
    uint64_t n_requests, salt;
    bool draining, cut;
    double drain_until_s;
};

struct ht_http_options ht_http_default_options(void)
{
    return (struct ht_http_options){ .host = "127.0.0.1",
                                     .port = 8080,
                                     .metrics_prefix = "hybridtrain_",
                                     .max_body_bytes = 8 << 20,
                                     .max_header_bytes = 16 << 10,
                                     .max_output_bytes = 1 << 20,
                                     .max_connections = 1024,
                                     .max_per_client = 1024,
                                     .max_queue = 1024,
                                     .request_s = 30,
                                     .idle_s = 60,
                                     .answer_s = 600,
                                     .drain_s = 30,
                                     .chat_page = true };
}

// ---- replies ----

static const char *phrase(int status)
{
    switch (status) {
    case 200: return "OK";
    case 204: return "No Content";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 413: return "Content Too Large";
    case 422: return "Unprocessable Content";
    case 429: return "Too Many Requests";
    case 503: return "Service Unavailable";
    default: return "Internal Server Error";
    }
}

static void answered(struct evhttp_request *r, void *arg);

static void common_headers(struct ht_http *h, struct evhttp_request *r, const char *id)
{
    struct evkeyvalq *headers = evhttp_request_get_output_headers(r);
    if (id) evhttp_add_header(headers, "X-Request-Id", id);
    evhttp_add_header(headers, "Cache-Control", "no-store");
    evhttp_add_header(headers, "X-Content-Type-Options", "nosniff");
    if (h->o.cors_origin) {
        evhttp_add_header(headers, "Access-Control-Allow-Origin", h->o.cors_origin);
        evhttp_add_header(headers, "Access-Control-Allow-Headers", "Authorization, Content-Type");
        evhttp_add_header(headers, "Access-Control-Allow-Methods", "GET, POST, OPTIONS");
    }
    if (h->draining) evhttp_add_header(headers, "Connection", "close");
}

static void reply(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                  const char *id, const char *body, size_t n)
{
    struct evbuffer *b = evbuffer_new();
    common_headers(h, r, id);
    evhttp_add_header(evhttp_request_get_output_headers(r), "Content-Type", type);
    if (status == 429 || status == 503)
        evhttp_add_header(evhttp_request_get_output_headers(r), "Retry-After", "1");
    if (status == 401)
        evhttp_add_header(evhttp_request_get_output_headers(r), "WWW-Authenticate", "Bearer");
    if (b && n) evbuffer_add(b, body, n);
    evhttp_request_set_on_complete_cb(r, answered, h);
    evhttp_send_reply(r, status, phrase(status), b);
    if (b) evbuffer_free(b);
}

static void reply_json(struct ht_http *h, struct evhttp_request *r, int status, const char *id,
                       struct ht_api_text *t)
{
    if (t->failed) {
        reply(h, r, 500, "application/json", id,
              "{\"error\":{\"message\":\"out of memory\",\"type\":\"server_error\"}}", 62);
    } else {
        reply(h, r, status, "application/json", id, t->p, t->n);
    }
    free(t->p);
    *t = (struct ht_api_text){ 0 };
}

static void reply_error(struct ht_http *h, struct evhttp_request *r, const char *id,
                        const struct ht_api_error *e, enum ht_rejection why)
{
    struct ht_api_text t = { 0 };
    h->metrics.rejected[why]++;
    HT_INFO(h->o.log, "%s %d %s", id ? id : "-", e->http, ht_error_message());
    ht_api_add_error(&t, e);
    reply_json(h, r, e->http, id, &t);
}

static void refuse(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                   const char *code, const char *message, enum ht_rejection why)
{
    const struct ht_api_error e = { .http = status, .type = type, .code = code };
    (void)HT_FAIL(HT_ERR_ARG, "%s", message);
    reply_error(h, r, NULL, &e, why);
}

static int socket_of(struct evhttp_request *r)
{
    struct evhttp_connection *c = evhttp_request_get_connection(r);
    return c ? (int)bufferevent_getfd(evhttp_connection_get_bufferevent(c)) : -1;
}

static void set_waiting(const struct ht_http *h, struct evhttp_request *r, bool waiting)
{
    struct evhttp_connection *c = evhttp_request_get_connection(r);
    struct timeval idle = { (time_t)h->o.idle_s, 0 };
    if (!c) return;
    struct bufferevent *bev = evhttp_connection_get_bufferevent(c);
    // while an answer is made the client may be silent; what it sends meanwhile stays in the kernel
    bufferevent_set_timeouts(bev, waiting ? NULL : &idle, &idle);
    bufferevent_setwatermark(bev, EV_READ, 0, waiting ? 65536 : 0);
}

/* The last byte of an answer is in the kernel. */
static void answered(struct evhttp_request *r, void *arg)
{
    struct ht_http *h = arg;
    ht_peers_idle(h->peers, socket_of(r), ht_time_s());
    set_waiting(h, r, false);
}

// ---- jobs ----

static void free_job(struct job *j)
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

static void cancel(struct job *j)
{
    for (int i = 0; i < j->n_prompts; i++)
        if (j->prompts[i].n_open > 0) ht_engine_cancel(j->h->engine, j->prompts[i].id);
}

static void log_end(const struct job *j)
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
    struct job *j = arg;
    (void)c;
    // evhttp frees a request that is still on its list; one that it took off is ours
    if (j->http && !evhttp_request_get_connection(j->http)) evhttp_request_free(j->http);
    j->http = NULL;
    if (j->status == 200) j->status = 499;
    cancel(j);
}

static void detach(struct job *j)
{
    struct evhttp_connection *c = j->http ? evhttp_request_get_connection(j->http) : NULL;
    if (c) evhttp_connection_set_closecb(c, NULL, NULL);
}

/* Close the connection in the middle of an answer. */
static void cut_off(struct job *j)
{
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    detach(j);
    j->http = NULL;
    cancel(j);
    if (c) evhttp_connection_free(c); // frees the request, too
}

static size_t unsent(struct job *j)
{
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    return c ? evbuffer_get_length(bufferevent_get_output(evhttp_connection_get_bufferevent(c)))
             : 0;
}

static void send_pending(struct job *j)
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
static void finish_job(struct job *j)
{
    struct ht_http *h = j->h;
    struct ht_api_text body = { 0 };

    if (j->http && j->stream) {
        ht_api_answer_finish(j->answer, &j->pending);
        send_pending(j);
        if (j->http) {
            detach(j);
            evhttp_send_reply_end(j->http);
        }
    } else if (j->http) {
        detach(j);
        if (ht_api_answer_finish(j->answer, &body) == HT_OK) {
            reply_json(h, j->http, 200, j->id, &body);
        } else {
            const struct ht_api_error e = { .http = 500, .type = "server_error" };
            j->status = 500;
            free(body.p);
            reply_error(h, j->http, j->id, &e, HT_REJECT_ERROR);
        }
    }
    if (j->status == 200) ht_histogram_add(&h->metrics.end_to_end, ht_time_s() - j->begin_s);
    log_end(j);
    free_job(j);
}

static void take_event(struct ht_http *h, const struct ht_engine_event *ev, struct job **dirty)
{
    struct job_prompt *p = ev->user;
    struct job *j = p->job;
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

static void take_events(struct ht_http *h)
{
    struct job *dirty = NULL, *next;
    struct ht_engine_event *list = ht_engine_take_events(h->engine);

    for (const struct ht_engine_event *ev = list; ev; ev = ev->next) take_event(h, ev, &dirty);
    ht_engine_event_free(list);
    for (struct job *j = dirty; j; j = next) {
        next = j->next_dirty;
        j->dirty = false;
        if (j->n_open > 0)
            send_pending(j);
        else
            finish_job(j);
    }
}

static void on_engine(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    take_events(arg);
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
static enum ht_status submit(struct job *j, struct ht_api_request *r, struct ht_api_error *e,
                             enum ht_rejection *why)
{
    struct ht_http *h = j->h;
    struct ht_request q = r->request;

    q.deadline_s = h->o.answer_s > 0 ? j->begin_s + h->o.answer_s : 0;
    if (q.n > r->n && q.logprobs < 0) q.logprobs = 0; // the best are chosen by them
    for (int i = 0; i < r->n_prompts; i++) {
        struct job_prompt *p = &j->prompts[i];
        enum ht_status st;
        *p = (struct job_prompt){ .job = j, .index = i };
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

static void start_answer(struct job *j)
{
    struct ht_http *h = j->h;
    struct evhttp_connection *c = evhttp_request_get_connection(j->http);
    struct bufferevent *bev = evhttp_connection_get_bufferevent(c);
    bufferevent_data_cb on_read, on_write;
    bufferevent_event_cb on_event;
    void *arg;

    evhttp_connection_set_closecb(c, client_gone, j);
    set_waiting(h, j->http, true);
    evhttp_request_set_on_complete_cb(j->http, answered, h);
    if (!j->stream) { // evhttp stops reading while an answer is made; only reading tells that a
                      // client has gone
        bufferevent_getcb(bev, &on_read, &on_write, &on_event, &arg);
        bufferevent_setcb(bev, NULL, on_write, on_event, arg);
        bufferevent_enable(bev, EV_READ);
        return;
    }
    common_headers(h, j->http, j->id);
    evhttp_add_header(evhttp_request_get_output_headers(j->http), "Content-Type",
                      "text/event-stream");
    evhttp_add_header(evhttp_request_get_output_headers(j->http), "X-Accel-Buffering",
                      "no"); // of reverse proxies
    evhttp_send_reply_start(j->http, 200, "OK");
    ht_api_answer_start(j->answer, &j->pending);
    send_pending(j);
}

static void handle_generate(struct ht_http *h, struct evhttp_request *http, enum ht_api_kind kind)
{
    struct evbuffer *in = evhttp_request_get_input_buffer(http);
    const size_t n = evbuffer_get_length(in);
    enum ht_rejection why = HT_REJECT_BAD_REQUEST;
    struct ht_engine_stats stats;
    struct ht_api_request r;
    struct ht_api_error e = { .http = 500, .type = "server_error" };
    struct job *j = calloc(1, sizeof *j);

    if (!j) {
        (void)HT_FAIL(HT_ERR_MEMORY, "no memory for a request");
        reply_error(h, http, NULL, &e, HT_REJECT_ERROR);
        return;
    }
    j->h = h;
    j->http = http;
    j->fd = socket_of(http);
    j->begin_s = ht_time_s();
    j->status = 200;
    snprintf(j->id, sizeof j->id, "%s-%08" PRIx64 "%08" PRIx64,
             kind == HT_API_CHAT ? "chatcmpl" : "cmpl", h->salt & 0xffffffffu, ++h->n_requests);
    j->next = h->jobs;
    if (j->next) j->next->previous = j;
    h->jobs = j;

    const char *body = n ? (const char *)evbuffer_pullup(in, -1) : "";
    if (!body || ht_api_parse(&r, kind, body, n, &h->context, &e) != HT_OK) {
        reply_error(h, http, j->id, &e, why);
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
        reply_error(h, http, j->id, &e, why);
        if (j->n_open == 0) free_job(j); // else with the last event of what was cancelled
        return;
    }
    start_answer(j);
}

// ---- other endpoints ----

/* Equal? Without telling by time how much of it was right. */
static bool same_key(const char *key, const char *given)
{
    const size_t n = strlen(key), m = strlen(given);
    unsigned difference = n != m;
    for (size_t i = 0; i < n; i++)
        difference |= (unsigned char)key[i] ^ (unsigned char)(m ? given[i % m] : 0);
    return difference == 0;
}

static bool has_key(const struct ht_http *h, struct evhttp_request *r)
{
    const char *given = evhttp_find_header(evhttp_request_get_input_headers(r), "Authorization");
    bool found = false;
    if (h->o.n_api_keys == 0) return true;
    if (!given || strncasecmp(given, "Bearer ", 7) != 0) return false;
    for (int i = 0; i < h->o.n_api_keys; i++) found |= same_key(h->o.api_keys[i], given + 7);
    return found;
}

typedef enum ht_status text_endpoint(struct ht_api_text *, const char *, size_t,
                                     const struct ht_api_context *, struct ht_api_error *);

static void handle_text(struct ht_http *h, struct evhttp_request *r, text_endpoint *endpoint)
{
    struct evbuffer *in = evhttp_request_get_input_buffer(r);
    const size_t n = evbuffer_get_length(in);
    const char *body = n ? (const char *)evbuffer_pullup(in, -1) : "";
    struct ht_api_error e = { .http = 500, .type = "server_error" };
    struct ht_api_text t = { 0 };
    if (body && endpoint(&t, body, n, &h->context, &e) == HT_OK) {
        reply_json(h, r, 200, NULL, &t);
    } else {
        free(t.p);
        reply_error(h, r, NULL, &e, HT_REJECT_BAD_REQUEST);
    }
}

enum endpoint {
    E_HEALTH,
    E_VERSION,
    E_PAGE,
    E_METRICS,
    E_MODELS,
    E_TOKENIZER_INFO,
    E_COMPLETIONS,
    E_CHAT,
    E_TOKENIZE,
    E_DETOKENIZE
};
static const struct {
    const char *path;
    enum endpoint endpoint;
    bool post, open; // open: no key is asked for
} routes[] = {
    { "/health", E_HEALTH, false, true },
    { "/version", E_VERSION, false, true },
    { "/", E_PAGE, false, true },
    { "/metrics", E_METRICS, false, false },
    { "/v1/models", E_MODELS, false, false },
    { "/tokenizer_info", E_TOKENIZER_INFO, false, false },
    { "/v1/completions", E_COMPLETIONS, true, false },
    { "/v1/chat/completions", E_CHAT, true, false },
    { "/tokenize", E_TOKENIZE, true, false },
    { "/detokenize", E_DETOKENIZE, true, false },
};

static void handle_get(struct ht_http *h, struct evhttp_request *r, enum endpoint endpoint)
{
    struct ht_api_text t = { 0 };
    switch (endpoint) {
    case E_HEALTH:
        if (!h->engine || h->draining) {
            refuse(h, r, 503, "service_unavailable", NULL,
                   h->draining ? "shutting down" : "loading the model", HT_REJECT_UNAVAILABLE);
            return;
        }
        ht_api_add(&t, "{\"status\":\"ok\"}");
        break;
    case E_VERSION: ht_api_add(&t, "{\"version\":\"%s\"}", HT_VERSION); break;
    case E_PAGE:
        reply(h, r, 200, "text/html; charset=utf-8", NULL, ht_chat_page, ht_chat_page_bytes);
        return;
    case E_METRICS:
        ht_http_write_metrics(&t, &h->metrics, h->engine, h->o.metrics_prefix);
        reply(h, r, 200, "text/plain; version=0.0.4; charset=utf-8", NULL, t.p, t.n);
        free(t.p);
        return;
    case E_MODELS: ht_api_models(&t, &h->context, h->started); break;
    default: ht_api_tokenizer_info(&t, &h->context); break;
    }
    reply_json(h, r, 200, NULL, &t);
}

static void handle(struct evhttp_request *r, void *arg)
{
    struct ht_http *h = arg;
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(r);
    const char *path = uri ? evhttp_uri_get_path(uri) : NULL;
    const enum evhttp_cmd_type method = evhttp_request_get_command(r);
    size_t i = 0;

    ht_peers_busy(h->peers, socket_of(r), ht_time_s());
    if (!path || !*path) path = "/";
    while (i < sizeof routes / sizeof *routes && strcmp(routes[i].path, path) != 0) i++;
    if (i == sizeof routes / sizeof *routes || (routes[i].endpoint == E_PAGE && !h->o.chat_page)) {
        refuse(h, r, 404, "invalid_request_error", "not_found", "no such path; see docs/serving.md",
               HT_REJECT_NOT_FOUND);
        return;
    }
    if (method == EVHTTP_REQ_OPTIONS) { // a browser asks before it posts
        reply(h, r, 204, "text/plain", NULL, NULL, 0);
        return;
    }
    if (!routes[i].open && !has_key(h, r)) {
        refuse(h, r, 401, "authentication_error", "invalid_api_key",
               "a valid key is needed: Authorization: Bearer KEY", HT_REJECT_KEY);
        return;
    }
    if ((method == EVHTTP_REQ_POST) != routes[i].post) {
        refuse(h, r, 405, "invalid_request_error", NULL,
               routes[i].post ? "this path takes POST" : "this path takes GET",
               HT_REJECT_BAD_REQUEST);
        return;
    }
    const bool needs_model = routes[i].endpoint >= E_MODELS;
    if (needs_model && (!h->engine || h->draining)) {
        refuse(h, r, 503, "service_unavailable", NULL,
               h->draining ? "shutting down" : "loading the model", HT_REJECT_UNAVAILABLE);
        return;
    }
    switch (routes[i].endpoint) {
    case E_COMPLETIONS: handle_generate(h, r, HT_API_COMPLETION); break;
    case E_CHAT: handle_generate(h, r, HT_API_CHAT); break;
    case E_TOKENIZE: handle_text(h, r, ht_api_tokenize); break;
    case E_DETOKENIZE: handle_text(h, r, ht_api_detokenize); break;
    default: handle_get(h, r, routes[i].endpoint);
    }
}

// ---- the loop ----

static void start_drain(struct ht_http *h)
{
    if (h->draining) {
        h->cut = h->jobs != NULL;
        event_base_loopbreak(h->base);
        return;
    }
    HT_INFO(h->o.log, "finishing what runs, at most %.0f s; once more to stop at once",
            h->o.drain_s);
    h->draining = true;
    h->drain_until_s = ht_time_s() + h->o.drain_s;
    if (h->listening) evhttp_del_accept_socket(h->http, h->listening);
    h->listening = NULL;
    if (h->engine) ht_engine_drain(h->engine);
}

static void on_signal(evutil_socket_t number, short what, void *arg)
{
    (void)number;
    (void)what;
    start_drain(arg);
}

static void on_wake(evutil_socket_t fd, short what, void *arg)
{
    struct ht_http *h = arg;
    uint64_t count;
    (void)what;
    if (read(fd, &count, sizeof count) != sizeof count) return;
    if (!h->engine && h->coming_engine) {
        h->engine = h->coming_engine;
        h->context = *h->coming_context;
        h->engine_events =
            event_new(h->base, ht_engine_event_fd(h->engine), EV_READ | EV_PERSIST, on_engine, h);
        if (!h->engine_events || event_add(h->engine_events, NULL) != 0) h->want_stop = true;
        HT_INFO(h->o.log, "serving %s on http://%s:%d", h->context.model, h->o.host, h->port);
    }
    if (h->want_drain) {
        h->want_drain = false;
        start_drain(h);
    }
    if (h->want_stop) {
        h->cut = h->jobs != NULL;
        event_base_loopbreak(h->base);
    }
}

static void on_tick(evutil_socket_t fd, short what, void *arg)
{
    struct ht_http *h = arg;
    const double now = ht_time_s();
    struct job *next;
    (void)fd;
    (void)what;

    h->metrics.connections =
        ht_peers_sweep(h->peers, now, &h->metrics.rejected[HT_REJECT_CONNECTIONS],
                       &h->metrics.rejected[HT_REJECT_SLOW_REQUEST]);
    for (struct job *j = h->jobs; j; j = next) {
        next = j->next;
        if (j->stream && j->http && now - j->sent_s > 30) { // proxies close what is silent
            ht_api_add(&j->pending, ": ping\n\n");
            send_pending(j);
        }
    }
    if (!h->draining) return;
    if (h->jobs && now < h->drain_until_s) return;
    h->cut = h->jobs != NULL;
    event_base_loopbreak(h->base);
}

static enum ht_status add_events(struct ht_http *h)
{
    const struct timeval tick = { 0, 100000 };
    h->wake = event_new(h->base, h->wake_fd, EV_READ | EV_PERSIST, on_wake, h);
    h->tick = event_new(h->base, -1, EV_PERSIST, on_tick, h);
    if (!h->wake || !h->tick || event_add(h->wake, NULL) != 0 || event_add(h->tick, &tick) != 0)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the server's events");
    if (!h->o.signals) return HT_OK;
    h->term = evsignal_new(h->base, SIGTERM, on_signal, h);
    h->interrupt = evsignal_new(h->base, SIGINT, on_signal, h);
    if (!h->term || !h->interrupt || event_add(h->term, NULL) != 0 ||
        event_add(h->interrupt, NULL) != 0)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the server's signals");
    return HT_OK;
}

static enum ht_status start_listening(struct ht_http *h)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    char host[64], port[16];

    h->http = evhttp_new(h->base);
    if (!h->http) return HT_FAIL(HT_ERR_MEMORY, "no memory for the server");
    evhttp_set_allowed_methods(h->http, EVHTTP_REQ_GET | EVHTTP_REQ_HEAD | EVHTTP_REQ_POST |
                                            EVHTTP_REQ_OPTIONS);
    evhttp_set_max_body_size(h->http, h->o.max_body_bytes);
    evhttp_set_max_headers_size(h->http, h->o.max_header_bytes);
    evhttp_set_timeout(h->http, (int)(h->o.idle_s < 1 ? 1 : h->o.idle_s));
    evhttp_set_gencb(h->http, handle, h);
    errno = 0;
    h->listening = evhttp_bind_socket_with_handle(h->http, h->o.host, (uint16_t)h->o.port);
    if (!h->listening)
        return HT_FAIL(HT_ERR_IO, "cannot listen on %s:%d: %s", h->o.host, h->o.port,
                       errno ? strerror(errno) : "no such address");
    if (getsockname(evhttp_bound_socket_get_fd(h->listening), (struct sockaddr *)&a, &n) != 0 ||
        getnameinfo((struct sockaddr *)&a, n, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0)
        return HT_FAIL(HT_ERR_IO, "%s:%d: %s", h->o.host, h->o.port, strerror(errno));
    h->port = atoi(port);
    return HT_OK;
}

enum ht_status ht_http_create(struct ht_http **out, const struct ht_http_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_http *h = calloc(1, sizeof *h);

    *out = NULL;
    if (!h) return HT_FAIL(HT_ERR_MEMORY, "no memory for the server");
    h->o = *o;
    h->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->base = event_base_new();
    h->started = (int64_t)time(NULL);
    h->salt = (uint64_t)h->started * 2654435761u ^ (uint64_t)getpid();
    if (!h->base || h->wake_fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "no event loop: %s", strerror(errno));
        goto done;
    }
    HT_TRY_GOTO(st, done, start_listening(h));
    HT_TRY_GOTO(st, done, add_events(h));
    const struct ht_peers_limits limits = { h->port, o->max_connections, o->max_per_client,
                                            o->request_s, o->idle_s };
    h->peers = ht_peers_create(&limits);
    if (!h->peers) st = HT_FAIL(HT_ERR_MEMORY, "no memory for %d connections", o->max_connections);
done:
    if (st == HT_OK)
        *out = h;
    else
        ht_http_free(h);
    return st;
}

/* The engine may still hold requests whose events point to jobs: they are cancelled and waited for.
 */
static void let_go(struct ht_http *h)
{
    const double until = ht_time_s() + 10;
    for (struct job *j = h->jobs; j; j = j->next) {
        detach(j);
        j->http = NULL;
        cancel(j);
    }
    while (h->jobs && ht_time_s() < until) {
        struct job *dirty = NULL, *next;
        struct ht_engine_event *list = ht_engine_wait_events(h->engine, 0.1);
        for (const struct ht_engine_event *ev = list; ev; ev = ev->next) take_event(h, ev, &dirty);
        ht_engine_event_free(list);
        for (struct job *j = dirty; j; j = next) {
            next = j->next_dirty;
            j->dirty = false;
            if (j->n_open == 0) free_job(j);
        }
    }
    while (h->jobs) free_job(h->jobs); // an engine that hangs: it is freed without being read again
}

void ht_http_free(struct ht_http *h)
{
    if (!h) return;
    if (h->jobs) let_go(h);
    struct event *const events[] = { h->wake, h->tick, h->engine_events, h->term, h->interrupt };
    for (size_t i = 0; i < sizeof events / sizeof *events; i++)
        if (events[i]) event_free(events[i]);
    if (h->http) evhttp_free(h->http);
    ht_grammar_vocab_free(h->vocab);
    if (h->base) event_base_free(h->base);
    if (h->wake_fd >= 0) close(h->wake_fd);
    ht_peers_free(h->peers);
    free(h->coming_context);
    free(h);
}

int ht_http_port(const struct ht_http *h)
{
    return h->port;
}

static void wake(struct ht_http *h)
{
    const uint64_t one = 1;
    __sync_synchronize();
    while (write(h->wake_fd, &one, sizeof one) < 0 && errno == EINTR) {
    }
}

void ht_http_set_model(struct ht_http *h, struct ht_engine *e, const struct ht_api_context *c)
{
    struct ht_api_context *copy = malloc(sizeof *copy);
    if (copy)
        *copy = *c;
    else
        h->want_stop = true;
    h->coming_context = copy;
    __sync_synchronize();
    if (copy) h->coming_engine = e;
    wake(h);
}

void ht_http_stop(struct ht_http *h)
{
    h->want_stop = true;
    wake(h);
}

void ht_http_drain(struct ht_http *h)
{
    h->want_drain = true;
    wake(h);
}

enum ht_status ht_http_run(struct ht_http *h)
{
    if (event_base_dispatch(h->base) < 0)
        return HT_FAIL(HT_ERR_IO, "the event loop failed: %s", strerror(errno));
    return h->cut ? HT_FAIL(HT_ERR_STOPPED, "some answers were cut off at the end") : HT_OK;
}
