/* data/stream.c: cursors over the global stream of documents. */
#include "data/stream.h"

#include <assert.h>
#include <string.h>

#include "data/mix.h"

/* Order of dataset d's present epoch. Its own stream of random numbers per dataset. */
static void set_order(struct ht_cursor *c, const struct ht_stream *s, int d)
{
    const uint64_t purpose = 0x6f72646572000000u + (uint64_t)d; // "order"
    const int64_t n = s->dataset[d].n_docs;

    if (n > 0) ht_permute_init(&c->order[d], (uint64_t)n, s->seed, purpose, (uint64_t)c->epoch[d]);
}

static int64_t doc_at(const struct ht_cursor *c, const struct ht_stream *s, int d, int64_t position)
{
    return s->shuffle ? (int64_t)ht_permute_at(&c->order[d], (uint64_t)position) : position;
}

void ht_cursor_start(struct ht_cursor *c, const struct ht_stream *s)
{
    memset(c, 0, sizeof *c);
    c->current = -1;
    for (int d = 0; d < s->n_datasets; d++) {
        c->scaled[d] = s->scaled[d];
        set_order(c, s, d);
    }
}

/* Draw documents until one has tokens; false when all are used up. */
static bool draw(struct ht_cursor *c, const struct ht_stream *s)
{
    for (;;) {
        const int d = ht_mix_choose(c->scaled, c->tokens, s->n_datasets);
        if (d < 0) return false;
        if (c->doc[d] == s->dataset[d].n_docs) {
            if (s->one_epoch) {
                c->scaled[d] = 0;
                continue;
            }
            c->epoch[d]++;
            c->doc[d] = 0;
            set_order(c, s, d);
        }
        c->current_doc = doc_at(c, s, d, c->doc[d]);
        c->current_length = ht_dataset_doc_length(&s->dataset[d], c->current_doc);
        c->doc[d]++;
        c->visited[d]++;
        if (c->current_length == 0) continue;
        c->current = d;
        c->current_pos = 0;
        return true;
    }
}

void ht_cursor_take(struct ht_cursor *c, const struct ht_stream *s, int64_t max,
                    struct ht_piece *piece)
{
    *piece = (struct ht_piece){ .dataset = -1 };
    if (c->current < 0 && !draw(c, s)) return;
    const int64_t left = c->current_length - c->current_pos;
    const int64_t n = left < max ? left : max;
    piece->dataset = c->current;
    piece->doc = c->current_doc;
    piece->first = c->current_pos;
    piece->n = n;
    piece->ends_doc = n == left;
    c->current_pos += n;
    c->tokens[c->current] += n;
    c->taken += n;
    piece->ends_stream = s->one_epoch && c->taken == s->epoch_tokens;
    if (piece->ends_doc) {
        c->current = -1;
        c->current_doc = c->current_pos = 0;
    }
}

int ht_stream_mark_words(const struct ht_stream *s)
{
    return 3 + 2 * s->n_datasets;
}

void ht_cursor_mark(const struct ht_cursor *c, const struct ht_stream *s, int64_t *mark)
{
    uint64_t used_up = 0, bit = 1;

    for (int d = 0; d < s->n_datasets; d++, bit <<= 1) {
        if (c->scaled[d] != s->scaled[d]) used_up |= bit;
        mark[3 + 2 * d] = c->visited[d];
        mark[4 + 2 * d] = c->tokens[d];
    }
    mark[0] = (int64_t)used_up;
    mark[1] = c->current;
    mark[2] = c->current_pos;
}

void ht_cursor_go_to(struct ht_cursor *c, const struct ht_stream *s, const int64_t *mark)
{
    const uint64_t used_up = (uint64_t)mark[0];
    uint64_t bit = 1;

    c->taken = 0;
    for (int d = 0; d < s->n_datasets; d++, bit <<= 1) {
        const int64_t visited = mark[3 + 2 * d], n_docs = s->dataset[d].n_docs;
        const int64_t epoch = visited > 0 ? (visited - 1) / n_docs : 0;
        c->scaled[d] = used_up & bit ? 0 : s->scaled[d];
        c->visited[d] = visited;
        c->doc[d] = visited - epoch * n_docs;
        c->tokens[d] = mark[4 + 2 * d];
        c->taken += c->tokens[d];
        if (c->epoch[d] == epoch) continue;
        c->epoch[d] = epoch;
        set_order(c, s, d);
    }
    c->current = (int)mark[1];
    c->current_pos = mark[2];
    c->current_doc = 0;
    if (c->current < 0) return;
    c->current_doc = doc_at(c, s, c->current, c->doc[c->current] - 1);
    c->current_length = ht_dataset_doc_length(&s->dataset[c->current], c->current_doc);
}

void ht_cursor_export(const struct ht_cursor *c, const struct ht_stream *s,
                      struct ht_loader_state *out)
{
    out->n_datasets = s->n_datasets;
    for (int d = 0; d < s->n_datasets; d++) {
        out->dataset[d].epoch = c->epoch[d];
        out->dataset[d].doc = c->doc[d];
        out->dataset[d].tokens = c->tokens[d];
        out->dataset[d].docs_visited = c->visited[d];
        out->dataset[d].fingerprint = s->dataset[d].fingerprint;
    }
    out->current = c->current;
    out->current_doc = c->current_doc;
    out->current_pos = c->current_pos;
}

static enum ht_status import_dataset(struct ht_cursor *c, const struct ht_stream *s, int d,
                                     const struct ht_loader_state *in)
{
    const struct ht_dataset *set = &s->dataset[d];
    const int64_t epoch = in->dataset[d].epoch, doc = in->dataset[d].doc;
    const int64_t tokens = in->dataset[d].tokens, visited = in->dataset[d].docs_visited;

    if (in->dataset[d].fingerprint != set->fingerprint)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "loader state: dataset %d has fingerprint %016llx, %s has %016llx: the data have "
            "changed since; bring them back or start without the loader's state",
            d, (unsigned long long)in->dataset[d].fingerprint, set->path,
            (unsigned long long)set->fingerprint);
    if (epoch < 0 || (s->one_epoch && epoch > 0))
        return HT_FAIL(HT_ERR_FORMAT, "loader state: epoch of dataset %d is %lld", d,
                       (long long)epoch);
    if (doc < 0 || doc > set->n_docs)
        return HT_FAIL(HT_ERR_FORMAT,
                       "loader state: doc of dataset %d is %lld; %s has %lld documents", d,
                       (long long)doc, set->path, (long long)set->n_docs);
    if (visited != (__int128)epoch * set->n_docs + doc)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "loader state: docs_visited of dataset %d is %lld; epoch %lld of %lld documents "
            "and doc %lld say otherwise",
            d, (long long)visited, (long long)epoch, (long long)set->n_docs, (long long)doc);
    if (tokens < (__int128)epoch * set->n_tokens || tokens > ((__int128)epoch + 1) * set->n_tokens)
        return HT_FAIL(HT_ERR_FORMAT,
                       "loader state: tokens of dataset %d is %lld in epoch %lld of %lld tokens", d,
                       (long long)tokens, (long long)epoch, (long long)set->n_tokens);
    c->epoch[d] = epoch;
    c->doc[d] = doc;
    c->tokens[d] = tokens;
    c->visited[d] = visited;
    c->taken += tokens;
    set_order(c, s, d);
    return HT_OK;
}

static enum ht_status import_current(struct ht_cursor *c, const struct ht_stream *s,
                                     const struct ht_loader_state *in)
{
    const int d = in->current;

    if (d < -1 || d >= s->n_datasets)
        return HT_FAIL(HT_ERR_FORMAT, "loader state: current is %d; there are %d datasets", d,
                       s->n_datasets);
    if (d < 0) {
        if (in->current_doc != 0 || in->current_pos != 0)
            return HT_FAIL(
                HT_ERR_FORMAT,
                "loader state: current is -1, yet current_doc is %lld and current_pos %lld",
                (long long)in->current_doc, (long long)in->current_pos);
        return HT_OK;
    }
    const int64_t doc = c->doc[d] > 0 ? doc_at(c, s, d, c->doc[d] - 1) : -1;
    if (in->current_doc != doc)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "loader state: current_doc is %lld; seed %llu%s puts document %lld there: resume "
            "with the seed and order of the run, or without the loader's state",
            (long long)in->current_doc, (unsigned long long)s->seed,
            s->shuffle ? "" : " without shuffling", (long long)doc);
    const int64_t length = ht_dataset_doc_length(&s->dataset[d], doc);
    if (in->current_pos < 1 || in->current_pos >= length)
        return HT_FAIL(HT_ERR_FORMAT,
                       "loader state: current_pos is %lld of %lld tokens in document %lld",
                       (long long)in->current_pos, (long long)length, (long long)doc);
    c->current = d;
    c->current_doc = doc;
    c->current_pos = in->current_pos;
    c->current_length = length;
    return HT_OK;
}

enum ht_status ht_cursor_import(struct ht_cursor *c, const struct ht_stream *s,
                                const struct ht_loader_state *in)
{
    ht_cursor_start(c, s);
    if (in->n_datasets != s->n_datasets)
        return HT_FAIL(HT_ERR_FORMAT, "loader state: %d datasets; the recipe has %d",
                       in->n_datasets, s->n_datasets);
    for (int d = 0; d < s->n_datasets; d++) HT_TRY(import_dataset(c, s, d, in));
    return import_current(c, s, in);
}
