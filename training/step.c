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

static void clear(float *x, int64_t n)
{
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n; block += 1 << 18)
        memset(x + block, 0, (size_t)(n - block < 1 << 18 ? n - block : 1 << 18) * sizeof *x);
}

/* Forward and backward over all micro-batches of this rank; sums gets loss and z sums. */
static enum ht_status accumulate(struct ht_run *r, double sums[2], int64_t *n_counted,
                                 struct ht_step_result *out)
{
    const struct ht_tensor_list *list = &r->model->list;
    const struct ht_batch *batch = NULL;
    double attended = 0.0, tokens = 0.0;

    clear(r->grads, list->n_total - (r->model->units ? list->n_matrix : 0));
    do {
        struct ht_loss loss;
        double wait_s = 0.0;
        HT_TRY(ht_loader_next(r->loader, &batch, &wait_s));
        out->data_wait_s += wait_s;
        const struct ht_model_batch b = { .n_tokens = batch->n_tokens,
                                          .ids = batch->ids,
                                          .labels = batch->labels,
                                          .pos = batch->pos,
                                          .seqs = batch->seqs };
        const float scale = batch->step_counted ? (float)(1.0 / (double)batch->step_counted) : 0.0f;
        HT_TRY(ht_model_train(r->model, r->acts, &b, scale, r->cfg->train.z_loss, r->grads, &loss,
                              batch->last_of_step ? grads_final : NULL, r));
        sums[0] += loss.loss_sum;
        sums[1] += loss.z_sum;
        attended += batch->attended * (double)batch->n_tokens;
        tokens += (double)batch->n_tokens;
        *n_counted = batch->step_counted;
        ht_run_pause_point(r, "step");
    } while (!batch->last_of_step);
    out->attended = attended / tokens;
    return HT_OK;
}

/* Sum of squares of this rank's part of the summed gradient. Where every rank has all of it
 * (zero_stage 0) it counts once. */
static enum ht_status shard_squares(struct ht_run *r, const float *shard_grad, double *out)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);

    *out = 0.0;
    if (r->cfg->parallel.zero_stage == 0 && ht_comm_rank(r->comm) != 0) return HT_OK;
    for (int i = 0; i < ht_zero_n_slices(r->zero); i++) {
        double part = 0.0;
        HT_TRY(ht_sum_squares(&r->backend, &part, shard_grad + slices[i].shard_start, slices[i].n));
        *out += part;
    }
    return HT_OK;
}

/* AdamW on the intersection of one slice with one tensor. */
static enum ht_status update_piece(struct ht_run *r, const struct ht_zero_slice *slice,
                                   const struct ht_tensor_info *t, const float *shard_grad,
                                   double lr, double grad_scale)
{
    const struct ht_optimizer_config *o = &r->cfg->optimizer;
    const int64_t slice_end = slice->flat_start + slice->n, tensor_end = t->offset + t->n;
    const int64_t first = t->offset > slice->flat_start ? t->offset : slice->flat_start;
    const int64_t end = tensor_end < slice_end ? tensor_end : slice_end;

    if (first >= end) return HT_OK;
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
                                 .weight_decay = t->decay ? o->weight_decay : 0.0f,
                                 .grad_scale = (float)grad_scale,
                                 .master = r->master + at,
                                 .exp_avg = r->exp_avg + at,
                                 .exp_avg_sq = r->exp_avg_sq + at,
                                 .grad = shard_grad + at,
                                 .weight = ht_run_weight(r, first, at),
                                 .weight_dtype = matrix ? r->model->dtype : HT_DTYPE_F32 });
}

static enum ht_status update(struct ht_run *r, const float *shard_grad, double lr,
                             double grad_scale)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    const struct ht_tensor_list *list = &r->model->list;

    for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
        for (int k = 0; k < list->n_tensors; k++)
            HT_TRY(update_piece(r, &slices[i], &list->tensors[k], shard_grad, lr, grad_scale));
    return ht_zero_gather_weights(r->zero, r->model->matrix, r->model->dtype, r->model->vector);
}

enum ht_status ht_run_step(struct ht_run *r, struct ht_step_result *out)
{
    const double start_s = ht_time_s();
    double sums[3] = { 0.0, 0.0, 0.0 }; // loss, z, squares of the gradient
    float *shard_grad = NULL;
    int64_t n_counted = 0;

    *out = (struct ht_step_result){ .tokens = r->cfg->train.global_batch_tokens };
    HT_TRY(accumulate(r, sums, &n_counted, out));

    const double comm_start_s = ht_time_s();
    HT_TRY(ht_zero_reduced(r->zero, &shard_grad));
    out->comm_exposed_s = ht_time_s() - comm_start_s;
    HT_TRY(shard_squares(r, shard_grad, &sums[2]));
    HT_TRY(ht_comm_sum_f64(r->comm, sums, 3));
    const double count = n_counted ? (double)n_counted : 1.0;
    out->loss = sums[0] / count;
    out->z_loss = (double)r->cfg->train.z_loss * sums[1] / count;
    out->grad_norm = sqrt(sums[2]);
    out->lr = ht_lr_at(&r->cfg->schedule, &r->cfg->optimizer, r->step, r->cfg->train.total_steps);

    // every rank has the same sums, so every rank decides the same
    out->skipped = !isfinite(out->loss) || !isfinite(out->grad_norm);
    if (!out->skipped) {
        const double clip = (double)r->cfg->train.grad_clip;
        const double scale = clip > 0.0 && out->grad_norm > clip ? clip / out->grad_norm : 1.0;
        HT_TRY(update(r, shard_grad, out->lr, scale));
        r->updates++;
    }
    r->skipped += out->skipped;
    r->skipped_in_row = out->skipped ? r->skipped_in_row + 1 : 0;
    r->step++;
    r->tokens += out->tokens;
    out->step_s = ht_time_s() - start_s;
    return HT_OK;
}
