/* ssm/gated_norm.h: gated RMSNorm, gate first, per group (spec 3.3 step 6).
 *
 *   q = y silu(z)     rstd[t,g] = 1 / sqrt(mean over the group of q^2 + eps)     o = w q rstd
 *
 * Backward (per group, r = rstd): xh = q r; e = w grad_o; c = mean(e xh); dq = (e - xh c) r;
 *   grad_w += grad_o xh; grad_y = dq silu(z); grad_z = dq y silu'(z)
 * `full` normalises over all of d_inner whatever n_groups is (bit-compatibility experiments only).
 */
#ifndef HT_SSM_GATED_NORM_H
#define HT_SSM_GATED_NORM_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_gated_norm_args {
    int64_t n_tokens, d_inner, n_groups;
    bool full;
    float eps;
    enum ht_dtype dtype;  // of y, z, o and their gradients
    const float *w;       // (d_inner)
    const void *y;        // (T, d_inner), contiguous
    const void *z;        // (T, d_inner), rows z_stride apart
    int64_t z_stride;
    void *o;              // (T, d_inner), contiguous; backward writes it again unless NULL (for grad of out_proj)
    float *rstd;          // (T, n_groups, or 1 when full): forward writes (or NULL); backward reads
    // backward only
    const void *grad_o;   // (T, d_inner), contiguous
    void *grad_y;         // (T, d_inner), contiguous; may equal grad_o
    void *grad_z;         // (T, d_inner), rows grad_z_stride apart
    int64_t grad_z_stride;
    float *grad_w;        // (d_inner), added to
};

/* HT_ERR_ARG: d_inner / n_groups not a multiple of 8. */
enum ht_status ht_gated_norm_forward(struct ht_backend *be, const struct ht_gated_norm_args *a);
enum ht_status ht_gated_norm_backward(struct ht_backend *be, const struct ht_gated_norm_args *a);
size_t ht_gated_norm_scratch_bytes(int64_t n_tokens, int64_t d_inner);

#endif
