/* distributed/watchdog.c: see watchdog.h. */
#include "distributed/watchdog.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"

struct ht_watchdog {
    struct ht_watchdog_source source;
    char who[160];
    double grace_s;
    _Atomic double timeout_s;
    atomic_bool failed, noticed, stop;
    char message[1024]; // written before `failed`
    pthread_t thread;
};

static void pause_s(double s)
{
    const struct timespec t = { (time_t)s, (long)((s - (double)(time_t)s) * 1e9) };
    nanosleep(&t, NULL);
}

/* Often enough to be exact to 5 %, seldom enough to cost nothing. */
static double period_s(double timeout_s)
{
    const double s = timeout_s / 20;
    return s < 0.01 ? 0.01 : s > 0.5 ? 0.5 : s;
}

static void *abort_thread(void *user)
{
    struct ht_watchdog *w = user;
    w->source.abort(w->source.user);
    return NULL;
}

/* The message is there: let the device go on, then see that somebody hears it. */
static void fail(struct ht_watchdog *w)
{
    pthread_t helper;

    atomic_store(&w->failed, true);
    if (pthread_create(&helper, NULL, abort_thread, w) == 0) pthread_detach(helper);
    for (double waited = 0; waited < w->grace_s; waited += 0.02) {
        if (atomic_load(&w->noticed) || atomic_load(&w->stop)) return;
        pause_s(0.02);
    }
    if (atomic_load(&w->noticed) || atomic_load(&w->stop)) return;
    fprintf(stderr,
            "%s; the process did not come back from the device within %g s (exit code %d)\n",
            w->message, w->grace_s, ht_exit_code(HT_ERR_COMM));
    fflush(stderr);
    _exit(ht_exit_code(HT_ERR_COMM));
}

static void *watch(void *user)
{
    struct ht_watchdog *w = user;
    const struct ht_watchdog_source *s = &w->source;
    int64_t seq = -1;
    double waited = 0, last = ht_time_s();
    char text[512];

    s->begin(s->user);
    while (!atomic_load(&w->stop)) {
        const double timeout_s = atomic_load(&w->timeout_s), now = ht_time_s();
        // a process that was itself stopped for minutes must not blame the others at once
        const double step = now - last < 1 ? now - last : 1;
        struct ht_watched c = { 0 };
        last = now;
        if (s->error(s->user, text, sizeof text)) {
            const bool any = s->running(s->user, &c);
            if (any)
                snprintf(w->message, sizeof w->message, "%s: %s %" PRId64 ": %s", w->who, c.what,
                         c.seq, text);
            else
                snprintf(w->message, sizeof w->message, "%s: %s", w->who, text);
            fail(w);
            return NULL;
        }
        if (!s->running(s->user, &c)) {
            seq = -1;
        } else if (c.seq != seq) {
            seq = c.seq;
            waited = 0;
        } else if ((waited += step) > timeout_s) {
            s->peers(s->user, &c, text, sizeof text);
            snprintf(w->message, sizeof w->message,
                     "%s: %s %" PRId64 " (%" PRId64 " bytes a rank) timed out after %g s on the "
                     "device: %s",
                     w->who, c.what, c.seq, c.n_bytes, timeout_s, text);
            fail(w);
            return NULL;
        }
        pause_s(period_s(timeout_s));
    }
    return NULL;
}

enum ht_status ht_watchdog_create(struct ht_watchdog **out, const struct ht_watchdog_source *s,
                                  const char *who, double timeout_s, double grace_s)
{
    struct ht_watchdog *w = calloc(1, sizeof *w);

    *out = NULL;
    if (!w) return HT_FAIL(HT_ERR_MEMORY, "no memory for the watchdog of collectives");
    w->source = *s;
    w->grace_s = grace_s;
    atomic_store(&w->timeout_s, timeout_s);
    snprintf(w->who, sizeof w->who, "%s", who);
    if (pthread_create(&w->thread, NULL, watch, w) != 0) {
        free(w);
        return HT_FAIL(HT_ERR_MEMORY, "no thread for the watchdog of collectives");
    }
    *out = w;
    return HT_OK;
}

void ht_watchdog_set_timeout(struct ht_watchdog *w, double timeout_s)
{
    atomic_store(&w->timeout_s, timeout_s);
}

const char *ht_watchdog_failure(struct ht_watchdog *w)
{
    if (!w || !atomic_load(&w->failed)) return NULL;
    atomic_store(&w->noticed, true);
    return w->message;
}

void ht_watchdog_free(struct ht_watchdog *w)
{
    if (!w) return;
    atomic_store(&w->stop, true);
    pthread_join(w->thread, NULL);
    if (!atomic_load(&w->failed)) free(w); // else the thread that aborts may still use it
}
