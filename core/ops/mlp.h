/* core/ops/mlp.h: SwiGLU between the two MLP products (spec 3.6).
 *
 *   forward   y = silu(gate) * up
 *   backward  grad_gate = grad_y * up * silu'(gate)      grad_up = grad_y * silu(gate)
 * gate and up are the halves of each row of gate_up, as one product with [gate; up] leaves them.
 */
#ifndef HT_OPS_MLP_H
#define HT_OPS_MLP_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_swiglu_args {
    int64_t n_rows, d_ff;
    enum ht_dtype dtype;
    const void *gate_up; // (n_rows, 2*d_ff): gate | up
    void *y;             // (n_rows, d_ff): forward writes; backward writes it again unless NULL
    const void *grad_y;  // (n_rows, d_ff)      backward
    void *grad_gate_up;  // (n_rows, 2*d_ff)    backward; may equal gate_up
};

enum ht_status ht_swiglu_forward(struct ht_backend *be, const struct ht_swiglu_args *a);
enum ht_status ht_swiglu_backward(struct ht_backend *be, const struct ht_swiglu_args *a);

#endif
