/* tests/ref/ssm_ref.h: ssm in plain fp64 loops, straight from spec sections 3.3 and 4: the scan as
 * its token-by-token recurrence and the adjoint of that recurrence, never in chunks.
 *
 * The tests of ssm compare against these; central differences check the backward functions here.
 * All tensors are dense. Gradients of parameters are added to, all others written.
 */
#ifndef HT_TESTS_REF_SSM_REF_H
#define HT_TESTS_REF_SSM_REF_H

#include <stdbool.h>
#include <stdint.h>

struct ssm_ref_scan {
    int64_t n_seqs;
    const int32_t *starts; // (n_seqs + 1)
    int64_t T, H, P, N, G;
    double dt_min, dt_max;
    bool round16; // what plain 16-bit code loses: every operand of a product and every result is
                  // rounded to bf16 once; sums and states are exact
    const double *x, *B, *C, *dt_raw;  // (T, H*P), (T, G*N), (T, G*N), (T, H)
    const double *dt_bias, *A_log, *D; // (H)
    const double *init;                // (n_seqs, H, P, N) or NULL
    double *y, *final;                 // (T, H*P), (n_seqs, H, P, N) or NULL
    const double *grad_y, *grad_final; // grad_final may be NULL
    double *grad_x, *grad_B, *grad_C, *grad_dt_raw;
    double *grad_dt_bias, *grad_A_log, *grad_D;
    double *grad_init; // or NULL
};
void ssm_ref_scan_forward(const struct ssm_ref_scan *a);
void ssm_ref_scan_backward(const struct ssm_ref_scan *a);

struct ssm_ref_conv {
    int64_t n_seqs;
    const int32_t *starts;
    int64_t T, CD, W;
    const double *x, *w, *bias; // (T, CD), (CD, W), (CD) or NULL
    const double *state;        // (n_seqs, W-1, CD) or NULL
    double *y;                  // (T, CD)
    double *new_state;          // (n_seqs, W-1, CD) or NULL
    const double *grad_y;
    double *grad_x, *grad_w, *grad_bias; // grad_bias may be NULL
};
void ssm_ref_conv_forward(const struct ssm_ref_conv *a);
void ssm_ref_conv_backward(const struct ssm_ref_conv *a);

struct ssm_ref_norm {
    int64_t T, d_inner, groups; // groups = 1 for `full`
    double eps;
    const double *w, *y, *z;
    double *o, *rstd; // (T, d_inner), (T, groups)
    const double *grad_o;
    double *grad_y, *grad_z, *grad_w;
};
void ssm_ref_norm_forward(const struct ssm_ref_norm *a);
void ssm_ref_norm_backward(const struct ssm_ref_norm *a);

#endif
