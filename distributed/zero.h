/* distributed/zero.h: gradient buckets; sharding of optimiser state, gradients and weights over the
 * ranks (ZeRO; Rajbhandari et al. 2020) [8].
 *
 * stage   a rank holds whole                        and only its part of
 *   0     weights, gradients, masters, moments      -
 *   1     weights, gradients                        masters, moments
 *   2     weights, one unit's gradients             masters, moments, summed gradients
 *   3     one unit's weights and gradients          masters, moments, summed gradients, weights
 *
 * The flat index space (core/config/tensor_list.h) is cut into buckets of about bucket_bytes of
 * fp32 gradient, the last elements first, as the backward pass finishes them. Bucket b covers
 * [start, end), padded to n_ranks * 64; rank r owns the r-th of n_ranks equal parts. A bucket lies
 * wholly in the matrix part or wholly in the vector part, so that the working copies can be
 * gathered in their own dtype; in stages 2 and 3 wholly in one unit: what a pass uses together, a
 * layer, the embedding or the head. The vector part, a few ten thousandths of a model, is gathered
 * and kept whole in every stage. With one rank the code path is the same.
 *
 * All memory is that of the backend (device memory on CUDA), and on CUDA everything here only
 * enqueues: a result is there for what is enqueued on the compute stream afterwards.
 */
#ifndef HT_DISTRIBUTED_ZERO_H
#define HT_DISTRIBUTED_ZERO_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "distributed/comm.h"

struct ht_zero; // bucket plan, requests under way, this rank's slices

struct ht_zero_slice {     // what this rank owns, in flat element offsets
    int64_t flat_start, n; // elements [flat_start, flat_start + n); never beyond n_total
    int64_t shard_start;   // where it stands in this rank's master/moment arrays
};

struct ht_zero_options {
    int stage;                 // 0 to 3
    int64_t n_matrix, n_total; // multiples of 64
    int64_t bucket_bytes;
    enum ht_dtype wire;        // in which gradients travel: fp32 or bf16
    int n_units;               // stages 2 and 3
    const int64_t *unit_start; // (n_units + 1) ascending multiples of 64 from 0 to n_matrix; copied
    bool keep_first;           // unit 0 is used from the backward pass's start to its end
    enum ht_dtype weight_dtype; // stages 2 and 3: of the matrices' working copies
};

enum ht_status ht_zero_create(struct ht_zero **out, struct ht_comm *comm, struct ht_backend *be,
                              const struct ht_zero_options *o);
void ht_zero_free(struct ht_zero *z);

/* This rank's slices, ascending in both offsets. With one rank and a stage below 2 shard_start
 * equals flat_start. Elements of the shard that no slice names are padding; their gradient is zero.
 */
int ht_zero_n_slices(const struct ht_zero *z);
const struct ht_zero_slice *ht_zero_slices(const struct ht_zero *z);
int64_t ht_zero_shard_size(const struct ht_zero *z); // elements of this rank's master/moment arrays

/* What create allocated: staging, summed gradients, and in stages 2 and 3 the units' places. */
struct ht_zero_bytes {
    size_t staging;   // of messages, padded copies
    size_t gradients; // this rank's sums; units' gradients
    size_t weights;   // stage 3: this rank's part of the matrices, units' weights
};
struct ht_zero_bytes ht_zero_buffer_bytes(const struct ht_zero *z);

/* How long the gradient buffer must be: in stages 0 and 1 n_total rounded up so that the last
 * padded bucket fits. */
int64_t ht_zero_padded_total(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks);

/* Elements of the working copies: weights_m needs the first, weights_v the second (multiples of
 * n_ranks * 64); what lies beyond n_matrix and n_total - n_matrix is scratch of
 * ht_zero_gather_weights. */
int64_t ht_zero_padded_matrix(int64_t n_matrix, int n_ranks);
int64_t ht_zero_padded_vector(int64_t n_matrix, int64_t n_total, int n_ranks);

/* Stages 0 and 1, during the last micro-step's backward pass: all gradients with flat offset >=
 * done (of the matrix part) are final; starts the reduce-scatter of every bucket that is now
 * complete. vectors_done says the same of the whole vector part. */
enum ht_status ht_zero_grads_ready(struct ht_zero *z, float *grad, int64_t done, bool vectors_done);

/* Wait for all; this rank's summed gradient, one fp32 array in shard order (borrowed). In stage 0
 * the sums of all elements in flat order (in the gradient buffer). */
enum ht_status ht_zero_reduced(struct ht_zero *z, float **shard_grad);

/* After the optimiser wrote this rank's slices of the working copies (matrix part in dtype at
 * weights_m, vector part fp32 at weights_v, indexed by flat offset, flat offset - n_matrix): gather
 * all others. Stage 3: weights_m is ht_zero_weight_shard and stays as it is, only the vectors are
 * gathered and the units' weights of before are forgotten. */
enum ht_status ht_zero_gather_weights(struct ht_zero *z, void *weights_m, enum ht_dtype dtype,
                                      float *weights_v);

/* ---- stages 2 and 3: one unit at a time (zero_units.c) ---- */

/* Stage 3: this rank's part of the matrices in weight_dtype, in shard order (owned by z). */
void *ht_zero_weight_shard(const struct ht_zero *z);

/* Stage 3: a unit's weights, whole, until ht_zero_unit_weights_done; starts to gather unit `next`
 * (-1: none). Two units at a time, three with keep_first. */
enum ht_status ht_zero_unit_weights(struct ht_zero *z, int unit, int next, void **out);
void ht_zero_unit_weights_done(struct ht_zero *z, int unit);

/* Stages 2 and 3: a place for the gradient of a unit, zero; then, when the backward pass has
 * written it, start its sum over the ranks, which is added to those of the same step's earlier
 * micro-batches. */
enum ht_status ht_zero_unit_grads(struct ht_zero *z, int unit, float **out);
enum ht_status ht_zero_unit_grads_done(struct ht_zero *z, int unit);

/* Stages 2 and 3: the vector part's gradient (n_total - n_matrix), accumulated over the step's
 * micro-batches, is final. */
enum ht_status ht_zero_vectors_ready(struct ht_zero *z, float *grad_v);

/* The slices of any rank of any size, without communication (checkpoints on other rank counts):
 * what ht_zero_slices would give there in stage 1. free(*out). shard_size may be NULL. */
enum ht_status ht_zero_plan(struct ht_zero_slice **out, int *n_slices, int64_t *shard_size,
                            int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks,
                            int rank);

#endif
