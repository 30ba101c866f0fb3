/* data/normal_form.c: Unicode normal forms (UAX 15) in linear time.
 *
 *   decompose each character -> order marks by combining class, stably -> compose (NFC, NFKC)
 *
 * utf8proc has the tables and composes, but orders marks by exchanging neighbours: 80000 marks of
 * one class before as many of a lower one took 74 s. Here long runs are sorted by counting.
 * Text is cut where nothing can interact, so plain text is copied.
 */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "data/tokenizer_impl.h"

#define MAX_DECOMPOSED 64 // code points of one character; U+FDFA has 18
#define SHORT_RUN 16

struct code_points {
    utf8proc_int32_t *at;
    size_t n, room;
};

static enum ht_status make_room(struct code_points *c, size_t n)
{
    if (n <= c->room) return HT_OK;
    const size_t room = 2 * n + 256;
    utf8proc_int32_t *at = realloc(c->at, room * sizeof *at);
    if (!at) return HT_FAIL(HT_ERR_MEMORY, "no memory to normalize %zu characters", n);
    c->at = at;
    c->room = room;
    return HT_OK;
}

static enum ht_status decompose(struct code_points *c, const char *p, size_t n, int options)
{
    c->n = 0;
    for (size_t i = 0; i < n;) {
        utf8proc_int32_t code;
        int boundary = UTF8PROC_BOUNDCLASS_START;
        const utf8proc_ssize_t len =
            utf8proc_iterate((const utf8proc_uint8_t *)p + i, (utf8proc_ssize_t)(n - i), &code);
        HT_TRY(make_room(c, c->n + MAX_DECOMPOSED));
        const utf8proc_ssize_t made =
            len < 1 ? len
                    : utf8proc_decompose_char(code, c->at + c->n, MAX_DECOMPOSED,
                                              (utf8proc_option_t)options, &boundary);
        if (made < 0 || made > MAX_DECOMPOSED)
            return HT_FAIL(HT_ERR_FORMAT, "normalizing: %s",
                           made < 0 ? utf8proc_errmsg(made) : "a character became too long");
        c->n += (size_t)made;
        i += (size_t)len;
    }
    return HT_OK;
}

static unsigned class_of(utf8proc_int32_t code)
{
    return (unsigned)utf8proc_get_property(code)->combining_class & 0xFF;
}

static void order_short(utf8proc_int32_t *marks, size_t n)
{
    for (size_t i = 1; i < n; i++) {
        const utf8proc_int32_t mark = marks[i];
        size_t k = i;
        for (; k > 0 && class_of(marks[k - 1]) > class_of(mark); k--) marks[k] = marks[k - 1];
        marks[k] = mark;
    }
}

static void order_long(utf8proc_int32_t *marks, size_t n, utf8proc_int32_t *scratch)
{
    size_t place[257] = { 0 };
    for (size_t i = 0; i < n; i++) place[class_of(marks[i]) + 1]++;
    for (int k = 1; k < 257; k++) place[k] += place[k - 1];
    for (size_t i = 0; i < n; i++) scratch[place[class_of(marks[i])]++] = marks[i];
    memcpy(marks, scratch, n * sizeof *marks);
}

/* Every run of marks (class not 0) by class. */
static enum ht_status order(struct code_points *c, struct code_points *scratch)
{
    for (size_t i = 0; i < c->n;) {
        size_t end = i;
        while (end < c->n && class_of(c->at[end]) != 0) end++;
        if (end - i > SHORT_RUN) {
            HT_TRY(make_room(scratch, end - i));
            order_long(c->at + i, end - i, scratch->at);
        } else {
            order_short(c->at + i, end - i);
        }
        i = end + 1;
    }
    return HT_OK;
}

static enum ht_status append(struct ht_bytes *out, const utf8proc_int32_t *codes, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        utf8proc_uint8_t utf8[4];
        const utf8proc_ssize_t len = utf8proc_encode_char(codes[i], utf8);
        HT_TRY(ht_bytes_append(out, (const char *)utf8, (size_t)len));
    }
    return HT_OK;
}

enum ht_status ht_normal_form(struct ht_bytes *out, enum ht_norm_kind kind, const char *text,
                              size_t n)
{
    const bool compose = kind == HT_NORM_NFC || kind == HT_NORM_NFKC;
    const int compat = kind == HT_NORM_NFKC || kind == HT_NORM_NFKD ? UTF8PROC_COMPAT : 0;
    const int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | compat;
    // Characters that start with a lower byte are in the form already and never join what is
    // before them: below U+0300 in NFC, ASCII in the others.
    const unsigned char limit = kind == HT_NORM_NFC ? 0xCC : 0x80;
    struct code_points codes = { 0 }, scratch = { 0 };
    enum ht_status st = HT_OK;

    for (size_t i = 0; i < n;) {
        size_t start = i, end;
        while (start < n && (unsigned char)text[start] < limit) start++;
        end = start;
        if (start < n && start > i) { // the last plain character may take marks
            do start--;
            while (((unsigned char)text[start] & 0xC0) == 0x80);
        }
        HT_TRY_GOTO(st, done, ht_bytes_append(out, text + i, start - i));
        while (end < n && ((unsigned char)text[end] >= limit ||
                           ((unsigned char)text[end] & 0xC0) == 0x80)) // rest of a character
            end++;
        i = end;
        if (start == end) continue;
        HT_TRY_GOTO(st, done, decompose(&codes, text + start, end - start, options));
        HT_TRY_GOTO(st, done, order(&codes, &scratch));
        utf8proc_ssize_t left = (utf8proc_ssize_t)codes.n;
        if (compose)
            left = utf8proc_normalize_utf32(codes.at, left, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (left < 0) {
            st = HT_FAIL(HT_ERR_FORMAT, "normalizing: %s", utf8proc_errmsg(left));
            goto done;
        }
        HT_TRY_GOTO(st, done, append(out, codes.at, (size_t)left));
    }
done:
    free(codes.at);
    free(scratch.at);
    return st;
}
