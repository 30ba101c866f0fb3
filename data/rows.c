/* data/rows.c: windows of rows, walked ahead and given out in the order of a bijection. */
#include "data/rows.h"

#include <stdlib.h>
#include <string.h>

enum {
    WALKED_AHEAD = 2
}; // rows of the next window per row taken: windows differ by less than that factor

static enum ht_status reserve(struct ht_window *w, int64_t room, int words)
{
    int64_t *marks = calloc((size_t)room, (size_t)words * sizeof *marks);
    int32_t *counted = calloc((size_t)room, sizeof *counted);

    if (!marks || !counted) {
        free(marks);
        free(counted);
        return HT_FAIL(HT_ERR_MEMORY,
                       "loader: no memory for the starts of %lld rows (%.1f MB); lower "
                       "data.shuffle_window_rows",
                       (long long)room, (double)room * (8.0 * words + 4.0) * 1e-6);
    }
    free(w->marks);
    free(w->counted);
    w->marks = marks;
    w->counted = counted;
    w->room = room;
    return HT_OK;
}

enum ht_status ht_rows_create(struct ht_rows *r, const struct ht_stream *s, int64_t seq_len,
                              bool pack_leak, int64_t window_rows)
{
    enum ht_status st = HT_OK;

    *r = (struct ht_rows){ .stream = s,
                           .seq_len = seq_len,
                           .pack_leak = pack_leak,
                           .window_rows = window_rows,
                           .words = ht_stream_mark_words(s) };
    for (int i = 0; i < 2 && st == HT_OK; i++) st = reserve(&r->window[i], window_rows, r->words);
    if (st != HT_OK)
        ht_rows_free(r);
    else
        ht_rows_start(r);
    return st;
}

void ht_rows_free(struct ht_rows *r)
{
    for (int i = 0; i < 2; i++) {
        free(r->window[i].marks);
        free(r->window[i].counted);
        r->window[i].marks = NULL;
        r->window[i].counted = NULL;
    }
}

static void empty(struct ht_window *w, int64_t first)
{
    w->first = first;
    w->n = 0;
    w->complete = false;
}

/* The walk is at row `row`: no window is walked. */
static void begin(struct ht_rows *r, int64_t row)
{
    r->row = row;
    r->now = 0;
    r->done = 0;
    empty(&r->window[0], row);
    r->window[0].complete = true; // of no rows: the next one follows
    empty(&r->window[1], row);
}

void ht_rows_start(struct ht_rows *r)
{
    ht_cursor_start(&r->walk, r->stream);
    begin(r, 0);
}

/* Rows until the dataset that takes longest has gone round; exact with a single dataset. */
static int64_t rows_to_round(const struct ht_rows *r, int64_t tokens_left)
{
    const struct ht_stream *s = r->stream;
    __int128 sum = 0;

    for (int d = 0; d < s->n_datasets; d++) sum += s->scaled[d];
    const __int128 tokens = (sum * tokens_left + s->scaled[s->slowest] - 1) / s->scaled[s->slowest];
    const __int128 rows = (tokens + r->seq_len - 1) / r->seq_len;
    return rows < INT64_MAX / 4 ? (int64_t)rows : INT64_MAX / 4;
}

/* Rounds that the dataset has gone, in tokens. */
static int64_t rounds(const struct ht_rows *r)
{
    const int d = r->stream->slowest;
    return r->walk.tokens[d] / r->stream->dataset[d].n_tokens;
}

/* An epoch's rows in windows of nearly one length, none above window_rows. */
static int64_t window_limit(const struct ht_rows *r)
{
    const int d = r->stream->slowest;
    const int64_t n_tokens = r->stream->dataset[d].n_tokens;
    const int64_t rows = rows_to_round(r, n_tokens - r->walk.tokens[d] % n_tokens);
    const int64_t windows = (rows + r->window_rows - 1) / r->window_rows;

    return windows > 1 ? (rows + windows - 1) / windows : r->window_rows;
}

static void complete(const struct ht_rows *r, struct ht_window *w)
{
    const uint64_t purpose = 0x726f777300000000u; // "rows"

    w->complete = true;
    if (w->n > 1)
        ht_permute_init(&w->order, (uint64_t)w->n, r->stream->seed, purpose, (uint64_t)w->first);
}

/* The next row of the stream into w; returns its labels >= 0. */
static void walk_row(struct ht_rows *r, struct ht_window *w)
{
    int64_t counted = 0;
    struct ht_piece p;

    ht_cursor_mark(&r->walk, r->stream, w->marks + w->n * r->words);
    for (int64_t at = 0; at < r->seq_len; at += p.n) {
        ht_cursor_take(&r->walk, r->stream, r->seq_len - at, &p);
        if (p.n == 0) break;
        counted += p.n - (p.ends_stream || (p.ends_doc && !r->pack_leak));
    }
    w->counted[w->n++] = (int32_t)counted;
    r->row++;
}

/* One row more of a window that is not complete. */
static void grow(struct ht_rows *r, struct ht_window *w)
{
    const int64_t before = rounds(r);

    if (w->n == 0) w->limit = window_limit(r);
    walk_row(r, w);
    if (w->n == w->limit || rounds(r) != before) complete(r, w);
}

/* The window that holds the next row. */
static const struct ht_window *present(struct ht_rows *r)
{
    if (r->done == r->window[r->now].n) {
        struct ht_window *next = &r->window[!r->now];
        while (!next->complete) grow(r, next);
        empty(&r->window[r->now], r->row);
        r->now = !r->now;
        r->done = 0;
    }
    return &r->window[r->now];
}

static int64_t place(const struct ht_window *w, int64_t i)
{
    return w->n > 1 ? (int64_t)ht_permute_at(&w->order, (uint64_t)i) : i;
}

const int64_t *ht_rows_next(struct ht_rows *r, int64_t *counted)
{
    const struct ht_window *w = present(r);
    struct ht_window *next = &r->window[!r->now];
    const int64_t i = place(w, r->done++);

    for (int k = 0; k < WALKED_AHEAD && !next->complete; k++) grow(r, next);
    *counted = w->counted[i];
    return w->marks + i * r->words;
}

bool ht_rows_ended(struct ht_rows *r)
{
    int64_t taken = 0;

    if (!r->stream->one_epoch) return false;
    const struct ht_window *w = present(r); // one row: nothing is shuffled in a single epoch
    for (int d = 0; d < r->stream->n_datasets; d++)
        taken += w->marks[r->done * r->words + 4 + 2 * d];
    return taken == r->stream->epoch_tokens;
}

void ht_rows_export(const struct ht_rows *r, struct ht_cursor *c, struct ht_loader_state *out)
{
    const struct ht_window *w = &r->window[r->now];
    const struct ht_cursor *at = c;

    memset(out, 0, sizeof *out); // padding too: states are compared byte by byte
    if (r->done == w->n) {
        w = &r->window[!r->now];
    } else if (r->done > 0) {
        out->window_rows = w->n;
        out->window_done = r->done;
    } // else a window begins with the next row
    if (w->n > 0)
        ht_cursor_go_to(c, r->stream, w->marks);
    else
        at = &r->walk;
    out->row = w->first + out->window_done;
    out->seq_len = r->seq_len;
    out->seed = (int64_t)r->stream->seed;
    ht_cursor_export(at, r->stream, out);
}

static enum ht_status check(const struct ht_rows *r, const struct ht_loader_state *in)
{
    const long long done = in->window_done, rows = in->window_rows;
    const int64_t longest =
        2 * rows_to_round(r, r->stream->dataset[r->stream->slowest].n_tokens) + 2;

    if (in->row < 0) return HT_FAIL(HT_ERR_FORMAT, "loader state: row is %lld", (long long)in->row);
    if (in->seed >= 0 && in->row > 0 && in->seed != (int64_t)r->stream->seed)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "loader state: seed is %lld, the recipe's is %lld: rows would be trained twice and "
            "others never; resume with data.seed = %lld, or without the loader's state",
            (long long)in->seed, (long long)r->stream->seed, (long long)in->seed);
    if (rows == 0 && done == 0) return HT_OK;
    if (rows < 2 || rows > HT_LOADER_MAX_WINDOW || rows > longest)
        return HT_FAIL(
            HT_ERR_FORMAT, "loader state: window_rows is %lld; 0, or 2 to %lld", rows,
            (long long)(longest < HT_LOADER_MAX_WINDOW ? longest : HT_LOADER_MAX_WINDOW));
    if (done < 1 || done >= rows || done > in->row)
        return HT_FAIL(HT_ERR_FORMAT, "loader state: window_done is %lld of %lld rows, at row %lld",
                       done, rows, (long long)in->row);
    if (!r->stream->shuffle || r->stream->one_epoch)
        return HT_FAIL(HT_ERR_FORMAT,
                       "loader state: %lld of a window of %lld shuffled rows are done; resume with "
                       "data.shuffle = true, or without the loader's state",
                       done, rows);
    if (in->seq_len != r->seq_len)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "loader state: %lld of a window of %lld rows of %lld tokens are done; "
            "data.seq_len is %lld: resume with data.seq_len = %lld, or without the loader's "
            "state",
            done, rows, (long long)in->seq_len, (long long)r->seq_len, (long long)in->seq_len);
    return HT_OK;
}

enum ht_status ht_rows_import(struct ht_rows *r, struct ht_cursor *c,
                              const struct ht_loader_state *in)
{
    HT_TRY(check(r, in));
    HT_TRY(ht_cursor_import(c, r->stream, in));
    if (in->window_rows > r->window[0].room)
        HT_TRY(reserve(&r->window[0], in->window_rows, r->words));
    r->walk = *c;
    begin(r, in->row - in->window_done);
    if (in->window_rows == 0) return HT_OK;
    // the rest of the window, whatever size windows have now
    struct ht_window *w = &r->window[0];
    while (w->n < in->window_rows) walk_row(r, w);
    complete(r, w);
    r->done = in->window_done;
    empty(&r->window[1], r->row);
    return HT_OK;
}
