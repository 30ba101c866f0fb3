/* core/ops/core_ops.h: inside core/ops only: the kernels' types and the table that lists them.
 *
 * The public functions (gemm.h, embedding.h, ...) check their arguments once and call the table in
 * core_ops.c. Kernels may assume checked arguments: sizes >= 0, pointers there, ids in range.
 */
#ifndef HT_OPS_CORE_OPS_H
#define HT_OPS_CORE_OPS_H

#include <stddef.h>

#include "core/base/backend.h"
#include "core/ops/adamw.h"
#include "core/ops/embedding.h"
#include "core/ops/gemm.h"
#include "core/ops/loss.h"
#include "core/ops/mlp.h"
#include "core/ops/rmsnorm.h"

typedef enum ht_status ht_gemm_fn(struct ht_backend *be, const struct ht_gemm_args *a);
typedef enum ht_status ht_embedding_fn(struct ht_backend *be, const struct ht_embedding_args *a);
typedef enum ht_status ht_rmsnorm_fn(struct ht_backend *be, const struct ht_rmsnorm_args *a);
typedef enum ht_status ht_swiglu_fn(struct ht_backend *be, const struct ht_swiglu_args *a);
typedef enum ht_status ht_adamw_fn(struct ht_backend *be, const struct ht_adamw_args *a);
typedef enum ht_status ht_sum_squares_fn(struct ht_backend *be, double *out, const float *x,
                                         int64_t n);

/* Softmax, loss and gradient of a block of logits (loss.h), in place.
 *
 *   l = logit_scale * logits[r, :]     lse[r] = logsumexp(l)     logprob[r] = l[label] - lse
 *   with gradients, logits[r, :] becomes
 *     grad_scale * ((1 + 2 z_coef lse) softmax(l) - onehot(label))
 * in `dtype`; a bf16 row lies at the start of its fp32 row, so its stride is 2*vocab_size elements.
 * Rows whose label is negative get zeros in all three.
 */
struct ht_softmax_ce_args {
    int64_t n_rows, vocab_size;
    float logit_scale, grad_scale, z_coef;
    bool want_grad;
    enum ht_dtype dtype;   // of the gradient
    float *logits;         // (n_rows, vocab_size) read; overwritten when want_grad
    const int32_t *labels; // (n_rows)
    double *lse, *logprob; // (n_rows) written
};
typedef enum ht_status ht_linear_ce_fn(struct ht_backend *be, struct ht_linear_ce_args *a);
typedef enum ht_status ht_clip_factor_fn(struct ht_backend *be, float *clip, const double *squares,
                                         const double *loss, double grad_scale, double max_norm);
typedef enum ht_status ht_sum_rows_fn(struct ht_backend *be, double *out, const double *x,
                                      int64_t n_rows, int64_t n_columns);
typedef enum ht_status ht_softmax_ce_fn(struct ht_backend *be, const struct ht_softmax_ce_args *a);

/* A tile of a bf16 matrix and its dense fp32 copy: ht_widen_cpu fills the copy; ht_narrow_cpu sets
 * the tile to alpha * copy, plus what it held when `add`. */
struct ht_tile_args {
    int64_t rows, cols, ld; // ld: elements between rows of the bf16 matrix
    ht_bf16 *narrow;        // (rows, cols)
    float *wide;            // (rows, cols)
    float alpha;
    bool add;
};
typedef void ht_tile_fn(struct ht_backend *be, const struct ht_tile_args *t);

/* Most rows of A for which ht_gemm with trans_b takes the matrix-vector kernel (gemv_cpu.c). On one
 * core of a Zen 5 VM it beats oneDNN in bf16 up to 32 rows (8 rows: 1.4x, 16: 1.2x, 32: 1.1x), in
 * fp32 up to 8; 16 rows tie. */
enum { HT_GEMV_MAX_M_BF16 = 32, HT_GEMV_MAX_M_F32 = 16 };

/* gemm_cpu.c: through oneDNN; small m goes to the level's gemv. */
ht_gemm_fn ht_gemm_cpu;

/* loss.c; core_ops.c */
ht_linear_ce_fn ht_linear_ce_cpu;
ht_clip_factor_fn ht_clip_factor_cpu;
ht_sum_rows_fn ht_sum_rows_cpu;

/* gemm_onednn.c: checked arguments, k > 0. */
ht_gemm_fn ht_gemm_onednn;

/* A buffer of the gemm cache (not the arena) for one product; grows at a new size only. */
enum ht_status ht_gemm_own_scratch(void **out, struct ht_backend *be, size_t bytes);

HT_ISA_DECLARE(ht_gemm_fn, ht_gemv_cpu);
HT_ISA_DECLARE(ht_tile_fn, ht_widen_cpu);
HT_ISA_DECLARE(ht_tile_fn, ht_narrow_cpu);
HT_ISA_DECLARE(ht_embedding_fn, ht_embedding_forward_cpu);
HT_ISA_DECLARE(ht_embedding_fn, ht_embedding_backward_cpu);
HT_ISA_DECLARE(ht_rmsnorm_fn, ht_rmsnorm_forward_cpu);
HT_ISA_DECLARE(ht_rmsnorm_fn, ht_rmsnorm_backward_cpu);
HT_ISA_DECLARE(ht_swiglu_fn, ht_swiglu_forward_cpu);
HT_ISA_DECLARE(ht_swiglu_fn, ht_swiglu_backward_cpu);
HT_ISA_DECLARE(ht_softmax_ce_fn, ht_softmax_ce_cpu);
HT_ISA_DECLARE(ht_adamw_fn, ht_adamw_step_cpu);
HT_ISA_DECLARE(ht_sum_squares_fn, ht_sum_squares_cpu);

/* *_cuda.cu: arguments as above, in device memory; nothing waits. */
ht_gemm_fn ht_gemm_cuda;
ht_embedding_fn ht_embedding_forward_cuda, ht_embedding_backward_cuda;
ht_rmsnorm_fn ht_rmsnorm_forward_cuda, ht_rmsnorm_backward_cuda;
ht_swiglu_fn ht_swiglu_forward_cuda, ht_swiglu_backward_cuda;
ht_softmax_ce_fn ht_softmax_ce_cuda;
ht_linear_ce_fn ht_linear_ce_cuda;
ht_adamw_fn ht_adamw_step_cuda;
ht_sum_squares_fn ht_sum_squares_cuda;
ht_clip_factor_fn ht_clip_factor_cuda;
ht_sum_rows_fn ht_sum_rows_cuda;

/* A row of the table: one column per operation, one cell per CPU level (the same function in all of
 * them on CUDA). */
struct ht_core_ops {
    ht_gemm_fn *gemm[HT_ISA_COUNT];
    ht_embedding_fn *embedding_forward[HT_ISA_COUNT], *embedding_backward[HT_ISA_COUNT];
    ht_rmsnorm_fn *rmsnorm_forward[HT_ISA_COUNT], *rmsnorm_backward[HT_ISA_COUNT];
    ht_swiglu_fn *swiglu_forward[HT_ISA_COUNT], *swiglu_backward[HT_ISA_COUNT];
    ht_softmax_ce_fn *softmax_ce[HT_ISA_COUNT];
    ht_linear_ce_fn *linear_ce[HT_ISA_COUNT];
    ht_adamw_fn *adamw_step[HT_ISA_COUNT];
    ht_sum_squares_fn *sum_squares[HT_ISA_COUNT];
    ht_clip_factor_fn *clip_factor[HT_ISA_COUNT];
    ht_sum_rows_fn *sum_rows[HT_ISA_COUNT];
    // parts of the CPU's products; empty elsewhere
    ht_gemm_fn *gemv[HT_ISA_COUNT];
    ht_tile_fn *widen[HT_ISA_COUNT], *narrow[HT_ISA_COUNT];
};

/* The columns before gemv: what every backend has. */
enum { HT_CORE_OPS_COMMON = offsetof(struct ht_core_ops, gemv) / sizeof(ht_gemm_fn *) };

/* The row of a backend, or NULL where this build has none. */
const struct ht_core_ops *ht_core_ops_get(enum ht_backend_kind kind);

/* HT_OK when tensors of an operation may have this type (F32 or BF16). */
enum ht_status ht_ops_check_dtype(const char *op, enum ht_dtype d);

/* HT_ERR_ARG naming `what` when p is NULL and n elements of it are needed. */
enum ht_status ht_ops_check_ptr(const char *op, const char *what, const void *p, int64_t n);

/* HT_OK and the backend's row, or HT_ERR_UNSUPPORTED. */
enum ht_status ht_ops_row(const struct ht_core_ops **out, const struct ht_backend *be,
                          const char *op);

#endif
