/* ssm/conv1d_cuda.cu: depthwise causal convolution and SiLU, forward and backward (conv1d.h has the
 * equations).
 *
 * A thread owns a few channels and walks a strip of 32 tokens with taps and window in registers; a
 * thread block is 8 strips of one set of channels, 256 tokens (HT_CONV1D_BLOCK). Borders of
 * sequences restart the window. Rows before a strip are read again, which hits L2. Bound by memory:
 * one read and one write per element forward (33 KB per token at Bamba's 8448 channels), two reads
 * and one write backward (50 KB), which recomputes W-1 rows of dpre per strip. grad_w: strips in
 * registers, a block's eight in order, then blocks in order.
 */
#include "ssm/rows_cuda.h"

namespace {

constexpr int kThreads = 256, kLanes = 32, kStrips = kThreads / kLanes;
constexpr int kStrip = HT_CONV1D_BLOCK / kStrips; // tokens
constexpr int kChannels = 4;                      // of a thread

struct conv_args {
    const int32_t *starts;
    int n_seqs, n_tokens, n_channels;
    const void *x, *grad_y;
    int64_t x_stride, grad_y_stride;
    const float *w, *bias;
    void *y, *grad_x;
    int64_t y_stride, grad_x_stride;
    const float *state;  // forward
    const int32_t *slot; // places of the sequences in state, or NULL
    float *partial;      // backward: (blocks of tokens, W+1, CD)
};

template <int W>
__device__ __forceinline__ void load_taps(float (&tap)[W][kChannels], const float *w, int c)
{
#pragma unroll
    for (int i = 0; i < kChannels; i++)
#pragma unroll
        for (int k = 0; k < W; k++) tap[k][i] = w[(c + i) * W + k];
}

template <int W>
__device__ __forceinline__ void push(float (&window)[W][kChannels], const float (&v)[kChannels])
{
#pragma unroll
    for (int i = 0; i < kChannels; i++) {
#pragma unroll
        for (int k = 0; k + 1 < W; k++) window[k][i] = window[k + 1][i];
        window[W - 1][i] = v[i];
    }
}

template <int W>
__device__ __forceinline__ void weigh(float (&out)[kChannels], const float (&tap)[W][kChannels],
                                      const float (&window)[W][kChannels],
                                      const float (&bias)[kChannels])
{
#pragma unroll
    for (int i = 0; i < kChannels; i++) {
        float s = bias[i];
#pragma unroll
        for (int k = 0; k < W; k++) s += tap[k][i] * window[k][i];
        out[i] = s;
    }
}

/* window[1 ..]: the W-1 rows before row t of sequence s, from x, the carried state, or zero. */
template <int W, typename T>
__device__ __forceinline__ void load_window(float (&window)[W][kChannels], const conv_args &a,
                                            int s, int t, int c)
{
    const int begin = a.starts[s];
#pragma unroll
    for (int k = 1; k < W; k++) {
        const int row = t - W + k;
        if (row >= begin) {
            load4(window[k], (const T *)a.x + row * a.x_stride + c);
        } else if (a.state) {
            const int64_t place = a.slot ? a.slot[s] : s;
            const int64_t at = place * (W - 1) + row - begin + W - 1;
            load4(window[k], a.state + at * a.n_channels + c);
        } else {
#pragma unroll
            for (int i = 0; i < kChannels; i++) window[k][i] = 0.0f;
        }
    }
#pragma unroll
    for (int i = 0; i < kChannels; i++) window[0][i] = 0.0f; // pushed out before it is read
}

/* What a thread works on. */
struct strip {
    int c, t0, t1;

    __device__ __forceinline__ strip(const conv_args &a)
    {
        const int per_row = (a.n_channels + kLanes * kChannels - 1) / (kLanes * kChannels);
        c = ((int)blockIdx.x % per_row * kLanes + (int)threadIdx.x % kLanes) * kChannels;
        t0 = ((int)blockIdx.x / per_row * kStrips + (int)threadIdx.x / kLanes) * kStrip;
        t1 = min(t0 + kStrip, a.n_tokens);
    }
};

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) conv1d_forward_kernel(conv_args a)
{
    const strip p(a);
    float tap[W][kChannels], window[W][kChannels], bias[kChannels] = { 0 };

    if (p.c >= a.n_channels || p.t0 >= p.t1) return;
    load_taps(tap, a.w, p.c);
    if (a.bias) load4(bias, a.bias + p.c);
    int s = seq_of(a.starts, a.n_seqs, p.t0), end = a.starts[s + 1];
    load_window<W, T>(window, a, s, p.t0, p.c);
    for (int t = p.t0; t < p.t1; t++) {
        float v[kChannels];
        if (t == end) {
            end = a.starts[++s + 1];
            load_window<W, T>(window, a, s, t, p.c);
        }
        load4(v, (const T *)a.x + t * a.x_stride + p.c);
        push(window, v);
        weigh(v, tap, window, bias);
#pragma unroll
        for (int i = 0; i < kChannels; i++) v[i] *= sigmoid(v[i]);
        store4((T *)a.y + t * a.y_stride + p.c, v);
    }
}

/* The last W-1 rows of every sequence; older ones move up when it is shorter. A thread owns a
 * channel of a sequence. */
template <int W, typename T>
__global__ void __launch_bounds__(kThreads) conv1d_state_kernel(conv_args a, float *state)
{
    const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
    const int s = (int)(i / a.n_channels), c = (int)(i % a.n_channels);
    if (s >= a.n_seqs) return;
    const int begin = a.starts[s], end = a.starts[s + 1];
    const int64_t place = a.slot ? a.slot[s] : s;
    float *rows = state + place * (W - 1) * a.n_channels + c;
    for (int r = 0; r < W - 1; r++) { // rising: what moves comes from behind
        const int t = end - (W - 1) + r;
        rows[r * a.n_channels] = t >= begin ? to_f32(((const T *)a.x)[t * a.x_stride + c])
                                            : rows[(r + end - begin) * a.n_channels];
    }
}

template <int W, typename T>
__global__ void __launch_bounds__(kThreads) conv1d_backward_kernel(conv_args a)
{
    HT_SHARED(float, sums, [kStrips][W + 1][kLanes * kChannels]);
    const strip p(a);
    float grad_tap[W][kChannels] = { { 0 } }, grad_bias[kChannels] = { 0 };

    if (p.c < a.n_channels && p.t0 < p.t1) {
        float tap[W][kChannels], window[W][kChannels], bias[kChannels] = { 0 };
        load_taps(tap, a.w, p.c);
        if (a.bias) load4(bias, a.bias + p.c);
        int s = seq_of(a.starts, a.n_seqs, p.t0);
        for (int from = p.t0; from < p.t1; s++) { // one sequence's rows of the strip
            const int end = a.starts[s + 1], stop = min(end, p.t1);
            float grad[W][kChannels] = { { 0 } }; // grad[k] = dpre[t - (W-1) + k]
            load_window<W, T>(window, a, s, from, p.c);
            for (int t = from; t < stop + W - 1; t++) {
                float dpre[kChannels] = { 0 };
                if (t < end) {
                    float v[kChannels], gy[kChannels];
                    load4(v, (const T *)a.x + t * a.x_stride + p.c);
                    load4(gy, (const T *)a.grad_y + t * a.grad_y_stride + p.c);
                    push(window, v);
                    weigh(v, tap, window, bias);
#pragma unroll
                    for (int i = 0; i < kChannels; i++) {
                        const float gate = sigmoid(v[i]);
                        dpre[i] = gy[i] * (gate * (1.0f + v[i] * (1.0f - gate)));
                    }
                }
                push(grad, dpre);
                if (t < stop) {
#pragma unroll
                    for (int i = 0; i < kChannels; i++) {
#pragma unroll
                        for (int k = 0; k < W; k++) grad_tap[k][i] += dpre[i] * window[k][i];
                        grad_bias[i] += dpre[i];
                    }
                }
                if (t - (W - 1) >= from) {
                    float g[kChannels] = { 0 };
#pragma unroll
                    for (int i = 0; i < kChannels; i++)
#pragma unroll
                        for (int k = 0; k < W; k++) g[i] += tap[k][i] * grad[W - 1 - k][i];
                    store4((T *)a.grad_x + (t - (W - 1)) * a.grad_x_stride + p.c, g);
                }
            }
            from = stop;
        }
    }
    const int row = (int)threadIdx.x / kLanes, col = (int)threadIdx.x % kLanes * kChannels;
#pragma unroll
    for (int i = 0; i < kChannels; i++) {
#pragma unroll
        for (int k = 0; k < W; k++) sums[row][k][col + i] = grad_tap[k][i];
        sums[row][W][col + i] = grad_bias[i];
    }
    __syncthreads();
    const int c0 = p.c - col; // of the thread block
    const int per_row = (a.n_channels + kLanes * kChannels - 1) / (kLanes * kChannels);
    float *out = a.partial + (int64_t)((int)blockIdx.x / per_row) * (W + 1) * a.n_channels;
    for (int i = (int)threadIdx.x; i < (W + 1) * kLanes * kChannels; i += kThreads) {
        const int k = i / (kLanes * kChannels), c = i % (kLanes * kChannels);
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kStrips; r++) sum += sums[r][k][c];
        if (c0 + c < a.n_channels) out[(int64_t)k * a.n_channels + c0 + c] = sum;
    }
}

/* grad_w and grad_bias: partial sums over blocks of tokens, in order. One (k, c) per thread. */
template <int W>
__global__ void __launch_bounds__(kThreads)
    conv1d_sum_kernel(float *grad_w, float *grad_bias, const float *partial, int n_blocks,
                      int n_channels)
{
    const int i = (int)(blockIdx.x * kThreads + threadIdx.x), k = i / n_channels;
    const int c = i % n_channels;
    if (k > W) return;
    float sum = 0.0f;
    for (int b = 0; b < n_blocks; b++) sum += partial[((int64_t)b * (W + 1) + k) * n_channels + c];
    if (k < W)
        grad_w[c * W + k] += sum;
    else if (grad_bias)
        grad_bias[c] += sum;
}

conv_args args_of(const struct ht_conv1d_args *a)
{
    conv_args k;
    k.starts = a->seqs.starts;
    k.n_seqs = (int)a->seqs.n_seqs;
    k.n_tokens = (int)a->n_tokens;
    k.n_channels = (int)a->n_channels;
    k.x = a->x;
    k.grad_y = a->grad_y;
    k.x_stride = a->x_stride;
    k.grad_y_stride = a->grad_y_stride;
    k.w = a->w;
    k.bias = a->bias;
    k.y = a->y;
    k.grad_x = a->grad_x;
    k.y_stride = a->y_stride;
    k.grad_x_stride = a->grad_x_stride;
    k.state = a->state;
    k.slot = a->slot;
    k.partial = NULL;
    return k;
}

unsigned n_thread_blocks(const struct ht_conv1d_args *a)
{
    return (unsigned)(ceil_div(a->n_channels, kLanes * kChannels) *
                      ceil_div(a->n_tokens, HT_CONV1D_BLOCK));
}

template <int W, typename T>
enum ht_status forward(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    const conv_args k = args_of(a);
    HT_LAUNCH(be, (conv1d_forward_kernel<W, T>), n_thread_blocks(a), kThreads, 0, k);
    if (a->state) {
        const int64_t n = a->seqs.n_seqs * a->n_channels;
        HT_LAUNCH(be, (conv1d_state_kernel<W, T>), (unsigned)ceil_div(n, kThreads), kThreads, 0, k,
                  a->state);
    }
    return ht_cuda_check_launch(be, "conv1d_forward");
}

template <int W, typename T>
enum ht_status backward(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    const size_t mark = ht_arena_mark(&be->scratch);
    conv_args k = args_of(a);
    void *p = NULL;

    HT_TRY(ht_arena_take(&p, &be->scratch,
                         ht_conv1d_scratch_bytes(a->n_tokens, a->n_channels, a->d_conv)));
    k.partial = (float *)p;
    HT_LAUNCH(be, (conv1d_backward_kernel<W, T>), n_thread_blocks(a), kThreads, 0, k);
    HT_LAUNCH(be, conv1d_sum_kernel<W>, (unsigned)ceil_div((W + 1) * a->n_channels, kThreads),
              kThreads, 0, a->grad_w, a->grad_bias, k.partial,
              (int)ceil_div(a->n_tokens, HT_CONV1D_BLOCK), k.n_channels);
    ht_arena_reset(&be->scratch, mark);
    return ht_cuda_check_launch(be, "conv1d_backward");
}

template <typename T>
enum ht_status forward_of(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    return a->d_conv == 2   ? forward<2, T>(be, a)
           : a->d_conv == 3 ? forward<3, T>(be, a)
                            : forward<4, T>(be, a);
}

template <typename T>
enum ht_status backward_of(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    return a->d_conv == 2   ? backward<2, T>(be, a)
           : a->d_conv == 3 ? backward<3, T>(be, a)
                            : backward<4, T>(be, a);
}

} // namespace

extern "C" enum ht_status ht_conv1d_forward_cuda(struct ht_backend *be,
                                                 const struct ht_conv1d_args *a)
{
    const char *op = "conv1d_forward";

    HT_TRY(check_rows_aligned(op, "x", a->x, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "y", a->y, a->y_stride, a->dtype));
    return HT_DISPATCH(a->dtype, op, forward_of, be, a);
}

extern "C" enum ht_status ht_conv1d_backward_cuda(struct ht_backend *be,
                                                  const struct ht_conv1d_args *a)
{
    const char *op = "conv1d_backward";

    HT_TRY(check_rows_aligned(op, "x", a->x, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_y", a->grad_y, a->grad_y_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_x", a->grad_x, a->grad_x_stride, a->dtype));
    return HT_DISPATCH(a->dtype, op, backward_of, be, a);
}
