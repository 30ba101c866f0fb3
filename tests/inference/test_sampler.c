/* tests/inference/test_sampler.c: truncation, frequencies, reproducibility and refusals of the
 * sampler. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/isa.h"
#include "core/base/rng.h"
#include "inference/sampler.h"

static const struct ht_sampler_options plain = {
    .temperature = 1.0f, .top_p = 1.0f, .repetition_penalty = 1.0f, .seed = 5
};

static struct ht_sampler *make(struct ht_sampler_options o, int64_t n)
{
    struct ht_sampler *s;
    ck_assert_msg(ht_sampler_create(&s, &o, n) == HT_OK, "%s", ht_error_message());
    return s;
}

static void count(struct ht_sampler *s, const float *logits, int n, int draws, int *hits)
{
    float copy[16];
    memset(hits, 0, (size_t)n * sizeof *hits);
    for (int i = 0; i < draws; i++) {
        int32_t id;
        memcpy(copy, logits, (size_t)n * sizeof *copy);
        ck_assert_int_eq(ht_sampler_pick(s, copy, i, &id), HT_OK);
        ck_assert_int_ge(id, 0);
        ck_assert_int_lt(id, n);
        hits[id]++;
    }
}

START_TEST(greedy_takes_the_largest_and_skips_nan)
{
    struct ht_sampler_options o = plain;
    o.temperature = 0.0f;
    struct ht_sampler *s = make(o, 5);
    float logits[5] = { 1.0f, NAN, 3.0f, 3.0f, -INFINITY };
    int32_t id;
    ck_assert_int_eq(ht_sampler_pick(s, logits, 0, &id), HT_OK);
    ck_assert_int_eq(id, 2); // ties to the lowest id
    float none[5] = { NAN, NAN, INFINITY, -INFINITY, NAN };
    ck_assert_int_eq(ht_sampler_pick(s, none, 0, &id), HT_ERR_NUMERIC);
    ht_sampler_free(s);
}
END_TEST

START_TEST(frequencies_follow_the_softmax)
{
    const float logits[4] = { 0.0f, logf(2.0f), logf(4.0f), logf(1.0f) };
    const double p[4] = { 1.0 / 8, 2.0 / 8, 4.0 / 8, 1.0 / 8 };
    struct ht_sampler *s = make(plain, 4);
    int hits[4];
    count(s, logits, 4, 20000, hits);
    for (int i = 0; i < 4; i++) // five standard deviations
        ck_assert_double_le(fabs(hits[i] - 20000 * p[i]), 5.0 * sqrt(20000 * p[i] * (1.0 - p[i])));
    ht_sampler_free(s);
}
END_TEST

START_TEST(truncations_keep_what_they_promise)
{
    const float logits[5] = { logf(50.0f), logf(30.0f), logf(15.0f), logf(4.0f), logf(1.0f) };
    struct ht_sampler_options o = plain;
    int hits[5];

    o.top_k = 2;
    struct ht_sampler *s = make(o, 5);
    count(s, logits, 5, 3000, hits);
    ck_assert(hits[0] && hits[1] && !hits[2] && !hits[3] && !hits[4]);
    ht_sampler_free(s);
    o.top_k = 0;
    o.top_p = 0.9f; // 0.5 + 0.3 < 0.9 <= 0.95
    s = make(o, 5);
    count(s, logits, 5, 3000, hits);
    ck_assert(hits[0] && hits[1] && hits[2] && !hits[3] && !hits[4]);
    ht_sampler_free(s);
    o.top_p = 1.0f;
    o.min_p = 0.07f; // 0.07 * 0.5 = 0.035
    s = make(o, 5);
    count(s, logits, 5, 5000, hits);
    ck_assert(hits[0] && hits[1] && hits[2] && hits[3] && !hits[4]);
    ht_sampler_free(s);
}
END_TEST

START_TEST(the_draw_depends_on_seed_and_position_only)
{
    const float logits[8] = { 0 };
    float copy[8];
    struct ht_sampler_options o = plain;
    int32_t first[50], id, same = 0;
    struct ht_sampler *a = make(plain, 8), *b = make(plain, 8);
    o.seed = 6;
    struct ht_sampler *c = make(o, 8);
    for (int i = 0; i < 50; i++) {
        memcpy(copy, logits, sizeof copy);
        ck_assert_int_eq(ht_sampler_pick(a, copy, i, &first[i]), HT_OK);
    }
    for (int i = 49; i >= 0; i--) {
        memcpy(copy, logits, sizeof copy);
        ck_assert_int_eq(ht_sampler_pick(b, copy, i, &id), HT_OK);
        ck_assert_int_eq(id, first[i]);
        ck_assert_int_eq(ht_sampler_pick(c, copy, i, &id), HT_OK);
        same += id == first[i];
    }
    ck_assert_int_lt(same, 25);
    ht_sampler_free(a);
    ht_sampler_free(b);
    ht_sampler_free(c);
}
END_TEST

START_TEST(repetition_penalty_lowers_seen_tokens)
{
    struct ht_sampler_options o = plain;
    o.temperature = 0.0f;
    o.repetition_penalty = 2.0f;
    struct ht_sampler *s = make(o, 3);
    float logits[3] = { 3.0f, 2.0f, -1.0f };
    int32_t id;
    ht_sampler_accept(s, 0);
    ht_sampler_accept(s, 2);
    ck_assert_int_eq(ht_sampler_pick(s, logits, 0, &id), HT_OK);
    ck_assert_int_eq(id, 1);
    ck_assert(logits[0] == 1.5f && logits[1] == 2.0f && logits[2] == -2.0f);
    ht_sampler_free(s);
}
END_TEST

/* ---- the definition, by sorting everything ---- */

struct candidate {
    float logit;
    int32_t id;
};

static int larger_first(const void *pa, const void *pb)
{
    const struct candidate *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit < b->logit ? 1 : -1;
    return a->id < b->id ? -1 : 1;
}

static int32_t slow_pick(const struct ht_sampler_options *o, const float *logits, int64_t n_logits,
                         int64_t position)
{
    struct candidate *c = calloc((size_t)n_logits, sizeof *c);
    double *w = calloc((size_t)n_logits, sizeof *w), total = 0.0, kept = 0.0;
    int64_t n = 0, k = 0, chosen = 0;

    for (int64_t i = 0; i < n_logits; i++)
        if (isfinite(logits[i])) c[n++] = (struct candidate){ logits[i], (int32_t)i };
    qsort(c, (size_t)n, sizeof *c, larger_first);
    if (o->top_k > 0 && o->top_k < n) n = o->top_k;
    for (int64_t i = 0; i < n; i++)
        total += w[i] = exp(((double)c[i].logit - (double)c[0].logit) / (double)o->temperature);
    while (k < n && kept < (double)o->top_p * total && (k == 0 || w[k] >= (double)o->min_p * w[0]))
        kept += w[k++];
    double left =
        (double)(ht_rng_u64(o->seed, ht_rng_stream("sampler"), (uint64_t)position) >> 11) *
        0x1p-53 * kept;
    while (chosen + 1 < k && left >= w[chosen]) left -= w[chosen++];
    const int32_t id = c[chosen].id;
    free(c);
    free(w);
    return id;
}

// shapes of a row: normal, peaked, all the same, few values, narrow, with NaN and infinities, wide
enum { N_ROWS = 7 };

static void row_of(float *x, int64_t n, int kind)
{
    for (int64_t i = 0; i < n; i++) {
        const float v = ht_rng_normal(11, (uint64_t)kind, (uint64_t)i);
        x[i] = 3.0f * v;
        if (kind == 1 && i % 97 == 5) x[i] += 12.0f;
        if (kind == 2) x[i] = 0.25f;
        if (kind == 3) x[i] = (float)(i * 7 % 5);
        if (kind == 4) x[i] = 1.0f + 1e-6f * v;
        if (kind == 5 && i % 3 == 0) x[i] = i % 2 ? NAN : i % 4 ? INFINITY : -INFINITY;
        if (kind == 6) x[i] = v * 1e37f;
    }
}

START_TEST(every_setting_draws_what_sorting_draws)
{
    static const int64_t sizes[] = { 1, 2, 17, 65, 1000, 5003 };
    static const float temperatures[] = { 1e-30f, 0.05f, 0.7f, 1.0f, 3.0f, 100.0f };
    static const int64_t top_k[] = { 0, 1, 2, 40, 100000 };
    static const float top_p[] = { 1.0f, 0.95f, 0.3f, 1e-6f },
                       min_p[] = { 0.0f, 0.05f, 0.9f, 1e-30f };
    static float row[5003], copy[5003];
    const int64_t n = sizes[_i / N_ROWS];

    row_of(row, n, _i % N_ROWS);
    row[0] = 1.0f; // finite, whatever the kind
    for (int t = 0; t < 6; t++)
        for (int k = 0; k < 5; k++)
            for (int p = 0; p < 16; p++) {
                struct ht_sampler_options o = plain;
                o.temperature = temperatures[t];
                o.top_k = top_k[k];
                o.top_p = top_p[p % 4];
                o.min_p = min_p[p / 4];
                struct ht_sampler *s = make(o, n);
                for (int i = 0; i < 4; i++) {
                    int32_t id;
                    memcpy(copy, row, (size_t)n * sizeof *copy);
                    ck_assert_int_eq(ht_sampler_pick(s, copy, i, &id), HT_OK);
                    ck_assert_int_eq(id, slow_pick(&o, row, n, i));
                }
                ht_sampler_free(s);
            }
}
END_TEST

START_TEST(every_cpu_level_draws_the_same)
{
    static float row[5003], copy[5003];
    struct ht_sampler_options o = plain;
    const char *before = getenv("HT_CPU_ISA");
    char *kept = before ? strdup(before) : NULL;

    row_of(row, 5003, 1);
    o.top_p = 0.9f;
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++) {
        setenv("HT_CPU_ISA", ht_isa_name((enum ht_isa)isa), 1);
        struct ht_sampler *s = make(o, 5003);
        for (int i = 0; i < 50; i++) {
            int32_t id;
            memcpy(copy, row, sizeof copy);
            ck_assert_int_eq(ht_sampler_pick(s, copy, i, &id), HT_OK);
            ck_assert_int_eq(id, slow_pick(&o, row, 5003, i));
        }
        ht_sampler_free(s);
    }
    if (kept)
        setenv("HT_CPU_ISA", kept, 1);
    else
        unsetenv("HT_CPU_ISA");
    free(kept);
}
END_TEST

START_TEST(penalties_and_biases_change_what_they_name)
{
    struct ht_sampler_options o = plain;
    o.repetition_penalty = 2.0f;
    o.frequency_penalty = 0.5f;
    o.presence_penalty = 0.25f;
    struct ht_sampler *s = make(o, 6);
    float x[6] = { 1.0f, 1.0f, -1.0f, 1.0f, 1.0f, 1.0f };
    const float want[6] = { 1.0f, 0.5f, -2.75f, 0.5f - 1.25f, 4.0f, 1.0f };
    int32_t id;

    ht_sampler_accept(s, 1);
    ht_sampler_accept(s, 1);
    ht_sampler_accept_generated(s, 2);
    ht_sampler_accept(s, 3);
    ht_sampler_accept_generated(s, 3);
    ht_sampler_accept_generated(s, 3);
    ht_sampler_accept_generated(s, 6); // outside: nothing
    ck_assert_int_eq(ht_sampler_bias(s, 4, -5.0f), HT_OK);
    ck_assert_int_eq(ht_sampler_bias(s, 4, 3.0f), HT_OK); // the last one counts
    ck_assert_int_eq(ht_sampler_bias(s, 6, 1.0f), HT_ERR_ARG);
    ck_assert_int_eq(ht_sampler_bias(s, 0, 101.0f), HT_ERR_ARG);
    ck_assert_int_eq(ht_sampler_pick(s, x, 0, &id), HT_OK);
    for (int i = 0; i < 6; i++) ck_assert_float_eq(x[i], want[i]);
    ht_sampler_free(s);
}
END_TEST

START_TEST(values_out_of_range_are_refused_by_name)
{
    static const float bad[] = { NAN, -1.0f, 1e9f, INFINITY };
    for (int i = 0; i < 4; i++) {
        struct ht_sampler *s;
        struct ht_sampler_options o = plain;
        o.temperature = bad[i];
        ck_assert_int_eq(ht_sampler_create(&s, &o, 4), HT_ERR_ARG);
        ck_assert_ptr_nonnull(strstr(ht_error_message(), "temperature"));
        o = plain, o.top_p = bad[i];
        ck_assert_int_eq(ht_sampler_create(&s, &o, 4), HT_ERR_ARG);
        o = plain, o.min_p = bad[i];
        ck_assert_int_eq(ht_sampler_create(&s, &o, 4), HT_ERR_ARG);
        o = plain, o.repetition_penalty = bad[i];
        ck_assert_int_eq(ht_sampler_create(&s, &o, 4), HT_ERR_ARG);
        ck_assert_ptr_null(s);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sampler");
    TCase *c = tcase_create("sampler");
    SRunner *r = srunner_create(s);

    suite_add_tcase(s, c);
    tcase_add_test(c, greedy_takes_the_largest_and_skips_nan);
    tcase_add_test(c, frequencies_follow_the_softmax);
    tcase_add_test(c, truncations_keep_what_they_promise);
    tcase_add_test(c, the_draw_depends_on_seed_and_position_only);
    tcase_add_test(c, repetition_penalty_lowers_seen_tokens);
    tcase_add_loop_test(c, every_setting_draws_what_sorting_draws, 0, 6 * N_ROWS);
    tcase_add_test(c, every_cpu_level_draws_the_same);
    tcase_add_test(c, penalties_and_biases_change_what_they_name);
    tcase_add_test(c, values_out_of_range_are_refused_by_name);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
