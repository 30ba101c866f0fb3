/* data/shard.c: reading token shards: seal, then HDF5 once, then plain reads with lazy
 * verification. */
#include "data/shard.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY // the hash state is a local variable
#include <xxhash.h>

#include "data/shard_format.h"
#include "data/shard_image.h"

struct ht_shard {
    char *path;
    int fd;
    struct ht_shard_header header;
    uint64_t fingerprint;
    int token_bytes;
    int64_t tokens_at, offsets_at, checksums_at; // places in the file
    int64_t n_blocks;
    void *map; // pages of /doc_offsets
    size_t map_bytes;
    const unsigned char *offsets; // in the map, of any alignment
    uint64_t *checksums;
    _Atomic uint64_t *verified; // one bit per block
};

static int64_t doc_offset(const struct ht_shard *s, int64_t i)
{
    int64_t v;
    memcpy(&v, s->offsets + 8 * i, sizeof v);
    return v;
}

static enum ht_status read_attribute(hid_t file, const char *path, const char *name, hid_t type,
                                     void *value)
{
    const hid_t a = H5Aopen(file, name, H5P_DEFAULT);
    enum ht_status st = HT_OK;

    if (a < 0 || H5Aread(a, type, value) < 0) st = ht_h5_fail(HT_ERR_FORMAT, path, name);
    if (a >= 0) H5Aclose(a);
    return st;
}

static enum ht_status read_tokenizer_hash(hid_t file, struct ht_shard *s)
{
    const hid_t a = H5Aopen(file, "tokenizer_hash", H5P_DEFAULT);
    const hid_t type = a >= 0 ? H5Aget_type(a) : -1;
    enum ht_status st = HT_OK;

    if (type < 0) {
        st = ht_h5_fail(HT_ERR_FORMAT, s->path, "tokenizer_hash");
    } else if (H5Tget_class(type) != H5T_STRING || H5Tis_variable_str(type) != 0 ||
               H5Tget_size(type) >= sizeof s->header.tokenizer_hash + 1) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: tokenizer_hash is not a string of at most %d bytes",
                     s->path, HT_SHARD_MAX_HASH_CHARS);
    } else if (H5Aread(a, type, s->header.tokenizer_hash) < 0) {
        st = ht_h5_fail(HT_ERR_FORMAT, s->path, "tokenizer_hash");
    }
    s->header.tokenizer_hash[HT_SHARD_MAX_HASH_CHARS] = '\0';
    if (type >= 0) H5Tclose(type);
    if (a >= 0) H5Aclose(a);
    return st;
}

/* Place of a one-dimensional contiguous array of n elements of bytes_each bytes. */
static enum ht_status read_place(hid_t file, const struct ht_shard *s, const char *name, int64_t n,
                                 int bytes_each, int64_t hdf5_bytes, int64_t *at)
{
    enum ht_status st = HT_OK;
    hsize_t dims[1] = { 0 };
    hid_t set = -1, space = -1, type = -1, plist = -1;

    *at = 0;
    set = H5Dopen2(file, name, H5P_DEFAULT);
    if (set >= 0) {
        space = H5Dget_space(set);
        type = H5Dget_type(set);
        plist = H5Dget_create_plist(set);
    }
    if (space < 0 || type < 0 || plist < 0) {
        st = ht_h5_fail(HT_ERR_FORMAT, s->path, name);
        goto done;
    }
    if (H5Sget_simple_extent_ndims(space) != 1 ||
        H5Sget_simple_extent_dims(space, dims, NULL) != 1 || dims[0] != (hsize_t)n) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: /%s has %llu elements; the header says %lld", s->path,
                     name, (unsigned long long)dims[0], (long long)n);
        goto done;
    }
    if (H5Tget_class(type) != H5T_INTEGER || H5Tget_size(type) != (size_t)bytes_each ||
        H5Tget_order(type) != H5T_ORDER_LE || H5Pget_layout(plist) != H5D_CONTIGUOUS) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: /%s is not a contiguous array of %d-byte integers",
                     s->path, name, bytes_each);
        goto done;
    }
    if (n > 0) {
        const haddr_t place = H5Dget_offset(set);
        if (place > (haddr_t)hdf5_bytes || (hdf5_bytes - (int64_t)place) / bytes_each < n) {
            st =
                HT_FAIL(HT_ERR_FORMAT, "%s: /%s, %lld elements at byte %lld, ends beyond byte %lld",
                        s->path, name, (long long)n, (long long)place, (long long)hdf5_bytes);
            goto done;
        }
        *at = (int64_t)place;
    }
done:
    if (plist >= 0) H5Pclose(plist);
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
    if (set >= 0) H5Dclose(set);
    return st;
}

static enum ht_status read_text_bytes(hid_t file, struct ht_shard *s)
{
    const hid_t set = H5Dopen2(file, "text_bytes", H5P_DEFAULT);
    const hid_t space = set >= 0 ? H5Dget_space(set) : -1;
    enum ht_status st = HT_OK;

    if (space < 0 || H5Sget_simple_extent_npoints(space) != 1 ||
        H5Dread(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, &s->header.text_bytes) < 0)
        st = ht_h5_fail(HT_ERR_FORMAT, s->path, "text_bytes");
    if (space >= 0) H5Sclose(space);
    if (set >= 0) H5Dclose(set);
    return st;
}

static enum ht_status check_header(struct ht_shard *s, uint64_t header_hash,
                                   const struct ht_shard_trailer *t)
{
    const struct ht_shard_header *h = &s->header;

    s->fingerprint = ht_shard_header_hash(h);
    if (s->fingerprint != header_hash)
        return HT_FAIL(HT_ERR_FORMAT, "%s: header values have XXH3 %016llx, %016llx was written",
                       s->path, (unsigned long long)s->fingerprint,
                       (unsigned long long)header_hash);
    if (h->format_version != HT_SHARD_VERSION)
        return HT_FAIL(HT_ERR_FORMAT, "%s: format_version is %lld; this program reads %d", s->path,
                       (long long)h->format_version, HT_SHARD_VERSION);
    if (h->vocab_size < 1 || h->vocab_size > INT32_MAX)
        return HT_FAIL(HT_ERR_FORMAT, "%s: vocab_size is %lld; it must be from 1 to %d", s->path,
                       (long long)h->vocab_size, INT32_MAX);
    if (h->n_docs < 0 || h->n_tokens < 0 || h->text_bytes < 0 || h->n_docs > t->hdf5_bytes / 8)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: n_docs %lld, n_tokens %lld, text_bytes %lld in %lld bytes", s->path,
                       (long long)h->n_docs, (long long)h->n_tokens, (long long)h->text_bytes,
                       (long long)t->hdf5_bytes);
    s->token_bytes = ht_shard_token_bytes(h->vocab_size);
    if (t->tokens_bytes % s->token_bytes != 0 || t->tokens_bytes / s->token_bytes != h->n_tokens)
        return HT_FAIL(HT_ERR_FORMAT, "%s: n_tokens is %lld; the trailer says %lld bytes", s->path,
                       (long long)h->n_tokens, (long long)t->tokens_bytes);
    s->n_blocks = (t->tokens_bytes + HT_SHARD_BLOCK_BYTES - 1) / HT_SHARD_BLOCK_BYTES;
    return HT_OK;
}

/* Header values and places of the arrays, from HDF5; the seal has been checked. */
static enum ht_status read_hdf5(struct ht_shard *s, const struct ht_shard_trailer *t)
{
    struct ht_shard_header *h = &s->header;
    const struct {
        const char *name;
        hid_t type;
        void *value;
    } attributes[] = {
        { "format_version", H5T_NATIVE_INT64, &h->format_version },
        { "vocab_size", H5T_NATIVE_INT64, &h->vocab_size },
        { "n_docs", H5T_NATIVE_INT64, &h->n_docs },
        { "n_tokens", H5T_NATIVE_INT64, &h->n_tokens },
        { "doc_offsets_xxh3", H5T_NATIVE_UINT64, &h->offsets_hash },
        { "checksums_xxh3", H5T_NATIVE_UINT64, &h->checksums_hash },
    };
    enum ht_status st = HT_OK;
    struct ht_h5_quiet quiet;
    uint64_t header_hash = 0;
    hid_t plist = -1, driver = -1, file = -1;

    ht_h5_quiet_begin(&quiet);
    plist = H5Pcreate(H5P_FILE_ACCESS);
    // through our descriptor: HDF5 sees the file that the trailer has vouched for, and locks
    // nothing
    if (plist < 0 || ht_shard_image_use(plist, s->fd, &driver) < 0) {
        st = ht_h5_fail(HT_ERR_IO, s->path, "file access properties");
        goto done;
    }
    file = H5Fopen(s->path, H5F_ACC_RDONLY, plist);
    if (file < 0) {
        st = ht_h5_fail(HT_ERR_FORMAT, s->path, "open");
        goto done;
    }
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        HT_TRY_GOTO(st, done,
                    read_attribute(file, s->path, attributes[i].name, attributes[i].type,
                                   attributes[i].value));
    HT_TRY_GOTO(st, done,
                read_attribute(file, s->path, "header_xxh3", H5T_NATIVE_UINT64, &header_hash));
    HT_TRY_GOTO(st, done, read_tokenizer_hash(file, s));
    HT_TRY_GOTO(st, done, read_text_bytes(file, s));
    HT_TRY_GOTO(st, done, check_header(s, header_hash, t));
    HT_TRY_GOTO(
        st, done,
        read_place(file, s, "doc_offsets", h->n_docs + 1, 8, t->hdf5_bytes, &s->offsets_at));
    HT_TRY_GOTO(st, done,
                read_place(file, s, "checksums", s->n_blocks, 8, t->hdf5_bytes, &s->checksums_at));
    HT_TRY_GOTO(
        st, done,
        read_place(file, s, "tokens", h->n_tokens, s->token_bytes, t->hdf5_bytes, &s->tokens_at));
    if (h->n_tokens > 0 && s->tokens_at != t->tokens_at)
        st = HT_FAIL(HT_ERR_FORMAT, "%s: /tokens is at byte %lld, by the trailer at %lld", s->path,
                     (long long)s->tokens_at, (long long)t->tokens_at);
done:
    if (file >= 0) H5Fclose(file);
    if (plist >= 0) H5Pclose(plist);
    if (driver >= 0) H5FDunregister(driver);
    ht_h5_quiet_end(&quiet);
    return st;
}

static enum ht_status load_checksums(struct ht_shard *s)
{
    const size_t n = (size_t)s->n_blocks;

    s->checksums = malloc(n * sizeof *s->checksums + 1);
    s->verified = calloc(n / 64 + 1, sizeof *s->verified);
    if (!s->checksums || !s->verified)
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu checksums", s->path, n);
    HT_TRY(ht_shard_pread(s->fd, s->path, s->checksums, 8 * n, s->checksums_at));
    if (XXH3_64bits(s->checksums, 8 * n) != s->header.checksums_hash)
        return HT_FAIL(HT_ERR_FORMAT, "%s: /checksums differs from its checksum", s->path);
    return HT_OK;
}

/* Map /doc_offsets: all ranks of a machine share its pages. */
static enum ht_status map_offsets(struct ht_shard *s)
{
    const struct ht_shard_header *h = &s->header;
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t from = s->offsets_at / page * page;
    const size_t n = 8 * (size_t)(h->n_docs + 1);

    s->map_bytes = (size_t)(s->offsets_at - from) + n;
    s->map = mmap(NULL, s->map_bytes, PROT_READ, MAP_SHARED, s->fd, (off_t)from);
    if (s->map == MAP_FAILED) {
        s->map = NULL;
        return HT_FAIL(HT_ERR_MEMORY, "%s: cannot map %zu bytes: %s", s->path, s->map_bytes,
                       strerror(errno));
    }
    s->offsets = (const unsigned char *)s->map + (s->offsets_at - from);
    if (XXH3_64bits(s->offsets, n) != h->offsets_hash)
        return HT_FAIL(HT_ERR_FORMAT, "%s: /doc_offsets differs from its checksum", s->path);
    int64_t before = 0;
    for (int64_t i = 0; i <= h->n_docs; i++) {
        const int64_t v = doc_offset(s, i);
        if (v < before || v > h->n_tokens || (i == 0 && v != 0))
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: /doc_offsets[%lld] is %lld, after %lld, of %lld tokens", s->path,
                           (long long)i, (long long)v, (long long)before, (long long)h->n_tokens);
        before = v;
    }
    if (before != h->n_tokens)
        return HT_FAIL(HT_ERR_FORMAT, "%s: /doc_offsets ends at %lld of %lld tokens", s->path,
                       (long long)before, (long long)h->n_tokens);
    return HT_OK;
}

enum ht_status ht_shard_open(struct ht_shard **out, const char *path)
{
    enum ht_status st = HT_OK;
    struct ht_shard_trailer trailer;
    struct ht_shard *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a shard", path);
    s->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s%s", path, strerror(errno),
                     errno == EMFILE ? "; raise `ulimit -n` or write fewer, larger shards" : "");
        goto done;
    }
    s->path = strdup(path);
    if (!s->path) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a shard", path);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_shard_check_seal(&trailer, s->fd, path));
    HT_TRY_GOTO(st, done, read_hdf5(s, &trailer));
    HT_TRY_GOTO(st, done, load_checksums(s));
    HT_TRY_GOTO(st, done, map_offsets(s));
    *out = s;
    s = NULL;
done:
    ht_shard_close(s);
    return st;
}

void ht_shard_close(struct ht_shard *s)
{
    if (!s) return;
    if (s->map) munmap(s->map, s->map_bytes);
    if (s->fd >= 0) close(s->fd);
    free(s->checksums);
    free((void *)s->verified);
    free(s->path);
    free(s);
}

int64_t ht_shard_n_docs(const struct ht_shard *s)
{
    return s->header.n_docs;
}
int64_t ht_shard_n_tokens(const struct ht_shard *s)
{
    return s->header.n_tokens;
}
int64_t ht_shard_vocab_size(const struct ht_shard *s)
{
    return s->header.vocab_size;
}
int64_t ht_shard_text_bytes(const struct ht_shard *s)
{
    return s->header.text_bytes;
}
const char *ht_shard_tokenizer_hash(const struct ht_shard *s)
{
    return s->header.tokenizer_hash;
}
const char *ht_shard_path(const struct ht_shard *s)
{
    return s->path;
}
uint64_t ht_shard_fingerprint(const struct ht_shard *s)
{
    return s->fingerprint;
}

int64_t ht_shard_doc_length(const struct ht_shard *s, int64_t doc)
{
    return doc_offset(s, doc + 1) - doc_offset(s, doc);
}

/* Position of the first id >= vocab_size among n tokens as stored, or -1; *value = that id. */
static int64_t find_bad_id(const struct ht_shard *s, const void *stored, int64_t n, uint32_t *value)
{
    uint32_t largest = 0;

    for (int64_t i = 0; i < n; i++) { // no early exit: this is a vector loop
        const uint32_t v =
            s->token_bytes == 2 ? ((const uint16_t *)stored)[i] : ((const uint32_t *)stored)[i];
        largest = v > largest ? v : largest;
    }
    if ((int64_t)largest < s->header.vocab_size) return -1;
    for (int64_t i = 0;; i++) {
        *value =
            s->token_bytes == 2 ? ((const uint16_t *)stored)[i] : ((const uint32_t *)stored)[i];
        if ((int64_t)*value >= s->header.vocab_size) return i;
    }
}

enum { CHUNK_BYTES = 1 << 15 }; // on the stack: readers run on threads of any kind

static enum ht_status verify_block(const struct ht_shard *s, int64_t block)
{
    const int64_t total = s->header.n_tokens * s->token_bytes;
    const int64_t begin = block * HT_SHARD_BLOCK_BYTES;
    const int64_t end = begin + HT_SHARD_BLOCK_BYTES < total ? begin + HT_SHARD_BLOCK_BYTES : total;
    _Alignas(64) unsigned char buf[CHUNK_BYTES];
    int64_t bad_at = -1;
    uint32_t bad_id = 0;
    XXH3_state_t state;

    XXH3_64bits_reset(&state);
    for (int64_t at = begin; at < end; at += CHUNK_BYTES) {
        const size_t n = end - at < CHUNK_BYTES ? (size_t)(end - at) : CHUNK_BYTES;
        HT_TRY(ht_shard_pread(s->fd, s->path, buf, n, s->tokens_at + at));
        XXH3_64bits_update(&state, buf, n);
        if (bad_at < 0) {
            const int64_t i = find_bad_id(s, buf, (int64_t)n / s->token_bytes, &bad_id);
            if (i >= 0) bad_at = at / s->token_bytes + i;
        }
    }
    const uint64_t hash = XXH3_64bits_digest(&state);
    if (hash != s->checksums[block])
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: /tokens block %lld (tokens %lld to %lld) has XXH3 %016llx, %016llx was "
                       "written: the file is damaged",
                       s->path, (long long)block, (long long)(begin / s->token_bytes),
                       (long long)(end / s->token_bytes - 1), (unsigned long long)hash,
                       (unsigned long long)s->checksums[block]);
    if (bad_at >= 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: /tokens[%lld] is %u; the vocabulary has %lld", s->path,
                       (long long)bad_at, bad_id, (long long)s->header.vocab_size);
    atomic_fetch_or_explicit(&s->verified[block / 64], (uint64_t)1 << (block % 64),
                             memory_order_relaxed);
    return HT_OK;
}

enum ht_status ht_shard_read(const struct ht_shard *s, int64_t doc, int64_t first, int64_t n,
                             int32_t *out)
{
    if (doc < 0 || doc >= s->header.n_docs)
        return HT_FAIL(HT_ERR_ARG, "%s: document %lld of %lld", s->path, (long long)doc,
                       (long long)s->header.n_docs);
    const int64_t length = ht_shard_doc_length(s, doc);
    if (first < 0 || n < 0 || first > length || n > length - first)
        return HT_FAIL(HT_ERR_ARG, "%s: document %lld has %lld tokens; %lld from %lld on wanted",
                       s->path, (long long)doc, (long long)length, (long long)n, (long long)first);
    if (n == 0) return HT_OK;
    int64_t begin = (doc_offset(s, doc) + first) * s->token_bytes;
    const int64_t end = begin + n * s->token_bytes;
    for (int64_t b = begin / HT_SHARD_BLOCK_BYTES; b <= (end - 1) / HT_SHARD_BLOCK_BYTES; b++) {
        const uint64_t bits = atomic_load_explicit(&s->verified[b / 64], memory_order_relaxed);
        if (!(bits >> (b % 64) & 1)) HT_TRY(verify_block(s, b));
    }
    if (s->token_bytes == 4)
        return ht_shard_pread(s->fd, s->path, out, (size_t)n * 4, s->tokens_at + begin);
    while (n > 0) {
        uint16_t buf[CHUNK_BYTES / 2];
        const int64_t k = n < CHUNK_BYTES / 2 ? n : CHUNK_BYTES / 2;
        HT_TRY(ht_shard_pread(s->fd, s->path, buf, (size_t)k * 2, s->tokens_at + begin));
        begin += 2 * k;
        for (int64_t i = 0; i < k; i++) out[i] = buf[i];
        out += k;
        n -= k;
    }
    return HT_OK;
}

enum ht_status ht_shard_verify(const struct ht_shard *s)
{
    for (int64_t b = 0; b < s->n_blocks; b++) HT_TRY(verify_block(s, b));
    return HT_OK;
}
