/* inference/jinja_value.c: values of templates, Python's in meaning. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_impl.h"

struct ht_jarena_block {
    struct ht_jarena_block *next;
    size_t n, capacity;
    max_align_t data[];
};

void *ht_jarena_take(struct ht_jarena *a, size_t n_bytes)
{
    struct ht_jarena_block *b = a->blocks;
    if (n_bytes > a->limit) return NULL;
    n_bytes = (n_bytes + 15) & ~(size_t)15;
    if (!b || b->capacity - b->n < n_bytes) {
        size_t capacity = 16384;
        while (b && capacity < b->capacity * 2 && capacity < 1 << 20) capacity *= 2;
        if (capacity < n_bytes) capacity = n_bytes;
        if (capacity > a->limit - a->used) capacity = n_bytes;
        if (capacity > a->limit - a->used) return NULL;
        b = malloc(sizeof *b + capacity);
        if (!b) return NULL;
        *b = (struct ht_jarena_block){ .next = a->blocks, .capacity = capacity };
        a->blocks = b;
        a->used += capacity;
    }
    void *p = (char *)b->data + b->n;
    b->n += n_bytes;
    return memset(p, 0, n_bytes);
}

void ht_jarena_free(struct ht_jarena *a)
{
    for (struct ht_jarena_block *b = a->blocks, *next; b; b = next) {
        next = b->next;
        free(b);
    }
    *a = (struct ht_jarena){ 0 };
}

enum ht_status ht_jinja_fail(struct ht_jrun *r, const char *format, ...)
{
    char text[600];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return HT_FAIL(HT_ERR_FORMAT, "%s:%d: %s", r->name, r->line, text);
}

enum ht_status ht_jinja_charge(struct ht_jrun *r, size_t steps)
{
    if (steps > HT_JINJA_MAX_STEPS) steps = HT_JINJA_MAX_STEPS;
    r->steps += (int64_t)steps;
    if (r->steps <= HT_JINJA_MAX_STEPS) return HT_OK;
    return HT_JFAIL(r, "the template takes more than %d steps", HT_JINJA_MAX_STEPS);
}

enum ht_status ht_jinja_enter(struct ht_jrun *r)
{
    if (r->depth >= HT_JINJA_MAX_CALLS)
        return HT_JFAIL(r, "nested more than %d deep", HT_JINJA_MAX_CALLS);
    r->depth++;
    return HT_OK;
}

enum ht_status ht_jinja_no_memory(struct ht_jrun *r)
{
    return HT_JFAIL(r, "the template needs more than %d MiB", HT_JINJA_MAX_MEMORY >> 20);
}

const char *ht_jv_kind_name(struct ht_jv v)
{
    static const char *const names[] = { "undefined",   "none",     "a boolean", "an integer",
                                         "a number",    "a string", "a list",    "a mapping",
                                         "a namespace", "loop",     "a function" };
    return names[v.kind];
}

bool ht_jv_truth(struct ht_jv v)
{
    switch (v.kind) {
    case HT_JV_UNDEFINED:
    case HT_JV_NONE: return false;
    case HT_JV_BOOL: return v.b;
    case HT_JV_INT: return v.i != 0;
    case HT_JV_FLOAT: return v.f != 0.0;
    case HT_JV_STRING: return v.s->n > 0;
    case HT_JV_LIST: return v.list->n > 0;
    case HT_JV_DICT: return v.dict->n > 0;
    default: return true;
    }
}

bool ht_jstring_is(const struct ht_jstring *s, const char *text)
{
    return s->n == strlen(text) && memcmp(s->p, text, s->n) == 0;
}

enum ht_status ht_jv_literal(struct ht_jrun *r, struct ht_jv *out, const char *text, size_t n)
{
    struct ht_jstring *s;
    HT_TRY(ht_jinja_take(r, &s, sizeof *s));
    *s = (struct ht_jstring){ .p = text, .n = n };
    *out = (struct ht_jv){ .kind = HT_JV_STRING, .s = s };
    return HT_OK;
}

enum ht_status ht_jv_part(struct ht_jrun *r, struct ht_jv *out, const struct ht_jstring *s,
                          size_t start, size_t end)
{
    struct ht_jstring *part;
    HT_TRY(ht_jinja_take(r, &part, sizeof *part));
    *part =
        (struct ht_jstring){ s->p + start, end - start, s->mask ? s->mask + start : NULL, s->user };
    *out = (struct ht_jv){ .kind = HT_JV_STRING, .s = part };
    return HT_OK;
}

enum ht_status ht_jv_list(struct ht_jrun *r, struct ht_jv *out, size_t capacity, bool tuple)
{
    struct ht_jlist *l;
    HT_TRY(ht_jinja_take(r, &l, sizeof *l));
    if (capacity) HT_TRY(ht_jinja_take(r, &l->items, capacity * sizeof *l->items));
    l->capacity = capacity;
    l->tuple = tuple;
    *out = (struct ht_jv){ .kind = HT_JV_LIST, .list = l };
    return HT_OK;
}

enum ht_status ht_jlist_add(struct ht_jrun *r, struct ht_jlist *l, struct ht_jv v)
{
    if (l->n == l->capacity) {
        const size_t capacity = l->capacity ? 2 * l->capacity : 8;
        struct ht_jv *grown;
        HT_TRY(ht_jinja_charge(r, 1 + capacity / 64));
        HT_TRY(ht_jinja_take(r, &grown, capacity * sizeof *grown));
        if (l->n) memcpy(grown, l->items, l->n * sizeof *grown);
        l->items = grown;
        l->capacity = capacity;
    }
    l->items[l->n++] = v;
    return HT_OK;
}

enum ht_status ht_jv_dict(struct ht_jrun *r, struct ht_jv *out, size_t capacity)
{
    struct ht_jdict *d;
    HT_TRY(ht_jinja_take(r, &d, sizeof *d));
    if (capacity) {
        HT_TRY(ht_jinja_take(r, &d->keys, capacity * sizeof *d->keys));
        HT_TRY(ht_jinja_take(r, &d->values, capacity * sizeof *d->values));
    }
    d->capacity = capacity;
    *out = (struct ht_jv){ .kind = HT_JV_DICT, .dict = d };
    return HT_OK;
}

static enum ht_status dict_add(struct ht_jrun *r, struct ht_jdict *d, struct ht_jv key,
                               struct ht_jv v)
{
    if (d->n == d->capacity) {
        const size_t capacity = d->capacity ? 2 * d->capacity : 8;
        struct ht_jv *keys, *values;
        HT_TRY(ht_jinja_take(r, &keys, capacity * sizeof *keys));
        HT_TRY(ht_jinja_take(r, &values, capacity * sizeof *values));
        if (d->n) memcpy(keys, d->keys, d->n * sizeof *keys);
        if (d->n) memcpy(values, d->values, d->n * sizeof *values);
        d->keys = keys;
        d->values = values;
        d->capacity = capacity;
    }
    d->keys[d->n] = key;
    d->values[d->n++] = v;
    return HT_OK;
}

enum ht_status ht_jdict_find(struct ht_jrun *r, const struct ht_jdict *d, struct ht_jv key,
                             struct ht_jv **out)
{
    *out = NULL;
    HT_TRY(ht_jinja_charge(r, d->n / 16));
    if (key.kind == HT_JV_LIST && !key.list->tuple) return HT_JFAIL(r, "a list cannot be a key");
    if (key.kind == HT_JV_DICT) return HT_JFAIL(r, "a mapping cannot be a key");
    for (size_t i = 0; i < d->n; i++) {
        const struct ht_jv k = d->keys[i];
        bool same;
        if (k.kind == HT_JV_STRING && key.kind == HT_JV_STRING)
            same = k.s->n == key.s->n && memcmp(k.s->p, key.s->p, k.s->n) == 0;
        else
            HT_TRY(ht_jv_equal(r, k, key, &same));
        if (!same) continue;
        *out = &d->values[i];
        return HT_OK;
    }
    return HT_OK;
}

struct ht_jv *ht_jdict_get(const struct ht_jdict *d, const char *key)
{
    for (size_t i = 0; i < d->n; i++)
        if (d->keys[i].kind == HT_JV_STRING && ht_jstring_is(d->keys[i].s, key))
            return &d->values[i];
    return NULL;
}

enum ht_status ht_jdict_set(struct ht_jrun *r, struct ht_jdict *d, struct ht_jv key, struct ht_jv v)
{
    struct ht_jv *there;
    HT_TRY(ht_jdict_find(r, d, key, &there));
    if (!there) return dict_add(r, d, key, v);
    *there = v;
    return HT_OK;
}

static bool is_number(struct ht_jv v)
{
    return v.kind == HT_JV_BOOL || v.kind == HT_JV_INT || v.kind == HT_JV_FLOAT;
}
static double as_double(struct ht_jv v)
{
    return v.kind == HT_JV_BOOL ? v.b : v.kind == HT_JV_INT ? (double)v.i : v.f;
}
static int64_t as_int(struct ht_jv v)
{
    return v.kind == HT_JV_BOOL ? v.b : v.i;
}

enum ht_status ht_jv_equal(struct ht_jrun *r, struct ht_jv a, struct ht_jv b, bool *out)
{
    *out = false;
    HT_TRY(ht_jinja_charge(r, 1));
    if (is_number(a) && is_number(b)) {
        *out = a.kind == HT_JV_FLOAT || b.kind == HT_JV_FLOAT ? as_double(a) == as_double(b)
                                                              : as_int(a) == as_int(b);
        return HT_OK;
    }
    if (a.kind != b.kind) return HT_OK;
    switch (a.kind) {
    case HT_JV_STRING:
        HT_TRY(ht_jinja_charge(r, a.s->n >> 10));
        *out = a.s->n == b.s->n && (a.s->n == 0 || memcmp(a.s->p, b.s->p, a.s->n) == 0);
        return HT_OK;
    case HT_JV_LIST:
        if (a.list->n != b.list->n || a.list->tuple != b.list->tuple) return HT_OK;
        HT_TRY(ht_jinja_enter(r));
        *out = true;
        for (size_t i = 0; i < a.list->n && *out; i++)
            HT_TRY(ht_jv_equal(r, a.list->items[i], b.list->items[i], out));
        r->depth--;
        return HT_OK;
    case HT_JV_DICT:
        if (a.dict->n != b.dict->n) return HT_OK;
        HT_TRY(ht_jinja_enter(r));
        *out = true;
        for (size_t i = 0; i < a.dict->n && *out; i++) {
            struct ht_jv *other;
            HT_TRY(ht_jdict_find(r, b.dict, a.dict->keys[i], &other));
            *out = other != NULL;
            if (other) HT_TRY(ht_jv_equal(r, a.dict->values[i], *other, out));
        }
        r->depth--;
        return HT_OK;
    case HT_JV_UNDEFINED:
    case HT_JV_NONE: *out = true; return HT_OK;
    case HT_JV_NAMESPACE: *out = a.dict == b.dict; return HT_OK;
    case HT_JV_FUNCTION: *out = a.function == b.function; return HT_OK;
    default: return HT_OK;
    }
}

enum ht_status ht_jv_order(struct ht_jrun *r, struct ht_jv a, struct ht_jv b, int *out)
{
    HT_TRY(ht_jinja_charge(r, 1));
    if (is_number(a) && is_number(b)) {
        if (a.kind == HT_JV_FLOAT || b.kind == HT_JV_FLOAT) {
            const double x = as_double(a), y = as_double(b);
            *out = (x > y) - (x < y);
        } else {
            *out = (as_int(a) > as_int(b)) - (as_int(a) < as_int(b));
        }
        return HT_OK;
    }
    if (a.kind == HT_JV_STRING && b.kind == HT_JV_STRING) { // UTF-8 sorts as its code points do
        const size_t n = a.s->n < b.s->n ? a.s->n : b.s->n;
        HT_TRY(ht_jinja_charge(r, n >> 10));
        const int c = n ? memcmp(a.s->p, b.s->p, n) : 0;
        *out = c ? c : (a.s->n > b.s->n) - (a.s->n < b.s->n);
        return HT_OK;
    }
    if (a.kind == HT_JV_LIST && b.kind == HT_JV_LIST) {
        HT_TRY(ht_jinja_enter(r));
        *out = 0;
        for (size_t i = 0; i < a.list->n && i < b.list->n && *out == 0; i++)
            HT_TRY(ht_jv_order(r, a.list->items[i], b.list->items[i], out));
        r->depth--;
        if (*out == 0) *out = (a.list->n > b.list->n) - (a.list->n < b.list->n);
        return HT_OK;
    }
    return HT_JFAIL(r, "%s and %s have no order", ht_jv_kind_name(a), ht_jv_kind_name(b));
}

enum ht_status ht_jv_contains(struct ht_jrun *r, struct ht_jv inside, struct ht_jv v, bool *out)
{
    struct ht_jv *found;
    *out = false;
    switch (inside.kind) {
    case HT_JV_STRING:
        if (v.kind != HT_JV_STRING)
            return HT_JFAIL(r, "'in' a string needs a string, not %s", ht_jv_kind_name(v));
        HT_TRY(ht_jinja_charge(r, 1 + (inside.s->n >> 10)));
        *out = v.s->n == 0 ||
               (v.s->n <= inside.s->n && memmem(inside.s->p, inside.s->n, v.s->p, v.s->n));
        return HT_OK;
    case HT_JV_LIST:
        for (size_t i = 0; i < inside.list->n && !*out; i++)
            HT_TRY(ht_jv_equal(r, inside.list->items[i], v, out));
        return HT_OK;
    case HT_JV_DICT:
        HT_TRY(ht_jdict_find(r, inside.dict, v, &found));
        *out = found != NULL;
        return HT_OK;
    case HT_JV_UNDEFINED: return HT_OK; // iterates as an empty list
    default:
        return HT_JFAIL(r, "'in' needs a string, a list or a mapping, not %s",
                        ht_jv_kind_name(inside));
    }
}

enum ht_status ht_jv_iterate(struct ht_jrun *r, struct ht_jv v, struct ht_jlist **out)
{
    struct ht_jv list;
    if (v.kind == HT_JV_LIST) {
        *out = v.list;
        return HT_OK;
    }
    HT_TRY(ht_jv_list(r, &list, v.kind == HT_JV_DICT ? v.dict->n : 0, false));
    *out = list.list;
    if (v.kind == HT_JV_DICT) {
        HT_TRY(ht_jinja_charge(r, v.dict->n / 16));
        for (size_t i = 0; i < v.dict->n; i++) HT_TRY(ht_jlist_add(r, *out, v.dict->keys[i]));
    } else if (v.kind == HT_JV_STRING) {
        for (size_t i = 0, k; i < v.s->n; i += k) {
            struct ht_jv c;
            int32_t code;
            HT_TRY(ht_jinja_charge(r, 1));
            k = ht_utf8_get(v.s->p + i, v.s->n - i, &code);
            HT_TRY(ht_jv_part(r, &c, v.s, i, i + k));
            HT_TRY(ht_jlist_add(r, *out, c));
        }
    } else if (v.kind != HT_JV_UNDEFINED) {
        return HT_JFAIL(r, "%s is nothing to loop over", ht_jv_kind_name(v));
    }
    return HT_OK;
}

enum ht_status ht_jv_length(struct ht_jrun *r, struct ht_jv v, int64_t *out)
{
    switch (v.kind) {
    case HT_JV_STRING:
        HT_TRY(ht_jinja_charge(r, v.s->n >> 12));
        *out = (int64_t)ht_utf8_count(v.s->p, v.s->n);
        return HT_OK;
    case HT_JV_LIST: *out = (int64_t)v.list->n; return HT_OK;
    case HT_JV_DICT: *out = (int64_t)v.dict->n; return HT_OK;
    case HT_JV_LOOP: *out = (int64_t)v.loop->items->n; return HT_OK;
    case HT_JV_UNDEFINED: *out = 0; return HT_OK;
    default: return HT_JFAIL(r, "%s has no length", ht_jv_kind_name(v));
    }
}

static enum ht_status json_text(struct ht_jrun *r, struct ht_jv *out, const char *p, size_t n,
                                bool user)
{
    struct ht_jstring *s;
    HT_TRY(ht_jinja_take(r, &s, sizeof *s));
    *s = (struct ht_jstring){ .p = p, .n = n, .user = user };
    *out = (struct ht_jv){ .kind = HT_JV_STRING, .s = s };
    return HT_OK;
}

static bool is_trusted_key(const struct ht_jinja_var *var, const char *key)
{
    for (const char *const *k = var->trusted_keys; k && *k; k++)
        if (strcmp(*k, key) == 0) return true;
    return false;
}

enum ht_status ht_jv_from_json(struct ht_jrun *r, struct ht_jv *out, const json_t *j,
                               const struct ht_jinja_var *var, bool user)
{
    struct ht_jv v, key;
    switch (json_typeof(j)) {
    case JSON_NULL: *out = ht_jv_none(); return HT_OK;
    case JSON_TRUE: *out = ht_jv_bool(true); return HT_OK;
    case JSON_FALSE: *out = ht_jv_bool(false); return HT_OK;
    case JSON_INTEGER: *out = ht_jv_int(json_integer_value(j)); return HT_OK;
    case JSON_REAL: *out = ht_jv_float(json_real_value(j)); return HT_OK;
    case JSON_STRING: return json_text(r, out, json_string_value(j), json_string_length(j), user);
    case JSON_ARRAY:
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(ht_jv_list(r, out, json_array_size(j), false));
        for (size_t i = 0; i < json_array_size(j); i++) {
            HT_TRY(ht_jv_from_json(r, &v, json_array_get(j, i), var, user));
            HT_TRY(ht_jlist_add(r, out->list, v));
        }
        r->depth--;
        return HT_OK;
    case JSON_OBJECT:
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(ht_jv_dict(r, out, json_object_size(j)));
        for (void *it = json_object_iter((json_t *)(uintptr_t)j); it;
             it = json_object_iter_next((json_t *)(uintptr_t)j, it)) {
            const char *k = json_object_iter_key(it);
            const json_t *inner = json_object_iter_value(it);
            const bool trusted = json_is_string(inner) && is_trusted_key(var, k);
            HT_TRY(json_text(r, &key, k, strlen(k), user));
            HT_TRY(ht_jv_from_json(r, &v, inner, var, user && !trusted));
            HT_TRY(dict_add(r, out->dict, key, v));
        }
        r->depth--;
        return HT_OK;
    }
    return HT_JFAIL(r, "a JSON value of unknown type");
}
