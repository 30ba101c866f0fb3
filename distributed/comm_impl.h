/* distributed/comm_impl.h: what comm_mpi.c and comm_device.c share. */
#ifndef HT_DISTRIBUTED_COMM_IMPL_H
#define HT_DISTRIBUTED_COMM_IMPL_H

#include <mpi.h>

#include "distributed/comm_device.h"
#include "distributed/reduce.h"

enum { HT_COMM_HOST_BYTES = 64 };

struct ht_comm_transfer {
    int peer;
    bool is_recv;
};

struct ht_comm_request {
    struct ht_comm_request *next; // in the active or the free list
    const char *what;
    int64_t seq;
    int n, capacity;             // messages
    MPI_Request *mpi;            // (capacity)
    struct ht_comm_transfer *to; // (capacity)
    bool moved;                  // all messages are through
    struct ht_nccl_op *op;       // on the device instead
    // reduce-scatter: what to add up then
    float *out; // NULL: nothing
    const void **src;
    int64_t n_sum;
    enum ht_dtype wire;
};

struct ht_comm {
    MPI_Comm mpi;
    int rank, size, local_rank, local_size;
    bool own_mpi; // we called MPI_Init
    bool failed;  // MPI may hang from here on
    double timeout_s;
    int64_t seq;
    char (*hosts)[HT_COMM_HOST_BYTES]; // (size)
    struct ht_comm_request *active, *free;
    void *small; // n values of every rank
    size_t small_bytes;
    ht_reduce_sum_fn *sum;
    ht_reduce_round_fn *round;
    // device memory (comm_device.c)
    struct ht_nccl *device;            // NULL: collectives are on host memory
    MPI_Win window;                    // of board
    struct ht_comm_board *board, *own; // of this host's ranks; this rank's
};

/* comm_mpi.c */
enum ht_status ht_comm_request_get(struct ht_comm *c, struct ht_comm_request **out,
                                   const char *what, int n);
void ht_comm_request_put(struct ht_comm *c, struct ht_comm_request *r);

/* comm_device.c: of collectives on the device; without one they do nothing. */
enum ht_status ht_comm_device_check(struct ht_comm *c);
void ht_comm_device_free(struct ht_comm *c);
void ht_comm_device_set_timeout(struct ht_comm *c, double seconds);
enum ht_status ht_comm_device_reduce_scatter(struct ht_comm *c, struct ht_comm_request **out_req,
                                             float *out, const float *in, int64_t n,
                                             enum ht_dtype wire, void *staging);
enum ht_status ht_comm_device_all_gather(struct ht_comm *c, struct ht_comm_request **out_req,
                                         void *data, int64_t n_bytes);
enum ht_status ht_comm_device_wait(struct ht_comm *c, struct ht_comm_request *r);

#endif
