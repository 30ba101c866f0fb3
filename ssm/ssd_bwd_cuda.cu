/* ssm/ssd_bwd_cuda.cu: the chunked scan backward (spec 4.2, B1 to B6) in three phases, each with
 * sums in a fixed order.
 *
 *   A  states S entering every chunk           (ssd_states_cuda.cu, forward in time)
 *   B  gradients dS of the states leaving it   (ssd_states_cuda.cu, backward in time)
 *   C  everything else, all chunks at once: one thread block per chunk and block of heads (below)
 *
 * and the partial sums of C over blocks of heads and over chunks in order. A and B store states in
 * the tensors' type; they run in rounds over the heads, so that those states fit into scratch.
 *
 * Phase C, per head, rows j (or i) of warp w: 16 (w % 4) .. , columns in halves w / 4. With
 * G = x Gy^T and K = B C^T, row j, column i >= j, L = exp(sum_{j<k<=i} da):
 *
 *   M = K L      T = dt_j M G      grad_K += dt_j L G
 *   grad_B_j += dt_j out_j dS^T x_j      V_j = dt_j out_j <B_j, dS^T x_j>
 *   grad_C_i += in_i S^T Gy_i            U_i = in_i <C_i, S^T Gy_i>
 *   grad_u = out_j dS B_j + M Gy         grad_x = dt grad_u + D Gy
 *   grad_da_k = sum_{j<k<=i} T + sum_{i>=k} U + sum_{j<k} V + gamma <dS, S>
 *   grad_dt = A grad_da + sum_i M G + V / dt
 *
 * grad_B, grad_C and grad_K stay in registers over the heads of the block (d_state <= kN; wider
 * ones add to the partial sums in memory). The rectangles of T come from sums over 16 rows, row
 * sums right of the diagonal block and the block itself: all terms are added, none subtracted.
 *
 * Cost of C per token and head, chunk 64: 6 P N + 128 P FLOP, and 3 * 128 N per block of heads;
 * bytes: x, grad_y, grad_x and 2 P N / 64 elements of states. A and B: 4 P N FLOP, the states
 * again.
 */
#include "ssm/ssd_cuda.h"

namespace {

struct backward_args {
    const int32_t *starts;
    int n_seqs, n_tokens, n_heads, d_head, d_state;
    ssd_heads heads;
    ssd_time_steps steps;
    const void *x, *B, *C, *grad_y, *S, *grad_S;
    int64_t x_stride, grad_y_stride;
    const float *D;
    void *grad_x, *grad_dt_raw;
    int64_t grad_x_stride, grad_dt_stride;
    float *partial; // (blocks of heads, T, 2, N): grad_B, grad_C
    float *sums;    // (chunk slots, n_heads, 8 warps, 3): grad of dt_bias, A, D
};

/* Sums of one head on their way to grad_da. */
struct head_sums {
    float columns[kBlocks - 1][kChunk]; // T over the 16 rows of a block, right of the block
    float diagonal[kBlocks][kBlock][kBlock + 1]; // T
    float rows[2][kChunk], right[2][kChunk];     // M G over a half; T right of the diagonal block
    float U[2][kChunk], V_dt[2][kChunk];         // over halves of d_state; V / dt
    float dot[kSsdWarps];                        // <dS, S>
};

/*   tables of two heads | sums | B, C | (M) | x, grad_y, S, dS | the same of the next head
 * M takes the place of x where it is wide enough. */
template <typename T_, int kN_, int kP_, bool kSingle_>
struct backward_shape {
    using T = T_;
    static constexpr int kN = kN_, kP = kP_;
    static constexpr bool kSingle = kSingle_; // d_state <= kN
    static constexpr int kPitchN = kN + kPad, kPitchP = kP + kPad, kPitchM = kChunk + kPad;
    static constexpr int kB = kChunk * kPitchN, kX = kChunk * kPitchP, kS = kP * kPitchN;
    static constexpr int kM = kP >= kChunk ? 0 : kChunk * kPitchM, kStage = 2 * kX + 2 * kS;
    static constexpr int kTilesN = kN / 16, kTilesP = kP / 16; // 16 x 8 tiles of a warp's half
    static constexpr size_t kFixed = 2 * sizeof(ssd_decay_table) + sizeof(head_sums);

    static size_t bytes(int n_stages)
    {
        return kFixed + (size_t)(2 * kB + kM + n_stages * kStage) * sizeof(T);
    }
};

template <typename S>
struct backward_smem {
    using T = typename S::T;
    ssd_decay_table *tables;
    head_sums *sums;
    T *B, *C;
    int n_stages;

    __device__ __forceinline__ backward_smem(unsigned char *p, int stages)
        : tables(reinterpret_cast<ssd_decay_table *>(p)),
          sums(reinterpret_cast<head_sums *>(tables + 2)), B(reinterpret_cast<T *>(p + S::kFixed)),
          C(B + S::kB), n_stages(stages)
    {
    }
    __device__ __forceinline__ T *x(int i) const
    {
        return C + S::kB + S::kM + (n_stages > 1 ? i % 2 : 0) * S::kStage;
    }
    __device__ __forceinline__ T *grad_y(int i) const { return x(i) + S::kX; }
    __device__ __forceinline__ T *state(int i) const { return x(i) + 2 * S::kX; }
    __device__ __forceinline__ T *grad_state(int i) const { return x(i) + 2 * S::kX + S::kS; }
    __device__ __forceinline__ T *M(int i) const { return S::kM ? C + S::kB : x(i); }
};

enum { TILE_B = 1, TILE_C = 2, TILE_X = 4, TILE_GRAD_Y = 8, TILE_S = 16, TILE_GRAD_S = 32 };

/* Decay of the diagonal block, transposed: rows j, columns i; lo: i 0..7, hi: i 8..15. Zero where
 * i < j. */
__device__ __forceinline__ void diagonal_decay(float (&lo)[4], float (&hi)[4],
                                               const float *da_of_block)
{
    const int g = lane_id() / 4, i = 2 * (lane_id() % 4);
    float da[kBlock], first = 0.0f, second = 0.0f; // of columns i + 1 and i + 9

    load_block(da, da_of_block);
#pragma unroll
    for (int k = 1; k < 8; k += 2) {
        if (k == i + 1) first = da[k];
        if (k == i + 1) second = da[k + 8];
    }
    const float upper = interval<0, 7>(da, g, i), lower = interval<8, 15>(da, g + 8, i + 8);
    const float across = interval<0, 7>(da, g, 7) + interval<7, 15>(da, 7, i + 8);
    lo[0] = g <= i ? decay_exp(upper) : 0.0f;
    lo[1] = g <= i + 1 ? decay_exp(upper + (g < i + 1 ? first : 0.0f)) : 0.0f;
    lo[2] = lo[3] = 0.0f;
    hi[0] = decay_exp(across);
    hi[1] = decay_exp(across + second);
    hi[2] = g <= i ? decay_exp(lower) : 0.0f;
    hi[3] = g <= i + 1 ? decay_exp(lower + (g < i + 1 ? second : 0.0f)) : 0.0f;
}

/* Sum over the four lanes of a row. */
__device__ __forceinline__ float quad_sum(float v)
{
    v += __shfl_xor_sync(kAllLanes, v, 1);
    return v + __shfl_xor_sync(kAllLanes, v, 2);
}

/* Decayed scores of a head from G, which becomes M, with all sums over them. */
template <int kTiles>
__device__ __forceinline__ void
scores_backward(float (&G)[kTiles][4], float (&grad_K)[kTiles][4], const float (&K)[kTiles][4],
                head_sums *sums, const ssd_decay_table *d, float *sum_D, int block, int half)
{
    const int g = lane_id() / 4, t = lane_id() % 4, j = block * kBlock + g;
    const float dt[2] = { d->dt[j], d->dt[j + 8] };
    float row_sum[2] = { 0, 0 }, right[2] = { 0, 0 };

#pragma unroll
    for (int pair = 0; pair < kTiles / 2; pair++) {
        const int column_block = half * kTiles / 2 + pair;
        float L[2][4];
        if (column_block < block) continue;
        if (column_block == block) {
            diagonal_decay(L[0], L[1], d->da + block * kBlock);
            if (g / 2 == t) // j == i
                *sum_D += g % 2 ? G[2 * pair][1] + G[2 * pair + 1][3]
                                : G[2 * pair][0] + G[2 * pair + 1][2];
        } else {
            const float *between = d->between[column_block - 1];
#pragma unroll
            for (int e = 0; e < 8; e++)
                L[e / 4][e % 4] = between[j + e / 2 % 2 * 8] *
                                  d->row[column_block * kBlock + e / 4 * 8 + 2 * t + e % 2];
        }
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            float column[2] = { 0, 0 };
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int at = 2 * pair + tile, low = e / 2; // row j or j + 8
                const float m = K[at][e] * L[tile][e], mg = m * G[at][e], T = dt[low] * mg;
                grad_K[at][e] += dt[low] * (L[tile][e] * G[at][e]);
                G[at][e] = m;
                row_sum[low] += mg;
                column[e % 2] += T;
                if (column_block == block)
                    sums->diagonal[block][g + 8 * low][8 * tile + 2 * t + e % 2] = T;
                else
                    right[low] += T;
            }
            if (column_block > block) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    column[e] += __shfl_xor_sync(kAllLanes, column[e], 4);
                    column[e] += __shfl_xor_sync(kAllLanes, column[e], 8);
                    column[e] += __shfl_xor_sync(kAllLanes, column[e], 16);
                    if (g == 0)
                        sums->columns[block][column_block * kBlock + 8 * tile + 2 * t + e] =
                            column[e];
                }
            }
        }
    }
#pragma unroll
    for (int low = 0; low < 2; low++) {
        const float all = quad_sum(row_sum[low]), r = quad_sum(right[low]);
        if (t == 0) sums->rows[half][j + 8 * low] = all;
        if (t == 0) sums->right[half][j + 8 * low] = r;
    }
}

/* The share of one of four threads in grad_da[k] without <dS, S>. */
__device__ __forceinline__ float grad_da_share(const head_sums *s, const float *dt, int k, int part)
{
    const int block = k / kBlock, r = k % kBlock;
    float sum = 0.0f;

    for (int i = k + part; i < kChunk; i += 4) {
#pragma unroll
        for (int b = 0; b + 1 < kBlocks; b++)
            if (b < block) sum += s->columns[b][i];
        sum += s->U[0][i] + s->U[1][i];
    }
    for (int j = block * kBlock + part; j < k; j += 4) sum += s->right[0][j] + s->right[1][j];
    for (int j = part; j < r; j += 4)
        for (int i = r; i < kBlock; i++) sum += s->diagonal[block][j][i];
    for (int j = part; j < k; j += 4) sum += dt[j] * (s->V_dt[0][j] + s->V_dt[1][j]);
    return sum;
}

template <typename S>
struct chunk_worker {
    using T = typename S::T;
    const backward_args &a;
    const backward_smem<S> &smem;
    int group, first_head, launch_heads, slot, t0, n_tokens, block, half;

    static constexpr int kTilesK = kChunk / 16; // of a warp's half of the columns

    /* First of the warp's columns of d_state, and of x */
    __device__ __forceinline__ int n0() const { return half * S::kN / 2; }
    __device__ __forceinline__ int p0() const { return half * S::kP / 2; }
    __device__ __forceinline__ int row() const { return block * kBlock + lane_id() / 4; }

    /* Starts copying the tiles in `which`: columns from p on, d_state from n on. */
    __device__ __forceinline__ void fetch(int which, int i, int head, int p, int n) const
    {
        const int P = a.d_head, N = a.d_state;
        const T *x = (const T *)a.x, *B = (const T *)a.B, *C = (const T *)a.C;
        const T *gy = (const T *)a.grad_y, *state = (const T *)a.S, *gs = (const T *)a.grad_S;
        const int64_t of_state =
            (((int64_t)slot * launch_heads + head - first_head) * P + p) * N + n;
        const int64_t of_B = (int64_t)t0 * a.x_stride + group * N + n;

        if (which & TILE_B)
            copy_tile<kChunk, S::kN, S::kPitchN>(smem.B, B + of_B, a.x_stride, n_tokens, N - n, B);
        if (which & TILE_C)
            copy_tile<kChunk, S::kN, S::kPitchN>(smem.C, C + of_B, a.x_stride, n_tokens, N - n, C);
        if (which & TILE_X)
            copy_tile<kChunk, S::kP, S::kPitchP>(smem.x(i),
                                                 x + (int64_t)t0 * a.x_stride + head * P + p,
                                                 a.x_stride, n_tokens, P - p, x);
        if (which & TILE_GRAD_Y)
            copy_tile<kChunk, S::kP, S::kPitchP>(smem.grad_y(i),
                                                 gy + (int64_t)t0 * a.grad_y_stride + head * P + p,
                                                 a.grad_y_stride, n_tokens, P - p, gy);
        if (which & TILE_S)
            copy_tile<S::kP, S::kN, S::kPitchN>(smem.state(i), state + of_state, N, P - p, N - n,
                                                state);
        if (which & TILE_GRAD_S)
            copy_tile<S::kP, S::kN, S::kPitchN>(smem.grad_state(i), gs + of_state, N, P - p, N - n,
                                                gs);
        cp_async_commit();
    }

    /* The same, and waits; nobody may still read the tiles. */
    __device__ __forceinline__ void bring(int which, int i, int head, int p, int n) const
    {
        __syncthreads();
        fetch(which, i, head, p, n);
        cp_async_wait<0>();
        __syncthreads();
    }

    /* acc += A's rows of this warp times columns of B given by rows (16 columns per `step` of b).
     */
    template <int kTiles>
    __device__ __forceinline__ void product(float (&acc)[kTiles][4], const T *rows, int rows_pitch,
                                            const T *columns, int columns_pitch, int k_end) const
    {
        for (int k = 0; k < k_end; k += 16) {
            frag_a<T> fa;
            load_a(fa, rows + block * kBlock * rows_pitch + k, rows_pitch);
#pragma unroll
            for (int i = 0; i < kTiles; i += 2) {
                frag_b<T> fb[2];
                load_b(fb, columns + 8 * i * columns_pitch + k, columns_pitch);
                mma(acc[i], fa, fb[0]);
                mma(acc[i + 1], fa, fb[1]);
            }
        }
    }

    /* Columns of B are columns of the tile: k runs over its rows. */
    template <int kTiles>
    __device__ __forceinline__ void product_trans(float (&acc)[kTiles][4], const T *rows,
                                                  int rows_pitch, const T *tile, int pitch,
                                                  int k_begin, int k_end) const
    {
        for (int k = k_begin; k < k_end; k += 16) {
            frag_a<T> fa;
            load_a(fa, rows + block * kBlock * rows_pitch + k, rows_pitch);
#pragma unroll
            for (int i = 0; i < kTiles; i += 2) {
                frag_b<T> fb[2];
                load_b_trans(fb, tile + k * pitch + 8 * i, pitch);
                mma(acc[i], fa, fb[0]);
                mma(acc[i + 1], fa, fb[1]);
            }
        }
    }

    /* acc[j, i] += a_j . b_i for this warp's columns i, where i's block is not before j's */
    __device__ __forceinline__ void scores(float (&acc)[kTilesK][4], const T *rows,
                                           const T *columns, int pitch, int k_end) const
    {
        for (int k = 0; k < k_end; k += 16) {
            frag_a<T> fa;
            load_a(fa, rows + block * kBlock * pitch + k, pitch);
#pragma unroll
            for (int i = 0; i < kTilesK; i += 2) {
                const int column_block = half * (kTilesK / 2) + i / 2;
                frag_b<T> fb[2];
                if (column_block < block) continue;
                load_b(fb, columns + column_block * kBlock * pitch + k, pitch);
                mma(acc[i], fa, fb[0]);
                mma(acc[i + 1], fa, fb[1]);
            }
        }
    }

    /* A warp's part of grad_B (which 0) or grad_C (1) among the partial sums. */
    __device__ __forceinline__ float *partial_at(int which, int r, int n) const
    {
        const int head_block = a.heads.first + (int)blockIdx.x % a.heads.n_blocks;
        return a.partial + (((int64_t)head_block * a.n_tokens + t0 + r) * 2 + which) * a.d_state +
               n;
    }

    /* Stores acc there, or adds it. */
    __device__ __forceinline__ void to_partial(const float (&acc)[S::kTilesN][4], int which, int n,
                                               bool add) const
    {
        const int t = lane_id() % 4;
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int r = row() + 8 * low;
            if (r >= n_tokens) continue;
#pragma unroll
            for (int i = 0; i < S::kTilesN; i++) {
                const int at = n + n0() + 8 * i + 2 * t;
                if (at >= a.d_state) continue;
                float *p = partial_at(which, r, at);
                float2 v = make_float2(acc[i][2 * low], acc[i][2 * low + 1]);
                if (add) {
                    const float2 old = load_pair(p);
                    v.x += old.x;
                    v.y += old.y;
                }
                store_pair(p, v.x, v.y);
            }
        }
    }

    /* dots[half][row] = scale[row] <matrix row, acc row> over the warp's half of d_state, added to
     * what `sum` holds; then acc[row] *= factor[row]. */
    __device__ __forceinline__ void dot_and_scale(float (&acc)[S::kTilesN][4], float (&sum)[2],
                                                  const T *matrix, const float *scale,
                                                  const float *factor) const
    {
        const int t = lane_id() % 4;
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int r = row() + 8 * low;
            float s = 0.0f;
#pragma unroll
            for (int i = 0; i < S::kTilesN; i++) {
                const float2 v = load_pair(matrix + r * S::kPitchN + n0() + 8 * i + 2 * t);
                s += v.x * acc[i][2 * low] + v.y * acc[i][2 * low + 1];
                acc[i][2 * low] *= factor[r];
                acc[i][2 * low + 1] *= factor[r];
            }
            sum[low] += scale[r] * s;
        }
    }

    __device__ __forceinline__ void put_rows(float *to, const float (&sum)[2]) const
    {
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const float s = quad_sum(sum[low]);
            if (lane_id() % 4 == 0) to[row() + 8 * low] = s;
        }
    }

    /* <dS, S> of the tiles that are here: this thread's share */
    __device__ __forceinline__ float state_dot(int i) const
    {
        float s = 0.0f;
        for (int e = (int)threadIdx.x; e < S::kP * S::kN / 2; e += kSsdThreads) {
            const int at = e / (S::kN / 2) * S::kPitchN + e % (S::kN / 2) * 2;
            const float2 u = load_pair(smem.state(i) + at), v = load_pair(smem.grad_state(i) + at);
            s += u.x * v.x + u.y * v.y;
        }
        return s;
    }

    /* A warp's part of scores as an operand in shared memory. */
    __device__ __forceinline__ void put_scores(T *to, const float (&acc)[kTilesK][4]) const
    {
        const int t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < kTilesK; i++) {
            const int column = half * (kChunk / 2) + 8 * i;
            if (column / kBlock < block) continue;
#pragma unroll
            for (int low = 0; low < 2; low++)
                store_pair(to + (row() + 8 * low) * S::kPitchM + column + 2 * t, acc[i][2 * low],
                           acc[i][2 * low + 1]);
        }
    }

    __device__ __forceinline__ void put_grad_x(const float (&acc)[S::kTilesP][4], int head, int p,
                                               const T *gy, const float *dt) const
    {
        const int t = lane_id() % 4, P = a.d_head;
        const float D = a.D[head];
#pragma unroll
        for (int low = 0; low < 2; low++) {
            const int r = row() + 8 * low;
            if (r >= n_tokens) continue;
            T *out = (T *)a.grad_x + (int64_t)(t0 + r) * a.grad_x_stride + head * P;
#pragma unroll
            for (int i = 0; i < S::kTilesP; i++) {
                const int col = p0() + 8 * i + 2 * t;
                const float2 v = load_pair(gy + r * S::kPitchP + col);
                if (p + col < P)
                    store_pair(out + p + col, dt[r] * acc[i][2 * low] + D * v.x,
                               dt[r] * acc[i][2 * low + 1] + D * v.y);
            }
        }
    }

    /* From the sums to grad_dt_raw and the head's own gradients (B5, B6); four threads per token.
     */
    __device__ __forceinline__ void time_steps(const ssd_decay_table *d, int head,
                                               float sum_D) const
    {
        const head_sums *s = smem.sums;
        const int k = (int)threadIdx.x / 4, part = (int)threadIdx.x % 4;
        const float A = -expf(a.steps.A_log[head]);
        float da = quad_sum(grad_da_share(s, d->dt, k, part)), bias = 0.0f, grad_A = 0.0f;

        if (part == 0 && k < n_tokens) {
            float dot = 0.0f;
#pragma unroll
            for (int i = 0; i < kSsdWarps; i++) dot += s->dot[i];
            da += d->in[kChunk - 1] * dot;
            const float v = d->v[k], soft = softplus(v);
            const float grad =
                A * da + (s->rows[0][k] + s->rows[1][k]) + (s->V_dt[0][k] + s->V_dt[1][k]);
            const bool inside = soft >= a.steps.lo && soft <= a.steps.hi;
            bias = inside ? grad * (v > 20.0f ? 1.0f : sigmoid(v)) : 0.0f;
            grad_A = d->dt[k] * da;
            ((T *)a.grad_dt_raw)[(int64_t)(t0 + k) * a.grad_dt_stride + head] = from_f32<T>(bias);
        }
        bias = warp_sum(bias);
        grad_A = warp_sum(grad_A);
        sum_D = warp_sum(sum_D);
        float *to = a.sums + ((int64_t)slot * a.n_heads + head) * HT_SSD_CUDA_SUMS +
                    threadIdx.x / kWarp * 3;
        if (lane_id() == 0) to[0] = bias, to[1] = grad_A, to[2] = sum_D;
    }
};

template <typename S>
__global__ void __launch_bounds__(kSsdThreads)
    ssd_backward_kernel(backward_args a, int launch_heads, int n_stages)
{
    using T = typename S::T;
    HT_SHARED_DYNAMIC(unsigned char, bytes);
    const backward_smem<S> smem(bytes, n_stages);
    const int slot = (int)blockIdx.x / a.heads.n_blocks, warp = (int)threadIdx.x / kWarp;
    const ssd_head_range r =
        heads_of_block(a.heads, a.heads.first + (int)blockIdx.x % a.heads.n_blocks);
    const int P = a.d_head, N = a.d_state;
    ssd_piece piece;

    if (!find_piece(&piece, a.starts, a.n_seqs, kChunk, slot)) {
        for (int i = (int)threadIdx.x; i < (r.end - r.begin) * HT_SSD_CUDA_SUMS; i += kSsdThreads)
            a.sums[((int64_t)slot * a.n_heads + r.begin) * HT_SSD_CUDA_SUMS + i] = 0.0f;
        return;
    }
    const chunk_worker<S> work = { a,
                                   smem,
                                   r.group,
                                   heads_of_block(a.heads, a.heads.first).begin,
                                   launch_heads,
                                   slot,
                                   piece.begin,
                                   piece.end - piece.begin,
                                   warp % kBlocks,
                                   warp / kBlocks };
    const bool whole = S::kSingle && P <= S::kP; // all tiles of a head are here at once
    const int of_head = TILE_X | TILE_GRAD_Y | TILE_S | TILE_GRAD_S;
    const auto table = [&](int i) {
        if (warp == kBlocks - 1) // whose scores are above the diagonal: none in the first half
            fill_decay<T>(smem.tables + i % 2, a.steps, r.begin + i, piece.begin, work.n_tokens);
    };
    float K[chunk_worker<S>::kTilesK][4], grad_K[chunk_worker<S>::kTilesK][4];
    float grad_B[S::kTilesN][4], grad_C[S::kTilesN][4];

    zero(K);
    zero(grad_K);
    zero(grad_B);
    zero(grad_C);
    for (int n = 0; n < N; n += S::kN) {
        work.bring(TILE_B | TILE_C | (whole ? of_head : 0), 0, r.begin, 0, n);
        work.scores(K, smem.B, smem.C, S::kPitchN, S::kN);
    }
    if (whole) table(0);
    for (int i = 0; i < r.end - r.begin; i++) {
        const int head = r.begin + i;
        const ssd_decay_table *d = smem.tables + i % 2;
        float G[chunk_worker<S>::kTilesK][4], V_dt[2] = { 0, 0 }, U[2] = { 0, 0 }, sum_D = 0.0f,
                                              dot = 0.0f;

        if (whole) {
            cp_async_wait<0>();
            __syncthreads(); // this head's tiles and table are here, the head before is done
            if (n_stages > 1 && head + 1 < r.end) work.fetch(of_head, i + 1, head + 1, 0, 0);
            if (head + 1 < r.end) table(i + 1);
        } else {
            table(i); // the next bring() has the barrier
        }
        zero(G);
        for (int p = 0; p < P; p += S::kP) {
            if (!whole) work.bring(TILE_X | TILE_GRAD_Y, i, head, p, 0);
            work.scores(G, smem.x(i), smem.grad_y(i), S::kPitchP, S::kP);
        }
        scores_backward(G, grad_K, K, smem.sums, d, &sum_D, work.block, work.half);

        for (int n = 0; n < N; n += S::kN) {
            float acc[S::kTilesN][4];
            zero(acc);
            for (int p = 0; p < P; p += S::kP) {
                if (!whole)
                    work.bring(TILE_X | TILE_GRAD_S | (S::kSingle ? 0 : TILE_B), i, head, p, n);
                work.product_trans(acc, smem.x(i), S::kPitchP, smem.grad_state(i) + work.n0(),
                                   S::kPitchN, 0, S::kP);
            }
            work.dot_and_scale(acc, V_dt, smem.B, d->out, d->dt_out);
            if constexpr (S::kSingle) {
#pragma unroll
                for (int e = 0; e < S::kTilesN * 4; e++) grad_B[e / 4][e % 4] += acc[e / 4][e % 4];
            } else {
                work.to_partial(acc, 0, n, i > 0);
            }
        }
        __syncthreads(); // everybody has read x
        work.put_scores(smem.M(i), G);

        for (int n = 0; n < N; n += S::kN) {
            float acc[S::kTilesN][4];
            zero(acc);
            for (int p = 0; p < P; p += S::kP) {
                if (!whole)
                    work.bring(TILE_GRAD_Y | TILE_S | TILE_GRAD_S | (S::kSingle ? 0 : TILE_C), i,
                               head, p, n);
                work.product_trans(acc, smem.grad_y(i), S::kPitchP, smem.state(i) + work.n0(),
                                   S::kPitchN, 0, S::kP);
                dot += work.state_dot(i);
            }
            work.dot_and_scale(acc, U, smem.C, d->in, d->in);
            if constexpr (S::kSingle) {
#pragma unroll
                for (int e = 0; e < S::kTilesN * 4; e++) grad_C[e / 4][e % 4] += acc[e / 4][e % 4];
            } else {
                work.to_partial(acc, 1, n, i > 0);
            }
        }
        work.put_rows(smem.sums->V_dt[work.half], V_dt);
        work.put_rows(smem.sums->U[work.half], U);
        dot = warp_sum(dot);
        if (lane_id() == 0) smem.sums->dot[warp] = dot;
        __syncthreads(); // M and the sums are here

        for (int p = 0; p < P; p += S::kP) {
            float acc[S::kTilesP][4];
            zero(acc);
            for (int n = 0; n < N; n += S::kN) {
                if (!whole)
                    work.bring(TILE_GRAD_S | TILE_GRAD_Y | (S::kSingle ? 0 : TILE_B), i, head, p,
                               n);
                work.product(acc, smem.B, S::kPitchN, smem.grad_state(i) + work.p0() * S::kPitchN,
                             S::kPitchN, S::kN);
            }
#pragma unroll
            for (int e = 0; e < S::kTilesP * 4; e++)
                acc[e / 4][e % 4] *= d->out[work.row() + e / 2 % 2 * 8];
            work.product_trans(acc, smem.M(i), S::kPitchM, smem.grad_y(i) + work.p0(), S::kPitchP,
                               work.block * kBlock, kChunk);
            work.put_grad_x(acc, head, p, smem.grad_y(i), d->dt);
        }
        work.time_steps(d, head, sum_D);
        if (whole && n_stages == 1 && head + 1 < r.end) {
            __syncthreads();
            work.fetch(of_head, i + 1, head + 1, 0, 0);
        }
    }

    /* grad_B += C^T grad_K^T, grad_C += B^T grad_K: once for all heads */
    __syncthreads();
    T *scores = smem.M(0);
    work.put_scores(scores, grad_K);
    __syncthreads();
    for (int n = 0; n < N; n += S::kN) {
        if (!S::kSingle) {
            work.bring(TILE_B | TILE_C, 0, r.begin, 0, n);
            zero(grad_B);
            zero(grad_C);
        }
        work.product_trans(grad_B, scores, S::kPitchM, smem.C + work.n0(), S::kPitchN,
                           work.block * kBlock, kChunk);
        for (int k = 0; k <= work.block * kBlock; k += kBlock) { // rows i of grad_C, k = j
            frag_a<T> fa;
            load_a_trans(fa, scores + k * S::kPitchM + work.block * kBlock, S::kPitchM);
#pragma unroll
            for (int e = 0; e < S::kTilesN; e += 2) {
                frag_b<T> fb[2];
                load_b_trans(fb, smem.B + k * S::kPitchN + work.n0() + 8 * e, S::kPitchN);
                mma(grad_C[e], fa, fb[0]);
                mma(grad_C[e + 1], fa, fb[1]);
            }
        }
        work.to_partial(grad_B, 0, n, !S::kSingle);
        work.to_partial(grad_C, 1, n, !S::kSingle);
    }
}

/* grad_B and grad_C: partial sums over the blocks of heads of a group, in order. Two elements per
 * thread. */
template <typename T>
__global__ void __launch_bounds__(kSsdThreads)
    ssd_sum_blocks_kernel(T *grad_B, T *grad_C, int64_t stride, const float *partial, int n_tokens,
                          int n_groups, int per_group, int d_state)
{
    const int64_t i = ((int64_t)blockIdx.x * kSsdThreads + threadIdx.x) * 2;
    const int64_t per_token = (int64_t)n_groups * 2 * d_state;
    const int64_t t = i / per_token, block_size = (int64_t)n_tokens * 2 * d_state;
    if (t >= n_tokens) return;
    const int g = (int)(i % per_token / (2 * d_state)), which = (int)(i / d_state % 2);
    const int n = (int)(i % d_state);
    const float *p = partial + g * per_group * block_size + (2 * t + which) * d_state + n;
    float2 sum = load_pair(p);
    for (int b = 1; b < per_group; b++) {
        const float2 v = load_pair(p + b * block_size);
        sum.x += v.x;
        sum.y += v.y;
    }
    store_pair((which ? grad_C : grad_B) + t * stride + g * d_state + n, sum.x, sum.y);
}

/* grad of dt_bias, A_log and D: one thread block per head, over chunks and warps in order. */
__global__ void __launch_bounds__(kSsdThreads)
    ssd_sum_chunks_kernel(float *grad_dt_bias, float *grad_A_log, float *grad_D, const float *sums,
                          const float *A_log, int n_slots, int n_heads)
{
    const int head = (int)blockIdx.x;
    double sum[3] = { 0, 0, 0 };
    for (int i = (int)threadIdx.x; i < n_slots * kSsdWarps; i += kSsdThreads) {
        const float *p = sums + ((int64_t)(i / kSsdWarps) * n_heads + head) * HT_SSD_CUDA_SUMS +
                         i % kSsdWarps * 3;
        for (int k = 0; k < 3; k++) sum[k] += (double)p[k];
    }
    for (int k = 0; k < 3; k++) sum[k] = block_sum<kSsdThreads>(sum[k]);
    if (threadIdx.x == 0) {
        grad_dt_bias[head] += (float)sum[0];
        grad_A_log[head] += -expf(A_log[head]) * (float)sum[1];
        grad_D[head] += (float)sum[2];
    }
}

template <typename S>
enum ht_status run_chunks(struct ht_backend *be, const backward_args &b, int64_t slots)
{
    const size_t limit = ht_cuda_device_of(be)->smem_block_max;
    const bool prefetch = S::kSingle && b.d_head <= S::kP && S::bytes(2) <= limit;
    const int n_stages = prefetch ? 2 : 1;

    if (S::bytes(1) > limit)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "ssd_backward: needs %zu bytes of shared memory per block, %s has %zu; use "
                       "precision \"bf16\"",
                       S::bytes(1), ht_cuda_device_of(be)->name, limit);
    HT_LAUNCH(be, ssd_backward_kernel<S>, (unsigned)(slots * b.heads.n_blocks), kSsdThreads,
              S::bytes(n_stages), b, n_heads_of(b.heads), n_stages);
    return ht_cuda_check_launch(be, "ssd_backward");
}

template <typename T>
enum ht_status run_chunks_of(struct ht_backend *be, const backward_args &b, int64_t slots)
{
    if constexpr (sizeof(T) == 2) {
        if (b.d_state <= 64) return run_chunks<backward_shape<T, 64, 64, true>>(be, b, slots);
        if (b.d_state <= 128) return run_chunks<backward_shape<T, 128, 64, true>>(be, b, slots);
        return run_chunks<backward_shape<T, 128, 64, false>>(be, b, slots);
    } else {
        return run_chunks<backward_shape<T, 64, 32, false>>(be, b, slots);
    }
}

/* Phases A, B and C for blocks of heads from `first` on; b.S, b.grad_S and the segments of the
 * walks lie in scratch behind `mark`. */
template <typename T>
enum ht_status round_of_heads(struct ht_backend *be, const struct ht_ssd_args *a, backward_args b,
                              int64_t slots)
{
    const int n_heads = n_heads_of(b.heads);
    const size_t bytes =
        (size_t)slots * (size_t)n_heads * (size_t)(a->d_head * a->d_state) * sizeof(T);
    void *S = NULL, *grad_S = NULL;
    ssd_walk w;

    HT_TRY(ht_arena_take(&S, &be->scratch, bytes));
    HT_TRY(ht_arena_take(&grad_S, &be->scratch, bytes));
    b.S = S;
    b.grad_S = grad_S;
    w.starts = b.starts;
    w.n_seqs = b.n_seqs;
    w.n_tokens = b.n_tokens;
    w.n_heads = b.n_heads;
    w.d_head = b.d_head;
    w.d_state = b.d_state;
    w.heads = b.heads;
    w.steps = b.steps;
    w.u = a->x;
    w.u_stride = w.v_stride = a->x_stride;
    w.v = a->B;
    w.reverse = false;
    w.seed = a->init_state;
    w.final = NULL;
    w.chunk_states = S;
    const size_t mark = ht_arena_mark(&be->scratch);
    HT_TRY(ssd_walk_states<T>(be, w));
    ht_arena_reset(&be->scratch, mark); // the stream keeps the order
    w.u = a->grad_y;
    w.u_stride = a->grad_y_stride;
    w.v = a->C;
    w.reverse = true;
    w.seed = a->grad_final_state;
    w.final = a->grad_init_state;
    w.chunk_states = grad_S;
    HT_TRY(ssd_walk_states<T>(be, w));
    return run_chunks_of<T>(be, b, slots);
}

template <typename T>
enum ht_status launch(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const struct ht_ssd_cuda_blocks blocks = ht_ssd_cuda_backward_blocks(a);
    const int64_t slots = ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, kChunk);
    const int n_blocks = (int)(a->n_groups * blocks.per_group);
    const size_t sums_bytes = (size_t)slots * (size_t)a->n_heads * HT_SSD_CUDA_SUMS * sizeof(float);
    void *partial = NULL, *sums = NULL;
    backward_args b;

    HT_TRY(
        ht_arena_take(&partial, &be->scratch,
                      (size_t)n_blocks * (size_t)(a->n_tokens * 2 * a->d_state) * sizeof(float)));
    HT_TRY(ht_arena_take(&sums, &be->scratch, sums_bytes));
    const size_t mark = ht_arena_mark(&be->scratch);
    const int round = (int)ht_ssd_cuda_round(a, be->scratch.size_bytes - be->scratch.used_bytes);
    b.starts = a->seqs.starts;
    b.n_seqs = (int)a->seqs.n_seqs;
    b.n_tokens = (int)a->n_tokens;
    b.n_heads = (int)a->n_heads;
    b.d_head = (int)a->d_head;
    b.d_state = (int)a->d_state;
    b.heads = ssd_heads{ (int)(a->n_heads / a->n_groups), (int)blocks.heads, (int)blocks.per_group,
                         0, 0 };
    b.steps = time_steps_of(a);
    b.x = a->x;
    b.B = a->B;
    b.C = a->C;
    b.grad_y = a->grad_y;
    b.x_stride = a->x_stride;
    b.grad_y_stride = a->grad_y_stride;
    b.D = a->D;
    b.grad_x = a->grad_x;
    b.grad_x_stride = a->grad_x_stride;
    b.grad_dt_raw = a->grad_dt_raw;
    b.grad_dt_stride = a->grad_dt_stride;
    b.partial = (float *)partial;
    b.sums = (float *)sums;
    for (int first = 0; first < n_blocks; first += round) {
        b.heads.first = first;
        b.heads.n_blocks = first + round < n_blocks ? round : n_blocks - first;
        HT_TRY(round_of_heads<T>(be, a, b, slots));
        ht_arena_reset(&be->scratch, mark);
    }
    const int64_t pairs = a->n_tokens * a->n_groups * a->d_state;
    HT_LAUNCH(be, ssd_sum_blocks_kernel<T>, (unsigned)ceil_div(pairs, kSsdThreads), kSsdThreads, 0,
              (T *)a->grad_B, (T *)a->grad_C, a->grad_x_stride, b.partial, b.n_tokens,
              (int)a->n_groups, (int)blocks.per_group, b.d_state);
    HT_LAUNCH(be, ssd_sum_chunks_kernel, (unsigned)a->n_heads, kSsdThreads, 0, a->grad_dt_bias,
              a->grad_A_log, a->grad_D, b.sums, a->A_log, (int)slots, b.n_heads);
    return ht_cuda_check_launch(be, "ssd_backward sums");
}

} // namespace

extern "C" enum ht_status ht_ssd_backward_cuda(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const char *op = "ssd_backward";
    const size_t mark = ht_arena_mark(&be->scratch);

    HT_TRY(check_rows_aligned(op, "x", a->x, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "B", a->B, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "C", a->C, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_y", a->grad_y, a->grad_y_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_x", a->grad_x, a->grad_x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_B", a->grad_B, a->grad_x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_C", a->grad_C, a->grad_x_stride, a->dtype));
    const enum ht_status st = HT_DISPATCH(a->dtype, op, launch, be, a);
    ht_arena_reset(&be->scratch, mark);
    return st;
}
