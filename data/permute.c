/* data/permute.c: Feistel network with cycle walking. */
#include "data/permute.h"

#include <assert.h>

#include "core/base/rng.h"

void ht_permute_init(struct ht_permute *p, uint64_t n, uint64_t seed, uint64_t stream,
                     uint64_t counter)
{
    int bits = 6; // narrower networks favour some orders of a handful of documents

    assert(n >= 1 && n <= (uint64_t)1 << 62);
    while (((uint64_t)1 << bits) < n) bits++;
    p->n = n;
    p->right_bits = bits - bits / 2;
    p->right_mask = ((uint64_t)1 << p->right_bits) - 1;
    p->left_mask = ((uint64_t)1 << (bits / 2)) - 1;
    const uint64_t key = ht_rng_u64(seed, stream, counter);
    for (int i = 0; i < HT_PERMUTE_ROUNDS; i++) p->key[i] = ht_rng_u64(key, stream, (uint64_t)i);
}

/* The finaliser of MurmurHash3: every input bit reaches every output bit. */
static uint64_t mix(uint64_t v)
{
    v = (v ^ (v >> 33)) * 0xff51afd7ed558ccdu;
    v = (v ^ (v >> 33)) * 0xc4ceb9fe1a85ec53u;
    return v ^ (v >> 33);
}

uint64_t ht_permute_at(const struct ht_permute *p, uint64_t i)
{
    assert(i < p->n);
    do {
        uint64_t left = i >> p->right_bits, right = i & p->right_mask;
        for (int r = 0; r < HT_PERMUTE_ROUNDS; r += 2) {
            left ^= mix(right ^ p->key[r]) & p->left_mask;
            right ^= mix(left ^ p->key[r + 1]) & p->right_mask;
        }
        i = left << p->right_bits | right;
    } while (i >= p->n); // walks the cycle of i inside 2^b: it must come back below n
    return i;
}
