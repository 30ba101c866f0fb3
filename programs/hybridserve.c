/* programs/hybridserve.c: an OpenAI-compatible server. Options, loading, signals; the rest is
 * inference/http_server.c. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/thread.h"
#include "inference/http_server.h"

static const char help[] =
    "Usage: hybridserve --model PATH [options]\n"
    "\n"
    "Serve a model over HTTP as OpenAI's API does: /v1/completions, /v1/chat/completions, "
    "/v1/models,\n"
    "streaming, and a small chat page on /. PATH is a run folder, a checkpoint, a converted folder "
    "or a\n"
    "folder in Hugging Face form. docs/serving.md describes endpoints, limits and metrics.\n"
    "\n"
    "Model\n"
    "  --model PATH                what to serve (may be the first argument without --model)\n"
    "  --tokenizer FILE            tokenizer.json to use instead of the model's\n"
    "  --chat-template FILE        Jinja chat template instead of the model's\n"
    "  --served-model-name NAME    its name in the API (default: last part of PATH)\n"
    "  --quantize FORMAT           weights in memory: stored, fp32, bf16, int8, int4, int4z, fp8 "
    "(default stored)\n"
    "  --kv-cache FORMAT           keys and values: model, bf16, int8 (default model)\n"
    "  --state-cache FORMAT        SSM states: fp32, 16 (default fp32)\n"
    "  --device NAME               cpu, cuda, or auto: cuda where there is a GPU (default cpu)\n"
    "  --threads N                 computing threads (default: all cores)\n"
    "\n"
    "Scheduling\n"
    "  --max-model-len N           tokens of prompt and answer together (alias --ctx-size; default "
    "4096)\n"
    "  --max-num-seqs N            sequences computed at once (alias --parallel; default 16)\n"
    "  --max-num-batched-tokens N  prompt tokens of one step (default 512)\n"
    "  --max-queue N               requests that wait; more get 429 (default 1024)\n"
    "  --memory SIZE               for states and keys and values, e.g. 4GiB (default: what the "
    "two above need)\n"
    "  --prefix-cache SIZE         memory for beginnings that come again (default 256MiB; 0 is "
    "--no-enable-prefix-caching)\n"
    "  --enable-prefix-caching, --no-enable-prefix-caching\n"
    "  --speculate N               sequences that guess ahead in one step, from their own text; "
    "answers stay\n"
    "                              the same, each takes one more state (default 0)\n"
    "  --max-time S                seconds for one answer; then it ends with what it has (default "
    "600)\n"
    "\n"
    "Sampling, where a request says nothing\n"
    "  --temperature T (1)  --top-k N (0: all)  --top-p P (1)  --min-p P (0)\n"
    "\n"
    "HTTP\n"
    "  --host ADDRESS              (default 127.0.0.1; others need a key or --insecure)\n"
    "  --port N                    (default 8080; 0: any free one, printed on standard output)\n"
    "  --api-key KEY               asked for as 'Authorization: Bearer KEY'; may be given several "
    "times\n"
    "  --api-key-file FILE         one key per line, '#' for comments\n"
    "  --insecure                  listen on any address without a key\n"
    "  --cors ORIGIN               let web pages of this origin call the API; * for all (default: "
    "none)\n"
    "  --max-body SIZE             of a request (default 8MiB)\n"
    "  --max-header SIZE           of its headers (default 16KiB)\n"
    "  --max-output SIZE           that waits for a client who does not read; then it is cut off "
    "(default 1MiB)\n"
    "  --max-connections N         (default 1024)\n"
    "  --max-per-client N          connections of one address (default: no bound of its own)\n"
    "  --request-timeout S         from connecting to a complete request (default 30)\n"
    "  --idle-timeout S            of a connection between requests, or without progress in "
    "sending (default 60)\n"
    "  --drain-timeout S           after SIGTERM, to finish what runs (default 30)\n"
    "  --chat-page, --no-chat-page (default: served)\n"
    "  --metrics-prefix PREFIX     of /metrics (default hybridtrain_; 'vllm:' gives that server's "
    "names)\n"
    "\n"
    "Fixed limits: n and best_of 8, logprobs 20, stop 16 strings of 256 bytes, 1024 messages, 256 "
    "prompts,\n"
    "JSON 64 deep, 1024 biases; template: 1e5 nodes, 1e6 steps, 8 MiB of text.\n"
    "\n"
    "  --log-level LEVEL           debug, info, warn, error (default info); prompts are never "
    "logged\n"
    "  --log-file FILE             also there; SIGHUP opens it anew\n"
    "  --version, --help\n"
    "\n"
    "SIGTERM and SIGINT stop accepting, finish what runs within --drain-timeout and exit 0; a "
    "second one\n"
    "exits at once. Exit codes: 0 done, 1 failure at run time, 2 usage, 3 bad model, 5 out of "
    "memory.\n";

enum { MAX_KEYS = 1024, MAX_KEY_BYTES = 4096 };

struct arguments {
    struct ht_engine_options engine;
    struct ht_http_options http;
    struct ht_api_context context; // names and sampling defaults
    const char *chat_template, *log_file;
    char *keys[MAX_KEYS];
    int n_keys;
    bool insecure, prefix_cache, per_client;
};

/* What the loading thread makes; freed by main when the server has ended. */
struct serving {
    const struct arguments *a;
    const struct ht_log *log;
    struct ht_http *http;
    struct ht_engine *engine;
    struct ht_encoder *encoder;
    struct ht_token_decoder *decoder;
    struct ht_chat_template *chat;
    enum ht_status status;
    char message[1024];
};

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybridserve: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static enum ht_status parse_integer(int64_t *out, const char *name, const char *text, int64_t low,
                                    int64_t high)
{
    char *end;
    errno = 0;
    const long long v = strtoll(text, &end, 10);
    if (*end || end == text || errno || v < low || v > high)
        return HT_FAIL(HT_ERR_ARG, "--%s is '%s'; it must be from %lld to %lld", name, text,
                       (long long)low, (long long)high);
    *out = v;
    return HT_OK;
}

static enum ht_status parse_real(double *out, const char *name, const char *text, double low,
                                 double high)
{
    char *end;
    const double v = strtod(text, &end);
    if (*end || end == text || !(v >= low && v <= high))
        return HT_FAIL(HT_ERR_ARG, "--%s is '%s'; it must be from %g to %g", name, text, low, high);
    *out = v;
    return HT_OK;
}

/* 64MiB, 4GiB, 1000000; K, M, G, T are powers of 1024, too. */
static enum ht_status parse_size(int64_t *out, const char *name, const char *text, int64_t low)
{
    static const char units[] = "KMGT";
    char *end;
    const double v = strtod(text, &end);
    const char *unit = *end ? strchr(units, *end) : NULL;
    double scale = 1.0;
    if (unit && *unit) {
        for (const char *u = units; u <= unit; u++) scale *= 1024.0;
        end++;
        if (*end == 'i') end++;
    }
    if (*end == 'B') end++;
    if (*end || end == text || !(v >= 0) || v * scale > 9e15 || v * scale < (double)low)
        return HT_FAIL(HT_ERR_ARG,
                       "--%s is '%s'; it must be a size such as 64MiB, at least %lld bytes", name,
                       text, (long long)low);
    *out = (int64_t)(v * scale);
    return HT_OK;
}

static enum ht_status choose(int *out, const char *name, const char *text, const char *const *words)
{
    char all[128] = "";
    for (int i = 0; words[i]; i++) {
        if (strcmp(words[i], text) == 0) {
            *out = i;
            return HT_OK;
        }
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", words[i]);
    }
    return HT_FAIL(HT_ERR_ARG, "--%s is '%s'; it must be one of %s", name, text, all);
}

static enum ht_status add_key(struct arguments *a, const char *key, size_t n)
{
    if (n == 0 || n > MAX_KEY_BYTES)
        return HT_FAIL(HT_ERR_ARG, "an API key of %zu bytes; it must have 1 to %d", n,
                       MAX_KEY_BYTES);
    if (a->n_keys == MAX_KEYS) return HT_FAIL(HT_ERR_ARG, "more than %d API keys", MAX_KEYS);
    char *copy = strndup(key, n);
    if (!copy) return HT_FAIL(HT_ERR_MEMORY, "no memory for an API key");
    a->keys[a->n_keys++] = copy;
    return HT_OK;
}

static enum ht_status read_keys(struct arguments *a, const char *path)
{
    enum ht_status st = HT_OK;
    char *text, *save = NULL;
    HT_TRY(ht_file_read(&text, NULL, path, 1 << 22));
    for (char *line = strtok_r(text, "\r\n", &save); line && st == HT_OK;
         line = strtok_r(NULL, "\r\n", &save)) {
        line += strspn(line, " \t");
        if (*line && *line != '#') st = add_key(a, line, strcspn(line, " \t"));
    }
    free(text);
    if (st == HT_OK && a->n_keys == 0) return HT_FAIL(HT_ERR_ARG, "%s holds no API key", path);
    return st;
}

enum option_code {
    O_MODEL = 256,
    O_TOKENIZER,
    O_TEMPLATE,
    O_NAME,
    O_QUANTIZE,
    O_KV,
    O_STATE,
    O_DEVICE,
    O_THREADS,
    O_CONTEXT,
    O_SEQS,
    O_STEP,
    O_QUEUE,
    O_MEMORY,
    O_PREFIX,
    O_PREFIX_ON,
    O_PREFIX_OFF,
    O_TIME,
    O_TEMPERATURE,
    O_TOP_K,
    O_TOP_P,
    O_MIN_P,
    O_SPECULATE,
    O_HOST,
    O_PORT,
    O_KEY,
    O_KEY_FILE,
    O_INSECURE,
    O_CORS,
    O_BODY,
    O_HEADER,
    O_OUTPUT,
    O_CONNECTIONS,
    O_PER_CLIENT,
    O_REQUEST_TIME,
    O_IDLE,
    O_DRAIN,
    O_PAGE,
    O_NO_PAGE,
    O_METRICS,
    O_LOG_LEVEL,
    O_LOG_FILE,
    O_VERSION,
    O_HELP
};

static enum ht_status set_real(float *out, const char *name, const char *value, double low,
                               double high)
{
    double x = 0;
    HT_TRY(parse_real(&x, name, value, low, high));
    *out = (float)x;
    return HT_OK;
}

static enum ht_status set_int(int *out, const char *name, const char *value, int low, int high)
{
    int64_t x = 0;
    HT_TRY(parse_integer(&x, name, value, low, high));
    *out = (int)x;
    return HT_OK;
}

static enum ht_status set_http(struct arguments *a, int code, const char *name, const char *v)
{
    struct ht_http_options *h = &a->http;
    switch (code) {
    case O_HOST: h->host = v; break;
    case O_PORT: return set_int(&h->port, name, v, 0, 65535);
    case O_KEY: return add_key(a, v, strlen(v));
    case O_KEY_FILE: return read_keys(a, v);
    case O_INSECURE: a->insecure = true; break;
    case O_CORS: h->cors_origin = v; break;
    case O_BODY: return parse_size(&h->max_body_bytes, name, v, 1024);
    case O_HEADER: return parse_size(&h->max_header_bytes, name, v, 1024);
    case O_OUTPUT: return parse_size(&h->max_output_bytes, name, v, 4096);
    case O_CONNECTIONS: return set_int(&h->max_connections, name, v, 1, 30000);
    case O_PER_CLIENT: a->per_client = true; return set_int(&h->max_per_client, name, v, 1, 30000);
    case O_REQUEST_TIME: return parse_real(&h->request_s, name, v, 0.1, 86400);
    case O_IDLE: return parse_real(&h->idle_s, name, v, 1, 86400);
    case O_DRAIN: return parse_real(&h->drain_s, name, v, 0, 86400);
    case O_TIME: return parse_real(&h->answer_s, name, v, 0.1, 1e6);
    case O_QUEUE: return parse_integer(&h->max_queue, name, v, 1, 1 << 20);
    case O_PAGE: h->chat_page = true; break;
    case O_NO_PAGE: h->chat_page = false; break;
    case O_METRICS: h->metrics_prefix = v; break;
    default: return HT_FAIL(HT_ERR_ARG, "--%s is not known", name);
    }
    return HT_OK;
}

static enum ht_status set_option(struct arguments *a, struct ht_log *log, int code,
                                 const char *name, const char *v)
{
    static const char *const weights[] = { "stored", "fp32",  "bf16", "int8",
                                           "int4",   "int4z", "fp8",  NULL };
    static const char *const kv[] = { "model", "bf16", "int8", NULL }, *const state[] = { "fp32",
                                                                                          "16",
                                                                                          NULL };
    static const char *const levels[] = { "debug", "info", "warn", "error", NULL };
    static const char *const devices[] = { "cpu", "cuda", "auto", NULL };
    struct ht_engine_options *e = &a->engine;
    int k = 0;

    switch (code) {
    case O_MODEL: e->path = v; break;
    case O_TOKENIZER: e->tokenizer = v; break;
    case O_TEMPLATE: a->chat_template = v; break;
    case O_NAME: a->context.model = v; break;
    case O_QUANTIZE:
        HT_TRY(choose(&k, name, v, weights));
        e->weights = weights[k];
        break;
    case O_KV:
        HT_TRY(choose(&k, name, v, kv));
        e->kv = (enum ht_kv_format)k;
        break;
    case O_STATE:
        HT_TRY(choose(&k, name, v, state));
        e->state = (enum ht_state_format)k;
        break;
    case O_LOG_LEVEL:
        HT_TRY(choose(&k, name, v, levels));
        log->level = (enum ht_log_level)k;
        break;
    case O_LOG_FILE: a->log_file = v; break;
    case O_DEVICE:
        HT_TRY(choose(&k, name, v, devices));
        e->device = devices[k];
        break;
    case O_THREADS: return set_int(&e->threads, name, v, 1, 1024);
    case O_CONTEXT: return parse_integer(&e->max_context, name, v, 1, 1 << 24);
    case O_SEQS: return parse_integer(&e->max_seqs, name, v, 1, 1 << 16);
    case O_STEP: return parse_integer(&e->max_step_tokens, name, v, 1, 1 << 20);
    case O_MEMORY: return parse_size(&e->memory_bytes, name, v, 1);
    case O_PREFIX: return parse_size(&e->prefix_cache_bytes, name, v, 0);
    case O_SPECULATE: return parse_integer(&e->max_drafts, name, v, 0, 1 << 12);
    case O_PREFIX_ON: a->prefix_cache = true; break;
    case O_PREFIX_OFF: a->prefix_cache = false; break;
    case O_TEMPERATURE: return set_real(&a->context.temperature, name, v, 0, 2);
    case O_TOP_P: return set_real(&a->context.top_p, name, v, 1e-6, 1);
    case O_MIN_P: return set_real(&a->context.min_p, name, v, 0, 0.999);
    case O_TOP_K: return parse_integer(&a->context.top_k, name, v, 0, 1 << 24);
    default: return set_http(a, code, name, v);
    }
    return HT_OK;
}

/* The last part of a path, without slashes at its end; '.' and the like say nothing. */
static char *name_of(const char *path)
{
    char *real = realpath(path, NULL), *copy = strdup(real ? real : path);
    free(real);
    if (!copy) return NULL;
    for (size_t n = strlen(copy); n > 1 && copy[n - 1] == '/';) copy[--n] = '\0';
    const char *slash = strrchr(copy, '/');
    if (slash && slash[1]) memmove(copy, slash + 1, strlen(slash + 1) + 1);
    return copy;
}

static enum ht_status load_template(struct serving *s)
{
    const char *text = ht_engine_chat_template(s->engine);
    enum ht_status st;
    char *file = NULL;
    size_t n;

    if (s->a->chat_template) {
        HT_TRY(ht_file_read(&file, &n, s->a->chat_template, HT_JINJA_MAX_BYTES));
        st = ht_chat_template_create(&s->chat, file, n, s->a->chat_template);
        free(file);
        return st;
    }
    if (!text) return HT_OK;
    if (ht_chat_template_create(&s->chat, text, strlen(text), "chat_template") !=
        HT_OK) // the rest can be served
        HT_WARN(s->log, "no chat: %s; give --chat-template", ht_error_message());
    return HT_OK;
}

static const char *token_text(const struct ht_tokenizer *t, int32_t id)
{
    return t && id >= 0 ? ht_tokenizer_token(t, id) : NULL;
}

static enum ht_status load(struct serving *s)
{
    struct ht_api_context c = s->a->context;
    HT_TRY(ht_engine_create(&s->engine, &s->a->engine));
    c.tokenizer = ht_engine_tokenizer(s->engine);
    c.max_context = ht_engine_max_context(s->engine);
    c.vocab_size = ht_engine_vocab_size(s->engine);
    c.bos_id = ht_engine_bos(s->engine);
    c.bos = token_text(c.tokenizer, c.bos_id);
    c.eos = token_text(c.tokenizer, ht_engine_eos(s->engine));
    if (c.tokenizer) {
        HT_TRY(ht_encoder_create(&s->encoder, c.tokenizer));
        HT_TRY(ht_token_decoder_create(&s->decoder, c.tokenizer, false));
        HT_TRY(load_template(s));
    }
    c.encoder = s->encoder;
    c.decoder = s->decoder;
    c.chat = s->chat;
    ht_http_set_model(s->http, s->engine, &c);
    return HT_OK;
}

static void *load_thread(void *arg)
{
    struct serving *s = arg;
    s->status = load(s);
    if (s->status != HT_OK) {
        snprintf(s->message, sizeof s->message, "%s", ht_error_message());
        ht_http_stop(s->http);
    }
    return NULL;
}

// ---- the log file is opened anew on SIGHUP, by a thread of its own so that no handler does it
// ----

struct reopen {
    struct ht_log *log;
    const char *path;
};

static void *reopen_thread(void *arg)
{
    const struct reopen *r = arg;
    sigset_t set;
    int number;
    sigemptyset(&set);
    sigaddset(&set, SIGHUP);
    for (;;) {
        if (sigwait(&set, &number) != 0) return NULL;
        if (!r->path) continue;
        // under the stream that others write to; where it cannot be opened the old one goes on
        const int fd = open(r->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0) continue;
        fflush(r->log->file);
        dup3(fd, fileno(r->log->file), O_CLOEXEC);
        close(fd);
    }
}

static enum ht_status serve(struct arguments *a, struct ht_log *log)
{
    struct serving s = { .a = a, .log = log };
    const struct rlimit files = { (rlim_t)a->http.max_connections + 512,
                                  (rlim_t)a->http.max_connections + 512 };
    enum ht_status st = HT_OK;
    struct rlimit now;
    pthread_t thread;
    bool loading = false;

    if (getrlimit(RLIMIT_NOFILE, &now) == 0 && now.rlim_cur < files.rlim_cur) {
        now.rlim_cur = now.rlim_max < files.rlim_cur ? now.rlim_max : files.rlim_cur;
        setrlimit(RLIMIT_NOFILE, &now);
    }
    HT_TRY_GOTO(st, done, ht_http_create(&s.http, &a->http));
    printf("listening on http://%s:%d\n", a->http.host, ht_http_port(s.http));
    fflush(stdout);
    if (pthread_create(&thread, NULL, load_thread, &s) != 0) {
        st = HT_FAIL(HT_ERR_MEMORY, "no thread to load the model");
        goto done;
    }
    loading = true;
    st = ht_http_run(s.http);
done:
    if (loading) pthread_join(thread, NULL);
    ht_http_free(s.http);
    ht_chat_template_free(s.chat);
    ht_encoder_free(s.encoder);
    ht_token_decoder_free(s.decoder);
    ht_engine_free(s.engine);
    if (loading && s.status != HT_OK) return HT_FAIL(s.status, "%s", s.message);
    if (st == HT_ERR_STOPPED) { // asked for: what was cut is in the log
        HT_WARN(log, "%s", ht_error_message());
        return HT_OK;
    }
    return st;
}

static enum ht_status check(struct arguments *a)
{
    const char *host = a->http.host;
    const bool local = strcmp(host, "127.0.0.1") == 0 || strcmp(host, "::1") == 0 ||
                       strcmp(host, "localhost") == 0;
    if (!local && a->n_keys == 0 && !a->insecure)
        return HT_FAIL(HT_ERR_ARG,
                       "--host %s can be reached from outside: give --api-key or --api-key-file, "
                       "or --insecure",
                       host);
    if (!a->per_client) a->http.max_per_client = a->http.max_connections;
    if (!a->prefix_cache) a->engine.prefix_cache_bytes = 0;
    a->engine.max_queue = a->http.max_queue;
    a->http.api_keys = (const char *const *)a->keys;
    a->http.n_api_keys = a->n_keys;
    return HT_OK;
}

int main(int argc, char **argv)
{
    static const struct option options[] = { { "model", 1, NULL, O_MODEL },
                                             { "tokenizer", 1, NULL, O_TOKENIZER },
                                             { "chat-template", 1, NULL, O_TEMPLATE },
                                             { "served-model-name", 1, NULL, O_NAME },
                                             { "quantize", 1, NULL, O_QUANTIZE },
                                             { "kv-cache", 1, NULL, O_KV },
                                             { "state-cache", 1, NULL, O_STATE },
                                             { "device", 1, NULL, O_DEVICE },
                                             { "threads", 1, NULL, O_THREADS },
                                             { "max-model-len", 1, NULL, O_CONTEXT },
                                             { "ctx-size", 1, NULL, O_CONTEXT },
                                             { "max-num-seqs", 1, NULL, O_SEQS },
                                             { "parallel", 1, NULL, O_SEQS },
                                             { "max-num-batched-tokens", 1, NULL, O_STEP },
                                             { "max-queue", 1, NULL, O_QUEUE },
                                             { "memory", 1, NULL, O_MEMORY },
                                             { "prefix-cache", 1, NULL, O_PREFIX },
                                             { "speculate", 1, NULL, O_SPECULATE },
                                             { "enable-prefix-caching", 0, NULL, O_PREFIX_ON },
                                             { "no-enable-prefix-caching", 0, NULL, O_PREFIX_OFF },
                                             { "max-time", 1, NULL, O_TIME },
                                             { "temperature", 1, NULL, O_TEMPERATURE },
                                             { "top-k", 1, NULL, O_TOP_K },
                                             { "top-p", 1, NULL, O_TOP_P },
                                             { "min-p", 1, NULL, O_MIN_P },
                                             { "host", 1, NULL, O_HOST },
                                             { "port", 1, NULL, O_PORT },
                                             { "api-key", 1, NULL, O_KEY },
                                             { "api-key-file", 1, NULL, O_KEY_FILE },
                                             { "insecure", 0, NULL, O_INSECURE },
                                             { "cors", 1, NULL, O_CORS },
                                             { "max-body", 1, NULL, O_BODY },
                                             { "max-header", 1, NULL, O_HEADER },
                                             { "max-output", 1, NULL, O_OUTPUT },
                                             { "max-connections", 1, NULL, O_CONNECTIONS },
                                             { "max-per-client", 1, NULL, O_PER_CLIENT },
                                             { "request-timeout", 1, NULL, O_REQUEST_TIME },
                                             { "idle-timeout", 1, NULL, O_IDLE },
                                             { "drain-timeout", 1, NULL, O_DRAIN },
                                             { "chat-page", 0, NULL, O_PAGE },
                                             { "no-chat-page", 0, NULL, O_NO_PAGE },
                                             { "metrics-prefix", 1, NULL, O_METRICS },
                                             { "log-level", 1, NULL, O_LOG_LEVEL },
                                             { "log-file", 1, NULL, O_LOG_FILE },
                                             { "version", 0, NULL, O_VERSION },
                                             { "help", 0, NULL, O_HELP },
                                             { NULL, 0, NULL, 0 } };
    static struct arguments a; // large
    struct ht_log log = { .level = HT_LOG_INFO, .terminal = stderr };
    enum ht_status st = HT_OK;
    char *name = NULL;
    sigset_t hup;
    pthread_t thread;
    int opt, index = 0;

    ht_thread_limit_spinning(argv);
    a.http = ht_http_default_options();
    a.http.log = a.engine.log = &log;
    a.http.signals = true;
    a.prefix_cache = true;
    a.engine.weights = "stored";
    a.engine.prefix_cache_bytes = 256 << 20;
    a.context.temperature = a.context.top_p = 1.0f;
    while ((opt = getopt_long(argc, argv, "h", options, &index)) != -1) {
        if (opt == O_HELP || opt == 'h') return fputs(help, stdout) < 0;
        if (opt == O_VERSION) return printf("hybridserve %s\n", HT_VERSION) < 0;
        if (opt == '?') return 2;
        if (set_option(&a, &log, opt, options[index].name, optarg) != HT_OK)
            return fail(HT_ERR_ARG), 2;
    }
    if (!a.engine.path && optind < argc) a.engine.path = argv[optind++];
    if (!a.engine.path || optind < argc) {
        fputs(a.engine.path ? "hybridserve: unexpected argument; try --help\n"
                            : "hybridserve: --model is missing; try --help\n",
              stderr);
        return 2;
    }
    if (check(&a) != HT_OK) return fail(HT_ERR_ARG), 2;
    a.context.speculate = a.engine.max_drafts > 0;
    if (a.engine.max_drafts == 0) a.engine.max_drafts = -1; // the engine's 0 is its default
    if (a.log_file && !(log.file = fopen(a.log_file, "a"))) {
        fprintf(stderr, "hybridserve: %s: %s\n", a.log_file, strerror(errno));
        return 2;
    }
    if (!a.context.model) a.context.model = name = name_of(a.engine.path);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&hup);
    sigaddset(&hup, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &hup, NULL); // before any thread
    struct reopen reopen = { &log, a.log_file };
    if (!a.context.model || pthread_create(&thread, NULL, reopen_thread, &reopen) != 0) {
        fputs("hybridserve: no memory\n", stderr);
        return 5;
    }
    st = serve(&a, &log);
    if (st != HT_OK) fail(st);
    free(name);
    for (int i = 0; i < a.n_keys; i++) free(a.keys[i]);
    if (log.file) fclose(log.file);
    return st == HT_OK ? 0 : ht_exit_code(st);
}
