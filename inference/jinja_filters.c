/* inference/jinja_filters.c: what follows "|". */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_impl.h"

enum filter {
    F_TRIM,
    F_LENGTH,
    F_COUNT,
    F_TOJSON,
    F_UPPER,
    F_LOWER,
    F_TITLE,
    F_CAPITALIZE,
    F_DEFAULT,
    F_D,
    F_JOIN,
    F_FIRST,
    F_LAST,
    F_LIST,
    F_SELECTATTR,
    F_REJECTATTR,
    F_SELECT,
    F_REJECT,
    F_MAP,
    F_ITEMS,
    F_DICTSORT,
    F_REPLACE,
    F_STRING,
    F_INT,
    F_FLOAT,
    F_ROUND,
    F_ABS,
    F_SORT,
    F_UNIQUE,
    F_REVERSE,
    F_SUM,
    F_MIN,
    F_MAX,
    F_SAFE,
    F_INDENT,
    F_ATTR,
    F_END
};
static const char *const names[F_END] = {
    "trim",    "length", "count",  "tojson", "upper",    "lower",   "title",      "capitalize",
    "default", "d",      "join",   "first",  "last",     "list",    "selectattr", "rejectattr",
    "select",  "reject", "map",    "items",  "dictsort", "replace", "string",     "int",
    "float",   "round",  "abs",    "sort",   "unique",   "reverse", "sum",        "min",
    "max",     "safe",   "indent", "attr"
};

static int find(const struct ht_jstring *name)
{
    for (int i = 0; i < F_END; i++)
        if (ht_jstring_is(name, names[i])) return i;
    return -1;
}

bool ht_jinja_has_filter(const struct ht_jstring *name)
{
    return find(name) >= 0;
}

static enum ht_status as_text(struct ht_jrun *r, struct ht_jv v, const struct ht_jstring **out)
{
    struct ht_jv s;
    HT_TRY(ht_jv_to_string(r, v, &s));
    *out = s.s;
    return HT_OK;
}

static const struct ht_jargs no_arguments;

/* "a.b.0" of an item, as in map(attribute="a.b"). */
static enum ht_status attribute_of(struct ht_jrun *r, struct ht_jv v, const struct ht_jstring *path,
                                   struct ht_jv *out)
{
    *out = v;
    for (size_t at = 0; at <= path->n;) {
        const char *dot = at < path->n ? memchr(path->p + at, '.', path->n - at) : NULL;
        const size_t end = dot ? (size_t)(dot - path->p) : path->n;
        struct ht_jv part;
        bool number = end > at && end - at < 10;
        int64_t index = 0;
        for (size_t i = at; i < end; i++) {
            number = number && path->p[i] >= '0' && path->p[i] <= '9';
            index = index * 10 % 10000000000 + path->p[i] - '0';
        }
        HT_TRY(ht_jv_part(r, &part, path, at, end));
        HT_TRY(ht_jinja_item(r, *out, number ? ht_jv_int(index) : part, out));
        at = end + 1;
    }
    return HT_OK;
}

/* select, reject, selectattr, rejectattr */
static enum ht_status choose(struct ht_jrun *r, enum filter f, struct ht_jv v,
                             const struct ht_jargs *a, struct ht_jv *out)
{
    const bool by_attribute = f == F_SELECTATTR || f == F_REJECTATTR,
               reject = f == F_REJECT || f == F_REJECTATTR;
    const struct ht_jstring *path = NULL, *test;
    const size_t skip = by_attribute;
    struct ht_jlist *l;
    if (by_attribute) {
        HT_TRY(ht_jargs_string(r, a, 0, NULL, &path));
        if (!path) return HT_JFAIL(r, "%s needs an attribute's name", names[f]);
    }
    HT_TRY(ht_jargs_string(r, a, skip, NULL, &test));
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jv_list(r, out, 0, false));
    for (size_t i = 0; i < l->n; i++) {
        struct ht_jv x = l->items[i];
        bool yes;
        HT_TRY(ht_jinja_charge(r, 1));
        if (path) HT_TRY(attribute_of(r, x, path, &x));
        if (test) {
            const struct ht_jargs rest = { .positional = a->positional + skip + 1,
                                           .n = a->n - skip - 1 };
            HT_TRY(ht_jinja_test(r, test, x, &rest, &yes));
        } else {
            yes = ht_jv_truth(x);
        }
        if (yes != reject) HT_TRY(ht_jlist_add(r, out->list, l->items[i]));
    }
    return HT_OK;
}

static enum ht_status map(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                          struct ht_jv *out)
{
    const struct ht_jv *attribute = a->n ? NULL : ht_jargs_get(a, 0, "attribute");
    const struct ht_jv *fallback = a->n ? NULL : ht_jargs_get(a, 1, "default");
    const struct ht_jstring *filter = NULL, *path = NULL;
    struct ht_jlist *l;
    if (attribute) {
        HT_TRY(as_text(r, *attribute, &path));
    } else {
        HT_TRY(ht_jargs_string(r, a, 0, NULL, &filter));
        if (!filter || !ht_jinja_has_filter(filter))
            return HT_JFAIL(r, "map needs a filter's name or attribute=");
    }
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jv_list(r, out, l->n, false));
    for (size_t i = 0; i < l->n; i++) {
        struct ht_jv x;
        HT_TRY(ht_jinja_charge(r, 1));
        if (attribute) {
            HT_TRY(attribute_of(r, l->items[i], path, &x));
            if (x.kind == HT_JV_UNDEFINED && fallback) x = *fallback;
        } else {
            struct ht_jargs rest = *a;
            rest.positional++;
            rest.n--;
            HT_TRY(ht_jinja_filter(r, filter, l->items[i], &rest, &x));
        }
        HT_TRY(ht_jlist_add(r, out->list, x));
    }
    return HT_OK;
}

struct sort_item {
    struct ht_jv key, value;
};

/* Merge sort: stable, and an order that fails stops it. */
static enum ht_status merge_sort(struct ht_jrun *r, struct sort_item *x, struct sort_item *spare,
                                 size_t n, int sign)
{
    if (n < 2) return HT_OK;
    const size_t half = n / 2;
    HT_TRY(merge_sort(r, x, spare, half, sign));
    HT_TRY(merge_sort(r, x + half, spare, n - half, sign));
    memcpy(spare, x, n * sizeof *x);
    for (size_t i = 0, j = half, k = 0; k < n; k++) {
        int order = 0;
        if (i < half && j < n) HT_TRY(ht_jv_order(r, spare[i].key, spare[j].key, &order));
        x[k] = j >= n || (i < half && order * sign <= 0) ? spare[i++] : spare[j++];
    }
    return HT_OK;
}

static enum ht_status fold_case(struct ht_jrun *r, bool sensitive, struct ht_jv *v)
{
    return sensitive || v->kind != HT_JV_STRING ? HT_OK : ht_jinja_case(r, v->s, HT_JCASE_LOWER, v);
}

static enum ht_status sort(struct ht_jrun *r, struct ht_jv v, bool reverse, bool sensitive,
                           const struct ht_jstring *attribute, int64_t part, struct ht_jv *out)
{
    struct sort_item *x, *spare;
    struct ht_jlist *l;
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jinja_take(r, &x, (l->n + 1) * sizeof *x));
    HT_TRY(ht_jinja_take(r, &spare, (l->n + 1) * sizeof *spare));
    for (size_t i = 0; i < l->n; i++) {
        x[i] = (struct sort_item){ l->items[i], l->items[i] };
        if (attribute) HT_TRY(attribute_of(r, x[i].value, attribute, &x[i].key));
        if (part >= 0) x[i].key = x[i].value.list->items[part];
        HT_TRY(fold_case(r, sensitive, &x[i].key));
    }
    HT_TRY(merge_sort(r, x, spare, l->n, reverse ? -1 : 1));
    HT_TRY(ht_jv_list(r, out, l->n, false));
    for (size_t i = 0; i < l->n; i++) HT_TRY(ht_jlist_add(r, out->list, x[i].value));
    return HT_OK;
}

static bool flag(const struct ht_jargs *a, size_t i, const char *name, bool otherwise)
{
    const struct ht_jv *v = ht_jargs_get(a, i, name);
    return v ? ht_jv_truth(*v) : otherwise;
}

static enum ht_status unique(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                             struct ht_jv *out)
{
    const bool sensitive = flag(a, 0, "case_sensitive", false);
    const struct ht_jstring *path;
    struct ht_jv seen;
    struct ht_jlist *l;
    bool there;
    HT_TRY(ht_jargs_string(r, a, 1, "attribute", &path));
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jv_list(r, &seen, 0, false));
    HT_TRY(ht_jv_list(r, out, 0, false));
    for (size_t i = 0; i < l->n; i++) {
        struct ht_jv key = l->items[i];
        if (path) HT_TRY(attribute_of(r, key, path, &key));
        HT_TRY(fold_case(r, sensitive, &key));
        HT_TRY(ht_jv_contains(r, seen, key, &there));
        if (there) continue;
        HT_TRY(ht_jlist_add(r, seen.list, key));
        HT_TRY(ht_jlist_add(r, out->list, l->items[i]));
    }
    return HT_OK;
}

static enum ht_status tojson(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                             struct ht_jv *out)
{
    static const struct ht_jstring comma = { ", ", 2, NULL, false },
                                   tight = { ",", 1, NULL, false },
                                   colon = { ": ", 2, NULL, false };
    const struct ht_jv *separators = ht_jargs_get(a, 2, "separators");
    struct ht_jbuffer b = { 0 };
    int64_t indent = -1;
    // positional order of transformers' filter: ensure_ascii, indent, separators, sort_keys
    HT_TRY(ht_jargs_int(r, a, 1, "indent", &indent));
    if (indent > 64) return HT_JFAIL(r, "tojson: an indent of %lld", (long long)indent);
    struct ht_jjson o = { .ascii = flag(a, 0, "ensure_ascii", false),
                          .sort_keys = flag(a, 3, "sort_keys", false),
                          .indent = (int)indent,
                          .item = indent >= 0 ? &tight : &comma,
                          .key = &colon };
    if (separators && separators->kind != HT_JV_NONE) {
        if (separators->kind != HT_JV_LIST || separators->list->n != 2 ||
            separators->list->items[0].kind != HT_JV_STRING ||
            separators->list->items[1].kind != HT_JV_STRING)
            return HT_JFAIL(r, "tojson: separators must be two strings");
        o.item = separators->list->items[0].s;
        o.key = separators->list->items[1].s;
    }
    HT_TRY(ht_jbuffer_json(r, &b, v, &o, 0));
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status join(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                           struct ht_jv *out)
{
    const struct ht_jstring *sep, *path;
    struct ht_jbuffer b = { 0 };
    struct ht_jlist *l;
    HT_TRY(ht_jargs_string(r, a, 0, "d", &sep));
    HT_TRY(ht_jargs_string(r, a, 1, "attribute", &path));
    HT_TRY(ht_jv_iterate(r, v, &l));
    for (size_t i = 0; i < l->n; i++) {
        struct ht_jv x = l->items[i];
        HT_TRY(ht_jinja_charge(r, 1));
        if (path) HT_TRY(attribute_of(r, x, path, &x));
        if (i && sep) HT_TRY(ht_jbuffer_add_string(r, &b, sep));
        HT_TRY(ht_jbuffer_print(r, &b, x));
    }
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status to_number(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                                bool real, struct ht_jv *out)
{
    const struct ht_jv *fallback = ht_jargs_get(a, 0, "default");
    char text[64], *end;
    *out = fallback ? *fallback : real ? ht_jv_float(0) : ht_jv_int(0);
    if (v.kind == HT_JV_BOOL) v = ht_jv_int(v.b);
    if (v.kind == HT_JV_FLOAT && !real) {
        if (v.f > -9.2e18 && v.f < 9.2e18) *out = ht_jv_int((int64_t)v.f);
        return HT_OK;
    }
    if (v.kind == HT_JV_INT || v.kind == HT_JV_FLOAT) {
        *out = real && v.kind == HT_JV_INT ? ht_jv_float((double)v.i) : v;
        return HT_OK;
    }
    if (v.kind != HT_JV_STRING) return HT_OK;
    HT_TRY(ht_jinja_strip(r, v.s, NULL, true, true, &v));
    if (v.s->n == 0 || v.s->n >= sizeof text) return HT_OK;
    memcpy(text, v.s->p, v.s->n);
    text[v.s->n] = '\0';
    if (strpbrk(text, "xXpPnN")) return HT_OK; // hexadecimal, nan, inf
    errno = 0;
    const long long whole = strtoll(text, &end, 10);
    if (!real && !*end && errno == 0) {
        *out = ht_jv_int(whole);
        return HT_OK;
    }
    const double f = strtod(text, &end);
    if (*end || !isfinite(f)) return HT_OK;
    if (real)
        *out = ht_jv_float(f);
    else if (f > -9.2e18 && f < 9.2e18)
        *out = ht_jv_int((int64_t)f);
    return HT_OK;
}

static enum ht_status round_number(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                                   struct ht_jv *out)
{
    const struct ht_jstring *method;
    int64_t precision = 0;
    HT_TRY(ht_jargs_int(r, a, 0, "precision", &precision));
    HT_TRY(ht_jargs_string(r, a, 1, "method", &method));
    if (v.kind == HT_JV_BOOL) v = ht_jv_int(v.b);
    if (v.kind != HT_JV_INT && v.kind != HT_JV_FLOAT)
        return HT_JFAIL(r, "round: %s is no number", ht_jv_kind_name(v));
    if (precision < 0 || precision > 15)
        return HT_JFAIL(r, "round: a precision of %lld", (long long)precision);
    if (v.kind == HT_JV_INT && (!method || ht_jstring_is(method, "common"))) {
        *out = v; // as Python's round of an int does
        return HT_OK;
    }
    const double f = v.kind == HT_JV_INT ? (double)v.i : v.f, scale = pow(10.0, (double)precision);
    if (!method || ht_jstring_is(method, "common"))
        *out = ht_jv_float(rint(f * scale) / scale);
    else if (ht_jstring_is(method, "ceil"))
        *out = ht_jv_float(ceil(f * scale) / scale);
    else if (ht_jstring_is(method, "floor"))
        *out = ht_jv_float(floor(f * scale) / scale);
    else
        return HT_JFAIL(r, "round: the method is common, ceil or floor");
    return HT_OK;
}

static enum ht_status extreme(struct ht_jrun *r, struct ht_jv v, int sign, struct ht_jv *out)
{
    struct ht_jlist *l;
    int order;
    HT_TRY(ht_jv_iterate(r, v, &l));
    *out = (struct ht_jv){ .kind = HT_JV_UNDEFINED };
    for (size_t i = 0; i < l->n; i++) {
        order = 1;
        if (i) HT_TRY(ht_jv_order(r, l->items[i], *out, &order));
        if (i == 0 || order * sign > 0) *out = l->items[i];
    }
    return HT_OK;
}

static enum ht_status sum(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                          struct ht_jv *out)
{
    const struct ht_jv *start = ht_jargs_get(a, 1, "start");
    const struct ht_jstring *path;
    struct ht_jlist *l;
    HT_TRY(ht_jargs_string(r, a, 0, "attribute", &path));
    HT_TRY(ht_jv_iterate(r, v, &l));
    *out = start ? *start : ht_jv_int(0);
    for (size_t i = 0; i < l->n; i++) {
        struct ht_jv x = l->items[i];
        if (path) HT_TRY(attribute_of(r, x, path, &x));
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jinja_binary(r, '+', *out, x, out));
    }
    return HT_OK;
}

static enum ht_status indent(struct ht_jrun *r, struct ht_jv v, const struct ht_jargs *a,
                             struct ht_jv *out)
{
    const bool first = flag(a, 1, "first", false), blank = flag(a, 2, "blank", false);
    const struct ht_jv *by = ht_jargs_get(a, 0, "width");
    struct ht_jbuffer b = { 0 };
    const struct ht_jstring *s;
    struct ht_jstring pad = { "                                                                ", 4,
                              NULL, false };
    if (v.kind != HT_JV_STRING) return HT_JFAIL(r, "indent: %s is no string", ht_jv_kind_name(v));
    s = v.s;
    if (by && by->kind == HT_JV_STRING) {
        pad = *by->s;
    } else if (by) {
        if (by->kind != HT_JV_INT || by->i < 0 || by->i > 64)
            return HT_JFAIL(r, "indent: the width must be from 0 to 64");
        pad.n = (size_t)by->i;
    }
    if (first) HT_TRY(ht_jbuffer_add_string(r, &b, &pad));
    for (size_t at = 0; at < s->n;) {
        const char *end = memchr(s->p + at, '\n', s->n - at);
        const size_t next = end ? (size_t)(end - s->p) + 1 : s->n;
        const struct ht_jstring line = { s->p + at, next - at, s->mask ? s->mask + at : NULL,
                                         s->user };
        HT_TRY(ht_jinja_charge(r, 1));
        if (at > 0 && (blank || s->p[at] != '\n')) HT_TRY(ht_jbuffer_add_string(r, &b, &pad));
        HT_TRY(ht_jbuffer_add_string(r, &b, &line));
        at = next;
    }
    if (blank && s->n && s->p[s->n - 1] == '\n') HT_TRY(ht_jbuffer_add_string(r, &b, &pad));
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status reverse(struct ht_jrun *r, struct ht_jv v, struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    struct ht_jlist *l;
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jv_list(r, out, l->n, false));
    HT_TRY(ht_jinja_charge(r, l->n / 16));
    for (size_t i = l->n; i > 0; i--) HT_TRY(ht_jlist_add(r, out->list, l->items[i - 1]));
    if (v.kind != HT_JV_STRING) return HT_OK;
    for (size_t i = 0; i < out->list->n; i++)
        HT_TRY(ht_jbuffer_add_string(r, &b, out->list->items[i].s));
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status ends(struct ht_jrun *r, struct ht_jv v, bool last, struct ht_jv *out)
{
    *out = (struct ht_jv){ .kind = HT_JV_UNDEFINED };
    if (v.kind == HT_JV_STRING) {
        const size_t n = v.s->n;
        int32_t c;
        size_t at = last && n ? n - 1 : 0;
        if (n == 0) return HT_OK;
        while (at > 0 && ((unsigned char)v.s->p[at] & 0xC0) == 0x80) at--;
        return ht_jv_part(r, out, v.s, at, at + ht_utf8_get(v.s->p + at, n - at, &c));
    }
    struct ht_jlist *l;
    HT_TRY(ht_jv_iterate(r, v, &l));
    if (l->n) *out = l->items[last ? l->n - 1 : 0];
    return HT_OK;
}

static enum ht_status pairs(struct ht_jrun *r, struct ht_jv v, struct ht_jv *out)
{
    if (v.kind == HT_JV_UNDEFINED) return ht_jv_list(r, out, 0, false);
    if (v.kind != HT_JV_DICT) return HT_JFAIL(r, "items: %s is no mapping", ht_jv_kind_name(v));
    static const struct ht_jstring name = { "items", 5, NULL, false };
    return ht_jinja_method(r, ht_jinja_method_id(v, &name), v, &no_arguments, out);
}

static enum ht_status text_filter(struct ht_jrun *r, enum filter f, struct ht_jv v,
                                  const struct ht_jargs *a, struct ht_jv *out)
{
    const struct ht_jstring *s, *x, *y;
    int64_t count = -1;
    HT_TRY(as_text(r, v, &s));
    switch (f) {
    case F_TRIM:
        HT_TRY(ht_jargs_string(r, a, 0, "chars", &x));
        return ht_jinja_strip(r, s, x, true, true, out);
    case F_UPPER: return ht_jinja_case(r, s, HT_JCASE_UPPER, out);
    case F_LOWER: return ht_jinja_case(r, s, HT_JCASE_LOWER, out);
    case F_TITLE: return ht_jinja_case(r, s, HT_JCASE_TITLE, out);
    case F_CAPITALIZE: return ht_jinja_case(r, s, HT_JCASE_CAPITAL, out);
    case F_REPLACE:
        HT_TRY(ht_jargs_string(r, a, 0, "old", &x));
        HT_TRY(ht_jargs_string(r, a, 1, "new", &y));
        HT_TRY(ht_jargs_int(r, a, 2, "count", &count));
        if (!x || !y) return HT_JFAIL(r, "replace needs two strings");
        return ht_jinja_replace(r, s, x, y, count, out);
    default: return ht_jv_part(r, out, s, 0, s->n); // string, safe
    }
}

enum ht_status ht_jinja_filter(struct ht_jrun *r, const struct ht_jstring *name, struct ht_jv v,
                               const struct ht_jargs *a, struct ht_jv *out)
{
    const int f = find(name);
    const struct ht_jstring *s;
    struct ht_jlist *l;
    int64_t n;

    HT_TRY(ht_jinja_charge(r, 1));
    switch (f) {
    case F_LENGTH:
    case F_COUNT:
        HT_TRY(ht_jv_length(r, v, &n));
        *out = ht_jv_int(n);
        return HT_OK;
    case F_TOJSON: return tojson(r, v, a, out);
    case F_DEFAULT:
    case F_D: {
        const struct ht_jv *other = ht_jargs_get(a, 0, "default_value");
        const bool use =
            v.kind == HT_JV_UNDEFINED || (flag(a, 1, "boolean", false) && !ht_jv_truth(v));
        if (!use)
            *out = v;
        else if (other)
            *out = *other;
        else
            return ht_jv_literal(r, out, "", 0);
        return HT_OK;
    }
    case F_JOIN: return join(r, v, a, out);
    case F_FIRST:
    case F_LAST: return ends(r, v, f == F_LAST, out);
    case F_LIST:
        HT_TRY(ht_jv_iterate(r, v, &l));
        HT_TRY(ht_jinja_charge(r, l->n / 16));
        HT_TRY(ht_jv_list(r, out, l->n, false));
        for (size_t i = 0; i < l->n; i++) HT_TRY(ht_jlist_add(r, out->list, l->items[i]));
        return HT_OK;
    case F_SELECTATTR:
    case F_REJECTATTR:
    case F_SELECT:
    case F_REJECT: return choose(r, (enum filter)f, v, a, out);
    case F_MAP: return map(r, v, a, out);
    case F_ITEMS: return pairs(r, v, out);
    case F_DICTSORT: {
        const struct ht_jstring *by;
        HT_TRY(ht_jargs_string(r, a, 1, "by", &by));
        if (v.kind != HT_JV_DICT)
            return HT_JFAIL(r, "dictsort: %s is no mapping", ht_jv_kind_name(v));
        HT_TRY(pairs(r, v, &v));
        return sort(r, v, flag(a, 2, "reverse", false), flag(a, 0, "case_sensitive", false), NULL,
                    by && ht_jstring_is(by, "value"), out);
    }
    case F_INT:
    case F_FLOAT: return to_number(r, v, a, f == F_FLOAT, out);
    case F_ROUND: return round_number(r, v, a, out);
    case F_ABS:
        if (v.kind == HT_JV_FLOAT)
            *out = ht_jv_float(fabs(v.f));
        else if (v.kind == HT_JV_INT && v.i != INT64_MIN)
            *out = ht_jv_int(v.i < 0 ? -v.i : v.i);
        else
            return HT_JFAIL(r, "abs: %s", ht_jv_kind_name(v));
        return HT_OK;
    case F_SORT:
        HT_TRY(ht_jargs_string(r, a, 2, "attribute", &s));
        return sort(r, v, flag(a, 0, "reverse", false), flag(a, 1, "case_sensitive", false), s, -1,
                    out);
    case F_UNIQUE: return unique(r, v, a, out);
    case F_REVERSE: return reverse(r, v, out);
    case F_SUM: return sum(r, v, a, out);
    case F_MIN:
    case F_MAX: return extreme(r, v, f == F_MAX ? 1 : -1, out);
    case F_INDENT: return indent(r, v, a, out);
    case F_ATTR:
        HT_TRY(ht_jargs_string(r, a, 0, "name", &s));
        if (!s) return HT_JFAIL(r, "attr needs a name");
        return ht_jinja_attribute(r, v, s, out);
    case -1: return HT_JFAIL(r, "no filter is called '%.*s'", (int)name->n, name->p);
    default: return text_filter(r, (enum filter)f, v, a, out);
    }
}
