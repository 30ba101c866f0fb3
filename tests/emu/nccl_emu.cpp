/* tests/emu/nccl_emu.cpp: a double of NCCL on the emulated device: bytes travel over MPI.
 *
 * A collective is only queued when it is called, as on a GPU, and runs when somebody waits for an
 * event or a stream behind it; until then its result is not there and its input may not change. It
 * adds in ring order, in the wire's type at every hop. Checked: that the stream had waited for all
 * earlier work of the device, and that no call is made while the last one is still in progress.
 *
 * HT_EMU_NCCL=FAULT:RANK:N     on that rank (-1: all), at the N-th collective (from 1)
 *   hang        it never begins            late        it begins a second later
 *   async       a remote error, and it hangs
 *   call        the call fails             stuck       the call stays in progress
 *   deaf        hang, and the abort hangs too, and the device with it
 *   init-hang   init-error   id-error      while connecting (N is not used)
 */
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <unistd.h>

#define OMPI_SKIP_MPICXX
#include <mpi.h>

#include "tests/emu/emu_impl.h"
#include "tests/emu/nccl/nccl.h"

extern "C" {
#include "core/base/dtype.h"
}

struct ncclComm {
    int rank, size;
    MPI_Comm mpi;
    std::atomic<int> state, polls; // what GetAsyncError says; how often it still says "in progress"
    std::atomic<bool> aborted;
    char error[160];
};

namespace {
struct task {
    ncclComm *comm;
    bool reduce;
    const void *in;
    void *out;
    size_t count, width;
};
std::vector<task> tasks; // ticket t is tasks[t - 1]
std::atomic<uint64_t> n_done;

struct {
    char kind[16];
    int rank, at;
} fault = { "", 0, 0 };

void read_fault()
{
    const char *text = getenv("HT_EMU_NCCL");
    if (!text || sscanf(text, "%15[^:]:%d:%d", fault.kind, &fault.rank, &fault.at) < 1)
        fault.kind[0] = '\0';
}

bool is_fault(const char *kind, int rank, int at)
{
    return strcmp(fault.kind, kind) == 0 && (fault.rank < 0 || fault.rank == rank) &&
           (at < 0 || fault.at == at);
}

/* Sum over ranks for rank r's part, as a ring adds: the next rank's first, its own last. */
void add_ring(const task &t, const char *all)
{
    const int n = t.comm->size, r = t.comm->rank;
    const enum ht_dtype d = t.width == 4 ? HT_DTYPE_F32 : HT_DTYPE_BF16;
    const size_t stride = t.count * (size_t)n * t.width;

    emu_heap_open();
    for (size_t i = 0; i < t.count; i++) {
        const size_t at = (size_t)r * t.count + i;
        float sum = 0.0f;
        for (int k = 1; k <= n; k++) {
            const float v = ht_load_f32(all + stride * (size_t)((r + k) % n), (int64_t)at, d);
            sum = k == 1 ? v : sum + v;
            if (d == HT_DTYPE_BF16) sum = ht_bf16_to_f32(ht_f32_to_bf16(sum));
        }
        ht_store_f32(t.out, (int64_t)i, d, sum);
    }
    emu_heap_close();
}

void run(const task &t, int ticket)
{
    ncclComm *c = t.comm;
    const size_t bytes = t.count * t.width * (size_t)(t.reduce ? c->size : 1);
    std::vector<char> own(bytes + 1), all(bytes * (size_t)c->size + 1);
    MPI_Request req;
    int over = 0;

    if (is_fault("late", c->rank, ticket)) sleep(1);
    while (!c->aborted && (is_fault("hang", c->rank, ticket) || is_fault("async", c->rank, ticket)))
        usleep(1000);
    while (is_fault("deaf", c->rank, ticket)) usleep(1000);
    if (c->aborted) return;
    emu_heap_open();
    memcpy(own.data(), t.in, bytes);
    emu_heap_close();
    MPI_Iallgather(own.data(), (int)bytes, MPI_BYTE, all.data(), (int)bytes, MPI_BYTE, c->mpi,
                   &req);
    while (MPI_Test(&req, &over, MPI_STATUS_IGNORE), !over) {
        if (c->aborted) {
            new std::vector<char>(std::move(own)); // MPI may still read and write these
            new std::vector<char>(std::move(all));
            return;
        }
        usleep(100);
    }
    if (t.reduce) {
        add_ring(t, all.data());
        return;
    }
    emu_heap_open();
    memcpy(t.out, all.data(), bytes * (size_t)c->size);
    emu_heap_close();
}

bool is_done(uint64_t ticket)
{
    return n_done >= ticket;
}

void wait_for(uint64_t ticket)
{
    while (n_done < ticket) {
        run(tasks[n_done], (int)n_done + 1);
        n_done++;
    }
}

ncclResult_t refuse(ncclComm *c, ncclResult_t r, const char *text)
{
    snprintf(c->error, sizeof c->error, "%s", text);
    return r;
}

ncclResult_t enqueue(const task &t, cudaStream_t stream)
{
    ncclComm *c = t.comm;
    const size_t bytes = t.count * t.width;
    const size_t in = t.reduce ? bytes * (size_t)c->size : bytes;
    const size_t out = t.reduce ? bytes : bytes * (size_t)c->size;
    const int n = (int)tasks.size() + 1;

    if (c->state != ncclSuccess && c->state != ncclInProgress) return (ncclResult_t)c->state.load();
    if (c->state == ncclInProgress)
        return refuse(c, ncclInvalidUsage, "called while another call is in progress");
    if (!emu_stream_is_current(stream))
        return refuse(c, ncclInvalidUsage,
                      "the stream did not wait for earlier work of the device");
    if (bytes > 0 && (!emu_heap_valid(t.in, in) || !emu_heap_valid(t.out, out)))
        return refuse(c, ncclInvalidArgument, "a buffer is not inside a device allocation");
    if (is_fault("call", c->rank, n)) return refuse(c, ncclSystemError, "injected");
    tasks.push_back(t);
    emu_stream_defer(stream, tasks.size());
    c->polls = is_fault("stuck", c->rank, n) ? 1 << 30 : 2;
    c->state = ncclInProgress;
    if (is_fault("async", c->rank, n)) {
        snprintf(c->error, sizeof c->error, "injected: the peer closed the connection");
        c->state = ncclRemoteError;
        return ncclSuccess;
    }
    return ncclInProgress;
}
} // namespace

ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    read_fault();
    memset(id, 7, sizeof *id);
    return is_fault("id-error", 0, -1) ? ncclSystemError : ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int n_ranks, ncclUniqueId id, int rank,
                                    ncclConfig_t *config)
{
    read_fault();
    *comm = nullptr;
    if (config->blocking != 0 || id.internal[0] != 7) return ncclInvalidArgument;
    ncclComm *c = new ncclComm{};
    c->rank = rank;
    c->size = n_ranks;
    *comm = c;
    if (is_fault("init-error", rank, -1)) return refuse(c, ncclSystemError, "injected");
    c->state = ncclInProgress;
    c->polls = is_fault("init-hang", -1, -1) || is_fault("init-hang", rank, -1) ? 1 << 30 : 3;
    if (c->polls == 3) MPI_Comm_dup(MPI_COMM_WORLD, &c->mpi);
    emu_later = { is_done, wait_for };
    return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t c, ncclResult_t *error)
{
    if (c->state == ncclInProgress && --c->polls <= 0) c->state = ncclSuccess;
    *error = (ncclResult_t)c->state.load();
    return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t c)
{
    c->polls = 2;
    c->state = ncclInProgress;
    return ncclInProgress;
}

ncclResult_t ncclCommDestroy(ncclComm_t c)
{
    if (c->state == ncclInProgress) return ncclInvalidUsage;
    MPI_Comm_free(&c->mpi);
    delete c;
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t c)
{
    while (strcmp(fault.kind, "deaf") == 0) usleep(1000);
    c->aborted = true; // whoever waits for it is let go
    return ncclSuccess;
}

ncclResult_t ncclReduceScatter(const void *in, void *out, size_t count, ncclDataType_t type,
                               ncclRedOp_t, ncclComm_t comm, cudaStream_t stream)
{
    return enqueue({ comm, true, in, out, count, (size_t)(type == ncclFloat32 ? 4 : 2) }, stream);
}

ncclResult_t ncclAllGather(const void *in, void *out, size_t count, ncclDataType_t, ncclComm_t comm,
                           cudaStream_t stream)
{
    return enqueue({ comm, false, in, out, count, 1 }, stream);
}

const char *ncclGetErrorString(ncclResult_t r)
{
    switch (r) {
    case ncclSuccess: return "no error";
    case ncclInProgress: return "NCCL operation in progress";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclSystemError: return "unhandled system error";
    case ncclInvalidUsage: return "invalid usage";
    default: return "invalid argument";
    }
}

const char *ncclGetLastError(ncclComm_t c)
{
    return c->error;
}
