/* data/tokenizer_parts.c: normalizer, pre_tokenizer, post_processor, decoder and added tokens of a
 * tokenizer.json.
 *
 * Sequences are flattened into arrays of steps. What is not known is an error that names it: a
 * guess would give ids that a model was not trained on. `truncation` and `padding` are the caller's
 * business and are not read.
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_impl.h"

struct source { // where we are, for messages
    struct ht_tokenizer *t;
    const char *name, *part;
};

static const char *string_of(const json_t *j, const char *key)
{
    const char *s = json_string_value(json_object_get(j, key));
    return s ? s : "";
}

static bool bool_of(const json_t *j, const char *key, bool if_absent)
{
    const json_t *v = json_object_get(j, key);
    return json_is_boolean(v) ? json_is_true(v) : if_absent;
}

static enum ht_status unknown(const struct source *s, const json_t *j)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s: %s type \"%.60s\" is not known", s->name, s->part,
                   string_of(j, "type"));
}

static enum ht_status copy(char **out, const struct source *s, const char *text)
{
    *out = strdup(text);
    return *out ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a %s", s->name, s->part);
}

/* Run each step of j, or of the sequence j under its list key. */
typedef enum ht_status step_fn(struct source *s, const json_t *j);
static enum ht_status each_step(struct source *s, const json_t *j, const char *list, step_fn *step)
{
    size_t i;
    json_t *part;
    if (!j || json_is_null(j)) return HT_OK;
    if (strcmp(string_of(j, "type"), "Sequence") != 0) return step(s, j);
    if (!json_is_array(json_object_get(j, list)))
        return HT_FAIL(HT_ERR_FORMAT, "%s: %s Sequence has no \"%s\"", s->name, s->part, list);
    json_array_foreach(json_object_get(j, list), i, part) HT_TRY(each_step(s, part, list, step));
    return HT_OK;
}

static enum ht_status room(const struct source *s, int n)
{
    if (n < HT_TOKENIZER_MAX_STAGES) return HT_OK;
    return HT_FAIL(HT_ERR_FORMAT, "%s: more than %d %ss", s->name, HT_TOKENIZER_MAX_STAGES,
                   s->part);
}

/* {"Regex": ".."} or {"String": ".."}, the latter with its punctuation escaped. */
static enum ht_status load_pattern(struct ht_splitter **out, const struct source *s,
                                   const json_t *j)
{
    const json_t *pattern = json_object_get(j, "pattern");
    const char *regex = json_string_value(json_object_get(pattern, "Regex"));
    const char *literal = json_string_value(json_object_get(pattern, "String"));
    if (regex) return ht_splitter_create(out, regex);
    if (!literal || !*literal)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %s %s needs a pattern {\"Regex\"} or {\"String\"}",
                       s->name, s->part, string_of(j, "type"));
    char *escaped = malloc(2 * strlen(literal) + 1), *q = escaped;
    if (!escaped) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a pattern", s->name);
    for (const char *p = literal; *p; p++) {
        if (strchr("\\^$.[]|()?*+{}#-", *p)) *q++ = '\\';
        *q++ = *p;
    }
    *q = '\0';
    const enum ht_status st = ht_splitter_create(out, escaped);
    free(escaped);
    return st;
}

static enum ht_status add_norm(struct source *s, const json_t *j)
{
    static const char *const forms[] = { "NFC", "NFD", "NFKC", "NFKD" };
    const char *type = string_of(j, "type");
    HT_TRY(room(s, s->t->n_norms));
    struct ht_norm *n = &s->t->norms[s->t->n_norms++];

    for (int i = 0; i < 4; i++) {
        if (strcmp(type, forms[i]) != 0) continue;
        n->kind = (enum ht_norm_kind)(HT_NORM_NFC + i);
        return HT_OK;
    }
    if (strcmp(type, "Prepend") == 0) {
        n->kind = HT_NORM_PREPEND;
        return copy(&n->content, s, string_of(j, "prepend"));
    }
    if (strcmp(type, "Replace") == 0) {
        n->kind = HT_NORM_REPLACE;
        HT_TRY(load_pattern(&n->pattern, s, j));
        return copy(&n->content, s, string_of(j, "content"));
    }
    if (strcmp(type, "Strip") == 0) {
        n->kind = HT_NORM_STRIP;
        n->left = bool_of(j, "strip_left", true);
        n->right = bool_of(j, "strip_right", true);
        return HT_OK;
    }
    return unknown(s, j);
}

static enum ht_status prepend_of(enum ht_prepend *out, const struct source *s, const json_t *j)
{
    const char *scheme = string_of(j, "prepend_scheme");
    if (strcmp(scheme, "always") == 0)
        *out = HT_PREPEND_ALWAYS;
    else if (strcmp(scheme, "first") == 0)
        *out = HT_PREPEND_FIRST;
    else if (strcmp(scheme, "never") == 0)
        *out = HT_PREPEND_NEVER;
    else if (!*scheme)
        *out = bool_of(j, "add_prefix_space", true) ? HT_PREPEND_ALWAYS : HT_PREPEND_NEVER;
    else
        return HT_FAIL(HT_ERR_FORMAT, "%s: %s prepend_scheme \"%.60s\" is not known", s->name,
                       s->part, scheme);
    return HT_OK;
}

static enum ht_status check_replacement(const struct source *s, const char *text)
{
    const size_t n = strlen(text);
    if (n >= 1 && n <= 4) return HT_OK;
    return HT_FAIL(HT_ERR_FORMAT, "%s: %s replacement \"%.60s\" is not one character", s->name,
                   s->part, text);
}

static enum ht_status add_stage(struct source *s, const json_t *j)
{
    static const char *const behaviors[] = { "Isolated", "Removed", "MergedWithPrevious",
                                             "MergedWithNext", "Contiguous" };
    const char *type = string_of(j, "type");
    HT_TRY(room(s, s->t->n_stages));
    struct ht_stage *g = &s->t->stages[s->t->n_stages++];

    if (strcmp(type, "ByteLevel") == 0) {
        g->kind = HT_STAGE_BYTE_LEVEL;
        g->add_prefix_space = bool_of(j, "add_prefix_space", true);
        if (bool_of(j, "use_regex", true)) return ht_splitter_create(&g->pattern, HT_PATTERN_GPT2);
        return HT_OK;
    }
    if (strcmp(type, "Split") == 0) {
        const char *behavior = string_of(j, "behavior");
        int b = 0;
        while (b < 5 && strcmp(behavior, behaviors[b]) != 0) b++;
        if (b == 5)
            return HT_FAIL(HT_ERR_FORMAT, "%s: %s Split behavior \"%.60s\" is not known", s->name,
                           s->part, behavior);
        g->kind = HT_STAGE_SPLIT;
        g->behavior = (enum ht_behavior)b;
        g->invert = bool_of(j, "invert", false);
        return load_pattern(&g->pattern, s, j);
    }
    if (strcmp(type, "Digits") == 0) {
        g->kind = HT_STAGE_SPLIT;
        g->behavior =
            bool_of(j, "individual_digits", false) ? HT_SPLIT_ISOLATED : HT_SPLIT_CONTIGUOUS;
        return ht_splitter_create(&g->pattern, "\\p{N}");
    }
    if (strcmp(type, "WhitespaceSplit") == 0) {
        g->kind = HT_STAGE_SPLIT;
        g->behavior = HT_SPLIT_REMOVED;
        return ht_splitter_create(&g->pattern, "\\s");
    }
    if (strcmp(type, "Metaspace") == 0) {
        g->kind = HT_STAGE_METASPACE;
        g->split = bool_of(j, "split", true);
        HT_TRY(check_replacement(s, string_of(j, "replacement")));
        strcpy(g->replacement, string_of(j, "replacement"));
        return prepend_of(&g->prepend, s, j);
    }
    return unknown(s, j);
}

static enum ht_status add_decode(struct source *s, const json_t *j)
{
    const char *type = string_of(j, "type");
    HT_TRY(room(s, s->t->n_decodes));
    const struct ht_decode *before = s->t->n_decodes ? &s->t->decodes[s->t->n_decodes - 1] : NULL;
    struct ht_decode *d = &s->t->decodes[s->t->n_decodes++];

    d->fused = before && (before->fused || before->kind == HT_DECODE_FUSE ||
                          before->kind == HT_DECODE_BYTE_LEVEL);
    if (strcmp(type, "ByteLevel") == 0) {
        d->kind = HT_DECODE_BYTE_LEVEL;
        if (d->fused)
            return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: decoder ByteLevel after Fuse or ByteLevel",
                           s->name);
        return HT_OK;
    }
    if (strcmp(type, "ByteFallback") == 0) {
        d->kind = HT_DECODE_BYTE_FALLBACK;
        if (d->fused)
            return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: decoder ByteFallback after Fuse", s->name);
        return HT_OK;
    }
    if (strcmp(type, "Fuse") == 0) {
        d->kind = HT_DECODE_FUSE;
        return HT_OK;
    }
    if (strcmp(type, "Replace") == 0) {
        const char *pattern =
            json_string_value(json_object_get(json_object_get(j, "pattern"), "String"));
        d->kind = HT_DECODE_REPLACE;
        if (!pattern || !*pattern)
            return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: decoder Replace needs a pattern {\"String\"}",
                           s->name);
        if (d->fused)
            HT_TRY(check_replacement(s, pattern)); // text comes in whole characters, no more
        HT_TRY(copy(&d->pattern, s, pattern));
        return copy(&d->content, s, string_of(j, "content"));
    }
    if (strcmp(type, "Strip") == 0) {
        d->kind = HT_DECODE_STRIP;
        d->start = (int64_t)json_integer_value(json_object_get(j, "start"));
        d->stop = (int64_t)json_integer_value(json_object_get(j, "stop"));
        if (d->start < 0 || d->stop < 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s: decoder Strip has a negative start or stop",
                           s->name);
        HT_TRY(check_replacement(s, string_of(j, "content")));
        return copy(&d->pattern, s, string_of(j, "content"));
    }
    if (strcmp(type, "Metaspace") == 0) {
        d->kind = HT_DECODE_METASPACE;
        HT_TRY(check_replacement(s, string_of(j, "replacement")));
        HT_TRY(prepend_of(&d->prepend, s, j));
        return copy(&d->pattern, s, string_of(j, "replacement"));
    }
    return unknown(s, j);
}

/* Put more ids around the sequence: before the prefix there is, after the suffix. */
static enum ht_status surround(struct ht_tokenizer *t, const struct ht_ids *before,
                               const struct ht_ids *after)
{
    struct ht_ids prefix = { 0 };
    enum ht_status st = HT_OK;
    HT_TRY_GOTO(st, done, ht_ids_append(&prefix, before->ids, before->n));
    HT_TRY_GOTO(st, done, ht_ids_append(&prefix, t->prefix.ids, t->prefix.n));
    HT_TRY_GOTO(st, done, ht_ids_append(&t->suffix, after->ids, after->n));
    const struct ht_ids old = t->prefix;
    t->prefix = prefix;
    prefix = old;
done:
    ht_ids_free(&prefix);
    return st;
}

static enum ht_status append_special(struct ht_ids *out, const struct source *s, const json_t *id)
{
    if (json_is_integer(id) && json_integer_value(id) >= 0 &&
        json_integer_value(id) < s->t->n_ids && s->t->texts[json_integer_value(id)].p) {
        const int32_t value = (int32_t)json_integer_value(id);
        return ht_ids_append(out, &value, 1);
    }
    return HT_FAIL(HT_ERR_FORMAT, "%s: %s adds id %lld, which is no token", s->name, s->part,
                   (long long)json_integer_value(id));
}

static enum ht_status load_template(const struct source *s, const json_t *j, struct ht_ids *before,
                                    struct ht_ids *after)
{
    const json_t *single = json_object_get(j, "single");
    int n_sequences = 0;
    size_t i, k;
    json_t *piece, *id;

    json_array_foreach(single, i, piece)
    {
        const json_t *sequence = json_object_get(piece, "Sequence");
        const json_t *special = json_object_get(piece, "SpecialToken");
        if (sequence && strcmp(string_of(sequence, "id"), "A") == 0) {
            n_sequences++;
            continue;
        }
        const json_t *ids = json_object_get(
            json_object_get(json_object_get(j, "special_tokens"), string_of(special, "id")), "ids");
        if (!json_is_array(ids))
            return HT_FAIL(HT_ERR_FORMAT,
                           "%s: %s single[%zu] is neither A nor one of special_tokens", s->name,
                           s->part, i);
        json_array_foreach(ids, k, id) HT_TRY(append_special(n_sequences ? after : before, s, id));
    }
    if (n_sequences != 1)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %s single has the text %d times instead of once",
                       s->name, s->part, n_sequences);
    return HT_OK;
}

static enum ht_status add_processor(struct source *s, const json_t *j)
{
    const char *type = string_of(j, "type");
    struct ht_ids before = { 0 }, after = { 0 };
    enum ht_status st = HT_OK;

    if (strcmp(type, "ByteLevel") == 0) return HT_OK; // moves offsets only
    if (strcmp(type, "TemplateProcessing") == 0) {
        HT_TRY_GOTO(st, done, load_template(s, j, &before, &after));
    } else if (strcmp(type, "RobertaProcessing") == 0 || strcmp(type, "BertProcessing") == 0) {
        HT_TRY_GOTO(st, done,
                    append_special(&before, s, json_array_get(json_object_get(j, "cls"), 1)));
        HT_TRY_GOTO(st, done,
                    append_special(&after, s, json_array_get(json_object_get(j, "sep"), 1)));
    } else {
        return unknown(s, j);
    }
    st = surround(s->t, &before, &after);
done:
    ht_ids_free(&before);
    ht_ids_free(&after);
    return st;
}

static enum ht_status trie_init(struct ht_trie *r, size_t n_bytes)
{
    size_t n = 16;
    while (n < 2 * (n_bytes + 1)) n *= 2;
    r->mask = n - 1;
    r->keys = malloc(n * sizeof *r->keys);
    r->next = malloc(n * sizeof *r->next);
    r->added = malloc((n_bytes + 1) * sizeof *r->added);
    if (!r->keys || !r->next || !r->added)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for added tokens of %zu bytes", n_bytes);
    for (size_t i = 0; i < n; i++) r->keys[i] = UINT64_MAX;
    r->added[0] = -1;
    r->n_nodes = 1;
    return HT_OK;
}

static void trie_add(struct ht_trie *r, struct ht_text x, int32_t added)
{
    uint64_t node = 0;
    r->first[(unsigned char)x.p[0]] = true;
    for (size_t k = 0; k < x.n; k++) {
        const uint64_t key = node << 8 | (unsigned char)x.p[k];
        size_t i = ht_hash_pair(key) & r->mask;
        while (r->keys[i] != UINT64_MAX && r->keys[i] != key) i = (i + 1) & r->mask;
        if (r->keys[i] == UINT64_MAX) {
            r->keys[i] = key;
            r->next[i] = r->n_nodes;
            r->added[r->n_nodes++] = -1;
        }
        node = (uint64_t)r->next[i];
    }
    if (r->added[node] < 0) r->added[node] = added; // two that normalize alike: the first
}

/* What is looked for: the content, normalized where the token says so. */
static enum ht_status load_matches(struct ht_tokenizer *t)
{
    enum ht_status st = HT_OK;
    struct ht_splitter_work *patterns[HT_TOKENIZER_MAX_STAGES] = { 0 };
    struct ht_bytes text = { 0 }, scratch = { 0 }, pool = { 0 };
    size_t total[2] = { 0 }, used = 0;

    for (int i = 0; i < t->n_norms; i++)
        if (t->norms[i].pattern)
            HT_TRY_GOTO(st, done, ht_splitter_work_create(&patterns[i], t->norms[i].pattern));
    for (int64_t i = 0; i < t->n_added; i++) {
        struct ht_added *a = &t->added[i];
        a->match = t->texts[a->id];
        if (a->normalized && t->n_norms) {
            HT_TRY_GOTO(
                st, done,
                ht_tokenizer_normalize(t, patterns, &text, &scratch, a->match.p, a->match.n));
            a->match =
                (struct ht_text){ NULL, text.n }; // placed below, once the pool no longer moves
            HT_TRY_GOTO(st, done, ht_bytes_append(&pool, text.p, text.n));
        }
        total[a->normalized] += a->match.n;
    }
    t->added_pool = pool.p;
    pool.p = NULL;
    HT_TRY_GOTO(st, done, trie_init(&t->tries[0], total[0]));
    HT_TRY_GOTO(st, done, trie_init(&t->tries[1], total[1]));
    for (int64_t i = 0; i < t->n_added; i++) {
        struct ht_added *a = &t->added[i];
        if (!a->match.p) {
            a->match.p = t->added_pool + used;
            used += a->match.n;
        }
        if (a->match.n) trie_add(&t->tries[a->normalized], a->match, (int32_t)i);
    }
done:
    for (int i = 0; i < t->n_norms; i++) ht_splitter_work_free(patterns[i]);
    free(text.p);
    free(scratch.p);
    free(pool.p);
    return st;
}

static enum ht_status load_added(struct ht_tokenizer *t, const json_t *added, const char *name)
{
    size_t i;
    json_t *j;
    if (added && !json_is_null(added) && !json_is_array(added))
        return HT_FAIL(HT_ERR_FORMAT, "%s: added_tokens is not a list", name);
    t->added = calloc(json_array_size(added) + 1, sizeof *t->added);
    if (!t->added)
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu added tokens", name,
                       json_array_size(added));
    json_array_foreach(added, i, j)
    {
        const bool special = bool_of(j, "special", false);
        t->added[t->n_added++] = (struct ht_added){
            .id = (int32_t)json_integer_value(json_object_get(j, "id")),
            .lstrip = bool_of(j, "lstrip", false),
            .rstrip = bool_of(j, "rstrip", false),
            .single_word = bool_of(j, "single_word", false),
            .normalized = bool_of(j, "normalized", !special),
            .special = special,
        };
    }
    return load_matches(t);
}

enum ht_status ht_tokenizer_load_parts(struct ht_tokenizer *t, struct json_t *root,
                                       const char *name)
{
    struct source s = { t, name, "normalizer" };
    HT_TRY(each_step(&s, json_object_get(root, "normalizer"), "normalizers", add_norm));
    HT_TRY(load_added(t, json_object_get(root, "added_tokens"), name));
    s.part = "pre_tokenizer";
    HT_TRY(each_step(&s, json_object_get(root, "pre_tokenizer"), "pretokenizers", add_stage));
    t->byte_level = t->n_stages > 0 && t->stages[t->n_stages - 1].kind == HT_STAGE_BYTE_LEVEL;
    for (int i = 0; i < t->n_stages - 1;
         i++) // twice mapped bytes would be characters of characters
        if (t->byte_level && t->stages[i].kind == HT_STAGE_BYTE_LEVEL)
            return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: two pre_tokenizers ByteLevel", name);
    if (t->byte_level) t->stages[t->n_stages - 1].raw = true;
    s.part = "post_processor";
    HT_TRY(each_step(&s, json_object_get(root, "post_processor"), "processors", add_processor));
    s.part = "decoder";
    HT_TRY(each_step(&s, json_object_get(root, "decoder"), "decoders", add_decode));
    if (t->n_decodes == 0) t->decodes[t->n_decodes++].kind = HT_DECODE_SPACES;
    return HT_OK;
}
