/* data/text_stream.c: plain, gzip (zlib) and zstd behind one peek/skip. */
#include "data/text_stream.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

enum { IN_BYTES = 1 << 17, OUT_BYTES = 1 << 18 };
enum kind { PLAIN, GZIP, ZSTD };

/* A bomb: more than 2000 times its size, once that is much. gzip ends at 1032; text of one repeated
 * line reaches some thousands in zstd, but no corpus is that. */
#define MAX_RATIO ((uint64_t)2000)
#define ALWAYS_BYTES ((uint64_t)256 << 20)

struct ht_text_stream {
    enum kind kind;
    int fd;
    char *path;
    uint64_t read_bytes, made_bytes; // of the file, decompressed
    unsigned char in[IN_BYTES];
    size_t in_at, in_n;
    unsigned char out[OUT_BYTES]; // decompressed; unused when plain
    size_t out_at, out_n;
    z_stream gz;
    ZSTD_DStream *zstd;
    int frame_open; // inside a compressed member or frame
};

static enum ht_status fill(struct ht_text_stream *s)
{
    ssize_t n;

    if (s->in_at < s->in_n) return HT_OK;
    do n = read(s->fd, s->in, sizeof s->in);
    while (n < 0 && errno == EINTR);
    if (n < 0) return HT_FAIL(HT_ERR_IO, "%s: read: %s", s->path, strerror(errno));
    s->in_at = 0;
    s->in_n = (size_t)n;
    s->read_bytes += (uint64_t)n;
    return HT_OK;
}

enum ht_status ht_text_stream_open(struct ht_text_stream **out, const char *path)
{
    static const unsigned char zstd_magic[4] = { 0x28, 0xb5, 0x2f, 0xfd };
    enum ht_status st = HT_OK;
    struct ht_text_stream *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read it", path);
    s->fd = -1;
    s->path = strdup(path);
    if (!s->path) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read it", path);
        goto done;
    }
    s->fd = open(path, O_RDONLY | O_CLOEXEC);
    if (s->fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
        goto done;
    }
    HT_TRY_GOTO(st, done, fill(s));
    if (s->in_n >= 4 && memcmp(s->in, zstd_magic, 4) == 0) {
        s->kind = ZSTD;
        s->zstd = ZSTD_createDStream();
        if (!s->zstd) {
            st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for zstd", path);
            goto done;
        }
    } else if (s->in_n >= 2 && s->in[0] == 0x1f && s->in[1] == 0x8b) {
        if (inflateInit2(&s->gz, 15 + 16) != Z_OK) {
            st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for gzip", path);
            goto done;
        }
        s->kind = GZIP;
    }
    *out = s;
    s = NULL;
done:
    ht_text_stream_close(s);
    return st;
}

void ht_text_stream_close(struct ht_text_stream *s)
{
    if (!s) return;
    if (s->kind == GZIP) inflateEnd(&s->gz);
    ZSTD_freeDStream(s->zstd);
    if (s->fd >= 0) close(s->fd);
    free(s->path);
    free(s);
}

static enum ht_status damaged(const struct ht_text_stream *s, const char *what)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s: near byte %llu: %s", s->path,
                   (unsigned long long)(s->read_bytes - s->in_n + s->in_at), what);
}

static enum ht_status inflate_some(struct ht_text_stream *s)
{
    if (!s->frame_open && inflateReset(&s->gz) != Z_OK) return damaged(s, "gzip: cannot start");
    s->frame_open = 1;
    s->gz.next_in = s->in + s->in_at;
    s->gz.avail_in = (uInt)(s->in_n - s->in_at);
    s->gz.next_out = s->out;
    s->gz.avail_out = OUT_BYTES;
    const int r = inflate(&s->gz, Z_NO_FLUSH);
    s->in_at = s->in_n - s->gz.avail_in;
    s->out_n = OUT_BYTES - s->gz.avail_out;
    if (r == Z_STREAM_END) s->frame_open = 0; // another member may follow
    if (r != Z_OK && r != Z_STREAM_END && r != Z_BUF_ERROR)
        return damaged(s, s->gz.msg ? s->gz.msg : "gzip: damaged");
    return HT_OK;
}

static enum ht_status unzstd_some(struct ht_text_stream *s)
{
    ZSTD_inBuffer in = { s->in, s->in_n, s->in_at };
    ZSTD_outBuffer out = { s->out, OUT_BYTES, 0 };
    const size_t r = ZSTD_decompressStream(s->zstd, &out, &in);

    s->in_at = in.pos;
    s->out_n = out.pos;
    if (ZSTD_isError(r)) return damaged(s, ZSTD_getErrorName(r));
    s->frame_open = r != 0;
    return HT_OK;
}

enum ht_status ht_text_stream_peek(struct ht_text_stream *s, const char **data, size_t *n)
{
    if (s->kind == PLAIN) {
        HT_TRY(fill(s));
        *data = (const char *)s->in + s->in_at;
        *n = s->in_n - s->in_at;
        return HT_OK;
    }
    while (s->out_at == s->out_n) {
        s->out_at = s->out_n = 0;
        HT_TRY(fill(s));
        // at the end of the file the decoder may still hold output
        if (s->in_n > 0 || s->frame_open)
            HT_TRY(s->kind == GZIP ? inflate_some(s) : unzstd_some(s));
        s->made_bytes += s->out_n;
        if (s->made_bytes > ALWAYS_BYTES && s->made_bytes / MAX_RATIO > s->read_bytes)
            return damaged(s, "the data grows more than 2000 times when decompressed");
        if (s->in_n == 0 && s->out_n == 0) {
            *n = 0;
            *data = "";
            return s->frame_open ? damaged(s, "the compressed data ends in the middle") : HT_OK;
        }
    }
    *data = (const char *)s->out + s->out_at;
    *n = s->out_n - s->out_at;
    return HT_OK;
}

void ht_text_stream_skip(struct ht_text_stream *s, size_t n)
{
    if (s->kind == PLAIN)
        s->in_at += n;
    else
        s->out_at += n;
}

uint64_t ht_text_stream_read_bytes(const struct ht_text_stream *s)
{
    return s->read_bytes;
}
