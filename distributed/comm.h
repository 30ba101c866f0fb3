/* distributed/comm.h: collectives of a data-parallel run over MPI (host memory) or NCCL (device
 * memory).
 *
 * Sums run in rank order on every rank, so a run gives the same bits each time. All calls come from
 * the one thread that called ht_comm_init. A failing rank calls ht_comm_abort: the others end with
 * it.
 */
#ifndef HT_DISTRIBUTED_COMM_H
#define HT_DISTRIBUTED_COMM_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/dtype.h"
#include "core/base/status.h"

struct ht_comm;
struct ht_comm_request; // a collective under way

/* MPI_Init_thread; also works without mpirun (one rank). */
enum ht_status ht_comm_init(struct ht_comm **out, int *argc, char ***argv);
void ht_comm_finalize(struct ht_comm *c);

int ht_comm_rank(const struct ht_comm *c);
int ht_comm_size(const struct ht_comm *c);
int ht_comm_local_rank(const struct ht_comm *c); // on this host
int ht_comm_local_size(const struct ht_comm *c);

/* Print message with the rank to stderr and take all ranks down with this exit code. c may be NULL
 * (before init). The only way out after HT_ERR_COMM: ht_comm_finalize then leaves MPI alone, which
 * would hang. */
void ht_comm_abort(struct ht_comm *c, int exit_code, const char *message) __attribute__((noreturn));

/* What a collective waits for at most before HT_ERR_COMM names it, its sequence number, this rank
 * and the ranks whose messages are missing, with their hosts. 300 s after init. ht_comm_test never
 * times out. */
void ht_comm_set_timeout(struct ht_comm *c, double seconds);

/* From here on reduce-scatter and all-gather work on memory of that backend. On CUDA: device memory
 * through NCCL (bootstrapped over MPI) on the communication stream, ordered with the compute stream
 * by events: start and wait only enqueue, and a peer that is missing is found by a thread that
 * watches (watchdog.h); the next call of anything here then gives HT_ERR_COMM. NCCL's sums are in
 * the order of its ring, the same on every run with the same ranks and machines (docs/cluster.md).
 * On the CPU nothing changes. be NULL: back to host memory, before the backend is freed.
 * Collective. */
struct ht_backend;
enum ht_status ht_comm_use_device(struct ht_comm *c, struct ht_backend *be);

enum ht_status ht_comm_barrier(struct ht_comm *c);
enum ht_status ht_comm_broadcast(struct ht_comm *c, void *data, int64_t n_bytes, int root);

/* Element-wise over ranks, in rank order, in place. The maximum of a NaN and anything is NaN. */
enum ht_status ht_comm_sum_f64(struct ht_comm *c, double *x, int n);
enum ht_status ht_comm_max_f64(struct ht_comm *c, double *x, int n);
enum ht_status ht_comm_min_i64(struct ht_comm *c, int64_t *x, int n);
enum ht_status ht_comm_max_i64(struct ht_comm *c, int64_t *x, int n);

/* Reduce-scatter of n * size fp32 values: rank r receives the sum over ranks of in[r*n .. (r+1)*n)
 * into out (n); out may be &in[rank*n]. wire BF16 halves the traffic (each contribution is rounded
 * once; sums stay fp32). `staging` holds ht_comm_staging_bytes and both buffers are untouchable
 * until wait. */
enum ht_status ht_comm_reduce_scatter_start(struct ht_comm *c, struct ht_comm_request **out_req,
                                            float *out, const float *in, int64_t n,
                                            enum ht_dtype wire, void *staging);
/* In-place all-gather: rank r's bytes stand at data + r*n_bytes. */
enum ht_status ht_comm_all_gather_start(struct ht_comm *c, struct ht_comm_request **out_req,
                                        void *data, int64_t n_bytes);
size_t ht_comm_staging_bytes(const struct ht_comm *c, int64_t n, enum ht_dtype wire);

enum ht_status ht_comm_wait(struct ht_comm *c, struct ht_comm_request **req); // frees; NULL is fine
void ht_comm_progress(
    struct ht_comm *c); // let transfers advance between layers of the backward pass

/* A barrier that can be polled: start, then test until *done (used while a checkpoint is written).
 */
enum ht_status ht_comm_ibarrier_start(struct ht_comm *c, struct ht_comm_request **out_req);
enum ht_status ht_comm_test(struct ht_comm *c, struct ht_comm_request **req, bool *done);

#endif
