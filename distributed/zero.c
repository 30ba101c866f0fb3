/* distributed/zero.c: bucket plan, reduction during the backward pass, gathering of weights.
 *
 * Region m = [0, n_matrix), region v = [n_matrix, n_total). Each is cut from its end:
 *
 *        0   first   B         B         B    pad
 *   m    |-----|---------|---------|------....|      B = bucket_bytes / 4, rounded down to a
 * multiple of
 *        <- last to start      first to start ->     A = n_ranks * 64; region rounded up to A
 *
 * Buckets start in one fixed order on every rank (matrices from the end, then vectors from the
 * end), however a rank cuts its calls. The last bucket of a region may reach past the region's end:
 * it is sent from a copy that ends in zeros, so the padding of a shard holds zeros and never a
 * neighbour's gradient.
 *
 * A rank's shard holds its parts in ascending order, first m then v; with one rank that is the flat
 * order, and the gradient buffer itself serves as the shard.
 */
#include "distributed/zero.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum {
    ALIGN = 64,          // elements; every part starts on a cache line in each dtype
    MAX_SLOTS = 4,       // reductions under way; more would only hold memory
    MAX_MESSAGES = 4096, // of gathers under way
};

struct bucket {
    int64_t start, end;          // flat offsets; end may pass region_end
    int64_t region_end;          // of real elements
    int64_t shard_start;         // of a rank's part in its shard
    struct ht_comm_request *req; // all-gather under way
};

struct plan {
    int n_buckets, n_matrix_buckets;
    struct bucket *buckets; // ascending
    int64_t shard_size;
};

struct slot {
    struct ht_comm_request *req;
    void *staging;
    int bucket;
};

struct ht_zero {
    struct ht_comm *comm;
    int rank, n_ranks, stage;
    int64_t n_matrix, n_total;
    enum ht_dtype wire;
    struct plan plan;
    int n_slices;
    struct ht_zero_slice *slices;
    struct ht_zero_slice whole; // the only slice of stage 0

    int n_slots;
    struct slot slots[MAX_SLOTS];
    float *tail[2];    // zero-padded copies of the last bucket of m and of v
    float *shard_grad; // (shard_size); NULL with one rank
    size_t buffer_bytes;

    float *grad;   // of the round under way
    int n_started; // buckets, in starting order
};

/* ---- the plan: a function of sizes alone ---- */

static int64_t round_up(int64_t n, int64_t a)
{
    return (n + a - 1) / a * a;
}

static int64_t bucket_size(int64_t bucket_bytes, int n_ranks)
{
    const int64_t a = (int64_t)n_ranks * ALIGN, n = bucket_bytes / 4 / a * a;
    return n < a ? a : n;
}

int64_t ht_zero_padded_matrix(int64_t n_matrix, int n_ranks)
{
    return round_up(n_matrix, (int64_t)n_ranks * ALIGN);
}

int64_t ht_zero_padded_vector(int64_t n_matrix, int64_t n_total, int n_ranks)
{
    return round_up(n_total - n_matrix, (int64_t)n_ranks * ALIGN);
}

int64_t ht_zero_padded_total(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks)
{
    const int64_t m = ht_zero_padded_matrix(n_matrix, n_ranks);
    const int64_t v = n_matrix + ht_zero_padded_vector(n_matrix, n_total, n_ranks);
    (void)bucket_bytes; // every bucket but the last of a region is whole
    return m > v ? m : v;
}

static enum ht_status check_sizes(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes,
                                  int n_ranks)
{
    if (n_matrix < 0 || n_total < n_matrix || n_matrix % ALIGN || n_total % ALIGN)
        return HT_FAIL(HT_ERR_ARG,
                       "gradient buckets: %" PRId64 " matrix elements of %" PRId64
                       "; both must be multiples of %d, and 0 <= matrix <= total",
                       n_matrix, n_total, ALIGN);
    if (bucket_bytes < 1 || n_ranks < 1)
        return HT_FAIL(HT_ERR_ARG, "gradient buckets of %" PRId64 " bytes over %d ranks",
                       bucket_bytes, n_ranks);
    return HT_OK;
}

static enum ht_status plan_create(struct plan *p, int64_t n_matrix, int64_t n_total,
                                  int64_t bucket_bytes, int n_ranks)
{
    const int64_t size = bucket_size(bucket_bytes, n_ranks);
    const int64_t padded[2] = { ht_zero_padded_matrix(n_matrix, n_ranks),
                                ht_zero_padded_vector(n_matrix, n_total, n_ranks) };
    const int64_t base[2] = { 0, n_matrix }, end[2] = { n_matrix, n_total };
    const int64_t n0 = (padded[0] + size - 1) / size, n1 = (padded[1] + size - 1) / size;

    if (n0 + n1 > INT32_MAX / 4)
        return HT_FAIL(HT_ERR_ARG,
                       "gradient buckets of %" PRId64 " bytes cut %" PRId64
                       " elements into %" PRId64 " buckets; make them larger",
                       bucket_bytes, n_total, n0 + n1);
    p->n_matrix_buckets = (int)n0;
    p->n_buckets = (int)(n0 + n1);
    p->shard_size = (padded[0] + padded[1]) / n_ranks;
    p->buckets = calloc((size_t)p->n_buckets + 1, sizeof *p->buckets);
    if (!p->buckets) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d buckets", p->n_buckets);
    for (int i = 0; i < p->n_buckets; i++) {
        const int region = i >= p->n_matrix_buckets;
        const int64_t from_end = region ? p->n_buckets - 1 - i : p->n_matrix_buckets - 1 - i;
        const int64_t stop = padded[region] - from_end * size; // relative to the region
        const int64_t begin = stop > size ? stop - size : 0;
        p->buckets[i] = (struct bucket){
            .start = base[region] + begin,
            .end = base[region] + stop,
            .region_end = end[region],
            .shard_start = begin / n_ranks + (region ? padded[0] / n_ranks : 0),
        };
    }
    return HT_OK;
}

static enum ht_status plan_slices(struct ht_zero_slice **out, int *n_out, const struct plan *p,
                                  int n_ranks, int rank)
{
    struct ht_zero_slice *s = calloc((size_t)p->n_buckets + 1, sizeof *s);
    int n = 0;

    *out = NULL;
    *n_out = 0;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d slices", p->n_buckets);
    for (int i = 0; i < p->n_buckets; i++) {
        const struct bucket *b = &p->buckets[i];
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
    struct plan p = { 0 };
    enum ht_status st;

    *out = NULL;
    *n_slices = 0;
    if (shard_size) *shard_size = 0;
    HT_TRY(check_sizes(n_matrix, n_total, bucket_bytes, n_ranks));
    if (rank < 0 || rank >= n_ranks)
        return HT_FAIL(HT_ERR_ARG, "slices of rank %d of %d", rank, n_ranks);
    HT_TRY_GOTO(st, done, plan_create(&p, n_matrix, n_total, bucket_bytes, n_ranks));
    HT_TRY_GOTO(st, done, plan_slices(out, n_slices, &p, n_ranks, rank));
    if (shard_size) *shard_size = p.shard_size;
done:
    free(p.buckets);
    return st;
}

/* ---- life ---- */

/* Zeroed memory on a cache line, counted. */
static enum ht_status buffer(struct ht_zero *z, void *out, size_t n_bytes)
{
    const size_t n = (n_bytes + 63) / 64 * 64;
    void *p = n ? aligned_alloc(64, n) : NULL;

    if (n && !p) return HT_FAIL(HT_ERR_MEMORY, "no memory for a gradient buffer of %zu bytes", n);
    if (p) memset(p, 0, n);
    memcpy(out, &p, sizeof p);
    z->buffer_bytes += n;
    return HT_OK;
}

static enum ht_status create_buffers(struct ht_zero *z)
{
    const struct plan *p = &z->plan;
    int64_t largest = 0;

    if (z->n_ranks == 1) return HT_OK;
    for (int i = 0; i < p->n_buckets; i++) {
        const int64_t n = p->buckets[i].end - p->buckets[i].start;
        if (n > largest) largest = n;
        if (p->buckets[i].end > p->buckets[i].region_end)
            HT_TRY(buffer(z, &z->tail[i >= p->n_matrix_buckets], (size_t)n * sizeof(float)));
    }
    const size_t staging = ht_comm_staging_bytes(z->comm, largest / z->n_ranks, z->wire);
    z->n_slots = p->n_buckets < MAX_SLOTS ? p->n_buckets : MAX_SLOTS;
    for (int i = 0; i < z->n_slots; i++) HT_TRY(buffer(z, &z->slots[i].staging, staging));
    return buffer(z, &z->shard_grad, (size_t)p->shard_size * sizeof(float));
}

enum ht_status ht_zero_create(struct ht_zero **out, struct ht_comm *comm, int64_t n_matrix,
                              int64_t n_total, int64_t bucket_bytes, enum ht_dtype wire)
{
    enum ht_status st = HT_OK;
    struct ht_zero *z = NULL;

    *out = NULL;
    HT_TRY(check_sizes(n_matrix, n_total, bucket_bytes, ht_comm_size(comm)));
    if (wire != HT_DTYPE_F32 && wire != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_ARG, "gradients cannot travel as %s; fp32 or bf16",
                       ht_dtype_name(wire));
    z = calloc(1, sizeof *z);
    if (!z) return HT_FAIL(HT_ERR_MEMORY, "no memory for gradient buckets");
    z->comm = comm;
    z->rank = ht_comm_rank(comm);
    z->n_ranks = ht_comm_size(comm);
    z->stage = 1;
    z->n_matrix = n_matrix;
    z->n_total = n_total;
    z->wire = wire;
    z->whole = (struct ht_zero_slice){ 0, n_total, 0 };
    HT_TRY_GOTO(st, done, plan_create(&z->plan, n_matrix, n_total, bucket_bytes, z->n_ranks));
    HT_TRY_GOTO(st, done, plan_slices(&z->slices, &z->n_slices, &z->plan, z->n_ranks, z->rank));
    HT_TRY_GOTO(st, done, create_buffers(z));
    *out = z;
    z = NULL;
done:
    ht_zero_free(z);
    return st;
}

void ht_zero_free(struct ht_zero *z)
{
    bool busy = false;

    if (!z) return;
    for (int i = 0; i < z->n_slots; i++) busy = busy || z->slots[i].req;
    // While messages are under way (a failed run), MPI may still write here: leave the memory to
    // the exit.
    if (!busy) {
        for (int i = 0; i < z->n_slots; i++) free(z->slots[i].staging);
        free(z->tail[0]);
        free(z->tail[1]);
        free(z->shard_grad);
    }
    free(z->plan.buckets);
    free(z->slices);
    free(z);
}

enum ht_status ht_zero_set_stage(struct ht_zero *z, int stage)
{
    if (stage != 0 && stage != 1)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "zero_stage %d; 0 or 1 on the CPU", stage);
    if (z->n_started)
        return HT_FAIL(HT_ERR_ARG, "zero_stage cannot change while gradients are being reduced");
    z->stage = stage;
    return HT_OK;
}

static bool is_sharded(const struct ht_zero *z)
{
    return z->stage > 0 && z->n_ranks > 1;
}

int ht_zero_n_slices(const struct ht_zero *z)
{
    return z->stage ? z->n_slices : z->n_total > 0;
}
const struct ht_zero_slice *ht_zero_slices(const struct ht_zero *z)
{
    return z->stage ? z->slices : &z->whole;
}
int64_t ht_zero_shard_size(const struct ht_zero *z)
{
    return z->stage ? z->plan.shard_size : z->n_total;
}
size_t ht_zero_buffer_bytes(const struct ht_zero *z)
{
    return z->buffer_bytes;
}

/* ---- gradients ---- */

/* Buckets by starting order: matrices from the end, then vectors from the end. */
static int bucket_at(const struct ht_zero *z, int order)
{
    const int m = z->plan.n_matrix_buckets;
    return order < m ? m - 1 - order : z->plan.n_buckets - 1 - (order - m);
}

/* The reduction in a slot is over: with stage 0 its parts must go round. */
static enum ht_status slot_finish(struct ht_zero *z, struct slot *s)
{
    const struct bucket *b = &z->plan.buckets[s->bucket];
    const bool was_busy = s->req != NULL;

    HT_TRY(ht_comm_wait(z->comm, &s->req));
    if (!was_busy || is_sharded(z) || z->n_ranks == 1) return HT_OK;
    const bool is_tail = b->end > b->region_end;
    float *sums = is_tail ? z->tail[s->bucket >= z->plan.n_matrix_buckets] : z->grad + b->start;
    HT_TRY(ht_comm_all_gather_start(z->comm, &s->req, sums,
                                    (b->end - b->start) / z->n_ranks * (int64_t)sizeof(float)));
    HT_TRY(ht_comm_wait(z->comm, &s->req));
    if (is_tail)
        memcpy(z->grad + b->start, sums, (size_t)(b->region_end - b->start) * sizeof(float));
    return HT_OK;
}

static enum ht_status bucket_start(struct ht_zero *z, int index)
{
    const struct bucket *b = &z->plan.buckets[index];
    struct slot *s = &z->slots[z->n_started % z->n_slots];
    const int64_t part = (b->end - b->start) / z->n_ranks;
    float *in = z->grad + b->start;

    HT_TRY(slot_finish(z, s));
    if (b->end > b->region_end) {
        // the padding is zero since create, or since the sums of zeros of the last round
        float *tail = z->tail[index >= z->plan.n_matrix_buckets];
        memcpy(tail, in, (size_t)(b->region_end - b->start) * sizeof(float));
        in = tail;
    }
    s->bucket = index;
    float *out = is_sharded(z) ? z->shard_grad + b->shard_start : in + z->rank * part;
    return ht_comm_reduce_scatter_start(z->comm, &s->req, out, in, part, z->wire, s->staging);
}

enum ht_status ht_zero_grads_ready(struct ht_zero *z, float *grad, int64_t done, bool vectors_done)
{
    const int n_before = z->n_started;

    if (done < 0 || (z->n_started > 0 && grad != z->grad))
        return HT_FAIL(HT_ERR_ARG, "gradients ready from %" PRId64 "%s", done,
                       done < 0 ? "" : ": another buffer than before");
    z->grad = grad;
    while (z->n_started < z->plan.n_buckets) {
        const int i = bucket_at(z, z->n_started);
        if (i < z->plan.n_matrix_buckets ? z->plan.buckets[i].start < done : !vectors_done) break;
        if (z->n_ranks > 1) HT_TRY(bucket_start(z, i));
        z->n_started++;
    }
    if (z->n_started == n_before) ht_comm_progress(z->comm);
    return HT_OK;
}

enum ht_status ht_zero_reduced(struct ht_zero *z, float **shard_grad)
{
    *shard_grad = NULL;
    if (z->n_started < z->plan.n_buckets)
        return HT_FAIL(HT_ERR_ARG, "gradients: only %d of %d buckets were declared ready",
                       z->n_started, z->plan.n_buckets);
    for (int i = 0; i < z->n_slots; i++) // oldest first
        HT_TRY(slot_finish(z, &z->slots[(z->n_started + i) % z->n_slots]));
    *shard_grad = is_sharded(z) ? z->shard_grad : z->grad;
    z->n_started = 0;
    return HT_OK;
}

/* ---- weights ---- */

enum ht_status ht_zero_gather_weights(struct ht_zero *z, void *weights_m, enum ht_dtype dtype,
                                      float *weights_v)
{
    const int n = z->plan.n_buckets;
    const size_t bytes_m = ht_dtype_bytes(dtype);
    int n_waited = 0;

    if (!is_sharded(z)) return HT_OK;
    const int window = 1 + MAX_MESSAGES / (2 * z->n_ranks);
    for (int i = 0; i < n; i++) {
        struct bucket *b = &z->plan.buckets[i];
        const int64_t part = (b->end - b->start) / z->n_ranks;
        if (i - n_waited >= window) HT_TRY(ht_comm_wait(z->comm, &z->plan.buckets[n_waited++].req));
        if (i < z->plan.n_matrix_buckets)
            HT_TRY(ht_comm_all_gather_start(z->comm, &b->req,
                                            (char *)weights_m + (size_t)b->start * bytes_m,
                                            part * (int64_t)bytes_m));
        else
            HT_TRY(ht_comm_all_gather_start(z->comm, &b->req, weights_v + (b->start - z->n_matrix),
                                            part * (int64_t)sizeof(float)));
    }
    while (n_waited < n) HT_TRY(ht_comm_wait(z->comm, &z->plan.buckets[n_waited++].req));
    return HT_OK;
}
