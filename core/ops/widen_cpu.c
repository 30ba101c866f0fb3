/* core/ops/widen_cpu.c: tiles of bf16 matrices to fp32 and back, for products on CPUs without bf16
 * arithmetic (gemm_cpu.c). Bound by memory; both directions go row by row.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum { PARALLEL_MIN = 1 << 14 }; // elements below which a parallel region costs more than the work

void HT_ISA_FN(ht_widen_cpu)(struct ht_backend *be, const struct ht_tile_args *t)
{
#pragma omp parallel for num_threads(be->n_threads)                                                \
    schedule(static) if (t->rows * t->cols > PARALLEL_MIN)
    for (int64_t r = 0; r < t->rows; r++) {
        const ht_bf16 *src = t->narrow + r * t->ld;
        float *dst = t->wide + r * t->cols;
        int64_t i = 0;
        for (; i + HT_VLEN <= t->cols; i += HT_VLEN) vf_store(dst + i, vf_load_bf16(src + i));
        if (i < t->cols) vf_store_n(dst + i, vf_load_bf16_n(src + i, t->cols - i), t->cols - i);
    }
}

void HT_ISA_FN(ht_narrow_cpu)(struct ht_backend *be, const struct ht_tile_args *t)
{
#pragma omp parallel for num_threads(be->n_threads)                                                \
    schedule(static) if (t->rows * t->cols > PARALLEL_MIN)
    for (int64_t r = 0; r < t->rows; r++) {
        const float *src = t->wide + r * t->cols;
        ht_bf16 *dst = t->narrow + r * t->ld;
        for (int64_t i = 0; i < t->cols; i += HT_VLEN) {
            const int64_t n = t->cols - i < HT_VLEN ? t->cols - i : HT_VLEN;
            ht_vf v = t->alpha * vf_load_n(src + i, n);
            if (t->add) v += vf_load_bf16_n(dst + i, n);
            vf_store_bf16_n(dst + i, v, n);
        }
    }
}
