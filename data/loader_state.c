/* data/loader_state.c: the loader's state as JSON, strict on the way back: it decides what is
 * trained on. */
#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/loader.h"

#define FORMAT 2
#define WITHOUT_WINDOWS                                                                            \
    1 // format: rows in the order of the stream; read as the beginning of a window

enum ht_status ht_loader_state_to_json(char **text, const struct ht_loader_state *s)
{
    json_t *datasets = json_array(), *root;
    int bad = !datasets;

    *text = NULL;
    for (int d = 0; d < s->n_datasets; d++) {
        char print[17];
        snprintf(print, sizeof print, "%016" PRIx64, s->dataset[d].fingerprint);
        json_t *o =
            json_pack("{s:I, s:I, s:I, s:I, s:s}", "epoch", (json_int_t)s->dataset[d].epoch, "doc",
                      (json_int_t)s->dataset[d].doc, "tokens", (json_int_t)s->dataset[d].tokens,
                      "docs_visited", (json_int_t)s->dataset[d].docs_visited, "fingerprint", print);
        bad |= json_array_append_new(datasets, o) != 0; // refuses NULL
    }
    root =
        json_pack("{s:i, s:I, s:I, s:I, s:I, s:I, s:i, s:I, s:I, s:o}", "format", FORMAT, "row",
                  (json_int_t)s->row, "window_rows", (json_int_t)s->window_rows, "window_done",
                  (json_int_t)s->window_done, "seq_len", (json_int_t)s->seq_len, "seed",
                  (json_int_t)s->seed, "current", s->current, "current_doc",
                  (json_int_t)s->current_doc, "current_pos", (json_int_t)s->current_pos, "datasets",
                  datasets); // takes datasets, even on failure
    if (root && !bad) *text = json_dumps(root, JSON_INDENT(1));
    json_decref(root);
    return *text ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for the loader's state");
}

struct field {
    const char *name;
    int64_t *value;
    int64_t least;
};

/* The integers of an object; n_others more keys are the caller's. */
static enum ht_status read_fields(const json_t *o, const char *where, const struct field *f, int n,
                                  size_t n_others)
{
    if (!json_is_object(o)) return HT_FAIL(HT_ERR_FORMAT, "%s: not an object", where);
    for (int i = 0; i < n; i++) {
        const json_t *v = json_object_get(o, f[i].name);
        if (!json_is_integer(v))
            return HT_FAIL(HT_ERR_FORMAT, "%s: \"%s\" is %s; an integer is needed", where,
                           f[i].name, v ? "of another type" : "missing");
        *f[i].value = json_integer_value(v);
        if (*f[i].value < f[i].least)
            return HT_FAIL(HT_ERR_FORMAT, "%s: \"%s\" is %lld; the least is %lld", where, f[i].name,
                           (long long)*f[i].value, (long long)f[i].least);
    }
    if (json_object_size(o) != (size_t)n + n_others)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %zu keys; %zu are known", where, json_object_size(o),
                       (size_t)n + n_others);
    return HT_OK;
}

static enum ht_status read_dataset(struct ht_loader_state *s, int d, const json_t *o,
                                   const char *name)
{
    const struct field fields[] = { { "epoch", &s->dataset[d].epoch, 0 },
                                    { "doc", &s->dataset[d].doc, 0 },
                                    { "tokens", &s->dataset[d].tokens, 0 },
                                    { "docs_visited", &s->dataset[d].docs_visited, 0 } };
    char where[512];

    snprintf(where, sizeof where, "%s: datasets[%d]", name, d);
    HT_TRY(read_fields(o, where, fields, 4, 1));
    const char *print = json_string_value(json_object_get(o, "fingerprint"));
    if (!print || strlen(print) != 16 || strspn(print, "0123456789abcdef") != 16)
        return HT_FAIL(HT_ERR_FORMAT, "%s: \"fingerprint\" is not 16 hexadecimal digits", where);
    s->dataset[d].fingerprint = strtoull(print, NULL, 16);
    return HT_OK;
}

static enum ht_status read_root(struct ht_loader_state *s, const json_t *root, const char *name)
{
    int64_t format, current;
    const struct field fields[] = { { "format", &format, 0 },
                                    { "row", &s->row, 0 },
                                    { "current", &current, -1 },
                                    { "current_doc", &s->current_doc, 0 },
                                    { "current_pos", &s->current_pos, 0 },
                                    { "window_rows", &s->window_rows, 0 },
                                    { "window_done", &s->window_done, 0 },
                                    { "seq_len", &s->seq_len, 1 },
                                    { "seed", &s->seed, 0 } };
    const bool old = json_integer_value(json_object_get(root, "format")) == WITHOUT_WINDOWS;

    HT_TRY(read_fields(root, name, fields, old ? 5 : 9, 1));
    if (format != FORMAT && !old)
        return HT_FAIL(HT_ERR_FORMAT, "%s: \"format\" is %lld; this program reads %d and %d", name,
                       (long long)format, WITHOUT_WINDOWS, FORMAT);
    if (old) s->seed = -1;
    const json_t *datasets = json_object_get(root, "datasets");
    const size_t n = json_array_size(datasets); // 0 for anything else
    if (n < 1 || n > HT_LOADER_MAX_DATASETS)
        return HT_FAIL(HT_ERR_FORMAT, "%s: \"datasets\" must be an array of 1 to %d objects", name,
                       HT_LOADER_MAX_DATASETS);
    if (current >= (int64_t)n)
        return HT_FAIL(HT_ERR_FORMAT, "%s: \"current\" is %lld; there are %zu datasets", name,
                       (long long)current, n);
    s->current = (int)current;
    s->n_datasets = (int)n;
    for (int d = 0; d < (int)n; d++)
        HT_TRY(read_dataset(s, d, json_array_get(datasets, (size_t)d), name));
    return HT_OK;
}

enum ht_status ht_loader_state_from_json(struct ht_loader_state *s, const char *text,
                                         const char *name)
{
    json_error_t error;
    json_t *root = json_loads(text, JSON_REJECT_DUPLICATES, &error);

    memset(s, 0, sizeof *s);
    if (!root)
        return HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", name, error.line, error.column, error.text);
    const enum ht_status st = read_root(s, root, name);
    json_decref(root);
    return st;
}
