/* tests/ssm/scan_case.h: one scan with all its tensors, their fp64 twins and gradients. */
#ifndef HT_TESTS_SSM_SCAN_CASE_H
#define HT_TESTS_SSM_SCAN_CASE_H

#include "ssm/ssm_ops.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ssm_ref.h"

enum { SCAN_MAX_SEQS = 8 };

struct scan_shape {
    int64_t lengths[SCAN_MAX_SEQS]; // 0 ends the list
    int64_t H, P, N, G, Q;
};

enum scan_data {
    SCAN_PLAIN,     // decays from strong to weak
    SCAN_STATES,    // and initial states, and a loss on the final states
    SCAN_CLAMPED,   // and a clamp that is active on both sides
    SCAN_EXTREME,   // dt_raw from -60 to 1e4: sums of da below -1e4 next to tokens that remember
    SCAN_REMEMBERS, // weak decay only: long sums
};

/* x | B | C | padding are columns of `rows`; dt_raw and its gradient have padding too. */
struct scan_case {
    struct scan_shape shape;
    int32_t starts[SCAN_MAX_SEQS + 1];
    int64_t T, width; // width of a row of x | B | C with padding
    struct tensor rows, dt_raw, dt_bias, A_log, D, init, grad_y, grad_final; // inputs
    struct tensor y, final;                                                  // forward
    struct tensor grad_rows, grad_dt_raw, grad_dt_bias, grad_A_log, grad_D, grad_init;
    struct ht_ssd_args args;
    struct ssm_ref_scan ref; // dense fp64; results after scan_case_reference
};

struct scan_case scan_case_make(const struct scan_shape *shape, enum scan_data data,
                                enum ht_dtype dtype, uint64_t seed);
void scan_case_free(struct scan_case *k);

/* Fills the ref's results. */
void scan_case_reference(struct scan_case *k);

/* With scratch of exactly the promised size; asserts HT_OK. Parameter gradients start from zero. */
void scan_case_forward(struct scan_case *k, enum ht_isa isa, int n_threads);
void scan_case_backward(struct scan_case *k, enum ht_isa isa, int n_threads);

/* Compare with the reference. fp32: 1e-5 of the largest value, plus bf16's share (see scan_case.c).
 */
void scan_case_check_forward(const struct scan_case *k);
void scan_case_check_backward(const struct scan_case *k);

/* The same, for few heads: a sum over all tokens is then a single draw, and what plain 16-bit code
 * loses in it is taken over several draws of `data` (each head within four times that). */
void scan_case_check_backward_of(const struct scan_case *k, enum scan_data data);

/* All results of two cases are the same bytes. */
void scan_case_same_bits(const struct scan_case *a, const struct scan_case *b);

/* |a - b| <= 1e-5 max|b| (fp32 only) over all forward and backward results. */
void scan_case_close(const struct scan_case *a, const struct scan_case *b);

#endif
