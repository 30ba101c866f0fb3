/* core/ops/rmsnorm.h: residual addition and RMSNorm in one pass (spec 3.1, 3.2).
 *
 *   forward   r_out[t] = r_in[t] + branch_scale * branch[t]      (r_in when branch is NULL)
 *             rstd[t] = 1 / sqrt(mean_i r_out[t,i]^2 + eps)
 *             y[t,i] = w[i] * r_out[t,i] * rstd[t]
 *   backward  with xh = r_out rstd, e = w grad_y, c = mean(e xh):
 *             grad_r_in = grad_r_out + rstd (e - c xh)           (grad_r_out NULL: 0)
 *             grad_branch = branch_scale * grad_r_in
 *             grad_w += sum_t grad_y xh
 * The residual stream is fp32; branch, y, grad_y and grad_branch have `dtype`; w is fp32. Sums are
 * fp32 in a fixed order that does not depend on the thread count.
 */
#ifndef HT_OPS_RMSNORM_H
#define HT_OPS_RMSNORM_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_rmsnorm_args {
    int64_t n_rows, d_model;
    enum ht_dtype dtype;
    float eps, branch_scale;
    bool round_residual; // round r_out to bf16 values (residual = "model" in a recipe)
    const float *w;      // (d_model)
    const float *r_in;   // (n_rows, d_model)   forward
    const void *branch;  // (n_rows, d_model) dtype, or NULL
    float *r_out; // (n_rows, d_model) written by forward, read by backward; may equal r_in; in
                  // forward NULL when branch is NULL and the caller keeps r_in
    void *y;      // (n_rows, d_model) dtype
    float *rstd;  // (n_rows) written by forward (or NULL), read by backward
    // backward only
    const void *grad_y;      // (n_rows, d_model) dtype
    const float *grad_r_out; // (n_rows, d_model) or NULL
    float *grad_r_in;        // (n_rows, d_model); may equal grad_r_out
    void *grad_branch;       // (n_rows, d_model) dtype, or NULL
    float *grad_w;           // (d_model), added to
};

enum ht_status ht_rmsnorm_forward(struct ht_backend *be, const struct ht_rmsnorm_args *a);
enum ht_status ht_rmsnorm_backward(struct ht_backend *be, const struct ht_rmsnorm_args *a);

/* Taken from be->scratch by the backward on CUDA; nothing on the CPU. */
size_t ht_rmsnorm_scratch_bytes(int64_t n_rows, int64_t d_model);

#endif
