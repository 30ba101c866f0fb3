/* tests/inference/test_http.c: the server over real sockets, with an engine that counts letters
 * (engine_double.c). */
#include <arpa/inet.h>
#include <check.h>
#include <errno.h>
#include <jansson.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "core/base/file.h"
#include "inference/http_server.h"
#include "tests/inference/engine_double.h"
#include "tests/inference/small_tokenizer.h"

static struct ht_tokenizer *tokenizer;
static struct ht_engine *engine;
static struct ht_encoder *encoder;
static struct ht_token_decoder *decoder;
static struct ht_chat_template *chat;
static struct ht_http *server;
static pthread_t thread;
static enum ht_status ended;

static void *run(void *arg)
{
    (void)arg;
    ended = ht_http_run(server);
    return NULL;
}

static void start(const struct ht_http_options *o, const struct engine_double_options *e)
{
    static const char text[] =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}x";
    tokenizer = small_tokenizer();
    engine = engine_double_create(e, tokenizer);
    ck_assert_int_eq(ht_encoder_create(&encoder, tokenizer), HT_OK);
    ck_assert_int_eq(ht_token_decoder_create(&decoder, tokenizer, false), HT_OK);
    ck_assert_int_eq(ht_chat_template_create(&chat, text, strlen(text), "t"), HT_OK);
    ck_assert_msg(ht_http_create(&server, o) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(pthread_create(&thread, NULL, run, NULL), 0);
}

static void give_model(void)
{
    const struct ht_api_context c = { .tokenizer = tokenizer,
                                      .encoder = encoder,
                                      .decoder = decoder,
                                      .chat = chat,
                                      .model = "m",
                                      .bos = "<|im_start|>",
                                      .eos = "<|im_end|>",
                                      .bos_id = 256,
                                      .max_context = 1 << 20,
                                      .vocab_size = SMALL_VOCAB,
                                      .temperature = 1,
                                      .top_p = 1 };
    ht_http_set_model(server, engine, &c);
}

static void stop(void)
{
    ht_http_stop(server);
    pthread_join(thread, NULL);
    ht_http_free(server);
    ht_engine_free(engine);
    ht_chat_template_free(chat);
    ht_encoder_free(encoder);
    ht_token_decoder_free(decoder);
    ht_tokenizer_free(tokenizer);
}

static struct ht_http_options options(void)
{
    struct ht_http_options o = ht_http_default_options();
    o.port = 0;
    return o;
}
static const struct engine_double_options quick = { .step_us = 200,
                                                    .max_seqs = 64,
                                                    .max_queue = 1000 };
static const struct engine_double_options slow = { .step_us = 20000,
                                                   .max_seqs = 2,
                                                   .max_queue = 2 };

// ---- a client ----

static int connect_to(void)
{
    const struct timeval patience = { 20, 0 };
    struct sockaddr_in a = { .sin_family = AF_INET,
                             .sin_port = htons((uint16_t)ht_http_port(server)),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ck_assert_int_ge(fd, 0);
    ck_assert_msg(connect(fd, (struct sockaddr *)&a, sizeof a) == 0, "%s", strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

static bool put(int fd, const char *text, size_t n)
{
    while (n > 0) {
        const ssize_t k = send(fd, text, n, MSG_NOSIGNAL);
        if (k <= 0) return false;
        text += k;
        n -= (size_t)k;
    }
    return true;
}

/* Everything until the server closes. The caller frees. */
static char *get_all(int fd)
{
    size_t n = 0, room = 1 << 16;
    char *text = malloc(room);
    for (ssize_t k; (k = recv(fd, text + n, room - n - 1, 0)) > 0;) {
        n += (size_t)k;
        if (room - n < 4096) text = realloc(text, room *= 2);
    }
    text[n] = '\0';
    return text;
}

static int begin_post(const char *path, const char *body, const char *headers)
{
    char head[1024];
    const int fd = connect_to();
    const int n = snprintf(
        head, sizeof head,
        "POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %zu\r\n%s\r\n", path,
        strlen(body), headers ? headers : "");
    put(fd, head, (size_t)n);
    put(fd, body, strlen(body));
    return fd;
}

/* Status; *body is what follows the headers (chunks joined), to be freed. */
static int answer_of(int fd, char **body)
{
    char *text = get_all(fd);
    close(fd);
    int status = 0;
    sscanf(text, "HTTP/1.1 %d", &status);
    char *start_ = strstr(text, "\r\n\r\n");
    *body = strdup(start_ ? start_ + 4 : "");
    const bool chunked = start_ && strcasestr(text, "transfer-encoding: chunked") &&
                         strcasestr(text, "transfer-encoding: chunked") < start_;
    if (chunked) {
        char *from = *body, *to = *body;
        for (size_t n; (n = strtoul(from, &from, 16)) > 0;) {
            from += 2;
            memmove(to, from, n);
            to += n;
            from += n + 2;
        }
        *to = '\0';
    }
    free(text);
    return status;
}

static int post(const char *path, const char *body, char **out)
{
    return answer_of(begin_post(path, body, NULL), out);
}

static int get(const char *path, char **out)
{
    char head[512];
    const int fd = connect_to();
    put(fd, head,
        (size_t)snprintf(head, sizeof head,
                         "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path));
    return answer_of(fd, out);
}

static json_t *json_of(char *text)
{
    json_error_t e;
    json_t *j = json_loads(text, JSON_REJECT_DUPLICATES, &e);
    ck_assert_msg(j != NULL, "%s in %s", e.text, text);
    free(text);
    return j;
}

static void wait_for_idle(void)
{
    for (int i = 0; i < 1000 && engine_double_unfinished(engine) > 0; i++) usleep(10000);
    ck_assert_int_eq(engine_double_unfinished(engine), 0);
}

static double metric(const char *name)
{
    char *text;
    ck_assert_int_eq(get("/metrics", &text), 200);
    const char *p = strstr(text, name);
    while (p && p != text && p[-1] != '\n') p = strstr(p + 1, name);
    ck_assert_msg(p != NULL, "no %s in %s", name, text);
    const double v = strtod(p + strlen(name), NULL);
    free(text);
    return v;
}

// ---- tests ----

START_TEST(completions_and_chat)
{
    const struct ht_http_options o = options();
    char *text;
    start(&o, &quick);
    ck_assert_int_eq(get("/health", &text), 503);
    free(text);
    give_model();
    for (int i = 0; i < 500 && get("/health", &text) != 200; i++, usleep(1000)) free(text);
    free(text);
    ck_assert_int_eq(
        post("/v1/completions", "{\"model\":\"m\",\"prompt\":\"b\",\"max_tokens\":3}", &text), 200);
    json_t *j = json_of(text), *c = json_array_get(json_object_get(j, "choices"), 0);
    ck_assert_str_eq(json_string_value(json_object_get(c, "text")), "uvw"); // 'b' is 98
    ck_assert_str_eq(json_string_value(json_object_get(c, "finish_reason")), "length");
    ck_assert_int_eq(
        json_integer_value(json_object_get(json_object_get(j, "usage"), "total_tokens")), 4);
    json_decref(j);

    ck_assert_int_eq(
        post("/v1/chat/completions",
             "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":2,\"n\":2}",
             &text),
        200);
    j = json_of(text);
    ck_assert_uint_eq(json_array_size(json_object_get(j, "choices")), 2);
    c = json_object_get(json_array_get(json_object_get(j, "choices"), 1), "message");
    ck_assert_uint_eq(json_string_length(json_object_get(c, "content")), 2);
    json_decref(j);

    ck_assert_int_eq(post("/v1/completions",
                          "{\"prompt\":\"b\",\"max_tokens\":4,\"stream\":true,\"stream_options\":{"
                          "\"include_usage\":true}}",
                          &text),
                     200);
    char joined[64] = "";
    int chunks = 0;
    for (char *p = text; (p = strstr(p, "data: {")); p++, chunks++) {
        json_t *e = json_loads(p + 6, JSON_DISABLE_EOF_CHECK, NULL);
        const char *piece = json_string_value(
            json_object_get(json_array_get(json_object_get(e, "choices"), 0), "text"));
        if (piece)
            strcat(joined, piece);
        else
            ck_assert_int_eq(json_integer_value(
                                 json_object_get(json_object_get(e, "usage"), "completion_tokens")),
                             4);
        json_decref(e);
    }
    ck_assert_str_eq(joined, "uvwx");
    ck_assert_int_ge(chunks, 5);
    ck_assert_ptr_nonnull(strstr(text, "data: [DONE]\n\n"));
    free(text);

    ck_assert_int_eq(post("/v1/chat/completions",
                          "{\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}],\"max_tokens\":2,"
                          "\"stream\":true}",
                          &text),
                     200);
    ck_assert_ptr_nonnull(strstr(text, "\"delta\":{\"role\":\"assistant\""));
    ck_assert_ptr_nonnull(strstr(text, "chat.completion.chunk"));
    free(text);
    ck_assert_int_eq(get("/v1/models", &text), 200);
    ck_assert_ptr_nonnull(strstr(text, "\"id\":\"m\""));
    free(text);
    ck_assert_int_eq(get("/", &text), 200);
    ck_assert_ptr_nonnull(strstr(text, "<!doctype html>"));
    free(text);
    ck_assert_double_ge(metric("hybridtrain_generation_tokens_total "), 3 + 4 + 4 + 2);
    ck_assert_double_ge(metric("hybridtrain_time_to_first_token_seconds_count "), 4);
    ck_assert_double_ge(metric("hybridtrain_requests_total{finish_reason=\"length\"} "), 5);
    stop();
}
END_TEST

START_TEST(scoring_has_what_lm_eval_reads)
{
    const struct ht_http_options o = options();
    char *text;
    start(&o, &quick);
    give_model();
    usleep(50000);
    ck_assert_int_eq(
        post("/v1/completions",
             "{\"prompt\":[[104,105,33],[98]],\"temperature\":0,\"max_tokens\":1,\"logprobs\":1,"
             "\"echo\":true,\"seed\":1234}",
             &text),
        200);
    json_t *j = json_of(text), *choices = json_object_get(j, "choices");
    ck_assert_uint_eq(json_array_size(choices), 2);
    for (size_t k = 0; k < 2; k++) {
        json_t *l = json_object_get(json_array_get(choices, k), "logprobs");
        json_t *tokens = json_object_get(l, "tokens"),
               *values = json_object_get(l, "token_logprobs");
        json_t *tops = json_object_get(l, "top_logprobs"),
               *offsets = json_object_get(l, "text_offset");
        const size_t n = k == 0 ? 4 : 2; // prompt + 1
        ck_assert_int_eq(json_integer_value(json_object_get(json_array_get(choices, k), "index")),
                         (json_int_t)k);
        ck_assert_uint_eq(json_array_size(tokens), n);
        ck_assert_uint_eq(json_array_size(values), n);
        ck_assert_uint_eq(json_array_size(tops), n);
        ck_assert_uint_eq(json_array_size(offsets), n);
        ck_assert(json_is_null(json_array_get(values, 0)) && json_is_null(json_array_get(tops, 0)));
        for (size_t i = 1; i < n; i++) {
            double most = -1e9;
            const char *key;
            json_t *v;
            json_object_foreach(json_array_get(tops, i), key, v) if (json_number_value(v) > most)
                most = json_number_value(v);
            ck_assert(json_number_value(json_array_get(values, i)) == most); // equal floats
            ck_assert_int_eq(json_integer_value(json_array_get(offsets, i)), (json_int_t)i);
        }
    }
    json_decref(j);
    stop();
}
END_TEST

static const struct {
    const char *path, *body;
    int status;
    const char *param;
} wrong[] = {
    { "/v1/completions", "", 400, NULL },
    { "/v1/completions", "{", 400, NULL },
    { "/v1/completions", "[]", 400, NULL },
    { "/v1/completions", "{\"prompt\":\"a\",\"prompt\":\"b\"}", 400, NULL },
    { "/v1/completions", "{}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":3}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":[]}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":[1,\"a\"]}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":[[1],[9999]]}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":[-1]}", 400, "prompt" },
    { "/v1/completions", "{\"prompt\":\"a\",\"n\":1000000000}", 400, "n" },
    { "/v1/completions", "{\"prompt\":\"a\",\"n\":2,\"best_of\":1}", 400, "best_of" },
    { "/v1/completions", "{\"prompt\":\"a\",\"logprobs\":-1}", 400, "logprobs" },
    { "/v1/completions", "{\"prompt\":\"a\",\"logprobs\":21}", 400, "logprobs" },
    { "/v1/completions", "{\"prompt\":\"a\",\"temperature\":NaN}", 400, NULL },
    { "/v1/completions", "{\"prompt\":\"a\",\"temperature\":1e999}", 400, NULL },
    { "/v1/completions", "{\"prompt\":\"a\",\"temperature\":1e308}", 400, "temperature" },
    { "/v1/completions", "{\"prompt\":\"a\",\"temperature\":\"1\"}", 400, "temperature" },
    { "/v1/completions", "{\"prompt\":\"a\",\"temperature\":-1}", 400, "temperature" },
    { "/v1/completions", "{\"prompt\":\"a\",\"top_p\":0}", 400, "top_p" },
    { "/v1/completions", "{\"prompt\":\"a\",\"top_p\":1.5}", 400, "top_p" },
    { "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":-5}", 400, "max_tokens" },
    { "/v1/completions", "{\"prompt\":\"a\",\"max_tokens\":0}", 400, "max_tokens" },
    { "/v1/completions", "{\"prompt\":\"a\",\"stop\":[1]}", 400, "stop" },
    { "/v1/completions", "{\"prompt\":\"a\",\"stop\":\"\"}", 400, "stop" },
    { "/v1/completions", "{\"prompt\":\"a\",\"logit_bias\":{\"x\":1}}", 400, "logit_bias" },
    { "/v1/completions", "{\"prompt\":\"a\",\"logit_bias\":{\"1\":1e9}}", 400, "logit_bias" },
    { "/v1/completions", "{\"prompt\":\"a\",\"stream\":1}", 400, "stream" },
    { "/v1/completions", "{\"prompt\":\"a\",\"stream_options\":{}}", 400, "stream_options" },
    { "/v1/completions", "{\"prompt\":\"a\",\"suffix\":\"x\"}", 400, "suffix" },
    { "/v1/completions", "{\"prompt\":\"a\",\"prompt_logprobs\":5}", 400, "prompt_logprobs" },
    { "/v1/completions", "{\"prompt\":\"a\",\"response_format\":{\"type\":\"xml\"}}", 400,
      "response_format" },
    { "/v1/completions",
      "{\"prompt\":\"a\",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":"
      "{\"pattern\":\"x\"}}}}",
      400, "response_format" },
    { "/v1/completions", "{\"prompt\":\"a\",\"model\":\"other\"}", 404, "model" },
    { "/v1/chat/completions", "{}", 400, "messages" },
    { "/v1/chat/completions", "{\"messages\":[]}", 400, "messages" },
    { "/v1/chat/completions", "{\"messages\":[3]}", 400, "messages[0]" },
    { "/v1/chat/completions", "{\"messages\":[{\"content\":\"x\"}]}", 400, "messages[0].role" },
    { "/v1/chat/completions", "{\"messages\":[{\"role\":\"<|im_end|>\",\"content\":\"x\"}]}", 400,
      "messages" },
    { "/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":3}]}", 400,
      "messages[0].content" },
    { "/v1/chat/completions",
      "{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}", 400,
      "messages[0].content" },
    { "/v1/chat/completions",
      "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"top_logprobs\":3}", 400,
      "top_logprobs" },
    { "/tokenize", "{\"prompt\":1}", 400, "prompt" },
    { "/detokenize", "{\"tokens\":\"x\"}", 400, "tokens" },
    { "/nowhere", "{}", 404, NULL },
    { "/v1/../etc/passwd", "{}", 404, NULL },
    { "/v1/models", "{}", 405, NULL },
};

START_TEST(wrong_requests_are_told_why)
{
    const struct ht_http_options o = options();
    char *text, deep[4096];
    start(&o, &quick);
    give_model();
    usleep(50000);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ck_assert_msg(post(wrong[i].path, wrong[i].body, &text) == wrong[i].status, "%s: %s",
                      wrong[i].body, text);
        json_t *j = json_of(text), *e = json_object_get(j, "error");
        const char *param = json_string_value(json_object_get(e, "param"));
        ck_assert(json_string_length(json_object_get(e, "message")) > 0);
        ck_assert_msg(wrong[i].param ? param && strcmp(param, wrong[i].param) == 0 : !param,
                      "%s: %s", wrong[i].body, param);
        json_decref(j);
    }
    memset(deep, '[', sizeof deep - 1);
    deep[sizeof deep - 1] = '\0';
    ck_assert_int_eq(post("/v1/completions", deep, &text), 400);
    free(text);
    // every sampling field with every kind of value: an answer or a 400, never silence
    static const char *const fields[] = {
        "temperature",        "top_p", "min_p", "top_k",   "presence_penalty", "frequency_penalty",
        "repetition_penalty", "seed",  "n",     "best_of", "max_tokens",       "logprobs",
        "logit_bias",         "stop"
    };
    static const char *const values[] = { "0",
                                          "-0.0",
                                          "1",
                                          "-1",
                                          "1e308",
                                          "1e999",
                                          "-1e308",
                                          "NaN",
                                          "Infinity",
                                          "null",
                                          "\"x\"",
                                          "[]",
                                          "{}",
                                          "true",
                                          "0.5",
                                          "1e12",
                                          "9223372036854775807",
                                          "99999999999999999999",
                                          "[[]]" };
    for (size_t f = 0; f < sizeof fields / sizeof *fields; f++)
        for (size_t v = 0; v < sizeof values / sizeof *values; v++) {
            char body[256];
            snprintf(body, sizeof body, "{\"prompt\":\"y\",\"ignore_eos\":false,\"%s\":%s}",
                     fields[f], values[v]);
            const int status = post("/v1/completions", body, &text);
            ck_assert_msg(status == 200 || status == 400, "%s: %d %s", body, status, text);
            free(text);
        }
    wait_for_idle();
    stop();
}
END_TEST

START_TEST(keys_are_asked_for)
{
    static const char *const keys[] = { "alpha", "beta" };
    struct ht_http_options o = options();
    char *text;
    o.api_keys = keys;
    o.n_api_keys = 2;
    o.cors_origin = "https://example.org";
    start(&o, &quick);
    give_model();
    usleep(50000);
    ck_assert_int_eq(post("/v1/completions", "{\"prompt\":\"b\"}", &text), 401);
    ck_assert_ptr_null(strstr(text, "alpha"));
    free(text);
    static const struct {
        const char *header;
        int status;
    } tries[] = {
        { "Authorization: Bearer alpha\r\n", 200 }, { "Authorization: bearer beta\r\n", 200 },
        { "Authorization: Bearer alph\r\n", 401 },  { "Authorization: Bearer alphaalpha\r\n", 401 },
        { "Authorization: Bearer \r\n", 401 },      { "Authorization: Basic alpha\r\n", 401 },
        { "Authorization: Bearer ALPHA\r\n", 401 }
    };
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        ck_assert_int_eq(
            answer_of(begin_post("/v1/completions", "{\"prompt\":\"b\",\"max_tokens\":1}",
                                 tries[i].header),
                      &text),
            tries[i].status);
        free(text);
    }
    ck_assert_int_eq(get("/metrics", &text), 401);
    free(text);
    ck_assert_int_eq(get("/health", &text), 200);
    free(text);
    const int fd = connect_to();
    static const char ask[] =
        "OPTIONS /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    put(fd, ask, sizeof ask - 1);
    text = get_all(fd);
    close(fd);
    ck_assert_ptr_nonnull(strstr(text, "204"));
    ck_assert_ptr_nonnull(strcasestr(text, "access-control-allow-origin: https://example.org"));
    free(text);
    stop();
}
END_TEST

START_TEST(who_leaves_is_not_worked_for)
{
    const struct ht_http_options o = options();
    start(&o, &(struct engine_double_options){ .step_us = 2000, .max_seqs = 4, .max_queue = 1000 });
    give_model();
    usleep(50000);
    static const char *const bodies[] = {
        "{\"prompt\":\"b\",\"max_tokens\":100000,\"ignore_eos\":true}",
        "{\"prompt\":\"b\",\"max_tokens\":100000,\"ignore_eos\":true,\"stream\":true,\"n\":3}",
        "{\"prompt\":[\"b\",\"c\"],\"max_tokens\":100000,\"ignore_eos\":true,\"stream\":true}"
    };
    for (int reset = 0; reset < 2; reset++) {
        int fds[12];
        for (int i = 0; i < 12; i++) fds[i] = begin_post("/v1/completions", bodies[i % 3], NULL);
        usleep(300000); // some run, some wait
        ck_assert_int_gt(engine_double_unfinished(engine), 11);
        for (int i = 0; i < 12; i++) {
            const struct linger hard = { 1, 0 };
            if (reset) setsockopt(fds[i], SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
            close(fds[i]);
        }
        wait_for_idle();
    }
    ck_assert_double_ge(metric("hybridtrain_requests_total{finish_reason=\"cancelled\"} "), 24);
    char *text; // and the server goes on
    ck_assert_int_eq(post("/v1/completions", "{\"prompt\":\"b\",\"max_tokens\":1}", &text), 200);
    free(text);
    stop();
}
END_TEST

/* The server knows it, or only the engine does: its statistics are a little older. */
START_TEST(a_full_queue_says_so)
{
    struct ht_http_options o = options();
    struct engine_double_options made = slow;
    char *text;
    o.max_queue = _i ? 100 : 2;
    made.stale_stats = _i;
    start(&o, &made);
    give_model();
    usleep(100000);
    int fds[4];
    for (int i = 0; i < 4; i++) {
        fds[i] = begin_post("/v1/completions",
                            "{\"prompt\":\"b\",\"max_tokens\":60,\"ignore_eos\":true}", NULL);
        usleep(60000);
    }
    const int fd = begin_post("/v1/completions", "{\"prompt\":\"b\"}", NULL);
    text = get_all(fd);
    close(fd);
    ck_assert_msg(strstr(text, " 429 ") != NULL, "%s", text);
    ck_assert_ptr_nonnull(strcasestr(text, "retry-after:"));
    free(text);
    for (int i = 0; i < 4; i++) { // those that were taken are answered
        ck_assert_int_eq(answer_of(fds[i], &text), 200);
        free(text);
    }
    stop();
}
END_TEST

START_TEST(slow_clients_are_cut)
{
    struct ht_http_options o = options();
    o.request_s = 1;
    o.max_output_bytes = 65536;
    start(&o, &(struct engine_double_options){ .step_us = 100, .max_seqs = 64, .max_queue = 100 });
    give_model();
    usleep(50000);
    // a byte now and then never makes a request
    const double begin = ht_time_s();
    const int dribble = connect_to(), silent = connect_to();
    static const char text[] = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
                               "50\r\n\r\n{\"prompt\":\"................................";
    size_t sent = 0;
    for (; sent < sizeof text - 1 && put(dribble, text + sent, 1); sent++) {
        struct pollfd p = { .fd = dribble, .events = POLLIN };
        if (poll(&p, 1, 100) > 0) break; // the server has closed
    }
    ck_assert_uint_lt(sent, sizeof text - 1);
    ck_assert_double_lt(ht_time_s() - begin, 10);
    char byte;
    ck_assert_int_le(recv(silent, &byte, 1, 0), 0);
    close(dribble);
    close(silent);
    ck_assert_double_ge(metric("hybridtrain_rejected_total{reason=\"slow_request\"} "), 2);
    // a stream that nobody reads is cut when its buffer is full; its neighbour is not
    const int small = 4096;
    const int fd = connect_to();
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    static const char body[] =
        "{\"prompt\":\"b\",\"max_tokens\":1000000,\"ignore_eos\":true,\"stream\":true,\"n\":8}";
    char head[256];
    put(fd, head,
        (size_t)snprintf(head, sizeof head,
                         "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %zu\r\n\r\n",
                         sizeof body - 1));
    put(fd, body, sizeof body - 1);
    for (int i = 0; i < 3000 && metric("hybridtrain_rejected_total{reason=\"slow_reader\"} ") < 1;
         i++)
        usleep(10000);
    ck_assert_double_ge(metric("hybridtrain_rejected_total{reason=\"slow_reader\"} "), 1);
    wait_for_idle();
    close(fd);
    stop();
}
END_TEST

START_TEST(oversize_is_refused)
{
    struct ht_http_options o = options();
    char head[256], *big = malloc(200000), *text;
    o.max_body_bytes = 10000;
    o.max_connections = 8;
    start(&o, &quick);
    give_model();
    usleep(50000);
    int fd = connect_to(); // 413 before the body is read
    put(fd, head,
        (size_t)snprintf(
            head, sizeof head,
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"));
    text = get_all(fd);
    close(fd);
    ck_assert_msg(strstr(text, " 413 ") != NULL, "%s", text);
    free(text);
    fd = connect_to(); // headers
    put(fd, head, (size_t)snprintf(head, sizeof head, "GET / HTTP/1.1\r\nX-Long: "));
    memset(big, 'x', 200000);
    put(fd, big, 200000);
    text = get_all(fd);
    close(fd);
    ck_assert_msg(strstr(text, " 400 ") || strstr(text, " 413 ") || !*text, "%s",
                  text); // or reset before it is read
    free(text);
    static const char *const rubbish[] = {
        "\x16\x03\x01\x02",
        "GET\r\n\r\n",
        "\r\n\r\n\r\n",
        "POST / HTTP/9.9\r\n\r\n",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: "
        "3\r\n\r\nzz\r\n",
        "POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        "POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n"
    };
    for (size_t i = 0; i < sizeof rubbish / sizeof *rubbish; i++) {
        fd = connect_to();
        put(fd, rubbish[i], strlen(rubbish[i]));
        shutdown(fd, SHUT_WR);
        free(get_all(fd));
        close(fd);
    }
    usleep(300000);
    int fds[40]; // more connections than allowed: the surplus is closed
    for (int i = 0; i < 40; i++) fds[i] = connect_to();
    usleep(500000);
    int closed = 0;
    for (int i = 0; i < 40; i++) {
        char byte;
        closed += recv(fds[i], &byte, 1, MSG_DONTWAIT) == 0;
        close(fds[i]);
    }
    ck_assert_int_ge(closed, 30);
    usleep(400000);
    ck_assert_int_eq(get("/health", &text), 200);
    free(text);
    free(big);
    stop();
}
END_TEST

static void until_one_runs(void)
{
    for (int k = 0; k < 1000 && metric("hybridtrain_requests_running ") < 1; k++) usleep(10000);
    ck_assert_double_eq(metric("hybridtrain_requests_running "), 1);
}

START_TEST(draining_finishes_what_runs)
{
    struct ht_http_options o = options();
    char *text;
    o.drain_s = 20;
    start(&o, &slow);
    give_model();
    usleep(50000);
    const int fd = begin_post("/v1/completions",
                              "{\"prompt\":\"b\",\"max_tokens\":30,\"ignore_eos\":true}", NULL);
    until_one_runs();
    ht_http_drain(server);
    ck_assert_int_eq(answer_of(fd, &text), 200);
    ck_assert_ptr_nonnull(strstr(text, "\"completion_tokens\":30"));
    free(text);
    pthread_join(thread, NULL);
    ck_assert_int_eq(ended, HT_OK);
    ck_assert_int_eq(pthread_create(&thread, NULL, run, NULL), 0); // for stop()
    stop();

    o.drain_s = 0.3; // longer answers are cut
    start(&o, &slow);
    give_model();
    usleep(50000);
    const int cut = begin_post(
        "/v1/completions", "{\"prompt\":\"b\",\"max_tokens\":100000,\"ignore_eos\":true}", NULL);
    until_one_runs();
    ht_http_drain(server);
    pthread_join(thread, NULL);
    ck_assert_int_eq(ended, HT_ERR_STOPPED);
    ck_assert_int_eq(pthread_create(&thread, NULL, run, NULL), 0);
    stop();
    close(cut);
}
END_TEST

/* An answer larger than what the kernel takes is made at once and read late. */
START_TEST(draining_waits_for_who_reads)
{
    const size_t n_text = 6 << 20;
    char *body = malloc(n_text + 64), *text;
    struct ht_http_options o = options();

    o.drain_s = 20;
    for (int late = 0; late < 2; late++) {
        if (late) o.drain_s = 0.5;
        start(&o, &quick);
        give_model();
        usleep(50000);
        const size_t n = (size_t)sprintf(body, "{\"add_special_tokens\":false,\"prompt\":\"");
        for (size_t i = 0; i < n_text; i++) body[n + i] = "hq z"[i % 4];
        strcpy(body + n + n_text, "\"}");
        const int fd = begin_post("/tokenize", body, NULL);
        char first;
        ck_assert_int_eq(recv(fd, &first, 1, MSG_PEEK), 1);
        ht_http_drain(server);
        usleep(late ? 1500000 : 500000);
        if (!late) {
            ck_assert_int_eq(answer_of(fd, &text), 200);
            ck_assert_msg(strcmp(text + strlen(text) - 2, "]}") == 0, "%zu bytes", strlen(text));
            free(text);
        }
        pthread_join(thread, NULL);
        ck_assert_int_eq(ended, late ? HT_ERR_STOPPED : HT_OK);
        if (late) close(fd);
        ck_assert_int_eq(pthread_create(&thread, NULL, run, NULL), 0); // for stop()
        stop();
    }
    free(body);
}
END_TEST

START_TEST(engine_failures_reach_the_client)
{
    const struct ht_http_options o = options();
    char *text;
    start(&o, &(struct engine_double_options){
                  .step_us = 200, .max_seqs = 4, .max_queue = 4, .fail_after = 2 });
    give_model();
    usleep(50000);
    ck_assert_int_eq(post("/v1/completions", "{\"prompt\":\"b\"}", &text), 500);
    ck_assert_ptr_nonnull(strstr(text, "told to fail"));
    free(text);
    ck_assert_int_eq(post("/v1/completions", "{\"prompt\":\"b\",\"stream\":true}", &text), 200);
    ck_assert_ptr_nonnull(strstr(text, "told to fail"));
    free(text);
    stop();
}
END_TEST

START_TEST(tokens_there_and_back)
{
    const struct ht_http_options o = options();
    char *text;
    start(&o, &quick);
    give_model();
    usleep(50000);
    ck_assert_int_eq(post("/tokenize", "{\"prompt\":\"hi\",\"add_special_tokens\":false}", &text),
                     200);
    json_t *j = json_of(text);
    ck_assert_int_eq(json_integer_value(json_object_get(j, "count")), 2);
    json_decref(j);
    ck_assert_int_eq(post("/detokenize", "{\"tokens\":[104,105]}", &text), 200);
    j = json_of(text);
    ck_assert_str_eq(json_string_value(json_object_get(j, "prompt")), "hi");
    json_decref(j);
    ck_assert_int_eq(get("/tokenizer_info", &text), 200);
    j = json_of(text);
    ck_assert_str_eq(json_string_value(json_object_get(j, "eos_token")), "<|im_end|>");
    ck_assert(json_is_string(json_object_get(j, "chat_template")));
    json_decref(j);
    stop();
}
END_TEST

int main(void)
{
    Suite *s = suite_create("http");
    TCase *c = tcase_create("http");
    tcase_set_timeout(c, 120);
    tcase_add_test(c, completions_and_chat);
    tcase_add_test(c, scoring_has_what_lm_eval_reads);
    tcase_add_test(c, wrong_requests_are_told_why);
    tcase_add_test(c, keys_are_asked_for);
    tcase_add_test(c, who_leaves_is_not_worked_for);
    tcase_add_loop_test(c, a_full_queue_says_so, 0, 2);
    tcase_add_test(c, slow_clients_are_cut);
    tcase_add_test(c, oversize_is_refused);
    tcase_add_test(c, draining_finishes_what_runs);
    tcase_add_test(c, draining_waits_for_who_reads);
    tcase_add_test(c, engine_failures_reach_the_client);
    tcase_add_test(c, tokens_there_and_back);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
