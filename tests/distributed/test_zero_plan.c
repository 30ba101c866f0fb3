/* tests/distributed/test_zero_plan.c: the bucket plan of any rank count, without communication. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "distributed/zero.h"

static const struct {
    int64_t n_matrix, n_total, bucket_bytes;
} sizes[] = {
    { 0, 0, 4096 },         { 64, 64, 1 },
    { 0, 640, 4096 },       { 640, 704, 100 },
    { 6400, 6464, 2560 },   { 12800, 13440, 1 << 20 },
    { 65536, 69632, 8192 }, { 100032, 100096, 7777 },
};

static void check_plan(int64_t n_matrix, int64_t n_total, int64_t bucket_bytes, int n_ranks)
{
    unsigned char *flat = calloc((size_t)n_total + 1, 1);

    for (int rank = 0; rank < n_ranks; rank++) {
        struct ht_zero_slice *s;
        int n;
        int64_t size, flat_before = 0, shard_before = 0;

        ck_assert_int_eq(
            ht_zero_plan(&s, &n, &size, n_matrix, n_total, bucket_bytes, n_ranks, rank), HT_OK);
        ck_assert_int_eq(size * n_ranks, ht_zero_padded_matrix(n_matrix, n_ranks) +
                                             ht_zero_padded_vector(n_matrix, n_total, n_ranks));
        for (int i = 0; i < n; i++) {
            ck_assert_int_gt(s[i].n, 0);
            ck_assert_int_ge(s[i].flat_start, flat_before); // ascending, apart
            ck_assert_int_ge(s[i].shard_start, shard_before);
            flat_before = s[i].flat_start + s[i].n;
            shard_before = s[i].shard_start + s[i].n;
            ck_assert_int_le(flat_before, n_total);
            ck_assert_int_le(shard_before, size);
            // wholly in one part, on a cache line
            ck_assert(flat_before <= n_matrix || s[i].flat_start >= n_matrix);
            ck_assert(s[i].flat_start % 64 == 0 && s[i].shard_start % 64 == 0);
            if (n_ranks == 1) ck_assert_int_eq(s[i].flat_start, s[i].shard_start);
            for (int64_t k = s[i].flat_start; k < flat_before; k++) flat[k]++;
        }
        free(s);
    }
    int64_t n_wrong = 0;
    for (int64_t k = 0; k < n_total; k++) n_wrong += flat[k] != 1; // exactly one owner
    ck_assert_int_eq(n_wrong, 0);
    ck_assert_int_ge(ht_zero_padded_total(n_matrix, n_total, bucket_bytes, n_ranks), n_total);
    free(flat);
}

START_TEST(every_element_has_one_owner)
{
    for (int n_ranks = 1; n_ranks <= 8; n_ranks++)
        check_plan(sizes[_i].n_matrix, sizes[_i].n_total, sizes[_i].bucket_bytes, n_ranks);
    check_plan(sizes[_i].n_matrix, sizes[_i].n_total, sizes[_i].bucket_bytes, 129);
}
END_TEST

START_TEST(bad_sizes_are_refused)
{
    struct ht_zero_slice *s;
    int n;

    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 65, 128, 4096, 2, 0), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "65"));
    ck_assert_ptr_null(s);
    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 128, 64, 4096, 2, 0), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 64, 128, 0, 2, 0), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 64, 128, 4096, 2, 2), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 64, 128, 4096, 0, 0), HT_ERR_ARG);
    // a trillion elements in buckets of one element each
    ck_assert_int_eq(ht_zero_plan(&s, &n, NULL, 1LL << 40, 1LL << 40, 4, 1, 0), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "larger"));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("zero_plan");
    TCase *tc = tcase_create("plan");

    tcase_add_loop_test(tc, every_element_has_one_owner, 0, sizeof sizes / sizeof *sizes);
    tcase_add_test(tc, bad_sizes_are_refused);
    suite_add_tcase(s, tc);
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return n_failed != 0;
}
