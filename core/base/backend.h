/* core/base/backend.h: where operations run: kind, CPU level, threads, device, memory.
 *
 * One backend per rank. An operation dispatches on kind and isa through its folder's table; scratch
 * memory comes from be->scratch (an arena that operations mark and reset), so a step allocates
 * nothing.
 *
 * On CUDA every pointer of an operation's arguments is device memory unless its header says host,
 * and operations only enqueue: they run in order on one compute stream, and a result is there after
 * ht_backend_download or ht_backend_synchronize. Nothing else waits. On the CPU all memory is host
 * memory and everything is done when a call returns.
 */
#ifndef HT_BASE_BACKEND_H
#define HT_BASE_BACKEND_H

#include <stddef.h>

#include "core/base/arena.h"
#include "core/base/isa.h"
#include "core/base/status.h"

enum ht_backend_kind { HT_BACKEND_CPU, HT_BACKEND_CUDA, HT_BACKEND_COUNT };

struct ht_backend {
    enum ht_backend_kind kind;
    enum ht_isa isa;
    int n_threads;           // OpenMP threads of an operation; results do not depend on it
    struct ht_arena scratch; // sized by the owner before the first operation; device memory on CUDA
    void *gemm; // cache of oneDNN primitives or cuBLASLt algorithms, owned by core/ops/gemm
    void (*gemm_free)(void *);
    void *device; // struct ht_cuda_device (core/base/cuda_device.h), owned; NULL on the CPU
};

/* A CPU backend with n_threads threads (0: what OMP_NUM_THREADS or the machine says). */
enum ht_status ht_backend_create_cpu(struct ht_backend *be, int n_threads, size_t scratch_bytes);

/* A CUDA backend on device local_rank modulo the devices that are visible. HT_ERR_UNSUPPORTED where
 * this build or this machine has none, naming what is missing ("no CUDA device: ..."). */
enum ht_status ht_backend_create_cuda(struct ht_backend *be, int local_rank, size_t scratch_bytes);

/* How many CUDA devices this process sees, at least 1; HT_ERR_UNSUPPORTED as above. *memory_bytes
 * (may be NULL) gets the least that one of them has. */
enum ht_status ht_backend_count_cuda(int *n, size_t *memory_bytes);

/* What no other device in the world has, of the one that create_cuda would take. */
enum ht_status ht_backend_cuda_uuid(unsigned char uuid[16], int local_rank);

/* Make the scratch arena at least that large (before use only: pieces taken become invalid). */
enum ht_status ht_backend_reserve_scratch(struct ht_backend *be, size_t scratch_bytes);

/* Waits for the device. Accepts a backend that create refused. */
void ht_backend_free(struct ht_backend *be);

/* "cpu" or "cuda". */
const char *ht_backend_kind_name(enum ht_backend_kind kind);

/* ---- memory of the backend ---- */

/* 64-byte aligned, content undefined. HT_ERR_MEMORY names `what`, size and what is free. */
enum ht_status ht_backend_alloc(void **out, struct ht_backend *be, const char *what, size_t bytes);
void ht_backend_free_memory(struct ht_backend *be, void *p); // waits for the device; accepts NULL

/* An arena (arena.h) in the memory of the backend, zeroed. */
enum ht_status ht_backend_arena_create(struct ht_arena *a, struct ht_backend *be, const char *name,
                                       size_t size_bytes);
void ht_backend_arena_free(struct ht_arena *a, struct ht_backend *be);

/* Host memory that the device reads and writes without a copy in between (pinned); plain memory on
 * the CPU. */
enum ht_status ht_backend_host_alloc(void **out, struct ht_backend *be, const char *what,
                                     size_t bytes);
void ht_backend_host_free(struct ht_backend *be, void *p);

/* Host to backend. Pinned source: only enqueued, and the source must stay until the stream has
 * passed; other host memory may be reused on return. */
enum ht_status ht_backend_upload(struct ht_backend *be, void *dst, const void *src, size_t bytes);

/* Backend to host; done on return (waits for everything enqueued before). */
enum ht_status ht_backend_download(struct ht_backend *be, void *dst, const void *src, size_t bytes);

/* As download, only enqueued: the host's memory is pinned, and has the bytes once a mark that was
 * set afterwards is passed. */
enum ht_status ht_backend_download_start(struct ht_backend *be, void *dst, const void *src,
                                         size_t bytes);

/* Within the backend's memory, enqueued. No overlap. */
enum ht_status ht_backend_copy(struct ht_backend *be, void *dst, const void *src, size_t bytes);
enum ht_status ht_backend_zero(struct ht_backend *be, void *dst, size_t bytes);

/* A place in the compute stream. set: after everything enqueued so far; wait: the host, until the
 * stream has passed it (at once when never set). ms: between two marks that were passed; 0 on the
 * CPU, where all of this does nothing. */
struct ht_backend_mark {
    void *event;
};
enum ht_status ht_backend_mark_set(struct ht_backend *be, struct ht_backend_mark *m);
enum ht_status ht_backend_mark_wait(struct ht_backend *be, const struct ht_backend_mark *m);
enum ht_status ht_backend_mark_ms(float *ms, struct ht_backend *be,
                                  const struct ht_backend_mark *from,
                                  const struct ht_backend_mark *to);
void ht_backend_mark_free(struct ht_backend *be, struct ht_backend_mark *m);

/* Until everything enqueued is done; reports errors of kernels that ran since the last call. */
enum ht_status ht_backend_synchronize(struct ht_backend *be);

#endif
