/* checkpoints/manifest.c: printing, merging and indexing of manifests; manifest_parse.c reads them.
 */
#include "checkpoints/manifest.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/manifest_seal.h"

const char *const ht_ckpt_array_names[HT_CKPT_ARRAYS] = { "master", "exp_avg", "exp_avg_sq" };

void ht_ckpt_rank_file(char name[64], int rank, int world)
{
    snprintf(name, 64, "rank-%05d-of-%05d.h5", rank, world);
}

bool ht_ckpt_name_ok(const char *name)
{
    const size_t n = strlen(name);
    static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";

    return n > 0 && n < 64 && name[0] != '.' && strspn(name, ok) == n;
}

bool ht_ckpt_tensor_name_ok(const char *name)
{
    static const char ok[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    return name[0] && name[0] != '.' && strspn(name, ok) == strlen(name);
}

enum ht_status ht_manifest_set_tensors(struct ht_manifest *m, const struct ht_tensor_list *list)
{
    m->tensors = calloc((size_t)list->n_tensors + 1, sizeof *m->tensors);
    if (!m->tensors) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d tensors", list->n_tensors);
    m->n_tensors = list->n_tensors;
    for (int i = 0; i < list->n_tensors; i++) {
        const struct ht_tensor_info *t = &list->tensors[i];
        if (!ht_ckpt_tensor_name_ok(t->name))
            return HT_FAIL(HT_ERR_ARG, "tensor '%s': a checkpoint cannot store this name", t->name);
        snprintf(m->tensors[i].name, sizeof m->tensors[i].name, "%s", t->name);
        m->tensors[i].n_dims = t->n_dims;
        memcpy(m->tensors[i].shape, t->shape, sizeof t->shape);
        m->tensors[i].n = t->n;
    }
    return HT_OK;
}

/* ---- printing ---- */

struct text {
    char *data;
    size_t used, size;
    bool failed;
};

static void __attribute__((format(printf, 2, 3))) add(struct text *t, const char *format, ...)
{
    char line[512];
    va_list ap;

    va_start(ap, format);
    const int n = vsnprintf(line, sizeof line, format, ap);
    va_end(ap);
    if (t->failed || n < 0 || (size_t)n >= sizeof line) {
        t->failed = true;
        return;
    }
    if (t->used + (size_t)n + 1 > t->size) {
        const size_t size = t->size ? 2 * t->size : 65536;
        char *grown = realloc(t->data, size);
        if (!grown) {
            t->failed = true;
            return;
        }
        t->data = grown;
        t->size = size;
    }
    memcpy(t->data + t->used, line, (size_t)n + 1);
    t->used += (size_t)n;
}

enum ht_status ht_manifest_print(char **text, size_t *n_bytes, const struct ht_manifest *m)
{
    struct text t = { 0 };
    char hex[HT_HASH_HEX];

    *text = NULL;
    *n_bytes = 0;
    add(&t, "{\n\"format\": \"%s\",\n\"version\": %d,\n\"kind\": \"%s\",\n", HT_MANIFEST_FORMAT,
        HT_MANIFEST_VERSION, m->is_part ? "part" : "checkpoint");
    add(&t, "\"world\": %d,\n\"step\": %" PRId64 ",\n\"tokens\": %" PRId64 ",\n", m->world, m->step,
        m->tokens);
    add(&t, "\"columns\": {\"files\": \"name bytes xxh3_128\", \"tensors\": \"name shape\", "
            "\"pieces\": \"array tensor start elements file byte_offset xxh3_128\", "
            "\"arrays\": \"master exp_avg exp_avg_sq\"},\n");
    add(&t, "\"files\": [");
    for (int i = 0; i < m->n_files; i++) {
        ht_hash_print(hex, &m->files[i].hash);
        add(&t, "%s\n[\"%s\", %" PRId64 ", \"%s\"]", i ? "," : "", m->files[i].name,
            m->files[i].n_bytes, hex);
    }
    add(&t, "\n],\n\"tensors\": [");
    for (int i = 0; i < m->n_tensors; i++) {
        const struct ht_mf_tensor *x = &m->tensors[i];
        add(&t, "%s\n[\"%s\", [", i ? "," : "", x->name);
        for (int d = 0; d < x->n_dims; d++) add(&t, "%s%" PRId64, d ? ", " : "", x->shape[d]);
        add(&t, "]]");
    }
    add(&t, "\n],\n\"pieces\": [");
    for (int64_t i = 0; i < m->n_pieces; i++) {
        const struct ht_mf_piece *p = &m->pieces[i];
        ht_hash_print(hex, &p->hash);
        add(&t, "%s\n[%d, %d, %" PRId64 ", %" PRId64 ", %d, %" PRId64 ", \"%s\"]", i ? "," : "",
            p->array, p->tensor, p->start, p->n, p->file, p->at, hex);
    }
    add(&t, "\n]");
    if (!t.failed) {
        const struct ht_hash seal = ht_hash_of(t.data, t.used);
        ht_hash_print(hex, &seal);
        add(&t, HT_MANIFEST_SEAL, hex);
    }
    if (t.failed) {
        free(t.data);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the manifest of step %" PRId64, m->step);
    }
    *text = t.data;
    *n_bytes = t.used;
    return HT_OK;
}

/* ---- merging ---- */

enum ht_status ht_manifest_merge(struct ht_manifest *m, const struct ht_manifest *part,
                                 const char *path)
{
    if (!part->is_part || part->world != m->world || part->step != m->step ||
        part->tokens != m->tokens || part->n_tensors != m->n_tensors)
        return HT_FAIL(
            HT_ERR_FORMAT,
            "%s: part of step %" PRId64 " of %d ranks, %d tensors; expected step %" PRId64
            " of %d ranks, %d tensors",
            path, part->step, part->world, part->n_tensors, m->step, m->world, m->n_tensors);
    for (int i = 0; i < m->n_tensors; i++) {
        const struct ht_mf_tensor *a = &m->tensors[i], *b = &part->tensors[i];
        if (strcmp(a->name, b->name) != 0 || a->n_dims != b->n_dims || a->n != b->n ||
            memcmp(a->shape, b->shape, sizeof a->shape) != 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s: tensor %d is %s; rank 0 has %s", path, i, b->name,
                           a->name);
    }
    struct ht_mf_file *files =
        realloc(m->files, (size_t)(m->n_files + part->n_files + 1) * sizeof *files);
    if (files) m->files = files;
    struct ht_mf_piece *pieces =
        realloc(m->pieces, (size_t)(m->n_pieces + part->n_pieces + 1) * sizeof *pieces);
    if (pieces) m->pieces = pieces;
    if (!files || !pieces)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %" PRId64 " pieces", m->n_pieces);
    memcpy(m->files + m->n_files, part->files, (size_t)part->n_files * sizeof *files);
    memcpy(m->pieces + m->n_pieces, part->pieces, (size_t)part->n_pieces * sizeof *pieces);
    for (int64_t i = 0; i < part->n_pieces; i++) m->pieces[m->n_pieces + i].file += m->n_files;
    m->n_files += part->n_files;
    m->n_pieces += part->n_pieces;
    return HT_OK;
}

/* ---- the index ---- */

static int by_place(const void *pa, const void *pb)
{
    const struct ht_mf_piece *a = pa, *b = pb;

    if (a->array != b->array) return a->array < b->array ? -1 : 1;
    if (a->tensor != b->tensor) return a->tensor < b->tensor ? -1 : 1;
    return a->start < b->start ? -1 : a->start > b->start;
}

enum ht_status ht_manifest_index(struct ht_manifest *m, const char *path)
{
    int64_t i = 0;

    if (m->n_pieces > 1) qsort(m->pieces, (size_t)m->n_pieces, sizeof *m->pieces, by_place);
    for (int a = 0; a < HT_CKPT_ARRAYS; a++)
        for (int t = 0; t < m->n_tensors; t++) {
            int64_t end = 0;
            for (; i < m->n_pieces && m->pieces[i].array == a && m->pieces[i].tensor == t; i++) {
                if (m->pieces[i].start != end) break;
                end += m->pieces[i].n;
            }
            if (end != m->tensors[t].n)
                return HT_FAIL(HT_ERR_FORMAT,
                               "%s: %s of %s is %s at element %" PRId64 " of %" PRId64, path,
                               ht_ckpt_array_names[a], m->tensors[t].name,
                               i < m->n_pieces && m->pieces[i].array == a &&
                                       m->pieces[i].tensor == t && m->pieces[i].start < end
                                   ? "stored twice"
                                   : "missing",
                               end, m->tensors[t].n);
        }
    if (i != m->n_pieces) return HT_FAIL(HT_ERR_FORMAT, "%s: a piece beyond the last tensor", path);
    return HT_OK;
}

int ht_manifest_find_file(const struct ht_manifest *m, const char *name)
{
    for (int i = 0; i < m->n_files; i++)
        if (strcmp(m->files[i].name, name) == 0) return i;
    return -1;
}

void ht_manifest_free(struct ht_manifest *m)
{
    if (!m) return;
    free(m->files);
    free(m->tensors);
    free(m->pieces);
    memset(m, 0, sizeof *m);
}
