/* training/metrics_file.h: reading and repairing metrics.jsonl (written by metrics.c). */
#ifndef HT_TRAINING_METRICS_FILE_H
#define HT_TRAINING_METRICS_FILE_H

#include <stdint.h>

#include "core/base/status.h"

/* A run goes on from start_step: lines of later steps get "superseded": true, a half line at the
 * end goes. The file is replaced by rename, and only when something changes; no file is fine. */
enum ht_status ht_metrics_file_supersede(const char *path, int64_t start_step);

struct ht_curve { // one value over steps
    int64_t n;
    double *step, *value; // (n)
};

struct ht_metrics_curves {
    struct ht_curve loss, lr, eval_loss; // train/loss, train/learning_rate, eval/loss
};

/* Valid lines that are not superseded; null values are left out. Lines that are not JSON objects
 * are skipped (a crash may leave one), an absent file is HT_ERR_IO. Free with
 * ht_metrics_curves_free. */
enum ht_status ht_metrics_file_read(struct ht_metrics_curves *out, const char *path);
void ht_metrics_curves_free(struct ht_metrics_curves *c);

#endif
