/* checkpoints/hash.c: XXH3-128 by libxxhash. */
#include "checkpoints/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include "core/base/file.h"

enum { BLOCK_BYTES = 1 << 20 };

struct ht_hasher {
    XXH3_state_t *state;
};

static struct ht_hash from_xxh(XXH128_hash_t x)
{
    XXH128_canonical_t c;
    struct ht_hash h;

    XXH128_canonicalFromHash(&c, x);
    memcpy(h.b, c.digest, sizeof h.b);
    return h;
}

struct ht_hash ht_hash_of(const void *data, size_t n_bytes)
{
    return from_xxh(XXH3_128bits(data, n_bytes));
}

bool ht_hash_equal(const struct ht_hash *a, const struct ht_hash *b)
{
    return memcmp(a->b, b->b, sizeof a->b) == 0;
}

void ht_hash_print(char hex[HT_HASH_HEX], const struct ht_hash *h)
{
    static const char digits[] = "0123456789abcdef";

    for (int i = 0; i < 16; i++) {
        hex[2 * i] = digits[h->b[i] >> 4];
        hex[2 * i + 1] = digits[h->b[i] & 15];
    }
    hex[32] = '\0';
}

bool ht_hash_parse(struct ht_hash *h, const char *hex)
{
    if (strlen(hex) != 32 || strspn(hex, "0123456789abcdef") != 32) return false;
    for (int i = 0; i < 16; i++) {
        const char hi = hex[2 * i], lo = hex[2 * i + 1];
        const int a = hi <= '9' ? hi - '0' : hi - 'a' + 10,
                  b = lo <= '9' ? lo - '0' : lo - 'a' + 10;
        h->b[i] = (unsigned char)(a << 4 | b);
    }
    return true;
}

enum ht_status ht_hasher_create(struct ht_hasher **out)
{
    struct ht_hasher *h = malloc(sizeof *h);

    *out = NULL;
    if (h) h->state = XXH3_createState();
    if (!h || !h->state) {
        free(h);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a hash");
    }
    ht_hasher_reset(h);
    *out = h;
    return HT_OK;
}

void ht_hasher_free(struct ht_hasher *h)
{
    if (!h) return;
    XXH3_freeState(h->state);
    free(h);
}

void ht_hasher_reset(struct ht_hasher *h)
{
    XXH3_128bits_reset(h->state);
}

void ht_hasher_update(struct ht_hasher *h, const void *data, size_t n_bytes)
{
    XXH3_128bits_update(h->state, data, n_bytes);
}

struct ht_hash ht_hasher_digest(const struct ht_hasher *h)
{
    return from_xxh(XXH3_128bits_digest(h->state));
}

enum ht_status ht_file_read_at(int fd, void *out, size_t n_bytes, int64_t at, const char *path)
{
    size_t n = 0;

    while (n < n_bytes) {
        const ssize_t r = pread(fd, (char *)out + n, n_bytes - n, at + (int64_t)n);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0)
            return HT_FAIL(HT_ERR_IO, "%s: read at byte %lld: %s", path,
                           (long long)at + (long long)n, strerror(errno));
        if (r == 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s: ends at byte %lld, within what should be read", path,
                           (long long)at + (long long)n);
        n += (size_t)r;
    }
    return HT_OK;
}

enum ht_status ht_file_read_regular(char **out, size_t *n_bytes, const char *path, size_t max_bytes)
{
    struct stat sb;

    *out = NULL;
    if (stat(path, &sb) == 0 && !S_ISREG(sb.st_mode))
        return HT_FAIL(HT_ERR_FORMAT, "%s: not a regular file", path);
    return ht_file_read(out, n_bytes, path, max_bytes);
}

enum ht_status ht_file_hash(struct ht_hash *out, int64_t *n_bytes, const char *path)
{
    enum ht_status st = HT_OK;
    struct ht_hasher *h = NULL;
    char *block = NULL;
    struct stat sb;

    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a FIFO must not hold us up
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &sb) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(sb.st_mode)) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: not a regular file", path);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_hasher_create(&h));
    block = malloc(BLOCK_BYTES);
    if (!block) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read it", path);
        goto done;
    }
    for (int64_t at = 0; at < sb.st_size;) {
        const int64_t left = sb.st_size - at;
        const size_t n = left < BLOCK_BYTES ? (size_t)left : BLOCK_BYTES;
        HT_TRY_GOTO(st, done, ht_file_read_at(fd, block, n, at, path));
        ht_hasher_update(h, block, n);
        at += (int64_t)n;
    }
    *out = ht_hasher_digest(h);
    *n_bytes = sb.st_size;
done:
    free(block);
    ht_hasher_free(h);
    close(fd);
    return st;
}
