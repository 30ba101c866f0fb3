/* data/permute.h: a keyed bijection over [0, n), so that an epoch's order of documents is never
 * stored.
 *
 *   one Feistel network over b = max(6, ceil(log2 n)) bits, halves of b/2 and b - b/2 bits:
 *     left ^= f(key[0], right)   right ^= f(key[1], left)   ...                     8 rounds
 *   cycle walking: apply it again until the value is below n (at most 2 times on average, as 2^b <
 * 2n)
 *
 * The same (n, seed, stream, counter) gives the same order on every machine. Not a cipher.
 */
#ifndef HT_DATA_PERMUTE_H
#define HT_DATA_PERMUTE_H

#include <stdint.h>

#define HT_PERMUTE_ROUNDS 8

struct ht_permute {
    uint64_t n; // 1 to 2^62
    uint64_t left_mask, right_mask;
    int right_bits;
    uint64_t key[HT_PERMUTE_ROUNDS];
};

void ht_permute_init(struct ht_permute *p, uint64_t n, uint64_t seed, uint64_t stream,
                     uint64_t counter);

/* Image of i, 0 <= i < n. */
uint64_t ht_permute_at(const struct ht_permute *p, uint64_t i);

#endif
