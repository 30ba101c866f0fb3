/* core/ops/gemm.h: matrix products through oneDNN (CPU) or cuBLASLt (CUDA).
 *
 *   C = alpha * op(A) op(B) + beta * C
 * op(A) is (m, k), op(B) is (k, n), C is (m, n), all row-major.
 *
 * A linear layer y = x W^T has trans_b = true with W stored [out, in]; its gradients are
 *   grad_x = grad_y W          (neither transposed)
 *   grad_W += grad_y^T x       (trans_a, beta = 1, C in fp32)
 * Sums are fp32 in every dtype. The same shapes with the same thread count give the same bits. With
 * trans_b and few rows (m <= 16 in fp32, 32 in bf16: decoding) a row of C depends on its row of A
 * alone: not on m, nor on the threads. One thread at a time may use a backend: products of its
 * shapes are cached in it.
 */
#ifndef HT_OPS_GEMM_H
#define HT_OPS_GEMM_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_gemm_args {
    int64_t m, n, k;
    bool trans_a, trans_b;
    enum ht_dtype ab_dtype; // of A and B
    enum ht_dtype c_dtype;  // of C; F32 or the dtype of A and B
    const void *a;          // (m, k), or (k, m) when trans_a
    int64_t lda;            // elements between rows of A as stored
    const void *b;          // (k, n), or (n, k) when trans_b
    int64_t ldb;
    void *c; // (m, n), must not overlap A or B
    int64_t ldc;
    float alpha, beta; // beta is 0 (C need not be initialised) or 1
};

/* HT_ERR_ARG: a negative size, a stride below the row, beta not 0 or 1. Sizes of 0 are allowed. */
enum ht_status ht_gemm(struct ht_backend *be, const struct ht_gemm_args *a);

/* Scratch that any ht_gemm of this size may take from be->scratch (0 where the library owns it). */
size_t ht_gemm_scratch_bytes(int64_t m, int64_t n, int64_t k, enum ht_dtype ab_dtype);

#endif
