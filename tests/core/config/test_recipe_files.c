/* tests/core/config/test_recipe_files.c: includes and precedence, the shipped recipes, the
 * documentation. */
#include <check.h>
#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/config/tensor_list.h"
#include "tests/core/config/config_case.h"

static struct ht_config c;

#define BASE                                                                                       \
    "model: { arch = \"mamba2\"; vocab_size = 64; d_model = 64; n_layers = 2; };\n"                \
    "data: { seq_len = 64; };\n"                                                                   \
    "train: { global_batch_tokens = 64; steps = 9; };\n"                                           \
    "optimizer: { lr = 0.5; beta1 = 0.5; };\n"

static enum ht_status load(const char *path, int n, char *const *overrides)
{
    return ht_recipe_load(&c, NULL, path, n, overrides, 1);
}

static void load_ok(const char *path)
{
    ck_assert_msg(load(path, 0, NULL) == HT_OK, "%s", ht_error_message());
}

static void load_refused(const char *path, const char *words)
{
    ck_assert_msg(load(path, 0, NULL) == HT_ERR_RECIPE, "status for %s: %s", path,
                  ht_error_message());
    ck_assert_msg(strstr(ht_error_message(), words) != NULL, "\"%s\" is not in \"%s\"", words,
                  ht_error_message());
}

START_TEST(override_beats_recipe_beats_include_beats_default)
{
    const struct folder f = case_folder();
    char path[512];
    char *one[] = { "optimizer.lr=0.125" };

    case_write(path, &f, "base/b.cfg", BASE);
    case_write(path, &f, "base/c.cfg", "@include \"b.cfg\"\noptimizer: { beta2 = 0.5; };\n");
    case_write(path, &f, "run.cfg",
               "@include \"base/c.cfg\"\n"
               "optimizer: { lr = 0.25; };\n"
               "train: { total_tokens = 640; };\n");
    load_ok(path);
    ck_assert_float_eq(c.optimizer.lr, 0.25f);
    ck_assert_float_eq(c.optimizer.beta1, 0.5f);
    ck_assert_float_eq(c.optimizer.beta2, 0.5f);
    ck_assert_float_eq(c.optimizer.weight_decay, 0.1f);
    ck_assert_int_eq(c.train.total_steps, 10); // total_tokens displaces the steps of the include
    ck_assert_str_eq(c.train.name, "run");
    ck_assert_int_eq(load(path, 1, one), HT_OK);
    ck_assert_float_eq(c.optimizer.lr, 0.125f);
    case_remove(&f);
}
END_TEST

START_TEST(of_two_includes_the_later_wins)
{
    const struct folder f = case_folder();
    char path[512];

    case_write(path, &f, "a.cfg", BASE);
    case_write(path, &f, "b.cfg", "optimizer: { lr = 0.75; };");
    case_write(path, &f, "run.cfg", "@include \"a.cfg\"\n@include \"b.cfg\"\n");
    load_ok(path);
    ck_assert_float_eq(c.optimizer.lr, 0.75f);
    case_remove(&f);
}
END_TEST

START_TEST(errors_name_the_included_file)
{
    const struct folder f = case_folder();
    char path[512];

    case_write(path, &f, "base/b.cfg", BASE "\n\neval: { max_tokens = true; };");
    case_write(path, &f, "run.cfg", "@include \"base/b.cfg\"\n");
    load_refused(path, "/base/b.cfg:7: eval.max_tokens is a boolean");
    case_remove(&f);
}
END_TEST

START_TEST(bad_includes_are_refused)
{
    const struct folder f = case_folder();
    char path[512], outside[512];

    case_write(outside, &f, "outside.cfg", BASE);
    case_write(path, &f, "r/run.cfg", "\n@include \"no.cfg\"\n");
    load_refused(path, "r/run.cfg:2: @include \"no.cfg\"");
    case_write(path, &f, "r/run.cfg", "@include \"run.cfg\"\n");
    load_refused(path, "the file includes itself");
    case_write(path, &f, "r/b.cfg", "@include \"run.cfg\"\n");
    case_write(path, &f, "r/run.cfg", "@include \"b.cfg\"\n");
    load_refused(path, "the file includes itself");
    case_write(path, &f, "r/run.cfg", "@include \"../outside.cfg\"\n");
    load_refused(path, "leaves the recipe's folder");
    char text[600], link[600];
    snprintf(text, sizeof text, "@include \"%s\"\n", outside);
    case_write(path, &f, "r/run.cfg", text);
    load_refused(path, "must be relative");
    snprintf(link, sizeof link, "%s/r/link.cfg", f.path);
    ck_assert_int_eq(symlink(outside, link), 0);
    case_write(path, &f, "r/run.cfg", "@include \"link.cfg\"\n");
    load_refused(path, "leaves the recipe's folder");
    case_write(path, &f, "r/run.cfg", "@include b.cfg\n");
    load_refused(path, "path in quotes");
    case_write(path, &f, "r/run.cfg", "optimizer: { }; @include \"b.cfg\"\n");
    load_refused(path, "unexpected @");
    for (int i = 0; i < 10; i++) {
        char name[32], next[64];
        snprintf(name, sizeof name, "r/d%d.cfg", i);
        snprintf(next, sizeof next, "@include \"d%d.cfg\"\n", i + 1);
        case_write(path, &f, name, next);
    }
    snprintf(path, sizeof path, "%s/r/d0.cfg", f.path);
    load_refused(path, "nested deeper than 8 files");
    case_remove(&f);
}
END_TEST

START_TEST(files_that_are_no_recipes_are_refused)
{
    const struct folder f = case_folder();
    char path[512];
    const size_t n = (1 << 20) + 1;
    char *big = malloc(n + 1);

    load_refused("/no/such/recipe.cfg", "/no/such/recipe.cfg: No such file");
    ck_assert_int_ne(load(f.path, 0, NULL), HT_OK); // a folder
    ck_assert_ptr_nonnull(big);
    memset(big, '#', n);
    big[n] = 0;
    case_write(path, &f, "big.cfg", big);
    ck_assert_int_ne(load(path, 0, NULL), HT_OK);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "big.cfg"));
    free(big);
    ck_assert_int_eq(ht_file_publish(path, "a = 1;\0", 7), HT_OK);
    load_refused(path, "NUL");
    case_remove(&f);
}
END_TEST

/* ---- what is shipped ---- */

static int64_t parameters(const char *recipe)
{
    char path[512];
    struct ht_tensor_list l;

    snprintf(path, sizeof path, "%s/recipes/%s.cfg", HT_SOURCE_DIR, recipe);
    load_ok(path);
    ck_assert_int_eq(ht_tensor_list_create(&l, &c.model, c.optimizer.decay), HT_OK);
    const int64_t n = l.n_params;
    ht_tensor_list_free(&l);
    return n;
}

START_TEST(every_shipped_recipe_is_valid)
{
    char dir[512], path[1024];
    int n = 0;

    snprintf(dir, sizeof dir, "%s/recipes", HT_SOURCE_DIR);
    DIR *d = opendir(dir);
    ck_assert_ptr_nonnull(d);
    for (const struct dirent *e; (e = readdir(d));) {
        const char *dot = strrchr(e->d_name, '.');
        struct ht_recipe *r = NULL;
        struct ht_config again;
        char *text = NULL;
        if (!dot || strcmp(dot, ".cfg")) continue;
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        ck_assert_msg(ht_recipe_load(&c, &r, path, 0, NULL, 1) == HT_OK, "%s", ht_error_message());
        ck_assert_msg(c.data.n_train > 0 && *c.train.name, "%s has no data or no name", path);
        ck_assert_int_eq(ht_recipe_print(&text, r, 0), HT_OK);
        ck_assert_int_eq(ht_recipe_parse(&again, NULL, text, "printed", 0, NULL, 1), HT_OK);
        ck_assert_mem_eq(&again, &c, sizeof c);
        free(text);
        ht_recipe_free(r);
        n++;
    }
    closedir(d);
    ck_assert_int_ge(n, 10);
}
END_TEST

START_TEST(twins_have_the_same_width_and_within_2_percent_as_many_parameters)
{
    static const char *const twins[][2] = { { "bamba130m", "transformer130m" },
                                            { "bamba1b", "transformer1b" },
                                            { "bamba9b", "transformer9b" } };
    const int64_t a = parameters(twins[_i][0]);
    const struct ht_config hybrid = c;
    const int64_t b = parameters(twins[_i][1]);

    ck_assert_msg(llabs(a - b) * 50 <= a, "%s has %lld, %s %lld", twins[_i][0], (long long)a,
                  twins[_i][1], (long long)b);
    ck_assert_int_eq(hybrid.model.d_model, c.model.d_model);
    ck_assert_int_eq(hybrid.model.n_layers, c.model.n_layers);
    ck_assert_int_eq(hybrid.model.vocab_size, c.model.vocab_size);
    ck_assert_int_eq(hybrid.train.global_batch_tokens, c.train.global_batch_tokens);
    ck_assert_int_eq(hybrid.train.total_steps, c.train.total_steps);
    ck_assert_mem_eq(&hybrid.optimizer, &c.optimizer, sizeof c.optimizer);
    ck_assert_mem_eq(&hybrid.schedule, &c.schedule, sizeof c.schedule);
}
END_TEST

/* Spec 6.1. */
START_TEST(bamba9b_is_the_published_run)
{
    double sum = 0.0;

    ck_assert_int_eq(parameters("bamba9b"), 9780235392);
    ck_assert_int_eq(c.train.total_steps, 1280000);
    ck_assert_int_eq(c.train.global_batch_tokens, 384 * 4096);
    ck_assert_int_eq(c.data.n_train, 19);
    for (int i = 0; i < c.data.n_train; i++) sum += c.data.train[i].weight;
    ck_assert_double_eq(sum, 10000.0);
    ck_assert_float_eq(c.optimizer.lr, 3e-4f);
    ck_assert_int_eq(c.schedule.warmup, HT_WARMUP_QUADRATIC);
    ck_assert_int_eq(c.schedule.warmup_steps, 2000);
    ck_assert_double_eq_tol((double)c.schedule.min_lr_ratio, 1.0 / 30.0, 1e-8);
    parameters("bamba9b_anneal");
    ck_assert_int_eq(c.data.n_train, 2);
    ck_assert_int_eq(c.train.total_steps, 152588); // 200e9 / 1310720, rounded up
    ck_assert_int_eq(c.schedule.kind, HT_SCHEDULE_LINEAR);
    ck_assert_int_eq(c.schedule.warmup_steps, 0);
}
END_TEST

START_TEST(documentation_is_the_tables)
{
    char *text = NULL, *file = NULL, path[512];
    size_t n = 0;

    ck_assert_int_eq(ht_recipe_document(&text), HT_OK);
    snprintf(path, sizeof path, "%s/docs/recipes.md", HT_SOURCE_DIR);
    ck_assert_int_eq(ht_file_read(&file, &n, path, 1 << 20), HT_OK);
    ck_assert_msg(strcmp(text, file) == 0,
                  "docs/recipes.md is not what the table says; make it again "
                  "with: hybridtrain --print-recipe-docs > docs/recipes.md");
    free(text);
    free(file);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("recipe_files");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_test(t, override_beats_recipe_beats_include_beats_default);
    tcase_add_test(t, of_two_includes_the_later_wins);
    tcase_add_test(t, errors_name_the_included_file);
    tcase_add_test(t, bad_includes_are_refused);
    tcase_add_test(t, files_that_are_no_recipes_are_refused);
    tcase_add_test(t, every_shipped_recipe_is_valid);
    tcase_add_loop_test(t, twins_have_the_same_width_and_within_2_percent_as_many_parameters, 0, 3);
    tcase_add_test(t, bamba9b_is_the_published_run);
    tcase_add_test(t, documentation_is_the_tables);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
