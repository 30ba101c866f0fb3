/* data/tokenizer_decode.c: ids -> text, as it becomes complete.
 *
 * Decoder steps run as a chain: each takes the text of one token and hands text to the next.
 * ByteLevel and ByteFallback hold bytes back until they are whole characters, Strip what may turn
 * out to be the end.
 */
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_impl.h"

struct step_state {
    struct ht_bytes held; // BYTE_LEVEL, BYTE_FALLBACK: an unfinished run of bytes
    struct ht_bytes text; // what goes to the next step
    int64_t n_tokens;     // seen so far
    int64_t n_stripped;   // STRIP of fused text: characters taken from its start
    int64_t n_end;        // STRIP of fused text: characters held at its end
    bool past_start;
};

struct ht_token_decoder {
    const struct ht_tokenizer *t;
    bool skip_special;
    struct step_state steps[HT_TOKENIZER_MAX_STAGES];
    struct ht_bytes out;
};

static enum ht_status step(struct ht_token_decoder *d, int i, const char *p, size_t n);

/* Bytes to text: whole characters and what can no longer become one go on, the rest stays. */
static enum ht_status push_bytes(struct ht_token_decoder *d, int i, bool last)
{
    struct step_state *s = &d->steps[i];
    size_t keep = 0, n = 0;

    if (!last) {
        // The last 1 to 3 bytes may be a character's beginning: a lead byte whose continuation has
        // not come.
        for (size_t k = 1; k <= 3 && k <= s->held.n; k++) {
            const unsigned char c = (unsigned char)s->held.p[s->held.n - k];
            if ((c & 0xC0) == 0x80) continue;
            const size_t need = c >= 0xF0 && c <= 0xF4  ? 4
                                : c >= 0xE0 && c < 0xF0 ? 3
                                : c >= 0xC2 && c < 0xE0 ? 2
                                                        : 1;
            char *fixed = NULL;
            if (need > k) { // unless already malformed: more than one part would be replaced
                HT_TRY(ht_utf8_repair(&fixed, &n, s->held.p + s->held.n - k, k));
                free(fixed);
                if (fixed && n == 3) keep = k;
            }
            break;
        }
    }
    const size_t ready = s->held.n - keep;
    if (ready == 0) return HT_OK;
    char *fixed = NULL;
    HT_TRY(ht_utf8_repair(&fixed, &n, s->held.p, ready));
    const enum ht_status st = step(d, i + 1, fixed ? fixed : s->held.p, n);
    free(fixed);
    HT_TRY(st);
    memmove(s->held.p, s->held.p + ready, keep);
    s->held.n = keep;
    return HT_OK;
}

/* Characters of a byte-level token to bytes; a token with any other character counts as its own
 * bytes. */
static enum ht_status byte_level(struct ht_token_decoder *d, int i, const char *p, size_t n)
{
    struct step_state *s = &d->steps[i];
    const size_t n_before = s->held.n;
    for (size_t k = 0; k < n;) {
        const unsigned char c = (unsigned char)p[k];
        uint32_t code = c;
        int byte = -1;
        if (c >= 0xC0 && c < 0xE0 && k + 1 < n)
            code = (uint32_t)(c & 0x1F) << 6 | ((unsigned char)p[k + 1] & 0x3F);
        if (c < 0xE0) byte = ht_byte_from_char(code);
        if (byte < 0) {
            s->held.n = n_before;
            HT_TRY(ht_bytes_append(&s->held, p, n));
            break;
        }
        const char one = (char)byte;
        HT_TRY(ht_bytes_append(&s->held, &one, 1));
        k += c >= 0x80 ? 2 : 1;
    }
    return push_bytes(d, i, false);
}

/* End of a run of <0x..> tokens: text if it is valid, else U+FFFD for each byte. */
static enum ht_status flush_fallback(struct ht_token_decoder *d, int i)
{
    struct step_state *s = &d->steps[i];
    const size_t n_run = s->held.n;
    char *fixed = NULL;
    size_t n;

    if (n_run == 0) return HT_OK;
    HT_TRY(ht_utf8_repair(&fixed, &n, s->held.p, n_run));
    s->text.n = 0;
    if (!fixed) {
        HT_TRY(ht_bytes_append(&s->text, s->held.p, n_run));
    } else {
        free(fixed);
        for (size_t k = 0; k < n_run; k++) HT_TRY(ht_bytes_append(&s->text, "\xEF\xBF\xBD", 3));
    }
    s->held.n = 0;
    return step(d, i + 1, s->text.p, s->text.n);
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static enum ht_status byte_fallback(struct ht_token_decoder *d, int i, const char *p, size_t n)
{
    if (n == 6 && memcmp(p, "<0x", 3) == 0 && p[5] == '>' && hex_digit(p[3]) >= 0 &&
        hex_digit(p[4]) >= 0) {
        const char byte = (char)(hex_digit(p[3]) * 16 + hex_digit(p[4]));
        return ht_bytes_append(&d->steps[i].held, &byte, 1);
    }
    HT_TRY(flush_fallback(d, i));
    return step(d, i + 1, p, n);
}

static enum ht_status replace(struct ht_token_decoder *d, int i, const char *p, size_t n,
                              const char *content)
{
    const struct ht_decode *k = &d->t->decodes[i];
    const size_t n_pattern = strlen(k->pattern), n_content = strlen(content);
    struct ht_bytes *text = &d->steps[i].text;

    text->n = 0;
    while (n > 0) {
        const char *hit = memmem(p, n, k->pattern, n_pattern);
        const size_t n_plain = hit ? (size_t)(hit - p) : n;
        HT_TRY(ht_bytes_append(text, p, n_plain));
        if (!hit) break;
        HT_TRY(ht_bytes_append(text, content, n_content));
        p += n_plain + n_pattern;
        n -= n_plain + n_pattern;
    }
    return step(d, i + 1, text->p, text->n);
}

/* Up to start characters off the front, up to stop off the back: of each token, or of the whole
 * when fused. */
static enum ht_status strip(struct ht_token_decoder *d, int i, const char *p, size_t n)
{
    const struct ht_decode *k = &d->t->decodes[i];
    struct step_state *s = &d->steps[i];
    const size_t n_mark = strlen(k->pattern);

    if (!k->fused) s->n_stripped = 0;
    if (!k->fused) s->past_start = false;
    while (!s->past_start && s->n_stripped < k->start && n >= n_mark &&
           memcmp(p, k->pattern, n_mark) == 0) {
        p += n_mark;
        n -= n_mark;
        s->n_stripped++;
    }
    if (n > 0) s->past_start = true;
    int64_t n_end = 0;
    size_t plain = n;
    while (n_end < k->stop && plain >= n_mark &&
           memcmp(p + plain - n_mark, k->pattern, n_mark) == 0) {
        plain -= n_mark;
        n_end++;
    }
    if (!k->fused) return step(d, i + 1, p, plain);
    // What was held goes on as far as more of the text, or more of the same, has come after it.
    s->text.n = 0;
    int64_t release = plain > 0 ? s->n_end : s->n_end + n_end - k->stop;
    if (release < 0) release = 0;
    s->n_end += n_end - release;
    for (int64_t r = 0; r < release; r++) HT_TRY(ht_bytes_append(&s->text, k->pattern, n_mark));
    HT_TRY(ht_bytes_append(&s->text, p, plain));
    return step(d, i + 1, s->text.p, s->text.n);
}

static enum ht_status step(struct ht_token_decoder *d, int i, const char *p, size_t n)
{
    if (i == d->t->n_decodes) return ht_bytes_append(&d->out, p, n);
    const struct ht_decode *k = &d->t->decodes[i];
    const bool first = d->steps[i].n_tokens == 0 || k->fused;
    d->steps[i].n_tokens++;
    switch (k->kind) {
    case HT_DECODE_BYTE_LEVEL: return byte_level(d, i, p, n);
    case HT_DECODE_BYTE_FALLBACK: return byte_fallback(d, i, p, n);
    case HT_DECODE_REPLACE: return replace(d, i, p, n, k->content);
    case HT_DECODE_METASPACE:
        return replace(d, i, p, n, first && k->prepend != HT_PREPEND_NEVER ? "" : " ");
    case HT_DECODE_STRIP: return strip(d, i, p, n);
    case HT_DECODE_FUSE: return step(d, i + 1, p, n);
    case HT_DECODE_SPACES:
        if (d->steps[i].n_tokens > 1) HT_TRY(step(d, i + 1, " ", 1));
        return step(d, i + 1, p, n);
    }
    return HT_OK;
}

static enum ht_status hand_out(struct ht_token_decoder *d, const char **text, size_t *n_bytes)
{
    HT_TRY(ht_bytes_append(&d->out, "", 1));
    *text = d->out.p;
    *n_bytes = d->out.n - 1;
    return HT_OK;
}

/* An id without a token gives no text, as in the reference: models are often wider than their
 * vocabulary. */
enum ht_status ht_token_decoder_push(struct ht_token_decoder *d, int32_t id, const char **text,
                                     size_t *n_bytes)
{
    const struct ht_tokenizer *t = d->t;
    d->out.n = 0;
    if (id >= 0 && id < t->n_ids && t->texts[id].p && !(d->skip_special && t->special[id]))
        HT_TRY(step(d, 0, t->texts[id].p, t->texts[id].n));
    return hand_out(d, text, n_bytes);
}

enum ht_status ht_token_decoder_finish(struct ht_token_decoder *d, const char **text,
                                       size_t *n_bytes)
{
    d->out.n = 0;
    for (int i = 0; i < d->t->n_decodes; i++) {
        if (d->t->decodes[i].kind == HT_DECODE_BYTE_LEVEL) HT_TRY(push_bytes(d, i, true));
        if (d->t->decodes[i].kind == HT_DECODE_BYTE_FALLBACK) HT_TRY(flush_fallback(d, i));
    }
    for (int i = 0; i < d->t->n_decodes; i++) { // ready for another text
        struct step_state *s = &d->steps[i];
        s->held.n = s->text.n = 0;
        s->n_tokens = s->n_stripped = s->n_end = 0;
        s->past_start = false;
    }
    return hand_out(d, text, n_bytes);
}

enum ht_status ht_token_decoder_create(struct ht_token_decoder **out, const struct ht_tokenizer *t,
                                       bool skip_special)
{
    struct ht_token_decoder *d = calloc(1, sizeof *d);
    *out = d;
    if (!d) return HT_FAIL(HT_ERR_MEMORY, "no memory for a token decoder");
    d->t = t;
    d->skip_special = skip_special;
    return HT_OK;
}

void ht_token_decoder_free(struct ht_token_decoder *d)
{
    if (!d) return;
    for (int i = 0; i < HT_TOKENIZER_MAX_STAGES; i++) {
        free(d->steps[i].held.p);
        free(d->steps[i].text.p);
    }
    free(d->out.p);
    free(d);
}
