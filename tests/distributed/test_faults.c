/* tests/distributed/test_faults.c: jobs in which one rank dies, hangs or gives up: the others end
 * in time, with a message that names it and the right exit code. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/base/file.h"

struct result {
    int exit_code;
    double seconds;
    char text[65536]; // stdout and stderr
};

/* mpirun on the fault job; killed after 40 s. */
static void run_job(struct result *r, int n_ranks, const char *mode, const char *timeout_s)
{
    char n[16];
    int fds[2], status = 0;
    size_t at = 0;
    const double start = ht_time_s();

    snprintf(n, sizeof n, "%d", n_ranks);
    ck_assert_int_eq(pipe(fds), 0);
    const pid_t pid = fork();
    ck_assert_int_ge(pid, 0);
    if (pid == 0) {
        dup2(fds[1], 1);
        dup2(fds[1], 2);
        close(fds[0]);
        close(fds[1]);
        setenv("OMP_NUM_THREADS", "1", 1);
        setenv("ASAN_OPTIONS", "detect_leaks=0", 1); // Open MPI leaks at exit
        if (n_ranks == 0) execl(FAULT_JOB, FAULT_JOB, mode, timeout_s, (char *)NULL);
        execl(MPIEXEC, MPIEXEC, "-n", n, "--oversubscribe", "--allow-run-as-root", FAULT_JOB, mode,
              timeout_s, (char *)NULL);
        _exit(127);
    }
    close(fds[1]);
    while (ht_time_s() - start < 40) {
        struct pollfd p = { .fd = fds[0], .events = POLLIN };
        if (poll(&p, 1, 100) <= 0) continue;
        const ssize_t got = read(fds[0], r->text + at, sizeof r->text - 1 - at);
        if (got <= 0) break;
        at += (size_t)got;
    }
    r->text[at] = '\0';
    r->seconds = ht_time_s() - start;
    if (r->seconds >= 40) kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
    close(fds[0]);
    r->exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

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
