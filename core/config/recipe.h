/* core/config/recipe.h: recipe file -> checked config [1].
 *
 * libconfig files with @include (relative to the including file) and overrides `section.key=value`.
 * Refused with file, line, value, bound and the nearest known key: unknown sections and keys, wrong
 * types, integers beyond 32 bits without L, sizes that do not fit together. Integers are accepted
 * where reals are meant; counts may be 2.2e12 or "2.2T", sizes "64MiB". Precedence: override >
 * recipe > include > default.
 */
#ifndef HT_CONFIG_RECIPE_H
#define HT_CONFIG_RECIPE_H

#include <stdio.h>

#include "core/base/status.h"
#include "core/config/config.h"

struct ht_recipe; // parsed values with their origins

/* n_ranks is needed to check that the batch divides; 1 when only the model matters. */
enum ht_status ht_recipe_load(struct ht_config *out, struct ht_recipe **recipe, const char *path,
                              int n_overrides, char *const *overrides, int n_ranks);

/* The same from text (a checkpoint's recipe.cfg read into memory); name is for messages. */
enum ht_status ht_recipe_parse(struct ht_config *out, struct ht_recipe **recipe, const char *text,
                               const char *name, int n_overrides, char *const *overrides,
                               int n_ranks);

/* The resolved recipe as a recipe file that parses back to the same config; with_origin adds a
 * comment where each value came from. Caller frees *text. */
enum ht_status ht_recipe_print(char **text, const struct ht_recipe *r, int with_origin);

/* docs/recipes.md from the key table. Caller frees *text. */
enum ht_status ht_recipe_document(char **text);

void ht_recipe_free(struct ht_recipe *r);

/* Copy of a JSON text in which Python's Infinity, which JSON has not got, is the string "Infinity". NULL when
 * memory is out; the caller frees it. */
char *ht_hf_json_text(const char *json, size_t n_bytes);

/* Model config from a Hugging Face config.json (bamba, mamba2, llama; synonyms of spec 1.1
 * accepted), given as text; and back. Unknown model_type, missing or contradictory key:
 * HT_ERR_FORMAT naming file and key. */
enum ht_status ht_model_config_from_hf(struct ht_model_config *out, const char *json,
                                       size_t n_bytes, const char *name);
enum ht_status ht_model_config_to_hf(char **json, const struct ht_model_config *m);

/* Consistency of a model config, whoever made it (ranges, divisibility); `where` starts the
 * message. */
enum ht_status ht_model_config_check(const struct ht_model_config *m, const char *where);

#endif
