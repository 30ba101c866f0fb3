/* data/tokenize_corpus.h: a text source through all cores: word counts, or a token shard.
 *
 * Documents are read in batches of some megabytes, worked on in parallel, and put out in the order
 * of the source, so the result does not depend on the thread count. Memory: one batch and its
 * tokens.
 */
#ifndef HT_DATA_TOKENIZE_CORPUS_H
#define HT_DATA_TOKENIZE_CORPUS_H

#include "data/bpe_train.h"
#include "data/text_source.h"
#include "data/tokenizer.h"

struct ht_corpus_counts {
    int64_t n_docs, n_tokens, n_bytes;
};

/* After each batch; total is the size of the (compressed) input. */
typedef void ht_corpus_progress(void *user, uint64_t done, uint64_t total, int64_t n_docs,
                                int64_t n_tokens);

enum ht_status ht_corpus_count_words(struct ht_text_source *source, struct ht_bpe_trainer *trainer,
                                     ht_corpus_progress *progress, void *user);

/* Token shard at out_path (data/shard.h), eos_id appended to each document unless it is negative.
 */
enum ht_status ht_corpus_tokenize(struct ht_text_source *source,
                                  const struct ht_tokenizer *tokenizer, int32_t eos_id,
                                  int n_threads, const char *out_path,
                                  struct ht_corpus_counts *counts, ht_corpus_progress *progress,
                                  void *user);

#endif
