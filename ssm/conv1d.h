/* ssm/conv1d.h: depthwise causal convolution over time, then SiLU (spec 3.3 step 2; Mamba-2 block).
 *
 *   pre[t,c] = bias[c] + sum_{k=0..W-1} w[c,k] * x[t-(W-1)+k, c]      y = silu(pre)
 *
 * within each sequence: rows before its start are zero, or the carried `state`. Tap W-1 multiplies the
 * current token. Sums and SiLU are fp32 in every dtype. x is read in place from the in_proj output, hence
 * the row strides. Backward (pre is recomputed):
 *   dpre = grad_y silu'(pre)     grad_x[s] = sum_k w[k] dpre[s+(W-1)-k]  (same sequence)
 *   grad_w[k] += sum_t dpre[t] x[t-(W-1)+k]      grad_bias += sum_t dpre[t]
 * Reductions over t run in a fixed order that does not depend on the thread count.
 */
#ifndef HT_SSM_CONV1D_H
#define HT_SSM_CONV1D_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"
#include "core/base/seqs.h"

struct ht_conv1d_args {
    struct ht_seqs seqs;
    int64_t n_tokens, n_channels, d_conv; // T, CD, W
    enum ht_dtype dtype;                  // of x, y and their gradients
    const void *x;                        // (T, CD), rows x_stride apart
    int64_t x_stride;
    const float *w;    // (CD, W)
    const float *bias; // (CD), or NULL for none
    void *y;           // (T, CD), rows y_stride apart, must not overlap x
    int64_t y_stride;
    float *state; // (n_seqs, W-1, CD) raw x rows before each sequence; read, then replaced by the last W-1
                  // rows of the sequence (older state rows move up when it is shorter); or NULL
    const int32_t *slot; // (n_seqs) sequence s stands at state[slot[s]], each place once; NULL: at state[s]
    // backward only; state must be NULL there
    const void *grad_y; // (T, CD), rows grad_y_stride apart
    int64_t grad_y_stride;
    void *grad_x; // (T, CD), rows grad_x_stride apart, must not overlap grad_y or x
    int64_t grad_x_stride;
    float *grad_w;    // (CD, W), added to
    float *grad_bias; // (CD), added to, or NULL
};

/* HT_ERR_ARG, nothing written: W outside 2..4, CD not a multiple of 8, an overlap, a state in backward. */
enum ht_status ht_conv1d_forward(struct ht_backend *be, const struct ht_conv1d_args *a);
enum ht_status ht_conv1d_backward(struct ht_backend *be, const struct ht_conv1d_args *a);
size_t ht_conv1d_scratch_bytes(int64_t n_tokens, int64_t n_channels, int64_t d_conv);

#endif
