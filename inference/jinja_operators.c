/* inference/jinja_operators.c: attributes, items and operators of values. */
#include <math.h>
#include <string.h>

#include "inference/jinja_run.h"

static const struct ht_jv undefined;

static enum ht_status loop_attribute(struct ht_jrun *r, struct ht_jloop *l,
                                     const struct ht_jstring *name, struct ht_jv *out)
{
    const int64_t i = (int64_t)l->index, n = (int64_t)l->items->n;
    *out = undefined;
    if (ht_jstring_is(name, "index"))
        *out = ht_jv_int(i + 1);
    else if (ht_jstring_is(name, "index0"))
        *out = ht_jv_int(i);
    else if (ht_jstring_is(name, "revindex"))
        *out = ht_jv_int(n - i);
    else if (ht_jstring_is(name, "revindex0"))
        *out = ht_jv_int(n - i - 1);
    else if (ht_jstring_is(name, "first"))
        *out = ht_jv_bool(i == 0);
    else if (ht_jstring_is(name, "last"))
        *out = ht_jv_bool(i == n - 1);
    else if (ht_jstring_is(name, "length"))
        *out = ht_jv_int(n);
    else if (ht_jstring_is(name, "depth"))
        *out = ht_jv_int(1); // of recursive loops
    else if (ht_jstring_is(name, "depth0"))
        *out = ht_jv_int(0);
    else if (ht_jstring_is(name, "previtem"))
        *out = i > 0 ? l->items->items[i - 1] : undefined;
    else if (ht_jstring_is(name, "nextitem"))
        *out = i < n - 1 ? l->items->items[i + 1] : undefined;
    else
        return HT_JFAIL(r, "loop has no '%.*s'", (int)name->n, name->p);
    return HT_OK;
}

enum ht_status ht_jinja_attribute(struct ht_jrun *r, struct ht_jv v, const struct ht_jstring *name,
                                  struct ht_jv *out)
{
    struct ht_jv *found, key = { .kind = HT_JV_STRING, .s = name };
    struct ht_jfunction *f;

    if (v.kind == HT_JV_UNDEFINED)
        return HT_JFAIL(r, "'%.*s' of something undefined%s%s", (int)(name->n < 60 ? name->n : 60),
                        name->p, "", "");
    const int id = ht_jinja_method_id(v, name);
    if (id >= 0) {
        HT_TRY(ht_jinja_take(r, &f, sizeof *f));
        *f = (struct ht_jfunction){ .kind = HT_JF_METHOD, .id = id, .self = v };
        *out = (struct ht_jv){ .kind = HT_JV_FUNCTION, .function = f };
        return HT_OK;
    }
    *out = undefined;
    if (v.kind == HT_JV_LOOP) return loop_attribute(r, v.loop, name, out);
    if (v.kind == HT_JV_DICT || v.kind == HT_JV_NAMESPACE) {
        HT_TRY(ht_jdict_find(r, v.dict, key, &found));
        if (found) *out = *found;
    }
    return HT_OK;
}

/* Index from the end when negative; false when outside. */
static bool place(int64_t index, int64_t n, int64_t *out)
{
    *out = index < 0 ? index + n : index;
    return *out >= 0 && *out < n;
}

enum ht_status ht_jinja_item(struct ht_jrun *r, struct ht_jv v, struct ht_jv key, struct ht_jv *out)
{
    struct ht_jv *found;
    int64_t i;

    *out = undefined;
    if (v.kind == HT_JV_UNDEFINED) return HT_JFAIL(r, "an item of something undefined");
    if (v.kind == HT_JV_DICT && key.kind != HT_JV_LIST && key.kind != HT_JV_DICT) {
        HT_TRY(ht_jdict_find(r, v.dict, key, &found));
        if (found) {
            *out = *found;
            return HT_OK;
        }
    }
    if (key.kind == HT_JV_BOOL) key = ht_jv_int(key.b);
    if (key.kind == HT_JV_STRING) return ht_jinja_attribute(r, v, key.s, out);
    if (key.kind != HT_JV_INT) return HT_OK;
    if (v.kind == HT_JV_LIST && place(key.i, (int64_t)v.list->n, &i)) *out = v.list->items[i];
    if (v.kind == HT_JV_STRING) {
        HT_TRY(ht_jinja_charge(r, v.s->n >> 10));
        if (place(key.i, (int64_t)ht_utf8_count(v.s->p, v.s->n), &i)) {
            const size_t at = ht_utf8_offset(v.s->p, v.s->n, (size_t)i);
            int32_t c;
            return ht_jv_part(r, out, v.s, at, at + ht_utf8_get(v.s->p + at, v.s->n - at, &c));
        }
    }
    return HT_OK;
}

static bool number(struct ht_jv v, bool *real, int64_t *i, double *f)
{
    if (v.kind == HT_JV_FLOAT) {
        *real = true;
        *f = v.f;
        return true;
    }
    if (v.kind != HT_JV_INT && v.kind != HT_JV_BOOL) return false;
    *i = v.kind == HT_JV_INT ? v.i : v.b;
    *f = (double)*i;
    return true;
}

static enum ht_status int_power(int64_t base, int64_t exponent, int64_t *out, bool *over)
{
    *out = 1;
    for (; exponent > 0 && !*over; exponent--) {
        if (base == 1 || base == 0 || base == -1) {
            *out = base == -1 && exponent % 2 == 0 ? 1 : base;
            break;
        }
        *over = __builtin_mul_overflow(*out, base, out);
    }
    return HT_OK;
}

enum ht_status ht_jrun_arithmetic(struct ht_jrun *r, int op, struct ht_jv a, struct ht_jv b,
                                  struct ht_jv *out)
{
    bool real = op == '/', over = false;
    int64_t x = 0, y = 0, z = 0;
    double f = 0, g = 0;

    if (!number(a, &real, &x, &f) || !number(b, &real, &y, &g))
        return HT_JFAIL(r, "'%c' between %s and %s",
                        op == HT_JOP_FLOOR   ? '/'
                        : op == HT_JOP_POWER ? '*'
                                             : op,
                        ht_jv_kind_name(a), ht_jv_kind_name(b));
    if ((op == '/' || op == '%' || op == HT_JOP_FLOOR) && g == 0.0)
        return HT_JFAIL(r, "division by zero");
    if (op == HT_JOP_POWER && y < 0) real = true;
    if (real) {
        const double m = op == '%' || op == HT_JOP_FLOOR ? f - g * floor(f / g) : 0.0;
        const double v = op == '+'            ? f + g
                         : op == '-'          ? f - g
                         : op == '*'          ? f * g
                         : op == '/'          ? f / g
                         : op == '%'          ? m
                         : op == HT_JOP_FLOOR ? floor(f / g)
                                              : pow(f, g);
        *out = ht_jv_float(v);
        return HT_OK;
    }
    switch (op) {
    case '+': over = __builtin_add_overflow(x, y, &z); break;
    case '-': over = __builtin_sub_overflow(x, y, &z); break;
    case '*': over = __builtin_mul_overflow(x, y, &z); break;
    case HT_JOP_POWER: HT_TRY(int_power(x, y, &z, &over)); break;
    default:
        if (y == -1) {
            over = op == HT_JOP_FLOOR && __builtin_sub_overflow((int64_t)0, x, &z);
            break;
        }
        z = x % y;
        if (z != 0 && (z < 0) != (y < 0)) z += y;
        if (op == HT_JOP_FLOOR) z = (x - z) / y;
    }
    if (over) return HT_JFAIL(r, "an integer beyond 64 bits");
    *out = ht_jv_int(z);
    return HT_OK;
}

static enum ht_status repeat(struct ht_jrun *r, struct ht_jv v, int64_t times, struct ht_jv *out)
{
    struct ht_jbuffer b = { 0 };
    if (v.kind == HT_JV_LIST) HT_TRY(ht_jv_list(r, out, 0, v.list->tuple));
    for (int64_t k = 0; k < times; k++) {
        HT_TRY(ht_jinja_charge(r, 1));
        if (v.kind == HT_JV_STRING) HT_TRY(ht_jbuffer_add_string(r, &b, v.s));
        for (size_t i = 0; v.kind == HT_JV_LIST && i < v.list->n; i++) {
            HT_TRY(ht_jinja_charge(r, 1));
            HT_TRY(ht_jlist_add(r, out->list, v.list->items[i]));
        }
    }
    return v.kind == HT_JV_STRING ? ht_jbuffer_string(r, &b, out) : HT_OK;
}

/* '%s text %d' % values: s, d, i, r-free, and %%. */
static enum ht_status format(struct ht_jrun *r, const struct ht_jstring *s, struct ht_jv values,
                             struct ht_jv *out)
{
    const bool many = values.kind == HT_JV_LIST && values.list->tuple;
    struct ht_jbuffer b = { 0 };
    size_t used = 0;
    for (size_t at = 0; at < s->n;) {
        const char *p = memchr(s->p + at, '%', s->n - at);
        const size_t end = p ? (size_t)(p - s->p) : s->n;
        const struct ht_jstring part = { s->p + at, end - at, s->mask ? s->mask + at : NULL,
                                         s->user };
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jbuffer_add_string(r, &b, &part));
        if (!p) break;
        const char c = end + 1 < s->n ? p[1] : '\0';
        if (c == '%') {
            HT_TRY(ht_jbuffer_add(r, &b, "%", 1, false));
        } else if (c == 's' || c == 'd' || c == 'i') {
            if (used >= (many ? values.list->n : 1))
                return HT_JFAIL(r, "not enough values for a format");
            const struct ht_jv v = many ? values.list->items[used] : values;
            used++;
            if (c != 's' && v.kind != HT_JV_INT)
                return HT_JFAIL(r, "%%d needs an integer, not %s", ht_jv_kind_name(v));
            HT_TRY(ht_jbuffer_print(r, &b, v));
        } else {
            return HT_JFAIL(r, "a format other than %%s, %%d, %%i and %%%%");
        }
        at = end + 2;
    }
    if (used != (many ? values.list->n : 1))
        return HT_JFAIL(r, "more values than the format has places");
    return ht_jbuffer_string(r, &b, out);
}

enum ht_status ht_jinja_binary(struct ht_jrun *r, int op, struct ht_jv a, struct ht_jv b,
                               struct ht_jv *out)
{
    struct ht_jbuffer text = { 0 };
    if (op == '+' && a.kind == HT_JV_STRING && b.kind == HT_JV_STRING) {
        HT_TRY(ht_jbuffer_add_string(r, &text, a.s));
        HT_TRY(ht_jbuffer_add_string(r, &text, b.s));
        return ht_jbuffer_string(r, &text, out);
    }
    if (op == '+' && a.kind == HT_JV_LIST && b.kind == HT_JV_LIST &&
        a.list->tuple == b.list->tuple) {
        HT_TRY(ht_jv_list(r, out, a.list->n + b.list->n, a.list->tuple));
        HT_TRY(ht_jinja_charge(r, (a.list->n + b.list->n) / 16));
        for (size_t i = 0; i < a.list->n; i++) HT_TRY(ht_jlist_add(r, out->list, a.list->items[i]));
        for (size_t i = 0; i < b.list->n; i++) HT_TRY(ht_jlist_add(r, out->list, b.list->items[i]));
        return HT_OK;
    }
    if (op == '*' && a.kind == HT_JV_INT && (b.kind == HT_JV_STRING || b.kind == HT_JV_LIST))
        return repeat(r, b, a.i, out);
    if (op == '*' && b.kind == HT_JV_INT && (a.kind == HT_JV_STRING || a.kind == HT_JV_LIST))
        return repeat(r, a, b.i, out);
    if (op == '%' && a.kind == HT_JV_STRING) return format(r, a.s, b, out);
    return ht_jrun_arithmetic(r, op, a, b, out);
}
