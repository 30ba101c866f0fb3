/* bench/hybridbench/samples.h: a growing list of measurements and its order statistics. */
#ifndef HT_BENCH_SAMPLES_H
#define HT_BENCH_SAMPLES_H

#include <stdbool.h>
#include <stddef.h>

#include "core/base/status.h"

struct ht_samples { // zero-initialise, free with ht_samples_free
    double *values;
    size_t n, capacity;
    bool sorted;
};

enum ht_status ht_samples_add(struct ht_samples *s, double value);
void ht_samples_free(struct ht_samples *s);

double ht_samples_mean(const struct ht_samples *s); // NAN when empty

/* The q-quantile (0..1), linear between neighbours (Hyndman & Fan type 7, as numpy's default); NAN
 * when empty. Sorts in place. */
double ht_samples_quantile(struct ht_samples *s, double q);

#endif
