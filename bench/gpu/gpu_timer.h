/* bench/gpu/gpu_timer.h: events and random data on the device, for gpu_kernels.c. */
#ifndef HT_BENCH_GPU_TIMER_H
#define HT_BENCH_GPU_TIMER_H

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct gpu_timer; // a pair of events on the compute stream

enum ht_status gpu_timer_create(struct gpu_timer **out);
void gpu_timer_free(struct gpu_timer *t);
enum ht_status gpu_timer_start(struct gpu_timer *t, struct ht_backend *be);
/* Waits; milliseconds since start on the device's clock. */
enum ht_status gpu_timer_stop(struct gpu_timer *t, struct ht_backend *be, float *ms);

/* n values near a normal distribution times sd: power, and so the clock, depends on the data. */
enum ht_status gpu_fill(struct ht_backend *be, void *p, int64_t n, enum ht_dtype dtype, float sd,
                        uint32_t seed);
/* n numbers from 0 to below limit. */
enum ht_status gpu_fill_ids(struct ht_backend *be, int32_t *p, int64_t n, int32_t limit);

#endif
