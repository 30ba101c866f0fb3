/* tests/training/test_signals.c: each signal in a child of its own. */
#include "temp_dir.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "training/signals.h"

/* Exit status of a child that installs the handlers and raises these. */
static int child(int first, int second, int third)
{
    int status;
    const pid_t pid = fork();

    if (pid == 0) {
        if (ht_signals_install() != HT_OK || ht_signals_pending() != 0) _exit(1);
        raise(first);
        if (ht_signals_pending() != first) _exit(2);
        if (second) raise(second);
        if (third) raise(third);
        _exit(ht_signals_pending() == first ? 75 : 3);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

START_TEST(the_first_is_a_request)
{
    ck_assert_int_eq(child(SIGUSR1, 0, 0), 75);
    ck_assert_int_eq(child(SIGTERM, 0, 0), 75);
    ck_assert_int_eq(child(SIGINT, 0, 0), 75);
    ck_assert_int_eq(child(SIGUSR1, SIGUSR1, SIGUSR1), 75); // schedulers repeat it
    ck_assert_int_eq(child(SIGUSR1, SIGTERM, 0), 75);       // still saving: let it
}
END_TEST

START_TEST(the_second_leaves_at_once)
{
    ck_assert_int_eq(child(SIGTERM, SIGTERM, 0), 128 + SIGTERM);
    ck_assert_int_eq(child(SIGINT, SIGINT, 0), 128 + SIGINT);
    ck_assert_int_eq(child(SIGTERM, SIGINT, 0), 128 + SIGINT);
    ck_assert_int_eq(child(SIGUSR1, SIGTERM, SIGTERM), 128 + SIGTERM);
}
END_TEST

START_TEST(a_closed_pipe_is_no_signal)
{
    int fds[2];

    ck_assert_int_eq(ht_signals_install(), HT_OK);
    ck_assert_int_eq(pipe(fds), 0);
    close(fds[0]);
    ck_assert_int_eq(write(fds[1], "x", 1), -1); // and the process lives
    close(fds[1]);
    ck_assert_int_eq(ht_signals_pending(), 0);
}
END_TEST

static volatile int interrupted;

static void *sleeper(void *arg)
{
    (void)arg;
    ht_signals_block_thread();
    const struct timespec t = { 0, 300000000 };
    interrupted = nanosleep(&t, NULL) != 0;
    return NULL;
}

START_TEST(blocked_threads_sleep_on)
{
    pthread_t thread;
    const struct timespec t = { 0, 50000000 };

    interrupted = -1;
    ck_assert_int_eq(ht_signals_install(), HT_OK);
    ck_assert_int_eq(pthread_create(&thread, NULL, sleeper, NULL), 0);
    nanosleep(&t, NULL);
    ck_assert_int_eq(pthread_kill(thread, SIGUSR1), 0);
    nanosleep(&t, NULL);
    ck_assert_int_eq(ht_signals_pending(), 0); // waits for a thread that takes it
    kill(getpid(), SIGUSR1);
    ck_assert_int_eq(ht_signals_pending(), SIGUSR1);
    pthread_join(thread, NULL);
    ck_assert_int_eq(interrupted, 0);
    ck_assert_int_eq(ht_signals_install(), HT_OK); // again: forgets
    ck_assert_int_eq(ht_signals_pending(), 0);
}
END_TEST

START_TEST(a_request_before_the_handlers_waits)
{
    int status;
    const pid_t pid = fork();

    if (pid == 0) {
        ht_signals_block_thread(); // as a program's first line: the default action would end it
        raise(SIGUSR1);
        if (ht_signals_install() != HT_OK) _exit(1);
        _exit(ht_signals_pending() == SIGUSR1 ? 75 : 3);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    ck_assert(WIFEXITED(status));
    ck_assert_int_eq(WEXITSTATUS(status), 75);
}
END_TEST

START_TEST(names_are_those_of_the_manual)
{
    ck_assert_str_eq(ht_signals_name(SIGUSR1), "SIGUSR1");
    ck_assert_str_eq(ht_signals_name(SIGTERM), "SIGTERM");
    ck_assert_str_eq(ht_signals_name(SIGINT), "SIGINT");
    ck_assert_str_eq(ht_signals_name(SIGHUP), "signal");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("signals");
    TCase *tc = tcase_create("signals");

    tcase_add_test(tc, the_first_is_a_request);
    tcase_add_test(tc, the_second_leaves_at_once);
    tcase_add_test(tc, a_closed_pipe_is_no_signal);
    tcase_add_test(tc, blocked_threads_sleep_on);
    tcase_add_test(tc, a_request_before_the_handlers_waits);
    tcase_add_test(tc, names_are_those_of_the_manual);
    suite_add_tcase(s, tc);
    return run_suite(s);
}
