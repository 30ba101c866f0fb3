/* training/plot.h: loss.svg and loss.png of a run, drawn by gnuplot from its metrics.jsonl. */
#ifndef HT_TRAINING_PLOT_H
#define HT_TRAINING_PLOT_H

#include "core/base/status.h"

/* Training loss (thin: as it was; bold: smoothed), held-out loss as points, learning rate on the
 * right axis. Both files appear by rename or not at all. title may hold any text.
 * HT_ERR_UNSUPPORTED when gnuplot is not installed (a caller warns and goes on), HT_ERR_IO when it
 * fails (its own words), HT_ERR_ARG without data. */
enum ht_status ht_plot_loss(const char *run_dir, const char *title);

#endif
