/* tests/ref/ops_ref.h: core/ops in plain fp64 loops, straight from the equations in the headers.
 *
 * The tests of core/ops compare against these; central differences check the backward functions
 * here. All matrices are dense and row-major unless a leading dimension is given.
 */
#ifndef HT_TESTS_REF_OPS_REF_H
#define HT_TESTS_REF_OPS_REF_H

#include <stdbool.h>
#include <stdint.h>

struct ops_ref_gemm {
    int64_t m, n, k, lda, ldb, ldc;
    bool trans_a, trans_b;
    double alpha, beta;
    const double *a, *b;
    double *c;
};
void ops_ref_gemm(const struct ops_ref_gemm *g);

struct ops_ref_rmsnorm {
    int64_t n_rows, d_model;
    double eps, branch_scale;
    const double *w, *r_in, *branch; // branch may be NULL
    double *r_out, *y, *rstd;        // forward writes; backward reads r_out and rstd
    const double *grad_y, *grad_r_out;
    double *grad_r_in, *grad_branch, *grad_w; // grad_w is added to; grad_branch may be NULL
};
void ops_ref_rmsnorm_forward(const struct ops_ref_rmsnorm *a);
void ops_ref_rmsnorm_backward(const struct ops_ref_rmsnorm *a);

/* gate_up (n_rows, 2*d_ff), y and grad_y (n_rows, d_ff) */
void ops_ref_swiglu_forward(int64_t n_rows, int64_t d_ff, const double *gate_up, double *y);
void ops_ref_swiglu_backward(int64_t n_rows, int64_t d_ff, const double *gate_up,
                             const double *grad_y, double *grad_gate_up);

struct ops_ref_linear_ce {
    int64_t n_tokens, d_model, vocab_size;
    double logit_scale, loss_scale, z_coef;
    const double *u, *weight;
    const int32_t *labels;
    double *grad_u, *grad_weight; // grad_u written, grad_weight added to; or both NULL
    double *logprobs;             // or NULL
    double loss_sum, z_sum;
    int64_t n_counted;
};
void ops_ref_linear_ce(struct ops_ref_linear_ce *a);

struct ops_ref_adamw {
    int64_t n, step;
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    double *master, *exp_avg, *exp_avg_sq;
    const double *grad;
};
void ops_ref_adamw(const struct ops_ref_adamw *a);

#endif
