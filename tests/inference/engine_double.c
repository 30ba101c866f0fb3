/* tests/inference/engine_double.c: stands in for inference/engine.c so that the server is tested
 * without a model.
 *
 * Behind the same functions: a thread gives every running choice one token per step (a step lasts
 * step_us), letters after the last id of the prompt; "z" is followed by the end of text. Requests
 * beyond max_seqs wait, beyond max_queue are refused.
 */
#include "tests/inference/engine_double.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/base/file.h"
#include "inference/grammar.h"

struct running {
    struct running *next;
    uint64_t id;
    struct ht_request r;
    int32_t *ids;
    int64_t made[HT_ENGINE_MAX_CHOICES];
    bool ended[HT_ENGINE_MAX_CHOICES], cancelled, started, echoed;
    double begin_s;
};

struct ht_engine {
    struct engine_double_options o;
    const struct ht_tokenizer *tokenizer;
    pthread_t thread;
    pthread_mutex_t lock;
    struct running *list;
    struct ht_engine_event *events, **last;
    struct ht_engine_stats stats;
    uint64_t next_id;
    bool stop, drain;
    int fd;
};

struct event_box { // an event and what it points to
    struct ht_engine_event ev;
    char text[8];
    struct ht_token_logprob top[HT_ENGINE_MAX_LOGPROBS + 1];
};

static void emit(struct ht_engine *e, const struct running *x, int choice, int32_t id, bool prompt,
                 enum ht_finish finish)
{
    struct event_box *b = calloc(1, sizeof *b);
    const uint64_t one = 1;
    if (!b) abort();
    b->ev = (struct ht_engine_event){ .request = x->id,
                                      .user = x->r.user,
                                      .choice = choice,
                                      .id = id,
                                      .from_prompt = prompt,
                                      .text = b->text,
                                      .finish = finish };
    if (id >= 0) {
        b->text[0] = (char)id;
        b->ev.text_bytes = id < 128;
    }
    if (finish == HT_FINISH_ERROR) b->ev.message = "the double was told to fail";
    if (id >= 0 && x->r.logprobs >= 0) {
        b->ev.has_logprob = !(prompt && id == x->ids[0]);
        b->ev.logprob = -0.1f * (float)(id % 7) - 1.0f / 3.0f;
        for (int i = 0; i < x->r.logprobs; i++)
            b->top[b->ev.n_top++] =
                (struct ht_token_logprob){ (id + i) % 256, b->ev.logprob - (float)i };
        if (b->ev.n_top == 0)
            b->top[b->ev.n_top++] = (struct ht_token_logprob){ id, b->ev.logprob };
        b->ev.top = b->top;
    }
    if (finish != HT_FINISH_NONE) {
        b->ev.prompt_tokens = x->r.n_ids;
        b->ev.generated_tokens = x->made[choice];
        b->ev.total_s = ht_time_s() - x->begin_s;
    }
    *e->last = &b->ev;
    e->last = &b->ev.next;
    if (write(e->fd, &one, sizeof one) < 0) abort();
}

static void step_one(struct ht_engine *e, struct running *x)
{
    if (!x->echoed && x->r.echo && !x->cancelled)
        for (int c = 0; c < x->r.n; c++)
            for (int64_t i = 0; i < x->r.n_ids; i++) emit(e, x, c, x->ids[i], true, HT_FINISH_NONE);
    x->echoed = true;
    for (int c = 0; c < x->r.n; c++) {
        if (x->ended[c]) continue;
        enum ht_finish f = HT_FINISH_NONE;
        int32_t id = x->ids[x->r.n_ids - 1] < 128
                         ? 'a' + (int32_t)((x->ids[x->r.n_ids - 1] + x->made[c] + c) % 26)
                         : 'a';
        if (x->cancelled)
            f = HT_FINISH_CANCELLED;
        else if (e->o.fail_after && x->made[c] >= e->o.fail_after)
            f = HT_FINISH_ERROR;
        else if (x->made[c] >= x->r.max_tokens)
            f = HT_FINISH_LENGTH;
        else if (x->r.deadline_s > 0 && ht_time_s() > x->r.deadline_s)
            f = HT_FINISH_LENGTH;
        else if (x->made[c] > 0 && id == 'a' && !x->r.ignore_eos)
            f = HT_FINISH_STOP;
        if (f == HT_FINISH_NONE) {
            x->made[c]++;
            e->stats.generated_tokens++;
            emit(e, x, c, id, false, HT_FINISH_NONE);
            continue;
        }
        x->ended[c] = true;
        emit(e, x, c, -1, false, f);
    }
}

static bool all_ended(const struct running *x)
{
    for (int c = 0; c < x->r.n; c++)
        if (!x->ended[c]) return false;
    return true;
}

static void free_running(struct running *x)
{
    ht_grammar_free(x->r.grammar);
    free(x->ids);
    free(x);
}

static void *work(void *arg)
{
    struct ht_engine *e = arg;
    for (;;) {
        usleep((useconds_t)e->o.step_us);
        pthread_mutex_lock(&e->lock);
        if (e->stop) break;
        int64_t slots = e->o.max_seqs, waiting = 0, running = 0;
        for (struct running **p = &e->list; *p;) {
            struct running *x = *p;
            if (!x->started && !x->cancelled && slots <= 0) {
                waiting++;
                p = &x->next;
                continue;
            }
            x->started = true;
            slots--;
            step_one(e, x);
            if (all_ended(x)) {
                *p = x->next;
                free_running(x);
            } else {
                running++;
                p = &x->next;
            }
        }
        e->stats.running = running;
        e->stats.waiting = waiting;
        e->stats.steps++;
        pthread_mutex_unlock(&e->lock);
    }
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

struct ht_engine *engine_double_create(const struct engine_double_options *o,
                                       const struct ht_tokenizer *t)
{
    struct ht_engine *e = calloc(1, sizeof *e);
    if (!e) abort();
    e->o = *o;
    e->tokenizer = t;
    e->last = &e->events;
    e->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&e->lock, NULL);
    if (pthread_create(&e->thread, NULL, work, e) != 0) abort();
    return e;
}

void ht_engine_free(struct ht_engine *e)
{
    if (!e) return;
    pthread_mutex_lock(&e->lock);
    e->stop = true;
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->thread, NULL);
    for (struct running *x = e->list, *next; x; x = next) {
        next = x->next;
        free_running(x);
    }
    ht_engine_event_free(e->events);
    close(e->fd);
    free(e);
}

enum ht_status ht_engine_submit(struct ht_engine *e, const struct ht_request *r, uint64_t *id)
{
    enum ht_status st = HT_OK;
    pthread_mutex_lock(&e->lock);
    int64_t n = 0;
    struct running **p = &e->list;
    for (; *p; p = &(*p)->next) n++;
    if (e->drain) {
        st = HT_FAIL(HT_ERR_STOPPED, "draining");
    } else if (n >= e->o.max_seqs + e->o.max_queue) {
        st = HT_FAIL(HT_ERR_MEMORY, "the queue is full");
    } else {
        struct running *x = calloc(1, sizeof *x);
        if (!x) abort();
        x->r = *r;
        x->id = *id = ++e->next_id;
        x->ids = malloc((size_t)r->n_ids * sizeof *x->ids);
        memcpy(x->ids, r->ids, (size_t)r->n_ids * sizeof *x->ids);
        x->begin_s = ht_time_s();
        e->stats.prompt_tokens += r->n_ids;
        if (n >= e->o.max_seqs) e->stats.waiting++;
        *p = x;
    }
    pthread_mutex_unlock(&e->lock);
    return st;
}

void ht_engine_cancel(struct ht_engine *e, uint64_t id)
{
    pthread_mutex_lock(&e->lock);
    for (struct running *x = e->list; x; x = x->next)
        if (x->id == id) x->cancelled = true;
    pthread_mutex_unlock(&e->lock);
}

struct ht_engine_event *ht_engine_take_events(struct ht_engine *e)
{
    uint64_t count;
    pthread_mutex_lock(&e->lock);
    struct ht_engine_event *list = e->events;
    e->events = NULL;
    e->last = &e->events;
    if (read(e->fd, &count, sizeof count) < 0) count = 0;
    pthread_mutex_unlock(&e->lock);
    return list;
}

struct ht_engine_event *ht_engine_wait_events(struct ht_engine *e, double timeout_s)
{
    usleep((useconds_t)(timeout_s * 1e6));
    return ht_engine_take_events(e);
}

void ht_engine_event_free(struct ht_engine_event *list)
{
    for (struct ht_engine_event *next; list; list = next) {
        next = list->next;
        free(list);
    }
}

int ht_engine_event_fd(const struct ht_engine *e)
{
    return e->fd;
}

void ht_engine_drain(struct ht_engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->drain = true;
    pthread_mutex_unlock(&e->lock);
}

bool ht_engine_idle(const struct ht_engine *e)
{
    return e->list == NULL;
}

void ht_engine_get_stats(const struct ht_engine *e, struct ht_engine_stats *out)
{
    struct ht_engine *w = (struct ht_engine *)(uintptr_t)e;
    pthread_mutex_lock(&w->lock);
    *out = e->stats;
    if (e->o.stale_stats) out->waiting = 0;
    pthread_mutex_unlock(&w->lock);
}

const struct ht_tokenizer *ht_engine_tokenizer(const struct ht_engine *e)
{
    return e->tokenizer;
}
int32_t ht_engine_eos(const struct ht_engine *e)
{
    return e->tokenizer ? 257 : -1;
}

int64_t engine_double_unfinished(struct ht_engine *e)
{
    int64_t n = 0;
    pthread_mutex_lock(&e->lock);
    for (struct running *x = e->list; x; x = x->next) n++;
    pthread_mutex_unlock(&e->lock);
    return n;
}
