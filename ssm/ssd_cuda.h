/* ssm/ssd_cuda.h: inside the CUDA scan only: decay, pieces of sequences, states along a sequence.
 *
 * Chunks have 64 tokens whatever ht_ssd_args.chunk says (it changes rounding only). Decay never
 * appears as a difference of running sums (see ssd_cpu.h): with blocks of 16 tokens
 *   exp(sum_{j<k<=i} da_k) = row[i] to_block(block of i)[j]     between blocks, both factors <= 1
 * and sums over the interval itself inside of one.
 */
#ifndef HT_SSM_SSD_CUDA_H
#define HT_SSM_SSD_CUDA_H

#include "ssm/ssd_tile_cuda.h"

/* ---- decay of one head's chunk ---- */

static __device__ __forceinline__ float decay_exp(float x)
{
    return fast_exp2(x * 1.44269504088896f);
}

struct ssd_decay_table {
    float dt[kChunk];     // clamp(softplus(v)), 0 behind the end
    float da[kChunk];     // dt A
    float in[kChunk];     // exp(sum_{k<=i} da); in[63] is the whole chunk's
    float out[kChunk];    // exp(sum_{k>j} da)
    float dt_out[kChunk]; // dt out
    float row[kChunk];    // exp(sum of da from the block's start to i)
    float to_blocks[8 * kBlocks * (kBlocks - 1)];

    /* [j], j before block b: exp(sum of da after j up to the block) */
    __device__ __forceinline__ float *to_block(int b) { return to_blocks + 8 * b * (b - 1); }
    __device__ __forceinline__ const float *to_block(int b) const
    {
        return to_blocks + 8 * b * (b - 1);
    }
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

/* dt_raw + dt_bias */
template <typename T>
static __device__ __forceinline__ float time_step_input(const ssd_time_steps &s, int head,
                                                        int64_t t)
{
    return to_f32(((const T *)s.dt_raw)[t * s.stride + head]) + s.dt_bias[head];
}

/* Fills the table; one whole warp. */
template <typename T>
static __device__ void fill_decay(ssd_decay_table *d, const ssd_time_steps &s, int head, int64_t t0,
                                  int n_tokens)
{
    const int l = lane_id();
    const float A = -expf(s.A_log[head]);
    float da[2], head_sum[2], tail_sum[2], total[kBlocks];

#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int i = l + h * kWarp;
        float dt = 0.0f;
        if (i < n_tokens) {
            const float soft = softplus(time_step_input<T>(s, head, t0 + i));
            dt = soft < s.lo ? s.lo : soft > s.hi ? s.hi : soft; // a NaN passes through
        }
        da[h] = dt * A;
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
                d->to_block(b)[i] = decay_exp(after); // blocks between block and b
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

/* 2 where tiles for two chunks (or heads) fit into shared memory, so that one is on its way while
 * the other is worked on; otherwise 1. */
static inline enum ht_status pick_stages(int *n_stages, struct ht_backend *be, const char *op,
                                         size_t bytes1, size_t bytes2)
{
    const struct ht_cuda_device *d = ht_cuda_device_of(be);

    *n_stages = bytes2 <= d->smem_block_max ? 2 : 1;
    if (bytes1 <= d->smem_block_max) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED,
                   "%s: needs %zu bytes of shared memory per block, %s has %zu; use precision "
                   "\"bf16\" or a smaller d_state",
                   op, bytes1, d->name, d->smem_block_max);
}

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
