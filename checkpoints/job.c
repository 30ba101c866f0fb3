/* checkpoints/job.c: pieces of a rank, the snapshot, set-up and clean-up of a save. */
#include "checkpoints/job.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/folder.h"
#include "core/base/file.h"

enum { MAX_TOKENIZER_BYTES = 256 << 20 };

/* ---- pieces ---- */

struct piece_list {
    struct ht_mf_piece *pieces;
    int64_t *source; // (n) element of the shard
    int64_t n, max;
};

static enum ht_status piece_add(struct piece_list *l, struct ht_mf_piece p, int64_t source)
{
    if (l->n == l->max) {
        const int64_t max = l->max ? 2 * l->max : 256;
        struct ht_mf_piece *pieces = realloc(l->pieces, (size_t)max * sizeof *pieces);
        if (pieces) l->pieces = pieces;
        int64_t *sources = realloc(l->source, (size_t)max * sizeof *sources);
        if (sources) l->source = sources;
        if (!pieces || !sources)
            return HT_FAIL(HT_ERR_MEMORY, "no memory for %" PRId64 " pieces of tensors", max);
        l->max = max;
    }
    l->pieces[l->n] = p;
    l->source[l->n++] = source;
    return HT_OK;
}

/* The part of [start, start + n) that lies in each tensor, for the three arrays; source_of gives
 * the element of the shard that holds a flat element: flat + shift. */
static enum ht_status add_range(struct piece_list *l, const struct ht_tensor_list *tensors,
                                int array, int tensor, int64_t start, int64_t n, int64_t shift,
                                int file)
{
    const struct ht_tensor_info *t = &tensors->tensors[tensor];
    const int64_t from = start > t->offset ? start : t->offset;
    const int64_t to = start + n < t->offset + t->n ? start + n : t->offset + t->n;

    if (from >= to) return HT_OK;
    return piece_add(l,
                     (struct ht_mf_piece){ .array = array,
                                           .tensor = tensor,
                                           .file = file,
                                           .start = from - t->offset,
                                           .n = to - from },
                     from + shift);
}

/* Rank r's share of state that every rank has whole: r-th of `world` equal parts, at cache lines.
 */
static struct ht_ckpt_range share_of(const struct ht_tensor_list *tensors, int rank, int world)
{
    const int64_t lines = (tensors->n_total + 63) / 64;
    const int64_t from = lines * rank / world * 64, to = lines * (rank + 1) / world * 64;
    return (struct ht_ckpt_range){ from, to - from };
}

static bool is_replicated(const struct ht_ckpt_range *all, int max_ranges, int world)
{
    for (int r = 1; r < world; r++)
        if (memcmp(all, all + (size_t)r * (size_t)max_ranges, (size_t)max_ranges * sizeof *all) !=
            0)
            return false;
    return world > 1;
}

/* The pieces of rank r. With slices (own rank) each piece's place in the shard is found as well. */
static enum ht_status list_pieces(struct piece_list *l, const struct ht_ckpt_writer_options *o,
                                  const struct ht_ckpt_range *all, int max_ranges, int r, int world,
                                  const struct ht_zero_slice *slices, int file)
{
    const struct ht_ckpt_range *mine = all + (size_t)r * (size_t)max_ranges;
    const bool replicated = is_replicated(all, max_ranges, world);
    const struct ht_ckpt_range share = share_of(o->tensors, r, world);

    for (int a = 0; a < HT_CKPT_ARRAYS; a++)
        for (int t = 0; t < o->tensors->n_tensors; t++)
            for (int i = 0; i < max_ranges && mine[i].n > 0; i++) {
                int64_t from = mine[i].start, to = from + mine[i].n;
                const int64_t shift = slices ? slices[i].shard_start - slices[i].flat_start : 0;
                if (replicated) {
                    from = from > share.start ? from : share.start;
                    to = to < share.start + share.n ? to : share.start + share.n;
                    if (from >= to) continue;
                }
                HT_TRY(add_range(l, o->tensors, a, t, from, to - from, shift, file));
            }
    return HT_OK;
}

/* Rank 0: the pieces of all ranks, checked to be complete, and the index over them. */
static enum ht_status make_index(struct ht_ckpt_job *j, const struct ht_ckpt_range *all,
                                 int max_ranges)
{
    struct piece_list l = { 0 };
    struct ht_manifest m = j->part; // tensors are borrowed
    enum ht_status st = HT_OK;

    for (int r = 0; r < j->world; r++)
        HT_TRY_GOTO(st, done, list_pieces(&l, j->options, all, max_ranges, r, j->world, NULL, r));
    m.pieces = l.pieces;
    m.n_pieces = l.n;
    if (ht_manifest_index(&m, "the ranks' slices") != HT_OK) {
        st = ht_fail_while(HT_ERR_ARG, "setting up checkpoints");
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_h5_image_index(&j->index, &m));
done:
    free(l.pieces);
    free(l.source);
    return st;
}

static enum ht_status sort_by_place(struct ht_ckpt_job *j)
{
    const int64_t n = j->part.n_pieces;

    j->order = malloc((size_t)(n + 1) * sizeof *j->order);
    if (!j->order) return HT_FAIL(HT_ERR_MEMORY, "no memory for %" PRId64 " pieces", n);
    // HDF5 allots nearly in order of creation: insertion is linear then
    for (int64_t i = 0; i < n; i++) {
        int64_t k = i;
        for (; k > 0 && j->part.pieces[j->order[k - 1]].at > j->part.pieces[i].at; k--)
            j->order[k] = j->order[k - 1];
        j->order[k] = i;
    }
    return HT_OK;
}

/* ---- life ---- */

static void read_crash_point(struct ht_ckpt_job *j)
{
    const char *text = getenv("HT_CKPT_CRASH_AT");
    const size_t n = text ? strcspn(text, ":") : 0;

    if (n == 0 || n >= sizeof j->crash_point) return;
    memcpy(j->crash_point, text, n);
    j->crash_countdown = text[n] == ':' ? atoi(text + n + 1) : 1;
}

void ht_ckpt_crash_point(struct ht_ckpt_job *j, const char *point)
{
    if (strcmp(j->crash_point, point) == 0 && --j->crash_countdown == 0) raise(SIGKILL);
}

/* Pinned where it is filled from a device: the stall is the copy. */
static enum ht_status take_snapshot_buffer(struct ht_ckpt_job *j, int array)
{
    const size_t bytes = (size_t)(j->shard_size + 1) * sizeof(float);
    void *p = NULL;

    if (j->options->be)
        HT_TRY(ht_backend_host_alloc(&p, j->options->be, "the snapshot of a checkpoint", bytes));
    else
        p = malloc(bytes);
    j->snapshot[array] = p;
    return HT_OK;
}

static void free_snapshot_buffer(struct ht_ckpt_job *j, int array)
{
    if (j->options && j->options->be)
        ht_backend_host_free(j->options->be, j->snapshot[array]);
    else
        free(j->snapshot[array]);
    j->snapshot[array] = NULL;
}

static enum ht_status create_state(struct ht_ckpt_job *j, const struct ht_ckpt_range *all,
                                   int max_ranges)
{
    const struct ht_ckpt_writer_options *o = j->options;
    struct piece_list l = { 0 };

    j->part.is_part = true;
    j->part.world = j->world;
    HT_TRY(ht_manifest_set_tensors(&j->part, o->tensors));
    const enum ht_status st = list_pieces(&l, o, all, max_ranges, j->rank, j->world, o->slices, 0);
    j->part.pieces = l.pieces;
    j->part.n_pieces = l.n;
    j->source = l.source;
    HT_TRY(st);
    HT_TRY(ht_h5_image_rank(&j->image, &j->part, j->part.pieces, j->part.n_pieces));
    HT_TRY(sort_by_place(j));
    j->part.files = calloc(1, sizeof *j->part.files);
    if (!j->part.files) return HT_FAIL(HT_ERR_MEMORY, "no memory for a list of files");
    j->part.n_files = 1;
    ht_ckpt_rank_file(j->part.files[0].name, j->rank, j->world);
    j->part.files[0].n_bytes = ht_h5_image_bytes(j->image);
    if (j->rank == 0) HT_TRY(make_index(j, all, max_ranges));
    for (int a = 0; a < HT_CKPT_ARRAYS; a++) {
        HT_TRY(take_snapshot_buffer(j, a));
        if (!j->snapshot[a])
            return HT_FAIL(HT_ERR_MEMORY,
                           "no memory for the snapshot of a checkpoint: 3 x %" PRId64 " bytes",
                           4 * o->shard_size);
        // touched now: the first save should not pay for the pages
        memset(j->snapshot[a], 0, (size_t)(o->shard_size + 1) * sizeof(float));
    }
    return HT_OK;
}

enum ht_status ht_ckpt_job_create(struct ht_ckpt_job *j, const struct ht_ckpt_writer_options *o,
                                  int rank, int world, long pid, const struct ht_ckpt_range *all,
                                  int max_ranges)
{
    enum ht_status st = HT_OK;

    *j = (struct ht_ckpt_job){ .options = o,
                               .rank = rank,
                               .world = world,
                               .pid = pid,
                               .shard_size = o->shard_size,
                               .lock_fd = -1 };
    read_crash_point(j);
    for (int i = 0; i < o->n_slices; i++)
        if (o->slices[i].shard_start < 0 || o->slices[i].n < 0 ||
            o->slices[i].shard_start > o->shard_size - o->slices[i].n)
            return HT_FAIL(HT_ERR_ARG,
                           "checkpoint: slice %d passes the shard's %" PRId64 " elements", i,
                           o->shard_size);
    j->dir = strdup(o->dir);
    if (!j->dir) return HT_FAIL(HT_ERR_MEMORY, "no memory for a path");
    if (rank == 0 && o->tokenizer_path && o->tokenizer_path[0])
        HT_TRY_GOTO(st, done,
                    ht_file_read(&j->tokenizer, &j->tokenizer_bytes, o->tokenizer_path,
                                 MAX_TOKENIZER_BYTES));
    HT_TRY_GOTO(st, done, create_state(j, all, max_ranges));
done:
    if (st != HT_OK) ht_ckpt_job_free(j);
    return st;
}

static void free_texts(struct ht_ckpt_job *j)
{
    free(j->recipe);
    free(j->loader);
    free(j->state);
    j->recipe = j->loader = j->state = NULL;
}

void ht_ckpt_job_free(struct ht_ckpt_job *j)
{
    free_texts(j);
    if (j->lock_fd >= 0) close(j->lock_fd);
    for (int a = 0; a < HT_CKPT_ARRAYS; a++) free_snapshot_buffer(j, a);
    ht_h5_image_free(j->index);
    ht_h5_image_free(j->image);
    ht_manifest_free(&j->part);
    free(j->source);
    free(j->order);
    free(j->tokenizer);
    free(j->dir);
    memset(j, 0, sizeof *j);
    j->lock_fd = -1;
}

enum ht_status ht_ckpt_job_snapshot(struct ht_ckpt_job *j, const struct ht_ckpt_source *s)
{
    const float *from[HT_CKPT_ARRAYS] = { s->master, s->exp_avg, s->exp_avg_sq };
    char name[32];

    free_texts(j);
    ht_ckpt_step_name(name, s->step);
    if (snprintf(j->tmp, sizeof j->tmp, "%s/.%s.tmp-%ld", j->dir, name, j->pid) >=
        (int)sizeof j->tmp)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", j->dir);
    j->step = s->step;
    j->tokens = s->tokens;
    j->part.step = s->step;
    j->part.tokens = s->tokens;
    j->recipe = strdup(s->recipe_text);
    j->loader = strdup(s->loader_json);
    j->state = strdup(s->state_json);
    if (!j->recipe || !j->loader || !j->state)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the checkpoint of step %" PRId64, s->step);
    const size_t bytes = (size_t)j->shard_size * sizeof(float);
    struct ht_backend *be = j->options->be;
    for (int a = 0; a < HT_CKPT_ARRAYS; a++) {
        if (be)
            HT_TRY(ht_backend_download_start(be, j->snapshot[a], from[a], bytes));
        else
            memcpy(j->snapshot[a], from[a], bytes);
    }
    return be ? ht_backend_synchronize(be) : HT_OK;
}

void ht_ckpt_job_discard(struct ht_ckpt_job *j)
{
    if (j->tmp[0]) ht_file_remove_tree(j->tmp); // what cannot be removed goes at the next start
    if (j->lock_fd >= 0) close(j->lock_fd);
    j->lock_fd = -1;
}
