/* inference/prefix_cache.c: a list in order of use; snapshots are large, so they are few. */
#include "inference/prefix_cache.h"

#include <stdlib.h>
#include <string.h>

struct entry {
    struct entry *next; // less recently used
    struct ht_snapshot s;
    int64_t bytes;
    void *state;
    int32_t ids[];
};

struct ht_prefix_cache {
    struct entry *first;
    int64_t bytes, max_bytes;
};

enum ht_status ht_prefix_cache_create(struct ht_prefix_cache **out, int64_t max_bytes)
{
    *out = calloc(1, sizeof **out);
    if (!*out) return HT_FAIL(HT_ERR_MEMORY, "no memory for a prefix cache");
    (*out)->max_bytes = max_bytes;
    return HT_OK;
}

static void entry_free(struct entry *e)
{
    free(e->state);
    free(e);
}

void ht_prefix_cache_free(struct ht_prefix_cache *c)
{
    if (!c) return;
    while (c->first) {
        struct entry *next = c->first->next;
        entry_free(c->first);
        c->first = next;
    }
    free(c);
}

int64_t ht_prefix_cache_bytes(const struct ht_prefix_cache *c)
{
    return c->bytes;
}

static int64_t common(const struct entry *e, const int32_t *ids, int64_t n)
{
    const int64_t most = e->s.n_tokens < n ? e->s.n_tokens : n;
    int64_t i = 0;

    while (i < most && e->ids[i] == ids[i]) i++;
    return i;
}

static void move_to_front(struct ht_prefix_cache *c, struct entry *e)
{
    struct entry **at = &c->first;

    while (*at != e) at = &(*at)->next;
    *at = e->next;
    e->next = c->first;
    c->first = e;
}

const struct ht_snapshot *ht_prefix_cache_find(struct ht_prefix_cache *c, const int32_t *ids,
                                               int64_t n, int64_t most)
{
    struct entry *best = NULL;

    for (struct entry *e = c->first; e; e = e->next)
        if (e->s.n_tokens <= most && e->s.n_tokens <= n &&
            (!best || e->s.n_tokens > best->s.n_tokens) && common(e, ids, n) == e->s.n_tokens)
            best = e;
    if (!best) return NULL;
    move_to_front(c, best);
    return &best->s;
}

int64_t ht_prefix_cache_common(const struct ht_prefix_cache *c, const int32_t *ids, int64_t n)
{
    int64_t best = 0;

    for (const struct entry *e = c->first; e; e = e->next) {
        const int64_t m = common(e, ids, n);
        if (m > best) best = m;
    }
    return best;
}

static void drop_last(struct ht_prefix_cache *c)
{
    struct entry **at = &c->first;

    while ((*at)->next) at = &(*at)->next;
    c->bytes -= (*at)->bytes;
    entry_free(*at);
    *at = NULL;
}

void *ht_prefix_cache_add(struct ht_prefix_cache *c, const int32_t *ids, int64_t n,
                          int64_t state_bytes)
{
    const int64_t ids_bytes = n * (int64_t)sizeof *ids;
    const int64_t bytes = (int64_t)sizeof(struct entry) + ids_bytes + state_bytes;

    if (bytes > c->max_bytes) return NULL;
    for (struct entry *e = c->first; e; e = e->next)
        if (e->s.n_tokens == n && common(e, ids, n) == n) {
            move_to_front(c, e);
            return NULL;
        }
    while (c->first && c->bytes + bytes > c->max_bytes) drop_last(c);
    struct entry *e = malloc(sizeof *e + (size_t)ids_bytes);
    void *state = malloc((size_t)state_bytes);
    if (!e || !state) {
        free(e);
        free(state);
        return NULL;
    }
    memcpy(e->ids, ids, (size_t)ids_bytes);
    e->state = state;
    e->bytes = bytes;
    e->s = (struct ht_snapshot){ n, e->ids, state, state_bytes };
    e->next = c->first;
    c->first = e;
    c->bytes += bytes;
    return state;
}

void ht_prefix_cache_drop_newest(struct ht_prefix_cache *c)
{
    struct entry *e = c->first;

    c->first = e->next;
    c->bytes -= e->bytes;
    entry_free(e);
}
