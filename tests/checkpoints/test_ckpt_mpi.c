/* tests/checkpoints/test_ckpt_mpi.c: saves of several ranks in the background; a failure on one is
 * known to all. */
#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt_case.h"
#include "checkpoints/folder.h"
#include "core/base/file.h"

static struct ht_comm *comm;
static struct ckpt_case c; // of rank 0; the others use its folder
static struct ht_zero_slice *slices;
static int n_slices;
static int64_t shard_size;
static float *shard[3];

static void setup(void)
{
    char dir[sizeof c.dir];

    ckpt_case_make(&c);
    memcpy(dir, c.dir, sizeof dir);
    ck_assert_int_eq(ht_comm_broadcast(comm, dir, sizeof dir, 0), HT_OK);
    if (ht_comm_rank(comm) != 0) {
        rmdir(c.dir);
        memcpy(c.dir, dir, sizeof dir);
    }
    ck_assert_int_eq(ht_zero_plan(&slices, &n_slices, &shard_size, c.list.n_matrix, c.list.n_total,
                                  CKPT_BUCKET, ht_comm_size(comm), ht_comm_rank(comm)),
                     HT_OK);
    for (int a = 0; a < 3; a++) ck_assert_ptr_nonnull(shard[a] = calloc((size_t)shard_size + 1, 4));
}

static void teardown(void)
{
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
    if (ht_comm_rank(comm) == 0)
        ckpt_case_free(&c);
    else
        free(c.list.tensors);
    for (int a = 0; a < 3; a++) free(shard[a]);
    free(slices);
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
}

static enum ht_status make_writer(struct ht_ckpt_writer **w)
{
    const struct ht_ckpt_writer_options o = { .dir = c.dir,
                                              .tensors = &c.list,
                                              .slices = slices,
                                              .n_slices = n_slices,
                                              .shard_size = shard_size,
                                              .keep_last = 2,
                                              .background = true };
    return ht_ckpt_writer_create(w, comm, &o);
}

static enum ht_status save(struct ht_ckpt_writer *w, int64_t step)
{
    double stall_s;

    for (int a = 0; a < 3; a++)
        for (int i = 0; i < n_slices; i++)
            for (int64_t k = 0; k < slices[i].n; k++) {
                const uint32_t u = ckpt_bits(a, slices[i].flat_start + k, step);
                memcpy(&shard[a][slices[i].shard_start + k], &u, sizeof u);
            }
    return ht_ckpt_save(w,
                        &(struct ht_ckpt_source){ .step = step,
                                                  .tokens = 1000 * step,
                                                  .master = shard[0],
                                                  .exp_avg = shard[1],
                                                  .exp_avg_sq = shard[2],
                                                  .recipe_text = "train: { seed = 1; };\n",
                                                  .loader_json = "{\"row\": 7}\n",
                                                  .state_json = "{}\n" },
                        &stall_s);
}

/* Step borders with other collectives in between, as in training, until something is published. */
static enum ht_status poll_until(struct ht_ckpt_writer *w, int64_t *published)
{
    *published = -1;
    for (int i = 0; i < 100000 && *published < 0; i++) {
        double x = ht_comm_rank(comm);
        HT_TRY(ht_ckpt_poll(w, published));
        HT_TRY(ht_comm_sum_f64(comm, &x, 1));
        ck_assert(x == ht_comm_size(comm) * (ht_comm_size(comm) - 1) / 2.0);
        usleep(200);
    }
    return HT_OK;
}

START_TEST(all_ranks_save_and_find)
{
    struct ht_ckpt_writer *w;
    char path[600];
    int64_t published;

    ck_assert_int_eq(make_writer(&w), HT_OK);
    for (int64_t s = 1; s <= 3; s++) {
        ck_assert_int_eq(save(w, s), HT_OK);
        ck_assert_int_eq(poll_until(w, &published), HT_OK);
        ck_assert_int_eq(published, s);
    }
    ck_assert_int_eq(save(w, 4), HT_OK);
    ck_assert_int_eq(ht_ckpt_finish(w), HT_OK);
    ht_ckpt_writer_free(w);
    ck_assert_int_eq(ht_ckpt_find_latest(path, sizeof path, c.dir, comm, NULL), HT_OK);
    ck_assert_int_eq(ckpt_step_of(path), 4);
    ckpt_check(&c, path, 3, 4);
    ck_assert(!ht_file_exists(ckpt_path(&c, 2)) && ht_file_exists(ckpt_path(&c, 3)));
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);

    // one rank's file is damaged: every rank takes the one before
    snprintf(path, sizeof path, "%s/rank-%05d-of-%05d.h5", ckpt_path(&c, 4), ht_comm_size(comm) - 1,
             ht_comm_size(comm));
    if (ht_comm_rank(comm) == 0) ck_assert_int_eq(truncate(path, 3000), 0);
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
    ck_assert_int_eq(ht_ckpt_find_latest(path, sizeof path, c.dir, comm, NULL), HT_OK);
    ck_assert_int_eq(ckpt_step_of(path), 3);
}
END_TEST

START_TEST(failure_of_the_last_rank_is_known_to_all)
{
    struct ht_ckpt_writer *w;
    const int last = ht_comm_size(comm) - 1;
    char block[600], tmp[300], path[600];
    int64_t published, pid = getpid();

    ck_assert_int_eq(ht_comm_broadcast(comm, &pid, sizeof pid, 0), HT_OK);
    ck_assert_int_eq(make_writer(&w), HT_OK);
    ck_assert_int_eq(save(w, 1), HT_OK);
    ck_assert_int_eq(ht_ckpt_finish(w), HT_OK);
    // a file that stands where the last rank will write
    snprintf(tmp, sizeof tmp, "%s/.step-00000002.tmp-%lld", c.dir, (long long)pid);
    snprintf(block, sizeof block, "%s/rank-%05d-of-%05d.h5", tmp, last, last + 1);
    if (ht_comm_rank(comm) == 0) {
        ck_assert_int_eq(mkdir(tmp, 0777), 0);
        ck_assert_int_eq(mkdir(block, 0777), 0);
    }
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
    ck_assert_int_eq(save(w, 2), HT_OK);
    ck_assert_int_eq(poll_until(w, &published), HT_ERR_IO);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), block)); // on every rank
    ck_assert_ptr_nonnull(strstr(ht_error_message(), strerror(EEXIST)));
    ck_assert_int_eq(published, -1);
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
    ck_assert(!ht_file_exists(tmp));
    ck_assert_int_eq(save(w, 3), HT_OK); // the next one is not hurt
    ck_assert_int_eq(ht_ckpt_finish(w), HT_OK);
    ht_ckpt_writer_free(w);
    ck_assert_int_eq(ht_ckpt_find_latest(path, sizeof path, c.dir, comm, NULL), HT_OK);
    ckpt_check(&c, path, 1, 3);
}
END_TEST

START_TEST(set_up_fails_on_all_ranks)
{
    struct ht_ckpt_writer *w;
    struct ckpt_case bad = c;
    const struct ht_ckpt_writer_options o = { .dir = "/proc/self/nowhere",
                                              .tensors = &bad.list,
                                              .slices = slices,
                                              .n_slices = n_slices,
                                              .shard_size = shard_size,
                                              .keep_last = 1 };

    ck_assert_int_ne(ht_ckpt_writer_create(&w, comm, &o), HT_OK);
    ck_assert_ptr_null(w);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "nowhere"));
}
END_TEST

int main(int argc, char **argv)
{
    if (ht_comm_init(&comm, &argc, &argv) != HT_OK) return 1;
    Suite *s = suite_create("ckpt_mpi");
    TCase *t = tcase_create("ckpt_mpi");

    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, all_ranks_save_and_find);
    tcase_add_test(t, failure_of_the_last_rank_is_known_to_all);
    tcase_add_test(t, set_up_fails_on_all_ranks);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_set_fork_status(r, CK_NOFORK);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    if (n_failed) ht_comm_abort(comm, 1, "a test failed");
    ht_comm_finalize(comm);
    return 0;
}
