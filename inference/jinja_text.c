/* inference/jinja_text.c: text in the making: UTF-8, printing as Python's str and repr do, JSON. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_impl.h"

size_t ht_utf8_get(const char *p, size_t n, int32_t *c)
{
    const unsigned char *s = (const unsigned char *)p;
    const size_t k = s[0] < 0x80 ? 1 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : 4;
    if (k > n || k == 1) {
        *c = s[0];
        return 1;
    }
    *c = s[0] & (0x7F >> k);
    for (size_t i = 1; i < k; i++) *c = *c << 6 | (s[i] & 0x3F);
    return k;
}

size_t ht_utf8_put(char p[4], int32_t c)
{
    if (c < 0x80) {
        p[0] = (char)c;
        return 1;
    }
    const size_t k = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = k - 1; i > 0; i--, c >>= 6) p[i] = (char)(0x80 | (c & 0x3F));
    p[0] = (char)((0xF00 >> k) | c);
    return k;
}

size_t ht_utf8_count(const char *p, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)p[i] & 0xC0) != 0x80;
    return count;
}

size_t ht_utf8_offset(const char *p, size_t n, size_t index)
{
    size_t i = 0;
    for (; i < n && index > 0; index--)
        for (i++; i < n && ((unsigned char)p[i] & 0xC0) == 0x80;) i++;
    return i;
}

bool ht_utf8_is_space(int32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F ||
           c == 0x205F || c == 0x3000;
}

static enum ht_status reserve(struct ht_jrun *r, struct ht_jbuffer *b, size_t n)
{
    if (n <= b->capacity - b->n) return HT_OK;
    if (n > HT_JINJA_MAX_OUTPUT || b->n + n > HT_JINJA_MAX_OUTPUT)
        return HT_JFAIL(r, "a text of more than %d MiB", HT_JINJA_MAX_OUTPUT >> 20);
    size_t capacity = b->capacity ? 2 * b->capacity : 64;
    while (capacity - b->n < n) capacity *= 2;
    char *p;
    unsigned char *mask;
    HT_TRY(ht_jinja_take(r, &p, capacity));
    HT_TRY(ht_jinja_take(r, &mask, capacity));
    if (b->n) memcpy(p, b->p, b->n);
    if (b->n) memcpy(mask, b->mask, b->n);
    *b = (struct ht_jbuffer){ p, mask, b->n, capacity };
    return HT_OK;
}

enum ht_status ht_jbuffer_add(struct ht_jrun *r, struct ht_jbuffer *b, const char *p, size_t n,
                              bool user)
{
    if (n == 0) return HT_OK;
    HT_TRY(ht_jinja_charge(r, n >> 10));
    HT_TRY(reserve(r, b, n));
    memcpy(b->p + b->n, p, n);
    memset(b->mask + b->n, user, n);
    b->n += n;
    return HT_OK;
}

enum ht_status ht_jbuffer_add_string(struct ht_jrun *r, struct ht_jbuffer *b,
                                     const struct ht_jstring *s)
{
    const size_t at = b->n;
    HT_TRY(ht_jbuffer_add(r, b, s->p, s->n, s->user));
    if (s->mask && s->n) memcpy(b->mask + at, s->mask, s->n);
    return HT_OK;
}

enum ht_status ht_jbuffer_string(struct ht_jrun *r, const struct ht_jbuffer *b, struct ht_jv *out)
{
    struct ht_jstring *s;
    HT_TRY(ht_jinja_take(r, &s, sizeof *s));
    const bool first = b->n > 0 && b->mask[0];
    const bool mixed = b->n > 0 && memchr(b->mask, !first, b->n) != NULL;
    *s = (struct ht_jstring){ b->n ? b->p : "", b->n, mixed ? b->mask : NULL, first };
    *out = (struct ht_jv){ .kind = HT_JV_STRING, .s = s };
    return HT_OK;
}

/* Python's repr of a float: the shortest digits that read back the same. */
static void float_text(char out[40], double f, bool json)
{
    char digits[40];
    if (isnan(f) || isinf(f)) {
        strcpy(out, isnan(f) ? (json ? "NaN" : "nan")
                    : f < 0  ? (json ? "-Infinity" : "-inf")
                    : json   ? "Infinity"
                             : "inf");
        return;
    }
    int precision = 0;
    do snprintf(digits, sizeof digits, "%.*e", precision, f);
    while (strtod(digits, NULL) != f && ++precision < 17);
    char *e = strchr(digits, 'e');
    const int exponent = atoi(e + 1);
    if (exponent >= -4 && exponent < 16) {
        const int decimals = precision > exponent ? precision - exponent : 1;
        snprintf(out, 40, "%.*f", decimals, f);
        return;
    }
    *e = '\0';
    snprintf(out, 40, "%.25se%c%02u", digits, exponent < 0 ? '-' : '+',
             (unsigned)abs(exponent) % 1000u);
}

/* One character of a string, with the mark of its byte. */
static bool mark(const struct ht_jstring *s, size_t i)
{
    return s->mask ? s->mask[i] : s->user;
}

static enum ht_status repr_string(struct ht_jrun *r, struct ht_jbuffer *b,
                                  const struct ht_jstring *s)
{
    const bool twice = s->n && memchr(s->p, '\'', s->n) && !memchr(s->p, '"', s->n);
    const char quote = twice ? '"' : '\'';
    HT_TRY(ht_jbuffer_add(r, b, &quote, 1, false));
    for (size_t i = 0; i < s->n; i++) {
        const char c = s->p[i];
        char text[8] = { c };
        if (c == quote || c == '\\')
            snprintf(text, sizeof text, "\\%c", c);
        else if (c == '\n' || c == '\r' || c == '\t')
            strcpy(text, c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t");
        else if ((unsigned char)c < 32 || c == 127)
            snprintf(text, sizeof text, "\\x%02x", (unsigned)c);
        HT_TRY(ht_jbuffer_add(r, b, text, strlen(text), mark(s, i)));
    }
    return ht_jbuffer_add(r, b, &quote, 1, false);
}

static enum ht_status repr(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv v)
{
    if (v.kind == HT_JV_STRING) return repr_string(r, b, v.s);
    return ht_jbuffer_print(r, b, v);
}

static enum ht_status plain(struct ht_jrun *r, struct ht_jbuffer *b, const char *text)
{
    return ht_jbuffer_add(r, b, text, strlen(text), false);
}

enum ht_status ht_jbuffer_print(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv v)
{
    char text[40];
    HT_TRY(ht_jinja_charge(r, 1));
    switch (v.kind) {
    case HT_JV_UNDEFINED: return HT_OK;
    case HT_JV_NONE: return plain(r, b, "None");
    case HT_JV_BOOL: return plain(r, b, v.b ? "True" : "False");
    case HT_JV_INT: snprintf(text, sizeof text, "%lld", (long long)v.i); return plain(r, b, text);
    case HT_JV_FLOAT: float_text(text, v.f, false); return plain(r, b, text);
    case HT_JV_STRING: return ht_jbuffer_add_string(r, b, v.s);
    case HT_JV_LIST:
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(plain(r, b, v.list->tuple ? "(" : "["));
        for (size_t i = 0; i < v.list->n; i++) {
            if (i) HT_TRY(plain(r, b, ", "));
            HT_TRY(repr(r, b, v.list->items[i]));
        }
        HT_TRY(plain(r, b, !v.list->tuple ? "]" : v.list->n == 1 ? ",)" : ")"));
        break;
    case HT_JV_DICT:
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(plain(r, b, "{"));
        for (size_t i = 0; i < v.dict->n; i++) {
            if (i) HT_TRY(plain(r, b, ", "));
            HT_TRY(repr(r, b, v.dict->keys[i]));
            HT_TRY(plain(r, b, ": "));
            HT_TRY(repr(r, b, v.dict->values[i]));
        }
        HT_TRY(plain(r, b, "}"));
        break;
    default: return HT_JFAIL(r, "%s cannot be printed", ht_jv_kind_name(v));
    }
    r->depth--;
    return HT_OK;
}

enum ht_status ht_jv_to_string(struct ht_jrun *r, struct ht_jv v, struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    if (v.kind == HT_JV_STRING) {
        *out = v;
        return HT_OK;
    }
    HT_TRY(ht_jbuffer_print(r, &b, v));
    return ht_jbuffer_string(r, &b, out);
}

static enum ht_status json_escape(struct ht_jrun *r, struct ht_jbuffer *b,
                                  const struct ht_jstring *s, bool ascii)
{
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    HT_TRY(plain(r, b, "\""));
    for (size_t i = 0, k = 1; i < s->n; i += k) {
        const char c = s->p[i];
        const char *simple = c ? strchr(from, c) : NULL;
        char text[16] = { 0 };
        k = 1;
        if (simple) {
            snprintf(text, sizeof text, "\\%c", to[simple - from]);
        } else if ((unsigned char)c < 32) {
            snprintf(text, sizeof text, "\\u%04x", (unsigned)c);
        } else if ((ascii && (unsigned char)c >= 0x80)) {
            int32_t code;
            k = ht_utf8_get(s->p + i, s->n - i, &code);
            if (code >= 0x10000)
                snprintf(text, sizeof text, "\\u%04x\\u%04x",
                         0xD800 + (((unsigned)code - 0x10000) >> 10),
                         0xDC00 + ((unsigned)code & 0x3FF));
            else
                snprintf(text, sizeof text, "\\u%04x", (unsigned)code);
        } else { // as many plain bytes as there are
            size_t end = i + 1;
            while (end < s->n && (unsigned char)s->p[end] >= 32 && s->p[end] != '"' &&
                   s->p[end] != '\\' && !(ascii && (unsigned char)s->p[end] >= 0x80) &&
                   mark(s, end) == mark(s, i))
                end++;
            k = end - i;
            HT_TRY(ht_jbuffer_add(r, b, s->p + i, k, mark(s, i)));
            continue;
        }
        HT_TRY(ht_jbuffer_add(r, b, text, strlen(text), mark(s, i)));
    }
    return plain(r, b, "\"");
}

static enum ht_status json_line(struct ht_jrun *r, struct ht_jbuffer *b, const struct ht_jjson *o,
                                int level)
{
    if (o->indent < 0) return HT_OK;
    HT_TRY(plain(r, b, "\n"));
    for (int i = 0; i < o->indent * level; i++) HT_TRY(plain(r, b, " "));
    return HT_OK;
}

static enum ht_status json_key(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv key,
                               const struct ht_jjson *o)
{
    struct ht_jbuffer text = { 0 };
    struct ht_jv s;
    if (key.kind == HT_JV_STRING) return json_escape(r, b, key.s, o->ascii);
    if (key.kind > HT_JV_FLOAT || key.kind == HT_JV_UNDEFINED)
        return HT_JFAIL(r, "tojson: %s as a key", ht_jv_kind_name(key));
    HT_TRY(ht_jbuffer_json(r, &text, key, o, 0));
    HT_TRY(ht_jbuffer_string(r, &text, &s));
    return json_escape(r, b, s.s, o->ascii);
}

static int by_key(const void *a, const void *b)
{
    const struct ht_jstring *x = ((const struct ht_jv *)a)->s, *y = ((const struct ht_jv *)b)->s;
    const size_t n = x->n < y->n ? x->n : y->n;
    const int c = n ? memcmp(x->p, y->p, n) : 0;
    return c ? c : (x->n > y->n) - (x->n < y->n);
}

static enum ht_status json_dict(struct ht_jrun *r, struct ht_jbuffer *b, const struct ht_jdict *d,
                                const struct ht_jjson *o, int level)
{
    struct ht_jv *keys = d->keys, *value;
    if (d->n == 0) return plain(r, b, "{}");
    if (o->sort_keys) {
        HT_TRY(ht_jinja_take(r, &keys, d->n * sizeof *keys));
        memcpy(keys, d->keys, d->n * sizeof *keys);
        for (size_t i = 0; i < d->n; i++)
            if (keys[i].kind != HT_JV_STRING)
                return HT_JFAIL(r, "tojson: sort_keys needs keys that are strings");
        qsort(keys, d->n, sizeof *keys, by_key);
    }
    HT_TRY(plain(r, b, "{"));
    for (size_t i = 0; i < d->n; i++) {
        if (i) HT_TRY(ht_jbuffer_add_string(r, b, o->item));
        HT_TRY(json_line(r, b, o, level + 1));
        HT_TRY(json_key(r, b, keys[i], o));
        HT_TRY(ht_jbuffer_add_string(r, b, o->key));
        value = &d->values[i];
        if (o->sort_keys) HT_TRY(ht_jdict_find(r, d, keys[i], &value));
        HT_TRY(ht_jbuffer_json(r, b, *value, o, level + 1));
    }
    HT_TRY(json_line(r, b, o, level));
    return plain(r, b, "}");
}

enum ht_status ht_jbuffer_json(struct ht_jrun *r, struct ht_jbuffer *b, struct ht_jv v,
                               const struct ht_jjson *o, int level)
{
    char text[40];
    HT_TRY(ht_jinja_charge(r, 1));
    switch (v.kind) {
    case HT_JV_NONE: return plain(r, b, "null");
    case HT_JV_BOOL: return plain(r, b, v.b ? "true" : "false");
    case HT_JV_INT: return ht_jbuffer_print(r, b, v);
    case HT_JV_FLOAT: float_text(text, v.f, true); return plain(r, b, text);
    case HT_JV_STRING: return json_escape(r, b, v.s, o->ascii);
    case HT_JV_LIST:
        if (v.list->n == 0) return plain(r, b, "[]");
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(plain(r, b, "["));
        for (size_t i = 0; i < v.list->n; i++) {
            if (i) HT_TRY(ht_jbuffer_add_string(r, b, o->item));
            HT_TRY(json_line(r, b, o, level + 1));
            HT_TRY(ht_jbuffer_json(r, b, v.list->items[i], o, level + 1));
        }
        HT_TRY(json_line(r, b, o, level));
        HT_TRY(plain(r, b, "]"));
        r->depth--;
        return HT_OK;
    case HT_JV_DICT:
        HT_TRY(ht_jinja_enter(r));
        HT_TRY(json_dict(r, b, v.dict, o, level));
        r->depth--;
        return HT_OK;
    default: return HT_JFAIL(r, "tojson: %s is not JSON", ht_jv_kind_name(v));
    }
}
