/* training/schedule.h: learning rate of each optimiser step (spec 6.3, the formulas of fms-fsdp).
 *
 *   x = step + 1    the update's number, so the first one moves weights and the last one reaches
 * the end S total steps   w warm-up steps   D decay steps of WSD   r = min_lr_ratio
 *
 *   warm(x)     = x/w  or  1 - (1 - x/w)^2           linear, quadratic; 1 from x = w on
 *   cosine(x)   = r + (1 - r) (1 + cos(pi x/S)) / 2
 *   linear(x)   = r + (1 - r) (1 - x/S)
 *   constant(x) = 1
 *   wsd(x)      = 1 - (1 - r) max(0, x - (S - D)) / D
 *   lr          = lr_peak * min(warm(x), kind(x))     "min": the decay runs from x = 0, below the
 * warm-up
 */
#ifndef HT_TRAINING_SCHEDULE_H
#define HT_TRAINING_SCHEDULE_H

#include "core/config/config.h"

/* step counts from 0; from total_steps on, the last value stays. */
double ht_lr_at(const struct ht_schedule_config *s, const struct ht_optimizer_config *o,
                int64_t step, int64_t total_steps);

#endif
