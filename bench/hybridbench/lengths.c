/* bench/hybridbench/lengths.c: parsing and drawing. */
#include "bench/hybridbench/lengths.h"

#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "core/base/rng.h"

enum { MOST = 10000000 };

static enum ht_status bad(const char *text, const char *name)
{
    return HT_FAIL(HT_ERR_ARG,
                   "%s: \"%s\" is not a length; use N, uniform:LOW-HIGH, exp:MEAN,MAX or "
                   "lognormal:MEDIAN,SIGMA,MAX with lengths from 1 to %d",
                   name, text, MOST);
}

enum ht_status ht_lengths_parse(struct ht_lengths *out, const char *text, const char *name)
{
    struct ht_lengths l = { .low = 1 };
    long long low = 1, high = 0;
    int end = -1;
    const int n_text = (int)strlen(text);

    if (sscanf(text, "%lld%n", &high, &end) == 1 && end == n_text) {
        l.kind = HT_LENGTH_FIXED;
        low = high;
    } else if (sscanf(text, "uniform:%lld-%lld%n", &low, &high, &end) == 2 && end == n_text) {
        l.kind = HT_LENGTH_UNIFORM;
    } else if (sscanf(text, "exp:%lf,%lld%n", &l.centre, &high, &end) == 2 && end == n_text) {
        l.kind = HT_LENGTH_EXP;
    } else if (sscanf(text, "lognormal:%lf,%lf,%lld%n", &l.centre, &l.sigma, &high, &end) == 3 &&
               end == n_text) {
        l.kind = HT_LENGTH_LOGNORMAL;
    } else {
        return bad(text, name);
    }
    const bool drawn = l.kind == HT_LENGTH_EXP || l.kind == HT_LENGTH_LOGNORMAL;
    if (low < 1 || high < low || high > MOST) return bad(text, name);
    if (drawn && !(l.centre >= 1.0 && l.centre <= (double)high)) return bad(text, name);
    if (l.kind == HT_LENGTH_LOGNORMAL && !(l.sigma >= 0.0 && l.sigma <= 10.0))
        return bad(text, name);
    l.low = low;
    l.high = high;
    *out = l;
    return HT_OK;
}

int64_t ht_lengths_draw(const struct ht_lengths *l, uint64_t seed, uint64_t stream, uint64_t i)
{
    double v = (double)l->high;

    switch (l->kind) {
    case HT_LENGTH_FIXED: return l->high;
    case HT_LENGTH_UNIFORM: {
        const uint64_t span = (uint64_t)(l->high - l->low) + 1;
        return l->low + (int64_t)(ht_rng_u64(seed, stream, i) % span);
    }
    case HT_LENGTH_EXP: v = -l->centre * log1p(-(double)ht_rng_uniform(seed, stream, i)); break;
    case HT_LENGTH_LOGNORMAL:
        v = l->centre * exp(l->sigma * (double)ht_rng_normal(seed, stream, i));
        break;
    }
    v = rint(v);
    if (v > (double)l->high) v = (double)l->high;
    return v < (double)l->low ? l->low : (int64_t)v;
}
