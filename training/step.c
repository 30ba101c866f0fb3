/* training/step.c: one optimiser step: gradients of the global batch, their sum, AdamW, new weights
 * [7, 9].
 *
 * Gradients belong to the mean over all counted labels of the global batch, whatever the number of
 * ranks and micro-batches: every micro-batch is scaled by the same 1 / step_counted.
 */
#include <math.h>
#include <string.h>

#include "core/base/file.h"
#include "core/ops/adamw.h"
#include "training/run.h"
#include "training/schedule.h"

static enum ht_status grads_final(void *user, int64_t done, bool vectors_done)
{
    struct ht_run *r = user;

    if (r->model->units) // the matrices' gradients are on their way already
        return vectors_done ? ht_zero_vectors_ready(r->zero, r->grads) : HT_OK;
    HT_TRY(ht_zero_grads_ready(r->zero, r->grads, done, vectors_done));
    ht_comm_progress(r->comm);
    return HT_OK;
}

static enum ht_status clear(struct ht_run *r, float *x, int64_t n)
{
    if (r->backend.kind != HT_BACKEND_CPU)
        return ht_backend_zero(&r->backend, x, (size_t)n * sizeof *x);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n; block += 1 << 18)
        memset(x + block, 0, (size_t)(n - block < 1 << 18 ? n - block : 1 << 18) * sizeof *x);
    return HT_OK;
}

/* Forward and backward over all micro-batches of this rank: loss and z sums of each in sums.micro.
 */
static enum ht_status accumulate(struct ht_run *r, int64_t *n_micro, int64_t *n_counted,
                                 struct ht_step_result *out)
{
    const struct ht_tensor_list *list = &r->model->list;
    const struct ht_batch *batch = NULL;
    double attended = 0.0, tokens = 0.0;

    *n_micro = 0;
    HT_TRY(clear(r, r->grads, list->n_total - (r->model->units ? list->n_matrix : 0)));
    do {
        struct ht_model_batch b;
        struct ht_loss loss;
        double wait_s = 0.0;
        HT_TRY(ht_loader_next(r->loader, &batch, &wait_s));
        out->data_wait_s += wait_s;
        HT_TRY(ht_run_put_batch(r, &b, batch));
        b.loss_sums = r->sums.micro + 3 * (*n_micro)++;
        const float scale = batch->step_counted ? (float)(1.0 / (double)batch->step_counted) : 0.0f;
        HT_TRY(ht_model_train(r->model, r->acts, &b, scale, r->cfg->train.z_loss, r->grads, &loss,
                              batch->last_of_step ? grads_final : NULL, r));
        attended += batch->attended * (double)batch->n_tokens;
        tokens += (double)batch->n_tokens;
        *n_counted = batch->step_counted;
        ht_run_pause_point(r, "step");
    } while (!batch->last_of_step);
    out->attended = attended / tokens;
    return HT_OK;
}

/* Loss, z-loss, labels and the sum of squares of the summed gradient over all ranks, and from them
 * the factor of the gradient. Where every rank has all of the gradient (zero_stage 0) it counts
 * once. Nothing waits for a device. */
static enum ht_status sum_up(struct ht_run *r, const float *shard_grad, int64_t n_micro)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    const int rank = ht_comm_rank(r->comm), n_ranks = ht_comm_size(r->comm);
    const bool counts = r->cfg->parallel.zero_stage > 0 || rank == 0;
    const int n_slices = counts ? ht_zero_n_slices(r->zero) : 0;
    struct ht_run_sums *s = &r->sums;
    struct ht_comm_request *req = NULL;
    double *own = s->ranks + 4 * (int64_t)rank;

    for (int i = 0; i < n_slices; i++)
        HT_TRY(ht_sum_squares(&r->backend, s->squares + i, shard_grad + slices[i].shard_start,
                              slices[i].n));
    HT_TRY(ht_sum_rows(&r->backend, own, s->micro, n_micro, 3));
    HT_TRY(ht_sum_rows(&r->backend, own + 3, s->squares, n_slices, 1));
    if (n_ranks > 1) {
        HT_TRY(ht_comm_all_gather_start(r->comm, &req, s->ranks, 4 * (int64_t)sizeof(double)));
        HT_TRY(ht_comm_wait(r->comm, &req));
    }
    HT_TRY(ht_sum_rows(&r->backend, s->total, s->ranks, n_ranks, 4));
    HT_TRY(ht_clip_factor(&r->backend, s->clip, s->total + 3, s->total, 1.0,
                          (double)r->cfg->train.grad_clip));
    HT_TRY(ht_backend_download_start(&r->backend, s->host, s->total, 4 * sizeof(double)));
    return ht_backend_mark_set(&r->backend, &s->there);
}

/* AdamW on elements [first, end) of a slice, which have the same decay and type. */
static enum ht_status update_piece(struct ht_run *r, const struct ht_zero_slice *slice,
                                   int64_t first, int64_t end, bool decay, const float *shard_grad,
                                   double lr)
{
    const struct ht_optimizer_config *o = &r->cfg->optimizer;
    const int64_t at = slice->shard_start + (first - slice->flat_start);
    const bool matrix = first < r->model->list.n_matrix;

    return ht_adamw_step(
        &r->backend,
        &(struct ht_adamw_args){ .n = end - first,
                                 .step = r->updates + 1,
                                 .lr = (float)lr,
                                 .beta1 = o->beta1,
                                 .beta2 = o->beta2,
                                 .eps = o->eps,
                                 .weight_decay = decay ? o->weight_decay : 0.0f,
                                 .grad_scale = 1.0f,
                                 .clip = r->sums.clip,
                                 .master = r->master + at,
                                 .exp_avg = r->exp_avg + at,
                                 .exp_avg_sq = r->exp_avg_sq + at,
                                 .grad = shard_grad + at,
                                 .weight = ht_run_weight(r, first, at),
                                 .weight_dtype = matrix ? r->model->dtype : HT_DTYPE_F32 });
}

/* Neighbouring tensors of one kind go together; gaps between them are zero and stay so. */
static enum ht_status update_slice(struct ht_run *r, const struct ht_zero_slice *slice,
                                   const float *shard_grad, double lr)
{
    const struct ht_tensor_list *list = &r->model->list;
    const int64_t slice_end = slice->flat_start + slice->n;
    int64_t first = 0, end = 0; // of what is not updated yet
    bool decay = false;

    for (int k = 0; k < list->n_tensors; k++) {
        const struct ht_tensor_info *t = &list->tensors[k];
        const int64_t from = t->offset > slice->flat_start ? t->offset : slice->flat_start;
        const int64_t to = t->offset + t->n < slice_end ? t->offset + t->n : slice_end;
        if (from >= to) continue;
        if (end > first &&
            (t->decay != decay || (first < list->n_matrix) != (from < list->n_matrix))) {
            HT_TRY(update_piece(r, slice, first, end, decay, shard_grad, lr));
            first = end = 0;
        }
        if (end == first) first = from;
        end = to;
        decay = t->decay;
    }
    return end > first ? update_piece(r, slice, first, end, decay, shard_grad, lr) : HT_OK;
}

static enum ht_status update(struct ht_run *r, const float *shard_grad, double lr)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);

    for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
        HT_TRY(update_slice(r, &slices[i], shard_grad, lr));
    ht_model_weights_changed(r->model);
    return ht_zero_gather_weights(r->zero, r->model->matrix, r->model->dtype, r->model->vector);
}

/* Wait for the gradient's sum and say for how long: on the CPU the host waits, on CUDA the compute
 * stream does. */
static enum ht_status reduced(struct ht_run *r, float **shard_grad, double *host_s)
{
    const double start_s = ht_time_s();

    HT_TRY(ht_backend_mark_set(&r->backend, &r->sums.reduce_start));
    HT_TRY(ht_zero_reduced(r->zero, shard_grad));
    HT_TRY(ht_backend_mark_set(&r->backend, &r->sums.reduce_end));
    *host_s = ht_time_s() - start_s;
    return HT_OK;
}

enum ht_status ht_run_step(struct ht_run *r, struct ht_step_result *out)
{
    const double start_s = ht_time_s();
    const struct ht_run_sums *s = &r->sums;
    float *shard_grad = NULL, ms = 0.0f;
    int64_t n_counted = 0, n_micro = 0;

    *out = (struct ht_step_result){ .tokens = r->cfg->train.global_batch_tokens };
    out->lr = ht_lr_at(&r->cfg->schedule, &r->cfg->optimizer, r->step, r->cfg->train.total_steps);
    HT_TRY(accumulate(r, &n_micro, &n_counted, out));
    HT_TRY(reduced(r, &shard_grad, &out->comm_exposed_s));
    HT_TRY(sum_up(r, shard_grad, n_micro));
    HT_TRY(update(r, shard_grad, out->lr)); // changes nothing where the factor is NaN

    // the one wait of a step; on CUDA the device goes on with the update
    HT_TRY(ht_backend_mark_wait(&r->backend, &s->there));
    if (r->backend.kind == HT_BACKEND_CUDA) {
        HT_TRY(ht_backend_mark_ms(&ms, &r->backend, &s->reduce_start, &s->reduce_end));
        out->comm_exposed_s = 1e-3 * (double)ms;
    }
    const double count = n_counted ? (double)n_counted : 1.0;
    out->loss = s->host[0] / count;
    out->z_loss = (double)r->cfg->train.z_loss * s->host[1] / count;
    out->grad_norm = sqrt(s->host[3]);

    // every rank has the same sums, so every rank decided the same
    out->skipped = !isfinite(out->loss) || !isfinite(out->grad_norm);
    r->updates += !out->skipped;
    r->skipped += out->skipped;
    r->skipped_in_row = out->skipped ? r->skipped_in_row + 1 : 0;
    r->step++;
    r->tokens += out->tokens;
    out->step_s = ht_time_s() - start_s;
    return HT_OK;
}
