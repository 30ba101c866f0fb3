/* inference/grammar_rules.c: rules as they are made, and those of JSON itself. */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "inference/grammar_schema.h"

enum { MAX_SPACES = 16, MAX_DIGITS = 16 };

enum ht_status ht_rules_grow(void **p, int *capacity, int n, size_t size, int limit,
                             const char *what)
{
    if (n < *capacity) return HT_OK;
    if (n >= limit) return HT_FAIL(HT_ERR_ARG, "the schema needs more than %d %s", limit, what);
    const int wanted = *capacity ? 2 * *capacity : 64;
    void *grown = realloc(*p, (size_t)wanted * size);
    if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d %s", wanted, what);
    *p = grown;
    *capacity = wanted;
    return HT_OK;
}

enum ht_status ht_rules_new_rule(struct ht_schema_compiler *c, int *out)
{
    struct ht_rules *r = c->r;
    HT_TRY(ht_rules_grow((void **)&r->rules, &r->rule_capacity, r->n_rules, sizeof *r->rules,
                         HT_GRAMMAR_MAX_RULES, "rules"));
    r->rules[r->n_rules] = (struct ht_rule){ 0 };
    *out = r->n_rules++;
    return HT_OK;
}

static enum ht_status symbol(struct ht_schema_compiler *c, enum ht_symbol_kind kind, int index)
{
    struct ht_rules *r = c->r;
    HT_TRY(ht_rules_grow((void **)&r->symbols, &r->symbol_capacity, r->n_symbols,
                         sizeof *r->symbols, HT_GRAMMAR_MAX_SYMBOLS, "symbols"));
    r->symbols[r->n_symbols++] = (struct ht_symbol){ kind, index };
    return HT_OK;
}

static enum ht_status byte_class(struct ht_schema_compiler *c, const struct ht_byte_class *wanted,
                                 int *out)
{
    struct ht_rules *r = c->r;
    for (*out = 0; *out < r->n_classes; ++*out)
        if (memcmp(&r->classes[*out], wanted, sizeof *wanted) == 0) return HT_OK;
    HT_TRY(ht_rules_grow((void **)&r->classes, &r->class_capacity, r->n_classes, sizeof *r->classes,
                         100000, "classes"));
    r->classes[r->n_classes++] = *wanted;
    return HT_OK;
}

enum ht_status ht_rules_one_of(struct ht_schema_compiler *c, const char *ranges, size_t n)
{
    struct ht_byte_class k = { { 0 } };
    int index;
    for (size_t i = 0; i + 1 < n; i += 2)
        for (int b = (unsigned char)ranges[i]; b <= (unsigned char)ranges[i + 1]; b++)
            k.bits[b / 64] |= (uint64_t)1 << b % 64;
    HT_TRY(byte_class(c, &k, &index));
    return symbol(c, HT_SYMBOL_BYTES, index);
}

enum ht_status ht_rules_literal(struct ht_schema_compiler *c, const char *text)
{
    for (; *text; text++) {
        const char pair[2] = { *text, *text };
        HT_TRY(ht_rules_one_of(c, pair, 2));
    }
    return HT_OK;
}

enum ht_status ht_rules_use(struct ht_schema_compiler *c, int rule)
{
    return symbol(c, HT_SYMBOL_RULE, rule);
}

enum ht_status ht_rules_end(struct ht_schema_compiler *c)
{
    return symbol(c, HT_SYMBOL_END, 0);
}

enum ht_status ht_rules_begin(struct ht_schema_compiler *c, int rule)
{
    struct ht_rule *x = &c->r->rules[rule];
    HT_TRY(ht_rules_grow((void **)&x->alternatives, &x->capacity, x->n, sizeof *x->alternatives,
                         HT_GRAMMAR_MAX_SYMBOLS, "alternatives"));
    x->alternatives[x->n++] = c->r->n_symbols;
    return HT_OK;
}

enum ht_status ht_rules_empty(struct ht_schema_compiler *c, int rule)
{
    HT_TRY(ht_rules_begin(c, rule));
    return ht_rules_end(c);
}

enum ht_status ht_rules_use_common(struct ht_schema_compiler *c, enum ht_rules_common which)
{
    return ht_rules_use(c, c->common[which] - 1); // made before: see ht_rules_need()
}

enum ht_status ht_rules_need(struct ht_schema_compiler *c, int n, ...)
{
    enum ht_status st = HT_OK;
    va_list args;
    int rule;
    va_start(args, n);
    for (int i = 0; i < n && st == HT_OK; i++)
        st = ht_rules_common(c, (enum ht_rules_common)va_arg(args, int), &rule);
    va_end(args);
    return st;
}

/* rule ::= low to high bytes of the class, the last alternative being empty. high > low. */
static enum ht_status repeat_class(struct ht_schema_compiler *c, const char *ranges, size_t n,
                                   int low, int high, int *out)
{
    int next = -1;
    for (int i = high; i >= 0; i--) { // rule i: i of them are there
        HT_TRY(ht_rules_new_rule(c, out));
        if (i < high) {
            HT_TRY(ht_rules_begin(c, *out));
            HT_TRY(ht_rules_one_of(c, ranges, n));
            HT_TRY(ht_rules_use(c, next));
            HT_TRY(ht_rules_end(c));
        }
        if (i >= low) HT_TRY(ht_rules_empty(c, *out));
        next = *out;
    }
    return HT_OK;
}

static enum ht_status make_chars(struct ht_schema_compiler *c, int rule)
{
    static const struct {
        const char *parts[4];
        size_t n[4];
    } forms[] = {
        { { " !#[]\x7E" }, { 6 } }, // ASCII without quote, backslash and control characters
        { { "\xC2\xDF", "\x80\xBF" }, { 2, 2 } },
        { { "\xE0\xE0", "\xA0\xBF", "\x80\xBF" }, { 2, 2, 2 } },
        { { "\xE1\xEC\xEE\xEF", "\x80\xBF", "\x80\xBF" }, { 4, 2, 2 } },
        { { "\xED\xED", "\x80\x9F", "\x80\xBF" }, { 2, 2, 2 } },
        { { "\xF0\xF0", "\x90\xBF", "\x80\xBF", "\x80\xBF" }, { 2, 2, 2, 2 } },
        { { "\xF1\xF3", "\x80\xBF", "\x80\xBF", "\x80\xBF" }, { 2, 2, 2, 2 } },
        { { "\xF4\xF4", "\x80\x8F", "\x80\xBF", "\x80\xBF" }, { 2, 2, 2, 2 } },
        { { "\\\\", "\"\"\\\\//bbffnnrrtt" }, { 2, 16 } },
    };
    static const char hex[] = "09afAF";
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        HT_TRY(ht_rules_begin(c, rule));
        for (int k = 0; k < 4 && forms[i].n[k]; k++)
            HT_TRY(ht_rules_one_of(c, forms[i].parts[k], forms[i].n[k]));
        HT_TRY(ht_rules_end(c));
    }
    for (int surrogate = 0; surrogate < 2; surrogate++) { // \uXXXX, never half of a pair
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "\\u"));
        if (surrogate) HT_TRY(HT_RULES_ONE_OF(c, "ddDD"));
        HT_TRY(surrogate ? HT_RULES_ONE_OF(c, "07") : HT_RULES_ONE_OF(c, "19acefACEF"));
        for (int k = surrogate; k < 3; k++) HT_TRY(ht_rules_one_of(c, hex, 6));
        HT_TRY(ht_rules_end(c));
    }
    HT_TRY(ht_rules_begin(c, rule)); // \u0XXX, but \u0000 is no text for many readers
    HT_TRY(ht_rules_literal(c, "\\u0"));
    HT_TRY(HT_RULES_ONE_OF(c, "19afAF"));
    HT_TRY(ht_rules_one_of(c, hex, 6));
    HT_TRY(ht_rules_one_of(c, hex, 6));
    HT_TRY(ht_rules_end(c));
    HT_TRY(ht_rules_begin(c, rule));
    HT_TRY(ht_rules_literal(c, "\\u00"));
    HT_TRY(HT_RULES_ONE_OF(c, "19afAF"));
    HT_TRY(ht_rules_one_of(c, hex, 6));
    return ht_rules_end(c);
}

static enum ht_status make_number(struct ht_schema_compiler *c, int rule, bool integer)
{
    int digits, fraction, exponent, tail = -1, tail2 = -1;
    HT_TRY(repeat_class(c, "09", 2, 0, MAX_DIGITS - 1, &digits));
    if (!integer) {
        HT_TRY(repeat_class(c, "09", 2, 0, 1, &exponent));
        HT_TRY(ht_rules_new_rule(c, &tail2)); // exponent
        HT_TRY(ht_rules_empty(c, tail2));
        for (int sign = 0; sign < 2; sign++) {
            HT_TRY(ht_rules_begin(c, tail2));
            HT_TRY(HT_RULES_ONE_OF(c, "eeEE"));
            if (sign) HT_TRY(HT_RULES_ONE_OF(c, "++--"));
            HT_TRY(HT_RULES_ONE_OF(c, "09"));
            HT_TRY(ht_rules_use(c, exponent));
            HT_TRY(ht_rules_end(c));
        }
        HT_TRY(repeat_class(c, "09", 2, 0, MAX_DIGITS - 1, &fraction));
        HT_TRY(ht_rules_new_rule(c, &tail));
        HT_TRY(ht_rules_begin(c, tail));
        HT_TRY(ht_rules_use(c, tail2));
        HT_TRY(ht_rules_end(c));
        HT_TRY(ht_rules_begin(c, tail));
        HT_TRY(ht_rules_literal(c, "."));
        HT_TRY(HT_RULES_ONE_OF(c, "09"));
        HT_TRY(ht_rules_use(c, fraction));
        HT_TRY(ht_rules_use(c, tail2));
        HT_TRY(ht_rules_end(c));
    }
    for (int form = 0; form < 4; form++) {
        HT_TRY(ht_rules_begin(c, rule));
        if (form & 1) HT_TRY(ht_rules_literal(c, "-"));
        if (form & 2)
            HT_TRY(ht_rules_literal(c, "0"));
        else
            HT_TRY(HT_RULES_ONE_OF(c, "19"));
        if (!(form & 2)) HT_TRY(ht_rules_use(c, digits));
        if (tail >= 0) HT_TRY(ht_rules_use(c, tail));
        HT_TRY(ht_rules_end(c));
    }
    return HT_OK;
}

enum ht_status ht_rules_make_map(struct ht_schema_compiler *c, int rule, int value)
{
    int member, more;
    HT_TRY(ht_rules_need(c, 2, HT_RULES_SPACE, HT_RULES_STRING));
    HT_TRY(ht_rules_new_rule(c, &member));
    HT_TRY(ht_rules_new_rule(c, &more));
    HT_TRY(ht_rules_begin(c, member));
    HT_TRY(ht_rules_use_common(c, HT_RULES_STRING));
    HT_TRY(ht_rules_literal(c, ":"));
    HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
    HT_TRY(ht_rules_use(c, value));
    HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
    HT_TRY(ht_rules_end(c));
    HT_TRY(ht_rules_empty(c, more));
    HT_TRY(ht_rules_begin(c, more));
    HT_TRY(ht_rules_literal(c, ","));
    HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
    HT_TRY(ht_rules_use(c, member));
    HT_TRY(ht_rules_use(c, more));
    HT_TRY(ht_rules_end(c));
    for (int members = 0; members < 2; members++) {
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "{"));
        HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
        if (members) HT_TRY(ht_rules_use(c, member));
        if (members) HT_TRY(ht_rules_use(c, more));
        HT_TRY(ht_rules_literal(c, "}"));
        HT_TRY(ht_rules_end(c));
    }
    return HT_OK;
}

enum ht_status ht_rules_make_list(struct ht_schema_compiler *c, int rule, const int *prefix,
                                  int n_prefix, int item, int low, int high)
{
    int next = -1, this;
    HT_TRY(ht_rules_need(c, 1, HT_RULES_SPACE));
    if (item < 0 && (high < 0 || high > n_prefix)) high = n_prefix;
    const int last =
        high >= 0 ? high
                  : (low > n_prefix ? low : n_prefix); // rule `last`: that many items are there
    for (int i = last; i >= 0; i--) {
        HT_TRY(ht_rules_new_rule(c, &this));
        if (i >= low) HT_TRY(ht_rules_empty(c, this));
        if (i < last || high < 0) {
            HT_TRY(ht_rules_begin(c, this));
            if (i > 0) HT_TRY(ht_rules_literal(c, ","));
            if (i > 0) HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
            HT_TRY(ht_rules_use(c, i < n_prefix ? prefix[i] : item));
            HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
            HT_TRY(ht_rules_use(c, i < last ? next : this));
            HT_TRY(ht_rules_end(c));
        }
        next = this;
        if (i == 0 && last == 0 &&
            high < 0) { // items without bound from the first on: the first has no comma
            int more;
            HT_TRY(ht_rules_new_rule(c, &more));
            HT_TRY(ht_rules_empty(c, more));
            HT_TRY(ht_rules_begin(c, more));
            HT_TRY(ht_rules_literal(c, ","));
            HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
            HT_TRY(ht_rules_use(c, item));
            HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
            HT_TRY(ht_rules_use(c, more));
            HT_TRY(ht_rules_end(c));
            HT_TRY(ht_rules_new_rule(c, &next));
            HT_TRY(ht_rules_empty(c, next));
            HT_TRY(ht_rules_begin(c, next));
            HT_TRY(ht_rules_use(c, item));
            HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
            HT_TRY(ht_rules_use(c, more));
            HT_TRY(ht_rules_end(c));
        }
    }
    HT_TRY(ht_rules_begin(c, rule));
    HT_TRY(ht_rules_literal(c, "["));
    HT_TRY(ht_rules_use_common(c, HT_RULES_SPACE));
    HT_TRY(ht_rules_use(c, next));
    HT_TRY(ht_rules_literal(c, "]"));
    return ht_rules_end(c);
}

enum ht_status ht_rules_alternatives(struct ht_schema_compiler *c, int rule, int n,
                                     const enum ht_rules_common *which)
{
    for (int i = 0; i < n; i++) {
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_use_common(c, which[i]));
        HT_TRY(ht_rules_end(c));
    }
    return HT_OK;
}

static enum ht_status make_common(struct ht_schema_compiler *c, enum ht_rules_common which,
                                  int rule)
{
    static const enum ht_rules_common values[] = { HT_RULES_OBJECT,  HT_RULES_ARRAY,
                                                   HT_RULES_STRING,  HT_RULES_NUMBER,
                                                   HT_RULES_BOOLEAN, HT_RULES_NULL };
    int spaces;
    switch (which) {
    case HT_RULES_SPACE:
        HT_TRY(repeat_class(c, "  ", 2, 0, MAX_SPACES, &spaces));
        HT_TRY(ht_rules_empty(c, rule));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, " "));
        HT_TRY(ht_rules_end(c));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "\n"));
        HT_TRY(ht_rules_use(c, spaces));
        return ht_rules_end(c);
    case HT_RULES_CHAR: return make_chars(c, rule);
    case HT_RULES_CHARS:
        HT_TRY(ht_rules_need(c, 1, HT_RULES_CHAR));
        HT_TRY(ht_rules_empty(c, rule));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_use_common(c, HT_RULES_CHAR));
        HT_TRY(ht_rules_use(c, rule));
        return ht_rules_end(c);
    case HT_RULES_STRING:
        HT_TRY(ht_rules_need(c, 1, HT_RULES_CHARS));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "\""));
        HT_TRY(ht_rules_use_common(c, HT_RULES_CHARS));
        HT_TRY(ht_rules_literal(c, "\""));
        return ht_rules_end(c);
    case HT_RULES_NUMBER:
    case HT_RULES_INTEGER: return make_number(c, rule, which == HT_RULES_INTEGER);
    case HT_RULES_BOOLEAN:
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "true"));
        HT_TRY(ht_rules_end(c));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "false"));
        return ht_rules_end(c);
    case HT_RULES_NULL:
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_literal(c, "null"));
        return ht_rules_end(c);
    case HT_RULES_VALUE:
        HT_TRY(ht_rules_need(c, 6, HT_RULES_OBJECT, HT_RULES_ARRAY, HT_RULES_STRING,
                             HT_RULES_NUMBER, HT_RULES_BOOLEAN, HT_RULES_NULL));
        return ht_rules_alternatives(c, rule, 6, values);
    case HT_RULES_OBJECT:
        HT_TRY(ht_rules_need(c, 1, HT_RULES_VALUE));
        return ht_rules_make_map(c, rule, c->common[HT_RULES_VALUE] - 1);
    case HT_RULES_ARRAY:
        HT_TRY(ht_rules_need(c, 1, HT_RULES_VALUE));
        return ht_rules_make_list(c, rule, NULL, 0, c->common[HT_RULES_VALUE] - 1, 0, -1);
    case HT_RULES_COUNT: break;
    }
    return HT_OK;
}

enum ht_status ht_rules_common(struct ht_schema_compiler *c, enum ht_rules_common which, int *rule)
{
    if (!c->common[which]) {
        HT_TRY(ht_rules_new_rule(c, rule));
        c->common[which] = *rule + 1; // first: values are recursive
        HT_TRY(make_common(c, which, *rule));
    }
    *rule = c->common[which] - 1;
    return HT_OK;
}

void ht_rules_free(struct ht_rules *r)
{
    for (int i = 0; i < r->n_rules; i++) free(r->rules[i].alternatives);
    free(r->rules);
    free(r->symbols);
    free(r->classes);
    *r = (struct ht_rules){ 0 };
}
