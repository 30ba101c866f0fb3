/* tests/data/test_normal_form.c: normal forms against utf8proc's own, and many marks. */
#include <utf8proc.h>

#include "data/tokenizer_impl.h"
#include "tests/data/data_test.h"

static const int options[] = {
    [HT_NORM_NFC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE,
    [HT_NORM_NFD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE,
    [HT_NORM_NFKC] = UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT,
    [HT_NORM_NFKD] = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT,
};

/* Text of n characters: of all planes (odd seeds), or of few that compose, carry marks or are
 * plain. */
static size_t random_text(char *out, int n, uint64_t seed)
{
    static const int32_t few[] = { 'a',    'e',    ' ',    0xE9,   0x1E69, 0x300,  0x301,  0x323,
                                   0x327,  0x345,  0x3B1,  0x1F80, 0xAC00, 0x1100, 0x1161, 0x11A8,
                                   0x212B, 0xFDFA, 0xFB01, 0x0F73, 0x0F71, 0x0958, 0x1D15E };
    size_t at = 0;
    for (int i = 0; i < n; i++) {
        const uint64_t r = ht_rng_u64(seed, 1, (uint64_t)i);
        int32_t c = few[r % (sizeof few / sizeof *few)];
        if (seed % 2) c = (int32_t)(r % (r >> 60 ? 0x3400 : 0x110000));
        if (c >= 0xD800 && c < 0xE000) c = 0x300 + c % 0x70;
        at += (size_t)utf8proc_encode_char(c ? c : 1, (utf8proc_uint8_t *)out + at);
    }
    return at;
}

START_TEST(forms_are_those_of_utf8proc)
{
    char text[4 * 200];

    for (uint64_t seed = 0; seed < 4000; seed++) {
        const size_t n = random_text(text, (int)(seed % 200), seed);
        for (int kind = HT_NORM_NFC; kind <= HT_NORM_NFKD; kind++) {
            struct ht_bytes got = { 0 };
            utf8proc_uint8_t *want;
            const utf8proc_ssize_t n_want =
                utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)n, &want,
                             (utf8proc_option_t)options[kind]);
            ck_assert_int_ge(n_want, 0);
            must(ht_bytes_append(&got, "x", 1)); // it appends
            must(ht_normal_form(&got, (enum ht_norm_kind)kind, text, n));
            ck_assert_msg(got.n == (size_t)n_want + 1 && !memcmp(got.p + 1, want, got.n - 1),
                          "seed %llu, form %d", (unsigned long long)seed, kind);
            free(got.p);
            free(want);
        }
    }
}
END_TEST

/* 300000 marks before 300000 of a lower class: exchanging neighbours would take 9e10 steps. */
START_TEST(many_marks_are_ordered)
{
    const size_t n_marks = 300000, n = 1 + 4 * n_marks;
    char *text = malloc(n);
    struct ht_bytes got = { 0 };

    ck_assert_ptr_nonnull(text);
    text[0] = 'q';
    for (size_t i = 0; i < 2 * n_marks; i++)
        memcpy(text + 1 + 2 * i, i < n_marks ? "\xCC\x95" : "\xCC\x96", 2); // 232, 220
    must(ht_normal_form(&got, (enum ht_norm_kind)_i, text, n));
    ck_assert_uint_eq(got.n, n);
    for (size_t i = 0; i < 2 * n_marks; i++)
        ck_assert_mem_eq(got.p + 1 + 2 * i, i < n_marks ? "\xCC\x96" : "\xCC\x95", 2);
    free(got.p);
    free(text);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("normal_form");
    TCase *forms = tcase_create("forms");
    SRunner *runner = srunner_create(suite);

    tcase_add_test(forms, forms_are_those_of_utf8proc);
    tcase_add_loop_test(forms, many_marks_are_ordered, HT_NORM_NFC, HT_NORM_NFKD + 1);
    suite_add_tcase(suite, forms);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
