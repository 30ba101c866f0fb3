/* ssm/rows_cuda.h: inside the CUDA kernels of ssm only: rows of a matrix, and which sequence a row
 * belongs to. */
#ifndef HT_SSM_ROWS_CUDA_H
#define HT_SSM_ROWS_CUDA_H

#include "core/base/cuda_kernel.h"

extern "C" {
#include "ssm/ssm_ops.h"
}

/* Kernels move 16 bytes at a time. HT_ERR_ARG names the tensor. */
static inline enum ht_status check_rows_aligned(const char *op, const char *what, const void *p,
                                                int64_t stride, enum ht_dtype dtype)
{
    if ((uintptr_t)p % 16 == 0 && (size_t)stride * ht_dtype_bytes(dtype) % 16 == 0) return HT_OK;
    return HT_FAIL(
        HT_ERR_ARG,
        "%s: rows of %s start at %p, %lld elements apart; on CUDA both must be multiples "
        "of 16 bytes",
        op, what, p, (long long)stride);
}

/* Four neighbouring elements, 8-byte (bf16) or 16-byte (fp32) aligned. */
static __device__ __forceinline__ void load4(float (&v)[4], const bf16 *p)
{
    const uint2 u = *reinterpret_cast<const uint2 *>(p);
    v[0] = bf16_lo(u.x), v[1] = bf16_hi(u.x), v[2] = bf16_lo(u.y), v[3] = bf16_hi(u.y);
}

static __device__ __forceinline__ void load4(float (&v)[4], const float *p)
{
    load_vec(v, p);
}

static __device__ __forceinline__ void store4(bf16 *p, const float (&v)[4])
{
    *reinterpret_cast<uint2 *>(p) = make_uint2(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
}

static __device__ __forceinline__ void store4(float *p, const float (&v)[4])
{
    store_vec(p, v);
}

/* The sequence that row t belongs to. */
static __device__ __forceinline__ int seq_of(const int32_t *starts, int n_seqs, int t)
{
    int low = 0, high = n_seqs;
    while (high - low > 1) {
        const int mid = (low + high) / 2;
        if (starts[mid] <= t)
            low = mid;
        else
            high = mid;
    }
    return low;
}

#endif
