/* inference/sampler_cpu.c: the passes of sampler_cpu.h, a vector of logits at a time. */
#include "inference/sampler_cpu.h"

#include <math.h>
#include <string.h>

#include "core/base/simd.h"

enum { LANES = HT_VLEN, HALF = LANES / 2 };

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef float vf_half __attribute__((vector_size(HALF * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef double vd __attribute__((vector_size(HALF * 8)));
typedef int64_t vl __attribute__((vector_size(HALF * 8)));

ht_sampler_scan_fn HT_ISA_FN(ht_sampler_scan);
ht_sampler_buckets_fn HT_ISA_FN(ht_sampler_buckets);
ht_sampler_sums_fn HT_ISA_FN(ht_sampler_sums);

/* LANES logits, NaN beyond the row's end. */
static inline vf load(const float *x, int64_t left)
{
    vf v;

    if (left >= LANES) {
        memcpy(&v, x, sizeof v);
        return v;
    }
    for (int i = 0; i < LANES; i++) v[i] = i < left ? x[i] : NAN;
    return v;
}

/* All bits set where finite. */
static inline vi is_finite(vf v)
{
    return ((vi)v & 0x7f800000) != 0x7f800000;
}

static inline vf choose(vi mask, vf a, vf b)
{
    return (vf)((mask & (vi)a) | (~mask & (vi)b));
}

void HT_ISA_FN(ht_sampler_scan)(struct ht_sampler_row *row)
{
    vf top = (vf){ 0 } - INFINITY, low = (vf){ 0 } + INFINITY;
    vi count = { 0 };

    for (int64_t i = 0; i < row->n; i += LANES) {
        const vf v = load(row->logits + i, row->n - i);
        const vi ok = is_finite(v);
        top = choose(ok & (vi)(v > top), v, top);
        low = choose(ok & (vi)(v < low), v, low);
        count -= ok;
    }
    row->top = -INFINITY;
    row->low = INFINITY;
    row->n_finite = 0;
    for (int i = 0; i < LANES; i++) {
        row->top = top[i] > row->top ? top[i] : row->top;
        row->low = low[i] < row->low ? low[i] : row->low;
        row->n_finite += count[i];
    }
}

static inline vi buckets_of(const struct ht_sampler_row *row, vf v, vi ok)
{
    const vf far = (vf){ 0 } + (float)(HT_SAMPLER_BUCKETS - 1);
    vf at = (row->top - v) * row->scale;

    at = choose((vi)(at < far), at, far); // NaN: the last one
    const vi bucket = __builtin_convertvector(at, vi);
    return (ok & bucket) | (~ok & HT_SAMPLER_BUCKETS);
}

void HT_ISA_FN(ht_sampler_buckets)(const struct ht_sampler_row *row, int64_t from, int64_t n,
                                   int32_t *bucket)
{
    for (int64_t i = 0; i < n; i += LANES) {
        const vf v = load(row->logits + from + i, n - i);
        const vi at = buckets_of(row, v, is_finite(v));
        memcpy(bucket + i, &at, sizeof at);
    }
}

/* exp(x) for x <= 0 to 1e-15 of itself; 0 below -700, where it is nothing beside exp(0) = 1. */
static inline vd exp_of(vd x)
{
    static const double coefficient[] = { // of Taylor's series; |r| <= ln(2) / 2
                                          1.0 / 6227020800.0,
                                          1.0 / 479001600.0,
                                          1.0 / 39916800.0,
                                          1.0 / 3628800.0,
                                          1.0 / 362880.0,
                                          1.0 / 40320.0,
                                          1.0 / 5040.0,
                                          1.0 / 720.0,
                                          1.0 / 120.0,
                                          1.0 / 24.0,
                                          1.0 / 6.0,
                                          0.5,
                                          1.0,
                                          1.0
    };
    const double shift = 0x1.8p52; // adding it rounds to an integer in the low bits
    const vl in_range = (vl)(x > -700.0);

    x = (vd)((vl)x & in_range);
    const vd t = x * 0x1.71547652b82fep0 + shift, n = t - shift;
    const vd r = x - n * 0x1.62e42fee00000p-1 - n * 0x1.a39ef35793c76p-33;
    vd p = (vd){ 0 } + coefficient[0];
    for (unsigned i = 1; i < sizeof coefficient / sizeof *coefficient; i++)
        p = p * r + coefficient[i];
    p = (vd)((vl)p + ((vl)t << 52)); // * 2^n
    return (vd)((vl)p & in_range);
}

void HT_ISA_FN(ht_sampler_sums)(const struct ht_sampler_row *row, double *sum)
{
    const double top = (double)row->top, temperature = row->temperature;

    for (int64_t i = 0; i < row->n; i += LANES) {
        const vf v = load(row->logits + i, row->n - i);
        const vi at = buckets_of(row, v, is_finite(v));
        vf_half half[2];
        memcpy(half, &v, sizeof half);
        const vd w0 = exp_of((__builtin_convertvector(half[0], vd) - top) / temperature);
        const vd w1 = exp_of((__builtin_convertvector(half[1], vd) - top) / temperature);
        // those that are not finite go to the sum behind the buckets, which nobody reads
        for (int j = 0; j < HALF; j++) sum[at[j]] += w0[j];
        for (int j = 0; j < HALF; j++) sum[at[HALF + j]] += w1[j];
    }
}
