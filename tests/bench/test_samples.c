/* tests/bench/test_samples.c: order statistics and drawn lengths. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/lengths.h"
#include "bench/hybridbench/samples.h"

START_TEST(quantiles_are_those_of_numpy)
{
    static const double values[] = { 7, 1, 3, 9, 5, 2 }; // sorted: 1 2 3 5 7 9
    struct ht_samples s = { 0 };

    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        ck_assert_int_eq(ht_samples_add(&s, values[i]), HT_OK);
    ck_assert_double_eq_tol(ht_samples_mean(&s), 4.5, 1e-12);
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 0.0), 1.0, 1e-12);
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 0.5), 4.0, 1e-12);
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 0.9), 8.0, 1e-12);
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 1.0), 9.0, 1e-12);
    ck_assert_int_eq(ht_samples_add(&s, 0.0), HT_OK); // sorted again after an addition
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 0.0), 0.0, 1e-12);
    ht_samples_free(&s);
    ck_assert(isnan(ht_samples_quantile(&s, 0.5)) && isnan(ht_samples_mean(&s)));
}
END_TEST

START_TEST(many_samples_grow_the_list)
{
    struct ht_samples s = { 0 };

    for (int i = 1000; i >= 0; i--) ck_assert_int_eq(ht_samples_add(&s, i), HT_OK);
    ck_assert_double_eq_tol(ht_samples_quantile(&s, 0.95), 950.0, 1e-9);
    ht_samples_free(&s);
}
END_TEST

/* Mean and bounds of 20,000 draws. */
static double mean_of(const struct ht_lengths *l)
{
    double sum = 0.0;

    for (uint64_t i = 0; i < 20000; i++) {
        const int64_t v = ht_lengths_draw(l, 1, 2, i);
        ck_assert_int_ge(v, l->low);
        ck_assert_int_le(v, l->high);
        ck_assert_int_eq(v, ht_lengths_draw(l, 1, 2, i));
        sum += (double)v;
    }
    return sum / 20000.0;
}

START_TEST(lengths_follow_their_distribution)
{
    struct ht_lengths l;

    ck_assert_int_eq(ht_lengths_parse(&l, "128", "--x"), HT_OK);
    ck_assert_double_eq_tol(mean_of(&l), 128.0, 1e-12);
    ck_assert_int_eq(ht_lengths_parse(&l, "uniform:64-512", "--x"), HT_OK);
    ck_assert_double_eq_tol(mean_of(&l), 288.0, 5.0); // 5 standard errors of 129.6 / sqrt(20000)
    ck_assert_int_eq(ht_lengths_parse(&l, "exp:100,100000", "--x"), HT_OK);
    ck_assert_double_eq_tol(mean_of(&l), 100.0, 3.6);
    ck_assert_int_eq(ht_lengths_parse(&l, "lognormal:100,0.5,100000", "--x"), HT_OK);
    ck_assert_double_eq_tol(mean_of(&l), 100.0 * exp(0.125), 2.2);
    ck_assert_int_eq(ht_lengths_parse(&l, "exp:100,120", "--x"), HT_OK);
    ck_assert_double_lt(mean_of(&l), 100.0); // cut
}
END_TEST

static const char *const refused[] = {
    "",       "0",         "-3",        "12x",      "uniform:9-3",      "uniform:0-3",
    "exp:5",  "exp:0.5,9", "exp:nan,9", "exp:10,9", "lognormal:5,-1,9", "10000001",
    "gauss:3"
};

START_TEST(bad_lengths_are_refused_with_their_text)
{
    struct ht_lengths l;

    ck_assert_int_eq(ht_lengths_parse(&l, refused[_i], "--prompt-words"), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "--prompt-words"));
    ck_assert_ptr_nonnull(strstr(ht_error_message(), refused[_i]));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("samples");
    TCase *t = tcase_create("all");
    tcase_add_test(t, quantiles_are_those_of_numpy);
    tcase_add_test(t, many_samples_grow_the_list);
    tcase_add_test(t, lengths_follow_their_distribution);
    tcase_add_loop_test(t, bad_lengths_are_refused_with_their_text, 0,
                        (int)(sizeof refused / sizeof *refused));
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
