/* core/base/file.h: files that are there whole or not at all, and time. */
#ifndef HT_BASE_FILE_H
#define HT_BASE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

/* Whole file into a fresh NUL-terminated buffer (free() it); refuses more than max_bytes. */
enum ht_status ht_file_read(char **out, size_t *n_bytes, const char *path, size_t max_bytes);

/* Write path.tmp-PID, fsync, rename to path, fsync the folder. On failure path is untouched. */
enum ht_status ht_file_publish(const char *path, const void *data, size_t n_bytes);

enum ht_status ht_file_sync(const char *path);        // fsync of a file or a folder
enum ht_status ht_file_make_dirs(const char *path);   // mkdir -p
enum ht_status ht_file_remove_tree(const char *path); // rm -r; absent is fine
bool ht_file_exists(const char *path);
bool ht_file_is_dir(const char *path);

/* Bytes free for us on the file system of path (or of its nearest existing parent). */
enum ht_status ht_file_free_bytes(uint64_t *out, const char *path);

double ht_time_s(void);      // monotonic, seconds
double ht_time_wall_s(void); // since 1970, seconds

/* Resident memory of this process now and at its peak, bytes (from /proc; 0 where there is none).
 */
uint64_t ht_memory_resident_bytes(void);
uint64_t ht_memory_peak_bytes(void);

#endif
