/* tests/core/base/test_team.c: the number of threads follows what passes cost. */
#include <check.h>
#include <stdlib.h>

#include "core/base/team.h"

static double lost; // cores that were taken away, so far

/* A pass that takes `cost[threads]` seconds, n times; time goes on in between, and cores are taken
 * away lost_per_s times in a second. Returns the threads of the last pass that was no trial, and in
 * *spent the time of all. */
static int run_beside(struct ht_team *t, int64_t rows, const double *cost, double *now, int n,
                      double lost_per_s, double *spent)
{
    int steady = 0;

    for (int i = 0; i < n; i++) {
        const int threads = ht_team_begin(t, rows, *now, (int64_t)lost);
        ck_assert_int_ge(threads, 1);
        ck_assert_int_le(threads, t->most > 1 ? t->most : 1);
        if (t->kind[t->current].trial == 0) steady = threads;
        *now += cost[threads];
        lost += cost[threads] * lost_per_s;
        if (spent) *spent += cost[threads];
        ht_team_end(t, *now, (int64_t)lost);
    }
    return steady;
}

static int run(struct ht_team *t, int64_t rows, const double *cost, double *now, int n,
               double *spent)
{
    return run_beside(t, rows, cost, now, n, 0.0, spent);
}

enum { TURNS = 150 }; // that a busy neighbour takes in a second

START_TEST(all_threads_while_they_help)
{
    const double cost[] = { 0, 0.033, 0.020 };
    struct ht_team t = { .most = 2 };
    double now = 100.0, spent = 0.0;

    ck_assert_int_eq(run(&t, 1, cost, &now, 5000, &spent), 2);
    ck_assert(spent < 1.0001 * 5000 * 0.020); // nobody takes a core: no trials
}
END_TEST

/* A busy neighbour makes two threads ten times slower; it leaves again. */
START_TEST(gives_way_and_comes_back)
{
    const double free[] = { 0, 0.033, 0.020 }, busy[] = { 0, 0.035, 0.250 };
    struct ht_team t = { .most = 2 };
    double now = 0.0, spent = 0.0;

    ck_assert_int_eq(run(&t, 1, free, &now, 300, NULL), 2);
    run_beside(&t, 1, busy, &now, 30, TURNS, NULL); // time to notice
    ck_assert_int_eq(run_beside(&t, 1, busy, &now, 1000, TURNS, &spent), 1);
    ck_assert(spent < 1.15 * 1000 * 0.035);
    run(&t, 1, free, &now, 150, NULL);
    ck_assert_int_eq(run(&t, 1, free, &now, 300, NULL), 2);
}
END_TEST

/* Sixteen cores, one of them taken: fifteen threads, not one. */
START_TEST(leaves_one_core)
{
    double cost[17] = { 0 };
    struct ht_team t = { .most = 16 };
    double now = 0.0;

    for (int n = 1; n <= 16; n++) cost[n] = 0.001 + 0.2 / n + (n == 16 ? 0.3 : 0.0);
    run_beside(&t, 1, cost, &now, 2000, TURNS, NULL);
    ck_assert_int_ge(run_beside(&t, 1, cost, &now, 100, TURNS, NULL), 8);
    ck_assert_int_lt(run_beside(&t, 1, cost, &now, 100, TURNS, NULL), 16);
}
END_TEST

/* Prompts and single tokens are told apart; one thread tries nothing. */
START_TEST(kinds_are_apart)
{
    const double many[] = { 0, 2.0, 1.0 }, one[] = { 0, 0.02, 0.3 };
    struct ht_team t = { .most = 2 }, alone = { .most = 1 };
    double now = 0.0;

    for (int i = 0; i < 300; i++) {
        run_beside(&t, 512, many, &now, 1, TURNS, NULL);
        run_beside(&t, 1, one, &now, 1, TURNS, NULL);
    }
    ck_assert_int_eq(run(&t, 512, many, &now, 2, NULL), 2);
    ck_assert_int_eq(run(&t, 1, one, &now, 2, NULL), 1);
    ck_assert_int_eq(run(&t, INT64_MAX, many, &now, 2, NULL), 2);
    ck_assert_int_eq(run(&alone, 1, many, &now, 100, NULL), 1);
}
END_TEST

/* Blocks of a prompt take a second each and grow: a neighbour that gains nothing there costs few
 * trials. */
START_TEST(long_passes_are_tried_seldom)
{
    struct ht_team t = { .most = 2 };
    double now = 0.0, spent = 0.0, want = 0.0;

    for (int i = 0; i < 100; i++) {
        const double cost[] = { 0, 2.0 + 0.02 * i, 1.0 + 0.01 * i };
        run_beside(&t, 512, cost, &now, 1, TURNS, &spent);
        want += cost[2];
    }
    ck_assert(spent < 1.15 * want);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("team");
    TCase *c = tcase_create("threads");

    tcase_add_test(c, all_threads_while_they_help);
    tcase_add_test(c, gives_way_and_comes_back);
    tcase_add_test(c, leaves_one_core);
    tcase_add_test(c, kinds_are_apart);
    tcase_add_test(c, long_passes_are_tried_seldom);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
