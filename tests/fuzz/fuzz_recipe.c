/* tests/fuzz/fuzz_recipe.c: the recipe parser. Input: a recipe, optionally NUL and an override.
 *
 * What is accepted prints as a recipe that parses to the same config.
 */
#include "core/config/recipe.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct ht_config c, again; // large
    const uint8_t *end = memchr(data, '\0', n);
    const size_t n_text = end ? (size_t)(end - data) : n;
    char *text = fuzz_text(data, n_text);
    char *override = end ? fuzz_text(end + 1, n - n_text - 1) : NULL;
    struct ht_recipe *r = NULL, *r_again = NULL;
    char *printed = NULL;
    // no file can be included from a folder that is not there
    const enum ht_status st =
        ht_recipe_parse(&c, &r, text, "/nowhere/fuzz.cfg", override != NULL, &override, 1);

    if (st == HT_OK) {
        FUZZ_HOLDS(ht_recipe_print(&printed, r, 1) == HT_OK);
        FUZZ_HOLDS(ht_recipe_parse(&again, &r_again, printed, "printed", 0, NULL, 1) == HT_OK);
        FUZZ_HOLDS(memcmp(&c.model, &again.model, sizeof c.model) == 0);
        FUZZ_HOLDS(memcmp(&c.data, &again.data, sizeof c.data) == 0);
        FUZZ_HOLDS(memcmp(&c.train, &again.train, sizeof c.train) == 0);
    } else {
        FUZZ_REFUSED(st);
    }
    ht_recipe_free(r_again);
    ht_recipe_free(r);
    free(printed);
    free(override);
    free(text);
    return 0;
}
