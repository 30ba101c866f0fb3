/* data/bpe_learn.h: merges from counted words: the pair with the largest count, again and again. */
#ifndef HT_DATA_BPE_LEARN_H
#define HT_DATA_BPE_LEARN_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_bpe_word {
    size_t text, n_bytes; // place in the pool
    int64_t count;
};

struct ht_bpe_vocab {
    int64_t n_tokens, n_merges;
    int32_t *merges;         // (n_merges, 2) ids
    unsigned char *bytes;    // of all tokens
    int64_t *start, *length; // (n_tokens); specials have length 0
};

/* Ids: n_specials, then the 256 bytes in the order of their byte-level characters, then merges. */
enum ht_status ht_bpe_learn(struct ht_bpe_vocab *out, const struct ht_bpe_word *words,
                            int64_t n_words, const char *pool, int64_t vocab_size, int n_specials);
void ht_bpe_vocab_free(struct ht_bpe_vocab *v);

#endif
