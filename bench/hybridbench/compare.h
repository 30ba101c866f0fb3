/* bench/hybridbench/compare.h: two models on the same engine: decoding and prefill over context and
 * batch, each beside what memory bandwidth and arithmetic allow.
 *
 * Contexts are not read token by token: keys and values of that many tokens are made up
 * (ht_pool_fill), which costs a pass the same. The models take turns, cell by cell and round by
 * round. A roof is the larger of bytes / (rate of a plain reading loop, between the rounds of the
 * same cell) and operations / (rate of the models' own products with 512 rows, in the same
 * process).
 */
#ifndef HT_HYBRIDBENCH_COMPARE_H
#define HT_HYBRIDBENCH_COMPARE_H

#include <stdint.h>
#include <stdio.h>

#include "core/base/status.h"

enum { HT_COMPARE_MOST = 16, HT_COMPARE_ROUNDS = 15, HT_COMPARE_NAME = 512 };

struct ht_compare_options {
    const char *path[2]; // model folders, or recipes: weights drawn at random then
    const char *weights; // format, as ht_loaded_open takes it
    int threads;         // 0: all cores
    double memory_bytes; // of one model: weights, states, keys and values
    int n_contexts, n_batches, rounds;
    int64_t context[HT_COMPARE_MOST], batch[HT_COMPARE_MOST]; // ascending
    double cell_s;                                            // time of one measurement at least
    FILE *progress;                                           // a line per cell; NULL
};

struct ht_compare_cell {        // of one model
    int64_t batch;              // 0: does not fit, see need_bytes
    double need_bytes;          // weights, states, keys and values
    double tokens_per_s;        // median of the rounds
    double p50_s, p90_s, p99_s; // of a step, over all rounds
    double roof_tokens_per_s, step_bytes, step_flop;
    double read_bytes_per_s; // of the reading loop between these rounds, median
    double resident_bytes;   // of this model meanwhile, as the system counts; decoding only
};

struct ht_compare_model {
    char path[HT_COMPARE_NAME];
    double weight_bytes, slot_bytes, token_bytes, n_matmul; // matmul parameters of a token
    struct ht_compare_cell decode[HT_COMPARE_MOST][HT_COMPARE_MOST + 1]; // [context][batch]; the
    // last: the largest batch that fits, where that is none of the list and below the list's last
    int best[HT_COMPARE_MOST];                       // of decode[context]; -1: nothing fits
    struct ht_compare_cell prefill[HT_COMPARE_MOST]; // a block of 512 tokens behind the context
};

struct ht_compare_result {
    struct ht_compare_model model[2];
    char weights[16];
    double flop_per_s;
    double peak_bytes; // of the process
    int threads;
};

enum ht_status ht_compare_run(struct ht_compare_result *out, const struct ht_compare_options *o);

/* The same figures as JSON, as Markdown tables, and as plots PREFIX-decode, -equal and
 * -latency.{svg,png} (gnuplot). "-": standard output. */
enum ht_status ht_compare_json(const struct ht_compare_result *r,
                               const struct ht_compare_options *o, const char *path);
enum ht_status ht_compare_table(const struct ht_compare_result *r,
                                const struct ht_compare_options *o, const char *path);
enum ht_status ht_compare_plot(const struct ht_compare_result *r,
                               const struct ht_compare_options *o, const char *prefix);

/* Figures of n files of ht_compare_json, each of other contexts, as if one run had measured them;
 * o becomes that run's options, its strings those of `out`. HT_ERR_FORMAT: not such a file;
 * HT_ERR_ARG: other models, weights, threads, memory, rounds or batches, or a context twice. */
enum ht_status ht_compare_merge(struct ht_compare_result *out, struct ht_compare_options *o,
                                const char *const *paths, int n);

/* Sets best[c] of a model from its cells. */
void ht_compare_pick_best(struct ht_compare_model *m, const struct ht_compare_options *o, int c);

/* Text, which it frees, to a file or standard output. */
enum ht_status ht_compare_publish(const char *path, char *text, size_t n);

#endif
