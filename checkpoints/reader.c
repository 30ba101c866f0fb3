/* checkpoints/reader.c: a verified checkpoint, and flat ranges out of it for any number of ranks.
 *
 * Tensors are read with pread at the manifest's offsets, which the hash has just vouched for:
 * nothing here parses HDF5, so no damaged file ever reaches that library. The files are HDF5 all
 * the same, for everyone else's tools.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/checkpoint.h"
#include "checkpoints/folder.h"
#include "checkpoints/hash.h"
#include "core/base/file.h"

enum { MAX_TEXT_BYTES = 64 << 20 };

struct ht_ckpt {
    struct ht_manifest manifest;
    char *path;
    char *recipe, *loader, *state;  // texts
    int *fds;                       // (n_files), -1 = not open yet
    int64_t *first[HT_CKPT_ARRAYS]; // (n_tensors) number of the first piece of each tensor
};

/* A small text file: read once, checked against its hash, kept. */
static enum ht_status read_text(char **out, const struct ht_ckpt *c, const char *name)
{
    const int i = ht_manifest_find_file(&c->manifest, name); // there: ht_ckpt_folder_open saw to it
    char path[PATH_MAX];
    size_t n_bytes;

    if (snprintf(path, sizeof path, "%s/%s", c->path, name) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", c->path);
    HT_TRY(ht_file_read_regular(out, &n_bytes, path, MAX_TEXT_BYTES));
    const struct ht_hash h = ht_hash_of(*out, n_bytes);
    if ((int64_t)n_bytes != c->manifest.files[i].n_bytes ||
        !ht_hash_equal(&h, &c->manifest.files[i].hash) || memchr(*out, '\0', n_bytes))
        return HT_FAIL(HT_ERR_FORMAT, "%s: damaged: its bytes do not match their hash", path);
    return HT_OK;
}

static enum ht_status find_pieces(struct ht_ckpt *c)
{
    const struct ht_manifest *m = &c->manifest;
    int64_t i = 0;

    for (int a = 0; a < HT_CKPT_ARRAYS; a++) {
        c->first[a] = calloc((size_t)m->n_tensors + 1, sizeof **c->first);
        if (!c->first[a]) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for an index", c->path);
        for (int t = 0; t < m->n_tensors; t++) {
            c->first[a][t] = i;
            while (i < m->n_pieces && m->pieces[i].array == a && m->pieces[i].tensor == t) i++;
        }
    }
    return HT_OK;
}

enum ht_status ht_ckpt_open(struct ht_ckpt **out, const char *path)
{
    enum ht_status st = HT_OK;
    struct ht_ckpt *c = calloc(1, sizeof *c);

    *out = NULL;
    if (!c) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a checkpoint", path);
    c->path = strdup(path);
    if (!c->path) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a checkpoint", path);
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_ckpt_folder_open(&c->manifest, path));
    c->fds = malloc(((size_t)c->manifest.n_files + 1) * sizeof *c->fds);
    if (!c->fds) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %d files", path, c->manifest.n_files);
        goto done;
    }
    for (int i = 0; i < c->manifest.n_files; i++) c->fds[i] = -1;
    for (int i = 0; i < c->manifest.n_files; i++)
        HT_TRY_GOTO(st, done, ht_ckpt_folder_check_file(&c->manifest, i, path));
    HT_TRY_GOTO(st, done, read_text(&c->recipe, c, "recipe.cfg"));
    HT_TRY_GOTO(st, done, read_text(&c->loader, c, "loader.json"));
    HT_TRY_GOTO(st, done, read_text(&c->state, c, "state.json"));
    HT_TRY_GOTO(st, done, find_pieces(c));
    *out = c;
    c = NULL;
done:
    ht_ckpt_close(c);
    return st;
}

void ht_ckpt_close(struct ht_ckpt *c)
{
    if (!c) return;
    for (int i = 0; c->fds && i < c->manifest.n_files; i++)
        if (c->fds[i] >= 0) close(c->fds[i]);
    for (int a = 0; a < HT_CKPT_ARRAYS; a++) free(c->first[a]);
    free(c->fds);
    free(c->recipe);
    free(c->loader);
    free(c->state);
    free(c->path);
    ht_manifest_free(&c->manifest);
    free(c);
}

int64_t ht_ckpt_step(const struct ht_ckpt *c)
{
    return c->manifest.step;
}
int64_t ht_ckpt_tokens(const struct ht_ckpt *c)
{
    return c->manifest.tokens;
}
int ht_ckpt_world(const struct ht_ckpt *c)
{
    return c->manifest.world;
}
const char *ht_ckpt_recipe(const struct ht_ckpt *c)
{
    return c->recipe;
}
const char *ht_ckpt_loader_json(const struct ht_ckpt *c)
{
    return c->loader;
}
const char *ht_ckpt_state_json(const struct ht_ckpt *c)
{
    return c->state;
}

/* ---- tensors ---- */

static enum ht_status check_tensors(const struct ht_ckpt *c, const struct ht_tensor_list *l)
{
    const struct ht_manifest *m = &c->manifest;
    const int n = m->n_tensors < l->n_tensors ? m->n_tensors : l->n_tensors;

    for (int i = 0; i < n; i++) {
        const struct ht_mf_tensor *a = &m->tensors[i];
        const struct ht_tensor_info *b = &l->tensors[i];
        if (strcmp(a->name, b->name) != 0)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: tensor %d is %s; the model has %s there: another architecture",
                           c->path, i, a->name, b->name);
        bool same = a->n_dims == b->n_dims;
        for (int d = 0; same && d < a->n_dims; d++) same = a->shape[d] == b->shape[d];
        if (!same)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: tensor %s has %" PRId64 " elements in %d dimensions (first %" PRId64
                           "); the model's has %" PRId64 " in %d (first %" PRId64 ")",
                           c->path, a->name, a->n, a->n_dims, a->shape[0], b->n, b->n_dims,
                           b->shape[0]);
    }
    if (m->n_tensors != l->n_tensors)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %d tensors; the model has %d (the first beyond: %s)",
                       c->path, m->n_tensors, l->n_tensors,
                       m->n_tensors > n ? m->tensors[n].name : l->tensors[n].name);
    return HT_OK;
}

static enum ht_status read_piece(struct ht_ckpt *c, const struct ht_mf_piece *p, int64_t from,
                                 int64_t n, float *out)
{
    const char *name = c->manifest.files[p->file].name;
    int *fd = &c->fds[p->file];
    char path[PATH_MAX];

    if (snprintf(path, sizeof path, "%s/%s", c->path, name) >= (int)sizeof path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", c->path);
    if (*fd < 0) *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    return ht_file_read_at(*fd, out, (size_t)n * sizeof(float),
                           p->at + (from - p->start) * (int64_t)sizeof(float), path);
}

/* Elements [from, to) of tensor t. */
static enum ht_status read_tensor(struct ht_ckpt *c, int array, int t, int64_t from, int64_t to,
                                  float *out)
{
    const struct ht_mf_piece *p = &c->manifest.pieces[c->first[array][t]];

    while (p->start + p->n <= from) p++; // the pieces cover the tensor: it ends
    while (from < to) {
        const int64_t end = p->start + p->n < to ? p->start + p->n : to;
        HT_TRY(read_piece(c, p, from, end - from, out));
        out += end - from;
        from = end;
        p++;
    }
    return HT_OK;
}

enum ht_status ht_ckpt_read_flat(struct ht_ckpt *c, enum ht_ckpt_array which,
                                 const struct ht_tensor_list *tensors, int64_t flat_start,
                                 int64_t n, float *out)
{
    const int64_t flat_end = flat_start + n;

    if (flat_start < 0 || n < 0 || (int)which < 0 || (int)which >= HT_CKPT_ARRAYS)
        return HT_FAIL(HT_ERR_ARG, "%s: array %d, elements %" PRId64 " + %" PRId64, c->path,
                       (int)which, flat_start, n);
    HT_TRY(check_tensors(c, tensors));
    memset(out, 0, (size_t)n * sizeof *out);
    for (int t = 0; t < tensors->n_tensors; t++) {
        const struct ht_tensor_info *x = &tensors->tensors[t];
        const int64_t from = flat_start > x->offset ? flat_start : x->offset;
        const int64_t to = flat_end < x->offset + x->n ? flat_end : x->offset + x->n;
        if (from < to)
            HT_TRY(read_tensor(c, (int)which, t, from - x->offset, to - x->offset,
                               out + (from - flat_start)));
    }
    return HT_OK;
}
