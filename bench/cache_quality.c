/* bench/cache_quality.c: what formats of the sequence states cost in quality.
 *
 *   bench_cache_quality --model PATH --data SHARD.h5 [--weights FORMAT] [--context N] [--tokens N]
 *                       [--threads N]
 *
 * Documents of the shard, cut to the context, go token by token through decoding passes of 16
 * sequences, once for each format of the states: every token reads and writes them, which is the
 * most that a format can lose. One JSON object per format goes to stdout: perplexity, and how far
 * log-probabilities are from those with states in fp32.
 */
#include <getopt.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/thread.h"
#include "core/model/pool.h"
#include "data/shard.h"
#include "inference/loaded.h"

enum { SEQS = 16 };

static const struct format {
    const char *name;
    enum ht_dtype ssm;
} formats[] = {
    { "fp32", HT_DTYPE_F32 },
    { "bf16, stochastic rounding", HT_DTYPE_BF16 },
};
enum { N_FORMATS = sizeof formats / sizeof *formats };

struct text { // a piece of a document
    const int32_t *ids;
    int64_t n;
    float *logprobs; // (n - 1) of ids[1 ...]
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_cache_quality: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static void *zeros(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) check(HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes", n * size));
    return p;
}

/* Pieces of documents until there are n_tokens of them. */
static int64_t read_texts(struct text **out, const char *path, int64_t context, int64_t n_tokens)
{
    struct ht_shard *s;
    int64_t n = 0, sum = 0;

    check(ht_shard_open(&s, path));
    struct text *t = zeros((size_t)ht_shard_n_docs(s), sizeof *t);
    for (int64_t doc = 0; doc < ht_shard_n_docs(s) && sum < n_tokens; doc++) {
        const int64_t length = ht_shard_doc_length(s, doc);
        const int64_t take = length < context ? length : context;
        if (take < 2) continue;
        int32_t *ids = zeros((size_t)take, sizeof *ids);
        check(ht_shard_read(s, doc, 0, take, ids));
        t[n++] = (struct text){ ids, take, NULL };
        sum += take;
    }
    ht_shard_close(s);
    *out = t;
    return n;
}

static float logprob_of(const float *x, int64_t n, int32_t id)
{
    double most = -INFINITY, sum = 0.0;

    for (int64_t i = 0; i < n; i++) most = (double)x[i] > most ? (double)x[i] : most;
    for (int64_t i = 0; i < n; i++) sum += exp((double)x[i] - most);
    return (float)((double)x[id] - most - log(sum));
}

/* All texts through a pool of that format; each of SEQS places takes the next text when its own has
 * ended. */
static void score(struct ht_loaded *l, const struct format *f, struct text *texts, int64_t n_texts,
                  int64_t context)
{
    const int64_t vocab_size = l->model->cfg.vocab_size;
    const bool attends = ht_pool_token_bytes(&l->model->cfg, l->model->dtype) > 0;
    float *logits = zeros((size_t)(SEQS * vocab_size), sizeof *logits);
    struct ht_place place[SEQS], *at[SEQS];
    struct text *text[SEQS] = { 0 };
    int32_t ids[SEQS];
    struct ht_pool *pool;
    int64_t next = 0;

    check(ht_pool_create(&pool, l->model,
                         &(struct ht_pool_options){ .n_slots = SEQS,
                                                    .kv_tokens = attends ? SEQS * context : 0,
                                                    .block_tokens = 16,
                                                    .ssm_dtype = f->ssm }));
    for (int i = 0; i < SEQS; i++)
        place[i] = (struct ht_place){ .slot = i, .kv_start = i * context, .kv_n = context };
    for (;;) {
        int n = 0, of[SEQS];
        for (int i = 0; i < SEQS; i++) {
            if (text[i] && place[i].n_tokens + 1 == text[i]->n) text[i] = NULL;
            if (!text[i] && next < n_texts) {
                text[i] = &texts[next++];
                check(ht_pool_reset(pool, &place[i]));
            }
            if (!text[i]) continue;
            of[n] = i;
            at[n] = &place[i];
            ids[n++] = text[i]->ids[place[i].n_tokens];
        }
        if (n == 0) break;
        check(ht_pool_decode(pool, at, ids, n, logits));
#pragma omp parallel for schedule(static)
        for (int k = 0; k < n; k++) {
            const int64_t t = place[of[k]].n_tokens;
            text[of[k]]->logprobs[t - 1] =
                logprob_of(logits + k * vocab_size, vocab_size, text[of[k]]->ids[t]);
        }
    }
    ht_pool_free(pool);
    free(logits);
}

static void report(const char *weights, const struct format *f, const struct text *texts,
                   const struct text *exact, int64_t n_texts, int64_t slot_bytes)
{
    double nats = 0.0, exact_nats = 0.0, sum = 0.0, most = 0.0;
    int64_t n = 0;

    for (int64_t i = 0; i < n_texts; i++)
        for (int64_t t = 0; t + 1 < texts[i].n; t++, n++) {
            const double d = fabs((double)texts[i].logprobs[t] - (double)exact[i].logprobs[t]);
            nats -= (double)texts[i].logprobs[t];
            exact_nats -= (double)exact[i].logprobs[t];
            sum += d;
            most = d > most ? d : most;
        }
    printf("{\"weights\": \"%s\", \"states\": \"%s\", \"slot_bytes\": %" PRId64
           ", \"scored\": %" PRId64 ", \"perplexity\": %.4f, \"against_fp32_percent\": %.4f, "
           "\"mean_error_nats\": %.6f, \"largest_error_nats\": %.4f}\n",
           weights, f->name, slot_bytes, n, exp(nats / (double)n),
           100.0 * (exp((nats - exact_nats) / (double)n) - 1.0), sum / (double)n, most);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const struct option options[] = { { "model", 1, NULL, 'm' },
                                             { "data", 1, NULL, 'd' },
                                             { "weights", 1, NULL, 'w' },
                                             { "tokens", 1, NULL, 'n' },
                                             { "context", 1, NULL, 'c' },
                                             { "threads", 1, NULL, 'j' },
                                             { 0 } };
    const char *path = NULL, *data = NULL, *weights = "fp32";
    int64_t n_tokens = 100000, context = 2048;
    struct text *texts, *first = NULL;
    struct ht_weights *w;
    struct ht_loaded l;
    int threads = 0;

    ht_thread_limit_spinning(argv);
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (c) {
        case 'm': path = optarg; break;
        case 'd': data = optarg; break;
        case 'w': weights = optarg; break;
        case 'n': n_tokens = strtoll(optarg, NULL, 10); break;
        case 'c': context = strtoll(optarg, NULL, 10); break;
        case 'j': threads = atoi(optarg); break;
        default: return 2;
        }
    }
    if (!path || !data || n_tokens < 2 || context < 2) {
        fprintf(stderr, "bench_cache_quality: --model PATH --data SHARD.h5\n");
        return 2;
    }
    check(ht_weights_open(&w, path, NULL));
    check(ht_loaded_open(&l, w, NULL, weights, threads, context));
    const int64_t n = read_texts(&texts, data, context, n_tokens);
    for (int f = 0; f < N_FORMATS; f++) {
        for (int64_t i = 0; i < n; i++)
            texts[i].logprobs = zeros((size_t)texts[i].n, sizeof(float));
        score(&l, &formats[f], texts, n, context);
        if (f == 0) {
            first = zeros((size_t)n, sizeof *first);
            memcpy(first, texts, (size_t)n * sizeof *first);
        }
        report(weights, &formats[f], texts, first, n,
               ht_pool_slot_bytes(&l.model->cfg, formats[f].ssm));
        for (int64_t i = 0; i < n && f > 0; i++) free(texts[i].logprobs);
    }
    for (int64_t i = 0; i < n; i++) {
        free(first[i].logprobs);
        free((void *)(uintptr_t)first[i].ids);
    }
    free(first);
    free(texts);
    ht_loaded_close(&l);
    return 0;
}
