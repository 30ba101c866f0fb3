/* inference/prefix_cache.h: states after prompts that were read before, found by their tokens.
 *
 * A snapshot is the state after its tokens, as bytes (core/model/pool.h). The longest one that
 * begins a prompt serves it. Least recently used ones go first when the bytes are over the budget.
 * One thread at a time.
 */
#ifndef HT_INFERENCE_PREFIX_CACHE_H
#define HT_INFERENCE_PREFIX_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_prefix_cache;

struct ht_snapshot {
    int64_t n_tokens;
    const int32_t *ids;
    const void *state;
    int64_t state_bytes;
};

enum ht_status ht_prefix_cache_create(struct ht_prefix_cache **out, int64_t max_bytes);
void ht_prefix_cache_free(struct ht_prefix_cache *c);
int64_t ht_prefix_cache_bytes(const struct ht_prefix_cache *c);

/* The longest snapshot of at most `most` tokens that ids (n) begin with; NULL when there is none.
 * Lent until the cache is changed. */
const struct ht_snapshot *ht_prefix_cache_find(struct ht_prefix_cache *c, const int32_t *ids,
                                               int64_t n, int64_t most);

/* The most tokens that ids share with the beginning of any snapshot. */
int64_t ht_prefix_cache_common(const struct ht_prefix_cache *c, const int32_t *ids, int64_t n);

/* Room for the state after n tokens: *state is to be filled at once. NULL when it is there already,
 * is larger than the whole budget, or memory is short. */
void *ht_prefix_cache_add(struct ht_prefix_cache *c, const int32_t *ids, int64_t n,
                          int64_t state_bytes);

/* Forget what was added last: its state could not be had. */
void ht_prefix_cache_drop_newest(struct ht_prefix_cache *c);

#endif
