/* tests/training/test_plot.c: the picture of a run; without gnuplot only its absence can be tested.
 */
#include "temp_dir.h"

#include <dirent.h>
#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include "core/base/rng.h"
#include "training/plot.h"

static bool has_gnuplot(void)
{
    const char *path = getenv("PATH");
    char file[512];

    while (path && *path) {
        const size_t n = strcspn(path, ":");
        snprintf(file, sizeof file, "%.*s/gnuplot", (int)(n < 400 ? n : 400), path);
        if (access(file, X_OK) == 0) return true;
        path += n + (path[n] == ':');
    }
    return false;
}

static void write_metrics(int n_steps, int eval_every)
{
    char path[256];
    FILE *f = fopen(in_dir(path, "metrics.jsonl"), "w");

    for (int i = 1; i <= n_steps; i++) {
        const double base = 2.2 + 3 * exp(-i / 120.0) + 5 * exp(-i / 15.0);
        const double lr = 3e-4 * fmin(i / 100.0, 0.55 + 0.45 * cos(M_PI * i / n_steps));
        fprintf(f, "{\"step\": %d, \"train/loss\": %g, \"train/learning_rate\": %g}\n", i,
                base + 0.15 * (double)ht_rng_normal(3, 0, (uint64_t)i), lr);
        if (eval_every && i % eval_every == 0)
            fprintf(f, "{\"step\": %d, \"eval/loss\": %g}\n", i, base + 0.1);
    }
    fclose(f);
}

/* The folder holds these files and no others. */
static void expect_files(bool has_pictures)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    int n = 0;

    while ((e = readdir(d))) {
        if (!strcmp(e->d_name, ".") || !strcmp(e->d_name, "..")) continue;
        ck_assert_msg(!strcmp(e->d_name, "metrics.jsonl") || !strcmp(e->d_name, "loss.svg") ||
                          !strcmp(e->d_name, "loss.png"),
                      "left behind: %s", e->d_name);
        n++;
    }
    closedir(d);
    ck_assert_int_eq(n, has_pictures ? 3 : 1);
}

START_TEST(pictures_are_drawn)
{
    static const unsigned char png[] = { 0x89, 'P', 'N', 'G', 13, 10, 26, 10 };
    size_t n;

    if (!has_gnuplot()) return;
    write_metrics(2000, 200);
    ck_assert_msg(ht_plot_loss(dir, "tiny: hybrid, 2 ranks") == HT_OK, "%s", ht_error_message());
    char *text = slurp("loss.png", &n);
    ck_assert(n > 5000 && memcmp(text, png, sizeof png) == 0);
    // width and height of the header
    ck_assert(text[18] == 1440 / 256 && (unsigned char)text[19] == 1440 % 256);
    free(text);
    text = slurp("loss.svg", &n);
    ck_assert(strstr(text, "<svg") && strstr(text, "</svg>"));
    ck_assert_ptr_nonnull(strstr(text, "tiny: hybrid, 2 ranks"));
    ck_assert_ptr_nonnull(strstr(text, "held-out"));
    ck_assert_ptr_nonnull(strstr(text, "learning rate"));
    free(text);
    expect_files(true);
    if (getenv("HT_KEEP_PLOT")) { // for looking at it
        char command[256], path[256];
        snprintf(command, sizeof command, "%s", getenv("HT_KEEP_PLOT"));
        ck_assert_int_eq(rename(in_dir(path, "loss.png"), command), 0);
    }
}
END_TEST

START_TEST(titles_are_text_and_nothing_else)
{
    char path[256];
    size_t n;

    if (!has_gnuplot()) return;
    write_metrics(3, 0); // little data is data too
    snprintf(path, sizeof path, "x'; system('touch %s/owned'); '\n!touch owned\n{/Bold a}_b @$loss",
             dir);
    ck_assert_msg(ht_plot_loss(dir, path) == HT_OK, "%s", ht_error_message());
    expect_files(true);
    char *text = slurp("loss.svg", &n);
    ck_assert_ptr_nonnull(strstr(text, "{/Bold a}_b @$loss"));
    free(text);
}
END_TEST

START_TEST(a_constant_loss_and_evaluations_alone_are_drawn)
{
    char path[256];

    if (!has_gnuplot()) return;
    FILE *f = fopen(in_dir(path, "metrics.jsonl"), "w");
    fputs("{\"step\": 5, \"eval/loss\": 2}\n{\"step\": 10, \"eval/loss\": 2}\n", f);
    fclose(f);
    ck_assert_msg(ht_plot_loss(dir, "") == HT_OK, "%s", ht_error_message());
    expect_files(true);
}
END_TEST

START_TEST(no_gnuplot_is_unsupported)
{
    write_metrics(10, 0);
    setenv("PATH", "/nonexistent", 1);
    ck_assert_int_eq(ht_plot_loss(dir, "t"), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "gnuplot"));
    expect_files(false);
}
END_TEST

START_TEST(a_failing_gnuplot_is_quoted)
{
    char path[256];
    FILE *f;

    write_metrics(10, 0);
    ck_assert_int_eq(mkdir(in_dir(path, "bin"), 0700), 0);
    f = fopen(in_dir(path, "bin/gnuplot"), "w");
    fputs("#!/bin/sh\necho line 7: unknown terminal >&2\nexit 1\n", f);
    fclose(f);
    chmod(path, 0700);
    setenv("PATH", in_dir(path, "bin"), 1);
    ck_assert_int_eq(ht_plot_loss(dir, "t"), HT_ERR_IO);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "line 7: unknown terminal"));
    ht_file_remove_tree(in_dir(path, "bin"));
    expect_files(false);
}
END_TEST

START_TEST(no_data_is_refused)
{
    char path[256];

    ck_assert_int_eq(ht_plot_loss(dir, "t"), HT_ERR_IO);
    FILE *f = fopen(in_dir(path, "metrics.jsonl"), "w");
    fputs("{\"step\": 1, \"train/loss\": null}\n", f);
    fclose(f);
    ck_assert_int_eq(ht_plot_loss(dir, "t"), HT_ERR_ARG);
    expect_files(false);
    char *longest = malloc(8000);
    memset(longest, 'x', 7999);
    longest[7999] = '\0';
    ck_assert_int_eq(ht_plot_loss(longest, "t"), HT_ERR_ARG);
    free(longest);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("plot");
    TCase *tc = tcase_create("plot");

    tcase_set_timeout(tc, 120);
    tcase_add_checked_fixture(tc, temp_dir_make, temp_dir_remove);
    tcase_add_test(tc, pictures_are_drawn);
    tcase_add_test(tc, titles_are_text_and_nothing_else);
    tcase_add_test(tc, a_constant_loss_and_evaluations_alone_are_drawn);
    tcase_add_test(tc, no_gnuplot_is_unsupported);
    tcase_add_test(tc, a_failing_gnuplot_is_quoted);
    tcase_add_test(tc, no_data_is_refused);
    suite_add_tcase(s, tc);
    return run_suite(s);
}
