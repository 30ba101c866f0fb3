/* distributed/comm_device.h: collectives on device memory, behind comm.h (internal to the folder).
 *
 * Starting one makes the communication stream wait for what the compute stream has been given so
 * far; waiting for one makes the compute stream wait for it. The host waits for neither.
 */
#ifndef HT_DISTRIBUTED_COMM_DEVICE_H
#define HT_DISTRIBUTED_COMM_DEVICE_H

#include "core/base/backend.h"
#include "distributed/comm.h"

/* How far a rank of this host is: read by the watchdogs of the others. In memory that they share.
 */
struct ht_comm_board {
    int64_t seq; // of the collective that it started last; through __atomic_ functions
    int rank;
};

struct ht_nccl;
struct ht_nccl_op; // a collective under way on the device

struct ht_nccl_options {
    struct ht_comm *comm; // for the exchange of the identifier
    struct ht_backend *be;
    const char *who, *host;
    double timeout_s;
    struct ht_comm_board *board; // (n_board) of this host's ranks, or NULL
    int n_board;
};

/* Collective. One rank also works in a build without NCCL. */
enum ht_status ht_nccl_create(struct ht_nccl **out, const struct ht_nccl_options *o);
void ht_nccl_free(struct ht_nccl *n); // after a failure: leaves the library alone
void ht_nccl_set_timeout(struct ht_nccl *n, double seconds);

/* HT_ERR_COMM with the watchdog's message after a failure. */
enum ht_status ht_nccl_check(struct ht_nccl *n);

/* As in comm.h; seq is the collective's number. */
enum ht_status ht_nccl_reduce_scatter(struct ht_nccl *n, struct ht_nccl_op **out_op, int64_t seq,
                                      float *out, const float *in, int64_t count,
                                      enum ht_dtype wire, void *staging);
enum ht_status ht_nccl_all_gather(struct ht_nccl *n, struct ht_nccl_op **out_op, int64_t seq,
                                  void *data, int64_t n_bytes);
enum ht_status ht_nccl_wait(struct ht_nccl *n, struct ht_nccl_op *op);

#endif
