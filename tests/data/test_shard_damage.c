/* tests/data/test_shard_damage.c: no flipped bit, other length or forged value gives other tokens.
 */
#include <fcntl.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <xxhash.h>

#include "data/shard_format.h"
#include "tests/data/data_test.h"

static char folder[PATH_MAX], path[PATH_MAX];

static void setup(void)
{
    join(path, make_folder(folder), "a.h5");
}
static void teardown(void)
{
    ht_file_remove_tree(folder);
}

/* Opens and reads everything; false when that was refused, which must be with HT_ERR_FORMAT and the
 * name. */
static bool survives(const struct doc_set *d, const char *what, long where)
{
    struct ht_shard *s = NULL;
    enum ht_status st = ht_shard_open(&s, path);
    int32_t ids[64];

    if (st == HT_OK) {
        for (int64_t doc = 0; doc < d->n_docs && st == HT_OK; doc++) {
            const int64_t n = doc_length(d, doc);
            ck_assert_msg(ht_shard_doc_length(s, doc) == n, "%s %ld: other length", what, where);
            st = ht_shard_read(s, doc, 0, n, ids);
            for (int64_t i = 0; i < n && st == HT_OK; i++)
                ck_assert_msg(ids[i] == doc_token(d, doc, i), "%s %ld: other token", what, where);
        }
        ht_shard_close(s);
    }
    if (st == HT_OK) return true;
    ck_assert_msg(st == HT_ERR_FORMAT, "%s %ld: status %d: %s", what, where, (int)st,
                  ht_error_message());
    ck_assert_ptr_nonnull(strstr(ht_error_message(), path));
    return false;
}

static const struct doc_set small = { 9, 200, 60, 1000 };

START_TEST(every_flipped_bit_is_refused)
{
    struct stat sb;

    write_shard(path, &small, 0, small.n_docs);
    ck_assert(survives(&small, "no damage", 0));
    ck_assert_int_eq(stat(path, &sb), 0);
    const int fd = open(path, O_RDWR);
    const int64_t n_bits = 8 * (int64_t)sb.st_size;
    for (int64_t k = 0; k < 2000 + 512 + 800; k++) { // at random, in the trailer, in the superblock
        const int64_t bit = k < 2000 ? (int64_t)(ht_rng_u64(10, 1, (uint64_t)k) % (uint64_t)n_bits)
                            : k < 2512 ? n_bits - 512 + (k - 2000)
                                       : k - 2512;
        unsigned char c, flipped;
        ck_assert_int_eq(pread(fd, &c, 1, bit / 8), 1);
        flipped = (unsigned char)(c ^ 1 << bit % 8);
        ck_assert_int_eq(pwrite(fd, &flipped, 1, bit / 8), 1);
        ck_assert_msg(!survives(&small, "bit", (long)bit), "bit %ld passed", (long)bit);
        ck_assert_int_eq(pwrite(fd, &c, 1, bit / 8), 1);
    }
    close(fd);
    ck_assert(survives(&small, "repaired", 0));
}
END_TEST

START_TEST(every_other_length_is_refused)
{
    size_t n;
    char *whole;

    write_shard(path, &small, 0, small.n_docs);
    must(ht_file_read(&whole, &n, path, 1 << 28));
    for (size_t k = 0; k < 400; k++) {
        const size_t cut = k < 100 ? k : k < 200 ? n - 1 - (k - 100) : ht_rng_u64(11, 1, k) % n;
        ck_assert_int_eq(truncate(path, (off_t)cut), 0);
        ck_assert_msg(!survives(&small, "cut", (long)cut), "cut at %zu passed", cut);
        ck_assert_int_eq(truncate(path, (off_t)n), 0); // zeros at its end now
        if (cut < n - 64) ck_assert(!survives(&small, "zeros from", (long)cut));
        must(ht_file_publish(path, whole, n));
    }
    ck_assert_int_eq(truncate(path, (off_t)n + 1), 0);
    ck_assert(!survives(&small, "grown", 0));
    free(whole);
}
END_TEST

/* Change one int64 or uint64 attribute, or one element of an array, and seal the file again with
 * all hashes right: a shard by a program that is wrong, not one that was damaged. */
struct forgery {
    const char *attribute; // or
    const char *array;
    int64_t element, value;
    const char *message;
};

static void forge(const struct forgery *f)
{
    struct ht_shard_header h = { .tokenizer_hash = "00ff" };
    struct ht_shard_trailer t;
    hid_t a;

    int fd = open(path, O_RDWR);
    must(ht_shard_check_seal(&t, fd, path));
    ck_assert_int_eq(ftruncate(fd, t.hdf5_bytes), 0);
    const hid_t file = H5Fopen(path, H5F_ACC_RDWR, H5P_DEFAULT);
    ck_assert_int_ge(file, 0);
    if (f->array) {
        const hid_t set = H5Dopen2(file, f->array, H5P_DEFAULT), space = H5Dget_space(set);
        int64_t *v = calloc((size_t)H5Sget_simple_extent_npoints(space), sizeof *v);
        H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, v);
        v[f->element] = f->value;
        H5Dwrite(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, v);
        free(v);
        H5Sclose(space);
        H5Dclose(set);
    } else {
        a = H5Aopen(file, f->attribute, H5P_DEFAULT);
        ck_assert_int_ge(H5Awrite(a, H5T_NATIVE_INT64, &f->value), 0);
        H5Aclose(a);
    }
    // hashes of the arrays as they are now
    static const char *const arrays[2] = { "doc_offsets", "checksums" };
    static const char *const names[2] = { "doc_offsets_xxh3", "checksums_xxh3" };
    if (f->array && strcmp(f->array, "tokens") == 0) {
        const hid_t set = H5Dopen2(file, "tokens", H5P_DEFAULT), space = H5Dget_space(set);
        const size_t n = (size_t)H5Sget_simple_extent_npoints(space);
        uint16_t *v = calloc(n, sizeof *v);
        H5Dread(set, H5T_NATIVE_UINT16, H5S_ALL, H5S_ALL, H5P_DEFAULT, v);
        const uint64_t hash = XXH3_64bits(v, 2 * n);
        const hid_t sums = H5Dopen2(file, "checksums", H5P_DEFAULT);
        H5Dwrite(sums, H5T_NATIVE_UINT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &hash);
        H5Dclose(sums);
        free(v);
        H5Sclose(space);
        H5Dclose(set);
    }
    for (int i = 0; i < 2; i++) {
        const hid_t set = H5Dopen2(file, arrays[i], H5P_DEFAULT), space = H5Dget_space(set);
        const size_t n = (size_t)H5Sget_simple_extent_npoints(space);
        uint64_t *v = calloc(n, sizeof *v);
        H5Dread(set, i ? H5T_NATIVE_UINT64 : H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, v);
        const uint64_t hash = XXH3_64bits(v, 8 * n);
        a = H5Aopen(file, names[i], H5P_DEFAULT);
        H5Awrite(a, H5T_NATIVE_UINT64, &hash);
        H5Aclose(a);
        *(i ? &h.checksums_hash : &h.offsets_hash) = hash;
        free(v);
        H5Sclose(space);
        H5Dclose(set);
    }
    const struct {
        const char *name;
        int64_t *value;
    } values[] = { { "format_version", &h.format_version },
                   { "vocab_size", &h.vocab_size },
                   { "n_docs", &h.n_docs },
                   { "n_tokens", &h.n_tokens } };
    for (size_t i = 0; i < 4; i++) {
        a = H5Aopen(file, values[i].name, H5P_DEFAULT);
        H5Aread(a, H5T_NATIVE_INT64, values[i].value);
        H5Aclose(a);
    }
    const hid_t text = H5Dopen2(file, "text_bytes", H5P_DEFAULT);
    H5Dread(text, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &h.text_bytes);
    H5Dclose(text);
    const uint64_t header_hash = ht_shard_header_hash(&h);
    a = H5Aopen(file, "header_xxh3", H5P_DEFAULT);
    H5Awrite(a, H5T_NATIVE_UINT64, &header_hash);
    H5Aclose(a);
    H5Fclose(file);
    must(ht_shard_seal(fd, path, t.tokens_at, t.tokens_bytes));
    close(fd);
}

static const struct forgery forgeries[] = {
    { .array = "text_bytes",
      .value = 12345,
      .message = NULL }, // harmless: shows that forging works
    { "format_version", .value = 2, .message = "format_version is 2; this program reads 1" },
    { "vocab_size", .value = 0, .message = "vocab_size is 0" },
    { "vocab_size", .value = 70000, .message = "n_tokens is" }, // 4 bytes per token then
    { "vocab_size", .value = 900, .message = "the vocabulary has 900" },
    { "n_docs", .value = -1, .message = "n_docs -1" },
    { "n_docs", .value = 199, .message = "/doc_offsets has 201 elements" },
    { "n_docs", .value = INT64_MAX, .message = "n_docs 9223372036854775807" },
    { "n_tokens", .value = 17, .message = "n_tokens is 17" },
    { "n_tokens", .value = INT64_MAX / 2, .message = "n_tokens is" },
    { .array = "doc_offsets", .element = 0, .value = 1, .message = "/doc_offsets[0] is 1" },
    { .array = "doc_offsets", .element = 9, .value = 0, .message = "/doc_offsets[9] is 0, after" },
    { .array = "doc_offsets", .element = 9, .value = -5, .message = "/doc_offsets[9] is -5" },
    { .array = "doc_offsets",
      .element = 9,
      .value = 1 << 30,
      .message = "/doc_offsets[9] is 1073741824" },
    { .array = "doc_offsets", .element = 200, .value = 1, .message = "/doc_offsets[200] is 1" },
    { .array = "tokens",
      .element = 77,
      .value = 1000,
      .message = "/tokens[77] is 1000; the vocabulary has 1000" },
    { .array = "checksums", .element = 0, .value = 1, .message = "block 0 (tokens 0 to" },
};

START_TEST(forged_contents_are_named)
{
    const struct forgery *f = &forgeries[_i];
    struct ht_shard *s = NULL;

    write_shard(path, &small, 0, small.n_docs);
    forge(f);
    enum ht_status st = ht_shard_open(&s, path);
    if (st == HT_OK) st = ht_shard_verify(s);
    ht_shard_close(s);
    if (f->message)
        expect(st, HT_ERR_FORMAT, f->message);
    else
        must(st);
}
END_TEST

START_TEST(other_files_are_refused)
{
    char junk[5000];

    for (size_t i = 0; i < sizeof junk; i++) junk[i] = (char)ht_rng_u64(12, 1, i);
    must(ht_file_publish(path, junk, sizeof junk));
    ck_assert(!survives(&small, "junk", 0));
    must(ht_file_publish(path, "", 0));
    ck_assert(!survives(&small, "empty file", 0));
    const hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    H5Fclose(file);
    ck_assert(!survives(&small, "an HDF5 file of others", 0));
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "no shard trailer"));
}
END_TEST

int main(void)
{
    Suite *s = suite_create("shard damage");
    TCase *damage = tcase_create("damage");

    tcase_add_checked_fixture(damage, setup, teardown);
    tcase_add_test(damage, every_flipped_bit_is_refused);
    tcase_add_test(damage, every_other_length_is_refused);
    tcase_add_loop_test(damage, forged_contents_are_named, 0, COUNT(forgeries));
    tcase_add_test(damage, other_files_are_refused);
    suite_add_tcase(s, damage);
    return run_suite(s);
}
