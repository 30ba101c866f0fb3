/* ssm/ssd_bwd_cuda.h: inside the CUDA scan's backward only: the arguments of its last phase, its
 * shared memory, and decayed scores with all sums over them (ssd_bwd_chunk_cuda.cu has the
 * equations). */
#ifndef HT_SSM_SSD_BWD_CUDA_H
#define HT_SSM_SSD_BWD_CUDA_H

#include "ssm/ssd_cuda.h"

struct ssd_backward_args {
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
static __device__ __forceinline__ void diagonal_decay(float (&lo)[4], float (&hi)[4],
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
static __device__ __forceinline__ float quad_sum(float v)
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
            const float *to_block = d->to_block(column_block);
#pragma unroll
            for (int e = 0; e < 8; e++)
                L[e / 4][e % 4] = to_block[j + e / 2 % 2 * 8] *
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
static __device__ __forceinline__ float grad_da_share(const head_sums *s, const float *dt, int k,
                                                      int part)
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

/* Phase C for the blocks of heads in a.heads and n_slots slots of chunks. */
template <typename T>
enum ht_status ssd_backward_chunks(struct ht_backend *be, const ssd_backward_args &a,
                                   int64_t n_slots);

#endif
