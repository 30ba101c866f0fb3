/* training/setup.c: creation of a run: every buffer is sized and taken here, before step 0. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/model/fp8.h"
#include "training/run.h"

static enum ht_status open_loader(struct ht_loader **out, const struct ht_run *r,
                                  const struct ht_dataset_config *datasets, int n, bool evaluation)
{
    const struct ht_config *c = r->cfg;
    struct ht_loader_dataset list[HT_MAX_DATASETS];
    const int n_ranks = ht_comm_size(r->comm);
    const int64_t step_rows = c->train.global_batch_tokens / c->data.seq_len;

    for (int i = 0; i < n; i++)
        list[i] = (struct ht_loader_dataset){ datasets[i].path, datasets[i].weight };
    const struct ht_loader_options o = {
        .n_datasets = n,
        .datasets = list,
        .seq_len = c->data.seq_len,
        .rows_per_step = evaluation ? c->train.micro_batch * n_ranks : step_rows,
        .micro_rows = c->train.micro_batch,
        .rank = ht_comm_rank(r->comm),
        .n_ranks = n_ranks,
        .vocab_size = c->model.vocab_size,
        .seed = c->data.seed,
        .shuffle = c->data.shuffle && !evaluation,
        .pack_leak = c->data.pack_leak,
        .window_rows = c->data.shuffle_window_rows,
        .prefetch_batches = evaluation ? 0 : c->data.prefetch_batches,
        .one_epoch = evaluation,
    };
    return ht_loader_open(out, &o);
}

/* What is 8-bit, and what not and why. */
static enum ht_status use_fp8(struct ht_run *r, int64_t n_tokens)
{
    const struct ht_fp8_cover c = ht_model_fp8_cover(&r->cfg->model, n_tokens);

    HT_TRY(ht_model_use_fp8(r->model, n_tokens, r->cfg->parallel.zero_stage < 3));
    if (c.n_fp8 == c.n_all)
        HT_INFO(r->log, "projections: fp8");
    else
        HT_INFO(r->log,
                "projections: fp8 in %d of %d; the others stay bf16, the first of them for %lld "
                "tokens of %lld to %lld elements: fp8 wants multiples of 16",
                c.n_fp8, c.n_all, (long long)n_tokens, (long long)c.n_in, (long long)c.n_out);
    return HT_OK;
}

static enum ht_status create_model(struct ht_run *r)
{
    const struct ht_config *c = r->cfg;
    const int n_ranks = ht_comm_size(r->comm);
    const int64_t n_tokens = c->train.micro_batch * c->data.seq_len;
    struct ht_tensor_list list;

    HT_TRY(ht_run_create_backend(r));
    HT_TRY(ht_tensor_list_create(&list, &c->model, c->optimizer.decay));
    const int64_t n_matrix = list.n_matrix, n_total = list.n_total;
    ht_tensor_list_free(&list);
    const int64_t matrix_room =
        c->parallel.zero_stage < 3 ? ht_zero_padded_matrix(n_matrix, n_ranks) : HT_MODEL_NO_MATRIX;
    HT_TRY(ht_model_create(&r->model, &r->backend, &c->model, c->train.precision,
                           c->optimizer.decay, matrix_room,
                           ht_zero_padded_vector(n_matrix, n_total, n_ranks), c->data.seq_len));
    HT_TRY(ht_acts_create(&r->acts, r->model, c->train.recompute, false, n_tokens));
    if (c->train.linear_dtype == HT_LINEAR_FP8) HT_TRY(use_fp8(r, n_tokens));
    return ht_zero_create(&r->zero, r->comm, &r->backend,
                          &(struct ht_zero_options){ .stage = c->parallel.zero_stage,
                                                     .n_matrix = n_matrix,
                                                     .n_total = n_total,
                                                     .bucket_bytes = c->parallel.bucket_bytes,
                                                     .wire = c->parallel.wire,
                                                     .n_units = r->model->list.n_units,
                                                     .unit_start = r->model->list.unit_start,
                                                     .keep_first = c->model.tied_head,
                                                     .weight_dtype = c->train.precision });
}

static enum ht_status create_state(struct ht_run *r)
{
    const struct ht_tensor_list *list = &r->model->list;
    const size_t shard_bytes = (size_t)ht_zero_shard_size(r->zero) * sizeof(float);
    const int n_ranks = ht_comm_size(r->comm);
    const int64_t n_grads = r->cfg->parallel.zero_stage < 2
                                ? ht_zero_padded_total(list->n_matrix, list->n_total,
                                                       r->cfg->parallel.bucket_bytes, n_ranks)
                                : list->n_total - list->n_matrix;
    const size_t grad_bytes = (size_t)n_grads * sizeof(float);

    HT_TRY(ht_backend_arena_create(&r->state, &r->backend, "gradients and optimiser state",
                                   ht_arena_bytes(grad_bytes) + 3 * ht_arena_bytes(shard_bytes) +
                                       ht_run_sums_bytes(r)));
    r->grads = ht_arena_get(&r->state, grad_bytes);
    r->master = ht_arena_get(&r->state, shard_bytes);
    r->exp_avg = ht_arena_get(&r->state, shard_bytes);
    r->exp_avg_sq = ht_arena_get(&r->state, shard_bytes);
    HT_TRY(ht_run_create_buffers(r));
    return ht_run_create_units(r);
}

static enum ht_status create_writer(struct ht_run *r)
{
    const struct ht_checkpoint_config *c = &r->cfg->checkpoint;

    return ht_ckpt_writer_create(
        &r->writer, r->comm,
        &(struct ht_ckpt_writer_options){ .dir = r->checkpoint_dir,
                                          .tensors = &r->model->list,
                                          .slices = ht_zero_slices(r->zero),
                                          .n_slices = ht_zero_n_slices(r->zero),
                                          .shard_size = ht_zero_shard_size(r->zero),
                                          .keep_last = c->keep_last,
                                          .keep_every = c->keep_every,
                                          .background = c->background,
                                          .on_full_pause = c->on_full_pause,
                                          .tokenizer_path = r->cfg->data.tokenizer,
                                          .log = r->log,
                                          .be = r->backend.kind == HT_BACKEND_CUDA ? &r->backend
                                                                                   : NULL });
}

enum ht_status ht_run_create(struct ht_run **out, const struct ht_config *cfg,
                             const struct ht_recipe *recipe, struct ht_comm *comm,
                             const struct ht_log *log)
{
    enum ht_status st = HT_OK;
    struct ht_run *r = calloc(1, sizeof *r);

    *out = NULL;
    if (!r) return HT_FAIL(HT_ERR_MEMORY, "no memory for a run");
    r->cfg = cfg;
    r->recipe = recipe;
    r->comm = comm;
    r->log = log;
    snprintf(r->dir, sizeof r->dir, "%s/%s", cfg->train.out_dir, cfg->train.name);
    snprintf(r->checkpoint_dir, sizeof r->checkpoint_dir, "%s/checkpoints", r->dir);
    ht_run_set_pause_point(r);
    HT_TRY_GOTO(st, done, ht_run_check_start(r));
    HT_TRY_GOTO(st, done, ht_recipe_print(&r->recipe_text, recipe, 0));
    HT_TRY_GOTO(st, done, create_model(r));
    HT_TRY_GOTO(st, done, create_state(r));
    ht_run_pause_point(r, "data");
    HT_TRY_GOTO(st, done, ht_run_check_start(r));
    HT_TRY_GOTO(st, done, open_loader(&r->loader, r, cfg->data.train, cfg->data.n_train, false));
    if (cfg->data.n_eval > 0)
        HT_TRY_GOTO(st, done,
                    open_loader(&r->eval_loader, r, cfg->data.eval, cfg->data.n_eval, true));
    HT_TRY_GOTO(st, done, create_writer(r));
    HT_TRY_GOTO(st, done, ht_run_check_start(r));
    HT_TRY_GOTO(st, done, ht_run_start(r));
    *out = r;
    r = NULL;
done:
    ht_run_free(r);
    return st;
}

void ht_run_free(struct ht_run *r)
{
    if (!r) return;
    ht_ckpt_writer_free(r->writer);
    ht_loader_close(r->loader);
    ht_loader_close(r->eval_loader);
    ht_zero_free(r->zero);
    ht_acts_free(r->acts);
    ht_model_free(r->model);
    ht_run_free_units(r);
    ht_run_free_buffers(r);
    ht_backend_arena_free(&r->state, &r->backend);
    ht_comm_use_device(r->comm, NULL);
    ht_backend_free(&r->backend);
    free(r->recipe_text);
    free(r);
}
