/* ssm/gated_norm_cuda.cu: gated RMSNorm, forward and backward (gated_norm.h has the equations).
 *
 * Forward: one thread block per row and group, the row in registers: y and z read once, o written
 * (48 KB per token at d_inner 8192). Backward: one thread block per HT_GATED_NORM_BLOCK rows and
 * group, which keeps its share of grad_w in registers over the rows: y, z, grad_o read, grad_y and
 * grad_z (and o) written (80 KB, with o 96 KB); rows wider than 8192 are read again from L2 for the
 * second pass. grad_w over blocks of rows in order.
 */
#include "ssm/rows_cuda.h"

namespace {

constexpr int kWide = 8; // elements of a thread and slot

struct norm_args {
    int n_tokens, d_inner, n_groups, width; // width of a group
    float eps;
    const float *w;
    const void *y, *z, *grad_o;
    int64_t z_stride, grad_z_stride;
    void *o, *grad_y, *grad_z;
    float *rstd, *partial; // partial: (blocks of rows, d_inner)
};

/* Row t of one group: where it lies in contiguous tensors, in z and in grad_z. */
struct norm_row {
    int64_t at, z_at, grad_z_at;

    __device__ __forceinline__ norm_row(const norm_args &a, int64_t t, int group)
    {
        const int64_t j0 = (int64_t)group * a.width;
        at = t * a.d_inner + j0;
        z_at = t * a.z_stride + j0;
        grad_z_at = t * a.grad_z_stride + j0;
    }
};

template <typename T, int kThreads, int kSlots>
__global__ void __launch_bounds__(kThreads) gated_norm_forward_kernel(norm_args a)
{
    const int group = (int)(blockIdx.x % (unsigned)a.n_groups);
    const int64_t t = blockIdx.x / (unsigned)a.n_groups;
    const norm_row row(a, t, group);
    float q[kSlots][kWide], sum = 0.0f;

#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        const int j = (s * kThreads + (int)threadIdx.x) * kWide;
        float z[kWide];
        if (j >= a.width) continue;
        load_n(q[s], (const T *)a.y + row.at + j);
        load_n(z, (const T *)a.z + row.z_at + j);
#pragma unroll
        for (int i = 0; i < kWide; i++) {
            q[s][i] *= z[i] * sigmoid(z[i]);
            sum += q[s][i] * q[s][i];
        }
    }
    const float rstd = rsqrtf(block_sum<kThreads>(sum) / (float)a.width + a.eps);
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        const int j = (s * kThreads + (int)threadIdx.x) * kWide;
        float w[kWide];
        if (j >= a.width) continue;
        load_n(w, a.w + group * a.width + j);
#pragma unroll
        for (int i = 0; i < kWide; i++) q[s][i] = w[i] * (q[s][i] * rstd);
        store_n((T *)a.o + row.at + j, q[s]);
    }
    if (threadIdx.x == 0 && a.rstd) a.rstd[blockIdx.x] = rstd;
}

/* Elements j .. of a row on their way through the backward pass, in their own type: 1024 threads
 * have 64 registers each, and with floats, gates and weights kept over the sum a row cost 38 words
 * of spills (sm_90a), now 8. So the gate is computed twice, and w comes from L1 twice. */
template <typename T>
struct norm_elements {
    static constexpr int kPieces = kWide / kVec<T>;
    uint4 y[kPieces], z[kPieces], grad_o[kPieces];

    __device__ __forceinline__ void load(const norm_args &a, const norm_row &row, int j)
    {
#pragma unroll
        for (int k = 0; k < kPieces; k++) {
            const int at = j + k * kVec<T>;
            y[k] = *reinterpret_cast<const uint4 *>((const T *)a.y + row.at + at);
            z[k] = *reinterpret_cast<const uint4 *>((const T *)a.z + row.z_at + at);
            grad_o[k] = *reinterpret_cast<const uint4 *>((const T *)a.grad_o + row.at + at);
        }
    }
    static __device__ __forceinline__ void widen(float (&out)[kWide], const uint4 (&in)[kPieces])
    {
#pragma unroll
        for (int k = 0; k < kPieces; k++) {
            float v[kVec<T>];
            unpack16(v, in[k]);
#pragma unroll
            for (int i = 0; i < kVec<T>; i++) out[k * kVec<T> + i] = v[i];
        }
    }
    __device__ __forceinline__ void widen(float (&fy)[kWide], float (&fz)[kWide],
                                          float (&g)[kWide]) const
    {
        widen(fy, y);
        widen(fz, z);
        widen(g, grad_o);
    }
};

template <typename T, int kThreads, int kSlots>
__global__ void __launch_bounds__(kThreads) gated_norm_backward_kernel(norm_args a)
{
    const int group = (int)(blockIdx.x % (unsigned)a.n_groups);
    const int block = (int)(blockIdx.x / (unsigned)a.n_groups);
    const int t1 = min((block + 1) * HT_GATED_NORM_BLOCK, a.n_tokens);
    const float *group_w = a.w + group * a.width;
    float grad_w[kSlots][kWide] = { { 0 } };

    for (int t = block * HT_GATED_NORM_BLOCK; t < t1; t++) {
        const norm_row row(a, t, group);
        const float rstd = a.rstd[(int64_t)t * a.n_groups + group];
        norm_elements<T> e;
        float sum = 0.0f, w[kWide], y[kWide], z[kWide], grad_o[kWide];
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            const int j = (s * kThreads + (int)threadIdx.x) * kWide;
            if (j >= a.width) continue;
            e.load(a, row, j);
            load_n(w, group_w + j);
            e.widen(y, z, grad_o);
#pragma unroll
            for (int i = 0; i < kWide; i++) {
                const float xh = y[i] * (z[i] * sigmoid(z[i])) * rstd;
                sum += w[i] * grad_o[i] * xh;
            }
        }
        const float c = block_sum<kThreads>(sum) / (float)a.width; // mean(e xh)
#pragma unroll
        for (int s = 0; s < kSlots; s++) {
            const int j = (s * kThreads + (int)threadIdx.x) * kWide;
            if (j >= a.width) continue;
            if (kSlots > 1) e.load(a, row, j); // with one slot they are still here
            load_n(w, group_w + j);            // from L1 again: registers are short
            float o[kWide], grad_y[kWide], grad_z[kWide];
            e.widen(y, z, grad_o);
#pragma unroll
            for (int i = 0; i < kWide; i++) {
                const float gate = sigmoid(z[i]), xh = y[i] * (z[i] * gate) * rstd;
                const float grad_q = (w[i] * grad_o[i] - xh * c) * rstd;
                grad_w[s][i] += grad_o[i] * xh;
                o[i] = w[i] * xh;
                grad_y[i] = grad_q * (z[i] * gate);
                grad_z[i] = grad_q * y[i] * (gate * (1.0f + z[i] * (1.0f - gate)));
            }
            if (a.o) store_n((T *)a.o + row.at + j, o);
            store_n((T *)a.grad_y + row.at + j, grad_y);
            store_n((T *)a.grad_z + row.grad_z_at + j, grad_z);
        }
    }
#pragma unroll
    for (int s = 0; s < kSlots; s++) {
        const int j = (s * kThreads + (int)threadIdx.x) * kWide;
        if (j < a.width)
            store_n(a.partial + (int64_t)block * a.d_inner + group * a.width + j, grad_w[s]);
    }
}

constexpr int kSumThreads = 256;

__global__ void __launch_bounds__(kSumThreads)
    gated_norm_sum_kernel(float *grad_w, const float *partial, int n_blocks, int d_inner)
{
    const int j = (int)(blockIdx.x * kSumThreads + threadIdx.x);
    if (j >= d_inner) return;
    float sum = 0.0f;
    for (int b = 0; b < n_blocks; b++) sum += partial[(int64_t)b * d_inner + j];
    grad_w[j] += sum;
}

norm_args args_of(const struct ht_gated_norm_args *a)
{
    norm_args k;
    k.n_tokens = (int)a->n_tokens;
    k.d_inner = (int)a->d_inner;
    k.n_groups = a->full ? 1 : (int)a->n_groups;
    k.width = k.d_inner / k.n_groups;
    k.eps = a->eps;
    k.w = a->w;
    k.y = a->y;
    k.z = a->z;
    k.grad_o = a->grad_o;
    k.z_stride = a->z_stride;
    k.grad_z_stride = a->grad_z_stride;
    k.o = a->o;
    k.grad_y = a->grad_y;
    k.grad_z = a->grad_z;
    k.rstd = a->rstd;
    k.partial = NULL;
    return k;
}

enum ht_status too_wide(const char *op, int width)
{
    return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: a group is %d wide; the CUDA kernels take up to 32768",
                   op, width);
}

template <typename T>
enum ht_status forward(struct ht_backend *be, const struct ht_gated_norm_args *a)
{
    const norm_args k = args_of(a);
    const unsigned grid = (unsigned)(a->n_tokens * k.n_groups);

    if (k.width <= 1024)
        HT_LAUNCH(be, (gated_norm_forward_kernel<T, 128, 1>), grid, 128, 0, k);
    else if (k.width <= 8192)
        HT_LAUNCH(be, (gated_norm_forward_kernel<T, 256, 4>), grid, 256, 0, k);
    else if (k.width <= 32768)
        HT_LAUNCH(be, (gated_norm_forward_kernel<T, 512, 8>), grid, 512, 0, k);
    else
        return too_wide("gated_norm_forward", k.width);
    return ht_cuda_check_launch(be, "gated_norm_forward");
}

template <typename T>
enum ht_status backward(struct ht_backend *be, const struct ht_gated_norm_args *a)
{
    const size_t mark = ht_arena_mark(&be->scratch);
    const int n_blocks = (int)ceil_div(a->n_tokens, HT_GATED_NORM_BLOCK);
    norm_args k = args_of(a);
    const unsigned grid = (unsigned)(n_blocks * k.n_groups);
    void *p = NULL;

    if (k.width > 32768) return too_wide("gated_norm_backward", k.width);
    HT_TRY(ht_arena_take(&p, &be->scratch, ht_gated_norm_scratch_bytes(a->n_tokens, a->d_inner)));
    k.partial = (float *)p;
    if (k.width <= 1024)
        HT_LAUNCH(be, (gated_norm_backward_kernel<T, 128, 1>), grid, 128, 0, k);
    else if (k.width <= 8192)
        HT_LAUNCH(be, (gated_norm_backward_kernel<T, 1024, 1>), grid, 1024, 0, k);
    else
        HT_LAUNCH(be, (gated_norm_backward_kernel<T, 512, 8>), grid, 512, 0, k);
    HT_LAUNCH(be, gated_norm_sum_kernel, (unsigned)ceil_div(k.d_inner, kSumThreads), kSumThreads, 0,
              a->grad_w, k.partial, n_blocks, k.d_inner);
    ht_arena_reset(&be->scratch, mark);
    return ht_cuda_check_launch(be, "gated_norm_backward");
}

} // namespace

extern "C" enum ht_status ht_gated_norm_forward_cuda(struct ht_backend *be,
                                                     const struct ht_gated_norm_args *a)
{
    const char *op = "gated_norm_forward";

    HT_TRY(check_rows_aligned(op, "y", a->y, a->d_inner, a->dtype));
    HT_TRY(check_rows_aligned(op, "z", a->z, a->z_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "o", a->o, a->d_inner, a->dtype));
    return HT_DISPATCH(a->dtype, op, forward, be, a);
}

extern "C" enum ht_status ht_gated_norm_backward_cuda(struct ht_backend *be,
                                                      const struct ht_gated_norm_args *a)
{
    const char *op = "gated_norm_backward";

    HT_TRY(check_rows_aligned(op, "y", a->y, a->d_inner, a->dtype));
    HT_TRY(check_rows_aligned(op, "z", a->z, a->z_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_o", a->grad_o, a->d_inner, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_y", a->grad_y, a->d_inner, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_z", a->grad_z, a->grad_z_stride, a->dtype));
    return HT_DISPATCH(a->dtype, op, backward, be, a);
}
