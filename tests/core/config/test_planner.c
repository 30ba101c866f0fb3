/* tests/core/config/test_planner.c: FLOPs of spec 7, bytes, what does not fit and what to change.
 */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/isa.h"
#include "core/config/linears.h"
#include "core/config/planner.h"
#include "tests/core/config/config_case.h"

static struct ht_config c;

static void load(const char *recipe, int n, char *const *overrides, int n_ranks)
{
    char path[512];

    snprintf(path, sizeof path, "%s/recipes/%s.cfg", HT_SOURCE_DIR, recipe);
    ck_assert_msg(ht_recipe_load(&c, NULL, path, n, overrides, n_ranks) == HT_OK, "%s",
                  ht_error_message());
}

/* To the digits that the specification gives. */
START_TEST(flops_are_the_specifications)
{
    if (published[_i].forward_4096 == 0) return;
    case_config(&c, published[_i].model);
    ck_assert_double_eq_tol(ht_flops_forward(&c.model, 4096), published[_i].forward_4096, 5e6);
}
END_TEST

START_TEST(flops_of_bamba_by_part_and_length)
{
    case_config(&c, published[0].model);
    const double at_0 = ht_flops_forward(&c.model, 0);
    const double mamba = 29.0 * (2 * 4 * 8448 + 4.0 * 128 * 64 * 128 + 257.0 * (128 + 128 * 64) +
                                 2.0 * 128 * 64 * 128 / 256);

    ck_assert_double_eq_tol(at_0 - mamba, 2.0 * 9253158912, 1.0); // matmul parameters
    ck_assert_double_eq_tol(ht_flops_forward(&c.model, 32768) - at_0, 3 * 2.0 * 32768 * 4096, 1.0);
    ck_assert_double_eq_tol(3.0 * ht_flops_forward(&c.model, 4096), 56.4e9, 5e7);
    ck_assert_double_eq_tol(3.0 * ht_flops_forward(&c.model, 32768), 58.5e9, 5e7);
    ck_assert_double_eq_tol(3.0 * ht_flops_forward(&c.model, 131072), 65.7e9, 5e7);
}
END_TEST

START_TEST(bytes_follow_the_sizes)
{
    struct ht_tensor_list l;
    struct ht_plan p;

    load("quickstart", 0, NULL, 1);
    ck_assert_int_eq(ht_tensor_list_create(&l, &c.model, c.optimizer.decay), HT_OK);
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, "cpu", 1000, 500), HT_OK);
    ck_assert_int_eq(p.n_params, l.n_params);
    ck_assert_int_eq(p.bytes.weights, 2 * l.n_matrix + 4 * (l.n_total - l.n_matrix));
    ck_assert_int_eq(p.bytes.gradients, 4 * l.n_total);
    ck_assert_int_eq(p.bytes.optimizer, 12 * l.n_total);
    ck_assert_int_eq(p.bytes.activations, 1000);
    ck_assert_int_eq(p.bytes.scratch, 500);
    ck_assert_int_ge(p.bytes.buffers, 12 * l.n_total); // the snapshot of a checkpoint
    ck_assert_int_eq(p.bytes.total, p.bytes.weights + p.bytes.gradients + p.bytes.optimizer + 1500 +
                                        p.bytes.buffers + p.bytes.program);
    const int64_t buffers = p.bytes.buffers;
    c.checkpoint.background = false;
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, "cpu", 1000, 500), HT_OK);
    ck_assert_int_eq(p.bytes.buffers, buffers - 12 * l.n_total);
    ck_assert_int_eq(ht_plan_make(&p, &c, 2, "cpu", 1000, 500), HT_OK); // ZeRO-1
    ck_assert_int_eq(p.bytes.optimizer, 6 * l.n_total);
    ck_assert_int_eq(p.bytes.gradients, 4 * l.n_total);
    ht_tensor_list_free(&l);
}
END_TEST

START_TEST(steps_and_passes_are_counted)
{
    struct ht_plan p;

    load("quickstart", 0, NULL, 2);
    ck_assert_int_eq(ht_plan_make(&p, &c, 2, "cpu", 0, 0), HT_OK);
    ck_assert_int_eq(p.n_micro_steps,
                     c.train.global_batch_tokens / (2 * c.train.micro_batch * 512));
    ck_assert_int_eq(p.total_steps, c.train.total_steps);
    ck_assert_double_eq(p.total_tokens,
                        (double)c.train.global_batch_tokens * (double)c.train.total_steps);
    ck_assert(p.step_s > 0 && p.mfu > 0 && p.mfu < 1);
    ck_assert_double_eq_tol(p.tokens_per_s * p.step_s, (double)c.train.global_batch_tokens, 1e-6);
}
END_TEST

/* The original run: 192 GPUs of 80 GB, everything sharded. */
START_TEST(bamba9b_fits_its_cluster)
{
    struct ht_plan p;

    load("bamba9b", 0, NULL, 192);
    ck_assert_msg(ht_plan_make(&p, &c, 192, "h100", 20000000000, 3000000000) == HT_OK, "%s",
                  ht_error_message());
    ck_assert_int_eq(p.n_tensors, 407);
    ck_assert_int_eq(p.n_micro_steps, 1);
    ck_assert_int_lt(p.bytes.gradients, INT64_C(5) << 30); // of one unit, twice, and a small part
    ck_assert(p.mfu > 0.2 && p.mfu < 0.7);
    ck_assert_int_eq(ht_plan_make(&p, &c, 192, "a100", 20000000000, 3000000000), HT_OK);
    ck_assert_str_eq(p.device.name, "a100");
}
END_TEST

START_TEST(too_large_is_refused_with_numbers_and_a_key)
{
    struct ht_plan p;
    char *stage2[] = { "parallel.zero_stage=2" };

    load("bamba9b", 0, NULL, 1);
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, "h100", 1, 1), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "GiB short; use more ranks"));
    ck_assert_int_eq(p.n_params, 9780235392); // filled all the same
    ck_assert(p.step_s > 0);
    load("bamba9b", 1, stage2, 8);
    ck_assert_int_eq(ht_plan_make(&p, &c, 8, "h100", INT64_C(30) << 30, 1), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "train.recompute"));
    c.train.recompute = HT_RECOMPUTE_FULL;
    ck_assert_int_eq(ht_plan_make(&p, &c, 8, "h100", INT64_C(30) << 30, 1), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "train.micro_batch"));
    ck_assert_int_eq(ht_plan_make(&p, &c, 8, "h100", INT64_C(66) << 30, 1), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "parallel.zero_stage"));
    ck_assert_int_eq(ht_plan_make(&p, &c, 192, "h100", INT64_C(20) << 30, 1), HT_OK);
}
END_TEST

START_TEST(devices)
{
    struct ht_plan p;
    char *stage3[] = { "parallel.zero_stage=3" };

    load("quickstart", 0, NULL, 1);
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, NULL, 0, 0), HT_OK);
    ck_assert_str_eq(p.device.name, "cpu");
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, "tpu", 0, 0), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "\"tpu\""));
    load("quickstart", 1, stage3, 1);
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, NULL, 0, 0), HT_OK);
    ck_assert_str_eq(p.device.name, "cpu");
    ck_assert_int_eq(ht_plan_make(&p, &c, 0, "cpu", 0, 0), HT_ERR_ARG);
}
END_TEST

/* 8-bit copies are counted: two bytes per weight of the projections, in ZeRO-3 those of one. Only
 * GPUs that have it are planned for. */
START_TEST(fp8_is_planned)
{
    struct ht_plan p, q;
    char *fp8[] = { "train.linear_dtype=fp8" };
    char *fp8_3[] = { "train.linear_dtype=fp8", "parallel.zero_stage=3" };
    char *stage3[] = { "parallel.zero_stage=3" };
    char *stage1_fp8[] = { "train.linear_dtype=fp8", "parallel.zero_stage=1" };
    char *stage1[] = { "parallel.zero_stage=1" };

    load("bamba9b", 1, stage1, 192);
    (void)ht_plan_make(&p, &c, 192, "h100", 0, 0);
    load("bamba9b", 2, stage1_fp8, 192);
    (void)ht_plan_make(&q, &c, 192, "h100", 0, 0);
    const int64_t tokens = c.train.micro_batch * c.data.seq_len;
    const struct ht_fp8_bytes b = ht_fp8_sizes(&c.model, tokens, true);
    ck_assert_int_eq(b.weights, 2 * INT64_C(8727822336)); // the linear weights of the model
    ck_assert_int_eq(b.tokens, tokens * (b.widest_in + 2 * b.widest_out));
    ck_assert_int_eq(b.widest_in, c.model.d_ff);
    ck_assert_int_eq(b.widest_out, 2 * c.model.d_ff);
    ck_assert_int_eq(q.bytes.weights - p.bytes.weights, b.total);
    ck_assert(q.tokens_per_s > 1.1 * p.tokens_per_s && q.mfu < p.mfu);

    load("bamba9b", 1, stage3, 192);
    (void)ht_plan_make(&p, &c, 192, "h100", 0, 0);
    load("bamba9b", 2, fp8_3, 192);
    (void)ht_plan_make(&q, &c, 192, "h100", 0, 0);
    ck_assert_int_eq(q.bytes.weights - p.bytes.weights,
                     ht_fp8_sizes(&c.model, tokens, false).total);
    ck_assert_int_eq(ht_plan_make(&q, &c, 192, "a100", 0, 0), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "a100 does not multiply fp8"));

    load("quickstart", 1, fp8, 1);
    ck_assert_int_eq(ht_plan_make(&q, &c, 1, NULL, 0, 0), HT_OK);
    ck_assert_str_eq(q.device.name, "h100");
    ck_assert_int_eq(ht_plan_make(&q, &c, 1, "cpu", 0, 0), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "cpu does not multiply fp8"));
}
END_TEST

/* One thread of each CPU level; those above the machine's own are not to be had. */
START_TEST(cpu_rates_grow_with_the_level)
{
    static const char *const levels[] = { "plain", "avx2", "avx512", "avx512bf16" };
    double last[2] = { 0, 0 };
    struct ht_plan p;

    load("bamba130m", 0, NULL, 1);
    c.train.threads = 1;
    for (int level = 0; level <= (int)ht_isa_best(); level++) {
        setenv("HT_CPU_ISA", levels[level], 1);
        for (int bf16 = 0; bf16 < 2; bf16++) {
            c.train.precision = bf16 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
            ck_assert_int_eq(ht_plan_make(&p, &c, 1, "cpu", 0, 0), HT_OK);
            ck_assert_str_eq(p.device.level, levels[level]);
            ck_assert(p.device.matmul_flops >= last[bf16] && p.device.matmul_flops > 0);
            ck_assert(p.device.matmul_flops < p.device.peak_flops);
            ck_assert(p.mfu > 0.2 && p.mfu < 1.0);
            ck_assert_ptr_nonnull(strstr(
                p.device.basis, level == HT_ISA_AVX512BF16 && bf16 ? "measured" : "estimated"));
            last[bf16] = p.device.matmul_flops;
        }
    }
    unsetenv("HT_CPU_ISA");
}
END_TEST

/* bench/results/cpu-zen5-2core: seconds of a step of one pass on two cores of AVX-512 BF16. */
START_TEST(measured_steps_are_predicted)
{
    static const struct {
        char *overrides[6];
        int n_overrides;
        double step_s; // the middle one where there are several
    } measured[] = {
        { { "train.micro_batch=4", "train.global_batch_tokens=4096", "data.seq_len=1024" },
          3,
          4.67 },
        { { "train.micro_batch=1", "train.global_batch_tokens=4096", "data.seq_len=4096" },
          3,
          4.21 },
        { { "train.micro_batch=4", "train.global_batch_tokens=4096", "data.seq_len=1024",
            "model.d_model=1024", "model.n_heads=16", "model.d_ff=2560" },
          6,
          7.53 },
        { { "train.micro_batch=1", "train.global_batch_tokens=4096", "data.seq_len=4096",
            "model.d_model=1024", "model.n_heads=16", "model.d_ff=2560" },
          6,
          7.27 },
    };
    struct ht_plan p;

    if (ht_isa_best() != HT_ISA_AVX512BF16) return;
    load("bamba130m", measured[_i].n_overrides, measured[_i].overrides, 1);
    c.train.threads = 1; // half of the machine, twice the time; the optimiser's part is small
    ck_assert_int_eq(ht_plan_make(&p, &c, 1, "cpu", 0, 0), HT_OK);
    ck_assert_int_eq(p.n_micro_steps, 1);
    ck_assert_double_eq_tol(p.step_s / 2, measured[_i].step_s, 0.15 * measured[_i].step_s);
}
END_TEST

START_TEST(the_table_has_the_numbers)
{
    struct ht_plan p;
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);

    ck_assert_ptr_nonnull(f);
    load("bamba9b", 0, NULL, 192);
    ck_assert_int_eq(ht_plan_make(&p, &c, 192, "h100", 1 << 30, 1 << 30), HT_OK);
    ht_plan_print(f, &p, &c);
    fclose(f);
    static const char *const words[] = { "9780235392 parameters",
                                         "407 tensors",
                                         "9, 18, 27",
                                         "18.8 G forward",
                                         "1280000 steps",
                                         "192 rank(s)",
                                         "h100 (per rank",
                                         "published figures, not measured by this project",
                                         "activations                  1024.0 MiB" };
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        ck_assert_msg(strstr(text, words[i]) != NULL, "\"%s\" is not in\n%s", words[i], text);
    ck_assert_ptr_null(strstr(text, "fp8"));
    free(text);
    c.train.linear_dtype = HT_LINEAR_FP8;
    f = open_memstream(&text, &n);
    ht_plan_print(f, &p, &c);
    fclose(f);
    ck_assert_ptr_nonnull(strstr(text, "of them fp8 copies"));
    free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("planner");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_loop_test(t, flops_are_the_specifications, 0, n_published);
    tcase_add_test(t, flops_of_bamba_by_part_and_length);
    tcase_add_test(t, bytes_follow_the_sizes);
    tcase_add_test(t, steps_and_passes_are_counted);
    tcase_add_test(t, bamba9b_fits_its_cluster);
    tcase_add_test(t, too_large_is_refused_with_numbers_and_a_key);
    tcase_add_test(t, devices);
    tcase_add_test(t, fp8_is_planned);
    tcase_add_test(t, cpu_rates_grow_with_the_level);
    tcase_add_loop_test(t, measured_steps_are_predicted, 0, 4);
    tcase_add_test(t, the_table_has_the_numbers);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
