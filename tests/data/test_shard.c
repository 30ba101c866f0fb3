/* tests/data/test_shard.c: shards give back what was written; HDF5's own tools read them. */
#include <dirent.h>
#include <hdf5.h>
#include <pthread.h>

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
    suite_add_tcase(s, good);
    suite_add_tcase(s, bad);
    return run_suite(s);
}
