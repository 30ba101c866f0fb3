/* tests/data/test_shard_disk.c: disks that are full, fail or lose a file's end give a status. */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <hdf5.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>

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

static const struct doc_set big = { 7, 9, 900000, 50000 }; // several blocks
static const struct doc_set middle = { 5, 300, 50, 65537 };
static const struct doc_set small = { 9, 200, 60, 1000 };

START_TEST(shrinking_while_open_is_a_status)
{
    const struct doc_set *d = &big;
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

static int count_files(void)
{
    DIR *d = opendir(folder);
    int n = 0;
    for (struct dirent *e; (e = readdir(d));) n += e->d_name[0] != '.';
    closedir(d);
    return n;
}

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

    write_shard(path, &middle, 0, 300);
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
            for (int64_t i = 0; i < doc_length(&middle, doc); i++)
                ids[i] = doc_token(&middle, doc, i);
            st = ht_shard_writer_add(w, ids, doc_length(&middle, doc), 0);
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

int main(void)
{
    Suite *s = suite_create("shard disk");
    TCase *disk = tcase_create("disk");

    tcase_add_checked_fixture(disk, setup, teardown);
    tcase_add_test(disk, shrinking_while_open_is_a_status);
    tcase_add_test(disk, full_disk_at_any_write);
    tcase_add_test(disk, limit_on_file_size);
    tcase_add_test(disk, failing_disk_at_any_read);
    suite_add_tcase(s, disk);
    return run_suite(s);
}
