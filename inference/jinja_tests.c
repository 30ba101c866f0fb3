/* inference/jinja_tests.c: what follows "is". */
#include <string.h>

#include "inference/jinja_impl.h"

enum test {
    T_DEFINED,
    T_UNDEFINED,
    T_NONE,
    T_STRING,
    T_NUMBER,
    T_INTEGER,
    T_FLOAT,
    T_BOOLEAN,
    T_TRUE,
    T_FALSE,
    T_MAPPING,
    T_ITERABLE,
    T_SEQUENCE,
    T_CALLABLE,
    T_ODD,
    T_EVEN,
    T_UPPER,
    T_LOWER,
    T_ONE_ARGUMENT,
    T_DIVISIBLEBY = T_ONE_ARGUMENT,
    T_IN,
    T_SAMEAS,
    T_EQ,
    T_EQ2,
    T_EQ3,
    T_NE,
    T_NE2,
    T_LT,
    T_LT2,
    T_LT3,
    T_LE,
    T_LE2,
    T_GT,
    T_GT2,
    T_GT3,
    T_GE,
    T_GE2,
    T_END
};
static const char *const names[T_END] = {
    "defined", "undefined",   "none",        "string",   "number",   "integer",  "float", "boolean",
    "true",    "false",       "mapping",     "iterable", "sequence", "callable", "odd",   "even",
    "upper",   "lower",       "divisibleby", "in",       "sameas",   "equalto",  "eq",    "==",
    "ne",      "!=",          "lt",          "<",        "lessthan", "le",       "<=",    "gt",
    ">",       "greaterthan", "ge",          ">="
};

static int find(const struct ht_jstring *name)
{
    for (int i = 0; i < T_END; i++)
        if (ht_jstring_is(name, names[i])) return i;
    return -1;
}

bool ht_jinja_has_test(const struct ht_jstring *name)
{
    return find(name) >= 0;
}

static enum ht_status cased(struct ht_jrun *r, struct ht_jv v, bool upper, bool *out)
{
    struct ht_jv text, id;
    const struct ht_jargs none = { 0 };
    HT_TRY(ht_jv_to_string(r, v, &text));
    HT_TRY(ht_jv_literal(r, &id, upper ? "isupper" : "islower", 7));
    HT_TRY(ht_jinja_method(r, ht_jinja_method_id(text, id.s), text, &none, &id));
    *out = id.b;
    return HT_OK;
}

static enum ht_status one_argument(struct ht_jrun *r, enum test t, struct ht_jv v, struct ht_jv x,
                                   bool *out)
{
    int order = 0;
    switch (t) {
    case T_DIVISIBLEBY:
        if (v.kind != HT_JV_INT || x.kind != HT_JV_INT || x.i == 0)
            return HT_JFAIL(r, "divisibleby needs integers, not 0");
        *out = x.i == -1 || v.i % x.i == 0;
        return HT_OK;
    case T_IN: return ht_jv_contains(r, x, v, out);
    case T_SAMEAS:
        if (v.kind != x.kind) return HT_OK;
        if (v.kind == HT_JV_LIST || v.kind == HT_JV_DICT)
            *out = v.kind == HT_JV_LIST ? v.list == x.list : v.dict == x.dict;
        else
            return ht_jv_equal(r, v, x, out);
        return HT_OK;
    case T_EQ:
    case T_EQ2:
    case T_EQ3: return ht_jv_equal(r, v, x, out);
    case T_NE:
    case T_NE2:
        HT_TRY(ht_jv_equal(r, v, x, out));
        *out = !*out;
        return HT_OK;
    default: break;
    }
    HT_TRY(ht_jv_order(r, v, x, &order));
    *out = t <= T_LT3 ? order < 0 : t <= T_LE2 ? order <= 0 : t <= T_GT3 ? order > 0 : order >= 0;
    return HT_OK;
}

enum ht_status ht_jinja_test(struct ht_jrun *r, const struct ht_jstring *name, struct ht_jv v,
                             const struct ht_jargs *a, bool *out)
{
    const int id = find(name);
    *out = false;
    HT_TRY(ht_jinja_charge(r, 1));
    if (id < 0) return HT_JFAIL(r, "no test is called '%.*s'", (int)name->n, name->p);
    if (a->n != (id >= T_ONE_ARGUMENT) || a->n_named)
        return HT_JFAIL(r, "the test '%s' has %zu arguments", names[id], a->n + a->n_named);
    if (id >= T_ONE_ARGUMENT) return one_argument(r, (enum test)id, v, a->positional[0], out);
    switch ((enum test)id) {
    case T_DEFINED: *out = v.kind != HT_JV_UNDEFINED; break;
    case T_UNDEFINED: *out = v.kind == HT_JV_UNDEFINED; break;
    case T_NONE: *out = v.kind == HT_JV_NONE; break;
    case T_STRING: *out = v.kind == HT_JV_STRING; break;
    case T_NUMBER:
        *out = v.kind == HT_JV_INT || v.kind == HT_JV_FLOAT || v.kind == HT_JV_BOOL;
        break;
    case T_INTEGER: *out = v.kind == HT_JV_INT; break;
    case T_FLOAT: *out = v.kind == HT_JV_FLOAT; break;
    case T_BOOLEAN: *out = v.kind == HT_JV_BOOL; break;
    case T_TRUE: *out = v.kind == HT_JV_BOOL && v.b; break;
    case T_FALSE: *out = v.kind == HT_JV_BOOL && !v.b; break;
    case T_MAPPING: *out = v.kind == HT_JV_DICT; break;
    case T_ITERABLE:
        *out = v.kind == HT_JV_STRING || v.kind == HT_JV_LIST || v.kind == HT_JV_DICT ||
               v.kind == HT_JV_UNDEFINED;
        break;
    case T_SEQUENCE: // what has a length and items
        *out = v.kind == HT_JV_STRING || v.kind == HT_JV_LIST || v.kind == HT_JV_DICT ||
               v.kind == HT_JV_UNDEFINED;
        break;
    case T_CALLABLE: *out = v.kind == HT_JV_FUNCTION; break;
    case T_ODD:
    case T_EVEN:
        if (v.kind != HT_JV_INT)
            return HT_JFAIL(r, "odd and even need an integer, not %s", ht_jv_kind_name(v));
        *out = (v.i % 2 != 0) == (id == T_ODD);
        break;
    default: return cased(r, v, id == T_UPPER, out);
    }
    return HT_OK;
}
