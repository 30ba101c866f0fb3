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

static enum ht_status random_values(void *user, int64_t flat_start, int64_t n, float *out)
{
    const struct ht_run *r = user;

    ht_params_init(out, &r->cfg->model, &r->model->list, r->cfg->train.seed, flat_start, n);
    return HT_OK;
}

static enum ht_status start_random(struct ht_run *r)
{
    HT_TRY(ht_run_fill(r, r->master, random_values, r));
    return ht_run_publish_weights(r);
}

static enum ht_status from_whole(void *user, int64_t flat_start, int64_t n, float *out)
{
    const float *all = user;

    memcpy(out, all + flat_start, (size_t)n * sizeof *out);
    return HT_OK;
}

static enum ht_status start_from_weights(struct ht_run *r)
{
    const struct ht_tensor_list *list = &r->model->list;
    // the working copies follow from the masters where they cannot be written here
    const bool direct = r->backend.kind == HT_BACKEND_CPU && r->model->matrix;
    const size_t n_all = (size_t)(2 * list->n_total - list->n_matrix);
    struct ht_weights *w = NULL;
    enum ht_status st = HT_OK;
    float *all = calloc(n_all, sizeof *all); // masters, then the vector part once more

    if (!all)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld weights of %s", (long long)list->n_total,
                       r->cfg->train.init_from);
    HT_TRY_GOTO(st, done, ht_weights_open(&w, r->cfg->train.init_from, r->log));
    HT_TRY_GOTO(st, done,
                ht_weights_load(w, list, direct ? r->model->matrix : NULL, r->model->dtype,
                                direct ? r->model->vector : all + list->n_total, all));
    HT_TRY_GOTO(st, done, ht_run_fill(r, r->master, from_whole, all));
    HT_INFO(r->log, "weights from %s", ht_weights_resolved_path(w));
    if (!direct) st = ht_run_publish_weights(r);
done:
    ht_weights_close(w);
    free(all);
    return st;
}

struct stored { // an array of a checkpoint
    struct ht_ckpt *c;
    enum ht_ckpt_array which;
    const struct ht_tensor_list *list;
};

static enum ht_status stored_values(void *user, int64_t flat_start, int64_t n, float *out)
{
    const struct stored *s = user;

    return ht_ckpt_read_flat(s->c, s->which, s->list, flat_start, n, out);
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
        struct stored stored = { c, which[a], &r->model->list };
        HT_TRY_GOTO(st, done, ht_run_fill(r, arrays[a], stored_values, &stored));
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
