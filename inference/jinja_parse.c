/* inference/jinja_parse.c: tokens -> syntax tree. Precedence, from loose to tight, as in Jinja:
 *
 *   if-else | or | and | not | == < in .. | + - | ~ | * / // % | ** | unary | . [] () | filters,
 * tests
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "inference/jinja_impl.h"

struct parser {
    struct ht_jinja *t;
    const struct ht_jtoken *tok; // the next token
    int64_t n_nodes;
    int depth, loops, macros;
};

static enum ht_status expression(struct parser *p, struct ht_jnode **out);
static enum ht_status body(struct parser *p, struct ht_jnode **out);

static enum ht_status fail(const struct parser *p, const char *what, const char *p2, size_t n2)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s:%d: %s%s%.*s%s", p->t->name, p->tok->line, what,
                   p2 ? " '" : "", p2 ? (int)(n2 < 60 ? n2 : 60) : 0, p2 ? p2 : "", p2 ? "'" : "");
}
#define FAIL(p, what) fail((p), (what), NULL, 0)

static enum ht_status unexpected(const struct parser *p, const char *wanted)
{
    switch (p->tok->kind) {
    case HT_JT_END:
        return fail(p, "the template ends where this is needed:", wanted, strlen(wanted));
    case HT_JT_BLOCK_END: return fail(p, "'%}' where this is needed:", wanted, strlen(wanted));
    case HT_JT_OUTPUT_END: return fail(p, "'}}' where this is needed:", wanted, strlen(wanted));
    default: return fail(p, "unexpected", p->tok->p, p->tok->n);
    }
}

static enum ht_status node(struct parser *p, struct ht_jnode **out, enum ht_jnode_kind kind)
{
    if (++p->n_nodes > HT_JINJA_MAX_NODES)
        return HT_FAIL(HT_ERR_FORMAT, "%s:%d: more than %d nodes", p->t->name, p->tok->line,
                       HT_JINJA_MAX_NODES);
    *out = ht_jarena_take(&p->t->arena, sizeof **out);
    if (!*out) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
    (*out)->kind = kind;
    (*out)->line = p->tok->line;
    return HT_OK;
}

/* Operators make trees that are deep without nesting: heights are bounded, for rendering recurses.
 */
static enum ht_status over(struct parser *p, struct ht_jnode *n, const struct ht_jnode *child)
{
    if (child && child->height >= n->height) n->height = child->height + 1;
    if (n->height > 2 * HT_JINJA_MAX_DEPTH) return FAIL(p, "an expression nested too deep");
    return HT_OK;
}

static enum ht_status add(struct parser *p, struct ht_jnode *list, struct ht_jnode *item)
{
    if (list->n == list->capacity) {
        const size_t capacity = list->capacity ? 2 * list->capacity : 4;
        struct ht_jnode **grown = ht_jarena_take(&p->t->arena, capacity * sizeof *grown);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
        if (list->n) memcpy(grown, list->items, list->n * sizeof *grown);
        list->items = grown;
        list->capacity = capacity;
    }
    list->items[list->n++] = item;
    return item ? over(p, list, item) : HT_OK;
}

static bool is_op(const struct parser *p, int op)
{
    return p->tok->kind == HT_JT_OPERATOR && p->tok->op == op;
}
static bool is_word(const struct parser *p, const char *word)
{
    return p->tok->kind == HT_JT_NAME && p->tok->n == strlen(word) &&
           memcmp(p->tok->p, word, p->tok->n) == 0;
}
static bool take_op(struct parser *p, int op)
{
    const bool yes = is_op(p, op);
    p->tok += yes;
    return yes;
}
static bool take_word(struct parser *p, const char *word)
{
    const bool yes = is_word(p, word);
    p->tok += yes;
    return yes;
}
static enum ht_status want_op(struct parser *p, int op)
{
    const char text[2] = { (char)op, '\0' };
    return take_op(p, op) ? HT_OK : unexpected(p, text);
}
static enum ht_status want(struct parser *p, enum ht_jtoken_kind kind, const char *what)
{
    if (p->tok->kind != kind) return unexpected(p, what);
    p->tok++;
    return HT_OK;
}

static enum ht_status string(struct parser *p, const struct ht_jstring **out, const char *text,
                             size_t n)
{
    struct ht_jstring *s = ht_jarena_take(&p->t->arena, sizeof *s);
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
    *s = (struct ht_jstring){ .p = text, .n = n };
    *out = s;
    return HT_OK;
}

static enum ht_status name(struct parser *p, const struct ht_jstring **out)
{
    if (p->tok->kind != HT_JT_NAME) return unexpected(p, "a name");
    HT_TRY(string(p, out, p->tok->p, p->tok->n));
    p->tok++;
    return HT_OK;
}

static int hex_digits(const char *s, size_t n, size_t digits, int32_t *out)
{
    *out = 0;
    if (n < digits) return 0;
    for (size_t i = 0; i < digits; i++) {
        const char c = s[i];
        const int v = c >= '0' && c <= '9'                 ? c - '0'
                      : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10
                                                           : -1;
        if (v < 0 || *out > 0x10FFFF) return 0;
        *out = *out * 16 + v;
    }
    return *out <= 0x10FFFF && (*out < 0xD800 || *out > 0xDFFF);
}

/* Escapes of Python's "unicode-escape". */
static enum ht_status unescape(struct parser *p, const struct ht_jstring **out, const char *s,
                               size_t n)
{
    char *text = ht_jarena_take(&p->t->arena, 2 * n + 1); // \x80 becomes two bytes of four
    size_t k = 0;
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
    for (size_t i = 0; i < n; i++) {
        if (s[i] != '\\' || i + 1 == n) {
            text[k++] = s[i];
            continue;
        }
        static const char from[] = "\\'\"abfnrtv", to[] = "\\'\"\a\b\f\n\r\t\v";
        const char c = s[++i];
        const char *plain = strchr(from, c);
        if (c && plain) {
            text[k++] = to[plain - from];
        } else if (c == '\n') {
        } else if (c == 'x' || c == 'u' || c == 'U') {
            const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
            int32_t code;
            if (!hex_digits(s + i + 1, n - i - 1, digits, &code))
                return FAIL(p, "a string with a bad \\x, \\u or \\U escape");
            k += ht_utf8_put(text + k, code);
            i += digits;
        } else if (c >= '0' && c <= '7') {
            int32_t code = c - '0';
            for (int d = 0; d < 2 && i + 1 < n && s[i + 1] >= '0' && s[i + 1] <= '7'; d++)
                code = code * 8 + s[++i] - '0';
            k += ht_utf8_put(text + k, code);
        } else {
            text[k++] = '\\';
            text[k++] = c;
        }
    }
    return string(p, out, text, k);
}

static enum ht_status literal(struct parser *p, struct ht_jnode **out, struct ht_jv v)
{
    HT_TRY(node(p, out, HT_JN_LITERAL));
    (*out)->value = v;
    return HT_OK;
}

static enum ht_status number(struct parser *p, struct ht_jnode **out)
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
        return fail(p, "number out of range", p->tok->p, p->tok->n);
    HT_TRY(literal(p, out, v));
    p->tok++;
    return HT_OK;
}

/* Comma-separated expressions up to `close` into list. */
static enum ht_status items(struct parser *p, struct ht_jnode *list, int close)
{
    struct ht_jnode *item;
    while (!is_op(p, close)) {
        HT_TRY(expression(p, &item));
        HT_TRY(add(p, list, item));
        if (!take_op(p, ',')) break;
    }
    return want_op(p, close);
}

static enum ht_status parentheses(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *first = NULL;
    p->tok++;
    if (!is_op(p, ')')) {
        HT_TRY(expression(p, &first));
        if (take_op(p, ')')) {
            *out = first;
            return HT_OK;
        }
        HT_TRY(want_op(p, ','));
    }
    HT_TRY(node(p, out, HT_JN_LIST));
    (*out)->op = 1;
    if (first) HT_TRY(add(p, *out, first));
    return items(p, *out, ')');
}

static enum ht_status primary(struct parser *p, struct ht_jnode **out)
{
    static const char *const words[] = { "true", "True", "false", "False", "none", "None" };
    const struct ht_jstring *s;

    switch (p->tok->kind) {
    case HT_JT_NAME:
        for (int i = 0; i < 6; i++)
            if (take_word(p, words[i]))
                return literal(p, out, i < 4 ? ht_jv_bool(i < 2) : ht_jv_none());
        HT_TRY(node(p, out, HT_JN_NAME));
        return name(p, &(*out)->name);
    case HT_JT_STRING:
        HT_TRY(literal(p, out, (struct ht_jv){ .kind = HT_JV_STRING }));
        HT_TRY(unescape(p, &s, p->tok->p, p->tok->n));
        for (p->tok++; p->tok->kind == HT_JT_STRING; p->tok++) { // "a" "b"
            const struct ht_jstring *more;
            HT_TRY(unescape(p, &more, p->tok->p, p->tok->n));
            char *both = ht_jarena_take(&p->t->arena, s->n + more->n + 1);
            if (!both) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
            if (s->n) memcpy(both, s->p, s->n);
            if (more->n) memcpy(both + s->n, more->p, more->n);
            HT_TRY(string(p, &s, both, s->n + more->n));
        }
        (*out)->value.s = s;
        return HT_OK;
    case HT_JT_INT:
    case HT_JT_FLOAT: return number(p, out);
    default: break;
    }
    if (is_op(p, '(')) return parentheses(p, out);
    if (take_op(p, '[')) {
        HT_TRY(node(p, out, HT_JN_LIST));
        return items(p, *out, ']');
    }
    if (take_op(p, '{')) {
        struct ht_jnode *e;
        HT_TRY(node(p, out, HT_JN_DICT));
        while (!is_op(p, '}')) {
            HT_TRY(expression(p, &e));
            HT_TRY(add(p, *out, e));
            HT_TRY(want_op(p, ':'));
            HT_TRY(expression(p, &e));
            HT_TRY(add(p, *out, e));
            if (!take_op(p, ',')) break;
        }
        return want_op(p, '}');
    }
    return unexpected(p, "an expression");
}

/* "(a, b, key=c)" into n, the parenthesis being the next token. */
static enum ht_status arguments(struct parser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    p->tok++;
    while (!is_op(p, ')')) {
        if (p->tok->kind == HT_JT_NAME && p->tok[1].kind == HT_JT_OPERATOR && p->tok[1].op == '=') {
            const size_t k = n->n_keywords;
            const struct ht_jstring **names = ht_jarena_take(&p->t->arena, (k + 1) * sizeof *names);
            struct ht_jnode **values = ht_jarena_take(&p->t->arena, (k + 1) * sizeof *values);
            if (!names || !values || k == 64) return FAIL(p, "too many named arguments");
            for (size_t i = 0; i < k; i++) {
                names[i] = n->keywords[i];
                values[i] = n->keyword_values[i];
            }
            HT_TRY(name(p, &names[k]));
            p->tok++;
            HT_TRY(expression(p, &values[k]));
            HT_TRY(over(p, n, values[k]));
            n->keywords = names;
            n->keyword_values = values;
            n->n_keywords = k + 1;
        } else {
            if (is_op(p, '*') || is_op(p, HT_JOP2('*', '*')))
                return FAIL(p, "* arguments are not supported");
            HT_TRY(expression(p, &e));
            HT_TRY(add(p, n, e));
        }
        if (!take_op(p, ',')) break;
    }
    return want_op(p, ')');
}

/* out = kind over a. */
static enum ht_status wrap(struct parser *p, struct ht_jnode **out, enum ht_jnode_kind kind,
                           struct ht_jnode *a)
{
    HT_TRY(node(p, out, kind));
    (*out)->a = a;
    return over(p, *out, a);
}

static enum ht_status subscript(struct parser *p, struct ht_jnode **e)
{
    struct ht_jnode *n, *parts[3] = { 0 };
    int i = 0;
    p->tok++;
    bool slice = false;
    for (;; i++) {
        if (!is_op(p, ':') && !is_op(p, ']')) HT_TRY(expression(p, &parts[i]));
        if (i == 2 || !take_op(p, ':')) break;
        slice = true;
    }
    HT_TRY(want_op(p, ']'));
    if (!slice && !parts[0]) return unexpected(p, "an index");
    HT_TRY(wrap(p, &n, slice ? HT_JN_SLICE : HT_JN_ITEM, *e));
    n->b = parts[0];
    n->c = parts[1];
    n->d = parts[2];
    for (i = 0; i < 3; i++) HT_TRY(over(p, n, parts[i]));
    *e = n;
    return HT_OK;
}

static enum ht_status postfix(struct parser *p, struct ht_jnode **e)
{
    struct ht_jnode *n;
    for (;;) {
        if (take_op(p, '.')) {
            if (p->tok->kind == HT_JT_INT) {
                HT_TRY(wrap(p, &n, HT_JN_ITEM, *e));
                HT_TRY(number(p, &n->b));
            } else {
                HT_TRY(wrap(p, &n, HT_JN_ATTRIBUTE, *e));
                HT_TRY(name(p, &n->name));
            }
            *e = n;
        } else if (is_op(p, '[')) {
            HT_TRY(subscript(p, e));
        } else if (is_op(p, '(')) {
            HT_TRY(wrap(p, &n, HT_JN_CALL, *e));
            HT_TRY(arguments(p, n));
            *e = n;
        } else {
            return HT_OK;
        }
    }
}

static enum ht_status one_filter(struct parser *p, struct ht_jnode **e)
{
    struct ht_jnode *n;
    HT_TRY(wrap(p, &n, HT_JN_FILTER, *e));
    HT_TRY(name(p, &n->name));
    if (!ht_jinja_has_filter(n->name))
        return fail(p, "no filter is called", n->name->p, n->name->n);
    if (is_op(p, '(')) HT_TRY(arguments(p, n));
    *e = n;
    return HT_OK;
}

static enum ht_status test(struct parser *p, struct ht_jnode **e)
{
    static const char *const no_argument[] = { "else", "or", "and", "if",
                                               "in",   "is", "not", "recursive" };
    struct ht_jnode *n, *argument;
    HT_TRY(wrap(p, &n, HT_JN_TEST, *e));
    n->op = take_word(p, "not");
    HT_TRY(name(p, &n->name));
    if (!ht_jinja_has_test(n->name)) return fail(p, "no test is called", n->name->p, n->name->n);
    bool more = p->tok->kind == HT_JT_NAME || p->tok->kind == HT_JT_STRING ||
                p->tok->kind == HT_JT_INT || p->tok->kind == HT_JT_FLOAT || is_op(p, '[') ||
                is_op(p, '{');
    for (size_t i = 0; i < sizeof no_argument / sizeof *no_argument; i++)
        if (is_word(p, no_argument[i])) more = false;
    if (is_op(p, '(')) {
        HT_TRY(arguments(p, n));
    } else if (more) {
        HT_TRY(primary(p, &argument));
        HT_TRY(postfix(p, &argument));
        HT_TRY(add(p, n, argument));
    }
    *e = n;
    return HT_OK;
}

static enum ht_status unary(struct parser *p, struct ht_jnode **out, bool with_filter)
{
    struct ht_jnode *n, *e;
    const int op = is_op(p, '-') ? '-' : is_op(p, '+') ? '+' : 0;

    if (++p->depth > HT_JINJA_MAX_DEPTH) return FAIL(p, "an expression nested too deep");
    if (op) {
        p->tok++;
        HT_TRY(unary(p, &n, false));
        HT_TRY(wrap(p, &e, HT_JN_UNARY, n));
        e->op = op;
    } else {
        HT_TRY(primary(p, &e));
    }
    HT_TRY(postfix(p, &e));
    while (with_filter) {
        if (take_op(p, '|')) {
            HT_TRY(one_filter(p, &e));
        } else if (take_word(p, "is")) {
            HT_TRY(test(p, &e));
        } else if (is_op(p, '(')) {
            HT_TRY(wrap(p, &n, HT_JN_CALL, e));
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

static enum ht_status binary(struct parser *p, struct ht_jnode **left, int op,
                             struct ht_jnode *right)
{
    struct ht_jnode *n;
    HT_TRY(wrap(p, &n, HT_JN_BINARY, *left));
    n->op = op;
    n->b = right;
    *left = n;
    return over(p, n, right);
}

static enum ht_status power(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *right;
    HT_TRY(unary(p, out, true));
    while (take_op(p, HT_JOP2('*', '*'))) {
        HT_TRY(unary(p, &right, true));
        HT_TRY(binary(p, out, HT_JOP_POWER, right));
    }
    return HT_OK;
}

static enum ht_status product(struct parser *p, struct ht_jnode **out)
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

static enum ht_status concat(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    HT_TRY(product(p, out));
    if (!is_op(p, '~')) return HT_OK;
    HT_TRY(node(p, &n, HT_JN_CONCAT));
    HT_TRY(add(p, n, *out));
    while (take_op(p, '~')) {
        HT_TRY(product(p, &e));
        HT_TRY(add(p, n, e));
    }
    *out = n;
    return HT_OK;
}

static enum ht_status sum(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *right;
    HT_TRY(concat(p, out));
    while (is_op(p, '+') || is_op(p, '-')) {
        const int op = p->tok++->op;
        HT_TRY(concat(p, &right));
        HT_TRY(binary(p, out, op, right));
    }
    return HT_OK;
}

static bool compare_op(struct parser *p, int *op)
{
    static const int ops[] = { HT_JOP2('=', '='), HT_JOP2('!', '='), '<', HT_JOP2('<', '='), '>',
                               HT_JOP2('>', '=') };
    for (int i = 0; i < 6; i++)
        if (take_op(p, ops[i])) {
            *op = HT_JC_EQ + i;
            return true;
        }
    *op = HT_JC_IN;
    if (take_word(p, "in")) return true;
    if (!is_word(p, "not") || p->tok[1].kind != HT_JT_NAME || p->tok[1].n != 2 ||
        memcmp(p->tok[1].p, "in", 2) != 0)
        return false;
    p->tok += 2;
    *op = HT_JC_NOT_IN;
    return true;
}

static enum ht_status compare(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *n = NULL, *right;
    int op;
    HT_TRY(sum(p, out));
    while (compare_op(p, &op)) {
        HT_TRY(sum(p, &right));
        if (!n) HT_TRY(wrap(p, &n, HT_JN_COMPARE, *out));
        HT_TRY(add(p, n, right));
        int *ops = ht_jarena_take(&p->t->arena, n->n * sizeof *ops);
        if (!ops || n->n > 64) return FAIL(p, "a comparison too long");
        for (size_t i = 0; i + 1 < n->n; i++) ops[i] = n->ops[i];
        ops[n->n - 1] = op;
        n->ops = ops;
        *out = n;
    }
    return HT_OK;
}

static enum ht_status negation(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *e;
    if (!take_word(p, "not")) return compare(p, out);
    if (++p->depth > HT_JINJA_MAX_DEPTH) return FAIL(p, "an expression nested too deep");
    HT_TRY(negation(p, &e));
    p->depth--;
    HT_TRY(wrap(p, out, HT_JN_UNARY, e));
    (*out)->op = '!';
    return HT_OK;
}

static enum ht_status logic(struct parser *p, struct ht_jnode **out, enum ht_jnode_kind kind)
{
    struct ht_jnode *n, *right;
    HT_TRY(kind == HT_JN_OR ? logic(p, out, HT_JN_AND) : negation(p, out));
    while (take_word(p, kind == HT_JN_OR ? "or" : "and")) {
        HT_TRY(kind == HT_JN_OR ? logic(p, &right, HT_JN_AND) : negation(p, &right));
        HT_TRY(wrap(p, &n, kind, *out));
        n->b = right;
        HT_TRY(over(p, n, right));
        *out = n;
    }
    return HT_OK;
}

static enum ht_status expression(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *n;
    if (++p->depth > HT_JINJA_MAX_DEPTH) return FAIL(p, "an expression nested too deep");
    HT_TRY(logic(p, out, HT_JN_OR));
    while (take_word(p, "if")) {
        HT_TRY(wrap(p, &n, HT_JN_CONDITION, *out));
        HT_TRY(logic(p, &n->b, HT_JN_OR));
        if (take_word(p, "else")) HT_TRY(expression(p, &n->c));
        HT_TRY(over(p, n, n->b));
        HT_TRY(over(p, n, n->c));
        *out = n;
    }
    p->depth--;
    return HT_OK;
}

/* "a, b" without parentheses is a tuple. */
static enum ht_status tuple(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    HT_TRY(expression(p, out));
    if (!is_op(p, ',')) return HT_OK;
    HT_TRY(node(p, &n, HT_JN_LIST));
    n->op = 1;
    HT_TRY(add(p, n, *out));
    while (take_op(p, ',') && p->tok->kind != HT_JT_BLOCK_END) {
        HT_TRY(expression(p, &e));
        HT_TRY(add(p, n, e));
    }
    *out = n;
    return HT_OK;
}

/* What for and set assign to: a name, a tuple of names, or (set) namespace.attribute. */
static enum ht_status target(struct parser *p, struct ht_jnode **out, bool attributes)
{
    struct ht_jnode *n, *first = NULL;
    const bool bracket = take_op(p, '(');
    for (;;) {
        HT_TRY(node(p, &n, HT_JN_NAME));
        HT_TRY(name(p, &n->name));
        if (attributes && take_op(p, '.')) {
            struct ht_jnode *of = n;
            HT_TRY(wrap(p, &n, HT_JN_ATTRIBUTE, of));
            HT_TRY(name(p, &n->name));
        }
        if (!first && !is_op(p, ',')) {
            *out = n;
            break;
        }
        if (!first) {
            HT_TRY(node(p, &first, HT_JN_LIST));
            *out = first;
        }
        HT_TRY(add(p, first, n));
        if (!take_op(p, ',') || p->tok->kind != HT_JT_NAME) break;
    }
    return bracket ? want_op(p, ')') : HT_OK;
}

static enum ht_status end_block(struct parser *p)
{
    return want(p, HT_JT_BLOCK_END, "%}");
}

/* Is the next tag {% word? */
static bool at_tag(const struct parser *p, const char *word)
{
    return p->tok->kind == HT_JT_BLOCK_BEGIN && p->tok[1].kind == HT_JT_NAME &&
           p->tok[1].n == strlen(word) && memcmp(p->tok[1].p, word, p->tok[1].n) == 0;
}
static bool take_tag(struct parser *p, const char *word)
{
    const bool yes = at_tag(p, word);
    p->tok += yes ? 2 : 0;
    return yes;
}
static enum ht_status want_tag(struct parser *p, const char *word)
{
    if (take_tag(p, word)) {
        if (p->tok->kind == HT_JT_NAME && strncmp(word, "end", 3) == 0)
            p->tok++; // {% endmacro name %}
        return end_block(p);
    }
    if (p->tok->kind == HT_JT_BLOCK_BEGIN) p->tok++;
    return unexpected(p, word);
}

static enum ht_status if_statement(struct parser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    for (;;) {
        HT_TRY(tuple(p, &e));
        HT_TRY(end_block(p));
        HT_TRY(add(p, n, e));
        HT_TRY(body(p, &e));
        HT_TRY(add(p, n, e));
        if (take_tag(p, "elif")) continue;
        if (take_tag(p, "else")) {
            HT_TRY(end_block(p));
            HT_TRY(body(p, &n->c));
        }
        return want_tag(p, "endif");
    }
}

static enum ht_status for_statement(struct parser *p, struct ht_jnode *n)
{
    HT_TRY(target(p, &n->a, false));
    if (!take_word(p, "in")) return unexpected(p, "in");
    HT_TRY(logic(p, &n->b, HT_JN_OR));
    if (is_op(p, ',')) return FAIL(p, "'for' over a list without brackets");
    if (take_word(p, "if")) HT_TRY(expression(p, &n->d));
    if (is_word(p, "recursive")) return FAIL(p, "'for .. recursive' is not supported");
    HT_TRY(end_block(p));
    p->loops++;
    HT_TRY(body(p, &n->c));
    p->loops--;
    if (take_tag(p, "else")) {
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->e));
    }
    return want_tag(p, "endfor");
}

static enum ht_status set_statement(struct parser *p, struct ht_jnode *n)
{
    HT_TRY(target(p, &n->a, true));
    if (take_op(p, '=')) {
        HT_TRY(tuple(p, &n->b));
        return end_block(p);
    }
    n->kind = HT_JN_SET_BLOCK;
    if (is_op(p, '|')) {
        HT_TRY(node(p, &n->c, HT_JN_HOLE));
        while (take_op(p, '|')) HT_TRY(one_filter(p, &n->c));
    }
    HT_TRY(end_block(p));
    HT_TRY(body(p, &n->b));
    return want_tag(p, "endset");
}

/* "(a, b=1)" and the body, up to end. */
static enum ht_status macro_rest(struct parser *p, struct ht_jnode *n, const char *end)
{
    struct ht_jnode *e;
    HT_TRY(node(p, &n->b, HT_JN_LIST));
    if (take_op(p, '(')) {
        while (!is_op(p, ')')) {
            HT_TRY(node(p, &e, HT_JN_NAME));
            HT_TRY(name(p, &e->name));
            HT_TRY(add(p, n, e));
            if (n->n > 64) return FAIL(p, "more than 64 parameters");
            if (take_op(p, '=')) {
                HT_TRY(expression(p, &e));
                HT_TRY(add(p, n->b, e));
            } else if (n->b->n) {
                return FAIL(p, "a parameter without default behind one that has a default");
            }
            if (!take_op(p, ',')) break;
        }
        HT_TRY(want_op(p, ')'));
    }
    if (strcmp(end, "endcall") == 0) return HT_OK;
    HT_TRY(end_block(p));
    const int loops = p->loops;
    p->loops = 0;
    HT_TRY(body(p, &n->c));
    p->loops = loops;
    return want_tag(p, end);
}

static enum ht_status call_statement(struct parser *p, struct ht_jnode *n)
{
    HT_TRY(node(p, &n->b, HT_JN_MACRO));
    HT_TRY(string(p, &n->b->name, "caller", 6));
    HT_TRY(macro_rest(p, n->b, "endcall"));
    HT_TRY(expression(p, &n->a));
    if (n->a->kind != HT_JN_CALL) return FAIL(p, "{% call %} needs a call");
    HT_TRY(end_block(p));
    const int loops = p->loops;
    p->loops = 0;
    HT_TRY(body(p, &n->b->c));
    p->loops = loops;
    return want_tag(p, "endcall");
}

static enum ht_status with_statement(struct parser *p, struct ht_jnode *n)
{
    struct ht_jnode *e;
    while (p->tok->kind != HT_JT_BLOCK_END) {
        HT_TRY(target(p, &e, false));
        HT_TRY(add(p, n, e));
        HT_TRY(want_op(p, '='));
        HT_TRY(expression(p, &e));
        HT_TRY(add(p, n, e));
        if (!take_op(p, ',')) break;
    }
    HT_TRY(end_block(p));
    HT_TRY(body(p, &n->c));
    return want_tag(p, "endwith");
}

/* One tag, behind {%. */
static enum ht_status statement(struct parser *p, struct ht_jnode **out)
{
    HT_TRY(node(p, out, HT_JN_IF));
    struct ht_jnode *n = *out;
    if (take_word(p, "if")) return if_statement(p, n);
    if (take_word(p, "for")) {
        n->kind = HT_JN_FOR;
        return for_statement(p, n);
    }
    if (take_word(p, "set")) {
        n->kind = HT_JN_SET;
        return set_statement(p, n);
    }
    if (take_word(p, "macro")) {
        n->kind = HT_JN_MACRO;
        HT_TRY(name(p, &n->name));
        return macro_rest(p, n, "endmacro");
    }
    if (take_word(p, "call")) {
        n->kind = HT_JN_CALL_BLOCK;
        return call_statement(p, n);
    }
    if (take_word(p, "with")) {
        n->kind = HT_JN_WITH;
        return with_statement(p, n);
    }
    if (take_word(p, "filter")) {
        n->kind = HT_JN_FILTER_BLOCK;
        HT_TRY(node(p, &n->a, HT_JN_HOLE));
        do HT_TRY(one_filter(p, &n->a));
        while (take_op(p, '|'));
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->b));
        return want_tag(p, "endfilter");
    }
    if (take_word(p, "generation")) {
        n->kind = HT_JN_GENERATION;
        HT_TRY(end_block(p));
        HT_TRY(body(p, &n->b));
        return want_tag(p, "endgeneration");
    }
    if (is_word(p, "break") || is_word(p, "continue")) {
        if (p->loops == 0) return FAIL(p, "{% break %} or {% continue %} outside a loop");
        n->kind = is_word(p, "break") ? HT_JN_BREAK : HT_JN_CONTINUE;
        p->tok++;
        return end_block(p);
    }
    if (p->tok->kind != HT_JT_NAME) return unexpected(p, "a statement");
    return fail(p, "unknown or misplaced tag", p->tok->p, p->tok->n);
}

static bool ends_body(const struct parser *p)
{
    static const char *const ends[] = { "else", "elif" };
    if (p->tok->kind == HT_JT_END) return true;
    if (p->tok->kind != HT_JT_BLOCK_BEGIN || p->tok[1].kind != HT_JT_NAME) return false;
    if (p->tok[1].n > 3 && memcmp(p->tok[1].p, "end", 3) == 0) return true;
    return at_tag(p, ends[0]) || at_tag(p, ends[1]);
}

static enum ht_status body(struct parser *p, struct ht_jnode **out)
{
    struct ht_jnode *n, *e;
    if (++p->depth > HT_JINJA_MAX_DEPTH) return FAIL(p, "blocks nested too deep");
    HT_TRY(node(p, out, HT_JN_BODY));
    while (!ends_body(p)) {
        if (p->tok->kind == HT_JT_TEXT) {
            HT_TRY(node(p, &n, HT_JN_TEXT));
            n->value.kind = HT_JV_STRING;
            HT_TRY(string(p, &n->value.s, p->tok->p, p->tok->n));
            p->tok++;
        } else if (p->tok->kind == HT_JT_OUTPUT_BEGIN) {
            p->tok++;
            HT_TRY(tuple(p, &e));
            HT_TRY(wrap(p, &n, HT_JN_OUTPUT, e));
            HT_TRY(want(p, HT_JT_OUTPUT_END, "}}"));
        } else {
            p->tok++;
            HT_TRY(statement(p, &n));
        }
        n->height = 0; // blocks are bounded by p->depth
        HT_TRY(add(p, *out, n));
    }
    (*out)->height = 0;
    p->depth--;
    return HT_OK;
}

enum ht_status ht_jinja_parse(struct ht_jinja **out, const char *text, size_t n_bytes,
                              const char *name_)
{
    enum ht_status st = HT_OK;
    struct ht_jtoken *tokens = NULL;
    struct ht_jinja *t = calloc(1, sizeof *t);
    char *copy;
    size_t n = 0;

    *out = NULL;
    if (t) t->name = strdup(name_);
    if (!t || !t->name) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a template", name_);
        goto done;
    }
    if (n_bytes > HT_JINJA_MAX_BYTES) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: %zu bytes; a template has at most %d", name_, n_bytes,
                     HT_JINJA_MAX_BYTES);
        goto done;
    }
    t->arena.limit = HT_JINJA_MAX_MEMORY;
    copy = ht_jarena_take(&t->arena, n_bytes + 1);
    if (!copy) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", name_, n_bytes);
        goto done;
    }
    json_t *utf8 = json_stringn(text, n_bytes); // NULL unless valid UTF-8
    if (!utf8 || memchr(text, '\0', n_bytes)) {
        json_decref(utf8);
        st = HT_FAIL(HT_ERR_FORMAT, "%s: not UTF-8 text", name_);
        goto done;
    }
    json_decref(utf8);
    for (size_t i = 0; i < n_bytes; i++) { // line ends as Jinja makes them
        if (text[i] == '\r') {
            copy[n++] = '\n';
            if (i + 1 < n_bytes && text[i + 1] == '\n') i++;
        } else {
            copy[n++] = text[i];
        }
    }
    if (n > 0 && copy[n - 1] == '\n') n--; // keep_trailing_newline is off
    HT_TRY_GOTO(st, done, ht_jinja_tokens(&tokens, &t->arena, copy, n, t->name));
    struct parser p = { .t = t, .tok = tokens };
    HT_TRY_GOTO(st, done, body(&p, &t->body));
    if (p.tok->kind != HT_JT_END) {
        p.tok++;
        st = fail(&p, "a tag that closes nothing:", p.tok->p, p.tok->n);
        goto done;
    }
    *out = t;
    t = NULL;
done:
    ht_jinja_free(t);
    return st;
}

void ht_jinja_free(struct ht_jinja *t)
{
    if (!t) return;
    ht_jarena_free(&t->arena);
    free(t->name);
    free(t);
}
