/* ssm/ssd_tile_cuda.h: inside the CUDA scan only: tiles of a chunk in shared memory and their
 * products.
 *
 * A thread block has 8 warps; in products over the chunk's 64 tokens warp w owns the rows
 * 16 (w % 4) .. + 15. Tiles have the tensors' type and rows of `columns` + 8 elements: eight rows
 * start in eight different groups of four banks, so ldmatrix and the fp32 loads have no conflicts.
 * A fragment holds the same elements of a matrix in both types: bf16 as mma.m16n8k16 wants them,
 * fp32 as two steps of m16n8k8 whose k are 2t, 2t+1 instead of t, t+4 (any order of k will do, if A
 * and B agree). fp32 products are three of tf32: hi hi + hi lo + lo hi, relative error 2^-21.
 */
#ifndef HT_SSM_SSD_TILE_CUDA_H
#define HT_SSM_SSD_TILE_CUDA_H

#include "ssm/rows_cuda.h"

extern "C" {
#include "ssm/ssd_cuda_layout.h"
}

constexpr int kChunk = HT_SSD_CUDA_CHUNK, kBlock = 16, kBlocks = kChunk / kBlock;
constexpr int kSsdThreads = 256, kSsdWarps = kSsdThreads / kWarp;
constexpr int kPad = 8; // elements behind each row of a tile

/* ---- fragments ---- */

/* 16 x 16 of A: v[2q], v[2q+1] (or the halves of r[q]) are row g + 8 (q % 2), k 2t + 8 (q / 2) and
 * the next one; g = lane / 4, t = lane % 4. */
template <typename T>
struct frag_a;
template <>
struct frag_a<bf16> {
    uint32_t r[4];
};
template <>
struct frag_a<float> {
    float v[8];
};

/* 16 x 8 of B: column g, k 2t, 2t + 1, 2t + 8, 2t + 9. */
template <typename T>
struct frag_b;
template <>
struct frag_b<bf16> {
    uint32_t r[2];
};
template <>
struct frag_b<float> {
    float v[4];
};

static __device__ __forceinline__ int lane_id()
{
    return (int)(threadIdx.x % kWarp);
}

/* A from a tile whose rows are A's rows (its first element at p). */
static __device__ __forceinline__ void load_a(frag_a<bf16> &f, const bf16 *p, int pitch)
{
    const int l = lane_id();
    ldmatrix_x4(f.r, p + l % 16 * pitch + l / 16 * 8);
}

static __device__ __forceinline__ void load_a(frag_a<float> &f, const float *p, int pitch)
{
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float *s = p + (g + q % 2 * 8) * pitch + 2 * t + q / 2 * 8;
        f.v[2 * q] = s[0];
        f.v[2 * q + 1] = s[1];
    }
}

/* A from a tile whose rows are k. */
static __device__ __forceinline__ void load_a_trans(frag_a<bf16> &f, const bf16 *p, int pitch)
{
    const int l = lane_id();
    ldmatrix_x4_trans(f.r, p + (l / 16 * 8 + l % 8) * pitch + l / 8 % 2 * 8);
}

static __device__ __forceinline__ void load_a_trans(frag_a<float> &f, const float *p, int pitch)
{
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float *s = p + (2 * t + q / 2 * 8) * pitch + g + q % 2 * 8;
        f.v[2 * q] = s[0];
        f.v[2 * q + 1] = s[pitch];
    }
}

/* Columns 0..7 and 8..15 of B from a tile whose rows are B's columns. */
static __device__ __forceinline__ void load_b(frag_b<bf16> (&f)[2], const bf16 *p, int pitch)
{
    const int l = lane_id();
    uint32_t r[4];
    ldmatrix_x4(r, p + (l / 16 * 8 + l % 8) * pitch + l / 8 % 2 * 8);
    f[0].r[0] = r[0], f[0].r[1] = r[1], f[1].r[0] = r[2], f[1].r[1] = r[3];
}

static __device__ __forceinline__ void load_b(frag_b<float> (&f)[2], const float *p, int pitch)
{
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *s = p + (g + i / 2 * 8) * pitch + 2 * t + i % 2 * 8;
        f[i / 2].v[i % 2 * 2] = s[0];
        f[i / 2].v[i % 2 * 2 + 1] = s[1];
    }
}

/* Columns 0..7 and 8..15 of B from a tile whose rows are k. */
static __device__ __forceinline__ void load_b_trans(frag_b<bf16> (&f)[2], const bf16 *p, int pitch)
{
    const int l = lane_id();
    uint32_t r[4];
    ldmatrix_x4_trans(r, p + (l / 8 % 2 * 8 + l % 8) * pitch + l / 16 * 8);
    f[0].r[0] = r[0], f[0].r[1] = r[1], f[1].r[0] = r[2], f[1].r[1] = r[3];
}

static __device__ __forceinline__ void load_b_trans(frag_b<float> (&f)[2], const float *p,
                                                    int pitch)
{
    const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *s = p + (2 * t + i % 2 * 8) * pitch + g + i / 2 * 8;
        f[i / 2].v[i % 2 * 2] = s[0];
        f[i / 2].v[i % 2 * 2 + 1] = s[pitch];
    }
}

static __device__ __forceinline__ void mma(float (&d)[4], const frag_a<bf16> &a,
                                           const frag_b<bf16> &b)
{
    mma_bf16(d, a.r, b.r);
}

static __device__ __forceinline__ void mma(float (&d)[4], const frag_a<float> &a,
                                           const frag_b<float> &b)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const float va[4] = { a.v[4 * h], a.v[4 * h + 2], a.v[4 * h + 1], a.v[4 * h + 3] };
        uint32_t a_hi[4], a_lo[4], b_hi[2], b_lo[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a_hi[i] = to_tf32(va[i]);
            a_lo[i] = to_tf32(va[i] - __uint_as_float(a_hi[i]));
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
            b_hi[i] = to_tf32(b.v[2 * h + i]);
            b_lo[i] = to_tf32(b.v[2 * h + i] - __uint_as_float(b_hi[i]));
        }
        mma_tf32(d, a_lo, b_hi);
        mma_tf32(d, a_hi, b_lo);
        mma_tf32(d, a_hi, b_hi);
    }
}

/* A from two neighbouring 16 x 8 accumulators: columns become k. */
static __device__ __forceinline__ void to_a(frag_a<bf16> &f, const float (&lo)[4],
                                            const float (&hi)[4])
{
    f.r[0] = pack_bf16(lo[0], lo[1]);
    f.r[1] = pack_bf16(lo[2], lo[3]);
    f.r[2] = pack_bf16(hi[0], hi[1]);
    f.r[3] = pack_bf16(hi[2], hi[3]);
}

static __device__ __forceinline__ void to_a(frag_a<float> &f, const float (&lo)[4],
                                            const float (&hi)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) f.v[i] = lo[i], f.v[4 + i] = hi[i];
}

/* Column k of A times scale[k], k from 0 to 15. */
static __device__ __forceinline__ void scale_k(frag_a<bf16> &f, const float *scale)
{
    const int t = lane_id() % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float *s = scale + 2 * t + q / 2 * 8;
        f.r[q] = pack_bf16(bf16_lo(f.r[q]) * s[0], bf16_hi(f.r[q]) * s[1]);
    }
}

static __device__ __forceinline__ void scale_k(frag_a<float> &f, const float *scale)
{
    const int t = lane_id() % 4;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        const float *s = scale + 2 * t + q / 2 * 8;
        f.v[2 * q] *= s[0];
        f.v[2 * q + 1] *= s[1];
    }
}

template <int N>
static __device__ __forceinline__ void zero(float (&acc)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
}

/* Two neighbouring elements, the first at an even place. */
static __device__ __forceinline__ float2 load_pair(const bf16 *p)
{
    const uint32_t u = *reinterpret_cast<const uint32_t *>(p);
    return make_float2(bf16_lo(u), bf16_hi(u));
}

static __device__ __forceinline__ float2 load_pair(const float *p)
{
    return *reinterpret_cast<const float2 *>(p);
}

static __device__ __forceinline__ void store_pair(bf16 *p, float a, float b)
{
    *reinterpret_cast<uint32_t *>(p) = pack_bf16(a, b);
}

static __device__ __forceinline__ void store_pair(float *p, float a, float b)
{
    *reinterpret_cast<float2 *>(p) = make_float2(a, b);
}

/* ---- tiles ---- */

/* Starts copying n_rows x n_cols (a multiple of 8; either may be 0 or less) of a matrix to a tile
 * of kRows x kCols, zeros around them. `valid` is any address inside of the tensor. */
template <int kRows, int kCols, int kPitch, typename T>
static __device__ __forceinline__ void copy_tile(T *tile, const T *src, int64_t stride, int n_rows,
                                                 int n_cols, const T *valid)
{
    constexpr int kPerRow = kCols / kVec<T>;
    for (int i = (int)threadIdx.x; i < kRows * kPerRow; i += kSsdThreads) {
        const int row = i / kPerRow, col = i % kPerRow * kVec<T>;
        const bool in = row < n_rows && col < n_cols;
        cp_async_16_zero(tile + row * kPitch + col, in ? src + row * stride + col : valid,
                         in ? 16 : 0);
    }
}

#endif
