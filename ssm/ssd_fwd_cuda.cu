/* ssm/ssd_fwd_cuda.cu: the chunked scan forward in one walk (spec 4.1).
 *
 *   M_ij = (C_i . B_j) exp(sum_{j<k<=i} da_k) dt_j     y_i = sum_{j<=i} M_ij x_j + in_i S C_i + D
 * x_i S <- gamma S + sum_j dt_j out_j x_j (outer) B_j
 *
 * One thread block walks the chunks of one piece of a sequence for two heads of 64 columns
 * (ssd_shape): B and C are shared by both, the state stays in registers as fp32 fragments and is
 * copied to shared memory in the tensors' type once per chunk, as an operand of S C. Warp w owns
 * the chunk's rows 16 (w % 4) .. and half of the columns: scores never leave its registers, where
 * they become the A operand of M x. The next chunk is on its way by cp.async (ssd_states_cuda.cu
 * has the segments of long sequences).
 *
 * Cost per token and head: 4 P N + 80 (P + N) FLOP (tiles up to the diagonal; gpu.md 3.3 counts the
 * 80 N once per group); bytes: x and y, and B and C once per pair of heads, mostly from L2. Roof
 * 34 KB per token at Bamba's shape.
 */
#include "ssm/ssd_cuda.h"

namespace {

struct forward_args {
    ssd_walk w; // u = x, v = B, seed, final
    const void *C;
    const float *D;
    void *y;
    int64_t y_stride;
};

/*   tables of two chunks | S | x, B, C of a chunk | x, B, C of the next (n_stages 2) */
template <typename S>
struct forward_smem {
    using T = typename S::T;
    ssd_decay_table *tables;
    T *state, *tiles;
    int n_stages;

    static constexpr int kX = kChunk * S::kPitchX, kB = kChunk * S::kPitchN;
    static constexpr int kState = S::kCols * S::kPitchN, kStage = kX + 2 * kB;
    static constexpr size_t kTables = 2 * S::kHeads * sizeof(ssd_decay_table);
    static size_t bytes(int n_stages)
    {
        return kTables + (size_t)(kState + n_stages * kStage) * sizeof(T);
    }
    __device__ __forceinline__ forward_smem(unsigned char *p, int stages)
        : tables(reinterpret_cast<ssd_decay_table *>(p)), state(reinterpret_cast<T *>(p + kTables)),
          tiles(state + kState), n_stages(stages)
    {
    }
    __device__ __forceinline__ ssd_decay_table *table(int c) const
    {
        return tables + c % 2 * S::kHeads;
    }
    __device__ __forceinline__ T *x(int c) const
    {
        return tiles + (n_stages > 1 ? c % 2 : 0) * kStage;
    }
    __device__ __forceinline__ T *B(int c) const { return x(c) + kX; }
    __device__ __forceinline__ T *C(int c) const { return x(c) + kX + kB; }
};

/* Scores of the block of rows on the diagonal times their decay and dt; lo: columns 0..7 of the
 * block, hi: 8..15. What lies right of the diagonal becomes zero. */
__device__ __forceinline__ void decay_diagonal(float (&lo)[4], float (&hi)[4],
                                               const ssd_decay_table *d, int block)
{
    const int g = lane_id() / 4, j = 2 * (lane_id() % 4);
    const float *dt = d->dt + block * kBlock;
    float da[kBlock];

    load_block(da, d->da + block * kBlock);
    const float upper = interval<0, 7>(da, j + 1, g), lower = interval<8, 15>(da, j + 9, g + 8);
    const float across = interval<0, 7>(da, j + 1, 7) + interval<7, 15>(da, 7, g + 8);
    float first = 0.0f; // da of column j + 1, then of j + 9
    float second = 0.0f;
#pragma unroll
    for (int k = 1; k < 8; k += 2) {
        if (k == j + 1) first = da[k];
        if (k == j + 1) second = da[k + 8];
    }
    lo[0] = j <= g ? lo[0] * decay_exp(upper + (j + 1 <= g ? first : 0.0f)) * dt[j] : 0.0f;
    lo[1] = j + 1 <= g ? lo[1] * decay_exp(upper) * dt[j + 1] : 0.0f;
    lo[2] *= decay_exp(across + first) * dt[j];
    lo[3] *= decay_exp(across) * dt[j + 1];
    hi[0] = hi[1] = 0.0f;
    hi[2] = j <= g ? hi[2] * decay_exp(lower + (j + 1 <= g ? second : 0.0f)) * dt[j + 8] : 0.0f;
    hi[3] = j + 1 <= g ? hi[3] * decay_exp(lower) * dt[j + 9] : 0.0f;
}

/* Scores of a block left of the diagonal; 16 x 8, columns from j0 on. */
__device__ __forceinline__ void decay_left(float (&acc)[4], const ssd_decay_table *d, int block,
                                           int j0)
{
    const int g = lane_id() / 4, j = j0 + 2 * (lane_id() % 4);
    const float *to_block = d->to_block(block);
    const float c0 = to_block[j] * d->dt[j], c1 = to_block[j + 1] * d->dt[j + 1];
    const float r0 = d->row[block * kBlock + g], r1 = d->row[block * kBlock + g + 8];
    acc[0] *= r0 * c0;
    acc[1] *= r0 * c1;
    acc[2] *= r1 * c0;
    acc[3] *= r1 * c1;
}

/* y of a warp: 16 rows, kTiles * 8 columns from `col0` of the x tile on, all of one head. */
template <typename S>
struct outputs {
    static constexpr int kSplit = S::kCols >= 32 ? 2 : 1; // warps that share 16 rows
    static constexpr int kColumns = S::kCols / kSplit, kTiles = kColumns / 8;
    static_assert(kColumns <= S::kHeadCols && kColumns % 16 == 0, "one head per warp");
    using T = typename S::T;

    static __device__ __forceinline__ bool mine()
    {
        return (int)threadIdx.x / kWarp < kBlocks * kSplit;
    }

    static __device__ __forceinline__ void write(const forward_args &a, const forward_smem<S> &smem,
                                                 int c, const ssd_column &col, int64_t t0,
                                                 int n_tokens)
    {
        const int warp = (int)threadIdx.x / kWarp, block = warp % kBlocks;
        const int col0 = warp / kBlocks * kColumns, hh = col0 / S::kHeadCols;
        const T *x = smem.x(c), *B = smem.B(c), *C = smem.C(c) + block * kBlock * S::kPitchN;
        const ssd_decay_table *d = smem.table(c) + hh;
        float y[kTiles][4], scores[2 * kBlocks][4];

        if (block * kBlock >= n_tokens || hh >= col.n_heads) return;
        zero(y);
        zero(scores);
#pragma unroll 4
        for (int k = 0; k < S::kN; k += 16) {
            frag_a<T> fa;
            frag_b<T> fb[2];
            load_a(fa, C + k, S::kPitchN);
#pragma unroll
            for (int i = 0; i < kTiles; i += 2) { // S C
                load_b(fb, smem.state + (col0 + 8 * i) * S::kPitchN + k, S::kPitchN);
                mma(y[i], fa, fb[0]);
                mma(y[i + 1], fa, fb[1]);
            }
#pragma unroll
            for (int j = 0; j < kBlocks; j++) { // C B^T, up to the diagonal
                if (j > block) continue;
                load_b(fb, B + j * kBlock * S::kPitchN + k, S::kPitchN);
                mma(scores[2 * j], fa, fb[0]);
                mma(scores[2 * j + 1], fa, fb[1]);
            }
        }
        const int g = lane_id() / 4, t = lane_id() % 4, row = block * kBlock + g;
        const float in0 = d->in[row], in1 = d->in[row + 8];
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
            y[i][0] *= in0;
            y[i][1] *= in0;
            y[i][2] *= in1;
            y[i][3] *= in1;
        }
#pragma unroll
        for (int j = 0; j < kBlocks; j++) { // M x
            if (j > block) continue;
            frag_a<T> fa;
            if (j == block) {
                decay_diagonal(scores[2 * j], scores[2 * j + 1], d, block);
            } else {
                decay_left(scores[2 * j], d, block, j * kBlock);
                decay_left(scores[2 * j + 1], d, block, j * kBlock + 8);
            }
            to_a(fa, scores[2 * j], scores[2 * j + 1]);
#pragma unroll
            for (int i = 0; i < kTiles; i += 2) {
                frag_b<T> fb[2];
                load_b_trans(fb, x + j * kBlock * S::kPitchX + col0 + 8 * i, S::kPitchX);
                mma(y[i], fa, fb[0]);
                mma(y[i + 1], fa, fb[1]);
            }
        }
        const int head = col.head + hh, P = a.w.d_head;
        const float D = a.D[head];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = row + 8 * half;
            if (r >= n_tokens) continue;
            T *out = (T *)a.y + (t0 + r) * a.y_stride + (int64_t)head * P;
#pragma unroll
            for (int i = 0; i < kTiles; i++) {
                const int p = col.p0 + (col0 + 8 * i) % S::kHeadCols + 2 * t;
                const float2 v = load_pair(x + r * S::kPitchX + col0 + 8 * i + 2 * t);
                if (p < P)
                    store_pair(out + p, y[i][2 * half] + D * v.x, y[i][2 * half + 1] + D * v.y);
            }
        }
    }
};

template <typename S>
__global__ void __launch_bounds__(kSsdThreads)
    ssd_forward_kernel(forward_args a, ssd_segments segments, int n_columns, int n_stages)
{
    using T = typename S::T;
    HT_SHARED_DYNAMIC(unsigned char, bytes);
    const forward_smem<S> smem(bytes, n_stages);
    const ssd_walk &w = a.w;
    const int slot = (int)blockIdx.x / n_columns, P = w.d_head, N = w.d_state;
    const ssd_column col = column_at<S>(w.heads, P, (int)blockIdx.x % n_columns);
    const int64_t state = (int64_t)P * N;
    ssd_piece piece;
    ssd_state<S> s;

    if (col.n_heads <= 0 || !find_piece(&piece, w.starts, w.n_seqs, segments.span, slot)) return;
    const int64_t of_seq = ((int64_t)piece.seq * w.n_heads + col.head) * state;
    const int64_t of_slot = ((int64_t)slot * w.n_heads + col.head) * state;
    s.load(segments.states ? segments.states + of_slot
           : w.seed        ? w.seed + of_seq
                           : nullptr,
           col, P, N);

    const int n_chunks = (piece.end - piece.begin + kChunk - 1) / kChunk;
    const auto fetch = [&](int c) {
        const int64_t t0 = piece.begin + c * kChunk, at = t0 * w.v_stride + col.group * N;
        const int n = min(kChunk, piece.end - (int)t0);
        copy_heads<S>(smem.x(c), (const T *)w.u, w.u_stride, t0, n, col, P);
        copy_tile<kChunk, S::kN, S::kPitchN>(smem.B(c), (const T *)w.v + at, w.v_stride, n, N,
                                             (const T *)w.v);
        copy_tile<kChunk, S::kN, S::kPitchN>(smem.C(c), (const T *)a.C + at, w.v_stride, n, N,
                                             (const T *)a.C);
        cp_async_commit();
    };
    const auto tables = [&](int c) {
        const int64_t t0 = piece.begin + c * kChunk;
        fill_tables<S>(smem.table(c), w.steps, col, t0, min(kChunk, piece.end - (int)t0));
    };
    const auto copy_state = [&]() { // as an operand: (columns of x, d_state)
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < S::kTiles; i++)
                store_pair(smem.state + (s.row() + g + 8 * half) * S::kPitchN + s.n0() + 8 * i +
                               2 * t,
                           s.acc[i][2 * half], s.acc[i][2 * half + 1]);
    };

    fetch(0);
    tables(0);
    copy_state();
    for (int c = 0; c < n_chunks; c++) {
        const int64_t t0 = piece.begin + c * kChunk;
        cp_async_wait<0>();
        __syncthreads(); // chunk c and the state are here, everybody is done with c - 1
        if (n_stages > 1 && c + 1 < n_chunks) fetch(c + 1);
        if (c + 1 < n_chunks) tables(c + 1);
        if (outputs<S>::mine())
            outputs<S>::write(a, smem, c, col, t0, min(kChunk, piece.end - (int)t0));
        const ssd_decay_table *d = smem.table(c) + s.head();
        s.update(smem.x(c), smem.B(c), d->dt_out, d->in[kChunk - 1]);
        if (c + 1 == n_chunks) break;
        __syncthreads(); // everybody has read the state (and x, B, C)
        if (n_stages == 1) fetch(c + 1);
        copy_state();
    }
    if (piece.index == piece.last && w.final) s.store(w.final + of_seq, col, P, N);
}

template <typename T>
enum ht_status launch(struct ht_backend *be, const struct ht_ssd_args *a)
{
    forward_args f;
    f.w.starts = a->seqs.starts;
    f.w.n_seqs = (int)a->seqs.n_seqs;
    f.w.n_tokens = (int)a->n_tokens;
    f.w.n_heads = (int)a->n_heads;
    f.w.d_head = (int)a->d_head;
    f.w.d_state = (int)a->d_state;
    const int of_group = (int)(a->n_heads / a->n_groups);
    f.w.heads = ssd_heads{ of_group, of_group, 1, 0, (int)a->n_groups };
    f.w.steps = time_steps_of(a);
    f.w.u = a->x;
    f.w.v = a->B;
    f.w.u_stride = f.w.v_stride = a->x_stride;
    f.w.reverse = false;
    f.w.seed = a->init_state;
    f.w.final = a->final_state;
    f.w.chunk_states = NULL;
    f.C = a->C;
    f.D = a->D;
    f.y = a->y;
    f.y_stride = a->y_stride;
    return with_shape<T>(
        a->d_state, [&](auto shape) -> enum ht_status {
            using S = decltype(shape);
            const int64_t columns = columns_of<S>(f.w.heads, a->d_head);
            ssd_segments segments;
            int n_stages;

            HT_TRY(pick_stages(&n_stages, be, "ssd_forward", forward_smem<S>::bytes(1),
                               forward_smem<S>::bytes(2)));
            HT_TRY(ssd_segment_states<T>(&segments, be, f.w, columns));
            const int64_t slots = ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, segments.span);
            HT_LAUNCH(be, ssd_forward_kernel<S>, (unsigned)(slots * columns), kSsdThreads,
                      forward_smem<S>::bytes(n_stages), f, segments, (int)columns, n_stages);
            return ht_cuda_check_launch(be, "ssd_forward");
        });
}

} // namespace

extern "C" enum ht_status ht_ssd_forward_cuda(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const char *op = "ssd_forward";
    const size_t mark = ht_arena_mark(&be->scratch);

    HT_TRY(check_rows_aligned(op, "x", a->x, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "B", a->B, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "C", a->C, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "y", a->y, a->y_stride, a->dtype));
    const enum ht_status st = HT_DISPATCH(a->dtype, op, launch, be, a);
    ht_arena_reset(&be->scratch, mark);
    return st;
}
