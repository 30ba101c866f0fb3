/* tests/data/test_text_source.c: files, folders and JSONL become the promised documents. */
#include <stdbool.h>
#include <sys/stat.h>
#include <zlib.h>
#include <zstd.h>

#include "data/text_source.h"
#include "tests/data/data_test.h"

static char folder[PATH_MAX];

static void setup(void)
{
    make_folder(folder);
}

static void teardown(void)
{
    ht_file_remove_tree(folder);
}

enum packing { PLAIN, GZIP, ZSTD, GZIP_MEMBERS, ZSTD_FRAMES, N_PACKINGS };

/* Append text to out as one gzip member. */
static size_t gzip(unsigned char *out, size_t room, const char *text, size_t n)
{
    z_stream z = { 0 };

    ck_assert_int_eq(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    z.next_in = (unsigned char *)(uintptr_t)text;
    z.avail_in = (uInt)n;
    z.next_out = out;
    z.avail_out = (uInt)room;
    ck_assert_int_eq(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return room - z.avail_out;
}

static size_t zstd(unsigned char *out, size_t room, const char *text, size_t n)
{
    ZSTD_CCtx *c = ZSTD_createCCtx();
    ck_assert_ptr_nonnull(c);
    ZSTD_CCtx_setParameter(c, ZSTD_c_checksumFlag, 1); // as the program zstd does
    const size_t made = ZSTD_compress2(c, out, room, text, n);
    ZSTD_freeCCtx(c);
    ck_assert(!ZSTD_isError(made));
    return made;
}

/* text in a file of the folder, packed; without its last `cut` bytes. */
static char *put(char out[PATH_MAX], const char *name, enum packing how, const char *text, size_t n,
                 size_t cut)
{
    const size_t room = 2 * n + 4096, half = n / 2;
    unsigned char *packed = malloc(room);
    size_t made = n;

    ck_assert_ptr_nonnull(packed);
    switch (how) {
    case GZIP: made = gzip(packed, room, text, n); break;
    case ZSTD: made = zstd(packed, room, text, n); break;
    case GZIP_MEMBERS:
        made = gzip(packed, room, text, half);
        made += gzip(packed + made, room - made, text + half, n - half);
        break;
    case ZSTD_FRAMES:
        made = zstd(packed, room, text, half);
        made += zstd(packed + made, room - made, text + half, n - half);
        break;
    default: memcpy(packed, text, n);
    }
    ck_assert_uint_le(cut, made);
    must(ht_file_publish(join(out, folder, name), packed, made - cut));
    free(packed);
    return out;
}

static char *put_text(char out[PATH_MAX], const char *name, const char *text)
{
    return put(out, name, PLAIN, text, strlen(text), 0);
}

static struct ht_text_source *open_one(char *path, const struct ht_text_options *o)
{
    struct ht_text_source *s = NULL;
    must(ht_text_open(&s, &path, 1, o));
    return s;
}

static void expect_text(struct ht_text_source *s, const char *want)
{
    const char *text;
    size_t n;

    must(ht_text_next(s, &text, &n));
    if (!want) {
        ck_assert_ptr_null(text);
        return;
    }
    ck_assert_ptr_nonnull(text);
    ck_assert_str_eq(text, want);
    ck_assert_uint_eq(n, strlen(want));
}

static const struct ht_text_options whole = { 0 }, lines = { .lines = true };

/* Longer than every buffer, so that documents and lines cross their borders. */
static char *long_text(size_t *n, bool jsonl)
{
    char *text = malloc((size_t)2 << 20);
    size_t at = 0;

    ck_assert_ptr_nonnull(text);
    for (int i = 0; i < 20000; i++) {
        const int width = (int)(ht_rng_u64(7, 1, (uint64_t)i) % 80);
        at += (size_t)sprintf(text + at, jsonl ? "{\"text\": \"%0*d\"}\n" : "%0*d\n", width + 1, i);
    }
    *n = at;
    return text;
}

START_TEST(every_packing_gives_the_same_text)
{
    char path[PATH_MAX];
    const char *got;
    size_t n, n_got;
    char *text = long_text(&n, false);
    struct ht_text_source *s = open_one(put(path, "a.txt", (enum packing)_i, text, n, 0), &whole);

    must(ht_text_next(s, &got, &n_got));
    ck_assert_uint_eq(n_got, n);
    ck_assert_mem_eq(got, text, n);
    ck_assert_int_eq(got[n], 0);
    expect_text(s, NULL);
    expect_text(s, NULL); // and again
    ht_text_close(s);
    free(text);
}
END_TEST

START_TEST(every_packing_gives_the_same_lines)
{
    const bool jsonl = _i >= N_PACKINGS;
    char path[PATH_MAX], want[128];
    size_t n;
    char *text = long_text(&n, jsonl);
    struct ht_text_source *s = open_one(
        put(path, jsonl ? "a.jsonl" : "a.txt", (enum packing)(_i % N_PACKINGS), text, n, 0),
        &lines);
    uint64_t done, total;

    for (int i = 0; i < 20000; i++) {
        const int width = (int)(ht_rng_u64(7, 1, (uint64_t)i) % 80);
        snprintf(want, sizeof want, "%0*d", width + 1, i);
        expect_text(s, want);
    }
    expect_text(s, NULL);
    ht_text_progress(s, &done, &total);
    ck_assert_uint_eq(done, total);
    ht_text_close(s);
    free(text);
}
END_TEST

START_TEST(folder_is_walked_in_order)
{
    char path[PATH_MAX], place[PATH_MAX];
    struct ht_text_source *s;

    must(ht_file_make_dirs(join(path, folder, "b/inner")));
    must(ht_file_make_dirs(join(path, folder, ".hidden")));
    put_text(path, "c.txt", "third");
    put_text(path, "a.txt", "first");
    put_text(path, "b/inner/x.txt", "second");
    put_text(path, "b/z.jsonl", "{\"text\": \"also second\"}\n");
    put_text(path, ".secret", "hidden");
    put_text(path, ".hidden/x.txt", "hidden");
    ck_assert_int_eq(symlink("../b", join(path, folder, "b/loop")), 0);
    ck_assert_int_eq(symlink("c.txt", join(path, folder, "d.txt")), 0);
    s = open_one(folder, &whole);
    expect_text(s, "first");
    ck_assert_str_eq(ht_text_place(s), strcat(join(place, folder, "a.txt"), ":1"));
    expect_text(s, "second");
    expect_text(s, "also second");
    expect_text(s, "third");
    expect_text(s, "third"); // a link to a file is a file
    expect_text(s, NULL);
    ht_text_close(s);
}
END_TEST

START_TEST(lines_and_their_ends)
{
    char path[PATH_MAX];
    struct ht_text_source *s =
        open_one(put_text(path, "a.txt", "\xEF\xBB\xBFone\r\n\n\r\ntwo\n three \nfour"), &lines);

    expect_text(s, "one");
    expect_text(s, "two");
    ck_assert_ptr_nonnull(strstr(ht_text_place(s), "a.txt:4"));
    expect_text(s, " three ");
    expect_text(s, "four");
    expect_text(s, NULL);
    ht_text_close(s);

    s = open_one(put_text(path, "b.txt", "\xEF\xBB\xBFone\r\ntwo\r\n"), &whole);
    expect_text(s, "one\r\ntwo\r\n");
    expect_text(s, NULL);
    ht_text_close(s);
}
END_TEST

START_TEST(empty_files)
{
    char path[PATH_MAX];
    struct ht_text_source *s;

    put_text(path, "a.txt", "");
    put_text(path, "b.jsonl", "");
    put_text(path, "c.txt", "c");
    s = open_one(folder, &whole);
    expect_text(s, ""); // a text file is a document, empty or not; JSONL has one per line
    expect_text(s, "c");
    expect_text(s, NULL);
    ht_text_close(s);
    s = open_one(folder, &lines);
    expect_text(s, "c");
    expect_text(s, NULL);
    ht_text_close(s);
}
END_TEST

START_TEST(jsonl_fields)
{
    char path[PATH_MAX];
    const char *text;
    size_t n;
    const struct ht_text_options field = { .field = "body" };
    struct ht_text_source *s =
        open_one(put_text(path, "a.ndjson",
                          "{\"body\": \"\\u00e9\\ud83d\\ude00\", \"n\": [1, {\"body\": 2}]}\r\n\r\n"
                          "{\"body\": \"a\\u0000b\"}"),
                 &field);

    expect_text(s, "\xC3\xA9\xF0\x9F\x98\x80");
    must(ht_text_next(s, &text, &n));
    ck_assert_uint_eq(n, 3);
    ck_assert_mem_eq(text, "a\0b", 4);
    expect_text(s, NULL);
    ht_text_close(s);
}
END_TEST

static const struct {
    const char *content, *message;
} bad_jsonl[] = {
    { "{\"text\": \"ok\"}\n{\"text\": }\n", "bad.jsonl:2: column" },
    { "{\"text\": \"ok\"}\n{\"txt\": \"a\"}\n", "bad.jsonl:2: no field \"text\"" },
    { "{\"text\": \"ok\"}\n{\"text\": 5}\n", "bad.jsonl:2: not a string: \"text\"" },
    { "{\"text\": \"ok\"}\n[1]\n", "bad.jsonl:2: no field" },
    { "{\"text\": \"ok\"}\n{\"text\": \"a\", \"text\": \"b\"}\n", "bad.jsonl:2: column" },
    { "{\"text\": \"ok\"}\n{\"text\": \"\xFF\"}\n", "bad.jsonl:2: column" },
    { "{\"text\": \"ok\"}\n{\"text\": \"\\ud800\"}\n", "bad.jsonl:2: column" },
    { "{\"text\": \"ok\"}\n{\"text\": \"a\"} x\n", "bad.jsonl:2: column" },
};

START_TEST(bad_jsonl_names_file_and_line)
{
    char path[PATH_MAX];
    const char *text;
    size_t n;
    struct ht_text_source *s = open_one(put_text(path, "bad.jsonl", bad_jsonl[_i].content), &whole);

    expect_text(s, "ok");
    expect(ht_text_next(s, &text, &n), HT_ERR_FORMAT, bad_jsonl[_i].message);
    ht_text_close(s);
}
END_TEST

START_TEST(deep_json_is_refused)
{
    char path[PATH_MAX];
    const size_t depth = 100000;
    char *text = malloc(depth + 32);
    const char *got;
    size_t n;

    memcpy(text, "{\"text\": ", 9);
    memset(text + 9, '[', depth);
    struct ht_text_source *s = open_one(put(path, "bad.jsonl", PLAIN, text, depth + 9, 0), &whole);
    expect(ht_text_next(s, &got, &n), HT_ERR_FORMAT, "bad.jsonl:1");
    ht_text_close(s);
    free(text);
}
END_TEST

START_TEST(truncated_and_damaged_files_are_refused)
{
    char path[PATH_MAX];
    const char *got;
    size_t n, n_got;
    char *text = long_text(&n, false), *file;
    struct ht_text_source *s =
        open_one(put(path, "a.bin", (enum packing)(1 + _i % (N_PACKINGS - 1)), text, n,
                     _i < N_PACKINGS - 1 ? 1 : 1000),
                 &whole);

    expect(ht_text_next(s, &got, &n_got), HT_ERR_FORMAT, "ends in the middle");
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "a.bin"));
    ht_text_close(s);

    put(path, "a.bin", (enum packing)(1 + _i % (N_PACKINGS - 1)), text, n, 0);
    must(ht_file_read(&file, &n_got, path, (size_t)1 << 30));
    memset(file + n_got / 2, 0x5A, 64);
    must(ht_file_publish(path, file, n_got));
    s = open_one(path, &whole);
    expect(ht_text_next(s, &got, &n_got), HT_ERR_FORMAT, "a.bin: near byte");
    ht_text_close(s);
    free(file);
    free(text);
}
END_TEST

START_TEST(documents_are_bounded)
{
    char path[PATH_MAX];
    const char *got;
    size_t n;
    const struct ht_text_options fits = { .max_document_bytes = 10 },
                                 short_by_one = { .max_document_bytes = 9 };
    struct ht_text_source *s = open_one(put_text(path, "a.txt", "0123456789"), &fits);

    expect_text(s, "0123456789");
    ht_text_close(s);
    s = open_one(path, &short_by_one);
    expect(ht_text_next(s, &got, &n), HT_ERR_FORMAT, "a.txt:1: a document of more than 9 bytes");
    ht_text_close(s);
}
END_TEST

/* 4 GiB of equal lines in about 500 kB: refused from the ratio, long before its end. */
START_TEST(bomb_is_refused)
{
    const size_t part = (size_t)64 << 20, n_parts = 64, line = 1 << 16;
    char path[PATH_MAX];
    const char *got;
    size_t n, at;
    char *text = malloc(part);
    unsigned char *packed = malloc((size_t)4 << 20);
    enum ht_status st = HT_OK;
    int64_t n_lines = 0;

    ck_assert(text && packed);
    for (size_t i = 0; i < part; i++) text[i] = (i + 1) % line ? 'x' : '\n';
    const size_t one = zstd(packed, (size_t)4 << 20, text, part);
    ck_assert_uint_le(n_parts * one, (size_t)4 << 20);
    for (at = one; at < n_parts * one; at += one) memcpy(packed + at, packed, one);
    must(ht_file_publish(join(path, folder, "bomb.txt"), packed, at));
    struct ht_text_source *s = open_one(path, &lines);
    while (st == HT_OK && n_lines < (int64_t)(n_parts * part / line)) {
        st = ht_text_next(s, &got, &n);
        n_lines++;
    }
    expect(st, HT_ERR_FORMAT, "grows more than 2000 times");
    ht_text_close(s);
    free(packed);
    free(text);
}
END_TEST

START_TEST(missing_and_odd_inputs_are_refused)
{
    char path[PATH_MAX], *one = path;
    struct ht_text_source *s;

    join(path, folder, "missing.txt");
    expect(ht_text_open(&s, &one, 1, &whole), HT_ERR_IO, "missing.txt: No such file");
    ck_assert_ptr_null(s);
    one = folder;
    expect(ht_text_open(&s, &one, 1, &whole), HT_ERR_IO, "no files to read");
    expect(ht_text_open(&s, NULL, 0, &whole), HT_ERR_IO, "no input");
    ck_assert_int_eq(mkfifo(join(path, folder, "pipe"), 0600), 0);
    one = path;
    expect(ht_text_open(&s, &one, 1, &whole), HT_ERR_IO, "neither a file nor a folder");
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("text_source");
    TCase *reads = tcase_create("reads"), *refuses = tcase_create("refuses");
    SRunner *runner = srunner_create(suite);

    tcase_add_checked_fixture(reads, setup, teardown);
    tcase_add_loop_test(reads, every_packing_gives_the_same_text, 0, N_PACKINGS);
    tcase_add_loop_test(reads, every_packing_gives_the_same_lines, 0, 2 * N_PACKINGS);
    tcase_add_test(reads, folder_is_walked_in_order);
    tcase_add_test(reads, lines_and_their_ends);
    tcase_add_test(reads, empty_files);
    tcase_add_test(reads, jsonl_fields);
    suite_add_tcase(suite, reads);
    tcase_add_checked_fixture(refuses, setup, teardown);
    tcase_add_loop_test(refuses, bad_jsonl_names_file_and_line, 0,
                        (int)(sizeof bad_jsonl / sizeof *bad_jsonl));
    tcase_add_test(refuses, deep_json_is_refused);
    tcase_add_loop_test(refuses, truncated_and_damaged_files_are_refused, 0, 2 * (N_PACKINGS - 1));
    tcase_add_test(refuses, documents_are_bounded);
    tcase_add_test(refuses, bomb_is_refused);
    tcase_add_test(refuses, missing_and_odd_inputs_are_refused);
    suite_add_tcase(suite, refuses);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
