/* tests/distributed/test_faults.c: jobs in which one rank dies, hangs or gives up: the others end
 * in time, with a message that names it and the right exit code. */
#include "tests/distributed/job.h"

static struct result r; // 64 KiB: not for the stack

START_TEST(a_whole_run_ends_well)
{
    run_job(&r, 3, "none", "30");
    ck_assert_msg(r.exit_code == 0, "exit %d: %s", r.exit_code, r.text);
    run_job(&r, 2, "requeue", "30");
    ck_assert_msg(r.exit_code == 75, "exit %d: %s", r.exit_code, r.text);
}
END_TEST

START_TEST(runs_without_mpirun)
{
    run_job(&r, 0, "none", "30");
    ck_assert_msg(r.exit_code == 0, "exit %d: %s", r.exit_code, r.text);
}
END_TEST

START_TEST(one_rank_alone_aborts_with_its_code)
{
    run_job(&r, 1, "bad usage", "x");
    ck_assert_int_eq(r.exit_code, 0);
}
END_TEST

static void expect_blame(const char *mode, const char *host_of)
{
    run_job(&r, 4, mode, "2");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    ck_assert_msg(strstr(r.text, host_of) != NULL, "%s", r.text);
    ck_assert_msg(strstr(r.text, "timed out after 2 s") != NULL, "%s", r.text);
    ck_assert_msg(strstr(r.text, "reduce-scatter") || strstr(r.text, "sum"), "%s", r.text);
    // nobody else is blamed for data that did not come
    ck_assert_ptr_null(strstr(r.text, "nothing came from rank 0"));
    ck_assert_ptr_null(strstr(r.text, "nothing came from rank 1"));
    ck_assert_ptr_null(strstr(r.text, "nothing came from rank 3"));
    ck_assert_double_le(r.seconds, 2 + 5 + 5); // time-out, our promise, mpirun's own end
}

START_TEST(a_stopped_rank_is_named)
{
    expect_blame("stop", "nothing came from rank 2 on ");
}
END_TEST

START_TEST(a_sleeping_rank_is_named)
{
    expect_blame("sleep", "nothing came from rank 2 on ");
}
END_TEST

START_TEST(an_abort_takes_all_with_its_code_and_message)
{
    run_job(&r, 4, "abort", "30");
    ck_assert_msg(r.exit_code == 7, "exit %d: %s", r.exit_code, r.text);
    const char *first = strstr(r.text, "loss is nan at step 20");
    ck_assert_ptr_nonnull(first);
    ck_assert_ptr_null(strstr(first + 1, "loss is nan at step 20")); // said once
    ck_assert_ptr_nonnull(strstr(r.text, "rank 2 of 4"));
    ck_assert_double_le(r.seconds, 10);
}
END_TEST

START_TEST(a_killed_rank_ends_the_job)
{
    run_job(&r, 4, "kill", "30");
    ck_assert_msg(r.exit_code == 137 || r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    ck_assert_double_le(r.seconds, 10);
}
END_TEST

START_TEST(a_rank_that_leaves_ends_the_job)
{
    run_job(&r, 3, "leave", "30");
    ck_assert_msg(r.exit_code != 0, "exit %d: %s", r.exit_code, r.text);
    ck_assert_double_le(r.seconds, 10);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("faults");
    TCase *tc = tcase_create("faults");

    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, a_whole_run_ends_well);
    tcase_add_test(tc, runs_without_mpirun);
    tcase_add_test(tc, one_rank_alone_aborts_with_its_code);
    tcase_add_test(tc, a_stopped_rank_is_named);
    tcase_add_test(tc, a_sleeping_rank_is_named);
    tcase_add_test(tc, an_abort_takes_all_with_its_code_and_message);
    tcase_add_test(tc, a_killed_rank_ends_the_job);
    tcase_add_test(tc, a_rank_that_leaves_ends_the_job);
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_set_fork_status(sr, CK_NOFORK); // the suite forks itself
    srunner_run_all(sr, CK_ENV);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return n_failed != 0;
}
