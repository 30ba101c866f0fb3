/* core/config/recipe_value.h: one value of a recipe: its text or libconfig setting, checked against
 * its key. */
#ifndef HT_CONFIG_RECIPE_VALUE_H
#define HT_CONFIG_RECIPE_VALUE_H

#include <libconfig.h>
#include <stdbool.h>
#include <stdint.h>

#include "core/base/status.h"
#include "core/config/recipe_table.h"

struct recipe_item {
    char *text;    // of text lists; the path of a data set
    int64_t i;     // of integer lists
    double weight; // of data sets
};

struct recipe_value {
    bool set;
    int pass;         // which file, or the command line: later passes win
    const char *file; // where from (borrowed); NULL = default
    int line;         // 0 = none
    int64_t i;        // bool, int, count, bytes, number of the choice
    double d;         // real, seconds
    char *text;       // text, divisor
    struct recipe_item *items;
    int n_items;
};

void recipe_value_free(struct recipe_value *v);

/* Replace what v holds (set, i, d, text, items; not the origin). `where` starts messages
 * ("a.cfg:12"). On failure v is unchanged. HT_ERR_RECIPE: wrong type, out of bounds, not a choice.
 */
enum ht_status recipe_value_read(struct recipe_value *v, const struct recipe_key *k,
                                 const config_setting_t *s, const char *where);

/* The same from text as on the command line: strings without quotes, lists as in a recipe. */
enum ht_status recipe_value_parse(struct recipe_value *v, const struct recipe_key *k,
                                  const char *text, const char *where);

/* A real as short as it can be read back to the same double, with the point that libconfig wants.
 */
void recipe_format_real(char *out, size_t size, double d);

#endif
