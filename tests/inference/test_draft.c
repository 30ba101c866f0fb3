/* tests/inference/test_draft.c: what n-gram lookup guesses and when it stops guessing. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "inference/draft.h"

static int64_t guess(const int32_t *ids, int64_t n, int64_t most, int32_t *out)
{
    struct ht_draft d;

    ht_draft_init(&d);
    d.length = HT_DRAFT_MOST;
    return ht_draft_guess(&d, ids, n, most, out);
}

START_TEST(the_longest_match_counts_then_the_latest)
{
    int32_t out[HT_DRAFT_MOST];
    // "5 6" was followed by 7 and, later, by 8; "4 5 6" by 7
    const int32_t ids[] = { 4, 5, 6, 7, 1, 5, 6, 8, 2, 4, 5, 6 };
    ck_assert_int_eq(guess(ids, 12, 3, out), 3);
    ck_assert(out[0] == 7 && out[1] == 1 && out[2] == 5);
    const int32_t later[] = { 5, 6, 7, 1, 5, 6, 8, 2, 3, 5, 6 };
    ck_assert_int_eq(guess(later, 11, 2, out), 2);
    ck_assert(out[0] == 8 && out[1] == 2);
}
END_TEST

START_TEST(guesses_go_on_past_the_end)
{
    int32_t out[HT_DRAFT_MOST];
    const int32_t ids[] = { 9, 1, 2, 3, 1, 2, 3 };
    ck_assert_int_eq(guess(ids, 7, 8, out), 8);
    for (int i = 0; i < 8; i++) ck_assert_int_eq(out[i], 1 + i % 3);
}
END_TEST

START_TEST(nothing_to_go_by_gives_no_guess)
{
    int32_t out[HT_DRAFT_MOST];
    const int32_t ids[] = { 1, 2, 3, 4, 5, 3 }; // one token in common is too few
    ck_assert_int_eq(guess(ids, 6, 8, out), 0);
    ck_assert_int_eq(guess(ids, 1, 8, out), 0);
    const int32_t two[] = { 1, 1, 1 };
    ck_assert_int_eq(guess(two, 3, 0, out), 0);
    ck_assert_int_eq(guess(two, 3, 4, out), 4);
}
END_TEST

START_TEST(wrong_guesses_stop_and_right_ones_grow)
{
    static int32_t ids[200];
    int32_t out[HT_DRAFT_MOST];
    struct ht_draft d;
    int tries = 0, longest_wait = 0, wait = 0;

    ht_draft_init(&d);
    for (int i = 0; i < 2000; i++) { // always a guess, never right
        const int64_t n = ht_draft_guess(&d, ids, 200, 8, out);
        wait = n ? 0 : wait + 1;
        longest_wait = wait > longest_wait ? wait : longest_wait;
        tries += n > 0;
        ht_draft_learn(&d, n, 0);
    }
    ck_assert_int_lt(tries, 40);
    ck_assert_int_ge(longest_wait, 500);
    while (ht_draft_guess(&d, ids, 200, 8, out) == 0) {
    }
    for (int i = 0; i < 10; i++) { // the text has changed its mind
        const int64_t n = ht_draft_guess(&d, ids, 200, 8, out);
        ht_draft_learn(&d, n, n);
    }
    ck_assert_int_eq(ht_draft_guess(&d, ids, 200, 8, out), 8);
    ck_assert_int_eq(ht_draft_guess(&d, ids, 200, 3, out), 3);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("draft");
    TCase *c = tcase_create("draft");
    SRunner *r = srunner_create(s);

    suite_add_tcase(s, c);
    tcase_add_test(c, the_longest_match_counts_then_the_latest);
    tcase_add_test(c, guesses_go_on_past_the_end);
    tcase_add_test(c, nothing_to_go_by_gives_no_guess);
    tcase_add_test(c, wrong_guesses_stop_and_right_ones_grow);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
