/* distributed/zero.c: reduction during the backward pass, gathering of weights; stages 0 and 1 in
 * flat buffers, and what all stages share.
 *
 * Buckets start in one fixed order on every rank (matrices from the end, then vectors from the
 * end), however a rank cuts its calls. The last bucket of a region may reach past the region's end:
 * it is sent from a copy that ends in zeros, so the padding of a shard holds zeros and never a
 * neighbour's gradient. With one rank and a stage below 2 the gradient buffer itself serves as the
 * shard.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "distributed/reduce.h"
#include "distributed/zero_impl.h"

enum { MAX_MESSAGES = 4096 }; // of gathers under way

/* ---- life ---- */

enum ht_status ht_zero_buffer(struct ht_zero *z, void *out, const char *what, size_t n_bytes,
                              size_t *count)
{
    void *p = NULL;

    if (n_bytes > 0) {
        HT_TRY(ht_backend_alloc(&p, z->be, what, n_bytes));
        memcpy(out, &p, sizeof p); // owned from here on
        HT_TRY(ht_backend_zero(z->be, p, n_bytes));
        *count += n_bytes;
    }
    return HT_OK;
}

static bool is_sharded(const struct ht_zero *z)
{
    return z->stage >= 2 || (z->stage == 1 && z->n_ranks > 1);
}

static enum ht_status create_buffers(struct ht_zero *z)
{
    const struct ht_zero_cut *c = &z->cut;
    int64_t largest = 0, largest_tail = 0;

    if (z->n_ranks == 1 && !ht_zero_by_unit(z)) return HT_OK;
    for (int i = 0; i < c->n_buckets; i++) {
        const struct ht_zero_bucket *b = &c->buckets[i];
        const int64_t n = b->end - b->start;
        const bool vectors = i >= c->n_matrix_buckets;
        if (n > largest) largest = n;
        if (b->end > b->region_end && !vectors && n > largest_tail) largest_tail = n;
        if (b->end > b->region_end && (vectors || !ht_zero_by_unit(z)))
            HT_TRY(ht_zero_buffer(z, &z->tail[vectors], "the last gradient bucket",
                                  (size_t)n * sizeof(float), &z->bytes.staging));
    }
    if (z->stage == 2)
        HT_TRY(ht_zero_buffer(z, &z->weight_tail, "the last weights of a unit",
                              (size_t)largest_tail * ht_dtype_bytes(z->weight_dtype),
                              &z->bytes.staging));
    const int64_t part = largest / z->n_ranks;
    const size_t staging = ht_comm_staging_bytes(z->comm, part, z->wire);
    z->n_slots = c->n_buckets < HT_ZERO_SLOTS ? c->n_buckets : HT_ZERO_SLOTS;
    for (int i = 0; i < z->n_slots; i++) {
        HT_TRY(ht_zero_buffer(z, &z->slots[i].staging, "gradient messages", staging,
                              &z->bytes.staging));
        if (ht_zero_by_unit(z))
            HT_TRY(ht_zero_buffer(z, &z->slots[i].part, "sums of gradients",
                                  (size_t)part * sizeof(float), &z->bytes.staging));
    }
    if (is_sharded(z))
        HT_TRY(ht_zero_buffer(z, &z->shard_grad, "summed gradients",
                              (size_t)c->shard_size * sizeof(float), &z->bytes.gradients));
    return ht_zero_by_unit(z) ? ht_zero_create_places(z) : HT_OK;
}

static enum ht_status check_units(const struct ht_zero_options *o)
{
    if (o->n_units < 1 || !o->unit_start || o->unit_start[0] != 0 ||
        o->unit_start[o->n_units] != o->n_matrix)
        return HT_FAIL(HT_ERR_ARG, "zero_stage %d needs the units of the matrix part", o->stage);
    for (int i = 0; i < o->n_units; i++)
        if (o->unit_start[i + 1] <= o->unit_start[i] || o->unit_start[i] % HT_ZERO_ALIGN)
            return HT_FAIL(HT_ERR_ARG,
                           "unit %d of the matrices is [%" PRId64 ", %" PRId64
                           "); units ascend in multiples of %d",
                           i, o->unit_start[i], o->unit_start[i + 1], HT_ZERO_ALIGN);
    return HT_OK;
}

static enum ht_status check_options(const struct ht_zero_options *o, int n_ranks)
{
    HT_TRY(ht_zero_check_sizes(o->n_matrix, o->n_total, o->bucket_bytes, n_ranks));
    if (o->stage < 0 || o->stage > 3)
        return HT_FAIL(HT_ERR_ARG, "zero_stage is %d; it must be from 0 to 3", o->stage);
    if (o->wire != HT_DTYPE_F32 && o->wire != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_ARG, "gradients cannot travel as %s; fp32 or bf16",
                       ht_dtype_name(o->wire));
    return o->stage >= 2 ? check_units(o) : HT_OK;
}

static enum ht_status create_cut(struct ht_zero *z, const struct ht_zero_options *o)
{
    const int64_t two[3] = { 0, o->n_matrix, o->n_total };
    int64_t *cuts;

    if (!ht_zero_by_unit(z))
        return ht_zero_cut_create(&z->cut, two, 2, o->bucket_bytes, z->n_ranks);
    cuts = malloc(((size_t)o->n_units + 2) * sizeof *cuts);
    if (!cuts) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d units", o->n_units);
    memcpy(cuts, o->unit_start, ((size_t)o->n_units + 1) * sizeof *cuts);
    cuts[o->n_units + 1] = o->n_total;
    const enum ht_status st =
        ht_zero_cut_create(&z->cut, cuts, o->n_units + 1, o->bucket_bytes, z->n_ranks);
    free(cuts);
    return st;
}

enum ht_status ht_zero_create(struct ht_zero **out, struct ht_comm *comm, struct ht_backend *be,
                              const struct ht_zero_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_zero *z = NULL;

    *out = NULL;
    HT_TRY(check_options(o, ht_comm_size(comm)));
    z = calloc(1, sizeof *z);
    if (!z) return HT_FAIL(HT_ERR_MEMORY, "no memory for gradient buckets");
    z->comm = comm;
    z->be = be;
    z->rank = ht_comm_rank(comm);
    z->n_ranks = ht_comm_size(comm);
    z->stage = o->stage;
    z->n_matrix = o->n_matrix;
    z->n_total = o->n_total;
    z->wire = o->wire;
    z->weight_dtype = o->weight_dtype;
    z->keep_first = o->keep_first;
    z->weight_tail_bucket = -1;
    z->whole = (struct ht_zero_slice){ 0, o->n_total, 0 };
    HT_TRY_GOTO(st, done, create_cut(z, o));
    HT_TRY_GOTO(st, done,
                ht_zero_cut_slices(&z->slices, &z->n_slices, &z->cut, z->n_ranks, z->rank));
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
    for (int i = 0; i < z->cut.n_buckets; i++) busy = busy || z->cut.buckets[i].req;
    // While messages are under way (a failed run), they may still be written here: leave the memory
    // to the exit.
    if (!busy) {
        for (int i = 0; i < z->n_slots; i++) {
            ht_backend_free_memory(z->be, z->slots[i].staging);
            ht_backend_free_memory(z->be, z->slots[i].part);
        }
        for (int i = 0; i < HT_ZERO_PLACES; i++) {
            ht_backend_free_memory(z->be, z->weights[i].data);
            ht_backend_free_memory(z->be, z->grads[i].data);
        }
        ht_backend_free_memory(z->be, z->tail[0]);
        ht_backend_free_memory(z->be, z->tail[1]);
        ht_backend_free_memory(z->be, z->weight_tail);
        ht_backend_free_memory(z->be, z->shard_grad);
        ht_backend_free_memory(z->be, z->shard_weight);
    }
    ht_zero_cut_free(&z->cut);
    free(z->slices);
    free(z);
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
    return z->stage ? z->cut.shard_size : z->n_total;
}
struct ht_zero_bytes ht_zero_buffer_bytes(const struct ht_zero *z)
{
    return z->bytes;
}

/* ---- gradients ---- */

/* Buckets by starting order: matrices from the end, then vectors from the end. */
static int bucket_at(const struct ht_zero *z, int order)
{
    const int m = z->cut.n_matrix_buckets;
    return order < m ? m - 1 - order : z->cut.n_buckets - 1 - (order - m);
}

static float *tail_of(const struct ht_zero *z, int index)
{
    return z->tail[index >= z->cut.n_matrix_buckets];
}

/* The reduction in a slot is over: with stage 0 its parts must go round, with stages 2 and 3 it may
 * join the sum of earlier micro-batches. */
enum ht_status ht_zero_slot_finish(struct ht_zero *z, struct ht_zero_slot *s)
{
    const struct ht_zero_bucket *b = &z->cut.buckets[s->bucket];
    const int64_t part = (b->end - b->start) / z->n_ranks;

    if (!s->req) return HT_OK;
    HT_TRY(ht_comm_wait(z->comm, &s->req));
    if (s->add) return ht_reduce_add(z->be, z->shard_grad + b->shard_start, s->part, part);
    if (z->stage > 0) return HT_OK;
    const bool is_tail = b->end > b->region_end;
    float *sums = is_tail ? tail_of(z, s->bucket) : z->grad + b->start;
    HT_TRY(ht_comm_all_gather_start(z->comm, &s->req, sums, part * (int64_t)sizeof(float)));
    HT_TRY(ht_comm_wait(z->comm, &s->req));
    if (!is_tail) return HT_OK;
    return ht_backend_copy(z->be, z->grad + b->start, sums,
                           (size_t)(b->region_end - b->start) * sizeof(float));
}

enum ht_status ht_zero_bucket_start(struct ht_zero *z, int index, float *in)
{
    struct ht_zero_bucket *b = &z->cut.buckets[index];
    struct ht_zero_slot *s = &z->slots[z->next_slot++ % z->n_slots];
    const int64_t part = (b->end - b->start) / z->n_ranks;
    const bool vectors = index >= z->cut.n_matrix_buckets;
    float *out;

    HT_TRY(ht_zero_slot_finish(z, s));
    if (b->summed) HT_TRY(ht_zero_finish_region(z, b->region)); // the sum that this one joins
    if (b->end > b->region_end && (vectors || !ht_zero_by_unit(z))) {
        // the padding is zero since create, or since the sums of zeros of the last round
        float *tail = tail_of(z, index);
        HT_TRY(
            ht_backend_copy(z->be, tail, in, (size_t)(b->region_end - b->start) * sizeof(float)));
        in = tail;
    }
    s->bucket = index;
    s->add = b->summed;
    b->summed = ht_zero_by_unit(z);
    if (s->add)
        out = s->part;
    else
        out = is_sharded(z) ? z->shard_grad + b->shard_start : in + z->rank * part;
    return ht_comm_reduce_scatter_start(z->comm, &s->req, out, in, part, z->wire, s->staging);
}

enum ht_status ht_zero_grads_ready(struct ht_zero *z, float *grad, int64_t done, bool vectors_done)
{
    const int n_before = z->n_started;

    if (ht_zero_by_unit(z))
        return HT_FAIL(HT_ERR_ARG, "zero_stage %d has no flat gradient", z->stage);
    if (done < 0 || (z->n_started > 0 && grad != z->grad))
        return HT_FAIL(HT_ERR_ARG, "gradients ready from %" PRId64 "%s", done,
                       done < 0 ? "" : ": another buffer than before");
    z->grad = grad;
    while (z->n_started < z->cut.n_buckets) {
        const int i = bucket_at(z, z->n_started);
        const struct ht_zero_bucket *b = &z->cut.buckets[i];
        if (i < z->cut.n_matrix_buckets ? b->start < done : !vectors_done) break;
        if (z->n_ranks > 1) HT_TRY(ht_zero_bucket_start(z, i, grad + b->start));
        z->n_started++;
    }
    if (z->n_started == n_before) ht_comm_progress(z->comm);
    return HT_OK;
}

enum ht_status ht_zero_reduced(struct ht_zero *z, float **shard_grad)
{
    struct ht_zero_cut *c = &z->cut;

    *shard_grad = NULL;
    if (ht_zero_by_unit(z)) {
        for (int i = 0; i < c->n_buckets; i++)
            if (!c->buckets[i].summed)
                return HT_FAIL(HT_ERR_ARG, "gradients: bucket %d of %d was not declared ready", i,
                               c->n_buckets);
    } else if (z->n_started < c->n_buckets) {
        return HT_FAIL(HT_ERR_ARG, "gradients: only %d of %d buckets were declared ready",
                       z->n_started, c->n_buckets);
    }
    for (int i = 0; i < z->n_slots; i++) // oldest first
        HT_TRY(ht_zero_slot_finish(z, &z->slots[(z->next_slot + i) % z->n_slots]));
    for (int i = 0; i < c->n_buckets; i++) c->buckets[i].summed = false;
    *shard_grad = is_sharded(z) ? z->shard_grad : z->grad;
    z->n_started = 0;
    return HT_OK;
}

/* ---- weights ---- */

/* Units follow each other without gaps in the flat buffer of stage 2: the last bucket of one, when
 * it is padded, goes through a copy. This one is through. */
static enum ht_status finish_weight_tail(struct ht_zero *z, char *weights_m)
{
    const size_t width = ht_dtype_bytes(z->weight_dtype);

    if (z->weight_tail_bucket < 0) return HT_OK;
    struct ht_zero_bucket *b = &z->cut.buckets[z->weight_tail_bucket];
    z->weight_tail_bucket = -1;
    HT_TRY(ht_comm_wait(z->comm, &b->req));
    return ht_backend_copy(z->be, weights_m + (size_t)b->start * width, z->weight_tail,
                           (size_t)(b->region_end - b->start) * width);
}

static enum ht_status start_weight_tail(struct ht_zero *z, int index, char *weights_m)
{
    struct ht_zero_bucket *b = &z->cut.buckets[index];
    const int64_t width = (int64_t)ht_dtype_bytes(z->weight_dtype);
    const int64_t part = (b->end - b->start) / z->n_ranks, own = b->start + z->rank * part;
    const int64_t real = b->region_end - own < part ? b->region_end - own : part;

    HT_TRY(finish_weight_tail(z, weights_m));
    if (real > 0)
        HT_TRY(ht_backend_copy(z->be, (char *)z->weight_tail + z->rank * part * width,
                               weights_m + own * width, (size_t)(real * width)));
    z->weight_tail_bucket = index;
    return ht_comm_all_gather_start(z->comm, &b->req, z->weight_tail, part * width);
}

static enum ht_status start_weight_gather(struct ht_zero *z, int index, char *weights_m,
                                          int64_t width, float *weights_v)
{
    struct ht_zero_bucket *b = &z->cut.buckets[index];
    const int64_t part = (b->end - b->start) / z->n_ranks;

    if (index >= z->cut.n_matrix_buckets)
        return ht_comm_all_gather_start(z->comm, &b->req, weights_v + (b->start - z->n_matrix),
                                        part * (int64_t)sizeof(float));
    if (ht_zero_by_unit(z) && b->end > b->region_end) return start_weight_tail(z, index, weights_m);
    return ht_comm_all_gather_start(z->comm, &b->req, weights_m + b->start * width, part * width);
}

enum ht_status ht_zero_gather_weights(struct ht_zero *z, void *weights_m, enum ht_dtype dtype,
                                      float *weights_v)
{
    const int n = z->cut.n_buckets, first = z->stage == 3 ? z->cut.n_matrix_buckets : 0;
    const int window = 1 + MAX_MESSAGES / (2 * z->n_ranks);
    int n_waited = first;

    if (z->stage == 0) return HT_OK;
    if (ht_zero_by_unit(z) && dtype != z->weight_dtype)
        return HT_FAIL(HT_ERR_ARG, "weights to gather are %s; create was told %s",
                       ht_dtype_name(dtype), ht_dtype_name(z->weight_dtype));
    if (z->stage == 3) HT_TRY(ht_zero_forget_weights(z));
    for (int i = first; i < n; i++) {
        if (i - n_waited >= window) HT_TRY(ht_comm_wait(z->comm, &z->cut.buckets[n_waited++].req));
        HT_TRY(start_weight_gather(z, i, weights_m, (int64_t)ht_dtype_bytes(dtype), weights_v));
    }
    while (n_waited < n) HT_TRY(ht_comm_wait(z->comm, &z->cut.buckets[n_waited++].req));
    return z->stage == 2 ? finish_weight_tail(z, weights_m) : HT_OK;
}
