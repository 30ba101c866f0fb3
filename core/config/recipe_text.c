/* core/config/recipe_text.c: numbers, includes and nesting of a recipe's text. */
#include "core/config/recipe_text.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/config.h"

#define MAX_DEPTH 16
#define MAX_NUMBER 64 // characters

struct scanner {
    struct recipe_text *out;
    char *p;          // next character, in out->text
    const char *name; // for messages
    int line, depth;
    bool line_start; // only blanks since the line began
};

/* "..." with \" and \\ inside; libconfig understands the other escapes. */
static enum ht_status skip_string(struct scanner *s)
{
    const int first_line = s->line;

    for (s->p++; *s->p != '"'; s->p++) {
        if (*s->p == '\\' && s->p[1]) s->p++;
        if (*s->p == '\n') s->line++;
        if (!*s->p)
            return HT_FAIL(HT_ERR_RECIPE, "%s:%d: this string has no closing quote", s->name,
                           first_line);
    }
    s->p++;
    return HT_OK;
}

static void skip_line(struct scanner *s)
{
    while (*s->p && *s->p != '\n') s->p++;
}

static enum ht_status skip_comment(struct scanner *s)
{
    const int first_line = s->line;

    for (s->p += 2; !(s->p[0] == '*' && s->p[1] == '/'); s->p++) {
        if (*s->p == '\n') s->line++;
        if (!*s->p)
            return HT_FAIL(HT_ERR_RECIPE, "%s:%d: this comment has no closing */", s->name,
                           first_line);
    }
    s->p += 2;
    return HT_OK;
}

/* @include "path": noted and blanked out. */
static enum ht_status take_include(struct scanner *s, bool line_start)
{
    static const char word[] = "@include";
    struct recipe_text *o = s->out;
    char *const start = s->p;
    char *end = NULL;

    if (strncmp(s->p, word, sizeof word - 1) || !line_start)
        return HT_FAIL(
            HT_ERR_RECIPE,
            "%s:%d: unexpected @; only a line of the form @include \"other.cfg\" has one", s->name,
            s->line);
    if (s->depth)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s:%d: @include inside a group; move it to the top of the file, "
                       "where it includes whole sections",
                       s->name, s->line);
    s->p += sizeof word - 1;
    while (*s->p == ' ' || *s->p == '\t') s->p++;
    if (*s->p == '"') end = s->p + 1 + strcspn(s->p + 1, "\"\n");
    if (!end || *end != '"' || end == s->p + 1 || end - s->p > HT_MAX_PATH)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s:%d: @include must be followed by a path in quotes of at most "
                       "%d characters",
                       s->name, s->line, HT_MAX_PATH - 1);
    if (o->n_includes == RECIPE_MAX_INCLUDES)
        return HT_FAIL(HT_ERR_RECIPE, "%s:%d: more than %d @include lines", s->name, s->line,
                       RECIPE_MAX_INCLUDES);
    struct recipe_include *inc = &o->includes[o->n_includes];
    inc->line = s->line;
    inc->path = strndup(s->p + 1, (size_t)(end - s->p - 1));
    if (!inc->path) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for an @include", s->name);
    o->n_includes++;
    s->p = end + 1;
    memset(start, ' ', (size_t)(s->p - start));
    return HT_OK;
}

/* Digits with an optional sign: fits 32 bits, or 64 with L. libconfig would cut it silently. */
static enum ht_status check_integer(const struct scanner *s, const char *number, size_t n)
{
    const bool is_long = number[n - 1] == 'L';
    char *end = NULL;

    errno = 0;
    const long long v = strtoll(number, &end, number[0] == '0' && n > 1 ? 16 : 10);
    if (errno == ERANGE)
        return HT_FAIL(HT_ERR_RECIPE, "%s:%d: %s is beyond 64 bits", s->name, s->line, number);
    if (!is_long && (v > INT32_MAX || v < INT32_MIN))
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s:%d: %s is beyond 32 bits; write %sL, or a count such as \"2.2T\"",
                       s->name, s->line, number, number);
    return HT_OK;
}

static enum ht_status check_number(struct scanner *s)
{
    char number[MAX_NUMBER + 1] = { 0 };
    size_t n = 0;
    const char *p = s->p;
    const bool hex = p[0] == '0' && (p[1] == 'x' || p[1] == 'X');

    while (isalnum((unsigned char)*p) || *p == '.' ||
           ((*p == '+' || *p == '-') && (p == s->p || (!hex && (p[-1] == 'e' || p[-1] == 'E'))))) {
        if (n == MAX_NUMBER)
            return HT_FAIL(HT_ERR_RECIPE, "%s:%d: a number of more than %d characters", s->name,
                           s->line, MAX_NUMBER);
        number[n++] = *p++;
    }
    const char *digits = number + (number[0] == '-' || number[0] == '+');
    const size_t n_digits = strspn(digits, "0123456789");
    const size_t n_hex = hex ? strspn(number + 2, "0123456789abcdefABCDEF") : 0;
    const char *tail = hex ? number + 2 + n_hex : digits + n_digits;
    const bool integer =
        (n_digits || n_hex) && (!*tail || !strcmp(tail, "L") || !strcmp(tail, "LL"));

    if (integer) {
        if (!hex && n_digits > 1 && digits[0] == '0')
            return HT_FAIL(HT_ERR_RECIPE, "%s:%d: %s begins with a zero; write it without", s->name,
                           s->line, number);
        HT_TRY(check_integer(s, number, n));
    } else {
        char *end = NULL;
        const double d = strtod(number, &end);
        if (hex || end == number || *end || !isfinite(d) || !strpbrk(number, "0123456789"))
            return HT_FAIL(
                HT_ERR_RECIPE,
                "%s:%d: %s is not a number; a value with a unit is written in quotes, as in "
                "\"2.2T\"",
                s->name, s->line, number);
    }
    s->p += n;
    return HT_OK;
}

static enum ht_status scan(struct scanner *s)
{
    while (*s->p) {
        const bool line_start = s->line_start;
        const char c = *s->p;

        if (c != ' ' && c != '\t') s->line_start = c == '\n';
        if (c == '"') {
            HT_TRY(skip_string(s));
        } else if (c == '#' || (c == '/' && s->p[1] == '/')) {
            skip_line(s);
        } else if (c == '/' && s->p[1] == '*') {
            HT_TRY(skip_comment(s));
        } else if (c == '@') {
            HT_TRY(take_include(s, line_start));
        } else if (isdigit((unsigned char)c) || c == '+' || c == '-' || c == '.') {
            HT_TRY(check_number(s));
        } else if (isalpha((unsigned char)c) || c == '*') {
            while (isalnum((unsigned char)*s->p) || (*s->p && strchr("-_*", *s->p))) s->p++;
            if (*s->p == '.')
                return HT_FAIL(
                    HT_ERR_RECIPE,
                    "%s:%d: a dot in a name; section.key=value is for the command line, a "
                    "file has section: { key = value; }",
                    s->name, s->line);
        } else {
            if (c == '\n') s->line++;
            if (strchr("({[", c) && ++s->depth > MAX_DEPTH)
                return HT_FAIL(HT_ERR_RECIPE, "%s:%d: nested deeper than %d", s->name, s->line,
                               MAX_DEPTH);
            if (strchr(")}]", c) && s->depth > 0) s->depth--;
            s->p++;
        }
    }
    return HT_OK;
}

enum ht_status recipe_text_scan(struct recipe_text *out, const char *text, size_t n_bytes,
                                const char *name)
{
    struct scanner s = { .out = out, .name = name, .line = 1, .line_start = true };

    *out = (struct recipe_text){ 0 };
    if (n_bytes > RECIPE_MAX_BYTES)
        return HT_FAIL(HT_ERR_RECIPE, "%s: %zu bytes; a recipe has at most %d", name, n_bytes,
                       RECIPE_MAX_BYTES);
    if (memchr(text, 0, n_bytes))
        return HT_FAIL(HT_ERR_RECIPE, "%s: contains a NUL byte; a recipe is a text file", name);
    s.p = out->text = strndup(text, n_bytes);
    if (!s.p) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", name, n_bytes);
    const enum ht_status st = scan(&s);
    if (st != HT_OK) recipe_text_free(out);
    return st;
}

void recipe_text_free(struct recipe_text *t)
{
    for (int i = 0; i < t->n_includes; i++) free(t->includes[i].path);
    free(t->text);
    *t = (struct recipe_text){ 0 };
}
