/* core/base/cuda_instr.h: instructions behind cuda_kernel.h, for nvcc only.
 *
 * Fragment layouts (PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"), lane l,
 * g = l / 4, t = l % 4:
 *
 *   m16n8k16 bf16   A  a[0] (g, 2t..2t+1)    a[1] (g+8, 2t..)   a[2] (g, 2t+8..)   a[3] (g+8,
 * 2t+8..) B  b[0] (k 2t..2t+1, n g)                   b[1] (k 2t+8.., n g) m16n8k8 tf32    A  a[0]
 * (g, t)           a[1] (g+8, t)      a[2] (g, t+4)      a[3] (g+8, t+4) B  b[0] (k t, n g) b[1] (k
 * t+4, n g) both            D  d[0], d[1] (g, 2t..2t+1)                 d[2], d[3] (g+8, 2t..2t+1)
 */
#ifndef HT_BASE_CUDA_INSTR_H
#define HT_BASE_CUDA_INSTR_H

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define HT_SHARED(type, name, dims) __shared__ type name dims
#define HT_SHARED_DYNAMIC(type, name)                                                              \
    extern __shared__ __align__(1024) unsigned char ht_dynamic_smem[];                             \
    type *name = reinterpret_cast<type *>(ht_dynamic_smem)

/* The arguments are converted to the kernel's parameter types. */
template <typename... P, typename... A>
static inline void ht_cuda_launch(struct ht_backend *be, void (*kernel)(P...), dim3 grid,
                                  dim3 block, size_t smem_bytes, A &&...args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = (cudaStream_t)ht_cuda_device_of(be)->compute;
    if (smem_bytes > 48 * 1024 && // an error of it is found by ht_cuda_check_launch
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (int)smem_bytes) != cudaSuccess)
        return;
    (void)cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...);
}

#define HT_LAUNCH(be, kernel, grid, block, smem_bytes, ...)                                        \
    ht_cuda_launch((be), kernel, dim3(grid), dim3(block), (size_t)(smem_bytes), __VA_ARGS__)

static __device__ __forceinline__ uint32_t smem_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* d += a b */
static __device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

static __device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2])
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* a - b, of two bf16 numbers each. */
static __device__ __forceinline__ uint32_t bf16x2_sub(uint32_t a, uint32_t b)
{
    __nv_bfloat162 u, v;
    memcpy(&u, &a, sizeof u);
    memcpy(&v, &b, sizeof v);
    const __nv_bfloat162 d = __hsub2(u, v);
    uint32_t out;
    memcpy(&out, &d, sizeof out);
    return out;
}

/* a * b, of two bf16 numbers each; subnormals count. */
static __device__ __forceinline__ uint32_t bf16x2_mul(uint32_t a, uint32_t b)
{
    __nv_bfloat162 u, v;
    memcpy(&u, &a, sizeof u);
    memcpy(&v, &b, sizeof v);
    const __nv_bfloat162 d = __hmul2(u, v);
    uint32_t out;
    memcpy(&out, &d, sizeof out);
    return out;
}

/* Nearest value with 10 bits of mantissa, ties away; the multiplier ignores what is below. */
static __device__ __forceinline__ uint32_t to_tf32(float v)
{
    uint32_t u;
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(u) : "f"(v));
    return u;
}

/* 8 x 8 matrices of 16-bit elements: lanes 8i .. 8i+7 give the addresses of the rows of matrix i
 * (16 bytes, aligned); lane l gets elements (l / 4, 2 (l % 4) ..) of each, or of its transpose. */
static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row))
                 : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_address(row))
                 : "memory");
}

/* The addresses of lanes 0 to 15 count. */
static __device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(smem_address(row))
                 : "memory");
}

static __device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(smem_address(row))
                 : "memory");
}

/* 16 bytes from global to shared memory, both aligned, without passing through registers. With
 * n_bytes < 16 the rest becomes zero (0: nothing is read, but the address must be valid). */
static __device__ __forceinline__ void cp_async_16(void *smem, const void *global)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(smem_address(smem)),
                 "l"(__cvta_generic_to_global(global))
                 : "memory");
}

static __device__ __forceinline__ void cp_async_16_zero(void *smem, const void *global, int n_bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(smem_address(smem)),
                 "l"(__cvta_generic_to_global(global)), "r"(n_bytes)
                 : "memory");
}

static __device__ __forceinline__ void cp_async_commit()
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}

/* Until at most kPending of this thread's committed groups are still under way. Other threads'
 * copies are there only after a barrier that follows their wait. */
template <int kPending>
static __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

/* Barrier `id` (1 to 15) of n_threads threads: whole warps, a part of the block. */
static __device__ __forceinline__ void bar_sync(int id, int n_threads)
{
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(n_threads) : "memory");
}

/* 2^x, relative error 2^-22; subnormal results become zero. */
static __device__ __forceinline__ float fast_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
    return y;
}

#endif
