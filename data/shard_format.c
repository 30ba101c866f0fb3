/* data/shard_format.c: the trailer that is checked before HDF5 sees the file; plain reads and
 * writes. */
#include "data/shard_format.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#define XXH_STATIC_LINKING_ONLY // the hash state is a local variable
#include <xxhash.h>

static const char magic[8] = "HTSHARD\n";

_Static_assert(sizeof(struct ht_shard_trailer) == 64, "the trailer is 64 bytes without holes");

uint64_t ht_shard_header_hash(const struct ht_shard_header *h)
{
    const uint64_t values[7] = { (uint64_t)h->format_version,
                                 (uint64_t)h->vocab_size,
                                 (uint64_t)h->n_docs,
                                 (uint64_t)h->n_tokens,
                                 (uint64_t)h->text_bytes,
                                 h->offsets_hash,
                                 h->checksums_hash };
    const uint64_t seed = XXH3_64bits(h->tokenizer_hash, strlen(h->tokenizer_hash));
    return XXH3_64bits_withSeed(values, sizeof values, seed);
}

enum ht_status ht_shard_pread(int fd, const char *path, void *out, size_t n, int64_t offset)
{
    size_t done = 0;

    while (done < n) {
        const ssize_t r = pread(fd, (char *)out + done, n - done, (off_t)offset + (off_t)done);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0)
            return HT_FAIL(HT_ERR_IO, "%s: read of %zu bytes at %lld: %s", path, n,
                           (long long)offset, strerror(errno));
        if (r == 0)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: truncated: ends at byte %lld, %zu bytes at %lld wanted", path,
                           (long long)offset + (long long)done, n, (long long)offset);
        done += (size_t)r;
    }
    return HT_OK;
}

enum ht_status ht_shard_pwrite(int fd, const char *path, const void *data, size_t n, int64_t offset)
{
    size_t done = 0;

    while (done < n) {
        const ssize_t r =
            pwrite(fd, (const char *)data + done, n - done, (off_t)offset + (off_t)done);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) {
            const bool full = errno == ENOSPC || errno == EDQUOT || errno == EFBIG;
            return HT_FAIL(full ? HT_ERR_MEMORY : HT_ERR_IO, "%s: write of %zu bytes at %lld: %s%s",
                           path, n, (long long)offset, strerror(errno),
                           full ? "; a shard needs twice its size while it is finished" : "");
        }
        done += (size_t)r;
    }
    return HT_OK;
}

/* XXH3-128 of bytes [0, tokens_at) and [tokens_at + tokens_bytes, hdf5_bytes). */
static enum ht_status hash_outside(unsigned char out[16], int fd, const char *path,
                                   const struct ht_shard_trailer *t)
{
    enum { CHUNK = 1 << 18 };
    const int64_t from[2] = { 0, t->tokens_at + t->tokens_bytes };
    const int64_t to[2] = { t->tokens_at, t->hdf5_bytes };
    enum ht_status st = HT_OK;
    XXH3_state_t state;
    char *buf = malloc(CHUNK);

    if (!buf) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to check it", path);
    XXH3_128bits_reset(&state);
    for (int part = 0; part < 2; part++) {
        for (int64_t at = from[part]; at < to[part]; at += CHUNK) {
            const int64_t left = to[part] - at;
            const size_t n = left < CHUNK ? (size_t)left : CHUNK;
            HT_TRY_GOTO(st, done, ht_shard_pread(fd, path, buf, n, at));
            XXH3_128bits_update(&state, buf, n);
        }
    }
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state));
    memcpy(out, canonical.digest, 16);
done:
    free(buf);
    return st;
}

static uint64_t hash_trailer(const struct ht_shard_trailer *t)
{
    return XXH3_64bits(t, offsetof(struct ht_shard_trailer, trailer_hash));
}

enum ht_status ht_shard_seal(int fd, const char *path, int64_t tokens_at, int64_t tokens_bytes)
{
    struct ht_shard_trailer t = { .version = HT_SHARD_VERSION,
                                  .tokens_at = tokens_at,
                                  .tokens_bytes = tokens_bytes };
    struct stat sb;

    if (fstat(fd, &sb) != 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    memcpy(t.magic, magic, sizeof magic);
    t.hdf5_bytes = sb.st_size;
    assert(tokens_at >= 0 && tokens_bytes >= 0 && tokens_at + tokens_bytes <= t.hdf5_bytes);
    HT_TRY(hash_outside(t.outside_hash, fd, path, &t));
    t.trailer_hash = hash_trailer(&t);
    return ht_shard_pwrite(fd, path, &t, sizeof t, t.hdf5_bytes);
}

enum ht_status ht_shard_check_seal(struct ht_shard_trailer *t, int fd, const char *path)
{
    unsigned char hash[16];
    struct stat sb;

    if (fstat(fd, &sb) != 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (!S_ISREG(sb.st_mode)) return HT_FAIL(HT_ERR_FORMAT, "%s: not a regular file", path);
    if (sb.st_size < (off_t)sizeof *t)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %lld bytes is too short for a token shard", path,
                       (long long)sb.st_size);
    HT_TRY(ht_shard_pread(fd, path, t, sizeof *t, sb.st_size - (off_t)sizeof *t));
    if (memcmp(t->magic, magic, sizeof magic) != 0)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: no shard trailer in its last 64 bytes: truncated, changed by another "
                       "program, or not a token shard",
                       path);
    if (t->trailer_hash != hash_trailer(t))
        return HT_FAIL(HT_ERR_FORMAT, "%s: damaged trailer: XXH3 %016llx, %016llx was written",
                       path, (unsigned long long)hash_trailer(t),
                       (unsigned long long)t->trailer_hash);
    if (t->version != HT_SHARD_VERSION)
        return HT_FAIL(HT_ERR_FORMAT, "%s: shard format version %u; this program reads %d", path,
                       t->version, HT_SHARD_VERSION);
    if (t->hdf5_bytes != sb.st_size - (off_t)sizeof *t)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %lld bytes before the trailer, %lld were written", path,
                       (long long)sb.st_size - (long long)sizeof *t, (long long)t->hdf5_bytes);
    if (t->tokens_at < 0 || t->tokens_bytes < 0 || t->tokens_at > t->hdf5_bytes ||
        t->tokens_bytes > t->hdf5_bytes - t->tokens_at)
        return HT_FAIL(HT_ERR_FORMAT, "%s: trailer puts %lld bytes of tokens at %lld in %lld bytes",
                       path, (long long)t->tokens_bytes, (long long)t->tokens_at,
                       (long long)t->hdf5_bytes);
    HT_TRY(hash_outside(hash, fd, path, t));
    if (memcmp(hash, t->outside_hash, sizeof hash) != 0)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: damaged header or offsets: the checksum of the bytes outside /tokens "
                       "differs from the written one",
                       path);
    return HT_OK;
}

void ht_h5_quiet_begin(struct ht_h5_quiet *q)
{
    H5Eget_auto2(H5E_DEFAULT, &q->function, &q->data);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

void ht_h5_quiet_end(const struct ht_h5_quiet *q)
{
    H5Eset_auto2(H5E_DEFAULT, q->function, q->data);
}

struct text {
    char s[512];
    size_t n;
};

static herr_t add_text(unsigned n, const H5E_error2_t *e, void *context)
{
    struct text *t = context;

    (void)n;
    if (e->desc && t->n < sizeof t->s) {
        const int r = snprintf(t->s + t->n, sizeof t->s - t->n, "%s%s", t->n ? ": " : "", e->desc);
        if (r > 0) t->n += (size_t)r;
    }
    return 0;
}

enum ht_status ht_h5_fail(enum ht_status code, const char *path, const char *what)
{
    struct text t = { .s = "no reason given" };

    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, add_text, &t); // the root cause comes first
    if (strstr(t.s, "No space left") || strstr(t.s, "Disk quota")) code = HT_ERR_MEMORY;
    return HT_FAIL(code, "%s: HDF5: %s: %s", path, what, t.s);
}
