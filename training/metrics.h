/* training/metrics.h: what a run reports of itself: metrics.jsonl, TensorBoard, a progress line,
 * log lines.
 *
 * runs/NAME/metrics.jsonl has one JSON object per line, flushed per line:
 *
 *   {"step": 12, "tokens": 98304, "time": 1763885000.1, "train/loss": 5.1, ...,
 * "memory/peak_bytes": 1e9}
 *   {"step": 20, "tokens": ..., "time": ..., "eval/loss": 4.9, "eval/perplexity": 134.3}
 *
 * Names are those of TensorBoard's tags. Values that do not apply are left out; a loss that is not
 * a number is null. After a resume at step s, lines of later steps start with {"superseded": true,
 * and the readers here skip them. A full disk must not end a run: failed writes are warned of once.
 *
 * Rank 0 only; every function accepts NULL and then does nothing, so that callers need no test.
 */
#ifndef HT_TRAINING_METRICS_H
#define HT_TRAINING_METRICS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "core/base/log.h"
#include "core/base/status.h"

struct ht_metrics;

struct ht_metrics_options {
    const char *dir;    // run folder, exists
    int64_t start_step; // finished steps: 0, or where a checkpoint resumed
    int64_t total_steps;
    int64_t log_every; // steps between log lines; 0 = none
    int n_ranks;       // for tokens per second per device
    double peak_flops; // of all devices together, for MFU; 0 = not known
    bool tensorboard;
    const struct ht_log *log; // borrowed; may be NULL
};

struct ht_step_metrics {
    int64_t step, tokens; // finished, with this one
    double loss, z_loss;  // mean per label; z_loss 0: left out
    double grad_norm, lr; // norm before clipping
    int64_t step_tokens;  // of this step, all ranks
    double step_flops;    // model FLOPs of this step, all ranks; 0: left out
    double step_s, data_wait_s, comm_exposed_s, checkpoint_stall_s;
    int64_t skipped_steps;               // since step 0
    uint64_t resident_bytes, peak_bytes; // 0: asked of the system here
};

struct ht_eval_metrics {
    int64_t step, tokens;
    double loss;          // nats per label
    double bits_per_byte; // 0: left out
    int64_t n_labels;
    double seconds;
};

enum ht_status ht_metrics_open(struct ht_metrics **out, const struct ht_metrics_options *o);
void ht_metrics_step(struct ht_metrics *m, const struct ht_step_metrics *s);
void ht_metrics_eval(struct ht_metrics *m, const struct ht_eval_metrics *e);

/* Take the progress line off the terminal before something else is printed there. */
void ht_metrics_clear_line(struct ht_metrics *m);

/* Ends the progress line; files are complete without it. */
void ht_metrics_close(struct ht_metrics *m);

/* "1.3 k", "45.2 G": three digits and a prefix of 1000. Returns text. */
char *ht_metrics_si(char text[16], double value);
/* "3.1 GiB". */
char *ht_metrics_bytes(char text[16], uint64_t n_bytes);
/* "0:42", "1:05:09", "3 d 04:10". */
char *ht_metrics_duration(char text[48], double seconds);

#endif
