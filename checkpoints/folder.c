/* checkpoints/folder.c: what is in a checkpoints folder, and whether a checkpoint is whole. */
#include "checkpoints/folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/file.h"

void ht_ckpt_step_name(char name[32], int64_t step)
{
    snprintf(name, 32, "step-%08" PRId64, step);
}

int64_t ht_ckpt_step_of_name(const char *name)
{
    char same[32];
    char *end;

    if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9') return -1;
    errno = 0;
    const long long step = strtoll(name + 5, &end, 10);
    if (errno || *end || step < 0) return -1;
    ht_ckpt_step_name(same, step);
    return strcmp(same, name) == 0 ? step : -1;
}

static int newest_first(const void *pa, const void *pb)
{
    const int64_t a = *(const int64_t *)pa, b = *(const int64_t *)pb;
    return a > b ? -1 : a < b;
}

enum ht_status ht_ckpt_list_steps(int64_t **steps, int *n, const char *dir)
{
    enum ht_status st = HT_OK;
    int64_t *list = NULL;
    int n_list = 0, max = 0;
    struct dirent *e;

    *steps = NULL;
    *n = 0;
    DIR *d = opendir(dir);
    if (!d && errno == ENOENT) return HT_OK;
    if (!d) return HT_FAIL(HT_ERR_IO, "%s: %s", dir, strerror(errno));
    while (errno = 0, (e = readdir(d)) != NULL) {
        const int64_t step = ht_ckpt_step_of_name(e->d_name);
        if (step < 0) continue;
        if (n_list == max) {
            max = max ? 2 * max : 16;
            int64_t *grown = realloc(list, (size_t)max * sizeof *grown);
            if (!grown) {
                st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %d steps", dir, max);
                goto done;
            }
            list = grown;
        }
        list[n_list++] = step;
    }
    if (errno) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", dir, strerror(errno));
        goto done;
    }
    if (n_list > 1) qsort(list, (size_t)n_list, sizeof *list, newest_first);
    *steps = list;
    *n = n_list;
    list = NULL;
done:
    free(list);
    closedir(d);
    return st;
}

enum ht_status ht_ckpt_remove_stale(const char *dir, const struct ht_log *log)
{
    enum ht_status st = HT_OK;
    char path[PATH_MAX];
    struct dirent *e;

    DIR *d = opendir(dir);
    if (!d && errno == ENOENT) return HT_OK;
    if (!d) return HT_FAIL(HT_ERR_IO, "%s: %s", dir, strerror(errno));
    while (st == HT_OK && (e = readdir(d)) != NULL) {
        if (strncmp(e->d_name, ".step-", 6) != 0 || !strstr(e->d_name, ".tmp-")) continue;
        if (snprintf(path, sizeof path, "%s/%s", dir, e->d_name) >= (int)sizeof path) continue;
        const int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        // where folders cannot be locked at all, the run's own lock on its folder must do
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
            HT_WARN(log, "%s: another process is writing it; left alone", path);
        else
            st = ht_file_remove_tree(path);
        if (fd >= 0) close(fd);
    }
    closedir(d);
    return st;
}

/* ---- whole or not ---- */

/* Regular files of folder that the manifest does not list; hidden ones are the file system's
 * business. */
static enum ht_status check_no_others(const struct ht_manifest *m, const char *folder)
{
    enum ht_status st = HT_OK;
    struct dirent *e;

    DIR *d = opendir(folder);
    if (!d) return HT_FAIL(HT_ERR_IO, "%s: %s", folder, strerror(errno));
    while (st == HT_OK && (e = readdir(d)) != NULL)
        if (e->d_name[0] != '.' && strcmp(e->d_name, HT_MANIFEST_NAME) != 0 &&
            ht_manifest_find_file(m, e->d_name) < 0)
            st = HT_FAIL(HT_ERR_FORMAT,
                         "%s/%s: not part of this checkpoint (its manifest does not list it); move "
                         "it elsewhere",
                         folder, e->d_name);
    closedir(d);
    return st;
}

static enum ht_status check_required(const struct ht_manifest *m, const char *folder)
{
    static const char *const required[] = { "index.h5", "recipe.cfg", "loader.json", "state.json" };
    char name[64];

    for (size_t i = 0; i < sizeof required / sizeof *required; i++)
        if (ht_manifest_find_file(m, required[i]) < 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s/%s: the manifest does not list it", folder,
                           required[i]);
    for (int r = 0; r < m->world; r++) {
        ht_ckpt_rank_file(name, r, m->world);
        if (ht_manifest_find_file(m, name) < 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s/%s: the manifest does not list it", folder, name);
    }
    return HT_OK;
}

/* "tensor X (exp_avg, elements a to b)" for the piece of file that holds or follows byte `at`. */
static void name_place(char *text, size_t n_text, const struct ht_manifest *m, int file, int64_t at)
{
    const struct ht_mf_piece *best = NULL;

    for (int64_t i = 0; i < m->n_pieces; i++) {
        const struct ht_mf_piece *p = &m->pieces[i];
        if (p->file == file && p->at + 4 * p->n > at && (!best || p->at < best->at)) best = p;
    }
    if (best)
        snprintf(text, n_text, "tensor %s (%s, elements %" PRId64 " to %" PRId64 ")",
                 m->tensors[best->tensor].name, ht_ckpt_array_names[best->array], best->start,
                 best->start + best->n - 1);
    else
        snprintf(text, n_text, "no tensor");
}

static enum ht_status check_size(const struct ht_manifest *m, int file, const char *folder)
{
    const struct ht_mf_file *f = &m->files[file];
    char path[PATH_MAX], place[256];
    struct stat sb;

    if (snprintf(path, sizeof path, "%s/%s", folder, f->name) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", folder);
    if (stat(path, &sb) != 0)
        return HT_FAIL(errno == ENOENT ? HT_ERR_FORMAT : HT_ERR_IO, "%s: %s", path,
                       errno == ENOENT ? "missing" : strerror(errno));
    if (!S_ISREG(sb.st_mode)) return HT_FAIL(HT_ERR_FORMAT, "%s: not a regular file", path);
    if (sb.st_size == f->n_bytes) return HT_OK;
    name_place(place, sizeof place, m, file, sb.st_size);
    return HT_FAIL(HT_ERR_FORMAT,
                   "%s: damaged: %lld bytes, the manifest says %" PRId64 "; %s: first affected %s",
                   path, (long long)sb.st_size, f->n_bytes,
                   sb.st_size < f->n_bytes ? "truncated" : "grown", place);
}

enum ht_status ht_ckpt_folder_open(struct ht_manifest *out, const char *folder)
{
    enum ht_status st = HT_OK;
    char path[PATH_MAX];

    memset(out, 0, sizeof *out);
    if (snprintf(path, sizeof path, "%s/%s", folder, HT_MANIFEST_NAME) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", folder);
    if (ht_file_is_dir(folder) && !ht_file_exists(path))
        return HT_FAIL(HT_ERR_FORMAT, "%s: missing; not a checkpoint, or an incomplete one", path);
    HT_TRY(ht_manifest_read(out, path));
    if (out->is_part) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: the list of one rank, not of a checkpoint", path);
        goto done;
    }
    if (!realpath(folder, path)) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", folder, strerror(errno));
        goto done;
    }
    const int64_t named = ht_ckpt_step_of_name(strrchr(path, '/') + 1);
    if (named >= 0 && named != out->step) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s/%s: belongs to step %" PRId64 ", not to this folder's",
                     folder, HT_MANIFEST_NAME, out->step);
        goto done;
    }
    HT_TRY_GOTO(st, done, check_required(out, folder));
    for (int i = 0; i < out->n_files; i++) HT_TRY_GOTO(st, done, check_size(out, i, folder));
    HT_TRY_GOTO(st, done, check_no_others(out, folder));
    HT_TRY_GOTO(st, done, ht_manifest_index(out, folder));
done:
    if (st != HT_OK) ht_manifest_free(out);
    return st;
}

/* The first piece of the file whose bytes differ; what is left is HDF5's structure. */
static enum ht_status name_damage(const struct ht_manifest *m, int file, const char *path)
{
    enum ht_status st = HT_OK;
    const struct ht_mf_piece *bad = NULL;
    char *data = NULL;

    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    for (int64_t i = 0; i < m->n_pieces && !bad; i++) {
        const struct ht_mf_piece *p = &m->pieces[i];
        if (p->file != file) continue;
        char *grown = realloc(data, (size_t)p->n * 4);
        if (!grown) {
            st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %" PRId64 " bytes", path, 4 * p->n);
            goto done;
        }
        data = grown;
        HT_TRY_GOTO(st, done, ht_file_read_at(fd, data, (size_t)p->n * 4, p->at, path));
        const struct ht_hash h = ht_hash_of(data, (size_t)p->n * 4);
        if (!ht_hash_equal(&h, &p->hash)) bad = p;
    }
    const char *dot = strrchr(path, '.');
    if (bad)
        st =
            HT_FAIL(HT_ERR_FORMAT,
                    "%s: damaged: bytes %" PRId64 " to %" PRId64
                    " do not match their hash: tensor %s (%s, elements %" PRId64 " to %" PRId64 ")",
                    path, bad->at, bad->at + 4 * bad->n - 1, m->tensors[bad->tensor].name,
                    ht_ckpt_array_names[bad->array], bad->start, bad->start + bad->n - 1);
    else
        st = HT_FAIL(HT_ERR_FORMAT, "%s: damaged: its bytes do not match their hash: %s", path,
                     dot && strcmp(dot, ".h5") == 0
                         ? "the HDF5 structure (no tensor's data are affected)"
                         : "no tensor is affected");
done:
    free(data);
    close(fd);
    return st;
}

enum ht_status ht_ckpt_folder_check_file(const struct ht_manifest *m, int file, const char *folder)
{
    const struct ht_mf_file *f = &m->files[file];
    char path[PATH_MAX];
    struct ht_hash h;
    int64_t n_bytes;

    if (snprintf(path, sizeof path, "%s/%s", folder, f->name) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", folder);
    HT_TRY(check_size(m, file, folder));
    HT_TRY(ht_file_hash(&h, &n_bytes, path));
    if (n_bytes == f->n_bytes && ht_hash_equal(&h, &f->hash)) return HT_OK;
    return name_damage(m, file, path);
}
