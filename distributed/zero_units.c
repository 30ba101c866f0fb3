/* distributed/zero_units.c: stages 2 and 3: weights and gradients of one unit at a time.
 *
 * A place holds one unit: its elements in flat order, then the padding of its last bucket, zeros.
 *
 *   weights    gather, wait, [in use], done     still there until the place is wanted: the last
 *              layer of the forward pass is the first one of the backward pass
 *   gradient   zeroed, [written by the backward pass], done, under reduction until the place is
 *              wanted again
 *
 * Two places alternate, so that one unit travels while the pass works on the other. A first unit
 * that is also the head (keep_first) has a place of its own.
 */
#include "distributed/zero_impl.h"

static int64_t unit_size(const struct ht_zero *z, int unit) // padded
{
    const struct ht_zero_cut *c = &z->cut;
    return c->buckets[c->first[unit + 1] - 1].end - c->buckets[c->first[unit]].start;
}

static int n_units(const struct ht_zero *z)
{
    return z->cut.n_regions - 1;
}

static enum ht_status check_unit(const struct ht_zero *z, int unit, int lowest_stage)
{
    if (z->stage < lowest_stage || unit < 0 || unit >= n_units(z))
        return HT_FAIL(HT_ERR_ARG, "unit %d of %d in zero_stage %d", unit,
                       z->stage >= 2 ? n_units(z) : 0, z->stage);
    return HT_OK;
}

static enum ht_status create_set(struct ht_zero *z, struct ht_zero_place *set, const char *what,
                                 size_t width, size_t *count)
{
    int64_t most = 0;

    for (int u = z->keep_first; u < n_units(z); u++)
        if (unit_size(z, u) > most) most = unit_size(z, u);
    for (int i = 0; i < HT_ZERO_PLACES; i++) {
        set[i].unit = -1;
        set[i].room = most;
        if (i == HT_ZERO_PLACES - 1) set[i].room = z->keep_first ? unit_size(z, 0) : 0;
        HT_TRY(ht_zero_buffer(z, &set[i].data, what, (size_t)set[i].room * width, count));
    }
    return HT_OK;
}

enum ht_status ht_zero_create_places(struct ht_zero *z)
{
    const size_t width = ht_dtype_bytes(z->weight_dtype);

    HT_TRY(create_set(z, z->grads, "gradients of a unit", sizeof(float), &z->bytes.gradients));
    if (z->stage < 3) return HT_OK;
    HT_TRY(create_set(z, z->weights, "weights of a unit", width, &z->bytes.weights));
    const struct ht_zero_bucket *v = &z->cut.buckets[z->cut.n_matrix_buckets];
    const int64_t n =
        z->cut.n_matrix_buckets < z->cut.n_buckets ? v->shard_start : z->cut.shard_size;
    return ht_zero_buffer(z, &z->shard_weight, "this rank's weights", (size_t)n * width,
                          &z->bytes.weights);
}

/* The place that holds a unit, or the one that it may take: the one whose turn is longest ago. NULL
 * when all are in use. */
static struct ht_zero_place *find_place(const struct ht_zero *z, struct ht_zero_place *set,
                                        int unit, const struct ht_zero_place *not_this)
{
    struct ht_zero_place *kept = &set[HT_ZERO_PLACES - 1], *found = NULL;

    if (z->keep_first && unit == 0) return kept;
    for (int i = 0; i < HT_ZERO_PLACES - 1; i++) {
        struct ht_zero_place *p = &set[i];
        if (p->unit == unit) return p;
        if (!p->in_use && p != not_this && (!found || p->used < found->used)) found = p;
    }
    return found;
}

/* ---- weights ---- */

void *ht_zero_weight_shard(const struct ht_zero *z)
{
    return z->shard_weight;
}

static enum ht_status wait_gather(struct ht_zero *z, struct ht_zero_place *p)
{
    if (!p->gathering) return HT_OK;
    for (int i = z->cut.first[p->unit]; i < z->cut.first[p->unit + 1]; i++)
        HT_TRY(ht_comm_wait(z->comm, &z->cut.buckets[i].req));
    p->gathering = false;
    return HT_OK;
}

static enum ht_status start_gather(struct ht_zero *z, struct ht_zero_place *p, int unit)
{
    const struct ht_zero_cut *c = &z->cut;
    const int64_t width = (int64_t)ht_dtype_bytes(z->weight_dtype);

    if (p->unit == unit) return HT_OK;
    HT_TRY(wait_gather(z, p)); // of a unit that nobody asked for in the end
    p->unit = unit;
    p->used = ++z->clock;
    p->gathering = true;
    for (int i = c->first[unit]; i < c->first[unit + 1]; i++) {
        struct ht_zero_bucket *b = &c->buckets[i];
        const int64_t part = (b->end - b->start) / z->n_ranks * width;
        char *to = (char *)p->data + (b->start - c->buckets[c->first[unit]].start) * width;
        HT_TRY(ht_backend_copy(z->be, to + z->rank * part,
                               (char *)z->shard_weight + b->shard_start * width, (size_t)part));
        HT_TRY(ht_comm_all_gather_start(z->comm, &b->req, to, part));
    }
    return HT_OK;
}

enum ht_status ht_zero_forget_weights(struct ht_zero *z)
{
    for (int i = 0; i < HT_ZERO_PLACES; i++) {
        HT_TRY(wait_gather(z, &z->weights[i]));
        z->weights[i].unit = -1;
    }
    return HT_OK;
}

enum ht_status ht_zero_unit_weights(struct ht_zero *z, int unit, int next, void **out)
{
    struct ht_zero_place *p, *q;

    *out = NULL;
    HT_TRY(check_unit(z, unit, 3));
    p = find_place(z, z->weights, unit, NULL);
    if (!p) return HT_FAIL(HT_ERR_ARG, "no place for the weights of unit %d: all are in use", unit);
    HT_TRY(start_gather(z, p, unit));
    HT_TRY(wait_gather(z, p));
    p->in_use = true;
    p->used = ++z->clock;
    *out = p->data;
    if (next < 0) return HT_OK;
    HT_TRY(check_unit(z, next, 3));
    q = find_place(z, z->weights, next, p);
    return q ? start_gather(z, q, next) : HT_OK;
}

void ht_zero_unit_weights_done(struct ht_zero *z, int unit)
{
    for (int i = 0; i < HT_ZERO_PLACES; i++)
        if (z->weights[i].unit == unit) z->weights[i].in_use = false;
}

/* ---- gradients ---- */

/* Until no reduction reads that unit's place or writes its sums any more. */
enum ht_status ht_zero_finish_region(struct ht_zero *z, int region)
{
    for (int i = 0; i < z->n_slots; i++) {
        struct ht_zero_slot *s = &z->slots[(z->next_slot + i) % z->n_slots]; // oldest first
        if (s->req && z->cut.buckets[s->bucket].region == region) HT_TRY(ht_zero_slot_finish(z, s));
    }
    return HT_OK;
}

enum ht_status ht_zero_unit_grads(struct ht_zero *z, int unit, float **out)
{
    struct ht_zero_place *p;

    *out = NULL;
    HT_TRY(check_unit(z, unit, 2));
    p = find_place(z, z->grads, unit, NULL);
    if (!p || p->in_use)
        return HT_FAIL(HT_ERR_ARG, "no place for the gradient of unit %d: %s", unit,
                       p ? "it is in use" : "all are in use");
    if (p->unit >= 0) HT_TRY(ht_zero_finish_region(z, p->unit));
    p->unit = unit;
    p->in_use = true;
    p->used = ++z->clock;
    *out = p->data;
    return ht_backend_zero(z->be, p->data, (size_t)unit_size(z, unit) * sizeof(float));
}

enum ht_status ht_zero_unit_grads_done(struct ht_zero *z, int unit)
{
    const struct ht_zero_cut *c = &z->cut;
    struct ht_zero_place *p = NULL;

    HT_TRY(check_unit(z, unit, 2));
    for (int i = 0; i < HT_ZERO_PLACES; i++)
        if (z->grads[i].unit == unit && z->grads[i].in_use) p = &z->grads[i];
    if (!p) return HT_FAIL(HT_ERR_ARG, "the gradient of unit %d is done but has no place", unit);
    for (int i = c->first[unit + 1] - 1; i >= c->first[unit]; i--)
        HT_TRY(ht_zero_bucket_start(
            z, i, (float *)p->data + (c->buckets[i].start - c->buckets[c->first[unit]].start)));
    p->in_use = false;
    return HT_OK;
}

enum ht_status ht_zero_vectors_ready(struct ht_zero *z, float *grad_v)
{
    if (!ht_zero_by_unit(z))
        return HT_FAIL(HT_ERR_ARG, "zero_stage %d reduces vectors with the rest", z->stage);
    for (int i = z->cut.n_buckets - 1; i >= z->cut.n_matrix_buckets; i--)
        HT_TRY(ht_zero_bucket_start(z, i, grad_v + (z->cut.buckets[i].start - z->n_matrix)));
    return HT_OK;
}
