/* tests/fuzz/small_shard.h: a shard of a few documents, some empty, for targets and seeds. */
#ifndef HT_TESTS_FUZZ_SMALL_SHARD_H
#define HT_TESTS_FUZZ_SMALL_SHARD_H

#include "data/shard.h"
#include "tests/fuzz/fuzz.h"

enum { SMALL_DOCS = 60, SMALL_VOCAB = 54321 };

static inline int64_t small_length(int doc)
{
    return doc % 7 == 3 ? 0 : 1 + doc * 13 % 40;
}

static inline void small_shard(const char *path)
{
    struct ht_shard_writer *w;
    int32_t ids[64];

    FUZZ_HOLDS(ht_shard_writer_create(&w, path, SMALL_VOCAB, "00ff") == HT_OK);
    for (int doc = 0; doc < SMALL_DOCS; doc++) {
        const int64_t n = small_length(doc);
        for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)((doc * 777 + i * 31) % SMALL_VOCAB);
        FUZZ_HOLDS(ht_shard_writer_add(w, ids, n, 5 * n) == HT_OK);
    }
    FUZZ_HOLDS(ht_shard_writer_finish(w, NULL, NULL) == HT_OK);
    ht_shard_writer_free(w);
}

#endif
