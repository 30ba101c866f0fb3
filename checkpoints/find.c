/* checkpoints/find.c: the newest checkpoint that every rank finds whole. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/agree.h"
#include "checkpoints/checkpoint.h"
#include "checkpoints/folder.h"
#include "checkpoints/hash.h"
#include "core/base/file.h"

enum { PATH_BYTES = HT_MAX_PATH + 500 };

/* This rank's share of the check: the structure, and every size-th file. */
static enum ht_status check_share(const char *path, int rank, int size)
{
    struct ht_manifest m;
    enum ht_status st;

    HT_TRY(ht_ckpt_folder_open(&m, path));
    st = HT_OK;
    for (int i = rank; i < m.n_files && st == HT_OK; i += size)
        st = ht_ckpt_folder_check_file(&m, i, path);
    ht_manifest_free(&m);
    return st;
}

/* Rank 0's list on every rank. */
static enum ht_status share_steps(int64_t **steps, int *n, const char *dir, struct ht_comm *comm)
{
    const bool first = !comm || ht_comm_rank(comm) == 0;
    int64_t count;
    enum ht_status st = HT_OK;

    *steps = NULL;
    *n = 0;
    if (first) st = ht_ckpt_list_steps(steps, n, dir);
    HT_TRY(ht_ckpt_agree(comm, st));
    if (!comm || ht_comm_size(comm) == 1) return HT_OK;
    count = *n;
    HT_TRY(ht_comm_broadcast(comm, &count, sizeof count, 0));
    if (!first && count > 0) {
        *steps = calloc((size_t)count, sizeof **steps);
        if (!*steps) st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %" PRId64 " steps", dir, count);
    }
    HT_TRY(ht_ckpt_agree(comm, st));
    *n = (int)count;
    if (count == 0) return HT_OK;
    return ht_comm_broadcast(comm, *steps, count * (int64_t)sizeof **steps, 0);
}

/* LATEST is only a hint, but one that names a checkpoint that is gone is worth a word. */
static void check_hint(const char *dir, const int64_t *steps, int n, const struct ht_log *log)
{
    char path[PATH_BYTES], *text = NULL;

    snprintf(path, sizeof path, "%s/LATEST", dir);
    if (!ht_file_exists(path) || ht_file_read_regular(&text, NULL, path, 64) != HT_OK) return;
    text[strcspn(text, "\r\n")] = '\0';
    const int64_t step = ht_ckpt_step_of_name(text);
    bool found = false;
    for (int i = 0; i < n; i++) found = found || steps[i] == step;
    if (step >= 0 && !found) HT_WARN(log, "%s names %s, which is not there", path, text);
    free(text);
}

enum ht_status ht_ckpt_find_latest(char *out, size_t size, const char *dir, struct ht_comm *comm,
                                   const struct ht_log *log)
{
    const int rank = comm ? ht_comm_rank(comm) : 0, n_ranks = comm ? ht_comm_size(comm) : 1;
    const struct ht_log *say = rank == 0 ? log : NULL;
    enum ht_status st;
    int64_t *steps = NULL;
    char path[PATH_BYTES], name[32];
    int n, i;

    out[0] = '\0';
    HT_TRY_GOTO(st, done, share_steps(&steps, &n, dir, comm));
    if (rank == 0) check_hint(dir, steps, n, say);
    for (i = 0; i < n; i++) {
        ht_ckpt_step_name(name, steps[i]);
        if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path) {
            st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", dir);
            goto done;
        }
        st = ht_ckpt_agree(comm, check_share(path, rank, n_ranks));
        if (st == HT_OK) break;
        if (st != HT_ERR_FORMAT && st != HT_ERR_IO) goto done; // ours, not the checkpoint's
        HT_WARN(say, "checkpoint %s cannot be used and is left alone: %s", name,
                ht_error_message());
    }
    if (i < n) {
        if (snprintf(out, size, "%s", path) >= (int)size) {
            out[0] = '\0';
            st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
            goto done;
        }
        if (i > 0) HT_WARN(say, "using the checkpoint before: %s", path);
    } else if (n > 0) {
        st = HT_FAIL(HT_ERR_CHECKPOINT,
                     "%s: none of its %d checkpoint(s) can be used; the oldest, %s: %s", dir, n,
                     name, strdupa(ht_error_message()));
    }
done:
    free(steps);
    return st;
}
