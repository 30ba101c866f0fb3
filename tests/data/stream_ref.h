/* tests/data/stream_ref.h: the stream written out naively, documents one by one by the rules of
 * loader.h in long double, and the order of its rows by those of rows.h. */
#ifndef HT_TESTS_STREAM_REF_H
#define HT_TESTS_STREAM_REF_H

#include <math.h>
#include <string.h>

#include "data/permute.h"
#include "tests/data/loader_world.h"

struct stream_ref {
    int64_t n;
    int32_t *token;
    bool *ends;   // last token of its document
    uint8_t *set; // where it comes from
    int64_t drawn[3], visited[3];
    int64_t n_rows, *row; // in the order of training: which row of the stream; NULL: as it is
};

/* The order of rows by the rules of rows.h. */
static inline void windows_ref_make(struct stream_ref *r, const struct ht_loader_options *o)
{
    const int64_t n = r->n / o->seq_len, L = o->seq_len, W = o->window_rows;
    int64_t size[3] = { 0 };
    long double weights = 0, longest = 0, weight = 1;
    int slow = -1;

    for (int d = 0; d < o->n_datasets; d++) {
        for (int64_t doc = 0; doc < sets[d].n_docs; doc++) size[d] += doc_length(&sets[d], doc);
        const long double w = (long double)llround(o->datasets[d].weight / 0.6 * 0x1p30);
        weights += w;
        if ((long double)size[d] / w <= longest) continue;
        longest = (long double)size[d] / w;
        weight = w;
        slow = d;
    }
    r->row = malloc(sizeof *r->row * (size_t)n);
    int64_t drawn = 0; // of the slowest
    while (r->n_rows < n) {
        const int64_t first = r->n_rows, round = drawn / size[slow];
        const long double left = (long double)((round + 1) * size[slow] - drawn) * weights;
        const long double rows = ceill(ceill(left / weight) / (long double)L);
        const long double windows = ceill(rows / (long double)W);
        const int64_t limit = windows > 1 ? (int64_t)ceill(rows / windows) : W;
        int64_t end = first;
        while (end < n && end < first + limit && drawn / size[slow] == round) {
            for (int64_t i = end * L; i < (end + 1) * L; i++) drawn += r->set[i] == slow;
            end++;
        }
        if (end == n) break; // cut off
        struct ht_permute order;
        ht_permute_init(&order, (uint64_t)(end - first), o->seed, 0x726f777300000000u,
                        (uint64_t)first);
        for (int64_t i = 0; i < end - first; i++)
            r->row[r->n_rows++] = first + (int64_t)ht_permute_at(&order, (uint64_t)i);
    }
}

static inline void stream_ref_make(struct stream_ref *r, const struct ht_loader_options *o,
                                   int64_t n_wanted)
{
    int64_t position[3] = { 0 }, epoch[3] = { 0 };
    bool over[3] = { false };
    int64_t total = 0;

    memset(r, 0, sizeof *r);
    n_wanted += (o->window_rows + 1) * o->seq_len; // windows are written out whole
    r->token = malloc(sizeof *r->token * (size_t)(n_wanted + 1000));
    r->ends = calloc((size_t)(n_wanted + 1000), sizeof *r->ends);
    r->set = calloc((size_t)(n_wanted + 1000), sizeof *r->set);
    while (r->n < n_wanted) {
        int best = -1;
        long double largest = 0, weights = 0;
        total = 0;
        for (int d = 0; d < o->n_datasets; d++)
            if (!over[d]) {
                weights += (long double)llround(o->datasets[d].weight / 0.6 * 0x1p30);
                total += r->drawn[d];
            }
        for (int d = 0; d < o->n_datasets; d++) {
            if (over[d]) continue;
            const long double w = (long double)llround(o->datasets[d].weight / 0.6 * 0x1p30);
            const long double deficit = w * (long double)total - weights * (long double)r->drawn[d];
            if (best < 0 || deficit > largest) {
                best = d;
                largest = deficit;
            }
        }
        if (best < 0) break;
        if (position[best] == sets[best].n_docs) {
            if (o->one_epoch) {
                over[best] = true;
                continue;
            }
            position[best] = 0;
            epoch[best]++;
        }
        struct ht_permute order;
        ht_permute_init(&order, (uint64_t)sets[best].n_docs, o->seed,
                        0x6f72646572000000u + (uint64_t)best, (uint64_t)epoch[best]);
        const int64_t doc =
            o->shuffle ? (int64_t)ht_permute_at(&order, (uint64_t)position[best]) : position[best];
        const int64_t n = doc_length(&sets[best], doc);
        for (int64_t i = 0; i < n; i++) {
            r->ends[r->n] = i == n - 1;
            r->set[r->n] = (uint8_t)best;
            r->token[r->n++] = doc_token(&sets[best], doc, i);
        }
        position[best]++;
        r->visited[best]++;
        r->drawn[best] += n;
    }
    if (o->shuffle && !o->one_epoch && o->window_rows > 1) windows_ref_make(r, o);
}

static inline void stream_ref_free(struct stream_ref *r)
{
    free(r->token);
    free(r->ends);
    free(r->set);
    free(r->row);
}

static inline int64_t row_ref(const struct stream_ref *r, int64_t row)
{
    if (!r->row) return row;
    ck_assert_int_lt(row, r->n_rows);
    return r->row[row];
}

#endif
