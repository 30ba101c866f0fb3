/* distributed/comm_device.c: when a communicator works on device memory, and how far its ranks are.
 */
#include <inttypes.h>
#include <stdio.h>

#include "distributed/comm_impl.h"

/* Which library moves device memory. */
static const struct {
    enum ht_status (*create)(struct ht_nccl **, const struct ht_nccl_options *);
    void (*free)(struct ht_nccl *);
    void (*set_timeout)(struct ht_nccl *, double);
    enum ht_status (*check)(struct ht_nccl *);
    enum ht_status (*reduce_scatter)(struct ht_nccl *, struct ht_nccl_op **, int64_t, float *,
                                     const float *, int64_t, enum ht_dtype, void *);
    enum ht_status (*all_gather)(struct ht_nccl *, struct ht_nccl_op **, int64_t, void *, int64_t);
    enum ht_status (*wait)(struct ht_nccl *, struct ht_nccl_op *);
} ops[HT_BACKEND_COUNT] = {
#ifdef HT_WITH_CUDA
    [HT_BACKEND_CUDA] = { ht_nccl_create, ht_nccl_free, ht_nccl_set_timeout, ht_nccl_check,
                          ht_nccl_reduce_scatter, ht_nccl_all_gather, ht_nccl_wait },
#endif
};

/* A line for every rank of this host, in memory that all of them see. Without one (some MPI
 * libraries cannot) messages say less. */
static void create_board(struct ht_comm *c)
{
    MPI_Comm local = MPI_COMM_NULL;
    MPI_Aint bytes = 0;
    int unit = 0;
    void *mine = NULL, *first = NULL;

    if (MPI_Comm_split_type(c->mpi, MPI_COMM_TYPE_SHARED, c->rank, MPI_INFO_NULL, &local)) return;
    MPI_Comm_set_errhandler(local, MPI_ERRORS_RETURN);
    if (MPI_Win_allocate_shared(sizeof *c->own, sizeof *c->own, MPI_INFO_NULL, local, &mine,
                                &c->window) == MPI_SUCCESS) {
        c->own = mine;
        c->own->rank = c->rank;
        __atomic_store_n(&c->own->seq, c->seq, __ATOMIC_RELEASE);
        MPI_Barrier(local); // written before anybody reads
        if (MPI_Win_shared_query(c->window, 0, &bytes, &unit, &first) == MPI_SUCCESS)
            c->board = first;
    } else {
        c->window = MPI_WIN_NULL;
    }
    MPI_Comm_free(&local);
}

enum ht_status ht_comm_use_device(struct ht_comm *c, struct ht_backend *be)
{
    char who[HT_COMM_HOST_BYTES + 64];

    if (!be) {
        ht_comm_device_free(c);
        return HT_OK;
    }
    if (!ops[be->kind].create) return HT_OK; // host memory
    if (c->device || c->active)
        return HT_FAIL(HT_ERR_ARG, "collectives cannot move to the device: %s",
                       c->device ? "they are there" : "some are under way");
    snprintf(who, sizeof who, "rank %d of %d on %s", c->rank, c->size, c->hosts[c->rank]);
    create_board(c);
    return ops[be->kind].create(&c->device, &(struct ht_nccl_options){ .comm = c,
                                                                       .be = be,
                                                                       .who = who,
                                                                       .host = c->hosts[c->rank],
                                                                       .timeout_s = c->timeout_s,
                                                                       .board = c->board,
                                                                       .n_board = c->local_size });
}

enum ht_status ht_comm_device_check(struct ht_comm *c)
{
    if (!c->device) return HT_OK;
    const enum ht_status st = ops[HT_BACKEND_CUDA].check(c->device);
    if (st != HT_OK) c->failed = true;
    return st;
}

void ht_comm_device_free(struct ht_comm *c)
{
    if (c->device) ops[HT_BACKEND_CUDA].free(c->device);
    c->device = NULL;
    if (c->window != MPI_WIN_NULL && !c->failed) MPI_Win_free(&c->window);
    c->own = c->board = NULL;
}

enum ht_status ht_comm_device_reduce_scatter(struct ht_comm *c, struct ht_comm_request **out_req,
                                             float *out, const float *in, int64_t n,
                                             enum ht_dtype wire, void *staging)
{
    HT_TRY(ht_comm_request_get(c, out_req, "reduce-scatter", 0));
    return ops[HT_BACKEND_CUDA].reduce_scatter(c->device, &(*out_req)->op, (*out_req)->seq, out, in,
                                               n, wire, staging);
}

enum ht_status ht_comm_device_all_gather(struct ht_comm *c, struct ht_comm_request **out_req,
                                         void *data, int64_t n_bytes)
{
    HT_TRY(ht_comm_request_get(c, out_req, "all-gather", 0));
    return ops[HT_BACKEND_CUDA].all_gather(c->device, &(*out_req)->op, (*out_req)->seq, data,
                                           n_bytes);
}

enum ht_status ht_comm_device_wait(struct ht_comm *c, struct ht_comm_request *r)
{
    struct ht_nccl_op *op = r->op;

    r->op = NULL;
    ht_comm_request_put(c, r);
    HT_TRY(ht_comm_device_check(c));
    return ops[HT_BACKEND_CUDA].wait(c->device, op);
}

void ht_comm_device_set_timeout(struct ht_comm *c, double seconds)
{
    if (c->device) ops[HT_BACKEND_CUDA].set_timeout(c->device, seconds);
}
