/* distributed/zero_plan.c: how the flat index space is cut into buckets and given to ranks.
 *
 * Each region (stages 0 and 1: matrices, vectors; stages 2 and 3: every unit, vectors) is cut from
 * its end:
 *
 *        0   first   B         B         B    pad
 *        |-----|---------|---------|------....|      B = bucket_bytes / 4, rounded down to a
 * multiple
 *        <- last to start      first to start ->     of A = n_ranks * 64; region rounded up to A
 *
 * A rank's shard holds its parts in ascending order; with one rank and two regions that is the flat
 * order.
 */
#include <inttypes.h>
#include <stdlib.h>

#include "distributed/zero_impl.h"

static int64_t round_up(int64_t n, int64_t a)
{
    return (n + a - 1) / a * a;
}

static int64_t bucket_size(int64_t bucket_bytes, int n_ranks)
{
    const int64_t a = (int64_t)n_ranks * HT_ZERO_ALIGN, n = bucket_bytes / 4 / a * a;
    return n < a ? a : n;
}

int64_t ht_zero_padded_matrix(int64_t n_matrix, int n_ranks)
{
    return round_up(n_matrix, (int64_t)n_ranks * HT_ZERO_ALIGN);
}

int64_t ht_zero_padded_vector(int64_t n_matrix, int64_t n_total, int n_ranks)
{
    return round_up(n_total - n_matrix, (int64_t)n_ranks * HT_ZERO_ALIGN);
}

int64_t ht_zero_padded_total(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks)
{
    const int64_t m = ht_zero_padded_matrix(n_matrix, n_ranks);
    const int64_t v = n_matrix + ht_zero_padded_vector(n_matrix, n_total, n_ranks);
    (void)bucket_bytes; // every bucket but the last of a region is whole
    return m > v ? m : v;
}

/* Buckets of region r, ascending, behind those that are there; shard_start moves on. */
static void cut_region(struct ht_zero_cut *c, int r, int64_t base, int64_t end, int64_t size,
                       int n_ranks)
{
    const int64_t padded = round_up(end - base, (int64_t)n_ranks * HT_ZERO_ALIGN);
    const int n = (int)((padded + size - 1) / size);

    c->first[r] = c->n_buckets;
    for (int i = 0; i < n; i++) {
        const int64_t stop = padded - (n - 1 - i) * size, begin = stop > size ? stop - size : 0;
        c->buckets[c->n_buckets++] =
            (struct ht_zero_bucket){ .start = base + begin,
                                     .end = base + stop,
                                     .region_end = end,
                                     .region = r,
                                     .shard_start = c->shard_size + begin / n_ranks };
    }
    c->shard_size += padded / n_ranks;
}

enum ht_status ht_zero_cut_create(struct ht_zero_cut *out, const int64_t *cuts, int n_regions,
                                  int64_t bucket_bytes, int n_ranks)
{
    const int64_t size = bucket_size(bucket_bytes, n_ranks), total = cuts[n_regions];
    int64_t most = 0;

    *out = (struct ht_zero_cut){ .n_regions = n_regions };
    for (int r = 0; r < n_regions; r++)
        most +=
            (round_up(cuts[r + 1] - cuts[r], (int64_t)n_ranks * HT_ZERO_ALIGN) + size - 1) / size;
    if (most > INT32_MAX / 4)
        return HT_FAIL(HT_ERR_ARG,
                       "gradient buckets of %" PRId64 " bytes cut %" PRId64
                       " elements into %" PRId64 " buckets; make them larger",
                       bucket_bytes, total, most);
    out->buckets = calloc((size_t)most + 1, sizeof *out->buckets);
    out->first = calloc((size_t)n_regions + 1, sizeof *out->first);
    if (!out->buckets || !out->first) {
        ht_zero_cut_free(out);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %" PRId64 " buckets", most);
    }
    for (int r = 0; r < n_regions; r++) cut_region(out, r, cuts[r], cuts[r + 1], size, n_ranks);
    out->first[n_regions] = out->n_buckets;
    out->n_matrix_buckets = out->first[n_regions - 1];
    return HT_OK;
}

void ht_zero_cut_free(struct ht_zero_cut *c)
{
    free(c->buckets);
    free(c->first);
    *c = (struct ht_zero_cut){ 0 };
}

enum ht_status ht_zero_cut_slices(struct ht_zero_slice **out, int *n_out,
                                  const struct ht_zero_cut *c, int n_ranks, int rank)
{
    struct ht_zero_slice *s = calloc((size_t)c->n_buckets + 1, sizeof *s);
    int n = 0;

    *out = NULL;
    *n_out = 0;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d slices", c->n_buckets);
    for (int i = 0; i < c->n_buckets; i++) {
        const struct ht_zero_bucket *b = &c->buckets[i];
        const int64_t part = (b->end - b->start) / n_ranks, start = b->start + rank * part;
        const int64_t real = b->region_end - start < part ? b->region_end - start : part;
        if (real > 0) s[n++] = (struct ht_zero_slice){ start, real, b->shard_start };
    }
    *out = s;
    *n_out = n;
    return HT_OK;
}

enum ht_status ht_zero_plan(struct ht_zero_slice **out, int *n_slices, int64_t *shard_size,
                            int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks,
                            int rank)
{
    const int64_t cuts[3] = { 0, n_matrix, n_total };
    struct ht_zero_cut c = { 0 };
    enum ht_status st;

    *out = NULL;
    *n_slices = 0;
    if (shard_size) *shard_size = 0;
    HT_TRY(ht_zero_check_sizes(n_matrix, n_total, bucket_bytes, n_ranks));
    if (rank < 0 || rank >= n_ranks)
        return HT_FAIL(HT_ERR_ARG, "slices of rank %d of %d", rank, n_ranks);
    HT_TRY_GOTO(st, done, ht_zero_cut_create(&c, cuts, 2, bucket_bytes, n_ranks));
    HT_TRY_GOTO(st, done, ht_zero_cut_slices(out, n_slices, &c, n_ranks, rank));
    if (shard_size) *shard_size = c.shard_size;
done:
    ht_zero_cut_free(&c);
    return st;
}

enum ht_status ht_zero_check_sizes(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes,
                                   int n_ranks)
{
    if (n_matrix < 0 || n_total < n_matrix || n_matrix % HT_ZERO_ALIGN || n_total % HT_ZERO_ALIGN)
        return HT_FAIL(HT_ERR_ARG,
                       "gradient buckets: %" PRId64 " matrix elements of %" PRId64
                       "; both must be multiples of %d, and 0 <= matrix <= total",
                       n_matrix, n_total, HT_ZERO_ALIGN);
    if (bucket_bytes < 1 || n_ranks < 1)
        return HT_FAIL(HT_ERR_ARG, "gradient buckets of %" PRId64 " bytes over %d ranks",
                       bucket_bytes, n_ranks);
    return HT_OK;
}
