/* tests/attention/attention_case.h: one attention problem with its fp64 answer. */
#ifndef HT_TESTS_ATTENTION_CASE_H
#define HT_TESTS_ATTENTION_CASE_H

#include "attention/flash.h"
#include "tests/ref/attention_ref.h"

enum { CASE_MAX_SEQS = 6 };

struct attention_shape {
    int64_t n_heads, n_kv_heads, d_head;
    int64_t lengths[CASE_MAX_SEQS]; // zero ends the list
};

struct attention_case {
    struct ht_backend be;
    struct ht_flash_args args;
    struct attention_ref ref;     // exact answer on the (rounded) inputs
    struct attention_ref plain16; // what all-16-bit code gives on them; filled for bf16
    int32_t starts[CASE_MAX_SEQS + 1];
    int64_t n_seqs, n_tokens, width, pad; // rows of qkv are width + pad apart
    size_t o_bytes, qkv_bytes;
};

/* Random q, k, v, grad_o of about unit size, forward and (if wanted) backward references computed.
 * Rows of qkv and grad_qkv end in `pad` guard elements. */
void attention_case_make(struct attention_case *c, const struct attention_shape *s,
                         enum ht_dtype dtype, enum ht_isa isa, int n_threads, uint64_t seed,
                         bool backward);
void attention_case_free(struct attention_case *c);

void attention_case_forward(struct attention_case *c);
void attention_case_backward(struct attention_case *c);

/* Largest |got - want| over an o-like or qkv-like tensor; NaN counts as infinite. */
double attention_case_o_error(const struct attention_case *c, const void *got, const double *want);
double attention_case_qkv_error(const struct attention_case *c, const void *got,
                                const double *want);
double attention_case_max(const double *x, int64_t n);

/* What an error may be: fp32 rounding times the largest value, or twice what plain 16-bit code
 * loses. */
double attention_case_tolerance(const struct attention_case *c, const double *want,
                                const double *plain16, int64_t n, double fp32_steps);

#endif
