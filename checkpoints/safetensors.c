/* checkpoints/safetensors.c: reader of the safetensors format; every number in the file is
 * distrusted. */
#include "checkpoints/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_HEADER_BYTES = 100000000, MAX_NAME_BYTES = 512, MAX_DIMS = 8 };

struct ht_safetensors {
    char *path;
    unsigned char *map;
    size_t map_bytes;
    const unsigned char *data; // after the header
    int64_t data_bytes;
    json_t *header; // owns the names
    int n;
    struct ht_safetensors_tensor *tensors; // by place in the file
};

struct dtype {
    const char *name;
    int bytes;
    int dtype; // enum ht_dtype, or -1: valid in the format, not used by our models
};

static const struct dtype dtypes[] = {
    { "F32", 4, HT_DTYPE_F32 }, { "BF16", 2, HT_DTYPE_BF16 },
    { "F16", 2, HT_DTYPE_F16 }, { "F64", 8, -1 },
    { "I64", 8, -1 },           { "I32", 4, -1 },
    { "I16", 2, -1 },           { "I8", 1, -1 },
    { "U64", 8, -1 },           { "U32", 4, -1 },
    { "U16", 2, -1 },           { "U8", 1, -1 },
    { "BOOL", 1, -1 },          { "F8_E4M3", 1, -1 },
    { "F8_E5M2", 1, -1 },
};

static enum ht_status bad(const struct ht_safetensors *s, const char *name, const char *what)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s: tensor '%.200s': %s", s->path, name, what);
}

/* An integer of [0, max]; JSON reals and negative numbers are refused. */
static bool get_size(int64_t *out, const json_t *v, int64_t max)
{
    if (!json_is_integer(v)) return false;
    *out = json_integer_value(v);
    return *out >= 0 && *out <= max;
}

static enum ht_status parse_shape(const struct ht_safetensors *s, struct ht_safetensors_tensor *t,
                                  const json_t *shape)
{
    if (!json_is_array(shape)) return bad(s, t->name, "'shape' is not a list");
    if (json_array_size(shape) > MAX_DIMS) return bad(s, t->name, "more than 8 dimensions");
    t->n_dims = (int)json_array_size(shape);
    t->n = 1;
    for (int d = 0; d < t->n_dims; d++) {
        if (!get_size(&t->shape[d], json_array_get(shape, (size_t)d), INT64_MAX))
            return bad(s, t->name, "'shape' holds something else than sizes");
        if (__builtin_mul_overflow(t->n, t->shape[d], &t->n))
            return bad(s, t->name, "the product of its shape passes 2^63");
    }
    return HT_OK;
}

static enum ht_status parse_tensor(struct ht_safetensors *s, struct ht_safetensors_tensor *t,
                                   const char *name, const json_t *v)
{
    const json_t *offsets = json_object_get(v, "data_offsets");
    const char *dtype_name = json_string_value(json_object_get(v, "dtype"));
    const struct dtype *type = NULL;
    int64_t begin, end, n_bytes;

    t->name = name;
    if (strlen(name) > MAX_NAME_BYTES) return bad(s, name, "its name passes 512 bytes");
    if (!json_is_object(v)) return bad(s, name, "its entry is not an object");
    if (json_object_size(v) != 3)
        return bad(s, name, "its entry must have dtype, shape and data_offsets, and nothing else");
    for (size_t i = 0; dtype_name && i < sizeof dtypes / sizeof *dtypes; i++)
        if (strcmp(dtypes[i].name, dtype_name) == 0) type = &dtypes[i];
    if (!type) return bad(s, name, "its dtype is missing or unknown");
    HT_TRY(parse_shape(s, t, json_object_get(v, "shape")));
    if (json_array_size(offsets) != 2 ||
        !get_size(&begin, json_array_get(offsets, 0), s->data_bytes) ||
        !get_size(&end, json_array_get(offsets, 1), s->data_bytes) || begin > end)
        return bad(s, name, "its data_offsets do not lie in the file");
    if (__builtin_mul_overflow(t->n, (int64_t)type->bytes, &n_bytes) || n_bytes != end - begin)
        return bad(s, name, "shape times dtype is not the length of its data");
    if (type->dtype < 0)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: tensor '%.200s' is %s; F32, F16 and BF16 are read",
                       s->path, name, type->name);
    t->dtype = (enum ht_dtype)type->dtype;
    t->data = s->data + begin;
    return HT_OK;
}

static int by_place(const void *pa, const void *pb)
{
    const struct ht_safetensors_tensor *a = pa, *b = pb;
    const uintptr_t x = (uintptr_t)a->data, y = (uintptr_t)b->data;

    if (x != y) return x < y ? -1 : 1;
    return a->n < b->n ? -1 : a->n > b->n; // empty ones first
}

/* In order of place the tensors must meet end to end, from the first byte to the last. */
static enum ht_status check_cover(const struct ht_safetensors *s)
{
    const unsigned char *at = s->data;

    for (int i = 0; i < s->n; i++) {
        const struct ht_safetensors_tensor *t = &s->tensors[i];
        if (t->data != at)
            return bad(s, t->name,
                       (const unsigned char *)t->data > at ? "a hole lies before its data"
                                                           : "its data overlap another tensor's");
        at += (size_t)t->n * ht_dtype_bytes(t->dtype);
    }
    if (at != s->data + s->data_bytes)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: %" PRId64 " bytes of data; the header accounts for %" PRId64, s->path,
                       s->data_bytes, (int64_t)(at - s->data));
    return HT_OK;
}

static enum ht_status check_metadata(const struct ht_safetensors *s, const json_t *v)
{
    const char *key;
    const json_t *text;

    if (!json_is_object(v))
        return HT_FAIL(HT_ERR_FORMAT, "%s: __metadata__ is not an object", s->path);
    json_object_foreach((json_t *)v, key, text) if (!json_is_string(text)) return HT_FAIL(
        HT_ERR_FORMAT, "%s: __metadata__ '%.100s' is not a string", s->path, key);
    return HT_OK;
}

static enum ht_status parse_header(struct ht_safetensors *s, const char *text, size_t n_bytes)
{
    json_error_t error;
    const char *name;
    json_t *v;

    if (text[0] != '{')
        return HT_FAIL(HT_ERR_FORMAT, "%s: the header does not start with '{'", s->path);
    while (n_bytes > 0 && text[n_bytes - 1] == ' ') n_bytes--; // the format pads with spaces
    errno = 0;
    s->header = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &error);
    if (errno == ENOMEM) // Jansson may have taken it for something else
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a header of %zu bytes", s->path, n_bytes);
    if (!s->header)
        return HT_FAIL(HT_ERR_FORMAT, "%s: header line %d, column %d: %s", s->path, error.line,
                       error.column, error.text);
    s->tensors = calloc(json_object_size(s->header) + 1, sizeof *s->tensors);
    if (!s->tensors)
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu tensors", s->path,
                       json_object_size(s->header));
    json_object_foreach(s->header, name, v)
    {
        if (strcmp(name, "__metadata__") == 0) {
            HT_TRY(check_metadata(s, v));
            continue;
        }
        HT_TRY(parse_tensor(s, &s->tensors[s->n], name, v));
        s->n++;
    }
    if (s->n > 1) qsort(s->tensors, (size_t)s->n, sizeof *s->tensors, by_place);
    return check_cover(s);
}

static enum ht_status map_file(struct ht_safetensors *s, const char *path)
{
    enum ht_status st = HT_OK;
    struct stat sb;

    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a FIFO must not hold us up
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &sb) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    } else if (!S_ISREG(sb.st_mode)) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: not a regular file", path);
    } else if (sb.st_size < 10) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: %lld bytes; too short for a safetensors file", path,
                     (long long)sb.st_size);
    } else {
        void *map = mmap(NULL, (size_t)sb.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (map == MAP_FAILED) {
            st = HT_FAIL(errno == ENOMEM ? HT_ERR_MEMORY : HT_ERR_IO, "%s: mmap: %s", path,
                         strerror(errno));
        } else {
            s->map = map;
            s->map_bytes = (size_t)sb.st_size;
        }
    }
    close(fd);
    return st;
}

static enum ht_status open_file(struct ht_safetensors *s, const char *path)
{
    uint64_t n_header = 0;

    s->path = strdup(path);
    if (!s->path) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", path);
    HT_TRY(map_file(s, path));
    for (int i = 0; i < 8; i++) n_header |= (uint64_t)s->map[i] << (8 * i);
    if (n_header > MAX_HEADER_BYTES || n_header > s->map_bytes - 8 || n_header < 2)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: a header of %" PRIu64
                       " bytes; it must have 2 to %d and fit the file of "
                       "%zu bytes",
                       path, n_header, MAX_HEADER_BYTES, s->map_bytes);
    s->data = s->map + 8 + n_header;
    s->data_bytes = (int64_t)(s->map_bytes - 8 - n_header);
    return parse_header(s, (const char *)s->map + 8, (size_t)n_header);
}

enum ht_status ht_safetensors_open(struct ht_safetensors **out, const char *path)
{
    struct ht_safetensors *s = calloc(1, sizeof *s);

    *out = NULL;
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", path);
    const enum ht_status st = open_file(s, path);
    if (st == HT_OK)
        *out = s;
    else
        ht_safetensors_close(s);
    return st;
}

void ht_safetensors_close(struct ht_safetensors *s)
{
    if (!s) return;
    json_decref(s->header);
    free(s->tensors);
    if (s->map) munmap(s->map, s->map_bytes);
    free(s->path);
    free(s);
}

int ht_safetensors_count(const struct ht_safetensors *s)
{
    return s->n;
}

const struct ht_safetensors_tensor *ht_safetensors_at(const struct ht_safetensors *s, int i)
{
    return &s->tensors[i];
}

const struct ht_safetensors_tensor *ht_safetensors_find(const struct ht_safetensors *s,
                                                        const char *name)
{
    for (int i = 0; i < s->n; i++)
        if (strcmp(s->tensors[i].name, name) == 0) return &s->tensors[i];
    return NULL;
}

void ht_safetensors_drop(const void *data, size_t n_bytes)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)data;
    const uintptr_t from = (at + page - 1) / page * page, to = (at + n_bytes) / page * page;

    if (from < to) (void)madvise((void *)from, to - from, MADV_DONTNEED);
}
