/* core/base/cuda_hopper.h: Hopper's asynchronous instructions: mbarriers, TMA, wgmma (sm_90a only).
 *
 * Files that include this are compiled for sm_90a alone. tests/emu/emu_hopper.h has the same names
 * on the host; there every instruction is done when it is issued. Nothing here has run on a GPU
 * yet.
 *
 * A tile is read by TMA in boxes of 64 bf16 columns: rows of 128 bytes, whose 16-byte chunks are
 * permuted by the row's number modulo 8 (the 128-byte swizzle). Tiles start at multiples of 1024.
 * wgmma finds its operands by descriptors:
 *
 *   rows x 16, summed over the columns    wgmma_tile(first row + 2 * first column, 16); 64 columns
 *                                         per box
 *   16 x 64 n, summed over the rows       wgmma_tile(first row, bytes between boxes)
 */
#ifndef HT_BASE_CUDA_HOPPER_H
#define HT_BASE_CUDA_HOPPER_H

#include "core/base/cuda_kernel.h"

#ifdef HT_CUDA_EMU
#include "tests/emu/emu_hopper.h"
#else

#include <cuda.h>

/* ---- mbarriers: a phase is complete when its arrivals and bytes are there ---- */

static __device__ __forceinline__ void mbarrier_init(uint64_t *bar, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(smem_address(bar)), "r"(arrivals)
                 : "memory");
}

/* After the inits, by the thread that did them; then a __syncthreads. */
static __device__ __forceinline__ void mbarrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
    asm volatile("fence.proxy.async;\n" ::: "memory");
}

/* Arrive, and let the phase wait for that many bytes of TMA. */
static __device__ __forceinline__ void mbarrier_expect(uint64_t *bar, int bytes)
{
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(smem_address(bar)),
        "r"(bytes)
        : "memory");
}

static __device__ __forceinline__ void mbarrier_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(smem_address(bar)) : "memory");
}

/* Until the phase of that parity (0, 1, 0, ...) is complete; parity 1 is, at first. */
static __device__ __forceinline__ void mbarrier_wait(uint64_t *bar, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}\n" ::"r"(smem_address(bar)),
                 "r"(parity)
                 : "memory");
}

/* Barrier `id` as in bar_sync, without waiting. */
static __device__ __forceinline__ void bar_arrive(int id, int n_threads)
{
    asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(n_threads) : "memory");
}

/* Registers of a warpgroup from here on. */
template <int kRegisters>
static __device__ __forceinline__ void registers_fewer()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

template <int kRegisters>
static __device__ __forceinline__ void registers_more()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

/* ---- TMA ---- */

typedef CUtensorMap ht_tensor_map;

/* A bf16 matrix that is read in boxes. Host; rows 16-byte aligned. */
static inline enum ht_status tensor_map_make(ht_tensor_map *map, const void *base, int64_t columns,
                                             int64_t rows, int64_t stride, int box_columns,
                                             int box_rows)
{
    typedef CUresult encode_fn(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                               const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                               const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                               CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    const cuuint64_t size[2] = { (cuuint64_t)columns, (cuuint64_t)rows };
    const cuuint64_t row_bytes[1] = { (cuuint64_t)stride * 2 };
    const cuuint32_t box[2] = { (cuuint32_t)box_columns, (cuuint32_t)box_rows }, step[2] = { 1, 1 };
    cudaDriverEntryPointQueryResult found;
    void *entry = NULL;

    HT_TRY(ht_cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                          cudaEnableDefault, &found),
                         "cuTensorMapEncodeTiled"));
    if (!entry) return HT_FAIL(HT_ERR_UNSUPPORTED, "the driver has no cuTensorMapEncodeTiled");
    const CUresult r = reinterpret_cast<encode_fn *>(entry)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(base), size, row_bytes, box,
        step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS)
        return HT_FAIL(HT_ERR_CUDA,
                       "cuTensorMapEncodeTiled of %lld x %lld, rows %lld apart: error %d",
                       (long long)rows, (long long)columns, (long long)stride, (int)r);
    return HT_OK;
}

/* One box from (column, row) on; what lies outside of the matrix is zero. */
static __device__ __forceinline__ void tma_load(unsigned char *to, const ht_tensor_map *map,
                                                uint64_t *bar, int column, int row)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(smem_address(to)),
                 "l"(map), "r"(smem_address(bar)), "r"(column), "r"(row)
                 : "memory");
}

/* ---- wgmma: 64 x 128 += 64 x 16 times 16 x 128, a warpgroup; warp w of it holds rows 16 w .. as
 * m16n8 accumulators, c[n] columns 8 n .. ---- */

static __device__ __forceinline__ uint64_t wgmma_tile(const unsigned char *tile, int leading)
{
    return (uint64_t)((smem_address(tile) & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#define HT_ACC4(c, n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define HT_ACC64(c)                                                                                \
    HT_ACC4(c, 0), HT_ACC4(c, 1), HT_ACC4(c, 2), HT_ACC4(c, 3), HT_ACC4(c, 4), HT_ACC4(c, 5),      \
        HT_ACC4(c, 6), HT_ACC4(c, 7), HT_ACC4(c, 8), HT_ACC4(c, 9), HT_ACC4(c, 10),                \
        HT_ACC4(c, 11), HT_ACC4(c, 12), HT_ACC4(c, 13), HT_ACC4(c, 14), HT_ACC4(c, 15)
#define HT_REGS64                                                                                  \
    "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
    "%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"

/* c = or += A B^T; both summed over their columns. */
static __device__ __forceinline__ void wgmma_rows(float (&c)[16][4], uint64_t a, uint64_t b,
                                                  bool add)
{
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " HT_REGS64
                 ", %64, %65, add, 1, 1, 0, 0;\n"
                 "}\n"
                 : HT_ACC64(c)
                 : "l"(a), "l"(b), "r"((int)add));
}

/* c += A B; A in registers as for m16n8k16, B summed over its rows. */
static __device__ __forceinline__ void wgmma_add(float (&c)[16][4], const uint32_t (&a)[4],
                                                 uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " HT_REGS64
                 ", {%64,%65,%66,%67}, %68, 1, 1, 1, 1;\n"
                 : HT_ACC64(c)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Before the first wgmma after registers of its operands were written otherwise. */
static __device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

static __device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

/* Until at most kPending committed groups run; c belongs to those until then. */
template <int kPending>
static __device__ __forceinline__ void wgmma_wait(float (&c)[16][4])
{
    asm volatile("wgmma.wait_group.sync.aligned %64;\n" : HT_ACC64(c) : "n"(kPending) : "memory");
}

#endif
#endif
