/* tests/emu/emu_memory.cpp: the emulated device's memory and runtime (emu_runtime.h).
 *
 * Device memory is one range of addresses without access rights; kernels and copies open it. So a
 * device pointer that host code follows faults at once, as on a machine with a GPU. Allocations
 * never return to the range's start: what was freed stays invalid.
 */
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <sys/mman.h>

#include "tests/emu/emu_impl.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMU_ASAN 1
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define EMU_ASAN 0
#endif

namespace {
constexpr size_t kHeapBytes = (size_t)64 << 30; // addresses, not memory
constexpr size_t kAlign = 256, kRedZone = 256;
constexpr size_t kBeyond = (size_t)1
                           << 20; // open to kernels, so that the check reports, not a fault

struct allocation {
    size_t begin, bytes;
    bool live;
};

unsigned char *heap;
size_t heap_used;                    // heap_used: up to where the range is opened
std::vector<allocation> allocations; // by rising address
int heap_opened;
cudaError_t last_error;

size_t page_round(size_t n)
{
    return (n + 4095) & ~(size_t)4095;
}

cudaError_t fail(cudaError_t e)
{
    last_error = e;
    return e;
}
} // namespace

void emu_heap_open()
{
    if (heap && heap_opened++ == 0)
        mprotect(heap, page_round(heap_used) + kBeyond, PROT_READ | PROT_WRITE);
}

void emu_heap_close()
{
    if (heap && --heap_opened == 0) mprotect(heap, page_round(heap_used) + kBeyond, PROT_NONE);
}

bool emu_heap_contains(const void *p)
{
    return heap && (uintptr_t)p - (uintptr_t)heap < kHeapBytes;
}

bool emu_heap_valid(const void *p, size_t bytes)
{
    static size_t last; // the same array is likely next
    const size_t at = (size_t)((const unsigned char *)p - heap);

    if (!emu_heap_contains(p)) return false;
    if (last < allocations.size() && at >= allocations[last].begin &&
        at + bytes <= allocations[last].begin + allocations[last].bytes && allocations[last].live)
        return true;
    size_t lo = 0, hi = allocations.size();
    while (lo < hi) { // the last one that begins at or before `at`
        const size_t mid = (lo + hi) / 2;
        if (allocations[mid].begin <= at)
            lo = mid + 1;
        else
            hi = mid;
    }
    if (lo == 0) return false;
    const allocation &a = allocations[lo - 1];
    last = lo - 1;
    return a.live && at + bytes <= a.begin + a.bytes;
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    *p = nullptr;
    if (!heap) {
        void *m = mmap(nullptr, kHeapBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
        if (m == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
        heap = (unsigned char *)m;
    }
    const size_t begin = heap_used, span = (bytes + kRedZone + kAlign - 1) / kAlign * kAlign;
    if (span < bytes || begin + span + kBeyond > kHeapBytes) return fail(cudaErrorMemoryAllocation);
    heap_used += span;
    // new memory of a GPU holds anything: NaN finds who counts on zeros
    mprotect(heap, page_round(heap_used) + kBeyond, PROT_READ | PROT_WRITE);
    ASAN_UNPOISON_MEMORY_REGION(heap + begin, span);
    memset(heap + begin, 0xff, span);
    ASAN_POISON_MEMORY_REGION(heap + begin + bytes, span - bytes);
    if (heap_opened == 0) mprotect(heap, page_round(heap_used) + kBeyond, PROT_NONE);
    allocations.push_back({ begin, bytes, true });
    *p = heap + begin;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p)
{
    if (!p) return cudaSuccess;
    for (size_t i = 0; i < allocations.size(); i++) {
        allocation &a = allocations[i];
        if (heap + a.begin != p || !a.live) continue;
        a.live = false;
        ASAN_POISON_MEMORY_REGION(p, a.bytes);
        // give the pages back; the addresses are not used again while anything is alive
        const size_t from = page_round(a.begin), to = (a.begin + a.bytes) & ~(size_t)4095;
        if (to > from) madvise(heap + from, to - from, MADV_DONTNEED);
        bool any = false;
        for (const allocation &b : allocations) any |= b.live;
        if (!any) allocations.clear(), heap_used = 0;
        return cudaSuccess;
    }
    return fail(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned)
{
    *p = malloc(bytes ? bytes : 1);
    return *p ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t)
{
    emu_count_work();
    const bool to_device = kind != cudaMemcpyDeviceToHost,
               from_device = kind != cudaMemcpyHostToDevice;

    if (bytes == 0) return cudaSuccess;
    if ((to_device ? !emu_heap_valid(dst, bytes) : emu_heap_contains(dst)) ||
        (from_device ? !emu_heap_valid(src, bytes) : emu_heap_contains(src)))
        return fail(cudaErrorInvalidValue);
    emu_heap_open();
    memmove(dst, src, bytes);
    emu_heap_close();
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *dst, int value, size_t bytes, cudaStream_t)
{
    emu_count_work();
    if (bytes == 0) return cudaSuccess;
    if (!emu_heap_valid(dst, bytes)) return fail(cudaErrorInvalidValue);
    emu_heap_open();
    memset(dst, value, bytes);
    emu_heap_close();
    return cudaSuccess;
}

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *n)
{
    *n = 1;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    return device == 0 ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int)
{
    snprintf(p->name, sizeof p->name, "emulated");
    memset(&p->uuid, 1, sizeof p->uuid); // every process has the same device
    p->totalGlobalMem = kHeapBytes;
    return cudaSuccess;
}

/* HT_EMU_ARCH=89: a device that has fp8; nothing else depends on it below 90. */
static int emulated_arch(void)
{
    const char *arch = getenv("HT_EMU_ARCH");
    return arch ? atoi(arch) : EMU_ARCH;
}

cudaError_t cudaDeviceGetAttribute(int *v, enum cudaDeviceAttr attr, int)
{
    switch (attr) {
    case cudaDevAttrMultiProcessorCount: *v = EMU_SMS; break;
    case cudaDevAttrComputeCapabilityMajor: *v = emulated_arch() / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *v = emulated_arch() % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *v = EMU_SMEM_MAX; break;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

/* ---- streams and events: work is done at once, in the order of the calls, but for what
 * nccl_emu.cpp defers ---- */

struct ht_emu_stream {
    std::atomic<uint64_t> ticket{ 0 }; // of the last deferred work that it has or waits for
    uint64_t work = 0;                 // kernels and copies that it waited for
    bool deferred = false;
};
struct ht_emu_event {
    std::atomic<uint64_t> ticket{ 0 };
    uint64_t work = 0;
};

static bool nothing_later(uint64_t)
{
    return true;
}
static void no_wait(uint64_t) {}

struct emu_later_hooks emu_later = { nothing_later, no_wait };
static uint64_t work;

void emu_count_work()
{
    work++;
}

void emu_stream_defer(cudaStream_t s, uint64_t ticket)
{
    s->deferred = true;
    s->ticket = ticket;
}

bool emu_stream_is_current(cudaStream_t s)
{
    return s->work == work;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int)
{
    *s = new ht_emu_stream;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    if (s) emu_later.wait(s->ticket);
    return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned)
{
    *e = new ht_emu_event;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *e)
{
    return cudaEventCreateWithFlags(e, 0);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t)
{
    *ms = 0.0f;
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    if (s) {
        e->ticket = s->ticket.load();
        e->work = s->deferred ? s->work : work;
    }
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    emu_later.wait(e->ticket);
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t e)
{
    return emu_later.is_done(e->ticket) ? cudaSuccess : cudaErrorNotReady;
}
/* A stream whose work is done at once cannot go on before the event: the caller waits. */
cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned)
{
    if (e->work > s->work) s->work = e->work;
    if (!s->deferred) emu_later.wait(e->ticket);
    return cudaSuccess;
}

static const char *kernel_error; // until the next one

cudaError_t cudaGetLastError()
{
    const char *text = emu_error_take();
    const cudaError_t e = text ? cudaErrorLaunchFailure : last_error;
    if (text) kernel_error = text;
    last_error = cudaSuccess;
    return e;
}

const char *cudaGetErrorName(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    default: return "cudaErrorInvalidValue";
    }
}

const char *cudaGetErrorString(cudaError_t e)
{
    if (e == cudaErrorLaunchFailure && kernel_error) return kernel_error;
    return cudaGetErrorName(e);
}
