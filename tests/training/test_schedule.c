/* tests/training/test_schedule.c: learning rates against the formulas and values worked out by
 * hand. */
#include "temp_dir.h"

#include <float.h>
#include <math.h>

#include "training/schedule.h"

static const struct ht_optimizer_config peak = { .lr = 3e-4f };
static const double lr_peak = (double)3e-4f;

static double lr(enum ht_schedule kind, enum ht_warmup warmup, int64_t w, int64_t d, float r,
                 int64_t step, int64_t total)
{
    const struct ht_schedule_config s = {
        .kind = kind, .warmup = warmup, .warmup_steps = w, .decay_steps = d, .min_lr_ratio = r
    };
    return ht_lr_at(&s, &peak, step, total) / lr_peak;
}

#define NEAR(a, b) ck_assert_double_le(fabs((a) - (b)), 4 * DBL_EPSILON)

START_TEST(values_by_hand)
{
    const float tenth = 0.125f; // exact
    // cosine, no warm-up, 8 steps: x = 4 is the middle, x = 8 the end
    NEAR(lr(HT_SCHEDULE_COSINE, HT_WARMUP_LINEAR, 0, 0, 0, 3, 8), 0.5);
    NEAR(lr(HT_SCHEDULE_COSINE, HT_WARMUP_LINEAR, 0, 0, tenth, 3, 8), 0.5625);
    NEAR(lr(HT_SCHEDULE_COSINE, HT_WARMUP_LINEAR, 0, 0, tenth, 7, 8), 0.125);
    // linear
    NEAR(lr(HT_SCHEDULE_LINEAR, HT_WARMUP_LINEAR, 0, 0, 0, 1, 8), 0.75);
    NEAR(lr(HT_SCHEDULE_LINEAR, HT_WARMUP_LINEAR, 0, 0, 0, 7, 8), 0.0);
    NEAR(lr(HT_SCHEDULE_LINEAR, HT_WARMUP_LINEAR, 0, 0, 0.5f, 3, 8), 0.75);
    // constant after warm-up: x/4, then 1 - (1 - x/4)^2
    NEAR(lr(HT_SCHEDULE_CONSTANT, HT_WARMUP_LINEAR, 4, 0, 0, 0, 100), 0.25);
    NEAR(lr(HT_SCHEDULE_CONSTANT, HT_WARMUP_QUADRATIC, 4, 0, 0, 0, 100), 0.4375);
    NEAR(lr(HT_SCHEDULE_CONSTANT, HT_WARMUP_QUADRATIC, 4, 0, 0, 1, 100), 0.75);
    NEAR(lr(HT_SCHEDULE_CONSTANT, HT_WARMUP_QUADRATIC, 4, 0, 0, 3, 100), 1.0);
    NEAR(lr(HT_SCHEDULE_CONSTANT, HT_WARMUP_QUADRATIC, 4, 0, 0, 99, 100), 1.0);
    // WSD: whole until S - D = 12, then straight down to r
    NEAR(lr(HT_SCHEDULE_WSD, HT_WARMUP_LINEAR, 2, 8, 0.5f, 0, 20), 0.5);
    NEAR(lr(HT_SCHEDULE_WSD, HT_WARMUP_LINEAR, 2, 8, 0.5f, 11, 20), 1.0);
    NEAR(lr(HT_SCHEDULE_WSD, HT_WARMUP_LINEAR, 2, 8, 0.5f, 15, 20), 0.75);
    NEAR(lr(HT_SCHEDULE_WSD, HT_WARMUP_LINEAR, 2, 8, 0.5f, 19, 20), 0.5);
    NEAR(lr(HT_SCHEDULE_WSD, HT_WARMUP_LINEAR, 2, 0, 0.5f, 19, 20), 1.0);
}
END_TEST

START_TEST(bamba_schedule_is_that_of_fms_fsdp)
{
    // 2000 steps of quadratic warm-up, cosine to 1/30 (spec 6.1, 6.3); w = min(2000, steps/20)
    const int64_t total = 1280000;
    const double r = (double)(1.0f / 30);

    for (int64_t step = 0; step < total; step = step * 3 / 2 + 1) {
        const double x = (double)step + 1;
        const double u = fmin(x, 2000) / 2000;
        const double want =
            fmin(1 - (1 - u) * (1 - u), r + (1 - r) * 0.5 * (1 + cos(x / (double)total * M_PI)));
        NEAR(lr(HT_SCHEDULE_COSINE, HT_WARMUP_QUADRATIC, 2000, 0, 1.0f / 30, step, total), want);
    }
}
END_TEST

START_TEST(rates_are_sane_everywhere)
{
    for (int kind = HT_SCHEDULE_COSINE; kind <= HT_SCHEDULE_WSD; kind++)
        for (int warmup = HT_WARMUP_LINEAR; warmup <= HT_WARMUP_QUADRATIC; warmup++)
            for (int64_t total = 1; total < 40; total += 3)
                for (int64_t w = 0; w <= total + 5; w += 4) {
                    double last = 0;
                    bool fell = false;
                    for (int64_t step = 0; step < total + 5; step++) {
                        const double v = lr((enum ht_schedule)kind, (enum ht_warmup)warmup, w,
                                            total / 3, 0.1f, step, total);
                        ck_assert(v >= 0 && v <= 1);
                        if (step == 0 && total > 1) ck_assert(v > 0);
                        if (v < last) fell = true;
                        ck_assert(!fell || v <= last); // up once, down once
                        if (step >= total) ck_assert(v == last);
                        last = v;
                    }
                }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("schedule");
    TCase *tc = tcase_create("schedule");

    tcase_add_test(tc, values_by_hand);
    tcase_add_test(tc, bamba_schedule_is_that_of_fms_fsdp);
    tcase_add_test(tc, rates_are_sane_everywhere);
    suite_add_tcase(s, tc);
    return run_suite(s);
}
