/* core/ops/embedding_cpu.c: token embedding, forward and backward (embedding.h). Bound by memory.
 *
 * Backward divides columns, not tokens, among the threads: every column adds its tokens in order,
 * so a token that appears twice needs no lock and the bits do not depend on the thread count.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum {
    COL_BLOCK = 64,      // floats: whole cache lines per thread
    PARALLEL_MIN = 16384 // elements below which a parallel region costs more than the work
};

static void forward_row(const struct ht_embedding_args *a, int64_t t, const enum ht_dtype d)
{
    const int64_t n = a->d_model, from = a->ids[t] * n;
    float *out = a->residual + t * n;
    int64_t i = 0;

    for (; i + HT_VLEN <= n; i += HT_VLEN)
        vf_store(out + i, a->multiplier * vf_load_any(a->weight, from + i, d));
    for (; i < n; i++) out[i] = a->multiplier * ht_load_f32(a->weight, from + i, d);
}

enum ht_status HT_ISA_FN(ht_embedding_forward_cpu)(struct ht_backend *be,
                                                   const struct ht_embedding_args *a)
{
    const bool parallel = a->n_tokens * a->d_model > PARALLEL_MIN;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_tokens; t++) {
        if (a->dtype == HT_DTYPE_F32)
            forward_row(a, t, HT_DTYPE_F32);
        else
            forward_row(a, t, HT_DTYPE_BF16);
    }
    return HT_OK;
}

/* Columns j0 .. j1-1 of every token, in order. */
static void backward_columns(const struct ht_embedding_args *a, int64_t j0, int64_t j1)
{
    for (int64_t t = 0; t < a->n_tokens; t++) {
        const float *g = a->grad_residual + t * a->d_model;
        float *gw = a->grad_weight + a->ids[t] * a->d_model;
        int64_t j = j0;
        for (; j + HT_VLEN <= j1; j += HT_VLEN)
            vf_store(gw + j, vf_load(gw + j) + a->multiplier * vf_load(g + j));
        for (; j < j1; j++) gw[j] += a->multiplier * g[j];
    }
}

enum ht_status HT_ISA_FN(ht_embedding_backward_cpu)(struct ht_backend *be,
                                                    const struct ht_embedding_args *a)
{
    const bool parallel = a->n_tokens * a->d_model > PARALLEL_MIN && a->d_model > COL_BLOCK;
    const int64_t blocks = (a->d_model + COL_BLOCK - 1) / COL_BLOCK;
    const int64_t parts = blocks < be->n_threads ? blocks : be->n_threads;

    // one wide range of columns per thread: rows stay long for the prefetcher
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t p = 0; p < parts; p++) {
        const int64_t j0 = p * blocks / parts * COL_BLOCK,
                      j1 = (p + 1) * blocks / parts * COL_BLOCK;
        backward_columns(a, j0, j1 < a->d_model ? j1 : a->d_model);
    }
    return HT_OK;
}
