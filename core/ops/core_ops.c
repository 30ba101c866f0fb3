/* core/ops/core_ops.c: which function runs where, and the checks every backend relies on. */
#include "core/ops/core_ops.h"

#include <inttypes.h>
#include <math.h>

#define ALL_LEVELS(f)                                                                              \
    {                                                                                              \
        f, f, f, f                                                                                 \
    }

static const struct ht_core_ops table[HT_BACKEND_COUNT] = {
    [HT_BACKEND_CPU] = {
        .gemm = ALL_LEVELS(ht_gemm_cpu),
        .gemv = HT_ISA_ROW(ht_gemv_cpu),
        .widen = HT_ISA_ROW(ht_widen_cpu),
        .narrow = HT_ISA_ROW(ht_narrow_cpu),
        .embedding_forward = HT_ISA_ROW(ht_embedding_forward_cpu),
        .embedding_backward = HT_ISA_ROW(ht_embedding_backward_cpu),
        .rmsnorm_forward = HT_ISA_ROW(ht_rmsnorm_forward_cpu),
        .rmsnorm_backward = HT_ISA_ROW(ht_rmsnorm_backward_cpu),
        .swiglu_forward = HT_ISA_ROW(ht_swiglu_forward_cpu),
        .swiglu_backward = HT_ISA_ROW(ht_swiglu_backward_cpu),
        .softmax_ce = HT_ISA_ROW(ht_softmax_ce_cpu),
        .adamw_step = HT_ISA_ROW(ht_adamw_step_cpu),
        .sum_squares = HT_ISA_ROW(ht_sum_squares_cpu),
        .linear_ce = ALL_LEVELS(ht_linear_ce_cpu),
        .clip_factor = ALL_LEVELS(ht_clip_factor_cpu),
        .sum_rows = ALL_LEVELS(ht_sum_rows_cpu),
    },
#ifdef HT_WITH_CUDA
    [HT_BACKEND_CUDA] = {
        .gemm = ALL_LEVELS(ht_gemm_cuda),
        .embedding_forward = ALL_LEVELS(ht_embedding_forward_cuda),
        .embedding_backward = ALL_LEVELS(ht_embedding_backward_cuda),
        .rmsnorm_forward = ALL_LEVELS(ht_rmsnorm_forward_cuda),
        .rmsnorm_backward = ALL_LEVELS(ht_rmsnorm_backward_cuda),
        .swiglu_forward = ALL_LEVELS(ht_swiglu_forward_cuda),
        .swiglu_backward = ALL_LEVELS(ht_swiglu_backward_cuda),
        .softmax_ce = ALL_LEVELS(ht_softmax_ce_cuda),
        .adamw_step = ALL_LEVELS(ht_adamw_step_cuda),
        .sum_squares = ALL_LEVELS(ht_sum_squares_cuda),
        .linear_ce = ALL_LEVELS(ht_linear_ce_cuda),
        .clip_factor = ALL_LEVELS(ht_clip_factor_cuda),
        .sum_rows = ALL_LEVELS(ht_sum_rows_cuda),
    },
#endif
};

const struct ht_core_ops *ht_core_ops_get(enum ht_backend_kind kind)
{
    if ((unsigned)kind >= HT_BACKEND_COUNT || !table[kind].gemm[0]) return NULL;
    return &table[kind];
}

enum ht_status ht_ops_row(const struct ht_core_ops **out, const struct ht_backend *be,
                          const char *op)
{
    *out = ht_core_ops_get(be->kind);
    if (!*out)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: this build has no kernels for backend %d", op,
                       (int)be->kind);
    if ((unsigned)be->isa >= HT_ISA_COUNT)
        return HT_FAIL(HT_ERR_ARG, "%s: CPU level %d; must be 0 to %d", op, (int)be->isa,
                       HT_ISA_COUNT - 1);
    return HT_OK;
}

enum ht_status ht_ops_check_dtype(const char *op, enum ht_dtype d)
{
    if (d == HT_DTYPE_F32 || d == HT_DTYPE_BF16) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: dtype %d; compute types are fp32 and bf16", op, (int)d);
}

enum ht_status ht_ops_check_ptr(const char *op, const char *what, const void *p, int64_t n)
{
    if (p || n == 0) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: %s is NULL; it must hold %" PRId64 " elements", op, what, n);
}

static enum ht_status check_sizes(const char *op, const char *what_a, int64_t a, const char *what_b,
                                  int64_t b)
{
    if (a < 0 || b < 0)
        return HT_FAIL(HT_ERR_ARG, "%s: %s is %" PRId64 ", %s is %" PRId64 "; both must be >= 0",
                       op, what_a, a, what_b, b);
    return HT_OK;
}

/* ---- gemm ---- */

static enum ht_status check_ld(const char *what, int64_t ld, int64_t row)
{
    if (ld >= row) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "gemm: %s is %" PRId64 "; a stored row has %" PRId64 " elements",
                   what, ld, row);
}

enum ht_status ht_gemm(struct ht_backend *be, const struct ht_gemm_args *a)
{
    const struct ht_core_ops *ops;
    HT_TRY(ht_ops_row(&ops, be, "gemm"));
    if (a->m < 0 || a->n < 0 || a->k < 0)
        return HT_FAIL(HT_ERR_ARG,
                       "gemm: m, n, k are %" PRId64 ", %" PRId64 ", %" PRId64 "; none may be < 0",
                       a->m, a->n, a->k);
    HT_TRY(ht_ops_check_dtype("gemm", a->ab_dtype));
    if (a->c_dtype != HT_DTYPE_F32 && a->c_dtype != a->ab_dtype)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "gemm: C is %s; it must be fp32 or the type of A (%s)",
                       ht_dtype_name(a->c_dtype), ht_dtype_name(a->ab_dtype));
    HT_TRY(check_ld("lda", a->lda, a->trans_a ? a->m : a->k));
    HT_TRY(check_ld("ldb", a->ldb, a->trans_b ? a->k : a->n));
    HT_TRY(check_ld("ldc", a->ldc, a->n));
    if (a->beta != 0.0f && a->beta != 1.0f)
        return HT_FAIL(HT_ERR_ARG, "gemm: beta is %g; it must be 0 or 1", (double)a->beta);
    if (a->m == 0 || a->n == 0) return HT_OK;
    HT_TRY(ht_ops_check_ptr("gemm", "C", a->c, a->m * a->n));
    HT_TRY(ht_ops_check_ptr("gemm", "A", a->a, a->m * a->k));
    HT_TRY(ht_ops_check_ptr("gemm", "B", a->b, a->k * a->n));
    if (a->k > 0 && (a->c == a->a || a->c == a->b))
        return HT_FAIL(HT_ERR_ARG, "gemm: C is the same buffer as %s; it must not overlap A or B",
                       a->c == a->a ? "A" : "B");
    return ops->gemm[be->isa](be, a);
}

/* ---- embedding ---- */

static enum ht_status embedding_check(const struct ht_backend *be,
                                      const struct ht_embedding_args *a)
{
    HT_TRY(check_sizes("embedding", "n_tokens", a->n_tokens, "d_model", a->d_model));
    HT_TRY(ht_ops_check_ptr("embedding", "ids", a->ids, a->n_tokens));
    if (be->kind != HT_BACKEND_CPU) return HT_OK; // the ids are not in host memory
    for (int64_t t = 0; t < a->n_tokens; t++)
        if (a->ids[t] < 0 || a->ids[t] >= a->vocab_size)
            return HT_FAIL(HT_ERR_ARG,
                           "embedding: id %d at position %" PRId64 "; ids are 0 to %" PRId64,
                           (int)a->ids[t], t, a->vocab_size - 1);
    return HT_OK;
}

enum ht_status ht_embedding_forward(struct ht_backend *be, const struct ht_embedding_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_tokens * a->d_model;

    HT_TRY(ht_ops_row(&ops, be, "embedding"));
    HT_TRY(embedding_check(be, a));
    HT_TRY(ht_ops_check_dtype("embedding", a->dtype));
    HT_TRY(ht_ops_check_ptr("embedding", "weight", a->weight, n));
    HT_TRY(ht_ops_check_ptr("embedding", "residual", a->residual, n));
    return n == 0 ? HT_OK : ops->embedding_forward[be->isa](be, a);
}

enum ht_status ht_embedding_backward(struct ht_backend *be, const struct ht_embedding_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_tokens * a->d_model;

    HT_TRY(ht_ops_row(&ops, be, "embedding"));
    HT_TRY(embedding_check(be, a));
    HT_TRY(ht_ops_check_ptr("embedding", "grad_residual", a->grad_residual, n));
    HT_TRY(ht_ops_check_ptr("embedding", "grad_weight", a->grad_weight, n));
    return n == 0 ? HT_OK : ops->embedding_backward[be->isa](be, a);
}

/* ---- RMSNorm ---- */

static enum ht_status rmsnorm_check(const struct ht_rmsnorm_args *a)
{
    HT_TRY(check_sizes("rmsnorm", "n_rows", a->n_rows, "d_model", a->d_model));
    HT_TRY(ht_ops_check_dtype("rmsnorm", a->dtype));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "w", a->w, a->n_rows * a->d_model));
    if (!(a->eps >= 0.0f))
        return HT_FAIL(HT_ERR_ARG, "rmsnorm: eps is %g; it must be >= 0", (double)a->eps);
    return HT_OK;
}

enum ht_status ht_rmsnorm_forward(struct ht_backend *be, const struct ht_rmsnorm_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_rows * a->d_model;

    HT_TRY(ht_ops_row(&ops, be, "rmsnorm"));
    HT_TRY(rmsnorm_check(a));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "r_in", a->r_in, n));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "y", a->y, n));
    if (!a->r_out && (a->branch || a->round_residual))
        HT_TRY(
            ht_ops_check_ptr("rmsnorm", "r_out (needed with branch or round_residual)", NULL, n));
    return n == 0 ? HT_OK : ops->rmsnorm_forward[be->isa](be, a);
}

enum ht_status ht_rmsnorm_backward(struct ht_backend *be, const struct ht_rmsnorm_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_rows * a->d_model;

    HT_TRY(ht_ops_row(&ops, be, "rmsnorm"));
    HT_TRY(rmsnorm_check(a));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "r_out", a->r_out, n));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "rstd", a->rstd, n));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "grad_y", a->grad_y, n));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "grad_r_in", a->grad_r_in, n));
    HT_TRY(ht_ops_check_ptr("rmsnorm", "grad_w", a->grad_w, n));
    if (n > 0 &&
        (a->grad_branch == a->grad_y || a->grad_r_in == a->grad_y || a->grad_r_in == a->r_out))
        return HT_FAIL(HT_ERR_ARG, "rmsnorm: a gradient is written over grad_y or r_out; "
                                   "only grad_r_in may equal grad_r_out");
    return n == 0 ? HT_OK : ops->rmsnorm_backward[be->isa](be, a);
}

size_t ht_rmsnorm_scratch_bytes(int64_t n_rows, int64_t d_model)
{
    const int64_t strips = n_rows < 256 ? n_rows : 256; // kStrips of rmsnorm_cuda.cu
    return ht_arena_bytes((size_t)(strips * d_model) * sizeof(float));
}

/* ---- SwiGLU ---- */

static enum ht_status swiglu_check(const struct ht_swiglu_args *a)
{
    HT_TRY(check_sizes("swiglu", "n_rows", a->n_rows, "d_ff", a->d_ff));
    HT_TRY(ht_ops_check_dtype("swiglu", a->dtype));
    return ht_ops_check_ptr("swiglu", "gate_up", a->gate_up, 2 * a->n_rows * a->d_ff);
}

enum ht_status ht_swiglu_forward(struct ht_backend *be, const struct ht_swiglu_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_rows * a->d_ff;

    HT_TRY(ht_ops_row(&ops, be, "swiglu"));
    HT_TRY(swiglu_check(a));
    HT_TRY(ht_ops_check_ptr("swiglu", "y", a->y, n));
    return n == 0 ? HT_OK : ops->swiglu_forward[be->isa](be, a);
}

enum ht_status ht_swiglu_backward(struct ht_backend *be, const struct ht_swiglu_args *a)
{
    const struct ht_core_ops *ops;
    const int64_t n = a->n_rows * a->d_ff;

    HT_TRY(ht_ops_row(&ops, be, "swiglu"));
    HT_TRY(swiglu_check(a));
    HT_TRY(ht_ops_check_ptr("swiglu", "grad_y", a->grad_y, n));
    HT_TRY(ht_ops_check_ptr("swiglu", "grad_gate_up", a->grad_gate_up, 2 * n));
    return n == 0 ? HT_OK : ops->swiglu_backward[be->isa](be, a);
}

/* ---- AdamW ---- */

enum ht_status ht_adamw_step(struct ht_backend *be, const struct ht_adamw_args *a)
{
    const struct ht_core_ops *ops;

    HT_TRY(ht_ops_row(&ops, be, "adamw"));
    if (a->n < 0 || a->step < 1)
        return HT_FAIL(HT_ERR_ARG,
                       "adamw: n is %" PRId64 ", step is %" PRId64 "; n >= 0 and step >= 1", a->n,
                       a->step);
    HT_TRY(ht_ops_check_dtype("adamw", a->weight_dtype));
    if (!(a->beta1 >= 0.0f && a->beta1 < 1.0f && a->beta2 >= 0.0f && a->beta2 < 1.0f))
        return HT_FAIL(HT_ERR_ARG, "adamw: beta1 is %g, beta2 is %g; both must be in [0, 1)",
                       (double)a->beta1, (double)a->beta2);
    HT_TRY(ht_ops_check_ptr("adamw", "master", a->master, a->n));
    HT_TRY(ht_ops_check_ptr("adamw", "exp_avg", a->exp_avg, a->n));
    HT_TRY(ht_ops_check_ptr("adamw", "exp_avg_sq", a->exp_avg_sq, a->n));
    HT_TRY(ht_ops_check_ptr("adamw", "grad", a->grad, a->n));
    HT_TRY(ht_ops_check_ptr("adamw", "weight", a->weight, a->n));
    return a->n == 0 ? HT_OK : ops->adamw_step[be->isa](be, a);
}

enum ht_status ht_sum_squares(struct ht_backend *be, double *out, const float *x, int64_t n)
{
    const struct ht_core_ops *ops;

    HT_TRY(ht_ops_row(&ops, be, "sum_squares"));
    if (n < 0) return HT_FAIL(HT_ERR_ARG, "sum_squares: n is %" PRId64 "; it must be >= 0", n);
    HT_TRY(ht_ops_check_ptr("sum_squares", "x", x, n));
    return n == 0 ? ht_backend_zero(be, out, sizeof *out)
                  : ops->sum_squares[be->isa](be, out, x, n);
}

enum ht_status ht_clip_factor_cpu(struct ht_backend *be, float *clip, const double *squares,
                                  const double *loss, double grad_scale, double max_norm)
{
    const double norm = sqrt(*squares) * grad_scale;

    (void)be;
    *clip = !isfinite(norm) || (loss && !isfinite(*loss)) ? NAN
            : max_norm > 0.0 && norm > max_norm           ? (float)(max_norm / norm)
                                                          : 1.0f;
    return HT_OK;
}

enum ht_status ht_clip_factor(struct ht_backend *be, float *clip, const double *squares,
                              const double *loss, double grad_scale, double max_norm)
{
    const struct ht_core_ops *ops;

    HT_TRY(ht_ops_row(&ops, be, "clip_factor"));
    HT_TRY(ht_ops_check_ptr("clip_factor", "clip", clip, 1));
    HT_TRY(ht_ops_check_ptr("clip_factor", "squares", squares, 1));
    return ops->clip_factor[be->isa](be, clip, squares, loss, grad_scale, max_norm);
}

enum ht_status ht_sum_rows_cpu(struct ht_backend *be, double *out, const double *x, int64_t n_rows,
                               int64_t n_columns)
{
    (void)be;
    for (int64_t c = 0; c < n_columns; c++) {
        out[c] = 0.0;
        for (int64_t r = 0; r < n_rows; r++) out[c] += x[r * n_columns + c];
    }
    return HT_OK;
}

enum ht_status ht_sum_rows(struct ht_backend *be, double *out, const double *x, int64_t n_rows,
                           int64_t n_columns)
{
    const struct ht_core_ops *ops;

    HT_TRY(ht_ops_row(&ops, be, "sum_rows"));
    if (n_rows < 0 || n_columns < 1)
        return HT_FAIL(HT_ERR_ARG,
                       "sum_rows: n_rows is %" PRId64 ", n_columns is %" PRId64
                       "; at least 0 and 1",
                       n_rows, n_columns);
    HT_TRY(ht_ops_check_ptr("sum_rows", "out", out, n_columns));
    HT_TRY(ht_ops_check_ptr("sum_rows", "x", x, n_rows * n_columns));
    return ops->sum_rows[be->isa](be, out, x, n_rows, n_columns);
}
