/* data/tokenize_corpus.h: a text source through all cores: word counts, or token shards.
 *
 * Documents are read in batches of some megabytes, worked on in parallel, and put out in the order
 * of the source, so the result does not depend on the thread count. While one batch is encoded, one
 * thread writes the batch before it and reads the one after. Memory: two batches and their tokens.
 */
#ifndef HT_DATA_TOKENIZE_CORPUS_H
#define HT_DATA_TOKENIZE_CORPUS_H

#include "data/bpe_train.h"
#include "data/text_source.h"
#include "data/tokenizer.h"

struct ht_corpus_counts {
    int64_t n_docs, n_tokens, n_bytes;
};

/* After each batch; total is the size of the (compressed) input. false stops: HT_ERR_STOPPED. */
typedef bool ht_corpus_progress(void *user, uint64_t done, uint64_t total, int64_t n_docs,
                                int64_t n_tokens);

enum ht_status ht_corpus_count_words(struct ht_text_source *source, struct ht_bpe_trainer *trainer,
                                     ht_corpus_progress *progress, void *user);

struct ht_corpus_job {
    struct ht_text_source *source;
    const struct ht_tokenizer *tokenizer;
    int32_t eos_id;           // appended to each document, unless negative
    int n_threads;            // 0 = all cores
    const char *out_path;     // token shard (data/shard.h), published by rename when complete
    int64_t holdout_every;    // every N-th document (N-1, 2N-1, ... from 0) is held out; 0 = none
    const char *holdout_path; // shard of the held-out documents; NULL without
    ht_corpus_progress *progress; // or NULL
    void *user;
};

/* counts: of out_path, of holdout_path. On failure out_path is as it was. */
enum ht_status ht_corpus_tokenize(const struct ht_corpus_job *job,
                                  struct ht_corpus_counts counts[2]);

#endif
