/* tests/core/config/config_case.h: recipes of published models, and a folder for recipe files. */
#ifndef TESTS_CONFIG_CASE_H
#define TESTS_CONFIG_CASE_H

#include "core/config/recipe.h"

struct published {            // spec 1.5, 1.6, 7
    const char *name, *model; // keys of the section model
    int64_t n_params;
    int n_tensors;
    double forward_4096; // FLOPs per token
};
extern const struct published published[];
extern const int n_published;

/* A recipe around the keys of a model, and its config. */
void case_text(char *out, size_t size, const char *model);
void case_config(struct ht_config *out, const char *model);

/* A parse that must fail: status HT_ERR_RECIPE and a message that contains every one of the words.
 */
void case_refused(const char *text, const char *const *words);
#define REFUSED(text, ...) case_refused((text), (const char *const[]){ __VA_ARGS__, NULL })

/* A fresh folder with a path that fits; case_write puts a file into it and returns its path. */
struct folder {
    char path[256];
};
struct folder case_folder(void);
const char *case_write(char out[512], const struct folder *f, const char *name, const char *text);
void case_remove(const struct folder *f);

#endif
