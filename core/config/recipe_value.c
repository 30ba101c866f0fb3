/* core/config/recipe_value.c: units, types and bounds of one value. */
#include "core/config/recipe_value.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/config.h"
#include "core/config/recipe_text.h"

#define MAX_ITEMS HT_MAX_LAYERS // of any list

struct unit {
    const char *name;
    double factor;
};

static const struct unit count_units[] = { { "", 1 },    { "K", 1e3 }, { "k", 1e3 },  { "M", 1e6 },
                                           { "G", 1e9 }, { "B", 1e9 }, { "T", 1e12 }, { NULL, 0 } };
static const struct unit byte_units[] = {
    { "", 1 },     { "B", 1 },     { "KiB", 1024.0 },          { "MiB", 1048576.0 },
    { "KB", 1e3 }, { "kB", 1e3 },  { "GiB", 1073741824.0 },    { "MB", 1e6 },
    { "GB", 1e9 }, { "TB", 1e12 }, { "TiB", 1099511627776.0 }, { NULL, 0 }
};
static const struct unit second_units[] = { { "", 1 },     { "s", 1 },    { "ms", 1e-3 },
                                            { "min", 60 }, { "h", 3600 }, { "d", 86400 },
                                            { NULL, 0 } };

void recipe_value_free(struct recipe_value *v)
{
    for (int i = 0; i < v->n_items; i++) free(v->items[i].text);
    free(v->items);
    free(v->text);
    *v = (struct recipe_value){ 0 };
}

void recipe_format_real(char *out, size_t size, double d)
{
    char digits[40], *exponent;

    if (isinf(d)) {
        snprintf(out, size, "%s", d > 0 ? "inf" : "-inf");
        return;
    }
    if (d == nearbyint(d) && fabs(d) < 1e15) {
        snprintf(out, size, "%.1f", d);
        return;
    }
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, d);
        if (strtod(digits, NULL) == d) break;
    }
    exponent = strchr(digits, 'e');
    if (exponent) *exponent++ = 0;
    snprintf(out, size, "%s%s%s%s", digits, strchr(digits, '.') ? "" : ".0", exponent ? "e" : "",
             exponent ? exponent : "");
}

/* ---- the parts of a message ---- */

static const char *type_name(enum recipe_type t)
{
    switch (t) {
    case RECIPE_BOOL: return "true or false";
    case RECIPE_INT: return "a whole number";
    case RECIPE_COUNT: return "a count such as 1000, 2.2e12 or \"2.2T\"";
    case RECIPE_BYTES: return "a size such as 4096 or \"64MiB\"";
    case RECIPE_SECONDS: return "a time such as 30 or \"10min\"";
    case RECIPE_REAL: return "a number";
    case RECIPE_TEXT:
    case RECIPE_CHOICE: return "a string in quotes";
    case RECIPE_DIVISOR: return "\"sqrt(L)\", \"sqrt(2L)\" or a number";
    case RECIPE_INT_LIST: return "a list such as [9, 18, 27]";
    case RECIPE_TEXT_LIST: return "a list such as [\"mamba\", \"attention\"]";
    case RECIPE_DATASETS:
        return "a list such as ( { path = \"x.h5\"; weight = 1.0; } ), or one path";
    }
    return "";
}

static enum ht_status wrong_type(const struct recipe_key *k, const char *where, const char *what)
{
    return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is %s; it must be %s", where, k->section, k->name,
                   what, type_name(k->type));
}

static enum ht_status out_of_bounds(const struct recipe_key *k, const char *where, double d)
{
    char value[40], min[40], max[40];
    const bool whole =
        k->type != RECIPE_REAL && k->type != RECIPE_SECONDS && k->type != RECIPE_DIVISOR;

    if (whole) {
        snprintf(value, sizeof value, "%.16g", d);
        snprintf(min, sizeof min, "%.16g", k->min);
        snprintf(max, sizeof max, "%.16g", k->max);
    } else {
        recipe_format_real(value, sizeof value, d);
        recipe_format_real(min, sizeof min, k->min);
        recipe_format_real(max, sizeof max, k->max);
    }
    return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is %s; it must be from %s to %s%s%s", where,
                   k->section, k->name, value, min, max, *k->unit ? " " : "", k->unit);
}

/* ---- scalars ---- */

static bool is_number(enum recipe_type t)
{
    return t == RECIPE_INT || t == RECIPE_COUNT || t == RECIPE_BYTES || t == RECIPE_SECONDS ||
           t == RECIPE_REAL;
}

static enum ht_status set_number(struct recipe_value *v, const struct recipe_key *k, double d,
                                 const char *where)
{
    const bool whole = k->type != RECIPE_REAL && k->type != RECIPE_SECONDS;

    if (isnan(d) || d < k->min || d > k->max) return out_of_bounds(k, where, d);
    if (whole && d != nearbyint(d))
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is %g; it must be a whole number", where,
                       k->section, k->name, d);
    recipe_value_free(v);
    v->set = true;
    v->d = d;
    v->i = whole ? (int64_t)d : 0;
    return HT_OK;
}

static enum ht_status parse_number(struct recipe_value *v, const struct recipe_key *k,
                                   const char *text, const char *where)
{
    static const struct unit none[] = { { "", 1 }, { NULL, 0 } };
    const struct unit *u = k->type == RECIPE_COUNT     ? count_units
                           : k->type == RECIPE_BYTES   ? byte_units
                           : k->type == RECIPE_SECONDS ? second_units
                                                       : none;
    const bool hex = strpbrk(text, "xX") != NULL; // strtod would take it
    char *end = NULL, quoted[80];
    double d = hex ? 0.0 : strtod(text, &end);

    snprintf(quoted, sizeof quoted, "\"%.60s\"", text);
    if (hex || end == text || isnan(d) || isspace((unsigned char)*text))
        return wrong_type(k, where, quoted);
    if (!strcmp(end, "L") || !strcmp(end, "LL")) end += strlen(end);
    if (*end == ' ') end++;
    while (u->name && strcmp(end, u->name)) u++;
    if (!u->name) return wrong_type(k, where, quoted);
    const double scaled = d * u->factor;
    // 2.3 * 1e9 is off by a rounding; what is meant is the whole number beside it
    const double whole = nearbyint(scaled);
    if (u->factor > 1 && fabs(scaled - whole) < 1e-12 * fabs(scaled))
        return set_number(v, k, whole, where);
    return set_number(v, k, scaled, where);
}

static enum ht_status set_text(struct recipe_value *v, const struct recipe_key *k, const char *text,
                               const char *where)
{
    const size_t room = k->size ? k->size : HT_MAX_PATH;

    if (k->type == RECIPE_TEXT && strlen(text) >= room)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s has %zu characters; at most %zu fit", where,
                       k->section, k->name, strlen(text), room - 1);
    char *copy = strdup(text);
    if (!copy) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %s.%s", where, k->section, k->name);
    recipe_value_free(v);
    v->set = true;
    v->text = copy;
    return HT_OK;
}

static enum ht_status parse_choice(struct recipe_value *v, const struct recipe_key *k,
                                   const char *text, const char *where)
{
    const size_t n = strlen(text);
    char listed[128];
    size_t used = 0;
    int number = 0;

    for (const char *c = k->choices; c; number++) {
        const char *bar = strchr(c, '|');
        const size_t len = bar ? (size_t)(bar - c) : strlen(c);
        if (len == n && !strncmp(c, text, n)) {
            recipe_value_free(v);
            v->set = true;
            v->i = number;
            return HT_OK;
        }
        used += (size_t)snprintf(listed + used, sizeof listed - used, "%s\"%.*s\"",
                                 number ? (bar ? ", " : " or ") : "", (int)len, c);
        c = bar ? bar + 1 : NULL;
    }
    return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is \"%.60s\"; it must be %s", where, k->section,
                   k->name, text, listed);
}

static enum ht_status parse_divisor(struct recipe_value *v, const struct recipe_key *k,
                                    const char *text, const char *where)
{
    char *end = NULL;

    if (strcmp(text, "sqrt(L)") && strcmp(text, "sqrt(2L)")) {
        const double d = strtod(text, &end);
        if (end == text || *end) {
            char quoted[80];
            snprintf(quoted, sizeof quoted, "\"%.60s\"", text);
            return wrong_type(k, where, quoted);
        }
        if (!(d >= k->min && d <= k->max)) return out_of_bounds(k, where, d);
    }
    return set_text(v, k, text, where);
}

static enum ht_status set_bool(struct recipe_value *v, bool b)
{
    recipe_value_free(v);
    v->set = true;
    v->i = b;
    return HT_OK;
}

/* ---- lists ---- */

/* { path = "..."; weight = 1.0; }, or just the path. */
static enum ht_status read_dataset(struct recipe_item *item, const struct recipe_key *k,
                                   const config_setting_t *s, const char *where)
{
    const char *path = NULL;
    double weight = 1.0;

    if (config_setting_type(s) == CONFIG_TYPE_STRING) {
        path = config_setting_get_string(s);
    } else if (config_setting_type(s) == CONFIG_TYPE_GROUP) {
        for (int i = 0; i < config_setting_length(s); i++) {
            const config_setting_t *e = config_setting_get_elem(s, (unsigned)i);
            const char *name = config_setting_name(e);
            const int type = config_setting_type(e);

            if (!strcmp(name, "path") && type == CONFIG_TYPE_STRING) {
                path = config_setting_get_string(e);
            } else if (!strcmp(name, "weight") && type == CONFIG_TYPE_FLOAT) {
                weight = config_setting_get_float(e);
            } else if (!strcmp(name, "weight") &&
                       (type == CONFIG_TYPE_INT || type == CONFIG_TYPE_INT64)) {
                weight = (double)config_setting_get_int64(e);
            } else {
                return HT_FAIL(
                    HT_ERR_RECIPE,
                    "%s: %s.%s: a data set has path (a string) and weight (a number), not "
                    "%.60s of this type",
                    where, k->section, k->name, name);
            }
        }
    }
    if (!path || !*path || strlen(path) >= HT_MAX_PATH)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s: %s.%s: every data set needs a path of 1 to %d characters", where,
                       k->section, k->name, HT_MAX_PATH - 1);
    if (!(weight > k->min && weight <= k->max))
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s: %s.%s: the weight of %.200s is %g; it must be above 0, to %g", where,
                       k->section, k->name, path, weight, k->max);
    item->weight = weight;
    item->text = strdup(path);
    return item->text
               ? HT_OK
               : HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %s.%s", where, k->section, k->name);
}

static enum ht_status read_item(struct recipe_item *item, const struct recipe_key *k,
                                const config_setting_t *s, const char *where)
{
    const int type = config_setting_type(s);

    if (k->type == RECIPE_DATASETS) return read_dataset(item, k, s, where);
    if (k->type == RECIPE_TEXT_LIST) {
        if (type != CONFIG_TYPE_STRING) return wrong_type(k, where, "a list of something else");
        item->text = strdup(config_setting_get_string(s));
        if (!item->text) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a list", where);
        return HT_OK;
    }
    if (type != CONFIG_TYPE_INT && type != CONFIG_TYPE_INT64)
        return wrong_type(k, where, "a list of something else");
    item->i = config_setting_get_int64(s);
    if ((double)item->i < k->min || (double)item->i > k->max)
        return out_of_bounds(k, where, (double)item->i);
    return HT_OK;
}

static enum ht_status read_list(struct recipe_value *v, const struct recipe_key *k,
                                const config_setting_t *s, const char *where)
{
    enum ht_status st = HT_OK;
    struct recipe_value new = { .set = true };
    const int type = config_setting_type(s);
    const bool one = k->type == RECIPE_DATASETS && type == CONFIG_TYPE_STRING;
    const int most = k->type == RECIPE_DATASETS ? HT_MAX_DATASETS : MAX_ITEMS;
    const int n = one ? 1 : config_setting_length(s);

    if (!one && type != CONFIG_TYPE_ARRAY && type != CONFIG_TYPE_LIST)
        return wrong_type(k, where, "not a list");
    if (n > most)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s has %d entries; at most %d are allowed", where,
                       k->section, k->name, n, most);
    new.items = calloc((size_t)n + 1, sizeof *new.items);
    if (!new.items) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a list", where);
    for (int i = 0; i < n; i++) {
        new.n_items++;
        HT_TRY_GOTO(
            st, done,
            read_item(&new.items[i], k, one ? s : config_setting_get_elem(s, (unsigned)i), where));
    }
    recipe_value_free(v);
    *v = new;
    new = (struct recipe_value){ 0 };
done:
    recipe_value_free(&new);
    return st;
}

/* ---- from libconfig, from text ---- */

static const char *setting_type_name(int type)
{
    switch (type) {
    case CONFIG_TYPE_BOOL: return "a boolean";
    case CONFIG_TYPE_INT:
    case CONFIG_TYPE_INT64: return "a whole number";
    case CONFIG_TYPE_FLOAT: return "a real number";
    case CONFIG_TYPE_STRING: return "a string";
    case CONFIG_TYPE_GROUP: return "a group";
    default: return "a list";
    }
}

enum ht_status recipe_value_read(struct recipe_value *v, const struct recipe_key *k,
                                 const config_setting_t *s, const char *where)
{
    const int type = config_setting_type(s);
    const bool integer = type == CONFIG_TYPE_INT || type == CONFIG_TYPE_INT64;

    if (k->type == RECIPE_INT_LIST || k->type == RECIPE_TEXT_LIST || k->type == RECIPE_DATASETS)
        return read_list(v, k, s, where);
    if (k->type == RECIPE_BOOL && type == CONFIG_TYPE_BOOL)
        return set_bool(v, config_setting_get_bool(s) != 0);
    if (is_number(k->type) && integer)
        return set_number(v, k, (double)config_setting_get_int64(s), where);
    if (is_number(k->type) && k->type != RECIPE_INT && type == CONFIG_TYPE_FLOAT)
        return set_number(v, k, config_setting_get_float(s), where);
    if (k->type == RECIPE_DIVISOR && (integer || type == CONFIG_TYPE_FLOAT)) {
        char number[40];
        recipe_format_real(number, sizeof number,
                           integer ? (double)config_setting_get_int64(s)
                                   : config_setting_get_float(s));
        return parse_divisor(v, k, number, where);
    }
    if (type == CONFIG_TYPE_STRING) {
        const char *text = config_setting_get_string(s);
        if (k->type == RECIPE_COUNT || k->type == RECIPE_BYTES || k->type == RECIPE_SECONDS ||
            (k->type == RECIPE_REAL && isinf(k->max)))
            return parse_number(v, k, text, where);
        if (k->type == RECIPE_TEXT) return set_text(v, k, text, where);
        if (k->type == RECIPE_CHOICE) return parse_choice(v, k, text, where);
        if (k->type == RECIPE_DIVISOR) return parse_divisor(v, k, text, where);
    }
    return wrong_type(k, where, setting_type_name(type));
}

/* data.train=shard.h5 on the command line. */
static enum ht_status set_one_dataset(struct recipe_value *v, const struct recipe_key *k,
                                      const char *path, const char *where)
{
    if (!*path || strlen(path) >= HT_MAX_PATH)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s: a path has 1 to %d characters", where, k->section,
                       k->name, HT_MAX_PATH - 1);
    struct recipe_item *item = calloc(1, sizeof *item);
    char *copy = strdup(path);
    if (!item || !copy) {
        free(item);
        free(copy);
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %s.%s", where, k->section, k->name);
    }
    *item = (struct recipe_item){ .text = copy, .weight = 1.0 };
    recipe_value_free(v);
    *v = (struct recipe_value){ .set = true, .items = item, .n_items = 1 };
    return HT_OK;
}

/* Lists on the command line are libconfig text. */
static enum ht_status parse_list(struct recipe_value *v, const struct recipe_key *k,
                                 const char *text, const char *where)
{
    enum ht_status st;
    struct recipe_text scanned;
    config_t parsed;
    const size_t room = strlen(text) + 16;

    if (k->type == RECIPE_DATASETS && !(*text && strchr("([\"", *text)))
        return set_one_dataset(v, k, text, where);
    char *whole = malloc(room);
    if (!whole) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a list", where);
    snprintf(whole, room, "v = %s;", text);
    st = recipe_text_scan(&scanned, whole, strlen(whole), where);
    free(whole);
    HT_TRY(st);
    config_init(&parsed);
    if (!config_read_string(&parsed, scanned.text) || scanned.n_includes)
        st = wrong_type(k, where, text);
    else
        st = recipe_value_read(v, k, config_lookup(&parsed, "v"), where);
    config_destroy(&parsed);
    recipe_text_free(&scanned);
    return st;
}

enum ht_status recipe_value_parse(struct recipe_value *v, const struct recipe_key *k,
                                  const char *text, const char *where)
{
    switch (k->type) {
    case RECIPE_BOOL:
        if (!strcmp(text, "true")) return set_bool(v, true);
        if (!strcmp(text, "false")) return set_bool(v, false);
        return HT_FAIL(HT_ERR_RECIPE, "%s: %s.%s is %.60s; it must be true or false", where,
                       k->section, k->name, text);
    case RECIPE_INT:
    case RECIPE_COUNT:
    case RECIPE_BYTES:
    case RECIPE_SECONDS:
    case RECIPE_REAL: return parse_number(v, k, text, where);
    case RECIPE_TEXT: return set_text(v, k, text, where);
    case RECIPE_CHOICE: return parse_choice(v, k, text, where);
    case RECIPE_DIVISOR: return parse_divisor(v, k, text, where);
    case RECIPE_INT_LIST:
    case RECIPE_TEXT_LIST:
    case RECIPE_DATASETS: return parse_list(v, k, text, where);
    }
    return HT_ERR_ARG;
}
