/* checkpoints/weights.c: weights from a run, a checkpoint, or a folder in Hugging Face form. */
#include "checkpoints/weights.h"

#include <errno.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/weights_impl.h"
#include "checkpoints/weights_names.h"
#include "checkpoints/hash.h"
#include "core/base/file.h"
#include "core/config/recipe.h"

enum { MAX_JSON_BYTES = 64 << 20, MAX_SHARDS = 4096, PATH_BYTES = HT_WEIGHTS_PATH_BYTES };

/* path/name into out; false when it is too long. */
static bool join(char *out, size_t size, const char *path, const char *name)
{
    return snprintf(out, size, "%s/%s", path, name) < (int)size;
}

static bool has(const char *path, const char *name)
{
    char p[PATH_BYTES + 300];
    return join(p, sizeof p, path, name) && ht_file_exists(p);
}

static enum ht_status read_json(json_t **root, const char *path, const char *name, char **text,
                                size_t *n_bytes)
{
    char p[PATH_BYTES + 300];
    json_error_t error;

    *root = NULL;
    *text = NULL;
    if (!join(p, sizeof p, path, name)) return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    HT_TRY(ht_file_read_regular(text, n_bytes, p, MAX_JSON_BYTES));
    char *plain = ht_hf_json_text(*text, *n_bytes);
    if (!plain) {
        free(*text);
        *text = NULL;
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", p, *n_bytes);
    }
    errno = 0;
    *root = json_loads(plain, JSON_REJECT_DUPLICATES, &error);
    const bool no_memory = errno == ENOMEM; // Jansson may have taken it for something else
    free(plain);
    if (*root && !no_memory) return HT_OK;
    json_decref(*root);
    *root = NULL;
    free(*text);
    *text = NULL;
    if (no_memory) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", p, *n_bytes);
    return HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", p, error.line, error.column, error.text);
}

/* ---- checkpoints ---- */

static enum ht_status model_of_recipe(struct ht_weights *w, const char *text)
{
    struct ht_config *cfg = malloc(sizeof *cfg); // large: not for the stack
    struct ht_recipe *recipe = NULL;
    char name[PATH_BYTES + 32];

    if (!cfg) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a recipe", w->path);
    snprintf(name, sizeof name, "%s/recipe.cfg", w->path);
    const enum ht_status st = ht_recipe_parse(cfg, &recipe, text, name, 0, NULL, 1);
    if (st == HT_OK) w->model = cfg->model;
    ht_recipe_free(recipe);
    free(cfg);
    return st;
}

static enum ht_status open_checkpoint(struct ht_weights *w)
{
    HT_TRY(ht_ckpt_open(&w->ckpt, w->path));
    w->stored = HT_DTYPE_F32;
    return model_of_recipe(w, ht_ckpt_recipe(w->ckpt));
}

/* ---- Hugging Face folders ---- */

static enum ht_status add_shard(struct ht_weights *w, const char *name)
{
    char path[PATH_BYTES + 300];
    struct ht_weights_shard *s;

    for (int i = 0; i < w->n_shards; i++)
        if (strcmp(w->shards[i].name, name) == 0) return HT_OK;
    if (!name[0] || name[0] == '.' || strchr(name, '/') || strstr(name, "..") ||
        strlen(name) >= sizeof s->name || w->n_shards >= MAX_SHARDS)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: the index names the file '%.100s'; it must be a plain name in this "
                       "folder, and at most %d of them",
                       w->path, name, MAX_SHARDS);
    s = realloc(w->shards, (size_t)(w->n_shards + 1) * sizeof *s);
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %d files", w->path, w->n_shards + 1);
    w->shards = s;
    s += w->n_shards;
    snprintf(s->name, sizeof s->name, "%s", name);
    s->file = NULL;
    w->n_shards++;
    if (!join(path, sizeof path, w->path, name))
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", w->path);
    return ht_safetensors_open(&s->file, path);
}

/* Every tensor of the index is in the file it names, and nothing else is in the files. */
static enum ht_status check_index(const struct ht_weights *w, const json_t *map)
{
    const char *tensor;
    const json_t *v;
    int64_t n_found = 0;

    json_object_foreach((json_t *)map, tensor, v)
    {
        for (int i = 0; i < w->n_shards; i++)
            if (strcmp(w->shards[i].name, json_string_value(v)) == 0 &&
                !ht_safetensors_find(w->shards[i].file, tensor))
                return HT_FAIL(HT_ERR_FORMAT,
                               "%s/%s: tensor '%.200s' is not there, but the index "
                               "says so",
                               w->path, w->shards[i].name, tensor);
        n_found++;
    }
    for (int i = 0; i < w->n_shards; i++) n_found -= ht_safetensors_count(w->shards[i].file);
    if (n_found != 0)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: the files hold %" PRId64 " tensors that the index does not name",
                       w->path, -n_found);
    return HT_OK;
}

static enum ht_status open_index(struct ht_weights *w)
{
    const char *tensor;
    enum ht_status st;
    json_t *root, *v;
    char *text;
    size_t n_bytes;

    HT_TRY(read_json(&root, w->path, "model.safetensors.index.json", &text, &n_bytes));
    const json_t *map = json_object_get(root, "weight_map");
    st = HT_OK;
    if (!json_is_object(map) || json_object_size(map) == 0) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s/model.safetensors.index.json: no weight_map", w->path);
        goto done;
    }
    json_object_foreach((json_t *)map, tensor, v)
    {
        if (!json_is_string(v)) {
            st = HT_FAIL(HT_ERR_FORMAT, "%s/model.safetensors.index.json: '%.200s' names no file",
                         w->path, tensor);
            goto done;
        }
        HT_TRY_GOTO(st, done, add_shard(w, json_string_value(v)));
    }
    HT_TRY_GOTO(st, done, check_index(w, map));
done:
    json_decref(root);
    free(text);
    return st;
}

/* An id, or the first of a list of them; -1 when there is none. */
static int64_t token_id(const json_t *root, const char *key)
{
    const json_t *v = json_object_get(root, key);

    if (json_is_array(v)) v = json_array_get(v, 0);
    const int64_t id = json_is_integer(v) ? json_integer_value(v) : -1;
    return id >= 0 && id <= INT32_MAX ? id : -1;
}

static enum ht_status read_ids(struct ht_weights *w, const char *name)
{
    json_t *root;
    char *text;
    size_t n_bytes;

    if (!has(w->path, name)) return HT_OK;
    HT_TRY(read_json(&root, w->path, name, &text, &n_bytes));
    const int64_t eos = token_id(root, "eos_token_id"), bos = token_id(root, "bos_token_id");
    if (w->eos_id < 0 && eos < w->model.vocab_size) w->eos_id = eos;
    if (w->bos_id < 0 && bos < w->model.vocab_size) w->bos_id = bos;
    json_decref(root);
    free(text);
    return HT_OK;
}

static void find_stored_dtype(struct ht_weights *w)
{
    for (int i = 0; i < w->n_shards; i++)
        for (int k = 0; k < ht_safetensors_count(w->shards[i].file); k++) {
            const struct ht_safetensors_tensor *t = ht_safetensors_at(w->shards[i].file, k);
            if (t->n_dims == 2) {
                w->stored = t->dtype;
                return;
            }
        }
}

static enum ht_status read_hf_config(struct ht_weights *w)
{
    char name[PATH_BYTES + 32], *text = NULL;
    size_t n_bytes;

    snprintf(name, sizeof name, "%s/config.json", w->path);
    HT_TRY(ht_file_read_regular(&text, &n_bytes, name, MAX_JSON_BYTES));
    const enum ht_status st = ht_model_config_from_hf(&w->model, text, n_bytes, name);
    free(text);
    HT_TRY(st);
    HT_TRY(read_ids(w, "generation_config.json"));
    return read_ids(w, "config.json");
}

static enum ht_status open_hf(struct ht_weights *w)
{
    static const char *const single[] = { "model.safetensors", "consolidated.safetensors" };

    HT_TRY(read_hf_config(w));
    if (has(w->path, single[0]))
        HT_TRY(add_shard(w, single[0]));
    else if (has(w->path, "model.safetensors.index.json"))
        HT_TRY(open_index(w));
    else if (has(w->path, single[1]))
        HT_TRY(add_shard(w, single[1]));
    else
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: neither model.safetensors nor model.safetensors.index.json is there",
                       w->path);
    find_stored_dtype(w);
    return HT_OK;
}

/* ---- folders of our own ---- */

static enum ht_status open_own(struct ht_weights *w)
{
    char name[PATH_BYTES + 32], *text;
    size_t n_bytes;

    HT_TRY(ht_wf_open(&w->own, w->path));
    const struct ht_wf_form *f = &ht_wf_manifest(w->own)->form;
    w->stored = f->quantised ? HT_DTYPE_BF16 : f->dtype;
    if (!has(w->path, "recipe.cfg")) return read_hf_config(w);
    snprintf(name, sizeof name, "%s/recipe.cfg", w->path);
    HT_TRY(ht_file_read_regular(&text, &n_bytes, name, MAX_JSON_BYTES));
    const enum ht_status st = model_of_recipe(w, text);
    free(text);
    return st;
}

/* ---- life ---- */

/* Which folder is meant, and of what kind. */
static enum ht_status resolve(struct ht_weights *w, const char *path, const struct ht_log *log)
{
    char dir[PATH_BYTES];

    if (!ht_file_exists(path)) return HT_FAIL(HT_ERR_IO, "%s: not there", path);
    if (!ht_file_is_dir(path))
        return HT_FAIL(HT_ERR_ARG,
                       "%s: not a folder; give a run folder, a checkpoint, or a folder with "
                       "config.json and model.safetensors",
                       path);
    if (snprintf(w->path, sizeof w->path, "%s", path) >= (int)sizeof w->path)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    if (has(path, HT_WEIGHTS_MANIFEST) || has(path, "manifest.json") || has(path, "config.json"))
        return HT_OK;
    if (!join(dir, sizeof dir, path, has(path, "checkpoints") ? "checkpoints" : "."))
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    HT_TRY(ht_ckpt_find_latest(w->path, sizeof w->path, dir, NULL, log));
    if (!w->path[0])
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: holds no checkpoint, no manifest.json and no config.json", path);
    return HT_OK;
}

enum ht_status ht_weights_open(struct ht_weights **out, const char *path, const struct ht_log *log)
{
    enum ht_status st = HT_OK;
    struct ht_weights *w = calloc(1, sizeof *w);

    *out = NULL;
    if (!w) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory", path);
    w->eos_id = w->bos_id = -1;
    HT_TRY_GOTO(st, done, resolve(w, path, log));
    if (has(w->path, HT_WEIGHTS_MANIFEST))
        HT_TRY_GOTO(st, done, open_own(w));
    else if (has(w->path, "manifest.json"))
        HT_TRY_GOTO(st, done, open_checkpoint(w));
    else
        HT_TRY_GOTO(st, done, open_hf(w));
    if (has(w->path, "tokenizer.json"))
        snprintf(w->tokenizer, sizeof w->tokenizer, "%s/tokenizer.json", w->path);
    *out = w;
    w = NULL;
done:
    ht_weights_close(w);
    return st;
}

void ht_weights_close(struct ht_weights *w)
{
    if (!w) return;
    ht_ckpt_close(w->ckpt);
    ht_wf_close(w->own);
    free(w->places);
    for (int i = 0; i < w->n_shards; i++) ht_safetensors_close(w->shards[i].file);
    free(w->shards);
    free(w);
}

const struct ht_model_config *ht_weights_model(const struct ht_weights *w)
{
    return &w->model;
}
enum ht_dtype ht_weights_stored_dtype(const struct ht_weights *w)
{
    return w->stored;
}
const char *ht_weights_tokenizer_path(const struct ht_weights *w)
{
    return w->tokenizer[0] ? w->tokenizer : NULL;
}
const char *ht_weights_resolved_path(const struct ht_weights *w)
{
    return w->path;
}
int64_t ht_weights_eos_id(const struct ht_weights *w)
{
    return w->eos_id;
}
int64_t ht_weights_bos_id(const struct ht_weights *w)
{
    return w->bos_id;
}

/* ---- loading ---- */

static enum ht_status shape_fail(const struct ht_weights *w, const char *file,
                                 const struct ht_safetensors_tensor *t,
                                 const struct ht_tensor_info *x)
{
    char have[128] = "", want[128] = "";
    size_t at = 0;

    for (int d = 0; d < t->n_dims && at < sizeof have; d++)
        at += (size_t)snprintf(have + at, sizeof have - at, "%s%" PRId64, d ? " x " : "",
                               t->shape[d]);
    at = 0;
    for (int d = 0; d < x->n_dims && at < sizeof want; d++)
        at += (size_t)snprintf(want + at, sizeof want - at, "%s%" PRId64, d ? " x " : "",
                               x->shape[d]);
    return HT_FAIL(HT_ERR_FORMAT, "%s/%s: tensor '%s' is %s; the config asks for %s (%s)", w->path,
                   file, t->name, have, want, x->name);
}

static bool shapes_fit(const struct ht_safetensors_tensor *t,
                       const struct ht_tensor_info *targets[3], int n_targets)
{
    int64_t rows = 0;

    if (t->n_dims != targets[0]->n_dims) return false;
    for (int k = 0; k < n_targets; k++) rows += targets[k]->shape[0];
    if (t->shape[0] != rows) return false;
    for (int d = 1; d < t->n_dims; d++)
        if (t->shape[d] != targets[0]->shape[d]) return false;
    return true;
}

static enum ht_status index_shards(struct ht_weights *w, const struct ht_tensor_list *list)
{
    const struct ht_tensor_info *targets[3];

    for (int i = 0; i < w->n_shards; i++)
        for (int k = 0; k < ht_safetensors_count(w->shards[i].file); k++) {
            const struct ht_safetensors_tensor *t = ht_safetensors_at(w->shards[i].file, k);
            const int n = ht_weights_targets(targets, t->name, list, &w->model);
            int64_t first = 0;
            if (n == HT_WEIGHT_IGNORED) continue;
            if (n == HT_WEIGHT_UNKNOWN)
                return HT_FAIL(HT_ERR_FORMAT,
                               "%s/%s: tensor '%s' has no place in the model of config.json",
                               w->path, w->shards[i].name, t->name);
            if (!shapes_fit(t, targets, n)) return shape_fail(w, w->shards[i].name, t, targets[0]);
            for (int x = 0; x < n; x++) { // one after the other, in rows
                struct ht_weights_place *place = &w->places[targets[x] - list->tensors];
                if (place->t)
                    return HT_FAIL(HT_ERR_FORMAT, "%s/%s: tensor '%s' is given a second time",
                                   w->path, w->shards[i].name, t->name);
                *place = (struct ht_weights_place){ t, first };
                first += targets[x]->n;
            }
        }
    for (int i = 0; i < list->n_tensors; i++)
        if (!w->places[i].t)
            return HT_FAIL(HT_ERR_FORMAT, "%s: tensor '%s' is missing from its weight file(s)",
                           w->path, list->tensors[i].name);
    return HT_OK;
}

static enum ht_status index_own(struct ht_weights *w, const struct ht_tensor_list *list)
{
    const struct ht_wf_manifest *m = ht_wf_manifest(w->own);

    for (int i = 0; i < list->n_tensors; i++) {
        const struct ht_tensor_info *x = &list->tensors[i];
        const struct ht_wf_tensor *t = ht_wf_find(w->own, x->name);
        if (!t)
            return HT_FAIL(HT_ERR_FORMAT, "%s: tensor '%s' is missing from " HT_WEIGHTS_MANIFEST,
                           w->path, x->name);
        bool same = t->n_dims == x->n_dims && (x->matrix || !t->form.quantised);
        for (int d = 0; same && d < x->n_dims; d++) same = t->shape[d] == x->shape[d];
        if (!same)
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: tensor '%s' has %" PRId64 " elements as %s in " HT_WEIGHTS_MANIFEST
                           "; the model asks for %" PRId64 " in another shape or form",
                           w->path, x->name, t->n, ht_wf_form_name(&t->form), x->n);
    }
    if (m->n_tensors != list->n_tensors)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: " HT_WEIGHTS_MANIFEST " lists %d tensors; the model has %d", w->path,
                       m->n_tensors, list->n_tensors);
    return HT_OK;
}

enum ht_status ht_weights_index(struct ht_weights *w, const struct ht_tensor_list *list)
{
    if (w->ckpt) return HT_OK; // checked by every read
    if (w->own) return index_own(w, list);
    w->indexed = NULL;
    free(w->places);
    w->places = calloc((size_t)list->n_tensors + 1, sizeof *w->places);
    if (!w->places) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read weights", w->path);
    HT_TRY(index_shards(w, list));
    w->indexed = list;
    return HT_OK;
}

/* A tensor, dense, into its places; through `master` where that is wanted as well. */
static enum ht_status load_one(struct ht_weights *w, const struct ht_tensor_list *list,
                               const struct ht_tensor_info *t, void *matrix, enum ht_dtype dtype,
                               float *vector, float *master)
{
    const enum ht_dtype d = t->matrix ? dtype : HT_DTYPE_F32;
    char *out = !t->matrix ? (char *)(vector + (t->offset - list->n_matrix))
                : matrix   ? (char *)matrix + (size_t)t->offset * ht_dtype_bytes(dtype)
                           : NULL;

    if (!master) return ht_weights_read(w, list, t, 0, t->shape[0], out, d);
    HT_TRY(ht_weights_read(w, list, t, 0, t->shape[0], master + t->offset, HT_DTYPE_F32));
    if (out) ht_convert(out, d, master + t->offset, HT_DTYPE_F32, t->n);
    return HT_OK;
}

enum ht_status ht_weights_load(struct ht_weights *w, const struct ht_tensor_list *list,
                               void *matrix, enum ht_dtype dtype, float *vector, float *master)
{
    if (dtype != HT_DTYPE_F32 && dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_ARG, "weights cannot be loaded as %s; fp32 or bf16",
                       ht_dtype_name(dtype));
    HT_TRY(ht_weights_index(w, list));
    for (int i = 0; i < list->n_tensors; i++)
        HT_TRY(load_one(w, list, &list->tensors[i], matrix, dtype, vector, master));
    return HT_OK;
}
