/* bench/speculate.c: what n-gram speculation gains on one text.
 *
 *   bench_speculate --model PATH --text FILE [--weights FORMAT] [--threads N] [--n-predict N]
 *                   [--temperature T] [--reps N]
 *
 * One request with the file's text as its prompt, alone in the engine, in turn without and with
 * guesses. One JSON object goes to stdout: tokens/s of the decoding alone (from the first token to
 * the last), medians over --reps, drafts tried and accepted. Output that differs is an error.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/thread.h"
#include "data/tokenizer.h"
#include "inference/engine.h"

enum { MAX_REPS = 51 };

struct run {
    int32_t *ids;
    int64_t n;
    double first_s, last_s;
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_speculate: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Tokens per second of one request's decoding. */
static double measure(struct ht_engine *e, struct ht_request *r, bool speculate, struct run *out)
{
    uint64_t id;
    bool over = false;

    out->n = 0;
    r->speculate = speculate;
    check(ht_engine_submit(e, r, &id));
    while (!over) {
        struct ht_engine_event *list = ht_engine_wait_events(e, 1.0);
        for (const struct ht_engine_event *v = list; v; v = v->next) {
            if (v->finish == HT_FINISH_ERROR) check(HT_FAIL(HT_ERR_ARG, "%s", v->message));
            over |= v->finish != HT_FINISH_NONE;
            if (v->id < 0) continue;
            out->last_s = ht_time_s();
            if (out->n == 0) out->first_s = out->last_s;
            out->ids[out->n++] = v->id;
        }
        ht_engine_event_free(list);
    }
    return out->n > 1 ? (double)(out->n - 1) / (out->last_s - out->first_s) : 0.0;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "model", 1, NULL, 'm' },    { "text", 1, NULL, 't' },        { "weights", 1, NULL, 'w' },
        { "threads", 1, NULL, 'j' },  { "n-predict", 1, NULL, 'n' },   { "reps", 1, NULL, 'r' },
        { "ctx-size", 1, NULL, 'c' }, { "temperature", 1, NULL, 'T' }, { 0 }
    };
    struct ht_engine_options o = { .max_seqs = 1 };
    struct ht_request r = { .max_tokens = 256,
                            .n = 1,
                            .top_p = 1.0f,
                            .repetition_penalty = 1.0f,
                            .ignore_eos = true,
                            .logprobs = -1 };
    const char *path = NULL;
    int64_t reps = 5;

    ht_thread_limit_spinning(argv);
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm': o.path = optarg; break;
        case 't': path = optarg; break;
        case 'w': o.weights = optarg; break;
        case 'j': o.threads = atoi(optarg); break;
        case 'n': r.max_tokens = strtoll(optarg, NULL, 10); break;
        case 'c': o.max_context = strtoll(optarg, NULL, 10); break;
        case 'r': reps = strtoll(optarg, NULL, 10); break;
        case 'T': r.temperature = strtof(optarg, NULL); break;
        default: return 2;
        }
    }
    if (!o.path || !path || reps < 1 || reps > MAX_REPS) {
        fprintf(stderr, "bench_speculate: --model PATH --text FILE, --reps 1 to %d\n", MAX_REPS);
        return 2;
    }
    struct ht_engine *e;
    struct ht_encoder *encoder;
    struct ht_ids prompt = { 0 };
    char *text;
    size_t n_bytes;
    check(ht_engine_create(&e, &o));
    check(ht_file_read(&text, &n_bytes, path, 1 << 20));
    if (!ht_engine_tokenizer(e)) check(HT_FAIL(HT_ERR_ARG, "%s has no tokenizer", o.path));
    check(ht_encoder_create(&encoder, ht_engine_tokenizer(e)));
    check(ht_encode(encoder, text, n_bytes, true, &prompt));
    r.ids = prompt.ids;
    r.n_ids = prompt.n;

    struct run runs[2] = { 0 };
    double speed[2][MAX_REPS];
    struct ht_engine_stats stats;
    for (int k = 0; k < 2; k++) runs[k].ids = calloc((size_t)r.max_tokens, sizeof(int32_t));
    for (int64_t i = 0; i < reps; i++)
        for (int k = 0; k < 2; k++) speed[k][i] = measure(e, &r, k == 1, &runs[k]);
    if (runs[0].n != runs[1].n ||
        memcmp(runs[0].ids, runs[1].ids, (size_t)runs[0].n * sizeof(int32_t)) != 0)
        check(HT_FAIL(HT_ERR_NUMERIC, "the output with guesses differs"));
    for (int k = 0; k < 2; k++) qsort(speed[k], (size_t)reps, sizeof(double), by_value);
    ht_engine_get_stats(e, &stats);
    printf("{\"weights\": \"%s\", \"temperature\": %g, \"prompt_tokens\": %" PRId64
           ", \"tokens\": %" PRId64 ", \"plain_tokens_per_s\": %.1f, \"speculating_tokens_per_s\": "
           "%.1f, \"ratio\": %.2f, \"drafted\": %" PRId64 ", \"accepted\": %" PRId64 "}\n",
           o.weights ? o.weights : "stored", (double)r.temperature, r.n_ids, runs[0].n,
           speed[0][reps / 2], speed[1][reps / 2], speed[1][reps / 2] / speed[0][reps / 2],
           stats.speculated / reps, stats.accepted / reps);
    for (int k = 0; k < 2; k++) free(runs[k].ids);
    ht_ids_free(&prompt);
    ht_encoder_free(encoder);
    free(text);
    ht_engine_free(e);
    return 0;
}
