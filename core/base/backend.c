/* core/base/backend.c: the CPU backend. */
#include "core/base/backend.h"

#include <omp.h>

enum ht_status ht_backend_create_cpu(struct ht_backend *be, int n_threads, size_t scratch_bytes)
{
    *be = (struct ht_backend){ .kind = HT_BACKEND_CPU, .isa = ht_isa_detect() };
    be->n_threads = n_threads > 0 ? n_threads : omp_get_max_threads();
    omp_set_num_threads(be->n_threads);
    return ht_arena_create(&be->scratch, "scratch", scratch_bytes);
}

enum ht_status ht_backend_reserve_scratch(struct ht_backend *be, size_t scratch_bytes)
{
    if (scratch_bytes <= be->scratch.size_bytes) return HT_OK;
    ht_arena_free(&be->scratch);
    return ht_arena_create(&be->scratch, "scratch", scratch_bytes);
}

void ht_backend_free(struct ht_backend *be)
{
    if (!be) return;
    if (be->gemm_free) be->gemm_free(be->gemm);
    ht_arena_free(&be->scratch);
    *be = (struct ht_backend){ 0 };
}
