/* bench/hybridbench/load.c: the arrivals, the clients and what they saw. One thread, libevent. */
#include "bench/hybridbench/load.h"

#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/keyvalq_struct.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/rng.h"

enum { MAX_LINE = 1 << 20, MAX_PATH = 512 };

struct load {
    const struct ht_load_options *o;
    struct ht_load_result *result;
    struct event_base *base;
    struct event *timer;  // of the next arrival
    struct event *reaper; // frees clients that are over, once libevent has let go of them
    struct client *clients;
    struct evhttp_uri *uri;
    const char *host;
    uint16_t port;
    char path[MAX_PATH], model[256];
    double start_s, next_due_s;
    int64_t n_started, n_finished;
    int n_running;
    enum ht_status status; // the first failure of our own
};

struct client { // one request under way
    struct load *load;
    struct client *next;
    bool over;
    struct evhttp_connection *connection;
    struct evbuffer *lines; // of the event stream, not yet whole
    double due_s, first_s, last_s;
    int64_t n_pieces, usage_prompt, usage_output;
    int status_code;
    bool done_mark;
    char failure[200];
};

static const char *const words[] = {
    "the",   "of",    "and",  "to",   "in",    "is",    "you",   "that", "it",    "he",   "was",
    "for",   "on",    "are",  "as",   "with",  "his",   "they",  "at",   "be",    "this", "have",
    "from",  "or",    "one",  "had",  "by",    "word",  "but",   "not",  "what",  "all",  "were",
    "we",    "when",  "your", "can",  "said",  "there", "use",   "each", "which", "she",  "do",
    "how",   "their", "if",   "will", "up",    "other", "about", "out",  "many",  "then", "them",
    "these", "so",    "some", "her",  "would", "make",  "like",  "him",  "into",
};
enum { N_WORDS = sizeof words / sizeof *words };

static void start_due(struct load *l);

static void append_words(struct evbuffer *b, uint64_t seed, uint64_t stream, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        evbuffer_add_printf(b, "%s%s", i ? " " : "",
                            words[ht_rng_u64(seed, stream, (uint64_t)i) % N_WORDS]);
}

/* The body of request i; NULL without memory. */
static char *request_body(const struct load *l, int64_t i)
{
    const struct ht_load_options *o = l->o;
    const int64_t n_words =
        ht_lengths_draw(&o->prompt_words, o->seed, ht_rng_stream("prompt length"), (uint64_t)i);
    const int64_t n_out =
        ht_lengths_draw(&o->output_tokens, o->seed, ht_rng_stream("output length"), (uint64_t)i);
    struct evbuffer *text = evbuffer_new();
    json_t *body = NULL, *prompt;
    char *out = NULL;

    if (!text) return NULL;
    append_words(text, o->seed, ht_rng_stream("shared words"), o->shared_words);
    if (o->shared_words) evbuffer_add(text, " ", 1);
    append_words(text, o->seed, ht_rng_stream("words") + (uint64_t)i, n_words);
    prompt = json_stringn((const char *)evbuffer_pullup(text, -1), evbuffer_get_length(text));
    evbuffer_free(text);
    if (o->chat)
        body = json_pack("{s:[{s:s, s:o}]}", "messages", "role", "user", "content", prompt);
    else
        body = json_pack("{s:o}", "prompt", prompt);
    if (!body) return NULL;
    // ignore_eos is an extension of ours and vLLM's; others do not mind
    if (json_object_update_new(body,
                               json_pack("{s:s, s:I, s:f, s:I, s:b, s:b, s:{s:b}}", "model",
                                         l->model, "max_tokens", (json_int_t)n_out, "temperature",
                                         0.0, "seed", (json_int_t)i, "stream", 1, "ignore_eos", 1,
                                         "stream_options", "include_usage", 1)) == 0)
        out = json_dumps(body, JSON_COMPACT);
    json_decref(body);
    return out;
}

static void note(struct load *l, enum ht_status st)
{
    if (st != HT_OK && l->status == HT_OK) l->status = st;
}

/* The request is over, well or not. */
static void finish(struct client *c)
{
    struct load *l = c->load;
    struct ht_load_result *r = l->result;
    const double now_s = ht_time_s();

    if (c->status_code == 429 || c->status_code == 503) {
        r->n_refused++;
    } else if (c->status_code != 200 || !c->done_mark || c->failure[0] || c->n_pieces == 0) {
        r->n_failed++;
        if (!r->first_failure[0])
            snprintf(r->first_failure, sizeof r->first_failure, "status %d: %s", c->status_code,
                     c->failure[0]         ? c->failure
                     : c->status_code == 0 ? "no answer"
                     : !c->done_mark       ? "the stream ended without data: [DONE]"
                                           : "no text came");
    } else {
        const int64_t n = c->usage_output > 0 ? c->usage_output : c->n_pieces;
        r->n_ok++;
        r->prompt_tokens += c->usage_prompt;
        r->output_tokens += n;
        note(l, ht_samples_add(&r->first_token_s, c->first_s - c->due_s));
        note(l, ht_samples_add(&r->total_s, now_s - c->due_s));
        if (n > 1)
            note(l, ht_samples_add(&r->per_token_s, (c->last_s - c->first_s) / (double)(n - 1)));
    }
    l->n_running--;
    l->n_finished++;
    if (l->o->progress) l->o->progress(l->o->user, l->n_finished, l->o->n_requests);
    if (l->n_finished == l->o->n_requests || l->status != HT_OK)
        event_base_loopbreak(l->base);
    else
        start_due(l);
}

static void client_free(struct client *c)
{
    if (c->connection) evhttp_connection_free(c->connection);
    if (c->lines) evbuffer_free(c->lines);
    free(c);
}

static void reap(struct load *l, bool all)
{
    for (struct client **at = &l->clients; *at;) {
        struct client *c = *at;
        if (all || c->over) {
            *at = c->next;
            client_free(c);
        } else {
            at = &c->next;
        }
    }
}

static void on_reaper(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    reap(user, false);
}

/* One "data: ..." line. */
static void take_line(struct client *c, const char *line, size_t n)
{
    static const char data[] = "data: ";
    const double now_s = ht_time_s();

    if (n < sizeof data - 1 || memcmp(line, data, sizeof data - 1) != 0) return; // comment, blank
    line += sizeof data - 1;
    n -= sizeof data - 1;
    if (n == 6 && memcmp(line, "[DONE]", 6) == 0) {
        c->done_mark = true;
        return;
    }
    json_t *event = json_loadb(line, n, 0, NULL);
    const json_t *choice = json_array_get(json_object_get(event, "choices"), 0);
    const json_t *usage = json_object_get(event, "usage"), *error = json_object_get(event, "error");
    const char *text = json_string_value(
        c->load->o->chat ? json_object_get(json_object_get(choice, "delta"), "content")
                         : json_object_get(choice, "text"));
    if (text && text[0]) {
        if (c->n_pieces++ == 0)
            c->first_s = now_s;
        else
            note(c->load, ht_samples_add(&c->load->result->between_tokens_s, now_s - c->last_s));
        c->last_s = now_s;
    }
    if (json_is_object(usage)) {
        c->usage_prompt = json_integer_value(json_object_get(usage, "prompt_tokens"));
        c->usage_output = json_integer_value(json_object_get(usage, "completion_tokens"));
    }
    if (error) {
        const char *message = json_string_value(json_object_get(error, "message"));
        snprintf(c->failure, sizeof c->failure, "%s", message ? message : "an error event");
    } else if (!event) {
        snprintf(c->failure, sizeof c->failure, "an event that is not JSON");
    }
    json_decref(event);
}

static void on_chunk(struct evhttp_request *request, void *user)
{
    struct client *c = user;
    size_t n;
    char *line;

    evbuffer_add_buffer(c->lines, evhttp_request_get_input_buffer(request));
    if (evhttp_request_get_response_code(request) != 200)
        return; // one JSON object, read at the end
    while ((line = evbuffer_readln(c->lines, &n, EVBUFFER_EOL_CRLF))) {
        take_line(c, line, n);
        free(line);
    }
    if (evbuffer_get_length(c->lines) > MAX_LINE) {
        snprintf(c->failure, sizeof c->failure, "a line of more than %d bytes", MAX_LINE);
        evbuffer_drain(c->lines, evbuffer_get_length(c->lines));
    }
}

/* The message of an error body, or the body's beginning. */
static void read_error(struct client *c)
{
    const size_t n = evbuffer_get_length(c->lines);
    const char *text = (const char *)evbuffer_pullup(c->lines, -1);
    json_t *body = text ? json_loadb(text, n, 0, NULL) : NULL;
    const char *message =
        json_string_value(json_object_get(json_object_get(body, "error"), "message"));

    if (message)
        snprintf(c->failure, sizeof c->failure, "%s", message);
    else if (text)
        snprintf(c->failure, sizeof c->failure, "%.*s", (int)(n < 150 ? n : 150), text);
    json_decref(body);
}

static void on_done(struct evhttp_request *request, void *user)
{
    struct client *c = user;

    if (request) { // NULL: no connection, or a time-out
        c->status_code = evhttp_request_get_response_code(request);
        evbuffer_add_buffer(c->lines, evhttp_request_get_input_buffer(request));
        if (c->status_code != 200) read_error(c);
    }
    c->over = true;
    event_active(c->load->reaper, EV_TIMEOUT, 0);
    finish(c);
}

static enum ht_status start_client(struct load *l, int64_t i, double due_s)
{
    const struct timeval timeout = { (time_t)l->o->timeout_s, 0 };
    struct client *c = calloc(1, sizeof *c);
    char *body = request_body(l, i);
    struct evhttp_request *request = NULL;

    if (c) {
        c->load = l;
        c->due_s = due_s;
        c->lines = evbuffer_new();
        c->connection = evhttp_connection_base_new(l->base, NULL, l->host, l->port);
        request = evhttp_request_new(on_done, c);
    }
    if (!c || !body || !c->lines || !c->connection || !request) {
        free(body);
        if (request) evhttp_request_free(request);
        if (c) client_free(c);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for request %lld", (long long)i);
    }
    c->next = l->clients;
    l->clients = c;
    evhttp_connection_set_timeout_tv(c->connection, &timeout);
    evhttp_request_set_chunked_cb(request, on_chunk);
    struct evkeyvalq *headers = evhttp_request_get_output_headers(request);
    evhttp_add_header(headers, "Host", l->host);
    evhttp_add_header(headers, "Content-Type", "application/json");
    evhttp_add_header(headers, "Connection", "close");
    if (l->o->api_key) {
        char bearer[600];
        snprintf(bearer, sizeof bearer, "Bearer %s", l->o->api_key);
        evhttp_add_header(headers, "Authorization", bearer);
    }
    evbuffer_add(evhttp_request_get_output_buffer(request), body, strlen(body));
    free(body);
    l->n_running++;
    // from here on the connection owns the request; on_done comes at once when it cannot be sent
    if (evhttp_make_request(c->connection, request, EVHTTP_REQ_POST, l->path) != 0)
        return HT_FAIL(HT_ERR_IO, "%s: request %lld could not be sent", l->o->url, (long long)i);
    return HT_OK;
}

/* Start what is due while a client is free, and set the timer for what is not due yet. */
static void start_due(struct load *l)
{
    const struct ht_load_options *o = l->o;

    while (l->status == HT_OK && l->n_started < o->n_requests && l->n_running < o->concurrency) {
        const double wait_s = l->next_due_s - ht_time_s();
        if (wait_s > 0.0) {
            const struct timeval tv = { (time_t)wait_s, (suseconds_t)(fmod(wait_s, 1.0) * 1e6) };
            evtimer_add(l->timer, &tv);
            return;
        }
        note(l, start_client(l, l->n_started, l->next_due_s));
        const uint64_t i = (uint64_t)l->n_started++;
        if (isfinite(o->rate))
            l->next_due_s -=
                log1p(-(double)ht_rng_uniform(o->seed, ht_rng_stream("arrivals"), i)) / o->rate;
    }
    if (l->status != HT_OK) event_base_loopbreak(l->base);
}

static void on_timer(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    start_due(user);
}

struct answer { // to the one question before the load
    struct load *load;
    int code;
};

static void on_models(struct evhttp_request *request, void *user)
{
    struct answer *a = user;

    if (request && (a->code = evhttp_request_get_response_code(request)) == 200) {
        struct evbuffer *in = evhttp_request_get_input_buffer(request);
        const char *text = (const char *)evbuffer_pullup(in, -1);
        json_t *body = text ? json_loadb(text, evbuffer_get_length(in), 0, NULL) : NULL;
        const char *id = json_string_value(
            json_object_get(json_array_get(json_object_get(body, "data"), 0), "id"));
        if (id) snprintf(a->load->model, sizeof a->load->model, "%s", id);
        json_decref(body);
    }
    event_base_loopbreak(a->load->base);
}

/* The name of the first model that the server has. */
static enum ht_status ask_model(struct load *l, const char *prefix)
{
    struct answer a = { l, 0 };
    char path[MAX_PATH + 16];
    const struct timeval timeout = { 30, 0 };
    struct evhttp_connection *connection =
        evhttp_connection_base_new(l->base, NULL, l->host, l->port);
    struct evhttp_request *request = evhttp_request_new(on_models, &a);

    if (!connection || !request) {
        if (request) evhttp_request_free(request);
        if (connection) evhttp_connection_free(connection);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a connection");
    }
    evhttp_connection_set_timeout_tv(connection, &timeout);
    snprintf(path, sizeof path, "%s/v1/models", prefix);
    struct evkeyvalq *headers = evhttp_request_get_output_headers(request);
    evhttp_add_header(headers, "Host", l->host);
    if (l->o->api_key) {
        char bearer[600];
        snprintf(bearer, sizeof bearer, "Bearer %s", l->o->api_key);
        evhttp_add_header(headers, "Authorization", bearer);
    }
    if (evhttp_make_request(connection, request, EVHTTP_REQ_GET, path) == 0)
        event_base_dispatch(l->base);
    evhttp_connection_free(connection);
    if (a.code != 200)
        return HT_FAIL(HT_ERR_IO, "%s%s: %s (status %d)", l->o->url, "/v1/models",
                       a.code ? "refused" : "no answer", a.code);
    if (!l->model[0])
        return HT_FAIL(HT_ERR_FORMAT, "%s/v1/models names no model; give --model", l->o->url);
    return HT_OK;
}

static enum ht_status check(const struct ht_load_options *o)
{
    if (o->n_requests < 1 || o->n_requests > 10000000)
        return HT_FAIL(HT_ERR_ARG, "%lld requests; 1 to 10,000,000", (long long)o->n_requests);
    if (o->concurrency < 1 || o->concurrency > 4096)
        return HT_FAIL(HT_ERR_ARG, "%d requests at once; 1 to 4,096", o->concurrency);
    if (!(o->rate > 0.0)) return HT_FAIL(HT_ERR_ARG, "%g arrivals per second; above 0", o->rate);
    if (!(o->timeout_s >= 1.0 && o->timeout_s <= 1e6))
        return HT_FAIL(HT_ERR_ARG, "a time-out of %g s; 1 to 1,000,000", o->timeout_s);
    if (o->shared_words < 0 || o->shared_words > 1000000)
        return HT_FAIL(HT_ERR_ARG, "%lld shared words; 0 to 1,000,000", (long long)o->shared_words);
    if (o->api_key && strlen(o->api_key) > 500)
        return HT_FAIL(HT_ERR_ARG, "an API key of more than 500 bytes");
    return HT_OK;
}

static enum ht_status prepare(struct load *l)
{
    const struct ht_load_options *o = l->o;
    const char *scheme, *prefix;
    int port, n;

    HT_TRY(check(o));
    l->uri = evhttp_uri_parse(o->url);
    scheme = l->uri ? evhttp_uri_get_scheme(l->uri) : NULL;
    l->host = l->uri ? evhttp_uri_get_host(l->uri) : NULL;
    if (!scheme || strcmp(scheme, "http") != 0 || !l->host || !l->host[0])
        return HT_FAIL(HT_ERR_ARG, "\"%s\" is not http://HOST:PORT", o->url);
    port = evhttp_uri_get_port(l->uri);
    l->port = port < 0 ? 80 : (uint16_t)port;
    prefix = evhttp_uri_get_path(l->uri) ? evhttp_uri_get_path(l->uri) : "";
    n = (int)strlen(prefix);
    while (n > 0 && prefix[n - 1] == '/') n--;
    if (n + 40 > MAX_PATH) return HT_FAIL(HT_ERR_ARG, "\"%s\" has too long a path", o->url);
    snprintf(l->path, sizeof l->path, "%.*s/v1/%s", n, prefix,
             o->chat ? "chat/completions" : "completions");
    l->base = event_base_new();
    l->timer = l->base ? evtimer_new(l->base, on_timer, l) : NULL;
    l->reaper = l->base ? event_new(l->base, -1, 0, on_reaper, l) : NULL;
    if (!l->timer || !l->reaper) return HT_FAIL(HT_ERR_MEMORY, "no memory for an event loop");
    if (o->model) {
        if (strlen(o->model) >= sizeof l->model)
            return HT_FAIL(HT_ERR_ARG, "a model's name of more than 255 bytes");
        snprintf(l->model, sizeof l->model, "%s", o->model);
        return HT_OK;
    }
    char plain[MAX_PATH];
    snprintf(plain, sizeof plain, "%.*s", n, prefix);
    return ask_model(l, plain);
}

enum ht_status ht_load_run(struct ht_load_result *out, const struct ht_load_options *o)
{
    struct load l = { .o = o, .result = out };
    enum ht_status st = HT_OK;

    *out = (struct ht_load_result){ 0 };
    HT_TRY_GOTO(st, done, prepare(&l));
    l.start_s = l.next_due_s = ht_time_s();
    start_due(&l);
    if (l.status == HT_OK) event_base_dispatch(l.base);
    out->wall_s = ht_time_s() - l.start_s;
    st = l.status;
done:
    reap(&l, true);
    if (l.reaper) event_free(l.reaper);
    if (l.timer) event_free(l.timer);
    if (l.base) event_base_free(l.base);
    if (l.uri) evhttp_uri_free(l.uri);
    return st;
}

void ht_load_result_free(struct ht_load_result *r)
{
    ht_samples_free(&r->first_token_s);
    ht_samples_free(&r->per_token_s);
    ht_samples_free(&r->between_tokens_s);
    ht_samples_free(&r->total_s);
}
