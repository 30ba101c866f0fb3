/* data/shard_format.h: what writer and reader of token shards share; not for users of shards.
 *
 *   [ HDF5 file: superblock, attributes, /doc_offsets, /checksums, /text_bytes, /tokens ] [ trailer
 * ]
 *
 * HDF5 1.10 reads about a quarter of randomly damaged files without an error and loops for ever on
 * a few (HDFGroup/hdf5#1707), so nothing is given to it before the trailer has vouched for every
 * byte outside /tokens; /tokens has its own checksums, verified block by block on first use. The
 * trailer lies behind the end that the superblock states, where HDF5 never looks: h5dump and h5py
 * read the file as it is.
 */
#ifndef HT_DATA_SHARD_FORMAT_H
#define HT_DATA_SHARD_FORMAT_H

#include <hdf5.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "shards are little-endian and mapped as they are"
#endif

#define HT_SHARD_VERSION 1
#define HT_SHARD_BLOCK_BYTES (1 << 20) // unit of the checksums of /tokens
#define HT_SHARD_MAX_HASH_CHARS 128    // of tokenizer_hash

/* Last 64 bytes of the file. */
struct ht_shard_trailer {
    char magic[8]; // "HTSHARD\n"
    uint32_t version, zero;
    int64_t hdf5_bytes;              // size of the HDF5 part
    int64_t tokens_at, tokens_bytes; // place of /tokens in it
    unsigned char outside_hash[16];  // XXH3-128 (canonical) of the HDF5 part without /tokens
    uint64_t trailer_hash;           // XXH3-64 of the 56 bytes above
};

/* The values that the header hash covers, in this order. */
struct ht_shard_header {
    int64_t format_version, vocab_size, n_docs, n_tokens, text_bytes;
    uint64_t offsets_hash;   // XXH3-64 of /doc_offsets
    uint64_t checksums_hash; // XXH3-64 of /checksums
    char tokenizer_hash[HT_SHARD_MAX_HASH_CHARS + 1];
};

static inline int ht_shard_token_bytes(int64_t vocab_size)
{
    return vocab_size <= 65536 ? 2 : 4;
}

/* XXH3-64 of the values; also the shard's fingerprint. */
uint64_t ht_shard_header_hash(const struct ht_shard_header *h);

/* Append the trailer to the HDF5 file open at fd, hdf5_bytes long; durability is the caller's. */
enum ht_status ht_shard_seal(int fd, const char *path, int64_t tokens_at, int64_t tokens_bytes);

/* Read the trailer and check it, the file's size and every byte outside /tokens. HT_ERR_FORMAT. */
enum ht_status ht_shard_check_seal(struct ht_shard_trailer *t, int fd, const char *path);

/* All n bytes at offset, or a status: HT_ERR_FORMAT when the file ends before, HT_ERR_IO, and
 * HT_ERR_MEMORY when the disk is full. */
enum ht_status ht_shard_pread(int fd, const char *path, void *out, size_t n, int64_t offset);
enum ht_status ht_shard_pwrite(int fd, const char *path, const void *data, size_t n,
                               int64_t offset);

/* HDF5 prints its error stack unless told otherwise: silence it around our calls. */
struct ht_h5_quiet {
    H5E_auto2_t function;
    void *data;
};
void ht_h5_quiet_begin(struct ht_h5_quiet *q);
void ht_h5_quiet_end(const struct ht_h5_quiet *q);

/* Fail with what and HDF5's own text. A full disk gives HT_ERR_MEMORY, anything else `code`. */
enum ht_status ht_h5_fail(enum ht_status code, const char *path, const char *what);

#endif
