/* checkpoints/checkpoint.h: training state on disk [10]: complete or absent, hashed, readable on
 * any rank count.
 *
 * DIR/step-00001000/
 *   rank-00000-of-00002.h5   this rank's slices: 1-D fp32 datasets, contiguous, one per piece of a
 *                            tensor: /master/NAME/START, /exp_avg/..., /exp_avg_sq/...
 *   index.h5                 virtual datasets: whole tensors under their Hugging Face names (fp32
 *                            masters), moments as optimizer/exp_avg/NAME, optimizer/exp_avg_sq/NAME
 *   recipe.cfg  loader.json  state.json  tokenizer.json (when the run has one)
 *   manifest.json            format version, world, step, tokens; per file: bytes, XXH3-128; per
 *                            piece: tensor, range, file, byte offset, XXH3-128; its own hash last
 * DIR/LATEST                 a hint (text), written by rename
 *
 * A save: snapshot to memory (the stall), then a background thread writes .step-00001000.tmp-PID/,
 * hashes, fsyncs and reads back; when all ranks' files are there (agreed on by ht_ckpt_poll) rank 0
 * writes the manifest, fsyncs, renames the folder, fsyncs DIR, moves LATEST, and prunes older ones
 * after the new one is verified. Nothing is ever updated in place. Readers check every hash first.
 *
 * HDF5 is called by ht_ckpt_writer_create alone (main thread): it makes the structure of the files
 * once, in memory. Saving and loading do not call it, so other code may use HDF5 at any time.
 */
#ifndef HT_CHECKPOINTS_CHECKPOINT_H
#define HT_CHECKPOINTS_CHECKPOINT_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/log.h"
#include "core/config/tensor_list.h"
#include "distributed/comm.h"
#include "distributed/zero.h"

struct ht_ckpt_writer;
struct ht_ckpt; // an opened, verified checkpoint

struct ht_ckpt_writer_options {
    const char *dir; // runs/NAME/checkpoints, created
    const struct ht_tensor_list *tensors;
    const struct ht_zero_slice *slices; // of this rank; copied
    int n_slices;
    int64_t shard_size; // elements of each of master, exp_avg, exp_avg_sq
    int keep_last;      // at least 1
    int64_t keep_every; // steps that are multiples of it are never pruned; 0 = none
    bool background;    // false: ht_ckpt_save writes and publishes before it returns
    bool on_full_pause; // disk full: wait for space, a log line each minute, instead of failing
    const char *tokenizer_path; // copied into each checkpoint; NULL or "" for none
    const struct ht_log *log;
    struct ht_backend
        *be; // whose memory the arrays to save are in, outlives the writer; NULL: host
};

struct ht_ckpt_source {
    int64_t step, tokens;
    const float *master, *exp_avg, *exp_avg_sq;         // (shard_size), copied by save
    const char *recipe_text, *loader_json, *state_json; // copied; same on all ranks
};

/* Collective. Allocates the snapshot buffers; removes unfinished .step-*.tmp-* folders of dead
 * writers. Checks that the folder is writable and that 2 checkpoints fit on the disk, one where
 * there are some already (HT_ERR_MEMORY names bytes needed and free). Ranks that all pass the same
 * slices (zero_stage 0) share the writing. comm may be NULL (one process). */
enum ht_status ht_ckpt_writer_create(struct ht_ckpt_writer **out, struct ht_comm *comm,
                                     const struct ht_ckpt_writer_options *o);
void ht_ckpt_writer_free(struct ht_ckpt_writer *w); // waits for nothing: finish first

/* Collective. Finishes a save still under way, takes the snapshot, starts the writing thread.
 * stall_s gets the seconds that the caller was held up. The failure of an earlier save is reported
 * once, here or by poll or finish; then no new save is started by this call. */
enum ht_status ht_ckpt_save(struct ht_ckpt_writer *w, const struct ht_ckpt_source *s,
                            double *stall_s);

/* Collective, cheap: call at every step border on every rank. *published gets the step that became
 * visible, or -1. Status is a failure of the background work (earlier checkpoints are intact), the
 * same on every rank. While a save is under way: one small maximum over ranks. */
enum ht_status ht_ckpt_poll(struct ht_ckpt_writer *w, int64_t *published);

/* Collective: wait until the save under way is published (or failed). */
enum ht_status ht_ckpt_finish(struct ht_ckpt_writer *w);

/* Test hook: environment HT_CKPT_CRASH_AT=POINT[:n] makes the process raise SIGKILL at the n-th
 * passing of a named point (open, mid-write, before-fsync, after-fsync, before-manifest,
 * after-manifest, after-rename, after-latest, mid-prune); docs/checkpoints.md. */

/* Newest checkpoint of dir that every rank finds whole: path written to out (size bytes), "" when
 * there is none at all. Damaged ones are named in the log with the reason and left alone.
 * HT_ERR_CHECKPOINT when there are checkpoints but none is usable (exit code 4 is the program's
 * business). Collective; each rank checks its share of the files. comm may be NULL (one process).
 */
enum ht_status ht_ckpt_find_latest(char *out, size_t size, const char *dir, struct ht_comm *comm,
                                   const struct ht_log *log);

/* Verify every hash (the first damaged file and tensor are named: HT_ERR_FORMAT), then open. */
enum ht_status ht_ckpt_open(struct ht_ckpt **out, const char *path);
void ht_ckpt_close(struct ht_ckpt *c);

int64_t ht_ckpt_step(const struct ht_ckpt *c);
int64_t ht_ckpt_tokens(const struct ht_ckpt *c);
int ht_ckpt_world(const struct ht_ckpt *c);
const char *ht_ckpt_recipe(const struct ht_ckpt *c);      // text
const char *ht_ckpt_loader_json(const struct ht_ckpt *c); // text
const char *ht_ckpt_state_json(const struct ht_ckpt *c);  // text

enum ht_ckpt_array { HT_CKPT_MASTER, HT_CKPT_EXP_AVG, HT_CKPT_EXP_AVG_SQ };

/* Elements [flat_start, flat_start+n) of the flat index space of `tensors` (whose names and shapes
 * must equal the checkpoint's; HT_ERR_FORMAT names the first difference) into out; gaps between
 * tensors become 0. */
enum ht_status ht_ckpt_read_flat(struct ht_ckpt *c, enum ht_ckpt_array which,
                                 const struct ht_tensor_list *tensors, int64_t flat_start,
                                 int64_t n, float *out);

#endif
