/* core/base/team.c: hill climbing on the number of threads. */
#include "core/base/team.h"

#include <sys/resource.h>

enum { N_CANDIDATES = 4 };
static const double FIRST_WAIT_S = 0.25, LAST_WAIT_S = 4.0; // between trials,
static const double LAST_WAIT_PASSES = 16.0; // and this many passes where they are long
static const double GAIN = 0.85;             // a trial must take less than this share
// A neighbour takes a core in turns of some milliseconds, more than 150 times in a second (measured
// on two cores); an idle system takes them 20 to 45 times.
static const double LOST_PER_S = 80.0;

int64_t ht_team_lost_cores(void)
{
    struct rusage u;

    return getrusage(RUSAGE_SELF, &u) == 0 ? u.ru_nivcsw : 0;
}

/* One thread fewer, half of them, one more, twice as many. */
static int candidate(int now, int which, int most)
{
    const int n[N_CANDIDATES] = { now - 1, now / 2, now + 1, 2 * now };
    const int c = n[which % N_CANDIDATES];

    return c < 1 ? 1 : c > most ? most : c;
}

int ht_team_begin(struct ht_team *t, int64_t n_rows, double now_s, int64_t n_lost)
{
    int k = 0;

    while (n_rows > 1 && k < HT_TEAM_KINDS - 1) n_rows /= 2, k++;
    t->current = k;
    t->start_s = now_s;
    t->start_lost = n_lost;
    if (t->kind[k].now == 0) {
        t->kind[k].now = t->most > 1 ? t->most : 1;
        t->kind[k].wait_s = FIRST_WAIT_S;
        t->kind[k].next_try_s = now_s + FIRST_WAIT_S;
    }
    t->kind[k].trial = 0;
    if (t->most > 1 && t->kind[k].pass_s > 0.0 && now_s >= t->kind[k].next_try_s) {
        for (int i = 0; i < N_CANDIDATES && t->kind[k].trial == 0; i++) {
            const int c = candidate(t->kind[k].now, t->kind[k].next++, t->most);
            if (c > t->kind[k].now || (c < t->kind[k].now && t->kind[k].lost_per_s > LOST_PER_S))
                t->kind[k].trial = c;
        }
        if (t->kind[k].trial > 0) return t->kind[k].trial;
    }
    return t->kind[k].now;
}

void ht_team_end(struct ht_team *t, double now_s, int64_t n_lost)
{
    const int k = t->current;
    const double s = now_s - t->start_s;
    double *pass_s = &t->kind[k].pass_s, *lost_per_s = &t->kind[k].lost_per_s;

    if (t->kind[k].trial == 0) {
        const double lost = s > 0.0 ? (double)(n_lost - t->start_lost) / s : 0.0;
        *lost_per_s = *pass_s > 0.0 ? 0.7 * *lost_per_s + 0.3 * lost : lost;
        *pass_s = *pass_s > 0.0 ? 0.7 * *pass_s + 0.3 * s : s;
        return;
    }
    const bool gains = s < GAIN * *pass_s;
    if (gains) {
        t->kind[k].now = t->kind[k].trial;
        *pass_s = s;
    }
    const double passes_s = LAST_WAIT_PASSES * *pass_s;
    const double most_s = passes_s > LAST_WAIT_S ? passes_s : LAST_WAIT_S;
    t->kind[k].wait_s = gains ? FIRST_WAIT_S : 2.0 * t->kind[k].wait_s;
    if (t->kind[k].wait_s < 2.0 * *pass_s) t->kind[k].wait_s = 2.0 * *pass_s;
    if (t->kind[k].wait_s > most_s) t->kind[k].wait_s = most_s;
    t->kind[k].next_try_s = now_s + t->kind[k].wait_s;
    t->kind[k].trial = 0;
}
