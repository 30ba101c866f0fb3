/* checkpoints/weights_file.c: the manifest of a weights folder, and reading of verified folders. */
#include "checkpoints/weights_file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/manifest.h"
#include "checkpoints/manifest_seal.h"
#include "core/base/file.h"

#define FORMAT "hybridtrain-weights"
enum { VERSION = 1, MAX_TENSORS = 1 << 16, MAX_MANIFEST_BYTES = 64 << 20 };

/* ---- forms ---- */

const char *ht_wf_form_name(const struct ht_wf_form *f)
{
    return f->quantised ? ht_qformat_name(f->format) : ht_dtype_name(f->dtype);
}

bool ht_wf_form_parse(struct ht_wf_form *f, const char *name, int64_t group)
{
    static const struct {
        const char *name;
        struct ht_wf_form form;
    } all[] = {
        { "fp32", { .dtype = HT_DTYPE_F32 } },
        { "bf16", { .dtype = HT_DTYPE_BF16 } },
        { "int8", { .quantised = true, .format = HT_Q_INT8 } },
        { "int4", { .quantised = true, .format = HT_Q_INT4 } },
        { "int4z", { .quantised = true, .format = HT_Q_INT4Z } },
        { "fp8", { .quantised = true, .format = HT_Q_FP8 } },
    };

    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (strcmp(all[i].name, name) == 0) {
            *f = all[i].form;
            f->group = f->quantised ? (int)group : 0;
            return f->quantised ? group == 32 || group == 64 : group == 0;
        }
    return false;
}

const char *ht_wf_part_name(const struct ht_wf_tensor *t, int p)
{
    static const char *const names[] = { "codes", "scales", "zeros" };
    return t->form.quantised ? names[p] : "data";
}

/* Bytes of one row of dataset p. */
static int64_t row_bytes(const struct ht_wf_tensor *t, int p)
{
    if (!t->form.quantised) return t->k * (int64_t)ht_dtype_bytes(t->form.dtype);
    const int64_t n_groups = ht_q_groups(t->form.format, t->form.group, t->k);
    return p == 0 ? ht_q_code_bytes(t->form.format, t->k) : p == 1 ? 2 * n_groups : n_groups;
}

int64_t ht_wf_part_bytes(const struct ht_wf_tensor *t, int p)
{
    return t->n_rows * row_bytes(t, p);
}

static void set_parts(struct ht_wf_tensor *t)
{
    t->n_rows = t->shape[0];
    t->k = t->n / t->n_rows;
    t->n_parts = !t->form.quantised ? 1 : t->form.format == HT_Q_INT4Z ? 3 : 2;
}

void ht_wf_tensor_set(struct ht_wf_tensor *t, const struct ht_tensor_info *info,
                      const struct ht_wf_form *form)
{
    *t = (struct ht_wf_tensor){ .form = *form, .n_dims = info->n_dims, .n = info->n };
    snprintf(t->name, sizeof t->name, "%s", info->name);
    memcpy(t->shape, info->shape, sizeof t->shape);
    set_parts(t);
}

/* ---- the text ---- */

static json_t *hash_text(const struct ht_hash *h)
{
    char hex[HT_HASH_HEX];
    ht_hash_print(hex, h);
    return json_string(hex);
}

static json_t *tensor_json(const struct ht_wf_tensor *t)
{
    json_t *shape = json_array(), *parts = json_array();

    for (int d = 0; d < t->n_dims; d++) json_array_append_new(shape, json_integer(t->shape[d]));
    for (int p = 0; p < t->n_parts; p++)
        json_array_append_new(parts, json_pack("[I,I,o]", (json_int_t)t->parts[p].at,
                                               (json_int_t)t->parts[p].n_bytes,
                                               hash_text(&t->parts[p].hash)));
    return json_pack("[s,s,i,o,o]", t->name, ht_wf_form_name(&t->form), t->form.group, shape,
                     parts);
}

enum ht_status ht_wf_print(char **text, size_t *n_bytes, const struct ht_wf_manifest *m)
{
    json_t *files = json_array(), *tensors = json_array();
    bool failed = !files || !tensors;
    char hex[HT_HASH_HEX], *body = NULL, *sealed = NULL;

    for (int i = 0; i < m->n_files; i++)
        failed |= json_array_append_new(files, json_pack("[s,I,o]", m->files[i].name,
                                                         (json_int_t)m->files[i].n_bytes,
                                                         hash_text(&m->files[i].hash))) != 0;
    for (int i = 0; i < m->n_tensors; i++)
        failed |= json_array_append_new(tensors, tensor_json(&m->tensors[i])) != 0;
    json_t *root = json_pack(
        "{s:s,s:i,s:s,s:i,s:{s:s,s:s},s:o,s:o}", "format", FORMAT, "version", VERSION,
        "projections", ht_wf_form_name(&m->form), "group", m->form.group, "columns", "files",
        "name bytes xxh3_128", "tensors",
        "name format group shape [byte_offset bytes xxh3_128] of data, or of codes, scales, zeros",
        "files", files, "tensors", tensors);
    if (root && !failed) body = json_dumps(root, JSON_INDENT(1));
    json_decref(root);
    if (body) {
        size_t n = strlen(body);
        while (n > 0 && (body[n - 1] == '}' || body[n - 1] == '\n')) n--; // the seal closes it
        const struct ht_hash seal = ht_hash_of(body, n);
        ht_hash_print(hex, &seal);
        sealed = malloc(n + HT_MANIFEST_SEAL_BYTES + 1);
        if (sealed) {
            memcpy(sealed, body, n);
            *n_bytes =
                n + (size_t)snprintf(sealed + n, HT_MANIFEST_SEAL_BYTES + 1, HT_MANIFEST_SEAL, hex);
        }
    }
    free(body);
    *text = sealed;
    return sealed ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for the manifest of the weights");
}

static bool get_int(int64_t *out, const json_t *v, int64_t min, int64_t max)
{
    if (!json_is_integer(v)) return false;
    *out = json_integer_value(v);
    return *out >= min && *out <= max;
}

static bool get_hash(struct ht_hash *out, const json_t *v)
{
    const char *s = json_string_value(v);
    return s && ht_hash_parse(out, s);
}

static bool parse_file(struct ht_wf_file *f, const json_t *v)
{
    const char *name = json_string_value(json_array_get(v, 0));

    if (json_array_size(v) != 3 || !name || !ht_ckpt_name_ok(name)) return false;
    snprintf(f->name, sizeof f->name, "%s", name);
    return get_int(&f->n_bytes, json_array_get(v, 1), 0, INT64_MAX / 2) &&
           get_hash(&f->hash, json_array_get(v, 2));
}

static bool parse_tensor(struct ht_wf_tensor *t, const json_t *v, int64_t h5_bytes)
{
    const char *name = json_string_value(json_array_get(v, 0));
    const char *form = json_string_value(json_array_get(v, 1));
    const json_t *shape = json_array_get(v, 3), *parts = json_array_get(v, 4);
    const size_t n_dims = json_array_size(shape);
    int64_t group;

    if (json_array_size(v) != 5 || !name || !name[0] || strlen(name) >= sizeof t->name || !form ||
        !get_int(&group, json_array_get(v, 2), 0, 64) || !ht_wf_form_parse(&t->form, form, group) ||
        n_dims < 1 || n_dims > 3)
        return false;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->n_dims = (int)n_dims;
    t->n = 1;
    for (size_t d = 0; d < n_dims; d++)
        if (!get_int(&t->shape[d], json_array_get(shape, d), 1, INT32_MAX) ||
            __builtin_mul_overflow(t->n, t->shape[d], &t->n) || t->n > INT64_MAX / 64)
            return false;
    set_parts(t);
    if (json_array_size(parts) != (size_t)t->n_parts) return false;
    for (int p = 0; p < t->n_parts; p++) {
        const json_t *x = json_array_get(parts, (size_t)p);
        struct ht_wf_part *part = &t->parts[p];
        if (json_array_size(x) != 3 || !get_int(&part->at, json_array_get(x, 0), 0, h5_bytes) ||
            !get_int(&part->n_bytes, json_array_get(x, 1), 0, h5_bytes - part->at) ||
            part->n_bytes != ht_wf_part_bytes(t, p) || !get_hash(&part->hash, json_array_get(x, 2)))
            return false;
    }
    return true;
}

static enum ht_status parse_root(struct ht_wf_manifest *m, const json_t *root, const char *path)
{
    const char *format = json_string_value(json_object_get(root, "format"));
    const char *form = json_string_value(json_object_get(root, "projections"));
    const json_t *files = json_object_get(root, "files"),
                 *tensors = json_object_get(root, "tensors");
    int64_t version, group, h5_bytes = -1;

    if (!format || strcmp(format, FORMAT) != 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: not the manifest of a weights folder", path);
    if (!get_int(&version, json_object_get(root, "version"), 0, INT64_MAX) || version != VERSION)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "%s: written in another version of the format; this program reads version %d", path,
            VERSION);
    if (!form || !get_int(&group, json_object_get(root, "group"), 0, 64) ||
        !ht_wf_form_parse(&m->form, form, group))
        return HT_FAIL(HT_ERR_FORMAT, "%s: projections or group is missing or unknown", path);
    if (json_array_size(files) < 1 || json_array_size(files) > HT_WF_MAX_FILES ||
        json_array_size(tensors) < 1 || json_array_size(tensors) > MAX_TENSORS)
        return HT_FAIL(HT_ERR_FORMAT, "%s: files or tensors is missing or too long", path);
    for (size_t i = 0; i < json_array_size(files); i++, m->n_files++) {
        if (!parse_file(&m->files[i], json_array_get(files, i)))
            return HT_FAIL(HT_ERR_FORMAT, "%s: entry %zu of files is not valid", path, i);
        if (strcmp(m->files[i].name, HT_WEIGHTS_H5) == 0) h5_bytes = m->files[i].n_bytes;
    }
    if (h5_bytes < 0) return HT_FAIL(HT_ERR_FORMAT, "%s: lists no %s", path, HT_WEIGHTS_H5);
    m->tensors = calloc(json_array_size(tensors), sizeof *m->tensors);
    if (!m->tensors) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tensors", path);
    for (size_t i = 0; i < json_array_size(tensors); i++, m->n_tensors++)
        if (!parse_tensor(&m->tensors[i], json_array_get(tensors, i), h5_bytes))
            return HT_FAIL(HT_ERR_FORMAT, "%s: entry %zu of tensors is not valid", path, i);
    return HT_OK;
}

enum ht_status ht_wf_parse(struct ht_wf_manifest *out, const char *text, size_t n_bytes,
                           const char *path)
{
    char tail[HT_MANIFEST_SEAL_BYTES + 1], hex[HT_HASH_HEX];
    json_error_t error;
    enum ht_status st;

    *out = (struct ht_wf_manifest){ 0 };
    if (n_bytes < HT_MANIFEST_SEAL_BYTES)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %zu bytes; truncated", path, n_bytes);
    const size_t n = n_bytes - HT_MANIFEST_SEAL_BYTES;
    const struct ht_hash h = ht_hash_of(text, n);
    ht_hash_print(hex, &h);
    snprintf(tail, sizeof tail, HT_MANIFEST_SEAL, hex);
    if (memcmp(tail, text + n, HT_MANIFEST_SEAL_BYTES) != 0)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: damaged: its content does not match the hash in its last field", path);
    errno = 0;
    json_t *root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root)
        return errno == ENOMEM
                   ? HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", path, n_bytes)
                   : HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", path, error.line, error.column,
                             error.text);
    st = parse_root(out, root, path);
    json_decref(root);
    if (st != HT_OK) ht_wf_manifest_free(out);
    return st;
}

void ht_wf_manifest_free(struct ht_wf_manifest *m)
{
    if (!m) return;
    free(m->tensors);
    *m = (struct ht_wf_manifest){ 0 };
}

/* ---- reading ---- */

struct ht_wf {
    struct ht_wf_manifest manifest;
    int fd;
    char path[PATH_MAX]; // of weights.h5
};

/* Which dataset of a damaged weights.h5 it is. */
static enum ht_status blame(struct ht_wf *f)
{
    unsigned char *block = malloc(1 << 20);
    struct ht_hasher *h = NULL;
    enum ht_status st = HT_OK;

    if (!block) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read it", f->path);
    HT_TRY_GOTO(st, done, ht_hasher_create(&h));
    for (int i = 0; i < f->manifest.n_tensors; i++)
        for (int p = 0; p < f->manifest.tensors[i].n_parts; p++) {
            const struct ht_wf_tensor *t = &f->manifest.tensors[i];
            const struct ht_wf_part *part = &t->parts[p];
            ht_hasher_reset(h);
            for (int64_t at = 0; at < part->n_bytes; at += 1 << 20) {
                const int64_t left = part->n_bytes - at;
                const size_t n = left < 1 << 20 ? (size_t)left : 1 << 20;
                HT_TRY_GOTO(st, done, ht_file_read_at(f->fd, block, n, part->at + at, f->path));
                ht_hasher_update(h, block, n);
            }
            const struct ht_hash got = ht_hasher_digest(h);
            if (!ht_hash_equal(&got, &part->hash)) {
                st = HT_FAIL(HT_ERR_FORMAT,
                             "%s: damaged: tensor %s (%s, bytes %" PRId64 " to %" PRId64
                             ") does not match its hash",
                             f->path, t->name, ht_wf_part_name(t, p), part->at,
                             part->at + part->n_bytes - 1);
                goto done;
            }
        }
    st = HT_FAIL(HT_ERR_FORMAT, "%s: damaged: its HDF5 structure does not match its hash", f->path);
done:
    ht_hasher_free(h);
    free(block);
    return st;
}

static enum ht_status check_file(struct ht_wf *f, const char *dir, const struct ht_wf_file *file)
{
    char path[PATH_MAX];
    struct ht_hash h;
    int64_t n;

    if (snprintf(path, sizeof path, "%s/%s", dir, file->name) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", dir);
    HT_TRY(ht_file_hash(&h, &n, path));
    if (n != file->n_bytes)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %" PRId64 " bytes; the manifest says %" PRId64, path, n,
                       file->n_bytes);
    if (ht_hash_equal(&h, &file->hash)) return HT_OK;
    if (strcmp(file->name, HT_WEIGHTS_H5) == 0) return blame(f);
    return HT_FAIL(HT_ERR_FORMAT, "%s: damaged: its bytes do not match their hash", path);
}

enum ht_status ht_wf_open(struct ht_wf **out, const char *dir)
{
    struct ht_wf *f = calloc(1, sizeof *f);
    enum ht_status st = HT_OK;
    char *text = NULL;
    size_t n_bytes;

    *out = NULL;
    if (!f) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", dir);
    f->fd = -1;
    if (snprintf(f->path, sizeof f->path, "%s/" HT_WEIGHTS_MANIFEST, dir) >= (int)sizeof f->path) {
        st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", dir);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_file_read_regular(&text, &n_bytes, f->path, MAX_MANIFEST_BYTES));
    HT_TRY_GOTO(st, done, ht_wf_parse(&f->manifest, text, n_bytes, f->path));
    snprintf(f->path, sizeof f->path, "%s/" HT_WEIGHTS_H5, dir);
    f->fd = open(f->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (f->fd < 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", f->path, strerror(errno));
        goto done;
    }
    for (int i = 0; i < f->manifest.n_files; i++)
        HT_TRY_GOTO(st, done, check_file(f, dir, &f->manifest.files[i]));
    *out = f;
    f = NULL;
done:
    free(text);
    ht_wf_close(f);
    return st;
}

void ht_wf_close(struct ht_wf *f)
{
    if (!f) return;
    if (f->fd >= 0) close(f->fd);
    ht_wf_manifest_free(&f->manifest);
    free(f);
}

const struct ht_wf_manifest *ht_wf_manifest(const struct ht_wf *f)
{
    return &f->manifest;
}

const struct ht_wf_tensor *ht_wf_find(const struct ht_wf *f, const char *name)
{
    for (int i = 0; i < f->manifest.n_tensors; i++)
        if (strcmp(f->manifest.tensors[i].name, name) == 0) return &f->manifest.tensors[i];
    return NULL;
}

enum ht_status ht_wf_read(struct ht_wf *f, const struct ht_wf_tensor *t, int p, int64_t row0,
                          int64_t n_rows, void *out)
{
    const int64_t row = row_bytes(t, p);
    return ht_file_read_at(f->fd, out, (size_t)(n_rows * row), t->parts[p].at + row0 * row,
                           f->path);
}
