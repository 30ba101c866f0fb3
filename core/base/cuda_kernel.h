/* core/base/cuda_kernel.h: what every CUDA file (*_cuda.cu) includes, and nothing else of CUDA.
 *
 * Under nvcc these are thin wrappers over instructions. Under g++ with HT_CUDA_EMU the same kernel
 * source runs on the host (tests/emu/cuda_emu.h). A kernel file therefore uses only plain CUDA
 * C++ and the names of this header; the differences between the two worlds are:
 *
 *   HT_SHARED(float, part, [32][33]);         static shared memory:  float part[32][33]
 *   HT_SHARED_DYNAMIC(unsigned char, smem);   dynamic shared memory: unsigned char *smem, 1024-byte
 *                                             aligned; sizes above 48 KiB are opted into by
 * HT_LAUNCH HT_LAUNCH(be, (kernel<T, 64>), grid, block, smem_bytes, args...); on the backend's
 * compute stream; parentheses where a template has a comma return ht_cuda_check_launch(be, "name");
 * after the launches of an operation return HT_DISPATCH(a->dtype, "rmsnorm", launch, be, a);
 * launch<float> or launch<bf16>
 *
 * Entry points are extern "C", so the folder's table in C can list them. Project headers in C are
 * included inside extern "C" { } after this one.
 */
#ifndef HT_BASE_CUDA_KERNEL_H
#define HT_BASE_CUDA_KERNEL_H

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

extern "C" {
#include "core/base/backend.h"
#include "core/base/cuda_device.h"
#include "core/base/dtype.h"
#include "core/base/seqs.h"
}

#ifdef HT_CUDA_EMU
#include "tests/emu/cuda_emu.h"
#else
#include "core/base/cuda_instr.h"
#endif

using bf16 = __nv_bfloat16;

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#define HT_DISPATCH(dtype, op, function, ...)                                                      \
    ((dtype) == HT_DTYPE_F32 ? function<float>(__VA_ARGS__)                                        \
     : (dtype) == HT_DTYPE_BF16                                                                    \
         ? function<bf16>(__VA_ARGS__)                                                             \
         : HT_FAIL(HT_ERR_UNSUPPORTED, "%s: no CUDA kernel for %s", (op), ht_dtype_name(dtype)))

static inline int64_t ceil_div(int64_t n, int64_t d)
{
    return (n + d - 1) / d;
}

/* ---- element types ---- */

static __device__ __forceinline__ float to_f32(float v)
{
    return v;
}
static __device__ __forceinline__ float to_f32(bf16 v)
{
    return __bfloat162float(v);
}

template <typename T>
static __device__ __forceinline__ T from_f32(float v);
template <>
__device__ __forceinline__ float from_f32<float>(float v)
{
    return v;
}
template <>
__device__ __forceinline__ bf16 from_f32<bf16>(float v)
{
    return __float2bfloat16(v);
}

/* The value after a round trip through T. */
template <typename T>
static __device__ __forceinline__ float round_to(float v)
{
    return to_f32(from_f32<T>(v));
}

/* Two values as one register of an mma operand: lo in the lower half (the lower k or column). */
static __device__ __forceinline__ uint32_t pack_bf16(float lo, float hi)
{
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

static __device__ __forceinline__ float bf16_lo(uint32_t u)
{
    return __uint_as_float(u << 16);
}

static __device__ __forceinline__ float bf16_hi(uint32_t u)
{
    return __uint_as_float(u & 0xffff0000u);
}

/* ---- 16 bytes at a time ---- */

/* Elements of T in 16 bytes. */
template <typename T>
constexpr int kVec = 16 / (int)sizeof(T);

static __device__ __forceinline__ void unpack16(float (&out)[4], uint4 u)
{
    out[0] = __uint_as_float(u.x);
    out[1] = __uint_as_float(u.y);
    out[2] = __uint_as_float(u.z);
    out[3] = __uint_as_float(u.w);
}

static __device__ __forceinline__ void unpack16(float (&out)[8], uint4 u)
{
    out[0] = bf16_lo(u.x), out[1] = bf16_hi(u.x);
    out[2] = bf16_lo(u.y), out[3] = bf16_hi(u.y);
    out[4] = bf16_lo(u.z), out[5] = bf16_hi(u.z);
    out[6] = bf16_lo(u.w), out[7] = bf16_hi(u.w);
}

static __device__ __forceinline__ uint4 pack16(const float (&v)[4])
{
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
}

static __device__ __forceinline__ uint4 pack16(const float (&v)[8])
{
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                      pack_bf16(v[6], v[7]));
}

/* kVec<T> elements at p (16-byte aligned) as fp32, and back. */
template <typename T>
static __device__ __forceinline__ void load_vec(float (&out)[kVec<T>], const T *p)
{
    unpack16(out, *reinterpret_cast<const uint4 *>(p));
}

template <typename T>
static __device__ __forceinline__ void store_vec(T *p, const float (&v)[kVec<T>])
{
    *reinterpret_cast<uint4 *>(p) = pack16(v);
}

/* N elements: in pieces of 16 bytes, as one of 8 bytes (4 bf16), or one by one. p is aligned
 * accordingly. */
template <int N, typename T>
static __device__ __forceinline__ void load_n(float (&out)[N], const T *p)
{
    if constexpr (N % kVec<T> == 0) {
#pragma unroll
        for (int i = 0; i < N; i += kVec<T>) {
            float v[kVec<T>];
            load_vec(v, p + i);
            for (int j = 0; j < kVec<T>; j++) out[i + j] = v[j];
        }
    } else if constexpr (N * sizeof(T) == 8) {
        const uint2 u = *reinterpret_cast<const uint2 *>(p);
        out[0] = bf16_lo(u.x), out[1] = bf16_hi(u.x);
        out[2] = bf16_lo(u.y), out[3] = bf16_hi(u.y);
    } else {
        for (int i = 0; i < N; i++) out[i] = to_f32(p[i]);
    }
}

template <int N, typename T>
static __device__ __forceinline__ void store_n(T *p, const float (&v)[N])
{
    if constexpr (N % kVec<T> == 0) {
#pragma unroll
        for (int i = 0; i < N; i += kVec<T>) {
            float w[kVec<T>];
            for (int j = 0; j < kVec<T>; j++) w[j] = v[i + j];
            store_vec(p + i, w);
        }
    } else if constexpr (N * sizeof(T) == 8) {
        *reinterpret_cast<uint2 *>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
    } else {
        for (int i = 0; i < N; i++) p[i] = from_f32<T>(v[i]);
    }
}

/* Whether rows of a matrix may be read n_bytes (a power of two) at a time; NULL may. */
template <typename T>
static inline bool rows_aligned(const T *p, int64_t row_elements, int n_bytes = 16)
{
    return (uintptr_t)p % (unsigned)n_bytes == 0 &&
           row_elements * (int64_t)sizeof(T) % n_bytes == 0;
}

/* ---- sums in a fixed order ---- */

template <typename T>
static __device__ __forceinline__ T warp_sum(T v)
{
    for (int o = kWarp / 2; o > 0; o >>= 1) v += __shfl_xor_sync(kAllLanes, v, o);
    return v;
}

static __device__ __forceinline__ float warp_max(float v)
{
    for (int o = kWarp / 2; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, o));
    return v;
}

/* Sum or largest of v over a block of kThreads threads (whole warps), in every thread. May be
 * called again at once: it ends with a barrier. */
template <int kThreads, typename T>
static __device__ __forceinline__ T block_sum(T v)
{
    HT_SHARED(T, part, [kThreads / kWarp]);
    v = warp_sum(v);
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
    __syncthreads();
    T sum = part[0];
    for (int i = 1; i < kThreads / kWarp; i++) sum += part[i];
    __syncthreads();
    return sum;
}

template <int kThreads>
static __device__ __forceinline__ float block_max(float v)
{
    HT_SHARED(float, part, [kThreads / kWarp]);
    v = warp_max(v);
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
    __syncthreads();
    float most = part[0];
    for (int i = 1; i < kThreads / kWarp; i++) most = fmaxf(most, part[i]);
    __syncthreads();
    return most;
}

/* ---- mathematics ---- */

/* x / (1 + exp(-x)) and the factor 1 / (1 + exp(-x)). expf, not __expf: the accuracy is the CPU's
 * and these run in kernels that wait for memory. */
static __device__ __forceinline__ float sigmoid(float x)
{
    return 1.0f / (1.0f + expf(-x));
}

#endif
