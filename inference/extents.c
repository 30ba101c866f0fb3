/* inference/extents.c: a sorted list; sequences are few. */
#include "inference/extents.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

enum ht_status ht_extents_create(struct ht_extents *e, int64_t n_tokens, int capacity)
{
    *e = (struct ht_extents){ .n_tokens = n_tokens, .capacity = capacity };
    e->taken = calloc((size_t)capacity, sizeof *e->taken);
    if (!e->taken) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d extents", capacity);
    return HT_OK;
}

void ht_extents_free(struct ht_extents *e)
{
    free(e->taken);
    *e = (struct ht_extents){ 0 };
}

bool ht_extents_take(struct ht_extents *e, int64_t n, int64_t *start)
{
    int64_t at = 0;
    int i = 0;

    *start = 0;
    if (n == 0) return true;
    if (e->n == e->capacity) return false;
    for (; i < e->n && e->taken[i].start - at < n; i++) at = e->taken[i].start + e->taken[i].n;
    if (i == e->n && e->n_tokens - at < n) return false;
    memmove(&e->taken[i + 1], &e->taken[i], (size_t)(e->n - i) * sizeof *e->taken);
    e->taken[i].start = *start = at;
    e->taken[i].n = n;
    e->n++;
    e->used += n;
    return true;
}

void ht_extents_give_back(struct ht_extents *e, int64_t start, int64_t n)
{
    int i = 0;

    if (n == 0) return;
    while (i < e->n && e->taken[i].start != start) i++;
    assert(i < e->n && e->taken[i].n == n);
    e->n--;
    memmove(&e->taken[i], &e->taken[i + 1], (size_t)(e->n - i) * sizeof *e->taken);
    e->used -= n;
}
