/* inference/http_impl.h: what http_*.c share. */
#ifndef HT_INFERENCE_HTTP_IMPL_H
#define HT_INFERENCE_HTTP_IMPL_H

#include <event2/event.h>
#include <event2/http.h>

#include "inference/http_server.h"

enum { HT_HTTP_BUCKETS = 16 };
struct ht_histogram {
    int64_t buckets[HT_HTTP_BUCKETS]; // not cumulative; the last: above all bounds
    int64_t count;
    double sum;
};
void ht_histogram_add(struct ht_histogram *h, double seconds);

enum ht_rejection { // label of rejected_total
    HT_REJECT_BAD_REQUEST,
    HT_REJECT_KEY,
    HT_REJECT_NOT_FOUND,
    HT_REJECT_TOO_LARGE,
    HT_REJECT_QUEUE,
    HT_REJECT_UNAVAILABLE,
    HT_REJECT_CONNECTIONS,
    HT_REJECT_SLOW_REQUEST,
    HT_REJECT_SLOW_READER,
    HT_REJECT_ERROR,
    HT_REJECT_COUNT
};

struct ht_http_metrics {
    struct ht_histogram first_token, inter_token, end_to_end, queue;
    int64_t finished[5]; // by enum ht_finish
    int64_t rejected[HT_REJECT_COUNT];
    int connections;
};
void ht_http_write_metrics(struct ht_api_text *out, const struct ht_http_metrics *m,
                           const struct ht_engine *e, const char *prefix);

// ---- connections (http_peers.c) ----

struct ht_peers;
struct ht_peers_limits {
    int port, max_connections, max_per_client;
    double request_s, idle_s;
};
struct ht_peers *ht_peers_create(const struct ht_peers_limits *limits); // NULL: no memory
void ht_peers_free(struct ht_peers *p);
/* A complete request came in on this socket; its answer is through. */
void ht_peers_busy(struct ht_peers *p, int fd, double now);
void ht_peers_idle(struct ht_peers *p, int fd, double now);
/* Look at all sockets and shut those that break a limit. Returns how many are open. */
int ht_peers_sweep(struct ht_peers *p, double now, int64_t *n_over, int64_t *n_slow);

extern const char ht_chat_page[]; // chat_page.html, made a C string by the build
extern const size_t ht_chat_page_bytes;

#endif
