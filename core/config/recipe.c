/* core/config/recipe.c: files, includes and the command line, merged into one set of values.
 *
 * Every file is a pass: first the files it includes, then its own values, so that a recipe changes
 * what it includes; the command line is the last pass. Within a pass a key may stand once.
 */
#include "core/config/recipe_impl.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/config/recipe_text.h"

#define MAX_INCLUDE_DEPTH 8
#define MAX_OVERRIDES 256

static const char command_line[] = "command line";

/* A file being read, and the files that include it. */
struct source {
    const char *name;    // for messages
    char real[PATH_MAX]; // resolved path; "" when the recipe came as text
    const char *root;    // folder that includes must not leave, with a slash at its end
    const struct source *from;
    int depth;
};

/* The recipe itself is files[0]. */
const char *recipe_where(char out[RECIPE_WHERE_BYTES], const struct ht_recipe *r,
                         const struct recipe_value *v)
{
    const char *file = v->file ? v->file : r->files[0];

    if (v->file && v->line)
        snprintf(out, RECIPE_WHERE_BYTES, "%.*s:%d", HT_MAX_PATH, file, v->line);
    else
        snprintf(out, RECIPE_WHERE_BYTES, "%.*s", HT_MAX_PATH, file);
    return out;
}

static enum ht_status add_file(const char **out, struct ht_recipe *r, const char *name,
                               const char *where)
{
    if (r->n_files == RECIPE_MAX_FILES)
        return HT_FAIL(HT_ERR_RECIPE, "%s: more than %d files", where, RECIPE_MAX_FILES);
    r->files[r->n_files] = strdup(name);
    if (!r->files[r->n_files]) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a recipe", where);
    *out = r->files[r->n_files++];
    return HT_OK;
}

/* Of keys that say the same thing in different ways, the last pass decides and removes the others.
 */
static enum ht_status displace(struct ht_recipe *r, int key, int pass, const char *where)
{
    const struct recipe_key *k = &recipe_keys[key];

    if (!k->exclusive) return HT_OK;
    for (int i = 0; i < recipe_n_keys; i++) {
        const struct recipe_key *other = &recipe_keys[i];
        if (!other->exclusive || strcmp(other->exclusive, k->exclusive) ||
            other->member == k->member || !r->values[i].set)
            continue;
        if (r->values[i].pass == pass)
            return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s and %s.%s are both given; keep one of them",
                           where, k->section, k->name, other->section, other->name);
        recipe_value_free(&r->values[i]);
    }
    return HT_OK;
}

static enum ht_status unknown_key(const char *where, const char *section, const char *name)
{
    int near = recipe_nearest_key(section, name);

    if (near < 0) near = recipe_nearest_key(NULL, name);
    if (near < 0)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%.60s is not a key; docs/recipes.md lists them all",
                       where, section, name);
    return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%.60s is not a key; did you mean %s.%s?", where, section,
                   name, recipe_keys[near].section, recipe_keys[near].name);
}

static enum ht_status unknown_section(const char *where, const char *name)
{
    const char *near = recipe_nearest_section(name);
    const int key = near ? -1 : recipe_nearest_key(NULL, name);

    if (near)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %.60s is not a section; did you mean %s?", where, name,
                       near);
    if (key >= 0)
        return HT_FAIL(
            HT_ERR_RECIPE, "%s: %.60s is not a section; the key %s.%s belongs inside %s: { }",
            where, name, recipe_keys[key].section, recipe_keys[key].name, recipe_keys[key].section);
    return HT_FAIL(HT_ERR_RECIPE,
                   "%s: %.60s is not a section; they are model, data, train, optimizer, schedule, "
                   "parallel, checkpoint, log and eval",
                   where, name);
}

static int has_section(const char *name)
{
    for (const struct recipe_section *s = recipe_sections; s->name; s++)
        if (!strcmp(s->name, name)) return 1;
    return 0;
}

/* One key of a file. */
static enum ht_status take_setting(struct ht_recipe *r, const char *section,
                                   const config_setting_t *s, const char *file, int pass)
{
    char where[RECIPE_WHERE_BYTES];
    const struct recipe_value at = { .file = file, .line = (int)config_setting_source_line(s) };
    const int key = recipe_find(section, config_setting_name(s));

    recipe_where(where, r, &at);
    if (key < 0) return unknown_key(where, section, config_setting_name(s));
    HT_TRY(displace(r, key, pass, where));
    HT_TRY(recipe_value_read(&r->values[key], &recipe_keys[key], s, where));
    r->values[key].file = at.file;
    r->values[key].line = at.line;
    r->values[key].pass = pass;
    return HT_OK;
}

static enum ht_status take_tree(struct ht_recipe *r, const config_setting_t *root, const char *file)
{
    const int pass = ++r->n_passes;
    char where[RECIPE_WHERE_BYTES];

    for (int i = 0; i < config_setting_length(root); i++) {
        const config_setting_t *group = config_setting_get_elem(root, (unsigned)i);
        const char *section = config_setting_name(group);
        const struct recipe_value at = { .file = file,
                                         .line = (int)config_setting_source_line(group) };

        recipe_where(where, r, &at);
        if (!has_section(section)) return unknown_section(where, section);
        if (config_setting_type(group) != CONFIG_TYPE_GROUP)
            return HT_FAIL(HT_ERR_RECIPE, "%s: %s is a section; write %s: { key = value; };", where,
                           section, section);
        for (int j = 0; j < config_setting_length(group); j++)
            HT_TRY(
                take_setting(r, section, config_setting_get_elem(group, (unsigned)j), file, pass));
    }
    return HT_OK;
}

static enum ht_status take_text(struct ht_recipe *r, const struct source *src, const char *text,
                                size_t n_bytes);

static enum ht_status take_file(struct ht_recipe *r, const struct source *src, const char *where)
{
    char *text = NULL;
    size_t n_bytes = 0;
    enum ht_status st = ht_file_read(&text, &n_bytes, src->real, RECIPE_MAX_BYTES);

    if (st == HT_OK)
        st = take_text(r, src, text, n_bytes);
    else
        st = ht_fail_while(st, "reading %s for %s", src->name, where);
    free(text);
    return st;
}

/* The path is relative to the file that includes, and must stay below the recipe's folder. */
static enum ht_status take_include(struct ht_recipe *r, const struct source *from,
                                   const struct recipe_include *inc)
{
    const char *slash = strrchr(from->name, '/');
    const int folder = slash ? (int)(slash - from->name) + 1 : 0;
    char name[2 * HT_MAX_PATH], where[RECIPE_WHERE_BYTES];
    struct source src = {
        .name = name, .root = from->root, .from = from, .depth = from->depth + 1
    };

    snprintf(where, sizeof where, "%.*s:%d", HT_MAX_PATH, from->name, inc->line);
    if (!*from->real)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s: @include \"%s\": a recipe that is not a file cannot include", where,
                       inc->path);
    if (src.depth > MAX_INCLUDE_DEPTH)
        return HT_FAIL(HT_ERR_RECIPE, "%s: @include \"%s\": nested deeper than %d files", where,
                       inc->path, MAX_INCLUDE_DEPTH);
    snprintf(name, sizeof name, "%.*s%s", folder < HT_MAX_PATH ? folder : 0, from->name, inc->path);
    if (inc->path[0] == '/')
        return HT_FAIL(HT_ERR_RECIPE, "%s: @include \"%s\": the path must be relative to this file",
                       where, inc->path);
    if (!realpath(name, src.real))
        return HT_FAIL(HT_ERR_RECIPE, "%s: @include \"%s\": %s: %s", where, inc->path, name,
                       strerror(errno));
    if (strncmp(src.real, src.root, strlen(src.root)))
        return HT_FAIL(HT_ERR_RECIPE, "%s: @include \"%s\" leaves the recipe's folder %s", where,
                       inc->path, src.root);
    for (const struct source *s = from; s; s = s->from)
        if (!strcmp(s->real, src.real))
            return HT_FAIL(HT_ERR_RECIPE, "%s: @include \"%s\": the file includes itself", where,
                           inc->path);
    return take_file(r, &src, where);
}

static enum ht_status take_text(struct ht_recipe *r, const struct source *src, const char *text,
                                size_t n_bytes)
{
    enum ht_status st = HT_OK;
    struct recipe_text scanned;
    const char *file = NULL;
    config_t parsed;

    HT_TRY(add_file(&file, r, src->name, src->name));
    HT_TRY(recipe_text_scan(&scanned, text, n_bytes, src->name));
    for (int i = 0; i < scanned.n_includes && st == HT_OK; i++)
        st = take_include(r, src, &scanned.includes[i]);
    if (st == HT_OK) {
        config_init(&parsed);
        if (config_read_string(&parsed, scanned.text))
            st = take_tree(r, config_root_setting(&parsed), file);
        else
            st = HT_FAIL(HT_ERR_RECIPE, "%s:%d: %s", src->name, config_error_line(&parsed),
                         config_error_text(&parsed));
        config_destroy(&parsed);
    }
    recipe_text_free(&scanned);
    return st;
}

/* section.key=value */
static enum ht_status take_override(struct ht_recipe *r, const char *text, int pass)
{
    const char *dot = strchr(text, '.'), *equals = strchr(text, '=');
    char section[64], name[64];

    if (!dot || !equals || dot > equals || dot == text || equals == dot + 1)
        return HT_FAIL(HT_ERR_RECIPE, "%s: \"%.200s\"; an override has the form section.key=value",
                       command_line, text);
    snprintf(section, sizeof section, "%.*s", (int)(dot - text < 64 ? dot - text : 63), text);
    snprintf(name, sizeof name, "%.*s", (int)(equals - dot < 64 ? equals - dot - 1 : 63), dot + 1);
    if (!has_section(section)) return unknown_section(command_line, section);
    const int key = recipe_find(section, name);
    if (key < 0) return unknown_key(command_line, section, name);
    HT_TRY(displace(r, key, pass, command_line));
    HT_TRY(recipe_value_parse(&r->values[key], &recipe_keys[key], equals + 1, command_line));
    r->values[key].file = command_line;
    r->values[key].line = 0;
    r->values[key].pass = pass;
    return HT_OK;
}

/* Is another key of its group given? Then its default must stay away. */
static int group_given(const struct ht_recipe *r, const struct recipe_key *k)
{
    if (!k->exclusive) return 0;
    for (int i = 0; i < recipe_n_keys; i++)
        if (recipe_keys[i].exclusive && !strcmp(recipe_keys[i].exclusive, k->exclusive) &&
            r->values[i].set)
            return 1;
    return 0;
}

static enum ht_status take_defaults(struct ht_recipe *r)
{
    for (int i = 0; i < recipe_n_keys; i++) {
        const struct recipe_key *k = &recipe_keys[i];
        if (r->values[i].set) continue;
        if (k->fallback && !group_given(r, k))
            HT_TRY(recipe_value_parse(&r->values[i], k, k->fallback, "default"));
        if (!k->fallback && !k->derived)
            return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is missing: %s", r->files[0], k->section,
                           k->name, k->meaning);
    }
    return HT_OK;
}

/* train.name is the file's name without folder and ending unless it is given. */
static enum ht_status default_name(struct ht_recipe *r)
{
    const int key = recipe_find("train", "name");
    const char *slash = strrchr(r->files[0], '/');
    char name[256];

    if (r->values[key].set) return HT_OK;
    snprintf(name, sizeof name, "%s", slash ? slash + 1 : r->files[0]);
    char *dot = strrchr(name, '.');
    if (dot && dot != name) *dot = 0;
    return recipe_value_parse(&r->values[key], &recipe_keys[key], name, r->files[0]);
}

static enum ht_status finish(struct ht_config *out, struct ht_recipe *r, int n_overrides,
                             char *const *overrides, int n_ranks)
{
    const int pass = ++r->n_passes;

    if (n_overrides > MAX_OVERRIDES)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %d overrides; at most %d", command_line, n_overrides,
                       MAX_OVERRIDES);
    for (int i = 0; i < n_overrides; i++) HT_TRY(take_override(r, overrides[i], pass));
    HT_TRY(take_defaults(r));
    HT_TRY(default_name(r));
    return recipe_resolve(out, r, n_ranks);
}

static struct ht_recipe *create(void)
{
    struct ht_recipe *r = calloc(1, sizeof *r);

    if (r) r->values = calloc((size_t)recipe_n_keys, sizeof *r->values);
    if (r && r->values) return r;
    free(r);
    return NULL;
}

/* text NULL: read path. */
static enum ht_status load(struct ht_config *out, struct ht_recipe **recipe, const char *text,
                           const char *path, int n_overrides, char *const *overrides, int n_ranks)
{
    enum ht_status st = HT_OK;
    struct source src = { .name = path };
    char root[PATH_MAX] = "";
    struct ht_recipe *r = create();

    memset(out, 0, sizeof *out);
    if (recipe) *recipe = NULL;
    if (!r) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a recipe", path);
    if (text) {
        HT_TRY_GOTO(st, done, take_text(r, &src, text, strlen(text)));
    } else {
        if (!realpath(path, src.real)) {
            st = HT_FAIL(HT_ERR_RECIPE, "%s: %s", path, strerror(errno));
            goto done;
        }
        snprintf(root, sizeof root, "%s", src.real);
        strrchr(root, '/')[1] = 0;
        src.root = root;
        HT_TRY_GOTO(st, done, take_file(r, &src, "this run"));
    }
    HT_TRY_GOTO(st, done, finish(out, r, n_overrides, overrides, n_ranks));
    if (recipe) {
        *recipe = r;
        r = NULL;
    }
done:
    ht_recipe_free(r);
    return st;
}

enum ht_status ht_recipe_load(struct ht_config *out, struct ht_recipe **recipe, const char *path,
                              int n_overrides, char *const *overrides, int n_ranks)
{
    return load(out, recipe, NULL, path, n_overrides, overrides, n_ranks);
}

enum ht_status ht_recipe_parse(struct ht_config *out, struct ht_recipe **recipe, const char *text,
                               const char *name, int n_overrides, char *const *overrides,
                               int n_ranks)
{
    return load(out, recipe, text, name, n_overrides, overrides, n_ranks);
}

void ht_recipe_free(struct ht_recipe *r)
{
    if (!r) return;
    for (int i = 0; i < recipe_n_keys; i++) recipe_value_free(&r->values[i]);
    for (int i = 0; i < r->n_files; i++) free(r->files[i]);
    free(r->values);
    free(r);
}
