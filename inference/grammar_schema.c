/* inference/grammar_schema.c: JSON schema -> rules. */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "inference/grammar_impl.h"

enum { MAX_COUNT = 4096, MAX_SPACES = 16, MAX_DIGITS = 16 };

/* Rules that every schema may use, made on demand. */
enum common {
    C_SPACE,
    C_CHAR,
    C_CHARS,
    C_STRING,
    C_NUMBER,
    C_INTEGER,
    C_VALUE,
    C_OBJECT,
    C_ARRAY,
    C_BOOLEAN,
    C_NULL,
    C_COUNT
};

struct compiler {
    struct ht_rules *r;
    const json_t *root;
    int common[C_COUNT]; // rule + 1, 0: not made
    struct seen {        // schemas already made, for $ref
        const json_t *schema;
        int rule;
    } * seen;
    int n_seen, seen_capacity, depth;
};

// ---- building blocks ----

static enum ht_status grow(void **p, int *capacity, int n, size_t size, int limit, const char *what)
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

static enum ht_status new_rule(struct compiler *c, int *out)
{
    struct ht_rules *r = c->r;
    HT_TRY(grow((void **)&r->rules, &r->rule_capacity, r->n_rules, sizeof *r->rules,
                HT_GRAMMAR_MAX_RULES, "rules"));
    r->rules[r->n_rules] = (struct ht_rule){ 0 };
    *out = r->n_rules++;
    return HT_OK;
}

static enum ht_status symbol(struct compiler *c, enum ht_symbol_kind kind, int index)
{
    struct ht_rules *r = c->r;
    HT_TRY(grow((void **)&r->symbols, &r->symbol_capacity, r->n_symbols, sizeof *r->symbols,
                HT_GRAMMAR_MAX_SYMBOLS, "symbols"));
    r->symbols[r->n_symbols++] = (struct ht_symbol){ kind, index };
    return HT_OK;
}

static enum ht_status byte_class(struct compiler *c, const struct ht_byte_class *wanted, int *out)
{
    struct ht_rules *r = c->r;
    for (*out = 0; *out < r->n_classes; ++*out)
        if (memcmp(&r->classes[*out], wanted, sizeof *wanted) == 0) return HT_OK;
    HT_TRY(grow((void **)&r->classes, &r->class_capacity, r->n_classes, sizeof *r->classes, 100000,
                "classes"));
    r->classes[r->n_classes++] = *wanted;
    return HT_OK;
}

/* One byte out of ranges "azAZ09". */
static enum ht_status one_of(struct compiler *c, const char *ranges, size_t n)
{
    struct ht_byte_class k = { { 0 } };
    int index;
    for (size_t i = 0; i + 1 < n; i += 2)
        for (int b = (unsigned char)ranges[i]; b <= (unsigned char)ranges[i + 1]; b++)
            k.bits[b / 64] |= (uint64_t)1 << b % 64;
    HT_TRY(byte_class(c, &k, &index));
    return symbol(c, HT_SYMBOL_BYTES, index);
}
#define ONE_OF(c, ranges) one_of((c), ranges, sizeof(ranges) - 1)

static enum ht_status literal(struct compiler *c, const char *text)
{
    for (; *text; text++) {
        const char pair[2] = { *text, *text };
        HT_TRY(one_of(c, pair, 2));
    }
    return HT_OK;
}

static enum ht_status use(struct compiler *c, int rule)
{
    return symbol(c, HT_SYMBOL_RULE, rule);
}

static enum ht_status end(struct compiler *c)
{
    return symbol(c, HT_SYMBOL_END, 0);
}

/* Symbols from here on, up to end(), are an alternative of rule. */
static enum ht_status begin(struct compiler *c, int rule)
{
    struct ht_rule *x = &c->r->rules[rule];
    HT_TRY(grow((void **)&x->alternatives, &x->capacity, x->n, sizeof *x->alternatives,
                HT_GRAMMAR_MAX_SYMBOLS, "alternatives"));
    x->alternatives[x->n++] = c->r->n_symbols;
    return HT_OK;
}

static enum ht_status empty(struct compiler *c, int rule)
{
    HT_TRY(begin(c, rule));
    return end(c);
}

static enum ht_status common(struct compiler *c, enum common which, int *rule);

static enum ht_status use_common(struct compiler *c, enum common which)
{
    return use(c, c->common[which] - 1); // made before: see need()
}

/* Rules cannot be made in the middle of an alternative: what it uses is made first. */
static enum ht_status need(struct compiler *c, int n, ...)
{
    enum ht_status st = HT_OK;
    va_list args;
    int rule;
    va_start(args, n);
    for (int i = 0; i < n && st == HT_OK; i++)
        st = common(c, (enum common)va_arg(args, int), &rule);
    va_end(args);
    return st;
}

/* rule ::= low to high bytes of the class, the last alternative being empty. high > low. */
static enum ht_status repeat_class(struct compiler *c, const char *ranges, size_t n, int low,
                                   int high, int *out)
{
    int next = -1;
    for (int i = high; i >= 0; i--) { // rule i: i of them are there
        HT_TRY(new_rule(c, out));
        if (i < high) {
            HT_TRY(begin(c, *out));
            HT_TRY(one_of(c, ranges, n));
            HT_TRY(use(c, next));
            HT_TRY(end(c));
        }
        if (i >= low) HT_TRY(empty(c, *out));
        next = *out;
    }
    return HT_OK;
}

static enum ht_status make_chars(struct compiler *c, int rule)
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
        HT_TRY(begin(c, rule));
        for (int k = 0; k < 4 && forms[i].n[k]; k++)
            HT_TRY(one_of(c, forms[i].parts[k], forms[i].n[k]));
        HT_TRY(end(c));
    }
    for (int surrogate = 0; surrogate < 2; surrogate++) { // \uXXXX, never half of a pair
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "\\u"));
        if (surrogate) HT_TRY(ONE_OF(c, "ddDD"));
        HT_TRY(surrogate ? ONE_OF(c, "07") : ONE_OF(c, "19acefACEF"));
        for (int k = surrogate; k < 3; k++) HT_TRY(one_of(c, hex, 6));
        HT_TRY(end(c));
    }
    HT_TRY(begin(c, rule)); // \u0XXX, but \u0000 is no text for many readers
    HT_TRY(literal(c, "\\u0"));
    HT_TRY(ONE_OF(c, "19afAF"));
    HT_TRY(one_of(c, hex, 6));
    HT_TRY(one_of(c, hex, 6));
    HT_TRY(end(c));
    HT_TRY(begin(c, rule));
    HT_TRY(literal(c, "\\u00"));
    HT_TRY(ONE_OF(c, "19afAF"));
    HT_TRY(one_of(c, hex, 6));
    return end(c);
}

static enum ht_status make_number(struct compiler *c, int rule, bool integer)
{
    int digits, fraction, exponent, tail = -1, tail2 = -1;
    HT_TRY(repeat_class(c, "09", 2, 0, MAX_DIGITS - 1, &digits));
    if (!integer) {
        HT_TRY(repeat_class(c, "09", 2, 0, 1, &exponent));
        HT_TRY(new_rule(c, &tail2)); // exponent
        HT_TRY(empty(c, tail2));
        for (int sign = 0; sign < 2; sign++) {
            HT_TRY(begin(c, tail2));
            HT_TRY(ONE_OF(c, "eeEE"));
            if (sign) HT_TRY(ONE_OF(c, "++--"));
            HT_TRY(ONE_OF(c, "09"));
            HT_TRY(use(c, exponent));
            HT_TRY(end(c));
        }
        HT_TRY(repeat_class(c, "09", 2, 0, MAX_DIGITS - 1, &fraction));
        HT_TRY(new_rule(c, &tail));
        HT_TRY(begin(c, tail));
        HT_TRY(use(c, tail2));
        HT_TRY(end(c));
        HT_TRY(begin(c, tail));
        HT_TRY(literal(c, "."));
        HT_TRY(ONE_OF(c, "09"));
        HT_TRY(use(c, fraction));
        HT_TRY(use(c, tail2));
        HT_TRY(end(c));
    }
    for (int form = 0; form < 4; form++) {
        HT_TRY(begin(c, rule));
        if (form & 1) HT_TRY(literal(c, "-"));
        if (form & 2)
            HT_TRY(literal(c, "0"));
        else
            HT_TRY(ONE_OF(c, "19"));
        if (!(form & 2)) HT_TRY(use(c, digits));
        if (tail >= 0) HT_TRY(use(c, tail));
        HT_TRY(end(c));
    }
    return HT_OK;
}

/* { key: value, .. } with any number of members. */
static enum ht_status make_map(struct compiler *c, int rule, int value)
{
    int member, more;
    HT_TRY(need(c, 2, C_SPACE, C_STRING));
    HT_TRY(new_rule(c, &member));
    HT_TRY(new_rule(c, &more));
    HT_TRY(begin(c, member));
    HT_TRY(use_common(c, C_STRING));
    HT_TRY(literal(c, ":"));
    HT_TRY(use_common(c, C_SPACE));
    HT_TRY(use(c, value));
    HT_TRY(use_common(c, C_SPACE));
    HT_TRY(end(c));
    HT_TRY(empty(c, more));
    HT_TRY(begin(c, more));
    HT_TRY(literal(c, ","));
    HT_TRY(use_common(c, C_SPACE));
    HT_TRY(use(c, member));
    HT_TRY(use(c, more));
    HT_TRY(end(c));
    for (int members = 0; members < 2; members++) {
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "{"));
        HT_TRY(use_common(c, C_SPACE));
        if (members) HT_TRY(use(c, member));
        if (members) HT_TRY(use(c, more));
        HT_TRY(literal(c, "}"));
        HT_TRY(end(c));
    }
    return HT_OK;
}

/* [ items ]: the first n_prefix of their own rules, the rest of rule `item` (-1: none may follow).
 * high -1: no bound. */
static enum ht_status make_list(struct compiler *c, int rule, const int *prefix, int n_prefix,
                                int item, int low, int high)
{
    int next = -1, this;
    HT_TRY(need(c, 1, C_SPACE));
    if (item < 0 && (high < 0 || high > n_prefix)) high = n_prefix;
    const int last =
        high >= 0 ? high
                  : (low > n_prefix ? low : n_prefix); // rule `last`: that many items are there
    for (int i = last; i >= 0; i--) {
        HT_TRY(new_rule(c, &this));
        if (i >= low) HT_TRY(empty(c, this));
        if (i < last || high < 0) {
            HT_TRY(begin(c, this));
            if (i > 0) HT_TRY(literal(c, ","));
            if (i > 0) HT_TRY(use_common(c, C_SPACE));
            HT_TRY(use(c, i < n_prefix ? prefix[i] : item));
            HT_TRY(use_common(c, C_SPACE));
            HT_TRY(use(c, i < last ? next : this));
            HT_TRY(end(c));
        }
        next = this;
        if (i == 0 && last == 0 &&
            high < 0) { // items without bound from the first on: the first has no comma
            int more;
            HT_TRY(new_rule(c, &more));
            HT_TRY(empty(c, more));
            HT_TRY(begin(c, more));
            HT_TRY(literal(c, ","));
            HT_TRY(use_common(c, C_SPACE));
            HT_TRY(use(c, item));
            HT_TRY(use_common(c, C_SPACE));
            HT_TRY(use(c, more));
            HT_TRY(end(c));
            HT_TRY(new_rule(c, &next));
            HT_TRY(empty(c, next));
            HT_TRY(begin(c, next));
            HT_TRY(use(c, item));
            HT_TRY(use_common(c, C_SPACE));
            HT_TRY(use(c, more));
            HT_TRY(end(c));
        }
    }
    HT_TRY(begin(c, rule));
    HT_TRY(literal(c, "["));
    HT_TRY(use_common(c, C_SPACE));
    HT_TRY(use(c, next));
    HT_TRY(literal(c, "]"));
    return end(c);
}

static enum ht_status alternatives(struct compiler *c, int rule, int n, const enum common *which)
{
    for (int i = 0; i < n; i++) {
        HT_TRY(begin(c, rule));
        HT_TRY(use_common(c, which[i]));
        HT_TRY(end(c));
    }
    return HT_OK;
}

static enum ht_status make_common(struct compiler *c, enum common which, int rule)
{
    static const enum common values[] = {
        C_OBJECT, C_ARRAY, C_STRING, C_NUMBER, C_BOOLEAN, C_NULL
    };
    int spaces;
    switch (which) {
    case C_SPACE:
        HT_TRY(repeat_class(c, "  ", 2, 0, MAX_SPACES, &spaces));
        HT_TRY(empty(c, rule));
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, " "));
        HT_TRY(end(c));
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "\n"));
        HT_TRY(use(c, spaces));
        return end(c);
    case C_CHAR: return make_chars(c, rule);
    case C_CHARS:
        HT_TRY(need(c, 1, C_CHAR));
        HT_TRY(empty(c, rule));
        HT_TRY(begin(c, rule));
        HT_TRY(use_common(c, C_CHAR));
        HT_TRY(use(c, rule));
        return end(c);
    case C_STRING:
        HT_TRY(need(c, 1, C_CHARS));
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "\""));
        HT_TRY(use_common(c, C_CHARS));
        HT_TRY(literal(c, "\""));
        return end(c);
    case C_NUMBER:
    case C_INTEGER: return make_number(c, rule, which == C_INTEGER);
    case C_BOOLEAN:
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "true"));
        HT_TRY(end(c));
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "false"));
        return end(c);
    case C_NULL:
        HT_TRY(begin(c, rule));
        HT_TRY(literal(c, "null"));
        return end(c);
    case C_VALUE:
        HT_TRY(need(c, 6, C_OBJECT, C_ARRAY, C_STRING, C_NUMBER, C_BOOLEAN, C_NULL));
        return alternatives(c, rule, 6, values);
    case C_OBJECT: HT_TRY(need(c, 1, C_VALUE)); return make_map(c, rule, c->common[C_VALUE] - 1);
    case C_ARRAY:
        HT_TRY(need(c, 1, C_VALUE));
        return make_list(c, rule, NULL, 0, c->common[C_VALUE] - 1, 0, -1);
    case C_COUNT: break;
    }
    return HT_OK;
}

static enum ht_status common(struct compiler *c, enum common which, int *rule)
{
    if (!c->common[which]) {
        HT_TRY(new_rule(c, rule));
        c->common[which] = *rule + 1; // first: values are recursive
        HT_TRY(make_common(c, which, *rule));
    }
    *rule = c->common[which] - 1;
    return HT_OK;
}

// ---- schemas ----

static enum ht_status compile(struct compiler *c, const json_t *schema, int *rule);

static enum ht_status check_keywords(const json_t *schema)
{
    static const char *const known[] = {
        "type",     "enum",        "const",    "properties", "required",  "additionalProperties",
        "items",    "prefixItems", "minItems", "maxItems",   "minLength", "maxLength",
        "anyOf",    "oneOf",       "allOf",    "$ref",       "$defs",     "definitions",
        "title",    "description", "default",  "examples",   "$schema",   "$id",
        "$comment", "deprecated",  "readOnly", "writeOnly",  "format",    "strict",
        "name"
    };
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)schema, key, value)
    {
        size_t i = 0;
        while (i < sizeof known / sizeof *known && strcmp(known[i], key) != 0) i++;
        if (i == sizeof known / sizeof *known)
            return HT_FAIL(HT_ERR_ARG, "the schema's keyword '%.60s' is not supported", key);
    }
    return HT_OK;
}

static enum ht_status get_count(const json_t *schema, const char *key, int otherwise, int *out)
{
    const json_t *v = json_object_get(schema, key);
    *out = otherwise;
    if (!v) return HT_OK;
    if (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > MAX_COUNT)
        return HT_FAIL(HT_ERR_ARG, "the schema's %s must be an integer from 0 to %d", key,
                       MAX_COUNT);
    *out = (int)json_integer_value(v);
    return HT_OK;
}

/* "#", "#/$defs/name": walks from the root. */
static enum ht_status resolve(const struct compiler *c, const char *ref, const json_t **out)
{
    char part[256];
    *out = c->root;
    if (ref[0] != '#') return HT_FAIL(HT_ERR_ARG, "the schema's $ref '%.100s' leads outside", ref);
    for (const char *p = ref + 1; *p && *out;) {
        size_t n = 0;
        if (*p++ != '/')
            return HT_FAIL(HT_ERR_ARG, "the schema's $ref '%.100s' is no pointer", ref);
        for (; *p && *p != '/' && n + 1 < sizeof part; p++) {
            if (p[0] == '~' && (p[1] == '0' || p[1] == '1'))
                part[n++] = *++p == '0' ? '~' : '/';
            else
                part[n++] = *p;
        }
        part[n] = '\0';
        *out = json_is_array(*out) ? json_array_get(*out, (size_t)strtoul(part, NULL, 10))
                                   : json_object_get(*out, part);
    }
    return *out ? HT_OK : HT_FAIL(HT_ERR_ARG, "the schema's $ref '%.100s' leads nowhere", ref);
}

static enum ht_status compile_literal(struct compiler *c, int rule, const json_t *value)
{
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for a value of the schema");
    enum ht_status st = begin(c, rule);
    if (st == HT_OK) st = literal(c, text);
    if (st == HT_OK) st = end(c);
    free(text);
    return st;
}

static enum ht_status compile_string(struct compiler *c, const json_t *schema, int rule)
{
    int low, high, next = -1, this;
    HT_TRY(get_count(schema, "minLength", 0, &low));
    HT_TRY(get_count(schema, "maxLength", -1, &high));
    if (high >= 0 && high < low)
        return HT_FAIL(HT_ERR_ARG, "the schema's maxLength is below its minLength");
    HT_TRY(need(c, 2, C_CHAR, C_CHARS));
    const int last = high >= 0 ? high : low;
    for (int i = last; i >= 0; i--) {
        HT_TRY(new_rule(c, &this));
        if (i == last && high < 0) {
            HT_TRY(begin(c, this));
            HT_TRY(use_common(c, C_CHARS));
            HT_TRY(end(c));
        } else {
            if (i >= low) HT_TRY(empty(c, this));
            if (i < last) {
                HT_TRY(begin(c, this));
                HT_TRY(use_common(c, C_CHAR));
                HT_TRY(use(c, next));
                HT_TRY(end(c));
            }
        }
        next = this;
    }
    HT_TRY(begin(c, rule));
    HT_TRY(literal(c, "\""));
    HT_TRY(use(c, next));
    HT_TRY(literal(c, "\""));
    return end(c);
}

static bool is_required(const json_t *schema, const char *key)
{
    const json_t *list = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name && strcmp(name, key) == 0) return true;
    }
    return false;
}

/* Members in the schema's order: state (k, something written) goes to k + 1. */
static enum ht_status compile_members(struct compiler *c, const json_t *schema, json_t *properties,
                                      int rule)
{
    const size_t n = json_object_size(properties);
    int *values = calloc(n + 1, sizeof *values), first = -1, more = -1, this;
    const char **keys = calloc(n + 1, sizeof *keys);
    enum ht_status st = HT_OK;
    const char *key;
    json_t *value;
    size_t k = 0;

    if (!values || !keys) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for %zu properties", n);
        goto done;
    }
    HT_TRY_GOTO(st, done, need(c, 1, C_SPACE));
    json_object_foreach(properties, key, value)
    {
        keys[k] = key;
        HT_TRY_GOTO(st, done, compile(c, value, &values[k]));
        k++;
    }
    for (k = n + 1; k-- > 0;) {
        int next[2] = { first, more };
        for (int written = 0; written < 2; written++) {
            HT_TRY_GOTO(st, done, new_rule(c, &this));
            if (k == n) {
                HT_TRY_GOTO(st, done, empty(c, this));
            } else {
                json_t *name = json_string(keys[k]);
                char *text = name ? json_dumps(name, JSON_ENCODE_ANY) : NULL;
                json_decref(name);
                if (!text) {
                    st = HT_FAIL(HT_ERR_MEMORY, "no memory for a property's name");
                    goto done;
                }
                st = begin(c, this);
                if (st == HT_OK && written) st = literal(c, ",");
                if (st == HT_OK && written) st = use_common(c, C_SPACE);
                if (st == HT_OK) st = literal(c, text);
                free(text);
                HT_TRY_GOTO(st, done, st);
                HT_TRY_GOTO(st, done, literal(c, ":"));
                HT_TRY_GOTO(st, done, use_common(c, C_SPACE));
                HT_TRY_GOTO(st, done, use(c, values[k]));
                HT_TRY_GOTO(st, done, use_common(c, C_SPACE));
                HT_TRY_GOTO(st, done, use(c, next[1]));
                HT_TRY_GOTO(st, done, end(c));
                if (!is_required(schema, keys[k])) {
                    HT_TRY_GOTO(st, done, begin(c, this));
                    HT_TRY_GOTO(st, done, use(c, next[written]));
                    HT_TRY_GOTO(st, done, end(c));
                }
            }
            if (written)
                more = this;
            else
                first = this;
        }
    }
    HT_TRY_GOTO(st, done, begin(c, rule));
    HT_TRY_GOTO(st, done, literal(c, "{"));
    HT_TRY_GOTO(st, done, use_common(c, C_SPACE));
    HT_TRY_GOTO(st, done, use(c, first));
    HT_TRY_GOTO(st, done, literal(c, "}"));
    HT_TRY_GOTO(st, done, end(c));
done:
    free(values);
    free(keys);
    return st;
}

static enum ht_status compile_object(struct compiler *c, const json_t *schema, int rule)
{
    json_t *properties = json_object_get(schema, "properties");
    const json_t *others = json_object_get(schema, "additionalProperties"),
                 *required = json_object_get(schema, "required");
    int value;

    if (properties && !json_is_object(properties))
        return HT_FAIL(HT_ERR_ARG, "the schema's properties are no object");
    if (required && !json_is_array(required))
        return HT_FAIL(HT_ERR_ARG, "the schema's required is no array");
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *name = json_string_value(json_array_get(required, i));
        if (!name || !json_object_get(properties, name))
            return HT_FAIL(HT_ERR_ARG,
                           "the schema requires '%.60s', which is not among its properties",
                           name ? name : "?");
    }
    if (json_object_size(properties) > 0 || json_is_false(others))
        return compile_members(c, schema, properties, rule);
    if (json_is_object(others)) {
        HT_TRY(compile(c, others, &value));
    } else {
        HT_TRY(common(c, C_VALUE, &value));
    }
    return make_map(c, rule, value);
}

static enum ht_status compile_array(struct compiler *c, const json_t *schema, int rule)
{
    const json_t *items = json_object_get(schema, "items"),
                 *prefix = json_object_get(schema, "prefixItems");
    const size_t n = json_array_size(prefix);
    int low, high, item = -1;
    HT_TRY(get_count(schema, "minItems", 0, &low));
    HT_TRY(get_count(schema, "maxItems", -1, &high));
    if ((prefix && !json_is_array(prefix)) || n > MAX_COUNT)
        return HT_FAIL(HT_ERR_ARG, "the schema's prefixItems are no array");
    if (json_is_object(items) || json_is_true(items))
        HT_TRY(compile(c, items, &item));
    else if (!items)
        HT_TRY(common(c, C_VALUE, &item));
    else if (!json_is_false(items))
        return HT_FAIL(HT_ERR_ARG, "the schema's items must be an object, true or false");
    if ((high >= 0 && high < low) || (item < 0 && low > (int)n))
        return HT_FAIL(HT_ERR_ARG, "the schema's array can have no length");
    int *rules = calloc(n + 1, sizeof *rules);
    enum ht_status st = rules ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for %zu items", n);
    for (size_t i = 0; i < n && st == HT_OK; i++)
        st = compile(c, json_array_get(prefix, i), &rules[i]);
    if (st == HT_OK) st = make_list(c, rule, rules, (int)n, item, low, high);
    free(rules);
    return st;
}

static enum ht_status compile_type(struct compiler *c, const json_t *schema, const char *type,
                                   int rule)
{
    static const char *const names[] = { "number", "integer", "boolean", "null" };
    static const enum common rules[] = { C_NUMBER, C_INTEGER, C_BOOLEAN, C_NULL };
    if (strcmp(type, "string") == 0) return compile_string(c, schema, rule);
    if (strcmp(type, "object") == 0) return compile_object(c, schema, rule);
    if (strcmp(type, "array") == 0) return compile_array(c, schema, rule);
    for (int i = 0; i < 4; i++) {
        if (strcmp(type, names[i]) != 0) continue;
        HT_TRY(need(c, 1, rules[i]));
        return alternatives(c, rule, 1, &rules[i]);
    }
    return HT_FAIL(HT_ERR_ARG, "the schema's type '%.40s' is unknown", type);
}

static enum ht_status compile_any(struct compiler *c, const json_t *list, const char *key, int rule)
{
    int inner;
    if (!json_is_array(list) || json_array_size(list) == 0)
        return HT_FAIL(HT_ERR_ARG, "the schema's %s is no list of schemas", key);
    for (size_t i = 0; i < json_array_size(list); i++) {
        HT_TRY(compile(c, json_array_get(list, i), &inner));
        HT_TRY(begin(c, rule));
        HT_TRY(use(c, inner));
        HT_TRY(end(c));
    }
    return HT_OK;
}

static enum ht_status compile_into(struct compiler *c, const json_t *schema, int rule)
{
    static const enum common any[] = { C_VALUE };
    const json_t *v, *target, *type = json_object_get(schema, "type");
    int inner;

    if (json_is_true(schema)) {
        HT_TRY(need(c, 1, C_VALUE));
        return alternatives(c, rule, 1, any);
    }
    if (!json_is_object(schema))
        return HT_FAIL(HT_ERR_ARG, "a schema is neither an object nor true");
    HT_TRY(check_keywords(schema));
    if ((v = json_object_get(schema, "$ref"))) {
        if (!json_is_string(v)) return HT_FAIL(HT_ERR_ARG, "the schema's $ref is no string");
        HT_TRY(resolve(c, json_string_value(v), &target));
        HT_TRY(compile(c, target, &inner));
        HT_TRY(begin(c, rule));
        HT_TRY(use(c, inner));
        return end(c);
    }
    if ((v = json_object_get(schema, "const"))) return compile_literal(c, rule, v);
    if ((v = json_object_get(schema, "enum"))) {
        if (!json_is_array(v) || json_array_size(v) == 0)
            return HT_FAIL(HT_ERR_ARG, "the schema's enum is no list of values");
        for (size_t i = 0; i < json_array_size(v); i++)
            HT_TRY(compile_literal(c, rule, json_array_get(v, i)));
        return HT_OK;
    }
    static const char *const lists[] = { "anyOf", "oneOf", "allOf" };
    for (int i = 0; i < 3; i++) {
        if (!(v = json_object_get(schema, lists[i]))) continue;
        if (i == 2 && json_array_size(v) != 1)
            return HT_FAIL(HT_ERR_ARG, "the schema's allOf must have one entry");
        if (type || json_object_get(schema, "properties"))
            return HT_FAIL(HT_ERR_ARG, "the schema's %s beside type or properties is not supported",
                           lists[i]);
        return compile_any(c, v, lists[i], rule);
    }
    if (json_is_string(type)) return compile_type(c, schema, json_string_value(type), rule);
    if (json_is_array(type) && json_array_size(type) > 0) {
        for (size_t i = 0; i < json_array_size(type); i++) {
            const char *name = json_string_value(json_array_get(type, i));
            HT_TRY(compile_type(c, schema, name ? name : "?", rule));
        }
        return HT_OK;
    }
    if (type) return HT_FAIL(HT_ERR_ARG, "the schema's type is neither a string nor strings");
    if (json_object_get(schema, "properties")) return compile_object(c, schema, rule);
    if (json_object_get(schema, "items") || json_object_get(schema, "prefixItems"))
        return compile_array(c, schema, rule);
    HT_TRY(need(c, 1, C_VALUE));
    return alternatives(c, rule, 1, any);
}

static enum ht_status compile(struct compiler *c, const json_t *schema, int *rule)
{
    for (int i = 0; i < c->n_seen; i++)
        if (c->seen[i].schema == schema) {
            *rule = c->seen[i].rule;
            return HT_OK;
        }
    if (c->depth >= 128) return HT_FAIL(HT_ERR_ARG, "the schema is nested more than 128 deep");
    HT_TRY(grow((void **)&c->seen, &c->seen_capacity, c->n_seen, sizeof *c->seen, 20000, "parts"));
    HT_TRY(new_rule(c, rule));
    if (json_is_object(schema))
        c->seen[c->n_seen++] = (struct seen){ schema, *rule }; // true and false are shared
    c->depth++;
    HT_TRY(compile_into(c, schema, *rule));
    c->depth--;
    return HT_OK;
}

enum ht_status ht_rules_from_schema(struct ht_rules *r, const json_t *schema)
{
    struct compiler c = { .r = r, .root = schema };
    enum ht_status st = HT_OK;
    int root, inner;

    *r = (struct ht_rules){ 0 };
    HT_TRY_GOTO(st, done, new_rule(&c, &root));
    HT_TRY_GOTO(st, done, need(&c, 1, C_SPACE));
    HT_TRY_GOTO(st, done, schema ? compile(&c, schema, &inner) : common(&c, C_OBJECT, &inner));
    HT_TRY_GOTO(st, done, begin(&c, root));
    HT_TRY_GOTO(st, done, use_common(&c, C_SPACE));
    HT_TRY_GOTO(st, done, use(&c, inner));
    HT_TRY_GOTO(st, done, end(&c));
done:
    free(c.seen);
    if (st != HT_OK) ht_rules_free(r);
    return st;
}

void ht_rules_free(struct ht_rules *r)
{
    for (int i = 0; i < r->n_rules; i++) free(r->rules[i].alternatives);
    free(r->rules);
    free(r->symbols);
    free(r->classes);
    *r = (struct ht_rules){ 0 };
}
