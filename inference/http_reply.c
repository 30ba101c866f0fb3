/* inference/http_reply.c: headers, bodies and errors of answers. */
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/keyvalq_struct.h>
#include <stdlib.h>

#include "core/base/file.h"
#include "inference/http_impl.h"

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

void ht_http_headers(struct ht_http *h, struct evhttp_request *r, const char *id)
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

void ht_http_reply(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                   const char *id, const char *body, size_t n)
{
    struct evbuffer *b = evbuffer_new();
    ht_http_headers(h, r, id);
    evhttp_add_header(evhttp_request_get_output_headers(r), "Content-Type", type);
    if (status == 429 || status == 503)
        evhttp_add_header(evhttp_request_get_output_headers(r), "Retry-After", "1");
    if (status == 401)
        evhttp_add_header(evhttp_request_get_output_headers(r), "WWW-Authenticate", "Bearer");
    if (b && n) evbuffer_add(b, body, n);
    evhttp_request_set_on_complete_cb(r, ht_http_answered, h);
    evhttp_send_reply(r, status, phrase(status), b);
    if (b) evbuffer_free(b);
}

void ht_http_reply_json(struct ht_http *h, struct evhttp_request *r, int status, const char *id,
                        struct ht_api_text *t)
{
    if (t->failed) {
        static const char body[] = "{\"error\":{\"message\":\"out of memory\",\"type\":"
                                   "\"server_error\",\"param\":null,\"code\":null}}";
        ht_http_reply(h, r, 500, "application/json", id, body, sizeof body - 1);
    } else {
        ht_http_reply(h, r, status, "application/json", id, t->p, t->n);
    }
    free(t->p);
    *t = (struct ht_api_text){ 0 };
}

void ht_http_reply_error(struct ht_http *h, struct evhttp_request *r, const char *id,
                         const struct ht_api_error *e, enum ht_rejection why)
{
    struct ht_api_text t = { 0 };
    h->metrics.rejected[why]++;
    HT_INFO(h->o.log, "%s %d %s", id ? id : "-", e->http, ht_error_message());
    ht_api_add_error(&t, e);
    ht_http_reply_json(h, r, e->http, id, &t);
}

void ht_http_refuse(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                    const char *code, const char *message, enum ht_rejection why)
{
    const struct ht_api_error e = { .http = status, .type = type, .code = code };
    (void)HT_FAIL(HT_ERR_ARG, "%s", message);
    ht_http_reply_error(h, r, NULL, &e, why);
}

int ht_http_socket(struct evhttp_request *r)
{
    struct evhttp_connection *c = evhttp_request_get_connection(r);
    return c ? (int)bufferevent_getfd(evhttp_connection_get_bufferevent(c)) : -1;
}

void ht_http_set_waiting(const struct ht_http *h, struct evhttp_request *r, bool waiting)
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
void ht_http_answered(struct evhttp_request *r, void *arg)
{
    struct ht_http *h = arg;
    ht_peers_idle(h->peers, ht_http_socket(r), ht_time_s());
    ht_http_set_waiting(h, r, false);
}
