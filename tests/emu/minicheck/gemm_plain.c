/* tests/emu/minicheck/gemm_plain.c: the CPU's products without oneDNN, for HT_KERNELS_ONLY: the
 * reference of the GPU's suites, with sums in fp32. Not for use. */
#include <stdlib.h>

#include "core/ops/core_ops.h"

enum ht_status ht_gemm_onednn(struct ht_backend *be, const struct ht_gemm_args *a)
{
#pragma omp parallel for num_threads(be->n_threads) schedule(static)
    for (int64_t i = 0; i < a->m; i++)
        for (int64_t j = 0; j < a->n; j++) {
            const int64_t at = i * a->ldc + j;
            float sum = 0.0f;
            for (int64_t k = 0; k < a->k; k++)
                sum += ht_load_f32(a->a, a->trans_a ? k * a->lda + i : i * a->lda + k, a->ab_dtype) *
                       ht_load_f32(a->b, a->trans_b ? j * a->ldb + k : k * a->ldb + j, a->ab_dtype);
            const float old = a->beta != 0.0f ? a->beta * ht_load_f32(a->c, at, a->c_dtype) : 0.0f;
            ht_store_f32(a->c, at, a->c_dtype, a->alpha * sum + old);
        }
    return HT_OK;
}

enum ht_status ht_gemm_own_scratch(void **out, struct ht_backend *be, size_t bytes)
{
    free(be->gemm); // one buffer, of the last call
    be->gemm = malloc(bytes ? bytes : 1);
    be->gemm_free = free;
    *out = be->gemm;
    if (!*out) return HT_FAIL(HT_ERR_MEMORY, "gemm: no memory for a copy (%zu bytes)", bytes);
    return HT_OK;
}
