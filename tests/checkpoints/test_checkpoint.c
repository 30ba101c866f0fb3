/* tests/checkpoints/test_checkpoint.c: saving, reading on other rank counts, HDF5's view, pruning,
 * crashes. */
#include <check.h>
#include <fcntl.h>
#include <hdf5.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ckpt_case.h"
#include "checkpoints/folder.h"
#include "checkpoints/h5_driver.h"
#include "core/base/file.h"

static struct ckpt_case c;

static void setup(void)
{
    ckpt_case_make(&c);
}

static void teardown(void)
{
    ckpt_case_free(&c);
}

static const int worlds[] = { 1, 2, 3, 4, 8 };
enum { N_WORLDS = sizeof worlds / sizeof *worlds };

START_TEST(written_by_n_ranks_is_read_by_m)
{
    const int from = worlds[_i / N_WORLDS], to = worlds[_i % N_WORLDS];

    ck_assert_msg(ckpt_save_as(&c, from, false, 17, 1, 0) == HT_OK, "%s", ht_error_message());
    ckpt_check(&c, ckpt_path(&c, 17), to, 17);
}
END_TEST

START_TEST(replicated_state_is_written_once)
{
    struct stat sb;
    char path[600];
    int64_t bytes = 0;

    ck_assert_msg(ckpt_save_as(&c, 3, true, 5, 1, 0) == HT_OK, "%s", ht_error_message());
    ckpt_check(&c, ckpt_path(&c, 5), 2, 5);
    for (int r = 0; r < 3; r++) {
        snprintf(path, sizeof path, "%s/rank-%05d-of-00003.h5", ckpt_path(&c, 5), r);
        ck_assert_int_eq(stat(path, &sb), 0);
        bytes += sb.st_size;
    }
    ck_assert_int_lt(bytes, c.list.n_params * 12 * 2); // not three times the state
}
END_TEST

START_TEST(ranks_that_leave_a_hole_are_refused)
{
    struct ht_ckpt_writer *w;
    const struct ht_zero_slice slice = { 64, c.list.n_total - 64, 0 };
    const struct ht_ckpt_writer_options o = { .dir = c.dir,
                                              .tensors = &c.list,
                                              .slices = &slice,
                                              .n_slices = 1,
                                              .shard_size = c.list.n_total,
                                              .keep_last = 1 };

    ck_assert_int_eq(ht_ckpt_writer_create(&w, NULL, &o), HT_ERR_ARG);
    ck_assert_ptr_null(w);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "model.embed_tokens.weight"));
}
END_TEST

/* ---- boxes ---- */

START_TEST(boxes_cover_any_range_once)
{
    static const struct ht_mf_tensor shapes[] = { { .n_dims = 1, .shape = { 9 }, .n = 9 },
                                                  { .n_dims = 2, .shape = { 4, 5 }, .n = 20 },
                                                  { .n_dims = 3, .shape = { 6, 1, 4 }, .n = 24 },
                                                  { .n_dims = 3, .shape = { 3, 4, 5 }, .n = 60 } };
    const struct ht_mf_tensor *t = &shapes[_i];
    struct ht_box boxes[HT_MAX_BOXES];

    for (int64_t start = 0; start < t->n; start++)
        for (int64_t n = 1; n <= t->n - start; n++) {
            const int n_boxes = ht_h5_boxes(boxes, t, start, n);
            int64_t at = start;
            ck_assert_int_le(n_boxes, 2 * t->n_dims - 1);
            for (int i = 0; i < n_boxes; i++) {
                int64_t flat = 0, count = 1;
                bool inner_whole = true; // below a dimension with count > 1 all must be whole
                for (int d = 0; d < t->n_dims; d++) {
                    flat = flat * t->shape[d] + boxes[i].start[d];
                    count *= boxes[i].count[d];
                    ck_assert_int_le(boxes[i].start[d] + boxes[i].count[d], t->shape[d]);
                }
                for (int d = 0, seen = 0; d < t->n_dims; d++) {
                    if (seen && boxes[i].count[d] != t->shape[d]) inner_whole = false;
                    if (boxes[i].count[d] > 1) seen = 1;
                }
                ck_assert(inner_whole);
                ck_assert_int_eq(flat, at);
                ck_assert_int_eq(boxes[i].first, at);
                ck_assert_int_eq(boxes[i].n, count);
                at += count;
            }
            ck_assert_int_eq(at, start + n);
        }
}
END_TEST

/* ---- HDF5's own view ---- */

static void check_virtual(hid_t file, int array, const struct ht_tensor_info *t, int64_t step)
{
    static const char *const prefix[] = { "", "optimizer/exp_avg/", "optimizer/exp_avg_sq/" };
    char name[200];
    uint32_t *got = calloc((size_t)t->n, 4);
    hsize_t shape[3];

    ck_assert_ptr_nonnull(got);
    snprintf(name, sizeof name, "/%s%s", prefix[array], t->name);
    const hid_t set = H5Dopen2(file, name, H5P_DEFAULT);
    ck_assert_int_ge(set, 0);
    const hid_t space = H5Dget_space(set);
    ck_assert_int_eq(H5Sget_simple_extent_dims(space, shape, NULL), t->n_dims);
    for (int d = 0; d < t->n_dims; d++) ck_assert_int_eq((int64_t)shape[d], t->shape[d]);
    ck_assert_int_ge(H5Dread(set, H5T_NATIVE_FLOAT, H5S_ALL, H5S_ALL, H5P_DEFAULT, got), 0);
    for (int64_t i = 0; i < t->n; i++)
        ck_assert_uint_eq(got[i], ckpt_bits(array, t->offset + i, step));
    H5Sclose(space);
    H5Dclose(set);
    free(got);
}

START_TEST(hdf5_shows_whole_tensors)
{
    char copy[300], command[1400], path[600];

    ck_assert_msg(ckpt_save_as(&c, worlds[_i], false, 3, 1, 0) == HT_OK, "%s", ht_error_message());
    // a copy elsewhere is as good: names in the index are relative
    snprintf(copy, sizeof copy, "%s/elsewhere", c.dir);
    snprintf(command, sizeof command, "cp -r %s %s && rm -r %s", ckpt_path(&c, 3), copy,
             ckpt_path(&c, 3));
    ck_assert_int_eq(system(command), 0);
    snprintf(path, sizeof path, "%s/index.h5", copy);
    const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    ck_assert_int_ge(file, 0);
    for (int a = 0; a < 3; a++)
        for (int t = 0; t < c.list.n_tensors; t++) check_virtual(file, a, &c.list.tensors[t], 3);
    ck_assert_int_ge(H5Fclose(file), 0);
    ckpt_check(&c, copy, 2, 3); // our own reader takes the copy as well
}
END_TEST

START_TEST(equal_states_give_equal_bytes)
{
    struct ht_ckpt_writer *w;
    char command[1400], first[520];

    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(ckpt_writer(&w, &c, 1, false), HT_OK);
        ck_assert_int_eq(ckpt_save(w, &c, 4), HT_OK);
        ht_ckpt_writer_free(w);
        if (i == 0) {
            snprintf(first, sizeof first, "%s/first", c.dir);
            ck_assert_int_eq(rename(ckpt_path(&c, 4), first), 0);
            sleep(1);
        }
    }
    snprintf(command, sizeof command, "diff -r %s %s", first, ckpt_path(&c, 4));
    ck_assert_int_eq(system(command), 0);
}
END_TEST

/* ---- the writer ---- */

static bool there(int64_t step)
{
    return ht_file_is_dir(ckpt_path(&c, step));
}

START_TEST(background_save_is_published_by_polling)
{
    struct ht_ckpt_writer *w;
    int64_t published = -1;
    char latest[300], *text;

    ck_assert_int_eq(ckpt_writer(&w, &c, 2, true), HT_OK);
    ck_assert_int_eq(ckpt_save(w, &c, 1000), HT_OK);
    for (int i = 0; i < 100000 && published < 0; i++) {
        ck_assert_int_eq(ht_ckpt_poll(w, &published), HT_OK);
        usleep(100);
    }
    ck_assert_int_eq(published, 1000);
    ck_assert_int_eq(ht_ckpt_poll(w, &published), HT_OK);
    ck_assert_int_eq(published, -1);
    ckpt_check(&c, ckpt_path(&c, 1000), 1, 1000);
    ck_assert_int_eq(ckpt_save(w, &c, 1001), HT_OK);
    ck_assert_int_eq(ckpt_save(w, &c, 1002), HT_OK); // waits for 1001
    ck_assert_int_eq(ht_ckpt_finish(w), HT_OK);
    ckpt_check(&c, ckpt_path(&c, 1002), 1, 1002);
    snprintf(latest, sizeof latest, "%s/LATEST", c.dir);
    ck_assert_int_eq(ht_file_read(&text, NULL, latest, 100), HT_OK);
    ck_assert_str_eq(text, "step-00001002\n");
    free(text);
    ht_ckpt_writer_free(w);
}
END_TEST

START_TEST(old_ones_are_pruned_by_the_rules)
{
    const int64_t steps[] = { 10, 20, 30, 40, 50, 60 };

    for (int i = 0; i < 6; i++)
        ck_assert_int_eq(ckpt_save_as(&c, 2, false, steps[i], 2, 30), HT_OK);
    ck_assert(!there(10) && !there(20) && there(30) && !there(40) && there(50) && there(60));
    // taken back to 50 and going on: what lies ahead is not ours to judge
    ck_assert_int_eq(ckpt_save_as(&c, 2, false, 55, 1, 0), HT_OK);
    ck_assert(!there(30) && !there(50) && there(55) && there(60));
    ckpt_check(&c, ckpt_path(&c, 55), 1, 55);
}
END_TEST

START_TEST(same_step_again_replaces_it)
{
    char path[600];

    ck_assert_int_eq(ckpt_save_as(&c, 3, false, 8, 3, 0), HT_OK);
    ck_assert_int_eq(ckpt_save_as(&c, 2, false, 8, 3, 0), HT_OK);
    ckpt_check(&c, ckpt_path(&c, 8), 1, 8);
    snprintf(path, sizeof path, "%s/rank-00000-of-00003.h5", ckpt_path(&c, 8));
    ck_assert(!ht_file_exists(path));
    // nothing hidden is left behind
    snprintf(path, sizeof path, "test -z \"$(ls -A %s | grep tmp)\"", c.dir);
    ck_assert_int_eq(system(path), 0);
}
END_TEST

START_TEST(unusable_folders_are_refused)
{
    struct ht_ckpt_writer *w;
    struct ckpt_case bad = c;

    snprintf(bad.dir, sizeof bad.dir, "/proc/self/nowhere");
    ck_assert_int_ne(ckpt_writer(&w, &bad, 1, true), HT_OK);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "/proc/self/nowhere"));
    snprintf(bad.dir, sizeof bad.dir, "/dev/null/x");
    ck_assert_int_eq(ckpt_writer(&w, &bad, 1, true), HT_ERR_IO);
    ck_assert_int_eq(ckpt_writer(&w, &c, 0, true), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "keep_last is 0"));
}
END_TEST

/* ---- finding ---- */

START_TEST(find_takes_the_newest_whole_one)
{
    char out[600], path[700];
    FILE *f = tmpfile();
    const struct ht_log log = { .level = HT_LOG_INFO, .n_ranks = 1, .terminal = f };
    char text[4096] = "";

    ck_assert_int_eq(ht_ckpt_find_latest(out, sizeof out, c.dir, NULL, &log), HT_OK);
    ck_assert_str_eq(out, "");
    for (int64_t s = 1; s <= 3; s++) ck_assert_int_eq(ckpt_save_as(&c, 2, false, s, 9, 0), HT_OK);
    ck_assert_int_eq(ht_ckpt_find_latest(out, sizeof out, c.dir, NULL, &log), HT_OK);
    ck_assert_int_eq(ckpt_step_of(out), 3);
    snprintf(path, sizeof path, "%s/rank-00001-of-00002.h5", ckpt_path(&c, 3));
    ck_assert_int_eq(truncate(path, 5000), 0);
    snprintf(path, sizeof path, "%s/manifest.json", ckpt_path(&c, 2));
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(ht_ckpt_find_latest(out, sizeof out, c.dir, NULL, &log), HT_OK);
    ck_assert_int_eq(ckpt_step_of(out), 1);
    rewind(f);
    ck_assert_uint_gt(fread(text, 1, sizeof text - 1, f), 0);
    ck_assert_ptr_nonnull(strstr(text, "step-00000003"));
    ck_assert_ptr_nonnull(strstr(text, "truncated"));
    ck_assert_ptr_nonnull(strstr(text, "step-00000002"));
    ck_assert_ptr_nonnull(strstr(text, "using the checkpoint before"));
    ck_assert(there(3) && there(2)); // left alone
    snprintf(path, sizeof path, "%s/state.json", ckpt_path(&c, 1));
    ck_assert_int_eq(truncate(path, 1), 0);
    ck_assert_int_eq(ht_ckpt_find_latest(out, sizeof out, c.dir, NULL, &log), HT_ERR_CHECKPOINT);
    ck_assert_str_eq(out, "");
    fclose(f);
}
END_TEST

START_TEST(another_model_is_refused)
{
    struct ht_ckpt *k;
    float out[4];

    ck_assert_int_eq(ckpt_save_as(&c, 2, false, 1, 1, 0), HT_OK);
    ck_assert_int_eq(ht_ckpt_open(&k, ckpt_path(&c, 1)), HT_OK);
    struct ht_tensor_info *t = &c.list.tensors[1];
    t->shape[0]++;
    ck_assert_int_eq(ht_ckpt_read_flat(k, HT_CKPT_MASTER, &c.list, 0, 4, out), HT_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), t->name));
    t->shape[0]--;
    t->name[3] = '_';
    ck_assert_int_eq(ht_ckpt_read_flat(k, HT_CKPT_MASTER, &c.list, 0, 4, out), HT_ERR_FORMAT);
    t->name[3] = 'e';
    c.list.n_tensors--;
    ck_assert_int_eq(ht_ckpt_read_flat(k, HT_CKPT_MASTER, &c.list, 0, 4, out), HT_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "lm_head.weight"));
    c.list.n_tensors++;
    ht_ckpt_close(k);
}
END_TEST

/* ---- crashes: a child that kills itself at each point of a save ---- */

static const char *const points[] = { "open",         "mid-write",       "before-fsync",
                                      "after-fsync",  "before-manifest", "after-manifest",
                                      "after-rename", "after-latest",    "mid-prune" };
enum { N_POINTS = sizeof points / sizeof *points, N_PASSES = 8 };

START_TEST(killed_at_a_named_point)
{
    const char *point = points[_i / N_PASSES];
    const int pass = 1 + _i % N_PASSES;
    const bool once = pass > 1 && _i / N_PASSES > 3; // points passed once per save
    struct ht_ckpt_writer *w;
    char spec[64], out[600], command[600];
    int status;

    if (once) return;
    for (int64_t s = 1; s <= 2; s++) ck_assert_int_eq(ckpt_save_as(&c, 1, false, s, 2, 0), HT_OK);
    snprintf(spec, sizeof spec, "%s:%d", point, pass);
    const pid_t pid = fork();
    if (pid == 0) {
        setenv("HT_CKPT_CRASH_AT", spec, 1);
        if (ckpt_writer(&w, &c, 2, true) != HT_OK) _exit(1);
        if (ckpt_save(w, &c, 3) != HT_OK || ht_ckpt_finish(w) != HT_OK) _exit(1);
        _exit(0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    const bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
    // open and the three around writing are passed by rank file, 4 small files, part and manifest:
    // 7 times
    ck_assert_msg(killed || (pass == 8 && WIFEXITED(status) && WEXITSTATUS(status) == 0),
                  "%s: status %x", spec, (unsigned)status);
    ck_assert_int_eq(ht_ckpt_find_latest(out, sizeof out, c.dir, NULL, NULL), HT_OK);
    const int64_t step = ckpt_step_of(out);
    ck_assert(step == 2 || step == 3);
    if (!killed || strcmp(point, "after-rename") == 0 || strcmp(point, "after-latest") == 0 ||
        strcmp(point, "mid-prune") == 0)
        ck_assert_int_eq(step, 3);
    ckpt_check(&c, out, 1, step);
    // the run goes on: the rubbish goes, the step is saved again
    ck_assert_int_eq(ckpt_writer(&w, &c, 2, true), HT_OK);
    snprintf(command, sizeof command, "test -z \"$(ls -A %s | grep tmp)\"", c.dir);
    ck_assert_int_eq(system(command), 0);
    ck_assert_int_eq(ckpt_save(w, &c, 3), HT_OK);
    ck_assert_int_eq(ht_ckpt_finish(w), HT_OK);
    ht_ckpt_writer_free(w);
    ckpt_check(&c, ckpt_path(&c, 3), 1, 3);
    ck_assert(!there(1) && there(2));
}
END_TEST

START_TEST(a_living_writer_is_left_alone)
{
    char path[400];

    snprintf(path, sizeof path, "%s/.step-00000009.tmp-77", c.dir);
    ck_assert_int_eq(mkdir(path, 0777), 0);
    const int fd = open(path, O_RDONLY | O_DIRECTORY);
    ck_assert_int_eq(flock(fd, LOCK_EX), 0);
    ck_assert_int_eq(ht_ckpt_remove_stale(c.dir, NULL), HT_OK);
    ck_assert(ht_file_exists(path));
    close(fd); // the writer died
    ck_assert_int_eq(ht_ckpt_remove_stale(c.dir, NULL), HT_OK);
    ck_assert(!ht_file_exists(path));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("checkpoint");
    TCase *t = tcase_create("checkpoint");

    ht_h5_quiet();
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, written_by_n_ranks_is_read_by_m, 0, N_WORLDS * N_WORLDS);
    tcase_add_test(t, replicated_state_is_written_once);
    tcase_add_test(t, ranks_that_leave_a_hole_are_refused);
    tcase_add_loop_test(t, boxes_cover_any_range_once, 0, 4);
    tcase_add_loop_test(t, hdf5_shows_whole_tensors, 0, N_WORLDS);
    tcase_add_test(t, equal_states_give_equal_bytes);
    tcase_add_test(t, background_save_is_published_by_polling);
    tcase_add_test(t, old_ones_are_pruned_by_the_rules);
    tcase_add_test(t, same_step_again_replaces_it);
    tcase_add_test(t, unusable_folders_are_refused);
    tcase_add_test(t, find_takes_the_newest_whole_one);
    tcase_add_test(t, another_model_is_refused);
    tcase_add_loop_test(t, killed_at_a_named_point, 0, N_POINTS * N_PASSES);
    tcase_add_test(t, a_living_writer_is_left_alone);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed != 0;
}
