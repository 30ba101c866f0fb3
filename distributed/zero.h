/* distributed/zero.h: gradient buckets and optimiser sharding (ZeRO-1; Rajbhandari et al. 2020)
 * [8].
 *
 * The flat index space (core/config/tensor_list.h) is cut into buckets of about bucket_bytes of
 * fp32 gradient, the last elements first, as the backward pass finishes them. Bucket b covers
 * [start, end), padded to n_ranks * 64; rank r owns the r-th of n_ranks equal parts. A bucket lies
 * wholly in the matrix part or wholly in the vector part, so that the working copies can be
 * gathered in their own dtype. With one rank, or zero_stage 0, the code path is the same; stage 0
 * keeps whole moments on every rank (all-gather of sums).
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

enum ht_status ht_zero_create(struct ht_zero **out, struct ht_comm *comm, int64_t n_matrix,
                              int64_t n_total, int64_t bucket_bytes, enum ht_dtype wire);
void ht_zero_free(struct ht_zero *z);

/* This rank's slices, ascending in both offsets. With one rank shard_start equals flat_start.
 * Elements of the shard that no slice names are padding; their gradient is zero. */
int ht_zero_n_slices(const struct ht_zero *z);
const struct ht_zero_slice *ht_zero_slices(const struct ht_zero *z);
int64_t ht_zero_shard_size(const struct ht_zero *z); // elements of this rank's master/moment arrays
size_t
ht_zero_buffer_bytes(const struct ht_zero *z); // staging + reduced gradients, allocated by create

/* How long each flat buffer must be: n_total rounded up so that the last padded bucket fits. */
int64_t ht_zero_padded_total(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks);

/* Elements of the working copies: weights_m needs the first, weights_v the second (multiples of
 * n_ranks * 64); what lies beyond n_matrix and n_total - n_matrix is scratch of
 * ht_zero_gather_weights. */
int64_t ht_zero_padded_matrix(int64_t n_matrix, int n_ranks);
int64_t ht_zero_padded_vector(int64_t n_matrix, int64_t n_total, int n_ranks);

/* During the last micro-step's backward pass: all gradients with flat offset >= done (of the matrix
 * part) are final; starts the reduce-scatter of every bucket that is now complete. vectors_done
 * says the same of the whole vector part. */
enum ht_status ht_zero_grads_ready(struct ht_zero *z, float *grad, int64_t done, bool vectors_done);

/* Wait for all; this rank's summed gradient, one fp32 array in shard order (borrowed). */
enum ht_status ht_zero_reduced(struct ht_zero *z, float **shard_grad);

/* After the optimiser wrote this rank's slices of the working copies (matrix part in dtype at
 * weights_m, vector part fp32 at weights_v, indexed by flat offset, flat offset - n_matrix): gather
 * all others. */
enum ht_status ht_zero_gather_weights(struct ht_zero *z, void *weights_m, enum ht_dtype dtype,
                                      float *weights_v);

/* 0 or 1 (the state after create is 1). Stage 0: one slice [0, n_total) on every rank,
 * ht_zero_reduced gives the sums of all elements in flat order (in the gradient buffer),
 * ht_zero_gather_weights does nothing. */
enum ht_status ht_zero_set_stage(struct ht_zero *z, int stage);

/* The slices of any rank of any size, without communication (checkpoints on other rank counts):
 * what ht_zero_slices would give there. free(*out). shard_size may be NULL. */
enum ht_status ht_zero_plan(struct ht_zero_slice **out, int *n_slices, int64_t *shard_size,
                            int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks,
                            int rank);

#endif
