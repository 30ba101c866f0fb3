/* ssm/ssd_cuda.h: inside the CUDA scan only: tiles and their products, decay, pieces of sequences.
 *
 * Chunks have 64 tokens whatever ht_ssd_args.chunk says (it changes rounding only). A thread block
 * has 8 warps; in products over the chunk's tokens warp w owns the rows 16 (w % 4) .. + 15.
 *
 * Tiles lie in shared memory in the tensors' type, rows of `columns` + 8 elements apart: eight rows
 * start in eight different groups of four banks, so ldmatrix and the fp32 loads have no conflicts.
 * A fragment holds the same elements of a matrix in both types: bf16 as mma.m16n8k16 wants them,
 * fp32 as two steps of m16n8k8 whose k are 2t, 2t+1 instead of t, t+4 (any order of k will do, if A
 * and B agree). fp32 products are three of tf32: hi hi + hi lo + lo hi, relative error 2^-21.
 *
 * Decay never appears as a difference of running sums (see ssd_cpu.h): with blocks of 16 tokens
 *   exp(sum_{j<k<=i} da_k) = row_i between[block(i)][j]      between blocks, both factors <= 1
 * and sums over the interval itself inside of one.
 */
#ifndef HT_SSM_SSD_CUDA_H
#define HT_SSM_SSD_CUDA_H

#include "core/base/cuda_kernel.h"

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

/* ---- decay of one head's chunk ---- */

static __device__ __forceinline__ float decay_exp(float x)
{
    return fast_exp2(x * 1.44269504088896f);
}

struct ssd_decay_table {
    float v[kChunk];                             // dt_raw + dt_bias
    float dt[kChunk];                            // clamp(softplus(v)), 0 behind the end
    float da[kChunk];                            // dt A
    float in[kChunk];                            // exp(sum_{k<=i} da); in[63] is the whole chunk's
    float out[kChunk];                           // exp(sum_{k>j} da)
    float dt_out[kChunk];                        // dt out
    float row[kChunk];                           // exp(sum of da from the block's start to i)
    float between[kBlocks - 1][kChunk - kBlock]; // [b-1][j], j before block b: exp(sum of da after
                                                 // j up to the block)
};

/* What a head's time steps are made of. */
struct ssd_time_steps {
    const void *dt_raw;
    int64_t stride;
    const float *dt_bias, *A_log;
    float lo, hi;
};

static __device__ __forceinline__ float softplus(float v)
{
    return v > 20.0f ? v : log1pf(expf(v));
}

/* Fills the table; one whole warp. */
template <typename T>
static __device__ void fill_decay(ssd_decay_table *d, const ssd_time_steps &s, int head, int64_t t0,
                                  int n_tokens)
{
    const int l = lane_id();
    const float A = -expf(s.A_log[head]), bias = s.dt_bias[head];
    float da[2], head_sum[2], tail_sum[2], total[kBlocks];

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = l + h * kWarp;
        float v = 0.0f, dt = 0.0f;
        if (i < n_tokens) {
            v = to_f32(((const T *)s.dt_raw)[(t0 + i) * s.stride + head]) + bias;
            const float soft = softplus(v);
            dt = soft < s.lo ? s.lo : soft > s.hi ? s.hi : soft; // a NaN passes through
        }
        da[h] = dt * A;
        d->v[i] = v;
        d->dt[i] = dt;
        d->da[i] = da[h];
        head_sum[h] = tail_sum[h] = da[h];
#pragma unroll
        for (int o = 1; o < kBlock; o *= 2) { // within blocks of 16 lanes, from either end
            const float before = __shfl_up_sync(kAllLanes, head_sum[h], o, kBlock);
            const float after = __shfl_down_sync(kAllLanes, tail_sum[h], o, kBlock);
            if (l % kBlock >= o) head_sum[h] += before;
            if (l % kBlock + o < kBlock) tail_sum[h] += after;
        }
        total[2 * h] = __shfl_sync(kAllLanes, head_sum[h], kBlock - 1);
        total[2 * h + 1] = __shfl_sync(kAllLanes, head_sum[h], kWarp - 1);
        const float next = __shfl_down_sync(kAllLanes, tail_sum[h], 1, kBlock);
        tail_sum[h] = l % kBlock + 1 < kBlock ? next : 0.0f; // without the token itself
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = l + h * kWarp, block = i / kBlock;
        float before = 0.0f, after = tail_sum[h];
#pragma unroll
        for (int b = 0; b < kBlocks; b++) {
            if (b < block) before += total[b];
            if (b > block) {
                d->between[b - 1][i] = decay_exp(after); // blocks between block and b
                after += total[b];
            }
        }
        const float out = decay_exp(after);
        d->in[i] = decay_exp(before + head_sum[h]);
        d->out[i] = out;
        d->dt_out[i] = out * d->dt[i];
        d->row[i] = decay_exp(head_sum[h]);
    }
}

/* sum of da over k, j < k <= i, in one block of 16; kFirst <= j: k from kFirst + 1 to kLast. */
template <int kFirst, int kLast>
static __device__ __forceinline__ float interval(const float (&da)[kBlock], int j, int i)
{
    float s = 0.0f;
#pragma unroll
    for (int k = kFirst + 1; k <= kLast; k++)
        if (k > j && k <= i) s += da[k];
    return s;
}

static __device__ __forceinline__ void load_block(float (&da)[kBlock], const float *p)
{
#pragma unroll
    for (int k = 0; k < kBlock; k += 4) {
        const float4 v = *reinterpret_cast<const float4 *>(p + k);
        da[k] = v.x, da[k + 1] = v.y, da[k + 2] = v.z, da[k + 3] = v.w;
    }
}

/* ---- pieces of sequences ---- */

struct ssd_piece {
    int seq, index, last; // number within the sequence; the sequence's last piece
    int begin, end;       // tokens
};

static __device__ __forceinline__ int first_slot(const int32_t *starts, int s, int span)
{
    return starts[s] / span + s;
}

/* The piece with this slot; false for an empty slot. */
static __device__ __forceinline__ bool find_piece(ssd_piece *piece, const int32_t *starts,
                                                  int n_seqs, int span, int slot)
{
    int low = 0, high = n_seqs;
    while (high - low > 1) {
        const int mid = (low + high) / 2;
        if (first_slot(starts, mid, span) <= slot)
            low = mid;
        else
            high = mid;
    }
    const int from = starts[low], to = starts[low + 1];
    piece->seq = low;
    piece->index = slot - first_slot(starts, low, span);
    piece->last = (to - from - 1) / span;
    piece->begin = from + piece->index * span;
    piece->end = min(piece->begin + span, to);
    return piece->index <= piece->last;
}

/* Heads are worked on in blocks of `heads` (the last one of a group may be shorter), numbered
 * through all groups; a launch covers n_blocks of them from `first` on. */
struct ssd_heads {
    int of_group, heads, per_group, first, n_blocks;
};

struct ssd_head_range {
    int group, begin, end;
};

static __host__ __device__ inline ssd_head_range heads_of_block(const ssd_heads &h, int block)
{
    ssd_head_range r;
    r.group = block / h.per_group;
    r.begin = r.group * h.of_group + block % h.per_group * h.heads;
    const int end = (r.group + 1) * h.of_group;
    r.end = r.begin + h.heads < end ? r.begin + h.heads : end;
    return r;
}

/* ---- the walk over states (ssd_states_cuda.cu) ---- */

/* How a walk's thread block divides a state: kCols columns of x (kHeads heads of kCols / kHeads)
 * times kN. Each warp owns 16 columns and kN / kParts of d_state as fp32 fragments. */
template <typename T_, int kN_, int kCols_, int kHeads_>
struct ssd_shape {
    using T = T_;
    static constexpr int kN = kN_, kCols = kCols_, kHeads = kHeads_, kHeadCols = kCols / kHeads;
    static constexpr int kRowBlocks = kCols / 16, kParts = kSsdWarps / kRowBlocks;
    static constexpr int kPart = kN / kParts, kTiles = kPart / 8; // of a warp
    static constexpr int kPitchX = kCols + kPad, kPitchN = kN + kPad;
};

/* What one thread block walks: heads `head` .. + n_heads - 1, columns p0 .. of each. */
struct ssd_column {
    int group, head, n_heads, p0;
};

template <typename S>
static __device__ __forceinline__ ssd_column column_at(const ssd_heads &h, int d_head, int column)
{
    const int p_tiles = (d_head + S::kHeadCols - 1) / S::kHeadCols;
    const int per_block = (h.heads + S::kHeads - 1) / S::kHeads;
    const ssd_head_range r = heads_of_block(h, h.first + column / p_tiles / per_block);
    ssd_column c;
    c.group = r.group;
    c.head = r.begin + column / p_tiles % per_block * S::kHeads;
    c.n_heads = min(S::kHeads, r.end - c.head); // 0 or less behind a shorter block
    c.p0 = column % p_tiles * S::kHeadCols;
    return c;
}

/* The columns' part of rows of a (tokens, n_heads * d_head) tensor. */
template <typename S>
static __device__ __forceinline__ void copy_heads(typename S::T *tile, const typename S::T *src,
                                                  int64_t stride, int64_t t0, int n_rows,
                                                  const ssd_column &c, int d_head)
{
#pragma unroll
    for (int hh = 0; hh < S::kHeads; hh++)
        copy_tile<kChunk, S::kHeadCols, S::kPitchX>(
            tile + hh * S::kHeadCols, src + t0 * stride + (c.head + hh) * d_head + c.p0, stride,
            n_rows, hh < c.n_heads ? d_head - c.p0 : 0, src);
}

/* Tables of the columns' heads, one warp each; a head that is not there decays nothing. */
template <typename S>
static __device__ __forceinline__ void fill_tables(ssd_decay_table *table, const ssd_time_steps &s,
                                                   const ssd_column &c, int64_t t0, int n_tokens)
{
    const int warp = (int)threadIdx.x / kWarp;
    if (warp < S::kHeads)
        fill_decay<typename S::T>(table + warp, s, c.head + min(warp, c.n_heads - 1), t0,
                                  warp < c.n_heads ? n_tokens : 0);
}

/* A warp's part of the state: 16 columns from `row` on (all of one head), kPart of d_state from n0.
 */
template <typename S>
struct ssd_state {
    float acc[S::kTiles][4];

    static __device__ __forceinline__ int row()
    {
        return (int)threadIdx.x / kWarp % S::kRowBlocks * 16;
    }
    static __device__ __forceinline__ int n0()
    {
        return (int)threadIdx.x / kWarp / S::kRowBlocks * S::kPart;
    }
    static __device__ __forceinline__ int head() { return row() / S::kHeadCols; }

    /* Calls f(tile, half, offset in a (n_heads, P, N) tensor from the first head on) for each pair
     * acc[tile][2 half], [2 half + 1] that exists. */
    template <typename F>
    static __device__ __forceinline__ void each(const ssd_column &c, int d_head, int d_state, F f)
    {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int p = c.p0 + row() % S::kHeadCols + g + 8 * half;
            if (head() >= c.n_heads || p >= d_head) continue;
#pragma unroll
            for (int i = 0; i < S::kTiles; i++) {
                const int n = n0() + 8 * i + 2 * t;
                if (n < d_state) f(i, half, (int64_t)(head() * d_head + p) * d_state + n);
            }
        }
    }

    /* p: the first head's state, or NULL for zero */
    __device__ __forceinline__ void load(const float *p, const ssd_column &c, int d_head,
                                         int d_state)
    {
        zero(acc);
        if (p)
            each(c, d_head, d_state, [&](int i, int half, int64_t at) {
                const float2 v = load_pair(p + at);
                acc[i][2 * half] = v.x;
                acc[i][2 * half + 1] = v.y;
            });
    }

    template <typename T>
    __device__ __forceinline__ void store(T *p, const ssd_column &c, int d_head, int d_state) const
    {
        each(c, d_head, d_state, [&](int i, int half, int64_t at) {
            store_pair(p + at, acc[i][2 * half], acc[i][2 * half + 1]);
        });
    }

    /* S <- gamma S + sum_j scale_j u_j (outer) v_j */
    __device__ __forceinline__ void update(const typename S::T *u, const typename S::T *v,
                                           const float *scale, float gamma)
    {
#pragma unroll
        for (int i = 0; i < S::kTiles; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) acc[i][e] *= gamma;
#pragma unroll
        for (int k = 0; k < kChunk; k += 16) {
            frag_a<typename S::T> a;
            load_a_trans(a, u + k * S::kPitchX + row(), S::kPitchX);
            scale_k(a, scale + k);
#pragma unroll
            for (int i = 0; i < S::kTiles; i += 2) {
                frag_b<typename S::T> b[2];
                load_b_trans(b, v + k * S::kPitchN + n0() + 8 * i, S::kPitchN);
                mma(acc[i], a, b[0]);
                mma(acc[i + 1], a, b[1]);
            }
        }
    }
};

/* Calls use(ssd_shape<...>()) with the shape for d_state. 64 registers of state per thread where
 * d_state is 128 or more; fp32 takes fewer columns, because its tiles are twice as large. */
template <typename T, typename F>
static enum ht_status with_shape(int64_t d_state, F use)
{
    if constexpr (sizeof(T) == 2) {
        if (d_state <= 64) return use(ssd_shape<T, 64, 128, 2>());
        if (d_state <= 128) return use(ssd_shape<T, 128, 128, 2>());
        return use(ssd_shape<T, 256, 32, 1>());
    } else {
        if (d_state <= 64) return use(ssd_shape<T, 64, 32, 1>());
        if (d_state <= 128) return use(ssd_shape<T, 128, 32, 1>());
        return use(ssd_shape<T, 256, 16, 1>());
    }
}

/* Thread blocks of a walk per piece. */
template <typename S>
static inline int64_t columns_of(const ssd_heads &h, int64_t d_head)
{
    return (int64_t)h.n_blocks * ceil_div(h.heads, S::kHeads) * ceil_div(d_head, S::kHeadCols);
}

/* States along the sequences, forward (u = x, v = B) or backward in time (u = grad_y, v = C):
 *   forward   S <- gamma S + sum_j dt_j out_j u_j (outer) v_j
 *   backward  S <- gamma S + sum_i in_i u_i (outer) v_i */
struct ssd_walk {
    const int32_t *starts;
    int n_seqs, n_tokens, n_heads, d_head, d_state;
    ssd_heads heads;
    ssd_time_steps steps;
    const void *u, *v;
    int64_t u_stride, v_stride;
    bool reverse;
    const float *seed;  // (n_seqs, n_heads, P, N) or NULL for zero
    float *final;       // (n_seqs, n_heads, P, N) or NULL: where the walk ends
    void *chunk_states; // (chunk slots, heads of the launch, P, N): before each chunk in the walk's
                        // direction; or NULL
};

/* Where a sequence is cut: `states` (slots, heads of the launch, P, N) hold the state that enters
 * each piece. Taken from scratch when span <= n_tokens, otherwise left NULL. */
struct ssd_segments {
    int span;
    float *states, *decay;
};

/* Cuts, and where it cuts computes the entering states. */
template <typename T>
enum ht_status ssd_segment_states(ssd_segments *out, struct ht_backend *be, const ssd_walk &w,
                                  int64_t columns);

/* Writes chunk_states and final. */
template <typename T>
enum ht_status ssd_walk_states(struct ht_backend *be, const ssd_walk &w);

static inline int n_heads_of(const ssd_heads &h)
{
    return heads_of_block(h, h.first + h.n_blocks - 1).end - heads_of_block(h, h.first).begin;
}

static inline ssd_time_steps time_steps_of(const struct ht_ssd_args *a)
{
    ssd_time_steps s;
    s.dt_raw = a->dt_raw;
    s.stride = a->dt_stride;
    s.dt_bias = a->dt_bias;
    s.A_log = a->A_log;
    s.lo = a->dt_min;
    s.hi = a->dt_max;
    return s;
}

#endif
