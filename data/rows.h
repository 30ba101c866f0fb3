/* data/rows.h: the one global order of rows: windows of the stream, each in an order of its own;
 * not for users of the loader.
 *
 *   row i = row a + perm(i - a) of the stream,   a first row of the window that holds i
 *
 * perm is the keyed bijection of permute.h over the rows of the window, keyed by seed and a. A
 * step's rows then come from many documents, however long these are. A window ends after
 * window_rows rows, or earlier with the row in which the dataset that takes longest goes round: a
 * single dataset is given out whole before its next epoch begins. Windows of an epoch are of nearly
 * equal length.
 *
 * Every rank walks all rows and keeps an index of row starts (3 + 2 * n_datasets words and the
 * number of labels each) of two windows: the present one and, growing as rows are taken, the next.
 * Nothing is allocated after create and import.
 */
#ifndef HT_DATA_ROWS_H
#define HT_DATA_ROWS_H

#include "data/stream.h"

struct ht_window {
    int64_t first, n;    // row number of its first row, rows walked so far
    bool complete;       // n is final, order is set
    int64_t limit, room; // rows it may have; rows that marks and counted have room for
    int64_t *marks;      // (room, mark words) where each row begins
    int32_t *counted;    // (room) labels >= 0 of each row
    struct ht_permute order;
};

struct ht_rows {
    const struct ht_stream *stream;
    int64_t seq_len, window_rows;
    bool pack_leak;
    int words;             // of a mark
    struct ht_cursor walk; // behind the last row walked
    int64_t row;           // number of the row to be walked next
    struct ht_window window[2];
    int now;      // window that rows are taken from
    int64_t done; // rows of it taken
};

/* The stream is borrowed. HT_ERR_MEMORY names the size. */
enum ht_status ht_rows_create(struct ht_rows *r, const struct ht_stream *s, int64_t seq_len,
                              bool pack_leak, int64_t window_rows);
void ht_rows_free(struct ht_rows *r);

/* Begin at row 0. */
void ht_rows_start(struct ht_rows *r);

/* Where the next row begins in the stream (borrowed until the next call), and its labels >= 0. Rows
 * behind the end of a stream of one epoch have none. */
const int64_t *ht_rows_next(struct ht_rows *r, int64_t *counted);

/* The stream ends before the next row (one_epoch). */
bool ht_rows_ended(struct ht_rows *r);

/* Place of the next row, the whole state. c is scratch that was started (ht_cursor_start). */
void ht_rows_export(const struct ht_rows *r, struct ht_cursor *c, struct ht_loader_state *out);

/* Go there; walks the rest of the window. HT_ERR_FORMAT names the field; r is as before. */
enum ht_status ht_rows_import(struct ht_rows *r, struct ht_cursor *c,
                              const struct ht_loader_state *in);

#endif
