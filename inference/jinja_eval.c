/* inference/jinja_eval.c: rendering. Every node visited is a step; scopes are Jinja's: for, macro
 * and with make one, if does not, and what set assigns inside a loop ends with the turn. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_impl.h"

enum flow { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE };

static enum ht_status eval(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                           struct ht_jv *out);
static enum ht_status run(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                          enum flow *flow);

static const struct ht_jv undefined;

// ---- scopes ----

static bool same_name(const struct ht_jstring *a, const struct ht_jstring *b)
{
    return a->n == b->n && memcmp(a->p, b->p, a->n) == 0;
}

static struct ht_jv *own_variable(struct ht_jscope *s, const struct ht_jstring *name)
{
    for (size_t i = 0; i < s->n; i++)
        if (same_name(s->vars[i].name, name)) return &s->vars[i].value;
    return NULL;
}

static enum ht_status assign(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jstring *name,
                             struct ht_jv v)
{
    struct ht_jv *there = own_variable(s, name);
    HT_TRY(ht_jinja_charge(r, s->n / 16));
    if (there) {
        *there = v;
        return HT_OK;
    }
    if (s->n == s->capacity) {
        const size_t capacity = s->capacity ? 2 * s->capacity : 4;
        struct ht_jvar *grown;
        HT_TRY(ht_jinja_take(r, &grown, capacity * sizeof *grown));
        if (s->n) memcpy(grown, s->vars, s->n * sizeof *grown);
        s->vars = grown;
        s->capacity = capacity;
    }
    s->vars[s->n++] = (struct ht_jvar){ name, v };
    return HT_OK;
}

static enum ht_status look_up(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jstring *name,
                              struct ht_jv *out)
{
    for (; s; s = s->parent) {
        const struct ht_jv *v = own_variable(s, name);
        HT_TRY(ht_jinja_charge(r, 1 + s->n / 16));
        if (v) {
            *out = *v;
            return HT_OK;
        }
    }
    const int id = ht_jinja_global_id(name);
    *out = undefined;
    if (id < 0) return HT_OK;
    struct ht_jfunction *f;
    HT_TRY(ht_jinja_take(r, &f, sizeof *f));
    *f = (struct ht_jfunction){ .kind = HT_JF_GLOBAL, .id = id };
    *out = (struct ht_jv){ .kind = HT_JV_FUNCTION, .function = f };
    return HT_OK;
}

// ---- expressions ----

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

static enum ht_status slice(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *node,
                            struct ht_jv v, struct ht_jv *out)
{
    const struct ht_jnode *const parts[3] = { node->b, node->c, node->d };
    int64_t at[3] = { 0, 0, 1 }, n;
    bool given[3] = { false };

    for (int k = 0; k < 3; k++) {
        struct ht_jv x = ht_jv_none();
        if (parts[k]) HT_TRY(eval(r, s, parts[k], &x));
        if (x.kind == HT_JV_NONE) continue;
        if (x.kind != HT_JV_INT)
            return HT_JFAIL(r, "a slice needs integers, not %s", ht_jv_kind_name(x));
        given[k] = true;
        at[k] = x.i;
    }
    if (v.kind != HT_JV_LIST && v.kind != HT_JV_STRING)
        return HT_JFAIL(r, "%s cannot be sliced", ht_jv_kind_name(v));
    HT_TRY(ht_jv_length(r, v, &n));
    const int64_t step = at[2];
    if (step == 0 || step == INT64_MIN)
        return HT_JFAIL(r, "a slice with step %lld", (long long)step);
    for (int k = 0; k < 2; k++) {
        const int64_t low = step > 0 ? 0 : -1, high = step > 0 ? n : n - 1;
        if (!given[k])
            at[k] = (k == 0) == (step > 0) ? low : high;
        else if (at[k] < 0)
            at[k] = at[k] + n < low ? low : at[k] + n;
        else if (at[k] > high)
            at[k] = high;
    }
    if (v.kind == HT_JV_STRING && step == 1) {
        if (at[1] < at[0]) at[1] = at[0];
        const size_t start = ht_utf8_offset(v.s->p, v.s->n, (size_t)at[0]);
        const size_t len = ht_utf8_offset(v.s->p + start, v.s->n - start, (size_t)(at[1] - at[0]));
        return ht_jv_part(r, out, v.s, start, start + len);
    }
    struct ht_jlist *l;
    struct ht_jbuffer b = { 0 };
    HT_TRY(ht_jv_iterate(r, v, &l));
    HT_TRY(ht_jv_list(r, out, 0, v.kind == HT_JV_LIST && v.list->tuple));
    for (int64_t i = at[0]; step > 0 ? i < at[1] : i > at[1];) {
        HT_TRY(ht_jinja_charge(r, 1));
        HT_TRY(ht_jlist_add(r, out->list, l->items[i]));
        if (__builtin_add_overflow(i, step, &i)) break;
    }
    if (v.kind == HT_JV_LIST) return HT_OK;
    for (size_t i = 0; i < out->list->n; i++)
        HT_TRY(ht_jbuffer_add_string(r, &b, out->list->items[i].s));
    return ht_jbuffer_string(r, &b, out);
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

static enum ht_status arithmetic(struct ht_jrun *r, int op, struct ht_jv a, struct ht_jv b,
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
    return arithmetic(r, op, a, b, out);
}

static enum ht_status compare(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              struct ht_jv *out)
{
    struct ht_jv left, right;
    bool yes = true;
    int order;
    HT_TRY(eval(r, s, n->a, &left));
    for (size_t i = 0; i < n->n && yes; i++, left = right) {
        HT_TRY(eval(r, s, n->items[i], &right));
        const int op = n->ops[i];
        if (op == HT_JC_EQ || op == HT_JC_NE) {
            HT_TRY(ht_jv_equal(r, left, right, &yes));
        } else if (op == HT_JC_IN || op == HT_JC_NOT_IN) {
            HT_TRY(ht_jv_contains(r, right, left, &yes));
        } else {
            HT_TRY(ht_jv_order(r, left, right, &order));
            yes = op == HT_JC_LT   ? order < 0
                  : op == HT_JC_LE ? order <= 0
                  : op == HT_JC_GT ? order > 0
                                   : order >= 0;
        }
        if (op == HT_JC_NE || op == HT_JC_NOT_IN) yes = !yes;
    }
    *out = ht_jv_bool(yes);
    return HT_OK;
}

static enum ht_status arguments(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                struct ht_jargs *a)
{
    *a = (struct ht_jargs){ .n = n->n, .names = n->keywords, .n_named = n->n_keywords };
    if (n->n) HT_TRY(ht_jinja_take(r, &a->positional, n->n * sizeof *a->positional));
    if (n->n_keywords) HT_TRY(ht_jinja_take(r, &a->named, n->n_keywords * sizeof *a->named));
    for (size_t i = 0; i < n->n; i++) HT_TRY(eval(r, s, n->items[i], &a->positional[i]));
    for (size_t i = 0; i < n->n_keywords; i++)
        HT_TRY(eval(r, s, n->keyword_values[i], &a->named[i]));
    return HT_OK;
}

static enum ht_status new_scope(struct ht_jrun *r, struct ht_jscope *parent, struct ht_jscope **out)
{
    HT_TRY(ht_jinja_take(r, out, sizeof **out));
    (*out)->parent = parent;
    return HT_OK;
}

/* Run a body into a text of its own. */
static enum ht_status capture(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                              struct ht_jv *out)
{
    struct ht_jbuffer text = { 0 }, *const outer = r->out;
    enum flow flow;
    r->out = &text;
    HT_TRY(run(r, s, body, &flow));
    r->out = outer;
    return ht_jbuffer_string(r, &text, out);
}

static enum ht_status call_macro(struct ht_jrun *r, const struct ht_jfunction *f,
                                 const struct ht_jargs *a, struct ht_jv *out)
{
    static const struct ht_jstring caller = { "caller", 6, NULL, false };
    const struct ht_jnode *m = f->node;
    const size_t first_default = m->n - m->b->n;
    struct ht_jscope *s;
    size_t used = 0;

    HT_TRY(new_scope(r, f->scope, &s));
    if (a->n > m->n)
        return HT_JFAIL(r, "macro '%.*s' takes %zu arguments", (int)m->name->n, m->name->p, m->n);
    if (f->caller.kind == HT_JV_FUNCTION) HT_TRY(assign(r, s, &caller, f->caller));
    for (size_t i = 0; i < m->n; i++) {
        struct ht_jv v = undefined;
        bool given = i < a->n;
        if (given) v = a->positional[i];
        for (size_t k = 0; !given && k < a->n_named; k++) {
            if (!same_name(a->names[k], m->items[i]->name)) continue;
            given = true;
            v = a->named[k];
            used++;
        }
        if (!given && i >= first_default) HT_TRY(eval(r, s, m->b->items[i - first_default], &v));
        HT_TRY(assign(r, s, m->items[i]->name, v));
    }
    if (used < a->n_named)
        return HT_JFAIL(r, "macro '%.*s': an argument of unknown name", (int)m->name->n,
                        m->name->p);
    return capture(r, s, m->c, out);
}

enum ht_status ht_jinja_call(struct ht_jrun *r, struct ht_jv f, const struct ht_jargs *a,
                             struct ht_jv *out)
{
    if (f.kind != HT_JV_FUNCTION) return HT_JFAIL(r, "%s cannot be called", ht_jv_kind_name(f));
    switch (f.function->kind) {
    case HT_JF_GLOBAL: return ht_jinja_global(r, f.function->id, a, out);
    case HT_JF_METHOD: return ht_jinja_method(r, f.function->id, f.function->self, a, out);
    case HT_JF_MACRO: break;
    }
    return call_macro(r, f.function, a, out);
}

static enum ht_status eval_call(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                struct ht_jv *out)
{
    struct ht_jargs a;
    struct ht_jv f;
    HT_TRY(eval(r, s, n->a, &f));
    if (f.kind == HT_JV_UNDEFINED) {
        const struct ht_jstring *name = n->a->name;
        return HT_JFAIL(r, "no function is called '%.*s'", name ? (int)name->n : 1,
                        name ? name->p : "?");
    }
    HT_TRY(arguments(r, s, n, &a));
    r->line = n->line;
    return ht_jinja_call(r, f, &a, out);
}

static enum ht_status eval_list(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                struct ht_jv *out)
{
    struct ht_jv v;
    HT_TRY(ht_jv_list(r, out, n->n, n->op == 1));
    for (size_t i = 0; i < n->n; i++) {
        HT_TRY(eval(r, s, n->items[i], &v));
        HT_TRY(ht_jlist_add(r, out->list, v));
    }
    return HT_OK;
}

static enum ht_status eval_unary(struct ht_jrun *r, const struct ht_jnode *n, struct ht_jv v,
                                 struct ht_jv *out)
{
    if (n->op == '!') {
        *out = ht_jv_bool(!ht_jv_truth(v));
        return HT_OK;
    }
    return arithmetic(r, n->op, ht_jv_int(0), v, out);
}

static enum ht_status eval_inner(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                 struct ht_jv *out)
{
    struct ht_jv a, b;
    struct ht_jargs args;
    struct ht_jbuffer text = { 0 };
    bool yes;

    switch (n->kind) {
    case HT_JN_LITERAL: *out = n->value; return HT_OK;
    case HT_JN_HOLE: *out = r->hole; return HT_OK;
    case HT_JN_NAME: return look_up(r, s, n->name, out);
    case HT_JN_LIST: return eval_list(r, s, n, out);
    case HT_JN_DICT:
        HT_TRY(ht_jv_dict(r, out, n->n / 2));
        for (size_t i = 0; i < n->n; i += 2) {
            HT_TRY(eval(r, s, n->items[i], &a));
            HT_TRY(eval(r, s, n->items[i + 1], &b));
            HT_TRY(ht_jdict_set(r, out->dict, a, b));
        }
        return HT_OK;
    case HT_JN_ATTRIBUTE:
        HT_TRY(eval(r, s, n->a, &a));
        r->line = n->line;
        return ht_jinja_attribute(r, a, n->name, out);
    case HT_JN_ITEM:
        HT_TRY(eval(r, s, n->a, &a));
        HT_TRY(eval(r, s, n->b, &b));
        r->line = n->line;
        return ht_jinja_item(r, a, b, out);
    case HT_JN_SLICE: HT_TRY(eval(r, s, n->a, &a)); return slice(r, s, n, a, out);
    case HT_JN_CALL: return eval_call(r, s, n, out);
    case HT_JN_FILTER:
        HT_TRY(eval(r, s, n->a, &a));
        HT_TRY(arguments(r, s, n, &args));
        r->line = n->line;
        return ht_jinja_filter(r, n->name, a, &args, out);
    case HT_JN_TEST:
        HT_TRY(eval(r, s, n->a, &a));
        HT_TRY(arguments(r, s, n, &args));
        HT_TRY(ht_jinja_test(r, n->name, a, &args, &yes));
        *out = ht_jv_bool(yes != (n->op == 1));
        return HT_OK;
    case HT_JN_UNARY: HT_TRY(eval(r, s, n->a, &a)); return eval_unary(r, n, a, out);
    case HT_JN_BINARY:
        HT_TRY(eval(r, s, n->a, &a));
        HT_TRY(eval(r, s, n->b, &b));
        r->line = n->line;
        return ht_jinja_binary(r, n->op, a, b, out);
    case HT_JN_CONCAT:
        for (size_t i = 0; i < n->n; i++) {
            HT_TRY(eval(r, s, n->items[i], &a));
            HT_TRY(ht_jbuffer_print(r, &text, a));
        }
        return ht_jbuffer_string(r, &text, out);
    case HT_JN_COMPARE: return compare(r, s, n, out);
    case HT_JN_AND:
    case HT_JN_OR:
        HT_TRY(eval(r, s, n->a, out));
        return ht_jv_truth(*out) == (n->kind == HT_JN_OR) ? HT_OK : eval(r, s, n->b, out);
    case HT_JN_CONDITION:
        HT_TRY(eval(r, s, n->b, &b));
        if (ht_jv_truth(b)) return eval(r, s, n->a, out);
        *out = undefined;
        return n->c ? eval(r, s, n->c, out) : HT_OK;
    default: return HT_JFAIL(r, "a statement where an expression is needed");
    }
}

static enum ht_status eval(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                           struct ht_jv *out)
{
    HT_TRY(ht_jinja_enter(r));
    HT_TRY(ht_jinja_charge(r, 1));
    r->line = n->line;
    HT_TRY(eval_inner(r, s, n, out));
    r->depth--;
    return HT_OK;
}

// ---- statements ----

static enum ht_status assign_to(struct ht_jrun *r, struct ht_jscope *s,
                                const struct ht_jnode *target, struct ht_jv v)
{
    struct ht_jlist *l;
    struct ht_jv space, key;
    if (target->kind == HT_JN_NAME) return assign(r, s, target->name, v);
    if (target->kind == HT_JN_ATTRIBUTE) {
        HT_TRY(look_up(r, s, target->a->name, &space));
        if (space.kind != HT_JV_NAMESPACE)
            return HT_JFAIL(r, "only a namespace's attributes can be set");
        key = (struct ht_jv){ .kind = HT_JV_STRING, .s = target->name };
        return ht_jdict_set(r, space.dict, key, v);
    }
    HT_TRY(ht_jv_iterate(r, v, &l));
    if (l->n != target->n) return HT_JFAIL(r, "%zu values for %zu names", l->n, target->n);
    for (size_t i = 0; i < l->n; i++) HT_TRY(assign_to(r, s, target->items[i], l->items[i]));
    return HT_OK;
}

static enum ht_status run_for(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              enum flow *flow)
{
    static const struct ht_jstring loop_name = { "loop", 4, NULL, false };
    struct ht_jlist *l;
    struct ht_jscope *inner;
    struct ht_jloop *loop;
    struct ht_jv v, kept;

    HT_TRY(eval(r, s, n->b, &v));
    HT_TRY(ht_jv_iterate(r, v, &l));
    if (n->d) { // for .. if: the loop counts only what passes
        HT_TRY(ht_jv_list(r, &kept, 0, false));
        for (size_t i = 0; i < l->n; i++) {
            HT_TRY(new_scope(r, s, &inner));
            HT_TRY(assign_to(r, inner, n->a, l->items[i]));
            HT_TRY(eval(r, inner, n->d, &v));
            if (ht_jv_truth(v)) HT_TRY(ht_jlist_add(r, kept.list, l->items[i]));
        }
        l = kept.list;
    }
    if (l->n == 0) return n->e ? run(r, s, n->e, flow) : HT_OK;
    HT_TRY(ht_jinja_take(r, &loop, sizeof *loop));
    *loop = (struct ht_jloop){ .items = l };
    for (size_t i = 0; i < l->n; i++) {
        enum flow inside = FLOW_ON;
        HT_TRY(ht_jinja_charge(r, 1));
        loop->index = i;
        HT_TRY(new_scope(r, s, &inner));
        HT_TRY(assign(r, inner, &loop_name, (struct ht_jv){ .kind = HT_JV_LOOP, .loop = loop }));
        HT_TRY(assign_to(r, inner, n->a, l->items[i]));
        HT_TRY(run(r, inner, n->c, &inside));
        if (inside == FLOW_BREAK) break;
    }
    return HT_OK;
}

static enum ht_status run_generation(struct ht_jrun *r, struct ht_jscope *s,
                                     const struct ht_jnode *n)
{
    struct ht_jv text;
    HT_TRY(capture(r, s, n->b, &text));
    if (r->n_generations == r->capacity_generations) {
        const size_t capacity = r->capacity_generations ? 2 * r->capacity_generations : 8;
        struct ht_jinja_span *grown;
        HT_TRY(ht_jinja_take(r, &grown, capacity * sizeof *grown));
        if (r->n_generations) memcpy(grown, r->generations, r->n_generations * sizeof *grown);
        r->generations = grown;
        r->capacity_generations = capacity;
    }
    r->generations[r->n_generations++] = (struct ht_jinja_span){ r->out->n, r->out->n + text.s->n };
    return ht_jbuffer_add_string(r, r->out, text.s);
}

static enum ht_status make_macro(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                 struct ht_jv *out)
{
    struct ht_jfunction *f;
    HT_TRY(ht_jinja_take(r, &f, sizeof *f));
    *f = (struct ht_jfunction){ .kind = HT_JF_MACRO, .node = n, .scope = s };
    *out = (struct ht_jv){ .kind = HT_JV_FUNCTION, .function = f };
    return HT_OK;
}

static enum ht_status run_call(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n)
{
    struct ht_jv f, caller;
    struct ht_jargs a;
    HT_TRY(eval(r, s, n->a->a, &f));
    if (f.kind != HT_JV_FUNCTION || f.function->kind != HT_JF_MACRO)
        return HT_JFAIL(r, "{%% call %%} needs a macro");
    HT_TRY(arguments(r, s, n->a, &a));
    HT_TRY(make_macro(r, s, n->b, &caller));
    struct ht_jfunction with = *f.function;
    with.caller = caller;
    HT_TRY(call_macro(r, &with, &a, &f));
    return ht_jbuffer_add_string(r, r->out, f.s);
}

/* The text of a body through a chain of filters; chain NULL: as it is. */
static enum ht_status filtered(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *chain,
                               const struct ht_jnode *body, struct ht_jv *out)
{
    struct ht_jscope *inner;
    const struct ht_jv outer = r->hole;
    HT_TRY(new_scope(r, s, &inner));
    HT_TRY(capture(r, inner, body, out));
    if (!chain) return HT_OK;
    r->hole = *out;
    HT_TRY(eval(r, s, chain, out));
    r->hole = outer;
    return HT_OK;
}

static enum ht_status run_if(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                             enum flow *flow)
{
    struct ht_jv v;
    for (size_t i = 0; i < n->n; i += 2) {
        HT_TRY(eval(r, s, n->items[i], &v));
        if (ht_jv_truth(v)) return run(r, s, n->items[i + 1], flow);
    }
    return n->c ? run(r, s, n->c, flow) : HT_OK;
}

static enum ht_status run_one(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              enum flow *flow)
{
    struct ht_jscope *inner;
    struct ht_jv v;

    switch (n->kind) {
    case HT_JN_TEXT: return ht_jbuffer_add_string(r, r->out, n->value.s);
    case HT_JN_OUTPUT: HT_TRY(eval(r, s, n->a, &v)); return ht_jbuffer_print(r, r->out, v);
    case HT_JN_IF: return run_if(r, s, n, flow);
    case HT_JN_FOR: return run_for(r, s, n, flow);
    case HT_JN_SET: HT_TRY(eval(r, s, n->b, &v)); return assign_to(r, s, n->a, v);
    case HT_JN_SET_BLOCK: HT_TRY(filtered(r, s, n->c, n->b, &v)); return assign_to(r, s, n->a, v);
    case HT_JN_MACRO: HT_TRY(make_macro(r, s, n, &v)); return assign(r, s, n->name, v);
    case HT_JN_CALL_BLOCK: return run_call(r, s, n);
    case HT_JN_FILTER_BLOCK:
        HT_TRY(filtered(r, s, n->a, n->b, &v));
        return ht_jbuffer_print(r, r->out, v);
    case HT_JN_WITH:
        HT_TRY(new_scope(r, s, &inner));
        for (size_t i = 0; i < n->n; i += 2) {
            HT_TRY(eval(r, s, n->items[i + 1], &v));
            HT_TRY(assign_to(r, inner, n->items[i], v));
        }
        return run(r, inner, n->c, flow);
    case HT_JN_GENERATION: return run_generation(r, s, n);
    case HT_JN_BREAK: *flow = FLOW_BREAK; return HT_OK;
    case HT_JN_CONTINUE: *flow = FLOW_CONTINUE; return HT_OK;
    default: return HT_JFAIL(r, "an expression where a statement is needed");
    }
}

static enum ht_status run(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *body,
                          enum flow *flow)
{
    *flow = FLOW_ON;
    HT_TRY(ht_jinja_enter(r));
    for (size_t i = 0; i < body->n && *flow == FLOW_ON; i++) {
        HT_TRY(ht_jinja_charge(r, 1));
        r->line = body->items[i]->line;
        HT_TRY(run_one(r, s, body->items[i], flow));
    }
    r->depth--;
    return HT_OK;
}

static enum ht_status copy_out(struct ht_jrun *r, const struct ht_jbuffer *text,
                               struct ht_jinja_output *out)
{
    out->text = malloc(text->n + 1);
    out->user = malloc(text->n + 1);
    out->generations = malloc((r->n_generations + 1) * sizeof *out->generations);
    if (!out->text || !out->user || !out->generations)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes", text->n);
    if (text->n) memcpy(out->text, text->p, text->n);
    if (text->n) memcpy(out->user, text->mask, text->n);
    if (r->n_generations)
        memcpy(out->generations, r->generations, r->n_generations * sizeof *out->generations);
    out->text[text->n] = '\0';
    out->n_bytes = text->n;
    out->n_generations = r->n_generations;
    return HT_OK;
}

enum ht_status ht_jinja_render(const struct ht_jinja *t, const struct ht_jinja_var *vars,
                               size_t n_vars, time_t now, struct ht_jinja_output *out)
{
    struct ht_jbuffer text = { 0 };
    struct ht_jrun r = { .name = t->name,
                         .line = 1,
                         .arena = { .limit = HT_JINJA_MAX_MEMORY },
                         .out = &text,
                         .now = now };
    enum ht_status st = HT_OK;
    struct ht_jscope *globals;
    enum flow flow;

    *out = (struct ht_jinja_output){ 0 };
    HT_TRY_GOTO(st, done, new_scope(&r, NULL, &globals));
    for (size_t i = 0; i < n_vars; i++) {
        struct ht_jv name, v;
        if (!vars[i].value) continue;
        HT_TRY_GOTO(st, done, ht_jv_literal(&r, &name, vars[i].name, strlen(vars[i].name)));
        HT_TRY_GOTO(st, done, ht_jv_from_json(&r, &v, vars[i].value, &vars[i], vars[i].user));
        HT_TRY_GOTO(st, done, assign(&r, globals, name.s, v));
    }
    HT_TRY_GOTO(st, done, run(&r, globals, t->body, &flow));
    HT_TRY_GOTO(st, done, copy_out(&r, &text, out));
done:
    if (st != HT_OK) ht_jinja_output_free(out);
    ht_jarena_free(&r.arena);
    return st;
}

void ht_jinja_output_free(struct ht_jinja_output *out)
{
    free(out->text);
    free(out->user);
    free(out->generations);
    *out = (struct ht_jinja_output){ 0 };
}
