/* tests/checkpoints/test_safetensors.c: good files, and files made to hurt. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoints/safetensors.h"
#include "core/base/file.h"

static char path[64];

static void setup(void)
{
    snprintf(path, sizeof path, "/tmp/ht-st-XXXXXX");
    const int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    close(fd);
}

static void teardown(void)
{
    unlink(path);
}

/* 8 bytes of length (n_header, or what the header really has when -1), header, n_data bytes. */
static void write_file(const char *header, size_t n, int64_t n_header, size_t n_data)
{
    FILE *f = fopen(path, "wb");
    const uint64_t said = n_header == -1 ? n : (uint64_t)n_header;

    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < 8; i++) fputc((int)(said >> (8 * i) & 255), f);
    ck_assert_uint_eq(fwrite(header, 1, n, f), n);
    for (size_t i = 0; i < n_data; i++) fputc((int)(i & 255), f);
    ck_assert_int_eq(fclose(f), 0);
}

START_TEST(good_file)
{
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[3],\"data_offsets\":[24,30]},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[0,24]},"
        "\"empty\":{\"dtype\":\"F16\",\"shape\":[0,7],\"data_offsets\":[24,24]},"
        "\"scalar\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[30,32]}}    ";
    struct ht_safetensors *s;

    write_file(header, sizeof header - 1, -1, 32);
    ck_assert_msg(ht_safetensors_open(&s, path) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_safetensors_count(s), 4);
    const struct ht_safetensors_tensor *a = ht_safetensors_find(s, "a");
    ck_assert_ptr_nonnull(a);
    ck_assert_int_eq(a->n_dims, 2);
    ck_assert_int_eq(a->n, 6);
    ck_assert_int_eq(a->shape[1], 3);
    ck_assert_int_eq(a->dtype, HT_DTYPE_F32);
    ck_assert_int_eq(((const unsigned char *)a->data)[23], 23);
    ck_assert_int_eq(((const unsigned char *)ht_safetensors_find(s, "b")->data)[0], 24);
    ck_assert_int_eq(ht_safetensors_find(s, "scalar")->n, 1);
    ck_assert_int_eq(ht_safetensors_find(s, "empty")->n, 0);
    ck_assert_ptr_null(ht_safetensors_find(s, "c"));
    ck_assert_str_eq(ht_safetensors_at(s, 0)->name, "a");
    ht_safetensors_close(s);
}
END_TEST

#define F32(shape, from, to)                                                                       \
    "{\"dtype\":\"F32\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

/* Header, its announced length (-1: true), bytes of data, what the message must name. */
static const struct attack {
    const char *header;
    int64_t n_header;
    size_t n_data;
    const char *names;
} attacks[] = {
    { "", 0, 0, "too short" },
    { "{}", 0, 8, "header of 0" },
    { "{}", 1, 8, "header of 1" },
    { "{}", 3, 0, "header of 3" },
    { "{}", 100000001, 0, "header of 100000001" },
    { "{}", INT64_MAX, 0, "header of 9223372036854775807" },
    { "{}", INT64_MIN, 8, "header of 9223372036854775808" },
    { "[]", -1, 8, "'{'" },
    { " {}", -1, 8, "'{'" },
    { "\xef\xbb\xbf{}", -1, 8, "'{'" },
    { "{", -1, 8, "header of 1" },
    { "{ ", -1, 8, "header line" },
    { "{}x", -1, 8, "header line" },
    { "{}{}", -1, 8, "header line" },
    { "{\"a\":}", -1, 8, "header line" },
    { "{\"\xff\xfe\":1}", -1, 8, "header line" },
    { "{\"a\":NaN}", -1, 8, "header line" },
    { "{\"a\":1e400}", -1, 8, "header line" },
    { "{\"a\\u0000b\":1}", -1, 8, "header line" },
    { "{}", -1, 8, "accounts for 0" },
    { "{\"a\":1}", -1, 8, "'a'" },
    { "{\"a\":[]}", -1, 8, "'a'" },
    { "{\"a\":null}", -1, 8, "'a'" },
    { "{\"a\":{}}", -1, 8, "'a'" },
    { "{\"a\":" F32("[2]", 0, 8) ",\"a\":" F32("[2]", 0, 8) "}", -1, 8, "header line" },
    { "{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8,
      "header line" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", -1, 8, "'a'" },
    { "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", -1, 8, "'a'" },
    { "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, "'a'" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8],\"x\":1}}", -1, 8, "'a'" },
    { "{\"a\":{\"dtype\":\"f32\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, "dtype" },
    { "{\"a\":{\"dtype\":\"Q4_0\",\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, "dtype" },
    { "{\"a\":{\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]}}", -1, 8, "dtype" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", -1, 8, "'shape'" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":{},\"data_offsets\":[0,8]}}", -1, 8, "'shape'" },
    { "{\"a\":" F32("[2.0]", 0, 8) "}", -1, 8, "'shape'" },
    { "{\"a\":" F32("[\"2\"]", 0, 8) "}", -1, 8, "'shape'" },
    { "{\"a\":" F32("[-2]", 0, 8) "}", -1, 8, "'shape'" },
    { "{\"a\":" F32("[-1,-2]", 0, 8) "}", -1, 8, "'shape'" },
    { "{\"a\":" F32("[1,1,1,1,1,1,1,1,2]", 0, 8) "}", -1, 8, "dimensions" },
    { "{\"a\":" F32("[4294967296,4294967296,4294967296]", 0, 8) "}", -1, 8, "2^63" },
    { "{\"a\":" F32("[9223372036854775807,2]", 0, 8) "}", -1, 8, "2^63" },
    { "{\"a\":" F32("[4611686018427387904]", 0, 0) "}", -1, 8, "length of its data" },
    { "{\"a\":" F32("[4611686018427387906]", 0, 8) "}", -1, 8, "length of its data" },
    { "{\"a\":" F32("[9223372036854775808]", 0, 8) "}", -1, 8, "header line" },
    { "{\"a\":" F32("[3]", 0, 8) "}", -1, 8, "length of its data" },
    { "{\"a\":" F32("[1]", 0, 8) "}", -1, 8, "length of its data" },
    { "{\"a\":" F32("[2]", 0, 9) "}", -1, 8, "data_offsets" },
    { "{\"a\":" F32("[2]", 8, 0) "}", -1, 8, "data_offsets" },
    { "{\"a\":" F32("[2]", -8, 0) "}", -1, 8, "data_offsets" },
    { "{\"a\":" F32("[2]", 8, 16) "}", -1, 8, "data_offsets" },
    { "{\"a\":" F32("[2]", 0.0, 8.0) "}", -1, 8, "data_offsets" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", -1, 8, "data_offsets" },
    { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", -1, 8, "data_offsets" },
    { "{\"a\":" F32("[1]", 4, 8) "}", -1, 8, "hole" },
    { "{\"a\":" F32("[1]", 0, 4) ",\"b\":" F32("[1]", 8, 12) "}", -1, 12, "hole" },
    { "{\"a\":" F32("[2]", 0, 8) ",\"b\":" F32("[2]", 4, 12) "}", -1, 12, "overlap" },
    { "{\"a\":" F32("[2]", 0, 8) ",\"b\":" F32("[2]", 0, 8) "}", -1, 8, "overlap" },
    { "{\"a\":" F32("[1]", 0, 4) "}", -1, 8, "accounts for 4" },
    { "{\"a\":" F32("[2]", 0, 8) "}", -1, 7, "data_offsets" },
    { "{\"__metadata__\":1,\"a\":" F32("[2]", 0, 8) "}", -1, 8, "__metadata__" },
    { "{\"__metadata__\":{\"x\":1},\"a\":" F32("[2]", 0, 8) "}", -1, 8, "__metadata__" },
    { "{\"__metadata__\":{\"x\":{}},\"a\":" F32("[2]", 0, 8) "}", -1, 8, "__metadata__" },
};
enum { N_ATTACKS = sizeof attacks / sizeof *attacks };

START_TEST(handcrafted_attacks_are_refused)
{
    const struct attack *a = &attacks[_i];
    struct ht_safetensors *s;

    write_file(a->header, strlen(a->header), a->n_header, a->n_data);
    ck_assert_msg(ht_safetensors_open(&s, path) == HT_ERR_FORMAT, "%s: accepted, or: %s", a->header,
                  ht_error_message());
    ck_assert_ptr_null(s);
    ck_assert_msg(strstr(ht_error_message(), path) && strstr(ht_error_message(), a->names),
                  "%s: '%s' is not in: %s", a->header, a->names, ht_error_message());
}
END_TEST

START_TEST(deep_and_long_headers_are_refused)
{
    const size_t n = 3 << 20;
    char *text = malloc(n + 64);
    struct ht_safetensors *s;

    ck_assert_ptr_nonnull(text);
    memset(text, '[', n); // nesting
    memcpy(text, "{\"a\":", 5);
    write_file(text, n, -1, 8);
    ck_assert_int_eq(ht_safetensors_open(&s, path), HT_ERR_FORMAT);
    memset(text, 'x', n); // a name of 3 MB
    memcpy(text, "{\"", 2);
    const int m = sprintf(text + n, "\":" F32("[2]", 0, 8) "}");
    write_file(text, n + (size_t)m, -1, 8);
    ck_assert_int_eq(ht_safetensors_open(&s, path), HT_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "512 bytes"));
    free(text);
}
END_TEST

START_TEST(other_types_are_named)
{
    static const char header[] =
        "{\"ids\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[0,8]}}";
    struct ht_safetensors *s;

    write_file(header, sizeof header - 1, -1, 8);
    ck_assert_int_eq(ht_safetensors_open(&s, path), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "I64"));
}
END_TEST

START_TEST(not_a_file)
{
    struct ht_safetensors *s;

    ck_assert_int_eq(ht_safetensors_open(&s, "/tmp"), HT_ERR_FORMAT);
    ck_assert_int_eq(ht_safetensors_open(&s, "/nowhere/x"), HT_ERR_IO);
    unlink(path);
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    ck_assert_int_eq(ht_safetensors_open(&s, path), HT_ERR_FORMAT);
}
END_TEST

/* Every single-byte change of a small file is either refused or still inside its bounds. */
START_TEST(mutations_stay_in_bounds)
{
    static const char header[] = "{\"a\":" F32("[1,2]", 0, 8) ",\"b\":" F32("[1]", 8, 12) "}";
    char changed[sizeof header];
    int n_accepted = 0;

    for (size_t at = 0; at < sizeof header - 1; at++)
        for (int byte = 0; byte < 256; byte += 11) {
            struct ht_safetensors *s;
            memcpy(changed, header, sizeof header);
            changed[at] = (char)byte;
            write_file(changed, sizeof header - 1, -1, 12);
            if (ht_safetensors_open(&s, path) != HT_OK) continue;
            unsigned sum = 0;
            for (int i = 0; i < ht_safetensors_count(s); i++) {
                const struct ht_safetensors_tensor *t = ht_safetensors_at(s, i);
                for (size_t k = 0; k < (size_t)t->n * ht_dtype_bytes(t->dtype); k++)
                    sum += ((const unsigned char *)t->data)[k];
            }
            ck_assert_uint_eq(sum, 66); // 0 + .. + 11: all bytes, each once
            n_accepted++;
            ht_safetensors_close(s);
        }
    ck_assert_int_gt(n_accepted, 0); // other names are fine
}
END_TEST

int main(void)
{
    Suite *s = suite_create("safetensors");
    TCase *t = tcase_create("safetensors");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, good_file);
    tcase_add_loop_test(t, handcrafted_attacks_are_refused, 0, N_ATTACKS);
    tcase_add_test(t, deep_and_long_headers_are_refused);
    tcase_add_test(t, other_types_are_named);
    tcase_add_test(t, not_a_file);
    tcase_add_test(t, mutations_stay_in_bounds);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed != 0;
}
