/* data/dataset.h: a shard, or a folder of shards taken in name order, as one numbered list of
 * documents. */
#ifndef HT_DATA_DATASET_H
#define HT_DATA_DATASET_H

#include <stdint.h>

#include "core/base/status.h"
#include "data/shard.h"

struct ht_dataset {
    char *path;
    int n_shards;
    struct ht_shard **shards;
    int64_t *first_doc; // (n_shards + 1) number of each shard's first document
    int64_t n_docs, n_tokens, text_bytes;
    int64_t vocab_size;   // the largest of the shards
    uint64_t fingerprint; // of the shards' fingerprints, in order
};

/* HT_ERR_FORMAT: no *.h5 in a folder, a shard is damaged, or its tokenizer is not the first
 * shard's. */
enum ht_status ht_dataset_open(struct ht_dataset *d, const char *path);
void ht_dataset_close(struct ht_dataset *d);

int64_t ht_dataset_doc_length(const struct ht_dataset *d, int64_t doc);

/* As ht_shard_read, with documents numbered over all shards. */
enum ht_status ht_dataset_read(const struct ht_dataset *d, int64_t doc, int64_t first, int64_t n,
                               int32_t *out);

#endif
