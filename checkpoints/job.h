/* checkpoints/job.h: the work of one save on one rank, without communication and without threads.
 *
 * ht_ckpt_writer gives it to a background thread: write on every rank, then (when all have written)
 * publish on rank 0. Tests drive several ranks of it in one process.
 */
#ifndef HT_CHECKPOINTS_JOB_H
#define HT_CHECKPOINTS_JOB_H

#include <stdbool.h>
#include <stdint.h>

#include "checkpoints/checkpoint.h"
#include "checkpoints/h5_image.h"
#include "checkpoints/manifest.h"

struct ht_ckpt_range { // flat elements [start, start + n) that a rank owns
    int64_t start, n;
};

struct ht_ckpt_job {
    const struct ht_ckpt_writer_options *options; // strings and lists not used after create
    char *dir;                                    // owned
    char *tokenizer;                              // content, owned; NULL for none
    size_t tokenizer_bytes;
    int rank, world;
    long pid; // of rank 0, part of the temporary folder's name

    // fixed by create
    struct ht_manifest part;   // this rank's file; on rank 0 also the source of tensors
    int64_t *source;           // (part.n_pieces) element of the shard where each piece starts
    int64_t *order;            // (part.n_pieces) pieces by place in the file
    struct ht_h5_image *image; // of this rank's file
    struct ht_h5_image *index; // rank 0
    int64_t shard_size;
    float *snapshot[HT_CKPT_ARRAYS]; // (shard_size)
    int64_t total_bytes;             // of all ranks' files, set by the owner; 0 = own file only

    // of one save
    int64_t step, tokens;
    char *recipe, *loader, *state; // texts, owned
    char tmp[HT_MAX_PATH + 400];   // dir/.step-*.tmp-PID
    int lock_fd;                   // rank 0: holds the lock on tmp; -1

    char crash_point[32]; // HT_CKPT_CRASH_AT
    int crash_countdown;
};

/* all: the ranges of rank r are all[r * max_ranges ...], up to the first with n = 0. When every
 * rank has the same ranges (state that is not sharded), each writes its share of them. HT_ERR_ARG
 * when the ranges of all ranks do not cover every tensor exactly once. */
enum ht_status ht_ckpt_job_create(struct ht_ckpt_job *j, const struct ht_ckpt_writer_options *o,
                                  int rank, int world, long pid, const struct ht_ckpt_range *all,
                                  int max_ranges);
void ht_ckpt_job_free(struct ht_ckpt_job *j);

/* Copy what will be saved: the caller may go on after it. */
enum ht_status ht_ckpt_job_snapshot(struct ht_ckpt_job *j, const struct ht_ckpt_source *s);

/* This rank's file and its part of the manifest into the temporary folder (rank 0: the small files
 * too), read back and fsynced. */
enum ht_status ht_ckpt_job_write(struct ht_ckpt_job *j);

/* Rank 0, after every rank has written: manifest, rename, LATEST, check, prune. */
enum ht_status ht_ckpt_job_publish(struct ht_ckpt_job *j);

/* Rank 0, after a failure anywhere: remove the temporary folder. */
void ht_ckpt_job_discard(struct ht_ckpt_job *j);

/* SIGKILL when HT_CKPT_CRASH_AT names this point and its count has come down to zero. */
void ht_ckpt_crash_point(struct ht_ckpt_job *j, const char *point);

/* A whole file of the temporary folder, fsynced; *hash may be NULL. Waits for space with
 * on_full_pause. */
enum ht_status ht_ckpt_job_put(struct ht_ckpt_job *j, const char *name, const void *data,
                               size_t n_bytes, struct ht_hash *hash);

#endif
