/* tests/emu/gemm_emu.cpp: products of the emulated device: plain loops, sums in fp32.
 *
 * Takes the place of core/ops/gemm_cublaslt.cu. The extents of A, B and C must lie in device
 * allocations, as a kernel's accesses would have to.
 */
#include <vector>

#include "tests/emu/emu_impl.h"

extern "C" {
#include "core/ops/core_ops.h"
#include "core/ops/gemm_fp8_impl.h"
}

static bool inside(const void *p, int64_t rows, int64_t cols, int64_t ld, enum ht_dtype d)
{
    return emu_heap_valid(p, (size_t)((rows - 1) * ld + cols) * ht_dtype_bytes(d));
}

static void rows_of_product(const struct ht_gemm_args *a)
{
    std::vector<float> b((size_t)(a->k * a->n)), row((size_t)a->n);

    for (int64_t k = 0; k < a->k; k++)
        for (int64_t j = 0; j < a->n; j++)
            b[(size_t)(k * a->n + j)] =
                ht_load_f32(a->b, a->trans_b ? j * a->ldb + k : k * a->ldb + j, a->ab_dtype);
    for (int64_t i = 0; i < a->m; i++) {
        for (float &v : row) v = 0.0f;
        for (int64_t k = 0; k < a->k; k++) {
            const float v =
                ht_load_f32(a->a, a->trans_a ? k * a->lda + i : i * a->lda + k, a->ab_dtype);
            for (size_t j = 0; j < row.size(); j++) row[j] += v * b[(size_t)k * row.size() + j];
        }
        for (int64_t j = 0; j < a->n; j++) {
            const int64_t at = i * a->ldc + j;
            const float old = a->beta != 0.0f ? a->beta * ht_load_f32(a->c, at, a->c_dtype) : 0.0f;
            ht_store_f32(a->c, at, a->c_dtype, a->alpha * row[(size_t)j] + old);
        }
    }
}

extern "C" enum ht_status ht_gemm_cuda(struct ht_backend *be, const struct ht_gemm_args *a)
{
    (void)be;
    if (!inside(a->c, a->m, a->n, a->ldc, a->c_dtype) ||
        (a->k > 0 &&
         (!inside(a->a, a->trans_a ? a->k : a->m, a->trans_a ? a->m : a->k, a->lda, a->ab_dtype) ||
          !inside(a->b, a->trans_b ? a->n : a->k, a->trans_b ? a->k : a->n, a->ldb, a->ab_dtype))))
        return HT_FAIL(HT_ERR_CUDA, "gemm: A, B or C is not inside a device allocation");
    emu_heap_open();
    rows_of_product(a);
    emu_heap_close();
    return HT_OK;
}

/* As bf16 values would be: both formats are exact in fp32. */
extern "C" enum ht_status ht_gemm_fp8_cuda(struct ht_backend *be, const struct ht_gemm_fp8_args *a)
{
    const size_t n_a = (size_t)(a->m * a->k), n_b = (size_t)(a->n * a->k);
    std::vector<float> va(n_a), vb(n_b);
    struct ht_gemm_args p = {};

    (void)be;
    if (!inside(a->c, a->m, a->n, a->n, a->c_dtype) || !emu_heap_valid(a->a, n_a) ||
        !emu_heap_valid(a->b, n_b) || !emu_heap_valid(a->scale_a, 4) ||
        !emu_heap_valid(a->scale_b, 4))
        return HT_FAIL(HT_ERR_CUDA, "fp8 gemm: A, B, C or a scale is not inside an allocation");
    emu_heap_open();
    for (size_t i = 0; i < n_a; i++) va[i] = ht_fp8_to_f32(a->a[i], a->a_format);
    for (size_t i = 0; i < n_b; i++) vb[i] = ht_fp8_to_f32(a->b[i], a->b_format);
    p.m = a->m, p.n = a->n, p.k = a->k;
    p.trans_b = true;
    p.ab_dtype = HT_DTYPE_F32;
    p.c_dtype = a->c_dtype;
    p.a = va.data(), p.b = vb.data(), p.c = a->c;
    p.lda = p.ldb = a->k;
    p.ldc = a->n;
    p.alpha = *a->scale_a * *a->scale_b;
    p.beta = a->beta;
    rows_of_product(&p);
    emu_heap_close();
    return HT_OK;
}
