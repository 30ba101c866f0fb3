/* inference/jinja_expression.c: tokens -> expressions. From loose to tight, as in Jinja:
 *
 *   if-else | or | and | not | == < in .. | + - | ~ | * / // % | ** | unary | . [] () | filters,
 *   tests
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_parser.h"

static enum ht_status literal(struct ht_jparser *p, struct ht_jnode **out, struct ht_jv v)
{
    HT_TRY(ht_jparse_node(p, out, HT_JN_LITERAL));
    (*out)->value = v;
    return HT_OK;
}

static enum ht_status number(struct ht_jparser *p, struct ht_jnode **out)
{
    char text[64];
    size_t n = 0;
    for (size_t i = 0; i < p->tok->n; i++)
        if (p->tok->p[i] != '_' && n + 1 < sizeof text) text[n++] = p->tok->p[i];
    text[n] = '\0';
    errno = 0;
    const bool real = p->tok->kind == HT_JT_FLOAT;
    const struct ht_jv v =
        real ? ht_jv_float(strtod(text, NULL)) : ht_jv_int(strtoll(text, NULL, 10));
    if (errno == ERANGE || n + 1 == sizeof text)
        return ht_jparse_fail(p, "number out of range", p->tok->p, p->tok->n);
    HT_TRY(literal(p, out, v));
    p->tok++;
    return HT_OK;
}

/* Comma-separated expressions up to `close` into list. */
static enum ht_status items(struct ht_jparser *p, struct ht_jnode *list, int close)
{
    struct ht_jnode *item;
    while (!ht_jparse_is_op(p, close)) {
        HT_TRY(ht_jparse_expression(p, &item));
        HT_TRY(ht_jparse_add(p, list, item));
        if (!ht_jparse_take_op(p, ',')) break;
    }
    return ht_jparse_want_op(p, close);
}

static enum ht_status parentheses(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *first = NULL;
    p->tok++;
    if (!ht_jparse_is_op(p, ')')) {
        HT_TRY(ht_jparse_expression(p, &first));
        if (ht_jparse_take_op(p, ')')) {
            *out = first;
            return HT_OK;
        }
        HT_TRY(ht_jparse_want_op(p, ','));
    }
    HT_TRY(ht_jparse_node(p, out, HT_JN_LIST));
    (*out)->op = 1;
    if (first) HT_TRY(ht_jparse_add(p, *out, first));
    return items(p, *out, ')');
}

static enum ht_status primary(struct ht_jparser *p, struct ht_jnode **out)
{
    static const char *const words[] = { "true", "True", "false", "False", "none", "None" };
    const struct ht_jstring *s;

    switch (p->tok->kind) {
    case HT_JT_NAME:
        for (int i = 0; i < 6; i++)
            if (ht_jparse_take_word(p, words[i]))
                return literal(p, out, i < 4 ? ht_jv_bool(i < 2) : ht_jv_none());
        HT_TRY(ht_jparse_node(p, out, HT_JN_NAME));
        return ht_jparse_name(p, &(*out)->name);
    case HT_JT_STRING:
        HT_TRY(literal(p, out, (struct ht_jv){ .kind = HT_JV_STRING }));
        HT_TRY(ht_jparse_unescape(p, &s, p->tok->p, p->tok->n));
        for (p->tok++; p->tok->kind == HT_JT_STRING; p->tok++) { // "a" "b"
            const struct ht_jstring *more;
            HT_TRY(ht_jparse_unescape(p, &more, p->tok->p, p->tok->n));
            char *both = ht_jarena_take(&p->t->arena, s->n + more->n + 1);
            if (!both) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
            if (s->n) memcpy(both, s->p, s->n);
            if (more->n) memcpy(both + s->n, more->p, more->n);
            HT_TRY(ht_jparse_string(p, &s, both, s->n + more->n));
        }
        (*out)->value.s = s;
        return HT_OK;
    case HT_JT_INT:
    case HT_JT_FLOAT: return number(p, out);
    default: break;
    }
    if (ht_jparse_is_op(p, '(')) return parentheses(p, out);
    if (ht_jparse_take_op(p, '[')) {
        HT_TRY(ht_jparse_node(p, out, HT_JN_LIST));
        return items(p, *out, ']');
    }
    if (ht_jparse_take_op(p, '{')) {
        struct ht_jnode *e;
        HT_TRY(ht_jparse_node(p, out, HT_JN_DICT));
        while (!ht_jparse_is_op(p, '}')) {
            HT_TRY(ht_jparse_expression(p, &e));
            HT_TRY(ht_jparse_add(p, *out, e));
            HT_TRY(ht_jparse_want_op(p, ':'));
            HT_TRY(ht_jparse_expression(p, &e));
            HT_TRY(ht_jparse_add(p, *out, e));
            if (!ht_jparse_take_op(p, ',')) break;
        }
        return ht_jparse_want_op(p, '}');
    }
    return ht_jparse_unexpected(p, "an expression");
}

/* "(a, b, key=c)" into n, the parenthesis being the next token. */
static enum ht_status arguments(struct ht_jparser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    p->tok++;
    while (!ht_jparse_is_op(p, ')')) {
        if (p->tok->kind == HT_JT_NAME && p->tok[1].kind == HT_JT_OPERATOR && p->tok[1].op == '=') {
            const size_t k = n->n_keywords;
            const struct ht_jstring **names = ht_jarena_take(&p->t->arena, (k + 1) * sizeof *names);
            struct ht_jnode **values = ht_jarena_take(&p->t->arena, (k + 1) * sizeof *values);
            if (!names || !values || k == 64) return HT_JPARSE_FAIL(p, "too many named arguments");
            for (size_t i = 0; i < k; i++) {
                names[i] = n->keywords[i];
                values[i] = n->keyword_values[i];
            }
            HT_TRY(ht_jparse_name(p, &names[k]));
            p->tok++;
            HT_TRY(ht_jparse_expression(p, &values[k]));
            HT_TRY(ht_jparse_over(p, n, values[k]));
            n->keywords = names;
            n->keyword_values = values;
            n->n_keywords = k + 1;
        } else {
            if (ht_jparse_is_op(p, '*') || ht_jparse_is_op(p, HT_JOP2('*', '*')))
                return HT_JPARSE_FAIL(p, "* arguments are not supported");
            HT_TRY(ht_jparse_expression(p, &e));
            HT_TRY(ht_jparse_add(p, n, e));
        }
        if (!ht_jparse_take_op(p, ',')) break;
    }
    return ht_jparse_want_op(p, ')');
}

enum ht_status ht_jparse_wrap(struct ht_jparser *p, struct ht_jnode **out, enum ht_jnode_kind kind,
                              struct ht_jnode *a)
{
    HT_TRY(ht_jparse_node(p, out, kind));
    (*out)->a = a;
    return ht_jparse_over(p, *out, a);
}

static enum ht_status subscript(struct ht_jparser *p, struct ht_jnode **e)
{
    struct ht_jnode *n, *parts[3] = { 0 };
    int i = 0;
    p->tok++;
    bool slice = false;
    for (;; i++) {
        if (!ht_jparse_is_op(p, ':') && !ht_jparse_is_op(p, ']'))
            HT_TRY(ht_jparse_expression(p, &parts[i]));
        if (i == 2 || !ht_jparse_take_op(p, ':')) break;
        slice = true;
    }
    HT_TRY(ht_jparse_want_op(p, ']'));
    if (!slice && !parts[0]) return ht_jparse_unexpected(p, "an index");
    HT_TRY(ht_jparse_wrap(p, &n, slice ? HT_JN_SLICE : HT_JN_ITEM, *e));
    n->b = parts[0];
    n->c = parts[1];
    n->d = parts[2];
    for (i = 0; i < 3; i++) HT_TRY(ht_jparse_over(p, n, parts[i]));
    *e = n;
    return HT_OK;
}

static enum ht_status postfix(struct ht_jparser *p, struct ht_jnode **e)
{
    struct ht_jnode *n;
    for (;;) {
        if (ht_jparse_take_op(p, '.')) {
            if (p->tok->kind == HT_JT_INT) {
                HT_TRY(ht_jparse_wrap(p, &n, HT_JN_ITEM, *e));
                HT_TRY(number(p, &n->b));
            } else {
                HT_TRY(ht_jparse_wrap(p, &n, HT_JN_ATTRIBUTE, *e));
                HT_TRY(ht_jparse_name(p, &n->name));
            }
            *e = n;
        } else if (ht_jparse_is_op(p, '[')) {
            HT_TRY(subscript(p, e));
        } else if (ht_jparse_is_op(p, '(')) {
            HT_TRY(ht_jparse_wrap(p, &n, HT_JN_CALL, *e));
            HT_TRY(arguments(p, n));
            *e = n;
        } else {
            return HT_OK;
        }
    }
}

enum ht_status ht_jparse_one_filter(struct ht_jparser *p, struct ht_jnode **e)
{
    struct ht_jnode *n;
    HT_TRY(ht_jparse_wrap(p, &n, HT_JN_FILTER, *e));
    HT_TRY(ht_jparse_name(p, &n->name));
    if (!ht_jinja_has_filter(n->name))
        return ht_jparse_fail(p, "no filter is called", n->name->p, n->name->n);
    if (ht_jparse_is_op(p, '(')) HT_TRY(arguments(p, n));
    *e = n;
    return HT_OK;
}

static enum ht_status test(struct ht_jparser *p, struct ht_jnode **e)
{
    static const char *const no_argument[] = { "else", "or", "and", "if",
                                               "in",   "is", "not", "recursive" };
    struct ht_jnode *n, *argument;
    HT_TRY(ht_jparse_wrap(p, &n, HT_JN_TEST, *e));
    n->op = ht_jparse_take_word(p, "not");
    HT_TRY(ht_jparse_name(p, &n->name));
    if (!ht_jinja_has_test(n->name))
        return ht_jparse_fail(p, "no test is called", n->name->p, n->name->n);
    bool more = p->tok->kind == HT_JT_NAME || p->tok->kind == HT_JT_STRING ||
                p->tok->kind == HT_JT_INT || p->tok->kind == HT_JT_FLOAT ||
                ht_jparse_is_op(p, '[') || ht_jparse_is_op(p, '{');
    for (size_t i = 0; i < sizeof no_argument / sizeof *no_argument; i++)
        if (ht_jparse_is_word(p, no_argument[i])) more = false;
    if (ht_jparse_is_op(p, '(')) {
        HT_TRY(arguments(p, n));
    } else if (more) {
        HT_TRY(primary(p, &argument));
        HT_TRY(postfix(p, &argument));
        HT_TRY(ht_jparse_add(p, n, argument));
    }
    *e = n;
    return HT_OK;
}

static enum ht_status unary(struct ht_jparser *p, struct ht_jnode **out, bool with_filter)
{
    struct ht_jnode *n, *e;
    const int op = ht_jparse_is_op(p, '-') ? '-' : ht_jparse_is_op(p, '+') ? '+' : 0;

    if (++p->depth > HT_JINJA_MAX_DEPTH) return HT_JPARSE_FAIL(p, "an expression nested too deep");
    if (op) {
        p->tok++;
        HT_TRY(unary(p, &n, false));
        HT_TRY(ht_jparse_wrap(p, &e, HT_JN_UNARY, n));
        e->op = op;
    } else {
        HT_TRY(primary(p, &e));
    }
    HT_TRY(postfix(p, &e));
    while (with_filter) {
        if (ht_jparse_take_op(p, '|')) {
            HT_TRY(ht_jparse_one_filter(p, &e));
        } else if (ht_jparse_take_word(p, "is")) {
            HT_TRY(test(p, &e));
        } else if (ht_jparse_is_op(p, '(')) {
            HT_TRY(ht_jparse_wrap(p, &n, HT_JN_CALL, e));
            HT_TRY(arguments(p, n));
            e = n;
        } else {
            break;
        }
    }
    p->depth--;
    *out = e;
    return HT_OK;
}

static enum ht_status binary(struct ht_jparser *p, struct ht_jnode **left, int op,
                             struct ht_jnode *right)
{
    struct ht_jnode *n;
    HT_TRY(ht_jparse_wrap(p, &n, HT_JN_BINARY, *left));
    n->op = op;
    n->b = right;
    *left = n;
    return ht_jparse_over(p, n, right);
}

static enum ht_status power(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *right;
    HT_TRY(unary(p, out, true));
    while (ht_jparse_take_op(p, HT_JOP2('*', '*'))) {
        HT_TRY(unary(p, &right, true));
        HT_TRY(binary(p, out, HT_JOP_POWER, right));
    }
    return HT_OK;
}

static enum ht_status product(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *right;
    HT_TRY(power(p, out));
    for (;;) {
        const int op = p->tok->kind == HT_JT_OPERATOR ? p->tok->op : 0;
        if (op != '*' && op != '/' && op != '%' && op != HT_JOP2('/', '/')) return HT_OK;
        p->tok++;
        HT_TRY(power(p, &right));
        HT_TRY(binary(p, out, op == HT_JOP2('/', '/') ? HT_JOP_FLOOR : op, right));
    }
}

static enum ht_status concat(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    HT_TRY(product(p, out));
    if (!ht_jparse_is_op(p, '~')) return HT_OK;
    HT_TRY(ht_jparse_node(p, &n, HT_JN_CONCAT));
    HT_TRY(ht_jparse_add(p, n, *out));
    while (ht_jparse_take_op(p, '~')) {
        HT_TRY(product(p, &e));
        HT_TRY(ht_jparse_add(p, n, e));
    }
    *out = n;
    return HT_OK;
}

static enum ht_status sum(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *right;
    HT_TRY(concat(p, out));
    while (ht_jparse_is_op(p, '+') || ht_jparse_is_op(p, '-')) {
        const int op = p->tok++->op;
        HT_TRY(concat(p, &right));
        HT_TRY(binary(p, out, op, right));
    }
    return HT_OK;
}

static bool compare_op(struct ht_jparser *p, int *op)
{
    static const int ops[] = { HT_JOP2('=', '='), HT_JOP2('!', '='), '<', HT_JOP2('<', '='), '>',
                               HT_JOP2('>', '=') };
    for (int i = 0; i < 6; i++)
        if (ht_jparse_take_op(p, ops[i])) {
            *op = HT_JC_EQ + i;
            return true;
        }
    *op = HT_JC_IN;
    if (ht_jparse_take_word(p, "in")) return true;
    if (!ht_jparse_is_word(p, "not") || p->tok[1].kind != HT_JT_NAME || p->tok[1].n != 2 ||
        memcmp(p->tok[1].p, "in", 2) != 0)
        return false;
    p->tok += 2;
    *op = HT_JC_NOT_IN;
    return true;
}

static enum ht_status compare(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *n = NULL, *right;
    int op;
    HT_TRY(sum(p, out));
    while (compare_op(p, &op)) {
        HT_TRY(sum(p, &right));
        if (!n) HT_TRY(ht_jparse_wrap(p, &n, HT_JN_COMPARE, *out));
        HT_TRY(ht_jparse_add(p, n, right));
        int *ops = ht_jarena_take(&p->t->arena, n->n * sizeof *ops);
        if (!ops || n->n > 64) return HT_JPARSE_FAIL(p, "a comparison too long");
        for (size_t i = 0; i + 1 < n->n; i++) ops[i] = n->ops[i];
        ops[n->n - 1] = op;
        n->ops = ops;
        *out = n;
    }
    return HT_OK;
}

static enum ht_status negation(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *e;
    if (!ht_jparse_take_word(p, "not")) return compare(p, out);
    if (++p->depth > HT_JINJA_MAX_DEPTH) return HT_JPARSE_FAIL(p, "an expression nested too deep");
    HT_TRY(negation(p, &e));
    p->depth--;
    HT_TRY(ht_jparse_wrap(p, out, HT_JN_UNARY, e));
    (*out)->op = '!';
    return HT_OK;
}

enum ht_status ht_jparse_logic(struct ht_jparser *p, struct ht_jnode **out, enum ht_jnode_kind kind)
{
    struct ht_jnode *n, *right;
    HT_TRY(kind == HT_JN_OR ? ht_jparse_logic(p, out, HT_JN_AND) : negation(p, out));
    while (ht_jparse_take_word(p, kind == HT_JN_OR ? "or" : "and")) {
        HT_TRY(kind == HT_JN_OR ? ht_jparse_logic(p, &right, HT_JN_AND) : negation(p, &right));
        HT_TRY(ht_jparse_wrap(p, &n, kind, *out));
        n->b = right;
        HT_TRY(ht_jparse_over(p, n, right));
        *out = n;
    }
    return HT_OK;
}

enum ht_status ht_jparse_expression(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *n;
    if (++p->depth > HT_JINJA_MAX_DEPTH) return HT_JPARSE_FAIL(p, "an expression nested too deep");
    HT_TRY(ht_jparse_logic(p, out, HT_JN_OR));
    while (ht_jparse_take_word(p, "if")) {
        HT_TRY(ht_jparse_wrap(p, &n, HT_JN_CONDITION, *out));
        HT_TRY(ht_jparse_logic(p, &n->b, HT_JN_OR));
        if (ht_jparse_take_word(p, "else")) HT_TRY(ht_jparse_expression(p, &n->c));
        HT_TRY(ht_jparse_over(p, n, n->b));
        HT_TRY(ht_jparse_over(p, n, n->c));
        *out = n;
    }
    p->depth--;
    return HT_OK;
}

enum ht_status ht_jparse_tuple(struct ht_jparser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    HT_TRY(ht_jparse_expression(p, out));
    if (!ht_jparse_is_op(p, ',')) return HT_OK;
    HT_TRY(ht_jparse_node(p, &n, HT_JN_LIST));
    n->op = 1;
    HT_TRY(ht_jparse_add(p, n, *out));
    while (ht_jparse_take_op(p, ',') && p->tok->kind != HT_JT_BLOCK_END) {
        HT_TRY(ht_jparse_expression(p, &e));
        HT_TRY(ht_jparse_add(p, n, e));
    }
    *out = n;
    return HT_OK;
}

enum ht_status ht_jparse_target(struct ht_jparser *p, struct ht_jnode **out, bool attributes)
{
    struct ht_jnode *n, *first = NULL;
    const bool bracket = ht_jparse_take_op(p, '(');
    for (;;) {
        HT_TRY(ht_jparse_node(p, &n, HT_JN_NAME));
        HT_TRY(ht_jparse_name(p, &n->name));
        if (attributes && ht_jparse_take_op(p, '.')) {
            struct ht_jnode *of = n;
            HT_TRY(ht_jparse_wrap(p, &n, HT_JN_ATTRIBUTE, of));
            HT_TRY(ht_jparse_name(p, &n->name));
        }
        if (!first && !ht_jparse_is_op(p, ',')) {
            *out = n;
            break;
        }
        if (!first) {
            HT_TRY(ht_jparse_node(p, &first, HT_JN_LIST));
            *out = first;
        }
        HT_TRY(ht_jparse_add(p, first, n));
        if (!ht_jparse_take_op(p, ',') || p->tok->kind != HT_JT_NAME) break;
    }
    return bracket ? ht_jparse_want_op(p, ')') : HT_OK;
}
