/* tests/emu/test_nccl_faults.c: jobs on emulated devices whose collectives hang, fail or lose a
 * rank: all ranks end in time with exit code 6 and a message that names rank, collective and
 * number.
 */
#include "tests/distributed/job.h"

static struct result r; // 64 KiB: not for the stack

static void job(const char *fault, int n_ranks, const char *mode, const char *timeout_s)
{
    if (fault)
        setenv("HT_EMU_NCCL", fault, 1);
    else
        unsetenv("HT_EMU_NCCL");
    run_job(&r, n_ranks, mode, timeout_s);
}

static void says(const char *text)
{
    ck_assert_msg(strstr(r.text, text) != NULL, "\"%s\" is not in: %s", text, r.text);
}

START_TEST(a_whole_run_ends_well)
{
    job(NULL, 3, "none", "20");
    ck_assert_msg(r.exit_code == 0, "exit %d: %s", r.exit_code, r.text);
    job(NULL, 0, "none", "20"); // without mpirun
    ck_assert_msg(r.exit_code == 0, "exit %d: %s", r.exit_code, r.text);
}
END_TEST

START_TEST(late_is_not_lost)
{
    job("late:1:9", 2, "none", "20");
    ck_assert_msg(r.exit_code == 0, "exit %d: %s", r.exit_code, r.text);
}
END_TEST

START_TEST(a_hanging_collective_is_named_by_every_rank)
{
    // with 3 ranks a step has 5 reduce-scatters, then 5 all-gathers
    job("hang:-1:18", 3, "none", "1");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("of 3 on ");
    says("all-gather ");
    says("timed out after 1 s on the device");
    says("all ranks of this host are in it");
    ck_assert_double_le(r.seconds, 15);
}
END_TEST

START_TEST(a_stopped_rank_is_named)
{
    job(NULL, 3, "stop", "2");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("rank 1 on ");
    says("timed out after 2 s");
    ck_assert_double_le(r.seconds, 20);
}
END_TEST

START_TEST(an_error_of_the_library_ends_the_run)
{
    job("async:1:3", 2, "none", "20");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("rank 1 of 2 on ");
    says("remote process exited");
    says("injected: the peer closed the connection");
    says("reduce-scatter");
    ck_assert_double_le(r.seconds, 15); // far below the time-out
}
END_TEST

START_TEST(a_call_that_fails_ends_the_run)
{
    job("call:0:6", 2, "none", "20");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("rank 0 of 2 on ");
    says("unhandled system error: injected");
}
END_TEST

START_TEST(a_call_that_is_never_accepted_times_out)
{
    job("stuck:-1:6", 2, "none", "1");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("NCCL did not accept it within 1 s");
}
END_TEST

START_TEST(connecting_fails_in_words)
{
    job("init-hang:-1:0", 2, "none", "1");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("connecting");
    job("init-error:1:0", 2, "none", "3");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("rank 1 of 2");
    job("id-error:0:0", 2, "none", "3");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("NCCL_SOCKET_IFNAME");
}
END_TEST

/* The abort hangs too and the device never comes back: the watchdog ends the process. */
START_TEST(a_dead_device_does_not_hang_the_job)
{
    setenv("HT_COMM_GRACE_S", "2", 1);
    job("deaf:-1:7", 2, "none", "1");
    unsetenv("HT_COMM_GRACE_S");
    ck_assert_msg(r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    says("the process did not come back from the device within 2 s");
    ck_assert_double_le(r.seconds, 20);
}
END_TEST

START_TEST(other_ends_are_as_on_the_cpu)
{
    job(NULL, 3, "kill", "20");
    ck_assert_msg(r.exit_code == 137 || r.exit_code == 6, "exit %d: %s", r.exit_code, r.text);
    job(NULL, 3, "abort", "20");
    ck_assert_msg(r.exit_code == 7, "exit %d: %s", r.exit_code, r.text);
    says("loss is nan at step 10");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("nccl_faults");
    TCase *tc = tcase_create("nccl_faults");

    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, a_whole_run_ends_well);
    tcase_add_test(tc, late_is_not_lost);
    tcase_add_test(tc, a_hanging_collective_is_named_by_every_rank);
    tcase_add_test(tc, a_stopped_rank_is_named);
    tcase_add_test(tc, an_error_of_the_library_ends_the_run);
    tcase_add_test(tc, a_call_that_fails_ends_the_run);
    tcase_add_test(tc, a_call_that_is_never_accepted_times_out);
    tcase_add_test(tc, connecting_fails_in_words);
    tcase_add_test(tc, a_dead_device_does_not_hang_the_job);
    tcase_add_test(tc, other_ends_are_as_on_the_cpu);
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_set_fork_status(sr, CK_NOFORK); // the suite forks itself
    srunner_run_all(sr, CK_ENV);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return n_failed != 0;
}
