/* tests/checkpoints/test_damage.c: no damaged checkpoint is ever taken for a whole one.
 *
 * HT_TEST_FLIPS sets the number of single-bit flips (2,000 without it; the long form runs 10,000).
 */
#include <check.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ckpt_case.h"
#include "checkpoints/folder.h"
#include "core/base/file.h"
#include "core/base/rng.h"

enum { MAX_FILES = 16, SEED = 20261123 };

static struct ckpt_case c;
static char folder[300];
static struct file {
    char name[64], path[400];
    int64_t n_bytes;
} files[MAX_FILES];
static int n_files;

static void setup(void)
{
    struct dirent *e;
    struct stat sb;

    ckpt_case_make(&c);
    ck_assert_int_eq(ckpt_save_as(&c, 2, false, 1, 9, 0), HT_OK);
    ck_assert_int_eq(ckpt_save_as(&c, 2, false, 2, 9, 0), HT_OK);
    snprintf(folder, sizeof folder, "%s", ckpt_path(&c, 2));
    DIR *d = opendir(folder);
    ck_assert_ptr_nonnull(d);
    n_files = 0;
    while ((e = readdir(d)) != NULL) {
        struct file *f = &files[n_files];
        if (e->d_name[0] == '.') continue;
        snprintf(f->name, sizeof f->name, "%.60s", e->d_name);
        snprintf(f->path, sizeof f->path, "%s/%.60s", folder, e->d_name);
        ck_assert_int_eq(stat(f->path, &sb), 0);
        f->n_bytes = sb.st_size;
        n_files++;
    }
    closedir(d);
    ck_assert_int_eq(n_files, 7);
}

static void teardown(void)
{
    ckpt_case_free(&c);
}

/* Refused, with the file's name in the message. */
static void refused(const char *name)
{
    struct ht_ckpt *k;

    ck_assert_int_eq(ht_ckpt_open(&k, folder), HT_ERR_FORMAT);
    ck_assert_ptr_null(k);
    ck_assert_msg(strstr(ht_error_message(), name) != NULL, "%s: %s", name, ht_error_message());
}

static void flip(const struct file *f, int64_t bit)
{
    unsigned char byte;
    const int fd = open(f->path, O_RDWR);

    ck_assert_int_ge(fd, 0);
    ck_assert_int_eq(pread(fd, &byte, 1, bit / 8), 1);
    byte ^= (unsigned char)(1u << (bit % 8));
    ck_assert_int_eq(pwrite(fd, &byte, 1, bit / 8), 1);
    close(fd);
}

/* What the message must name when that byte is wrong: the tensor, or that there is none. */
static const char *expected_name(const struct ht_manifest *m, const struct file *f, int64_t at)
{
    const int file = ht_manifest_find_file(m, f->name);

    if (file < 0) return "manifest.json";
    for (int64_t i = 0; i < m->n_pieces; i++)
        if (m->pieces[i].file == file && at >= m->pieces[i].at &&
            at < m->pieces[i].at + 4 * m->pieces[i].n)
            return m->tensors[m->pieces[i].tensor].name;
    return strstr(f->name, ".h5") ? "HDF5 structure" : "no tensor is affected";
}

START_TEST(every_flipped_bit_is_refused_and_named)
{
    const char *count = getenv("HT_TEST_FLIPS");
    const int n = count ? atoi(count) : 2000;
    struct ht_manifest m;
    int64_t total = 0;
    int n_tensor = 0;

    ck_assert_int_eq(ht_ckpt_folder_open(&m, folder), HT_OK);
    for (int i = 0; i < n_files; i++) total += files[i].n_bytes;
    for (int k = 0; k < n; k++) {
        // every file in turn, so that small ones are hit as often as large ones; then by size
        int64_t bit = (int64_t)(ht_rng_u64(SEED, 1, (uint64_t)k) >> 8);
        int i = k % n_files;
        if (k % 2) {
            bit %= total * 8;
            for (i = 0; bit >= files[i].n_bytes * 8; i++) bit -= files[i].n_bytes * 8;
        } else {
            bit %= files[i].n_bytes * 8;
        }
        const char *name = expected_name(&m, &files[i], bit / 8);
        flip(&files[i], bit);
        refused(files[i].name);
        ck_assert_msg(strstr(ht_error_message(), name) != NULL, "%s bit %lld: expected %s in: %s",
                      files[i].name, (long long)bit, name, ht_error_message());
        n_tensor += strstr(ht_error_message(), ": tensor ") != NULL;
        flip(&files[i], bit);
    }
    ck_assert_int_gt(n_tensor, n / 8);
    printf("%d single-bit flips over %d files (seed %d): all refused and named, %d in tensors\n", n,
           n_files, SEED, n_tensor);
    ckpt_check(&c, folder, 1, 2); // all undone: whole again
    ht_manifest_free(&m);
}
END_TEST

START_TEST(every_truncation_is_refused)
{
    char *data;
    size_t n_bytes;
    int n_cuts = 0;

    for (int i = 0; i < n_files; i++) {
        ck_assert_int_eq(ht_file_read(&data, &n_bytes, files[i].path, 1 << 24), HT_OK);
        for (int64_t k = 0; k < 40 + files[i].n_bytes / 4096; k++) {
            // 4 KiB borders, then random places
            const int64_t cut =
                k * 4096 < files[i].n_bytes
                    ? k * 4096
                    : (int64_t)(ht_rng_u64(SEED, 2, (uint64_t)k) % (uint64_t)files[i].n_bytes);
            ck_assert_int_eq(truncate(files[i].path, cut), 0);
            refused(files[i].name);
            const int fd = open(files[i].path, O_WRONLY);
            ck_assert_int_eq(pwrite(fd, data, n_bytes, 0), (ssize_t)n_bytes);
            close(fd);
            n_cuts++;
        }
        ck_assert_int_eq(truncate(files[i].path, (off_t)n_bytes + 1), 0); // and grown
        refused(files[i].name);
        ck_assert_int_eq(truncate(files[i].path, (off_t)n_bytes), 0);
        free(data);
    }
    ckpt_check(&c, folder, 1, 2);
    printf("%d truncations refused\n", n_cuts);
}
END_TEST

START_TEST(missing_files_are_refused)
{
    char away[400];

    for (int i = 0; i < n_files; i++) {
        snprintf(away, sizeof away, "%s/away", c.dir);
        ck_assert_int_eq(rename(files[i].path, away), 0);
        refused(files[i].name);
        ck_assert_int_eq(mkdir(files[i].path, 0777), 0); // a folder in its place
        ck_assert_int_ne(ht_ckpt_open(&(struct ht_ckpt *){ NULL }, folder), HT_OK);
        ck_assert_int_eq(rmdir(files[i].path), 0);
        ck_assert_int_eq(mkfifo(files[i].path, 0666), 0); // must not hang
        ck_assert_int_ne(ht_ckpt_open(&(struct ht_ckpt *){ NULL }, folder), HT_OK);
        ck_assert_int_eq(unlink(files[i].path), 0);
        ck_assert_int_eq(rename(away, files[i].path), 0);
    }
    ckpt_check(&c, folder, 1, 2);
}
END_TEST

START_TEST(extra_files_are_refused)
{
    char path[400];

    snprintf(path, sizeof path, "%s/rank-00002-of-00003.h5", folder);
    ck_assert_int_eq(link(files[0].path, path), 0);
    refused("rank-00002-of-00003.h5");
    ck_assert_int_eq(unlink(path), 0);
    ckpt_check(&c, folder, 1, 2);
}
END_TEST

START_TEST(swapped_files_are_refused)
{
    char a[400], b[400], t[400], old[300];

    snprintf(a, sizeof a, "%s/rank-00000-of-00002.h5", folder);
    snprintf(b, sizeof b, "%s/rank-00001-of-00002.h5", folder);
    snprintf(t, sizeof t, "%s/away", c.dir);
    ck_assert(!rename(a, t) && !rename(b, a) && !rename(t, b));
    refused("rank-0000");
    ck_assert(!rename(a, t) && !rename(b, a) && !rename(t, b));
    // the same file of another step, the manifest of another step
    snprintf(old, sizeof old, "%s", ckpt_path(&c, 1));
    snprintf(b, sizeof b, "%s/rank-00000-of-00002.h5", old);
    ck_assert(!rename(a, t) && !rename(b, a));
    refused("rank-00000-of-00002.h5");
    ck_assert(!rename(a, b) && !rename(t, a));
    snprintf(a, sizeof a, "%s/manifest.json", folder);
    snprintf(b, sizeof b, "%s/manifest.json", old);
    ck_assert(!rename(a, t) && !rename(b, a));
    refused("manifest.json");
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "step 1"));
    ck_assert(!rename(a, b) && !rename(t, a));
    ckpt_check(&c, folder, 1, 2);
}
END_TEST

/* ---- manifests that are sealed correctly and lie ---- */

static void print_changed(struct ht_manifest *m, const char *what)
{
    char path[400], *text;
    size_t n;

    ck_assert_int_eq(ht_manifest_print(&text, &n, m), HT_OK);
    snprintf(path, sizeof path, "%s/manifest.json", folder);
    ck_assert_int_eq(ht_file_publish(path, text, n), HT_OK);
    free(text);
    struct ht_ckpt *k;
    ck_assert_msg(ht_ckpt_open(&k, folder) == HT_ERR_FORMAT, "%s was accepted", what);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), folder));
}

#define LIE(field, value)                                                                          \
    do {                                                                                           \
        const __typeof__(field) lie_old_ = (field);                                                \
        (field) = (value);                                                                         \
        print_changed(&m, #field " = " #value);                                                    \
        (field) = lie_old_;                                                                        \
    } while (0)

START_TEST(sealed_lies_are_refused)
{
    struct ht_manifest m;
    struct ht_mf_piece *p;

    ck_assert_int_eq(ht_ckpt_folder_open(&m, folder), HT_OK);
    p = &m.pieces[3];
    LIE(m.is_part, true);
    LIE(m.world, 0);
    LIE(m.world, -1);
    LIE(m.world, 3);
    LIE(m.world, 1 << 30);
    LIE(m.step, -1);
    LIE(m.step, 7);
    LIE(m.tokens, INT64_MIN);
    LIE(m.files[0].n_bytes, -1);
    LIE(m.files[0].n_bytes, INT64_MAX);
    LIE(m.files[0].name[0], '.');
    LIE(m.files[0].name[0], '/');
    LIE(m.files[0].name[0], 'x');
    LIE(m.files[0].hash.b[15], m.files[0].hash.b[15] ^ 1);
    LIE(m.n_files, 1);
    LIE(m.n_files, 0);
    LIE(m.tensors[0].name[1], '/');
    LIE(m.tensors[0].name[1], 7);
    LIE(m.tensors[0].n_dims, 0);
    LIE(m.tensors[0].shape[0], 0);
    LIE(m.tensors[0].shape[0], -5);
    LIE(m.tensors[0].shape[0], INT64_MAX);
    LIE(m.tensors[0].shape[0], INT64_MAX / 64);
    LIE(m.tensors[1].shape[1], m.tensors[1].shape[1] + 1);
    LIE(m.n_tensors, m.n_tensors - 1);
    LIE(p->array, 3);
    LIE(p->array, -1);
    LIE(p->array, p->array + 1);
    LIE(p->tensor, m.n_tensors);
    LIE(p->tensor, -1);
    LIE(p->tensor, p->tensor + 1);
    LIE(p->start, -1);
    LIE(p->start, INT64_MAX);
    LIE(p->start, p->start - 1);
    LIE(p->n, 0);
    LIE(p->n, -1);
    LIE(p->n, INT64_MAX);
    LIE(p->n, p->n + 1);
    LIE(p->file, m.n_files);
    LIE(p->file, -1);
    LIE(p->at, -4);
    LIE(p->at, INT64_MAX - 3);
    LIE(p->at, m.files[p->file].n_bytes - 4 * p->n + 1);
    LIE(m.n_pieces, m.n_pieces - 1);
    LIE(m.n_pieces, 0);
    ht_manifest_free(&m);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("damage");
    TCase *t = tcase_create("damage");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, every_flipped_bit_is_refused_and_named);
    tcase_add_test(t, every_truncation_is_refused);
    tcase_add_test(t, missing_files_are_refused);
    tcase_add_test(t, extra_files_are_refused);
    tcase_add_test(t, swapped_files_are_refused);
    tcase_add_test(t, sealed_lies_are_refused);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed != 0;
}
