/* inference/http_server.h: the engine behind HTTP, on libevent's evhttp [11].
 *
 * One thread runs everything here: sockets, JSON, templates, events of the engine; the engine's own
 * thread computes. A request is parsed by inference/api.h, submitted, and its events are written as
 * they come. Endpoints, limits and metrics: docs/serving.md.
 *
 * What evhttp leaves open is closed here: an absolute time from connecting to a complete request
 * (found by asking the kernel which of our sockets are open, so no connection escapes it), a bound
 * on what waits for a client that does not read, bounds on connections in all and per address,
 * cancelling when a client goes away.
 */
#ifndef HT_INFERENCE_HTTP_SERVER_H
#define HT_INFERENCE_HTTP_SERVER_H

#include "core/base/log.h"
#include "inference/api.h"

struct ht_http;

struct ht_http_options {
    const char *host;
    int port; // 0: any free one
    const char *const *api_keys;
    int n_api_keys;             // 0: no key is asked for
    const char *cors_origin;    // "*", an origin, or NULL
    const char *metrics_prefix; // "hybridtrain_", or "vllm:" for that server's names
    int64_t max_body_bytes, max_header_bytes;
    int64_t max_output_bytes; // that wait for one client
    int max_connections, max_per_client;
    int64_t max_queue; // requests that wait in the engine
    double request_s;  // from connecting to a complete request
    double idle_s;     // between requests, and without progress in sending
    double answer_s;   // of one answer, from its arrival
    double drain_s;    // after the first SIGTERM
    bool chat_page;    // GET / is a small chat
    bool signals;      // SIGTERM and SIGINT drain; a second one stops
    const struct ht_log *log;
};

/* The defaults of hybridserve. */
struct ht_http_options ht_http_default_options(void);

/* Binds and listens; /health says 503 until there is a model. */
enum ht_status ht_http_create(struct ht_http **out, const struct ht_http_options *o);
void ht_http_free(struct ht_http *h); // before the engine
int ht_http_port(const struct ht_http *h);

/* Any thread, once: requests are served from now on. Both are lent. */
void ht_http_set_model(struct ht_http *h, struct ht_engine *e, const struct ht_api_context *c);

void ht_http_stop(struct ht_http *h);  // any thread: run returns without waiting for answers
void ht_http_drain(struct ht_http *h); // any thread: as the first SIGTERM

/* Until drained or stopped. HT_ERR_STOPPED when answers were cut off at the end. */
enum ht_status ht_http_run(struct ht_http *h);

#endif
