/* tests/data/test_shard.c: shards give back what was written, and damage never passes. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <hdf5.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
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

static void check_all(const struct ht_shard *s, const struct doc_set *d)
{
    int32_t *ids = malloc(sizeof *ids * (size_t)(d->max_doc + 1));

    for (int64_t doc = 0; doc < d->n_docs; doc++) {
        const int64_t n = doc_length(d, doc);
        ck_assert_int_eq(ht_shard_doc_length(s, doc), n);
        must(ht_shard_read(s, doc, 0, n, ids));
        for (int64_t i = 0; i < n; i++) ck_assert_int_eq(ids[i], doc_token(d, doc, i));
    }
    free(ids);
}

static const struct doc_set sets[] = {
    { 1, 0, 10, 100 },         // no documents
    { 2, 1, 0, 100 },          // one empty document
    { 3, 300, 50, 1 },         // a vocabulary of one
    { 4, 300, 50, 65536 },     // the largest in 16 bits
    { 5, 300, 50, 65537 },     // the smallest in 32
    { 6, 20, 300000, 128256 }, // several blocks, documents across their borders
    { 7, 9, 900000, 50000 },   // the same in 16 bits
};

START_TEST(reads_what_was_written)
{
    const struct doc_set *d = &sets[_i];
    struct ht_shard *s;
    int64_t n_tokens = 0;

    write_shard(path, d, 0, d->n_docs);
    must(ht_shard_open(&s, path));
    for (int64_t doc = 0; doc < d->n_docs; doc++) n_tokens += doc_length(d, doc);
    ck_assert_int_eq(ht_shard_n_docs(s), d->n_docs);
    ck_assert_int_eq(ht_shard_n_tokens(s), n_tokens);
    ck_assert_int_eq(ht_shard_vocab_size(s), d->vocab);
    ck_assert_int_eq(ht_shard_text_bytes(s), 3 * n_tokens);
    ck_assert_str_eq(ht_shard_tokenizer_hash(s), "00ff");
    ck_assert_str_eq(ht_shard_path(s), path);
    check_all(s, d);
    must(ht_shard_verify(s));
    for (uint64_t k = 0; k < 200 && n_tokens > 0; k++) { // pieces of documents
        const int64_t doc = (int64_t)(ht_rng_u64(8, 1, k) % (uint64_t)d->n_docs);
        const int64_t n = doc_length(d, doc);
        const int64_t first = (int64_t)(ht_rng_u64(8, 2, k) % (uint64_t)(n + 1));
        int32_t ids[100];
        const int64_t count = n - first < 100 ? n - first : 100;
        must(ht_shard_read(s, doc, first, count, ids));
        for (int64_t i = 0; i < count; i++) ck_assert_int_eq(ids[i], doc_token(d, doc, first + i));
    }
    ht_shard_close(s);
}
END_TEST

START_TEST(same_documents_give_same_bytes)
{
    char other[PATH_MAX];
    char *a, *b;
    size_t n_a, n_b;

    write_shard(path, &sets[3], 0, 300);
    write_shard(join(other, folder, "b.h5"), &sets[3], 0, 300);
    must(ht_file_read(&a, &n_a, path, 1 << 28));
    must(ht_file_read(&b, &n_b, other, 1 << 28));
    ck_assert_uint_eq(n_a, n_b);
    ck_assert_mem_eq(a, b, n_a);
    free(a);
    free(b);
}
END_TEST

/* Any HDF5 program sees plain arrays. */
START_TEST(hdf5_reads_it_as_plain_arrays)
{
    const struct doc_set *d = &sets[4];
    hsize_t dims[1];
    int64_t at = 0;

    write_shard(path, d, 0, d->n_docs);
    const hid_t file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    const hid_t set = H5Dopen2(file, "tokens", H5P_DEFAULT), space = H5Dget_space(set);
    ck_assert_int_eq(H5Sget_simple_extent_dims(space, dims, NULL), 1);
    int32_t *ids = malloc(dims[0] * sizeof *ids);
    ck_assert_int_ge(H5Dread(set, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, ids), 0);
    for (int64_t doc = 0; doc < d->n_docs; doc++)
        for (int64_t i = 0; i < doc_length(d, doc); i++)
            ck_assert_int_eq(ids[at++], doc_token(d, doc, i));
    ck_assert_int_eq(at, (int64_t)dims[0]);
    free(ids);
    H5Sclose(space);
    H5Dclose(set);
    H5Fclose(file);

    char command[PATH_MAX + 64], line[256];
    bool seen = false;
    if (system("command -v h5dump >/dev/null 2>&1") != 0) return;
    snprintf(command, sizeof command, "h5dump -A %s 2>&1", path);
    FILE *f = popen(command, "r");
    while (fgets(line, sizeof line, f)) {
        seen = seen || strstr(line, "\"doc_offsets\"");
        ck_assert_ptr_null(strstr(line, "error"));
    }
    ck_assert_int_eq(pclose(f), 0);
    ck_assert(seen);
}
END_TEST

static int count_files(void)
{
    DIR *d = opendir(folder);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

START_TEST(unfinished_writer_leaves_nothing)
{
    struct ht_shard_writer *w;
    int32_t id = 3;

    must(ht_shard_writer_create(&w, path, 10, ""));
    must(ht_shard_writer_add(w, &id, 1, 1));
    ht_shard_writer_free(w);
    ht_shard_writer_free(NULL);
    ht_shard_close(NULL);
    ck_assert_int_eq(count_files(), 0);
}
END_TEST

START_TEST(an_old_shard_stays_until_the_new_one_is_whole)
{
    struct ht_shard_writer *w;
    struct ht_shard *s, *now;
    int32_t id = 3;

    write_shard(path, &sets[3], 0, 300);
    must(ht_shard_open(&s, path));
    must(ht_shard_writer_create(&w, path, 10, ""));
    must(ht_shard_writer_add(w, &id, 1, 1));
    must(ht_shard_open(&now, path));
    ck_assert_int_eq(ht_shard_n_docs(now), 300);
    ht_shard_close(now);
    must(ht_shard_writer_finish(w, NULL, NULL));
    ck_assert_int_eq(ht_shard_writer_finish(w, NULL, NULL), HT_ERR_ARG);
    ht_shard_writer_free(w);
    must(ht_shard_open(&now, path));
    ck_assert_int_eq(ht_shard_n_docs(now), 1);
    ck_assert_str_eq(ht_shard_tokenizer_hash(now), "");
    ht_shard_close(now);
    check_all(s, &sets[3]); // who has it open goes on reading the old one
    ht_shard_close(s);
    ck_assert_int_eq(count_files(), 1);
}
END_TEST

static void expect(enum ht_status st, enum ht_status want, const char *text)
{
    ck_assert_msg(st == want, "status %d, not %d: %s", (int)st, (int)want, ht_error_message());
    ck_assert_msg(strstr(ht_error_message(), text) != NULL, "'%s' is not in: %s", text,
                  ht_error_message());
}

START_TEST(writer_refuses_bad_input)
{
    struct ht_shard_writer *w;
    const int32_t bad[3] = { 1, 10, 2 }, negative[1] = { -1 };
    char hash[200], nowhere[PATH_MAX];

    expect(ht_shard_writer_create(&w, path, 0, ""), HT_ERR_ARG, "vocab_size is 0");
    memset(hash, 'a', sizeof hash);
    hash[199] = '\0';
    expect(ht_shard_writer_create(&w, path, 10, hash), HT_ERR_ARG, "199 characters");
    join(nowhere, folder, "no/such/folder.h5");
    expect(ht_shard_writer_create(&w, nowhere, 10, ""), HT_ERR_IO, "No such file");
    ck_assert_ptr_null(w);
    must(ht_shard_writer_create(&w, path, 10, ""));
    must(ht_shard_writer_add(w, bad, 1, 1));
    expect(ht_shard_writer_add(w, bad, 3, 1), HT_ERR_ARG, "document 1, token 1: id 10");
    expect(ht_shard_writer_add(w, negative, 1, 1), HT_ERR_ARG, "id -1");
    expect(ht_shard_writer_add(w, bad, -1, 1), HT_ERR_ARG, "-1 tokens");
    int64_t n_docs, n_tokens;
    must(ht_shard_writer_finish(w, &n_docs, &n_tokens)); // a refused document adds nothing
    ck_assert_int_eq(n_docs, 1);
    ck_assert_int_eq(n_tokens, 1);
    ht_shard_writer_free(w);
}
END_TEST

START_TEST(reader_refuses_bad_arguments)
{
    struct ht_shard *s;
    int32_t ids[100];

    expect(ht_shard_open(&s, path), HT_ERR_IO, "No such file");
    ck_assert_ptr_null(s);
    expect(ht_shard_open(&s, folder), HT_ERR_FORMAT, "not a regular file");
    write_shard(path, &sets[3], 0, 300);
    must(ht_shard_open(&s, path));
    expect(ht_shard_read(s, 300, 0, 1, ids), HT_ERR_ARG, "document 300 of 300");
    expect(ht_shard_read(s, -1, 0, 1, ids), HT_ERR_ARG, "document -1");
    expect(ht_shard_read(s, 0, 0, 99, ids), HT_ERR_ARG, "99 from 0 on wanted");
    expect(ht_shard_read(s, 0, INT64_MAX, 1, ids), HT_ERR_ARG, "wanted");
    ht_shard_close(s);
}
END_TEST

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

START_TEST(shrinking_while_open_is_a_status)
{
    const struct doc_set *d = &sets[6];
    struct ht_shard *s;
    int32_t *ids = malloc(sizeof *ids * (size_t)d->max_doc);

    write_shard(path, d, 0, d->n_docs);
    must(ht_shard_open(&s, path));
    must(ht_shard_verify(s));
    ck_assert_int_eq(truncate(path, 1 << 16), 0);
    expect(ht_shard_read(s, 8, 0, ht_shard_doc_length(s, 8), ids), HT_ERR_FORMAT, "truncated");
    expect(ht_shard_verify(s), HT_ERR_FORMAT, "truncated");
    ht_shard_close(s);
    free(ids);
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

/* The disk is full from the nth write on. The writer's library is linked statically, so this pwrite
 * is the one it calls; HDF5's calls come here too and go to memory. */
static int64_t writes_left = INT64_MAX;

ssize_t pwrite(int fd, const void *data, size_t n, off_t offset)
{
    char name[64], target[64] = "";

    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    if (readlink(name, target, sizeof target - 1) > 0 && strncmp(target, "/memfd:", 7) != 0) {
        if (writes_left == 0) {
            errno = ENOSPC;
            return -1;
        }
        if (n > 1) n /= 2; // and short writes are made whole
        writes_left--;
    }
    return syscall(SYS_pwrite64, fd, data, n, offset);
}

START_TEST(full_disk_at_any_write)
{
    int64_t failures = 0;
    enum ht_status st = HT_ERR_MEMORY;

    for (int64_t n = 0; st != HT_OK; n++) {
        struct ht_shard_writer *w = NULL;
        const int32_t ids[3] = { 1, 2, 3 };
        int32_t *many = calloc(600000, sizeof *many);
        writes_left = n;
        st = ht_shard_writer_create(&w, path, 1000, "00ff");
        if (st == HT_OK) st = ht_shard_writer_add(w, ids, 3, 9);
        if (st == HT_OK) st = ht_shard_writer_add(w, many, 600000, 9);
        if (st == HT_OK) st = ht_shard_writer_finish(w, NULL, NULL);
        writes_left = INT64_MAX;
        if (st != HT_OK) {
            failures++;
            expect(st, HT_ERR_MEMORY, "No space left on device");
            expect(ht_shard_writer_finish(w, NULL, NULL), HT_ERR_ARG, "start the shard again");
        }
        ht_shard_writer_free(w);
        ck_assert_int_eq(count_files(), st == HT_OK);
        free(many);
    }
    ck_assert_int_gt(failures, 20);
    struct ht_shard *s;
    must(ht_shard_open(&s, path));
    must(ht_shard_verify(s));
    ht_shard_close(s);
}
END_TEST

START_TEST(limit_on_file_size)
{
    struct rlimit limit, old;
    struct stat sb;
    int failures = 0;

    write_shard(path, &sets[4], 0, 300);
    ck_assert_int_eq(stat(path, &sb), 0);
    unlink(path);
    signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &old);
    int32_t *ids = calloc(51, sizeof *ids);
    for (off_t size = 0; size < sb.st_size + (3 << 20); size += size < sb.st_size ? 997 : 1 << 19) {
        struct ht_shard_writer *w = NULL;
        limit = old;
        limit.rlim_cur = (rlim_t)size;
        setrlimit(RLIMIT_FSIZE, &limit);
        enum ht_status st = ht_shard_writer_create(&w, path, 65537, "00ff");
        for (int64_t doc = 0; doc < 300 && st == HT_OK; doc++) {
            for (int64_t i = 0; i < doc_length(&sets[4], doc); i++)
                ids[i] = doc_token(&sets[4], doc, i);
            st = ht_shard_writer_add(w, ids, doc_length(&sets[4], doc), 0);
        }
        if (st == HT_OK) st = ht_shard_writer_finish(w, NULL, NULL);
        setrlimit(RLIMIT_FSIZE, &old);
        ht_shard_writer_free(w);
        if (size < sb.st_size) ck_assert_int_ne(st, HT_OK);
        if (size > sb.st_size + (2 << 20)) must(st);
        if (st != HT_OK) {
            failures++;
            ck_assert_msg(st == HT_ERR_MEMORY || st == HT_ERR_IO, "limit %ld: %s", (long)size,
                          ht_error_message());
            ck_assert_msg(count_files() == 0, "limit %ld leaves files", (long)size);
        }
        unlink(path);
    }
    ck_assert_int_gt(failures, 10);
    free(ids);
}
END_TEST

/* The disk fails at the nth read of ours. HDF5's reads are left alone: they come after the whole
 * header was read and hashed, and a failing one makes HDF5 1.10 leak and complain at exit. */
static int64_t reads_left = INT64_MAX;
static bool in_hdf5;

hid_t H5Fopen(const char *name, unsigned flags, hid_t plist)
{
    hid_t (*next)(const char *, unsigned, hid_t) =
        (hid_t(*)(const char *, unsigned, hid_t))dlsym(RTLD_NEXT, "H5Fopen");
    in_hdf5 = true;
    return next(name, flags, plist);
}

herr_t H5Fclose(hid_t file)
{
    herr_t (*next)(hid_t) = (herr_t(*)(hid_t))dlsym(RTLD_NEXT, "H5Fclose");
    const herr_t r = next(file);
    in_hdf5 = false;
    return r;
}

ssize_t pread(int fd, void *out, size_t n, off_t offset)
{
    if (!in_hdf5 && reads_left-- <= 0) {
        errno = EIO;
        return -1;
    }
    return syscall(SYS_pread64, fd, out, n, offset);
}

START_TEST(failing_disk_at_any_read)
{
    enum ht_status st = HT_ERR_IO;
    int64_t failures = 0;

    write_shard(path, &small, 0, small.n_docs);
    for (int64_t n = 0; st != HT_OK; n++) {
        struct ht_shard *s;
        reads_left = n;
        st = ht_shard_open(&s, path);
        if (st == HT_OK) st = ht_shard_verify(s);
        reads_left = INT64_MAX;
        ht_shard_close(s);
        if (st == HT_OK) break;
        failures++;
        expect(st, HT_ERR_IO, "Input/output error");
        ck_assert_ptr_nonnull(strstr(ht_error_message(), path));
    }
    ck_assert_int_ge(failures, 4); // trailer, header, checksums, tokens
}
END_TEST

struct reading {
    const struct ht_shard *s;
    const struct doc_set *d;
    int bad;
};

static void *read_all(void *context)
{
    struct reading *r = context;
    int32_t *ids = malloc(sizeof *ids * (size_t)(r->d->max_doc + 1));

    for (int64_t doc = 0; doc < r->d->n_docs; doc++) {
        const int64_t n = doc_length(r->d, doc);
        if (ht_shard_read(r->s, doc, 0, n, ids) != HT_OK) r->bad++;
        for (int64_t i = 0; i < n; i += 1 + n / 64) r->bad += ids[i] != doc_token(r->d, doc, i);
    }
    free(ids);
    return NULL;
}

START_TEST(threads_may_read_together)
{
    const struct doc_set *d = &sets[6];
    struct ht_shard *s;
    struct reading r[4];
    pthread_t thread[4];

    write_shard(path, d, 0, d->n_docs);
    must(ht_shard_open(&s, path));
    for (int i = 0; i < 4; i++) {
        r[i] = (struct reading){ s, d, 0 };
        ck_assert_int_eq(pthread_create(&thread[i], NULL, read_all, &r[i]), 0);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(thread[i], NULL);
        ck_assert_int_eq(r[i].bad, 0);
    }
    ht_shard_close(s);
}
END_TEST

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

int main(void)
{
    Suite *s = suite_create("shard");
    TCase *good = tcase_create("round trip"), *bad = tcase_create("refusal");

    tcase_add_checked_fixture(good, setup, teardown);
    tcase_add_checked_fixture(bad, setup, teardown);
    tcase_add_loop_test(good, reads_what_was_written, 0, COUNT(sets));
    tcase_add_test(good, same_documents_give_same_bytes);
    tcase_add_test(good, hdf5_reads_it_as_plain_arrays);
    tcase_add_test(good, unfinished_writer_leaves_nothing);
    tcase_add_test(good, an_old_shard_stays_until_the_new_one_is_whole);
    tcase_add_test(good, threads_may_read_together);
    tcase_add_test(bad, writer_refuses_bad_input);
    tcase_add_test(bad, reader_refuses_bad_arguments);
    tcase_add_test(bad, every_flipped_bit_is_refused);
    tcase_add_test(bad, every_other_length_is_refused);
    tcase_add_test(bad, shrinking_while_open_is_a_status);
    tcase_add_loop_test(bad, forged_contents_are_named, 0, COUNT(forgeries));
    tcase_add_test(bad, other_files_are_refused);
    tcase_add_test(bad, full_disk_at_any_write);
    tcase_add_test(bad, limit_on_file_size);
    tcase_add_test(bad, failing_disk_at_any_read);
    suite_add_tcase(s, good);
    suite_add_tcase(s, bad);
    return run_suite(s);
}
