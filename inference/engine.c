/* inference/engine.c: the engine's thread and the queues to and from it. */
#include "inference/engine.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/model/packed.h"
#include "inference/engine_impl.h"

enum {
    DEFAULT_CONTEXT = 4096,
    DEFAULT_SEQS = 16,
    DEFAULT_DRAFTS = 4,
    DEFAULT_QUEUE = 1024,
    DEFAULT_STEP = 512,
    DEFAULT_CHUNK = 256
};

/* ---- the thread ---- */

static void give_out_events(struct ht_engine *e)
{
    const uint64_t one = 1;
    bool was_empty;

    if (!e->fresh) return;
    pthread_mutex_lock(&e->out_lock);
    was_empty = e->events == NULL;
    *e->events_end = e->fresh;
    e->events_end = e->fresh_end;
    pthread_cond_broadcast(&e->out_changed);
    pthread_mutex_unlock(&e->out_lock);
    e->fresh = NULL;
    e->fresh_end = &e->fresh;
    if (was_empty) {
        const ssize_t n = write(e->event_fd, &one, sizeof one);
        (void)n; // full counts as readable
    }
}

static void publish_stats(struct ht_engine *e)
{
    int64_t waiting = 0;

    for (const struct ht_open_request *r = e->waiting; r; r = r->next) waiting++;
    e->stats.running = e->n_running;
    e->stats.waiting = waiting;
    e->stats.state_usage = (double)e->n_running / (double)e->o.max_seqs;
    e->stats.kv_usage =
        e->extents.n_tokens ? (double)e->extents.used / (double)e->extents.n_tokens : 0.0;
    e->stats.prefix_bytes = e->cache ? ht_prefix_cache_bytes(e->cache) : 0;
    pthread_mutex_lock(&e->stats_lock);
    e->published = e->stats;
    pthread_mutex_unlock(&e->stats_lock);
}

/* What callers have put in since the last look; waits for something when nothing runs. False: quit.
 */
static bool take_inbox(struct ht_engine *e, struct ht_state_command **command)
{
    struct ht_open_request *fresh;
    uint64_t *cancels;
    size_t n_cancels;
    bool quit;

    pthread_mutex_lock(&e->in_lock);
    while (!e->quit && !e->inbox && e->n_cancels == 0 && !e->command && e->n_running == 0 &&
           !e->waiting)
        pthread_cond_wait(&e->in_changed, &e->in_lock);
    fresh = e->inbox;
    e->inbox = NULL;
    e->inbox_end = &e->inbox;
    cancels = e->cancels;
    n_cancels = e->n_cancels;
    e->cancels = NULL;
    e->n_cancels = e->cancels_capacity = 0;
    *command = e->command;
    quit = e->quit;
    pthread_mutex_unlock(&e->in_lock);

    while (fresh) {
        struct ht_open_request *r = fresh;
        fresh = r->next;
        ht_scheduler_enqueue(e, r);
    }
    for (size_t i = 0; i < n_cancels; i++) ht_scheduler_cancel(e, cancels[i]);
    free(cancels);
    return !quit;
}

static void run_command(struct ht_engine *e, struct ht_state_command *command)
{
    command->status = ht_engine_run_command(e, command);
    if (command->status != HT_OK)
        snprintf(command->message, sizeof command->message, "%s", ht_error_message());
    pthread_mutex_lock(&e->in_lock);
    command->done = true;
    e->command = NULL;
    pthread_cond_broadcast(&e->command_done);
    pthread_mutex_unlock(&e->in_lock);
}

static void *engine_thread(void *user)
{
    struct ht_engine *e = user;
    struct ht_state_command *command;

    while (take_inbox(e, &command)) {
        ht_scheduler_expire(e);
        if (command) run_command(e, command);
        enum ht_status st = ht_scheduler_admit(e);
        publish_stats(e);
        if (st == HT_OK) st = ht_engine_step(e);
        if (st != HT_OK) ht_scheduler_end_all(e, HT_FINISH_ERROR, ht_error_message());
        publish_stats(e);
        give_out_events(e);
    }
    ht_scheduler_end_all(e, HT_FINISH_CANCELLED, NULL);
    give_out_events(e);
    if (command) { // its caller must not wait for ever
        pthread_mutex_lock(&e->in_lock);
        command->status = HT_ERR_STOPPED;
        snprintf(command->message, sizeof command->message, "the engine is closing");
        command->done = true;
        e->command = NULL;
        pthread_cond_broadcast(&e->command_done);
        pthread_mutex_unlock(&e->in_lock);
    }
    return NULL;
}

/* ---- creation ---- */

static enum ht_status resolve_options(struct ht_engine *e, const struct ht_model_config *c)
{
    struct ht_engine_options *o = &e->o;
    const int64_t positions = c->rope_dims ? c->max_position : INT64_MAX;

    if (o->kv != HT_KV_MODEL)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "keys and values have the model's dtype here");
    if (o->max_context < 0 || o->max_context > INT32_MAX)
        return HT_FAIL(HT_ERR_ARG, "max_context is %lld; 1 to 2147483647",
                       (long long)o->max_context);
    if (o->max_context > positions)
        return HT_FAIL(HT_ERR_ARG, "max_context is %lld; the model has %lld positions",
                       (long long)o->max_context, (long long)positions);
    if (o->max_seqs < 0 || o->max_seqs > 4096)
        return HT_FAIL(HT_ERR_ARG, "max_seqs is %lld; 1 to 4096", (long long)o->max_seqs);
    if (o->max_queue < 0 || o->max_step_tokens < 0 || o->prefill_chunk < 0 || o->memory_bytes < 0 ||
        o->prefix_cache_bytes < 0)
        return HT_FAIL(HT_ERR_ARG, "an option of the engine is negative");
    if (o->max_context == 0)
        o->max_context = positions < DEFAULT_CONTEXT ? positions : DEFAULT_CONTEXT;
    if (o->max_seqs == 0) o->max_seqs = DEFAULT_SEQS;
    if (o->max_drafts < -1 || o->max_drafts > o->max_seqs)
        return HT_FAIL(HT_ERR_ARG, "max_drafts is %lld; -1 (none) to max_seqs = %lld",
                       (long long)o->max_drafts, (long long)o->max_seqs);
    if (o->max_drafts == 0)
        o->max_drafts = o->max_seqs < DEFAULT_DRAFTS ? o->max_seqs : DEFAULT_DRAFTS;
    if (o->max_drafts == -1) o->max_drafts = 0;
    if (o->max_queue == 0) o->max_queue = DEFAULT_QUEUE;
    const int64_t unit = c->chunk > 0 ? c->chunk : 1;
    if (o->prefill_chunk == 0) o->prefill_chunk = DEFAULT_CHUNK;
    o->prefill_chunk = (o->prefill_chunk + unit - 1) / unit * unit; // whole chunks of the scan
    if (o->prefill_chunk > 1 << 16)
        return HT_FAIL(HT_ERR_ARG, "prefill_chunk is %lld; at most 65536",
                       (long long)o->prefill_chunk);
    if (o->max_step_tokens == 0) o->max_step_tokens = DEFAULT_STEP;
    if (o->max_step_tokens < o->prefill_chunk) o->max_step_tokens = o->prefill_chunk;
    return HT_OK;
}

static enum ht_dtype ssm_dtype(const struct ht_engine_options *o)
{
    return o->state == HT_STATE_16 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
}

/* Tokens that the pool of keys and values holds. */
static enum ht_status kv_pool_tokens(const struct ht_engine *e, const struct ht_model_config *c,
                                     int64_t *out)
{
    const struct ht_engine_options *o = &e->o;
    const int64_t slots_bytes =
        (o->max_seqs + o->max_drafts) * ht_pool_slot_bytes(c, ssm_dtype(&e->o));

    *out = e->token_bytes ? o->max_seqs * o->max_context : 0;
    if (o->memory_bytes == 0) return HT_OK;
    if (o->memory_bytes < slots_bytes + e->token_bytes)
        return HT_FAIL(HT_ERR_ARG,
                       "memory_bytes is %lld; the states of %lld sequences alone take %lld",
                       (long long)o->memory_bytes, (long long)o->max_seqs, (long long)slots_bytes);
    if (e->token_bytes && (o->memory_bytes - slots_bytes) / e->token_bytes < *out)
        *out = (o->memory_bytes - slots_bytes) / e->token_bytes;
    return HT_OK;
}

static enum ht_status allocate(struct ht_engine *e)
{
    const struct ht_model_config *c = &e->loaded.model->cfg;
    const size_t seqs = (size_t)e->o.max_seqs, drafts = (size_t)e->o.max_drafts;
    const size_t row_bytes = (size_t)c->vocab_size * sizeof *e->logits;
    struct ht_pool_options pool = { .n_slots = e->o.max_seqs + e->o.max_drafts,
                                    .n_drafts = e->o.max_drafts,
                                    .block_tokens = e->o.prefill_chunk,
                                    .ssm_dtype = ssm_dtype(&e->o) };

    e->token_bytes = ht_pool_token_bytes(c, e->loaded.model->dtype);
    HT_TRY(kv_pool_tokens(e, c, &pool.kv_tokens));
    HT_TRY(ht_pool_create(&e->pool, e->loaded.model, &pool));
    HT_TRY(ht_extents_create(&e->extents, pool.kv_tokens, (int)e->o.max_seqs));
    if (e->o.prefix_cache_bytes > 0)
        HT_TRY(ht_prefix_cache_create(&e->cache, e->o.prefix_cache_bytes));
    e->stats.pool_bytes =
        pool.n_slots * ht_pool_slot_bytes(c, ssm_dtype(&e->o)) + pool.kv_tokens * e->token_bytes;
    e->stats.weight_bytes = ht_loaded_weight_bytes(&e->loaded);
    e->published = e->stats;
    e->running = calloc(seqs, sizeof *e->running);
    e->slot_taken = calloc(seqs + drafts, sizeof *e->slot_taken);
    e->spare_slots = calloc(drafts + 1, sizeof *e->spare_slots);
    e->row = calloc(seqs, sizeof *e->row);
    e->run = calloc(seqs, sizeof *e->run);
    e->logits = malloc((seqs + drafts * HT_DRAFT_MOST) * row_bytes);
    e->draw_threads = e->loaded.model->be->n_threads;
    e->changed = malloc((size_t)e->draw_threads * row_bytes);
    if (!e->running || !e->slot_taken || !e->spare_slots || !e->row || !e->run || !e->logits ||
        !e->changed)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the rows of %zu sequences", seqs);
    for (size_t i = 0; i < drafts; i++) {
        e->spare_slots[i] = (int32_t)(seqs + i);
        e->slot_taken[seqs + i] = true;
    }
    return HT_OK;
}

static void init_locks(struct ht_engine *e)
{
    pthread_condattr_t monotonic;

    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&e->in_lock, NULL);
    pthread_mutex_init(&e->out_lock, NULL);
    pthread_mutex_init(&e->stats_lock, NULL);
    pthread_cond_init(&e->in_changed, NULL);
    pthread_cond_init(&e->command_done, NULL);
    pthread_cond_init(&e->out_changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    e->inbox_end = &e->inbox;
    e->fresh_end = &e->fresh;
    e->events_end = &e->events;
}

static enum ht_status start_thread(struct ht_engine *e)
{
    sigset_t all, before;

    // signals are the program's business, not this thread's or its OpenMP threads'
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int code = pthread_create(&e->thread, NULL, engine_thread, e);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (code) return HT_FAIL(HT_ERR_MEMORY, "no thread for the engine: %s", strerror(code));
    e->thread_runs = true;
    return HT_OK;
}

enum ht_status ht_engine_create(struct ht_engine **out, const struct ht_engine_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_engine *e = calloc(1, sizeof *e);
    struct ht_weights *weights = NULL;

    *out = NULL;
    if (!e) return HT_FAIL(HT_ERR_MEMORY, "no memory for an engine");
    e->o = *o;
    e->event_fd = -1;
    init_locks(e);
    HT_TRY_GOTO(st, done, ht_weights_open(&weights, o->path, o->log));
    e->loaded.weights = weights; // closed with it
    HT_TRY_GOTO(st, done, resolve_options(e, ht_weights_model(weights)));
    HT_TRY_GOTO(st, done,
                ht_loaded_open_on(&e->loaded, o->device ? o->device : "cpu", weights, o->tokenizer,
                                  o->weights ? o->weights : "stored", o->threads,
                                  e->o.max_context));
    HT_TRY_GOTO(st, done, allocate(e));
    HT_TRY_GOTO(st, done,
                ht_chat_template_load(&e->chat_template, ht_weights_resolved_path(weights)));
    e->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->event_fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "eventfd: %s", strerror(errno));
        goto done;
    }
    HT_TRY_GOTO(st, done, start_thread(e));
    *out = e;
    e = NULL;
done:
    ht_engine_free(e);
    return st;
}

void ht_engine_free(struct ht_engine *e)
{
    if (!e) return;
    if (e->thread_runs) {
        pthread_mutex_lock(&e->in_lock);
        e->quit = true;
        pthread_cond_signal(&e->in_changed);
        pthread_mutex_unlock(&e->in_lock);
        pthread_join(e->thread, NULL);
    }
    ht_engine_event_free(e->events);
    ht_engine_event_free(e->fresh);
    if (e->event_fd >= 0) close(e->event_fd);
    ht_prefix_cache_free(e->cache);
    ht_extents_free(&e->extents);
    ht_pool_free(e->pool);
    ht_loaded_close(&e->loaded);
    ht_chat_template_free(e->chat_template);
    free(e->running);
    free(e->slot_taken);
    free(e->spare_slots);
    free(e->row);
    free(e->run);
    free(e->logits);
    free(e->changed);
    free(e->cancels);
    pthread_mutex_destroy(&e->in_lock);
    pthread_mutex_destroy(&e->out_lock);
    pthread_mutex_destroy(&e->stats_lock);
    pthread_cond_destroy(&e->in_changed);
    pthread_cond_destroy(&e->command_done);
    pthread_cond_destroy(&e->out_changed);
    free(e);
}

/* ---- questions ---- */

const struct ht_tokenizer *ht_engine_tokenizer(const struct ht_engine *e)
{
    return e->loaded.tokenizer;
}
const char *ht_engine_chat_template(const struct ht_engine *e)
{
    return e->chat_template ? ht_chat_template_text(e->chat_template) : NULL;
}
int32_t ht_engine_bos(const struct ht_engine *e)
{
    return e->loaded.bos;
}
int32_t ht_engine_eos(const struct ht_engine *e)
{
    return e->loaded.eos;
}
int64_t ht_engine_max_context(const struct ht_engine *e)
{
    return e->o.max_context;
}
int64_t ht_engine_vocab_size(const struct ht_engine *e)
{
    return e->loaded.model->cfg.vocab_size;
}
int ht_engine_event_fd(const struct ht_engine *e)
{
    return e->event_fd;
}
void ht_engine_drain(struct ht_engine *e)
{
    atomic_store(&e->draining, true);
}
bool ht_engine_idle(const struct ht_engine *e)
{
    return atomic_load(&e->n_open) == 0;
}
void ht_engine_get_stats(const struct ht_engine *e, struct ht_engine_stats *out)
{
    pthread_mutex_t *lock = (pthread_mutex_t *)(uintptr_t)&e->stats_lock;

    pthread_mutex_lock(lock);
    *out = e->published;
    pthread_mutex_unlock(lock);
}

/* ---- in ---- */

enum ht_status ht_engine_submit(struct ht_engine *e, const struct ht_request *r, uint64_t *id)
{
    struct ht_open_request *fresh = NULL;
    const int64_t most = e->o.max_queue + e->o.max_seqs;

    if (atomic_load(&e->draining))
        return HT_FAIL(HT_ERR_STOPPED, "the engine takes no more requests");
    if (atomic_load(&e->n_open) >= most)
        return HT_FAIL(HT_ERR_MEMORY, "the queue is full: %lld requests are open", (long long)most);
    HT_TRY(ht_open_request_create(&fresh, e, r));
    atomic_fetch_add(&e->n_open, 1);
    pthread_mutex_lock(&e->in_lock);
    *id = fresh->id = ++e->next_id;
    fresh->next = NULL;
    *e->inbox_end = fresh;
    e->inbox_end = &fresh->next;
    pthread_cond_signal(&e->in_changed);
    pthread_mutex_unlock(&e->in_lock);
    return HT_OK;
}

void ht_engine_cancel(struct ht_engine *e, uint64_t id)
{
    pthread_mutex_lock(&e->in_lock);
    if (e->n_cancels == e->cancels_capacity) {
        const size_t capacity = 2 * e->cancels_capacity + 16;
        uint64_t *grown = realloc(e->cancels, capacity * sizeof *grown);
        if (grown) {
            e->cancels = grown;
            e->cancels_capacity = capacity;
        }
    }
    // without memory the request runs to its end, as if the cancel had come too late
    if (e->n_cancels < e->cancels_capacity) e->cancels[e->n_cancels++] = id;
    pthread_cond_signal(&e->in_changed);
    pthread_mutex_unlock(&e->in_lock);
}

static enum ht_status command(struct ht_engine *e, struct ht_state_command *c)
{
    pthread_mutex_lock(&e->in_lock);
    while (e->command) pthread_cond_wait(&e->command_done, &e->in_lock); // another caller's
    e->command = c;
    pthread_cond_signal(&e->in_changed);
    while (!c->done) pthread_cond_wait(&e->command_done, &e->in_lock);
    pthread_mutex_unlock(&e->in_lock);
    if (c->status != HT_OK) return HT_FAIL(c->status, "%s", c->message);
    return HT_OK;
}

enum ht_status ht_engine_save_state(struct ht_engine *e, const int32_t *ids, int64_t n,
                                    const char *path)
{
    struct ht_state_command c = { .is_save = true, .ids = ids, .n = n, .path = path };

    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= ht_engine_vocab_size(e))
            return HT_FAIL(HT_ERR_ARG, "token %lld is %d; the vocabulary has 0 to %lld",
                           (long long)i, ids[i], (long long)ht_engine_vocab_size(e) - 1);
    return command(e, &c);
}

enum ht_status ht_engine_restore_state(struct ht_engine *e, const char *path, int64_t *n_tokens)
{
    struct ht_state_command c = { .path = path };

    *n_tokens = 0;
    HT_TRY(command(e, &c));
    *n_tokens = c.n;
    return HT_OK;
}

/* ---- out ---- */

static struct ht_engine_event *take_locked(struct ht_engine *e)
{
    struct ht_engine_event *list = e->events;
    uint64_t count;

    e->events = NULL;
    e->events_end = &e->events;
    const ssize_t n = read(e->event_fd, &count, sizeof count);
    (void)n; // nothing to reset is fine
    return list;
}

struct ht_engine_event *ht_engine_take_events(struct ht_engine *e)
{
    pthread_mutex_lock(&e->out_lock);
    struct ht_engine_event *list = take_locked(e);
    pthread_mutex_unlock(&e->out_lock);
    return list;
}

struct ht_engine_event *ht_engine_wait_events(struct ht_engine *e, double timeout_s)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    const double at = (double)until.tv_nsec * 1e-9 + (timeout_s > 0 ? timeout_s : 0);
    until.tv_sec += (time_t)at;
    until.tv_nsec = (long)((at - (double)(time_t)at) * 1e9);
    pthread_mutex_lock(&e->out_lock);
    while (!e->events)
        if (pthread_cond_timedwait(&e->out_changed, &e->out_lock, &until) == ETIMEDOUT) break;
    struct ht_engine_event *list = take_locked(e);
    pthread_mutex_unlock(&e->out_lock);
    return list;
}

void ht_engine_event_free(struct ht_engine_event *list)
{
    while (list) {
        struct ht_engine_event *next = list->next;
        free(list);
        list = next;
    }
}
