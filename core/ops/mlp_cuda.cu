/* core/ops/mlp_cuda.cu: SwiGLU on CUDA (mlp.h). Bound by memory: every element moves once, 16 bytes
 * at a time. Backward reads gate and up before it writes over them.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
}

constexpr int kThreads = 256;

/* Block (row, kThreads * W columns). */
template <typename T, int W>
static __global__ void __launch_bounds__(kThreads)
    swiglu_forward_kernel(T *y, const T *gate_up, int64_t n)
{
    const int64_t row = blockIdx.x, i = ((int64_t)blockIdx.y * kThreads + threadIdx.x) * W;
    float gate[W], up[W];

    if (i >= n) return;
    load_n<W>(gate, gate_up + row * 2 * n + i);
    load_n<W>(up, gate_up + row * 2 * n + n + i);
    for (int k = 0; k < W; k++) gate[k] = gate[k] * sigmoid(gate[k]) * up[k];
    store_n<W>(y + row * n + i, gate);
}

template <typename T, int W>
static __global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(T *grad_gate_up, T *y, const T *gate_up, const T *grad_y, int64_t n)
{
    const int64_t row = blockIdx.x, i = ((int64_t)blockIdx.y * kThreads + threadIdx.x) * W;
    float gate[W], up[W], gy[W], out[W];

    if (i >= n) return;
    load_n<W>(gate, gate_up + row * 2 * n + i);
    load_n<W>(up, gate_up + row * 2 * n + n + i);
    load_n<W>(gy, grad_y + row * n + i);
    for (int k = 0; k < W; k++) {
        const float s = sigmoid(gate[k]), silu = gate[k] * s;
        out[k] = silu * up[k]; // as in forward: the same bits
        gate[k] = gy[k] * up[k] * (s * (1.0f + gate[k] * (1.0f - s)));
        up[k] = gy[k] * silu;
    }
    store_n<W>(grad_gate_up + row * 2 * n + i, gate);
    store_n<W>(grad_gate_up + row * 2 * n + n + i, up);
    if (y) store_n<W>(y + row * n + i, out);
}

static dim3 grid_of(const struct ht_swiglu_args *a, int width)
{
    return dim3((unsigned)a->n_rows, (unsigned)ceil_div(a->d_ff, (int64_t)kThreads * width));
}

template <typename T>
static enum ht_status forward(struct ht_backend *be, const struct ht_swiglu_args *a)
{
    constexpr int W = kVec<T>;
    const T *gate_up = (const T *)a->gate_up;
    T *y = (T *)a->y;

    if (rows_aligned(gate_up, a->d_ff) && rows_aligned(y, a->d_ff))
        HT_LAUNCH(be, (swiglu_forward_kernel<T, W>), grid_of(a, W), kThreads, 0, y, gate_up,
                  a->d_ff);
    else
        HT_LAUNCH(be, (swiglu_forward_kernel<T, 1>), grid_of(a, 1), kThreads, 0, y, gate_up,
                  a->d_ff);
    return ht_cuda_check_launch(be, "swiglu_forward");
}

template <typename T>
static enum ht_status backward(struct ht_backend *be, const struct ht_swiglu_args *a)
{
    constexpr int W = kVec<T>;
    const T *gate_up = (const T *)a->gate_up, *grad_y = (const T *)a->grad_y;
    T *y = (T *)a->y, *grad = (T *)a->grad_gate_up;

    if (rows_aligned(gate_up, a->d_ff) && rows_aligned(y, a->d_ff) &&
        rows_aligned(grad_y, a->d_ff) && rows_aligned(grad, a->d_ff))
        HT_LAUNCH(be, (swiglu_backward_kernel<T, W>), grid_of(a, W), kThreads, 0, grad, y, gate_up,
                  grad_y, a->d_ff);
    else
        HT_LAUNCH(be, (swiglu_backward_kernel<T, 1>), grid_of(a, 1), kThreads, 0, grad, y, gate_up,
                  grad_y, a->d_ff);
    return ht_cuda_check_launch(be, "swiglu_backward");
}

extern "C" enum ht_status ht_swiglu_forward_cuda(struct ht_backend *be,
                                                 const struct ht_swiglu_args *a)
{
    return HT_DISPATCH(a->dtype, "swiglu", forward, be, a);
}

extern "C" enum ht_status ht_swiglu_backward_cuda(struct ht_backend *be,
                                                  const struct ht_swiglu_args *a)
{
    return HT_DISPATCH(a->dtype, "swiglu", backward, be, a);
}
