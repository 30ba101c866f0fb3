/* inference/jinja_eval.c: values of expressions. Every node visited is a step. */
#include "inference/jinja_run.h"

static const struct ht_jv undefined;

static enum ht_status slice(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *node,
                            struct ht_jv v, struct ht_jv *out)
{
    const struct ht_jnode *const parts[3] = { node->b, node->c, node->d };
    int64_t at[3] = { 0, 0, 1 }, n;
    bool given[3] = { false };

    for (int k = 0; k < 3; k++) {
        struct ht_jv x = ht_jv_none();
        if (parts[k]) HT_TRY(ht_jrun_eval(r, s, parts[k], &x));
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

static enum ht_status compare(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                              struct ht_jv *out)
{
    struct ht_jv left, right;
    bool yes = true;
    int order;
    HT_TRY(ht_jrun_eval(r, s, n->a, &left));
    for (size_t i = 0; i < n->n && yes; i++, left = right) {
        HT_TRY(ht_jrun_eval(r, s, n->items[i], &right));
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

enum ht_status ht_jrun_arguments(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                 struct ht_jargs *a)
{
    *a = (struct ht_jargs){ .n = n->n, .names = n->keywords, .n_named = n->n_keywords };
    if (n->n) HT_TRY(ht_jinja_take(r, &a->positional, n->n * sizeof *a->positional));
    if (n->n_keywords) HT_TRY(ht_jinja_take(r, &a->named, n->n_keywords * sizeof *a->named));
    for (size_t i = 0; i < n->n; i++) HT_TRY(ht_jrun_eval(r, s, n->items[i], &a->positional[i]));
    for (size_t i = 0; i < n->n_keywords; i++)
        HT_TRY(ht_jrun_eval(r, s, n->keyword_values[i], &a->named[i]));
    return HT_OK;
}

static enum ht_status eval_call(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                struct ht_jv *out)
{
    struct ht_jargs a;
    struct ht_jv f;
    HT_TRY(ht_jrun_eval(r, s, n->a, &f));
    if (f.kind == HT_JV_UNDEFINED) {
        const struct ht_jstring *name = n->a->name;
        return HT_JFAIL(r, "no function is called '%.*s'", name ? (int)name->n : 1,
                        name ? name->p : "?");
    }
    HT_TRY(ht_jrun_arguments(r, s, n, &a));
    r->line = n->line;
    return ht_jinja_call(r, f, &a, out);
}

static enum ht_status eval_list(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                                struct ht_jv *out)
{
    struct ht_jv v;
    HT_TRY(ht_jv_list(r, out, n->n, n->op == 1));
    for (size_t i = 0; i < n->n; i++) {
        HT_TRY(ht_jrun_eval(r, s, n->items[i], &v));
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
    return ht_jrun_arithmetic(r, n->op, ht_jv_int(0), v, out);
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
    case HT_JN_NAME: return ht_jrun_look_up(r, s, n->name, out);
    case HT_JN_LIST: return eval_list(r, s, n, out);
    case HT_JN_DICT:
        HT_TRY(ht_jv_dict(r, out, n->n / 2));
        for (size_t i = 0; i < n->n; i += 2) {
            HT_TRY(ht_jrun_eval(r, s, n->items[i], &a));
            HT_TRY(ht_jrun_eval(r, s, n->items[i + 1], &b));
            HT_TRY(ht_jdict_set(r, out->dict, a, b));
        }
        return HT_OK;
    case HT_JN_ATTRIBUTE:
        HT_TRY(ht_jrun_eval(r, s, n->a, &a));
        r->line = n->line;
        return ht_jinja_attribute(r, a, n->name, out);
    case HT_JN_ITEM:
        HT_TRY(ht_jrun_eval(r, s, n->a, &a));
        HT_TRY(ht_jrun_eval(r, s, n->b, &b));
        r->line = n->line;
        return ht_jinja_item(r, a, b, out);
    case HT_JN_SLICE: HT_TRY(ht_jrun_eval(r, s, n->a, &a)); return slice(r, s, n, a, out);
    case HT_JN_CALL: return eval_call(r, s, n, out);
    case HT_JN_FILTER:
        HT_TRY(ht_jrun_eval(r, s, n->a, &a));
        HT_TRY(ht_jrun_arguments(r, s, n, &args));
        r->line = n->line;
        return ht_jinja_filter(r, n->name, a, &args, out);
    case HT_JN_TEST:
        HT_TRY(ht_jrun_eval(r, s, n->a, &a));
        HT_TRY(ht_jrun_arguments(r, s, n, &args));
        HT_TRY(ht_jinja_test(r, n->name, a, &args, &yes));
        *out = ht_jv_bool(yes != (n->op == 1));
        return HT_OK;
    case HT_JN_UNARY: HT_TRY(ht_jrun_eval(r, s, n->a, &a)); return eval_unary(r, n, a, out);
    case HT_JN_BINARY:
        HT_TRY(ht_jrun_eval(r, s, n->a, &a));
        HT_TRY(ht_jrun_eval(r, s, n->b, &b));
        r->line = n->line;
        return ht_jinja_binary(r, n->op, a, b, out);
    case HT_JN_CONCAT:
        for (size_t i = 0; i < n->n; i++) {
            HT_TRY(ht_jrun_eval(r, s, n->items[i], &a));
            HT_TRY(ht_jbuffer_print(r, &text, a));
        }
        return ht_jbuffer_string(r, &text, out);
    case HT_JN_COMPARE: return compare(r, s, n, out);
    case HT_JN_AND:
    case HT_JN_OR:
        HT_TRY(ht_jrun_eval(r, s, n->a, out));
        return ht_jv_truth(*out) == (n->kind == HT_JN_OR) ? HT_OK : ht_jrun_eval(r, s, n->b, out);
    case HT_JN_CONDITION:
        HT_TRY(ht_jrun_eval(r, s, n->b, &b));
        if (ht_jv_truth(b)) return ht_jrun_eval(r, s, n->a, out);
        *out = undefined;
        return n->c ? ht_jrun_eval(r, s, n->c, out) : HT_OK;
    default: return HT_JFAIL(r, "a statement where an expression is needed");
    }
}

enum ht_status ht_jrun_eval(struct ht_jrun *r, struct ht_jscope *s, const struct ht_jnode *n,
                            struct ht_jv *out)
{
    HT_TRY(ht_jinja_enter(r));
    HT_TRY(ht_jinja_charge(r, 1));
    r->line = n->line;
    HT_TRY(eval_inner(r, s, n, out));
    r->depth--;
    return HT_OK;
}
