/* tests/training/temp_dir.h: a folder of its own for a test. */
#ifndef HT_TESTS_TEMP_DIR_H
#define HT_TESTS_TEMP_DIR_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"

static char dir[64]; // fresh for each test

static inline void temp_dir_make(void)
{
    strcpy(dir, "/tmp/ht-training-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
}

static inline void temp_dir_remove(void)
{
    ht_file_remove_tree(dir);
}

static inline char *in_dir(char path[256], const char *name)
{
    snprintf(path, 256, "%.60s/%.180s", dir, name);
    return path;
}

/* Whole content of a file in the folder; free() it. */
static inline char *slurp(const char *name, size_t *n)
{
    char path[256], *text;
    ck_assert_msg(ht_file_read(&text, n, in_dir(path, name), 1 << 26) == HT_OK, "%s",
                  ht_error_message());
    return text;
}

static inline int run_suite(Suite *s)
{
    SRunner *sr = srunner_create(s);
    srunner_run_all(sr, CK_ENV);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    return n_failed != 0;
}

#endif
