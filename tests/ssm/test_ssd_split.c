/* tests/ssm/test_ssd_split.c: how a sequence may be cut: several sequences equal separate runs, a
 * split anywhere equals the whole, steps equal a longer prefill, left padding changes nothing. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ssm/ssd_layout.h"
#include "tests/ssm/scan_case.h"

static size_t bytes_of(enum ht_dtype d, int64_t n)
{
    return (size_t)n * ht_dtype_bytes(d);
}

/* args over rows t0..t0+n-1 of the case as one sequence, with states at `init` and `final`. */
static struct ht_ssd_args window_of(const struct scan_case *k, int64_t t0, int64_t n,
                                    const int32_t *starts, const float *init, float *final)
{
    struct ht_ssd_args a = k->args;
    const enum ht_dtype d = a.dtype;

    a.seqs = (struct ht_seqs){ 1, starts };
    a.n_tokens = n;
    a.x = (const char *)a.x + bytes_of(d, t0 * a.x_stride);
    a.B = (const char *)a.B + bytes_of(d, t0 * a.x_stride);
    a.C = (const char *)a.C + bytes_of(d, t0 * a.x_stride);
    a.dt_raw = (const char *)a.dt_raw + bytes_of(d, t0 * a.dt_stride);
    a.y = (char *)a.y + bytes_of(d, t0 * a.y_stride);
    a.grad_y = (const char *)a.grad_y + bytes_of(d, t0 * a.grad_y_stride);
    a.grad_x = (char *)a.grad_x + bytes_of(d, t0 * a.grad_x_stride);
    a.grad_B = (char *)a.grad_B + bytes_of(d, t0 * a.grad_x_stride);
    a.grad_C = (char *)a.grad_C + bytes_of(d, t0 * a.grad_x_stride);
    a.grad_dt_raw = (char *)a.grad_dt_raw + bytes_of(d, t0 * a.grad_dt_stride);
    a.init_state = init;
    a.final_state = final;
    return a;
}

static void run(const struct ht_ssd_args *a, enum ht_isa isa, bool backward)
{
    struct ht_backend be = backend_make(isa, 1, 64);
    const size_t need =
        backward ? ht_ssd_backward_scratch_bytes(a) : ht_ssd_forward_scratch_bytes(a);

    ck_assert_int_eq(ht_backend_reserve_scratch(&be, need), HT_OK);
    ck_assert_int_eq(backward ? ht_ssd_backward(&be, a) : ht_ssd_forward(&be, a), HT_OK);
    ht_backend_free(&be);
}

/* Bits for fp32 and bf16 alike: a sequence's chunks do not know their neighbours. */
START_TEST(sequences_equal_separate_runs)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 40, 1, 67, 16 }, 6, 16, 24, 2, 32 };
    struct scan_case all = scan_case_make(&shape, SCAN_STATES, v.dtype, 1);
    struct scan_case one = scan_case_make(&shape, SCAN_STATES, v.dtype, 1);
    const int64_t size = shape.H * shape.P * shape.N;

    scan_case_forward(&all, v.isa, 2);
    scan_case_backward(&all, v.isa, 2);
    tensor_fill(&one.grad_dt_bias, 0.0);
    tensor_fill(&one.grad_A_log, 0.0);
    tensor_fill(&one.grad_D, 0.0);
    for (int64_t s = 0; s < 4; s++) {
        const int32_t starts[2] = { 0, (int32_t)shape.lengths[s] };
        struct ht_ssd_args a =
            window_of(&one, one.starts[s], shape.lengths[s], starts, (float *)one.init.p + s * size,
                      (float *)one.final.p + s * size);
        a.grad_final_state = (float *)one.grad_final.p + s * size;
        a.grad_init_state = (float *)one.grad_init.p + s * size;
        run(&a, v.isa, false);
        run(&a, v.isa, true);
    }
    scan_case_same_bits(&one, &all);
    scan_case_free(&all);
    scan_case_free(&one);
}
END_TEST

/* Cut at `cut`, the second part in place on the carried state. */
static void split_run(struct scan_case *k, int64_t cut, enum ht_isa isa)
{
    const int32_t first[2] = { 0, (int32_t)cut }, second[2] = { 0, (int32_t)(k->T - cut) };
    const struct ht_ssd_args a = window_of(k, 0, cut, first, k->init.p, k->final.p);
    const struct ht_ssd_args b = window_of(k, cut, k->T - cut, second, k->final.p, k->final.p);

    run(&a, isa, false);
    run(&b, isa, false);
}

START_TEST(split_anywhere_equals_whole)
{
    const struct scan_shape shape = { { 83 }, 3, 16, 24, 1, 32 };
    const enum ht_isa isa = (enum ht_isa)_i;
    struct scan_case whole = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 2);

    scan_case_reference(&whole);
    scan_case_forward(&whole, isa, 1);
    for (int64_t cut = 1; cut < whole.T; cut++) {
        struct scan_case k = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 2);
        scan_case_reference(&k);
        split_run(&k, cut, isa);
        scan_case_check_forward(&k);
        if (cut % shape.Q == 0) { // no chunk is cut: the same bits
            check_same_bits(&k.y, &whole.y, "y");
            check_same_bits(&k.final, &whole.final, "final_state");
        }
        scan_case_free(&k);
    }
    scan_case_free(&whole);
}
END_TEST

START_TEST(aligned_split_keeps_bits)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 83 }, 3, 16, 24, 1, 32 };
    struct scan_case whole = scan_case_make(&shape, SCAN_STATES, v.dtype, 2);
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, v.dtype, 2);

    scan_case_forward(&whole, v.isa, 1);
    split_run(&k, 64, v.isa);
    check_same_bits(&k.y, &whole.y, "y");
    check_same_bits(&k.final, &whole.final, "final_state");
    scan_case_free(&whole);
    scan_case_free(&k);
}
END_TEST

/* d(loss)/d(state at the cut) of the second part is the first part's grad_final_state. */
START_TEST(backward_through_a_split)
{
    const struct scan_shape shape = { { 83 }, 6, 16, 24, 2, 16 };
    const enum ht_isa isa = (enum ht_isa)_i;
    const int64_t cut = 37;
    const int32_t first[2] = { 0, (int32_t)cut }, second[2] = { 0, (int32_t)(83 - cut) };
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 3);

    scan_case_reference(&k);
    struct ht_ssd_args a = window_of(&k, 0, cut, first, k.init.p, k.final.p);
    run(&a, isa, false);
    struct ht_ssd_args b = window_of(&k, cut, k.T - cut, second, k.final.p, NULL);
    tensor_fill(&k.grad_dt_bias, 0.0);
    tensor_fill(&k.grad_A_log, 0.0);
    tensor_fill(&k.grad_D, 0.0);
    run(&b, isa, true);
    memcpy(k.grad_final.p, k.grad_init.p, (size_t)k.grad_final.n * sizeof(float));
    run(&a, isa, true);
    scan_case_check_backward(&k);
    scan_case_free(&k);
}
END_TEST

/* Prefill of n, then one step at a time, against the recurrence; slots in any order. */
START_TEST(prefill_then_steps)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 21 }, 6, 24, 40, 2, 16 };
    const enum scan_data data = _i % 3 ? SCAN_CLAMPED : SCAN_STATES;
    const int64_t n = 13;
    const int32_t first[2] = { 0, (int32_t)n };
    struct scan_case k = scan_case_make(&shape, data, v.dtype, 4);
    struct ht_backend be = backend_make(v.isa, 2, 64);

    scan_case_reference(&k);
    const struct ht_ssd_args a = window_of(&k, 0, n, first, k.init.p, k.final.p);
    run(&a, v.isa, false);
    for (int64_t t = n; t < k.T; t++) {
        const struct ht_ssd_args step = window_of(&k, t, 1, NULL, NULL, NULL);
        ck_assert_int_eq(ht_ssd_step(&be, &step, &(struct ht_ssm_states){ .p = k.final.p }, NULL),
                         HT_OK);
    }
    scan_case_check_forward(&k);
    ht_backend_free(&be);
    scan_case_free(&k);
}
END_TEST

/* Three tokens of three sequences: states 2, none, 0. Only those two change, and as a scan of one
 * token. */
START_TEST(step_uses_slots)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 1, 1, 1 }, 4, 16, 16, 1, 16 };
    const int32_t slot[3] = { 2, -1, 0 };
    const int64_t size = shape.H * shape.P * shape.N, HP = shape.H * shape.P;
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, v.dtype, 5);
    struct scan_case whole = scan_case_make(&shape, SCAN_STATES, v.dtype, 5);
    struct tensor state = tensor_copy(&k.init);
    struct ht_backend be = backend_make(v.isa, 2, 64);

    // token 0 runs on state 2, so give the scan's sequence 0 the same start
    memcpy(whole.init.d, k.init.d + 2 * size, (size_t)size * sizeof(double));
    memcpy(whole.init.d + 2 * size, k.init.d, (size_t)size * sizeof(double));
    scan_case_reference(&whole);
    ck_assert_int_eq(ht_ssd_step(&be, &k.args, &(struct ht_ssm_states){ .p = state.p }, slot),
                     HT_OK);
    for (int64_t i = 0; i < 3; i++)
        for (int64_t j = 0; j < HP; j++) {
            const double y = tensor_at(&k.y, i * k.args.y_stride + j);
            const double want = i == 1 ? 0.0 : whole.ref.y[i * HP + j];
            ck_assert_double_le(fabs(y - want),
                                1e-5 + (v.dtype == HT_DTYPE_BF16 ? fabs(want) / 256.0 : 0.0));
        }
    for (int64_t i = 0; i < size; i++) {
        const double old = tensor_at(&k.init, size + i);
        ck_assert_double_eq(tensor_at(&state, size + i), old);
        ck_assert_double_le(fabs(tensor_at(&state, i) - whole.ref.final[2 * size + i]), 1e-5);
        ck_assert_double_le(fabs(tensor_at(&state, 2 * size + i) - whole.ref.final[i]), 1e-5);
    }
    ht_backend_free(&be);
    tensor_free(&state);
    scan_case_free(&k);
    scan_case_free(&whole);
}
END_TEST

/* Rows of zeros before the prompt (spec 3.8), whatever dt is there, leave y and the state as they
 * are. */
START_TEST(left_padding_changes_nothing)
{
    const struct variant v = variant_at(_i);
    const struct scan_shape shape = { { 60 }, 4, 16, 24, 2, 16 };
    const int64_t pads = 19, n = shape.lengths[0] - pads;
    const int32_t starts[2] = { 0, (int32_t)n };
    struct scan_case padded = scan_case_make(&shape, SCAN_PLAIN, v.dtype, 6);
    struct scan_case bare = scan_case_make(&shape, SCAN_PLAIN, v.dtype, 6);

    memset(padded.rows.p, 0, bytes_of(v.dtype, pads * padded.width));
    const struct ht_ssd_args a = window_of(&bare, pads, n, starts, NULL, bare.final.p);
    scan_case_forward(&padded, v.isa, 1);
    run(&a, v.isa, false);
    // bf16: chunks are cut elsewhere, so operands round differently; y is rounded to 2^-9 anyway
    const double slack = v.dtype == HT_DTYPE_BF16 ? 0.02 : 1e-5;
    double largest = 0.0;
    for (int64_t i = 0; i < padded.y.n; i++) largest = fmax(largest, fabs(tensor_at(&padded.y, i)));
    for (int64_t t = 0; t < shape.lengths[0]; t++)
        for (int64_t j = 0; j < shape.H * shape.P; j++) {
            const double p = tensor_at(&padded.y, t * padded.args.y_stride + j);
            const double b = t < pads ? 0.0 : tensor_at(&bare.y, t * bare.args.y_stride + j);
            ck_assert_double_le(fabs(p - b), t < pads ? 0.0 : slack * largest);
        }
    for (int64_t i = 0; i < padded.final.n; i++)
        ck_assert_double_le(fabs(tensor_at(&padded.final, i) - tensor_at(&bare.final, i)), slack);
    scan_case_free(&padded);
    scan_case_free(&bare);
}
END_TEST

/* More chunks than one segment of states holds: the wide state makes segments of few chunks. */
START_TEST(long_sequence_in_segments)
{
    const struct scan_shape shape = { { 530 }, 5, 256, 256, 1, 16 };
    const enum ht_dtype dtype = _i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, dtype, 7);

    k.args.seqs.starts = k.starts;
    ck_assert_int_gt(ht_ssd_segments(&k.args).n_segments, 2);
    scan_case_reference(&k);
    scan_case_backward(&k, ht_isa_best(), 1);
    scan_case_check_backward(&k);
    scan_case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ssd_split");
    TCase *c = tcase_create("property");

    tcase_add_loop_test(c, sequences_equal_separate_runs, 0, n_variants());
    tcase_add_loop_test(c, split_anywhere_equals_whole, 0, n_variants() / 2);
    tcase_add_loop_test(c, aligned_split_keeps_bits, 0, n_variants());
    tcase_add_loop_test(c, backward_through_a_split, 0, n_variants() / 2);
    tcase_add_loop_test(c, prefill_then_steps, 0, n_variants());
    tcase_add_loop_test(c, step_uses_slots, 0, n_variants());
    tcase_add_loop_test(c, left_padding_changes_nothing, 0, n_variants());
    tcase_add_loop_test(c, long_sequence_in_segments, 0, 2);
    suite_add_tcase(s, c);
    return run_suite(s);
}
