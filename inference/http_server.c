/* inference/http_server.c: the event loop: sockets, signals, the engine's wake-ups. */
#include "inference/http_server.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <netdb.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"
#include "inference/grammar.h"
#include "inference/http_impl.h"

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

static void on_engine(evutil_socket_t fd, short what, void *arg)
{
    (void)fd;
    (void)what;
    ht_http_take_events(arg);
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
    struct ht_job *next;
    int n_busy;
    (void)fd;
    (void)what;

    h->metrics.connections =
        ht_peers_sweep(h->peers, now, &n_busy, &h->metrics.rejected[HT_REJECT_CONNECTIONS],
                       &h->metrics.rejected[HT_REJECT_SLOW_REQUEST]);
    for (struct ht_job *j = h->jobs; j; j = next) {
        next = j->next;
        if (j->stream && j->http && now - j->sent_s > 30) { // proxies close what is silent
            ht_api_add(&j->pending, ": ping\n\n");
            ht_job_send(j);
        }
    }
    if (!h->draining) return;
    // an answer that is made may still wait for its client to read it
    const bool open = h->jobs || n_busy > 0;
    if (open && now < h->drain_until_s) return;
    h->cut = open;
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
    evhttp_set_gencb(h->http, ht_http_handle, h);
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

void ht_http_free(struct ht_http *h)
{
    if (!h) return;
    if (h->jobs) ht_http_let_go(h);
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
