/* inference/scheduler.c: who has a place. */
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "inference/engine_impl.h"

/* ---- places ---- */

bool ht_scheduler_take_place(struct ht_engine *e, struct ht_place *place, int64_t kv_tokens)
{
    for (int32_t s = 0; s < e->o.max_seqs + e->o.max_drafts; s++) {
        if (e->slot_taken[s]) continue;
        *place = (struct ht_place){ .slot = s, .kv_n = kv_tokens };
        if (!ht_extents_take(&e->extents, kv_tokens, &place->kv_start)) return false;
        e->slot_taken[s] = true;
        return true;
    }
    return false;
}

void ht_scheduler_give_place(struct ht_engine *e, const struct ht_place *place)
{
    e->slot_taken[place->slot] = false;
    ht_extents_give_back(&e->extents, place->kv_start, place->kv_n);
}

static void unplace(struct ht_engine *e, struct ht_choice *c)
{
    int i = 0;

    if (!c->placed) return;
    ht_scheduler_give_place(e, &c->place);
    c->placed = false;
    while (e->running[i] != c) i++;
    e->n_running--;
    memmove(&e->running[i], &e->running[i + 1], (size_t)(e->n_running - i) * sizeof *e->running);
}

/* Places for all live choices of a request, or for none. */
static bool place_all(struct ht_engine *e, struct ht_open_request *r)
{
    for (int i = 0; i < r->o.n; i++) {
        struct ht_choice *c = &r->choices[i];
        struct ht_place place;
        if (c->phase == HT_PHASE_OVER) continue;
        if (!ht_scheduler_take_place(e, &place, r->kv_tokens)) {
            while (--i >= 0) unplace(e, &r->choices[i]);
            return false;
        }
        place.n_tokens = c->place.n_tokens; // of a state that was swapped out
        c->place = place;
        c->placed = true;
        e->running[e->n_running++] = c;
    }
    return true;
}

/* ---- the queue ---- */

void ht_scheduler_enqueue(struct ht_engine *e, struct ht_open_request *r)
{
    struct ht_open_request **at = &e->waiting;

    while (*at && ((*at)->o.priority > r->o.priority ||
                   ((*at)->o.priority == r->o.priority && (*at)->id < r->id)))
        at = &(*at)->next;
    r->next = *at;
    *at = r;
}

/* The running request of the lowest priority below `priority`, the youngest of equals. */
static struct ht_open_request *victim(const struct ht_engine *e, int priority)
{
    struct ht_open_request *v = NULL;

    for (int i = 0; i < e->n_running; i++) {
        struct ht_open_request *r = e->running[i]->request;
        if (r->o.priority < priority && (!v || r->o.priority < v->o.priority ||
                                         (r->o.priority == v->o.priority && r->id > v->id)))
            v = r;
    }
    return v;
}

/* Would r fit if everything of lower priority went? Extents may still lie badly. */
static bool worth_preempting(const struct ht_engine *e, const struct ht_open_request *r)
{
    int64_t slots = e->o.max_seqs - e->n_running, kv = e->extents.n_tokens - e->extents.used;

    for (int i = 0; i < e->n_running; i++)
        if (e->running[i]->request->o.priority < r->o.priority) {
            slots++;
            kv += e->running[i]->place.kv_n;
        }
    return slots >= r->n_live && kv >= r->n_live * r->kv_tokens;
}

static void drop_swapped(struct ht_open_request *r)
{
    for (int i = 0; i < r->o.n; i++) {
        free(r->choices[i].swapped);
        r->choices[i].swapped = NULL;
    }
}

/* States to host memory, places back, the request to the queue. *done = false without that memory;
 * all is as before then. */
static enum ht_status preempt(struct ht_engine *e, struct ht_open_request *r, bool *done)
{
    *done = false;
    for (int i = 0; i < r->o.n; i++) {
        struct ht_choice *c = &r->choices[i];
        if (c->phase == HT_PHASE_OVER || c->phase == HT_PHASE_FORK) continue;
        c->swapped = malloc((size_t)ht_pool_export_bytes(e->pool, c->place.n_tokens));
        const enum ht_status st =
            c->swapped ? ht_pool_export(e->pool, &c->place, c->swapped) : HT_OK;
        if (!c->swapped || st != HT_OK) {
            drop_swapped(r);
            return st;
        }
    }
    for (int i = 0; i < r->o.n; i++) unplace(e, &r->choices[i]);
    r->swapped = true;
    ht_scheduler_enqueue(e, r);
    e->stats.preemptions++;
    *done = true;
    return HT_OK;
}

static enum ht_status swap_in(struct ht_engine *e, struct ht_open_request *r)
{
    for (int i = 0; i < r->o.n; i++) {
        struct ht_choice *c = &r->choices[i];
        if (!c->swapped) continue;
        // phases that have a state: prompt (as far as read) and decode (all but the last token)
        const int64_t n = c->place.n_tokens;
        HT_TRY(ht_pool_import(e->pool, &c->place, n, c->swapped));
        free(c->swapped);
        c->swapped = NULL;
    }
    r->swapped = false;
    return HT_OK;
}

/* Where a fresh request begins: at a snapshot of its beginning, or at nothing. */
static enum ht_status begin(struct ht_engine *e, struct ht_open_request *r)
{
    struct ht_choice *c = &r->choices[0];
    const int64_t chunk = e->o.prefill_chunk, n = r->o.n_ids;

    r->admitted_s = ht_time_s();
    if (e->cache) {
        // echoed log-probabilities need every row of the prompt
        const bool all_rows = r->o.echo && r->o.logprobs >= 0;
        const struct ht_snapshot *s =
            all_rows ? NULL : ht_prefix_cache_find(e->cache, r->o.ids, n, n - 1);
        const int64_t shared = ht_prefix_cache_common(e->cache, r->o.ids, n) / chunk * chunk;
        e->stats.prefix_queries++;
        r->snapshot_at[0] = n / chunk * chunk;
        r->snapshot_at[1] = shared;
        if (s) {
            HT_TRY(ht_pool_import(e->pool, &c->place, s->n_tokens, s->state));
            r->cached_tokens = s->n_tokens;
            e->stats.prefix_hits++;
            e->stats.cached_tokens += s->n_tokens;
            return HT_OK;
        }
    }
    return ht_pool_reset(e->pool, &c->place);
}

enum ht_status ht_scheduler_admit(struct ht_engine *e)
{
    bool preempted;

    while (e->waiting) {
        struct ht_open_request *r = e->waiting;
        while (!place_all(e, r)) {
            struct ht_open_request *v = victim(e, r->o.priority);
            if (!v || !worth_preempting(e, r)) return HT_OK;
            HT_TRY(preempt(e, v, &preempted));
            if (!preempted) return HT_OK;
        }
        // preempted ones were put behind it: it is still the first
        e->waiting = r->next;
        HT_TRY(r->swapped ? swap_in(e, r) : begin(e, r));
    }
    return HT_OK;
}

/* ---- ends ---- */

static void close_request(struct ht_engine *e, struct ht_open_request *r)
{
    ht_open_request_free(r, false);
    atomic_fetch_sub(&e->n_open, 1);
}

void ht_scheduler_end_choice(struct ht_engine *e, struct ht_choice *c, enum ht_finish why,
                             const char *message)
{
    struct ht_open_request *r = c->request;

    ht_choice_end(e, c, why, message);
    unplace(e, c);
    c->phase = HT_PHASE_OVER;
    if (--r->n_live == 0) close_request(e, r);
}

static void end_request(struct ht_engine *e, struct ht_open_request *r, enum ht_finish why,
                        const char *message)
{
    int left = r->n_live;

    for (int i = 0; left > 0; i++) // the last one frees r
        if (r->choices[i].phase != HT_PHASE_OVER) {
            left--;
            ht_scheduler_end_choice(e, &r->choices[i], why, message);
        }
}

/* End the waiting request at *at. */
static void end_waiting(struct ht_engine *e, struct ht_open_request **at, enum ht_finish why,
                        const char *message)
{
    struct ht_open_request *r = *at;

    *at = r->next;
    end_request(e, r, why, message);
}

void ht_scheduler_cancel(struct ht_engine *e, uint64_t id)
{
    for (struct ht_open_request **at = &e->waiting; *at; at = &(*at)->next)
        if ((*at)->id == id) {
            end_waiting(e, at, HT_FINISH_CANCELLED, NULL);
            return;
        }
    for (int i = 0; i < e->n_running; i++)
        if (e->running[i]->request->id == id) {
            end_request(e, e->running[i]->request, HT_FINISH_CANCELLED, NULL);
            return;
        }
}

void ht_scheduler_expire(struct ht_engine *e)
{
    const double now_s = ht_time_s();

    for (struct ht_open_request **at = &e->waiting; *at;)
        if ((*at)->o.deadline_s > 0 && now_s > (*at)->o.deadline_s)
            end_waiting(e, at, HT_FINISH_LENGTH, NULL);
        else
            at = &(*at)->next;
    for (int i = 0; i < e->n_running;)
        if (e->running[i]->request->o.deadline_s > 0 &&
            now_s > e->running[i]->request->o.deadline_s) {
            end_request(e, e->running[i]->request, HT_FINISH_LENGTH, NULL);
            i = 0; // several entries may have gone
        } else {
            i++;
        }
}

void ht_scheduler_end_all(struct ht_engine *e, enum ht_finish why, const char *message)
{
    while (e->waiting) end_waiting(e, &e->waiting, why, message);
    while (e->n_running > 0) end_request(e, e->running[0]->request, why, message);
}
