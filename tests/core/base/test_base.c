/* tests/core/base/test_base.c: conversions, generator, arena, files, messages. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/arena.h"
#include "core/base/dtype.h"
#include "core/base/file.h"
#include "core/base/isa.h"
#include "core/base/rng.h"
#include "tests/core/base/simd_probe.h"

/* Known answers of Random123 (kat_vectors, philox4x32-10). */
START_TEST(philox_known_answers)
{
    uint32_t w[4];
    ht_rng_philox(w, 0, 0, 0);
    ck_assert_uint_eq(w[0], 0x6627e8d5);
    ck_assert_uint_eq(w[1], 0xe169c58d);
    ck_assert_uint_eq(w[2], 0xbc57ac4c);
    ck_assert_uint_eq(w[3], 0x9b00dbd8);
    ht_rng_philox(w, UINT64_MAX, UINT64_MAX, UINT64_MAX);
    ck_assert_uint_eq(w[0], 0x408f276d);
    ck_assert_uint_eq(w[1], 0x41c83b0e);
    ck_assert_uint_eq(w[2], 0xa20bc7c6);
    ck_assert_uint_eq(w[3], 0x6d5451fd);
}
END_TEST

START_TEST(normal_has_mean_0_and_variance_1)
{
    double sum = 0.0, squares = 0.0;
    const int n = 100000;
    for (int i = 0; i < n; i++) {
        const double v = (double)ht_rng_normal(9, 3, (uint64_t)i);
        sum += v;
        squares += v * v;
    }
    ck_assert_double_le(fabs(sum / n), 5.0 / sqrt(n));
    ck_assert_double_le(fabs(squares / n - 1.0), 5.0 * sqrt(2.0 / n));
}
END_TEST

START_TEST(bf16_rounds_to_nearest_even)
{
    ck_assert_uint_eq(ht_f32_to_bf16(1.0f), 0x3f80);
    ck_assert_uint_eq(ht_f32_to_bf16(1.0f + 0x1p-8f), 0x3f80);            // half: to even
    ck_assert_uint_eq(ht_f32_to_bf16(1.0f + 0x1p-7f + 0x1p-8f), 0x3f82);  // half: to even
    ck_assert_uint_eq(ht_f32_to_bf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81); // above half
    ck_assert_uint_eq(ht_f32_to_bf16(INFINITY), 0x7f80);
    ck_assert(isnan(ht_bf16_to_f32(ht_f32_to_bf16(NAN))));
    for (uint32_t v = 0; v < 0x10000; v++) { // exact round trip
        const float f = ht_bf16_to_f32((ht_bf16)v);
        if (!isnan(f)) ck_assert_uint_eq(ht_f32_to_bf16(f), v);
    }
}
END_TEST

START_TEST(f16_values)
{
    ck_assert(ht_f16_to_f32(0x3c00) == 1.0f);
    ck_assert(ht_f16_to_f32(0xc000) == -2.0f);
    ck_assert(ht_f16_to_f32(0x7bff) == 65504.0f);
    ck_assert(ht_f16_to_f32(0x0001) == 0x1p-24f);
    ck_assert(ht_f16_to_f32(0x03ff) == 1023.0f * 0x1p-24f);
    ck_assert(ht_f16_to_f32(0x8000) == 0.0f && signbit(ht_f16_to_f32(0x8000)));
    ck_assert(isinf(ht_f16_to_f32(0x7c00)) && isnan(ht_f16_to_f32(0x7e00)));
}
END_TEST

/* Every level that this machine has: exp within 2e-7 where it is normal, and the promised limits;
 * bf16 as the scalar code does it. */
START_TEST(vector_functions_at_every_level)
{
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++) {
        double worst = 0.0;
        for (float x = -87.0f; x < 88.5f; x += 0.0137f) {
            const float y = ht_simd_probe((enum ht_isa)isa, HT_PROBE_EXP, x);
            worst = fmax(worst, fabs((double)y / exp((double)x) - 1.0));
        }
        ck_assert_msg(worst <= 2e-7, "%s: relative error of exp %.2e",
                      ht_isa_name((enum ht_isa)isa), worst);
        ck_assert(ht_simd_probe((enum ht_isa)isa, HT_PROBE_EXP, -INFINITY) == 0.0f);
        ck_assert(ht_simd_probe((enum ht_isa)isa, HT_PROBE_EXP, -1e30f) == 0.0f);
        ck_assert(isinf(ht_simd_probe((enum ht_isa)isa, HT_PROBE_EXP, 89.0f)));
        ck_assert(isnan(ht_simd_probe((enum ht_isa)isa, HT_PROBE_EXP, NAN)));
        ck_assert(ht_simd_probe((enum ht_isa)isa, HT_PROBE_SUM, 3.0f) > 0.0f);
        for (int i = 0; i < 20000; i++) {
            const float x = ht_rng_normal(1, 2, (uint64_t)i) * ldexpf(1.0f, i % 60 - 30);
            ck_assert(ht_simd_probe((enum ht_isa)isa, HT_PROBE_BF16, x) ==
                      ht_bf16_to_f32(ht_f32_to_bf16(x)));
        }
        ck_assert(isnan(ht_simd_probe((enum ht_isa)isa, HT_PROBE_BF16, NAN)));
    }
}
END_TEST

START_TEST(arena_aligns_counts_and_refuses)
{
    struct ht_arena a;
    void *p, *q;
    ck_assert_int_eq(ht_arena_create(&a, "test arena", 256), HT_OK);
    ck_assert_int_eq(ht_arena_take(&p, &a, 1), HT_OK);
    ck_assert_int_eq(ht_arena_take(&q, &a, 100), HT_OK);
    ck_assert_uint_eq((uintptr_t)q % 64, 0);
    ck_assert_int_eq((char *)q - (char *)p, 64);
    ck_assert_int_eq(ht_arena_take(&p, &a, 65), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "test arena"));
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "64 of 256"));
    ht_arena_reset(&a, 0);
    ck_assert_int_eq(ht_arena_take(&p, &a, 256), HT_OK);
    ck_assert_uint_eq(a.peak_bytes, 256);
    ht_arena_free(&a);
    ht_arena_free(&a);
    ck_assert_int_eq(ht_arena_create(&a, "too large", (size_t)1 << 62), HT_ERR_MEMORY);
}
END_TEST

START_TEST(published_files_are_whole_or_absent)
{
    char dir[] = "/tmp/ht_base_XXXXXX", path[256], *text;
    size_t n;
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(path, sizeof path, "%s/a/b/c", dir);
    ck_assert_int_eq(ht_file_make_dirs(path), HT_OK);
    ck_assert_int_eq(ht_file_make_dirs(path), HT_OK);
    snprintf(path, sizeof path, "%s/a/b/file", dir);
    ck_assert_int_eq(ht_file_publish(path, "one", 3), HT_OK);
    ck_assert_int_eq(ht_file_publish(path, "second", 6), HT_OK);
    ck_assert_int_eq(ht_file_read(&text, &n, path, 100), HT_OK);
    ck_assert_uint_eq(n, 6);
    ck_assert_str_eq(text, "second");
    free(text);
    ck_assert_int_eq(ht_file_read(&text, &n, path, 5), HT_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "6 bytes"));
    ck_assert_int_eq(ht_file_read(&text, &n, dir, 5), HT_ERR_IO);
    snprintf(path, sizeof path, "%s/fifo", dir);
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    ck_assert_int_eq(ht_file_read(&text, &n, path, 5), HT_ERR_IO); // refused, not waited for
    snprintf(path, sizeof path, "%s/missing/file", dir);
    ck_assert_int_eq(ht_file_publish(path, "x", 1), HT_ERR_IO);
    uint64_t free_bytes;
    ck_assert_int_eq(ht_file_free_bytes(&free_bytes, path), HT_OK); // climbs to what exists
    ck_assert_uint_gt(free_bytes, 0);
    ck_assert_int_eq(ht_file_remove_tree(dir), HT_OK);
    ck_assert(!ht_file_exists(dir));
    ck_assert_int_eq(ht_file_remove_tree(dir), HT_OK);
}
END_TEST

START_TEST(messages_and_exit_codes)
{
    ck_assert_int_eq(HT_FAIL(HT_ERR_IO, "%s: gone", "x"), HT_ERR_IO);
    ck_assert_int_eq(ht_fail_while(HT_ERR_IO, "reading %d", 7), HT_ERR_IO);
    ck_assert_str_eq(ht_error_message(), "x: gone, while reading 7");
    ck_assert_int_eq(ht_exit_code(HT_OK), 0);
    ck_assert_int_eq(ht_exit_code(HT_ERR_RECIPE), 2);
    ck_assert_int_eq(ht_exit_code(HT_ERR_FORMAT), 3);
    ck_assert_int_eq(ht_exit_code(HT_ERR_CHECKPOINT), 4);
    ck_assert_int_eq(ht_exit_code(HT_ERR_MEMORY), 5);
    ck_assert_int_eq(ht_exit_code(HT_ERR_COMM), 6);
    ck_assert_int_eq(ht_exit_code(HT_ERR_NUMERIC), 7);
    ck_assert_int_eq(ht_exit_code(HT_ERR_STOPPED), 75);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base");
    TCase *c = tcase_create("base");
    SRunner *r = srunner_create(s);

    suite_add_tcase(s, c);
    tcase_add_test(c, philox_known_answers);
    tcase_add_test(c, normal_has_mean_0_and_variance_1);
    tcase_add_test(c, bf16_rounds_to_nearest_even);
    tcase_add_test(c, f16_values);
    tcase_add_test(c, vector_functions_at_every_level);
    tcase_add_test(c, arena_aligns_counts_and_refuses);
    tcase_add_test(c, published_files_are_whole_or_absent);
    tcase_add_test(c, messages_and_exit_codes);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
