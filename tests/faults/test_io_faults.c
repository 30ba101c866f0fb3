/* tests/faults/test_io_faults.c: every n-th write, read, fsync, rename, open, mkdir, unlink and
 * allocation of a save and of a load fails once. What happened is said, and an earlier checkpoint
 * stays whole. A full disk is waited out where the recipe says so. */
#include <check.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/folder.h"
#include "core/base/file.h"
#include "failshim.h"
#include "tests/checkpoints/ckpt_case.h"

static struct ckpt_case c;
static failshim_arm_fn *arm;
static failshim_disarm_fn *disarm;
static FILE *said;
static struct ht_log log_to = { .level = HT_LOG_INFO, .n_ranks = 1 };

static const struct fault {
    const char *name;
    enum failshim_kind kind;
    int code;
    bool harmless; // must be repeated, not reported
    int min_calls; // of a save: a fault that never strikes tests nothing
} faults[] = {
    { "open EIO", FAILSHIM_OPEN, EIO, false, 10 },
    { "open EMFILE", FAILSHIM_OPEN, EMFILE, false, 10 },
    { "write ENOSPC", FAILSHIM_WRITE, ENOSPC, false, 8 },
    { "write EDQUOT", FAILSHIM_WRITE, EDQUOT, false, 8 },
    { "write EIO", FAILSHIM_WRITE, EIO, false, 8 },
    { "write EINTR", FAILSHIM_WRITE, EINTR, true, 8 },
    { "write short", FAILSHIM_WRITE, FAILSHIM_SHORT, true, 8 },
    { "read EIO", FAILSHIM_READ, EIO, false, 8 },
    { "read EINTR", FAILSHIM_READ, EINTR, true, 8 },
    { "read short", FAILSHIM_READ, FAILSHIM_SHORT, true, 8 },
    { "fsync EIO", FAILSHIM_FSYNC, EIO, false, 8 },
    { "fsync ENOSPC", FAILSHIM_FSYNC, ENOSPC, false, 8 },
    { "rename EIO", FAILSHIM_RENAME, EIO, false, 2 },
    { "rename EROFS", FAILSHIM_RENAME, EROFS, false, 2 },
    { "mkdir ENOSPC", FAILSHIM_MKDIR, ENOSPC, false, 1 },
    { "mkdir EROFS", FAILSHIM_MKDIR, EROFS, false, 1 },
    { "unlink EIO", FAILSHIM_UNLINK, EIO, false, 1 },
    { "opendir EIO", FAILSHIM_OPENDIR, EIO, false, 1 },
    { "allocation", FAILSHIM_ALLOC, ENOMEM, false, 20 },
};
enum { N_FAULTS = sizeof faults / sizeof *faults };

static void setup(void)
{
    void *a = dlsym(RTLD_DEFAULT, "ht_failshim_arm"),
         *d = dlsym(RTLD_DEFAULT, "ht_failshim_disarm");

    ck_assert_msg(a && d, "the shim is not loaded");
    memcpy(&arm, &a, sizeof arm);
    memcpy(&disarm, &d, sizeof disarm);
    ckpt_case_make(&c);
    said = tmpfile();
    ck_assert_ptr_nonnull(said);
    setvbuf(said, NULL, _IONBF, 0);
    log_to.terminal = said;
}

static void teardown(void)
{
    fclose(said);
    ckpt_case_free(&c);
}

/* Something for the person at the terminal in the log since the last call? */
static bool was_said(void)
{
    static long at;
    fseek(said, 0, SEEK_END);
    const long end = ftell(said);
    const bool more = end > at;
    at = end;
    return more;
}

static bool on_full_pause;

static enum ht_status make_writer(struct ht_ckpt_writer **w)
{
    const struct ht_zero_slice slice = { 0, c.list.n_total, 0 };
    const struct ht_ckpt_writer_options o = { .dir = c.dir,
                                              .tensors = &c.list,
                                              .slices = &slice,
                                              .n_slices = 1,
                                              .shard_size = c.list.n_total,
                                              .keep_last = 2,
                                              .on_full_pause = on_full_pause,
                                              .log = &log_to };
    return ht_ckpt_writer_create(w, NULL, &o);
}

/* Everything that is visible is whole, the newest is at least `step`, and returns it. */
static int64_t all_whole(int64_t step)
{
    int64_t *steps, newest;
    int n;

    ck_assert_int_eq(ht_ckpt_list_steps(&steps, &n, c.dir), HT_OK);
    ck_assert_int_ge(n, 1);
    for (int i = 0; i < n; i++) ckpt_check(&c, ckpt_path(&c, steps[i]), 1, steps[i]);
    newest = steps[0];
    ck_assert_int_ge(newest, step);
    free(steps);
    return newest;
}

START_TEST(save)
{
    const struct fault *f = &faults[_i];
    struct ht_ckpt_writer *w;
    int n, n_failed = 0;
    int64_t step = 3;

    for (int64_t s = 1; s <= step; s++)
        ck_assert_int_eq(ckpt_save_as(&c, 1, false, s, 2, 0), HT_OK);
    for (n = 1;; n++) {
        ck_assert_msg(make_writer(&w) == HT_OK, "%s", ht_error_message());
        was_said();
        arm(f->kind, n, f->code, c.dir);
        const enum ht_status st = ckpt_save(w, &c, step + 1);
        const int calls = disarm();
        char message[1024];
        snprintf(message, sizeof message, "%s", ht_error_message());
        ht_ckpt_writer_free(w);
        const int64_t newest = all_whole(step);
        if (calls < n) { // it did not strike: the save is through its last call
            ck_assert_int_eq(st, HT_OK);
            break;
        }
        if (st == HT_OK) {
            ck_assert_int_eq(newest, step + 1);
            // some allocations are only a convenience to the C library
            ck_assert_msg(f->harmless || f->kind == FAILSHIM_ALLOC || was_said(),
                          "%s, call %d: nothing was said", f->name, n);
        } else {
            n_failed++;
            ck_assert_msg(!f->harmless, "%s, call %d: %s", f->name, n, message);
            ck_assert_msg(strstr(message, "checkpoint of step") != NULL, "%s", message);
            // Jansson cuts a token short when its buffer cannot grow: then the file is blamed
            ck_assert_msg(strstr(message, c.dir) != NULL ||
                              (f->kind == FAILSHIM_ALLOC &&
                               (strstr(message, "memory") || strstr(message, "no thread"))),
                          "%s", message);
            if (f->kind == FAILSHIM_WRITE && f->code != EIO) ck_assert_int_eq(st, HT_ERR_MEMORY);
        }
        step = newest;
    }
    printf("save, %s: %d calls, each failed once; %d saves refused\n", f->name, n - 1, n_failed);
    ck_assert_int_ge(n - 1, f->min_calls);
    ck_assert(f->harmless || n_failed > 0);
}
END_TEST

static const struct fault fulls[] = {
    { "write ENOSPC", FAILSHIM_WRITE, ENOSPC, true, 8 },
    { "write EDQUOT", FAILSHIM_WRITE, EDQUOT, true, 8 },
    { "create ENOSPC", FAILSHIM_CREATE, ENOSPC, true, 6 },
    { "mkdir ENOSPC", FAILSHIM_MKDIR, ENOSPC, true, 1 },
    { "statvfs says full", FAILSHIM_STATVFS, 0, true, 1 },
};
enum { N_FULLS = sizeof fulls / sizeof *fulls };

/* The text of the log from byte `at` on. */
static const char *said_since(long at)
{
    static char text[4096];
    fseek(said, at, SEEK_SET);
    text[fread(text, 1, sizeof text - 1, said)] = '\0';
    fseek(said, 0, SEEK_END);
    return text;
}

/* checkpoint.on_full: the same full disk ends a save with "stop" and is waited out with "pause". */
START_TEST(wait_for_space)
{
    const struct fault *f = &fulls[_i];
    static const int calls[] = { 1, 5 }; // each costs the second that a pause lasts
    struct ht_ckpt_writer *w;
    int64_t step = 1;
    int n_waited = 0;

    ck_assert_int_eq(ckpt_save_as(&c, 1, false, step, 2, 0), HT_OK);
    for (size_t i = 0; i < sizeof calls / sizeof *calls && calls[i] <= f->min_calls; i++) {
        on_full_pause = false;
        ck_assert_msg(make_writer(&w) == HT_OK, "%s", ht_error_message());
        arm(f->kind, calls[i], f->code, c.dir);
        const enum ht_status stopped = ckpt_save(w, &c, step + 1);
        disarm();
        ht_ckpt_writer_free(w);
        ck_assert_msg(stopped != HT_OK, "%s, call %d: on_full = \"stop\" went on", f->name,
                      calls[i]);
        ck_assert_int_eq(all_whole(step), step);

        on_full_pause = true;
        ck_assert_msg(make_writer(&w) == HT_OK, "%s", ht_error_message());
        fseek(said, 0, SEEK_END);
        const long at = ftell(said);
        arm(f->kind, calls[i], f->code, c.dir);
        const enum ht_status st = ckpt_save(w, &c, step + 1);
        const int seen = disarm();
        ck_assert_msg(st == HT_OK, "%s, call %d: %s", f->name, calls[i], ht_error_message());
        ht_ckpt_writer_free(w);
        ck_assert_int_ge(seen, calls[i]);
        ck_assert_int_eq(all_whole(step + 1), step + 1);
        ck_assert_msg(strstr(said_since(at), "disk full") && strstr(said_since(at), "waiting"),
                      "%s, call %d: waited in silence: %s", f->name, calls[i], said_since(at));
        step++;
        n_waited++;
    }
    on_full_pause = false;
    printf("pause, %s: %d full disks waited out\n", f->name, n_waited);
    ck_assert_int_gt(n_waited, 0);
}
END_TEST

START_TEST(load)
{
    const struct fault *f = &faults[_i];
    float *out = calloc((size_t)c.list.n_total, sizeof *out);
    int n, n_failed = 0, n_earlier = 0;

    ck_assert_ptr_nonnull(out);
    for (int64_t s = 1; s <= 2; s++) ck_assert_int_eq(ckpt_save_as(&c, 2, false, s, 2, 0), HT_OK);
    for (n = 1; n < 5000; n++) {
        char path[600];
        struct ht_ckpt *k = NULL;
        was_said();
        arm(f->kind, n, f->code, c.dir);
        enum ht_status st = ht_ckpt_find_latest(path, sizeof path, c.dir, NULL, &log_to);
        if (st == HT_OK) st = ht_ckpt_open(&k, path);
        if (st == HT_OK)
            st = ht_ckpt_read_flat(k, HT_CKPT_EXP_AVG, &c.list, 0, c.list.n_total, out);
        const int calls = disarm();
        const int64_t step = k ? ht_ckpt_step(k) : -1;
        ht_ckpt_close(k);
        if (st == HT_OK) {
            for (int t = 0; t < c.list.n_tensors; t++)
                for (int64_t i = 0; i < c.list.tensors[t].n; i++) {
                    const int64_t at = c.list.tensors[t].offset + i;
                    const uint32_t want = ckpt_bits(1, at, step);
                    ck_assert(memcmp(&out[at], &want, 4) == 0);
                }
            n_earlier += step == 1;
            if (step == 1) ck_assert_msg(was_said(), "%s, call %d: silent fall-back", f->name, n);
        } else {
            n_failed++;
            ck_assert_str_ne(ht_error_message(), "");
            ck_assert_msg(!f->harmless, "%s, call %d: %s", f->name, n, ht_error_message());
        }
        ck_assert(!f->harmless || step == 2);
        all_whole(2); // nothing on the disk has changed
        if (calls < n) break;
    }
    printf("load, %s: %d calls, each failed once; %d refused, %d times the earlier one was taken\n",
           f->name, n - 1, n_failed, n_earlier);
    free(out);
}
END_TEST

int main(int argc, char **argv)
{
    (void)argc;
    if (!getenv("LD_PRELOAD")) {
        setenv("LD_PRELOAD", FAILSHIM, 1);
        execv("/proc/self/exe", argv);
        perror("execv");
        return 1;
    }
    Suite *s = suite_create("io_faults");
    TCase *t = tcase_create("io_faults");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, save, 0, N_FAULTS);
    tcase_add_loop_test(t, load, 0, N_FAULTS);
    tcase_add_loop_test(t, wait_for_space, 0, N_FULLS);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed != 0;
}
