/* checkpoints/publish.c: from the ranks' files to a visible checkpoint; pruning of old ones. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/folder.h"
#include "checkpoints/job.h"
#include "core/base/file.h"

enum { PATH_BYTES = HT_MAX_PATH + 500 };

static void path_in(char path[PATH_BYTES], const char *folder, const char *name)
{
    snprintf(path, PATH_BYTES, "%s/%s", folder, name);
}

/* All parts into one manifest; the parts' files are removed. */
static enum ht_status merge_parts(struct ht_manifest *m, const struct ht_ckpt_job *j)
{
    char path[PATH_BYTES], name[32];
    enum ht_status st = HT_OK;

    for (int r = 0; r < j->world; r++) {
        struct ht_manifest part;
        snprintf(name, sizeof name, "part-%05d.json", r);
        path_in(path, j->tmp, name);
        HT_TRY(ht_manifest_read(&part, path));
        if (r == 0) {
            *m = part;
            m->is_part = false;
        } else {
            st = ht_manifest_merge(m, &part, path);
            ht_manifest_free(&part);
            HT_TRY(st);
        }
        if (unlink(path) != 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    }
    return ht_manifest_index(m, j->tmp);
}

static enum ht_status write_manifest(struct ht_ckpt_job *j)
{
    struct ht_manifest m = { 0 };
    enum ht_status st = HT_OK;
    char *text = NULL;
    size_t n_bytes;

    HT_TRY_GOTO(st, done, merge_parts(&m, j));
    ht_ckpt_crash_point(j, "before-manifest");
    HT_TRY_GOTO(st, done, ht_manifest_print(&text, &n_bytes, &m));
    HT_TRY_GOTO(st, done, ht_ckpt_job_put(j, HT_MANIFEST_NAME, text, n_bytes, NULL));
    HT_TRY_GOTO(st, done, ht_file_sync(j->tmp));
    ht_ckpt_crash_point(j, "after-manifest");
done:
    free(text);
    ht_manifest_free(&m);
    return st;
}

static enum ht_status move(const char *from, const char *to)
{
    if (rename(from, to) == 0) return HT_OK;
    return HT_FAIL(HT_ERR_IO, "%s: rename to %s: %s", from, to, strerror(errno));
}

/* The rename. A folder of this step that is already there (left by a run that went on from an
 * earlier one) changes places with the new one in one move, so that at no moment there is none.
 * Where the file system cannot exchange (NFS), the old one steps aside first; the checkpoint before
 * it stays either way. */
static enum ht_status move_in(struct ht_ckpt_job *j, const char *path)
{
    char old[PATH_BYTES + 32];

    if (!ht_file_exists(path)) return move(j->tmp, path);
    snprintf(old, sizeof old, "%s-replaced", j->tmp);
    if (renameat2(AT_FDCWD, j->tmp, AT_FDCWD, path, RENAME_EXCHANGE) == 0) {
        snprintf(old, sizeof old, "%s", j->tmp);
    } else if (errno == EINVAL || errno == ENOSYS) {
        HT_TRY(move(path, old));
        HT_TRY(move(j->tmp, path));
    } else {
        return HT_FAIL(HT_ERR_IO, "%s: cannot replace %s: %s; move the old one away", j->tmp, path,
                       strerror(errno));
    }
    HT_TRY(ht_file_sync(j->dir));
    if (ht_file_remove_tree(old) != HT_OK)
        HT_WARN(j->options->log, "%s", ht_error_message()); // goes at the next start
    return HT_OK;
}

/* What is visible now is what was written. The ranks' files were read back by their ranks before
 * this. */
static enum ht_status check_published(const struct ht_ckpt_job *j, const char *path)
{
    char rank_file[64];
    struct ht_manifest m;
    enum ht_status st;

    HT_TRY(ht_ckpt_folder_open(&m, path));
    st = m.step == j->step
             ? HT_OK
             : HT_FAIL(HT_ERR_IO, "%s: holds step %" PRId64 " after the rename", path, m.step);
    for (int i = 0; i < m.n_files && st == HT_OK; i++) {
        bool is_rank = false;
        for (int r = 0; r < j->world && !is_rank; r++) {
            ht_ckpt_rank_file(rank_file, r, j->world);
            is_rank = strcmp(rank_file, m.files[i].name) == 0;
        }
        if (!is_rank) st = ht_ckpt_folder_check_file(&m, i, path);
    }
    ht_manifest_free(&m);
    return st;
}

/* Remove all but the keep_last newest up to this step; multiples of keep_every and later ones (left
 * by a run that was taken back) stay. A folder is renamed out of sight first, so that none is ever
 * seen half removed. */
static enum ht_status prune(struct ht_ckpt_job *j)
{
    const struct ht_ckpt_writer_options *o = j->options;
    char name[32], path[PATH_BYTES], away[PATH_BYTES + 32];
    enum ht_status st = HT_OK;
    int64_t *steps = NULL;
    int n, n_kept = 0;

    HT_TRY(ht_ckpt_list_steps(&steps, &n, j->dir));
    for (int i = 0; i < n; i++) {
        if (steps[i] > j->step) continue;
        if (n_kept < o->keep_last || n_kept == 0) {
            n_kept++;
            continue;
        }
        if (o->keep_every > 0 && steps[i] % o->keep_every == 0) continue;
        ht_ckpt_step_name(name, steps[i]);
        path_in(path, j->dir, name);
        snprintf(away, sizeof away, "%s/.%s.tmp-%ld-pruned", j->dir, name, j->pid);
        HT_TRY_GOTO(st, done, move(path, away));
        ht_ckpt_crash_point(j, "mid-prune");
        HT_TRY_GOTO(st, done, ht_file_remove_tree(away));
    }
done:
    free(steps);
    return st;
}

enum ht_status ht_ckpt_job_publish(struct ht_ckpt_job *j)
{
    char name[32], line[40], path[PATH_BYTES], latest[PATH_BYTES];

    ht_ckpt_step_name(name, j->step);
    path_in(path, j->dir, name);
    path_in(latest, j->dir, "LATEST");
    HT_TRY(write_manifest(j));
    HT_TRY(move_in(j, path));
    ht_ckpt_crash_point(j, "after-rename");
    close(j->lock_fd);
    j->lock_fd = -1;
    HT_TRY(ht_file_sync(j->dir));

    // From here the checkpoint is there. LATEST is only a hint and old folders are only space.
    const int n = snprintf(line, sizeof line, "%s\n", name);
    if (ht_file_publish(latest, line, (size_t)n) != HT_OK)
        HT_WARN(j->options->log, "checkpoint %s is complete, but: %s", path, ht_error_message());
    ht_ckpt_crash_point(j, "after-latest");
    HT_TRY(check_published(j, path));
    if (prune(j) != HT_OK)
        HT_WARN(j->options->log, "checkpoint %s is complete, but older ones stay: %s", path,
                ht_error_message());
    return HT_OK;
}
