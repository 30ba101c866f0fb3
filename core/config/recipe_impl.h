/* core/config/recipe_impl.h: inside of struct ht_recipe, for the recipe_*.c files only. */
#ifndef HT_CONFIG_RECIPE_IMPL_H
#define HT_CONFIG_RECIPE_IMPL_H

#include "core/config/recipe.h"
#include "core/config/recipe_value.h"

#define RECIPE_MAX_FILES 64

struct ht_recipe {
    struct recipe_value *values;   // (recipe_n_keys)
    char *files[RECIPE_MAX_FILES]; // names that origins point at
    int n_files, n_passes;
};

/* "recipes/a.cfg:14", "command line", or the recipe's name for a default. */
#define RECIPE_WHERE_BYTES (HT_MAX_PATH + 16)
const char *recipe_where(char out[RECIPE_WHERE_BYTES], const struct ht_recipe *r,
                         const struct recipe_value *v);

/* Values to config: derived defaults, alternatives, everything that concerns more than one key. */
enum ht_status recipe_resolve(struct ht_config *out, const struct ht_recipe *r, int n_ranks);

/* What is wrong with a model, if anything: the key to blame and the rest of the sentence after it.
 */
struct model_problem {
    const char *key; // NULL: nothing is wrong
    char text[256];
};
void model_find_problem(struct model_problem *out, const struct ht_model_config *m);

#endif
