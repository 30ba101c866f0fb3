/* tests/ssm/test_ssd.c: the chunked scan and its backward pass against the fp64 recurrence, at
 * every CPU level, in fp32 and bf16. */
#include <math.h>
#include <string.h>

#include "tests/ssm/scan_case.h"

// one token; shorter than a chunk; ragged chunks and blocks; widths that are no multiple of 16;
// groups; several sequences; more heads than one block of heads; one head per group; past the
// longest chunk
static const struct {
    struct scan_shape shape;
    enum scan_data data;
} scans[] = {
    { { { 1 }, 1, 8, 8, 1, 16 }, SCAN_PLAIN },
    { { { 3 }, 2, 16, 16, 1, 64 }, SCAN_STATES },
    { { { 67 }, 3, 64, 128, 1, 64 }, SCAN_STATES },
    { { { 67 }, 6, 24, 40, 2, 16 }, SCAN_STATES },
    { { { 1, 16, 3, 50, 17 }, 5, 8, 24, 1, 16 }, SCAN_STATES },
    { { { 33, 2, 64 }, 8, 16, 8, 8, 32 }, SCAN_CLAMPED },
    { { { 70 }, 9, 32, 16, 1, 32 }, SCAN_PLAIN },
    { { { 130, 40 }, 2, 48, 56, 1, 64 }, SCAN_REMEMBERS },
    { { { 300 }, 1, 16, 32, 1, 256 }, SCAN_REMEMBERS },
    { { { 150 }, 4, 16, 16, 2, 128 }, SCAN_EXTREME },
};
enum { N_SCANS = sizeof scans / sizeof *scans };

START_TEST(matches_the_recurrence)
{
    const struct variant v = variant_at(_i / N_SCANS);
    struct scan_case k =
        scan_case_make(&scans[_i % N_SCANS].shape, scans[_i % N_SCANS].data, v.dtype, 1);

    scan_case_reference(&k);
    scan_case_forward(&k, v.isa, 1);
    scan_case_check_forward(&k);
    scan_case_backward(&k, v.isa, 1);
    scan_case_check_backward(&k);
    scan_case_free(&k);
}
END_TEST

START_TEST(bits_do_not_depend_on_run_or_threads)
{
    const struct variant v = variant_at(_i / N_SCANS);
    struct scan_case k[3];

    for (int i = 0; i < 3; i++) {
        k[i] = scan_case_make(&scans[_i % N_SCANS].shape, scans[_i % N_SCANS].data, v.dtype, 2);
        scan_case_forward(&k[i], v.isa, 1 + i);
        scan_case_backward(&k[i], v.isa, 1 + i);
    }
    scan_case_same_bits(&k[0], &k[1]);
    scan_case_same_bits(&k[0], &k[2]);
    scan_case_backward(&k[2], v.isa, 2);
    scan_case_same_bits(&k[0], &k[2]);
    for (int i = 0; i < 3; i++) scan_case_free(&k[i]);
}
END_TEST

START_TEST(chunk_changes_only_rounding)
{
    struct scan_shape shape = { { 300, 5, 64 }, 4, 16, 24, 2, 16 };
    struct scan_case first = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 4);

    scan_case_forward(&first, ht_isa_best(), 1);
    scan_case_backward(&first, ht_isa_best(), 1);
    for (shape.Q = 32; shape.Q <= 256; shape.Q *= 2) {
        struct scan_case k = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 4);
        scan_case_forward(&k, ht_isa_best(), 1);
        scan_case_backward(&k, ht_isa_best(), 1);
        scan_case_close(&k, &first);
        scan_case_free(&k);
    }
    scan_case_free(&first);
}
END_TEST

/* A clean result however strong the decay: sums of da far below -1e4 within one chunk. */
START_TEST(extreme_steps_stay_finite)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 256 }, 3, 16, 16, 1, 256 };
    struct scan_case k = scan_case_make(&shape, SCAN_EXTREME, v.dtype, 5);
    double lowest = 0.0;

    for (int64_t t = 0; t < k.T; t++)
        lowest -= exp(k.ref.A_log[0]) * fmax(k.ref.dt_raw[t * 3], 0.0);
    ck_assert_double_lt(lowest, -1e4);
    scan_case_forward(&k, v.isa, 1);
    scan_case_backward(&k, v.isa, 1);
    for (int64_t i = 0; i < k.y.n; i++) ck_assert(isfinite(tensor_at(&k.y, i)));
    for (int64_t i = 0; i < k.grad_rows.n; i++) ck_assert(isfinite(tensor_at(&k.grad_rows, i)));
    for (int64_t i = 0; i < k.grad_dt_raw.n; i++) ck_assert(isfinite(tensor_at(&k.grad_dt_raw, i)));
    for (int64_t h = 0; h < 3; h++) ck_assert(isfinite(tensor_at(&k.grad_A_log, h)));
    scan_case_free(&k);
}
END_TEST

/* Tokens with da near -1e5 and no input empty the state; what follows must be remembered to the
 * last digit, which differences of running sums of da would have lost. */
START_TEST(memory_is_exact_after_a_reset)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 200 }, 3, 16, 16, 1, 128 };
    struct scan_case k = scan_case_make(&shape, SCAN_REMEMBERS, v.dtype, 8);
    const int64_t HP = shape.H * shape.P, tokens[] = { 3, 40, 41, 64, 150 };
    double *x = (double *)(uintptr_t)k.ref.x, *dt_raw = (double *)(uintptr_t)k.ref.dt_raw;

    for (int64_t h = 0; h < shape.H; h++) { // decays of 2 % per token, and 1e5 at a reset
        ((float *)k.A_log.p)[h] = (float)log(10.0);
        k.A_log.d[h] = tensor_at(&k.A_log, h);
        ((float *)k.dt_bias.p)[h] = -6.0f;
        k.dt_bias.d[h] = -6.0;
    }
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
        const int64_t t = tokens[i];
        for (int64_t j = 0; j < HP; j++) {
            ht_store_f32(k.rows.p, t * k.width + j, v.dtype, 0.0f);
            x[t * HP + j] = 0.0;
        }
        for (int64_t h = 0; h < shape.H; h++) {
            ht_store_f32(k.dt_raw.p, t * k.args.dt_stride + h, v.dtype, 9984.0f); // exact in bf16
            dt_raw[t * shape.H + h] = 9984.0;
        }
    }
    scan_case_reference(&k);
    ck_assert_double_lt(max_abs(k.ref.y, k.T * HP), 100.0);
    scan_case_forward(&k, v.isa, 1);
    scan_case_check_forward(&k);
    scan_case_free(&k);
}
END_TEST

/* A NaN in dt_raw must come out, not vanish in the clamp. */
START_TEST(nan_is_not_hidden)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 40 }, 2, 16, 16, 1, 16 };
    struct scan_case k = scan_case_make(&shape, SCAN_CLAMPED, v.dtype, 6);

    ht_store_f32(k.dt_raw.p, 20 * k.args.dt_stride + 1, v.dtype, NAN);
    scan_case_forward(&k, v.isa, 1);
    ck_assert(isnan(tensor_at(&k.y, 20 * k.args.y_stride + 16)));
    ck_assert(isnan(tensor_at(&k.y, 39 * k.args.y_stride + 16)));
    ck_assert(!isnan(tensor_at(&k.y, 39 * k.args.y_stride)));
    scan_case_free(&k);
}
END_TEST

/* Less scratch than asked for means fewer workers and the same bits; none at all is an error. */
START_TEST(scratch_limits_workers)
{
    const struct scan_shape shape = { { 67, 20 }, 6, 16, 16, 1, 16 };
    struct scan_case a = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 7);
    struct scan_case b = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 7);
    struct ht_backend one = backend_make(ht_isa_best(), 1, 64);

    scan_case_forward(&a, ht_isa_best(), 2);
    b.args.seqs.starts = b.starts;
    ck_assert_int_eq(ht_ssd_forward(&one, &b.args), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "scratch"));
    ck_assert_int_eq(ht_ssd_backward(&one, &b.args), HT_ERR_MEMORY);
    ck_assert_uint_eq(one.scratch.used_bytes, 0);
    ck_assert_int_eq(ht_backend_reserve_scratch(&one, ht_ssd_forward_scratch_bytes(&b.args)),
                     HT_OK);
    one.n_threads = 2;
    ck_assert_int_eq(ht_ssd_forward(&one, &b.args), HT_OK);
    check_same_bits(&a.y, &b.y, "y");
    ht_backend_free(&one);
    scan_case_free(&a);
    scan_case_free(&b);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ssd");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_the_recurrence, 0, n_variants() * N_SCANS);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, bits_do_not_depend_on_run_or_threads, 0, n_variants() * N_SCANS);
    tcase_add_test(property, chunk_changes_only_rounding);
    tcase_add_loop_test(property, extreme_steps_stay_finite, 0, n_variants());
    tcase_add_loop_test(property, memory_is_exact_after_a_reset, 0, n_variants());
    tcase_add_loop_test(property, nan_is_not_hidden, 0, n_variants());
    tcase_add_test(property, scratch_limits_workers);
    suite_add_tcase(s, property);
    return run_suite(s);
}
