/* checkpoints/weights_save.c: a folder of our own or of Hugging Face form from any source. */
#include "checkpoints/weights_save.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoints/h5_driver.h"
#include "checkpoints/weights_impl.h"
#include "checkpoints/weights_quant.h"
#include "core/base/file.h"
#include "core/config/recipe.h"

enum { BLOCK = 1 << 20, MAX_COPY_BYTES = 256 << 20 }; // elements per turn; bytes of a file copied

/* What travels with the weights when the source has it. */
static const char *const companions[] = { "tokenizer.json",          "tokenizer_config.json",
                                          "special_tokens_map.json", "added_tokens.json",
                                          "generation_config.json",  "chat_template.jinja",
                                          "tokenizer.model" };

struct saver {
    struct ht_weights *w;
    const struct ht_weights_save_options *o;
    struct ht_weights_save_report report;
    struct ht_tensor_list list;
    struct ht_wf_manifest manifest; // h5; otherwise only its files
    char dir[PATH_MAX], tmp[PATH_MAX], path[PATH_MAX];
    int fd; // of the weights file
    float *block;
    unsigned char *codes;
    ht_bf16 *scales;
    uint8_t *zeros;
    double error, total; // sums of squares
};

static enum ht_status path_of(struct saver *s, const char *name)
{
    if (snprintf(s->path, sizeof s->path, "%s/%s", s->tmp, name) < (int)sizeof s->path)
        return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: path is too long", s->dir);
}

static enum ht_status write_at(const struct saver *s, const void *data, int64_t n_bytes, int64_t at)
{
    for (int64_t n = 0; n < n_bytes;) {
        const ssize_t r = pwrite(s->fd, (const char *)data + n, (size_t)(n_bytes - n), at + n);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0)
            return HT_FAIL(errno == ENOSPC || errno == EDQUOT ? HT_ERR_MEMORY : HT_ERR_IO,
                           "%s: write at byte %" PRId64 ": %s", s->dir, at + n, strerror(errno));
        n += r;
    }
    return HT_OK;
}

/* ---- the folder ---- */

static enum ht_status make_folder(struct saver *s, const char *dir)
{
    size_t n = strlen(dir);

    while (n > 1 && dir[n - 1] == '/') n--;
    if (n == 0 || snprintf(s->dir, sizeof s->dir, "%.*s", (int)n, dir) >= (int)sizeof s->dir - 32)
        return HT_FAIL(HT_ERR_ARG, "'%s': not a usable path", dir);
    snprintf(s->tmp, sizeof s->tmp, "%.*s.tmp-%ld", (int)n, s->dir, (long)getpid());
    if (ht_file_exists(s->dir))
        return HT_FAIL(HT_ERR_ARG, "%s: is there already; give a new folder or remove it", s->dir);
    return ht_file_make_dirs(s->tmp);
}

static enum ht_status publish_folder(struct saver *s)
{
    char parent[PATH_MAX];
    const char *slash = strrchr(s->dir, '/');

    HT_TRY(ht_file_sync(s->tmp));
    if (rename(s->tmp, s->dir) != 0)
        return HT_FAIL(HT_ERR_IO, "%s: rename from %s: %s", s->dir, s->tmp, strerror(errno));
    if (!slash) return ht_file_sync(".");
    snprintf(parent, sizeof parent, "%.*s", slash == s->dir ? 1 : (int)(slash - s->dir), s->dir);
    return ht_file_sync(parent);
}

/* A file of the folder, and its entry in the manifest. */
static enum ht_status put_file(struct saver *s, const char *name, const void *data, size_t n_bytes)
{
    struct ht_wf_file *f = &s->manifest.files[s->manifest.n_files++]; // companions, config, weights

    HT_TRY(path_of(s, name));
    HT_TRY(ht_file_publish(s->path, data, n_bytes));
    snprintf(f->name, sizeof f->name, "%s", name);
    f->n_bytes = (int64_t)n_bytes;
    f->hash = ht_hash_of(data, n_bytes);
    return HT_OK;
}

/* Copies a file of the source where it is there. */
static enum ht_status copy_file(struct saver *s, const char *name, bool *copied)
{
    char from[PATH_MAX], *data;
    size_t n_bytes;

    *copied = false;
    if (snprintf(from, sizeof from, "%s/%s", s->w->path, name) >= (int)sizeof from ||
        !ht_file_exists(from))
        return HT_OK;
    HT_TRY(ht_file_read_regular(&data, &n_bytes, from, MAX_COPY_BYTES));
    const enum ht_status st = put_file(s, name, data, n_bytes);
    free(data);
    *copied = st == HT_OK;
    return st;
}

static enum ht_status copy_companions(struct saver *s)
{
    bool copied;

    for (size_t i = 0; i < sizeof companions / sizeof *companions; i++)
        HT_TRY(copy_file(s, companions[i], &copied));
    return HT_OK;
}

/* The model's description as the source has it. */
static enum ht_status copy_config(struct saver *s)
{
    const char *const names[] = { "recipe.cfg", "config.json" };
    bool copied = false;

    for (int i = s->w->ckpt || s->w->own ? 0 : 1; i < 2 && !copied; i++)
        HT_TRY(copy_file(s, names[i], &copied));
    return copied ? HT_OK
                  : HT_FAIL(HT_ERR_FORMAT, "%s: neither recipe.cfg nor config.json", s->w->path);
}

static enum ht_status check_room(const struct saver *s, int64_t n_bytes)
{
    uint64_t room;

    HT_TRY(ht_file_free_bytes(&room, s->tmp));
    if ((uint64_t)n_bytes <= room) return HT_OK;
    return HT_FAIL(HT_ERR_MEMORY, "%s: %" PRId64 " bytes are needed and %" PRIu64 " are free",
                   s->dir, n_bytes, room);
}

static enum ht_status open_weights_file(struct saver *s, const char *name, int64_t n_bytes)
{
    HT_TRY(check_room(s, n_bytes));
    HT_TRY(path_of(s, name));
    s->fd = open(s->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (s->fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", s->path, strerror(errno));
    if (ftruncate(s->fd, n_bytes) != 0)
        return HT_FAIL(HT_ERR_IO, "%s: %" PRId64 " bytes: %s", s->path, n_bytes, strerror(errno));
    s->report.n_bytes = n_bytes;
    return HT_OK;
}

static enum ht_status close_weights_file(struct saver *s)
{
    const int fd = s->fd;

    s->fd = -1;
    if (fsync(fd) != 0) {
        const enum ht_status st = HT_FAIL(HT_ERR_IO, "%s: fsync: %s", s->dir, strerror(errno));
        close(fd);
        return st;
    }
    return close(fd) == 0 ? HT_OK : HT_FAIL(HT_ERR_IO, "%s: close: %s", s->dir, strerror(errno));
}

/* ---- values ---- */

static enum ht_status make_buffers(struct saver *s)
{
    int64_t widest = 1;

    for (int i = 0; i < s->list.n_tensors; i++) {
        const int64_t k = s->list.tensors[i].n / s->list.tensors[i].shape[0];
        widest = k > widest ? k : widest;
    }
    const size_t n = (size_t)(widest > BLOCK ? widest : BLOCK);
    s->block = malloc(2 * n * sizeof *s->block); // values, and what became of them
    s->codes = malloc(2 * n);
    s->scales = malloc(n * sizeof *s->scales);
    s->zeros = malloc(n);
    if (s->block && s->codes && s->scales && s->zeros) return HT_OK;
    return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to convert weights", s->dir);
}

static void add_error(struct saver *s, const struct ht_qrows *rows, double *error, double *total)
{
    float *back = s->block + rows->n_rows * rows->k;

    ht_dequantise_rows(rows, back, rows->k);
    for (int64_t i = 0; i < rows->n_rows * rows->k; i++) {
        const double e = (double)back[i] - (double)s->block[i];
        *error += e * e;
        *total += (double)s->block[i] * (double)s->block[i];
    }
}

/* One block of rows as the manifest wants tensor t, into its datasets. */
static enum ht_status put_rows(struct saver *s, const struct ht_wf_tensor *t, int64_t row0,
                               int64_t n_rows, struct ht_hasher *const *hash, double *error,
                               double *total)
{
    const void *parts[HT_WF_MAX_PARTS] = { s->block, s->scales, s->zeros };

    if (t->form.quantised) {
        parts[0] = s->codes;
        HT_TRY(ht_quantise_rows(s->o->n_threads, t->form.format, t->form.group, s->block,
                                HT_DTYPE_F32, t->k, n_rows, t->k, s->codes, s->scales, s->zeros));
        add_error(s,
                  &(struct ht_qrows){ t->form.format, t->form.group, n_rows, t->k, s->codes,
                                      s->scales, s->zeros },
                  error, total);
    }
    for (int p = 0; p < t->n_parts; p++) {
        const int64_t row = t->parts[p].n_bytes / t->n_rows;
        HT_TRY(write_at(s, parts[p], n_rows * row, t->parts[p].at + row0 * row));
        ht_hasher_update(hash[p], parts[p], (size_t)(n_rows * row));
    }
    return HT_OK;
}

static enum ht_status put_tensor(struct saver *s, const struct ht_tensor_info *info,
                                 struct ht_wf_tensor *t)
{
    const enum ht_dtype dtype = t->form.quantised ? HT_DTYPE_F32 : t->form.dtype;
    struct ht_hasher *hash[HT_WF_MAX_PARTS] = { NULL };
    enum ht_status st = HT_OK;
    double error = 0.0, total = 0.0;
    int64_t turn = BLOCK / t->k;

    if (turn < 1) turn = 1;
    for (int p = 0; p < t->n_parts; p++) HT_TRY_GOTO(st, done, ht_hasher_create(&hash[p]));
    for (int64_t i = 0; i < t->n_rows; i += turn) {
        const int64_t n = t->n_rows - i < turn ? t->n_rows - i : turn;
        HT_TRY_GOTO(st, done, ht_weights_read(s->w, &s->list, info, i, n, s->block, dtype));
        HT_TRY_GOTO(st, done, put_rows(s, t, i, n, hash, &error, &total));
    }
    for (int p = 0; p < t->n_parts; p++) t->parts[p].hash = ht_hasher_digest(hash[p]);
    const double relative = total > 0.0 ? sqrt(error / total) : 0.0;
    if (relative > s->report.worst) {
        s->report.worst = relative;
        snprintf(s->report.worst_name, sizeof s->report.worst_name, "%s", t->name);
    }
    s->error += error;
    s->total += total;
done:
    for (int p = 0; p < t->n_parts; p++) ht_hasher_free(hash[p]);
    return st == HT_OK ? HT_OK : ht_fail_while(st, "converting '%s'", t->name);
}

/* ---- our own folder ---- */

static struct ht_wf_form form_of(const struct saver *s, const struct ht_tensor_info *t)
{
    const struct ht_weights_save_options *o = s->o;

    if (!t->matrix) return (struct ht_wf_form){ .dtype = HT_DTYPE_F32 };
    if (!o->quantise) return (struct ht_wf_form){ .dtype = o->dtype };
    const enum ht_qformat f = ht_weights_format(o->format, t->role, s->w->model.tied_head);
    if (f == HT_Q_BF16) return (struct ht_wf_form){ .dtype = HT_DTYPE_BF16 };
    return (struct ht_wf_form){ .quantised = true, .format = f, .group = o->group };
}

static enum ht_status make_manifest(struct saver *s)
{
    struct ht_wf_manifest *m = &s->manifest;

    m->tensors = calloc((size_t)s->list.n_tensors, sizeof *m->tensors);
    if (!m->tensors) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its manifest", s->dir);
    m->n_tensors = s->list.n_tensors;
    m->form = (struct ht_wf_form){ .dtype = s->o->dtype };
    if (s->o->quantise)
        m->form = s->o->format == HT_Q_BF16 ? (struct ht_wf_form){ .dtype = HT_DTYPE_BF16 }
                                            : (struct ht_wf_form){ .quantised = true,
                                                                   .format = s->o->format,
                                                                   .group = s->o->group };
    for (int i = 0; i < m->n_tensors; i++) {
        const struct ht_wf_form f = form_of(s, &s->list.tensors[i]);
        ht_wf_tensor_set(&m->tensors[i], &s->list.tensors[i], &f);
    }
    return HT_OK;
}

static enum ht_status put_h5(struct saver *s)
{
    struct ht_h5_pages pages = { 0 };
    enum ht_status st = HT_OK;

    HT_TRY_GOTO(st, done, ht_weights_h5_structure(&pages, &s->manifest));
    HT_TRY_GOTO(st, done, open_weights_file(s, HT_WEIGHTS_H5, pages.end));
    for (int64_t i = 0; i < pages.n_pages; i++) {
        const int64_t at = pages.pages[i].number * HT_H5_PAGE;
        const int64_t left = pages.end - at;
        HT_TRY_GOTO(st, done,
                    write_at(s, pages.pages[i].bytes, left < HT_H5_PAGE ? left : HT_H5_PAGE, at));
    }
    for (int i = 0; i < s->list.n_tensors; i++)
        HT_TRY_GOTO(st, done, put_tensor(s, &s->list.tensors[i], &s->manifest.tensors[i]));
    HT_TRY_GOTO(st, done, close_weights_file(s));
    struct ht_wf_file *f = &s->manifest.files[s->manifest.n_files++];
    snprintf(f->name, sizeof f->name, "%s", HT_WEIGHTS_H5);
    HT_TRY_GOTO(st, done, path_of(s, HT_WEIGHTS_H5));
    st = ht_file_hash(&f->hash, &f->n_bytes, s->path);
done:
    ht_h5_pages_free(&pages);
    return st;
}

static enum ht_status save_h5(struct saver *s)
{
    char *text;
    size_t n_bytes;

    HT_TRY(make_manifest(s));
    HT_TRY(copy_companions(s));
    HT_TRY(copy_config(s));
    HT_TRY(put_h5(s));
    HT_TRY(ht_wf_print(&text, &n_bytes, &s->manifest));
    enum ht_status st = path_of(s, HT_WEIGHTS_MANIFEST);
    if (st == HT_OK) st = ht_file_publish(s->path, text, n_bytes);
    free(text);
    return st;
}

/* ---- Hugging Face form ---- */

static enum ht_status put_config(struct saver *s)
{
    char *json;
    json_error_t error;

    HT_TRY(ht_model_config_to_hf(&json, &s->w->model));
    json_t *root = json_loads(json, 0, &error);
    free(json);
    bool ok = root && json_object_set_new(
                          root, "torch_dtype",
                          json_string(s->o->dtype == HT_DTYPE_F32 ? "float32" : "bfloat16")) == 0;
    if (ok && s->w->bos_id >= 0)
        ok = json_object_set_new(root, "bos_token_id", json_integer(s->w->bos_id)) == 0;
    if (ok && s->w->eos_id >= 0)
        ok = json_object_set_new(root, "eos_token_id", json_integer(s->w->eos_id)) == 0;
    json = ok ? json_dumps(root, JSON_INDENT(2) | JSON_REAL_PRECISION(15)) : NULL;
    json_decref(root);
    if (!json) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for config.json", s->dir);
    const enum ht_status st = put_file(s, "config.json", json, strlen(json));
    free(json);
    return st;
}

/* Header text, padded so that data begin at a multiple of 64; places go to the manifest's parts. */
static enum ht_status safetensors_header(struct saver *s, char **text, int64_t *n_bytes)
{
    json_t *root = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    bool failed = !root;
    int64_t at = 0;

    for (int i = 0; i < s->manifest.n_tensors && !failed; i++) {
        struct ht_wf_tensor *t = &s->manifest.tensors[i];
        json_t *shape = json_array();
        for (int d = 0; d < t->n_dims; d++)
            failed |= json_array_append_new(shape, json_integer(t->shape[d])) != 0;
        t->parts[0].at = at;
        t->parts[0].n_bytes = ht_wf_part_bytes(t, 0);
        at += t->parts[0].n_bytes;
        failed |= json_object_set_new(root, t->name,
                                      json_pack("{s:s,s:o,s:[I,I]}", "dtype",
                                                t->form.dtype == HT_DTYPE_F32 ? "F32" : "BF16",
                                                "shape", shape, "data_offsets",
                                                (json_int_t)t->parts[0].at, (json_int_t)at)) != 0;
    }
    char *json = failed ? NULL : json_dumps(root, JSON_COMPACT);
    json_decref(root);
    if (!json) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a header", s->dir);
    const int64_t n = (int64_t)strlen(json), padded = (n + 8 + 63) / 64 * 64;
    *text = malloc((size_t)padded);
    if (*text) {
        const uint64_t length = (uint64_t)(padded - 8);
        for (int i = 0; i < 8; i++) (*text)[i] = (char)(unsigned char)(length >> 8 * i & 255);
        memcpy(*text + 8, json, (size_t)n);
        memset(*text + 8 + n, ' ', (size_t)(padded - 8 - n));
    }
    free(json);
    *n_bytes = padded;
    if (!*text) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a header", s->dir);
    for (int i = 0; i < s->manifest.n_tensors; i++) s->manifest.tensors[i].parts[0].at += padded;
    return HT_OK;
}

static enum ht_status save_safetensors(struct saver *s)
{
    enum ht_status st = HT_OK;
    char *header = NULL;
    int64_t n_bytes = 0;

    HT_TRY(put_config(s));
    HT_TRY(copy_companions(s));
    HT_TRY(make_manifest(s));
    HT_TRY(safetensors_header(s, &header, &n_bytes));
    const struct ht_wf_tensor *last = &s->manifest.tensors[s->manifest.n_tensors - 1];
    HT_TRY_GOTO(
        st, done,
        open_weights_file(s, "model.safetensors", last->parts[0].at + last->parts[0].n_bytes));
    HT_TRY_GOTO(st, done, write_at(s, header, n_bytes, 0));
    for (int i = 0; i < s->list.n_tensors; i++)
        HT_TRY_GOTO(st, done, put_tensor(s, &s->list.tensors[i], &s->manifest.tensors[i]));
    HT_TRY_GOTO(st, done, close_weights_file(s));
done:
    free(header);
    return st;
}

/* ---- */

static enum ht_status check_options(const struct ht_weights_save_options *o)
{
    if (o->dtype != HT_DTYPE_F32 && o->dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_ARG, "weights cannot be saved as %s; fp32 or bf16",
                       ht_dtype_name(o->dtype));
    if (o->quantise && o->group != 32 && o->group != 64)
        return HT_FAIL(HT_ERR_ARG, "group is %d; it must be 32 or 64", o->group);
    return HT_OK;
}

static enum ht_status save(struct ht_weights *w, const char *dir,
                           const struct ht_weights_save_options *o,
                           struct ht_weights_save_report *report,
                           enum ht_status (*body)(struct saver *))
{
    struct saver *s = calloc(1, sizeof *s); // large: not for the stack
    bool made = false;
    enum ht_status st = HT_OK;

    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", dir);
    s->w = w;
    s->o = o;
    s->fd = -1;
    HT_TRY_GOTO(st, done, ht_tensor_list_create(&s->list, &w->model, HT_DECAY_MATRICES));
    HT_TRY_GOTO(st, done, ht_weights_index(w, &s->list));
    HT_TRY_GOTO(st, done, make_folder(s, dir));
    made = true;
    HT_TRY_GOTO(st, done, make_buffers(s));
    HT_TRY_GOTO(st, done, body(s));
    HT_TRY_GOTO(st, done, publish_folder(s));
    made = false;
    s->report.n_params = s->list.n_params;
    s->report.error = s->total > 0.0 ? sqrt(s->error / s->total) : 0.0;
    if (report) *report = s->report;
done:
    if (s->fd >= 0) close(s->fd);
    if (made) (void)ht_file_remove_tree(s->tmp); // the first failure is the one to report
    if (w->indexed == &s->list) w->indexed = NULL;
    ht_wf_manifest_free(&s->manifest);
    ht_tensor_list_free(&s->list);
    free(s->block);
    free(s->codes);
    free(s->scales);
    free(s->zeros);
    free(s);
    return st;
}

enum ht_status ht_weights_save_h5(struct ht_weights *w, const char *dir,
                                  const struct ht_weights_save_options *o,
                                  struct ht_weights_save_report *report)
{
    HT_TRY(check_options(o));
    return save(w, dir, o, report, save_h5);
}

enum ht_status ht_weights_save_safetensors(struct ht_weights *w, const char *dir,
                                           const struct ht_weights_save_options *o,
                                           struct ht_weights_save_report *report)
{
    HT_TRY(check_options(o));
    if (o->quantise)
        return HT_FAIL(HT_ERR_ARG,
                       "safetensors holds dense weights only; quantise into a folder of "
                       "our own (--to h5)");
    return save(w, dir, o, report, save_safetensors);
}
