/* inference/grammar.c: rules -> states over bytes, and the tokens that each state allows.
 *
 * A stack is a frame (symbol to come, frame below); equal frames are one. A state is the set of
 * frames whose next symbol is a byte class, sorted. Successors of states are tables filled on
 * demand: in a string, say, all characters lead back to the same state, and after a few tokens
 * nothing is computed any more.
 */
#include "inference/grammar.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_impl.h"
#include "inference/grammar_impl.h"

enum {
    MAX_FRAMES = 1 << 20,
    MAX_STATES = 20000,
    MAX_SET = 4096,    // frames of a state
    MAX_CLOSURE = 512, // rules entered without a byte
    MAX_MASKS = 256,
    MAX_TOKEN_BYTES = 256,
    UNKNOWN = -2,
    DEAD = -1
};

// ---- vocabulary ----

struct word {
    const char *p;
    uint32_t n, common; // bytes shared with the word before
    int32_t id;
};

struct ht_grammar_vocab {
    struct word *words; // sorted by bytes
    int64_t n_words, vocab_size;
    int32_t *place; // by id: word, -1 none
    int32_t eos;
    char *pool;
};

static int by_bytes(const void *a, const void *b)
{
    const struct word *x = a, *y = b;
    const uint32_t n = x->n < y->n ? x->n : y->n;
    const int c = memcmp(x->p, y->p, n);
    if (c) return c;
    if (x->n != y->n) return x->n < y->n ? -1 : 1;
    return x->id < y->id ? -1 : 1;
}

/* The bytes a token stands for, into out (room for n). */
static size_t token_bytes(const struct ht_tokenizer *t, int32_t id, char *out)
{
    const char *p = t->texts[id].p;
    size_t n = t->texts[id].n, k = 0;
    unsigned byte;
    if (t->byte_level && t->raw && t->raw[id].p) {
        memcpy(out, t->raw[id].p, t->raw[id].n);
        return t->raw[id].n;
    }
    if (t->byte_level) {
        memcpy(out, p, n);
        return n;
    }
    if (t->byte_fallback && n == 6 && sscanf(p, "<0x%2X>", &byte) == 1) {
        out[0] = (char)byte;
        return 1;
    }
    for (size_t i = 0; i < n;) { // U+2581 is how SentencePiece writes a space
        if (n - i >= 3 && memcmp(p + i, "\xE2\x96\x81", 3) == 0) {
            out[k++] = ' ';
            i += 3;
        } else {
            out[k++] = p[i++];
        }
    }
    return k;
}

enum ht_status ht_grammar_vocab_create(struct ht_grammar_vocab **out, const struct ht_tokenizer *t,
                                       int64_t vocab_size, int32_t eos)
{
    struct ht_grammar_vocab *v = calloc(1, sizeof *v);
    int64_t n = ht_tokenizer_vocab_size(t);
    size_t bytes = 1, at = 0;

    *out = NULL;
    if (n > vocab_size) n = vocab_size;
    for (int64_t i = 0; i < n; i++) bytes += t->texts[i].n;
    if (v) v->words = calloc((size_t)n + 1, sizeof *v->words);
    if (v) v->pool = malloc(bytes);
    if (v) v->place = malloc((size_t)(vocab_size + 1) * sizeof *v->place);
    if (!v || !v->words || !v->pool || !v->place) {
        ht_grammar_vocab_free(v);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a sorted vocabulary of %lld tokens",
                       (long long)n);
    }
    v->vocab_size = vocab_size;
    v->eos = eos;
    for (int32_t i = 0; i < n; i++) {
        if (!t->texts[i].p || t->texts[i].n == 0 || t->special[i] || i == eos) continue;
        struct word *w = &v->words[v->n_words];
        w->p = v->pool + at;
        w->id = i;
        w->n = (uint32_t)token_bytes(t, i, v->pool + at);
        at += w->n;
        if (w->n > 0 && w->n <= MAX_TOKEN_BYTES) v->n_words++;
    }
    qsort(v->words, (size_t)v->n_words, sizeof *v->words, by_bytes);
    memset(v->place, 0xff, (size_t)(vocab_size + 1) * sizeof *v->place);
    for (int64_t i = 0; i < v->n_words; i++) v->place[v->words[i].id] = (int32_t)i;
    for (int64_t i = 1; i < v->n_words; i++) {
        const struct word *x = &v->words[i - 1];
        struct word *y = &v->words[i];
        while (y->common < x->n && y->common < y->n && x->p[y->common] == y->p[y->common])
            y->common++;
    }
    *out = v;
    return HT_OK;
}

void ht_grammar_vocab_free(struct ht_grammar_vocab *v)
{
    if (!v) return;
    free(v->words);
    free(v->place);
    free(v->pool);
    free(v);
}

// ---- states ----

struct frame {
    int symbol;    // to come
    int32_t below; // frame, -1: the text ends
};
struct state {
    int32_t *frames; // sorted
    int n_frames;
    bool may_end;
    int32_t next[256];
    uint64_t *mask; // by token; NULL: not made
};

struct automaton {
    int references;
    const struct ht_grammar_vocab *vocab;
    struct ht_rules rules;
    struct frame *frames;
    int32_t *frame_slots, *state_slots; // hash tables of indices, -1 free
    int n_frames, frame_capacity, n_states, state_capacity, n_masks;
    struct state **states;
    // of the state being made
    int32_t set[MAX_SET];
    int n_set;
    bool may_end;
};

struct ht_grammar {
    struct automaton *a;
    int32_t state;
};

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9E3779B97F4A7C15u;
    return h ^ h >> 29;
}

enum { STATE_SLOTS = 65536 };

static size_t frame_slot(const struct automaton *a, int symbol, int32_t below)
{
    const size_t n = 2 * (size_t)a->frame_capacity;
    size_t i = mix(mix(1, (uint64_t)symbol), (uint64_t)(uint32_t)below) % n;
    for (; a->frame_slots[i] >= 0; i = (i + 1) % n) {
        const struct frame *f = &a->frames[a->frame_slots[i]];
        if (f->symbol == symbol && f->below == below) break;
    }
    return i;
}

static enum ht_status more_frames(struct automaton *a)
{
    const int capacity = a->frame_capacity ? 2 * a->frame_capacity : 256;
    if (capacity > MAX_FRAMES)
        return HT_FAIL(HT_ERR_MEMORY, "the answer needs more than %d grammar frames",
                       a->frame_capacity);
    struct frame *grown = realloc(a->frames, (size_t)capacity * sizeof *grown);
    if (grown) a->frames = grown;
    int32_t *slots = malloc(2 * (size_t)capacity * sizeof *slots);
    if (!grown || !slots) {
        free(slots);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %d grammar frames", capacity);
    }
    memset(slots, 0xff, 2 * (size_t)capacity * sizeof *slots);
    free(a->frame_slots);
    a->frame_slots = slots;
    a->frame_capacity = capacity;
    for (int k = 0; k < a->n_frames; k++)
        a->frame_slots[frame_slot(a, a->frames[k].symbol, a->frames[k].below)] = k;
    return HT_OK;
}

static enum ht_status push(struct automaton *a, int symbol, int32_t below, int32_t *out)
{
    if (a->n_frames == a->frame_capacity) HT_TRY(more_frames(a));
    const size_t i = frame_slot(a, symbol, below);
    if (a->frame_slots[i] < 0) {
        a->frames[a->n_frames] = (struct frame){ symbol, below };
        a->frame_slots[i] = a->n_frames++;
    }
    *out = a->frame_slots[i];
    return HT_OK;
}

/* Into the set: every frame with a byte to come that can be reached from this symbol without one.
 */
static enum ht_status close_over(struct automaton *a, int symbol, int32_t below, int depth)
{
    int32_t frame;
    if (depth > MAX_CLOSURE)
        return HT_FAIL(HT_ERR_ARG, "the schema leads back to itself with nothing in between");
    while (a->rules.symbols[symbol].kind == HT_SYMBOL_END) {
        if (below < 0) {
            a->may_end = true;
            return HT_OK;
        }
        symbol = a->frames[below].symbol;
        below = a->frames[below].below;
    }
    if (a->rules.symbols[symbol].kind == HT_SYMBOL_BYTES) {
        HT_TRY(push(a, symbol, below, &frame));
        for (int i = 0; i < a->n_set; i++)
            if (a->set[i] == frame) return HT_OK;
        if (a->n_set == MAX_SET)
            return HT_FAIL(HT_ERR_ARG, "the schema has more than %d readings at one place",
                           MAX_SET);
        a->set[a->n_set++] = frame;
        return HT_OK;
    }
    const struct ht_rule *r = &a->rules.rules[a->rules.symbols[symbol].index];
    // a rule at the end of another takes its place: repetition does not deepen the stack
    if (a->rules.symbols[symbol + 1].kind != HT_SYMBOL_END)
        HT_TRY(push(a, symbol + 1, below, &below));
    for (int i = 0; i < r->n; i++) HT_TRY(close_over(a, r->alternatives[i], below, depth + 1));
    return HT_OK;
}

static int by_value(const void *a, const void *b)
{
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* The state of the collected set. */
static enum ht_status intern(struct automaton *a, int32_t *out)
{
    uint64_t h = a->may_end;
    *out = DEAD;
    if (a->n_set == 0 && !a->may_end) return HT_OK;
    qsort(a->set, (size_t)a->n_set, sizeof *a->set, by_value);
    for (int i = 0; i < a->n_set; i++) h = mix(h, (uint64_t)a->set[i]);
    size_t slot = h % STATE_SLOTS;
    for (; a->state_slots[slot] >= 0; slot = (slot + 1) % STATE_SLOTS) {
        const struct state *s = a->states[a->state_slots[slot]];
        if (s->n_frames != a->n_set || s->may_end != a->may_end ||
            (a->n_set && memcmp(s->frames, a->set, (size_t)a->n_set * sizeof *a->set) != 0))
            continue;
        *out = a->state_slots[slot];
        return HT_OK;
    }
    if (a->n_states == MAX_STATES)
        return HT_FAIL(HT_ERR_MEMORY, "the answer needs more than %d grammar states", MAX_STATES);
    if (a->n_states == a->state_capacity) {
        const int capacity = a->state_capacity ? 2 * a->state_capacity : 64;
        struct state **grown = realloc(a->states, (size_t)capacity * sizeof *grown);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for grammar states");
        a->states = grown;
        a->state_capacity = capacity;
    }
    struct state *s = calloc(1, sizeof *s);
    if (s) s->frames = malloc((size_t)(a->n_set + 1) * sizeof *s->frames);
    if (!s || !s->frames) {
        free(s);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a grammar state");
    }
    if (a->n_set) memcpy(s->frames, a->set, (size_t)a->n_set * sizeof *a->set);
    s->n_frames = a->n_set;
    s->may_end = a->may_end;
    for (int i = 0; i < 256; i++) s->next[i] = UNKNOWN;
    a->states[a->n_states] = s;
    *out = a->state_slots[slot] = a->n_states++;
    return HT_OK;
}

static enum ht_status step(struct automaton *a, int32_t state, unsigned char byte, int32_t *out)
{
    struct state *s = a->states[state];
    if (s->next[byte] == UNKNOWN) {
        a->n_set = 0;
        a->may_end = false;
        for (int i = 0; i < s->n_frames; i++) {
            const struct frame f = a->frames[s->frames[i]];
            const struct ht_byte_class *k = &a->rules.classes[a->rules.symbols[f.symbol].index];
            if (k->bits[byte / 64] >> byte % 64 & 1)
                HT_TRY(close_over(a, f.symbol + 1, f.below, 0));
        }
        HT_TRY(intern(a, &s->next[byte]));
    }
    *out = s->next[byte];
    return HT_OK;
}

static enum ht_status run(struct automaton *a, int32_t state, const struct word *w, int32_t *out)
{
    for (uint32_t i = 0; i < w->n && state != DEAD; i++)
        HT_TRY(step(a, state, (unsigned char)w->p[i], &state));
    *out = state;
    return HT_OK;
}

/* Walk the sorted vocabulary; what two neighbours share is walked once. */
static enum ht_status make_mask(struct automaton *a, int32_t state)
{
    const struct ht_grammar_vocab *v = a->vocab;
    const size_t n = (size_t)(v->vocab_size + 63) / 64;
    int32_t path[MAX_TOKEN_BYTES + 1];
    uint32_t known = 0,
             dead = UINT32_MAX; // path[0..known] hold for the last word; it died at byte `dead`
    uint64_t *mask;

    if (a->n_masks >= MAX_MASKS) {
        for (int i = 0; i < a->n_states; i++) {
            free(a->states[i]->mask);
            a->states[i]->mask = NULL;
        }
        a->n_masks = 0;
    }
    mask = calloc(n, sizeof *mask);
    if (!mask) return HT_FAIL(HT_ERR_MEMORY, "no memory for a mask of %zu words", n);
    path[0] = state;
    for (int64_t i = 0; i < v->n_words; i++) {
        const struct word *w = &v->words[i];
        if (w->common > dead) continue; // shares the byte on which the one before failed
        if (w->common < known) known = w->common;
        dead = UINT32_MAX;
        for (uint32_t k = known; k < w->n; k++) {
            const enum ht_status st = step(a, path[k], (unsigned char)w->p[k], &path[k + 1]);
            if (st != HT_OK) {
                free(mask);
                return st;
            }
            if (path[k + 1] == DEAD) {
                dead = k;
                break;
            }
            known = k + 1;
        }
        if (dead == UINT32_MAX) mask[w->id / 64] |= (uint64_t)1 << w->id % 64;
    }
    if (v->eos >= 0 && v->eos < v->vocab_size && a->states[state]->may_end)
        mask[v->eos / 64] |= (uint64_t)1 << v->eos % 64;
    a->states[state]->mask = mask;
    a->n_masks++;
    return HT_OK;
}

// ---- grammars ----

static void release(struct automaton *a)
{
    if (!a || --a->references > 0) return;
    for (int i = 0; i < a->n_states; i++) {
        free(a->states[i]->frames);
        free(a->states[i]->mask);
        free(a->states[i]);
    }
    free(a->states);
    free(a->frames);
    free(a->frame_slots);
    free(a->state_slots);
    ht_rules_free(&a->rules);
    free(a);
}

static enum ht_status create(struct ht_grammar **out, const struct ht_grammar_vocab *v,
                             const json_t *schema)
{
    enum ht_status st = HT_OK;
    struct ht_grammar *g = calloc(1, sizeof *g);

    *out = NULL;
    if (g) g->a = calloc(1, sizeof *g->a);
    if (!g || !g->a) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a grammar");
        goto done;
    }
    g->a->references = 1;
    g->a->vocab = v;
    g->a->state_slots = malloc(STATE_SLOTS * sizeof *g->a->state_slots);
    if (!g->a->state_slots) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a grammar");
        goto done;
    }
    memset(g->a->state_slots, 0xff, STATE_SLOTS * sizeof *g->a->state_slots);
    HT_TRY_GOTO(st, done, ht_rules_from_schema(&g->a->rules, schema));
    const struct ht_rule *root = &g->a->rules.rules[0];
    for (int i = 0; i < root->n; i++)
        HT_TRY_GOTO(st, done, close_over(g->a, root->alternatives[i], -1, 0));
    HT_TRY_GOTO(st, done, intern(g->a, &g->state));
    if (g->state == DEAD) {
        st = HT_FAIL(HT_ERR_ARG, "no text satisfies the schema");
        goto done;
    }
    *out = g;
    g = NULL;
done:
    ht_grammar_free(g);
    return st;
}

enum ht_status ht_grammar_create_json(struct ht_grammar **out, const struct ht_grammar_vocab *v)
{
    return create(out, v, NULL);
}

enum ht_status ht_grammar_create_schema(struct ht_grammar **out, const struct ht_grammar_vocab *v,
                                        const json_t *schema)
{
    return create(out, v, schema);
}

enum ht_status ht_grammar_clone(struct ht_grammar **out, const struct ht_grammar *g)
{
    *out = malloc(sizeof **out);
    if (!*out) return HT_FAIL(HT_ERR_MEMORY, "no memory for a grammar");
    **out = *g;
    g->a->references++;
    return HT_OK;
}

void ht_grammar_free(struct ht_grammar *g)
{
    if (!g) return;
    release(g->a);
    free(g);
}

static enum ht_status current_mask(struct ht_grammar *g, const uint64_t **out)
{
    *out = NULL;
    if (!g->a->states[g->state]->mask) HT_TRY(make_mask(g->a, g->state));
    *out = g->a->states[g->state]->mask;
    return HT_OK;
}

enum ht_status ht_grammar_mask(struct ht_grammar *g, float *logits)
{
    const int64_t n = g->a->vocab->vocab_size;
    const uint64_t *mask;
    HT_TRY(current_mask(g, &mask));
    for (int64_t i = 0; i < n; i++)
        if (!(mask[i / 64] >> i % 64 & 1)) logits[i] = -INFINITY;
    return HT_OK;
}

bool ht_grammar_allows(struct ht_grammar *g, int32_t id)
{
    const uint64_t *mask;
    if (id < 0 || id >= g->a->vocab->vocab_size || current_mask(g, &mask) != HT_OK) return false;
    return mask[id / 64] >> id % 64 & 1;
}

enum ht_status ht_grammar_accept(struct ht_grammar *g, int32_t id)
{
    const struct ht_grammar_vocab *v = g->a->vocab;
    const uint64_t *mask;
    HT_TRY(current_mask(g, &mask));
    if (id < 0 || id >= v->vocab_size || !(mask[id / 64] >> id % 64 & 1))
        return HT_FAIL(HT_ERR_ARG, "token %d is not allowed by the grammar", id);
    if (id == v->eos) return HT_OK;
    return run(g->a, g->state, &v->words[v->place[id]], &g->state);
}

bool ht_grammar_may_end(const struct ht_grammar *g)
{
    return g->a->states[g->state]->may_end;
}

bool ht_grammar_must_end(struct ht_grammar *g)
{
    return g->a->states[g->state]->may_end && g->a->states[g->state]->n_frames == 0;
}
