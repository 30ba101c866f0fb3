/* tests/data/test_pretokenize.c: words as Hugging Face's patterns cut them. */
#include <jansson.h>
#include <stdbool.h>

#include "data/pretokenize.h"
#include "tests/data/data_test.h"

#define GOLDEN HT_SOURCE_DIR "/tests/golden/tokenizer/"

static const char *const styles[] = { "gpt2", "llama3", "marks" };

/* tests/golden/tokenizer/words.py */
START_TEST(golden_words_are_those_of_the_reference)
{
    struct ht_splitter *s;
    struct ht_splitter_work *w;
    size_t n_file, at = 0, start, end;
    int matched;
    char *file;
    json_error_t e;

    must(ht_file_read(&file, &n_file, GOLDEN "words.json", 1 << 20));
    json_t *root = json_loadb(file, n_file, 0, &e);
    ck_assert_msg(root != NULL, "line %d: %s", e.line, e.text);
    const json_t *text_json = json_object_get(root, "text");
    const char *text = json_string_value(text_json);
    const size_t n = json_string_length(text_json);
    const json_t *style = json_object_get(json_object_get(root, "words"), styles[_i]);
    const char *pattern = json_string_value(json_object_get(style, "pattern"));
    const json_t *lengths = json_object_get(style, "bytes");
    if (_i == 0) ck_assert_str_eq(pattern, HT_PATTERN_GPT2);
    if (_i == 1) ck_assert_str_eq(pattern, HT_PATTERN_LLAMA3);
    must(ht_splitter_create(&s, pattern));
    must(ht_splitter_work_create(&w, s));
    for (size_t i = 0; i < json_array_size(lengths); i++) {
        const size_t want = (size_t)json_integer_value(json_array_get(lengths, i));
        must(ht_splitter_next(w, text, n, &at, &start, &end, &matched));
        ck_assert_msg(end - start == want, "%s: word %zu at byte %zu has %zu bytes, not %zu",
                      styles[_i], i, start, end - start, want);
    }
    ck_assert_uint_eq(at, n);
    must(ht_splitter_next(w, text, n, &at, &start, &end, &matched));
    ck_assert_uint_eq(start, end);
    ht_splitter_work_free(w);
    ht_splitter_free(s);
    json_decref(root);
    free(file);
}
END_TEST

START_TEST(pieces_between_matches_are_pieces)
{
    static const struct {
        size_t end;
        int matched;
    } want[] = { { 1, 0 }, { 3, 1 }, { 5, 0 }, { 6, 1 }, { 7, 0 } };
    struct ht_splitter *s;
    struct ht_splitter_work *w;
    size_t at = 0, start, end;
    int matched;

    must(ht_splitter_create(&s, "\\p{N}+"));
    must(ht_splitter_work_create(&w, s));
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        const size_t before = at;
        must(ht_splitter_next(w, "a12bc3d", 7, &at, &start, &end, &matched));
        ck_assert_uint_eq(start, before);
        ck_assert_uint_eq(end, want[i].end);
        ck_assert_uint_eq(at, end);
        ck_assert_int_eq(matched, want[i].matched);
    }
    ht_splitter_work_free(w);
    ht_splitter_free(s);
}
END_TEST

/* A word of 4 MiB is one match and must not run into a stack, a limit, or quadratic work. */
START_TEST(huge_words_are_one_piece)
{
    static const char *const runs[] = {
        "a", "1", " ", "\n", " \n", "!", "\xC3\xA9", "\xE4\xB8\xAD"
    };
    const size_t n_run = strlen(runs[_i]), n = ((size_t)4 << 20) / n_run * n_run;
    char *text = malloc(n);
    size_t n_pieces;

    ck_assert_ptr_nonnull(text);
    for (size_t i = 0; i < n; i++) text[i] = runs[_i][i % n_run];
    for (int k = 0; k < 2; k++) {
        struct ht_splitter *s;
        struct ht_splitter_work *w;
        size_t at = 0, start = 0, end = 1;
        int matched;
        must(ht_splitter_create(&s, k ? HT_PATTERN_LLAMA3 : HT_PATTERN_GPT2));
        must(ht_splitter_work_create(&w, s));
        for (n_pieces = 0; end > start; n_pieces++)
            must(ht_splitter_next(w, text, n, &at, &start, &end, &matched));
        if (!(k == 1 && *runs[_i] == '1')) // digits: by threes
            ck_assert_uint_le(n_pieces, 2);
        ck_assert_uint_eq(at, n);
        ht_splitter_work_free(w);
        ht_splitter_free(s);
    }
    free(text);
}
END_TEST

START_TEST(byte_characters_are_one_to_one)
{
    bool seen[0x144] = { false };
    char text[2];

    for (int b = 0; b < 256; b++) {
        const int n = ht_byte_char_utf8(text, (unsigned char)b);
        const uint32_t c = n == 1 ? (unsigned char)text[0]
                                  : (uint32_t)(text[0] & 0x1F) << 6 | (uint32_t)(text[1] & 0x3F);
        ck_assert_uint_lt(c, 0x144);
        ck_assert(!seen[c]);
        seen[c] = true;
        ck_assert_int_eq(ht_byte_from_char(c), b);
    }
    for (uint32_t c = 0; c < 0x144; c++)
        if (!seen[c]) ck_assert_int_eq(ht_byte_from_char(c), -1);
    ck_assert_int_eq(ht_byte_from_char(0x144), -1);
    ck_assert_int_eq(ht_byte_from_char(0x10FFFF), -1);
}
END_TEST

static const char *const bad[] = { "", "(", "[a", "\\p{Nonsense}", "\\p{L", "a{2,1}", "(?<=a+)b" };

START_TEST(bad_patterns_are_refused)
{
    struct ht_splitter *s = (struct ht_splitter *)1;
    expect(ht_splitter_create(&s, bad[_i]), HT_ERR_FORMAT, "split pattern");
    ck_assert_ptr_null(s);
}
END_TEST

/* A pattern from a stranger's file that needs exponential work is an error, not a hang. */
START_TEST(exponential_patterns_give_up)
{
    struct ht_splitter *s;
    struct ht_splitter_work *w;
    size_t at = 0, start, end;
    char text[64];
    int matched;

    memset(text, 'a', sizeof text);
    must(ht_splitter_create(&s, "(a|aa|aaa)+(a|aa)+[bc]"));
    must(ht_splitter_work_create(&w, s));
    expect(ht_splitter_next(w, text, sizeof text, &at, &start, &end, &matched), HT_ERR_FORMAT,
           "gave up at byte 0 of 64");
    ht_splitter_work_free(w);
    ht_splitter_free(s);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("pretokenize");
    TCase *words = tcase_create("words"), *refuses = tcase_create("refuses");
    SRunner *runner = srunner_create(suite);

    tcase_add_loop_test(words, golden_words_are_those_of_the_reference, 0, 3);
    tcase_add_test(words, pieces_between_matches_are_pieces);
    tcase_add_loop_test(words, huge_words_are_one_piece, 0, 8);
    tcase_add_test(words, byte_characters_are_one_to_one);
    suite_add_tcase(suite, words);
    tcase_add_loop_test(refuses, bad_patterns_are_refused, 0, (int)(sizeof bad / sizeof *bad));
    tcase_add_test(refuses, exponential_patterns_give_up);
    suite_add_tcase(suite, refuses);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
