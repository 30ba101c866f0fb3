/* data/shard.h: token shards, an HDF5 file of documents [4].
 *
 *   /tokens       (n_tokens) uint32 little-endian (uint16 when vocab_size <= 65536), contiguous
 *   /doc_offsets  (n_docs + 1) int64, first token of each document; empty documents are allowed
 *   /text_bytes   int64 scalar: UTF-8 bytes that the tokens came from (for bits per byte)
 *   /checksums    (n_blocks) uint64: XXH3-64 of every 1 MiB of /tokens; attributes carry XXH3-64 of
 *                 /doc_offsets and of the header values
 *   attributes    format_version, vocab_size, n_docs, n_tokens, tokenizer_hash
 * and, behind the end of the HDF5 part, a trailer of 64 bytes that vouches for every byte outside
 * /tokens (shard_format.h); HDF5's own tools do not see it. Written once, published by rename after
 * fsync. A reader checks the trailer before HDF5 opens anything, takes places and sizes from HDF5
 * once and closes it; offsets are mapped, tokens read with pread, so that a disk error is a status
 * and not a signal. Open, writer_finish: HDF5, one thread at a time in the whole process.
 * Everything else is thread-safe.
 */
#ifndef HT_DATA_SHARD_H
#define HT_DATA_SHARD_H

#include <stdint.h>

#include "core/base/status.h"

struct ht_shard;
struct ht_shard_writer;

enum ht_status ht_shard_open(struct ht_shard **out, const char *path);
void ht_shard_close(struct ht_shard *s);

int64_t ht_shard_n_docs(const struct ht_shard *s);
int64_t ht_shard_n_tokens(const struct ht_shard *s);
int64_t ht_shard_vocab_size(const struct ht_shard *s);
int64_t ht_shard_text_bytes(const struct ht_shard *s);
const char *ht_shard_tokenizer_hash(const struct ht_shard *s);
const char *ht_shard_path(const struct ht_shard *s);
uint64_t ht_shard_fingerprint(const struct ht_shard *s); // XXH3-64 of header, offsets and checksums
int64_t ht_shard_doc_length(const struct ht_shard *s, int64_t doc);

/* n tokens of document doc from position first on, as int32. The 1 MiB blocks touched are verified
 * against their checksum on first use; HT_ERR_FORMAT names file and block. Thread-safe. */
enum ht_status ht_shard_read(const struct ht_shard *s, int64_t doc, int64_t first, int64_t n,
                             int32_t *out);

/* All checksums. */
enum ht_status ht_shard_verify(const struct ht_shard *s);

enum ht_status ht_shard_writer_create(struct ht_shard_writer **out, const char *path,
                                      int64_t vocab_size, const char *tokenizer_hash_hex);
enum ht_status ht_shard_writer_add(struct ht_shard_writer *w, const int32_t *ids, int64_t n_ids,
                                   int64_t n_text_bytes);
enum ht_status ht_shard_writer_finish(struct ht_shard_writer *w, int64_t *n_docs,
                                      int64_t *n_tokens);
void ht_shard_writer_free(
    struct ht_shard_writer *w); // removes the temporary file when not finished

#endif
