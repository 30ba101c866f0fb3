/* core/base/arena.c: bump allocation over one mmap. */
#include "core/base/arena.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>

enum ht_status ht_arena_create(struct ht_arena *a, const char *name, size_t size_bytes)
{
    const size_t size = ht_arena_bytes(size_bytes ? size_bytes : 1);

    *a = (struct ht_arena){ .name = name };
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        return HT_FAIL(HT_ERR_MEMORY, "%s: cannot reserve %.1f MiB: %s", name,
                       (double)size / 1048576.0, strerror(errno));
    if (size >= (size_t)8 << 20) (void)madvise(p, size, MADV_HUGEPAGE);
    a->base = p;
    a->size_bytes = size;
    return HT_OK;
}

void ht_arena_free(struct ht_arena *a)
{
    if (a && a->base) munmap(a->base, a->size_bytes);
    if (a) *a = (struct ht_arena){ 0 };
}

enum ht_status ht_arena_take(void **out, struct ht_arena *a, size_t size_bytes)
{
    const size_t size = ht_arena_bytes(size_bytes);

    *out = NULL;
    if (size > a->size_bytes - a->used_bytes)
        return HT_FAIL(HT_ERR_MEMORY, "%s: %zu bytes wanted, %zu of %zu left", a->name, size,
                       a->size_bytes - a->used_bytes, a->size_bytes);
    *out = a->base + a->used_bytes;
    a->used_bytes += size;
    if (a->used_bytes > a->peak_bytes) a->peak_bytes = a->used_bytes;
    return HT_OK;
}

void *ht_arena_get(struct ht_arena *a, size_t size_bytes)
{
    void *p = NULL;
    const enum ht_status st = ht_arena_take(&p, a, size_bytes);
    assert(st == HT_OK && "the planner and the code disagree about an arena's size");
    (void)st;
    return p;
}
