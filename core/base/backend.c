/* core/base/backend.c: creation and memory of backends; what CUDA does is in backend_cuda.cu. */
#include "core/base/backend.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/cuda_device.h"

enum ht_status ht_backend_create_cpu(struct ht_backend *be, int n_threads, size_t scratch_bytes)
{
    *be = (struct ht_backend){ .kind = HT_BACKEND_CPU, .isa = ht_isa_detect() };
    be->n_threads = n_threads > 0 ? n_threads : omp_get_max_threads();
    omp_set_num_threads(be->n_threads);
    return ht_arena_create(&be->scratch, "scratch", scratch_bytes);
}

enum ht_status ht_backend_create_cuda(struct ht_backend *be, int local_rank, size_t scratch_bytes)
{
    enum ht_status st = HT_OK;

    *be = (struct ht_backend){ .kind = HT_BACKEND_CPU, .isa = ht_isa_detect(), .n_threads = 1 };
#ifdef HT_WITH_CUDA
    HT_TRY(ht_cuda_device_create(&be->device, local_rank));
    be->kind = HT_BACKEND_CUDA;
    be->n_threads = omp_get_max_threads();
    HT_TRY_GOTO(st, done, ht_backend_arena_create(&be->scratch, be, "scratch", scratch_bytes));
done:
    if (st != HT_OK) ht_backend_free(be);
#else
    (void)local_rank;
    (void)scratch_bytes;
    st = HT_FAIL(HT_ERR_UNSUPPORTED, "this build has no CUDA backend; configure with nvcc on the "
                                     "PATH, or run on the CPU");
#endif
    return st;
}

enum ht_status ht_backend_count_cuda(int *n, size_t *memory_bytes)
{
    *n = 0;
#ifdef HT_WITH_CUDA
    return ht_cuda_count(n, memory_bytes);
#else
    (void)memory_bytes;
    return HT_FAIL(HT_ERR_UNSUPPORTED, "this build has no CUDA backend; configure with nvcc on the "
                                       "PATH");
#endif
}

enum ht_status ht_backend_cuda_uuid(unsigned char uuid[16], int local_rank)
{
    memset(uuid, 0, 16);
#ifdef HT_WITH_CUDA
    return ht_cuda_uuid(uuid, local_rank);
#else
    (void)local_rank;
    return HT_FAIL(HT_ERR_UNSUPPORTED, "this build has no CUDA backend");
#endif
}

enum ht_status ht_backend_reserve_scratch(struct ht_backend *be, size_t scratch_bytes)
{
    if (scratch_bytes <= be->scratch.size_bytes) return HT_OK;
    ht_backend_arena_free(&be->scratch, be);
    return ht_backend_arena_create(&be->scratch, be, "scratch", scratch_bytes);
}

void ht_backend_free(struct ht_backend *be)
{
    if (!be) return;
    if (be->gemm_free) be->gemm_free(be->gemm);
    ht_backend_arena_free(&be->scratch, be);
#ifdef HT_WITH_CUDA
    ht_cuda_device_free(be->device);
#endif
    *be = (struct ht_backend){ 0 };
}

const char *ht_backend_kind_name(enum ht_backend_kind kind)
{
    return kind == HT_BACKEND_CUDA ? "cuda" : "cpu";
}

/* ---- memory on the CPU ---- */

static enum ht_status host_alloc(void **out, struct ht_backend *be, const char *what, size_t bytes)
{
    (void)be;
    *out = aligned_alloc(64, ht_arena_bytes(bytes ? bytes : 1));
    if (!*out) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory (%zu bytes)", what, bytes);
    return HT_OK;
}

static void host_free(struct ht_backend *be, void *p)
{
    (void)be;
    free(p);
}

static enum ht_status host_copy(struct ht_backend *be, void *dst, const void *src, size_t bytes)
{
    (void)be;
    if (bytes > 0) memcpy(dst, src, bytes);
    return HT_OK;
}

static enum ht_status host_zero(struct ht_backend *be, void *dst, size_t bytes)
{
    (void)be;
    if (bytes > 0) memset(dst, 0, bytes);
    return HT_OK;
}

static enum ht_status host_synchronize(struct ht_backend *be)
{
    (void)be;
    return HT_OK;
}

static enum ht_status host_mark_set(struct ht_backend *be, struct ht_backend_mark *m)
{
    (void)be;
    (void)m;
    return HT_OK;
}

static enum ht_status host_mark_wait(struct ht_backend *be, const struct ht_backend_mark *m)
{
    (void)be;
    (void)m;
    return HT_OK;
}

static enum ht_status host_mark_ms(float *ms, struct ht_backend *be,
                                   const struct ht_backend_mark *from,
                                   const struct ht_backend_mark *to)
{
    (void)be;
    (void)from;
    (void)to;
    *ms = 0.0f;
    return HT_OK;
}

static void host_mark_free(struct ht_backend *be, struct ht_backend_mark *m)
{
    (void)be;
    (void)m;
}

/* ---- which function runs where ---- */

static const struct {
    enum ht_status (*alloc)(void **, struct ht_backend *, const char *, size_t);
    void (*free)(struct ht_backend *, void *);
    enum ht_status (*host_alloc)(void **, struct ht_backend *, const char *, size_t);
    void (*host_free)(struct ht_backend *, void *);
    enum ht_status (*upload)(struct ht_backend *, void *, const void *, size_t);
    enum ht_status (*download)(struct ht_backend *, void *, const void *, size_t);
    enum ht_status (*copy)(struct ht_backend *, void *, const void *, size_t);
    enum ht_status (*zero)(struct ht_backend *, void *, size_t);
    enum ht_status (*synchronize)(struct ht_backend *);
    enum ht_status (*download_start)(struct ht_backend *, void *, const void *, size_t);
    enum ht_status (*mark_set)(struct ht_backend *, struct ht_backend_mark *);
    enum ht_status (*mark_wait)(struct ht_backend *, const struct ht_backend_mark *);
    enum ht_status (*mark_ms)(float *, struct ht_backend *, const struct ht_backend_mark *,
                              const struct ht_backend_mark *);
    void (*mark_free)(struct ht_backend *, struct ht_backend_mark *);
} memory[HT_BACKEND_COUNT] = {
    [HT_BACKEND_CPU] = { host_alloc, host_free, host_alloc, host_free, host_copy, host_copy,
                         host_copy, host_zero, host_synchronize, host_copy, host_mark_set,
                         host_mark_wait, host_mark_ms, host_mark_free },
#ifdef HT_WITH_CUDA
    [HT_BACKEND_CUDA] = { ht_cuda_alloc, ht_cuda_free, ht_cuda_host_alloc, ht_cuda_host_free,
                          ht_cuda_upload, ht_cuda_download, ht_cuda_copy, ht_cuda_zero,
                          ht_cuda_synchronize, ht_cuda_download_start, ht_cuda_mark_set,
                          ht_cuda_mark_wait, ht_cuda_mark_ms, ht_cuda_mark_free },
#endif
};

enum ht_status ht_backend_alloc(void **out, struct ht_backend *be, const char *what, size_t bytes)
{
    return memory[be->kind].alloc(out, be, what, bytes);
}

void ht_backend_free_memory(struct ht_backend *be, void *p)
{
    if (p) memory[be->kind].free(be, p);
}

enum ht_status ht_backend_host_alloc(void **out, struct ht_backend *be, const char *what,
                                     size_t bytes)
{
    return memory[be->kind].host_alloc(out, be, what, bytes);
}

void ht_backend_host_free(struct ht_backend *be, void *p)
{
    if (p) memory[be->kind].host_free(be, p);
}

enum ht_status ht_backend_upload(struct ht_backend *be, void *dst, const void *src, size_t bytes)
{
    return memory[be->kind].upload(be, dst, src, bytes);
}

enum ht_status ht_backend_download(struct ht_backend *be, void *dst, const void *src, size_t bytes)
{
    return memory[be->kind].download(be, dst, src, bytes);
}

enum ht_status ht_backend_copy(struct ht_backend *be, void *dst, const void *src, size_t bytes)
{
    return memory[be->kind].copy(be, dst, src, bytes);
}

enum ht_status ht_backend_zero(struct ht_backend *be, void *dst, size_t bytes)
{
    return memory[be->kind].zero(be, dst, bytes);
}

enum ht_status ht_backend_synchronize(struct ht_backend *be)
{
    return memory[be->kind].synchronize(be);
}

enum ht_status ht_backend_download_start(struct ht_backend *be, void *dst, const void *src,
                                         size_t bytes)
{
    return memory[be->kind].download_start(be, dst, src, bytes);
}

enum ht_status ht_backend_mark_set(struct ht_backend *be, struct ht_backend_mark *m)
{
    return memory[be->kind].mark_set(be, m);
}

enum ht_status ht_backend_mark_wait(struct ht_backend *be, const struct ht_backend_mark *m)
{
    return memory[be->kind].mark_wait(be, m);
}

enum ht_status ht_backend_mark_ms(float *ms, struct ht_backend *be,
                                  const struct ht_backend_mark *from,
                                  const struct ht_backend_mark *to)
{
    return memory[be->kind].mark_ms(ms, be, from, to);
}

void ht_backend_mark_free(struct ht_backend *be, struct ht_backend_mark *m)
{
    memory[be->kind].mark_free(be, m);
}

/* ---- arenas ---- */

enum ht_status ht_backend_arena_create(struct ht_arena *a, struct ht_backend *be, const char *name,
                                       size_t size_bytes)
{
    void *base = NULL;

    if (be->kind == HT_BACKEND_CPU) return ht_arena_create(a, name, size_bytes);
    *a = (struct ht_arena){ .name = name };
    if (size_bytes == 0) return HT_OK;
    HT_TRY(ht_backend_alloc(&base, be, name, size_bytes));
    *a = (struct ht_arena){ .base = base, .size_bytes = size_bytes, .name = name };
    const enum ht_status st = ht_backend_zero(be, base, size_bytes);
    if (st != HT_OK) ht_backend_arena_free(a, be);
    return st;
}

void ht_backend_arena_free(struct ht_arena *a, struct ht_backend *be)
{
    if (be->kind == HT_BACKEND_CPU) {
        ht_arena_free(a);
        return;
    }
    ht_backend_free_memory(be, a->base);
    *a = (struct ht_arena){ 0 };
}
