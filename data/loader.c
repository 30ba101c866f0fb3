/* data/loader.c: steps are planned by walking lengths, own rows are read, a thread keeps some
 * ahead.
 *
 * Per step: the plan takes the rows of all ranks (rows.h), adds up their labels and keeps where
 * this rank's rows begin. Batches are then filled from there.
 * Everything that is produced belongs to whoever produces (the thread, or the caller without one);
 * `lock` guards the ring.
 */
#include "data/loader.h"

#include <assert.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "data/mix.h"
#include "data/rows.h"

struct slot {
    struct ht_batch batch;
    struct ht_loader_state state_after; // of the step, when batch.last_of_step
    int32_t *ids, *labels, *pos, *starts;
};

struct ht_loader {
    struct ht_loader_options o; // datasets is not kept
    struct ht_stream stream;
    int n_slots;
    struct slot *slots;
    int32_t *memory; // of all slots

    // the producer's
    struct ht_rows rows;
    struct ht_cursor fill, peek;
    int64_t own_rows, micro; // of one step: rows of this rank, batches filled so far
    int64_t *own;            // (own_rows, rows.words) where they begin
    int64_t step_counted;

    // the caller's
    struct ht_loader_state state;
    bool started, has_thread;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t filled, emptied;
    int head, n_ready;
    bool lent;     // the slot before head is with the caller
    bool finished; // nothing more will be filled
    bool stop;
    enum ht_status status; // why, with its message
    char message[4096];
};

/* Plan the next step; *end when the one epoch is over. */
static void plan_step(struct ht_loader *l, bool *end)
{
    const int64_t first = l->own_rows * l->o.rank;

    *end = ht_rows_ended(&l->rows);
    if (*end) return;
    l->step_counted = 0;
    for (int64_t row = 0; row < l->o.rows_per_step; row++) {
        int64_t counted;
        const int64_t *begin = ht_rows_next(&l->rows, &counted);
        l->step_counted += counted;
        if (row >= first && row < first + l->own_rows)
            memcpy(l->own + (row - first) * l->rows.words, begin,
                   (size_t)l->rows.words * sizeof *begin);
    }
}

static enum ht_status check_ids(const struct ht_loader *l, const struct ht_piece *p,
                                const int32_t *ids, int64_t n)
{
    const struct ht_dataset *d = &l->stream.dataset[p->dataset];

    if (l->o.vocab_size <= 0 || d->vocab_size <= l->o.vocab_size) return HT_OK;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] >= l->o.vocab_size)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: document %lld, token %lld: id %d; the model has %lld", d->path,
                           (long long)p->doc, (long long)(p->first + i), (int)ids[i],
                           (long long)l->o.vocab_size);
    return HT_OK;
}

static enum ht_status read_piece(const struct ht_loader *l, const struct ht_piece *p, int64_t n,
                                 int32_t *out)
{
    HT_TRY(ht_dataset_read(&l->stream.dataset[p->dataset], p->doc, p->first, n, out));
    return check_ids(l, p, out, n);
}

/* The token after a document that ends with its row (pack_leak); -1 at the end of the stream. */
static enum ht_status peek_token(struct ht_loader *l, int32_t *token)
{
    struct ht_piece p;

    *token = -1;
    l->peek = l->fill;
    ht_cursor_take(&l->peek, &l->stream, 1, &p);
    return p.n ? read_piece(l, &p, 1, token) : HT_OK;
}

static void begin_sequence(struct slot *s, int64_t at)
{
    s->starts[s->batch.seqs.n_seqs++] = (int32_t)at;
}

static void fill_pos(struct slot *s, int64_t from, int64_t n)
{
    for (int64_t i = 0; i < n; i++) s->pos[from + i] = (int32_t)i;
}

/* This rank's row `row` of the step into tokens base .. base+seq_len-1 of the slot. */
static enum ht_status fill_row(struct ht_loader *l, struct slot *s, int64_t row, int64_t base)
{
    const int64_t end = base + l->o.seq_len;
    int64_t at = base;
    struct ht_piece p = { .n = 0 };

    ht_cursor_go_to(&l->fill, &l->stream, l->own + row * l->rows.words);
    if (l->o.pack_leak) {
        begin_sequence(s, base);
        fill_pos(s, base, l->o.seq_len);
    }
    while (at < end) {
        ht_cursor_take(&l->fill, &l->stream, end - at, &p);
        if (p.n == 0) break;
        // one token more where the row cuts the document; ids has room, the next row overwrites it
        HT_TRY(read_piece(l, &p, p.n + !p.ends_doc, s->ids + at));
        memcpy(s->labels + at, s->ids + at + 1, (size_t)(p.n - 1) * sizeof *s->labels);
        if (l->o.pack_leak) {
            if (at > base) s->labels[at - 1] = s->ids[at];
        } else {
            begin_sequence(s, at);
            fill_pos(s, at, p.n);
        }
        at += p.n;
        s->labels[at - 1] = p.ends_doc ? -1 : s->ids[at];
        s->batch.n_counted += p.n - (p.ends_stream || (p.ends_doc && !l->o.pack_leak));
    }
    if (at == end) {
        if (l->o.pack_leak && p.ends_doc) HT_TRY(peek_token(l, &s->labels[end - 1]));
    } else { // behind the end of the only epoch
        memset(s->ids + at, 0, (size_t)(end - at) * sizeof *s->ids);
        memset(s->labels + at, 0xff, (size_t)(end - at) * sizeof *s->labels);
        if (!l->o.pack_leak) {
            begin_sequence(s, at);
            fill_pos(s, at, end - at);
        }
    }
    return HT_OK;
}

static enum ht_status fill_batch(struct ht_loader *l, struct slot *s, bool *end)
{
    struct ht_batch *b = &s->batch;
    double sum = 0.0, squares = 0.0;

    *end = false;
    if (l->micro == 0) {
        plan_step(l, end);
        if (*end) return HT_OK;
    }
    b->n_counted = 0;
    b->seqs.n_seqs = 0;
    for (int64_t r = 0; r < l->o.micro_rows; r++)
        HT_TRY(fill_row(l, s, l->micro * l->o.micro_rows + r, r * l->o.seq_len));
    s->starts[b->seqs.n_seqs] = (int32_t)b->n_tokens;
    for (int64_t i = 0; i < b->seqs.n_seqs; i++) {
        const double n = s->starts[i + 1] - s->starts[i];
        sum += n;
        squares += n * n;
    }
    b->attended = squares / sum;
    b->step_counted = l->step_counted;
    b->last_of_step = ++l->micro == l->own_rows / l->o.micro_rows;
    if (b->last_of_step) {
        l->micro = 0;
        ht_rows_export(&l->rows, &l->peek, &s->state_after);
    }
    return HT_OK;
}

static void *prefetch(void *context)
{
    struct ht_loader *l = context;
    int tail = 0;

    pthread_mutex_lock(&l->lock);
    while (!l->stop && !l->finished) {
        if (l->n_ready + l->lent == l->n_slots) {
            pthread_cond_wait(&l->emptied, &l->lock);
            continue;
        }
        pthread_mutex_unlock(&l->lock);
        bool end = false;
        const enum ht_status st = fill_batch(l, &l->slots[tail], &end);
        pthread_mutex_lock(&l->lock);
        if (st != HT_OK || end) {
            l->finished = true;
            l->status = st;
            if (st != HT_OK) snprintf(l->message, sizeof l->message, "%s", ht_error_message());
        } else {
            l->n_ready++;
            tail = (tail + 1) % l->n_slots;
        }
        pthread_cond_signal(&l->filled);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

static enum ht_status start(struct ht_loader *l)
{
    l->started = true;
    if (l->o.prefetch_batches == 0) return HT_OK;
    sigset_t all, old; // signals are the main thread's
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int r = pthread_create(&l->thread, NULL, prefetch, l);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    if (r != 0) return HT_FAIL(HT_ERR_MEMORY, "loader: cannot start its thread: %s", strerror(r));
    l->has_thread = true;
    return HT_OK;
}

static enum ht_status next_from_thread(struct ht_loader *l, struct slot **s)
{
    enum ht_status st = HT_OK;

    pthread_mutex_lock(&l->lock);
    if (l->lent) {
        l->lent = false;
        pthread_cond_signal(&l->emptied);
    }
    while (l->n_ready == 0 && !l->finished) pthread_cond_wait(&l->filled, &l->lock);
    if (l->n_ready > 0) {
        *s = &l->slots[l->head];
        l->head = (l->head + 1) % l->n_slots;
        l->n_ready--;
        l->lent = true;
    } else if (l->status != HT_OK) {
        st = HT_FAIL(l->status, "%s", l->message);
    }
    pthread_mutex_unlock(&l->lock);
    return st;
}

static enum ht_status next_directly(struct ht_loader *l, struct slot **s)
{
    bool end = false;

    if (!l->finished) l->status = fill_batch(l, &l->slots[0], &end);
    if (!l->finished && l->status != HT_OK)
        snprintf(l->message, sizeof l->message, "%s", ht_error_message());
    l->finished = l->finished || end || l->status != HT_OK;
    if (!l->finished) *s = &l->slots[0];
    return l->status == HT_OK ? HT_OK : HT_FAIL(l->status, "%s", l->message);
}

enum ht_status ht_loader_next(struct ht_loader *l, const struct ht_batch **batch, double *wait_s)
{
    const double begin = ht_time_s();
    struct slot *s = NULL;

    *batch = NULL;
    if (!l->started) HT_TRY(start(l));
    HT_TRY(l->has_thread ? next_from_thread(l, &s) : next_directly(l, &s));
    if (wait_s) *wait_s = ht_time_s() - begin;
    if (!s) return HT_OK;
    if (s->batch.last_of_step) l->state = s->state_after;
    *batch = &s->batch;
    return HT_OK;
}

void ht_loader_get_state(const struct ht_loader *l, struct ht_loader_state *out)
{
    *out = l->state;
}

enum ht_status ht_loader_set_state(struct ht_loader *l, const struct ht_loader_state *s)
{
    if (l->started)
        return HT_FAIL(HT_ERR_ARG, "loader: its state can be set before the first batch only");
    const enum ht_status st = ht_rows_import(&l->rows, &l->peek, s);
    ht_cursor_start(&l->peek, &l->stream); // undefined after a failure
    if (st == HT_OK) ht_rows_export(&l->rows, &l->peek, &l->state);
    return st;
}

enum ht_status ht_loader_rewind(struct ht_loader *l)
{
    if (!l->o.one_epoch || l->o.prefetch_batches > 0)
        return HT_FAIL(HT_ERR_ARG,
                       "loader: only one without prefetching that stops after one epoch can "
                       "begin again");
    ht_rows_start(&l->rows);
    ht_rows_export(&l->rows, &l->peek, &l->state);
    l->micro = 0;
    l->started = l->finished = false;
    l->status = HT_OK;
    return HT_OK;
}

static enum ht_status check_options(const struct ht_loader_options *o)
{
    if (o->n_datasets < 1 || o->n_datasets > HT_LOADER_MAX_DATASETS)
        return HT_FAIL(HT_ERR_ARG, "loader: %d datasets; 1 to %d are possible", o->n_datasets,
                       HT_LOADER_MAX_DATASETS);
    if (o->n_ranks < 1 || o->rank < 0 || o->rank >= o->n_ranks)
        return HT_FAIL(HT_ERR_ARG, "loader: rank %d of %d", o->rank, o->n_ranks);
    if (o->seq_len < 1 || o->micro_rows < 1 || o->rows_per_step < 1 || o->seq_len > INT32_MAX ||
        o->micro_rows > (INT32_MAX - 1) / o->seq_len)
        return HT_FAIL(HT_ERR_ARG,
                       "loader: micro-batch of %lld rows of %lld tokens, %lld rows a step; "
                       "each at least 1, a micro-batch below 2^31 tokens",
                       (long long)o->micro_rows, (long long)o->seq_len,
                       (long long)o->rows_per_step);
    if (o->rows_per_step % o->n_ranks != 0 || o->rows_per_step / o->n_ranks % o->micro_rows != 0)
        return HT_FAIL(
            HT_ERR_ARG,
            "loader: %lld rows a step do not divide into %d ranks times micro-batches of %lld",
            (long long)o->rows_per_step, o->n_ranks, (long long)o->micro_rows);
    if (o->prefetch_batches < 0 || o->prefetch_batches > 1024)
        return HT_FAIL(HT_ERR_ARG, "loader: prefetch_batches is %lld; 0 to 1024 are possible",
                       (long long)o->prefetch_batches);
    if (o->window_rows < 0 || o->window_rows > HT_LOADER_MAX_WINDOW)
        return HT_FAIL(HT_ERR_ARG, "loader: window of %lld rows; 0 to %d are possible",
                       (long long)o->window_rows, HT_LOADER_MAX_WINDOW);
    if (o->seed > INT64_MAX)
        return HT_FAIL(HT_ERR_ARG, "loader: seed is %llu; it must be below 2^63",
                       (unsigned long long)o->seed);
    return HT_OK;
}

/* The dataset that takes longest to be drawn once: it has the most tokens for its weight. */
static int slowest(const struct ht_stream *s)
{
    int best = -1;

    for (int d = 0; d < s->n_datasets; d++)
        if (s->scaled[d] > 0 &&
            (best < 0 || (__int128)s->dataset[d].n_tokens * s->scaled[best] >
                             (__int128)s->dataset[best].n_tokens * s->scaled[d]))
            best = d;
    return best;
}

static enum ht_status open_stream(struct ht_stream *s, const struct ht_loader_options *o)
{
    double weights[HT_LOADER_MAX_DATASETS];

    s->seed = o->seed;
    s->shuffle = o->shuffle;
    s->one_epoch = o->one_epoch;
    for (int d = 0; d < o->n_datasets; d++) weights[d] = o->datasets[d].weight;
    HT_TRY(ht_mix_scale(s->scaled, weights, o->n_datasets));
    for (int d = 0; d < o->n_datasets; d++) {
        struct ht_dataset *set = &s->dataset[d];
        HT_TRY(ht_dataset_open(set, o->datasets[d].path));
        s->n_datasets = d + 1;
        const char *hash = ht_shard_tokenizer_hash(set->shards[0]);
        const char *first = ht_shard_tokenizer_hash(s->dataset[0].shards[0]);
        if (strcmp(hash, first) != 0)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s has tokenizer %s, %s has %s: tokenize both with the same", set->path,
                           hash, s->dataset[0].path, first);
        if (s->scaled[d] == 0) continue;
        if (set->n_tokens == 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s: no tokens in %lld documents", set->path,
                           (long long)set->n_docs);
        s->epoch_tokens += set->n_tokens;
    }
    s->slowest = slowest(s);
    return HT_OK;
}

static size_t slot_words(const struct ht_loader_options *o)
{
    const size_t n = (size_t)o->micro_rows * (size_t)o->seq_len;
    return 4 * (n + 16); // ids with one more, labels, pos, starts with one more; 64-byte steps
}

static enum ht_status allocate(struct ht_loader *l)
{
    const struct ht_loader_options *o = &l->o;
    const size_t n_tokens = (size_t)o->micro_rows * (size_t)o->seq_len, words = slot_words(o);

    l->n_slots = (int)o->prefetch_batches + 1; // one is with the caller
    l->slots = calloc((size_t)l->n_slots, sizeof *l->slots);
    l->memory = calloc((size_t)l->n_slots * words, sizeof *l->memory);
    l->own = calloc((size_t)l->own_rows * (size_t)l->rows.words, sizeof *l->own);
    if (!l->slots || !l->memory || !l->own)
        return HT_FAIL(HT_ERR_MEMORY, "loader: no memory for %d batches of %zu tokens", l->n_slots,
                       n_tokens);
    for (int i = 0; i < l->n_slots; i++) {
        struct slot *s = &l->slots[i];
        s->ids = l->memory + (size_t)i * words;
        s->labels = s->ids + words / 4;
        s->pos = s->labels + words / 4;
        s->starts = s->pos + words / 4;
        s->batch = (struct ht_batch){ .n_rows = o->micro_rows,
                                      .n_tokens = (int64_t)n_tokens,
                                      .ids = s->ids,
                                      .labels = s->labels,
                                      .pos = s->pos,
                                      .seqs = { .starts = s->starts } };
    }
    return HT_OK;
}

enum ht_status ht_loader_open(struct ht_loader **out, const struct ht_loader_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_loader *l = NULL;

    *out = NULL;
    HT_TRY(check_options(o));
    l = calloc(1, sizeof *l);
    if (!l) return HT_FAIL(HT_ERR_MEMORY, "no memory for a loader");
    pthread_mutex_init(&l->lock, NULL); // cannot fail with glibc
    pthread_cond_init(&l->filled, NULL);
    pthread_cond_init(&l->emptied, NULL);
    l->o = *o;
    l->o.datasets = NULL;
    l->own_rows = o->rows_per_step / o->n_ranks;
    HT_TRY_GOTO(st, done, open_stream(&l->stream, o));
    const int64_t window_rows =
        o->shuffle && !o->one_epoch && o->window_rows > 1 ? o->window_rows : 1;
    HT_TRY_GOTO(st, done,
                ht_rows_create(&l->rows, &l->stream, o->seq_len, o->pack_leak, window_rows));
    HT_TRY_GOTO(st, done, allocate(l));
    ht_cursor_start(&l->fill, &l->stream);
    ht_cursor_start(&l->peek, &l->stream);
    ht_rows_export(&l->rows, &l->peek, &l->state);
    *out = l;
    l = NULL;
done:
    ht_loader_close(l);
    return st;
}

void ht_loader_close(struct ht_loader *l)
{
    if (!l) return;
    if (l->has_thread) {
        pthread_mutex_lock(&l->lock);
        l->stop = true;
        pthread_cond_signal(&l->emptied);
        pthread_mutex_unlock(&l->lock);
        pthread_join(l->thread, NULL);
    }
    for (int d = 0; d < l->stream.n_datasets; d++) ht_dataset_close(&l->stream.dataset[d]);
    pthread_cond_destroy(&l->filled);
    pthread_cond_destroy(&l->emptied);
    pthread_mutex_destroy(&l->lock);
    ht_rows_free(&l->rows);
    free(l->own);
    free(l->slots);
    free(l->memory);
    free(l);
}

int64_t ht_loader_text_bytes(const struct ht_loader *l)
{
    int64_t n = 0;
    for (int d = 0; d < l->stream.n_datasets; d++) n += l->stream.dataset[d].text_bytes;
    return n;
}

int64_t ht_loader_n_tokens(const struct ht_loader *l)
{
    int64_t n = 0;
    for (int d = 0; d < l->stream.n_datasets; d++) n += l->stream.dataset[d].n_tokens;
    return n;
}
