/* data/loader.h: stateful loader: shards -> packed rows, order a pure function of (seed, row index) [4].
 *
 * One global order of rows exists, the same for every rank count. Per dataset and epoch, documents are
 * visited in the order of a keyed bijection over [0, n_docs) (a Feistel network with cycle walking): each
 * document exactly once per epoch, nothing materialised. Across datasets the next document comes from the one
 * with the largest token deficit against its weight (integer arithmetic, ties to the lowest index); it is
 * held to its end. The documents form one stream; row i is stream tokens [i*seq_len, (i+1)*seq_len] (one
 * token of overlap: inputs and labels). Rows are given out in windows of the stream, each in the order of
 * another keyed bijection (rows.h), so that the rows of a step come from many documents, however long these
 * are; a single dataset's epoch is still given out whole before its next begins. Every rank walks the same
 * document lengths and reads only the tokens of its own rows. The state is a handful of integers (the
 * window's place in the stream and the rows of it that are done) and describes rows *trained*, not
 * prefetched.
 *
 * Calls of one loader: one thread at a time. Open reads shards with HDF5 (shard.h); nothing after it uses
 * HDF5, and only set_state allocates. Errors of the prefetch thread come out of ht_loader_next, again on every call.
 */
#ifndef HT_DATA_LOADER_H
#define HT_DATA_LOADER_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/seqs.h"
#include "core/base/status.h"

#define HT_LOADER_MAX_DATASETS 64
#define HT_LOADER_MAX_WINDOW (1 << 20)

struct ht_loader;

struct ht_loader_dataset { // a shard file, or a folder whose *.h5 files are taken in name order
    const char *path;
    double weight;
};

struct ht_loader_options {
    int n_datasets;
    const struct ht_loader_dataset *datasets;
    int64_t seq_len;
    int64_t rows_per_step;     // global: rows of one optimiser step over all ranks
    int64_t micro_rows;        // rows of one micro-batch of one rank; ranks * micro_rows divides rows_per_step
    int rank, n_ranks;
    int64_t vocab_size;        // ids must be below; 0 = not checked
    uint64_t seed;             // below 2^63
    bool shuffle, pack_leak;
    int64_t window_rows;       // rows shuffled together; 0, 1, without shuffle and with one_epoch: none
    int64_t prefetch_batches;  // 0 = no thread
    bool one_epoch;            // evaluation: every dataset once; the last step is padded (id 0, label -1)
};

/* Everything needed to go on; saved inside the model checkpoint as JSON (ht_loader_state_to_json). */
struct ht_loader_state {
    int64_t row;               // next global row
    int64_t window_rows;       // of the window that holds it; 0: a window begins there
    int64_t window_done;       // rows of the window done: all that follows describes its first row
    int64_t seq_len, seed;     // that the window is cut and shuffled with; seed -1: not known
    int n_datasets;
    struct {
        int64_t epoch, doc;    // next position in the epoch's permutation
        int64_t tokens;        // drawn so far
        int64_t docs_visited;  // over all epochs
        uint64_t fingerprint;  // of the shard's header: another data set is refused on resume
    } dataset[HT_LOADER_MAX_DATASETS];
    int current;               // dataset of the document being drawn, -1 = none
    int64_t current_doc, current_pos; // its number in the dataset and the next token in it
};

/* One micro-batch of this rank: rows of seq_len tokens, flat. Borrowed until the next call. */
struct ht_batch {
    int64_t n_rows, n_tokens;
    const int32_t *ids;    // (n_tokens)
    const int32_t *labels; // (n_tokens) next token in the same document, -1 = not counted
    const int32_t *pos;    // (n_tokens) position in its sequence
    struct ht_seqs seqs;
    int64_t n_counted;     // labels >= 0 here
    int64_t step_counted;  // labels >= 0 in the whole step over all ranks (known to every rank)
    double attended;       // sum(len^2)/sum(len) of the sequences, for FLOP accounting
    bool last_of_step;
};

enum ht_status ht_loader_open(struct ht_loader **out, const struct ht_loader_options *o);
void ht_loader_close(struct ht_loader *l);

/* Next micro-batch of this rank; micro-batches of a step come one after the other (rows of the step are dealt
 * to ranks in contiguous blocks). With one_epoch: *batch = NULL at the end, for all ranks after the same number
 * of batches. wait_s, if not NULL, gets the time the call took: waiting for the prefetch thread, or reading. */
enum ht_status ht_loader_next(struct ht_loader *l, const struct ht_batch **batch, double *wait_s);

/* State after the last step whose batches were all handed out; set only before the first next. Setting
 * checks fingerprints, dataset count, ranges and that the current document is the one that seed and order put
 * there (HT_ERR_FORMAT names the field; the loader is as before). */
void ht_loader_get_state(const struct ht_loader *l, struct ht_loader_state *out);
enum ht_status ht_loader_set_state(struct ht_loader *l, const struct ht_loader_state *s);

enum ht_status ht_loader_state_to_json(char **text, const struct ht_loader_state *s);
enum ht_status ht_loader_state_from_json(struct ht_loader_state *s, const char *text, const char *name);

/* Start again from row 0; one_epoch loaders without a prefetch thread only (HT_ERR_ARG otherwise). Opens
 * nothing: HDF5 is not called. */
enum ht_status ht_loader_rewind(struct ht_loader *l);

int64_t ht_loader_text_bytes(const struct ht_loader *l); // of all datasets, for bits per byte
int64_t ht_loader_n_tokens(const struct ht_loader *l);   // of all datasets

#endif
