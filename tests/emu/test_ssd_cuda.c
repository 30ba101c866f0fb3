/* tests/emu/test_ssd_cuda.c: the CUDA scan against the fp64 recurrence and the CPU backend: ragged
 * lengths, packing, groups, initial states, all tile shapes, segments, rounds of heads. */
#include <math.h>
#include <string.h>

#include "core/base/cuda_device.h"
#include "ssm/ssd_cuda_layout.h"
#include "ssm/state_round.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ssm/scan_case.h"

// one token; one chunk; ragged chunks; head pairs that do not come out even; widths that are no
// multiple of 16; groups; several sequences; one head per group; segments of 256 tokens (few heads,
// many tokens); d_state and d_head beyond one tile
static const struct {
    struct scan_shape shape;
    enum scan_data data;
} scans[] = {
    { { { 1 }, 1, 8, 8, 1, 16 }, SCAN_PLAIN },
    { { { 3 }, 2, 16, 16, 1, 64 }, SCAN_STATES },
    { { { 67 }, 3, 64, 128, 1, 64 }, SCAN_STATES },
    { { { 131 }, 6, 24, 40, 2, 16 }, SCAN_STATES },
    { { { 1, 64, 3, 100, 17 }, 5, 8, 24, 1, 16 }, SCAN_STATES },
    { { { 33, 2, 65 }, 4, 16, 8, 4, 32 }, SCAN_CLAMPED },
    { { { 600 }, 2, 16, 16, 1, 64 }, SCAN_STATES },
    { { { 300, 5, 520 }, 1, 8, 16, 1, 64 }, SCAN_STATES },
    { { { 150 }, 4, 16, 16, 2, 128 }, SCAN_EXTREME },
    { { { 260 }, 1, 16, 32, 1, 256 }, SCAN_REMEMBERS },
    { { { 70 }, 2, 72, 136, 1, 64 }, SCAN_STATES },
    { { { 20, 66 }, 1, 136, 200, 1, 64 }, SCAN_STATES },
};
enum { N_SCANS = sizeof scans / sizeof *scans };

static enum ht_dtype dtype_of(int i)
{
    return i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
}

/* Device copies of everything, results too, so that what is not written keeps its guard bytes. */
static struct ht_ssd_args to_device(struct ht_backend *be, const struct scan_case *k)
{
    const int64_t HP = k->shape.H * k->shape.P, GN = k->shape.G * k->shape.N;
    const size_t e = ht_dtype_bytes(k->rows.dtype);
    struct ht_ssd_args a = k->args;
    char *rows = to_gpu(be, &k->rows), *grad_rows = to_gpu(be, &k->grad_rows);

    a.seqs.starts = gpu_put(be, k->starts, sizeof k->starts);
    a.x = rows;
    a.B = rows + (size_t)HP * e;
    a.C = rows + (size_t)(HP + GN) * e;
    a.dt_raw = to_gpu(be, &k->dt_raw);
    a.dt_bias = to_gpu(be, &k->dt_bias);
    a.A_log = to_gpu(be, &k->A_log);
    a.D = to_gpu(be, &k->D);
    a.y = to_gpu(be, &k->y);
    a.init_state = a.init_state ? to_gpu(be, &k->init) : NULL;
    a.final_state = to_gpu(be, &k->final);
    a.grad_y = to_gpu(be, &k->grad_y);
    a.grad_x = grad_rows;
    a.grad_B = grad_rows + (size_t)HP * e;
    a.grad_C = grad_rows + (size_t)(HP + GN) * e;
    a.grad_dt_raw = to_gpu(be, &k->grad_dt_raw);
    a.grad_dt_bias = to_gpu(be, &k->grad_dt_bias);
    a.grad_A_log = to_gpu(be, &k->grad_A_log);
    a.grad_D = to_gpu(be, &k->grad_D);
    a.grad_final_state = a.grad_final_state ? to_gpu(be, &k->grad_final) : NULL;
    a.grad_init_state = to_gpu(be, &k->grad_init);
    return a;
}

static void from_device(struct ht_backend *be, struct scan_case *k, const struct ht_ssd_args *a)
{
    from_gpu(be, &k->y, a->y);
    from_gpu(be, &k->final, a->final_state);
    from_gpu(be, &k->grad_rows, a->grad_x);
    from_gpu(be, &k->grad_dt_raw, a->grad_dt_raw);
    from_gpu(be, &k->grad_dt_bias, a->grad_dt_bias);
    from_gpu(be, &k->grad_A_log, a->grad_A_log);
    from_gpu(be, &k->grad_D, a->grad_D);
    from_gpu(be, &k->grad_init, a->grad_init_state);
}

/* Forward, and backward with `scratch` bytes (0: what is promised to suffice). */
static void run(struct scan_case *k, bool backward, size_t scratch)
{
    struct ht_backend be;
    const size_t forward_bytes = ht_ssd_forward_scratch_bytes_cuda(&k->args);
    const size_t backward_bytes = ht_ssd_backward_scratch_bytes_cuda(&k->args);

    tensor_fill(&k->grad_dt_bias, 0.0);
    tensor_fill(&k->grad_A_log, 0.0);
    tensor_fill(&k->grad_D, 0.0);
    gpu_start(&be, forward_bytes);
    const struct ht_ssd_args a = to_device(&be, k);
    gpu_ok(ht_ssd_forward(&be, &a));
    if (backward) {
        gpu_ok(ht_backend_synchronize(&be));
        gpu_ok(ht_backend_reserve_scratch(&be, scratch ? scratch : backward_bytes));
        gpu_ok(ht_ssd_backward(&be, &a));
    }
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    from_device(&be, k, &a);
    gpu_end(&be);
}

START_TEST(matches_the_recurrence)
{
    struct scan_case k = scan_case_make(&scans[_i % N_SCANS].shape, scans[_i % N_SCANS].data,
                                        dtype_of(_i / N_SCANS), 1);

    scan_case_reference(&k);
    run(&k, true, 0);
    scan_case_check_forward(&k);
    scan_case_check_backward_of(&k, scans[_i % N_SCANS].data);
    scan_case_free(&k);
}
END_TEST

/* Over the CPU backend's results, in fp32: the tolerance between two chunk lengths there. */
START_TEST(equals_the_cpu)
{
    static const struct scan_shape shape = { { 300, 5, 64 }, 4, 16, 24, 2, 64 };
    struct scan_case a = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 4);
    struct scan_case b = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 4);

    run(&a, true, 0);
    scan_case_forward(&b, ht_isa_best(), 1);
    scan_case_backward(&b, ht_isa_best(), 1);
    scan_case_close(&a, &b);
    scan_case_free(&a);
    scan_case_free(&b);
}
END_TEST

/* Twice the same bits; and with scratch for one block of heads at a time. */
START_TEST(bits_do_not_depend_on_run_or_rounds)
{
    static const struct scan_shape shape = { { 130, 70 }, 7, 16, 24, 1, 64 };
    const enum ht_dtype dtype = dtype_of(_i);
    struct scan_case k[3];

    for (int i = 0; i < 3; i++) {
        k[i] = scan_case_make(&shape, SCAN_STATES, dtype, 2);
        const size_t one =
            ht_ssd_cuda_shared_bytes(&k[i].args) + ht_ssd_cuda_round_bytes(&k[i].args, 1);
        ck_assert_int_gt(ht_ssd_cuda_backward_blocks(&k[i].args).per_group, 1);
        run(&k[i], true, i == 2 ? one : 0);
    }
    scan_case_same_bits(&k[0], &k[1]);
    scan_case_same_bits(&k[0], &k[2]);
    for (int i = 0; i < 3; i++) scan_case_free(&k[i]);
}
END_TEST

/* Devices with 99 KiB of shared memory per block hold one chunk at a time: the same bits. What does
 * not fit at all is refused. */
START_TEST(small_shared_memory)
{
    static const struct scan_shape shapes[] = { { { 140 }, 3, 16, 72, 1, 64 },
                                                { { 70 }, 2, 16, 136, 1, 64 },
                                                { { 70 }, 2, 16, 24, 1, 64 } };
    const enum ht_dtype dtype = dtype_of(_i);

    for (int i = 0; i < 3; i++) {
        struct scan_case k = scan_case_make(&shapes[i], SCAN_STATES, dtype, 5);
        struct scan_case small = scan_case_make(&shapes[i], SCAN_STATES, dtype, 5);
        struct ht_backend be;

        run(&k, true, 0);
        tensor_fill(&small.grad_dt_bias, 0.0);
        tensor_fill(&small.grad_A_log, 0.0);
        tensor_fill(&small.grad_D, 0.0);
        gpu_start(&be, ht_ssd_backward_scratch_bytes_cuda(&small.args));
        const struct ht_ssd_args a = to_device(&be, &small);
        ht_cuda_device_of(&be)->smem_block_max = 99 * 1024;
        if (dtype == HT_DTYPE_F32 && i == 1) { // tiles of d_state 256 in fp32
            ck_assert_int_eq(ht_ssd_forward(&be, &a), HT_ERR_UNSUPPORTED);
            ck_assert_ptr_nonnull(strstr(ht_error_message(), "bytes of shared memory"));
        } else {
            gpu_ok(ht_ssd_forward(&be, &a));
            if (dtype == HT_DTYPE_BF16) gpu_ok(ht_ssd_backward(&be, &a));
            if (dtype == HT_DTYPE_F32)
                ck_assert_int_eq(ht_ssd_backward(&be, &a), HT_ERR_UNSUPPORTED);
            from_device(&be, &small, &a);
            check_same_bits(&k.y, &small.y, "y");
            check_same_bits(&k.final, &small.final, "final_state");
            if (dtype == HT_DTYPE_BF16) scan_case_same_bits(&k, &small);
        }
        gpu_end(&be);
        scan_case_free(&k);
        scan_case_free(&small);
    }
}
END_TEST

/* Tokens with da near -1e5 and no input empty the state; what follows must be remembered to the
 * last digit, which differences of running sums of da would have lost. */
START_TEST(memory_is_exact_after_a_reset)
{
    const enum ht_dtype dtype = dtype_of(_i);
    const struct scan_shape shape = { { 200 }, 3, 16, 16, 1, 128 };
    struct scan_case k = scan_case_make(&shape, SCAN_REMEMBERS, dtype, 8);
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
            ht_store_f32(k.rows.p, t * k.width + j, dtype, 0.0f);
            x[t * HP + j] = 0.0;
        }
        for (int64_t h = 0; h < shape.H; h++) {
            ht_store_f32(k.dt_raw.p, t * k.args.dt_stride + h, dtype, 9984.0f); // exact in bf16
            dt_raw[t * shape.H + h] = 9984.0;
        }
    }
    scan_case_reference(&k);
    run(&k, false, 0);
    scan_case_check_forward(&k);
    scan_case_free(&k);
}
END_TEST

/* A NaN in dt_raw must come out, not vanish in the clamp, and not reach tokens before it. */
START_TEST(nan_is_not_hidden)
{
    const enum ht_dtype dtype = dtype_of(_i);
    const struct scan_shape shape = { { 80 }, 2, 16, 16, 1, 16 };
    struct scan_case k = scan_case_make(&shape, SCAN_CLAMPED, dtype, 6);

    ht_store_f32(k.dt_raw.p, 20 * k.args.dt_stride + 1, dtype, NAN);
    run(&k, false, 0);
    ck_assert(isnan(tensor_at(&k.y, 20 * k.args.y_stride + 16)));
    ck_assert(isnan(tensor_at(&k.y, 79 * k.args.y_stride + 16)));
    ck_assert(!isnan(tensor_at(&k.y, 19 * k.args.y_stride + 16)));
    ck_assert(!isnan(tensor_at(&k.y, 79 * k.args.y_stride)));
    scan_case_free(&k);
}
END_TEST

/* final_state over init_state, and a second call that goes on from there: as one long sequence. */
START_TEST(pieces_equal_whole)
{
    const struct scan_shape shape = { { 500 }, 2, 16, 24, 1, 64 };
    struct scan_case whole = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 3);
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_F32, 3);
    static const int32_t pieces[] = { 300, 1, 64, 135 };
    struct ht_backend be;

    run(&whole, false, 0);
    for (int i = 0; i < 3; i++)
        tensor_fill((struct tensor *[]){ &k.grad_dt_bias, &k.grad_A_log, &k.grad_D }[i], 0.0);
    gpu_start(&be, ht_ssd_forward_scratch_bytes_cuda(&k.args));
    struct ht_ssd_args a = to_device(&be, &k);
    a.final_state = (float *)(uintptr_t)a.init_state;
    const struct ht_ssd_args first = a;
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        const int32_t starts[2] = { 0, pieces[i] };
        a.seqs.starts = gpu_put(&be, starts, sizeof starts);
        a.n_tokens = pieces[i];
        gpu_ok(ht_ssd_forward(&be, &a));
        a.x = (const float *)a.x + pieces[i] * a.x_stride;
        a.B = (const float *)a.B + pieces[i] * a.x_stride;
        a.C = (const float *)a.C + pieces[i] * a.x_stride;
        a.dt_raw = (const float *)a.dt_raw + pieces[i] * a.dt_stride;
        a.y = (float *)a.y + pieces[i] * a.y_stride;
    }
    from_device(&be, &k, &first);
    gpu_end(&be);
    scan_case_close(&k, &whole);
    scan_case_free(&k);
    scan_case_free(&whole);
}
END_TEST

/* Sequences of one token are decode steps: states in permuted slots, with a padding row between. */
START_TEST(step_is_one_token_of_the_scan)
{
    static const struct scan_shape shapes[] = {
        { { 1, 1, 1, 1, 1 }, 3, 8, 8, 1, 64 },
        { { 1, 1, 1 }, 4, 64, 128, 2, 64 },
        { { 1, 1 }, 2, 24, 200, 2, 64 },
    };
    const struct scan_shape *shape = &shapes[_i % 3];
    struct scan_case k = scan_case_make(shape, SCAN_CLAMPED, dtype_of(_i / 3), 9);
    const int64_t state = shape->H * shape->P * shape->N;
    struct tensor states = tensor_normal(8 * state, HT_DTYPE_F32, 1.0, 1);
    struct tensor before = tensor_copy(&states);
    int32_t slot[8];
    struct ht_backend be;

    for (int i = 0; i < k.T; i++) {
        slot[i] = (3 * i + 1) % 8;
        memcpy((float *)states.p + slot[i] * state, (const float *)k.init.p + i * state,
               (size_t)state * sizeof(float));
    }
    gpu_start(&be, 0);
    const struct ht_ssd_args a = to_device(&be, &k);
    float *on_device = to_gpu(&be, &states);
    gpu_ok(ht_ssd_step(&be, &a, &(struct ht_ssm_states){ .p = on_device },
                       gpu_put(&be, slot, sizeof slot)));
    from_device(&be, &k, &a);
    from_gpu(&be, &states, on_device);
    for (int i = 0; i < k.T; i++)
        memcpy((float *)k.final.p + i * state, (float *)states.p + slot[i] * state,
               (size_t)state * sizeof(float));
    scan_case_reference(&k);
    scan_case_check_forward(&k);
    for (int s = 0; s < 8; s++) {
        bool used = false;
        for (int i = 0; i < k.T; i++) used |= slot[i] == s;
        if (!used)
            ck_assert_mem_eq((float *)states.p + s * state, (float *)before.p + s * state,
                             (size_t)state * sizeof(float));
    }

    for (int i = 0; i < k.T; i++) slot[i] = -1; // padding rows only
    gpu_ok(ht_ssd_step(&be, &a, &(struct ht_ssm_states){ .p = on_device },
                       gpu_put(&be, slot, sizeof slot)));
    from_gpu(&be, &before, on_device);
    check_same_bits(&before, &states, "states of a padded batch");
    from_gpu(&be, &k.y, a.y);
    for (int64_t i = 0; i < k.T; i++)
        for (int64_t j = 0; j < shape->H * shape->P; j++)
            ck_assert_double_eq(tensor_at(&k.y, i * k.args.y_stride + j), 0.0);
    gpu_end(&be);
    tensor_free(&states);
    tensor_free(&before);
    scan_case_free(&k);
}
END_TEST

/* A step with decay 1 on states of zero: x B exactly, rounded as the formula says, wherever the
 * state stands; and a whole state there and back. */
START_TEST(states_in_bf16_round_as_on_the_cpu)
{
    const struct scan_shape shape = { { 1, 1, 1 }, 3, 24, 136, 1, 64 };
    const int64_t size = shape.H * shape.P * shape.N, HP = shape.H * shape.P;
    static const int32_t slot[3] = { 2, -1, 0 };
    static const int64_t position[3] = { 70000, 1, 3 };
    struct scan_case k = scan_case_make(&shape, SCAN_PLAIN, dtype_of(_i), 12);
    struct tensor states = tensor_make(3 * size, HT_DTYPE_BF16);
    struct tensor whole = tensor_normal(size, HT_DTYPE_F32, 1.0, 5);
    struct ht_backend be;

    memset(states.p, 0, (size_t)(3 * size) * sizeof(ht_bf16));
    for (int64_t h = 0; h < shape.H; h++) ((float *)k.A_log.p)[h] = -INFINITY;
    k.args.dt_min = k.args.dt_max = 1.0f;
    gpu_start(&be, 0);
    const struct ht_ssd_args a = to_device(&be, &k);
    const struct ht_ssm_states s = { .p = to_gpu(&be, &states),
                                     .dtype = HT_DTYPE_BF16,
                                     .stream = 4,
                                     .position = gpu_put(&be, position, sizeof position),
                                     .first_position = 17 };
    gpu_ok(ht_ssd_step(&be, &a, &s, gpu_put(&be, slot, sizeof slot)));
    from_gpu(&be, &states, s.p);
    const ht_bf16 *got = states.p;
    for (int i = 0; i < 3; i++)
        for (int64_t e = 0; e < size && slot[i] >= 0; e++) {
            const float x = ht_load_f32(k.rows.p, i * k.width + e / shape.N, dtype_of(_i));
            const float B = ht_load_f32(k.rows.p, i * k.width + HP + e % shape.N, dtype_of(_i));
            const float v = x * B;
            uint32_t bits;
            memcpy(&bits, &v, sizeof bits);
            ck_assert_uint_eq(
                got[slot[i] * size + e],
                ht_state_bf16(bits, ht_state_noise(ht_state_key(4, position[i]), (uint32_t)e)));
        }
    for (int64_t e = 0; e < size; e++) ck_assert_uint_eq(got[size + e], 0);

    float *on_device = to_gpu(&be, &whole);
    gpu_ok(ht_ssm_state_store(&be, &s, 1, size, on_device));
    from_gpu(&be, &states, s.p);
    for (int64_t e = 0; e < size; e++) {
        uint32_t bits;
        memcpy(&bits, (const float *)whole.p + e, sizeof bits);
        ck_assert_uint_eq(got[size + e],
                          ht_state_bf16(bits, ht_state_noise(ht_state_key(4, 17), (uint32_t)e)));
    }
    gpu_ok(ht_ssm_state_load(&be, on_device, &s, 1, size));
    from_gpu(&be, &whole, on_device);
    for (int64_t e = 0; e < size; e++)
        ck_assert(((const float *)whole.p)[e] == ht_bf16_to_f32(got[size + e]));
    gpu_end(&be);
    tensor_free(&states);
    tensor_free(&whole);
    scan_case_free(&k);
}
END_TEST

START_TEST(refusals_name_the_cause)
{
    static const struct scan_shape shape = { { 67, 20 }, 2, 16, 16, 1, 64 };
    struct scan_case k = scan_case_make(&shape, SCAN_STATES, HT_DTYPE_BF16, 7);
    struct ht_backend be;

    gpu_start(&be, 64);
    struct ht_ssd_args a = to_device(&be, &k);
    ck_assert_int_eq(ht_ssd_backward(&be, &a), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "scratch"));
    a.x = (const char *)a.x + 2;
    ck_assert_int_eq(ht_ssd_forward(&be, &a), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "multiples of 16 bytes"));
    ck_assert_int_eq(ht_ssd_backward(&be, &a), HT_ERR_ARG);
    a.seqs.n_seqs = a.n_tokens + 1;
    ck_assert_int_eq(ht_ssd_forward(&be, &a), HT_ERR_ARG);
    gpu_ok(ht_backend_synchronize(&be));
    gpu_end(&be);
    scan_case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ssd_cuda");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_the_recurrence, 0, 2 * N_SCANS);
    tcase_add_test(reference, equals_the_cpu);
    tcase_add_loop_test(reference, step_is_one_token_of_the_scan, 0, 6);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, bits_do_not_depend_on_run_or_rounds, 0, 2);
    tcase_add_loop_test(property, small_shared_memory, 0, 2);
    tcase_add_loop_test(property, memory_is_exact_after_a_reset, 0, 2);
    tcase_add_loop_test(property, nan_is_not_hidden, 0, 2);
    tcase_add_test(property, pieces_equal_whole);
    tcase_add_loop_test(property, states_in_bf16_round_as_on_the_cpu, 0, 2);
    tcase_add_test(property, refusals_name_the_cause);
    suite_add_tcase(s, property);
    return gpu_run_suite(s);
}
