/* core/ops/gemm_fp8.c: the checks in front of the kernels of gemm_fp8.h. */
#include "core/ops/gemm_fp8.h"

#include <inttypes.h>

#include "core/base/cuda_device.h"
#include "core/ops/core_ops.h"
#include "core/ops/gemm_fp8_impl.h"

enum ht_status ht_fp8_check_backend(const struct ht_backend *be)
{
    if (be->kind != HT_BACKEND_CUDA)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "fp8 products are computed on GPUs of compute capability 8.9 and later, not "
                       "on the CPU backend");
    const struct ht_cuda_device *d = ht_cuda_device_of(be);
    if (d->arch >= HT_FP8_MIN_ARCH) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED,
                   "fp8 products need a GPU of compute capability 8.9 or later (L4, H100 and "
                   "newer); %s has %d.%d",
                   d->name, d->arch / 10, d->arch % 10);
}

static enum ht_status check_size(const char *op, const char *name, int64_t n)
{
    if (n >= 0 && n % HT_FP8_UNIT == 0) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: %s is %" PRId64 "; it must be a multiple of %d", op, name, n,
                   HT_FP8_UNIT);
}

static enum ht_status check_aligned(const char *op, const char *name, const void *p)
{
    if ((uintptr_t)p % 16 == 0) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: %s is not at a multiple of 16 bytes", op, name);
}

enum ht_status ht_fp8_quantise(struct ht_backend *be, const struct ht_fp8_quantise_args *a)
{
    static const char op[] = "fp8 quantise";

    HT_TRY(ht_fp8_check_backend(be));
    HT_TRY(check_size(op, "rows", a->rows));
    HT_TRY(check_size(op, "cols", a->cols));
    HT_TRY(ht_ops_check_ptr(op, "x", a->x, a->rows * a->cols));
    HT_TRY(ht_ops_check_ptr(op, "scale", a->scale, 1));
    HT_TRY(ht_ops_check_ptr(op, "codes", a->codes ? a->codes : a->codes_t, a->rows * a->cols));
    HT_TRY(check_aligned(op, "x", a->x));
    HT_TRY(check_aligned(op, "codes", a->codes));
    HT_TRY(check_aligned(op, "codes_t", a->codes_t));
#ifdef HT_WITH_CUDA
    return ht_fp8_quantise_cuda(be, a);
#else
    return HT_FAIL(HT_ERR_UNSUPPORTED, "fp8: this build has no kernels for CUDA");
#endif
}

enum ht_status ht_gemm_fp8(struct ht_backend *be, const struct ht_gemm_fp8_args *a)
{
    static const char op[] = "fp8 gemm";

    HT_TRY(ht_fp8_check_backend(be));
    HT_TRY(check_size(op, "m", a->m));
    HT_TRY(check_size(op, "n", a->n));
    HT_TRY(check_size(op, "k", a->k));
    HT_TRY(ht_ops_check_dtype(op, a->c_dtype));
    if (a->beta != 0.0f && a->beta != 1.0f)
        return HT_FAIL(HT_ERR_ARG, "%s: beta is %g; it must be 0 or 1", op, (double)a->beta);
    if (a->a_format == HT_FP8_E5M2 && a->b_format == HT_FP8_E5M2)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: A and B are both e5m2; one may be", op);
    if (a->m == 0 || a->n == 0) return HT_OK;
    HT_TRY(ht_ops_check_ptr(op, "A", a->a, a->m * a->k));
    HT_TRY(ht_ops_check_ptr(op, "B", a->b, a->n * a->k));
    HT_TRY(ht_ops_check_ptr(op, "C", a->c, a->m * a->n));
    HT_TRY(ht_ops_check_ptr(op, "scale of A", a->scale_a, 1));
    HT_TRY(ht_ops_check_ptr(op, "scale of B", a->scale_b, 1));
    HT_TRY(check_aligned(op, "A", a->a));
    HT_TRY(check_aligned(op, "B", a->b));
    HT_TRY(check_aligned(op, "C", a->c));
#ifdef HT_WITH_CUDA
    return ht_gemm_fp8_cuda(be, a);
#else
    return HT_FAIL(HT_ERR_UNSUPPORTED, "fp8: this build has no kernels for CUDA");
#endif
}
