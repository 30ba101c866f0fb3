/* inference/extents.h: extents of a row of tokens, first fit, in order of place. */
#ifndef HT_INFERENCE_EXTENTS_H
#define HT_INFERENCE_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_extents {
    int64_t n_tokens, used;
    int n, capacity; // taken extents
    struct {
        int64_t start, n;
    } * taken; // ascending, apart
};

enum ht_status ht_extents_create(struct ht_extents *e, int64_t n_tokens, int capacity);
void ht_extents_free(struct ht_extents *e);

/* False: no gap of n tokens (n >= 0; 0 always fits and takes nothing), or capacity extents are out.
 */
bool ht_extents_take(struct ht_extents *e, int64_t n, int64_t *start);
void ht_extents_give_back(struct ht_extents *e, int64_t start, int64_t n);

#endif
