/* tests/data/test_tokenizer.c: ids and texts are those of the reference implementation; round
 * trips; refusals. */
#include <check.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "data/pretokenize.h"
#include "data/tokenizer.h"

#define GOLDEN HT_SOURCE_DIR "/tests/golden/tokenizer/"

static const char *const golden[] = { "gpt2",      "prefix_space", "llama3", "fallback",
                                      "metaspace", "nfc",          "splits" };
#define N_GOLDEN ((int)(sizeof golden / sizeof *golden))

static struct ht_tokenizer *load(const char *name)
{
    struct ht_tokenizer *t = NULL;
    char path[512];
    (void)snprintf(path, sizeof path, GOLDEN "%s.tokenizer.json", name);
    ck_assert_msg(ht_tokenizer_load(&t, path) == HT_OK, "%s", ht_error_message());
    return t;
}

/* All of ids at once, as one string: free() it. */
static char *decode(const struct ht_tokenizer *t, const struct ht_ids *a, bool skip_special,
                    size_t *n_out)
{
    struct ht_token_decoder *d = NULL;
    const char *text;
    char *all = NULL;
    size_t n, used = 0;
    FILE *f = open_memstream(&all, &used);
    ck_assert_int_eq(ht_token_decoder_create(&d, t, skip_special), HT_OK);
    for (int64_t i = 0; i <= a->n; i++) {
        if (i < a->n)
            ck_assert_int_eq(ht_token_decoder_push(d, a->ids[i], &text, &n), HT_OK);
        else
            ck_assert_int_eq(ht_token_decoder_finish(d, &text, &n), HT_OK);
        char *fixed = NULL;
        size_t n_fixed;
        ck_assert_int_eq(ht_utf8_repair(&fixed, &n_fixed, text, n), HT_OK);
        ck_assert_msg(!fixed, "piece %lld is not UTF-8",
                      (long long)i); // each piece is whole characters
        ck_assert_int_eq(text[n], 0);
        (void)fwrite(text, 1, n, f);
    }
    (void)fclose(f);
    ht_token_decoder_free(d);
    *n_out = used;
    return all;
}

static bool same_ids(const struct ht_ids *a, const json_t *want)
{
    if ((size_t)a->n != json_array_size(want)) return false;
    for (int64_t i = 0; i < a->n; i++)
        if (a->ids[i] != json_integer_value(json_array_get(want, (size_t)i))) return false;
    return true;
}

static void print_difference(const char *name, const json_t *j, const char *key,
                             const struct ht_ids *a)
{
    char *text = json_dumps(json_object_get(j, "text"), JSON_ENCODE_ANY | JSON_ENSURE_ASCII);
    char *ids = json_dumps(json_object_get(j, key), JSON_COMPACT);
    printf("%s, %s of %.300s\n  want %.600s\n  have ", name, key, text, ids);
    for (int64_t i = 0; i < a->n && i < 100; i++) printf("%d,", a->ids[i]);
    printf("\n");
    free(text);
    free(ids);
}

START_TEST(ids_and_texts_are_those_of_the_reference)
{
    static const char *const id_keys[] = { "ids", "ids_special" }, *const text_keys[] = {
        "decoded", "decoded_skip"
    };
    const char *name = golden[_i];
    struct ht_tokenizer *t = load(name);
    struct ht_encoder *e = NULL;
    struct ht_ids a = { 0 };
    char path[512];
    size_t i;
    json_t *j;
    int n_bad = 0;

    (void)snprintf(path, sizeof path, GOLDEN "%s.cases.json", name);
    json_t *cases = json_load_file(path, JSON_ALLOW_NUL, NULL);
    ck_assert_uint_gt(json_array_size(cases), 150);
    ck_assert_int_eq(ht_encoder_create(&e, t), HT_OK);
    json_array_foreach(cases, i, j)
    {
        const json_t *text = json_object_get(j, "text");
        for (int k = 0; k < 2; k++) {
            a.n = 0;
            ck_assert_msg(ht_encode(e, json_string_value(text), json_string_length(text), k == 1,
                                    &a) == HT_OK,
                          "%s", ht_error_message());
            if (same_ids(&a, json_object_get(j, id_keys[k]))) continue;
            print_difference(name, j, id_keys[k], &a);
            n_bad++;
        }
        for (int k = 0; k < 2; k++) {
            const json_t *want = json_object_get(j, text_keys[k]);
            const json_t *ids = json_object_get(j, "ids_special");
            size_t n, m;
            json_t *id;
            a.n = 0;
            json_array_foreach(ids, m, id)
            {
                const int32_t value = (int32_t)json_integer_value(id);
                ck_assert_int_eq(ht_ids_append(&a, &value, 1), HT_OK);
            }
            char *have = decode(t, &a, k == 1, &n);
            if (n != json_string_length(want) || memcmp(have, json_string_value(want), n) != 0) {
                print_difference(name, j, text_keys[k], &a);
                n_bad++;
            }
            free(have);
        }
    }
    ck_assert_int_eq(n_bad, 0);
    json_decref(cases);
    ht_ids_free(&a);
    ht_encoder_free(e);
    ht_tokenizer_free(t);
}
END_TEST

static uint32_t draw(uint64_t *counter)
{
    return (uint32_t)(ht_rng_u64(11, 5, (*counter)++) >> 32);
}

static size_t put_utf8(char *p, uint32_t c)
{
    if (c < 0x80) {
        p[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        p[0] = (char)(0xC0 | c >> 6);
        p[1] = (char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        p[0] = (char)(0xE0 | c >> 12);
        p[1] = (char)(0x80 | (c >> 6 & 0x3F));
        p[2] = (char)(0x80 | (c & 0x3F));
        return 3;
    }
    p[0] = (char)(0xF0 | c >> 18);
    p[1] = (char)(0x80 | (c >> 12 & 0x3F));
    p[2] = (char)(0x80 | (c >> 6 & 0x3F));
    p[3] = (char)(0x80 | (c & 0x3F));
    return 4;
}

START_TEST(decoding_gives_back_what_was_encoded)
{
    static const uint32_t tops[] = { 0x80, 0x80, 0x250, 0x3000, 0xD800, 0x110000 };
    struct ht_tokenizer *t = load(_i ? "llama3" : "gpt2");
    struct ht_encoder *e = NULL;
    struct ht_ids a = { 0 };
    char text[4 * 400];
    uint64_t counter = 0;

    ck_assert_int_eq(ht_encoder_create(&e, t), HT_OK);
    for (int k = 0; k < 500; k++) {
        const uint32_t top = tops[draw(&counter) % 6], n_chars = draw(&counter) % 400;
        size_t n = 0, n_back;
        for (uint32_t i = 0; i < n_chars; i++) {
            const uint32_t c = draw(&counter) % 4 ? draw(&counter) % top : ' ';
            if (c < 0xD800 || c > 0xDFFF) n += put_utf8(text + n, c);
        }
        a.n = 0;
        ck_assert_int_eq(ht_encode(e, text, n, false, &a), HT_OK);
        char *back = decode(t, &a, false, &n_back);
        ck_assert_msg(n == n_back && memcmp(text, back, n) == 0,
                      "text %d of %zu bytes came back as %zu", k, n, n_back);
        free(back);
    }
    ht_ids_free(&a);
    ht_encoder_free(e);
    ht_tokenizer_free(t);
}
END_TEST

START_TEST(random_bytes_and_ids_do_no_harm)
{
    struct ht_tokenizer *t = load(golden[_i]);
    struct ht_encoder *e = NULL;
    struct ht_ids a = { 0 };
    char text[200];
    size_t n_text;
    uint64_t counter = 0;

    ck_assert_int_eq(ht_encoder_create(&e, t), HT_OK);
    for (int k = 0; k < 600; k++) {
        const size_t n = draw(&counter) % sizeof text;
        for (size_t i = 0; i < n; i++) text[i] = (char)(draw(&counter) % (k % 2 ? 256 : 128));
        a.n = 0;
        ck_assert_int_eq(ht_encode(e, text, n, k % 3 == 0, &a), HT_OK);
        for (int64_t i = 0; i < a.n; i++) ck_assert_ptr_nonnull(ht_tokenizer_token(t, a.ids[i]));
        a.n = 0;
        for (size_t i = 0; i < n; i++) {
            const int32_t id =
                (int32_t)(draw(&counter) % (uint32_t)(ht_tokenizer_vocab_size(t) + 9)) - 4;
            ck_assert_int_eq(ht_ids_append(&a, &id, 1), HT_OK);
        }
        free(decode(t, &a, k % 2, &n_text));
    }
    ht_ids_free(&a);
    ht_encoder_free(e);
    ht_tokenizer_free(t);
}
END_TEST

START_TEST(long_words_take_no_longer_than_n_log_n)
{
    static const char letters[] = "a \n.0";
    struct ht_tokenizer *t = load(golden[_i]);
    struct ht_encoder *e = NULL;
    struct ht_ids a = { 0 };
    const size_t n = (size_t)1 << 20;
    char *text = malloc(n);

    ck_assert_int_eq(ht_encoder_create(&e, t), HT_OK);
    for (int k = 0; k < 5; k++) {
        const clock_t start = clock(); // processor time: other processes do not count
        memset(text, letters[k], n);
        a.n = 0;
        ck_assert_int_eq(ht_encode(e, text, n, false, &a), HT_OK);
        ck_assert_double_lt((double)(clock() - start) / CLOCKS_PER_SEC, 20.0); // quadratic: days
    }
    free(text);
    ht_ids_free(&a);
    ht_encoder_free(e);
    ht_tokenizer_free(t);
}
END_TEST

START_TEST(malformed_text_becomes_replacement_characters)
{
    static const struct {
        const char *text, *want;
    } cases[] = {
        // what Python's errors="replace" gives
        { "a\xFFz", "a\uFFFDz" },
        { "\xC0\x80", "\uFFFD\uFFFD" },
        { "\xE2\x82", "\uFFFD" },
        { "\xE2\x82z", "\uFFFDz" },
        { "\xF0\x9F\x99", "\uFFFD" },
        { "\xED\xA0\x80", "\uFFFD\uFFFD\uFFFD" },
        { "\xF4\x90\x80\x80", "\uFFFD\uFFFD\uFFFD\uFFFD" },
        { "\xF0\x80\x80", "\uFFFD\uFFFD\uFFFD" },
        { "12345678\x80", "12345678\uFFFD" },
    };
    char *fixed;
    size_t n;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ck_assert_int_eq(ht_utf8_repair(&fixed, &n, cases[i].text, strlen(cases[i].text)), HT_OK);
        ck_assert_ptr_nonnull(fixed);
        ck_assert_str_eq(fixed, cases[i].want);
        ck_assert_uint_eq(n, strlen(cases[i].want));
        free(fixed);
    }
    ck_assert_int_eq(ht_utf8_repair(&fixed, &n, "h\u00e9\u6f22\U0001F642", 10), HT_OK);
    ck_assert_ptr_null(fixed);
    for (int b = 0; b < 256; b++) {
        char utf8[2];
        const int len = ht_byte_char_utf8(utf8, (unsigned char)b);
        const uint32_t c =
            len == 1 ? (uint32_t)utf8[0] : (uint32_t)(utf8[0] & 0x1F) << 6 | (utf8[1] & 0x3F);
        ck_assert_int_eq(ht_byte_from_char(c), b);
    }
    ck_assert_int_eq(ht_byte_from_char(0x144), -1);
}
END_TEST

START_TEST(tokens_are_found_by_text_and_id)
{
    struct ht_tokenizer *t = load("llama3");
    const int32_t id = ht_tokenizer_find(t, "<|eot_id|>");
    ck_assert_int_eq(id, 702);
    ck_assert_int_eq(ht_tokenizer_vocab_size(t), 705);
    ck_assert_str_eq(ht_tokenizer_token(t, id), "<|eot_id|>");
    ck_assert(ht_tokenizer_is_special(t, id));
    ck_assert(!ht_tokenizer_is_special(t, 5));
    ck_assert(!ht_tokenizer_is_special(t, -1));
    ck_assert_int_eq(ht_tokenizer_find(t, "no such token"), -1);
    ck_assert_ptr_null(ht_tokenizer_token(t, 705));
    ck_assert_ptr_null(ht_tokenizer_token(t, -1));
    ck_assert_uint_eq(strlen(ht_tokenizer_hash(t)), 32);
    ht_tokenizer_free(t);
}
END_TEST

#define MODEL(vocab, merges)                                                                       \
    "{\"model\":{\"type\":\"BPE\",\"vocab\":" vocab ",\"merges\":" merges "}"
static const struct {
    const char *json, *message;
    enum ht_status status;
} refused[] = {
    { "", "", HT_ERR_FORMAT },
    { "[]", "no model", HT_ERR_FORMAT },
    { "{\"model\":{\"type\":\"Unigram\",\"vocab\":[]}}", "Unigram", HT_ERR_FORMAT },
    { "{\"model\":{\"type\":\"BPE\",\"vocab\":{},\"merges\":[]}}", "empty", HT_ERR_FORMAT },
    { "{\"model\":{\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", "duplicate", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "7") "}", "merges", HT_ERR_FORMAT },
    { MODEL("{\"a\":-1}", "[]") "}", "id -1", HT_ERR_FORMAT },
    { MODEL("{\"a\":1000000}", "[]") "}", "1000000", HT_ERR_FORMAT },
    { MODEL("{\"a\":0.5}", "[]") "}", "id", HT_ERR_FORMAT },
    { MODEL("{\"a\":0,\"b\":0}", "[]") "}", "both have id 0", HT_ERR_FORMAT },
    { MODEL("{\"a\":0,\"b\":1}", "[\"a b\"]") "}", "the result", HT_ERR_FORMAT },
    { MODEL("{\"a\":0,\"b\":1}", "[\"a c\"]") "}", "the second", HT_ERR_FORMAT },
    { MODEL("{\"a\":0,\"b\":1}", "[\"ab\"]") "}", "not a pair", HT_ERR_FORMAT },
    { MODEL("{\"a\":0,\"b\":1}", "[[\"a\"]]") "}", "not a pair", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"pre_tokenizer\":{\"type\":\"Magic\"}}", "\"Magic\"",
      HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"normalizer\":{\"type\":\"Magic\"}}", "\"Magic\"",
      HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"decoder\":{\"type\":\"Magic\"}}", "\"Magic\"", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"post_processor\":{\"type\":\"Magic\"}}", "\"Magic\"",
      HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Isolated\","
                               "\"pattern\":{\"Regex\":\"(\"}}}",
      "pattern", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"pre_tokenizer\":{\"type\":\"Split\",\"behavior\":\"Sideways\","
                               "\"pattern\":{\"Regex\":\"a\"}}}",
      "Sideways", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"added_tokens\":[{\"id\":0,\"content\":\"b\"}]}",
      "both have id 0", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"added_tokens\":[{\"id\":1,\"content\":\"a\"}]}", "also 0",
      HT_ERR_FORMAT },
    { MODEL("{\"a\":0}", "[]") ",\"added_tokens\":[{\"id\":1}]}", "content", HT_ERR_FORMAT },
    { MODEL("{\"a\":0}",
            "[]") ",\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[]}}",
      "0 times", HT_ERR_FORMAT },
    { "{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"dropout\":0.1}}", "dropout",
      HT_ERR_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"end_of_word_suffix\":\"</w>\"}}", "</w>",
      HT_ERR_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":0},\"merges\":[],\"unk_token\":\"?\"}}", "unk_token",
      HT_ERR_FORMAT },
};

START_TEST(what_is_not_understood_is_refused)
{
    struct ht_tokenizer *t = NULL;
    ck_assert_int_eq(ht_tokenizer_parse(&t, refused[_i].json, strlen(refused[_i].json), "x.json"),
                     refused[_i].status);
    ck_assert_ptr_null(t);
    ck_assert_msg(strstr(ht_error_message(), refused[_i].message) != NULL, "%s",
                  ht_error_message());
}
END_TEST

START_TEST(cut_files_are_refused_without_a_leak)
{
    struct ht_tokenizer *t = NULL;
    char *json = NULL;
    size_t n = 0;
    ck_assert_int_eq(ht_file_read(&json, &n, GOLDEN "llama3.tokenizer.json", 1 << 20), HT_OK);
    for (size_t cut = 0; cut + 2 < n; cut += 97)
        ck_assert_int_eq(ht_tokenizer_parse(&t, json, cut, "cut.json"), HT_ERR_FORMAT);
    free(json);
    ck_assert_int_eq(ht_tokenizer_load(&t, GOLDEN "absent.json"), HT_ERR_IO);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tokenizer");
    TCase *c = tcase_create("tokenizer");
    tcase_set_timeout(c, 200);
    tcase_add_loop_test(c, ids_and_texts_are_those_of_the_reference, 0, N_GOLDEN);
    tcase_add_loop_test(c, decoding_gives_back_what_was_encoded, 0, 2);
    tcase_add_loop_test(c, random_bytes_and_ids_do_no_harm, 0, N_GOLDEN);
    tcase_add_loop_test(c, long_words_take_no_longer_than_n_log_n, 0, N_GOLDEN);
    tcase_add_test(c, malformed_text_becomes_replacement_characters);
    tcase_add_test(c, tokens_are_found_by_text_and_id);
    tcase_add_loop_test(c, what_is_not_understood_is_refused, 0,
                        (int)(sizeof refused / sizeof *refused));
    tcase_add_test(c, cut_files_are_refused_without_a_leak);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed ? 1 : 0;
}
