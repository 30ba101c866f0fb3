/* inference/sampler_cpu.h: vectorised passes over a row of logits, for sampler.c alone.
 *
 * Buckets divide the finite logits by their distance from the largest one: bucket = trunc((top -
 * logit) * scale), at most HT_SAMPLER_BUCKETS - 1. A larger logit is never in a later bucket.
 */
#ifndef HT_INFERENCE_SAMPLER_CPU_H
#define HT_INFERENCE_SAMPLER_CPU_H

#include <stdint.h>

#include "core/base/isa.h"

enum { HT_SAMPLER_BUCKETS = 4096, HT_SAMPLER_BLOCK = 512 };

struct ht_sampler_row {
    const float *logits;
    int64_t n;
    // of the finite ones, by scan
    float top, low;
    int64_t n_finite;
    // by the caller
    float scale;
    double temperature;
};

typedef void ht_sampler_scan_fn(struct ht_sampler_row *row);
/* bucket (at most HT_SAMPLER_BLOCK) of logits from .. from + n - 1; HT_SAMPLER_BUCKETS for those
 * that are not finite. */
typedef void ht_sampler_buckets_fn(const struct ht_sampler_row *row, int64_t from, int64_t n,
                                   int32_t *bucket);
/* sum[bucket] += exp((logit - top) / temperature) over the row; sum has HT_SAMPLER_BUCKETS + 1
 * elements. */
typedef void ht_sampler_sums_fn(const struct ht_sampler_row *row, double *sum);

HT_ISA_DECLARE(ht_sampler_scan_fn, ht_sampler_scan);
HT_ISA_DECLARE(ht_sampler_buckets_fn, ht_sampler_buckets);
HT_ISA_DECLARE(ht_sampler_sums_fn, ht_sampler_sums);

#endif
