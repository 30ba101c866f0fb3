/* inference/grammar_schema.c: JSON schema -> rules. */
#include <stdlib.h>
#include <string.h>

#include "inference/grammar_schema.h"

enum { MAX_COUNT = 4096 };

static enum ht_status compile(struct ht_schema_compiler *c, const json_t *schema, int *rule);

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
static enum ht_status resolve(const struct ht_schema_compiler *c, const char *ref,
                              const json_t **out)
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

static enum ht_status compile_literal(struct ht_schema_compiler *c, int rule, const json_t *value)
{
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT);
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for a value of the schema");
    enum ht_status st = ht_rules_begin(c, rule);
    if (st == HT_OK) st = ht_rules_literal(c, text);
    if (st == HT_OK) st = ht_rules_end(c);
    free(text);
    return st;
}

static enum ht_status compile_string(struct ht_schema_compiler *c, const json_t *schema, int rule)
{
    int low, high, next = -1, this;
    HT_TRY(get_count(schema, "minLength", 0, &low));
    HT_TRY(get_count(schema, "maxLength", -1, &high));
    if (high >= 0 && high < low)
        return HT_FAIL(HT_ERR_ARG, "the schema's maxLength is below its minLength");
    HT_TRY(ht_rules_need(c, 2, HT_RULES_CHAR, HT_RULES_CHARS));
    const int last = high >= 0 ? high : low;
    for (int i = last; i >= 0; i--) {
        HT_TRY(ht_rules_new_rule(c, &this));
        if (i == last && high < 0) {
            HT_TRY(ht_rules_begin(c, this));
            HT_TRY(ht_rules_use_common(c, HT_RULES_CHARS));
            HT_TRY(ht_rules_end(c));
        } else {
            if (i >= low) HT_TRY(ht_rules_empty(c, this));
            if (i < last) {
                HT_TRY(ht_rules_begin(c, this));
                HT_TRY(ht_rules_use_common(c, HT_RULES_CHAR));
                HT_TRY(ht_rules_use(c, next));
                HT_TRY(ht_rules_end(c));
            }
        }
        next = this;
    }
    HT_TRY(ht_rules_begin(c, rule));
    HT_TRY(ht_rules_literal(c, "\""));
    HT_TRY(ht_rules_use(c, next));
    HT_TRY(ht_rules_literal(c, "\""));
    return ht_rules_end(c);
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
static enum ht_status compile_members(struct ht_schema_compiler *c, const json_t *schema,
                                      json_t *properties, int rule)
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
    HT_TRY_GOTO(st, done, ht_rules_need(c, 1, HT_RULES_SPACE));
    json_object_foreach(properties, key, value)
    {
        keys[k] = key;
        HT_TRY_GOTO(st, done, compile(c, value, &values[k]));
        k++;
    }
    for (k = n + 1; k-- > 0;) {
        int next[2] = { first, more };
        for (int written = 0; written < 2; written++) {
            HT_TRY_GOTO(st, done, ht_rules_new_rule(c, &this));
            if (k == n) {
                HT_TRY_GOTO(st, done, ht_rules_empty(c, this));
            } else {
                json_t *name = json_string(keys[k]);
                char *text = name ? json_dumps(name, JSON_ENCODE_ANY) : NULL;
                json_decref(name);
                if (!text) {
                    st = HT_FAIL(HT_ERR_MEMORY, "no memory for a property's name");
                    goto done;
                }
                st = ht_rules_begin(c, this);
                if (st == HT_OK && written) st = ht_rules_literal(c, ",");
                if (st == HT_OK && written) st = ht_rules_use_common(c, HT_RULES_SPACE);
                if (st == HT_OK) st = ht_rules_literal(c, text);
                free(text);
                HT_TRY_GOTO(st, done, st);
                HT_TRY_GOTO(st, done, ht_rules_literal(c, ":"));
                HT_TRY_GOTO(st, done, ht_rules_use_common(c, HT_RULES_SPACE));
                HT_TRY_GOTO(st, done, ht_rules_use(c, values[k]));
                HT_TRY_GOTO(st, done, ht_rules_use_common(c, HT_RULES_SPACE));
                HT_TRY_GOTO(st, done, ht_rules_use(c, next[1]));
                HT_TRY_GOTO(st, done, ht_rules_end(c));
                if (!is_required(schema, keys[k])) {
                    HT_TRY_GOTO(st, done, ht_rules_begin(c, this));
                    HT_TRY_GOTO(st, done, ht_rules_use(c, next[written]));
                    HT_TRY_GOTO(st, done, ht_rules_end(c));
                }
            }
            if (written)
                more = this;
            else
                first = this;
        }
    }
    HT_TRY_GOTO(st, done, ht_rules_begin(c, rule));
    HT_TRY_GOTO(st, done, ht_rules_literal(c, "{"));
    HT_TRY_GOTO(st, done, ht_rules_use_common(c, HT_RULES_SPACE));
    HT_TRY_GOTO(st, done, ht_rules_use(c, first));
    HT_TRY_GOTO(st, done, ht_rules_literal(c, "}"));
    HT_TRY_GOTO(st, done, ht_rules_end(c));
done:
    free(values);
    free(keys);
    return st;
}

static enum ht_status compile_object(struct ht_schema_compiler *c, const json_t *schema, int rule)
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
        HT_TRY(ht_rules_common(c, HT_RULES_VALUE, &value));
    }
    return ht_rules_make_map(c, rule, value);
}

static enum ht_status compile_array(struct ht_schema_compiler *c, const json_t *schema, int rule)
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
        HT_TRY(ht_rules_common(c, HT_RULES_VALUE, &item));
    else if (!json_is_false(items))
        return HT_FAIL(HT_ERR_ARG, "the schema's items must be an object, true or false");
    if ((high >= 0 && high < low) || (item < 0 && low > (int)n))
        return HT_FAIL(HT_ERR_ARG, "the schema's array can have no length");
    int *rules = calloc(n + 1, sizeof *rules);
    enum ht_status st = rules ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for %zu items", n);
    for (size_t i = 0; i < n && st == HT_OK; i++)
        st = compile(c, json_array_get(prefix, i), &rules[i]);
    if (st == HT_OK) st = ht_rules_make_list(c, rule, rules, (int)n, item, low, high);
    free(rules);
    return st;
}

static enum ht_status compile_type(struct ht_schema_compiler *c, const json_t *schema,
                                   const char *type, int rule)
{
    static const char *const names[] = { "number", "integer", "boolean", "null" };
    static const enum ht_rules_common rules[] = { HT_RULES_NUMBER, HT_RULES_INTEGER,
                                                  HT_RULES_BOOLEAN, HT_RULES_NULL };
    if (strcmp(type, "string") == 0) return compile_string(c, schema, rule);
    if (strcmp(type, "object") == 0) return compile_object(c, schema, rule);
    if (strcmp(type, "array") == 0) return compile_array(c, schema, rule);
    for (int i = 0; i < 4; i++) {
        if (strcmp(type, names[i]) != 0) continue;
        HT_TRY(ht_rules_need(c, 1, rules[i]));
        return ht_rules_alternatives(c, rule, 1, &rules[i]);
    }
    return HT_FAIL(HT_ERR_ARG, "the schema's type '%.40s' is unknown", type);
}

static enum ht_status compile_any(struct ht_schema_compiler *c, const json_t *list, const char *key,
                                  int rule)
{
    int inner;
    if (!json_is_array(list) || json_array_size(list) == 0)
        return HT_FAIL(HT_ERR_ARG, "the schema's %s is no list of schemas", key);
    for (size_t i = 0; i < json_array_size(list); i++) {
        HT_TRY(compile(c, json_array_get(list, i), &inner));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_use(c, inner));
        HT_TRY(ht_rules_end(c));
    }
    return HT_OK;
}

static enum ht_status compile_into(struct ht_schema_compiler *c, const json_t *schema, int rule)
{
    static const enum ht_rules_common any[] = { HT_RULES_VALUE };
    const json_t *v, *target, *type = json_object_get(schema, "type");
    int inner;

    if (json_is_true(schema)) {
        HT_TRY(ht_rules_need(c, 1, HT_RULES_VALUE));
        return ht_rules_alternatives(c, rule, 1, any);
    }
    if (!json_is_object(schema))
        return HT_FAIL(HT_ERR_ARG, "a schema is neither an object nor true");
    HT_TRY(check_keywords(schema));
    if ((v = json_object_get(schema, "$ref"))) {
        if (!json_is_string(v)) return HT_FAIL(HT_ERR_ARG, "the schema's $ref is no string");
        HT_TRY(resolve(c, json_string_value(v), &target));
        HT_TRY(compile(c, target, &inner));
        HT_TRY(ht_rules_begin(c, rule));
        HT_TRY(ht_rules_use(c, inner));
        return ht_rules_end(c);
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
    HT_TRY(ht_rules_need(c, 1, HT_RULES_VALUE));
    return ht_rules_alternatives(c, rule, 1, any);
}

static enum ht_status compile(struct ht_schema_compiler *c, const json_t *schema, int *rule)
{
    for (int i = 0; i < c->n_seen; i++)
        if (c->seen[i].schema == schema) {
            *rule = c->seen[i].rule;
            return HT_OK;
        }
    if (c->depth >= 128) return HT_FAIL(HT_ERR_ARG, "the schema is nested more than 128 deep");
    HT_TRY(ht_rules_grow((void **)&c->seen, &c->seen_capacity, c->n_seen, sizeof *c->seen, 20000,
                         "parts"));
    HT_TRY(ht_rules_new_rule(c, rule));
    if (json_is_object(schema))
        c->seen[c->n_seen++] =
            (struct ht_schema_seen){ schema, *rule }; // true and false are shared
    c->depth++;
    HT_TRY(compile_into(c, schema, *rule));
    c->depth--;
    return HT_OK;
}

enum ht_status ht_rules_from_schema(struct ht_rules *r, const json_t *schema)
{
    struct ht_schema_compiler c = { .r = r, .root = schema };
    enum ht_status st = HT_OK;
    int root, inner;

    *r = (struct ht_rules){ 0 };
    HT_TRY_GOTO(st, done, ht_rules_new_rule(&c, &root));
    HT_TRY_GOTO(st, done, ht_rules_need(&c, 1, HT_RULES_SPACE));
    HT_TRY_GOTO(st, done,
                schema ? compile(&c, schema, &inner)
                       : ht_rules_common(&c, HT_RULES_OBJECT, &inner));
    HT_TRY_GOTO(st, done, ht_rules_begin(&c, root));
    HT_TRY_GOTO(st, done, ht_rules_use_common(&c, HT_RULES_SPACE));
    HT_TRY_GOTO(st, done, ht_rules_use(&c, inner));
    HT_TRY_GOTO(st, done, ht_rules_end(&c));
done:
    free(c.seen);
    if (st != HT_OK) ht_rules_free(r);
    return st;
}
