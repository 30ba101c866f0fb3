/* tests/training/test_tensorboard.c: event files read back by a small parser of their own. */
#include "temp_dir.h"

#include <math.h>
#include <sys/resource.h>
#include <signal.h>

#include "training/tensorboard.h"

/* Castagnoli bit by bit, another formulation than the table's. */
static uint32_t crc_slow(const unsigned char *p, size_t n)
{
    uint32_t c = ~0u;
    for (size_t i = 0; i < 8 * n; i++) {
        const uint32_t bit = (c ^ (uint32_t)p[i / 8] >> i % 8) & 1;
        c = c >> 1 ^ (bit ? 0x82f63b78u : 0);
    }
    return ~c;
}

static uint64_t get_le(const unsigned char *p, int n)
{
    uint64_t v = 0;
    for (int i = 0; i < n; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

static uint32_t unmask(uint32_t m)
{
    const uint32_t r = m - 0xa282ead8u;
    return r >> 17 | r << 15;
}

struct reader {
    const unsigned char *p, *end;
};

static uint64_t get_varint(struct reader *r)
{
    uint64_t v = 0;
    for (int shift = 0;; shift += 7) {
        ck_assert(r->p < r->end && shift < 64);
        v |= (uint64_t)(*r->p & 0x7f) << shift;
        if (*r->p++ < 0x80) return v;
    }
}

static struct reader get_bytes(struct reader *r)
{
    const uint64_t n = get_varint(r);
    ck_assert(n <= (uint64_t)(r->end - r->p));
    struct reader in = { r->p, r->p + n };
    r->p += n;
    return in;
}

struct event {
    double wall_time;
    int64_t step;
    bool has_version, has_start;
    int n;
    char tag[64][160];
    float value[64];
};

static void parse_summary(struct event *e, struct reader r)
{
    while (r.p < r.end) {
        ck_assert_uint_eq(get_varint(&r), 1 << 3 | 2);
        struct reader v = get_bytes(&r);
        ck_assert_uint_eq(get_varint(&v), 1 << 3 | 2);
        struct reader tag = get_bytes(&v);
        memcpy(e->tag[e->n], tag.p, (size_t)(tag.end - tag.p));
        e->tag[e->n][tag.end - tag.p] = '\0';
        ck_assert_uint_eq(get_varint(&v), 2 << 3 | 5);
        const uint32_t bits = (uint32_t)get_le(v.p, 4);
        memcpy(&e->value[e->n++], &bits, 4);
        ck_assert_ptr_eq(v.p + 4, v.end);
    }
}

static void parse_event(struct event *e, struct reader r)
{
    memset(e, 0, sizeof *e);
    while (r.p < r.end) {
        switch (get_varint(&r)) {
        case 1 << 3 | 1: {
            const uint64_t bits = get_le(r.p, 8);
            memcpy(&e->wall_time, &bits, 8);
            r.p += 8;
            break;
        }
        case 2 << 3 | 0: e->step = (int64_t)get_varint(&r); break;
        case 3 << 3 | 2: {
            struct reader v = get_bytes(&r);
            ck_assert(v.end - v.p == 13 && memcmp(v.p, "brain.Event:2", 13) == 0);
            e->has_version = true;
            break;
        }
        case 5 << 3 | 2: parse_summary(e, get_bytes(&r)); break;
        case 7 << 3 | 2: {
            struct reader v = get_bytes(&r);
            ck_assert(v.end - v.p == 2 && v.p[0] == (1 << 3) && v.p[1] == 1);
            e->has_start = true;
            break;
        }
        default: ck_abort_msg("unexpected field");
        }
    }
}

/* The next record; false at the end of the file. */
static bool next_event(struct event *e, struct reader *file)
{
    if (file->p == file->end) return false;
    ck_assert_int_ge(file->end - file->p, 16);
    const uint64_t n = get_le(file->p, 8);
    ck_assert_uint_eq(unmask((uint32_t)get_le(file->p + 8, 4)), crc_slow(file->p, 8));
    ck_assert_uint_le(n + 16, (uint64_t)(file->end - file->p));
    const unsigned char *data = file->p + 12;
    ck_assert_uint_eq(unmask((uint32_t)get_le(data + n, 4)), crc_slow(data, n));
    parse_event(e, (struct reader){ data, data + n });
    file->p = data + n + 4;
    return true;
}

static const char *base_name(const struct ht_tensorboard *t)
{
    return strrchr(ht_tensorboard_path(t), '/') + 1;
}

START_TEST(checksums_have_known_values)
{
    unsigned char block[32];

    ck_assert_uint_eq(ht_crc32c("123456789", 9), 0xe3069283u); // the check value of CRC-32C
    memset(block, 0, sizeof block);
    ck_assert_uint_eq(ht_crc32c(block, 32), 0x8a9136aau); // RFC 3720, B.4
    memset(block, 0xff, sizeof block);
    ck_assert_uint_eq(ht_crc32c(block, 32), 0x62a8ab43u);
    for (unsigned char i = 0; i < 32; i++) block[i] = i;
    ck_assert_uint_eq(ht_crc32c(block, 32), 0x46dd794eu);
    ck_assert_uint_eq(ht_crc32c(block, 0), 0);
    ck_assert_uint_eq(unmask(ht_crc32c_masked(block, 32)), 0x46dd794eu);
}
END_TEST

START_TEST(events_read_back)
{
    char long_tag[HT_TENSORBOARD_MAX_TAG + 1];
    memset(long_tag, 'x', sizeof long_tag - 1); // a length of two bytes
    long_tag[sizeof long_tag - 1] = '\0';
    const char *tags[] = { "train/loss", long_tag, "e" };
    struct ht_tensorboard *t;
    struct event e;
    size_t n;

    ck_assert_int_eq(ht_tensorboard_open(&t, dir, 0), HT_OK);
    for (int64_t step = 1; step < 1000000000000; step *= 7) {
        const double values[] = { 1.0 / (double)step, (double)step, NAN };
        ck_assert_int_eq(ht_tensorboard_scalars(t, 1000.5, step, 3, tags, values), HT_OK);
    }
    char *text = slurp(base_name(t), &n);
    struct reader file = { (unsigned char *)text, (unsigned char *)text + n };
    ck_assert(next_event(&e, &file));
    ck_assert(e.has_version && e.n == 0 && e.wall_time > 1e9);
    for (int64_t step = 1; step < 1000000000000; step *= 7) {
        ck_assert(next_event(&e, &file));
        ck_assert_int_eq(e.step, step);
        ck_assert_int_eq(e.n, 3);
        ck_assert(e.wall_time == 1000.5);
        ck_assert_str_eq(e.tag[0], "train/loss");
        ck_assert_str_eq(e.tag[1], long_tag);
        ck_assert(e.value[0] == (float)(1.0 / (double)step) && e.value[1] == (float)step);
        ck_assert(isnan(e.value[2]));
    }
    ck_assert(!next_event(&e, &file));
    free(text);
    ht_tensorboard_close(t);
}
END_TEST

START_TEST(resume_starts_another_file_with_a_mark)
{
    struct ht_tensorboard *a, *b;
    struct event e;
    size_t n;

    ck_assert_int_eq(ht_tensorboard_open(&a, dir, 0), HT_OK);
    ck_assert_int_eq(ht_tensorboard_open(&b, dir, 41), HT_OK); // same second, same process
    ck_assert_str_ne(ht_tensorboard_path(a), ht_tensorboard_path(b));
    char *text = slurp(base_name(b), &n);
    struct reader file = { (unsigned char *)text, (unsigned char *)text + n };
    ck_assert(next_event(&e, &file) && e.has_version);
    ck_assert(next_event(&e, &file) && e.has_start && e.step == 42);
    ck_assert(!next_event(&e, &file));
    free(text);
    ht_tensorboard_close(a);
    ht_tensorboard_close(b);
}
END_TEST

START_TEST(largest_event_fits)
{
    static char tags[HT_TENSORBOARD_MAX_SCALARS][HT_TENSORBOARD_MAX_TAG + 1];
    const char *names[HT_TENSORBOARD_MAX_SCALARS + 1];
    double values[HT_TENSORBOARD_MAX_SCALARS + 1] = { 0 };
    struct ht_tensorboard *t;
    static struct event e;
    size_t n;

    for (int i = 0; i < HT_TENSORBOARD_MAX_SCALARS; i++) {
        memset(tags[i], 'a' + i % 26, HT_TENSORBOARD_MAX_TAG);
        names[i] = tags[i];
        values[i] = i;
    }
    ck_assert_int_eq(ht_tensorboard_open(&t, dir, 0), HT_OK);
    ck_assert_int_eq(
        ht_tensorboard_scalars(t, 1, INT64_MAX, HT_TENSORBOARD_MAX_SCALARS, names, values), HT_OK);
    char *text = slurp(base_name(t), &n);
    struct reader file = { (unsigned char *)text, (unsigned char *)text + n };
    ck_assert(next_event(&e, &file) && next_event(&e, &file));
    ck_assert(e.n == HT_TENSORBOARD_MAX_SCALARS && e.step == INT64_MAX);
    for (int i = 0; i < e.n; i++) ck_assert(e.value[i] == (float)i);
    free(text);

    names[HT_TENSORBOARD_MAX_SCALARS] = "one too many";
    ck_assert_int_eq(ht_tensorboard_scalars(t, 1, 1, HT_TENSORBOARD_MAX_SCALARS + 1, names, values),
                     HT_ERR_ARG);
    char too_long[HT_TENSORBOARD_MAX_TAG + 2];
    memset(too_long, 'y', sizeof too_long - 1);
    too_long[sizeof too_long - 1] = '\0';
    names[0] = too_long;
    ck_assert_int_eq(ht_tensorboard_scalars(t, 1, 1, 1, names, values), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "129"));
    ht_tensorboard_close(t);
}
END_TEST

START_TEST(failures_are_said)
{
    struct ht_tensorboard *t;
    const char *tag = "a";
    const double value = 1;
    char path[256];
    struct rlimit limit = { 40, RLIM_INFINITY };

    ck_assert_int_eq(ht_tensorboard_open(&t, in_dir(path, "absent"), 0), HT_ERR_IO);
    ck_assert_ptr_null(t);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "absent"));
    ck_assert_int_eq(ht_tensorboard_open(&t, dir, 0), HT_OK);
    signal(SIGXFSZ, SIG_IGN);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &limit), 0); // a full disk, for this process
    ck_assert_int_eq(ht_tensorboard_scalars(t, 1, 1, 1, &tag, &value), HT_ERR_IO);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "events.out.tfevents."));
    limit.rlim_cur = RLIM_INFINITY;
    setrlimit(RLIMIT_FSIZE, &limit);
    ht_tensorboard_close(t);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tensorboard");
    TCase *tc = tcase_create("tensorboard");

    tcase_add_checked_fixture(tc, temp_dir_make, temp_dir_remove);
    tcase_add_test(tc, checksums_have_known_values);
    tcase_add_test(tc, events_read_back);
    tcase_add_test(tc, resume_starts_another_file_with_a_mark);
    tcase_add_test(tc, largest_event_fits);
    tcase_add_test(tc, failures_are_said);
    suite_add_tcase(s, tc);
    return run_suite(s);
}
