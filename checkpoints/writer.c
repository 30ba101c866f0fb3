/* checkpoints/writer.c: saves in the background, agreed on by all ranks.
 *
 *   idle --save: snapshot, thread--> writing --all ranks wrote--> publishing --done--> idle
 *                                       \--any rank failed--> idle; status to all ranks
 *
 * MPI belongs to the main thread. While a save is under way each poll takes one maximum over ranks
 * of two integers (who is not done, who failed): all ranks come to the same conclusion at the same
 * step border, so none waits for another that has given up. A barrier that is started when a rank
 * is done would be started by each rank at another place among its collectives, which the messages'
 * numbering does not allow.
 */
#include "checkpoints/checkpoint.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "checkpoints/agree.h"
#include "checkpoints/folder.h"
#include "checkpoints/job.h"
#include "core/base/file.h"

enum phase { IDLE, WRITING, PUBLISHING };

struct ht_ckpt_writer {
    struct ht_ckpt_writer_options options;
    struct ht_comm *comm;
    int rank, world;
    struct ht_ckpt_job job;
    enum phase phase;

    pthread_t thread;
    bool has_thread;
    atomic_bool done;      // of this rank in this phase
    enum ht_status status; // set before done
    char message[1024];
};

/* ---- set-up ---- */

/* The slices of all ranks, on every rank. */
static enum ht_status gather_ranges(struct ht_ckpt_range **out, int *max_ranges,
                                    const struct ht_ckpt_writer *w)
{
    enum ht_status st = HT_OK;
    int64_t max = w->options.n_slices;

    *out = NULL;
    if (w->comm) HT_TRY(ht_comm_max_i64(w->comm, &max, 1));
    *max_ranges = (int)max + 1; // always one that ends the list
    const size_t n = (size_t)*max_ranges;
    struct ht_ckpt_range *all = calloc(n * (size_t)w->world, sizeof *all);
    HT_TRY(ht_ckpt_agree(w->comm,
                         all ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for the ranks' slices")));
    for (int i = 0; i < w->options.n_slices; i++)
        all[n * (size_t)w->rank + (size_t)i] =
            (struct ht_ckpt_range){ w->options.slices[i].flat_start, w->options.slices[i].n };
    // host memory: the communicator's other collectives may be on a device
    for (int rank = 0; rank < w->world && w->world > 1; rank++)
        HT_TRY_GOTO(
            st, done,
            ht_comm_broadcast(w->comm, all + n * (size_t)rank, (int64_t)(n * sizeof *all), rank));
    *out = all;
    all = NULL;
done:
    free(all);
    return st;
}

/* Rank 0: the folder exists, is writable, holds no unfinished saves of dead writers, and has room.
 */
static enum ht_status prepare_dir(const struct ht_ckpt_writer *w)
{
    const char *dir = w->options.dir;
    char probe[HT_MAX_PATH + 400];
    uint64_t free_bytes;
    int64_t *steps = NULL;
    int n;

    HT_TRY(ht_file_make_dirs(dir));
    HT_TRY(ht_ckpt_remove_stale(dir, w->options.log));
    snprintf(probe, sizeof probe, "%s/.writable", dir);
    HT_TRY(ht_file_publish(probe, "", 0));
    HT_TRY(ht_file_remove_tree(probe));
    HT_TRY(ht_ckpt_list_steps(&steps, &n, dir));
    free(steps);
    // With old checkpoints in place one more must fit, and then the oldest can go.
    const uint64_t one = (uint64_t)w->job.total_bytes, needed = n > 0 ? one : 2 * one;
    HT_TRY(ht_file_free_bytes(&free_bytes, dir));
    if (free_bytes >= needed) return HT_OK;
    if (w->options.on_full_pause) {
        HT_WARN(w->options.log, "%s: %" PRIu64 " bytes free, checkpoints need %" PRIu64, dir,
                free_bytes, needed);
        return HT_OK;
    }
    return HT_FAIL(HT_ERR_MEMORY,
                   "%s: %d checkpoint(s) of %" PRIu64 " bytes must fit: %" PRIu64
                   " bytes are needed, %" PRIu64 " are free",
                   dir, n > 0 ? 1 : 2, one, needed, free_bytes);
}

static enum ht_status create_job(struct ht_ckpt_writer *w)
{
    struct ht_ckpt_range *all = NULL;
    int64_t pid = (int64_t)getpid();
    int max_ranges;

    if (w->comm) HT_TRY(ht_comm_broadcast(w->comm, &pid, sizeof pid, 0));
    HT_TRY(gather_ranges(&all, &max_ranges, w));
    const enum ht_status st =
        ht_ckpt_job_create(&w->job, &w->options, w->rank, w->world, (long)pid, all, max_ranges);
    free(all);
    HT_TRY(ht_ckpt_agree(w->comm, st));
    double bytes = (double)w->job.part.files[0].n_bytes;
    if (w->comm) HT_TRY(ht_comm_sum_f64(w->comm, &bytes, 1));
    w->job.total_bytes = (int64_t)bytes;
    return ht_ckpt_agree(w->comm, w->rank == 0 ? prepare_dir(w) : HT_OK);
}

enum ht_status ht_ckpt_writer_create(struct ht_ckpt_writer **out, struct ht_comm *comm,
                                     const struct ht_ckpt_writer_options *o)
{
    enum ht_status st = HT_OK;
    struct ht_ckpt_writer *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w) w->job.lock_fd = -1;
    if (!w)
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a checkpoint writer");
    else if (o->keep_last < 1)
        st = HT_FAIL(HT_ERR_ARG, "checkpoint.keep_last is %d; it must be at least 1", o->keep_last);
    else if (!o->dir || !o->dir[0] || strlen(o->dir) > HT_MAX_PATH + 330)
        st = HT_FAIL(HT_ERR_ARG, "the checkpoint folder's path is empty or too long");
    HT_TRY_GOTO(st, done, ht_ckpt_agree(comm, st));
    w->options = *o;
    w->comm = comm;
    w->rank = comm ? ht_comm_rank(comm) : 0;
    w->world = comm ? ht_comm_size(comm) : 1;
    HT_TRY_GOTO(st, done, create_job(w));
    w->options.dir = w->job.dir; // what the caller lent is not needed any more
    w->options.tensors = NULL;
    w->options.slices = NULL;
    *out = w;
    w = NULL;
done:
    ht_ckpt_writer_free(w);
    return st;
}

void ht_ckpt_writer_free(struct ht_ckpt_writer *w)
{
    if (!w) return;
    if (w->has_thread) {
        if (!atomic_load(&w->done)) {
            w->options.log = NULL;     // the caller's, and about to go
            pthread_detach(w->thread); // it goes on with its memory until the process ends
            return;
        }
        pthread_join(w->thread, NULL);
    }
    ht_ckpt_job_free(&w->job);
    free(w);
}

/* ---- the thread ---- */

static void finish_phase(struct ht_ckpt_writer *w, enum ht_status st)
{
    w->status = st;
    if (st != HT_OK) snprintf(w->message, sizeof w->message, "%s", ht_error_message());
    atomic_store(&w->done, true);
}

static void *work(void *arg)
{
    struct ht_ckpt_writer *w = arg;
    enum ht_status st = HT_OK;

    // training has the cores; this thread takes what is left
    setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10);
    if (w->phase == WRITING) st = ht_ckpt_job_write(&w->job);
    // one rank needs no agreement in between
    if (st == HT_OK && (w->phase == PUBLISHING || w->world == 1)) st = ht_ckpt_job_publish(&w->job);
    finish_phase(w, st);
    return NULL;
}

static void start_thread(struct ht_ckpt_writer *w)
{
    const int code = pthread_create(&w->thread, NULL, work, w);

    w->has_thread = code == 0;
    if (code != 0)
        finish_phase(w,
                     HT_FAIL(HT_ERR_MEMORY, "no thread to write a checkpoint: %s", strerror(code)));
}

/* ---- the main thread ---- */

/* All ranks know of the failure of `rank`: its message to all, the folder away, idle again. */
static enum ht_status give_up(struct ht_ckpt_writer *w, enum ht_status code, int rank)
{
    char message[sizeof w->message];

    w->phase = IDLE;
    if (w->rank == 0) ht_ckpt_job_discard(&w->job);
    memcpy(message, w->message, sizeof message);
    if (w->comm) HT_TRY(ht_comm_broadcast(w->comm, message, sizeof message, rank));
    message[sizeof message - 1] = '\0';
    return HT_FAIL(code, "checkpoint of step %" PRId64 " was not saved: %s", w->job.step, message);
}

enum ht_status ht_ckpt_poll(struct ht_ckpt_writer *w, int64_t *published)
{
    // [0] 0 while some rank is not done; [1] code and rank of a failure
    int64_t v[2] = { 0, 0 };

    if (published) *published = -1;
    if (w->phase == IDLE) return HT_OK;
    v[0] = atomic_load(&w->done) ? -1 : 0;
    if (v[0] && w->status != HT_OK) v[1] = (int64_t)w->status << 32 | w->rank;
    if (w->comm) HT_TRY(ht_comm_max_i64(w->comm, v, 2));
    if (v[0] == 0) return HT_OK; // also after a failure: all threads must have left the folder

    if (w->has_thread) pthread_join(w->thread, NULL);
    w->has_thread = false;
    if (v[1]) return give_up(w, (enum ht_status)(v[1] >> 32), (int)(v[1] & 0x7fffffff));
    if (w->phase == WRITING && w->world > 1) {
        w->phase = PUBLISHING;
        atomic_store(&w->done, w->rank != 0);
        if (w->rank == 0) start_thread(w);
        return HT_OK;
    }
    w->phase = IDLE;
    if (published) *published = w->job.step;
    return HT_OK;
}

enum ht_status ht_ckpt_finish(struct ht_ckpt_writer *w)
{
    double pause_s = 1e-4;

    while (w->phase != IDLE) {
        HT_TRY(ht_ckpt_poll(w, NULL));
        if (w->phase == IDLE) break;
        const struct timespec t = { 0, (long)(pause_s * 1e9) };
        nanosleep(&t, NULL);
        if (pause_s < 0.02) pause_s *= 2;
    }
    return HT_OK;
}

enum ht_status ht_ckpt_save(struct ht_ckpt_writer *w, const struct ht_ckpt_source *s,
                            double *stall_s)
{
    const double start = ht_time_s();
    enum ht_status st = ht_ckpt_finish(w);

    if (stall_s) *stall_s = ht_time_s() - start;
    HT_TRY(st);
    atomic_store(&w->done, false);
    w->status = HT_OK;
    w->phase = WRITING;
    st = ht_ckpt_job_snapshot(&w->job, s);
    if (st == HT_OK)
        start_thread(w);
    else
        finish_phase(w, st); // the other ranks hear of it at the next poll
    if (!w->options.background)
        st = ht_ckpt_finish(w);
    else
        st = HT_OK;
    if (stall_s) *stall_s = ht_time_s() - start;
    return st;
}
