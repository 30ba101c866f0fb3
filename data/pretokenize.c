/* data/pretokenize.c: see pretokenize.h.
 *
 * Patterns come from tokenizer.json, where Oniguruma (Ruby syntax) reads them: ^ and $ are line
 * anchors, and \s is the Unicode property White_Space. PCRE2's \s also takes U+180E, so \s and \S
 * are spelled out before compiling. Its tables in 10.42 are Unicode 14, Oniguruma's there 16: the
 * letters, digits and so on in between (unicode_new.h) are added to \p{..}.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/pretokenize.h"

#include <pcre2.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/unicode_new.h"

#define MAX_PATTERN_BYTES ((size_t)64 << 10)
#define MATCH_LIMIT 200000000u     // steps of one match: a word of 1 MiB needs about 3 per byte
#define HEAP_LIMIT_KIB (64u << 10) // backtracking memory of one match
#define JIT_STACK_BYTES ((size_t)16 << 20)

#define WHITE_SPACE                                                                                \
    "\\t-\\r\\x20\\x85\\xA0\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{"   \
    "3000}"

struct ht_splitter {
    pcre2_code *code;
};

struct ht_splitter_work {
    const struct ht_splitter *s;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* What PCRE2's Unicode tables miss of \p{name}; "" when nothing. */
static const char *missing_members(const char *name, size_t n)
{
    char version[32] = "";
    (void)pcre2_config(PCRE2_CONFIG_UNICODE_VERSION, version);
    if (strtod(version, NULL) >= 16.0) return "";
    for (size_t i = 0; i < sizeof unicode_new / sizeof *unicode_new; i++)
        if (strlen(unicode_new[i].name) == n && memcmp(unicode_new[i].name, name, n) == 0)
            return unicode_new[i].ranges;
    return "";
}

/* \p{..} or \P{..} at p; returns its length. */
static size_t spell_property(FILE *out, const char *p, bool in_class)
{
    const char *close = p[2] == '{' ? strchr(p, '}') : NULL;
    const size_t n = close ? (size_t)(close - p) + 1 : 2;
    const char *more = close ? missing_members(p + 3, n - 4) : "";

    if (!*more || (in_class && p[1] == 'P')) // a class cannot take members out again
        fprintf(out, "%.*s", (int)n, p);
    else if (in_class)
        fprintf(out, "%.*s%s", (int)n, p, more);
    else
        fprintf(out, "[%s\\p%.*s%s]", p[1] == 'P' ? "^" : "", (int)n - 2, p + 2, more);
    return n;
}

/* Pattern with \s, \S and the properties spelled out. */
static void spell_classes(FILE *out, const char *pattern)
{
    bool in_class = false;
    const char *p = pattern;
    while (*p) {
        if (p[0] == '\\' && p[1] == 's') {
            fputs(in_class ? WHITE_SPACE : "[" WHITE_SPACE "]", out);
            p += 2;
        } else if (p[0] == '\\' && p[1] == 'S') {
            fputs(in_class ? "\\S\\x{180E}" : "[^" WHITE_SPACE "]", out);
            p += 2;
        } else if (p[0] == '\\' && (p[1] == 'p' || p[1] == 'P')) {
            p += spell_property(out, p, in_class);
        } else if (p[0] == '\\' && p[1]) {
            fputc(*p++, out);
            fputc(*p++, out);
        } else if (!in_class && *p == '[') {
            in_class = true;
            fputc(*p++, out);
            if (*p == '^') fputc(*p++, out);
            if (*p == ']') fputc(*p++, out);
        } else {
            if (*p == ']') in_class = false;
            fputc(*p++, out);
        }
    }
}

static enum ht_status spell(char **out, const char *pattern)
{
    size_t n;
    FILE *f = open_memstream(out, &n);

    if (f) spell_classes(f, pattern);
    if (!f || fclose(f) != 0) {
        if (f) free(*out);
        *out = NULL;
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a split pattern of %zu bytes",
                       strlen(pattern));
    }
    return HT_OK;
}

enum ht_status ht_splitter_create(struct ht_splitter **out, const char *pattern)
{
    enum ht_status st = HT_OK;
    const size_t len = strlen(pattern);
    struct ht_splitter *s = NULL;
    pcre2_compile_context *context = NULL;
    char *spelled = NULL;
    int code = 0;
    PCRE2_SIZE at = 0;
    PCRE2_UCHAR text[160];

    *out = NULL;
    if (len == 0 || len > MAX_PATTERN_BYTES)
        return HT_FAIL(HT_ERR_FORMAT, "split pattern has %zu bytes; 1 to %zu are accepted", len,
                       MAX_PATTERN_BYTES);
    s = calloc(1, sizeof *s);
    context = pcre2_compile_context_create(NULL);
    if (!s || !context) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a split pattern of %zu bytes", len);
        goto done;
    }
    HT_TRY_GOTO(st, done, spell(&spelled, pattern));
    (void)pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    (void)pcre2_set_parens_nest_limit(context, 100);
    s->code = pcre2_compile((PCRE2_SPTR)spelled, PCRE2_ZERO_TERMINATED,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                            &code, &at, context);
    if (!s->code) {
        (void)pcre2_get_error_message(code, text, sizeof text);
        st = HT_FAIL(HT_ERR_FORMAT, "split pattern \"%.200s\": %s", pattern, (char *)text);
        goto done;
    }
    // Without the JIT (another processor, or no executable memory) the interpreter gives the same
    // pieces.
    (void)pcre2_jit_compile(s->code, PCRE2_JIT_COMPLETE);
    *out = s;
    s = NULL;
done:
    pcre2_compile_context_free(context);
    free(spelled);
    ht_splitter_free(s);
    return st;
}

void ht_splitter_free(struct ht_splitter *s)
{
    if (!s) return;
    pcre2_code_free(s->code);
    free(s);
}

enum ht_status ht_splitter_work_create(struct ht_splitter_work **out, const struct ht_splitter *s)
{
    struct ht_splitter_work *w = calloc(1, sizeof *w);

    *out = NULL;
    if (w) {
        w->s = s;
        w->match = pcre2_match_data_create(1, NULL);
        w->context = pcre2_match_context_create(NULL);
        w->stack = pcre2_jit_stack_create(32 << 10, JIT_STACK_BYTES, NULL);
    }
    if (!w || !w->match || !w->context) {
        ht_splitter_work_free(w);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the matches of a split pattern");
    }
    (void)pcre2_set_match_limit(w->context, MATCH_LIMIT);
    (void)pcre2_set_heap_limit(w->context, HEAP_LIMIT_KIB);
    if (w->stack) pcre2_jit_stack_assign(w->context, NULL, w->stack);
    *out = w;
    return HT_OK;
}

void ht_splitter_work_free(struct ht_splitter_work *w)
{
    if (!w) return;
    pcre2_match_data_free(w->match);
    pcre2_match_context_free(w->context);
    pcre2_jit_stack_free(w->stack);
    free(w);
}

enum ht_status ht_splitter_next(struct ht_splitter_work *w, const char *text, size_t n, size_t *at,
                                size_t *start, size_t *end, int *matched)
{
    const PCRE2_SIZE *o = pcre2_get_ovector_pointer(w->match);
    PCRE2_UCHAR reason[160];

    *start = *end = *at;
    *matched = 0;
    if (*at >= n) return HT_OK;
    // A match must move forward; an empty one further on only ends the piece before it.
    const int rc = pcre2_match(w->s->code, (PCRE2_SPTR)text, n, *at,
                               PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY_ATSTART, w->match, w->context);
    if (rc == PCRE2_ERROR_NOMATCH) {
        *end = n;
    } else if (rc < 0) {
        (void)pcre2_get_error_message(rc, reason, sizeof reason);
        return HT_FAIL(HT_ERR_FORMAT, "split pattern gave up at byte %zu of %zu: %s", *at, n,
                       (char *)reason);
    } else if (o[0] > *at) {
        *end = o[0];
    } else {
        *end = o[1];
        *matched = 1;
    }
    if (*end <= *at) // \K or a look-behind trick
        return HT_FAIL(HT_ERR_FORMAT, "split pattern matched backwards at byte %zu", *at);
    *at = *end;
    return HT_OK;
}

/* GPT-2: printable Latin-1 stands for itself, the other 68 bytes for U+0100, U+0101, ... in order.
 */
static bool stands_for_itself(unsigned byte)
{
    return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

int ht_byte_char_utf8(char out[2], unsigned char byte)
{
    unsigned c = byte;
    if (!stands_for_itself(c)) {
        // 0..32, then 127..160, then 173
        if (c <= 32)
            c += 0x100;
        else if (c <= 160)
            c += 0x100 + 33 - 127;
        else
            c = 0x100 + 33 + 34;
    }
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    out[0] = (char)(0xC0 | c >> 6);
    out[1] = (char)(0x80 | (c & 0x3F));
    return 2;
}

int ht_byte_from_char(uint32_t c)
{
    if (c < 0x100) return stands_for_itself(c) ? (int)c : -1;
    if (c <= 0x120) return (int)(c - 0x100);
    if (c <= 0x142) return (int)(c - 0x100 - 33 + 127);
    return c == 0x143 ? 173 : -1;
}

/* Length of the well-formed character at p, or minus the length of the maximal malformed subpart.
 */
static int char_length(const unsigned char *p, const unsigned char *end)
{
    unsigned char lo = 0x80, hi = 0xBF;
    int need;
    if (p[0] < 0x80) return 1;
    if (p[0] < 0xC2 || p[0] > 0xF4) return -1;
    if (p[0] < 0xE0) {
        need = 1;
    } else if (p[0] < 0xF0) {
        need = 2;
        if (p[0] == 0xE0) lo = 0xA0;
        if (p[0] == 0xED) hi = 0x9F;
    } else {
        need = 3;
        if (p[0] == 0xF0) lo = 0x90;
        if (p[0] == 0xF4) hi = 0x8F;
    }
    for (int i = 1; i <= need; i++) {
        if (p + i >= end || p[i] < lo || p[i] > hi) return -i;
        lo = 0x80;
        hi = 0xBF;
    }
    return need + 1;
}

enum ht_status ht_utf8_repair(char **out, size_t *n_out, const char *text, size_t n)
{
    const unsigned char *const begin = (const unsigned char *)text, *const end = begin + n;
    const unsigned char *p = begin;
    size_t n_bad = 0;

    *out = NULL;
    *n_out = n;
    while (p < end) {
        uint64_t eight;
        if (end - p >= 8 && (memcpy(&eight, p, 8), (eight & 0x8080808080808080u) == 0)) {
            p += 8;
            continue;
        }
        const int len = char_length(p, end);
        n_bad += len < 0;
        p += len < 0 ? -len : len;
    }
    if (n_bad == 0) return HT_OK;
    if (n_bad > (SIZE_MAX - n - 1) / 3)
        return HT_FAIL(HT_ERR_MEMORY, "repaired text of %zu bytes does not fit the address space",
                       n);
    char *fixed = malloc(n + 2 * n_bad + 1); // U+FFFD has 3 bytes and replaces at least one
    if (!fixed) return HT_FAIL(HT_ERR_MEMORY, "no memory to repair %zu bytes of text", n);
    char *q = fixed;
    for (p = begin; p < end;) {
        const int len = char_length(p, end);
        if (len > 0) {
            memcpy(q, p, (size_t)len);
            q += len;
            p += len;
        } else {
            memcpy(q, "\xEF\xBF\xBD", 3);
            q += 3;
            p -= len;
        }
    }
    *q = '\0';
    *out = fixed;
    *n_out = (size_t)(q - fixed);
    return HT_OK;
}
