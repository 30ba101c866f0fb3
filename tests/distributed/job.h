/* tests/distributed/job.h: run FAULT_JOB under mpirun, whatever becomes of it. */
#ifndef HT_TESTS_JOB_H
#define HT_TESTS_JOB_H

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

#endif
