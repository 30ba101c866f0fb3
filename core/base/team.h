/* core/base/team.h: how many threads work together, found by trying.
 *
 * A parallel region ends when its slowest thread does. Beside a neighbour that keeps one core busy,
 * that thread waits for its turn in every region, milliseconds each time, and a pass of some
 * hundred regions falls to a tenth of its speed where half a machine less one core is at hand (two
 * cores, measured: 5 to 7 tokens/s with two threads, 33 with one, 44 when alone). So equal passes
 * are timed, and another number of threads is tried now and then: fewer while the kernel takes
 * cores away from this process (nobody else's wish for them, no trial), more while there are fewer
 * than at hand. The faster one stays. Results do not depend on it.
 */
#ifndef HT_BASE_TEAM_H
#define HT_BASE_TEAM_H

#include <stdbool.h>
#include <stdint.h>

enum { HT_TEAM_KINDS = 20 };

struct ht_team {
    int most; // threads at hand; 0 or 1: nothing is tried
    struct {
        int now, trial;    // threads; of the pass under way where it is a trial, else 0
        int next;          // candidate of the next trial
        double pass_s;     // of a pass with `now` threads, averaged
        double next_try_s; // time of the next trial
        double wait_s;     // between trials: grows while they gain nothing
        double lost_per_s; // how often a thread lost its core, averaged over those passes
    } kind[HT_TEAM_KINDS];
    int current;
    double start_s;
    int64_t start_lost;
};

/* How often a thread of this process has lost its core before its time (ru_nivcsw). */
int64_t ht_team_lost_cores(void);

/* A pass over n_rows rows begins, at time now_s and with ht_team_lost_cores at n_lost: threads to
 * use. Passes of n_rows of the same power of two are taken for equal. */
int ht_team_begin(struct ht_team *t, int64_t n_rows, double now_s, int64_t n_lost);

/* It has ended. */
void ht_team_end(struct ht_team *t, double now_s, int64_t n_lost);

#endif
