/* tests/core/ops/test_core_ops.c: the dispatch table has no hole, and says so where a backend is
 * absent. */
#include <string.h>

#include "core/ops/core_ops.h"
#include "tests/core/ops/ops_case.h"

/* Function pointers are compared as bytes: every field of the row is an array of them. */
START_TEST(no_cell_is_empty)
{
    const struct ht_core_ops *row = ht_core_ops_get(HT_BACKEND_CPU);
    void (*cell)(void);
    const size_t n_cells = sizeof *row / sizeof cell;

    ck_assert_ptr_nonnull(row);
    ck_assert_uint_eq(n_cells, (size_t)16 * HT_ISA_COUNT);
    for (size_t i = 0; i < n_cells; i++) {
        memcpy(&cell, (const char *)row + i * sizeof cell, sizeof cell);
        ck_assert_msg(cell != NULL, "operation %zu has no function for level %zu", i / HT_ISA_COUNT,
                      i % HT_ISA_COUNT);
    }
}
END_TEST

START_TEST(backends_this_build_lacks_are_refused)
{
    struct ht_backend be = backend_make(ht_isa_best(), 1, 0);
    const struct ht_gemm_args gemm = { .alpha = 1.0f };
    const struct ht_adamw_args adamw = { .step = 1 };

    be.kind = HT_BACKEND_COUNT; // never built in
    ck_assert_ptr_null(ht_core_ops_get(be.kind));
    ck_assert_int_eq(ht_gemm(&be, &gemm), HT_ERR_UNSUPPORTED);
    ck_assert_int_eq(ht_adamw_step(&be, &adamw), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "backend"));
    be.kind = HT_BACKEND_CPU;
    be.isa = HT_ISA_COUNT;
    ck_assert_int_eq(ht_gemm(&be, &gemm), HT_ERR_ARG);
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("core_ops");
    TCase *t = tcase_create("core_ops");

    tcase_add_test(t, no_cell_is_empty);
    tcase_add_test(t, backends_this_build_lacks_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
