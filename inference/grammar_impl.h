/* inference/grammar_impl.h: rules, for grammar*.c only.
 *
 * A rule is a list of alternatives; an alternative is a run of symbols that ends with END.
 */
#ifndef HT_INFERENCE_GRAMMAR_IMPL_H
#define HT_INFERENCE_GRAMMAR_IMPL_H

#include "inference/grammar.h"

enum { HT_GRAMMAR_MAX_SYMBOLS = 400000, HT_GRAMMAR_MAX_RULES = 100000 };

enum ht_symbol_kind { HT_SYMBOL_END, HT_SYMBOL_BYTES, HT_SYMBOL_RULE };
struct ht_symbol {
    enum ht_symbol_kind kind;
    int index; // of the class or rule
};
struct ht_byte_class {
    uint64_t bits[4];
};
struct ht_rule {
    int *alternatives; // first symbol of each
    int n, capacity;
};

struct ht_rules {
    struct ht_symbol *symbols;
    struct ht_byte_class *classes;
    struct ht_rule *rules; // 0 is the root
    int n_symbols, symbol_capacity, n_classes, class_capacity, n_rules, rule_capacity;
};

enum ht_status ht_rules_from_schema(struct ht_rules *r, const json_t *schema); // NULL: any object
void ht_rules_free(struct ht_rules *r);

#endif
