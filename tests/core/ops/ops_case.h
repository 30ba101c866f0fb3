/* tests/core/ops/ops_case.h: what the suites of core/ops share: tensors with their fp64 twin and
 * guards, and the loop over CPU levels, types and thread counts.
 *
 * Tolerance of a result: fp32 rounding of the sums (a factor times epsilon times the largest value
 * that takes part), and for a bf16 result twice what rounding the exact value to bf16 loses on the
 * same data.
 */
#ifndef HT_TESTS_OPS_CASE_H
#define HT_TESTS_OPS_CASE_H

#include <check.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

/* n elements between guard bytes, and the same values in fp64. */
struct tensor {
    int64_t n;
    enum ht_dtype dtype;
    void *p;   // (n) dtype
    double *d; // (n) exactly the values in p when filled by tensor_normal
    unsigned char *block;
};

/* All bytes 0xa5, so that what is never written shows. */
struct tensor tensor_make(int64_t n, enum ht_dtype dtype);

/* Nearly normal values of the given deviation, rounded to the type. */
struct tensor tensor_normal(int64_t n, enum ht_dtype dtype, double sd, uint64_t seed);
struct tensor tensor_copy(const struct tensor *t);

/* Asserts that the guards are whole, then frees. */
void tensor_free(struct tensor *t);

/* p and d = value */
void tensor_fill(struct tensor *t, double value);

double tensor_at(const struct tensor *t, int64_t i);
double max_abs(const double *d, int64_t n);

/* Asserts |t.p[i] - ref[i]| <= slack + (bf16: 2 * the most that rounding ref to bf16 loses). */
void check_close(const struct tensor *t, const double *ref, double slack, const char *what);

/* Asserts that the bytes of p are equal. */
void check_same_bits(const struct tensor *a, const struct tensor *b, const char *what);

/* One cell of the loop: case index -> level, type, threads (2 is compared with 1 inside the tests).
 */
struct variant {
    enum ht_isa isa;
    enum ht_dtype dtype;
};

/* Levels of this machine times {fp32, bf16}. */
int n_variants(void);
struct variant variant_at(int i);

/* A backend of that level. */
struct ht_backend backend_make(enum ht_isa isa, int n_threads, size_t scratch_bytes);

/* Runs one suite; returns main()'s exit code. */
int run_suite(Suite *s);

#endif
