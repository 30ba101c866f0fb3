/* training/stop.c: what a request to stop means where. Ranks agree on it together, so every call
 * here is collective but ht_run_pause_point. */
#include <inttypes.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/folder.h"
#include "training/run.h"
#include "training/signals.h"

enum ht_status ht_run_agree_to_stop(struct ht_run *r, int64_t *signal_number)
{
    *signal_number = ht_signals_pending();
    return ht_comm_max_i64(r->comm, signal_number, 1);
}

enum ht_status ht_run_check_start(struct ht_run *r)
{
    int64_t signal_number, *steps = NULL;
    int n = 0;

    HT_TRY(ht_run_agree_to_stop(r, &signal_number));
    if (!signal_number) return HT_OK;
    const char *name = ht_signals_name((int)signal_number);
    HT_TRY(ht_ckpt_list_steps(&steps, &n, r->checkpoint_dir));
    const int64_t newest = n > 0 ? steps[0] : 0;
    free(steps);
    if (n == 0)
        return HT_FAIL(HT_ERR_STOPPED,
                       "stopped on %s before the first step; there was nothing to save, start "
                       "again to begin",
                       name);
    return HT_FAIL(HT_ERR_STOPPED,
                   "stopped on %s before the first step of this start; the checkpoint of step "
                   "%" PRId64 " is as it was, start again to go on",
                   name, newest);
}

void ht_run_set_pause_point(struct ht_run *r)
{
    const char *text = getenv("HT_TRAIN_PAUSE_AT");
    const size_t n = text ? strcspn(text, ":") : 0;

    if (n == 0 || n >= sizeof r->pause_point) return;
    memcpy(r->pause_point, text, n);
    r->pause_countdown = text[n] == ':' ? atoi(text + n + 1) : 1;
}

void ht_run_pause_point(struct ht_run *r, const char *point)
{
    if (strcmp(r->pause_point, point) == 0 && --r->pause_countdown == 0) raise(SIGSTOP);
}
