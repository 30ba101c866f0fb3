/* tests/ssm/test_state_round.c: SSM states in bf16 round stochastically, the same way everywhere.
 */
#include "ssm/state_round.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ssm/scan_case.h"

enum { H = 3, P = 16, N = 40, SIZE = H * P * N, SLOTS = 4 };

/* One token per sequence on slots in any order, with decay 1 and dt 1: S + x B, in fp32 exactly
 * what its arguments say when S is zero. */
struct exact {
    float dt_raw[SLOTS][H], y[SLOTS][H * P];
    float rows[SLOTS][H * P + 2 * N];
    float dt_bias[H], A_log[H], D[H];
    ht_bf16 states[SLOTS][SIZE];
    struct ht_ssd_args args;
};

static struct exact *exact_make(float scale)
{
    struct exact *k = calloc(1, sizeof *k);

    for (int i = 0; i < SLOTS; i++) {
        for (int j = 0; j < H * P; j++)
            k->rows[i][j] = scale * (1.0f + (float)((i * 31 + j * 7) % 61) / 64.0f);
        for (int j = 0; j < N; j++)
            k->rows[i][H * P + j] = 1.0f + (float)((i * 17 + j * 5) % 53) / 64.0f;
    }
    for (int h = 0; h < H; h++) k->A_log[h] = -INFINITY;
    k->args = (struct ht_ssd_args){ .n_tokens = SLOTS,
                                    .n_heads = H,
                                    .d_head = P,
                                    .d_state = N,
                                    .n_groups = 1,
                                    .chunk = 16,
                                    .dt_min = 1.0f,
                                    .dt_max = 1.0f,
                                    .x = k->rows,
                                    .B = k->rows[0] + H * P,
                                    .C = k->rows[0] + H * P + N,
                                    .x_stride = H * P + 2 * N,
                                    .dt_raw = k->dt_raw,
                                    .dt_stride = H,
                                    .dt_bias = k->dt_bias,
                                    .A_log = k->A_log,
                                    .D = k->D,
                                    .y = k->y,
                                    .y_stride = H * P };
    return k;
}

START_TEST(every_level_rounds_as_the_formula)
{
    static const int32_t slot[SLOTS] = { 2, 0, 3, 1 };
    static const int64_t position[SLOTS] = { 0, 5, 5, (int64_t)1 << 20 };
    struct exact *k = exact_make(1.0f);
    int up = 0, down = 0;

    for (int isa = 0; isa <= (int)ht_isa_best(); isa++) {
        struct ht_backend be = backend_make((enum ht_isa)isa, 2, 64);
        const struct ht_ssm_states states = {
            .p = k->states, .dtype = HT_DTYPE_BF16, .stream = 7, .position = position
        };
        memset(k->states, 0, sizeof k->states);
        ck_assert_int_eq(ht_ssd_step(&be, &k->args, &states, slot), HT_OK);
        for (int i = 0; i < SLOTS; i++)
            for (int e = 0; e < SIZE; e++) {
                const float s = k->rows[i][e / N] * k->rows[i][H * P + e % N];
                uint32_t bits;
                memcpy(&bits, &s, sizeof bits);
                const uint32_t want =
                    ht_state_bf16(bits, ht_state_noise(ht_state_key(7, position[i]), (uint32_t)e));
                ck_assert_uint_eq(k->states[slot[i]][e], want);
                up += want << 16 > bits;
                down += want << 16 < bits;
            }
        ht_backend_free(&be);
    }
    ck_assert_int_gt(up, 100);
    ck_assert_int_gt(down, 100);
    free(k);
}
END_TEST

/* 4,096 steps of 2^-12 on a state of 1, each far below half a unit in the last place (2^-9). */
START_TEST(small_terms_are_not_lost)
{
    struct exact *k = exact_make(0.0f);
    struct ht_backend be = backend_make(ht_isa_best(), 2, 64);
    const ht_bf16 one = ht_f32_to_bf16(1.0f);
    double sum = 0.0;

    for (int i = 0; i < SLOTS; i++) {
        for (int j = 0; j < H * P; j++) k->rows[i][j] = 0x1p-12f;
        for (int j = 0; j < N; j++) k->rows[i][H * P + j] = 1.0f;
        for (int e = 0; e < SIZE; e++) k->states[i][e] = one;
    }
    ck_assert_uint_eq(ht_f32_to_bf16(1.0f + 0x1p-12f), one); // to nearest it would stay 1 for ever
    for (int64_t t = 0; t < 4096; t++) {
        const int64_t position[SLOTS] = { t, t + 5000, t + 10000, t + 15000 };
        const struct ht_ssm_states states = {
            .p = k->states, .dtype = HT_DTYPE_BF16, .stream = 1, .position = position
        };
        ck_assert_int_eq(ht_ssd_step(&be, &k->args, &states, NULL), HT_OK);
    }
    for (int i = 0; i < SLOTS; i++)
        for (int e = 0; e < SIZE; e++) {
            const double s = (double)ht_bf16_to_f32(k->states[i][e]);
            ck_assert_double_gt(s, 1.5); // a walk of standard deviation 0.09 around 2
            ck_assert_double_lt(s, 2.5);
            sum += s;
        }
    ck_assert_double_le(fabs(sum / (SLOTS * SIZE) - 2.0), 0.005);
    ht_backend_free(&be);
    free(k);
}
END_TEST

START_TEST(loaded_and_stored)
{
    struct ht_backend be = backend_make(ht_isa_best(), 2, 64);
    const ht_bf16 canary = 0x1234;
    float whole[SIZE], back[SIZE];
    ht_bf16 states[3][SIZE];
    float plain[3][SIZE];

    for (int i = 0; i < SIZE; i++) whole[i] = sinf((float)i) * expf((float)(i % 40) - 20.0f);
    whole[0] = INFINITY, whole[1] = -INFINITY, whole[2] = NAN, whole[3] = 0.0f, whole[4] = -0.0f;
    for (int i = 0; i < SIZE; i++) states[0][i] = states[2][i] = canary;
    const struct ht_ssm_states s = {
        .p = states, .dtype = HT_DTYPE_BF16, .stream = 3, .first_position = 99
    };
    ck_assert_int_eq(ht_ssm_state_store(&be, &s, 1, SIZE, whole), HT_OK);
    ck_assert_int_eq(ht_ssm_state_load(&be, back, &s, 1, SIZE), HT_OK);
    for (int i = 0; i < SIZE; i++) {
        ck_assert_uint_eq(states[0][i], canary);
        ck_assert_uint_eq(states[2][i], canary);
        if (isnan(whole[i])) {
            ck_assert(isnan(back[i]));
        } else if (isinf(whole[i])) {
            ck_assert(back[i] == whole[i]);
        } else { // to one of the two neighbours
            ck_assert_float_le(fabsf(back[i] - whole[i]), fabsf(whole[i]) * 0x1p-7f);
        }
    }
    const struct ht_ssm_states f = { .p = plain, .dtype = HT_DTYPE_F32 };
    ck_assert_int_eq(ht_ssm_state_store(&be, &f, 2, SIZE, whole), HT_OK);
    ck_assert_int_eq(ht_ssm_state_load(&be, back, &f, 2, SIZE), HT_OK);
    ck_assert_mem_eq(back, whole, sizeof back);
    const struct ht_ssm_states wrong = { .p = states, .dtype = HT_DTYPE_F16 };
    ck_assert_int_eq(ht_ssm_state_load(&be, back, &wrong, 0, SIZE), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "states are fp16"));
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("state_round");
    TCase *t = tcase_create("all");

    tcase_set_timeout(t, 120);
    tcase_add_test(t, every_level_rounds_as_the_formula);
    tcase_add_test(t, small_terms_are_not_lost);
    tcase_add_test(t, loaded_and_stored);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
