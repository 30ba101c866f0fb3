/* core/base/backend.h: where operations run: kind, CPU level, threads, scratch memory.
 *
 * One backend per rank. An operation dispatches on kind and isa through its folder's table; scratch
 * memory comes from be->scratch (an arena that operations mark and reset), so a step allocates
 * nothing.
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
    struct ht_arena scratch; // sized by the owner before the first operation
    void *gemm; // cache of oneDNN primitives, owned by core/ops/gemm (ht_gemm_cache_free)
    void (*gemm_free)(void *);
};

/* A CPU backend with n_threads threads (0: what OMP_NUM_THREADS or the machine says). */
enum ht_status ht_backend_create_cpu(struct ht_backend *be, int n_threads, size_t scratch_bytes);

/* Make the scratch arena at least that large (before use only: pieces taken become invalid). */
enum ht_status ht_backend_reserve_scratch(struct ht_backend *be, size_t scratch_bytes);

void ht_backend_free(struct ht_backend *be);

#endif
