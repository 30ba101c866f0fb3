/* training/units.c: ZeRO-2 and -3: weights and gradients come and go unit by unit as the passes
 * need them (core/model/model.h, distributed/zero.h). */
#include <stdlib.h>

#include "training/run.h"

/* The backward pass of an embedding has no product with its weights. */
static bool wants_weights(const struct ht_run *r, int unit, bool backward)
{
    return r->units.weights && !(backward && unit == 0 && !r->cfg->model.tied_head);
}

static enum ht_status needed(void *user, int unit, int next, bool backward)
{
    struct ht_run *r = user;

    if (wants_weights(r, unit, backward))
        HT_TRY(ht_zero_unit_weights(r->zero, unit, next, &r->units.weights[unit]));
    if (backward) HT_TRY(ht_zero_unit_grads(r->zero, unit, &r->units.grads[unit]));
    ht_comm_progress(r->comm);
    return HT_OK;
}

static enum ht_status done(void *user, int unit, bool backward)
{
    struct ht_run *r = user;

    if (wants_weights(r, unit, backward)) {
        ht_zero_unit_weights_done(r->zero, unit);
        r->units.weights[unit] = NULL;
    }
    if (backward) {
        r->units.grads[unit] = NULL;
        HT_TRY(ht_zero_unit_grads_done(r->zero, unit));
    }
    ht_comm_progress(r->comm);
    return HT_OK;
}

enum ht_status ht_run_create_units(struct ht_run *r)
{
    const size_t n = (size_t)r->model->list.n_units;
    const int stage = r->cfg->parallel.zero_stage;
    struct ht_model_units *u = &r->units;

    if (stage < 2) return HT_OK;
    *u = (struct ht_model_units){ .user = r, .needed = needed, .done = done };
    u->grads = calloc(n, sizeof *u->grads);
    if (stage == 3) u->weights = calloc(n, sizeof *u->weights);
    if (!u->grads || (stage == 3 && !u->weights))
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a list of %zu units", n);
    u->vector_grads = r->grads;
    r->model->units = u;
    return HT_OK;
}

void ht_run_free_units(struct ht_run *r)
{
    free(r->units.weights);
    free(r->units.grads);
}

void *ht_run_weight(const struct ht_run *r, int64_t first, int64_t at)
{
    const struct ht_model *m = r->model;
    const size_t width = ht_dtype_bytes(m->dtype);

    if (first >= m->list.n_matrix) return m->vector + (first - m->list.n_matrix);
    if (m->matrix) return (char *)m->matrix + (size_t)first * width;
    return (char *)ht_zero_weight_shard(r->zero) + (size_t)at * width;
}
