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
/* Look at all sockets and shut those that break a limit. Returns how many are open; n_busy of them
 * have an answer that is not through. */
int ht_peers_sweep(struct ht_peers *p, double now, int *n_busy, int64_t *n_over, int64_t *n_slow);

// ---- the server ----

struct ht_job_prompt { // what engine events point to
    struct ht_job *job;
    int index;
    uint64_t id;
    int n_open;                           // choices that have not ended
    double last_s[HT_ENGINE_MAX_CHOICES]; // when the choice's last token came
};

struct ht_job { // one completion request, from submission until the engine has let go of it
    struct ht_job *next, *previous, *next_dirty;
    struct ht_http *h;
    struct evhttp_request *http; // NULL: the client is gone
    int fd;
    char id[40];
    struct ht_api_answer *answer;
    struct ht_job_prompt *prompts;
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
    struct ht_job *jobs;
    struct ht_http_metrics metrics;
    int64_t started; // since 1970
    uint64_t n_requests, salt;
    bool draining, cut;
    double drain_until_s;
};

// ---- answers (http_reply.c) ----

void ht_http_headers(struct ht_http *h, struct evhttp_request *r, const char *id);
void ht_http_reply(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                   const char *id, const char *body, size_t n);
/* t is freed; one that failed becomes an error. */
void ht_http_reply_json(struct ht_http *h, struct evhttp_request *r, int status, const char *id,
                        struct ht_api_text *t);
/* With the calling thread's last error message. */
void ht_http_reply_error(struct ht_http *h, struct evhttp_request *r, const char *id,
                         const struct ht_api_error *e, enum ht_rejection why);
void ht_http_refuse(struct ht_http *h, struct evhttp_request *r, int status, const char *type,
                    const char *code, const char *message, enum ht_rejection why);
int ht_http_socket(struct evhttp_request *r); // -1: the connection is gone
/* While an answer is made the client may be silent. */
void ht_http_set_waiting(const struct ht_http *h, struct evhttp_request *r, bool waiting);
/* The last byte of an answer is in the kernel; arg: the server. */
void ht_http_answered(struct evhttp_request *r, void *arg);

// ---- requests for text (http_job.c) ----

void ht_http_generate(struct ht_http *h, struct evhttp_request *http, enum ht_api_kind kind);
void ht_http_take_events(struct ht_http *h); // of the engine, to their clients
void ht_job_send(struct ht_job *j);          // what is pending of it
void ht_http_let_go(struct ht_http *h);      // of all jobs

// ---- endpoints (http_routes.c) ----

void ht_http_handle(struct evhttp_request *r, void *arg); // arg: the server

extern const char ht_chat_page[]; // chat_page.html, made a C string by the build
extern const size_t ht_chat_page_bytes;

#endif
