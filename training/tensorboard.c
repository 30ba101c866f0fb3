/* training/tensorboard.c: the encoder; see the header for the format. */
#include "training/tensorboard.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"

enum {
    HEAD_BYTES = 12, // length and its checksum
    TAIL_BYTES = 4,
    // tag, its key and length, value and its key, Value's key and length
    VALUE_BYTES = HT_TENSORBOARD_MAX_TAG + 16,
    RECORD_BYTES = HT_TENSORBOARD_MAX_SCALARS * VALUE_BYTES + 128,
};

enum wire { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

struct ht_tensorboard {
    int fd;
    char path[PATH_MAX];
    uint32_t crc_table[256];
    unsigned char values[RECORD_BYTES]; // the Summary being built
    unsigned char record[HEAD_BYTES + RECORD_BYTES + TAIL_BYTES];
};

static void crc_fill(uint32_t table[256])
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1; // reflected 0x1edc6f41
        table[i] = c;
    }
}

static uint32_t crc_with(const uint32_t table[256], const void *data, size_t n)
{
    const unsigned char *p = data;
    uint32_t c = 0xffffffffu;

    for (size_t i = 0; i < n; i++) c = c >> 8 ^ table[(c ^ p[i]) & 0xff];
    return ~c;
}

static uint32_t masked(uint32_t c)
{
    return (c >> 15 | c << 17) + 0xa282ead8u;
}

uint32_t ht_crc32c(const void *data, size_t n)
{
    uint32_t table[256];

    crc_fill(table);
    return crc_with(table, data, n);
}

uint32_t ht_crc32c_masked(const void *data, size_t n)
{
    return masked(ht_crc32c(data, n));
}

/* ---- protobuf, into a buffer that the bounds above make large enough ---- */

static unsigned char *put_le(unsigned char *p, uint64_t v, int n_bytes)
{
    for (int i = 0; i < n_bytes; i++) *p++ = (unsigned char)(v >> (8 * i));
    return p;
}

static unsigned char *put_varint(unsigned char *p, uint64_t v)
{
    while (v >= 0x80) {
        *p++ = (unsigned char)(v | 0x80);
        v >>= 7;
    }
    *p++ = (unsigned char)v;
    return p;
}

static unsigned char *put_key(unsigned char *p, unsigned field, enum wire wire)
{
    return put_varint(p, field << 3 | (unsigned)wire);
}

static unsigned char *put_bytes(unsigned char *p, unsigned field, const void *data, size_t n)
{
    p = put_key(p, field, WIRE_BYTES);
    p = put_varint(p, n);
    memcpy(p, data, n);
    return p + n;
}

static unsigned char *put_value(unsigned char *p, const char *tag, double value)
{
    const size_t n_tag = strlen(tag), n = n_tag + (n_tag < 128 ? 7 : 8);
    const float f = (float)value;
    uint32_t bits;

    memcpy(&bits, &f, sizeof bits);
    p = put_key(p, 1, WIRE_BYTES); // Summary.value
    p = put_varint(p, n);
    p = put_bytes(p, 1, tag, n_tag);
    p = put_key(p, 2, WIRE_32);
    return put_le(p, bits, 4);
}

/* ---- the file ---- */

/* Frame and write one Event with the given field. */
static enum ht_status write_event(struct ht_tensorboard *t, double wall_time_s, int64_t step,
                                  unsigned field, const void *data, size_t n_data)
{
    unsigned char *const event = t->record + HEAD_BYTES, *p = event;
    uint64_t bits;

    memcpy(&bits, &wall_time_s, sizeof bits);
    p = put_key(p, 1, WIRE_64);
    p = put_le(p, bits, 8);
    p = put_key(p, 2, WIRE_VARINT);
    p = put_varint(p, (uint64_t)step);
    p = put_bytes(p, field, data, n_data);
    const size_t n = (size_t)(p - event);
    put_le(t->record, n, 8);
    put_le(t->record + 8, masked(crc_with(t->crc_table, t->record, 8)), 4);
    p = put_le(p, masked(crc_with(t->crc_table, event, n)), 4);

    const size_t all = (size_t)(p - t->record);
    for (size_t at = 0; at < all;) {
        const ssize_t w = write(t->fd, t->record + at, all - at);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) return HT_FAIL(HT_ERR_IO, "%s: write: %s", t->path, strerror(errno));
        at += (size_t)w;
    }
    return HT_OK;
}

enum ht_status ht_tensorboard_open(struct ht_tensorboard **out, const char *dir,
                                   int64_t resume_step)
{
    static const unsigned char session_start[] = { 1 << 3 | WIRE_VARINT, 1 };
    static const char version[] = "brain.Event:2";
    char host[65] = "";
    enum ht_status st = HT_OK;
    struct ht_tensorboard *t = calloc(1, sizeof *t);
    const double now = ht_time_wall_s();

    *out = NULL;
    if (!t) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for an event file", dir);
    t->fd = -1;
    crc_fill(t->crc_table);
    if (gethostname(host, sizeof host - 1) != 0 || !host[0]) strcpy(host, "host");
    // A resume within the same second and process would meet its own file: try the next name.
    for (int i = 0; t->fd < 0; i++) {
        const int n = snprintf(t->path, sizeof t->path, "%s/events.out.tfevents.%010lld.%s.%ld.%d",
                               dir, (long long)now, host, (long)getpid(), i);
        if (n >= (int)sizeof t->path) {
            st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", dir);
            goto done;
        }
        t->fd = open(t->path, O_WRONLY | O_CREAT | O_EXCL | O_APPEND | O_CLOEXEC, 0666);
        if (t->fd < 0 && (errno != EEXIST || i > 1000)) {
            st = HT_FAIL(HT_ERR_IO, "%s: %s", t->path, strerror(errno));
            goto done;
        }
    }
    HT_TRY_GOTO(st, done, write_event(t, now, 0, 3, version, sizeof version - 1));
    if (resume_step > 0) // TensorBoard forgets all steps from this one on
        HT_TRY_GOTO(st, done,
                    write_event(t, now, resume_step + 1, 7, session_start, sizeof session_start));
    *out = t;
    t = NULL;
done:
    ht_tensorboard_close(t);
    return st;
}

enum ht_status ht_tensorboard_scalars(struct ht_tensorboard *t, double wall_time_s, int64_t step,
                                      int n, const char *const *tags, const double *values)
{
    unsigned char *p = t->values;

    if (n < 0 || n > HT_TENSORBOARD_MAX_SCALARS)
        return HT_FAIL(HT_ERR_ARG, "%d scalars in one event; at most %d", n,
                       (int)HT_TENSORBOARD_MAX_SCALARS);
    for (int i = 0; i < n; i++) {
        if (strlen(tags[i]) > HT_TENSORBOARD_MAX_TAG)
            return HT_FAIL(HT_ERR_ARG, "tag '%.40s...' has %zu bytes; at most %d", tags[i],
                           strlen(tags[i]), (int)HT_TENSORBOARD_MAX_TAG);
        p = put_value(p, tags[i], values[i]);
    }
    return write_event(t, wall_time_s, step, 5, t->values, (size_t)(p - t->values));
}

const char *ht_tensorboard_path(const struct ht_tensorboard *t)
{
    return t->path;
}

void ht_tensorboard_close(struct ht_tensorboard *t)
{
    if (!t) return;
    if (t->fd >= 0) close(t->fd);
    free(t);
}
