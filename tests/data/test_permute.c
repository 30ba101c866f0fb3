/* tests/data/test_permute.c: the document order is a bijection, mixes well, and mixtures keep their
 * shares. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "data/mix.h"
#include "data/permute.h"

START_TEST(permutation_hits_every_value_once)
{
    static const uint64_t sizes[] = { 1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 1000, 4097, 100003 };
    unsigned char *seen = calloc(100003, 1);

    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        for (uint64_t seed = 0; seed < 8; seed++) {
            struct ht_permute p;
            ht_permute_init(&p, sizes[k], seed, 11, seed / 3);
            memset(seen, 0, sizes[k]);
            for (uint64_t i = 0; i < sizes[k]; i++) {
                const uint64_t v = ht_permute_at(&p, i);
                ck_assert_uint_lt(v, sizes[k]);
                ck_assert_msg(!seen[v], "n %llu seed %llu: %llu twice",
                              (unsigned long long)sizes[k], (unsigned long long)seed,
                              (unsigned long long)v);
                seen[v] = 1;
            }
        }
    free(seen);
}
END_TEST

START_TEST(huge_domain_stays_inside_and_differs)
{
    const uint64_t n = ((uint64_t)1 << 40) + 12345;
    struct ht_permute p;
    uint64_t low = 0;

    ht_permute_init(&p, n, 7, 1, 0);
    for (uint64_t i = 0; i < 10000; i++) {
        const uint64_t v = ht_permute_at(&p, i);
        ck_assert_uint_lt(v, n);
        low += v & 1;
    }
    ck_assert_int_lt(llabs((long long)low - 5000), 250); // 5 sigma of a fair coin
}
END_TEST

START_TEST(key_decides_the_order)
{
    struct ht_permute a, b, c, d;
    int same_b = 0, same_c = 0, same_d = 0;

    ht_permute_init(&a, 1000, 1, 2, 3);
    ht_permute_init(&b, 1000, 2, 2, 3);
    ht_permute_init(&c, 1000, 1, 3, 3);
    ht_permute_init(&d, 1000, 1, 2, 4);
    for (uint64_t i = 0; i < 1000; i++) {
        same_b += ht_permute_at(&a, i) == ht_permute_at(&b, i);
        same_c += ht_permute_at(&a, i) == ht_permute_at(&c, i);
        same_d += ht_permute_at(&a, i) == ht_permute_at(&d, i);
    }
    ck_assert_int_le(same_b, 8); // 1 on average
    ck_assert_int_le(same_c, 8);
    ck_assert_int_le(same_d, 8);
}
END_TEST

/* Each place of a small and of a larger domain gets each value about equally often over the keys,
 * and so does each pair (first, second): chi square against the uniform distribution. */
START_TEST(orders_are_spread_evenly)
{
    static const uint64_t sizes[] = { 3, 4, 5, 8, 13 };
    enum { KEYS = 20000 };

    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
        const uint64_t n = sizes[k];
        double place[13][13] = { { 0 } }, pair[13][13] = { { 0 } };
        for (uint64_t key = 0; key < KEYS; key++) {
            struct ht_permute p;
            ht_permute_init(&p, n, 99, 5, key);
            for (uint64_t i = 0; i < n; i++) place[i][ht_permute_at(&p, i)]++;
            pair[ht_permute_at(&p, 0)][ht_permute_at(&p, 1)]++;
        }
        double chi_place = 0, chi_pair = 0;
        const double e_place = (double)KEYS / (double)n, e_pair = e_place / (double)(n - 1);
        for (uint64_t i = 0; i < n; i++)
            for (uint64_t v = 0; v < n; v++) {
                chi_place += pow(place[i][v] - e_place, 2) / e_place;
                if (i != v) chi_pair += pow(pair[i][v] - e_pair, 2) / e_pair;
            }
        const double free_place = (double)((n - 1) * (n - 1)),
                     free_pair = (double)(n * (n - 1) - 1);
        ck_assert_msg(chi_place < free_place + 5 * sqrt(2 * free_place) + 5,
                      "n %d: places %.1f of %.0f", (int)n, chi_place, free_place);
        ck_assert_msg(chi_pair < free_pair + 5 * sqrt(2 * free_pair) + 5,
                      "n %d: pairs %.1f of %.0f", (int)n, chi_pair, free_pair);
    }
}
END_TEST

START_TEST(order_of_a_key_never_changes)
{
    static const uint64_t want[10] = { 4, 9, 6, 8, 2, 7, 5, 0, 3, 1 };
    struct ht_permute p;

    ht_permute_init(&p, 10, 42, 7, 0);
    for (uint64_t i = 0; i < 10; i++) ck_assert_uint_eq(ht_permute_at(&p, i), want[i]);
}
END_TEST

START_TEST(shares_stay_within_a_document)
{
    static const double weights[4] = { 0.5, 0.3, 0.15, 0.05 };
    enum { MAX_DOC = 1000 };
    int64_t scaled[4], tokens[4] = { 0 }, total = 0;

    ck_assert_int_eq(ht_mix_scale(scaled, weights, 4), HT_OK);
    for (uint64_t i = 0; i < 200000; i++) {
        const int d = ht_mix_choose(scaled, tokens, 4);
        const int64_t n = (int64_t)(ht_rng_u64(3, 4, i) % (MAX_DOC + 1)); // empty ones too
        tokens[d] += n;
        total += n;
        for (int k = 0; k < 4; k++)
            ck_assert_double_le(fabs((double)tokens[k] - weights[k] * (double)total),
                                2.0 * MAX_DOC);
    }
}
END_TEST

START_TEST(choice_follows_deficit_then_index)
{
    const int64_t scaled[3] = { 1, 1, 2 }, none[3] = { 0, 0, 0 };

    ck_assert_int_eq(ht_mix_choose(scaled, (int64_t[]){ 0, 0, 0 }, 3), 0); // a tie
    ck_assert_int_eq(ht_mix_choose(scaled, (int64_t[]){ 5, 0, 0 }, 3), 2);
    ck_assert_int_eq(ht_mix_choose(scaled, (int64_t[]){ 5, 0, 10 }, 3), 1);
    ck_assert_int_eq(ht_mix_choose((int64_t[]){ 0, 1, 0 }, (int64_t[]){ 0, 9, 0 }, 3), 1);
    ck_assert_int_eq(ht_mix_choose(none, none, 3), -1);
    // past the range of 64-bit products
    const int64_t big = (int64_t)1 << 60, w[2] = { 1 << 30, 1 << 30 };
    ck_assert_int_eq(ht_mix_choose(w, (int64_t[]){ big, big - 1 }, 2), 1);
}
END_TEST

START_TEST(weights_are_checked)
{
    int64_t scaled[3];

    ck_assert_int_eq(ht_mix_scale(scaled, (double[]){ 1, -0.5, 1 }, 3), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "dataset 1 is -0.5"));
    ck_assert_int_eq(ht_mix_scale(scaled, (double[]){ 1, NAN, 1 }, 3), HT_ERR_ARG);
    ck_assert_int_eq(ht_mix_scale(scaled, (double[]){ INFINITY, 1, 1 }, 3), HT_ERR_ARG);
    ck_assert_int_eq(ht_mix_scale(scaled, (double[]){ 0, 0, 0 }, 3), HT_ERR_ARG);
    ck_assert_int_eq(ht_mix_scale(scaled, (double[]){ 0, 1e-30, 1e30 }, 3), HT_OK);
    ck_assert_int_eq(scaled[0], 0);
    ck_assert_int_eq(scaled[1], 1);
    ck_assert_int_eq(scaled[2], 1 << 30);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("permute");
    TCase *order = tcase_create("order"), *mix = tcase_create("mix");

    tcase_add_test(order, permutation_hits_every_value_once);
    tcase_add_test(order, huge_domain_stays_inside_and_differs);
    tcase_add_test(order, key_decides_the_order);
    tcase_add_test(order, orders_are_spread_evenly);
    tcase_add_test(order, order_of_a_key_never_changes);
    tcase_add_test(mix, shares_stay_within_a_document);
    tcase_add_test(mix, choice_follows_deficit_then_index);
    tcase_add_test(mix, weights_are_checked);
    suite_add_tcase(s, order);
    suite_add_tcase(s, mix);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
