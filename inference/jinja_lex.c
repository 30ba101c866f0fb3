/* inference/jinja_lex.c: a template's text -> tokens, white space handled as Jinja's lexer does.
 *
 *   {%- -%}   strips all white space on that side       {%+ +%}   switches the following two off
 *   lstrip_blocks: blanks between the start of a line and {% or {# go
 *   trim_blocks:   one newline after %} or #} goes
 */
#include <string.h>

#include "inference/jinja_impl.h"

struct lexer {
    const char *text, *name;
    size_t n, at;
    int line;
    bool line_start; // the last tag took a newline with it
    struct ht_jarena *arena;
    struct ht_jtoken *tokens;
    size_t n_tokens, capacity;
};

static enum ht_status lex_fail(const struct lexer *x, const char *what)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s:%d: %s", x->name, x->line, what);
}

static enum ht_status add(struct lexer *x, enum ht_jtoken_kind kind, int op, size_t start,
                          size_t end)
{
    if (x->n_tokens == x->capacity) {
        const size_t capacity = x->capacity ? 2 * x->capacity : 256;
        struct ht_jtoken *grown = ht_jarena_take(x->arena, capacity * sizeof *grown);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for its tokens", x->name);
        if (x->n_tokens) memcpy(grown, x->tokens, x->n_tokens * sizeof *grown);
        x->tokens = grown;
        x->capacity = capacity;
    }
    x->tokens[x->n_tokens++] =
        (struct ht_jtoken){ kind, x->line, op, x->text + start, end - start };
    return HT_OK;
}

static void skip_to(struct lexer *x, size_t at)
{
    for (; x->at < at; x->at++) x->line += x->text[x->at] == '\n';
}

static size_t skip_spaces(const struct lexer *x, size_t at)
{
    while (at < x->n) {
        int32_t c;
        const size_t k = ht_utf8_get(x->text + at, x->n - at, &c);
        if (!ht_utf8_is_space(c)) break;
        at += k;
    }
    return at;
}

static size_t spaces_before(const struct lexer *x, size_t start, size_t end)
{
    while (end > start) {
        size_t k = end - 1;
        int32_t c;
        while (k > start && ((unsigned char)x->text[k] & 0xC0) == 0x80) k--;
        ht_utf8_get(x->text + k, end - k, &c);
        if (!ht_utf8_is_space(c)) break;
        end = k;
    }
    return end;
}

/* The text before a tag, cut as the tag's sign and lstrip_blocks say. */
static size_t text_end(const struct lexer *x, size_t start, size_t end, char sign, bool block)
{
    if (sign == '-') return spaces_before(x, start, end);
    if (sign == '+' || !block) return end;
    size_t line = end;
    while (line > start && x->text[line - 1] != '\n') line--;
    if (line == start && !x->line_start) return end;
    return spaces_before(x, line, end) == line ? line : end;
}

/* The end of a tag at x->at: behind the bracket and what goes with it. */
static void end_tag(struct lexer *x, size_t bracket, bool strip, bool trim)
{
    const size_t from = x->at;
    size_t at = bracket;
    if (strip)
        at = skip_spaces(x, at);
    else if (trim && at < x->n && x->text[at] == '\n')
        at++;
    skip_to(x, at);
    x->line_start = at > from && x->text[at - 1] == '\n';
}

static bool starts(const struct lexer *x, size_t at, const char *what)
{
    const size_t n = strlen(what);
    return n <= x->n - at && memcmp(x->text + at, what, n) == 0;
}

/* "{% raw %}": false when the tag at `at` is another. *end: behind the tag. */
static bool is_raw_tag(const struct lexer *x, size_t at, const char *word, size_t *end, char *sign,
                       char *end_sign)
{
    at += 2;
    *sign = '\0';
    if (at < x->n && (x->text[at] == '-' || x->text[at] == '+')) *sign = x->text[at++];
    at = skip_spaces(x, at);
    if (!starts(x, at, word)) return false;
    at = skip_spaces(x, at + strlen(word));
    *end_sign = '\0';
    if (at < x->n && (x->text[at] == '-' || x->text[at] == '+')) *end_sign = x->text[at++];
    if (!starts(x, at, "%}")) return false;
    *end = at + 2;
    return true;
}

static enum ht_status lex_raw(struct lexer *x, size_t body)
{
    for (size_t at = body; at < x->n; at++) {
        char sign, end_sign;
        size_t end;
        if (!starts(x, at, "{%") || !is_raw_tag(x, at, "endraw", &end, &sign, &end_sign)) continue;
        const size_t stop = text_end(x, body, at, sign, true);
        if (stop > body) HT_TRY(add(x, HT_JT_TEXT, 0, body, stop));
        skip_to(x, at);
        end_tag(x, end, end_sign == '-', end_sign != '+');
        return HT_OK;
    }
    return lex_fail(x, "{% raw %} without {% endraw %}");
}

static bool is_name_byte(unsigned char c, bool first)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || c >= 0x80 ||
           (!first && c >= '0' && c <= '9');
}

static enum ht_status lex_number(struct lexer *x)
{
    const size_t start = x->at;
    bool real = false;
    size_t at = start;
    while (at < x->n && ((x->text[at] >= '0' && x->text[at] <= '9') || x->text[at] == '_')) at++;
    if (at + 1 < x->n && x->text[at] == '.' && x->text[at + 1] >= '0' && x->text[at + 1] <= '9') {
        real = true;
        for (at++; at < x->n && x->text[at] >= '0' && x->text[at] <= '9';) at++;
    }
    if (at < x->n && (x->text[at] | 32) == 'e') {
        size_t k = at + 1;
        if (k < x->n && (x->text[k] == '+' || x->text[k] == '-')) k++;
        if (k < x->n && x->text[k] >= '0' && x->text[k] <= '9') {
            real = true;
            for (at = k; at < x->n && x->text[at] >= '0' && x->text[at] <= '9';) at++;
        }
    }
    HT_TRY(add(x, real ? HT_JT_FLOAT : HT_JT_INT, 0, start, at));
    x->at = at;
    return HT_OK;
}

static enum ht_status lex_string(struct lexer *x)
{
    const char quote = x->text[x->at];
    size_t at = x->at + 1;
    while (at < x->n && x->text[at] != quote) at += x->text[at] == '\\' ? 2 : 1;
    if (at >= x->n) return lex_fail(x, "a string without its closing quote");
    HT_TRY(add(x, HT_JT_STRING, 0, x->at + 1, at));
    skip_to(x, at + 1);
    return HT_OK;
}

/* Tokens up to the end of the tag. */
static enum ht_status lex_expression(struct lexer *x, bool block)
{
    const char *const close = block ? "%}" : "}}";
    char stack[HT_JINJA_MAX_DEPTH];
    int depth = 0;

    for (;;) {
        skip_to(x, skip_spaces(x, x->at));
        if (x->at >= x->n) return lex_fail(x, block ? "{% without %}" : "{{ without }}");
        const char c = x->text[x->at], next = x->at + 1 < x->n ? x->text[x->at + 1] : '\0';
        const bool sign = c == '-' || (block && c == '+');
        if (depth == 0 && starts(x, x->at + sign, close)) {
            HT_TRY(add(x, block ? HT_JT_BLOCK_END : HT_JT_OUTPUT_END, 0, x->at, x->at));
            end_tag(x, x->at + 2 + sign, c == '-', block && c != '+');
            return HT_OK;
        }
        if (is_name_byte((unsigned char)c, true)) {
            size_t at = x->at + 1;
            while (at < x->n && is_name_byte((unsigned char)x->text[at], false)) at++;
            HT_TRY(add(x, HT_JT_NAME, 0, x->at, at));
            x->at = at;
        } else if (c >= '0' && c <= '9') {
            HT_TRY(lex_number(x));
        } else if (c == '"' || c == '\'') {
            HT_TRY(lex_string(x));
        } else {
            int op = c;
            if (((c == '=' || c == '!' || c == '<' || c == '>') && next == '=') ||
                (c == '*' && next == '*') || (c == '/' && next == '/'))
                op = HT_JOP2(c, next);
            else if (!c || !strchr("+-*/%~()[]{}<>=|.,:", c))
                return lex_fail(x, "a character that no expression has");
            if (c == '(' || c == '[' || c == '{') {
                if (depth == HT_JINJA_MAX_DEPTH) return lex_fail(x, "brackets nested too deep");
                stack[depth++] = (char)(c == '(' ? ')' : c + 2);
            } else if (c == ')' || c == ']' || c == '}') {
                if (depth == 0 || stack[--depth] != c) return lex_fail(x, "unbalanced brackets");
            }
            HT_TRY(add(x, HT_JT_OPERATOR, op, x->at, x->at + (op > 255 ? 2 : 1)));
            x->at += op > 255 ? 2 : 1;
        }
    }
}

enum ht_status ht_jinja_tokens(struct ht_jtoken **out, struct ht_jarena *arena, const char *text,
                               size_t n, const char *name)
{
    struct lexer x = {
        .text = text, .name = name, .n = n, .line = 1, .line_start = true, .arena = arena
    };

    while (x.at < n) {
        const size_t start = x.at;
        const char *tag = memchr(text + start, '{', n - start);
        while (tag && !(tag + 1 < text + n && (tag[1] == '%' || tag[1] == '{' || tag[1] == '#')))
            tag = memchr(tag + 1, '{', (size_t)(text + n - tag - 1));
        if (!tag) {
            HT_TRY(add(&x, HT_JT_TEXT, 0, start, n));
            break;
        }
        const size_t at = (size_t)(tag - text);
        const char kind = tag[1];
        char sign = at + 2 < n ? tag[2] : '\0', end_sign;
        if (sign != '-' && sign != '+') sign = '\0';
        const size_t end = text_end(&x, start, at, sign, kind != '{');
        if (end > start) HT_TRY(add(&x, HT_JT_TEXT, 0, start, end));
        skip_to(&x, at);
        size_t behind;
        if (kind == '%' && is_raw_tag(&x, at, "raw", &behind, &sign, &end_sign)) {
            end_tag(&x, behind, end_sign == '-', false);
            HT_TRY(lex_raw(&x, x.at));
        } else if (kind == '#') {
            size_t close = at + 2;
            while (close < n && !starts(&x, close, "#}")) close++;
            if (close >= n) return lex_fail(&x, "{# without #}");
            const char before = close > at + 2 ? text[close - 1] : '\0';
            skip_to(&x, close);
            end_tag(&x, close + 2, before == '-', before != '+');
        } else {
            HT_TRY(add(&x, kind == '%' ? HT_JT_BLOCK_BEGIN : HT_JT_OUTPUT_BEGIN, 0, at, at));
            x.at = at + 2 + (sign != '\0');
            HT_TRY(lex_expression(&x, kind == '%'));
        }
    }
    HT_TRY(add(&x, HT_JT_END, 0, n, n));
    *out = x.tokens;
    return HT_OK;
}
