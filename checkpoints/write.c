/* checkpoints/write.c: one rank's files of a save: written front to back, hashed on the way, read
 * back. */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "checkpoints/job.h"
#include "core/base/file.h"

enum { BUFFER_BYTES = 4 << 20, STRUCTURE_BLOCK = 16384 };

/* A file being written: bytes are gathered into large writes and hashed in order. */
struct sink {
    struct ht_ckpt_job *job;
    char path[HT_MAX_PATH + 500];
    int fd;
    int64_t at; // bytes given to write
    char *buffer;
    size_t used;
    struct ht_hasher *hasher;
};

/* ---- a full disk ---- */

static bool is_full(int code)
{
    return code == ENOSPC || code == EDQUOT;
}

static enum ht_status full_disk(const struct ht_ckpt_job *j, const char *path, int code,
                                int64_t needed)
{
    const int saved = code;
    uint64_t free_bytes = 0;

    ht_file_free_bytes(&free_bytes, j->dir);
    return HT_FAIL(HT_ERR_MEMORY,
                   "%s: %s: %" PRId64 " more bytes are needed, %" PRIu64
                   " are free; earlier checkpoints are intact. Free space, lower "
                   "checkpoint.keep_last, or let the run wait with checkpoint.on_full = \"pause\"",
                   path, strerror(saved), needed, free_bytes);
}

/* on_full_pause: sleep a second; a log line at once and each minute. */
static void wait_for_space(const struct ht_ckpt_job *j, const char *path, int64_t n_waited)
{
    const struct timespec second = { 1, 0 };
    uint64_t free_bytes = 0;

    if (n_waited % 60 == 0) {
        ht_file_free_bytes(&free_bytes, j->dir);
        HT_WARN(j->options->log,
                "%s: disk full, %" PRIu64 " bytes free; waiting for space (%" PRId64 " min so far)",
                path, free_bytes, n_waited / 60);
    }
    nanosleep(&second, NULL);
}

/* Before the first byte: is there room for the files of all ranks? */
static enum ht_status check_space(const struct ht_ckpt_job *j)
{
    const int64_t needed = j->total_bytes ? j->total_bytes : j->part.files[0].n_bytes;
    uint64_t free_bytes;

    for (int64_t n = 0;; n++) {
        HT_TRY(ht_file_free_bytes(&free_bytes, j->dir));
        if (free_bytes >= (uint64_t)needed) return HT_OK;
        if (!j->options->on_full_pause) return full_disk(j, j->tmp, ENOSPC, needed);
        wait_for_space(j, j->tmp, n);
    }
}

/* ---- the sink ---- */

static enum ht_status write_all(struct sink *s, const char *data, size_t n)
{
    int64_t n_waited = 0;

    while (n > 0) {
        const ssize_t w = pwrite(s->fd, data, n, s->at);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0 && is_full(errno)) {
            if (!s->job->options->on_full_pause)
                return full_disk(s->job, s->path, errno, (int64_t)n);
            wait_for_space(s->job, s->path, n_waited++);
            continue;
        }
        if (w < 0)
            return HT_FAIL(HT_ERR_IO, "%s: write of %zu bytes at byte %" PRId64 ": %s", s->path, n,
                           s->at, strerror(errno));
        data += w;
        n -= (size_t)w;
        s->at += w;
    }
    return HT_OK;
}

static enum ht_status sink_flush(struct sink *s)
{
    const size_t half = s->used / 2;

    ht_hasher_update(s->hasher, s->buffer, s->used);
    HT_TRY(write_all(s, s->buffer, half));
    ht_ckpt_crash_point(s->job, "mid-write");
    HT_TRY(write_all(s, s->buffer + half, s->used - half));
    s->used = 0;
    return HT_OK;
}

static enum ht_status sink_put(struct sink *s, const void *data, size_t n)
{
    const char *from = data;

    while (n > 0) {
        const size_t room = BUFFER_BYTES - s->used, m = n < room ? n : room;
        memcpy(s->buffer + s->used, from, m);
        s->used += m;
        from += m;
        n -= m;
        if (s->used == BUFFER_BYTES) HT_TRY(sink_flush(s));
    }
    return HT_OK;
}

static enum ht_status sink_open(struct sink *s, struct ht_ckpt_job *j, const char *name)
{
    *s = (struct sink){ .job = j, .fd = -1 };
    snprintf(s->path, sizeof s->path, "%s/%s", j->tmp, name);
    s->buffer = malloc(BUFFER_BYTES);
    if (!s->buffer) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to write it", s->path);
    HT_TRY(ht_hasher_create(&s->hasher));
    for (int64_t n = 0;; n++) {
        s->fd = open(s->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (s->fd >= 0 || !is_full(errno) || !j->options->on_full_pause) break;
        wait_for_space(j, s->path, n);
    }
    if (s->fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", s->path, strerror(errno));
    ht_ckpt_crash_point(j, "open");
    return HT_OK;
}

/* Everything on the disk, and the same when read back. */
static enum ht_status sink_finish(struct sink *s, struct ht_hash *hash)
{
    struct ht_hash again;
    int64_t n_bytes;

    HT_TRY(sink_flush(s));
    ht_ckpt_crash_point(s->job, "before-fsync");
    if (fsync(s->fd) != 0) return HT_FAIL(HT_ERR_IO, "%s: fsync: %s", s->path, strerror(errno));
    ht_ckpt_crash_point(s->job, "after-fsync");
    const int closed = close(s->fd);
    s->fd = -1;
    if (closed != 0) return HT_FAIL(HT_ERR_IO, "%s: close: %s", s->path, strerror(errno));
    *hash = ht_hasher_digest(s->hasher);
    HT_TRY(ht_file_hash(&again, &n_bytes, s->path));
    if (n_bytes != s->at || !ht_hash_equal(&again, hash))
        return HT_FAIL(HT_ERR_IO,
                       "%s: what was read back is not what was written; the disk or the memory of "
                       "this machine is faulty",
                       s->path);
    return HT_OK;
}

static void sink_close(struct sink *s)
{
    if (s->fd >= 0) close(s->fd);
    ht_hasher_free(s->hasher);
    free(s->buffer);
}

enum ht_status ht_ckpt_job_put(struct ht_ckpt_job *j, const char *name, const void *data,
                               size_t n_bytes, struct ht_hash *hash)
{
    struct ht_hash ignored;
    enum ht_status st;
    struct sink s;

    HT_TRY_GOTO(st, done, sink_open(&s, j, name));
    HT_TRY_GOTO(st, done, sink_put(&s, data, n_bytes));
    HT_TRY_GOTO(st, done, sink_finish(&s, hash ? hash : &ignored));
done:
    sink_close(&s);
    return st;
}

/* ---- a rank's work ---- */

/* Bytes [from, to) of the HDF5 structure. */
static enum ht_status put_structure(struct sink *s, const struct ht_h5_image *image, int64_t from,
                                    int64_t to)
{
    char block[STRUCTURE_BLOCK];

    while (from < to) {
        const int64_t n = to - from < STRUCTURE_BLOCK ? to - from : STRUCTURE_BLOCK;
        ht_h5_image_copy(image, block, from, n);
        HT_TRY(sink_put(s, block, (size_t)n));
        from += n;
    }
    return HT_OK;
}

static enum ht_status write_rank_file(struct ht_ckpt_job *j)
{
    struct ht_mf_file *f = &j->part.files[0];
    enum ht_status st;
    struct sink s;
    int64_t at = 0;

    HT_TRY_GOTO(st, done, sink_open(&s, j, f->name));
    for (int64_t i = 0; i < j->part.n_pieces; i++) {
        struct ht_mf_piece *p = &j->part.pieces[j->order[i]];
        const float *data = j->snapshot[p->array] + j->source[j->order[i]];
        HT_TRY_GOTO(st, done, put_structure(&s, j->image, at, p->at));
        HT_TRY_GOTO(st, done, sink_put(&s, data, (size_t)p->n * sizeof(float)));
        p->hash = ht_hash_of(data, (size_t)p->n * sizeof(float));
        at = p->at + 4 * p->n;
    }
    HT_TRY_GOTO(st, done, put_structure(&s, j->image, at, f->n_bytes));
    HT_TRY_GOTO(st, done, sink_finish(&s, &f->hash));
done:
    sink_close(&s);
    return st;
}

/* Rank 0: a file of the manifest besides the ranks' files; entered into a growing list in `part`.
 */
static enum ht_status write_small(struct ht_ckpt_job *j, const char *name, const void *data,
                                  size_t n_bytes)
{
    struct ht_mf_file *files =
        realloc(j->part.files, (size_t)(j->part.n_files + 1) * sizeof *files);

    if (!files) return HT_FAIL(HT_ERR_MEMORY, "no memory for a list of files");
    j->part.files = files;
    struct ht_mf_file *f = &files[j->part.n_files];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->n_bytes = (int64_t)n_bytes;
    HT_TRY(ht_ckpt_job_put(j, name, data, n_bytes, &f->hash));
    j->part.n_files++;
    return HT_OK;
}

static enum ht_status write_small_files(struct ht_ckpt_job *j)
{
    const int64_t n_index = ht_h5_image_bytes(j->index);
    char *index = malloc((size_t)n_index + 1);

    if (!index)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for index.h5 of %" PRId64 " bytes", n_index);
    ht_h5_image_copy(j->index, index, 0, n_index);
    const enum ht_status st = write_small(j, "index.h5", index, (size_t)n_index);
    free(index);
    HT_TRY(st);
    HT_TRY(write_small(j, "recipe.cfg", j->recipe, strlen(j->recipe)));
    HT_TRY(write_small(j, "loader.json", j->loader, strlen(j->loader)));
    HT_TRY(write_small(j, "state.json", j->state, strlen(j->state)));
    if (!j->tokenizer) return HT_OK;
    return write_small(j, "tokenizer.json", j->tokenizer, j->tokenizer_bytes);
}

static enum ht_status make_tmp(struct ht_ckpt_job *j)
{
    for (int64_t n = 0; mkdir(j->tmp, 0777) != 0 && errno != EEXIST; n++) {
        if (!is_full(errno)) return HT_FAIL(HT_ERR_IO, "%s: mkdir: %s", j->tmp, strerror(errno));
        if (!j->options->on_full_pause) return full_disk(j, j->tmp, errno, j->total_bytes);
        wait_for_space(j, j->tmp, n);
    }
    if (j->rank != 0) return HT_OK;
    // the lock says that the writer lives; it goes with the process, whatever happens
    j->lock_fd = open(j->tmp, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (j->lock_fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", j->tmp, strerror(errno));
    flock(j->lock_fd, LOCK_EX | LOCK_NB);
    return HT_OK;
}

enum ht_status ht_ckpt_job_write(struct ht_ckpt_job *j)
{
    char *text = NULL, name[32];
    size_t n_bytes;

    j->part.n_files = 1;
    HT_TRY(check_space(j));
    HT_TRY(make_tmp(j));
    HT_TRY(write_rank_file(j));
    if (j->rank == 0) HT_TRY(write_small_files(j));
    HT_TRY(ht_manifest_print(&text, &n_bytes, &j->part));
    snprintf(name, sizeof name, "part-%05d.json", j->rank);
    const enum ht_status st = ht_ckpt_job_put(j, name, text, n_bytes, NULL);
    free(text);
    HT_TRY(st);
    return ht_file_sync(j->tmp);
}
