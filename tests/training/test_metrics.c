/* tests/training/test_metrics.c: what a run writes about itself, read back. */
#include "temp_dir.h"

#include <dirent.h>
#include <fcntl.h>
#include <jansson.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "training/metrics.h"
#include "training/metrics_file.h"

static struct ht_step_metrics step_at(int64_t step)
{
    return (struct ht_step_metrics){ .step = step,
                                     .tokens = step * 2200000000001,
                                     .loss = 4.0 / (double)step,
                                     .z_loss = 1e-5,
                                     .grad_norm = 0.75,
                                     .lr = 3e-4,
                                     .step_tokens = 8192,
                                     .step_flops = 5e9,
                                     .step_s = 0.5,
                                     .data_wait_s = 0.005,
                                     .comm_exposed_s = 0.05,
                                     .checkpoint_stall_s = 0.25,
                                     .skipped_steps = 2,
                                     .resident_bytes = 1 << 20,
                                     .peak_bytes = 1 << 21 };
}

static struct ht_metrics_options options(int64_t start_step)
{
    return (struct ht_metrics_options){
        .dir = dir, .start_step = start_step, .total_steps = 100, .n_ranks = 2, .peak_flops = 1e11
    };
}

/* Steps from start to end, an evaluation every 5. */
static void run(int64_t start, int64_t end)
{
    const struct ht_metrics_options o = options(start);
    struct ht_metrics *m;

    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    for (int64_t i = start + 1; i <= end; i++) {
        const struct ht_step_metrics s = step_at(i);
        ht_metrics_step(m, &s);
        if (i % 5 == 0)
            ht_metrics_eval(m, &(struct ht_eval_metrics){ .step = i, .tokens = i, .loss = 2 });
    }
    ht_metrics_close(m);
}

/* Every line parsed; a line that is no JSON fails the test. */
static json_t *read_lines(void)
{
    json_t *all = json_array();
    size_t n;
    char *text = slurp("metrics.jsonl", &n), *at = text;

    while (*at) {
        char *end = strchr(at, '\n');
        json_error_t error;
        ck_assert_ptr_nonnull(end);
        json_t *line = json_loadb(at, (size_t)(end - at), JSON_REJECT_DUPLICATES, &error);
        ck_assert_msg(line != NULL, "%s in: %.200s", error.text, at);
        json_array_append_new(all, line);
        at = end + 1;
    }
    free(text);
    return all;
}

static double real(const json_t *line, const char *key)
{
    const json_t *v = json_object_get(line, key);
    ck_assert_msg(json_is_number(v), "no %s", key);
    return json_number_value(v);
}

START_TEST(a_step_has_the_promised_names)
{
    run(0, 5);
    json_t *lines = read_lines();
    const json_t *l = json_array_get(lines, 3), *e = json_array_get(lines, 5);

    ck_assert_uint_eq(json_array_size(lines), 6);
    ck_assert_int_eq(json_integer_value(json_object_get(l, "step")), 4);
    ck_assert(json_integer_value(json_object_get(l, "tokens")) == 4 * 2200000000001);
    ck_assert(fabs(real(l, "time") - ht_time_wall_s()) < 60);
    ck_assert(real(l, "train/loss") == 1.0);
    ck_assert(real(l, "train/grad_norm") == 0.75);
    ck_assert(real(l, "train/learning_rate") == 3e-4);
    ck_assert(real(l, "train/tokens") == 4 * 2200000000001.0);
    ck_assert(real(l, "train/tokens_per_second") == 16384);
    ck_assert(real(l, "train/tokens_per_second_per_device") == 8192);
    ck_assert(real(l, "train/flops_per_second") == 1e10);
    ck_assert(real(l, "train/mfu") == 0.1);
    ck_assert(real(l, "train/step_seconds") == 0.5);
    ck_assert(real(l, "train/data_wait_seconds") == 0.005);
    ck_assert(real(l, "train/comm_exposed_seconds") == 0.05);
    ck_assert(real(l, "train/checkpoint_stall_seconds") == 0.25);
    ck_assert(real(l, "train/skipped_steps") == 2);
    ck_assert(real(l, "train/z_loss") == 1e-5);
    ck_assert(real(l, "memory/resident_bytes") == 1 << 20);
    ck_assert(real(l, "memory/peak_bytes") == 1 << 21);
    ck_assert(real(e, "eval/loss") == 2);
    ck_assert(fabs(real(e, "eval/perplexity") - exp(2)) < 1e-7);
    ck_assert_ptr_null(json_object_get(e, "eval/bits_per_byte"));
    json_decref(lines);
}
END_TEST

START_TEST(what_is_not_a_number_is_null)
{
    const struct ht_metrics_options o = options(0);
    struct ht_step_metrics s = step_at(1);
    struct ht_metrics *m;

    s.loss = NAN;
    s.grad_norm = INFINITY;
    s.step_flops = 0;
    s.step_s = 0; // no division by it
    s.resident_bytes = s.peak_bytes = 0;
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    ht_metrics_step(m, &s);
    ht_metrics_close(m);
    json_t *lines = read_lines();
    const json_t *l = json_array_get(lines, 0);
    ck_assert(json_is_null(json_object_get(l, "train/loss")));
    ck_assert(json_is_null(json_object_get(l, "train/grad_norm")));
    ck_assert_ptr_null(json_object_get(l, "train/mfu"));
    ck_assert(real(l, "memory/peak_bytes") > 1e5); // asked of the system
    json_decref(lines);
}
END_TEST

/* Steps of the lines that count, as one string. */
static void valid_steps(char text[256])
{
    json_t *lines = read_lines();
    size_t i, n = 0;
    json_t *l;

    text[0] = '\0';
    json_array_foreach(lines, i, l)
    {
        if (json_is_true(json_object_get(l, "superseded"))) continue;
        n +=
            (size_t)snprintf(text + n, 256 - n, "%s%d ", json_object_get(l, "eval/loss") ? "e" : "",
                             (int)json_integer_value(json_object_get(l, "step")));
    }
    json_decref(lines);
}

START_TEST(resume_supersedes_later_lines)
{
    char text[256], path[256];

    run(0, 11);
    run(7, 8);
    valid_steps(text);
    ck_assert_str_eq(text, "1 2 3 4 5 e5 6 7 8 ");
    run(5, 6); // a second time, further back
    valid_steps(text);
    ck_assert_str_eq(text, "1 2 3 4 5 e5 6 ");
    run(6, 7); // nothing to mark
    json_t *lines = read_lines();
    ck_assert_uint_eq(json_array_size(lines), 13 + 1 + 1 + 1); // nothing is lost
    json_decref(lines);
    run(0, 1);
    valid_steps(text);
    ck_assert_str_eq(text, "1 ");

    // half a line, as a crash or a full disk leaves it
    FILE *f = fopen(in_dir(path, "metrics.jsonl"), "a");
    fputs("{\"step\": 2, \"tokens\": 12", f);
    fclose(f);
    run(1, 3);
    valid_steps(text);
    ck_assert_str_eq(text, "1 2 3 ");
}
END_TEST

START_TEST(nothing_to_change_leaves_the_file_alone)
{
    char path[256];
    struct stat before, after;

    run(0, 5);
    ck_assert_int_eq(stat(in_dir(path, "metrics.jsonl"), &before), 0);
    ck_assert_int_eq(ht_metrics_file_supersede(path, 5), HT_OK);
    ck_assert_int_eq(stat(path, &after), 0);
    ck_assert(before.st_ino == after.st_ino && before.st_size == after.st_size);
    ck_assert_int_eq(ht_metrics_file_supersede(path, 4), HT_OK);
    ck_assert_int_eq(stat(path, &after), 0);
    ck_assert(before.st_ino != after.st_ino && before.st_size < after.st_size);
    ck_assert_int_eq(ht_metrics_file_supersede(in_dir(path, "absent"), 5), HT_OK);
}
END_TEST

START_TEST(curves_read_back)
{
    struct ht_metrics_curves c;
    char path[256];

    run(0, 20);
    run(10, 12);
    FILE *f = fopen(in_dir(path, "metrics.jsonl"), "a");
    fputs("not json\n{\"step\": 13, \"train/loss\": null}\n[1]\n{\"step\": \"x\", "
          "\"train/loss\": 1}\n\n",
          f);
    fclose(f);
    ck_assert_int_eq(ht_metrics_file_read(&c, path), HT_OK);
    ck_assert_int_eq(c.loss.n, 12);
    ck_assert_int_eq(c.lr.n, 12);
    ck_assert_int_eq(c.eval_loss.n, 2);
    for (int i = 0; i < 12; i++) {
        ck_assert(c.loss.step[i] == i + 1);
        ck_assert(fabs(c.loss.value[i] - 4.0 / (i + 1)) < 1e-8);
    }
    ck_assert(c.eval_loss.step[1] == 10);
    ht_metrics_curves_free(&c);
    ck_assert_int_eq(ht_metrics_file_read(&c, in_dir(path, "absent")), HT_ERR_IO);
}
END_TEST

/* Everything a log wrote, from a file of the folder. */
static struct ht_log file_log(FILE **f)
{
    char path[256];
    *f = fopen(in_dir(path, "train.log"), "w");
    ck_assert_ptr_nonnull(*f);
    return (struct ht_log){ .level = HT_LOG_INFO, .n_ranks = 1, .file = *f };
}

static int count(const char *text, const char *word)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, word)); p++) n++;
    return n;
}

START_TEST(log_lines_come_every_n_steps_with_means)
{
    FILE *f;
    const struct ht_log log = file_log(&f);
    struct ht_metrics_options o = options(0);
    struct ht_metrics *m;
    size_t n;

    o.log = &log;
    o.log_every = 10;
    o.total_steps = 24;
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    for (int64_t i = 1; i <= 24; i++) {
        struct ht_step_metrics s = step_at(i);
        s.loss = (double)i;
        ht_metrics_step(m, &s);
    }
    ht_metrics_close(m);
    fclose(f);
    char *text = slurp("train.log", &n);
    ck_assert_msg(strstr(text, "step 10/24  loss 5.5000  grad norm 0.75  lr 0.0003  16.4 ktokens/s"
                               "  10.0 GFLOP/s  step 0.5 s (data 1%, comm 10%)  "
                               "checkpoint stall 2.5 s  skipped 2  1.0 MiB") != NULL,
                  "%s", text);
    ck_assert_ptr_nonnull(strstr(text, "step 20/24  loss 15.5000"));
    ck_assert_ptr_nonnull(strstr(text, "step 24/24  loss 22.5000")); // the end is always told
    ck_assert_int_eq(count(text, "\n"), 3);
    free(text);
}
END_TEST

START_TEST(a_terminal_gets_one_line_that_changes)
{
    char out[8192];
    struct ht_metrics *m;
    struct winsize size = { .ws_row = 24, .ws_col = 60 };
    size_t n;
    FILE *f;
    struct ht_log log = file_log(&f);
    struct ht_metrics_options o = options(0);

    const int master = posix_openpt(O_RDWR | O_NOCTTY);
    ck_assert(master >= 0 && grantpt(master) == 0 && unlockpt(master) == 0);
    log.terminal = fopen(ptsname(master), "w");
    ck_assert_ptr_nonnull(log.terminal);
    ck_assert_int_eq(ioctl(master, TIOCSWINSZ, &size), 0);
    setenv("TERM", "xterm", 1);
    o.log = &log;
    o.log_every = 10;
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    for (int64_t i = 1; i <= 20; i++) {
        const struct ht_step_metrics s = step_at(i);
        ht_metrics_step(m, &s);
    }
    ht_metrics_eval(m, &(struct ht_eval_metrics){ .step = 20, .loss = 1, .bits_per_byte = 0.5 });
    ht_metrics_close(m);
    // the terminal hands its bytes over when it likes: read until it has been silent for a second
    size_t got = 0;
    struct pollfd wait = { .fd = master, .events = POLLIN };
    while (got < sizeof out - 1 && poll(&wait, 1, 1000) == 1) {
        const ssize_t more = read(master, out + got, sizeof out - 1 - got);
        ck_assert_int_gt(more, 0);
        got += (size_t)more;
    }
    out[got] = '\0';
    fclose(log.terminal);
    fclose(f);
    close(master);

    // lines start over in place, none longer than the window
    ck_assert_ptr_nonnull(strstr(out, "\rstep 20/100 [====>"));
    int n_returns = 0;
    for (char *p = out; (p = strchr(p, '\r')); p++) {
        if (strncmp(p, "\rstep", 5) != 0) continue;
        n_returns++;
        ck_assert_int_lt(strchr(p, '\033') - p, 61);
    }
    ck_assert_int_eq(n_returns, 20);
    ck_assert_ptr_nonnull(strstr(out, "\r\033[K")); // cleared for the evaluation
    ck_assert_ptr_nonnull(strstr(out, "evaluation at step 20: loss 1.0000"));
    ck_assert_ptr_null(strstr(out, "grad norm")); // log lines go to the file meanwhile
    char *text = slurp("train.log", &n);
    ck_assert_ptr_nonnull(strstr(text, "step 20/100  loss"));
    ck_assert_ptr_nonnull(strstr(text, "0.5000 bits per byte"));
    free(text);
}
END_TEST

START_TEST(a_full_disk_is_told_once_and_mended)
{
    FILE *f;
    const struct ht_log log = file_log(&f);
    struct ht_metrics_options o = options(0);
    struct rlimit limit = { 1500, RLIM_INFINITY };
    struct ht_metrics *m;
    size_t n;

    o.log = &log;
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
    for (int64_t i = 1; i <= 5; i++) {
        const struct ht_step_metrics s = step_at(i);
        ht_metrics_step(m, &s);
    }
    limit.rlim_cur = RLIM_INFINITY;
    setrlimit(RLIMIT_FSIZE, &limit);
    const struct ht_step_metrics s = step_at(6);
    ht_metrics_step(m, &s);
    ht_metrics_close(m);
    fclose(f);
    char *text = slurp("train.log", &n);
    ck_assert_int_eq(count(text, "metrics.jsonl"), 1);
    free(text);
    // the half line ends on its own; the next one is whole
    struct ht_metrics_curves c;
    char path[256];
    ck_assert_int_eq(ht_metrics_file_read(&c, in_dir(path, "metrics.jsonl")), HT_OK);
    ck_assert(c.loss.n >= 2 && c.loss.n < 6 && c.loss.step[c.loss.n - 1] == 6);
    ht_metrics_curves_free(&c);
}
END_TEST

START_TEST(events_are_written_beside)
{
    struct ht_metrics_options o = options(0);
    struct ht_metrics *m;
    struct dirent *entry;
    int n_files = 0;

    o.tensorboard = true;
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_OK);
    const struct ht_step_metrics s = step_at(1);
    ht_metrics_step(m, &s);
    ht_metrics_close(m);
    DIR *d = opendir(dir);
    while ((entry = readdir(d))) {
        if (strncmp(entry->d_name, "events.out.tfevents.", 20) != 0) continue;
        size_t n;
        char *text = slurp(entry->d_name, &n);
        ck_assert_ptr_nonnull(memmem(text, n, "train/mfu", 9));
        ck_assert_ptr_nonnull(memmem(text, n, "memory/peak_bytes", 17));
        free(text);
        n_files++;
    }
    closedir(d);
    ck_assert_int_eq(n_files, 1);
}
END_TEST

START_TEST(no_metrics_is_fine_and_no_folder_is_not)
{
    struct ht_metrics_options o = options(0);
    struct ht_metrics *m;
    const struct ht_step_metrics s = step_at(1);
    char path[256];

    ht_metrics_step(NULL, &s); // other ranks have none
    ht_metrics_eval(NULL, &(struct ht_eval_metrics){ 0 });
    ht_metrics_clear_line(NULL);
    ht_metrics_close(NULL);
    o.dir = in_dir(path, "absent");
    ck_assert_int_eq(ht_metrics_open(&m, &o), HT_ERR_IO);
    ck_assert_ptr_null(m);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "absent/metrics.jsonl"));
}
END_TEST

START_TEST(units_for_people)
{
    char s[16], d[48];

    ck_assert_str_eq(ht_metrics_si(s, 0), "0.00 ");
    ck_assert_str_eq(ht_metrics_si(s, 999.4), "999 ");
    ck_assert_str_eq(ht_metrics_si(s, 999.6), "1.00 k");
    ck_assert_str_eq(ht_metrics_si(s, 12345), "12.3 k");
    ck_assert_str_eq(ht_metrics_si(s, 1.5e9), "1.50 G");
    ck_assert_str_eq(ht_metrics_bytes(s, 1023), "1023 B");
    ck_assert_str_eq(ht_metrics_bytes(s, 1536), "1.5 KiB");
    ck_assert_str_eq(ht_metrics_bytes(s, 3ull << 40), "3.0 TiB");
    ck_assert_str_eq(ht_metrics_duration(d, 42), "0:42");
    ck_assert_str_eq(ht_metrics_duration(d, 3600 + 5 * 60 + 9), "1:05:09");
    ck_assert_str_eq(ht_metrics_duration(d, 3 * 86400.0 + 4 * 3600 + 600), "3 d 04:10");
    ck_assert_str_eq(ht_metrics_duration(d, NAN), "0:00");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("metrics");
    TCase *tc = tcase_create("metrics");

    tcase_add_checked_fixture(tc, temp_dir_make, temp_dir_remove);
    tcase_add_test(tc, a_step_has_the_promised_names);
    tcase_add_test(tc, what_is_not_a_number_is_null);
    tcase_add_test(tc, resume_supersedes_later_lines);
    tcase_add_test(tc, nothing_to_change_leaves_the_file_alone);
    tcase_add_test(tc, curves_read_back);
    tcase_add_test(tc, log_lines_come_every_n_steps_with_means);
    tcase_add_test(tc, a_terminal_gets_one_line_that_changes);
    tcase_add_test(tc, a_full_disk_is_told_once_and_mended);
    tcase_add_test(tc, events_are_written_beside);
    tcase_add_test(tc, no_metrics_is_fine_and_no_folder_is_not);
    tcase_add_test(tc, units_for_people);
    suite_add_tcase(s, tc);
    return run_suite(s);
}
