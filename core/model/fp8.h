/* core/model/fp8.h: training with the projections of the layers in fp8 (core/ops/gemm_fp8.h).
 *
 *   y      = x W^T        x e4m3, W e4m3                       sums may lose bits ("fast")
 *   grad_x = grad_y W     grad_y e5m2, W^T e4m3                fp32 sums
 *   grad_W += grad_y^T x  grad_y^T e5m2, x^T e4m3, result fp32 fp32 sums
 *
 * Everything else stays as it is: master weights, activations between products, embedding, head,
 * scan, convolution, attention, norms. x is rounded once for the forward and once for the backward
 * product (what is kept in between are the bf16 activations), grad_y once for both.
 *
 * A weight is rounded into both orders at its first use after ht_model_weights_changed and then
 * used by all micro-batches of the step, in both passes. Where weights come and go (ZeRO-3) no copy
 * can stay: it is made anew at every use, in the order that this use wants.
 *
 * A product whose sizes are no multiples of 16 is computed in the model's type.
 */
#ifndef HT_MODEL_FP8_H
#define HT_MODEL_FP8_H

#include "core/config/linears.h"
#include "core/model/linear.h"
#include "core/model/model.h"
#include "core/ops/gemm_fp8.h"

/* Compute the projections of m in fp8 from here on, micro-batches up to n_tokens. every_weight:
 * copies of all weights (m->matrix is whole). HT_ERR_UNSUPPORTED: a backend or model without. */
enum ht_status ht_model_use_fp8(struct ht_model *m, int64_t n_tokens, bool every_weight);

/* How many projections of the model are fp8 in micro-batches of n_tokens, and the sizes of the
 * first one that is not. */
struct ht_fp8_cover {
    int n_fp8, n_all;
    int64_t n_in, n_out;
};
struct ht_fp8_cover ht_model_fp8_cover(const struct ht_model_config *c, int64_t n_tokens);

/* Inside core/model: a layer's three products. */
enum ht_status ht_fp8_forward(struct ht_model *m, int layer, enum ht_tensor_role role,
                              const struct ht_linear *l, void *y, const void *x);

/* Both of a projection's backward products, one after the other in either order; another
 * projection's may not come in between. They are fp8 where m says so. */
enum ht_status ht_model_linear_backward_x(struct ht_model *m, int layer, enum ht_tensor_role role,
                                          const struct ht_linear *l, void *grad_x,
                                          const void *grad_y);
enum ht_status ht_model_linear_backward_w(struct ht_model *m, int layer, enum ht_tensor_role role,
                                          const struct ht_linear *l, float *grads,
                                          const void *grad_y, const void *x);

/* Whether this product is one of them. */
bool ht_fp8_applies(const struct ht_model *m, const struct ht_linear *l);

void ht_model_fp8_free(struct ht_model *m);

#endif
