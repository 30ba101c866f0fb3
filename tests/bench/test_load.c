/* tests/bench/test_load.c: the load generator against a server whose answers are known. */
#include <arpa/inet.h>
#include <check.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <event2/http.h>
#include <event2/keyvalq_struct.h>
#include <jansson.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/hybridbench/load.h"

enum { PIECES = 4, PIECE_MS = 5 };
enum how { WELL, REFUSED, TORN, ERROR_EVENT };

struct server {
    struct event_base *base;
    struct evhttp *http;
    pthread_t thread;
    int port, n_seen, n_chat, n_with_key;
    enum how third; // of every third request; the others are answered well
    char url[64];
    int stop[2]; // the loop's own thread must break it: a byte in this pipe wakes it
    struct event *stop_event;
};

struct stream {
    struct server *server;
    struct evhttp_request *request;
    struct event *timer;
    enum how how;
    int sent;
    bool chat;
};

static void send_text(struct evhttp_request *r, const char *text)
{
    struct evbuffer *b = evbuffer_new();

    evbuffer_add(b, text, strlen(text));
    evhttp_send_reply_chunk(r, b);
    evbuffer_free(b);
}

static void on_tick(evutil_socket_t fd, short what, void *user)
{
    const struct timeval next = { 0, PIECE_MS * 1000 };
    struct stream *s = user;

    (void)fd;
    (void)what;
    if (s->sent < PIECES && !(s->how == TORN && s->sent == 2)) {
        send_text(s->request, s->chat
                                  ? "data: {\"choices\":[{\"delta\":{\"content\":\"ab\"}}]}\r\n\r\n"
                                  : ": ping\n\ndata: {\"choices\":[{\"text\":\"ab\"}]}\n\n");
        s->sent++;
        evtimer_add(s->timer, &next);
        return;
    }
    if (s->how == ERROR_EVENT)
        send_text(s->request, "data: {\"error\":{\"message\":\"the disk is gone\"}}\n\n");
    if (s->how != TORN)
        send_text(s->request, "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,"
                              "\"completion_tokens\":9}}\n\ndata: [DONE]\n\n");
    evhttp_send_reply_end(s->request);
    event_free(s->timer);
    free(s);
}

static void on_completions(struct evhttp_request *request, void *user)
{
    const struct timeval first = { 0, PIECE_MS * 1000 };
    struct server *v = user;
    struct evbuffer *in = evhttp_request_get_input_buffer(request);
    json_t *body = json_loadb((char *)evbuffer_pullup(in, -1), evbuffer_get_length(in), 0, NULL);
    const char *key =
        evhttp_find_header(evhttp_request_get_input_headers(request), "Authorization");
    const bool well = json_is_object(body) &&
                      strcmp(json_string_value(json_object_get(body, "model")), "tiny") == 0 &&
                      json_is_true(json_object_get(body, "stream")) &&
                      json_integer_value(json_object_get(body, "max_tokens")) == 9;
    const bool chat = json_object_get(body, "messages") != NULL;

    json_decref(body);
    v->n_chat += chat;
    v->n_with_key += key && strcmp(key, "Bearer s3cret") == 0;
    const enum how how = v->n_seen++ % 3 == 2 ? v->third : WELL;
    if (!well || how == REFUSED) {
        struct evbuffer *b = evbuffer_new();
        evbuffer_add_printf(b, "{\"error\":{\"message\":\"%s\"}}", well ? "full" : "bad body");
        evhttp_send_reply(request, well ? 429 : 400, NULL, b);
        evbuffer_free(b);
        return;
    }
    struct stream *s = calloc(1, sizeof *s);
    *s = (struct stream){ v, request, evtimer_new(v->base, on_tick, s), how, 0, chat };
    evhttp_send_reply_start(request, 200, "OK");
    evtimer_add(s->timer, &first);
}

static void on_models(struct evhttp_request *request, void *user)
{
    struct evbuffer *b = evbuffer_new();

    (void)user;
    evbuffer_add_printf(b, "{\"data\":[{\"id\":\"tiny\"}]}");
    evhttp_send_reply(request, 200, NULL, b);
    evbuffer_free(b);
}

static void *serve(void *user)
{
    struct server *v = user;

    event_base_loop(v->base, EVLOOP_NO_EXIT_ON_EMPTY);
    return NULL;
}

static void on_stop(evutil_socket_t fd, short what, void *user)
{
    (void)fd;
    (void)what;
    event_base_loopbreak(((struct server *)user)->base);
}

static void server_start(struct server *v, enum how third)
{
    struct sockaddr_in address;
    socklen_t n = sizeof address;

    *v = (struct server){ .third = third, .base = event_base_new() };
    ck_assert_int_eq(pipe(v->stop), 0);
    v->stop_event = event_new(v->base, v->stop[0], EV_READ, on_stop, v);
    event_add(v->stop_event, NULL);
    v->http = evhttp_new(v->base);
    evhttp_set_cb(v->http, "/v1/completions", on_completions, v);
    evhttp_set_cb(v->http, "/v1/chat/completions", on_completions, v);
    evhttp_set_cb(v->http, "/v1/models", on_models, v);
    struct evhttp_bound_socket *socket = evhttp_bind_socket_with_handle(v->http, "127.0.0.1", 0);
    ck_assert_ptr_nonnull(socket);
    getsockname(evhttp_bound_socket_get_fd(socket), (struct sockaddr *)&address, &n);
    v->port = ntohs(address.sin_port);
    snprintf(v->url, sizeof v->url, "http://127.0.0.1:%d/", v->port);
    ck_assert_int_eq(pthread_create(&v->thread, NULL, serve, v), 0);
}

static void server_stop(struct server *v)
{
    ck_assert_int_eq((int)write(v->stop[1], "x", 1), 1);
    pthread_join(v->thread, NULL);
    event_free(v->stop_event);
    close(v->stop[0]);
    close(v->stop[1]);
    evhttp_free(v->http);
    event_base_free(v->base);
}

static struct ht_load_options options_for(const struct server *v)
{
    return (struct ht_load_options){ .url = v->url,
                                     .n_requests = 30,
                                     .rate = INFINITY,
                                     .concurrency = 8,
                                     .prompt_words = { HT_LENGTH_FIXED, 5, 5, 0, 0 },
                                     .output_tokens = { HT_LENGTH_FIXED, 9, 9, 0, 0 },
                                     .timeout_s = 20.0 };
}

START_TEST(every_answer_is_counted_with_its_times)
{
    struct ht_load_result r;
    struct server v;

    server_start(&v, WELL);
    struct ht_load_options o = options_for(&v);
    o.api_key = "s3cret";
    o.chat = _i == 1;
    o.rate = 400.0;
    ck_assert_int_eq(ht_load_run(&r, &o), HT_OK);
    ck_assert_int_eq(r.n_ok, 30);
    ck_assert_int_eq(r.n_failed + r.n_refused, 0);
    ck_assert_int_eq(r.prompt_tokens, 30 * 7);
    ck_assert_int_eq(r.output_tokens, 30 * 9);
    ck_assert_int_eq(v.n_with_key, 30);
    ck_assert_int_eq(v.n_chat, _i == 1 ? 30 : 0);
    ck_assert_uint_eq(r.between_tokens_s.n, 30 * (PIECES - 1));
    // the server waits 5 ms before each piece: nothing can come sooner
    ck_assert_double_ge(ht_samples_quantile(&r.first_token_s, 0.0), PIECE_MS * 0.9e-3);
    ck_assert_double_ge(ht_samples_quantile(&r.total_s, 0.0), PIECES * PIECE_MS * 0.9e-3);
    ck_assert_double_ge(ht_samples_mean(&r.per_token_s), (PIECES - 1) * PIECE_MS * 0.9e-3 / 8);
    ht_load_result_free(&r);
    server_stop(&v);
}
END_TEST

START_TEST(what_goes_wrong_is_told_apart)
{
    static const enum how how[] = { REFUSED, TORN, ERROR_EVENT };
    static const char *const said[] = { "", "[DONE]", "the disk is gone" };
    struct ht_load_result r;
    struct server v;

    server_start(&v, how[_i]);
    const struct ht_load_options o = options_for(&v);
    ck_assert_int_eq(ht_load_run(&r, &o), HT_OK);
    ck_assert_int_eq(r.n_ok, 20);
    ck_assert_int_eq(r.n_refused, how[_i] == REFUSED ? 10 : 0);
    ck_assert_int_eq(r.n_failed, how[_i] == REFUSED ? 0 : 10);
    ck_assert_ptr_nonnull(strstr(r.first_failure, said[_i]));
    ht_load_result_free(&r);
    server_stop(&v);
}
END_TEST

START_TEST(no_server_and_bad_options_are_errors)
{
    struct ht_load_result r;
    struct server v = { .url = "http://127.0.0.1:9" }; // discard: nobody listens
    struct ht_load_options o = options_for(&v);

    ck_assert_int_eq(ht_load_run(&r, &o), HT_ERR_IO);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "http://127.0.0.1:9"));
    o.url = "https://example.com";
    ck_assert_int_eq(ht_load_run(&r, &o), HT_ERR_ARG);
    o = options_for(&v);
    o.concurrency = 0;
    ck_assert_int_eq(ht_load_run(&r, &o), HT_ERR_ARG);
    o = options_for(&v);
    o.rate = 0.0;
    ck_assert_int_eq(ht_load_run(&r, &o), HT_ERR_ARG);
    // a named model needs no question first: the requests themselves find nobody
    o = options_for(&v);
    o.model = "tiny";
    ck_assert_int_eq(ht_load_run(&r, &o), HT_OK);
    ck_assert_int_eq(r.n_failed, 30);
    ht_load_result_free(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("load");
    TCase *t = tcase_create("all");
    tcase_add_loop_test(t, every_answer_is_counted_with_its_times, 0, 2);
    tcase_add_loop_test(t, what_goes_wrong_is_told_apart, 0, 3);
    tcase_add_test(t, no_server_and_bad_options_are_errors);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
