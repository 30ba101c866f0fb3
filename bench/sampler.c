/* bench/sampler.c: time of one draw from a row of logits.
 *
 *   bench_sampler [--vocab 128256] [--repeat 101]
 *
 * Logits are normal with deviation 3 and one token in a thousand raised by 8, so that a few hundred
 * tokens share most of the probability, as in a language model's row. The row is copied before
 * every draw, as sampling changes it; the copy is not measured. One JSON object per setting goes to
 * stdout: the median of --repeat draws, in microseconds.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "inference/sampler.h"

static const struct setting {
    const char *name;
    struct ht_sampler_options o;
} settings[] = {
    { "greedy", { .temperature = 0.0f, .top_p = 1.0f, .repetition_penalty = 1.0f } },
    { "temperature", { .temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f } },
    { "top_k 1000",
      { .temperature = 1.0f, .top_k = 1000, .top_p = 1.0f, .repetition_penalty = 1.0f } },
    { "top_k 40", { .temperature = 1.0f, .top_k = 40, .top_p = 1.0f, .repetition_penalty = 1.0f } },
    { "top_p 0.95", { .temperature = 1.0f, .top_p = 0.95f, .repetition_penalty = 1.0f } },
    { "min_p 0.05",
      { .temperature = 1.0f, .top_p = 1.0f, .min_p = 0.05f, .repetition_penalty = 1.0f } },
    { "top_k 40, top_p 0.95",
      { .temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .repetition_penalty = 1.0f } },
    { "top_p 0.95, min_p 0.05",
      { .temperature = 0.8f, .top_p = 0.95f, .min_p = 0.05f, .repetition_penalty = 1.0f } },
    { "temperature 5", { .temperature = 5.0f, .top_p = 1.0f, .repetition_penalty = 1.0f } },
    { "all, penalties",
      { .temperature = 0.8f,
        .top_k = 100,
        .top_p = 0.95f,
        .min_p = 0.02f,
        .repetition_penalty = 1.1f,
        .frequency_penalty = 0.1f,
        .presence_penalty = 0.1f } },
};

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_sampler: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

int main(int argc, char **argv)
{
    static const struct option options[] = { { "vocab", required_argument, NULL, 'v' },
                                             { "repeat", required_argument, NULL, 'r' },
                                             { 0 } };
    int64_t vocab_size = 128256, repeat = 101;

    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == '?') return 2;
        *(o == 'v' ? &vocab_size : &repeat) = strtoll(optarg, NULL, 10);
    }
    if (vocab_size < 1 || vocab_size > 1 << 24 || repeat < 1 || repeat > 100000) {
        fprintf(stderr, "bench_sampler: --vocab 1 to 16777216, --repeat 1 to 100000\n");
        return 2;
    }
    float *logits = malloc((size_t)vocab_size * sizeof *logits);
    float *copy = malloc((size_t)vocab_size * sizeof *copy);
    double *us = malloc((size_t)repeat * sizeof *us);
    if (!logits || !copy || !us) return 1;
    for (int64_t i = 0; i < vocab_size; i++)
        logits[i] = 3.0f * ht_rng_normal(1, 2, (uint64_t)i) + (i % 1000 == 7 ? 8.0f : 0.0f);

    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
        struct ht_sampler *s;
        int32_t id = 0;
        check(ht_sampler_create(&s, &settings[i].o, vocab_size));
        for (int t = 0; t < 1000; t++) // a conversation behind it
            ht_sampler_accept_generated(
                s, (int32_t)(ht_rng_u64(3, 0, (uint64_t)t) % (uint64_t)vocab_size));
        for (int64_t r = 0; r < repeat; r++) {
            memcpy(copy, logits, (size_t)vocab_size * sizeof *copy);
            const double start_s = ht_time_s();
            check(ht_sampler_pick(s, copy, r, &id));
            us[r] = 1e6 * (ht_time_s() - start_s);
        }
        qsort(us, (size_t)repeat, sizeof *us, by_value);
        printf("{\"setting\": \"%s\", \"vocab\": %" PRId64 ", \"us\": %.1f}\n", settings[i].name,
               vocab_size, us[repeat / 2]);
        fflush(stdout);
        ht_sampler_free(s);
    }
    free(logits);
    free(copy);
    free(us);
    return 0;
}
