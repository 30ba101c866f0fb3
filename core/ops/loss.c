/* core/ops/loss.c: output head and cross-entropy in blocks of tokens: the order of the products.
 *
 * Per block of tokens (loss.h), with V the vocabulary:
 *   logits = u W^T            (block, V) fp32 in scratch
 *   softmax_ce                lse, log-probabilities; logits become their own gradient g in `dtype`
 *   grad_u = g W
 *   grad_W += g^T u
 * Every block reads W twice and reads and writes the fp32 grad_W once, so a larger block saves
 * traffic and a smaller one saves memory.
 */
#include <inttypes.h>
#include <string.h>

#include "core/ops/core_ops.h"

/* 512 rows were best of 128, 256, 512, 1024 at d_model 1024 and V 32000 (0.64, 0.77, 0.80, 0.73
 * TFLOP/s over all of forward and backward, 2-core AMD Zen 5 VM); more than 128 MiB of logits only
 * where V forces it. */
enum { MAX_BLOCK = 512, MIN_BLOCK = 64 };
static const int64_t block_target_bytes = (int64_t)128 << 20;

/* The most rows per block. Grows with n_tokens: scratch planned for a larger call suffices. */
static int64_t most_rows(int64_t n_tokens, int64_t vocab_size)
{
    int64_t rows = vocab_size > 0 ? block_target_bytes / (4 * vocab_size) : MAX_BLOCK;

    rows = rows / 64 * 64;
    if (rows > MAX_BLOCK) rows = MAX_BLOCK;
    if (rows < MIN_BLOCK) rows = MIN_BLOCK;
    return rows < n_tokens ? rows : n_tokens;
}

/* Rows per block of a call: as few blocks as fit, and those of one size. */
static int64_t block_rows(int64_t n_tokens, int64_t vocab_size)
{
    const int64_t most = most_rows(n_tokens, vocab_size), n_blocks = (n_tokens + most - 1) / most;
    const int64_t even = ((n_tokens + n_blocks - 1) / n_blocks + 31) / 32 * 32;
    return even < most ? even : most;
}

size_t ht_linear_ce_scratch_bytes(int64_t n_tokens, int64_t d_model, int64_t vocab_size,
                                  enum ht_dtype dtype)
{
    const int64_t rows = most_rows(n_tokens, vocab_size);
    const size_t products[3] = {
        ht_gemm_scratch_bytes(rows, vocab_size, d_model, dtype),
        ht_gemm_scratch_bytes(rows, d_model, vocab_size, dtype),
        ht_gemm_scratch_bytes(vocab_size, d_model, rows, dtype),
    };
    size_t most = 0;

    for (int i = 0; i < 3; i++)
        if (products[i] > most) most = products[i];
    return ht_arena_bytes((size_t)(rows * vocab_size) * sizeof(float)) +
           2 * ht_arena_bytes((size_t)rows * sizeof(double)) + most;
}

static enum ht_status check(const struct ht_backend *be, const struct ht_linear_ce_args *a)
{
    const char *op = "linear_ce";

    if (a->n_tokens < 0 || a->d_model < 1 || a->vocab_size < 1)
        return HT_FAIL(HT_ERR_ARG,
                       "linear_ce: n_tokens is %" PRId64 ", d_model is %" PRId64
                       ", vocab_size is %" PRId64 "; at least 0, 1 and 1",
                       a->n_tokens, a->d_model, a->vocab_size);
    HT_TRY(ht_ops_check_dtype(op, a->dtype));
    HT_TRY(ht_ops_check_ptr(op, "u", a->u, a->n_tokens * a->d_model));
    HT_TRY(ht_ops_check_ptr(op, "weight", a->weight, a->vocab_size * a->d_model));
    HT_TRY(ht_ops_check_ptr(op, "labels", a->labels, a->n_tokens));
    if (a->grad_u)
        HT_TRY(ht_ops_check_ptr(op, "grad_weight", a->grad_weight, a->vocab_size * a->d_model));
    if (!(a->logit_scale > 0.0f))
        return HT_FAIL(HT_ERR_ARG, "linear_ce: logit_scale is %g; it must be > 0",
                       (double)a->logit_scale);
    if (be->kind != HT_BACKEND_CPU) return HT_OK; // the labels are not in host memory
    for (int64_t t = 0; t < a->n_tokens; t++)
        if (a->labels[t] >= a->vocab_size)
            return HT_FAIL(HT_ERR_ARG,
                           "linear_ce: label %d at position %" PRId64 "; labels are 0 to %" PRId64
                           ", negative where not counted",
                           (int)a->labels[t], t, a->vocab_size - 1);
    return HT_OK;
}

/* The two gradients of rows t0 .. t0+rows-1 from the gradient g of their logits. */
static enum ht_status block_gradients(struct ht_backend *be, const struct ht_linear_ce_args *a,
                                      const void *g, int64_t t0, int64_t rows)
{
    const size_t bytes = ht_dtype_bytes(a->dtype), offset = (size_t)(t0 * a->d_model) * bytes;
    const int64_t ldg = a->vocab_size * (int64_t)(sizeof(float) / bytes); // in place in fp32 rows
    const struct ht_gemm_args grad_u = {
        .m = rows,
        .n = a->d_model,
        .k = a->vocab_size,
        .ab_dtype = a->dtype,
        .c_dtype = a->dtype,
        .a = g,
        .lda = ldg,
        .b = a->weight,
        .ldb = a->d_model,
        .c = (char *)a->grad_u + offset,
        .ldc = a->d_model,
        .alpha = 1.0f,
    };
    const struct ht_gemm_args grad_w = {
        .m = a->vocab_size,
        .n = a->d_model,
        .k = rows,
        .trans_a = true,
        .ab_dtype = a->dtype,
        .c_dtype = HT_DTYPE_F32,
        .a = g,
        .lda = ldg,
        .b = (const char *)a->u + offset,
        .ldb = a->d_model,
        .c = a->grad_weight,
        .ldc = a->d_model,
        .alpha = 1.0f,
        .beta = 1.0f,
    };
    HT_TRY(ht_gemm(be, &grad_u));
    return ht_gemm(be, &grad_w);
}

/* A block without a label costs nothing: long prompts in fine-tuning. */
static bool skip_block(struct ht_linear_ce_args *a, int64_t t0, int64_t rows)
{
    const size_t row_bytes = (size_t)a->d_model * ht_dtype_bytes(a->dtype);

    for (int64_t r = 0; r < rows; r++)
        if (a->labels[t0 + r] >= 0) return false;
    if (a->grad_u) memset((char *)a->grad_u + (size_t)t0 * row_bytes, 0, (size_t)rows * row_bytes);
    if (a->logprobs) memset(a->logprobs + t0, 0, (size_t)rows * sizeof *a->logprobs);
    return true;
}

static enum ht_status block(struct ht_backend *be, const struct ht_core_ops *ops,
                            struct ht_linear_ce_args *a, float *logits, double *lse,
                            double *logprob, int64_t t0, int64_t rows)
{
    const struct ht_gemm_args product = {
        .m = rows,
        .n = a->vocab_size,
        .k = a->d_model,
        .trans_b = true,
        .ab_dtype = a->dtype,
        .c_dtype = HT_DTYPE_F32,
        .a = (const char *)a->u + (size_t)(t0 * a->d_model) * ht_dtype_bytes(a->dtype),
        .lda = a->d_model,
        .b = a->weight,
        .ldb = a->d_model,
        .c = logits,
        .ldc = a->vocab_size,
        .alpha = 1.0f,
    };
    const struct ht_softmax_ce_args softmax = {
        .n_rows = rows,
        .vocab_size = a->vocab_size,
        .logit_scale = a->logit_scale,
        .grad_scale = a->loss_scale * a->logit_scale, // d logits / d (W u) = logit_scale
        .z_coef = a->z_coef,
        .want_grad = a->grad_u != NULL,
        .dtype = a->dtype,
        .logits = logits,
        .labels = a->labels + t0,
        .lse = lse,
        .logprob = logprob,
    };
    HT_TRY(ht_gemm(be, &product));
    HT_TRY(ops->softmax_ce[be->isa](be, &softmax));
    for (int64_t r = 0; r < rows; r++) { // in order: the sums do not depend on the threads
        if (a->labels[t0 + r] >= 0) {
            a->loss_sum -= logprob[r];
            a->z_sum += lse[r] * lse[r];
            a->n_counted++;
        }
        if (a->logprobs) a->logprobs[t0 + r] = (float)logprob[r];
    }
    return a->grad_u ? block_gradients(be, a, logits, t0, rows) : HT_OK;
}

enum ht_status ht_linear_ce(struct ht_backend *be, struct ht_linear_ce_args *a)
{
    const struct ht_core_ops *ops;

    a->loss_sum = a->z_sum = 0.0;
    a->n_counted = 0;
    HT_TRY(ht_ops_row(&ops, be, "linear_ce"));
    HT_TRY(check(be, a));
    if (a->n_tokens == 0)
        return a->sums ? ht_backend_zero(be, a->sums, 3 * sizeof *a->sums) : HT_OK;
    return ops->linear_ce[be->isa](be, a);
}

enum ht_status ht_linear_ce_cpu(struct ht_backend *be, struct ht_linear_ce_args *a)
{
    enum ht_status st = HT_OK;
    const struct ht_core_ops *ops = ht_core_ops_get(HT_BACKEND_CPU);
    const size_t mark = ht_arena_mark(&be->scratch);
    void *logits, *lse, *logprob;

    const int64_t rows = block_rows(a->n_tokens, a->vocab_size);
    const size_t logits_bytes = (size_t)(rows * a->vocab_size) * sizeof(float);
    HT_TRY_GOTO(st, done, ht_arena_take(&logits, &be->scratch, logits_bytes));
    HT_TRY_GOTO(st, done, ht_arena_take(&lse, &be->scratch, (size_t)rows * sizeof(double)));
    HT_TRY_GOTO(st, done, ht_arena_take(&logprob, &be->scratch, (size_t)rows * sizeof(double)));
    for (int64_t t = 0; t < a->n_tokens; t += rows) {
        const int64_t n = a->n_tokens - t < rows ? a->n_tokens - t : rows;
        if (skip_block(a, t, n)) continue;
        HT_TRY_GOTO(st, done, block(be, ops, a, logits, lse, logprob, t, n));
    }
    if (a->sums) {
        a->sums[0] = a->loss_sum;
        a->sums[1] = a->z_sum;
        a->sums[2] = (double)a->n_counted;
    }
done:
    ht_arena_reset(&be->scratch, mark);
    return st;
}
