/* checkpoints/manifest_parse.c: a manifest from untrusted text. */
#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/manifest.h"
#include "checkpoints/manifest_seal.h"
#include "checkpoints/hash.h"
#include "core/base/file.h"

enum { MAX_WORLD = 65536, MAX_TENSORS = 1 << 20 };

static enum ht_status check_seal(const char *text, size_t n_bytes, const char *path)
{
    char tail[HT_MANIFEST_SEAL_BYTES + 1], hex[HT_HASH_HEX];

    if (n_bytes < HT_MANIFEST_SEAL_BYTES)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %zu bytes; truncated", path, n_bytes);
    const size_t n = n_bytes - HT_MANIFEST_SEAL_BYTES;
    const struct ht_hash h = ht_hash_of(text, n);
    ht_hash_print(hex, &h);
    snprintf(tail, sizeof tail, HT_MANIFEST_SEAL, hex);
    if (memcmp(tail, text + n, HT_MANIFEST_SEAL_BYTES) != 0)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: damaged: its content does not match the hash in its last field", path);
    return HT_OK;
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

static bool parse_file(struct ht_mf_file *f, const json_t *v)
{
    const char *name = json_string_value(json_array_get(v, 0));

    if (json_array_size(v) != 3 || !name || !ht_ckpt_name_ok(name)) return false;
    snprintf(f->name, sizeof f->name, "%s", name);
    return get_int(&f->n_bytes, json_array_get(v, 1), 0, INT64_MAX / 2) &&
           get_hash(&f->hash, json_array_get(v, 2));
}

static bool parse_tensor(struct ht_mf_tensor *t, const json_t *v)
{
    const char *name = json_string_value(json_array_get(v, 0));
    const json_t *shape = json_array_get(v, 1);
    const size_t n_dims = json_array_size(shape);

    if (json_array_size(v) != 2 || !name || strlen(name) >= sizeof t->name ||
        !ht_ckpt_tensor_name_ok(name) || n_dims < 1 || n_dims > 3)
        return false;
    snprintf(t->name, sizeof t->name, "%s", name);
    t->n_dims = (int)n_dims;
    t->n = 1;
    for (size_t d = 0; d < n_dims; d++)
        if (!get_int(&t->shape[d], json_array_get(shape, d), 1, INT64_MAX / 64) ||
            __builtin_mul_overflow(t->n, t->shape[d], &t->n) || t->n > INT64_MAX / 64)
            return false;
    return true;
}

static bool parse_piece(struct ht_mf_piece *p, const struct ht_manifest *m, const json_t *v)
{
    int64_t array, tensor, file;

    if (json_array_size(v) != 7 || !get_int(&array, json_array_get(v, 0), 0, HT_CKPT_ARRAYS - 1) ||
        !get_int(&tensor, json_array_get(v, 1), 0, m->n_tensors - 1) ||
        !get_int(&file, json_array_get(v, 4), 0, m->n_files - 1))
        return false;
    const int64_t n_tensor = m->tensors[tensor].n, n_bytes = m->files[file].n_bytes;
    p->array = (int)array;
    p->tensor = (int)tensor;
    p->file = (int)file;
    if (!get_int(&p->start, json_array_get(v, 2), 0, n_tensor - 1) ||
        !get_int(&p->n, json_array_get(v, 3), 1, n_tensor - p->start) || p->n > n_bytes / 4 ||
        !get_int(&p->at, json_array_get(v, 5), 0, n_bytes - 4 * p->n))
        return false;
    return get_hash(&p->hash, json_array_get(v, 6));
}

/* An array of `what` with at most max entries, memory for it, and its number of entries. */
static enum ht_status get_list(const json_t **list, void *out, int64_t *n, size_t entry_bytes,
                               const json_t *root, const char *what, int64_t max, const char *path)
{
    *list = json_object_get(root, what);
    *n = (int64_t)json_array_size(*list);
    if (!json_is_array(*list) || *n > max)
        return HT_FAIL(HT_ERR_FORMAT, "%s: '%s' must be a list of at most %" PRId64 " entries",
                       path, what, max);
    void *p = calloc((size_t)*n + 1, entry_bytes);
    if (!p) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %" PRId64 " %s", path, *n, what);
    memcpy(out, &p, sizeof p);
    return HT_OK;
}

static enum ht_status parse_head(struct ht_manifest *m, const json_t *root, const char *path)
{
    const char *format = json_string_value(json_object_get(root, "format"));
    const char *kind = json_string_value(json_object_get(root, "kind"));
    int64_t version, world;

    if (!format || strcmp(format, HT_MANIFEST_FORMAT) != 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: not the manifest of a checkpoint", path);
    if (!get_int(&version, json_object_get(root, "version"), 0, INT64_MAX) ||
        version != HT_MANIFEST_VERSION)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "%s: written in another version of the format; this program reads version %d", path,
            HT_MANIFEST_VERSION);
    if (!kind || !get_int(&world, json_object_get(root, "world"), 1, MAX_WORLD) ||
        !get_int(&m->step, json_object_get(root, "step"), 0, INT64_MAX) ||
        !get_int(&m->tokens, json_object_get(root, "tokens"), 0, INT64_MAX))
        return HT_FAIL(HT_ERR_FORMAT, "%s: kind, world, step or tokens is missing or out of range",
                       path);
    m->world = (int)world;
    m->is_part = strcmp(kind, "part") == 0;
    return HT_OK;
}

static enum ht_status parse_root(struct ht_manifest *m, const json_t *root, const char *path)
{
    const json_t *files, *tensors, *pieces;
    int64_t n, n_pieces;

    HT_TRY(parse_head(m, root, path));
    HT_TRY(get_list(&files, &m->files, &n, sizeof *m->files, root, "files", MAX_WORLD + 16, path));
    for (; m->n_files < n; m->n_files++)
        if (!parse_file(&m->files[m->n_files], json_array_get(files, (size_t)m->n_files)))
            return HT_FAIL(HT_ERR_FORMAT, "%s: files[%d] is not [name, bytes, hash]", path,
                           m->n_files);
    HT_TRY(get_list(&tensors, &m->tensors, &n, sizeof *m->tensors, root, "tensors", MAX_TENSORS,
                    path));
    for (; m->n_tensors < n; m->n_tensors++)
        if (!parse_tensor(&m->tensors[m->n_tensors], json_array_get(tensors, (size_t)m->n_tensors)))
            return HT_FAIL(HT_ERR_FORMAT, "%s: tensors[%d] is not [name, shape]", path,
                           m->n_tensors);
    HT_TRY(get_list(&pieces, &m->pieces, &n_pieces, sizeof *m->pieces, root, "pieces",
                    (int64_t)(HT_MANIFEST_MAX_BYTES / 32), path));
    for (; m->n_pieces < n_pieces; m->n_pieces++)
        if (!parse_piece(&m->pieces[m->n_pieces], m, json_array_get(pieces, (size_t)m->n_pieces)))
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: pieces[%" PRId64 "] does not lie in its tensor or file", path,
                           m->n_pieces);
    return HT_OK;
}

enum ht_status ht_manifest_parse(struct ht_manifest *out, const char *text, size_t n_bytes,
                                 const char *path)
{
    enum ht_status st = HT_OK;
    json_error_t error;
    json_t *root = NULL;

    memset(out, 0, sizeof *out);
    HT_TRY(check_seal(text, n_bytes, path));
    errno = 0; // Jansson 2.14 takes some failed allocations for something else
    root = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &error);
    if (errno == ENOMEM)
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its %zu bytes", path, n_bytes);
    else if (!root)
        st = HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", path, error.line, error.column, error.text);
    else
        st = parse_root(out, root, path);
    json_decref(root);
    if (st != HT_OK) ht_manifest_free(out);
    return st;
}

enum ht_status ht_manifest_read(struct ht_manifest *out, const char *path)
{
    char *text = NULL;
    size_t n_bytes;

    memset(out, 0, sizeof *out);
    HT_TRY(ht_file_read_regular(&text, &n_bytes, path, HT_MANIFEST_MAX_BYTES));
    const enum ht_status st = ht_manifest_parse(out, text, n_bytes, path);
    free(text);
    return st;
}
