/* bench/data_loader.c: speed of the loader alone on this machine.
 *
 *   bench_data_loader FOLDER [--docs N] [--length N] [--datasets N] [--seq N] [--rows N] [--ranks
 * N] [--window N]
 *                     [--steps N]
 *
 * Shards of random documents (lengths 0 to 2 * length) are written into FOLDER. One rank of `ranks`
 * then goes through steps of `rows` rows of all ranks without a prefetch thread, so that nothing is
 * hidden: every rank walks all rows and reads its own. One JSON object goes to stdout; tokens_per_s
 * counts the tokens of all ranks, own_tokens_per_s this rank's.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "data/loader.h"
#include "data/shard.h"

struct numbers {
    int64_t docs, length, datasets, seq, rows, ranks, window, steps;
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_data_loader: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static void write_shard(const char *path, const struct numbers *n, uint64_t seed)
{
    int32_t *ids = calloc((size_t)(2 * n->length + 1), sizeof *ids);
    struct ht_shard_writer *w;

    if (!ids) check(HT_FAIL(HT_ERR_MEMORY, "no memory for a document"));
    for (int64_t i = 0; i <= 2 * n->length; i++)
        ids[i] = (int32_t)(ht_rng_u64(seed, 1, (uint64_t)i) % 50000);
    check(ht_shard_writer_create(&w, path, 50000, ""));
    for (int64_t doc = 0; doc < n->docs; doc++) {
        const uint64_t draw = ht_rng_u64(seed, 2, (uint64_t)doc);
        check(ht_shard_writer_add(w, ids, (int64_t)(draw % (uint64_t)(2 * n->length + 1)), 0));
    }
    check(ht_shard_writer_finish(w, NULL, NULL));
    ht_shard_writer_free(w);
    free(ids);
}

static void measure(const char *folder, const struct numbers *n)
{
    static char paths[HT_LOADER_MAX_DATASETS][4096];
    struct ht_loader_dataset datasets[HT_LOADER_MAX_DATASETS];
    const struct ht_batch *b = NULL;
    struct ht_loader *l;

    for (int d = 0; d < n->datasets; d++) {
        snprintf(paths[d], sizeof paths[d], "%s/bench-%d.h5", folder, d);
        write_shard(paths[d], n, (uint64_t)d);
        datasets[d] = (struct ht_loader_dataset){ paths[d], 1.0 + d };
    }
    check(ht_loader_open(&l, &(struct ht_loader_options){ .n_datasets = (int)n->datasets,
                                                          .datasets = datasets,
                                                          .seq_len = n->seq,
                                                          .rows_per_step = n->rows,
                                                          .micro_rows = n->rows / n->ranks,
                                                          .rank = (int)n->ranks / 2,
                                                          .n_ranks = (int)n->ranks,
                                                          .seed = 1,
                                                          .shuffle = true,
                                                          .window_rows = n->window }));
    double first_s = 0.0, longest_s = 0.0, sum_s = 0.0;
    for (int64_t step = 0; step <= n->steps; step++) { // the first also walks the first window
        double s;
        check(ht_loader_next(l, &b, &s));
        if (step == 0)
            first_s = s;
        else
            sum_s += s;
        if (step > 0 && s > longest_s) longest_s = s;
    }
    const double tokens = (double)(n->steps * n->rows * n->seq);
    printf(
        "{\"docs\": %lld, \"mean_length\": %lld, \"datasets\": %lld, \"seq\": %lld, \"rows\": "
        "%lld, "
        "\"ranks\": %lld, \"window\": %lld, \"steps\": %lld, \"first_s\": %.4f, \"step_s\": %.6f, "
        "\"longest_step_s\": %.6f, \"tokens_per_s\": %.4g, \"own_tokens_per_s\": %.4g}\n",
        (long long)n->docs, (long long)n->length, (long long)n->datasets, (long long)n->seq,
        (long long)n->rows, (long long)n->ranks, (long long)n->window, (long long)n->steps, first_s,
        sum_s / (double)n->steps, longest_s, tokens / sum_s, tokens / sum_s / (double)n->ranks);
    ht_loader_close(l);
    for (int d = 0; d < n->datasets; d++) remove(paths[d]);
}

int main(int argc, char **argv)
{
    struct numbers n = { 200000, 500, 1, 4096, 64, 1, 8192, 100 };
    int64_t *const at[] = { &n.docs, &n.length, &n.datasets, &n.seq,
                            &n.rows, &n.ranks,  &n.window,   &n.steps };
    static const struct option options[] = { { "docs", 1, NULL, 0 },     { "length", 1, NULL, 1 },
                                             { "datasets", 1, NULL, 2 }, { "seq", 1, NULL, 3 },
                                             { "rows", 1, NULL, 4 },     { "ranks", 1, NULL, 5 },
                                             { "window", 1, NULL, 6 },   { "steps", 1, NULL, 7 },
                                             { NULL, 0, NULL, 0 } };

    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c < 0 || c > 7) return 2;
        *at[c] = strtoll(optarg, NULL, 10);
    }
    if (optind != argc - 1 || n.docs < 1 || n.length < 1 || n.datasets < 1 ||
        n.datasets > HT_LOADER_MAX_DATASETS || n.ranks < 1 || n.rows % n.ranks || n.steps < 1) {
        fprintf(stderr, "usage: bench_data_loader FOLDER [--docs N] [--length N] [--datasets N] "
                        "[--seq N] [--rows N] [--ranks N] [--window N] [--steps N]\n");
        return 2;
    }
    measure(argv[optind], &n);
    return 0;
}
