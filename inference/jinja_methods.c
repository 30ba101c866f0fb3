/* inference/jinja_methods.c: methods of strings, mappings and lists, and the global functions. */
#include <stdio.h>
#include <string.h>
#include <utf8proc.h>

#include "inference/jinja_impl.h"

struct ht_jv *ht_jargs_get(const struct ht_jargs *a, size_t i, const char *name)
{
    if (i < a->n) return &a->positional[i];
    for (size_t k = 0; name && k < a->n_named; k++)
        if (ht_jstring_is(a->names[k], name)) return &a->named[k];
    return NULL;
}

enum ht_status ht_jargs_string(struct ht_jrun *r, const struct ht_jargs *a, size_t i,
                               const char *name, const struct ht_jstring **out)
{
    const struct ht_jv *v = ht_jargs_get(a, i, name);
    *out = NULL;
    if (!v || v->kind == HT_JV_NONE) return HT_OK;
    if (v->kind != HT_JV_STRING)
        return HT_JFAIL(r, "a string is needed, not %s", ht_jv_kind_name(*v));
    *out = v->s;
    return HT_OK;
}

enum ht_status ht_jargs_int(struct ht_jrun *r, const struct ht_jargs *a, size_t i, const char *name,
                            int64_t *out)
{
    const struct ht_jv *v = ht_jargs_get(a, i, name);
    if (!v || v->kind == HT_JV_NONE) return HT_OK;
    if (v->kind != HT_JV_INT && v->kind != HT_JV_BOOL)
        return HT_JFAIL(r, "an integer is needed, not %s", ht_jv_kind_name(*v));
    *out = v->kind == HT_JV_INT ? v->i : v->b;
    return HT_OK;
}

static enum ht_status need_string(struct ht_jrun *r, const struct ht_jargs *a, size_t i,
                                  const struct ht_jstring **out)
{
    HT_TRY(ht_jargs_string(r, a, i, NULL, out));
    return *out ? HT_OK : HT_JFAIL(r, "a string is missing as argument %zu", i + 1);
}

static bool is_among(int32_t c, const struct ht_jstring *chars)
{
    if (!chars) return ht_utf8_is_space(c);
    for (size_t i = 0; i < chars->n;) {
        int32_t d;
        i += ht_utf8_get(chars->p + i, chars->n - i, &d);
        if (c == d) return true;
    }
    return false;
}

enum ht_status ht_jinja_strip(struct ht_jrun *r, const struct ht_jstring *s,
                              const struct ht_jstring *chars, bool left, bool right,
                              struct ht_jv *out)
{
    size_t start = 0, end = s->n;
    int32_t c;
    HT_TRY(ht_jinja_charge(r, (s->n >> 10) * (chars ? 1 + chars->n : 1)));
    while (left && start < end) {
        const size_t k = ht_utf8_get(s->p + start, end - start, &c);
        if (!is_among(c, chars)) break;
        start += k;
    }
    while (right && end > start) {
        size_t k = end - 1;
        while (k > start && ((unsigned char)s->p[k] & 0xC0) == 0x80) k--;
        ht_utf8_get(s->p + k, end - k, &c);
        if (!is_among(c, chars)) break;
        end = k;
    }
    return ht_jv_part(r, out, s, start, end);
}

enum ht_status ht_jinja_replace(struct ht_jrun *r, const struct ht_jstring *s,
                                const struct ht_jstring *from, const struct ht_jstring *to,
                                int64_t count, struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    size_t at = 0;
    HT_TRY(ht_jinja_charge(r, s->n >> 10));
    while (count != 0 && at <= s->n) {
        size_t hit = at, next = at;
        if (from->n) {
            const char *p = at < s->n ? memmem(s->p + at, s->n - at, from->p, from->n) : NULL;
            if (!p) break;
            hit = (size_t)(p - s->p);
            next = hit + from->n;
        } else if (at < s->n) { // between all characters
            int32_t c;
            next = at + ht_utf8_get(s->p + at, s->n - at, &c);
        }
        struct ht_jstring part = { s->p + at, hit - at, s->mask ? s->mask + at : NULL, s->user };
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jbuffer_add_string(r, &b, &part));
        HT_TRY(ht_jbuffer_add_string(r, &b, to));
        if (!from->n) {
            part =
                (struct ht_jstring){ s->p + at, next - at, s->mask ? s->mask + at : NULL, s->user };
            HT_TRY(ht_jbuffer_add_string(r, &b, &part));
            if (at == s->n) return ht_jbuffer_string(r, &b, out);
        }
        at = next;
        count--;
    }
    const struct ht_jstring rest = { s->p + at, s->n - at, s->mask ? s->mask + at : NULL, s->user };
    HT_TRY(ht_jbuffer_add_string(r, &b, &rest));
    return ht_jbuffer_string(r, &b, out);
}

enum ht_status ht_jinja_case(struct ht_jrun *r, const struct ht_jstring *s, enum ht_jcase how,
                             struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    bool inside = false;
    HT_TRY(ht_jinja_charge(r, s->n >> 8));
    for (size_t i = 0, k; i < s->n; i += k) {
        int32_t c;
        char text[4];
        k = ht_utf8_get(s->p + i, s->n - i, &c);
        const bool up = how == HT_JCASE_UPPER || (how == HT_JCASE_TITLE && !inside) ||
                        (how == HT_JCASE_CAPITAL && i == 0);
        const utf8proc_category_t category = utf8proc_category(c);
        inside = category == UTF8PROC_CATEGORY_LU || category == UTF8PROC_CATEGORY_LL ||
                 category == UTF8PROC_CATEGORY_LT;
        const int32_t d = up ? utf8proc_toupper(c) : utf8proc_tolower(c);
        HT_TRY(ht_jbuffer_add(r, &b, text, ht_utf8_put(text, d), s->mask ? s->mask[i] : s->user));
    }
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status split(struct ht_jrun *r, const struct ht_jstring *s, const struct ht_jargs *a,
                            bool from_right, struct ht_jv *out)
{
    const struct ht_jstring *sep;
    int64_t most = -1;
    struct ht_jv part;
    size_t at = 0, end = s->n;
    int32_t c;

    HT_TRY(ht_jargs_string(r, a, 0, "sep", &sep));
    HT_TRY(ht_jargs_int(r, a, 1, "maxsplit", &most));
    if (sep && sep->n == 0) return HT_JFAIL(r, "split: the separator is empty");
    HT_TRY(ht_jv_list(r, out, 0, false));
    HT_TRY(ht_jinja_charge(r, s->n >> 10));
    if (!sep) {
        if (from_right && most >= 0) return HT_JFAIL(r, "rsplit with a maximum needs a separator");
        for (;;) {
            size_t k;
            for (; at < end; at += k) {
                k = ht_utf8_get(s->p + at, end - at, &c);
                if (!ht_utf8_is_space(c)) break;
            }
            if (at == end) return HT_OK;
            const size_t start = at;
            if (most == 0) {
                HT_TRY(ht_jv_part(r, &part, s, start, end));
                return ht_jlist_add(r, out->list, part);
            }
            for (; at < end; at += k) {
                k = ht_utf8_get(s->p + at, end - at, &c);
                if (ht_utf8_is_space(c)) break;
            }
            most--;
            HT_TRY(ht_jinja_charge(r, 1));
            HT_TRY(ht_jv_part(r, &part, s, start, at));
            HT_TRY(ht_jlist_add(r, out->list, part));
        }
    }
    if (from_right && most >= 0) {
        size_t i = end;
        HT_TRY(ht_jinja_charge(r, (s->n >> 10) * (1 + sep->n / 16)));
        while (most > 0 && i >= sep->n) {
            if (memcmp(s->p + i - sep->n, sep->p, sep->n) != 0) {
                i--;
                continue;
            }
            HT_TRY(ht_jinja_charge(r, 1));
            HT_TRY(ht_jv_part(r, &part, s, i, end));
            HT_TRY(ht_jlist_add(r, out->list, part));
            end = i -= sep->n;
            most--;
        }
        HT_TRY(ht_jv_part(r, &part, s, 0, end));
        HT_TRY(ht_jlist_add(r, out->list, part));
        for (size_t k = 0; k < out->list->n / 2; k++) {
            struct ht_jv *x = &out->list->items[k], *y = &out->list->items[out->list->n - 1 - k];
            const struct ht_jv t = *x;
            *x = *y;
            *y = t;
        }
        return HT_OK;
    }
    while (most != 0 && at < end) {
        const char *p = memmem(s->p + at, end - at, sep->p, sep->n);
        if (!p) break;
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jv_part(r, &part, s, at, (size_t)(p - s->p)));
        HT_TRY(ht_jlist_add(r, out->list, part));
        at = (size_t)(p - s->p) + sep->n;
        most--;
    }
    HT_TRY(ht_jv_part(r, &part, s, at, end));
    return ht_jlist_add(r, out->list, part);
}

static bool affix(const struct ht_jstring *s, const struct ht_jstring *x, bool at_end)
{
    return x->n <= s->n &&
           (x->n == 0 || memcmp(s->p + (at_end ? s->n - x->n : 0), x->p, x->n) == 0);
}

static enum ht_status has_affix(struct ht_jrun *r, const struct ht_jstring *s,
                                const struct ht_jargs *a, bool at_end, struct ht_jv *out)
{
    const struct ht_jv *v = ht_jargs_get(a, 0, NULL);
    *out = ht_jv_bool(false);
    if (v && v->kind == HT_JV_STRING) {
        *out = ht_jv_bool(affix(s, v->s, at_end));
        return HT_OK;
    }
    if (!v || v->kind != HT_JV_LIST || !v->list->tuple)
        return HT_JFAIL(r, "startswith and endswith need a string");
    for (size_t i = 0; i < v->list->n; i++) {
        if (v->list->items[i].kind != HT_JV_STRING)
            return HT_JFAIL(r, "startswith and endswith need strings");
        if (affix(s, v->list->items[i].s, at_end)) *out = ht_jv_bool(true);
    }
    return HT_OK;
}

static enum ht_status join(struct ht_jrun *r, const struct ht_jstring *s, const struct ht_jargs *a,
                           struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    struct ht_jlist *l;
    if (a->n != 1) return HT_JFAIL(r, "join needs one list");
    HT_TRY(ht_jv_iterate(r, a->positional[0], &l));
    for (size_t i = 0; i < l->n; i++) {
        if (l->items[i].kind != HT_JV_STRING)
            return HT_JFAIL(r, "join: item %zu is %s, not a string", i,
                            ht_jv_kind_name(l->items[i]));
        HT_TRY(ht_jinja_charge(r, 1));
        if (i) HT_TRY(ht_jbuffer_add_string(r, &b, s));
        HT_TRY(ht_jbuffer_add_string(r, &b, l->items[i].s));
    }
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status find(struct ht_jrun *r, const struct ht_jstring *s, const struct ht_jargs *a,
                           bool last, bool count, struct ht_jv *out)
{
    const struct ht_jstring *x;
    int64_t at = -1, n = 0;
    HT_TRY(need_string(r, a, 0, &x));
    if (a->n > 1) return HT_JFAIL(r, "find and count with a range are not supported");
    HT_TRY(ht_jinja_charge(r, s->n >> 10));
    for (size_t i = 0; i <= s->n;) {
        const char *p = x->n == 0  ? s->p + i
                        : i < s->n ? memmem(s->p + i, s->n - i, x->p, x->n)
                                   : NULL;
        if (!p) break;
        HT_TRY(ht_jinja_charge(r, 1 + (x->n >> 10)));
        if (at < 0 || last) at = p - s->p;
        n++;
        i = (size_t)(p - s->p) + x->n;
        if (!last && !count) break;
        if (x->n == 0) {
            n = (int64_t)ht_utf8_count(s->p, s->n) + 1;
            at = last ? (int64_t)s->n : 0;
            break;
        }
        if (last) i = (size_t)(p - s->p) + 1; // matches may overlap
    }
    *out = ht_jv_int(count ? n : at < 0 ? -1 : (int64_t)ht_utf8_count(s->p, (size_t)at));
    return HT_OK;
}

enum letter_class { ALPHA, DIGIT, ALNUM, SPACE, UPPER, LOWER };
static bool all_of(const struct ht_jstring *s, enum letter_class which)
{
    bool any = false;
    for (size_t i = 0; i < s->n;) {
        int32_t c;
        i += ht_utf8_get(s->p + i, s->n - i, &c);
        const utf8proc_category_t g = utf8proc_category(c);
        const bool letter = g >= UTF8PROC_CATEGORY_LU && g <= UTF8PROC_CATEGORY_LO,
                   digit = g == UTF8PROC_CATEGORY_ND;
        switch (which) {
        case ALPHA:
            if (!letter) return false;
            break;
        case DIGIT:
            if (!digit) return false;
            break;
        case ALNUM:
            if (!letter && g != UTF8PROC_CATEGORY_ND && g != UTF8PROC_CATEGORY_NL &&
                g != UTF8PROC_CATEGORY_NO)
                return false;
            break;
        case SPACE:
            if (!ht_utf8_is_space(c)) return false;
            break;
        case UPPER:
        case LOWER:
            if (g == UTF8PROC_CATEGORY_LT ||
                g == (which == UPPER ? UTF8PROC_CATEGORY_LL : UTF8PROC_CATEGORY_LU))
                return false;
            any |= g == UTF8PROC_CATEGORY_LU || g == UTF8PROC_CATEGORY_LL;
            continue;
        }
        any = true;
    }
    return any;
}

static enum ht_status splitlines(struct ht_jrun *r, const struct ht_jstring *s,
                                 const struct ht_jargs *a, struct ht_jv *out)
{
    const struct ht_jv *keep = ht_jargs_get(a, 0, "keepends");
    struct ht_jv line;
    HT_TRY(ht_jv_list(r, out, 0, false));
    HT_TRY(ht_jinja_charge(r, s->n >> 10));
    for (size_t at = 0; at < s->n;) {
        size_t end = at;
        while (end < s->n && s->p[end] != '\n' && s->p[end] != '\r') end++;
        size_t next = end < s->n ? end + 1 : end;
        if (next < s->n && s->p[end] == '\r' && s->p[next] == '\n') next++;
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jv_part(r, &line, s, at, keep && ht_jv_truth(*keep) ? next : end));
        HT_TRY(ht_jlist_add(r, out->list, line));
        at = next;
    }
    return HT_OK;
}

static enum ht_status partition(struct ht_jrun *r, const struct ht_jstring *s,
                                const struct ht_jargs *a, bool last, struct ht_jv *out)
{
    const struct ht_jstring *sep;
    struct ht_jv part;
    size_t hit = SIZE_MAX;
    HT_TRY(need_string(r, a, 0, &sep));
    if (sep->n == 0) return HT_JFAIL(r, "partition: the separator is empty");
    HT_TRY(ht_jinja_charge(r, (s->n >> 10) * (last ? 1 + sep->n / 16 : 1)));
    for (size_t i = 0; i + sep->n <= s->n; i++) {
        if (!last) {
            const char *p = memmem(s->p + i, s->n - i, sep->p, sep->n);
            hit = p ? (size_t)(p - s->p) : SIZE_MAX;
            break;
        }
        if (memcmp(s->p + s->n - sep->n - i, sep->p, sep->n) == 0) {
            hit = s->n - sep->n - i;
            break;
        }
    }
    const size_t none = last ? 0 : s->n; // where the text goes when there is no separator
    HT_TRY(ht_jv_list(r, out, 3, true));
    HT_TRY(ht_jv_part(r, &part, s, 0, hit != SIZE_MAX ? hit : none));
    HT_TRY(ht_jlist_add(r, out->list, part));
    HT_TRY(ht_jv_part(r, &part, s, hit != SIZE_MAX ? hit : none,
                      hit != SIZE_MAX ? hit + sep->n : none));
    HT_TRY(ht_jlist_add(r, out->list, part));
    HT_TRY(ht_jv_part(r, &part, s, hit != SIZE_MAX ? hit + sep->n : none, s->n));
    return ht_jlist_add(r, out->list, part);
}

enum method {
    M_STRIP,
    M_LSTRIP,
    M_RSTRIP,
    M_SPLIT,
    M_RSPLIT,
    M_STARTSWITH,
    M_ENDSWITH,
    M_REPLACE,
    M_UPPER,
    M_LOWER,
    M_TITLE,
    M_CAPITALIZE,
    M_JOIN,
    M_FIND,
    M_RFIND,
    M_COUNT,
    M_ISALPHA,
    M_ISDIGIT,
    M_ISALNUM,
    M_ISSPACE,
    M_ISUPPER,
    M_ISLOWER,
    M_SPLITLINES,
    M_REMOVEPREFIX,
    M_REMOVESUFFIX,
    M_PARTITION,
    M_RPARTITION,
    M_STRING_END,
    M_GET = M_STRING_END,
    M_KEYS,
    M_VALUES,
    M_ITEMS,
    M_COPY,
    M_DICT_END,
    M_INDEX = M_DICT_END,
    M_LIST_COUNT,
    M_LIST_END,
    M_LOOP_CYCLE = M_LIST_END,
    M_LOOP_CHANGED,
    M_END
};
static const char *const method_names[M_END] = {
    "strip",        "lstrip",    "rstrip",     "split",   "rsplit",     "startswith",
    "endswith",     "replace",   "upper",      "lower",   "title",      "capitalize",
    "join",         "find",      "rfind",      "count",   "isalpha",    "isdigit",
    "isalnum",      "isspace",   "isupper",    "islower", "splitlines", "removeprefix",
    "removesuffix", "partition", "rpartition", "get",     "keys",       "values",
    "items",        "copy",      "index",      "count",   "cycle",      "changed"
};

int ht_jinja_method_id(struct ht_jv self, const struct ht_jstring *name)
{
    int from = 0, to = 0;
    if (self.kind == HT_JV_STRING) to = M_STRING_END;
    if (self.kind == HT_JV_DICT) from = M_GET, to = M_DICT_END;
    if (self.kind == HT_JV_LIST) from = M_INDEX, to = M_LIST_END;
    if (self.kind == HT_JV_LOOP) from = M_LOOP_CYCLE, to = M_END;
    for (; from < to; from++)
        if (ht_jstring_is(name, method_names[from])) return from;
    return -1;
}

static enum ht_status string_method(struct ht_jrun *r, enum method id, const struct ht_jstring *s,
                                    const struct ht_jargs *a, struct ht_jv *out)
{
    const struct ht_jstring *x, *y;
    int64_t count = -1;
    switch (id) {
    case M_STRIP:
    case M_LSTRIP:
    case M_RSTRIP:
        HT_TRY(ht_jargs_string(r, a, 0, NULL, &x));
        return ht_jinja_strip(r, s, x, id != M_RSTRIP, id != M_LSTRIP, out);
    case M_SPLIT: return split(r, s, a, false, out);
    case M_RSPLIT: return split(r, s, a, true, out);
    case M_STARTSWITH: return has_affix(r, s, a, false, out);
    case M_ENDSWITH: return has_affix(r, s, a, true, out);
    case M_REPLACE:
        HT_TRY(need_string(r, a, 0, &x));
        HT_TRY(need_string(r, a, 1, &y));
        HT_TRY(ht_jargs_int(r, a, 2, "count", &count));
        return ht_jinja_replace(r, s, x, y, count, out);
    case M_UPPER: return ht_jinja_case(r, s, HT_JCASE_UPPER, out);
    case M_LOWER: return ht_jinja_case(r, s, HT_JCASE_LOWER, out);
    case M_TITLE: return ht_jinja_case(r, s, HT_JCASE_TITLE, out);
    case M_CAPITALIZE: return ht_jinja_case(r, s, HT_JCASE_CAPITAL, out);
    case M_JOIN: return join(r, s, a, out);
    case M_FIND: return find(r, s, a, false, false, out);
    case M_RFIND: return find(r, s, a, true, false, out);
    case M_COUNT: return find(r, s, a, false, true, out);
    case M_SPLITLINES: return splitlines(r, s, a, out);
    case M_REMOVEPREFIX:
    case M_REMOVESUFFIX:
        HT_TRY(need_string(r, a, 0, &x));
        if (!affix(s, x, id == M_REMOVESUFFIX)) return ht_jv_part(r, out, s, 0, s->n);
        return id == M_REMOVESUFFIX ? ht_jv_part(r, out, s, 0, s->n - x->n)
                                    : ht_jv_part(r, out, s, x->n, s->n);
    case M_PARTITION: return partition(r, s, a, false, out);
    case M_RPARTITION: return partition(r, s, a, true, out);
    default: break;
    }
    HT_TRY(ht_jinja_charge(r, s->n >> 9));
    *out = ht_jv_bool(all_of(s, (enum letter_class)(id - M_ISALPHA)));
    return HT_OK;
}

static enum ht_status dict_method(struct ht_jrun *r, enum method id, struct ht_jdict *d,
                                  const struct ht_jargs *a, struct ht_jv *out)
{
    struct ht_jv *found, pair;
    if (id == M_GET) {
        if (a->n < 1 || a->n > 2) return HT_JFAIL(r, "get needs a key");
        HT_TRY(ht_jdict_find(r, d, a->positional[0], &found));
        *out = found ? *found : a->n > 1 ? a->positional[1] : ht_jv_none();
        return HT_OK;
    }
    HT_TRY(ht_jinja_charge(r, d->n / 4));
    if (id == M_COPY) {
        HT_TRY(ht_jv_dict(r, out, d->n));
        if (d->n) memcpy(out->dict->keys, d->keys, d->n * sizeof *d->keys);
        if (d->n) memcpy(out->dict->values, d->values, d->n * sizeof *d->values);
        out->dict->n = d->n;
        return HT_OK;
    }
    HT_TRY(ht_jv_list(r, out, d->n, false));
    for (size_t i = 0; i < d->n; i++) {
        if (id == M_ITEMS) {
            HT_TRY(ht_jv_list(r, &pair, 2, true));
            HT_TRY(ht_jlist_add(r, pair.list, d->keys[i]));
            HT_TRY(ht_jlist_add(r, pair.list, d->values[i]));
        } else {
            pair = id == M_KEYS ? d->keys[i] : d->values[i];
        }
        HT_TRY(ht_jlist_add(r, out->list, pair));
    }
    return HT_OK;
}

enum ht_status ht_jinja_method(struct ht_jrun *r, int id, struct ht_jv self,
                               const struct ht_jargs *a, struct ht_jv *out)
{
    int64_t n = 0;
    bool same;
    HT_TRY(ht_jinja_charge(r, 1));
    if (self.kind == HT_JV_STRING) return string_method(r, (enum method)id, self.s, a, out);
    if (self.kind == HT_JV_DICT) return dict_method(r, (enum method)id, self.dict, a, out);
    if (id == M_LOOP_CYCLE) {
        if (a->n == 0) return HT_JFAIL(r, "loop.cycle needs values");
        *out = a->positional[self.loop->index % a->n];
        return HT_OK;
    }
    if (id == M_LOOP_CHANGED) {
        struct ht_jv seen;
        HT_TRY(ht_jv_list(r, &seen, a->n, true));
        for (size_t i = 0; i < a->n; i++) HT_TRY(ht_jlist_add(r, seen.list, a->positional[i]));
        same = false;
        if (self.loop->has_changed) HT_TRY(ht_jv_equal(r, self.loop->changed, seen, &same));
        self.loop->has_changed = true;
        self.loop->changed = seen;
        *out = ht_jv_bool(!same);
        return HT_OK;
    }
    if (a->n != 1) return HT_JFAIL(r, "index and count need one value");
    for (size_t i = 0; i < self.list->n; i++) {
        HT_TRY(ht_jv_equal(r, self.list->items[i], a->positional[0], &same));
        if (same && id == M_INDEX) {
            *out = ht_jv_int((int64_t)i);
            return HT_OK;
        }
        n += same;
    }
    if (id == M_INDEX) return HT_JFAIL(r, "index: the value is not in the list");
    *out = ht_jv_int(n);
    return HT_OK;
}

enum global { G_RANGE, G_DICT, G_NAMESPACE, G_RAISE, G_STRFTIME, G_END };

int ht_jinja_global_id(const struct ht_jstring *name)
{
    static const char *const names[G_END] = { "range", "dict", "namespace", "raise_exception",
                                              "strftime_now" };
    for (int i = 0; i < G_END; i++)
        if (ht_jstring_is(name, names[i])) return i;
    return -1;
}

static enum ht_status range(struct ht_jrun *r, const struct ht_jargs *a, struct ht_jv *out)
{
    int64_t start = 0, stop = 0, step = 1;
    if (a->n < 1 || a->n > 3) return HT_JFAIL(r, "range needs one to three integers");
    HT_TRY(ht_jargs_int(r, a, a->n > 1, NULL, &stop));
    if (a->n > 1) HT_TRY(ht_jargs_int(r, a, 0, NULL, &start));
    HT_TRY(ht_jargs_int(r, a, 2, NULL, &step));
    if (step == 0) return HT_JFAIL(r, "range: the step is 0");
    HT_TRY(ht_jv_list(r, out, 0, false));
    for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jlist_add(r, out->list, ht_jv_int(i)));
        if (__builtin_add_overflow(i, step, &i)) break;
    }
    return HT_OK;
}

static enum ht_status make_dict(struct ht_jrun *r, const struct ht_jargs *a, bool space,
                                struct ht_jv *out)
{
    struct ht_jv key;
    HT_TRY(ht_jv_dict(r, out, a->n_named));
    if (a->n > 1 || (a->n == 1 && a->positional[0].kind != HT_JV_DICT))
        return HT_JFAIL(r, "dict and namespace need a mapping or named values");
    for (size_t i = 0; a->n && i < a->positional[0].dict->n; i++)
        HT_TRY(ht_jdict_set(r, out->dict, a->positional[0].dict->keys[i],
                            a->positional[0].dict->values[i]));
    for (size_t i = 0; i < a->n_named; i++) {
        key = (struct ht_jv){ .kind = HT_JV_STRING, .s = a->names[i] };
        HT_TRY(ht_jdict_set(r, out->dict, key, a->named[i]));
    }
    if (space) out->kind = HT_JV_NAMESPACE;
    return HT_OK;
}

static enum ht_status time_text(struct ht_jrun *r, const struct ht_jargs *a, struct ht_jv *out)
{
    const struct ht_jstring *s;
    char format[256], text[1024], *copy;
    struct tm tm;
    HT_TRY(need_string(r, a, 0, &s));
    if (s->n >= sizeof format) return HT_JFAIL(r, "strftime_now: a format of %zu bytes", s->n);
    if (s->n) memcpy(format, s->p, s->n);
    format[s->n] = '\0';
    localtime_r(&r->now, &tm);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    const size_t n = strftime(text, sizeof text, format, &tm);
#pragma GCC diagnostic pop
    HT_TRY(ht_jinja_take(r, &copy, n + 1));
    memcpy(copy, text, n);
    return ht_jv_literal(r, out, copy, n);
}

enum ht_status ht_jinja_global(struct ht_jrun *r, int id, const struct ht_jargs *a,
                               struct ht_jv *out)
{
    struct ht_jv text;
    HT_TRY(ht_jinja_charge(r, 1));
    switch (id) {
    case G_RANGE: return range(r, a, out);
    case G_DICT:
    case G_NAMESPACE: return make_dict(r, a, id == G_NAMESPACE, out);
    case G_STRFTIME: return time_text(r, a, out);
    default: break;
    }
    if (a->n != 1) return HT_JFAIL(r, "raise_exception needs a message");
    HT_TRY(ht_jv_to_string(r, a->positional[0], &text));
    r->raised = true;
    return HT_FAIL(HT_ERR_ARG, "the chat template refuses this conversation: %.*s",
                   (int)(text.s->n < 500 ? text.s->n : 500), text.s->p);
}
