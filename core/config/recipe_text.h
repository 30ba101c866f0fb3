/* core/config/recipe_text.h: what has to be seen in a recipe's text before libconfig reads it.
 *
 * libconfig 1.5 cuts integers to 32 bits without a word and resolves @include against one folder,
 * so both are done here: every integer literal is checked, and @include lines are taken out of the
 * text (replaced by blanks, so that line numbers stay) and handed back.
 */
#ifndef HT_CONFIG_RECIPE_TEXT_H
#define HT_CONFIG_RECIPE_TEXT_H

#include <stddef.h>

#include "core/base/status.h"

#define RECIPE_MAX_BYTES (1 << 20) // of one file
#define RECIPE_MAX_INCLUDES 32     // in one file

struct recipe_include {
    char *path;
    int line;
};

struct recipe_text {
    char *text; // for config_read_string
    struct recipe_include includes[RECIPE_MAX_INCLUDES];
    int n_includes;
};

/* HT_ERR_RECIPE with name:line: integers outside 32 bits without L, malformed numbers, an @include
 * that is not a line of its own outside all groups, unclosed strings and comments, nesting deeper
 * than 16, NUL bytes. */
enum ht_status recipe_text_scan(struct recipe_text *out, const char *text, size_t n_bytes,
                                const char *name);
void recipe_text_free(struct recipe_text *t);

#endif
