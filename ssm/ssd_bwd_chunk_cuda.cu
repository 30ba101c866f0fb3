/* ssm/ssd_bwd_chunk_cuda.cu: phase C of the scan's backward (ssd_bwd_cuda.cu): all that is left
 * once the states S that enter each chunk and the gradients dS of those that leave it are known;
 * one thread block per chunk and block of heads.
 *
 * Per head, rows j (or i) of warp w: 16 (w % 4) .. , columns in halves w / 4. With
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
 * Cost per token and head: 6 P N + 160 P FLOP, and 240 N per block of heads (tiles up to the
 * diagonal); bytes: x, grad_y, grad_x and 2 P N / 64 elements of states.
 */
#include "ssm/ssd_bwd_cuda.h"

namespace {

template <typename S>
struct chunk_worker {
    using T = typename S::T;
    const ssd_backward_args &a;
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
            const float v = time_step_input<T>(a.steps, head, t0 + k), soft = softplus(v);
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
    ssd_backward_kernel(ssd_backward_args a, int launch_heads, int n_stages)
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

template <typename S>
enum ht_status run_chunks(struct ht_backend *be, const ssd_backward_args &b, int64_t slots)
{
    int n_stages;

    HT_TRY(pick_stages(&n_stages, be, "ssd_backward", S::bytes(1), S::bytes(2)));
    if (!S::kSingle || b.d_head > S::kP) n_stages = 1; // a head's tiles come one by one
    HT_LAUNCH(be, ssd_backward_kernel<S>, (unsigned)(slots * b.heads.n_blocks), kSsdThreads,
              S::bytes(n_stages), b, n_heads_of(b.heads), n_stages);
    return ht_cuda_check_launch(be, "ssd_backward");
}

} // namespace

template <typename T>
enum ht_status ssd_backward_chunks(struct ht_backend *be, const ssd_backward_args &b, int64_t slots)
{
    if constexpr (sizeof(T) == 2) {
        if (b.d_state <= 64) return run_chunks<backward_shape<T, 64, 64, true>>(be, b, slots);
        if (b.d_state <= 128) return run_chunks<backward_shape<T, 128, 64, true>>(be, b, slots);
        return run_chunks<backward_shape<T, 128, 64, false>>(be, b, slots);
    } else {
        return run_chunks<backward_shape<T, 64, 32, false>>(be, b, slots);
    }
}

template enum ht_status ssd_backward_chunks<float>(struct ht_backend *, const ssd_backward_args &,
                                                   int64_t);
template enum ht_status ssd_backward_chunks<bf16>(struct ht_backend *, const ssd_backward_args &,
                                                  int64_t);
