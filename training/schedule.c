/* training/schedule.c: the formulas of the header. */
#include "training/schedule.h"

#include <math.h>

static double warm(const struct ht_schedule_config *s, double x)
{
    const double w = (double)s->warmup_steps;

    if (x >= w) return 1.0;
    return s->warmup == HT_WARMUP_LINEAR ? x / w : 1.0 - (1.0 - x / w) * (1.0 - x / w);
}

static double decayed(const struct ht_schedule_config *s, double x, double total)
{
    const double r = (double)s->min_lr_ratio, d = (double)s->decay_steps;

    switch (s->kind) {
    case HT_SCHEDULE_COSINE: return r + (1.0 - r) * (1.0 + cos(M_PI * x / total)) / 2.0;
    case HT_SCHEDULE_LINEAR: return r + (1.0 - r) * (1.0 - x / total);
    case HT_SCHEDULE_CONSTANT: return 1.0;
    case HT_SCHEDULE_WSD:
        return d <= 0.0 || x <= total - d ? 1.0 : 1.0 - (1.0 - r) * (x - (total - d)) / d;
    }
    return 1.0;
}

double ht_lr_at(const struct ht_schedule_config *s, const struct ht_optimizer_config *o,
                int64_t step, int64_t total_steps)
{
    const double total = total_steps > 0 ? (double)total_steps : 1.0;
    const double x = fmin((double)step + 1.0, total);

    return (double)o->lr * fmin(warm(s, x), decayed(s, x, total));
}
