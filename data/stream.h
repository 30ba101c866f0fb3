/* data/stream.h: the one global stream of tokens, walked by document lengths alone; not for users
 * of the loader.
 *
 * A cursor is a place in the stream. Taking a piece moves it on; no token is read and nothing
 * allocated, so every rank can walk the rows of all ranks. Empty documents are visited and give no
 * piece.
 */
#ifndef HT_DATA_STREAM_H
#define HT_DATA_STREAM_H

#include <stdbool.h>
#include <stdint.h>

#include "data/dataset.h"
#include "data/loader.h"
#include "data/permute.h"

struct ht_stream {
    int n_datasets;
    struct ht_dataset dataset[HT_LOADER_MAX_DATASETS];
    int64_t scaled[HT_LOADER_MAX_DATASETS]; // weights (mix.h)
    int64_t epoch_tokens;                   // of the datasets that have a weight
    int slowest;                            // the dataset that takes longest to go round
    uint64_t seed;
    bool shuffle, one_epoch;
};

struct ht_cursor {
    int64_t taken; // tokens since the beginning
    int64_t epoch[HT_LOADER_MAX_DATASETS], doc[HT_LOADER_MAX_DATASETS];
    int64_t tokens[HT_LOADER_MAX_DATASETS], visited[HT_LOADER_MAX_DATASETS];
    int64_t scaled[HT_LOADER_MAX_DATASETS]; // 0 also once a dataset is used up (one_epoch)
    int current;                            // -1: the next piece begins a document
    int64_t current_doc, current_pos, current_length;
    struct ht_permute order[HT_LOADER_MAX_DATASETS]; // of the datasets' present epochs
};

/* n tokens from `first` on of a document. */
struct ht_piece {
    int dataset;
    int64_t doc, first, n;
    bool ends_doc;
    bool ends_stream; // with one_epoch: nothing follows
};

void ht_cursor_start(struct ht_cursor *c, const struct ht_stream *s);

/* A place in few words, for an index of places: ht_stream_mark_words() of them. A cursor goes to
 * one after ht_cursor_start. */
int ht_stream_mark_words(const struct ht_stream *s);
void ht_cursor_mark(const struct ht_cursor *c, const struct ht_stream *s, int64_t *mark);
void ht_cursor_go_to(struct ht_cursor *c, const struct ht_stream *s, const int64_t *mark);

/* The next piece, at most max (>= 1) tokens; piece->n = 0 at the end (one_epoch). */
void ht_cursor_take(struct ht_cursor *c, const struct ht_stream *s, int64_t max,
                    struct ht_piece *piece);

/* The part of a state that is a place in the stream; the caller sets the others (rows.h). */
void ht_cursor_export(const struct ht_cursor *c, const struct ht_stream *s,
                      struct ht_loader_state *out);

/* HT_ERR_FORMAT names the field that does not fit these datasets; c is undefined then. */
enum ht_status ht_cursor_import(struct ht_cursor *c, const struct ht_stream *s,
                                const struct ht_loader_state *in);

#endif
