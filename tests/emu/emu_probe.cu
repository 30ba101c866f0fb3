/* tests/emu/emu_probe.cu: see emu_probe.h. */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "tests/emu/emu_probe.h"
}

constexpr int kThreads = 128;

static __global__ void index_kernel(int *out, int n)
{
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = i * 3;
}

extern "C" enum ht_status probe_index(struct ht_backend *be, int *out, int n)
{
    HT_LAUNCH(be, index_kernel, (unsigned)ceil_div(n, 96), 96, 0, out, n);
    return ht_cuda_check_launch(be, "index");
}

static __global__ void block_sum_kernel(float *out, const float *in)
{
    const float v = in[blockIdx.x * kThreads + threadIdx.x];
    const float once = block_sum<kThreads>(v), twice = block_sum<kThreads>(v + once);
    if (threadIdx.x == 0) out[blockIdx.x] = twice - kThreads * once;
}

extern "C" enum ht_status probe_block_sum(struct ht_backend *be, float *out, const float *in,
                                          int n_blocks)
{
    HT_LAUNCH(be, block_sum_kernel, (unsigned)n_blocks, kThreads, 0, out, in);
    return ht_cuda_check_launch(be, "block_sum");
}

static __global__ void mma_kernel(float *c, const bf16 *a, const bf16 *b)
{
    HT_SHARED(bf16, sa, [16][24]); // rows of 48 bytes: no bank conflicts among 8 rows
    HT_SHARED(bf16, sb, [16][8]);
    const int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t fa[4], fb[2];
    float d[4] = { 0, 0, 0, 0 };

    cp_async_16(&sa[lane / 2][lane % 2 * 8], a + lane * 8);
    cp_async_commit();
    if (lane < 16) cp_async_16(&sb[lane][0], b + lane * 8);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
    ldmatrix_x2_trans(fb, &sb[lane % 16][0]);
    mma_bf16(d, fa, fb);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

extern "C" enum ht_status probe_mma(struct ht_backend *be, float *c, const void *a, const void *b)
{
    HT_LAUNCH(be, mma_kernel, 1, 32, 0, c, (const bf16 *)a, (const bf16 *)b);
    return ht_cuda_check_launch(be, "mma");
}

static __global__ void mma_tf32_kernel(float *c, const float *a, const float *b)
{
    const int lane = (int)threadIdx.x, g = lane / 4, t = lane % 4;
    const uint32_t fa[4] = { to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]),
                             to_tf32(a[g * 8 + t + 4]), to_tf32(a[(g + 8) * 8 + t + 4]) };
    const uint32_t fb[2] = { to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g]) };
    float d[4] = { 0, 0, 0, 0 };
    mma_tf32(d, fa, fb);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

extern "C" enum ht_status probe_mma_tf32(struct ht_backend *be, float *c, const float *a,
                                         const float *b)
{
    HT_LAUNCH(be, mma_tf32_kernel, 1, 32, 0, c, a, b);
    return ht_cuda_check_launch(be, "mma_tf32");
}

static __global__ void warp_kernel(int *out)
{
    HT_SHARED_DYNAMIC(int, counter);
    const int lane = (int)threadIdx.x;
    if (lane == 0) *counter = 0;
    __syncthreads();
    atomicAdd(counter, lane);
    __syncthreads();
    out[lane] = __shfl_sync(kAllLanes, lane, lane + 5);
    out[32 + lane] = __shfl_up_sync(kAllLanes, lane, 3);
    out[64 + lane] = __shfl_down_sync(kAllLanes, lane, 3, 16);
    out[96 + lane] = __shfl_xor_sync(kAllLanes, lane, 1);
    out[128 + lane] = (int)__ballot_sync(kAllLanes, lane % 3 == 0);
    out[160 + lane] = __any_sync(kAllLanes, lane == 7) + 2 * __all_sync(kAllLanes, lane < 31);
    out[192 + lane] = *counter;
    out[224 + lane] = __syncthreads_count(lane % 2);
}

extern "C" enum ht_status probe_warp(struct ht_backend *be, int *out)
{
    HT_LAUNCH(be, warp_kernel, 1, 32, sizeof(int), out);
    return ht_cuda_check_launch(be, "warp");
}

static __global__ void mistake_kernel(int m, float *out, float *in, int n)
{
    HT_SHARED(float, fixed, [kThreads]);
    HT_SHARED_DYNAMIC(float, moving); // kThreads + 64 floats
    const int t = (int)threadIdx.x;

    fixed[t] = in[t];
    moving[t] = in[t];
    switch (m) {
    case PROBE_NO_BARRIER: out[t] = fixed[(t + 32) % kThreads]; break;
    case PROBE_NO_BARRIER_AFTER:
        __syncthreads();
        out[t] = fixed[(t + 32) % kThreads];
        fixed[t] = 1.0f;
        break;
    case PROBE_DIVERGENT_BARRIER:
        if (t < 64) __syncthreads();
        break;
    case PROBE_TWO_BARRIERS:
        if (t < 64)
            __syncthreads();
        else
            __syncthreads(); // another line
        break;
    case PROBE_MISSING_LANE:
        if (t != 5) out[t] = warp_sum(in[t]);
        break;
    case PROBE_UNINITIALISED:
        __syncthreads();
        out[t] = moving[kThreads + t % 64];
        break;
    case PROBE_OUT_OF_BOUNDS: moving[t == 3 ? kThreads + 64 : t] = 1.0f; break;
    case PROBE_STATIC_BOUNDS: fixed[t == 3 ? kThreads + n : t] = 1.0f; break;
    case PROBE_NO_WAIT:
    case PROBE_WAIT_TOO_FEW:
        if (t < 8) cp_async_16(&moving[kThreads + 4 * t], in + 4 * t);
        cp_async_commit();
        if (m == PROBE_WAIT_TOO_FEW) cp_async_wait<1>();
        __syncthreads();
        out[t] = moving[kThreads + t % 32];
        break;
    case PROBE_COPY_OVER_READ:
        __syncthreads();
        out[t] = moving[(t + 40) % kThreads];
        if (t < 8) cp_async_16(&moving[4 * t], in + 4 * t);
        cp_async_commit();
        cp_async_wait<0>();
        break;
    case PROBE_GLOBAL_BOUNDS: out[t == 9 ? n : t] = 1.0f; break;
    case PROBE_NO_SYNCWARP: out[t] = moving[t ^ 1]; break;
    default: break;
    }
}

extern "C" enum ht_status probe_mistake(struct ht_backend *be, enum probe_mistake m, float *out,
                                        float *in, int n)
{
    const size_t smem = (kThreads + 64) * sizeof(float);
    HT_LAUNCH(be, mistake_kernel, 1, kThreads, m == PROBE_TOO_MUCH_SMEM ? 200 * 1024 : smem, (int)m,
              out, in, m == PROBE_STATIC_BOUNDS ? 0 : n);
    return ht_cuda_check_launch(be, "mistake");
}
