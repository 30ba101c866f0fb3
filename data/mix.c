/* data/mix.c: dataset choice by token deficit. */
#include "data/mix.h"

#include <math.h>

enum ht_status ht_mix_scale(int64_t *scaled, const double *weights, int n)
{
    double largest = 0.0;

    for (int d = 0; d < n; d++) {
        if (!(weights[d] >= 0.0) || !isfinite(weights[d]))
            return HT_FAIL(HT_ERR_ARG,
                           "weight of dataset %d is %g; it must be finite and not negative", d,
                           weights[d]);
        largest = fmax(largest, weights[d]);
    }
    if (largest == 0.0) return HT_FAIL(HT_ERR_ARG, "the weights of all %d datasets are 0", n);
    for (int d = 0; d < n; d++) {
        scaled[d] = (int64_t)llround(weights[d] / largest * 0x1p30);
        if (scaled[d] == 0 && weights[d] > 0.0) scaled[d] = 1;
    }
    return HT_OK;
}

int ht_mix_choose(const int64_t *scaled, const int64_t *tokens, int n)
{
    __int128 sum_tokens = 0, sum_scaled = 0, largest = 0;
    int best = -1;

    for (int d = 0; d < n; d++) {
        if (scaled[d] == 0) continue;
        sum_scaled += scaled[d];
        sum_tokens += tokens[d];
    }
    for (int d = 0; d < n; d++) {
        if (scaled[d] == 0) continue;
        const __int128 deficit = scaled[d] * sum_tokens - sum_scaled * tokens[d];
        if (best < 0 || deficit > largest) {
            best = d;
            largest = deficit;
        }
    }
    return best;
}
