/* core/ops/gemm_cpu.c: matrix products on the CPU.
 *
 * Three ways, chosen by pick_path:
 *   gemv     few rows of A against W stored [out, in] (decode): bound by reading W, gemv_cpu.c
 *   oneDNN   everything else in fp32, and bf16 where the CPU has AVX512-BF16, gemm_onednn.c
 *   widened  bf16 on older CPUs, where oneDNN 2.6 emulates or falls back to plain loops: tiles of A
 *            and B are converted to fp32 in scratch and go through oneDNN's fp32 product
 */
#include <string.h>

#include "core/ops/core_ops.h"

enum gemm_path { PATH_GEMV, PATH_ONEDNN, PATH_WIDENED };

static enum gemm_path pick_path(const struct ht_backend *be, const struct ht_gemm_args *a)
{
    const int64_t few = a->ab_dtype == HT_DTYPE_BF16 ? HT_GEMV_MAX_M_BF16 : HT_GEMV_MAX_M_F32;

    if (a->trans_b && !a->trans_a && a->m <= few) return PATH_GEMV;
    if (a->ab_dtype == HT_DTYPE_BF16 && be->isa < HT_ISA_AVX512BF16) return PATH_WIDENED;
    return PATH_ONEDNN;
}

static int64_t min64(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

/* ---- bf16 without AVX512-BF16 ---- */

// 14 MiB of fp32. A tile of B is widened once per TILE_M rows, which hides it behind the product.
enum { TILE_M = 1024, TILE_N = 512, TILE_K = 2048 };

struct widened {
    float *a, *b, *c; // (m, k) or (k, m), (k, n) or (n, k), (m, n) dense; c only where C is bf16
    int64_t i0, k0;   // what a holds; -1: nothing
    int64_t m, n, k;  // of the tile at hand
};

/* The product of one tile over one block of k, into c (bf16 C) or straight into C (fp32 C). */
static enum ht_status widened_tile(struct ht_backend *be, const struct ht_gemm_args *a,
                                   struct widened *w, int64_t i0, int64_t j0, int64_t k0)
{
    const bool into_c = a->c_dtype == HT_DTYPE_F32;
    // ht_widen_cpu only reads the bf16 side
    ht_bf16 *src_a = (ht_bf16 *)(uintptr_t)a->a, *src_b = (ht_bf16 *)(uintptr_t)a->b;

    w->m = min64(TILE_M, a->m - i0);
    w->n = min64(TILE_N, a->n - j0);
    w->k = min64(TILE_K, a->k - k0);
    const struct ht_tile_args of_a = {
        .rows = a->trans_a ? w->k : w->m,
        .cols = a->trans_a ? w->m : w->k,
        .ld = a->lda,
        .narrow = src_a + (a->trans_a ? k0 * a->lda + i0 : i0 * a->lda + k0),
        .wide = w->a,
    };
    const struct ht_tile_args of_b = {
        .rows = a->trans_b ? w->n : w->k,
        .cols = a->trans_b ? w->k : w->n,
        .ld = a->ldb,
        .narrow = src_b + (a->trans_b ? j0 * a->ldb + k0 : k0 * a->ldb + j0),
        .wide = w->b,
    };
    if (w->i0 != i0 || w->k0 != k0) ht_core_ops_get(HT_BACKEND_CPU)->widen[be->isa](be, &of_a);
    w->i0 = i0;
    w->k0 = k0;
    ht_core_ops_get(HT_BACKEND_CPU)->widen[be->isa](be, &of_b);
    const struct ht_gemm_args tile = {
        .m = w->m,
        .n = w->n,
        .k = w->k,
        .trans_a = a->trans_a,
        .trans_b = a->trans_b,
        .ab_dtype = HT_DTYPE_F32,
        .c_dtype = HT_DTYPE_F32,
        .a = w->a,
        .lda = of_a.cols,
        .b = w->b,
        .ldb = of_b.cols,
        .c = into_c ? (float *)a->c + i0 * a->ldc + j0 : w->c,
        .ldc = into_c ? a->ldc : w->n,
        .alpha = into_c ? a->alpha : 1.0f,
        .beta = k0 > 0   ? 1.0f
                : into_c ? a->beta
                         : 0.0f,
    };
    return ht_gemm_onednn(be, &tile);
}

/* All tiles of TILE_M rows. fp32 C: k outside, so that a tile of A is widened once. bf16 C: k
 * inside, because its sum over k must stay in fp32 until it is complete. */
static enum ht_status widened_rows(struct ht_backend *be, const struct ht_gemm_args *a,
                                   struct widened *w, int64_t i0)
{
    if (a->c_dtype == HT_DTYPE_F32) {
        for (int64_t k0 = 0; k0 < a->k; k0 += TILE_K)
            for (int64_t j0 = 0; j0 < a->n; j0 += TILE_N)
                HT_TRY(widened_tile(be, a, w, i0, j0, k0));
        return HT_OK;
    }
    for (int64_t j0 = 0; j0 < a->n; j0 += TILE_N) {
        for (int64_t k0 = 0; k0 < a->k; k0 += TILE_K) HT_TRY(widened_tile(be, a, w, i0, j0, k0));
        const struct ht_tile_args of_c = { .rows = w->m,
                                           .cols = w->n,
                                           .ld = a->ldc,
                                           .narrow = (ht_bf16 *)a->c + i0 * a->ldc + j0,
                                           .wide = w->c,
                                           .alpha = a->alpha,
                                           .add = a->beta != 0.0f };
        ht_core_ops_get(HT_BACKEND_CPU)->narrow[be->isa](be, &of_c);
    }
    return HT_OK;
}

static enum ht_status run_widened(struct ht_backend *be, const struct ht_gemm_args *a)
{
    enum ht_status st = HT_OK;
    const size_t mark = ht_arena_mark(&be->scratch);
    const int64_t m = min64(TILE_M, a->m), n = min64(TILE_N, a->n), k = min64(TILE_K, a->k);
    struct widened w = { .i0 = -1 };
    void *pa, *pb, *pc;

    HT_TRY_GOTO(st, done, ht_arena_take(&pa, &be->scratch, (size_t)(m * k) * sizeof(float)));
    HT_TRY_GOTO(st, done, ht_arena_take(&pb, &be->scratch, (size_t)(k * n) * sizeof(float)));
    HT_TRY_GOTO(st, done, ht_arena_take(&pc, &be->scratch, (size_t)(m * n) * sizeof(float)));
    w.a = pa;
    w.b = pb;
    w.c = pc;
    for (int64_t i0 = 0; i0 < a->m; i0 += TILE_M)
        HT_TRY_GOTO(st, done, widened_rows(be, a, &w, i0));
done:
    ht_arena_reset(&be->scratch, mark);
    return st;
}

size_t ht_gemm_scratch_bytes(int64_t m, int64_t n, int64_t k, enum ht_dtype ab_dtype)
{
    if (ab_dtype == HT_DTYPE_F32) return 0;
    m = min64(TILE_M, m);
    n = min64(TILE_N, n);
    k = min64(TILE_K, k);
    return ht_arena_bytes((size_t)(m * k) * sizeof(float)) +
           ht_arena_bytes((size_t)(k * n) * sizeof(float)) +
           ht_arena_bytes((size_t)(m * n) * sizeof(float));
}

/* ---- */

enum ht_status ht_gemm_cpu(struct ht_backend *be, const struct ht_gemm_args *a)
{
    if (a->k == 0) { // an empty sum
        if (a->beta == 0.0f)
            for (int64_t i = 0; i < a->m; i++)
                memset((char *)a->c + (size_t)(i * a->ldc) * ht_dtype_bytes(a->c_dtype), 0,
                       (size_t)a->n * ht_dtype_bytes(a->c_dtype));
        return HT_OK;
    }
    switch (pick_path(be, a)) {
    case PATH_GEMV: return ht_core_ops_get(HT_BACKEND_CPU)->gemv[be->isa](be, a);
    case PATH_WIDENED: return run_widened(be, a);
    case PATH_ONEDNN: break;
    }
    return ht_gemm_onednn(be, a);
}
