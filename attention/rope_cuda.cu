/* attention/rope_cuda.cu: rotary embedding in place on the q and k heads of qkv rows (spec 3.5).
 *
 * A thread rotates kPairs pairs of one head: 16 bytes of each half where the halves are whole
 * vectors. Bound by memory: 4 * n_tokens * (n_heads + n_kv_heads) * rope_dims / 2 * sizeof(T) bytes
 * (read and written); a token's row of the tables stays in cache for its heads. Arithmetic in fp32.
 * A position outside of the tables cannot be refused without waiting for the device: its row
 * becomes NaN.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "attention/attention_cuda.h"
}

constexpr int kThreads = 256;

template <typename T>
struct rope_params {
    T *qkv;
    const int32_t *pos;
    const float *cos_table, *sin_table;
    int64_t n_tokens, n_positions, stride;
    int n_heads, d_head, half; // n_heads: of q and k
    float sign;
};

template <typename T, int kPairs>
static __global__ void __launch_bounds__(kThreads) rope_kernel(const rope_params<T> p)
{
    const int per_head = p.half / kPairs, per_token = p.n_heads * per_head;
    const int64_t at = (int64_t)blockIdx.x * kThreads + threadIdx.x, token = at / per_token;
    if (token >= p.n_tokens) return;
    const int in_row = (int)(at - token * per_token), head = in_row / per_head;
    const int i = (in_row - head * per_head) * kPairs;
    const int pos = p.pos[token];
    T *const x = p.qkv + token * p.stride + (int64_t)head * p.d_head + i;
    float a[kPairs], b[kPairs], c[kPairs], s[kPairs];

    load_n(a, x);
    load_n(b, x + p.half);
#pragma unroll
    for (int j = 0; j < kPairs; j++) c[j] = s[j] = NAN;
    if (pos >= 0 && pos < p.n_positions) {
        load_n(c, p.cos_table + (int64_t)pos * p.half + i);
        load_n(s, p.sin_table + (int64_t)pos * p.half + i);
    }
#pragma unroll
    for (int j = 0; j < kPairs; j++) {
        const float sin_a = s[j] * p.sign, lo = a[j], hi = b[j];
        a[j] = lo * c[j] - hi * sin_a;
        b[j] = hi * c[j] + lo * sin_a;
    }
    store_n(x, a);
    store_n(x + p.half, b);
}

template <typename T, int kPairs>
static enum ht_status launch_pairs(struct ht_backend *be, const rope_params<T> &p)
{
    const int64_t n = p.n_tokens * p.n_heads * (p.half / kPairs);
    HT_LAUNCH(be, (rope_kernel<T, kPairs>), (unsigned)ceil_div(n, kThreads), kThreads, 0, p);
    return ht_cuda_check_launch(be, "rope");
}

template <typename T>
static enum ht_status launch(struct ht_backend *be, const struct ht_rope_args *a)
{
    const rope_params<T> p = { static_cast<T *>(a->qkv),
                               a->pos,
                               a->cos_table,
                               a->sin_table,
                               a->n_tokens,
                               a->n_positions,
                               a->qkv_stride,
                               (int)(a->n_heads + a->n_kv_heads),
                               (int)a->d_head,
                               (int)(a->rope_dims / 2),
                               a->inverse ? -1.0f : 1.0f };
    if (a->n_tokens == 0) return HT_OK;
    if (p.half % kVec<T> == 0 && p.d_head % kVec<T> == 0 && rows_aligned(p.qkv, p.stride) &&
        rows_aligned(p.cos_table, p.half) && rows_aligned(p.sin_table, p.half))
        return launch_pairs<T, kVec<T>>(be, p);
    return launch_pairs<T, 1>(be, p);
}

extern "C" enum ht_status ht_rope_apply_cuda(struct ht_backend *be, const struct ht_rope_args *a)
{
    return HT_DISPATCH(a->dtype, "rope", launch, be, a);
}
