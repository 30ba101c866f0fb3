/* core/config/recipe_print.c: a resolved recipe as text, and docs/recipes.md. */
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/recipe_impl.h"

static void print_string(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++) {
        const unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            fprintf(f, "\\%c", c);
        else if (c < 32 || c == 127)
            fprintf(f, "\\x%02X", c);
        else
            fputc(c, f);
    }
    fputc('"', f);
}

static void print_integer(FILE *f, int64_t i)
{
    fprintf(f, "%" PRId64 "%s", i, i > INT32_MAX || i < INT32_MIN ? "L" : "");
}

static void print_real(FILE *f, double d)
{
    char text[40];

    recipe_format_real(text, sizeof text, d);
    fprintf(f, isinf(d) ? "\"%s\"" : "%s", text);
}

static void print_choice(FILE *f, const char *choices, int64_t number)
{
    for (; number > 0; number--) choices = strchr(choices, '|') + 1;
    fprintf(f, "\"%.*s\"", (int)strcspn(choices, "|"), choices);
}

static void print_list(FILE *f, const struct recipe_key *k, const struct recipe_value *v)
{
    const bool sets = k->type == RECIPE_DATASETS;

    fputc(sets ? '(' : '[', f);
    for (int i = 0; i < v->n_items; i++) {
        const struct recipe_item *item = &v->items[i];
        if (i) fputs(sets ? "," : ", ", f);
        if (sets) {
            fputs("\n        { path = ", f);
            print_string(f, item->text);
            fputs("; weight = ", f);
            print_real(f, item->weight);
            fputs("; }", f);
        } else if (k->type == RECIPE_TEXT_LIST) {
            print_string(f, item->text);
        } else {
            print_integer(f, item->i);
        }
    }
    fputs(sets ? " )" : "]", f);
}

static void print_value(FILE *f, const struct recipe_key *k, const struct recipe_value *v)
{
    switch (k->type) {
    case RECIPE_BOOL: fputs(v->i ? "true" : "false", f); break;
    case RECIPE_INT:
    case RECIPE_COUNT:
    case RECIPE_BYTES: print_integer(f, v->i); break;
    case RECIPE_SECONDS:
    case RECIPE_REAL: print_real(f, v->d); break;
    case RECIPE_TEXT:
    case RECIPE_DIVISOR: print_string(f, v->text); break;
    case RECIPE_CHOICE: print_choice(f, k->choices, v->i); break;
    case RECIPE_INT_LIST:
    case RECIPE_TEXT_LIST:
    case RECIPE_DATASETS: print_list(f, k, v); break;
    }
}

static void print_section(FILE *f, const struct ht_recipe *r, const char *section, int with_origin)
{
    fprintf(f, "%s: {\n", section);
    for (int i = 0; i < recipe_n_keys; i++) {
        const struct recipe_key *k = &recipe_keys[i];
        const struct recipe_value *v = &r->values[i];

        if (strcmp(k->section, section) || !v->set) continue;
        fprintf(f, "    %s = ", k->name);
        print_value(f, k, v);
        fputc(';', f);
        if (with_origin && !v->file) fputs("  # default", f);
        if (with_origin && v->file) fprintf(f, v->line ? "  # %s:%d" : "  # %s", v->file, v->line);
        fputc('\n', f);
    }
    fputs("};\n", f);
}

enum ht_status ht_recipe_print(char **text, const struct ht_recipe *r, int with_origin)
{
    size_t size = 0;
    FILE *f = open_memstream(text, &size);

    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory to print a recipe: %s", strerror(errno));
    for (const struct recipe_section *s = recipe_sections; s->name; s++) {
        if (s != recipe_sections) fputc('\n', f);
        print_section(f, r, s->name, with_origin);
    }
    if (fclose(f) != 0) {
        free(*text);
        *text = NULL;
        return HT_FAIL(HT_ERR_MEMORY, "no memory to print a recipe: %s", strerror(errno));
    }
    return HT_OK;
}

/* ---- docs/recipes.md ---- */

static const char intro[] =
    "# Recipes\n"
    "\n"
    "<!-- Generated from core/config/recipe_table.c by `hybridtrain --print-recipe-docs`; edit the "
    "table. "
    "-->\n"
    "\n"
    "A recipe is a [libconfig](https://hyperrealm.github.io/libconfig/) file: sections with keys, "
    "`#` "
    "comments,\n"
    "`@include`. It says everything about a run; nothing else does but the command line.\n"
    "\n"
    "```\n"
    "@include \"base/bamba130m.cfg\"      # relative to this file, below the recipe's folder\n"
    "\n"
    "train: {\n"
    "    total_tokens = \"2.5B\";           # replaces what the included file says\n"
    "};\n"
    "```\n"
    "\n"
    "- **Precedence:** command line (`hybridtrain RECIPE optimizer.lr=1e-3`), then the recipe, "
    "then what it\n"
    "  includes (a later `@include` before an earlier one), then the default. "
    "`hybridtrain --print-recipe RECIPE` shows\n"
    "  every value with its origin. The resolved recipe is stored in every checkpoint.\n"
    "- **Counts** may be `2000000`, `2.2e12` or `\"2.2T\"` (K, M, B or G, T; powers of 1000), "
    "**sizes** "
    "`4096` or\n"
    "  `\"64MiB\"` (KiB, MiB, GiB, TiB; KB, MB, GB, TB), **times** seconds or `\"10min\"` (ms, s, "
    "min, h, "
    "d). A bare integer\n"
    "  beyond 32 bits needs an `L` at its end. Whole numbers are accepted where reals are meant.\n"
    "- **Refused,** with file, line, value, bound and the nearest known name: unknown sections and "
    "keys, a "
    "key given\n"
    "  twice in one file, wrong types, values out of bounds, sizes that do not fit together.\n"
    "- **Paths** are relative to the folder that the program is started in.\n";

static const char exit_codes[] =
    "\n## Exit codes\n"
    "\n"
    "| code | meaning |\n"
    "|---|---|\n"
    "| 0 | done |\n"
    "| 1 | failure at run time |\n"
    "| 2 | usage or recipe error; nothing was started |\n"
    "| 3 | bad input data or weights |\n"
    "| 4 | there are checkpoints, but none can be used |\n"
    "| 5 | out of memory or disk |\n"
    "| 6 | a rank was lost or a collective timed out |\n"
    "| 7 | too many steps in a row that were not finite |\n"
    "| 75 | stopped on request, checkpoint saved, start again to go on "
    "(docs/checkpoints.md, Stopping) |\n";

static const char *type_word(enum recipe_type t)
{
    switch (t) {
    case RECIPE_BOOL: return "true, false";
    case RECIPE_INT: return "integer";
    case RECIPE_COUNT: return "count";
    case RECIPE_BYTES: return "size";
    case RECIPE_SECONDS: return "time";
    case RECIPE_REAL: return "real";
    case RECIPE_TEXT: return "string";
    case RECIPE_CHOICE: return "";
    case RECIPE_DIVISOR: return "real or string";
    case RECIPE_INT_LIST: return "list of integers";
    case RECIPE_TEXT_LIST: return "list of strings";
    case RECIPE_DATASETS: return "list of data sets";
    }
    return "";
}

static void document_type(FILE *f, const struct recipe_key *k)
{
    char min[40], max[40];

    fputs(type_word(k->type), f);
    for (const char *c = k->choices; c; c = strchr(c, '|') ? strchr(c, '|') + 1 : NULL)
        fprintf(f, "%s`\"%.*s\"`", c == k->choices ? "" : ", ", (int)strcspn(c, "|"), c);
    if (k->type == RECIPE_DATASETS || k->min >= k->max) return;
    recipe_format_real(min, sizeof min, k->min);
    recipe_format_real(max, sizeof max, k->max);
    if (k->type == RECIPE_INT || k->type == RECIPE_COUNT || k->type == RECIPE_BYTES ||
        k->type == RECIPE_INT_LIST) {
        snprintf(min, sizeof min, "%.16g", k->min);
        snprintf(max, sizeof max, "%.16g", k->max);
    }
    fprintf(f, ", %s to %s", min, max);
    if (*k->unit) fprintf(f, " %s", k->unit);
}

static void document_default(FILE *f, const struct recipe_key *k)
{
    const bool text =
        k->type == RECIPE_TEXT || k->type == RECIPE_CHOICE || k->type == RECIPE_DIVISOR;

    if (k->fallback)
        fprintf(f, text ? "`\"%s\"`" : "`%s`", k->fallback);
    else
        fputs(k->derived ? k->derived : "**required**", f);
}

enum ht_status ht_recipe_document(char **text)
{
    size_t size = 0;
    FILE *f = open_memstream(text, &size);

    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for the documentation: %s", strerror(errno));
    fputs(intro, f);
    for (const struct recipe_section *s = recipe_sections; s->name; s++) {
        fprintf(f,
                "\n## %s: %s\n\n| key | type and bounds | default | meaning |\n|---|---|---|---|\n",
                s->name, s->meaning);
        for (int i = 0; i < recipe_n_keys; i++) {
            const struct recipe_key *k = &recipe_keys[i];
            if (strcmp(k->section, s->name)) continue;
            fprintf(f, "| `%s` | ", k->name);
            document_type(f, k);
            fputs(" | ", f);
            document_default(f, k);
            fprintf(f, " | %s |\n", k->meaning);
        }
    }
    fputs(exit_codes, f);
    if (fclose(f) != 0) {
        free(*text);
        *text = NULL;
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the documentation: %s", strerror(errno));
    }
    return HT_OK;
}
