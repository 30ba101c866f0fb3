/* data/shard_writer.c: documents -> spool files -> one HDF5 file with its trailer, published by
 * rename.
 *
 * HDF5 must know the size of a contiguous array when it is created, and the number of tokens is
 * known only at the end. So tokens and offsets are spooled to two files without a name (a crash
 * leaves nothing), and finish copies them to the places that HDF5 allotted. Memory: 1 MiB, 64 KiB
 * and 8 bytes per MiB of tokens.
 */
#include "data/shard.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY // the hash state is a member of a struct
#include <xxhash.h>

#include "core/base/file.h"
#include "data/shard_format.h"
#include "data/shard_image.h"

enum { N_BUFFERED_OFFSETS = 8192 };

struct ht_shard_writer {
    char *path, *tmp;
    int tokens_fd, offsets_fd; // spools
    int token_bytes;
    bool failed;      // an append failed: the spools are no longer whole
    bool tmp_created; // and has to be removed
    unsigned char *block;
    size_t block_used; // bytes
    uint64_t *checksums;
    int64_t n_blocks, max_blocks;
    int64_t *offsets; // buffered ones
    int64_t n_offsets, n_offsets_spooled;
    struct ht_shard_header header;
    XXH3_state_t offsets_state;
};

static enum ht_status open_spool(int *fd, const struct ht_shard_writer *w, const char *suffix)
{
    char name[PATH_MAX];

    if (snprintf(name, sizeof name, "%s.%s", w->tmp, suffix) >= (int)sizeof name)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", w->path);
    unlink(name);
    *fd = open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (*fd < 0) return HT_FAIL(HT_ERR_IO, "%s: cannot create: %s", name, strerror(errno));
    unlink(name);
    return HT_OK;
}

static enum ht_status flush_block(struct ht_shard_writer *w)
{
    if (w->block_used == 0) return HT_OK;
    if (w->n_blocks == w->max_blocks) {
        const int64_t n = w->max_blocks ? 2 * w->max_blocks : 64;
        uint64_t *p = realloc(w->checksums, (size_t)n * sizeof *p);
        if (!p)
            return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %lld checksums", w->path,
                           (long long)n);
        w->checksums = p;
        w->max_blocks = n;
    }
    HT_TRY(ht_shard_pwrite(w->tokens_fd, w->path, w->block, w->block_used,
                           w->n_blocks * HT_SHARD_BLOCK_BYTES));
    w->checksums[w->n_blocks++] = XXH3_64bits(w->block, w->block_used);
    w->block_used = 0;
    return HT_OK;
}

static enum ht_status flush_offsets(struct ht_shard_writer *w)
{
    const size_t n = (size_t)w->n_offsets * sizeof *w->offsets;

    HT_TRY(ht_shard_pwrite(w->offsets_fd, w->path, w->offsets, n,
                           w->n_offsets_spooled * (int64_t)sizeof *w->offsets));
    XXH3_64bits_update(&w->offsets_state, w->offsets, n);
    w->n_offsets_spooled += w->n_offsets;
    w->n_offsets = 0;
    return HT_OK;
}

static enum ht_status push_offset(struct ht_shard_writer *w, int64_t offset)
{
    if (w->n_offsets == N_BUFFERED_OFFSETS) HT_TRY(flush_offsets(w));
    w->offsets[w->n_offsets++] = offset;
    return HT_OK;
}

enum ht_status ht_shard_writer_create(struct ht_shard_writer **out, const char *path,
                                      int64_t vocab_size, const char *tokenizer_hash_hex)
{
    enum ht_status st = HT_OK;
    struct ht_shard_writer *w = NULL;

    *out = NULL;
    if (vocab_size < 1 || vocab_size > INT32_MAX)
        return HT_FAIL(HT_ERR_ARG, "%s: vocab_size is %lld; it must be from 1 to %d", path,
                       (long long)vocab_size, INT32_MAX);
    if (strlen(tokenizer_hash_hex) > HT_SHARD_MAX_HASH_CHARS)
        return HT_FAIL(HT_ERR_ARG, "%s: the tokenizer's hash has %zu characters; at most %d", path,
                       strlen(tokenizer_hash_hex), HT_SHARD_MAX_HASH_CHARS);
    w = calloc(1, sizeof *w);
    if (!w) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a shard writer", path);
    w->tokens_fd = w->offsets_fd = -1;
    w->token_bytes = ht_shard_token_bytes(vocab_size);
    w->header.format_version = HT_SHARD_VERSION;
    w->header.vocab_size = vocab_size;
    strcpy(w->header.tokenizer_hash, tokenizer_hash_hex);
    XXH3_64bits_reset(&w->offsets_state);
    w->path = strdup(path);
    w->block = malloc(HT_SHARD_BLOCK_BYTES);
    w->offsets = malloc(N_BUFFERED_OFFSETS * sizeof *w->offsets);
    if (!w->path || !w->block || !w->offsets ||
        asprintf(&w->tmp, "%s.tmp-%ld", path, (long)getpid()) < 0) {
        w->tmp = NULL; // asprintf leaves it undefined
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a shard writer", path);
        goto done;
    }
    HT_TRY_GOTO(st, done, open_spool(&w->tokens_fd, w, "tokens"));
    HT_TRY_GOTO(st, done, open_spool(&w->offsets_fd, w, "offsets"));
    HT_TRY_GOTO(st, done, push_offset(w, 0));
    *out = w;
    w = NULL;
done:
    ht_shard_writer_free(w);
    return st;
}

void ht_shard_writer_free(struct ht_shard_writer *w)
{
    if (!w) return;
    if (w->tmp_created) unlink(w->tmp);
    if (w->tokens_fd >= 0) close(w->tokens_fd);
    if (w->offsets_fd >= 0) close(w->offsets_fd);
    free(w->path);
    free(w->tmp);
    free(w->block);
    free(w->offsets);
    free(w->checksums);
    free(w);
}

static enum ht_status append(struct ht_shard_writer *w, const int32_t *ids, int64_t n)
{
    while (n > 0) {
        const size_t room = (HT_SHARD_BLOCK_BYTES - w->block_used) / (size_t)w->token_bytes;
        const size_t k = (uint64_t)n < room ? (size_t)n : room;
        unsigned char *to = w->block + w->block_used;
        if (w->token_bytes == 4) {
            memcpy(to, ids, 4 * k);
        } else {
            uint16_t *to16 = (uint16_t *)to;
            for (size_t i = 0; i < k; i++) to16[i] = (uint16_t)ids[i];
        }
        w->block_used += k * (size_t)w->token_bytes;
        ids += k;
        n -= (int64_t)k;
        if (w->block_used == HT_SHARD_BLOCK_BYTES) HT_TRY(flush_block(w));
    }
    return HT_OK;
}

enum ht_status ht_shard_writer_add(struct ht_shard_writer *w, const int32_t *ids, int64_t n_ids,
                                   int64_t n_text_bytes)
{
    if (w->failed)
        return HT_FAIL(HT_ERR_ARG, "%s: an earlier write failed; start the shard again", w->path);
    if (n_ids < 0 || n_text_bytes < 0)
        return HT_FAIL(HT_ERR_ARG, "%s: document of %lld tokens and %lld bytes", w->path,
                       (long long)n_ids, (long long)n_text_bytes);
    for (int64_t i = 0; i < n_ids; i++)
        if (ids[i] < 0 || ids[i] >= w->header.vocab_size)
            return HT_FAIL(HT_ERR_ARG,
                           "%s: document %lld, token %lld: id %d; the vocabulary has %lld", w->path,
                           (long long)w->header.n_docs, (long long)i, (int)ids[i],
                           (long long)w->header.vocab_size);
    w->failed = true; // until all of it is in
    HT_TRY(append(w, ids, n_ids));
    HT_TRY(push_offset(w, w->header.n_tokens + n_ids));
    w->failed = false;
    w->header.n_tokens += n_ids;
    w->header.n_docs++;
    w->header.text_bytes += n_text_bytes;
    return HT_OK;
}

static enum ht_status write_attribute(hid_t file, const char *path, const char *name, hid_t type,
                                      const void *value)
{
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t a = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    const bool good = a >= 0 && H5Awrite(a, type, value) >= 0;
    enum ht_status st = HT_OK;

    if (!good) st = ht_h5_fail(HT_ERR_IO, path, name);
    if (a >= 0) H5Aclose(a);
    if (space >= 0) H5Sclose(space);
    return st;
}

/* A contiguous array of n elements, allotted at once; *at = its place in the file. */
static enum ht_status create_array(hid_t file, const char *path, const char *name, hid_t type,
                                   int64_t n, int64_t *at)
{
    const hsize_t dims[1] = { (hsize_t)n };
    const hid_t space = H5Screate_simple(1, dims, NULL);
    const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
    enum ht_status st = HT_OK;
    hid_t set = -1;

    *at = 0;
    if (space >= 0 && H5Pset_layout(plist, H5D_CONTIGUOUS) >= 0 &&
        H5Pset_alloc_time(plist, H5D_ALLOC_TIME_EARLY) >= 0 &&
        H5Pset_fill_time(plist, H5D_FILL_TIME_NEVER) >= 0 &&
        H5Pset_obj_track_times(plist, false) >= 0) // same documents, same bytes
        set = H5Dcreate2(file, name, type, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    if (set < 0) {
        st = ht_h5_fail(HT_ERR_IO, path, name);
    } else if (n > 0) {
        const haddr_t place = H5Dget_offset(set);
        if (place == HADDR_UNDEF)
            st = ht_h5_fail(HT_ERR_IO, path, "place of an array");
        else
            *at = (int64_t)place;
    }
    if (set >= 0) H5Dclose(set);
    if (plist >= 0) H5Pclose(plist);
    if (space >= 0) H5Sclose(space);
    return st;
}

static enum ht_status write_text_bytes(hid_t file, const char *path, int64_t text_bytes)
{
    const hid_t space = H5Screate(H5S_SCALAR);
    const hid_t plist = H5Pcreate(H5P_DATASET_CREATE);
    enum ht_status st = HT_OK;
    hid_t set = -1;

    if (H5Pset_obj_track_times(plist, false) >= 0)
        set = H5Dcreate2(file, "text_bytes", H5T_STD_I64LE, space, H5P_DEFAULT, plist, H5P_DEFAULT);
    if (set < 0 || H5Dwrite(set, H5T_STD_I64LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, &text_bytes) < 0)
        st = ht_h5_fail(HT_ERR_IO, path, "text_bytes");
    if (set >= 0) H5Dclose(set);
    if (plist >= 0) H5Pclose(plist);
    if (space >= 0) H5Sclose(space);
    return st;
}

struct places {
    int64_t tokens, offsets, checksums;
};

static enum ht_status write_contents(hid_t file, const struct ht_shard_writer *w, struct places *p)
{
    const struct ht_shard_header *h = &w->header;
    const uint64_t header_hash = ht_shard_header_hash(h);
    const struct {
        const char *name;
        hid_t type;
        const void *value;
    } attributes[] = {
        { "format_version", H5T_STD_I64LE, &h->format_version },
        { "vocab_size", H5T_STD_I64LE, &h->vocab_size },
        { "n_docs", H5T_STD_I64LE, &h->n_docs },
        { "n_tokens", H5T_STD_I64LE, &h->n_tokens },
        { "doc_offsets_xxh3", H5T_STD_U64LE, &h->offsets_hash },
        { "checksums_xxh3", H5T_STD_U64LE, &h->checksums_hash },
        { "header_xxh3", H5T_STD_U64LE, &header_hash },
    };
    enum ht_status st = HT_OK;

    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        HT_TRY(write_attribute(file, w->tmp, attributes[i].name, attributes[i].type,
                               attributes[i].value));
    const hid_t text = H5Tcopy(H5T_C_S1);
    if (H5Tset_size(text, strlen(h->tokenizer_hash) + 1) < 0)
        st = ht_h5_fail(HT_ERR_IO, w->tmp, "tokenizer_hash");
    else
        st = write_attribute(file, w->tmp, "tokenizer_hash", text, h->tokenizer_hash);
    H5Tclose(text);
    HT_TRY(st);
    HT_TRY(write_text_bytes(file, w->tmp, h->text_bytes));
    HT_TRY(create_array(file, w->tmp, "doc_offsets", H5T_STD_I64LE, h->n_docs + 1, &p->offsets));
    HT_TRY(create_array(file, w->tmp, "checksums", H5T_STD_U64LE, w->n_blocks, &p->checksums));
    return create_array(file, w->tmp, "tokens", w->token_bytes == 2 ? H5T_STD_U16LE : H5T_STD_U32LE,
                        h->n_tokens, &p->tokens);
}

/* The HDF5 part in memory (shard_image.h), with holes where the arrays go. */
static enum ht_status create_hdf5(int *image, const struct ht_shard_writer *w, struct places *p)
{
    enum ht_status st = HT_OK;
    struct ht_h5_quiet quiet;
    hid_t plist = -1, creation = -1, driver = -1, file = -1;

    *image = memfd_create("hybridtrain-shard", MFD_CLOEXEC);
    if (*image < 0) return HT_FAIL(HT_ERR_IO, "%s: memfd_create: %s", w->tmp, strerror(errno));
    ht_h5_quiet_begin(&quiet);
    plist = H5Pcreate(H5P_FILE_ACCESS);
    // metadata with HDF5's own checksums, readable since 1.8; arrays on page borders
    if (plist < 0 || ht_shard_image_use(plist, *image, &driver) < 0 ||
        H5Pset_libver_bounds(plist, H5F_LIBVER_V18, H5F_LIBVER_LATEST) < 0 ||
        H5Pset_alignment(plist, 4096, 4096) < 0) {
        st = ht_h5_fail(HT_ERR_IO, w->tmp, "file access properties");
        goto done;
    }
    creation = H5Pcreate(H5P_FILE_CREATE);
    if (creation < 0 || H5Pset_obj_track_times(creation, false) < 0) { // of the root group
        st = ht_h5_fail(HT_ERR_IO, w->tmp, "file creation properties");
        goto done;
    }
    file = H5Fcreate(w->tmp, H5F_ACC_TRUNC, creation, plist);
    if (file < 0) {
        st = ht_h5_fail(HT_ERR_IO, w->tmp, "create");
        goto done;
    }
    HT_TRY_GOTO(st, done, write_contents(file, w, p));
done:
    if (file >= 0 && H5Fclose(file) < 0 && st == HT_OK) st = ht_h5_fail(HT_ERR_IO, w->tmp, "close");
    if (plist >= 0) H5Pclose(plist);
    if (creation >= 0) H5Pclose(creation);
    if (driver >= 0) H5FDunregister(driver);
    ht_h5_quiet_end(&quiet);
    return st;
}

/* What HDF5 wrote, without the holes; fd gets the image's size. */
static enum ht_status copy_image(int fd, int image, const struct ht_shard_writer *w)
{
    struct stat sb;

    if (fstat(image, &sb) != 0 || ftruncate(fd, sb.st_size) != 0)
        return HT_FAIL(HT_ERR_IO, "%s: %s", w->tmp, strerror(errno));
    for (off_t at = 0; (at = lseek(image, at, SEEK_DATA)) >= 0;) {
        const off_t hole = lseek(image, at, SEEK_HOLE);
        const off_t n = hole - at < HT_SHARD_BLOCK_BYTES ? hole - at : HT_SHARD_BLOCK_BYTES;
        HT_TRY(ht_shard_pread(image, w->tmp, w->block, (size_t)n, at));
        HT_TRY(ht_shard_pwrite(fd, w->tmp, w->block, (size_t)n, at));
        at += n;
    }
    if (errno != ENXIO) // no data behind `at`
        return HT_FAIL(HT_ERR_IO, "%s: lseek: %s", w->tmp, strerror(errno));
    return HT_OK;
}

/* Move n bytes of a spool to `at` of fd, giving the spool's space back on the way where the file
 * system can. `buf` is one block. */
static enum ht_status unspool(int fd, int64_t at, int spool, int64_t n,
                              const struct ht_shard_writer *w)
{
    for (int64_t done = 0; done < n; done += HT_SHARD_BLOCK_BYTES) {
        const int64_t left = n - done;
        const size_t k = left < HT_SHARD_BLOCK_BYTES ? (size_t)left : HT_SHARD_BLOCK_BYTES;
        HT_TRY(ht_shard_pread(spool, w->tmp, w->block, k, done));
        HT_TRY(ht_shard_pwrite(fd, w->tmp, w->block, k, at + done));
        (void)!fallocate(spool, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, done, (off_t)k);
    }
    return HT_OK;
}

static enum ht_status sync_folder_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    char folder[PATH_MAX];

    if (!slash) return ht_file_sync(".");
    if (slash == path) return ht_file_sync("/");
    snprintf(folder, sizeof folder, "%.*s", (int)(slash - path), path);
    return ht_file_sync(folder);
}

/* The HDF5 part and the arrays at their places, then the trailer. */
static enum ht_status fill(int fd, struct ht_shard_writer *w)
{
    const int64_t tokens_bytes = w->header.n_tokens * w->token_bytes;
    const int64_t offsets_bytes = 8 * (w->header.n_docs + 1), margin = 1 << 20;
    enum ht_status st = HT_OK;
    struct places p;
    int image = -1;

    // a limit on file sizes must show here and not inside HDF5; copy_image sets the true size
    if (ftruncate(fd, tokens_bytes + offsets_bytes + 8 * w->n_blocks + margin) != 0)
        return HT_FAIL(HT_ERR_MEMORY, "%s: %lld bytes: %s", w->tmp,
                       (long long)(tokens_bytes + offsets_bytes), strerror(errno));
    HT_TRY_GOTO(st, done, create_hdf5(&image, w, &p));
    HT_TRY_GOTO(st, done, copy_image(fd, image, w));
    HT_TRY_GOTO(st, done, unspool(fd, p.offsets, w->offsets_fd, offsets_bytes, w));
    HT_TRY_GOTO(st, done,
                ht_shard_pwrite(fd, w->tmp, w->checksums, 8 * (size_t)w->n_blocks, p.checksums));
    HT_TRY_GOTO(st, done, unspool(fd, p.tokens, w->tokens_fd, tokens_bytes, w));
    st = ht_shard_seal(fd, w->tmp, p.tokens, tokens_bytes);
done:
    if (image >= 0) close(image);
    return st;
}

static enum ht_status publish(struct ht_shard_writer *w)
{
    enum ht_status st = HT_OK;
    int fd = -1;

    unlink(w->tmp); // of a process that had our number
    fd = open(w->tmp, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: cannot create: %s", w->tmp, strerror(errno));
    w->tmp_created = true;
    HT_TRY_GOTO(st, done, fill(fd, w));
    if (fsync(fd) != 0) {
        st = HT_FAIL(errno == ENOSPC || errno == EDQUOT ? HT_ERR_MEMORY : HT_ERR_IO,
                     "%s: fsync: %s", w->tmp, strerror(errno));
        goto done;
    }
    if (rename(w->tmp, w->path) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: cannot rename to %s: %s", w->tmp, w->path, strerror(errno));
        goto done;
    }
    w->tmp_created = false;
    st = sync_folder_of(w->path);
done:
    if (close(fd) != 0 && st == HT_OK)
        st = HT_FAIL(HT_ERR_IO, "%s: close: %s", w->path, strerror(errno));
    return st;
}

enum ht_status ht_shard_writer_finish(struct ht_shard_writer *w, int64_t *n_docs, int64_t *n_tokens)
{
    if (w->failed)
        return HT_FAIL(HT_ERR_ARG, "%s: an earlier write failed; start the shard again", w->path);
    w->failed = true; // one try: the spools are consumed
    HT_TRY(flush_block(w));
    HT_TRY(flush_offsets(w));
    w->header.offsets_hash = XXH3_64bits_digest(&w->offsets_state);
    w->header.checksums_hash = XXH3_64bits(w->checksums, 8 * (size_t)w->n_blocks);
    HT_TRY(publish(w));
    if (n_docs) *n_docs = w->header.n_docs;
    if (n_tokens) *n_tokens = w->header.n_tokens;
    return HT_OK;
}
