/* tests/bench/test_compare.c: hybridbench compare: costs, roofs and memory of its cells against
 * plain arithmetic, the contexts that are made up, figures put together from several files. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/compare.h"
#include "core/model/pool.h"
#include "inference/loaded.h"
#include "tests/training/temp_dir.h"

static const char hybrid[] = HT_SOURCE_DIR "/recipes/debug_tiny.cfg";
static const char transformer[] = HT_SOURCE_DIR "/tests/golden/hf/llama";
enum { ROOM = 512 }; // tokens that a cell keeps free behind its context

static struct ht_compare_result result, other;

static struct ht_compare_options tiny(void)
{
    return (struct ht_compare_options){ .path = { hybrid, transformer },
                                        .weights = "int8",
                                        .threads = 2,
                                        .memory_bytes = 5e6,
                                        .n_contexts = 2,
                                        .context = { 48, 300 },
                                        .n_batches = 3,
                                        .batch = { 1, 3, 500 },
                                        .rounds = 2,
                                        .cell_s = 0.002 };
}

static void check_cell(const struct ht_compare_model *m, const struct ht_compare_cell *cell,
                       int64_t context, double tokens)
{
    const double n = (double)cell->batch;
    const double need =
        m->weight_bytes + n * (m->slot_bytes + (double)(context + ROOM) * m->token_bytes);
    const double by_bytes = cell->step_bytes / cell->read_bytes_per_s;
    const double by_flop = cell->step_flop / result.flop_per_s;

    ck_assert_double_eq_tol(cell->need_bytes, need, 1.0);
    ck_assert_double_eq_tol(cell->roof_tokens_per_s * fmax(by_bytes, by_flop), tokens,
                            1e-9 * tokens);
    ck_assert(cell->tokens_per_s > 0.0 && isfinite(cell->tokens_per_s));
    ck_assert(cell->read_bytes_per_s > 0.0);
    // every token takes every matrix once, so much at least
    ck_assert_double_ge(cell->step_flop, tokens * 2.0 * m->n_matmul);
}

START_TEST(cells_agree_with_arithmetic)
{
    const struct ht_compare_options o = tiny();

    ck_assert_msg(ht_compare_run(&result, &o) == HT_OK, "%s", ht_error_message());
    ck_assert(result.flop_per_s > 0.0 && result.peak_bytes > 0.0 && result.threads == 2);
    ck_assert_double_gt(result.model[0].slot_bytes, 0.0); // the hybrid has states
    ck_assert_double_eq(result.model[1].slot_bytes, 0.0); // the transformer none
    ck_assert_double_gt(result.model[1].token_bytes, 0.0);
    for (int i = 0; i < 2; i++) {
        const struct ht_compare_model *m = &result.model[i];
        for (int c = 0; c < o.n_contexts; c++) {
            const double each = m->slot_bytes + (double)(o.context[c] + ROOM) * m->token_bytes;
            for (int k = 0; k <= o.n_batches; k++) {
                const struct ht_compare_cell *cell = &m->decode[c][k];
                if (!cell->batch) continue;
                check_cell(m, cell, o.context[c], (double)cell->batch);
                ck_assert(cell->p50_s > 0.0 && cell->p50_s <= cell->p90_s &&
                          cell->p90_s <= cell->p99_s);
                ck_assert_double_le(cell->need_bytes, o.memory_bytes);
                ck_assert_double_ge(m->decode[c][m->best[c]].tokens_per_s, cell->tokens_per_s);
            }
            ck_assert_int_eq(m->decode[c][0].batch, 1);
            ck_assert_int_eq(m->decode[c][1].batch, 3);
            ck_assert_int_eq(m->decode[c][2].batch, 0); // 500 sequences do not fit,
            ck_assert_double_gt(m->decode[c][2].need_bytes, o.memory_bytes);
            const struct ht_compare_cell *most = &m->decode[c][3]; // the most that do are tried
            ck_assert_int_gt(most->batch, 3);
            ck_assert_double_gt(most->need_bytes + each, o.memory_bytes);
            // a sequence more: its state read and written, its keys and values read
            ck_assert_double_eq_tol(
                m->decode[c][1].step_bytes - m->decode[c][0].step_bytes,
                2.0 * (2.0 * m->slot_bytes + (double)o.context[c] * m->token_bytes), 1.0);
            check_cell(m, &m->prefill[c], o.context[c], ROOM);
        }
    }
}
END_TEST

START_TEST(a_model_that_does_not_fit_is_left_out)
{
    struct ht_compare_options o = tiny();
    char path[256];

    o.memory_bytes = 1000.0;
    ck_assert_msg(ht_compare_run(&result, &o) == HT_OK, "%s", ht_error_message());
    for (int i = 0; i < 2; i++)
        for (int c = 0; c < o.n_contexts; c++) {
            ck_assert_int_eq(result.model[i].best[c], -1);
            ck_assert_int_eq(result.model[i].prefill[c].batch, 0);
            for (int k = 0; k <= o.n_batches; k++)
                ck_assert_int_eq(result.model[i].decode[c][k].batch, 0);
        }
    ck_assert_int_eq(ht_compare_table(&result, &o, in_dir(path, "none.md")), HT_OK);
    ck_assert_int_eq(ht_compare_plot(&result, &o, in_dir(path, "none")), HT_ERR_ARG);
    ck_assert_int_eq(ht_compare_plot(&result, &o, "it's"), HT_ERR_ARG);
}
END_TEST

START_TEST(pieces_make_the_whole)
{
    struct ht_compare_options o = tiny(), whole;
    char a[256], b[256], c[256];
    const char *const pieces[] = { in_dir(a, "late.json"), in_dir(b, "early.json") };

    for (int k = 0; k < 2; k++) {
        o.n_contexts = 1;
        o.context[0] = k ? 48 : 300;
        ck_assert_msg(ht_compare_run(&result, &o) == HT_OK, "%s", ht_error_message());
        ck_assert_int_eq(ht_compare_json(&result, &o, pieces[k]), HT_OK);
    }
    ck_assert_msg(ht_compare_merge(&other, &whole, pieces, 2) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(whole.n_contexts, 2);
    ck_assert(whole.context[0] == 48 && whole.context[1] == 300); // sorted
    ck_assert_str_eq(whole.path[0], hybrid);
    ck_assert_str_eq(other.weights, "int8");
    for (int i = 0; i < 2; i++) { // the last run is the first context
        const struct ht_compare_model *m = &result.model[i], *n = &other.model[i];
        ck_assert_int_eq(m->best[0], n->best[0]);
        for (int k = 0; k <= o.n_batches; k++) {
            const struct ht_compare_cell *x = &m->decode[0][k], *y = &n->decode[0][k];
            ck_assert_int_eq(x->batch, y->batch);
            if (!x->batch) continue;
            ck_assert_double_eq_tol(x->tokens_per_s, y->tokens_per_s, 1e-6 * x->tokens_per_s);
            ck_assert_double_eq_tol(x->roof_tokens_per_s, y->roof_tokens_per_s,
                                    1e-6 * x->roof_tokens_per_s);
            ck_assert_double_eq_tol(x->p99_s, y->p99_s, 1e-6 * x->p99_s);
            ck_assert_double_eq_tol(x->need_bytes, y->need_bytes, 1e-6 * x->need_bytes);
        }
        ck_assert_int_eq(n->prefill[1].batch, 1);
        ck_assert_int_eq(n->decode[1][0].batch, 1);
    }

    const char *const twice[] = { a, a }, *const missing[] = { "/nowhere/x.json" };
    ck_assert_int_eq(ht_compare_merge(&other, &whole, twice, 2), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "context 300"));
    ck_assert_int_eq(ht_compare_merge(&other, &whole, missing, 1), HT_ERR_FORMAT);
    o.rounds = 1; // measured otherwise
    ck_assert_int_eq(ht_compare_json(&result, &o, in_dir(c, "other.json")), HT_OK);
    const char *const unlike[] = { a, c };
    ck_assert_int_eq(ht_compare_merge(&other, &whole, unlike, 2), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "rounds"));
}
END_TEST

START_TEST(damaged_figures_are_refused)
{
    static const char *const cuts[][2] = {
        { "\"batches\"", "\"batch_\"" },        { "\"weights\"", "\"weight_\"" },
        { "\"decode\"", "\"decade\"" },         { "\"tokens_per_s\"", "\"tokens_per_m\"" },
        { "\"step_GFLOP\"", "\"step_GFLIP\"" }, { "\"context\": 48", "\"context\": 49" },
        { "\"models\"", "\"modes_\"" },         { "\"state_MB\"", "\"state_mb\"" },
    };
    struct ht_compare_options o = tiny(), whole;
    char path[256], bad[256];
    const char *const one[] = { in_dir(bad, "bad.json") };
    size_t n;

    o.n_contexts = 1;
    ck_assert_msg(ht_compare_run(&result, &o) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_compare_json(&result, &o, in_dir(path, "good.json")), HT_OK);
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        char *text;
        ck_assert_int_eq(ht_file_read(&text, &n, path, 1 << 20), HT_OK);
        ck_assert_msg(strstr(text, cuts[i][0]), "%s is not in the file", cuts[i][0]);
        memcpy(strstr(text, cuts[i][0]), cuts[i][1], strlen(cuts[i][1]));
        ck_assert_int_eq(ht_file_publish(bad, text, n), HT_OK);
        free(text);
        ck_assert_msg(ht_compare_merge(&other, &whole, one, 1) == HT_ERR_FORMAT, "%s", cuts[i][1]);
        ck_assert_ptr_nonnull(strstr(ht_error_message(), "bad.json"));
    }
}
END_TEST

START_TEST(a_made_up_context_is_like_a_read_one)
{
    struct ht_loaded l;
    struct ht_pool *p;
    struct ht_place at[2] = { { .slot = 0, .kv_start = 0, .kv_n = 40 },
                              { .slot = 1, .kv_start = 40, .kv_n = 40 } };
    struct ht_place *const list[] = { &at[0], &at[1] };
    static const int32_t ids[] = { 5, 5 };

    ck_assert_msg(ht_loaded_random(&l, hybrid, "bf16", 1, 64) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_pool_create(&p, l.model,
                                    &(struct ht_pool_options){
                                        .n_slots = 2, .kv_tokens = 80, .block_tokens = 8 }),
                     HT_OK);
    const int64_t vocab = l.model->cfg.vocab_size;
    float *logits = malloc((size_t)(2 * vocab) * sizeof *logits);
    float *behind = malloc((size_t)vocab * sizeof *logits);
    ck_assert(logits && behind);
    for (int i = 0; i < 2; i++) ck_assert_int_eq(ht_pool_fill(p, &at[i], 33), HT_OK);
    ck_assert_int_eq(at[0].n_tokens, 33);
    ck_assert_int_eq(ht_pool_decode(p, list, ids, 2, logits), HT_OK);
    ck_assert_int_eq(at[0].n_tokens, 34);
    // the same made-up context gives the same row, whatever its place
    ck_assert_mem_eq(logits, logits + vocab, (size_t)vocab * sizeof *logits);
    for (int64_t i = 0; i < vocab; i++) ck_assert(isfinite(logits[i]));
    memcpy(behind, logits, (size_t)vocab * sizeof *logits);

    // keys and values count: without them the row is another
    ck_assert_int_eq(ht_pool_reset(p, &at[0]), HT_OK);
    ck_assert_int_eq(ht_pool_decode(p, list, ids, 1, logits), HT_OK);
    ck_assert_mem_ne(logits, behind, (size_t)vocab * sizeof *logits);

    ck_assert_int_eq(ht_pool_fill(p, &at[0], 41), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "40"));
    free(behind);
    free(logits);
    ht_pool_free(p);
    ht_loaded_close(&l);
}
END_TEST

START_TEST(bad_models_are_refused)
{
    struct ht_compare_options o = tiny();

    o.weights = "int5";
    ck_assert_int_ne(ht_compare_run(&result, &o), HT_OK);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "int5"));
    o = tiny();
    o.path[1] = "/nowhere/model";
    ck_assert_int_ne(ht_compare_run(&result, &o), HT_OK);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "/nowhere/model"));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("compare");
    TCase *t = tcase_create("all");
    tcase_add_checked_fixture(t, temp_dir_make, temp_dir_remove);
    tcase_set_timeout(t, 120);
    tcase_add_test(t, cells_agree_with_arithmetic);
    tcase_add_test(t, a_model_that_does_not_fit_is_left_out);
    tcase_add_test(t, pieces_make_the_whole);
    tcase_add_test(t, damaged_figures_are_refused);
    tcase_add_test(t, a_made_up_context_is_like_a_read_one);
    tcase_add_test(t, bad_models_are_refused);
    suite_add_tcase(s, t);
    return run_suite(s);
}
