/* inference/jinja_nodes.c: what the parser takes and makes: tokens, nodes, names, strings. */
#include <string.h>

#include "inference/jinja_parser.h"

enum ht_status ht_jparse_fail(const struct ht_jparser *p, const char *what, const char *p2,
                              size_t n2)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s:%d: %s%s%.*s%s", p->t->name, p->tok->line, what,
                   p2 ? " '" : "", p2 ? (int)(n2 < 60 ? n2 : 60) : 0, p2 ? p2 : "", p2 ? "'" : "");
}

enum ht_status ht_jparse_unexpected(const struct ht_jparser *p, const char *wanted)
{
    switch (p->tok->kind) {
    case HT_JT_END:
        return ht_jparse_fail(p, "the template ends where this is needed:", wanted, strlen(wanted));
    case HT_JT_BLOCK_END:
        return ht_jparse_fail(p, "'%}' where this is needed:", wanted, strlen(wanted));
    case HT_JT_OUTPUT_END:
        return ht_jparse_fail(p, "'}}' where this is needed:", wanted, strlen(wanted));
    default: return ht_jparse_fail(p, "unexpected", p->tok->p, p->tok->n);
    }
}

enum ht_status ht_jparse_node(struct ht_jparser *p, struct ht_jnode **out, enum ht_jnode_kind kind)
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

enum ht_status ht_jparse_over(struct ht_jparser *p, struct ht_jnode *n,
                              const struct ht_jnode *child)
{
    if (child && child->height >= n->height) n->height = child->height + 1;
    if (n->height > 2 * HT_JINJA_MAX_DEPTH)
        return HT_JPARSE_FAIL(p, "an expression nested too deep");
    return HT_OK;
}

enum ht_status ht_jparse_add(struct ht_jparser *p, struct ht_jnode *list, struct ht_jnode *item)
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
    return item ? ht_jparse_over(p, list, item) : HT_OK;
}

bool ht_jparse_is_op(const struct ht_jparser *p, int op)
{
    return p->tok->kind == HT_JT_OPERATOR && p->tok->op == op;
}
bool ht_jparse_is_word(const struct ht_jparser *p, const char *word)
{
    return p->tok->kind == HT_JT_NAME && p->tok->n == strlen(word) &&
           memcmp(p->tok->p, word, p->tok->n) == 0;
}
bool ht_jparse_take_op(struct ht_jparser *p, int op)
{
    const bool yes = ht_jparse_is_op(p, op);
    p->tok += yes;
    return yes;
}
bool ht_jparse_take_word(struct ht_jparser *p, const char *word)
{
    const bool yes = ht_jparse_is_word(p, word);
    p->tok += yes;
    return yes;
}
enum ht_status ht_jparse_want_op(struct ht_jparser *p, int op)
{
    const char text[2] = { (char)op, '\0' };
    return ht_jparse_take_op(p, op) ? HT_OK : ht_jparse_unexpected(p, text);
}
enum ht_status ht_jparse_want(struct ht_jparser *p, enum ht_jtoken_kind kind, const char *what)
{
    if (p->tok->kind != kind) return ht_jparse_unexpected(p, what);
    p->tok++;
    return HT_OK;
}

enum ht_status ht_jparse_string(struct ht_jparser *p, const struct ht_jstring **out,
                                const char *text, size_t n)
{
    struct ht_jstring *s = ht_jarena_take(&p->t->arena, sizeof *s);
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tree", p->t->name);
    *s = (struct ht_jstring){ .p = text, .n = n };
    *out = s;
    return HT_OK;
}

enum ht_status ht_jparse_name(struct ht_jparser *p, const struct ht_jstring **out)
{
    if (p->tok->kind != HT_JT_NAME) return ht_jparse_unexpected(p, "a name");
    HT_TRY(ht_jparse_string(p, out, p->tok->p, p->tok->n));
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

enum ht_status ht_jparse_unescape(struct ht_jparser *p, const struct ht_jstring **out,
                                  const char *s, size_t n)
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
                return HT_JPARSE_FAIL(p, "a string with a bad \\x, \\u or \\U escape");
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
    return ht_jparse_string(p, out, text, k);
}
