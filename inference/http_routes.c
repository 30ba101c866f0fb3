/* inference/http_routes.c: which endpoint a request is for, and the short ones. */
#include <event2/buffer.h>
#include <event2/keyvalq_struct.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "core/base/file.h"
#include "inference/http_impl.h"

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
        ht_http_reply_json(h, r, 200, NULL, &t);
    } else {
        free(t.p);
        ht_http_reply_error(h, r, NULL, &e, HT_REJECT_BAD_REQUEST);
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
            ht_http_refuse(h, r, 503, "service_unavailable", NULL,
                           h->draining ? "shutting down" : "loading the model",
                           HT_REJECT_UNAVAILABLE);
            return;
        }
        ht_api_add(&t, "{\"status\":\"ok\"}");
        break;
    case E_VERSION: ht_api_add(&t, "{\"version\":\"%s\"}", HT_VERSION); break;
    case E_PAGE:
        ht_http_reply(h, r, 200, "text/html; charset=utf-8", NULL, ht_chat_page,
                      ht_chat_page_bytes);
        return;
    case E_METRICS:
        ht_http_write_metrics(&t, &h->metrics, h->engine, h->o.metrics_prefix);
        ht_http_reply(h, r, 200, "text/plain; version=0.0.4; charset=utf-8", NULL, t.p, t.n);
        free(t.p);
        return;
    case E_MODELS: ht_api_models(&t, &h->context, h->started); break;
    default: ht_api_tokenizer_info(&t, &h->context); break;
    }
    ht_http_reply_json(h, r, 200, NULL, &t);
}

void ht_http_handle(struct evhttp_request *r, void *arg)
{
    struct ht_http *h = arg;
    const struct evhttp_uri *uri = evhttp_request_get_evhttp_uri(r);
    const char *path = uri ? evhttp_uri_get_path(uri) : NULL;
    const enum evhttp_cmd_type method = evhttp_request_get_command(r);
    size_t i = 0;

    ht_peers_busy(h->peers, ht_http_socket(r), ht_time_s());
    if (!path || !*path) path = "/";
    while (i < sizeof routes / sizeof *routes && strcmp(routes[i].path, path) != 0) i++;
    if (i == sizeof routes / sizeof *routes || (routes[i].endpoint == E_PAGE && !h->o.chat_page)) {
        ht_http_refuse(h, r, 404, "invalid_request_error", "not_found",
                       "no such path; see docs/serving.md", HT_REJECT_NOT_FOUND);
        return;
    }
    if (method == EVHTTP_REQ_OPTIONS) { // a browser asks before it posts
        ht_http_reply(h, r, 204, "text/plain", NULL, NULL, 0);
        return;
    }
    if (!routes[i].open && !has_key(h, r)) {
        ht_http_refuse(h, r, 401, "authentication_error", "invalid_api_key",
                       "a valid key is needed: Authorization: Bearer KEY", HT_REJECT_KEY);
        return;
    }
    if ((method == EVHTTP_REQ_POST) != routes[i].post) {
        ht_http_refuse(h, r, 405, "invalid_request_error", NULL,
                       routes[i].post ? "this path takes POST" : "this path takes GET",
                       HT_REJECT_BAD_REQUEST);
        return;
    }
    const bool needs_model = routes[i].endpoint >= E_MODELS;
    if (needs_model && (!h->engine || h->draining)) {
        ht_http_refuse(h, r, 503, "service_unavailable", NULL,
                       h->draining ? "shutting down" : "loading the model", HT_REJECT_UNAVAILABLE);
        return;
    }
    switch (routes[i].endpoint) {
    case E_COMPLETIONS: ht_http_generate(h, r, HT_API_COMPLETION); break;
    case E_CHAT: ht_http_generate(h, r, HT_API_CHAT); break;
    case E_TOKENIZE: handle_text(h, r, ht_api_tokenize); break;
    case E_DETOKENIZE: handle_text(h, r, ht_api_detokenize); break;
    default: handle_get(h, r, routes[i].endpoint);
    }
}
