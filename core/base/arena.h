/* core/base/arena.h: one allocation, handed out in pieces; nothing is freed but the whole.
 *
 * The planner knows every size before the first step, so a step never calls malloc. Pieces are
 * aligned to 64 bytes. Not thread-safe: the owner's thread only.
 */
#ifndef HT_BASE_ARENA_H
#define HT_BASE_ARENA_H

#include <stddef.h>

#include "core/base/status.h"

struct ht_arena {
    unsigned char *base; // NULL when empty
    size_t size_bytes, used_bytes, peak_bytes;
    const char *name; // for messages; must outlive the arena
};

/* Reserve size_bytes (zeroed pages of the system; huge pages are asked for). HT_ERR_MEMORY names
 * size. */
enum ht_status ht_arena_create(struct ht_arena *a, const char *name, size_t size_bytes);
void ht_arena_free(struct ht_arena *a);

/* The next size_bytes, 64-byte aligned; HT_ERR_MEMORY (with name, wanted, left) when it does not
 * fit. */
enum ht_status ht_arena_take(void **out, struct ht_arena *a, size_t size_bytes);

/* Like take, but asserts: for callers whose sizes the planner computed. */
void *ht_arena_get(struct ht_arena *a, size_t size_bytes);

/* Remember and return to a point: everything taken since is free again. */
static inline size_t ht_arena_mark(const struct ht_arena *a)
{
    return a->used_bytes;
}
static inline void ht_arena_reset(struct ht_arena *a, size_t mark)
{
    a->used_bytes = mark;
}

/* What a piece of n bytes costs in an arena: n rounded up to 64. */
static inline size_t ht_arena_bytes(size_t n)
{
    return (n + 63) & ~(size_t)63;
}

#endif
