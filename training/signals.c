/* training/signals.c: async-signal-safe handlers: lock-free atomics and _exit only. */
#include "training/signals.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

static const int stop_signals[] = { SIGUSR1, SIGTERM, SIGINT };
enum { N_SIGNALS = sizeof stop_signals / sizeof *stop_signals };

static atomic_int pending;  // the first one
static atomic_int n_urgent; // SIGTERM and SIGINT so far

static void on_signal(int number)
{
    int none = 0;

    // SIGUSR1 may come twice (scheduler and mpirun both forward it); it is never a reason to hurry
    if (number != SIGUSR1 && atomic_fetch_add(&n_urgent, 1) > 0) _exit(128 + number);
    atomic_compare_exchange_strong(&pending, &none, number);
}

enum ht_status ht_signals_install(void)
{
    struct sigaction stop = { .sa_handler = on_signal, .sa_flags = SA_RESTART };
    struct sigaction ignore = { .sa_handler = SIG_IGN };

    atomic_store(&pending, 0);
    atomic_store(&n_urgent, 0);
    sigemptyset(&stop.sa_mask);
    for (int i = 0; i < N_SIGNALS; i++) sigaddset(&stop.sa_mask, stop_signals[i]);
    for (int i = 0; i < N_SIGNALS; i++)
        if (sigaction(stop_signals[i], &stop, NULL) != 0)
            return HT_FAIL(HT_ERR_IO, "handler for %s: %s", ht_signals_name(stop_signals[i]),
                           strerror(errno));
    if (sigaction(SIGPIPE, &ignore, NULL) != 0)
        return HT_FAIL(HT_ERR_IO, "ignoring SIGPIPE: %s", strerror(errno));
    ht_signals_unblock_thread();
    return HT_OK;
}

int ht_signals_pending(void)
{
    return atomic_load_explicit(&pending, memory_order_relaxed);
}

static void set_mask(int how)
{
    sigset_t set;

    sigemptyset(&set);
    for (int i = 0; i < N_SIGNALS; i++) sigaddset(&set, stop_signals[i]);
    pthread_sigmask(how, &set, NULL);
}

void ht_signals_block_thread(void)
{
    set_mask(SIG_BLOCK);
}

void ht_signals_unblock_thread(void)
{
    set_mask(SIG_UNBLOCK);
}

const char *ht_signals_name(int signal_number)
{
    switch (signal_number) {
    case SIGUSR1: return "SIGUSR1";
    case SIGTERM: return "SIGTERM";
    case SIGINT: return "SIGINT";
    default: return "signal";
    }
}
