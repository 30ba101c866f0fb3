/* distributed/comm_nccl.cu: NCCL on the communication stream (comm_device.h).
 *
 *   compute  --- kernels ---o ready              wait o--- kernels that use the result ---
 *                            \                       /
 *   comm          ------------o wait -- collective --o done
 *
 * The communicator is non-blocking: no call of NCCL keeps this thread, so the watchdog's thread,
 * which asks for errors and may abort at any time, shares it under a lock. NCCL_ALGO is set to Ring
 * unless the user has: a ring adds in the order of its ranks, which is the same on every run; trees
 * and switches (NVLS) do not promise that. The library is loaded at run time (libnccl.so.2), so
 * that the programs start where there is none.
 */
#include "core/base/cuda_kernel.h"

#include <pthread.h>
#include <unistd.h>

#ifdef HT_WITH_NCCL
#include <nccl.h>
#endif

#ifndef HT_CUDA_EMU
#include <dlfcn.h>
#endif

extern "C" {
#include "core/base/file.h"
#include "distributed/comm_device.h"
#include "distributed/reduce.h"
#include "distributed/watchdog.h"
}

/* For the training thread to come back from the device after a failure. Tests cannot wait that
 * long.
 */
static double grace_s()
{
    const char *text = getenv("HT_COMM_GRACE_S");
    const double s = text ? atof(text) : 0.0;
    return s > 0.0 ? s : 30.0;
}

struct ht_nccl_op {
    struct ht_nccl_op *next;
    const char *what;
    int64_t seq, n_bytes;
    cudaEvent_t ready, done; // it may begin; it is over
    bool waited, finished;   // by the compute stream; as the watchdog saw it
    float *widen_out;        // a bf16 wire's sums, back to fp32
    const void *widen_in;
    int64_t n;
};

#ifdef HT_WITH_NCCL
#define NCCL_FUNCTIONS(f)                                                                          \
    f(ncclGetUniqueId) f(ncclCommInitRankConfig) f(ncclCommGetAsyncError) f(ncclCommFinalize)      \
        f(ncclCommDestroy) f(ncclCommAbort) f(ncclReduceScatter) f(ncclAllGather)                  \
            f(ncclGetErrorString) f(ncclGetLastError)
struct nccl_api {
#define NCCL_MEMBER(function) decltype(&::function) function;
    NCCL_FUNCTIONS(NCCL_MEMBER)
};
#endif

struct ht_nccl {
    struct ht_backend *be;
    int rank, size;
    char who[160], host[64];
    double timeout_s;
    struct ht_comm_board *board;
    int n_board;
#ifdef HT_WITH_NCCL
    struct nccl_api api;
    ncclComm_t comm;
#endif
    pthread_mutex_t lock;               // of all below
    bool aborted;                       // comm is no more
    struct ht_nccl_op *oldest, *newest; // under way, in the order of the stream
    struct ht_nccl_op *free;
    struct ht_watchdog *watchdog;
};

static cudaStream_t compute_stream(const struct ht_nccl *n)
{
    return (cudaStream_t)ht_cuda_device_of(n->be)->compute;
}
static cudaStream_t comm_stream(const struct ht_nccl *n)
{
    return (cudaStream_t)ht_cuda_device_of(n->be)->comm;
}

/* ---- collectives under way ---- */

/* Under the lock: what is over leaves the queue; it is free once the compute stream waited too. */
static void reap(struct ht_nccl *n)
{
    while (n->oldest && cudaEventQuery(n->oldest->done) == cudaSuccess) {
        struct ht_nccl_op *op = n->oldest;
        n->oldest = op->next;
        if (!n->oldest) n->newest = NULL;
        op->finished = true;
        if (!op->waited) continue;
        op->next = n->free;
        n->free = op;
    }
}

static enum ht_status op_get(struct ht_nccl *n, struct ht_nccl_op **out, const char *what,
                             int64_t seq, int64_t n_bytes)
{
    enum ht_status st = HT_OK;
    struct ht_nccl_op *op;

    *out = NULL;
    pthread_mutex_lock(&n->lock);
    reap(n);
    op = n->free;
    if (op) n->free = op->next;
    pthread_mutex_unlock(&n->lock);
    if (!op) {
        op = (struct ht_nccl_op *)calloc(1, sizeof *op);
        if (!op) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", what);
        st = ht_cuda_check(cudaEventCreateWithFlags(&op->ready, cudaEventDisableTiming), "event");
        if (st == HT_OK)
            st =
                ht_cuda_check(cudaEventCreateWithFlags(&op->done, cudaEventDisableTiming), "event");
        if (st != HT_OK) {
            free(op);
            return st;
        }
    }
    op->next = NULL;
    op->what = what;
    op->seq = seq;
    op->n_bytes = n_bytes;
    op->waited = op->finished = false;
    op->widen_out = NULL;
    *out = op;
    return HT_OK;
}

/* The communication stream waits for the compute stream as it is now. */
static enum ht_status op_begin(struct ht_nccl *n, struct ht_nccl_op *op)
{
    HT_TRY(ht_cuda_check(cudaEventRecord(op->ready, compute_stream(n)), op->what));
    return ht_cuda_check(cudaStreamWaitEvent(comm_stream(n), op->ready, 0), op->what);
}

static enum ht_status op_enqueued(struct ht_nccl *n, struct ht_nccl_op *op)
{
    HT_TRY(ht_cuda_check(cudaEventRecord(op->done, comm_stream(n)), op->what));
    pthread_mutex_lock(&n->lock);
    if (n->newest)
        n->newest->next = op;
    else
        n->oldest = op;
    n->newest = op;
    pthread_mutex_unlock(&n->lock);
    return HT_OK;
}

extern "C" enum ht_status ht_nccl_wait(struct ht_nccl *n, struct ht_nccl_op *op)
{
    HT_TRY(ht_cuda_check(cudaStreamWaitEvent(compute_stream(n), op->done, 0), op->what));
    float *const out = op->widen_out;
    const void *const in = op->widen_in;
    const int64_t count = op->n;
    pthread_mutex_lock(&n->lock);
    op->waited = true;
    if (op->finished) {
        op->next = n->free;
        n->free = op;
    }
    pthread_mutex_unlock(&n->lock);
    return out ? ht_reduce_widen_cuda(n->be, out, in, count) : HT_OK;
}

extern "C" enum ht_status ht_nccl_check(struct ht_nccl *n)
{
    const char *text = ht_watchdog_failure(n->watchdog);
    return text ? HT_FAIL(HT_ERR_COMM, "%s", text) : HT_OK;
}

extern "C" void ht_nccl_set_timeout(struct ht_nccl *n, double seconds)
{
    n->timeout_s = seconds;
    if (n->watchdog) ht_watchdog_set_timeout(n->watchdog, seconds);
}

#ifdef HT_WITH_NCCL

/* ---- the library ---- */

static enum ht_status load(struct ht_nccl *n)
{
#ifdef HT_CUDA_EMU
#define NCCL_LOAD(function) n->api.function = &::function;
#else
    void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL); // stays for the process's life
    if (!library) library = dlopen(HT_CUDA_LIBRARY_DIR "/libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "NCCL: %s; install libnccl2 or name its folder in LD_LIBRARY_PATH",
                       dlerror());
#define NCCL_LOAD(function)                                                                        \
    *(void **)(&n->api.function) = dlsym(library, #function);                                      \
    if (!n->api.function)                                                                          \
        return HT_FAIL(HT_ERR_UNSUPPORTED, "libnccl.so.2 has no " #function "; 2.18 or newer");
#endif
    NCCL_FUNCTIONS(NCCL_LOAD)
    return HT_OK;
}

static enum ht_status nccl_fail(struct ht_nccl *n, ncclResult_t r, const char *what, int64_t seq)
{
    const char *detail = n->comm && !n->aborted ? n->api.ncclGetLastError(n->comm) : NULL;

    return HT_FAIL(HT_ERR_COMM, "%s: %s %lld: NCCL: %s%s%s", n->who, what, (long long)seq,
                   n->api.ncclGetErrorString(r), detail && *detail ? ": " : "",
                   detail ? detail : "");
}

/* A call of a non-blocking communicator has returned r: until it is through, or the time is up. */
static enum ht_status settle(struct ht_nccl *n, ncclResult_t r, const char *what, int64_t seq)
{
    const double start_s = ht_time_s();

    while (r == ncclInProgress) {
        HT_TRY(ht_nccl_check(n));
        if (ht_time_s() - start_s > n->timeout_s)
            return HT_FAIL(HT_ERR_COMM,
                           "%s: %s %lld: NCCL did not accept it within %g s; a rank is missing or "
                           "the network between GPUs is down (NCCL_DEBUG=INFO says more)",
                           n->who, what, (long long)seq, n->timeout_s);
        usleep(200);
        pthread_mutex_lock(&n->lock);
        const ncclResult_t asked =
            n->aborted ? ncclSystemError : n->api.ncclCommGetAsyncError(n->comm, &r);
        pthread_mutex_unlock(&n->lock);
        if (asked != ncclSuccess) r = asked;
    }
    return r == ncclSuccess ? HT_OK : nccl_fail(n, r, what, seq);
}

/* ---- what the watchdog asks ---- */

static void watch_begin(void *user)
{
    struct ht_nccl *n = (struct ht_nccl *)user;
    (void)cudaSetDevice(ht_cuda_device_of(n->be)->ordinal); // of this thread
}

static bool watch_running(void *user, struct ht_watched *out)
{
    struct ht_nccl *n = (struct ht_nccl *)user;
    bool running = false;

    pthread_mutex_lock(&n->lock);
    reap(n);
    // not before its input is computed: the host may be a whole step ahead of the device
    if (n->oldest && cudaEventQuery(n->oldest->ready) == cudaSuccess) {
        *out = (struct ht_watched){ n->oldest->what, n->oldest->seq, n->oldest->n_bytes };
        running = true;
    }
    pthread_mutex_unlock(&n->lock);
    return running;
}

static bool watch_error(void *user, char *text, size_t n_text)
{
    struct ht_nccl *n = (struct ht_nccl *)user;
    ncclResult_t r = ncclSuccess;

    pthread_mutex_lock(&n->lock);
    if (!n->aborted && n->comm && n->api.ncclCommGetAsyncError(n->comm, &r) == ncclSuccess &&
        r != ncclSuccess && r != ncclInProgress) {
        const char *detail = n->api.ncclGetLastError(n->comm);
        snprintf(text, n_text, "NCCL: %s%s%s", n->api.ncclGetErrorString(r),
                 detail && *detail ? ": " : "", detail ? detail : "");
    } else {
        r = ncclSuccess;
    }
    pthread_mutex_unlock(&n->lock);
    return r != ncclSuccess && r != ncclInProgress;
}

static void watch_peers(void *user, const struct ht_watched *w, char *text, size_t n_text)
{
    const struct ht_nccl *n = (const struct ht_nccl *)user;
    size_t at = 0;
    int n_found = 0;

    text[0] = '\0';
    for (int i = 0; n->board && i < n->n_board; i++) {
        const int64_t seq = __atomic_load_n(&n->board[i].seq, __ATOMIC_ACQUIRE);
        if (seq >= w->seq || ++n_found > 8) continue;
        const int k = snprintf(text + at, n_text - at, "%srank %d on %s is at collective %lld",
                               at ? ", " : "", n->board[i].rank, n->host, (long long)seq);
        if (k > 0) at = at + (size_t)k < n_text ? at + (size_t)k : n_text - 1;
    }
    if (n_found > 8) snprintf(text + at, n_text - at, " and %d more", n_found - 8);
    if (n_found == 0)
        snprintf(text, n_text, "all ranks of this host are in it; %s",
                 n->n_board < n->size ? "see what those of other hosts say"
                                      : "a GPU or a link between them hangs");
}

static void watch_abort(void *user)
{
    struct ht_nccl *n = (struct ht_nccl *)user;

    pthread_mutex_lock(&n->lock);
    ncclComm_t comm = n->aborted ? NULL : n->comm;
    n->aborted = true; // nobody uses it from here on
    pthread_mutex_unlock(&n->lock);
    if (comm) (void)n->api.ncclCommAbort(comm);
}

/* ---- life ---- */

static enum ht_status connect(struct ht_nccl *n, struct ht_comm *c)
{
    // what failed stands at byte 0 of everybody's message
    struct {
        int failed;
        ncclUniqueId id;
    } first = {};
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;

    setenv("NCCL_ALGO", "Ring", 0);
    HT_TRY(load(n));
    if (n->rank == 0) first.failed = n->api.ncclGetUniqueId(&first.id) != ncclSuccess;
    HT_TRY(ht_comm_broadcast(c, &first, sizeof first, 0));
    if (first.failed)
        return HT_FAIL(HT_ERR_COMM,
                       "%s: NCCL found no way to start on rank 0's host (its network "
                       "interfaces: NCCL_SOCKET_IFNAME)",
                       n->who);
    config.blocking = 0;
    const ncclResult_t r =
        n->api.ncclCommInitRankConfig(&n->comm, n->size, first.id, n->rank, &config);
    if (r != ncclSuccess && r != ncclInProgress) return nccl_fail(n, r, "connecting", 0);
    return settle(n, r, "connecting", 0);
}

static enum ht_status create_comm(struct ht_nccl *n, struct ht_comm *c)
{
    const struct ht_watchdog_source source = { n,           watch_begin, watch_running,
                                               watch_error, watch_peers, watch_abort };

    const enum ht_status st = connect(n, c);
    if (st != HT_OK) {
        if (n->comm) watch_abort(n);
        return st;
    }
    return ht_watchdog_create(&n->watchdog, &source, n->who, n->timeout_s, grace_s());
}

static void free_comm(struct ht_nccl *n)
{
    ncclResult_t r = ncclSuccess;

    if (!n->comm || n->aborted) return;
    r = n->api.ncclCommFinalize(n->comm);
    for (int i = 0; r == ncclInProgress && i < 50000; i++) { // 10 s
        usleep(200);
        if (n->api.ncclCommGetAsyncError(n->comm, &r) != ncclSuccess) break;
    }
    if (r == ncclSuccess)
        (void)n->api.ncclCommDestroy(n->comm);
    else
        (void)n->api.ncclCommAbort(n->comm);
    n->comm = NULL;
}

/* One call of the library, under the lock, then until it is accepted. */
template <typename F>
static enum ht_status enqueue(struct ht_nccl *n, struct ht_nccl_op *op, F call)
{
    ncclResult_t r = ncclSystemError;

    pthread_mutex_lock(&n->lock);
    if (!n->aborted) r = call();
    pthread_mutex_unlock(&n->lock);
    HT_TRY(ht_nccl_check(n));
    if (r != ncclSuccess && r != ncclInProgress) return nccl_fail(n, r, op->what, op->seq);
    return settle(n, r, op->what, op->seq);
}

static enum ht_status call_reduce_scatter(struct ht_nccl *n, struct ht_nccl_op *op, const void *in,
                                          void *out, int64_t count, enum ht_dtype wire)
{
    const ncclDataType_t type = wire == HT_DTYPE_F32 ? ncclFloat32 : ncclBfloat16;
    return enqueue(n, op, [&] {
        return n->api.ncclReduceScatter(in, out, (size_t)count, type, ncclSum, n->comm,
                                        comm_stream(n));
    });
}

static enum ht_status call_all_gather(struct ht_nccl *n, struct ht_nccl_op *op, void *data,
                                      int64_t n_bytes)
{
    return enqueue(n, op, [&] {
        return n->api.ncclAllGather((char *)data + n->rank * n_bytes, data, (size_t)n_bytes,
                                    ncclUint8, n->comm, comm_stream(n));
    });
}

#else // one rank needs no library

static enum ht_status create_comm(struct ht_nccl *n, struct ht_comm *c)
{
    (void)c;
    if (n->size == 1) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED,
                   "this build has no NCCL, which %d GPUs need; install its "
                   "header (libnccl-dev) and build again",
                   n->size);
}

static void free_comm(struct ht_nccl *n)
{
    (void)n;
}

static enum ht_status call_reduce_scatter(struct ht_nccl *n, struct ht_nccl_op *op, const void *in,
                                          void *out, int64_t count, enum ht_dtype wire)
{
    if (in == out) return HT_OK;
    return ht_cuda_check(cudaMemcpyAsync(out, in, (size_t)count * ht_dtype_bytes(wire),
                                         cudaMemcpyDeviceToDevice, comm_stream(n)),
                         op->what);
}

static enum ht_status call_all_gather(struct ht_nccl *n, struct ht_nccl_op *op, void *data,
                                      int64_t n_bytes)
{
    (void)n, (void)op, (void)data, (void)n_bytes;
    return HT_OK;
}

#endif

extern "C" enum ht_status ht_nccl_create(struct ht_nccl **out, const struct ht_nccl_options *o)
{
    struct ht_nccl *n = (struct ht_nccl *)calloc(1, sizeof *n);

    *out = NULL;
    if (!n) return HT_FAIL(HT_ERR_MEMORY, "no memory for a communicator of GPUs");
    n->be = o->be;
    n->rank = ht_comm_rank(o->comm);
    n->size = ht_comm_size(o->comm);
    n->timeout_s = o->timeout_s;
    n->board = o->board;
    n->n_board = o->n_board;
    snprintf(n->who, sizeof n->who, "%s", o->who);
    snprintf(n->host, sizeof n->host, "%s", o->host);
    pthread_mutex_init(&n->lock, NULL);
    const enum ht_status st = create_comm(n, o->comm);
    if (st != HT_OK) {
        ht_nccl_free(n);
        return st;
    }
    *out = n;
    return HT_OK;
}

static void free_ops(struct ht_nccl_op *op)
{
    while (op) {
        struct ht_nccl_op *next = op->next;
        (void)cudaEventDestroy(op->ready);
        (void)cudaEventDestroy(op->done);
        free(op);
        op = next;
    }
}

extern "C" void ht_nccl_free(struct ht_nccl *n)
{
    if (!n) return;
    const bool failed = ht_watchdog_failure(n->watchdog) != NULL;
    ht_watchdog_free(n->watchdog);
    if (failed) return; // the abort may still be under way
    (void)cudaStreamSynchronize(comm_stream(n));
    free_comm(n);
    free_ops(n->oldest);
    free_ops(n->free);
    pthread_mutex_destroy(&n->lock);
    free(n);
}

/* ---- collectives ---- */

extern "C" enum ht_status ht_nccl_reduce_scatter(struct ht_nccl *n, struct ht_nccl_op **out_op,
                                                 int64_t seq, float *out, const float *in,
                                                 int64_t count, enum ht_dtype wire, void *staging)
{
    const int64_t bytes = count * (int64_t)ht_dtype_bytes(wire);
    // one rank: nothing travels, so nothing is rounded either
    const bool rounds = wire == HT_DTYPE_BF16 && n->size > 1;
    struct ht_nccl_op *op;

    HT_TRY(op_get(n, &op, "reduce-scatter", seq, bytes));
    *out_op = op;
    if (!rounds) {
        HT_TRY(op_begin(n, op));
        HT_TRY(call_reduce_scatter(n, op, in, out, count, HT_DTYPE_F32));
        return op_enqueued(n, op);
    }
    char *const sums = (char *)staging + n->size * bytes;
    HT_TRY(ht_reduce_round_cuda(n->be, staging, in, n->size * count));
    HT_TRY(op_begin(n, op));
    HT_TRY(call_reduce_scatter(n, op, staging, sums, count, HT_DTYPE_BF16));
    op->widen_out = out;
    op->widen_in = sums;
    op->n = count;
    return op_enqueued(n, op);
}

extern "C" enum ht_status ht_nccl_all_gather(struct ht_nccl *n, struct ht_nccl_op **out_op,
                                             int64_t seq, void *data, int64_t n_bytes)
{
    struct ht_nccl_op *op;

    HT_TRY(op_get(n, &op, "all-gather", seq, n_bytes));
    *out_op = op;
    HT_TRY(op_begin(n, op));
    HT_TRY(call_all_gather(n, op, data, n_bytes));
    return op_enqueued(n, op);
}
