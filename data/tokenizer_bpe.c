/* data/tokenizer_bpe.c: byte-pair merging of one word, and normalization of text.
 *
 * Merging takes the pair of lowest rank, leftmost first, until none is left. Short words scan the
 * ranks of their pairs (they fit a few cache lines); long ones use a heap over a linked list, so n
 * symbols cost O(n log n).
 */
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_impl.h"

#define SHORT_WORD 64

/* O(n^2), n <= SHORT_WORD. */
static int64_t merge_short(const struct ht_tokenizer *t, int32_t *ids, int64_t n)
{
    int32_t rank[SHORT_WORD], id[SHORT_WORD];

    for (int64_t i = 0; i + 1 < n; i++) {
        const struct ht_merge *m = ht_tokenizer_merge(t, ids[i], ids[i + 1]);
        rank[i] = m ? m->rank : INT32_MAX;
        id[i] = m ? m->id : -1;
    }
    while (n > 1) {
        int64_t best = 0;
        for (int64_t i = 1; i + 1 < n; i++)
            if (rank[i] < rank[best]) best = i;
        if (rank[best] == INT32_MAX) break;
        ids[best] = id[best];
        const size_t n_after = (size_t)(n - best - 2);
        memmove(ids + best + 1, ids + best + 2, n_after * sizeof *ids);
        memmove(rank + best + 1, rank + best + 2, n_after * sizeof *rank);
        memmove(id + best + 1, id + best + 2, n_after * sizeof *id);
        n--;
        for (int64_t i = best > 0 ? best - 1 : 0; i <= best && i + 1 < n; i++) {
            const struct ht_merge *m = ht_tokenizer_merge(t, ids[i], ids[i + 1]);
            rank[i] = m ? m->rank : INT32_MAX;
            id[i] = m ? m->id : -1;
        }
    }
    return n;
}

static bool before(const struct ht_bpe_candidate *a, const struct ht_bpe_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void sift_up(struct ht_bpe_candidate *h, int64_t i)
{
    const struct ht_bpe_candidate c = h[i];
    for (; i > 0 && before(&c, &h[(i - 1) / 2]); i = (i - 1) / 2) h[i] = h[(i - 1) / 2];
    h[i] = c;
}

static void sift_down(struct ht_bpe_candidate *h, int64_t n, int64_t i)
{
    const struct ht_bpe_candidate c = h[i];
    for (int64_t k = 2 * i + 1; k < n; k = 2 * i + 1) {
        if (k + 1 < n && before(&h[k + 1], &h[k])) k++;
        if (!before(&h[k], &c)) break;
        h[i] = h[k];
        i = k;
    }
    h[i] = c;
}

/* Add the pair at i, if it can be merged. Each of n symbols brings at most one pair, each of n
 * merges two more. */
static void push(const struct ht_tokenizer *t, struct ht_bpe_work *w, const int32_t *ids,
                 int64_t *n_heap, int64_t i)
{
    const int32_t next = w->next[i];
    const struct ht_merge *m = next >= 0 ? ht_tokenizer_merge(t, ids[i], ids[next]) : NULL;
    if (!m) return;
    w->heap[*n_heap] = (struct ht_bpe_candidate){ m->rank, (int32_t)i, m->id };
    sift_up(w->heap, (*n_heap)++);
}

static enum ht_status reserve(struct ht_bpe_work *w, int64_t n)
{
    if (n <= w->capacity) return HT_OK;
    if (n > INT32_MAX / 4)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "a word of %lld symbols is too long", (long long)n);
    ht_bpe_work_free(w);
    w->prev = malloc((size_t)n * sizeof *w->prev);
    w->next = malloc((size_t)n * sizeof *w->next);
    w->heap = malloc((size_t)n * 3 * sizeof *w->heap);
    if (!w->prev || !w->next || !w->heap)
        return HT_FAIL(HT_ERR_MEMORY, "no memory to merge a word of %lld symbols", (long long)n);
    w->capacity = n;
    return HT_OK;
}

enum ht_status ht_bpe_merge(const struct ht_tokenizer *t, struct ht_bpe_work *w, int32_t *ids,
                            int64_t *n)
{
    int64_t n_heap = 0, n_left = 0;

    if (*n <= SHORT_WORD) {
        *n = merge_short(t, ids, *n);
        return HT_OK;
    }
    HT_TRY(reserve(w, *n));
    for (int64_t i = 0; i < *n; i++) {
        w->prev[i] = (int32_t)(i - 1);
        w->next[i] = i + 1 < *n ? (int32_t)(i + 1) : -1;
    }
    for (int64_t i = 0; i < *n; i++) push(t, w, ids, &n_heap, i);
    while (n_heap > 0) {
        const struct ht_bpe_candidate c = w->heap[0];
        w->heap[0] = w->heap[--n_heap];
        if (n_heap > 0) sift_down(w->heap, n_heap, 0);
        // Symbols may have changed since the pair was added: it counts only if it would still give
        // the same token.
        const int32_t next = w->next[c.at];
        if (ids[c.at] < 0 || next < 0) continue;
        const struct ht_merge *m = ht_tokenizer_merge(t, ids[c.at], ids[next]);
        if (!m || m->id != c.id) continue;
        ids[c.at] = c.id;
        ids[next] = -1;
        w->next[c.at] = w->next[next];
        if (w->next[next] >= 0) w->prev[w->next[next]] = c.at;
        if (w->prev[c.at] >= 0) push(t, w, ids, &n_heap, w->prev[c.at]);
        push(t, w, ids, &n_heap, c.at);
    }
    for (int64_t i = 0; i >= 0; i = w->next[i]) ids[n_left++] = ids[i];
    *n = n_left;
    return HT_OK;
}

void ht_bpe_work_free(struct ht_bpe_work *w)
{
    free(w->prev);
    free(w->next);
    free(w->heap);
    *w = (struct ht_bpe_work){ 0 };
}

enum ht_status ht_bytes_append(struct ht_bytes *b, const char *p, size_t n)
{
    if (n > b->capacity - b->n) {
        size_t capacity = b->capacity ? b->capacity : 256;
        while (capacity - b->n < n) {
            if (capacity > SIZE_MAX / 2)
                return HT_FAIL(HT_ERR_MEMORY, "text of more than %zu bytes", capacity);
            capacity *= 2;
        }
        char *grown = realloc(b->p, capacity);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes of text", capacity);
        b->p = grown;
        b->capacity = capacity;
    }
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
    return HT_OK;
}

static enum ht_status replace(struct ht_bytes *out, const struct ht_norm *norm,
                              struct ht_splitter_work *w, const char *text, size_t n)
{
    const size_t n_content = strlen(norm->content);
    size_t at = 0, start, end;
    int matched;
    for (;;) {
        HT_TRY(ht_splitter_next(w, text, n, &at, &start, &end, &matched));
        if (end == start) return HT_OK;
        if (matched)
            HT_TRY(ht_bytes_append(out, norm->content, n_content));
        else
            HT_TRY(ht_bytes_append(out, text + start, end - start));
    }
}

/* Length of the white-space character (Unicode White_Space) at p, or 0. */
static size_t space_length(const char *p, size_t n)
{
    static const char *const wide[] = { "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80",
                                        "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF",
                                        "\xE2\x81\x9F", "\xE3\x80\x80" };
    if (n == 0) return 0;
    if (*p == ' ' || (*p >= '\t' && *p <= '\r')) return 1;
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++)
        if (n >= strlen(wide[i]) && memcmp(p, wide[i], strlen(wide[i])) == 0)
            return strlen(wide[i]);
    if (n >= 3 && memcmp(p, "\xE2\x80", 2) == 0 && (unsigned char)p[2] <= 0x8A)
        return 3; // U+2000..U+200A
    return 0;
}

size_t ht_text_spaces_at_start(const char *p, size_t n)
{
    size_t i = 0, len;
    while ((len = space_length(p + i, n - i)) > 0) i += len;
    return i;
}

size_t ht_text_spaces_at_end(const char *p, size_t n)
{
    size_t end = n;
    while (end > 0) {
        size_t i = end - 1;
        while (i > 0 && ((unsigned char)p[i] & 0xC0) == 0x80) i--;
        if (space_length(p + i, end - i) != end - i) break;
        end = i;
    }
    return n - end;
}

enum ht_status ht_tokenizer_normalize(const struct ht_tokenizer *t,
                                      struct ht_splitter_work *const *patterns,
                                      struct ht_bytes *out, struct ht_bytes *scratch,
                                      const char *text, size_t n)
{
    out->n = 0;
    HT_TRY(ht_bytes_append(out, text, n));
    for (int i = 0; i < t->n_norms; i++) {
        const struct ht_norm *norm = &t->norms[i];
        const struct ht_bytes in = *out;
        const char *p = in.p;
        size_t left = in.n;
        *out = *scratch;
        *scratch = in;
        out->n = 0;
        if (left == 0) continue;
        switch (norm->kind) {
        case HT_NORM_PREPEND:
            HT_TRY(ht_bytes_append(out, norm->content, strlen(norm->content)));
            HT_TRY(ht_bytes_append(out, p, left));
            break;
        case HT_NORM_REPLACE: HT_TRY(replace(out, norm, patterns[i], p, left)); break;
        case HT_NORM_STRIP:
            if (norm->left) {
                const size_t cut = ht_text_spaces_at_start(p, left);
                p += cut;
                left -= cut;
            }
            if (norm->right) left -= ht_text_spaces_at_end(p, left);
            HT_TRY(ht_bytes_append(out, p, left));
            break;
        default: HT_TRY(ht_normal_form(out, norm->kind, p, left)); break;
        }
    }
    return HT_OK;
}
