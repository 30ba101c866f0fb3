/* data/mix.h: which dataset gives the next document: the one furthest behind its share of tokens.
 *
 *   deficit[d] = W[d] * (tokens of all datasets so far) - (sum of W) * tokens[d]
 *
 * in 128-bit integers, largest first, ties to the lowest index, so the choice is exact and the same
 * on every rank. Between documents each dataset's share is within one document's length of its
 * weight.
 */
#ifndef HT_DATA_MIX_H
#define HT_DATA_MIX_H

#include <stdint.h>

#include "core/base/status.h"

/* Weights as integers in proportion, the largest 2^30; a weight above 0 gives at least 1.
 * HT_ERR_ARG: negative or not finite, or all 0. */
enum ht_status ht_mix_scale(int64_t *scaled, const double *weights, int n);

/* Index of the next dataset, or -1 when none is left. A scaled weight of 0 takes a dataset out. */
int ht_mix_choose(const int64_t *scaled, const int64_t *tokens, int n);

#endif
