/* core/ops/loss_cuda.cu: output head with cross-entropy on CUDA (loss.h).
 *
 * Per chunk of tokens: logits = u W^T in fp32 (scratch), one kernel that reads them twice and
 * leaves their gradient in their place, grad_u = g W, grad_W += g^T u. A chunk has as many rows as
 * scratch holds, up to kMaxRows, because small chunks starve the products (gpu.md, 8e). Scratch
 * that was sized for the CPU's blocks works too. fp32 logits cost 6 bytes per logit more traffic
 * than bf16 ones, on paper 0.7 ms of 10 per 2048 tokens and 128256 entries on an H100, and keep the
 * loss exact.
 *
 * Softmax: a block per row. Each thread keeps a running maximum and a sum relative to it; the sums
 * of the threads are added in a fixed order in fp64.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
}

constexpr int kThreads = 512;
constexpr int64_t kMaxRows = 4096, kMinRows = 16;

struct running { // max and sum of exp(scale * (x - max)) over what was seen
    float max, sum;
};

static __device__ __forceinline__ void see(struct running *r, float x, float scale)
{
    if (x > r->max) {
        r->sum = r->sum * expf(scale * (r->max - x)) + 1.0f;
        r->max = x;
    } else {
        r->sum += expf(scale * (x - r->max));
    }
}

/* The gradient in T overwrites the fp32 row from its start: element i of the result lies at or
 * before element i of the source, and a tile is read by all threads before it is written. Whatever
 * the caller read of the row comes before the first tile's barrier. */
template <typename T, int W>
static __device__ void write_gradient(float *row, int n, float max, float scale, float factor,
                                      int label, float at_label)
{
    T *out = reinterpret_cast<T *>(row);

    for (int tile = 0; tile < n; tile += kThreads * W) {
        const int i = tile + (int)threadIdx.x * W;
        float v[W];
        if (i < n) load_n<W>(v, row + i);
        __syncthreads();
        if (i >= n) continue;
        for (int k = 0; k < W; k++)
            v[k] = i + k == label ? at_label : factor * expf(scale * (v[k] - max));
        store_n<W>(out + i, v);
    }
}

template <typename T, int W>
static __global__ void __launch_bounds__(kThreads) softmax_ce_kernel(struct ht_softmax_ce_args a)
{
    const int n = (int)a.vocab_size, label = a.labels[blockIdx.x];
    float *row = a.logits + (int64_t)blockIdx.x * n;
    const float scale = a.logit_scale;
    struct running r = { -FLT_MAX, 0.0f };

    if (label < 0 || label >= n) { // not counted
        if (threadIdx.x == 0) a.lse[blockIdx.x] = a.logprob[blockIdx.x] = 0.0;
        if (!a.want_grad) return;
        for (int i = (int)threadIdx.x; i < n; i += kThreads)
            reinterpret_cast<T *>(row)[i] = from_f32<T>(0.0f);
        return;
    }
    for (int i = (int)threadIdx.x * W; i < n; i += kThreads * W) {
        float v[W];
        load_n<W>(v, row + i);
        for (int k = 0; k < W; k++) see(&r, v[k], scale);
    }
    const float max = block_max<kThreads>(r.max);
    // a thread without elements adds 0
    const double sum = block_sum<kThreads>((double)(r.sum * expf(scale * (r.max - max))));
    const double log_sum = log(sum), lse = (double)scale * (double)max + log_sum;
    const double logprob = (double)scale * ((double)row[label] - (double)max) - log_sum;
    if (threadIdx.x == 0) {
        a.lse[blockIdx.x] = lse;
        a.logprob[blockIdx.x] = logprob;
    }
    if (!a.want_grad) return;
    // the label's entry on its own, in fp64: softmax - 1 would cancel in the type of the gradient
    const double z = 2.0 * (double)a.z_coef * lse;
    const float at_label = (float)((double)a.grad_scale * (exp(logprob) * (1.0 + z) - 1.0));
    write_gradient<T, W>(row, n, max, scale, (float)((double)a.grad_scale * (1.0 + z) / sum), label,
                         at_label);
}

template <typename T>
static enum ht_status softmax_ce(struct ht_backend *be, const struct ht_softmax_ce_args *a)
{
    if (rows_aligned(a->logits, a->vocab_size))
        HT_LAUNCH(be, (softmax_ce_kernel<T, 4>), (unsigned)a->n_rows, kThreads, 0, *a);
    else
        HT_LAUNCH(be, (softmax_ce_kernel<T, 1>), (unsigned)a->n_rows, kThreads, 0, *a);
    return ht_cuda_check_launch(be, "softmax_ce");
}

extern "C" enum ht_status ht_softmax_ce_cuda(struct ht_backend *be,
                                             const struct ht_softmax_ce_args *a)
{
    if (a->vocab_size > INT_MAX / 2)
        return HT_FAIL(HT_ERR_ARG, "softmax_ce: vocab_size is %lld; at most %d",
                       (long long)a->vocab_size, INT_MAX / 2);
    return HT_DISPATCH(a->dtype, "softmax_ce", softmax_ce, be, a);
}

/* sums[0..2] += loss, z-loss and count of a chunk; logprobs in fp32. One block, in a fixed order.
 */
static __global__ void __launch_bounds__(kThreads)
    add_losses_kernel(double *sums, float *logprobs, const double *lse, const double *logprob,
                      const int32_t *labels, int n_rows, int64_t vocab_size)
{
    double loss = 0.0, z = 0.0, count = 0.0;

    for (int r = (int)threadIdx.x; r < n_rows; r += kThreads) {
        if (logprobs) logprobs[r] = (float)logprob[r];
        if (labels[r] < 0) continue;
        // a label outside of the vocabulary, which the CPU refuses, makes the loss NaN
        loss -= labels[r] < vocab_size ? logprob[r] : (double)NAN;
        z += lse[r] * lse[r];
        count += 1.0;
    }
    loss = block_sum<kThreads>(loss);
    z = block_sum<kThreads>(z);
    count = block_sum<kThreads>(count);
    if (threadIdx.x != 0) return;
    sums[0] += loss;
    sums[1] += z;
    sums[2] += count;
}

/* ---- the order of the products ---- */

struct scratch {
    float *logits;
    double *lse, *logprob, *sums;
    int64_t rows;
};

static enum ht_status take_scratch(struct scratch *s, struct ht_backend *be,
                                   const struct ht_linear_ce_args *a)
{
    const size_t per_row = (size_t)a->vocab_size * sizeof(float) + 2 * sizeof(double);
    const size_t left = be->scratch.size_bytes - be->scratch.used_bytes, fixed = 1024;
    void *logits, *lse, *logprob, *sums;

    s->rows = left > fixed ? (int64_t)((left - fixed) / per_row) : 0;
    if (s->rows > kMaxRows) s->rows = kMaxRows;
    if (s->rows >= 128) s->rows = s->rows / 128 * 128; // whole tiles of the products
    if (s->rows > a->n_tokens) s->rows = a->n_tokens;
    if (s->rows < kMinRows && s->rows < a->n_tokens)
        return HT_FAIL(HT_ERR_MEMORY,
                       "linear_ce: %zu bytes of scratch are left; at least %zu are needed", left,
                       fixed + (size_t)kMinRows * per_row);
    const size_t rows = (size_t)s->rows;
    HT_TRY(ht_arena_take(&sums, &be->scratch, 3 * sizeof(double)));
    HT_TRY(ht_arena_take(&lse, &be->scratch, rows * sizeof(double)));
    HT_TRY(ht_arena_take(&logprob, &be->scratch, rows * sizeof(double)));
    HT_TRY(ht_arena_take(&logits, &be->scratch, rows * (size_t)a->vocab_size * sizeof(float)));
    s->logits = (float *)logits;
    s->lse = (double *)lse;
    s->logprob = (double *)logprob;
    s->sums = a->sums ? a->sums : (double *)sums;
    return HT_OK;
}

static struct ht_gemm_args product(const struct ht_linear_ce_args *a, int64_t m, int64_t n,
                                   int64_t k)
{
    struct ht_gemm_args g = {};
    g.m = m;
    g.n = n;
    g.k = k;
    g.ab_dtype = a->dtype;
    g.c_dtype = HT_DTYPE_F32;
    g.alpha = 1.0f;
    return g;
}

static enum ht_status chunk(struct ht_backend *be, const struct ht_linear_ce_args *a,
                            const struct scratch *s, int64_t t0, int64_t rows)
{
    const size_t bytes = ht_dtype_bytes(a->dtype), offset = (size_t)(t0 * a->d_model) * bytes;
    const char *u = (const char *)a->u + offset;
    struct ht_softmax_ce_args softmax = {};
    struct ht_gemm_args g = product(a, rows, a->vocab_size, a->d_model);

    g.trans_b = true;
    g.a = u, g.lda = a->d_model;
    g.b = a->weight, g.ldb = a->d_model;
    g.c = s->logits, g.ldc = a->vocab_size;
    HT_TRY(ht_gemm_cuda(be, &g));

    softmax.n_rows = rows;
    softmax.vocab_size = a->vocab_size;
    softmax.logit_scale = a->logit_scale;
    softmax.grad_scale = a->loss_scale * a->logit_scale; // d logits / d (W u) = logit_scale
    softmax.z_coef = a->z_coef;
    softmax.want_grad = a->grad_u != nullptr;
    softmax.dtype = a->dtype;
    softmax.logits = s->logits;
    softmax.labels = a->labels + t0;
    softmax.lse = s->lse;
    softmax.logprob = s->logprob;
    HT_TRY(ht_softmax_ce_cuda(be, &softmax));
    HT_LAUNCH(be, add_losses_kernel, 1, kThreads, 0, s->sums,
              a->logprobs ? a->logprobs + t0 : nullptr, s->lse, s->logprob, a->labels + t0,
              (int)rows, a->vocab_size);
    if (!a->grad_u) return ht_cuda_check_launch(be, "linear_ce");

    const int64_t ldg = a->vocab_size * (int64_t)(sizeof(float) / bytes); // in place in fp32 rows
    g = product(a, rows, a->d_model, a->vocab_size);
    g.c_dtype = a->dtype;
    g.a = s->logits, g.lda = ldg;
    g.b = a->weight, g.ldb = a->d_model;
    g.c = (char *)a->grad_u + offset, g.ldc = a->d_model;
    HT_TRY(ht_gemm_cuda(be, &g));
    g = product(a, a->vocab_size, a->d_model, rows);
    g.trans_a = true;
    g.a = s->logits, g.lda = ldg;
    g.b = u, g.ldb = a->d_model;
    g.c = a->grad_weight, g.ldc = a->d_model;
    g.beta = 1.0f;
    HT_TRY(ht_gemm_cuda(be, &g));
    return ht_cuda_check_launch(be, "linear_ce");
}

extern "C" enum ht_status ht_linear_ce_cuda(struct ht_backend *be, struct ht_linear_ce_args *a)
{
    enum ht_status st = HT_OK;
    const size_t mark = ht_arena_mark(&be->scratch);
    struct scratch s = {};
    double sums[3];

    HT_TRY_GOTO(st, done, take_scratch(&s, be, a));
    HT_TRY_GOTO(st, done, ht_backend_zero(be, s.sums, sizeof sums));
    for (int64_t t = 0; t < a->n_tokens; t += s.rows)
        HT_TRY_GOTO(st, done,
                    chunk(be, a, &s, t, a->n_tokens - t < s.rows ? a->n_tokens - t : s.rows));
    if (!a->sums) { // the caller wants the numbers now
        HT_TRY_GOTO(st, done, ht_backend_download(be, sums, s.sums, sizeof sums));
        a->loss_sum = sums[0];
        a->z_sum = sums[1];
        a->n_counted = (int64_t)sums[2];
    }
done:
    ht_arena_reset(&be->scratch, mark);
    return st;
}
