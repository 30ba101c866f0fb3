/* data/tokenizer_encode.c: text -> ids. See tokenizer_impl.h for the path a text takes.
 *
 * Nothing is allocated per word: pieces are slices of the text, symbols are written and merged at
 * the end of the caller's ids. Words of up to 30 bytes that give up to 8 ids are remembered in a
 * table of one cache line per word.
 */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>
#include <xxhash.h>

#include "data/tokenizer_impl.h"

#define CACHE_WORD_BYTES 30
#define CACHE_WORD_IDS 8
#define CACHE_WORDS 32768 // 2 MiB: about the L2 cache of a core

struct cached_word {
    uint8_t n_bytes, n_ids; // n_bytes 0: free
    char bytes[CACHE_WORD_BYTES];
    int32_t ids[CACHE_WORD_IDS];
};

struct ht_encoder {
    const struct ht_tokenizer *t;
    struct ht_splitter_work *norm_work[HT_TOKENIZER_MAX_STAGES],
        *stage_work[HT_TOKENIZER_MAX_STAGES];
    struct ht_bytes normal, scratch, stage_text[HT_TOKENIZER_MAX_STAGES];
    struct ht_bpe_work bpe;
    struct cached_word *cache;
    struct ht_ids *out;         // of the running call
    const char *base;           // of the running call: the text that guard is about
    const unsigned char *guard; // NULL: special tokens are found everywhere
};

static enum ht_status reserve(struct ht_ids *a, int64_t n)
{
    if (n <= a->capacity - a->n) return HT_OK;
    int64_t capacity = a->capacity ? a->capacity : 256;
    while (capacity - a->n < n) {
        if (capacity > INT64_MAX / 16)
            return HT_FAIL(HT_ERR_MEMORY, "more than %lld ids", (long long)capacity);
        capacity *= 2;
    }
    int32_t *grown = realloc(a->ids, (size_t)capacity * sizeof *grown);
    if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld ids", (long long)capacity);
    a->ids = grown;
    a->capacity = capacity;
    return HT_OK;
}

enum ht_status ht_ids_append(struct ht_ids *a, const int32_t *ids, int64_t n)
{
    HT_TRY(reserve(a, n));
    if (n > 0) memcpy(a->ids + a->n, ids, (size_t)n * sizeof *ids);
    a->n += n;
    return HT_OK;
}

void ht_ids_free(struct ht_ids *a)
{
    free(a->ids);
    *a = (struct ht_ids){ 0 };
}

static int char_bytes(unsigned char first)
{
    return first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
}

struct symbols { // of the word that is being spelled
    int32_t *ids;
    int64_t n;
    bool unk_waits; // an unknown run, not yet written
};

/* One character that is no symbol: bytes, unk_token (runs fused if asked), or nothing. */
static void add_unknown(const struct ht_tokenizer *t, struct symbols *y, const char *p, int n)
{
    if (t->byte_fallback) {
        int k = 0;
        while (k < n && t->fallback_ids[(unsigned char)p[k]] >= 0) k++;
        if (k == n) {
            for (k = 0; k < n; k++) y->ids[y->n++] = t->fallback_ids[(unsigned char)p[k]];
            return;
        }
    }
    if (t->unk_id < 0) return;
    if (y->unk_waits && !t->fuse_unk) y->ids[y->n++] = t->unk_id;
    y->unk_waits = true;
}

static void add_known(const struct ht_tokenizer *t, struct symbols *y, int32_t id)
{
    if (y->unk_waits) y->ids[y->n++] = t->unk_id;
    y->unk_waits = false;
    y->ids[y->n++] = id;
}

/* The symbols of a word, before merging. ids has room for 2 per byte. */
static int64_t spell(const struct ht_tokenizer *t, int32_t *ids, const char *p, size_t n)
{
    struct symbols y = { ids, 0, false };
    if (t->byte_level) {
        for (size_t i = 0; i < n; i++) {
            const unsigned char byte = (unsigned char)p[i];
            char utf8[2];
            if (t->byte_ids[byte] >= 0)
                add_known(t, &y, t->byte_ids[byte]);
            else
                add_unknown(t, &y, utf8, ht_byte_char_utf8(utf8, byte));
        }
    } else {
        for (size_t i = 0; i < n;) {
            const int len = char_bytes((unsigned char)p[i]);
            const int32_t id = ht_token_table_find(&t->model, p + i, (size_t)len);
            if (id >= 0)
                add_known(t, &y, id);
            else
                add_unknown(t, &y, p + i, len);
            i += (size_t)len;
        }
    }
    if (y.unk_waits) y.ids[y.n++] = t->unk_id;
    return y.n;
}

static enum ht_status encode_word(struct ht_encoder *e, const char *p, size_t n)
{
    const struct ht_tokenizer *t = e->t;
    struct ht_ids *out = e->out;
    struct cached_word *c = NULL;

    HT_TRY(reserve(out, (int64_t)(2 * n)));
    if (n == 1 && t->byte_level && !t->ignore_merges && t->byte_ids[(unsigned char)*p] >= 0) {
        out->ids[out->n++] = t->byte_ids[(unsigned char)*p];
        return HT_OK;
    }
    if (n <= CACHE_WORD_BYTES) {
        c = &e->cache[XXH3_64bits(p, n) % CACHE_WORDS];
        if (c->n_bytes == n && memcmp(c->bytes, p, n) == 0) {
            if (out->capacity - out->n >= CACHE_WORD_IDS) // whole line: no length to branch on
                memcpy(out->ids + out->n, c->ids, sizeof c->ids);
            else
                memcpy(out->ids + out->n, c->ids, c->n_ids * sizeof *c->ids);
            out->n += c->n_ids;
            return HT_OK;
        }
    }
    int32_t *ids = out->ids + out->n;
    int64_t n_ids = 0;
    const int32_t whole = t->ignore_merges ? ht_token_table_find(&t->model, p, n) : -1;
    if (whole >= 0) {
        ids[0] = whole;
        n_ids = 1;
    } else {
        n_ids = spell(t, ids, p, n);
        HT_TRY(ht_bpe_merge(t, &e->bpe, ids, &n_ids));
    }
    out->n += n_ids;
    if (c && n_ids <= CACHE_WORD_IDS) {
        c->n_bytes = (uint8_t)n;
        c->n_ids = (uint8_t)n_ids;
        memcpy(c->bytes, p, n);
        memcpy(c->ids, ids, (size_t)n_ids * sizeof *ids);
    }
    return HT_OK;
}

/* Stage i and all after it on one piece; first: the piece starts where the text starts. */
static enum ht_status run_stage(struct ht_encoder *e, int i, const char *p, size_t n, bool first);

/* Cut at the pattern, handle what matched as the behavior says, pass the pieces on. */
static enum ht_status run_split(struct ht_encoder *e, int i, const char *p, size_t n, bool first)
{
    const struct ht_stage *g = &e->t->stages[i];
    size_t at = 0, start, end, held = 0,
           held_end = 0; // piece that may still grow: [held, held_end)
    bool held_match = false, previous = false;
    int matched;

    for (;;) {
        HT_TRY(ht_splitter_next(e->stage_work[i], p, n, &at, &start, &end, &matched));
        if (end == start) break;
        const bool match = (matched != 0) != g->invert;
        bool join = false;
        switch (g->behavior) {
        case HT_SPLIT_ISOLATED: break;
        case HT_SPLIT_REMOVED: break;
        case HT_SPLIT_CONTIGUOUS: join = match == held_match; break;
        case HT_SPLIT_PREVIOUS: join = match && !previous; break;
        case HT_SPLIT_NEXT: join = held_match && !match; break;
        }
        previous = match;
        if (g->behavior == HT_SPLIT_REMOVED && match) continue;
        if (join && held_end > held) {
            held_end = end;
        } else {
            if (held_end > held)
                HT_TRY(run_stage(e, i + 1, p + held, held_end - held, first && held == 0));
            held = start;
            held_end = end;
        }
        held_match = match;
    }
    if (held_end > held) return run_stage(e, i + 1, p + held, held_end - held, first && held == 0);
    return HT_OK;
}

static enum ht_status run_byte_level(struct ht_encoder *e, int i, const char *p, size_t n,
                                     bool first)
{
    const struct ht_stage *g = &e->t->stages[i];
    struct ht_bytes *text = &e->stage_text[i];
    size_t at = 0, start = 0, end = n;
    int matched;

    if (g->add_prefix_space && p[0] != ' ') {
        text->n = 0;
        HT_TRY(ht_bytes_append(text, " ", 1));
        HT_TRY(ht_bytes_append(text, p, n));
        p = text->p;
        n = end = text->n;
    }
    if (g->raw && !g->pattern) return encode_word(e, p, n);
    struct ht_bytes chars = { 0 };
    enum ht_status st = HT_OK;
    for (;;) {
        if (g->pattern) {
            HT_TRY_GOTO(st, done,
                        ht_splitter_next(e->stage_work[i], p, n, &at, &start, &end, &matched));
            if (end == start) break;
        }
        if (g->raw) {
            HT_TRY_GOTO(st, done, encode_word(e, p + start, end - start));
        } else { // rare: a stage after ByteLevel sees the characters
            chars.n = 0;
            for (size_t k = start; k < end; k++) {
                char utf8[2];
                const int len = ht_byte_char_utf8(utf8, (unsigned char)p[k]);
                HT_TRY_GOTO(st, done, ht_bytes_append(&chars, utf8, (size_t)len));
            }
            HT_TRY_GOTO(st, done, run_stage(e, i + 1, chars.p, chars.n, first && start == 0));
        }
        if (!g->pattern) break;
    }
done:
    free(chars.p);
    return st;
}

static enum ht_status run_metaspace(struct ht_encoder *e, int i, const char *p, size_t n,
                                    bool first)
{
    const struct ht_stage *g = &e->t->stages[i];
    struct ht_bytes *text = &e->stage_text[i];
    const size_t n_mark = strlen(g->replacement);
    const bool marked = p[0] == ' ' || (n >= n_mark && memcmp(p, g->replacement, n_mark) == 0);

    text->n = 0;
    if (!marked && (g->prepend == HT_PREPEND_ALWAYS || (g->prepend == HT_PREPEND_FIRST && first)))
        HT_TRY(ht_bytes_append(text, g->replacement, n_mark));
    while (n > 0) {
        const char *space = memchr(p, ' ', n);
        const size_t n_plain = space ? (size_t)(space - p) : n;
        HT_TRY(ht_bytes_append(text, p, n_plain));
        if (!space) break;
        HT_TRY(ht_bytes_append(text, g->replacement, n_mark));
        p += n_plain + 1;
        n -= n_plain + 1;
    }
    if (!g->split) return run_stage(e, i + 1, text->p, text->n, first);
    for (size_t start = 0, end; start < text->n; start = end) {
        for (end = start + 1; end < text->n; end++)
            if (end + n_mark <= text->n && memcmp(text->p + end, g->replacement, n_mark) == 0)
                break;
        HT_TRY(run_stage(e, i + 1, text->p + start, end - start, first && start == 0));
    }
    return HT_OK;
}

static enum ht_status run_stage(struct ht_encoder *e, int i, const char *p, size_t n, bool first)
{
    if (n == 0) return HT_OK;
    if (i == e->t->n_stages) return encode_word(e, p, n);
    switch (e->t->stages[i].kind) {
    case HT_STAGE_SPLIT: return run_split(e, i, p, n, first);
    case HT_STAGE_BYTE_LEVEL: return run_byte_level(e, i, p, n, first);
    case HT_STAGE_METASPACE: return run_metaspace(e, i, p, n, first);
    }
    return HT_OK;
}

/* \w of the reference: Alphabetic, Mark, Decimal_Number, Connector_Punctuation, Join_Control. */
static bool is_word_char(const char *p, size_t n)
{
    utf8proc_int32_t c;
    if (utf8proc_iterate((const utf8proc_uint8_t *)p, (utf8proc_ssize_t)n, &c) < 1) return false;
    if (c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
        (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
        (c >= 0x1F170 && c <= 0x1F189))
        return true;
    const utf8proc_category_t k = utf8proc_category(c);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC;
}

static bool stands_alone(const char *text, size_t n, size_t start, size_t end)
{
    size_t before = start;
    if (end < n && is_word_char(text + end, n - end)) return false;
    if (start == 0) return true;
    do before--;
    while (before > 0 && ((unsigned char)text[before] & 0xC0) == 0x80);
    return !is_word_char(text + before, start - before);
}

/* The longest added token that starts at p, or -1; a special one only where no byte is guarded
 * (guard may be NULL). */
static int32_t longest_added(const struct ht_tokenizer *t, const struct ht_trie *r, const char *p,
                             size_t n, const unsigned char *guard, bool open, size_t *len)
{
    uint64_t node = 0;
    int32_t found = -1;
    for (size_t k = 0; k < n; k++) {
        const uint64_t key = node << 8 | (unsigned char)p[k];
        size_t i = ht_hash_pair(key) & r->mask;
        while (r->keys[i] != key && r->keys[i] != UINT64_MAX) i = (i + 1) & r->mask;
        if (r->keys[i] != key) break;
        node = (uint64_t)r->next[i];
        if (guard && guard[k]) open = false;
        if (r->added[node] >= 0 && (open || !t->added[r->added[node]].special)) {
            found = r->added[node];
            *len = k + 1;
        }
    }
    return found;
}

/* Cut text at the added tokens of pass 0 (as it is) and 1 (normalized), then run the stages on the
 * rest. */
static enum ht_status encode_section(struct ht_encoder *e, int pass, const char *text, size_t n,
                                     bool first)
{
    const struct ht_tokenizer *t = e->t;
    const struct ht_trie *r;
    bool open = true;
    size_t done = 0, at = 0, len = 0;

    if (n == 0) return HT_OK;
    if (pass == 2) return run_stage(e, 0, text, n, first);
    const unsigned char *guard = e->guard ? e->guard + (text - e->base) : NULL;
    if (pass == 1 && t->n_norms > 0) {
        open = !guard ||
               !memchr(guard, 1, n); // normalizing moves bytes: all of the section or nothing
        guard = NULL;
        HT_TRY(ht_tokenizer_normalize(t, e->norm_work, &e->normal, &e->scratch, text, n));
        text = e->normal.p;
        n = e->normal.n;
    }
    r = &t->tries[pass];
    while (r->n_nodes > 1) {
        while (at < n && !r->first[(unsigned char)text[at]]) at++;
        if (at >= n) break;
        const int32_t k =
            longest_added(t, r, text + at, n - at, guard ? guard + at : NULL, open, &len);
        if (k < 0) {
            at++;
            continue;
        }
        const struct ht_added *a = &t->added[k];
        size_t start = at, end = at + len;
        at = end;
        if (a->single_word && !stands_alone(text, n, start, end)) continue;
        if (a->lstrip && start > done) // not past done: a run of such tokens stays linear
            start -= ht_text_spaces_at_end(text + done, start - done);
        if (start < done) start = done;
        if (a->rstrip) end += ht_text_spaces_at_start(text + end, n - end);
        HT_TRY(encode_section(e, pass + 1, text + done, start - done, first && done == 0));
        HT_TRY(ht_ids_append(e->out, &a->id, 1));
        done = end;
    }
    if (done >= n) return HT_OK;
    return encode_section(e, pass + 1, text + done, n - done, first && done == 0);
}

enum ht_status ht_encode(struct ht_encoder *e, const char *text, size_t n_bytes, bool add_special,
                         struct ht_ids *out)
{
    enum ht_status st = HT_OK;
    const int64_t n_before = out->n;
    char *repaired = NULL;

    if (n_bytes > PTRDIFF_MAX / 16)
        return HT_FAIL(HT_ERR_ARG, "text of %zu bytes to encode", n_bytes);
    e->out = out;
    e->guard = NULL;
    HT_TRY(ht_utf8_repair(&repaired, &n_bytes, text, n_bytes));
    if (add_special) HT_TRY_GOTO(st, done, ht_ids_append(out, e->t->prefix.ids, e->t->prefix.n));
    HT_TRY_GOTO(st, done, encode_section(e, 0, repaired ? repaired : text, n_bytes, true));
    if (add_special) HT_TRY_GOTO(st, done, ht_ids_append(out, e->t->suffix.ids, e->t->suffix.n));
done:
    if (st != HT_OK) out->n = n_before;
    free(repaired);
    return st;
}

enum ht_status ht_encode_guarded(struct ht_encoder *e, const char *text, size_t n_bytes,
                                 const unsigned char *guard, struct ht_ids *out)
{
    enum ht_status st = HT_OK;
    const int64_t n_before = out->n;
    char *repaired = NULL;
    size_t n = n_bytes;

    if (n_bytes > PTRDIFF_MAX / 16)
        return HT_FAIL(HT_ERR_ARG, "text of %zu bytes to encode", n_bytes);
    HT_TRY(ht_utf8_repair(&repaired, &n, text, n_bytes));
    if (repaired) {
        free(repaired);
        return HT_FAIL(HT_ERR_ARG, "text of %zu bytes that is not UTF-8", n_bytes);
    }
    e->out = out;
    e->base = text;
    e->guard = guard;
    st = encode_section(e, 0, text, n_bytes, true);
    e->guard = NULL;
    if (st != HT_OK) out->n = n_before;
    return st;
}

enum ht_status ht_encoder_create(struct ht_encoder **out, const struct ht_tokenizer *t)
{
    enum ht_status st = HT_OK;
    struct ht_encoder *e = calloc(1, sizeof *e);

    *out = NULL;
    if (e) e->cache = calloc(CACHE_WORDS, sizeof *e->cache);
    if (!e || !e->cache) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for an encoder");
        goto done;
    }
    e->t = t;
    for (int i = 0; i < t->n_norms; i++)
        if (t->norms[i].pattern)
            HT_TRY_GOTO(st, done, ht_splitter_work_create(&e->norm_work[i], t->norms[i].pattern));
    for (int i = 0; i < t->n_stages; i++)
        if (t->stages[i].pattern)
            HT_TRY_GOTO(st, done, ht_splitter_work_create(&e->stage_work[i], t->stages[i].pattern));
    *out = e;
    e = NULL;
done:
    ht_encoder_free(e);
    return st;
}

void ht_encoder_free(struct ht_encoder *e)
{
    if (!e) return;
    for (int i = 0; i < HT_TOKENIZER_MAX_STAGES; i++) {
        ht_splitter_work_free(e->norm_work[i]);
        ht_splitter_work_free(e->stage_work[i]);
        free(e->stage_text[i].p);
    }
    free(e->normal.p);
    free(e->scratch.p);
    ht_bpe_work_free(&e->bpe);
    free(e->cache);
    free(e);
}
