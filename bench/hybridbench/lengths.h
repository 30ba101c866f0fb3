/* bench/hybridbench/lengths.h: length distributions of a load, from text:
 *
 *   128                     always
 *   uniform:64-512          every length equally often
 *   exp:200,2048            exponential with that mean, cut at the maximum
 *   lognormal:200,0.8,2048  median, sigma of the logarithm, cut at the maximum
 */
#ifndef HT_BENCH_LENGTHS_H
#define HT_BENCH_LENGTHS_H

#include <stdint.h>

#include "core/base/status.h"

enum ht_length_kind { HT_LENGTH_FIXED, HT_LENGTH_UNIFORM, HT_LENGTH_EXP, HT_LENGTH_LOGNORMAL };

struct ht_lengths {
    enum ht_length_kind kind;
    int64_t low, high; // every draw lies in [low, high]
    double centre, sigma;
};

/* HT_ERR_ARG quotes the text and says what is allowed; lengths are 1..10,000,000. name: the option.
 */
enum ht_status ht_lengths_parse(struct ht_lengths *out, const char *text, const char *name);

/* The i-th draw: a function of (seed, stream, i). */
int64_t ht_lengths_draw(const struct ht_lengths *l, uint64_t seed, uint64_t stream, uint64_t i);

#endif
