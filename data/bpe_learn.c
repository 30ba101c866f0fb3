/* data/bpe_learn.c: a heap of pairs with lazy counts; only words that hold the merged pair are
 * touched.
 *
 * Counts of existing pairs only fall and new pairs all contain the new token, so a stale heap entry
 * is recognised by its count and pushed again with the present one.
 */
#include "data/bpe_learn.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "data/pretokenize.h"

struct pair {
    uint64_t key; // left << 32 | right, 0 = empty slot (no pair is 0,0: see key_of)
    int64_t count;
    int32_t *words; // that may hold it
    int32_t n_words, room;
};

struct entry {
    int64_t count;
    uint64_t key;
};

struct learner {
    struct ht_bpe_vocab *v;
    const struct ht_bpe_word *words;
    int64_t n_words;
    int32_t *symbols; // of all words, one after the other
    int64_t *first;   // (n_words) where a word's symbols start
    int32_t *length;  // (n_words)
    struct pair *pairs;
    int64_t n_pairs, n_slots;
    struct entry *heap;
    int64_t n_heap, heap_room;
    uint64_t *fresh; // keys of pairs that are not in the heap yet
    int64_t n_fresh, fresh_room;
};

static enum ht_status no_memory(void)
{
    return HT_FAIL(HT_ERR_MEMORY, "no memory to learn merges");
}

static uint64_t key_of(int32_t left, int32_t right)
{
    return ((uint64_t)(uint32_t)(left + 1) << 32) | (uint32_t)(right + 1);
}

static uint64_t hash_key(uint64_t key)
{
    key *= 0x9E3779B97F4A7C15u;
    return key ^ (key >> 31);
}

static struct pair *find_pair(const struct learner *l, uint64_t key)
{
    uint64_t at = hash_key(key);
    for (;; at++) {
        struct pair *p = &l->pairs[at & (uint64_t)(l->n_slots - 1)];
        if (p->key == key || p->key == 0) return p;
    }
}

static enum ht_status grow_pairs(struct learner *l)
{
    struct pair *old = l->pairs;
    const int64_t n_old = l->n_slots;

    l->n_slots = n_old ? 2 * n_old : 1 << 14;
    l->pairs = calloc((size_t)l->n_slots, sizeof *l->pairs);
    if (!l->pairs) {
        l->pairs = old;
        l->n_slots = n_old;
        return no_memory();
    }
    for (int64_t i = 0; i < n_old; i++)
        if (old[i].key) *find_pair(l, old[i].key) = old[i];
    free(old);
    return HT_OK;
}

static enum ht_status note_fresh(struct learner *l, uint64_t key)
{
    if (l->n_fresh == l->fresh_room) {
        const int64_t room = l->fresh_room ? 2 * l->fresh_room : 1024;
        uint64_t *fresh = realloc(l->fresh, (size_t)room * sizeof *fresh);
        if (!fresh) return no_memory();
        l->fresh = fresh;
        l->fresh_room = room;
    }
    l->fresh[l->n_fresh++] = key;
    return HT_OK;
}

static enum ht_status add_count(struct learner *l, uint64_t key, int64_t count, int32_t word)
{
    if (2 * l->n_pairs >= l->n_slots) HT_TRY(grow_pairs(l));
    struct pair *p = find_pair(l, key);
    if (!p->key) {
        p->key = key;
        l->n_pairs++;
        HT_TRY(note_fresh(l, key));
    }
    p->count += count;
    if (count < 0 || (p->n_words && p->words[p->n_words - 1] == word)) return HT_OK;
    if (p->n_words == p->room) {
        const int32_t room = p->room ? 2 * p->room : 4;
        int32_t *list = realloc(p->words, (size_t)room * sizeof *list);
        if (!list) return no_memory();
        p->words = list;
        p->room = room;
    }
    p->words[p->n_words++] = word;
    return HT_OK;
}

static bool before(struct entry a, struct entry b)
{
    return a.count != b.count ? a.count > b.count : a.key < b.key;
}

static enum ht_status push(struct learner *l, struct entry e)
{
    if (l->n_heap == l->heap_room) {
        const int64_t room = l->heap_room ? 2 * l->heap_room : 4096;
        struct entry *heap = realloc(l->heap, (size_t)room * sizeof *heap);
        if (!heap) return no_memory();
        l->heap = heap;
        l->heap_room = room;
    }
    int64_t at = l->n_heap++;
    while (at > 0 && before(e, l->heap[(at - 1) / 2])) {
        l->heap[at] = l->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    l->heap[at] = e;
    return HT_OK;
}

static struct entry pop(struct learner *l)
{
    const struct entry top = l->heap[0], last = l->heap[--l->n_heap];
    int64_t at = 0;

    for (;;) {
        int64_t child = 2 * at + 1;
        if (child >= l->n_heap) break;
        if (child + 1 < l->n_heap && before(l->heap[child + 1], l->heap[child])) child++;
        if (!before(l->heap[child], last)) break;
        l->heap[at] = l->heap[child];
        at = child;
    }
    l->heap[at] = last;
    return top;
}

static enum ht_status count_pairs(struct learner *l, int32_t word)
{
    const int32_t *s = l->symbols + l->first[word];
    for (int32_t i = 0; i + 1 < l->length[word]; i++)
        HT_TRY(add_count(l, key_of(s[i], s[i + 1]), l->words[word].count, word));
    return HT_OK;
}

/* Replace every left,right of the word by the new token, from the left. Only the pairs beside a
 * replaced one change, so a word costs one pass over its symbols and not a recount. */
static enum ht_status merge_in_word(struct learner *l, int32_t word, int32_t left, int32_t right,
                                    int32_t id)
{
    int32_t *s = l->symbols + l->first[word];
    const int32_t n = l->length[word];
    const int64_t count = l->words[word].count;
    int32_t kept = 0;

    for (int32_t i = 0; i < n; i++) {
        if (i + 1 == n || s[i] != left || s[i + 1] != right) {
            s[kept++] = s[i];
            continue;
        }
        if (kept > 0) {
            HT_TRY(add_count(l, key_of(s[kept - 1], left), -count, word));
            HT_TRY(add_count(l, key_of(s[kept - 1], id), count, word));
        }
        if (i + 2 < n) {
            HT_TRY(add_count(l, key_of(right, s[i + 2]), -count, word));
            HT_TRY(add_count(l, key_of(id, s[i + 2]), count, word));
        }
        s[kept++] = id;
        i++;
    }
    l->length[word] = kept; // unchanged when the pair was merged away since the word was listed
    return HT_OK;
}

/* Pairs met for the first time, which are all the pairs of a new token, enter the heap. */
static enum ht_status push_fresh(struct learner *l)
{
    for (int64_t i = 0; i < l->n_fresh; i++) {
        const struct pair *p = find_pair(l, l->fresh[i]);
        if (p->count > 0) HT_TRY(push(l, (struct entry){ p->count, p->key }));
    }
    l->n_fresh = 0;
    return HT_OK;
}

static enum ht_status new_token(struct ht_bpe_vocab *v, int64_t *n_bytes, int64_t *room,
                                int32_t left, int32_t right)
{
    const int64_t n = v->length[left] + v->length[right], id = v->n_tokens;

    if (*n_bytes + n > *room) {
        const int64_t bigger = 2 * (*n_bytes + n);
        unsigned char *bytes = realloc(v->bytes, (size_t)bigger);
        if (!bytes) return no_memory();
        v->bytes = bytes;
        *room = bigger;
    }
    memcpy(v->bytes + *n_bytes, v->bytes + v->start[left], (size_t)v->length[left]);
    memcpy(v->bytes + *n_bytes + v->length[left], v->bytes + v->start[right],
           (size_t)v->length[right]);
    v->start[id] = *n_bytes;
    v->length[id] = n;
    *n_bytes += n;
    v->merges[2 * v->n_merges] = left;
    v->merges[2 * v->n_merges + 1] = right;
    v->n_merges++;
    v->n_tokens++;
    return HT_OK;
}

static enum ht_status learn(struct learner *l, int64_t vocab_size, int64_t n_bytes, int64_t room)
{
    struct ht_bpe_vocab *v = l->v;

    for (int64_t w = 0; w < l->n_words; w++) HT_TRY(count_pairs(l, (int32_t)w));
    HT_TRY(push_fresh(l));
    while (v->n_tokens < vocab_size && l->n_heap > 0) {
        const struct entry top = pop(l);
        struct pair *p = find_pair(l, top.key);
        if (p->count <= 0) continue;
        if (p->count != top.count) {
            HT_TRY(push(l, (struct entry){ p->count, p->key }));
            continue;
        }
        const int32_t left = (int32_t)(top.key >> 32) - 1, right = (int32_t)(uint32_t)top.key - 1;
        const int32_t id = (int32_t)v->n_tokens;
        int32_t *changed =
            p->words; // the list is taken over: the table may move while counts change
        const int32_t n_changed = p->n_words;
        p->words = NULL;
        p->n_words = p->room = 0;
        enum ht_status st = new_token(v, &n_bytes, &room, left, right);
        for (int32_t i = 0; i < n_changed && st == HT_OK; i++)
            st = merge_in_word(l, changed[i], left, right, id);
        free(changed);
        HT_TRY(st);
        // in "aaa" the pair a,a counts twice and merges once; the new token cannot bring it back
        find_pair(l, top.key)->count = 0;
        HT_TRY(push_fresh(l));
    }
    return HT_OK;
}

/* Bytes in the order of the characters that stand for them; order[i] is the i-th byte. */
static void byte_order(unsigned char order[256])
{
    uint32_t code[256];

    for (int b = 0; b < 256; b++) {
        char text[2];
        const int n = ht_byte_char_utf8(text, (unsigned char)b);
        code[b] = n == 1 ? (unsigned char)text[0]
                         : ((uint32_t)(text[0] & 0x1f) << 6) | (uint32_t)(text[1] & 0x3f);
    }
    for (int b = 0; b < 256; b++) {
        int rank = 0;
        for (int other = 0; other < 256; other++) rank += code[other] < code[b];
        order[rank] = (unsigned char)b;
    }
}

static enum ht_status prepare(struct learner *l, const char *pool, int n_specials)
{
    int32_t id_of[256];
    unsigned char order[256];
    int64_t total = 0;

    byte_order(order);
    for (int i = 0; i < 256; i++) {
        id_of[order[i]] = n_specials + i;
        l->v->bytes[i] = order[i];
        l->v->start[n_specials + i] = i;
        l->v->length[n_specials + i] = 1;
    }
    l->v->n_tokens = n_specials + 256;
    for (int64_t w = 0; w < l->n_words; w++) total += (int64_t)l->words[w].n_bytes;
    if (l->n_words > INT32_MAX)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%lld different words; at most 2147483647",
                       (long long)l->n_words);
    l->symbols = malloc((size_t)(total ? total : 1) * sizeof *l->symbols);
    l->first = malloc((size_t)(l->n_words ? l->n_words : 1) * sizeof *l->first);
    l->length = malloc((size_t)(l->n_words ? l->n_words : 1) * sizeof *l->length);
    if (!l->symbols || !l->first || !l->length) return no_memory();
    total = 0;
    for (int64_t w = 0; w < l->n_words; w++) {
        l->first[w] = total;
        l->length[w] = (int32_t)l->words[w].n_bytes;
        for (size_t i = 0; i < l->words[w].n_bytes; i++)
            l->symbols[total++] = id_of[(unsigned char)pool[l->words[w].text + i]];
    }
    return grow_pairs(l);
}

enum ht_status ht_bpe_learn(struct ht_bpe_vocab *out, const struct ht_bpe_word *words,
                            int64_t n_words, const char *pool, int64_t vocab_size, int n_specials)
{
    struct learner l = { .v = out, .words = words, .n_words = n_words };
    const int64_t room = 16 * vocab_size;
    enum ht_status st = HT_OK;

    *out = (struct ht_bpe_vocab){ 0 };
    out->bytes = malloc((size_t)room);
    out->start = calloc((size_t)vocab_size, sizeof *out->start);
    out->length = calloc((size_t)vocab_size, sizeof *out->length);
    out->merges = calloc((size_t)vocab_size, 2 * sizeof *out->merges);
    if (!out->bytes || !out->start || !out->length || !out->merges) {
        st = no_memory();
        goto done;
    }
    HT_TRY_GOTO(st, done, prepare(&l, pool, n_specials));
    HT_TRY_GOTO(st, done, learn(&l, vocab_size, 256, room));
done:
    for (int64_t i = 0; i < l.n_slots; i++) free(l.pairs[i].words);
    free(l.pairs);
    free(l.heap);
    free(l.fresh);
    free(l.symbols);
    free(l.first);
    free(l.length);
    if (st != HT_OK) ht_bpe_vocab_free(out);
    return st;
}

void ht_bpe_vocab_free(struct ht_bpe_vocab *v)
{
    free(v->bytes);
    free(v->start);
    free(v->length);
    free(v->merges);
    *v = (struct ht_bpe_vocab){ 0 };
}
