/* attention/tile_cuda.h: tiles in shared memory, and a warp's products of them; private to
 * attention/.
 *
 * A tile is a number of rows of kD elements. Within a row the 16-byte chunks are permuted by the
 * row's number, so that 8 rows at one column lie in different banks. Columns from d_head to kD and
 * rows beyond the last are zero.
 *
 * One step of a product is 16 deep in bf16 (mma m16n8k16) and 8 deep in fp32, where every factor is
 * split into two tf32 numbers and three products are summed (m16n8k8; what is dropped is below
 * 2^-22 of a product). Fragments, lane = 4 g + t:
 *
 *   bf16   as in core/base/cuda_instr.h
 *   fp32   depth t of the instruction is column 2t of the step, depth t + 4 is column 2t + 1, in
 *          both factors. A lane then reads pairs, and its accumulators are its A fragment.
 */
#ifndef HT_ATTENTION_TILE_CUDA_H
#define HT_ATTENTION_TILE_CUDA_H

#include "core/base/cuda_kernel.h"

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

template <typename T>
constexpr int kDepth = 32 / (int)sizeof(T); // of a step
/* Steps unrolled where only addresses depend on the step: more cost registers, and spills. */
template <typename T>
constexpr int kUnrolled = sizeof(T) == 2 ? 2 : 1;
template <typename T>
constexpr int kTogether = sizeof(T) == 2 ? 2 : 1; // B fragments (8 columns each) of one load

/* ---- tiles ---- */

template <typename T>
static __device__ __forceinline__ int swizzle(int row)
{
    return sizeof(T) == 2 ? row & 7 : (row & 3) << 1 | (row >> 2 & 1);
}

/* Chunk `chunk` (even, the same in all lanes) + lane_chunk (0 or 1) of a row. Only the lowest three
 * bits depend on the lane: addresses 8 chunks apart share a register. */
template <typename T, int kD>
static __device__ __forceinline__ T *chunk_at(T *tile, int row, int chunk, int lane_chunk)
{
    T *const at = tile + row * kD + ((chunk & 7) ^ lane_chunk ^ swizzle<T>(row)) * kVec<T>;
    return at + (chunk & ~7) * kVec<T>;
}

template <typename T, int kD>
static __device__ __forceinline__ T *chunk_at(T *tile, int row, int chunk)
{
    return tile + row * kD + (chunk ^ swizzle<T>(row)) * kVec<T>;
}

/* Ask for rows 0 .. n_rows of a matrix of d columns; at least one row is there. kThreads threads
 * call it, of which this is number `thread`. */
template <typename T, int kD, int kRows, int kThreads>
static __device__ __forceinline__ void load_tile(T *tile, const T *rows, int64_t stride, int n_rows,
                                                 int d, int thread)
{
    constexpr int kChunks = kD / kVec<T>, kAcross = kChunks < kThreads ? kChunks : kThreads;
    constexpr int kDown = kThreads / kAcross;
    static_assert(kThreads % kAcross == 0 && kChunks % kAcross == 0 && kRows % kDown == 0,
                  "every thread copies as many chunks");
#pragma unroll
    for (int c = 0; c < kChunks; c += kAcross) {
        const int chunk = c + thread % kAcross;
        const bool inside = chunk * kVec<T> < d;
        const T *from = rows + (inside ? chunk * kVec<T> : 0);
#pragma unroll 1 // unrolled, the addresses of all passes stay in registers around the caller's loop
        for (int row = thread / kAcross; row < kRows; row += kDown) {
            const bool here = inside && row < n_rows;
            cp_async_16_zero(chunk_at<T, kD>(tile, row, chunk), here ? from + row * stride : rows,
                             here ? 16 : 0);
        }
    }
}

/* ---- fragments ---- */

template <typename T>
struct frag_a { // 16 rows, kDepth columns
    uint32_t hi[4];
};
template <>
struct frag_a<float> {
    uint32_t hi[4], lo[4];
};

template <typename T>
struct frag_b { // kDepth rows, 8 columns
    uint32_t hi[2];
};
template <>
struct frag_b<float> {
    uint32_t hi[2], lo[2];
};

static __device__ __forceinline__ void split_tf32(uint32_t &hi, uint32_t &lo, float v)
{
    hi = to_tf32(v);
    lo = to_tf32(v - __uint_as_float(hi));
}

static __device__ __forceinline__ void multiply(float (&c)[4], const frag_a<bf16> &a,
                                                const frag_b<bf16> &b)
{
    mma_bf16(c, a.hi, b.hi);
}

static __device__ __forceinline__ void multiply(float (&c)[4], const frag_a<float> &a,
                                                const frag_b<float> &b)
{
    mma_tf32(c, a.lo, b.hi);
    mma_tf32(c, a.hi, b.lo);
    mma_tf32(c, a.hi, b.hi);
}

/* A = rows row0 .. row0 + 16, columns of `step`. */
template <int kD>
static __device__ __forceinline__ void load_a(frag_a<bf16> &a, const bf16 *tile, int row0, int step)
{
    const int lane = (int)threadIdx.x % kWarp;
    ldmatrix_x4(a.hi, chunk_at<const bf16, kD>(tile, row0 + lane % 16, 2 * step, lane / 16));
}

template <int kD>
static __device__ __forceinline__ void load_a(frag_a<float> &a, const float *tile, int row0,
                                              int step)
{
    const int lane = (int)threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float *at =
            chunk_at<const float, kD>(tile, row0 + g + 8 * i, 2 * step, t / 2) + t % 2 * 2;
        const float2 v = *reinterpret_cast<const float2 *>(at);
        split_tf32(a.hi[i], a.lo[i], v.x);
        split_tf32(a.hi[i + 2], a.lo[i + 2], v.y);
    }
}

/* B = the transpose of rows row0 .. row0 + 8 kTogether, columns of `step`. */
template <int kD>
static __device__ __forceinline__ void load_b(frag_b<bf16> (&b)[2], const bf16 *tile, int row0,
                                              int step)
{
    const int lane = (int)threadIdx.x % kWarp;
    uint32_t r[4];
    ldmatrix_x4(
        r, chunk_at<const bf16, kD>(tile, row0 + lane / 16 * 8 + lane % 8, 2 * step, lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; i++) b[i / 2].hi[i % 2] = r[i];
}

template <int kD>
static __device__ __forceinline__ void load_b(frag_b<float> (&b)[1], const float *tile, int row0,
                                              int step)
{
    const int lane = (int)threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const float *at = chunk_at<const float, kD>(tile, row0 + g, 2 * step, t / 2) + t % 2 * 2;
    const float2 v = *reinterpret_cast<const float2 *>(at);
    split_tf32(b[0].hi[0], b[0].lo[0], v.x);
    split_tf32(b[0].hi[1], b[0].lo[1], v.y);
}

/* B = rows of `step`, columns column0 .. column0 + 8 kTogether. */
template <int kD>
static __device__ __forceinline__ void load_b_rows(frag_b<bf16> (&b)[2], const bf16 *tile, int step,
                                                   int column0)
{
    const int lane = (int)threadIdx.x % kWarp;
    uint32_t r[4];
    ldmatrix_x4_trans(
        r, chunk_at<const bf16, kD>(tile, step * 16 + lane % 16, column0 / 8, lane / 16));
#pragma unroll
    for (int i = 0; i < 4; i++) b[i / 2].hi[i % 2] = r[i];
}

template <int kD>
static __device__ __forceinline__ void load_b_rows(frag_b<float> (&b)[1], const float *tile,
                                                   int step, int column0)
{
    const int lane = (int)threadIdx.x % kWarp, g = lane / 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int row = step * 8 + lane % 4 * 2 + i;
        const float v = chunk_at<const float, kD>(tile, row, column0 / 4, g / 4)[g % 4];
        split_tf32(b[0].hi[i], b[0].lo[i], v);
    }
}

/* A = accumulators of 16 rows: of two blocks of 8 columns, or of one. */
static __device__ __forceinline__ void to_a(frag_a<bf16> &a, const float (*c)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) a.hi[i] = pack_bf16(c[i / 2][i % 2 * 2], c[i / 2][i % 2 * 2 + 1]);
}

static __device__ __forceinline__ void to_a(frag_a<float> &a, const float (*c)[4])
{
#pragma unroll
    for (int i = 0; i < 4; i++) split_tf32(a.hi[i], a.lo[i], c[0][i % 2 * 2 + i / 2]);
}

/* ---- products of a warp; kM blocks of 16 rows ---- */

template <int kM, int kN>
static __device__ __forceinline__ void clear(float (&c)[kM][kN][4])
{
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) c[m][n][i] = 0.0f;
}

/* c = A B^T: rows row0 .. of one tile with all 8 kN rows of another, over all columns. */
template <typename T, int kD, int kM, int kN>
static __device__ __forceinline__ void multiply_rows(float (&c)[kM][kN][4], const T *a_tile,
                                                     int row0, const T *b_tile)
{
    clear(c);
#pragma unroll(kUnrolled <T>)
    for (int step = 0; step < kD / kDepth<T>; step++) {
        frag_a<T> a[kM];
#pragma unroll
        for (int m = 0; m < kM; m++) load_a<kD>(a[m], a_tile, row0 + 16 * m, step);
#pragma unroll
        for (int n = 0; n < kN; n += kTogether<T>) {
            frag_b<T> b[kTogether<T>];
            load_b<kD>(b, b_tile, 8 * n, step);
#pragma unroll
            for (int i = 0; i < kTogether<T>; i++)
#pragma unroll
                for (int m = 0; m < kM; m++) multiply(c[m][n + i], a[m], b[i]);
        }
    }
}

/* out += P B: P in accumulators (columns = rows of the tile), columns column0 .. + 8 kOut. */
template <typename T, int kD, int kM, int kN, int kOut>
static __device__ __forceinline__ void
multiply_add(float (&out)[kM][kOut][4], const float (&p)[kM][kN][4], const T *b_tile, int column0)
{
#pragma unroll
    for (int step = 0; step < 8 * kN / kDepth<T>; step++) {
        frag_a<T> a[kM];
#pragma unroll
        for (int m = 0; m < kM; m++) to_a(a[m], p[m] + step * (kDepth<T> / 8));
#pragma unroll
        for (int n = 0; n < kOut; n += kTogether<T>) {
            frag_b<T> b[kTogether<T>];
            load_b_rows<kD>(b, b_tile, step, column0 + 8 * n);
#pragma unroll
            for (int i = 0; i < kTogether<T>; i++)
#pragma unroll
                for (int m = 0; m < kM; m++) multiply(out[m][n + i], a[m], b[i]);
        }
    }
}

static __device__ __forceinline__ void store_pair(bf16 *at, float lo, float hi)
{
    *reinterpret_cast<uint32_t *>(at) = pack_bf16(lo, hi);
}

static __device__ __forceinline__ void store_pair(float *at, float lo, float hi)
{
    *reinterpret_cast<float2 *>(at) = make_float2(lo, hi);
}

/* Accumulators, times `factor` of their rows (g, g + 8), to rows row0 .. of a tile. */
template <typename T, int kD, int kOut>
static __device__ __forceinline__ void
store_tile(T *tile, int row0, int column0, const float (&c)[kOut][4], const float (&factor)[2])
{
    const int lane = (int)threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < kOut; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int column = column0 + 8 * n + 2 * t;
            T *at = chunk_at<T, kD>(tile, row0 + g + 8 * i, column / kVec<T>) + column % kVec<T>;
            store_pair(at, c[n][2 * i] * factor[i], c[n][2 * i + 1] * factor[i]);
        }
}

/* ---- online softmax ---- */

/* Sum or maximum over the four lanes that hold a row. */
static __device__ __forceinline__ float row_max(float v)
{
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, 1));
    return fmaxf(v, __shfl_xor_sync(kAllLanes, v, 2));
}

static __device__ __forceinline__ float row_sum(float v)
{
    v += __shfl_xor_sync(kAllLanes, v, 1);
    return v + __shfl_xor_sync(kAllLanes, v, 2);
}

/* Of rows g and g + 8 of 16: offset, the largest score times scale log2 e, and this lane's share of
 * the sum of exp2(score scale log2 e - offset). */
struct softmax_rows {
    float offset[2], sum[2];
};

static __device__ __forceinline__ void softmax_start(softmax_rows &r)
{
#pragma unroll
    for (int i = 0; i < 2; i++) r.offset[i] = -INFINITY, r.sum[i] = 0.0f;
}

/* Scores to probabilities; `out`, the sum over earlier keys, is scaled to the new maximum. At least
 * one score of every row must be a number, now or before. */
template <int kN, int kOut>
static __device__ __forceinline__ void softmax_step(float (&s)[kN][4], softmax_rows &r,
                                                    float (&out)[kOut][4], float scale_log2)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float top = s[0][2 * i], sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kN; n++) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
        const float offset = fmaxf(r.offset[i], row_max(top) * scale_log2);
        const float older = fast_exp2(r.offset[i] - offset);
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
            for (int j = 2 * i; j < 2 * i + 2; j++) {
                s[n][j] = fast_exp2(fmaf(s[n][j], scale_log2, -offset));
                sum += s[n][j];
            }
        r.offset[i] = offset;
        r.sum[i] = r.sum[i] * older + sum;
#pragma unroll
        for (int n = 0; n < kOut; n++) {
            out[n][2 * i] *= older;
            out[n][2 * i + 1] *= older;
        }
    }
}

/* ---- which tile a block works on ---- */

struct tile_place {
    int seq, first, n_rows; // the sequence, its first row, its rows
    int tile, n_tiles;      // within the sequence
};

/* Tile number `slot` when the sequences of more than `skip` rows are cut into tiles of kRows one
 * after the other; false past the end. All lanes of a warp call it. */
template <int kRows>
static __device__ __forceinline__ bool find_tile(tile_place &place, const int32_t *starts,
                                                 int n_seqs, int slot, int skip)
{
    const int lane = (int)threadIdx.x % kWarp;
    int before = 0;
    for (int seq0 = 0; seq0 < n_seqs; seq0 += kWarp) {
        int first = 0, n_rows = 0;
        if (seq0 + lane < n_seqs) {
            first = starts[seq0 + lane];
            n_rows = starts[seq0 + lane + 1] - first;
        }
        const int n_tiles = n_rows > skip ? (n_rows + kRows - 1) / kRows : 0;
        int upto = n_tiles;
        for (int o = 1; o < kWarp; o <<= 1) {
            const int left = __shfl_up_sync(kAllLanes, upto, (unsigned)o);
            if (lane >= o) upto += left;
        }
        const unsigned past_slot = __ballot_sync(kAllLanes, before + upto > slot);
        if (past_slot) {
            const int at = __ffs((int)past_slot) - 1;
            place.seq = seq0 + at;
            place.first = __shfl_sync(kAllLanes, first, at);
            place.n_rows = __shfl_sync(kAllLanes, n_rows, at);
            place.n_tiles = __shfl_sync(kAllLanes, n_tiles, at);
            place.tile = slot - (before + __shfl_sync(kAllLanes, upto, at) - place.n_tiles);
            return true;
        }
        before += __shfl_sync(kAllLanes, upto, kWarp - 1);
    }
    return false;
}

/* At least as many slots as any division of n_tokens rows into n_seqs sequences has tiles. */
static inline int64_t tile_slots(int64_t n_tokens, int64_t n_seqs, int64_t rows)
{
    return n_tokens / rows + n_seqs;
}

/* ---- host: what the kernels ask of their arguments ---- */

/* Rows are read 16 bytes at a time. */
static inline enum ht_status check_rows(const char *what, const char *name, const void *p,
                                        int64_t stride, enum ht_dtype dtype)
{
    const int64_t bytes = stride * (int64_t)ht_dtype_bytes(dtype);
    if ((uintptr_t)p % 16 == 0 && bytes % 16 == 0) return HT_OK;
    return HT_FAIL(HT_ERR_ARG,
                   "%s: %s at %p with rows %lld bytes apart; on CUDA both must be multiples of 16",
                   what, name, p, (long long)bytes);
}

#endif
