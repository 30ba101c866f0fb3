/* ssm/conv1d_cpu.c: depthwise causal convolution and SiLU, forward and backward (conv1d.h has the
 * equations).
 *
 * A block of ROWS tokens is walked channel vector by channel vector, so that the taps and the
 * window of W rows stay in registers; sequence borders restart the window. Backward recomputes W-1
 * rows of dpre per block rather than pass them on. Cost per element: one exponential and one
 * division, 2 W FLOP forward and 6 W backward, against 2 (forward) or 3 (backward) accesses to
 * memory. grad_w is summed over blocks of HT_CONV1D_BLOCK tokens and these in order, whatever the
 * thread count.
 */
#include "ssm/ssd_cpu.h"

enum { ROWS = 32, MAX_TAPS = 4, AHEAD_BYTES = 128 };

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* A column of a block visits ROWS lines far apart, which the hardware does not foresee: fetch the
 * lines of the columns to come. */
static ALWAYS_INLINE void fetch(const void *p, int64_t i, enum ht_dtype d)
{
    __builtin_prefetch((const char *)p + i * (int64_t)ht_dtype_bytes(d) + AHEAD_BYTES, 0, 3);
}

/* The sequence that row t belongs to. */
static int64_t seq_of(const struct ht_seqs *s, int64_t t)
{
    int64_t low = 0, high = s->n_seqs;
    while (high - low > 1) {
        const int64_t mid = (low + high) / 2;
        if (s->starts[mid] <= t)
            low = mid;
        else
            high = mid;
    }
    return low;
}

/* Taps of channels c.., one vector per tap. */
static ALWAYS_INLINE void load_taps(ht_vf *tap, const float *w, int64_t c, int64_t n, const int W)
{
    float t[MAX_TAPS][HT_VLEN] = { 0 };

    for (int64_t l = 0; l < n && l < HT_VLEN; l++)
        for (int k = 0; k < W; k++) t[k][l] = w[(c + l) * W + k];
    for (int k = 0; k < W; k++) tap[k] = vf_load(t[k]);
}

/* Channels c.. of row t of the sequence that starts at `begin`: from x, the carried state, or zero.
 */
static ALWAYS_INLINE ht_vf row_at(const struct ht_conv1d_args *a, int64_t seq, int64_t begin,
                                  int64_t t, int64_t c, const int64_t n, const int W,
                                  const enum ht_dtype d)
{
    if (t >= begin) return ssd_load_n(a->x, t * a->x_stride + c, n, d);
    if (!a->state) return vf_set(0.0f);
    if (a->slot) seq = a->slot[seq];
    return ssd_load_n(a->state, (seq * (W - 1) + t - begin + W - 1) * a->n_channels + c, n,
                      HT_DTYPE_F32);
}

static ALWAYS_INLINE ht_vf weigh(const ht_vf *tap, const ht_vf *window, ht_vf bias, const int W)
{
    ht_vf sum = bias;
#pragma GCC unroll 4
    for (int k = 0; k < W; k++) sum += tap[k] * window[k];
    return sum;
}

/* window moves up by one row and takes v as the newest */
static ALWAYS_INLINE void push(ht_vf *window, ht_vf v, const int W)
{
#pragma GCC unroll 4
    for (int k = 0; k + 1 < W; k++) window[k] = window[k + 1];
    window[W - 1] = v;
}

/* n channels at c: HT_VLEN, or what is left. */
static ALWAYS_INLINE void forward_columns(const struct ht_conv1d_args *a, int64_t t0, int64_t t1,
                                          int64_t c, const int64_t n, const int W,
                                          const enum ht_dtype d)
{
    const ht_vf bias = a->bias ? ssd_load_n(a->bias, c, n, HT_DTYPE_F32) : vf_set(0.0f);
    ht_vf tap[MAX_TAPS], window[MAX_TAPS];
    int64_t t = t0;

    load_taps(tap, a->w, c, n, W);
    for (int64_t s = seq_of(&a->seqs, t0); t < t1; s++) {
        const int64_t begin = a->seqs.starts[s];
        const int64_t end = a->seqs.starts[s + 1] < t1 ? a->seqs.starts[s + 1] : t1;
#pragma GCC unroll 4
        for (int k = 1; k < W; k++) window[k] = row_at(a, s, begin, t - W + k, c, n, W, d);
        for (; t < end; t++) {
            fetch(a->x, t * a->x_stride + c, d);
            fetch(a->y, t * a->y_stride + c, d);
            push(window, ssd_load_n(a->x, t * a->x_stride + c, n, d), W);
            ssd_store_n(a->y, t * a->y_stride + c, vf_silu(weigh(tap, window, bias, W)), n, d);
        }
    }
}

static ALWAYS_INLINE void forward_block(const struct ht_conv1d_args *a, int64_t t0, int64_t t1,
                                        const int W, const enum ht_dtype d)
{
    int64_t c = 0;

    for (; c + HT_VLEN <= a->n_channels; c += HT_VLEN) forward_columns(a, t0, t1, c, HT_VLEN, W, d);
    if (c < a->n_channels) forward_columns(a, t0, t1, c, a->n_channels - c, W, d);
}

/* The last W-1 rows of sequence s; older ones move up when it is shorter. */
static void update_state(const struct ht_conv1d_args *a, int64_t s)
{
    const int64_t begin = a->seqs.starts[s], end = a->seqs.starts[s + 1];
    const int64_t keep = a->d_conv - 1, n = a->n_channels;
    float *state = a->state + (a->slot ? a->slot[s] : s) * keep * n;

    for (int64_t r = 0; r < keep; r++) {
        const int64_t t = end - keep + r;
        if (t >= begin)
            ht_convert(state + r * n, HT_DTYPE_F32,
                       (const char *)a->x + (size_t)(t * a->x_stride) * ht_dtype_bytes(a->dtype),
                       a->dtype, n);
        else
            memcpy(state + r * n, state + (r + end - begin) * n, (size_t)n * sizeof *state);
    }
}

enum ht_status HT_ISA_FN(ht_conv1d_forward_cpu)(struct ht_backend *be,
                                                const struct ht_conv1d_args *a)
{
    const int64_t T = a->n_tokens, blocks = (T + ROWS - 1) / ROWS;
    const bool f32 = a->dtype == HT_DTYPE_F32;

#pragma omp parallel num_threads(be->n_threads) if (blocks > 1)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t t0 = b * ROWS, t1 = t0 + ROWS < T ? t0 + ROWS : T;
            switch (a->d_conv * 2 + f32) { // constant taps and type make loops without branches
            case 4: forward_block(a, t0, t1, 2, HT_DTYPE_BF16); break;
            case 5: forward_block(a, t0, t1, 2, HT_DTYPE_F32); break;
            case 6: forward_block(a, t0, t1, 3, HT_DTYPE_BF16); break;
            case 7: forward_block(a, t0, t1, 3, HT_DTYPE_F32); break;
            case 8: forward_block(a, t0, t1, 4, HT_DTYPE_BF16); break;
            default: forward_block(a, t0, t1, 4, HT_DTYPE_F32); break;
            }
        }
        if (a->state) { // after the loop above, which reads it
#pragma omp for schedule(static)
            for (int64_t s = 0; s < a->seqs.n_seqs; s++) update_state(a, s);
        }
    }
    return HT_OK;
}

static ALWAYS_INLINE void backward_columns(const struct ht_conv1d_args *a, float *sums, int64_t t0,
                                           int64_t t1, int64_t c, const int64_t n, const int W,
                                           const enum ht_dtype d)
{
    const int64_t CD = a->n_channels;
    const ht_vf zero = vf_set(0.0f);
    const ht_vf bias = a->bias ? ssd_load_n(a->bias, c, n, HT_DTYPE_F32) : zero;
    ht_vf tap[MAX_TAPS], window[MAX_TAPS], grad[MAX_TAPS], grad_tap[MAX_TAPS], grad_bias;
    int64_t row = t0;

    load_taps(tap, a->w, c, n, W);
#pragma GCC unroll 4
    for (int k = 0; k < W; k++) grad_tap[k] = ssd_load_n(sums, k * CD + c, n, HT_DTYPE_F32);
    grad_bias = ssd_load_n(sums, W * CD + c, n, HT_DTYPE_F32);
    for (int64_t s = seq_of(&a->seqs, t0); row < t1; s++) {
        const int64_t begin = a->seqs.starts[s], end = a->seqs.starts[s + 1];
        const int64_t stop = end < t1 ? end : t1, from = row;
        window[0] = zero; // pushed out before it is read
#pragma GCC unroll 4
        for (int k = 1; k < W; k++) window[k] = row_at(a, s, begin, from - W + k, c, n, W, d);
#pragma GCC unroll 4
        for (int k = 0; k < W; k++) grad[k] = zero; // grad[k] = dpre[t - (W-1) + k]
        for (int64_t t = from; t < stop + W - 1; t++) {
            ht_vf dpre = zero;
            if (t < end) {
                fetch(a->x, t * a->x_stride + c, d);
                fetch(a->grad_y, t * a->grad_y_stride + c, d);
                fetch(a->grad_x, t * a->grad_x_stride + c, d);
                push(window, ssd_load_n(a->x, t * a->x_stride + c, n, d), W);
                dpre = ssd_load_n(a->grad_y, t * a->grad_y_stride + c, n, d) *
                       vf_silu_grad(weigh(tap, window, bias, W));
            }
            push(grad, dpre, W);
            if (t < stop) {
#pragma GCC unroll 4
                for (int k = 0; k < W; k++) grad_tap[k] += dpre * window[k];
                grad_bias += dpre;
            }
            if (t - (W - 1) >= from) {
                ht_vf g = zero;
#pragma GCC unroll 4
                for (int k = 0; k < W; k++) g += tap[k] * grad[W - 1 - k];
                ssd_store_n(a->grad_x, (t - (W - 1)) * a->grad_x_stride + c, g, n, d);
            }
        }
        row = stop;
    }
#pragma GCC unroll 4
    for (int k = 0; k < W; k++) ssd_store_n(sums, k * CD + c, grad_tap[k], n, HT_DTYPE_F32);
    ssd_store_n(sums, W * CD + c, grad_bias, n, HT_DTYPE_F32);
}

/* grad_x of rows t0..t1-1; sums: grad_w as (W, CD), then grad_bias (CD), of the same rows, added
 * to. */
static ALWAYS_INLINE void backward_block(const struct ht_conv1d_args *a, float *sums, int64_t t0,
                                         int64_t t1, const int W, const enum ht_dtype d)
{
    int64_t c = 0;

    for (; c + HT_VLEN <= a->n_channels; c += HT_VLEN)
        backward_columns(a, sums, t0, t1, c, HT_VLEN, W, d);
    if (c < a->n_channels) backward_columns(a, sums, t0, t1, c, a->n_channels - c, W, d);
}

enum ht_status HT_ISA_FN(ht_conv1d_backward_cpu)(struct ht_backend *be,
                                                 const struct ht_conv1d_args *a)
{
    const int64_t T = a->n_tokens, CD = a->n_channels, W = a->d_conv;
    const int64_t blocks = (T + HT_CONV1D_BLOCK - 1) / HT_CONV1D_BLOCK, size = (W + 1) * CD;
    const bool f32 = a->dtype == HT_DTYPE_F32;
    const size_t mark = ht_arena_mark(&be->scratch);
    void *p;

    HT_TRY(ht_arena_take(&p, &be->scratch, ht_conv1d_scratch_bytes(T, CD, W)));
    float *partial = p; // (blocks, W+1, CD)
#pragma omp parallel num_threads(be->n_threads) if (blocks > 1)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t t_end = (b + 1) * HT_CONV1D_BLOCK < T ? (b + 1) * HT_CONV1D_BLOCK : T;
            float *sums = partial + b * size;
            memset(sums, 0, (size_t)size * sizeof *sums);
            for (int64_t t0 = b * HT_CONV1D_BLOCK; t0 < t_end; t0 += ROWS) {
                const int64_t t1 = t0 + ROWS < t_end ? t0 + ROWS : t_end;
                switch (W * 2 + f32) {
                case 4: backward_block(a, sums, t0, t1, 2, HT_DTYPE_BF16); break;
                case 5: backward_block(a, sums, t0, t1, 2, HT_DTYPE_F32); break;
                case 6: backward_block(a, sums, t0, t1, 3, HT_DTYPE_BF16); break;
                case 7: backward_block(a, sums, t0, t1, 3, HT_DTYPE_F32); break;
                case 8: backward_block(a, sums, t0, t1, 4, HT_DTYPE_BF16); break;
                default: backward_block(a, sums, t0, t1, 4, HT_DTYPE_F32); break;
                }
            }
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < CD; c++) {
            for (int64_t k = 0; k <= W; k++) {
                float sum = 0.0f;
                for (int64_t b = 0; b < blocks; b++) sum += partial[b * size + k * CD + c];
                if (k < W)
                    a->grad_w[c * W + k] += sum;
                else if (a->grad_bias)
                    a->grad_bias[c] += sum;
            }
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
