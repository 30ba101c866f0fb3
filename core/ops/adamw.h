/* core/ops/adamw.h: AdamW with fp32 master weights over a slice of the flat parameter buffer
 * (Loshchilov & Hutter 2019, algorithm 2, decoupled decay).
 *
 *   g = grad_scale * grad        m = b1 m + (1-b1) g        v = b2 v + (1-b2) g^2
 *   master -= lr * (m / c1 / (sqrt(v / c2) + eps) + weight_decay * master)
 *   c1 = 1 - b1^step, c2 = 1 - b2^step (computed in fp64, step from 1)
 * weight is the copy that the model computes with (rounded to nearest when bf16). Element-wise: no
 * dependence on slicing.
 */
#ifndef HT_OPS_ADAMW_H
#define HT_OPS_ADAMW_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_adamw_args {
    int64_t n, step;
    float lr, beta1, beta2, eps, weight_decay, grad_scale;
    float *master, *exp_avg, *exp_avg_sq; // (n)
    const float *grad;                    // (n)
    void *weight;                         // (n) weight_dtype
    enum ht_dtype weight_dtype;
    const float
        *clip; // (1) or NULL: a further factor of the gradient; not finite: no change at all
};

enum ht_status ht_adamw_step(struct ht_backend *be, const struct ht_adamw_args *a);

/* Sum of squares of n fp32 values: fp64, fixed order (blocks of 4096), independent of thread count.
 * NaN and infinity come through. out is memory of the backend, like x. */
enum ht_status ht_sum_squares(struct ht_backend *be, double *out, const float *x, int64_t n);

/* out[c] = x[0, c] + x[1, c] + ... in fp64, in a fixed order, all in memory of the backend; x
 * (n_rows, n_columns). Sums over parts of a buffer, micro-batches, ranks. out is not in x. */
enum ht_status ht_sum_rows(struct ht_backend *be, double *out, const double *x, int64_t n_rows,
                           int64_t n_columns);

/* The factor for ht_adamw_step that limits the gradient's norm, without waiting for a device:
 *   norm = grad_scale * sqrt(squares[0])
 *   clip[0] = max_norm / norm when 0 < max_norm < norm, else 1; NaN when norm or loss[0] is
 *             not finite
 * loss: memory of the backend, like squares and clip; or NULL
 */
enum ht_status ht_clip_factor(struct ht_backend *be, float *clip, const double *squares,
                              const double *loss, double grad_scale, double max_norm);

#endif
