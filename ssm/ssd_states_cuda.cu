/* ssm/ssd_states_cuda.cu: states at chunk borders, forward or backward in time (spec 4.1 stages 1
 * and 2, 4.2 B1 and B2): the sweeps of the backward pass and the segment states of long sequences.
 *
 * One thread block walks the chunks of one piece of a sequence for two heads (ssd_shape), the state
 * in registers as fp32 fragments, the next chunk's u and v on their way by cp.async. Where one
 * sequence cannot fill the device it is cut into segments:
 *
 *   totals    every segment on its own, from zero: its state and its decay
 *   combine   the state that enters each segment, in order
 *   walk      again, from those states
 *
 * Cost per token and head: 2 P N FLOP (bf16 products, fp32 sums); bytes: u and v once per pair of
 * heads, P N / 64 elements written. The totals pass repeats it for all segments but one.
 */
#include "ssm/ssd_cuda.h"

namespace {

/*   tables of chunk c and c + 1 | u, v of chunk c and c + 1 */
template <typename S>
struct walk_smem {
    using T = typename S::T;
    ssd_decay_table *tables;
    T *tiles;

    static constexpr int kU = kChunk * S::kPitchX, kV = kChunk * S::kPitchN;
    static constexpr size_t kTables = 2 * S::kHeads * sizeof(ssd_decay_table);
    static constexpr size_t kBytes = kTables + 2 * (kU + kV) * sizeof(T);

    __device__ __forceinline__ walk_smem(unsigned char *p)
        : tables(reinterpret_cast<ssd_decay_table *>(p)), tiles(reinterpret_cast<T *>(p + kTables))
    {
    }
    __device__ __forceinline__ ssd_decay_table *table(int c) const
    {
        return tables + c % 2 * S::kHeads;
    }
    __device__ __forceinline__ T *u(int c) const { return tiles + c % 2 * (kU + kV); }
    __device__ __forceinline__ T *v(int c) const { return u(c) + kU; }
};

/* With kTotals: from zero, only the state at the end and the decay, into segments. */
template <typename S, bool kTotals>
__global__ void __launch_bounds__(kSsdThreads)
    ssd_walk_kernel(ssd_walk w, ssd_segments segments, int n_columns, int n_heads)
{
    using T = typename S::T;
    HT_SHARED_DYNAMIC(unsigned char, bytes);
    const walk_smem<S> smem(bytes);
    const int slot = (int)blockIdx.x / n_columns, P = w.d_head, N = w.d_state;
    const ssd_column col = column_at<S>(w.heads, P, (int)blockIdx.x % n_columns);
    const int first_head = heads_of_block(w.heads, w.heads.first).begin;
    const int64_t state = (int64_t)P * N;
    ssd_piece piece;
    ssd_state<S> s;

    if (col.n_heads <= 0 || !find_piece(&piece, w.starts, w.n_seqs, segments.span, slot)) return;
    const bool ends = piece.index == (w.reverse ? 0 : piece.last); // of the walk
    if (kTotals && ends) return; // nothing follows that would need it
    const int64_t of_seq = ((int64_t)piece.seq * w.n_heads + col.head) * state;
    const int64_t of_slot = ((int64_t)slot * n_heads + col.head - first_head) * state;
    if (kTotals)
        zero(s.acc);
    else
        s.load(segments.states ? segments.states + of_slot
               : w.seed        ? w.seed + of_seq
                               : nullptr,
               col, P, N);

    const int n_chunks = (piece.end - piece.begin + kChunk - 1) / kChunk;
    const auto chunk_of = [&](int c) { return w.reverse ? n_chunks - 1 - c : c; };
    const auto fetch = [&](int c) {
        const int64_t t0 = piece.begin + chunk_of(c) * kChunk;
        const int n = min(kChunk, piece.end - (int)t0);
        copy_heads<S>(smem.u(c), (const T *)w.u, w.u_stride, t0, n, col, P);
        copy_tile<kChunk, S::kN, S::kPitchN>(smem.v(c),
                                             (const T *)w.v + t0 * w.v_stride + col.group * N,
                                             w.v_stride, n, N, (const T *)w.v);
        cp_async_commit();
    };
    const auto tables = [&](int c) {
        const int64_t t0 = piece.begin + chunk_of(c) * kChunk;
        fill_tables<S>(smem.table(c), w.steps, col, t0, min(kChunk, piece.end - (int)t0));
    };
    const int64_t first_chunk =
        first_slot(w.starts, piece.seq, kChunk) + (int64_t)piece.index * (segments.span / kChunk);
    float decay = 1.0f; // of the piece, in thread hh for head hh

    fetch(0);
    tables(0);
    for (int c = 0; c < n_chunks; c++) {
        cp_async_wait<0>();
        __syncthreads(); // chunk c is here, everybody is done with c - 1
        if (c + 1 < n_chunks) {
            fetch(c + 1);
            tables(c + 1);
        }
        const ssd_decay_table *d = smem.table(c);
        if (!kTotals && w.chunk_states)
            s.store((T *)w.chunk_states +
                        ((first_chunk + chunk_of(c)) * n_heads + col.head - first_head) * state,
                    col, P, N);
        if (kTotals && threadIdx.x < S::kHeads) decay *= d[threadIdx.x].in[kChunk - 1];
        d += ssd_state<S>::head();
        s.update(smem.u(c), smem.v(c), w.reverse ? d->in : d->dt_out, d->in[kChunk - 1]);
    }
    if (kTotals) {
        s.store(segments.states + of_slot, col, P, N);
        if (col.p0 == 0 && (int)threadIdx.x < min(S::kHeads, col.n_heads))
            segments.decay[(int64_t)slot * n_heads + col.head - first_head + threadIdx.x] = decay;
    } else if (ends && w.final) {
        s.store(w.final + of_seq, col, P, N);
    }
}

/* From what each segment adds and how it decays to the state that enters it; element by element.
 * Block: (elements, head of the launch, sequence). */
__global__ void __launch_bounds__(kSsdThreads)
    ssd_combine_kernel(ssd_walk w, ssd_segments segments, int n_heads)
{
    const int64_t state = (int64_t)w.d_head * w.d_state;
    const int64_t i = (int64_t)blockIdx.x * kSsdThreads + threadIdx.x;
    const int h = (int)(blockIdx.y % (unsigned)n_heads),
              seq = (int)(blockIdx.y / (unsigned)n_heads);
    const int head = heads_of_block(w.heads, w.heads.first).begin + h;
    const int n = (w.starts[seq + 1] - w.starts[seq] - 1) / segments.span + 1;
    const int slot0 = first_slot(w.starts, seq, segments.span);

    if (i >= state) return;
    float s = w.seed ? w.seed[((int64_t)seq * w.n_heads + head) * state + i] : 0.0f;
    for (int k = 0; k < n; k++) {
        const int64_t at = (int64_t)(slot0 + (w.reverse ? n - 1 - k : k)) * n_heads + h;
        const float added = k + 1 < n ? segments.states[at * state + i] : 0.0f;
        segments.states[at * state + i] = s;
        if (k + 1 < n) s = segments.decay[at] * s + added;
    }
}

template <typename S, bool kTotals>
enum ht_status run_walk(struct ht_backend *be, const ssd_walk &w, const ssd_segments &segments)
{
    const int64_t columns = columns_of<S>(w.heads, w.d_head);
    const int64_t slots = ht_ssd_cuda_slots(w.n_tokens, w.n_seqs, segments.span);
    int n_stages;

    HT_TRY(pick_stages(&n_stages, be, "ssd_walk", walk_smem<S>::kBytes, walk_smem<S>::kBytes));
    HT_LAUNCH(be, (ssd_walk_kernel<S, kTotals>), (unsigned)(slots * columns), kSsdThreads,
              walk_smem<S>::kBytes, w, segments, (int)columns, n_heads_of(w.heads));
    return ht_cuda_check_launch(be, "ssd_walk");
}

} // namespace

template <typename T>
enum ht_status ssd_segment_states(ssd_segments *out, struct ht_backend *be, const ssd_walk &w,
                                  int64_t columns)
{
    const int64_t span = ht_ssd_cuda_span(w.n_tokens, w.n_seqs, columns);
    const int64_t state = (int64_t)w.d_head * w.d_state;
    const int n_heads = n_heads_of(w.heads);
    void *p = NULL;

    out->span = (int)span;
    out->states = out->decay = NULL;
    if (span > w.n_tokens) return HT_OK;
    const size_t at_slots = (size_t)ht_ssd_cuda_slots(w.n_tokens, w.n_seqs, span) * (size_t)n_heads;
    HT_TRY(ht_arena_take(&p, &be->scratch, at_slots * (size_t)state * sizeof(float)));
    out->states = (float *)p;
    HT_TRY(ht_arena_take(&p, &be->scratch, at_slots * sizeof(float)));
    out->decay = (float *)p;
    HT_TRY(with_shape<T>(w.d_state,
                         [&](auto shape) { return run_walk<decltype(shape), true>(be, w, *out); }));
    const dim3 grid((unsigned)ceil_div(state, kSsdThreads), (unsigned)(n_heads * w.n_seqs));
    HT_LAUNCH(be, ssd_combine_kernel, grid, kSsdThreads, 0, w, *out, n_heads);
    return ht_cuda_check_launch(be, "ssd_combine");
}

template <typename T>
enum ht_status ssd_walk_states(struct ht_backend *be, const ssd_walk &w)
{
    return with_shape<T>(
        w.d_state, [&](auto shape) -> enum ht_status {
            using S = decltype(shape);
            ssd_segments segments;
            HT_TRY(ssd_segment_states<T>(&segments, be, w, columns_of<S>(w.heads, w.d_head)));
            return run_walk<S, false>(be, w, segments);
        });
}

template enum ht_status ssd_segment_states<float>(ssd_segments *, struct ht_backend *,
                                                  const ssd_walk &, int64_t);
template enum ht_status ssd_segment_states<bf16>(ssd_segments *, struct ht_backend *,
                                                 const ssd_walk &, int64_t);
template enum ht_status ssd_walk_states<float>(struct ht_backend *, const ssd_walk &);
template enum ht_status ssd_walk_states<bf16>(struct ht_backend *, const ssd_walk &);
