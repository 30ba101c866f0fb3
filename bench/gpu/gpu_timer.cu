/* bench/gpu/gpu_timer.cu: see gpu_timer.h. */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "bench/gpu/gpu_timer.h"
}

struct gpu_timer {
    cudaEvent_t start, stop;
};

extern "C" void gpu_timer_free(struct gpu_timer *t)
{
    if (!t) return;
    if (t->start) cudaEventDestroy(t->start);
    if (t->stop) cudaEventDestroy(t->stop);
    free(t);
}

extern "C" enum ht_status gpu_timer_create(struct gpu_timer **out)
{
    enum ht_status st = HT_OK;
    struct gpu_timer *t = (struct gpu_timer *)calloc(1, sizeof *t);

    *out = NULL;
    if (!t) return HT_FAIL(HT_ERR_MEMORY, "no memory for a timer");
    HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventCreate(&t->start), "event"));
    HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventCreate(&t->stop), "event"));
    *out = t;
    t = NULL;
done:
    gpu_timer_free(t);
    return st;
}

static cudaStream_t stream_of(struct ht_backend *be)
{
    return (cudaStream_t)ht_cuda_device_of(be)->compute;
}

extern "C" enum ht_status gpu_timer_start(struct gpu_timer *t, struct ht_backend *be)
{
    return ht_cuda_check(cudaEventRecord(t->start, stream_of(be)), "event");
}

extern "C" enum ht_status gpu_timer_stop(struct gpu_timer *t, struct ht_backend *be, float *ms)
{
    HT_TRY(ht_cuda_check(cudaEventRecord(t->stop, stream_of(be)), "event"));
    HT_TRY(ht_cuda_check(cudaEventSynchronize(t->stop), "event"));
    return ht_cuda_check(cudaEventElapsedTime(ms, t->start, t->stop), "event");
}

static __device__ uint32_t hash(uint64_t i, uint32_t seed)
{
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (uint32_t)(z >> 32);
}

template <typename T>
static __global__ void bench_fill_kernel(T *p, int64_t n, float sd, uint32_t seed)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n;
         i += (int64_t)gridDim.x * 256) {
        const uint32_t h = hash((uint64_t)i, seed);
        const float sum = (float)(h & 0xffff) + (float)(h >> 16) - 65535.0f; // triangular
        p[i] = from_f32<T>(sd * sum * (2.4494897f / 65536.0f));
    }
}

static __global__ void bench_ids_kernel(int32_t *p, int64_t n, int32_t limit)
{
    for (int64_t i = (int64_t)blockIdx.x * 256 + threadIdx.x; i < n; i += (int64_t)gridDim.x * 256)
        p[i] = (int32_t)(hash((uint64_t)i, 7) % (uint32_t)limit);
}

template <typename T>
static enum ht_status fill(struct ht_backend *be, void *p, int64_t n, float sd, uint32_t seed)
{
    HT_LAUNCH(be, bench_fill_kernel<T>, 1024, 256, 0, (T *)p, n, sd, seed);
    return ht_cuda_check_launch(be, "fill");
}

extern "C" enum ht_status gpu_fill(struct ht_backend *be, void *p, int64_t n, enum ht_dtype dtype,
                                   float sd, uint32_t seed)
{
    return HT_DISPATCH(dtype, "fill", fill, be, p, n, sd, seed);
}

extern "C" enum ht_status gpu_fill_ids(struct ht_backend *be, int32_t *p, int64_t n, int32_t limit)
{
    HT_LAUNCH(be, bench_ids_kernel, 1024, 256, 0, p, n, limit);
    return ht_cuda_check_launch(be, "ids");
}
