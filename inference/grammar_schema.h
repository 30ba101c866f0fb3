/* inference/grammar_schema.h: what grammar_schema.c and grammar_rules.c share. */
#ifndef HT_INFERENCE_GRAMMAR_SCHEMA_H
#define HT_INFERENCE_GRAMMAR_SCHEMA_H

#include "inference/grammar_impl.h"

/* Rules that every schema may use, made on demand. */
enum ht_rules_common {
    HT_RULES_SPACE,
    HT_RULES_CHAR,
    HT_RULES_CHARS,
    HT_RULES_STRING,
    HT_RULES_NUMBER,
    HT_RULES_INTEGER,
    HT_RULES_VALUE,
    HT_RULES_OBJECT,
    HT_RULES_ARRAY,
    HT_RULES_BOOLEAN,
    HT_RULES_NULL,
    HT_RULES_COUNT
};

struct ht_schema_compiler {
    struct ht_rules *r;
    const json_t *root;
    int common[HT_RULES_COUNT]; // rule + 1, 0: not made
    struct ht_schema_seen {     // schemas already made, for $ref
        const json_t *schema;
        int rule;
    } * seen;
    int n_seen, seen_capacity, depth;
};

enum ht_status ht_rules_grow(void **p, int *capacity, int n, size_t size, int limit,
                             const char *what);
enum ht_status ht_rules_new_rule(struct ht_schema_compiler *c, int *out);
/* One byte out of ranges "azAZ09". */
enum ht_status ht_rules_one_of(struct ht_schema_compiler *c, const char *ranges, size_t n);
enum ht_status ht_rules_literal(struct ht_schema_compiler *c, const char *text);
enum ht_status ht_rules_use(struct ht_schema_compiler *c, int rule);
enum ht_status ht_rules_end(struct ht_schema_compiler *c);
/* Symbols from here on, up to end(), are an alternative of rule. */
enum ht_status ht_rules_begin(struct ht_schema_compiler *c, int rule);
enum ht_status ht_rules_empty(struct ht_schema_compiler *c, int rule);
enum ht_status ht_rules_use_common(struct ht_schema_compiler *c, enum ht_rules_common which);
/* Rules cannot be made in the middle of an alternative: what it uses is made first. */
enum ht_status ht_rules_need(struct ht_schema_compiler *c, int n, ...);
/* { key: value, .. } with any number of members. */
enum ht_status ht_rules_make_map(struct ht_schema_compiler *c, int rule, int value);
/* [ items ]: the first n_prefix of their own rules, the rest of rule `item` (-1: none may follow).
 * high -1: no bound. */
enum ht_status ht_rules_make_list(struct ht_schema_compiler *c, int rule, const int *prefix,
                                  int n_prefix, int item, int low, int high);
enum ht_status ht_rules_alternatives(struct ht_schema_compiler *c, int rule, int n,
                                     const enum ht_rules_common *which);
enum ht_status ht_rules_common(struct ht_schema_compiler *c, enum ht_rules_common which, int *rule);
#define HT_RULES_ONE_OF(c, ranges) ht_rules_one_of((c), ranges, sizeof(ranges) - 1)

#endif
