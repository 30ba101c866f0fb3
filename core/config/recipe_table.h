/* core/config/recipe_table.h: every key of a recipe, once: name, type, default, bounds, unit,
 * meaning.
 *
 * Parsing, checking, printing and docs/recipes.md all read this table. A key whose field is given
 * is copied into struct ht_config as it is; the others are resolved by name in recipe_resolve.c.
 */
#ifndef HT_CONFIG_RECIPE_TABLE_H
#define HT_CONFIG_RECIPE_TABLE_H

#include <stddef.h>

enum recipe_type {
    RECIPE_BOOL,
    RECIPE_INT,
    RECIPE_COUNT,   // whole number, also 2.2e12 or "2.2T"
    RECIPE_BYTES,   // whole number, also "64MiB"
    RECIPE_SECONDS, // real, also "10min"
    RECIPE_REAL,    // also "inf" where the bound allows it
    RECIPE_TEXT,
    RECIPE_CHOICE,    // one of `choices`
    RECIPE_DIVISOR,   // "sqrt(L)", "sqrt(2L)" or a number
    RECIPE_INT_LIST,  // [1, 2]
    RECIPE_TEXT_LIST, // ["a", "b"]
    RECIPE_DATASETS,  // ( { path = "x.h5"; weight = 1.0; }, ... ), or one path
};

struct recipe_key {
    const char *section, *name;
    enum recipe_type type;
    size_t offset, size;  // of the field in struct ht_config; size 0: recipe_resolve.c sets it
    const char *fallback; // the default as text; NULL: see `derived`
    const char *derived;  // what the default is computed from; NULL with fallback NULL: required
    double min, max;      // of numbers, inclusive
    const char *choices;  // "a|b|c", in the order of the enum; a bool field means "is the first"
    const char *unit;     // "" for none
    const char *meaning;
    const char *exclusive; // keys of one group and different `member` exclude each other
    int member;
};

extern const struct recipe_key recipe_keys[];
extern const int recipe_n_keys;

/* "model", "data", ...: sections in the order of the table, with a sentence each; NULL at the end.
 */
struct recipe_section {
    const char *name, *meaning;
};
extern const struct recipe_section recipe_sections[];

/* Index of section.name, or -1. */
int recipe_find(const char *section, const char *name);

/* The key (of that section, or of any when section is NULL) nearest to name by edit distance, or -1
 * when none is near; the section nearest to name, or NULL. */
int recipe_nearest_key(const char *section, const char *name);
const char *recipe_nearest_section(const char *name);

#endif
