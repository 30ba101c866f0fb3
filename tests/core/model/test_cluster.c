/* tests/core/model/test_cluster.c: plans for clusters of GPUs: bamba9b fits its machines, and what
 * is called fastest is. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/recipe.h"
#include "core/model/cluster.h"

static struct ht_config c;

static void load(const char *recipe, int n_ranks)
{
    char path[512];

    snprintf(path, sizeof path, "%s/recipes/%s.cfg", HT_SOURCE_DIR, recipe);
    ck_assert_msg(ht_recipe_load(&c, NULL, path, 0, NULL, n_ranks) == HT_OK, "%s",
                  ht_error_message());
}

START_TEST(bamba9b_fits_a_host_of_eight)
{
    static const char *const devices[] = { "h100", "a100", "h200" };
    struct ht_plan p;

    load("bamba9b", 8);
    ck_assert_msg(ht_model_plan(&p, &c, 8, devices[_i]) == HT_OK, "%s", ht_error_message());
    ck_assert_str_eq(p.device.name, devices[_i]);
    ck_assert_int_eq(p.n_micro_steps * 8 * c.train.micro_batch * c.data.seq_len,
                     c.train.global_batch_tokens);
    ck_assert(p.mfu > 0.3 && p.mfu < 0.75);
    ck_assert(p.comm_exposed_s > 0 && p.comm_exposed_s < 0.1 * p.step_s);
    // what specification gives for the states: 22 GB of ZeRO-3 with fp32 gradients, and two units
    const double states = (double)(p.bytes.weights + p.bytes.gradients + p.bytes.optimizer) / 1e9;
    ck_assert_double_eq_tol(states, 22.0 + 2 * 525.3e6 * (2 + 4) / 1e9, 0.1);
}
END_TEST

START_TEST(without_a_device_the_smallest_that_fits_is_taken)
{
    struct ht_plan p;

    load("quickstart", 1);
    ck_assert_int_eq(ht_model_plan(&p, &c, 1, NULL), HT_OK);
    ck_assert_str_eq(p.device.name, "cpu");
    load("bamba9b", 1);
    ck_assert_int_eq(ht_model_plan(&p, &c, 1, NULL), HT_ERR_MEMORY); // nor one GPU
    ck_assert_str_eq(p.device.name, "h100");
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "use more ranks"));
    ck_assert_int_eq(ht_model_plan(&p, &c, 8, "b300"), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "h200"));
}
END_TEST

START_TEST(the_fastest_fits_and_is_no_slower)
{
    static const int ranks[] = { 8, 64, 256 };
    struct ht_plan_cluster k;

    load("bamba9b", 8);
    const struct ht_config before = c;
    ck_assert_int_eq(ht_model_plan_cluster(&k, &c, ranks[_i], "h100"), HT_OK);
    ck_assert_int_eq(memcmp(&before, &c, sizeof c), 0);
    ck_assert(k.recipe.fits && k.best.fits);
    ck_assert_double_ge(k.best.plan.tokens_per_s, 0.994 * k.recipe.plan.tokens_per_s);
    ck_assert_double_le((double)k.best.plan.bytes.total, 0.95 * 80e9);
    // 384 rows a step: 256 ranks with two rows each need 512
    ck_assert_int_eq(k.recipe.global_batch_tokens, (ranks[_i] == 256 ? 512 : 384) * 4096);
    // the choice, planned again as a recipe of its own, is the same plan
    struct ht_plan p;
    c.parallel.zero_stage = k.best.zero_stage;
    c.train.recompute = k.best.recompute;
    c.train.micro_batch = k.best.micro_batch;
    c.train.global_batch_tokens = k.best.global_batch_tokens;
    ck_assert_int_eq(ht_model_plan(&p, &c, ranks[_i], "h100"), HT_OK);
    ck_assert_int_eq(p.bytes.total, k.best.plan.bytes.total);
    ck_assert_double_eq(p.tokens_per_s, k.best.plan.tokens_per_s);
}
END_TEST

START_TEST(a_stage_takes_memory_away_and_adds_traffic)
{
    struct ht_plan p[4];

    load("bamba9b", 64);
    for (int stage = 0; stage < 4; stage++) {
        c.parallel.zero_stage = stage;
        ht_model_plan(&p[stage], &c, 64, "h200");
        if (stage > 0) ck_assert_int_lt(p[stage].bytes.total, p[stage - 1].bytes.total);
    }
    ck_assert_double_gt(p[3].step_s - p[3].comm_exposed_s, p[1].step_s - p[1].comm_exposed_s);
    // full recomputation: less memory, more time
    struct ht_plan full;
    c.train.recompute = HT_RECOMPUTE_FULL;
    ht_model_plan(&full, &c, 64, "h200");
    ck_assert_int_lt(full.bytes.activations, p[3].bytes.activations / 4);
    ck_assert_double_gt(full.step_s, 1.2 * p[3].step_s);
}
END_TEST

START_TEST(the_table_names_every_size)
{
    struct ht_plan_cluster rows[2];
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);

    load("bamba9b", 8);
    ck_assert_int_eq(ht_model_plan_cluster(&rows[0], &c, 8, "a100"), HT_OK);
    ck_assert_int_eq(ht_model_plan_cluster(&rows[1], &c, 256, "a100"), HT_OK);
    rows[1].recipe.fits = rows[1].best.fits = false;
    ht_plan_print_cluster(f, rows, 2, &c);
    fclose(f);
    ck_assert_ptr_nonnull(strstr(text, "Clusters of a100, 80 GB each"));
    ck_assert_ptr_nonnull(strstr(text, "  fits\n"));
    ck_assert_ptr_nonnull(strstr(text, "DOES NOT FIT"));
    ck_assert_ptr_nonnull(strstr(text, "nothing fits"));
    ck_assert_ptr_nonnull(strstr(text, "train.global_batch_tokens")); // 256 do not divide it
    free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cluster");
    TCase *tc = tcase_create("cluster");

    tcase_add_loop_test(tc, bamba9b_fits_a_host_of_eight, 0, 3);
    tcase_add_test(tc, without_a_device_the_smallest_that_fits_is_taken);
    tcase_add_loop_test(tc, the_fastest_fits_and_is_no_slower, 0, 3);
    tcase_add_test(tc, a_stage_takes_memory_away_and_adds_traffic);
    tcase_add_test(tc, the_table_names_every_size);
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return n_failed != 0;
}
