/* core/base/backend_cuda.cu: device, streams and memory of a CUDA backend (backend.h).
 *
 * One device per backend, chosen by the rank's number on its node. Two streams that do not wait for
 * the default stream: operations run on `compute`, collectives on `comm`, which has the higher
 * priority so that a finished bucket leaves at once.
 */
#include "core/base/cuda_kernel.h"

extern "C" enum ht_status ht_cuda_check(int cuda_error, const char *what)
{
    const cudaError_t e = (cudaError_t)cuda_error;

    if (e == cudaSuccess) return HT_OK;
    return HT_FAIL(e == cudaErrorMemoryAllocation ? HT_ERR_MEMORY : HT_ERR_CUDA, "%s: %s (%s)",
                   what, cudaGetErrorString(e), cudaGetErrorName(e));
}

static cudaStream_t compute_stream(const struct ht_backend *be)
{
    return (cudaStream_t)ht_cuda_device_of(be)->compute;
}

extern "C" enum ht_status ht_cuda_check_launch(struct ht_backend *be, const char *what)
{
    HT_TRY(ht_cuda_check(cudaGetLastError(), what));
    if (!ht_cuda_device_of(be)->sync_every_launch) return HT_OK;
    return ht_cuda_check(cudaStreamSynchronize(compute_stream(be)), what);
}

/* ---- device ---- */

static enum ht_status count_devices(int *n)
{
    const cudaError_t e = cudaGetDeviceCount(n);

    if (e == cudaSuccess && *n > 0) return HT_OK;
    *n = 0;
    (void)cudaGetLastError();
    return HT_FAIL(
        HT_ERR_UNSUPPORTED,
        "no CUDA device: %s; check nvidia-smi and CUDA_VISIBLE_DEVICES, or run on the CPU",
        e == cudaSuccess ? "none is visible" : cudaGetErrorString(e));
}

extern "C" enum ht_status ht_cuda_count(int *n, size_t *memory_bytes)
{
    HT_TRY(count_devices(n));
    if (!memory_bytes) return HT_OK;
    *memory_bytes = 0;
    for (int i = 0; i < *n; i++) {
        struct cudaDeviceProp p;
        HT_TRY(ht_cuda_check(cudaGetDeviceProperties(&p, i), "device properties"));
        if (i == 0 || p.totalGlobalMem < *memory_bytes) *memory_bytes = p.totalGlobalMem;
    }
    return HT_OK;
}

extern "C" enum ht_status ht_cuda_uuid(unsigned char uuid[16], int local_rank)
{
    struct cudaDeviceProp p;
    int n = 0;

    HT_TRY(count_devices(&n));
    HT_TRY(ht_cuda_check(cudaGetDeviceProperties(&p, local_rank % n), "device properties"));
    static_assert(sizeof p.uuid == 16, "a UUID");
    memcpy(uuid, &p.uuid, 16);
    return HT_OK;
}

static enum ht_status describe(struct ht_cuda_device *d)
{
    struct cudaDeviceProp p;
    int major = 0, minor = 0, smem = 0;

    HT_TRY(ht_cuda_check(cudaGetDeviceProperties(&p, d->ordinal), "device properties"));
    snprintf(d->name, sizeof d->name, "%s", p.name);
    d->memory_bytes = p.totalGlobalMem;
    HT_TRY(ht_cuda_check(
        cudaDeviceGetAttribute(&d->n_sms, cudaDevAttrMultiProcessorCount, d->ordinal), "SM count"));
    HT_TRY(
        ht_cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, d->ordinal),
                      "capability"));
    HT_TRY(
        ht_cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, d->ordinal),
                      "capability"));
    HT_TRY(ht_cuda_check(
        cudaDeviceGetAttribute(&smem, cudaDevAttrMaxSharedMemoryPerBlockOptin, d->ordinal),
        "shared memory"));
    d->arch = 10 * major + minor;
    d->smem_block_max = (size_t)smem;
    if (d->arch < 80)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "CUDA device %d (%s) has compute capability %d.%d; at least 8.0 is needed",
                       d->ordinal, d->name, major, minor);
    return HT_OK;
}

extern "C" void ht_cuda_device_free(void *device)
{
    struct ht_cuda_device *d = (struct ht_cuda_device *)device;

    if (!d) return;
    if (d->compute) cudaStreamDestroy((cudaStream_t)d->compute);
    if (d->comm) cudaStreamDestroy((cudaStream_t)d->comm);
    free(d);
}

extern "C" enum ht_status ht_cuda_device_create(void **out, int local_rank)
{
    enum ht_status st = HT_OK;
    struct ht_cuda_device *d = NULL;
    cudaStream_t stream;
    int n = 0, least = 0, greatest = 0;
    const char *sync = getenv("HT_CUDA_SYNC");

    *out = NULL;
    HT_TRY(count_devices(&n));
    d = (struct ht_cuda_device *)calloc(1, sizeof *d);
    if (!d) return HT_FAIL(HT_ERR_MEMORY, "CUDA device: no memory (%zu bytes)", sizeof *d);
    d->ordinal = local_rank % n;
    d->sync_every_launch = sync && strcmp(sync, "1") == 0;
    HT_TRY_GOTO(st, done, ht_cuda_check(cudaSetDevice(d->ordinal), "choosing the CUDA device"));
    HT_TRY_GOTO(st, done, describe(d));
    HT_TRY_GOTO(
        st, done,
        ht_cuda_check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "stream priorities"));
    HT_TRY_GOTO(st, done,
                ht_cuda_check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, least),
                              "compute stream"));
    d->compute = (void *)stream;
    HT_TRY_GOTO(
        st, done,
        ht_cuda_check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
                      "communication stream"));
    d->comm = (void *)stream;
    *out = d;
    d = NULL;
done:
    ht_cuda_device_free(d);
    return st;
}

/* ---- memory ---- */

extern "C" enum ht_status ht_cuda_alloc(void **out, struct ht_backend *be, const char *what,
                                        size_t bytes)
{
    const cudaError_t e = cudaMalloc(out, bytes ? bytes : 1);

    if (e == cudaSuccess) return HT_OK;
    (void)cudaGetLastError();
    *out = NULL;
    return HT_FAIL(e == cudaErrorMemoryAllocation ? HT_ERR_MEMORY : HT_ERR_CUDA,
                   "%s: %zu bytes on device %d (%s, %zu bytes in all): %s", what, bytes,
                   ht_cuda_device_of(be)->ordinal, ht_cuda_device_of(be)->name,
                   ht_cuda_device_of(be)->memory_bytes, cudaGetErrorString(e));
}

extern "C" void ht_cuda_free(struct ht_backend *be, void *p)
{
    (void)cudaStreamSynchronize(compute_stream(be));
    (void)cudaFree(p);
}

extern "C" enum ht_status ht_cuda_host_alloc(void **out, struct ht_backend *be, const char *what,
                                             size_t bytes)
{
    (void)be;
    return ht_cuda_check(cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault), what);
}

extern "C" void ht_cuda_host_free(struct ht_backend *be, void *p)
{
    (void)cudaStreamSynchronize(compute_stream(be));
    (void)cudaFreeHost(p);
}

extern "C" enum ht_status ht_cuda_upload(struct ht_backend *be, void *dst, const void *src,
                                         size_t bytes)
{
    return ht_cuda_check(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, compute_stream(be)), "upload");
}

extern "C" enum ht_status ht_cuda_download(struct ht_backend *be, void *dst, const void *src,
                                           size_t bytes)
{
    HT_TRY(ht_cuda_check(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, compute_stream(be)), "download"));
    return ht_cuda_synchronize(be);
}

extern "C" enum ht_status ht_cuda_copy(struct ht_backend *be, void *dst, const void *src,
                                       size_t bytes)
{
    return ht_cuda_check(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, compute_stream(be)), "copy");
}

extern "C" enum ht_status ht_cuda_zero(struct ht_backend *be, void *dst, size_t bytes)
{
    return ht_cuda_check(cudaMemsetAsync(dst, 0, bytes, compute_stream(be)), "zero");
}

extern "C" enum ht_status ht_cuda_synchronize(struct ht_backend *be)
{
    HT_TRY(ht_cuda_check(cudaStreamSynchronize(compute_stream(be)), "waiting for the device"));
    return ht_cuda_check(cudaGetLastError(), "waiting for the device");
}

extern "C" enum ht_status ht_cuda_download_start(struct ht_backend *be, void *dst, const void *src,
                                                 size_t bytes)
{
    return ht_cuda_check(
        cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, compute_stream(be)), "download");
}

/* ---- marks ---- */

extern "C" enum ht_status ht_cuda_mark_set(struct ht_backend *be, struct ht_backend_mark *m)
{
    cudaEvent_t e = (cudaEvent_t)m->event;

    if (!e) {
        HT_TRY(ht_cuda_check(cudaEventCreate(&e), "an event"));
        m->event = (void *)e;
    }
    return ht_cuda_check(cudaEventRecord(e, compute_stream(be)), "an event");
}

extern "C" enum ht_status ht_cuda_mark_wait(struct ht_backend *be, const struct ht_backend_mark *m)
{
    (void)be;
    if (!m->event) return HT_OK;
    HT_TRY(ht_cuda_check(cudaEventSynchronize((cudaEvent_t)m->event), "waiting for the device"));
    return ht_cuda_check(cudaGetLastError(), "waiting for the device");
}

extern "C" enum ht_status ht_cuda_mark_ms(float *ms, struct ht_backend *be,
                                          const struct ht_backend_mark *from,
                                          const struct ht_backend_mark *to)
{
    (void)be;
    *ms = 0.0f;
    if (!from->event || !to->event) return HT_OK;
    return ht_cuda_check(cudaEventElapsedTime(ms, (cudaEvent_t)from->event, (cudaEvent_t)to->event),
                         "event time");
}

extern "C" void ht_cuda_mark_free(struct ht_backend *be, struct ht_backend_mark *m)
{
    (void)be;
    if (m->event) (void)cudaEventDestroy((cudaEvent_t)m->event);
    m->event = NULL;
}
