/* checkpoints/hash.h: XXH3-128 of buffers and files, and the few file operations that a checkpoint
 * needs.
 *
 * Integrity, not origin: a hash tells damage from what was written, it does not say who wrote it.
 */
#ifndef HT_CHECKPOINTS_HASH_H
#define HT_CHECKPOINTS_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

#define HT_HASH_HEX 33 // 32 digits and the end

struct ht_hash {
    unsigned char b[16]; // canonical, most significant byte first
};

struct ht_hash ht_hash_of(const void *data, size_t n_bytes);
bool ht_hash_equal(const struct ht_hash *a, const struct ht_hash *b);
void ht_hash_print(char hex[HT_HASH_HEX], const struct ht_hash *h);
bool ht_hash_parse(struct ht_hash *h, const char *hex); // exactly 32 lower-case digits

/* Streaming; create is the only one that can fail (HT_ERR_MEMORY). */
struct ht_hasher;
enum ht_status ht_hasher_create(struct ht_hasher **out);
void ht_hasher_free(struct ht_hasher *h);
void ht_hasher_reset(struct ht_hasher *h);
void ht_hasher_update(struct ht_hasher *h, const void *data, size_t n_bytes);
struct ht_hash ht_hasher_digest(const struct ht_hasher *h);

/* pread until n_bytes are there; EINTR is repeated, an early end is HT_ERR_FORMAT. */
enum ht_status ht_file_read_at(int fd, void *out, size_t n_bytes, int64_t at, const char *path);

/* ht_file_read for files of others: a FIFO or a device in its place is refused, not waited for. */
enum ht_status ht_file_read_regular(char **out, size_t *n_bytes, const char *path,
                                    size_t max_bytes);

/* Size and hash of a regular file, read in blocks (never mapped: a file cut meanwhile is an error,
 * not a signal). Links are followed. */
enum ht_status ht_file_hash(struct ht_hash *out, int64_t *n_bytes, const char *path);

#endif
