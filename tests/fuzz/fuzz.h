/* tests/fuzz/fuzz.h: what the fuzz targets share.
 *
 * A target gives outside bytes to one parser of ours. The sanitizers look for memory errors;
 * FUZZ_HOLDS for broken promises: what was accepted must come back the same, an index must be in
 * its range.
 */
#ifndef HT_TESTS_FUZZ_H
#define HT_TESTS_FUZZ_H

#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/status.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

#define FUZZ_HOLDS(what)                                                                           \
    do {                                                                                           \
        if (!(what)) {                                                                             \
            fprintf(stderr, "%s:%d: broken: %s (last error: %s)\n", __FILE__, __LINE__, #what,     \
                    ht_error_message());                                                           \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* A refusal says why. */
#define FUZZ_REFUSED(st) FUZZ_HOLDS((st) != HT_OK && ht_error_message()[0] != '\0')

/* The bytes as a NUL-terminated text of their own, so that reading past the end is seen. */
static inline char *fuzz_text(const void *data, size_t n)
{
    char *text = malloc(n + 1);

    if (!text) abort();
    if (n > 0) memcpy(text, data, n);
    text[n] = '\0';
    return text;
}

/* The bytes as a file in memory; the same name each time. fd, if not NULL, is lent. */
static inline const char *fuzz_file(const void *data, size_t n, int *fd)
{
    static char path[64];
    static int file = -1;

    if (file < 0) {
        file = memfd_create("fuzz", 0);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    if (file < 0 || ftruncate(file, 0) != 0 || pwrite(file, data, n, 0) != (ssize_t)n) abort();
    if (fd) *fd = file;
    return path;
}

/* A folder of this process, removed when it ends. */
static char fuzz_folder_path[PATH_MAX];

static inline void fuzz_remove_folder(void)
{
    ht_file_remove_tree(fuzz_folder_path);
}

static inline const char *fuzz_folder(void)
{
    const char *base = getenv("TMPDIR");

    if (fuzz_folder_path[0]) return fuzz_folder_path;
    snprintf(fuzz_folder_path, sizeof fuzz_folder_path, "%s/ht-fuzz-XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(fuzz_folder_path) || atexit(fuzz_remove_folder) != 0) abort();
    return fuzz_folder_path;
}

#endif
