/* inference/chat_template.c: finding, rendering and encoding. */
#include "inference/chat_template.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"

struct ht_chat_template {
    struct ht_jinja *chat, *tools; // tools NULL: chat does both
    char *text;
};

static enum ht_status set_text(struct ht_chat_template *t, const char *text, size_t n,
                               const char *name)
{
    HT_TRY(ht_jinja_parse(&t->chat, text, n, name));
    t->text = strndup(text, n);
    return t->text ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a chat template", name);
}

enum ht_status ht_chat_template_create(struct ht_chat_template **out, const char *text,
                                       size_t n_bytes, const char *name)
{
    enum ht_status st = HT_OK;
    struct ht_chat_template *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a chat template", name);
    HT_TRY_GOTO(st, done, set_text(t, text, n_bytes, name));
    *out = t;
    t = NULL;
done:
    ht_chat_template_free(t);
    return st;
}

void ht_chat_template_free(struct ht_chat_template *t)
{
    if (!t) return;
    ht_jinja_free(t->chat);
    ht_jinja_free(t->tools);
    free(t->text);
    free(t);
}

const char *ht_chat_template_text(const struct ht_chat_template *t)
{
    return t->text;
}

/* The list form: {"name": "default", "template": ".."}, .. */
static enum ht_status named(struct ht_chat_template *t, const json_t *list, const char *path)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *item = json_array_get(list, i);
        const char *name = json_string_value(json_object_get(item, "name"));
        const json_t *text = json_object_get(item, "template");
        if (!name || !json_is_string(text))
            return HT_FAIL(HT_ERR_FORMAT, "%s: chat_template[%zu] has no name and template", path,
                           i);
        if (strcmp(name, "default") == 0 && !t->chat)
            HT_TRY(set_text(t, json_string_value(text), json_string_length(text), path));
        if (strcmp(name, "tool_use") == 0 && !t->tools)
            HT_TRY(
                ht_jinja_parse(&t->tools, json_string_value(text), json_string_length(text), path));
    }
    return t->chat ? HT_OK
                   : HT_FAIL(HT_ERR_FORMAT, "%s: chat_template has no entry named 'default'", path);
}

static enum ht_status load(struct ht_chat_template *t, const char *folder)
{
    enum { MAX_CONFIG = 64 << 20 }; // some list a hundred thousand added tokens
    char path[4096];
    char *data = NULL;
    json_t *root = NULL;
    json_error_t e;
    size_t n;
    enum ht_status st = HT_OK;

    snprintf(path, sizeof path, "%s/chat_template.jinja", folder);
    if (ht_file_exists(path)) {
        HT_TRY(ht_file_read(&data, &n, path, HT_JINJA_MAX_BYTES));
        st = set_text(t, data, n, path);
        free(data);
        return st;
    }
    snprintf(path, sizeof path, "%s/tokenizer_config.json", folder);
    if (!ht_file_exists(path)) return HT_OK;
    HT_TRY(ht_file_read(&data, &n, path, MAX_CONFIG));
    root = json_loadb(data, n, JSON_REJECT_DUPLICATES, &e);
    if (!json_is_object(root)) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", path, root ? 1 : e.line, root ? 1 : e.column,
                     root ? "not an object" : e.text);
        goto done;
    }
    const json_t *c = json_object_get(root, "chat_template");
    if (json_is_string(c))
        HT_TRY_GOTO(st, done, set_text(t, json_string_value(c), json_string_length(c), path));
    else if (json_is_array(c))
        HT_TRY_GOTO(st, done, named(t, c, path));
    else if (c && !json_is_null(c))
        st = HT_FAIL(HT_ERR_FORMAT, "%s: chat_template is neither a string nor a list", path);
done:
    json_decref(root);
    free(data);
    return st;
}

enum ht_status ht_chat_template_load(struct ht_chat_template **out, const char *folder)
{
    enum ht_status st = HT_OK;
    struct ht_chat_template *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a chat template", folder);
    HT_TRY_GOTO(st, done, load(t, folder));
    if (t->chat) {
        *out = t;
        t = NULL;
    }
done:
    ht_chat_template_free(t);
    return st;
}

static enum ht_status check_roles(const json_t *messages)
{
    static const char allowed[] =
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    for (size_t i = 0; i < json_array_size(messages); i++) {
        const char *role = json_string_value(json_object_get(json_array_get(messages, i), "role"));
        if (!role) return HT_FAIL(HT_ERR_ARG, "messages[%zu] has no role", i);
        const size_t n = strlen(role);
        if (n == 0 || n > 64 || strspn(role, allowed) != n)
            return HT_FAIL(
                HT_ERR_ARG,
                "messages[%zu].role is '%.64s'; it must be 1 to 64 letters, digits, '_' and '-'", i,
                role);
    }
    return HT_OK;
}

enum ht_status ht_chat_render(const struct ht_chat_template *t, const struct ht_chat_input *in,
                              struct ht_jinja_output *out)
{
    enum { MAX_VARS = 64 };
    static const char *const trusted[] = { "role", NULL };
    struct ht_jinja_var vars[MAX_VARS];
    json_t *owned[4] = { json_boolean(in->add_generation_prompt),
                         in->bos ? json_string(in->bos) : NULL,
                         in->eos ? json_string(in->eos) : NULL, json_null() };
    size_t n = 0;
    enum ht_status st = HT_OK;

    *out = (struct ht_jinja_output){ 0 };
    HT_TRY_GOTO(st, done, check_roles(in->messages));
    // values are only read; Jansson's iterators want them writable
    vars[n++] =
        (struct ht_jinja_var){ "messages", (json_t *)(uintptr_t)in->messages, true, trusted };
    vars[n++] =
        (struct ht_jinja_var){ "tools", in->tools ? (json_t *)(uintptr_t)in->tools : owned[3], true,
                               NULL };
    vars[n++] = (struct ht_jinja_var){
        "documents", in->documents ? (json_t *)(uintptr_t)in->documents : owned[3], true, NULL
    };
    vars[n++] = (struct ht_jinja_var){ "add_generation_prompt", owned[0], false, NULL };
    vars[n++] = (struct ht_jinja_var){ "bos_token", owned[1], false, NULL };
    vars[n++] = (struct ht_jinja_var){ "eos_token", owned[2], false, NULL };
    const size_t n_own = n;
    json_t *extra = (json_t *)(uintptr_t)in->extra;
    for (void *it = extra ? json_object_iter(extra) : NULL; it;
         it = json_object_iter_next(extra, it)) {
        const char *name = json_object_iter_key(it);
        for (size_t i = 0; i < n_own; i++)
            if (strcmp(vars[i].name, name) == 0) {
                st = HT_FAIL(HT_ERR_ARG, "chat_template_kwargs: '%s' is set by the request itself",
                             name);
                goto done;
            }
        if (n == MAX_VARS) {
            st =
                HT_FAIL(HT_ERR_ARG, "chat_template_kwargs: more than %zu values", MAX_VARS - n_own);
            goto done;
        }
        vars[n++] = (struct ht_jinja_var){ name, json_object_iter_value(it), true, NULL };
    }
    const struct ht_jinja *which =
        t->tools && in->tools && json_array_size(in->tools) ? t->tools : t->chat;
    HT_TRY_GOTO(st, done, ht_jinja_render(which, vars, n, in->now ? in->now : time(NULL), out));
done:
    for (size_t i = 0; i < 4; i++) json_decref(owned[i]);
    return st;
}

enum ht_status ht_chat_encode(struct ht_encoder *e, const struct ht_jinja_output *text,
                              struct ht_ids *out)
{
    return ht_encode_guarded(e, text->text, text->n_bytes, text->user, out);
}
