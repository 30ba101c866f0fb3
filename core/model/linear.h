/* core/model/linear.h: the three products of a linear layer y = x W^T, W stored [out, in]. */
#ifndef HT_MODEL_LINEAR_H
#define HT_MODEL_LINEAR_H

#include "core/ops/gemm.h"

struct ht_linear {
    int64_t n_tokens, n_in, n_out;
    enum ht_dtype dtype;
};

/* y (T, out) = x (T, in) W^T */
static inline enum ht_status ht_linear_forward(struct ht_backend *be, const struct ht_linear *l,
                                               void *y, const void *x, const void *w)
{
    return ht_gemm(be, &(struct ht_gemm_args){ .m = l->n_tokens,
                                               .n = l->n_out,
                                               .k = l->n_in,
                                               .trans_b = true,
                                               .ab_dtype = l->dtype,
                                               .c_dtype = l->dtype,
                                               .a = x,
                                               .lda = l->n_in,
                                               .b = w,
                                               .ldb = l->n_in,
                                               .c = y,
                                               .ldc = l->n_out,
                                               .alpha = 1.0f });
}

/* grad_x (T, in) = grad_y (T, out) W */
static inline enum ht_status ht_linear_backward_x(struct ht_backend *be, const struct ht_linear *l,
                                                  void *grad_x, const void *grad_y, const void *w)
{
    return ht_gemm(be, &(struct ht_gemm_args){ .m = l->n_tokens,
                                               .n = l->n_in,
                                               .k = l->n_out,
                                               .ab_dtype = l->dtype,
                                               .c_dtype = l->dtype,
                                               .a = grad_y,
                                               .lda = l->n_out,
                                               .b = w,
                                               .ldb = l->n_in,
                                               .c = grad_x,
                                               .ldc = l->n_in,
                                               .alpha = 1.0f });
}

/* grad_w (out, in) += grad_y^T x */
static inline enum ht_status ht_linear_backward_w(struct ht_backend *be, const struct ht_linear *l,
                                                  float *grad_w, const void *grad_y, const void *x)
{
    return ht_gemm(be, &(struct ht_gemm_args){ .m = l->n_out,
                                               .n = l->n_in,
                                               .k = l->n_tokens,
                                               .trans_a = true,
                                               .ab_dtype = l->dtype,
                                               .c_dtype = HT_DTYPE_F32,
                                               .a = grad_y,
                                               .lda = l->n_out,
                                               .b = x,
                                               .ldb = l->n_in,
                                               .c = grad_w,
                                               .ldc = l->n_in,
                                               .alpha = 1.0f,
                                               .beta = 1.0f });
}

#endif
