/* training/run.h: everything one rank of a training run owns; created once, used by every step. */
#ifndef HT_TRAINING_RUN_H
#define HT_TRAINING_RUN_H

#include "checkpoints/checkpoint.h"
#include "core/base/log.h"
#include "core/config/config.h"
#include "core/config/recipe.h"
#include "core/model/model.h"
#include "data/loader.h"
#include "distributed/comm.h"
#include "distributed/zero.h"

/* One micro-batch on its way to a device: pinned host memory, and where it is copied to. */
struct ht_run_slot {
    int32_t *host, *device;        // ids, labels, positions, sequence starts
    struct ht_backend_mark copied; // the host's memory may be written again
};

enum { HT_RUN_SLOTS = 2 };

/* What a step sums up, in the backend's memory; order of additions fixed. */
struct ht_run_sums {
    double *micro;   // (micro-batches of a step, 3) loss, z, labels counted
    double *squares; // (slices) of the summed gradient
    double *ranks;   // (ranks, 4) loss, z, labels, squares
    double *total;   // (4) of all ranks
    float *clip;     // (1) factor of the gradient; NaN: skip the step
    double *host;    // (4) pinned: total, once `there` is passed
    struct ht_backend_mark reduce_start, reduce_end, there;
};

struct ht_run {
    const struct ht_config *cfg; // borrowed, as are recipe, comm and log
    const struct ht_recipe *recipe;
    struct ht_comm *comm;
    const struct ht_log *log;
    char dir[HT_MAX_PATH + 300], checkpoint_dir[HT_MAX_PATH + 320]; // runs/NAME, its checkpoints
    char *recipe_text; // resolved, as stored in checkpoints

    struct ht_backend backend;
    struct ht_model *model;
    struct ht_acts *acts;
    struct ht_zero *zero;
    struct ht_loader *loader;      // training rows
    struct ht_loader *eval_loader; // NULL without evaluation data
    struct ht_ckpt_writer *writer;

    float *grads; // whole gradient, flat index space (padded); from ZeRO-2 on the vector part's
    struct ht_model_units units;          // from ZeRO-2 on
    float *master, *exp_avg, *exp_avg_sq; // this rank's shard
    struct ht_run_sums sums;
    struct ht_arena state; // of the backend: holds the arrays above

    struct ht_run_slot slots[HT_RUN_SLOTS]; // used where the backend is a device
    int next_slot;

    int64_t step, tokens; // finished
    int64_t saved;        // step of this run's newest checkpoint that it wrote or resumed; -1
    int64_t updates;      // optimiser updates applied: step minus skipped ones
    int64_t skipped, skipped_in_row;

    char pause_point[16]; // HT_TRAIN_PAUSE_AT
    int pause_countdown;
};

/* Model, data, optimiser state and checkpoint writer for this rank, weights initialised or resumed.
 * After a failure *out is NULL and nothing is left behind. */
enum ht_status ht_run_create(struct ht_run **out, const struct ht_config *cfg,
                             const struct ht_recipe *recipe, struct ht_comm *comm,
                             const struct ht_log *log);
void ht_run_free(struct ht_run *r);

/* training/device.c: the backend that the recipe asks for, on this rank. */
enum ht_status ht_run_create_backend(struct ht_run *r);

/* training/device.c: buffers of micro-batches and of the step's sums; sums are taken from r->state,
 * which has room for ht_run_sums_bytes more. */
size_t ht_run_sums_bytes(const struct ht_run *r);
enum ht_status ht_run_create_buffers(struct ht_run *r);
void ht_run_free_buffers(struct ht_run *r);

/* training/device.c: a micro-batch where the model can read it, until the one after the next is
 * put. Enqueued; the loader's may go at once. */
enum ht_status ht_run_put_batch(struct ht_run *r, struct ht_model_batch *out,
                                const struct ht_batch *batch);

/* training/device.c: fill this rank's part of one of the three state arrays: source gives elements
 * [flat_start, flat_start + n) in host memory. */
typedef enum ht_status ht_state_source(void *user, int64_t flat_start, int64_t n, float *out);
enum ht_status ht_run_fill(struct ht_run *r, float *array, ht_state_source *source, void *user);

/* training/units.c: from ZeRO-2 on, hand units' weights and gradients to the model. */
enum ht_status ht_run_create_units(struct ht_run *r);
void ht_run_free_units(struct ht_run *r);

/* training/units.c: where the working copy of flat element `first` stands, whose master is `at` in
 * this rank's shard. */
void *ht_run_weight(const struct ht_run *r, int64_t first, int64_t at);

/* training/resume.c: initial weights, weights from elsewhere, or a checkpoint of this run. */
enum ht_status ht_run_start(struct ht_run *r);

/* training/resume.c: start a checkpoint of the present state; stall_s as in ht_ckpt_save. */
enum ht_status ht_run_save(struct ht_run *r, double *stall_s);

/* training/step.c: one optimiser step over the global batch. */
struct ht_step_result {
    double loss,
        z_loss; // means over the counted labels of the global batch (z_loss: with its coefficient)
    double grad_norm, lr; // norm before clipping
    double step_s, data_wait_s, comm_exposed_s;
    double attended; // mean attended length of this rank's sequences
    int64_t tokens;  // of the global batch
    bool skipped;    // loss or gradient was not finite: weights unchanged
};
enum ht_status ht_run_step(struct ht_run *r, struct ht_step_result *out);

/* training/evaluate.c: mean loss over the held-out data (all ranks get the same numbers). A request
 * to stop cuts it short after the batch at hand. */
struct ht_eval_result {
    int64_t cut_by;       // the signal that cut it short: the rest is not set; 0
    double loss;          // nats per counted token
    double bits_per_byte; // 0 when the shards carry no byte count or max_tokens cut them
    int64_t n_counted;
};
enum ht_status ht_run_evaluate(struct ht_run *r, struct ht_eval_result *out);

/* training/stop.c: the signal by which some rank was asked to stop, 0 = none; the same on all
 * ranks. Collective. */
enum ht_status ht_run_agree_to_stop(struct ht_run *r, int64_t *signal_number);

/* Before the first step: HT_ERR_STOPPED on all ranks when one was asked to stop, with a message
 * that says what there is to go on from. Nothing is saved. Collective. */
enum ht_status ht_run_check_start(struct ht_run *r);

/* Test hook: environment HT_TRAIN_PAUSE_AT=POINT[:n] stops the process (SIGSTOP) at the n-th
 * passing of a point: data, load, step, evaluate, save, last-evaluate, finish. Whoever watches
 * sends signals, then SIGCONT. */
void ht_run_set_pause_point(struct ht_run *r);
void ht_run_pause_point(struct ht_run *r, const char *point);

/* Working copies from this rank's masters, then everyone's (used after a load). */
enum ht_status ht_run_publish_weights(struct ht_run *r);

#endif
