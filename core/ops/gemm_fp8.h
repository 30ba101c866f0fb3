/* core/ops/gemm_fp8.h: products of 8-bit matrices on CUDA, and how a matrix becomes 8-bit (fp8.h).
 *
 *   value = scale * code      scale = the smallest power of two with which max |x| fits
 *   C = (scale_a A) (scale_b B)^T + beta * C
 *
 * Scales are those of the values at hand ("current scaling", one per matrix): the device finds the
 * largest magnitude, derives the scale and rounds, and the host never waits. Tensor cores of sm_89
 * and later want both operands contiguous along k, so a matrix is written in both orders at once
 * where both are used (a weight: forward, and gradient of x). An element that is not finite makes
 * its scale NaN and so every element of every product: a training step with one is skipped.
 *
 * Never run on a GPU yet (docs/gpu-status.md).
 */
#ifndef HT_OPS_GEMM_FP8_H
#define HT_OPS_GEMM_FP8_H

#include <stdbool.h>
#include <stddef.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"
#include "core/ops/fp8.h"

enum { HT_FP8_UNIT = 16, HT_FP8_MIN_ARCH = 89 };

/* HT_ERR_UNSUPPORTED: the CPU backend, or a GPU without fp8; the message says which there are. */
enum ht_status ht_fp8_check_backend(const struct ht_backend *be);

struct ht_fp8_quantise_args {
    int64_t rows, cols; // multiples of 16
    enum ht_fp8 format;
    const ht_bf16 *x; // (rows, cols), 16-byte aligned as are the codes
    uint8_t *codes;   // (rows, cols), or NULL
    uint8_t *codes_t; // (cols, rows), or NULL
    float *scale;     // (1)
};

/* Taken from be->scratch during the call. */
enum { HT_FP8_QUANTISE_SCRATCH_BYTES = 1024 };

/* HT_ERR_ARG: a size that is not a multiple of 16, neither codes nor codes_t. */
enum ht_status ht_fp8_quantise(struct ht_backend *be, const struct ht_fp8_quantise_args *a);

struct ht_gemm_fp8_args {
    int64_t m, n, k;                // multiples of 16
    enum ht_fp8 a_format, b_format; // not both e5m2
    const uint8_t *a;               // (m, k)
    const uint8_t *b;               // (n, k)
    const float *scale_a, *scale_b; // (1) in device memory, each
    enum ht_dtype c_dtype;          // F32 or BF16
    void *c;                        // (m, n)
    float beta;                     // 0, or 1
    bool fast; // sums may lose bits (14 are kept): for forward passes. Else fp32 sums
};

enum ht_status ht_gemm_fp8(struct ht_backend *be, const struct ht_gemm_fp8_args *a);

#endif
