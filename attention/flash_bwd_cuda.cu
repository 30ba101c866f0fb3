/* attention/flash_bwd_cuda.cu: gradients of causal attention on mma.sync (spec 3.4; Dao 2023).
 *
 *   D  = rowsum(grad_o o)                       a kernel of its own, with lse: (head, token) pairs
 *   P  = exp2(S scale log2 e - lse log2 e)      dS = P (grad_o V^T - D)
 *   grad_v = P^T grad_o                         a block owns 64 keys of a kv head and walks the
 *   grad_k = scale dS^T Q                       query tiles of all heads that read it, in order
 *   grad_q = scale dS K                         a block owns 64 rows of a head, walks its key tiles
 *
 * Both walks are one kernel: the owned tiles are (K, V) or (Q, grad_o), the streamed ones the other
 * two, and
 *
 *   S or S^T       = owned 1  streamed 1^T           second += P  streamed 2     (grad_v)
 *   dP or dP^T     = owned 2  streamed 2^T           first  += dS streamed 1     (grad_k, grad_q)
 *
 * The transposed orientation leaves P^T and dS^T in the registers where the next product wants
 * them. A warp owns 16 rows of its outputs, so every sum has one owner and a fixed order: no
 * atomics, and the same bits on every run, whatever is packed around a sequence. The price is that
 * S and dP are computed twice: 7 products in place of 5.
 *
 *   shared memory   | owned 1 | owned 2 | streamed 1, 2 (stage 0) | streamed 1, 2 (stage 1) |
 *   bf16, d 128: 32 + 32 KiB, two blocks per SM (sm_80); 96 KiB at most
 *
 * Cost: 7 T^2 d_head n_heads FLOP (5 are necessary); reads of one stream per owned tile come from
 * L2. DRAM: q, k, v, o, grad_o, lse once, grad_qkv once.
 */
#include "attention/flash_cuda.h"

extern "C" {
#include "attention/attention_cuda.h"
}

struct backward_params_base {
    int64_t qkv_stride, o_stride, grad_stride; // elements
    int64_t n_tokens;
    const int32_t *starts;
    const float2 *rows; // (n_heads, T): lse log2 e, D
    int n_seqs, n_heads, group, d_head;
    float scale, scale_log2;
};

template <typename T>
struct backward_params : backward_params_base {
    const T *q, *k, *v, *grad_o; // first head of row 0
    T *grad_q, *grad_k, *grad_v;
};

/* kOwned rows of the output, 16 per warp, kStream rows of the other side at a time. For d_head 256
 * the accumulators of grad_k and grad_v do not fit: two warps share 16 rows, each has half the
 * columns, and both compute S and dP. */
template <typename T, int kD, bool kOwnKeys>
struct backward_tiling {
    static constexpr int kBytes = kD * (int)sizeof(T); // of a row
    static constexpr int kOwned = kBytes == 1024 ? 32 : 64;
    static constexpr int kStream = 8192 / kBytes;
    static constexpr int kHalves = kOwnKeys && kD == 256 ? 2 : 1;
    static constexpr int kThreads = kOwned / 16 * kHalves * kWarp;
    static constexpr int kBytesShared = (2 * kOwned + 4 * kStream) * kBytes;
};

/* ---- D ---- */

constexpr int kRowLanes = 16, kRowThreads = 256;

template <typename T>
static __global__ void __launch_bounds__(kRowThreads)
    flash_row_sums_kernel(float2 *out, const T *o, const T *grad_o, const float *lse,
                          int64_t n_tokens, int n_heads, int d_head)
{
    const int64_t row = ((int64_t)blockIdx.x * kRowThreads + threadIdx.x) / kRowLanes;
    float sum = 0.0f;
    if (row < n_tokens * n_heads) // (token, head)
        for (int i = (int)threadIdx.x % kRowLanes * kVec<T>; i < d_head; i += kRowLanes * kVec<T>) {
            float a[kVec<T>], b[kVec<T>];
            load_vec(a, o + row * d_head + i);
            load_vec(b, grad_o + row * d_head + i);
#pragma unroll
            for (int j = 0; j < kVec<T>; j++) sum += a[j] * b[j];
        }
    for (int o2 = kRowLanes / 2; o2 > 0; o2 >>= 1) sum += __shfl_xor_sync(kAllLanes, sum, o2);
    if (row < n_tokens * n_heads && threadIdx.x % kRowLanes == 0)
        out[row % n_heads * n_tokens + row / n_heads] = make_float2(lse[row] * kLog2e, sum);
}

/* ---- the walk ---- */

/* Scores to P, dP to dS; s and dp hold owned rows x streamed rows. `stat(n, i)` gives the query
 * row's pair for an element, `hidden(n, i)` whether its key lies in the query's future. */
template <int kN, typename Stat, typename Hidden>
static __device__ __forceinline__ void probabilities(float (&s)[kN][4], float scale_log2, Stat stat,
                                                     Hidden hidden, bool masked)
{
#pragma unroll
    for (int n = 0; n < kN; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[n][i] = fast_exp2(fmaf(s[n][i], scale_log2, -stat(n, i).x));
            if (masked && hidden(n, i)) s[n][i] = 0.0f;
        }
}

template <typename T, int kD, bool kOwnKeys>
static __global__ void __launch_bounds__((backward_tiling<T, kD, kOwnKeys>::kThreads))
    flash_backward_kernel(const backward_params<T> p)
{
    using C = backward_tiling<T, kD, kOwnKeys>;
    constexpr int kOwned = C::kOwned, kStream = C::kStream, kThreads = C::kThreads;
    constexpr int kN = kStream / 8, kOut = kD / 8 / C::kHalves;
    HT_SHARED_DYNAMIC(unsigned char, smem);
    T *const owned1 = reinterpret_cast<T *>(smem), *const owned2 = owned1 + kOwned * kD;
    T *const stream = owned2 + kOwned * kD; // stage, side, row

    tile_place place;
    const int n_owners = kOwnKeys ? p.n_heads / p.group : p.n_heads; // kv heads or heads
    const int owner = (int)(blockIdx.x % (unsigned)n_owners);
    if (!find_tile<kOwned>(place, p.starts, p.n_seqs, (int)(blockIdx.x / (unsigned)n_owners), 0))
        return;
    const int d = p.d_head, kv_head = kOwnKeys ? owner : owner / p.group;
    // long walks first: those of the first keys, those of the last rows
    const int own0 = (kOwnKeys ? place.tile : place.n_tiles - 1 - place.tile) * kOwned;
    const int n_own = min(kOwned, place.n_rows - own0);
    const int64_t first = place.first;

    // the stream: query tiles from the diagonal to the end, head after head; or key tiles up to the
    // diagonal
    const int stream0 = kOwnKeys ? own0 / kStream : 0;
    const int stream1 =
        kOwnKeys ? (place.n_rows + kStream - 1) / kStream : (own0 + n_own + kStream - 1) / kStream;
    const int per_head = stream1 - stream0, n_steps = kOwnKeys ? per_head * p.group : per_head;

    const auto load_stream = [&](int step) {
        const int row0 = (stream0 + step % per_head) * kStream, n = place.n_rows - row0;
        const int64_t token = first + row0;
        T *const to = stream + step % 2 * 2 * kStream * kD;
        const T *from1, *from2;
        int64_t stride2;
        if constexpr (kOwnKeys) {
            const int64_t head = (int64_t)owner * p.group + step / per_head;
            from1 = p.q + token * p.qkv_stride + head * d;
            from2 = p.grad_o + token * p.o_stride + head * d;
            stride2 = p.o_stride;
        } else {
            from1 = p.k + token * p.qkv_stride + kv_head * d;
            from2 = p.v + token * p.qkv_stride + kv_head * d;
            stride2 = p.qkv_stride;
        }
        load_tile<T, kD, kStream, kThreads>(to, from1, p.qkv_stride, n, d, (int)threadIdx.x);
        load_tile<T, kD, kStream, kThreads>(to + kStream * kD, from2, stride2, n, d,
                                            (int)threadIdx.x);
    };

    const int64_t own_token = first + own0;
    if constexpr (kOwnKeys) {
        load_tile<T, kD, kOwned, kThreads>(owned1, p.k + own_token * p.qkv_stride + kv_head * d,
                                           p.qkv_stride, n_own, d, (int)threadIdx.x);
        load_tile<T, kD, kOwned, kThreads>(owned2, p.v + own_token * p.qkv_stride + kv_head * d,
                                           p.qkv_stride, n_own, d, (int)threadIdx.x);
    } else {
        load_tile<T, kD, kOwned, kThreads>(owned1, p.q + own_token * p.qkv_stride + owner * d,
                                           p.qkv_stride, n_own, d, (int)threadIdx.x);
        load_tile<T, kD, kOwned, kThreads>(owned2, p.grad_o + own_token * p.o_stride + owner * d,
                                           p.o_stride, n_own, d, (int)threadIdx.x);
    }
    load_stream(0);
    cp_async_commit();

    const int lane = (int)threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const int warp = (int)threadIdx.x / kWarp, warp_row = warp / C::kHalves * 16;
    const int column0 = warp % C::kHalves * 8 * kOut;
    const int own_row = own0 + warp_row;             // of the sequence
    const float2 none = make_float2(INFINITY, 0.0f); // a row that is not there: P = 0
    float first_out[1][kOut][4], second_out[1][kOwnKeys ? kOut : 1][4];
    float2 own_stat[2] = { none, none };
    clear(first_out);
    clear(second_out);
    if constexpr (!kOwnKeys)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (own_row + g + 8 * i < place.n_rows)
                own_stat[i] = p.rows[owner * p.n_tokens + first + own_row + g + 8 * i];

    for (int step = 0; step < n_steps; step++) {
        const int row0 = (stream0 + step % per_head) * kStream; // of the streamed tiles
        [[maybe_unused]] float2 stat[kOwnKeys ? kN : 1][2];
        cp_async_wait<0>();
        __syncthreads(); // this stage is there; no warp reads the other any more
        if (step + 1 < n_steps) load_stream(step + 1);
        cp_async_commit();
        // a warp whose keys (rows) all lie after (before) the tile has nothing to add
        if (kOwnKeys ? own_row > row0 + kStream - 1 : own_row + 15 < row0) continue;
        if constexpr (kOwnKeys) {
            const int64_t head = (int64_t)owner * p.group + step / per_head;
            const float2 *at = p.rows + head * p.n_tokens + first + row0;
#pragma unroll
            for (int n = 0; n < kN; n++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    stat[n][i] =
                        row0 + 8 * n + 2 * t + i < place.n_rows ? at[8 * n + 2 * t + i] : none;
        }
        const T *const stream1_tile = stream + step % 2 * 2 * kStream * kD;
        const T *const stream2_tile = stream1_tile + kStream * kD;
        float s[1][kN][4], ds[1][kN][4];
        const auto stat_of = [&](int n, int i) {
            if constexpr (kOwnKeys)
                return stat[n][i % 2];
            else
                return own_stat[i / 2];
        };
        const auto hidden = [&](int n, int i) {
            const int own = own_row + g + i / 2 * 8, other = row0 + 8 * n + 2 * t + i % 2;
            return kOwnKeys ? own > other : other > own;
        };
        const bool masked = kOwnKeys ? own_row + 15 > row0 : row0 + kStream - 1 > own_row;

        multiply_rows<T, kD>(s, owned1, warp_row, stream1_tile);
        probabilities(s[0], p.scale_log2, stat_of, hidden, masked);
        if constexpr (kOwnKeys) multiply_add<T, kD>(second_out, s, stream2_tile, column0);
        multiply_rows<T, kD>(ds, owned2, warp_row, stream2_tile);
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) ds[0][n][i] = s[0][n][i] * (ds[0][n][i] - stat_of(n, i).y);
        multiply_add<T, kD>(first_out, ds, stream1_tile, column0);
    }

    // out through the owned tiles, so that 16 bytes go out at a time
    __syncthreads();
    const float scales[2] = { p.scale, p.scale }, ones[2] = { 1.0f, 1.0f };
    store_tile<T, kD>(owned1, warp_row, column0, first_out[0], scales);
    if constexpr (kOwnKeys) store_tile<T, kD>(owned2, warp_row, column0, second_out[0], ones);
    __syncthreads();
    constexpr int kChunks = kD / kVec<T>;
    for (int at = (int)threadIdx.x; at < n_own * kChunks; at += kThreads) {
        const int row = at / kChunks, chunk = at % kChunks;
        if (chunk * kVec<T> >= d) continue;
        const int64_t to = (own_token + row) * p.grad_stride + (int64_t)owner * d + chunk * kVec<T>;
        T *const grad1 = kOwnKeys ? p.grad_k : p.grad_q;
        *reinterpret_cast<uint4 *>(grad1 + to) =
            *reinterpret_cast<const uint4 *>(chunk_at<T, kD>(owned1, row, chunk));
        if constexpr (kOwnKeys)
            *reinterpret_cast<uint4 *>(p.grad_v + to) =
                *reinterpret_cast<const uint4 *>(chunk_at<T, kD>(owned2, row, chunk));
    }
}

template <typename T, int kD, bool kOwnKeys>
static enum ht_status launch_walk(struct ht_backend *be, const backward_params<T> &p)
{
    using C = backward_tiling<T, kD, kOwnKeys>;
    const int64_t owners = kOwnKeys ? p.n_heads / p.group : p.n_heads;
    const int64_t blocks = tile_slots(p.n_tokens, p.n_seqs, C::kOwned) * owners;
    if (blocks > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "flash_backward: %lld tokens of %d heads in one call",
                       (long long)p.n_tokens, p.n_heads);
    HT_LAUNCH(be, (flash_backward_kernel<T, kD, kOwnKeys>), (unsigned)blocks, C::kThreads,
              C::kBytesShared, p);
    return ht_cuda_check_launch(be, kOwnKeys ? "flash_backward_kv" : "flash_backward_q");
}

template <typename T, int kD>
static enum ht_status launch(struct ht_backend *be, const backward_params<T> &p)
{
    HT_TRY((launch_walk<T, kD, true>(be, p)));
    return launch_walk<T, kD, false>(be, p);
}

template <typename T>
static enum ht_status backward(struct ht_backend *be, const struct ht_flash_args *a)
{
    const int64_t d = a->d_head, n_rows = a->n_tokens * a->n_heads;
    const T *row = static_cast<const T *>(a->qkv);
    T *grad = static_cast<T *>(a->grad_qkv);
    const size_t mark = ht_arena_mark(&be->scratch);
    backward_params<T> p = {};
    void *rows;

    HT_TRY(check_rows("flash_backward", "qkv", a->qkv, a->qkv_stride, a->dtype));
    HT_TRY(check_rows("flash_backward", "o", a->o, a->n_heads * d, a->dtype));
    HT_TRY(check_rows("flash_backward", "grad_o", a->grad_o, a->n_heads * d, a->dtype));
    HT_TRY(check_rows("flash_backward", "grad_qkv", a->grad_qkv, a->grad_qkv_stride, a->dtype));
    HT_TRY(ht_arena_take(&rows, &be->scratch, ht_attention_cuda_backward_bytes(a)));
    ht_arena_reset(&be->scratch, mark); // the stream keeps later operations off until it is used
    p.qkv_stride = a->qkv_stride;
    p.o_stride = a->n_heads * d;
    p.grad_stride = a->grad_qkv_stride;
    p.n_tokens = a->n_tokens;
    p.starts = a->seqs.starts;
    p.rows = static_cast<const float2 *>(rows);
    p.n_seqs = (int)a->seqs.n_seqs;
    p.n_heads = (int)a->n_heads;
    p.group = (int)(a->n_heads / a->n_kv_heads);
    p.d_head = (int)d;
    p.scale = a->scale;
    p.scale_log2 = a->scale * kLog2e;
    p.q = row;
    p.k = row + a->n_heads * d;
    p.v = p.k + a->n_kv_heads * d;
    p.grad_o = static_cast<const T *>(a->grad_o);
    p.grad_q = grad;
    p.grad_k = grad + a->n_heads * d;
    p.grad_v = p.grad_k + a->n_kv_heads * d;
    HT_LAUNCH(be, flash_row_sums_kernel<T>, (unsigned)ceil_div(n_rows, kRowThreads / kRowLanes),
              kRowThreads, 0, static_cast<float2 *>(rows), static_cast<const T *>(a->o),
              static_cast<const T *>(a->grad_o), a->lse, a->n_tokens, p.n_heads, p.d_head);
    HT_TRY(ht_cuda_check_launch(be, "flash_row_sums"));
    return HT_D_HEAD_SWITCH(p.d_head, launch, T, be, p);
}

extern "C" enum ht_status ht_flash_backward_cuda(struct ht_backend *be,
                                                 const struct ht_flash_args *a)
{
    return HT_DISPATCH(a->dtype, "flash_backward", backward, be, a);
}
