/* programs/hybridbench.c: measure a server under load; compare two models (hybridbench_compare.c).
 */
#include <errno.h>
#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench/hybridbench/load.h"
#include "core/base/file.h"
#include "core/base/thread.h"
#include "programs/hybridbench_compare.h"

static const char help[] =
    "Usage: hybridbench serve --url http://HOST:PORT [options]\n"
    "       hybridbench compare A B [options]      (hybridbench compare --help)\n"
    "\n"
    "A load for any OpenAI-compatible server (ours, vLLM, llama.cpp): Poisson arrivals, drawn "
    "lengths, "
    "streamed\n"
    "answers. Times count from when a request was due, so a queue in front of the server counts as "
    "well.\n"
    "\n"
    "  --url URL              the server, plain HTTP\n"
    "  --model NAME           default: the first that /v1/models names\n"
    "  --api-key-file FILE    its first line is sent as a bearer token (default: $OPENAI_API_KEY)\n"
    "  --chat                 /v1/chat/completions instead of /v1/completions\n"
    "  --requests N           how many (default 100)\n"
    "  --rate R               arrivals per second, or inf: all due at once (default inf)\n"
    "  --concurrency N        requests under way at once (default 16)\n"
    "  --prompt-words LENGTH  words per prompt (default 128); see below\n"
    "  --output-tokens LENGTH tokens asked for (default 64)\n"
    "  --shared-words N       first words that all prompts share, for prefix caches (default 0)\n"
    "  --timeout S            of one request, seconds (default 600)\n"
    "  --seed N               of arrivals, lengths and words (default 0)\n"
    "  --json FILE            write the figures there; - for standard output\n"
    "  --version, --help\n"
    "\n"
    "LENGTH is N, uniform:LOW-HIGH, exp:MEAN,MAX or lognormal:MEDIAN,SIGMA,MAX.\n"
    "Exit codes: 0 every request was answered, 1 some were not, or failure at run time, 2 usage.\n";

enum { EXIT_USAGE = 2 };

static int fail(enum ht_status st)
{
    fprintf(stderr, "hybridbench: %s\n", ht_error_message());
    return ht_exit_code(st);
}

static enum ht_status parse_int(int64_t *out, const char *name, const char *text, int64_t low,
                                int64_t high)
{
    char *end;

    errno = 0;
    const long long v = strtoll(text, &end, 10);
    if (errno || end == text || *end || v < low || v > high)
        return HT_FAIL(HT_ERR_ARG, "%s: \"%s\" is not a number from %lld to %lld", name, text,
                       (long long)low, (long long)high);
    *out = v;
    return HT_OK;
}

static enum ht_status parse_real(double *out, const char *name, const char *text)
{
    char *end;

    *out = strtod(text, &end);
    if (end == text || *end || isnan(*out))
        return HT_FAIL(HT_ERR_ARG, "%s: \"%s\" is not a number", name, text);
    return HT_OK;
}

static void show_progress(void *user, int64_t finished, int64_t n_requests)
{
    (void)user;
    fprintf(stderr, "\r%lld of %lld requests", (long long)finished, (long long)n_requests);
    if (finished == n_requests) fputc('\n', stderr);
}

static const double quantiles[] = { 0.5, 0.9, 0.95, 0.99, 1.0 };
static const char *const quantile_names[] = { "p50", "p90", "p95", "p99", "max" };
enum { N_QUANTILES = sizeof quantiles / sizeof *quantiles };

static json_t *real_or_null(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

static json_t *summary(struct ht_samples *s)
{
    json_t *out = json_object();

    json_object_set_new(out, "n", json_integer((json_int_t)s->n));
    json_object_set_new(out, "mean", real_or_null(ht_samples_mean(s)));
    for (int i = 0; i < N_QUANTILES; i++)
        json_object_set_new(out, quantile_names[i],
                            real_or_null(ht_samples_quantile(s, quantiles[i])));
    return out;
}

static enum ht_status write_json(const char *path, const struct ht_load_options *o,
                                 struct ht_load_result *r)
{
    json_t *j = json_pack(
        "{s:s, s:I, s:i, s:o, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:o, s:o, s:o, s:o}", "url",
        o->url, "requests", (json_int_t)o->n_requests, "concurrency", o->concurrency, "rate",
        real_or_null(o->rate), "answered", (json_int_t)r->n_ok, "refused", (json_int_t)r->n_refused,
        "failed", (json_int_t)r->n_failed, "prompt_tokens", (json_int_t)r->prompt_tokens,
        "output_tokens", (json_int_t)r->output_tokens, "wall_s", r->wall_s, "requests_per_s",
        (double)r->n_ok / r->wall_s, "output_tokens_per_s", (double)r->output_tokens / r->wall_s,
        "first_token_s", summary(&r->first_token_s), "per_token_s", summary(&r->per_token_s),
        "between_tokens_s", summary(&r->between_tokens_s), "total_s", summary(&r->total_s));
    char *text = j ? json_dumps(j, JSON_INDENT(2) | JSON_REAL_PRECISION(6)) : NULL;
    enum ht_status st = HT_OK;

    json_decref(j);
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    if (strcmp(path, "-") == 0)
        puts(text);
    else
        st = ht_file_publish(path, text, strlen(text));
    free(text);
    return st;
}

static void print_row(const char *name, struct ht_samples *s)
{
    printf("%-22s", name);
    printf(" %9.1f", 1e3 * ht_samples_mean(s));
    for (int i = 0; i < N_QUANTILES; i++)
        printf(" %9.1f", 1e3 * ht_samples_quantile(s, quantiles[i]));
    putchar('\n');
}

static void print_table(struct ht_load_result *r)
{
    printf("%lld answered, %lld refused (429, 503), %lld failed in %.2f s: %.2f requests/s, %.1f "
           "output tokens/s, %.1f tokens/s with prompts\n",
           (long long)r->n_ok, (long long)r->n_refused, (long long)r->n_failed, r->wall_s,
           (double)r->n_ok / r->wall_s, (double)r->output_tokens / r->wall_s,
           (double)(r->output_tokens + r->prompt_tokens) / r->wall_s);
    if (r->first_failure[0]) printf("first failure: %s\n", r->first_failure);
    if (r->n_ok == 0) return;
    printf("%-22s %9s", "milliseconds", "mean");
    for (int i = 0; i < N_QUANTILES; i++) printf(" %9s", quantile_names[i]);
    putchar('\n');
    print_row("time to first token", &r->first_token_s);
    print_row("time per output token", &r->per_token_s);
    print_row("inter-token latency", &r->between_tokens_s);
    print_row("whole answer", &r->total_s);
}

struct serve_args {
    struct ht_load_options load;
    const char *json;
    char key[512];
};

static enum ht_status read_key(struct serve_args *a, const char *path)
{
    char *text = NULL;
    size_t n;

    HT_TRY(ht_file_read(&text, &n, path, sizeof a->key - 1));
    text[strcspn(text, "\r\n")] = '\0';
    snprintf(a->key, sizeof a->key, "%s", text);
    free(text);
    a->load.api_key = a->key;
    return HT_OK;
}

enum {
    OPT_URL = 256,
    OPT_MODEL,
    OPT_KEY,
    OPT_CHAT,
    OPT_REQUESTS,
    OPT_RATE,
    OPT_CONCURRENCY,
    OPT_PROMPT,
    OPT_OUTPUT,
    OPT_SHARED,
    OPT_TIMEOUT,
    OPT_SEED,
    OPT_JSON,
    OPT_VERSION,
    OPT_HELP
};

static const struct option options[] = {
    { "url", required_argument, NULL, OPT_URL },
    { "model", required_argument, NULL, OPT_MODEL },
    { "api-key-file", required_argument, NULL, OPT_KEY },
    { "chat", no_argument, NULL, OPT_CHAT },
    { "requests", required_argument, NULL, OPT_REQUESTS },
    { "rate", required_argument, NULL, OPT_RATE },
    { "concurrency", required_argument, NULL, OPT_CONCURRENCY },
    { "prompt-words", required_argument, NULL, OPT_PROMPT },
    { "output-tokens", required_argument, NULL, OPT_OUTPUT },
    { "shared-words", required_argument, NULL, OPT_SHARED },
    { "timeout", required_argument, NULL, OPT_TIMEOUT },
    { "seed", required_argument, NULL, OPT_SEED },
    { "json", required_argument, NULL, OPT_JSON },
    { "version", no_argument, NULL, OPT_VERSION },
    { "help", no_argument, NULL, OPT_HELP },
    { NULL, 0, NULL, 0 },
};

static enum ht_status take_option(struct serve_args *a, int option, const char *text)
{
    struct ht_load_options *o = &a->load;
    int64_t v = 0;

    switch (option) {
    case OPT_URL: o->url = text; break;
    case OPT_MODEL: o->model = text; break;
    case OPT_KEY: return read_key(a, text);
    case OPT_CHAT: o->chat = true; break;
    case OPT_REQUESTS: return parse_int(&o->n_requests, "--requests", text, 1, 10000000);
    case OPT_RATE: return parse_real(&o->rate, "--rate", text);
    case OPT_CONCURRENCY:
        HT_TRY(parse_int(&v, "--concurrency", text, 1, 4096));
        o->concurrency = (int)v;
        break;
    case OPT_PROMPT: return ht_lengths_parse(&o->prompt_words, text, "--prompt-words");
    case OPT_OUTPUT: return ht_lengths_parse(&o->output_tokens, text, "--output-tokens");
    case OPT_SHARED: return parse_int(&o->shared_words, "--shared-words", text, 0, 1000000);
    case OPT_TIMEOUT: return parse_real(&o->timeout_s, "--timeout", text);
    case OPT_SEED:
        HT_TRY(parse_int(&v, "--seed", text, 0, INT64_MAX));
        o->seed = (uint64_t)v;
        break;
    case OPT_JSON: a->json = text; break;
    default: return HT_FAIL(HT_ERR_ARG, "an option nobody takes");
    }
    return HT_OK;
}

static int serve(int argc, char **argv)
{
    struct serve_args a = { .load = { .n_requests = 100,
                                      .rate = INFINITY,
                                      .concurrency = 16,
                                      .prompt_words = { HT_LENGTH_FIXED, 128, 128, 0, 0 },
                                      .output_tokens = { HT_LENGTH_FIXED, 64, 64, 0, 0 },
                                      .timeout_s = 600.0 } };
    struct ht_load_result result;
    const char *key = getenv("OPENAI_API_KEY");
    enum ht_status st;
    int option;

    if (key && key[0]) a.load.api_key = key;
    if (isatty(2)) a.load.progress = show_progress;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == '?') return EXIT_USAGE;
        if (option == OPT_HELP) return fputs(help, stdout), 0;
        if (option == OPT_VERSION) return puts("hybridbench " HT_VERSION), 0;
        st = take_option(&a, option, optarg);
        if (st != HT_OK) return fail(st), EXIT_USAGE;
    }
    if (optind < argc || !a.load.url) {
        fprintf(stderr, "hybridbench serve: %s\n",
                a.load.url ? "only options are taken" : "--url is needed; --help tells more");
        return EXIT_USAGE;
    }
    st = ht_load_run(&result, &a.load);
    if (st == HT_OK) {
        if (!a.json || strcmp(a.json, "-") != 0) print_table(&result);
        if (a.json) st = write_json(a.json, &a.load, &result);
    }
    const bool all = result.n_ok == a.load.n_requests;
    ht_load_result_free(&result);
    if (st != HT_OK) return fail(st);
    return all ? 0 : 1;
}

int main(int argc, char **argv)
{
    ht_thread_limit_spinning(argv);
    if (argc >= 2 && strcmp(argv[1], "compare") == 0) return ht_bench_compare(argc - 1, argv + 1);
    if (argc >= 2 && strcmp(argv[1], "serve") == 0) return serve(argc - 1, argv + 1);
    if (argc == 2 && strcmp(argv[1], "--version") == 0) return puts("hybridbench " HT_VERSION), 0;
    const bool asked = argc == 2 && strcmp(argv[1], "--help") == 0;
    fputs(help, asked ? stdout : stderr);
    return asked ? 0 : EXIT_USAGE;
}
