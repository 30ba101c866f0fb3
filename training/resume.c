/* training/resume.c: where a run starts from, and the state that a checkpoint carries besides
 * tensors. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/hash.h"
#include "checkpoints/weights.h"
#include "core/base/file.h"
#include "core/model/params.h"
#include "training/run.h"

enum ht_status ht_run_publish_weights(struct ht_run *r)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    const int64_t n_matrix = r->model->list.n_matrix;

    for (int i = 0; i < ht_zero_n_slices(r->zero); i++) {
        const struct ht_zero_slice *s = &slices[i];
        const int64_t end = s->flat_start + s->n; // zero_stage 0: one slice with both parts
        const int64_t matrix_end = end < n_matrix ? end : n_matrix;
        const int64_t vector_start = s->flat_start > n_matrix ? s->flat_start : n_matrix;
        const float *master = r->master + s->shard_start;
        if (s->flat_start < matrix_end)
            ht_convert(ht_run_weight(r, s->flat_start, s->shard_start), r->model->dtype, master,
                       HT_DTYPE_F32, matrix_end - s->flat_start);
        if (vector_start < end)
            memcpy(r->model->vector + (vector_start - n_matrix),
                   master + (vector_start - s->flat_start),
                   (size_t)(end - vector_start) * sizeof(float));
    }
    return ht_zero_gather_weights(r->zero, r->model->matrix, r->model->dtype, r->model->vector);
}

static enum ht_status start_random(struct ht_run *r)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);

    for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
        ht_params_init(r->master + slices[i].shard_start, &r->cfg->model, &r->model->list,
                       r->cfg->train.seed, slices[i].flat_start, slices[i].n);
    return ht_run_publish_weights(r);
}

static enum ht_status start_from_weights(struct ht_run *r)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    const int64_t n_total = r->model->list.n_total;
    struct ht_weights *w = NULL;
    enum ht_status st = HT_OK;
    float *all = calloc((size_t)n_total, sizeof *all);

    if (!all)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld weights of %s", (long long)n_total,
                       r->cfg->train.init_from);
    HT_TRY_GOTO(st, done, ht_weights_open(&w, r->cfg->train.init_from, r->log));
    HT_TRY_GOTO(st, done,
                ht_weights_load(w, &r->model->list, r->model->matrix, r->model->dtype,
                                r->model->vector, all));
    for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
        memcpy(r->master + slices[i].shard_start, all + slices[i].flat_start,
               (size_t)slices[i].n * sizeof *all);
    HT_INFO(r->log, "weights from %s", ht_weights_resolved_path(w));
    if (!r->model->matrix) st = ht_run_publish_weights(r);
done:
    ht_weights_close(w);
    free(all);
    return st;
}

static enum ht_status read_state(struct ht_run *r, const char *text, const char *path)
{
    json_error_t error;
    json_int_t updates = 0, skipped = 0, in_row = 0;
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    enum ht_status st = HT_OK;

    if (!root || json_unpack_ex(root, &error, 0, "{s:I, s:I, s:I}", "updates", &updates,
                                "skipped_steps", &skipped, "skipped_in_row", &in_row) != 0)
        st = HT_FAIL(HT_ERR_FORMAT, "%s/state.json: line %d: %s", path, error.line, error.text);
    r->updates = updates;
    r->skipped = skipped;
    r->skipped_in_row = in_row;
    json_decref(root);
    return st;
}

static enum ht_status start_from_checkpoint(struct ht_run *r, const char *path)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    float *arrays[3] = { r->master, r->exp_avg, r->exp_avg_sq };
    const enum ht_ckpt_array which[3] = { HT_CKPT_MASTER, HT_CKPT_EXP_AVG, HT_CKPT_EXP_AVG_SQ };
    struct ht_loader_state loader_state;
    struct ht_ckpt *c = NULL;
    enum ht_status st = HT_OK;

    HT_TRY_GOTO(st, done, ht_ckpt_open(&c, path));
    for (int a = 0; a < 3; a++) {
        ht_run_pause_point(r, "load");
        st = ht_run_check_start(r);
        if (st == HT_ERR_STOPPED) {
            ht_ckpt_close(c);
            return st; // no fault of the checkpoint's
        }
        if (st != HT_OK) goto done;
        for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
            HT_TRY_GOTO(st, done,
                        ht_ckpt_read_flat(c, which[a], &r->model->list, slices[i].flat_start,
                                          slices[i].n, arrays[a] + slices[i].shard_start));
    }
    HT_TRY_GOTO(st, done, read_state(r, ht_ckpt_state_json(c), path));
    HT_TRY_GOTO(st, done, ht_loader_state_from_json(&loader_state, ht_ckpt_loader_json(c), path));
    HT_TRY_GOTO(st, done, ht_loader_set_state(r->loader, &loader_state));
    r->step = ht_ckpt_step(c);
    r->tokens = ht_ckpt_tokens(c);
    HT_INFO(r->log, "resumed from %s: step %lld, written by %d rank(s)", path, (long long)r->step,
            ht_ckpt_world(c));
    ht_ckpt_close(c);
    return ht_run_publish_weights(r);
done:
    ht_ckpt_close(c);
    return ht_fail_while(st, "resuming from %s", path);
}

/* A kill between the rename of a checkpoint and that of LATEST leaves the hint behind. A run that
 * is complete writes no other checkpoint: bring it up to date here. */
static void update_hint(const struct ht_run *r, const char *path)
{
    char hint[HT_MAX_PATH + 400], line[64], *old = NULL;

    if (ht_comm_rank(r->comm) != 0) return;
    snprintf(hint, sizeof hint, "%s/LATEST", r->checkpoint_dir);
    const int n = snprintf(line, sizeof line, "%s\n", strrchr(path, '/') + 1);
    const bool same = ht_file_exists(hint) &&
                      ht_file_read_regular(&old, NULL, hint, sizeof line) == HT_OK &&
                      strcmp(old, line) == 0;
    free(old);
    if (!same && ht_file_publish(hint, line, (size_t)n) != HT_OK)
        HT_WARN(r->log, "%s", ht_error_message());
}

enum ht_status ht_run_start(struct ht_run *r)
{
    const char *resume = r->cfg->train.resume;
    char path[HT_MAX_PATH + 400] = "";

    const bool own = strcmp(resume, "auto") == 0;

    r->saved = -1;
    if (own)
        HT_TRY(ht_ckpt_find_latest(path, sizeof path, r->checkpoint_dir, r->comm, r->log));
    else if (strcmp(resume, "never") != 0)
        snprintf(path, sizeof path, "%s", resume);
    if (path[0]) {
        HT_TRY(start_from_checkpoint(r, path));
        if (own) {
            update_hint(r, path);
            r->saved = r->step; // not written again
        }
    } else {
        HT_TRY(r->cfg->train.init_from[0] ? start_from_weights(r) : start_random(r));
    }
    return ht_run_check_start(r);
}

enum ht_status ht_run_save(struct ht_run *r, double *stall_s)
{
    struct ht_loader_state loader_state;
    char *loader_json = NULL, *state_json = NULL;
    enum ht_status st = HT_OK;

    ht_loader_get_state(r->loader, &loader_state);
    HT_TRY_GOTO(st, done, ht_loader_state_to_json(&loader_json, &loader_state));
    if (asprintf(&state_json,
                 "{\"updates\": %lld, \"skipped_steps\": %lld, \"skipped_in_row\": %lld, "
                 "\"seed\": %llu}\n",
                 (long long)r->updates, (long long)r->skipped, (long long)r->skipped_in_row,
                 (unsigned long long)r->cfg->train.seed) < 0) {
        state_json = NULL;
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for the state of step %lld", (long long)r->step);
        goto done;
    }
    HT_TRY_GOTO(st, done,
                ht_ckpt_save(r->writer,
                             &(struct ht_ckpt_source){ .step = r->step,
                                                       .tokens = r->tokens,
                                                       .master = r->master,
                                                       .exp_avg = r->exp_avg,
                                                       .exp_avg_sq = r->exp_avg_sq,
                                                       .recipe_text = r->recipe_text,
                                                       .loader_json = loader_json,
                                                       .state_json = state_json },
                             stall_s));
done:
    free(loader_json);
    free(state_json);
    return st;
}
