/* data/tokenizer_load.c: vocabulary, merges and added tokens of a tokenizer.json; ids <-> texts. */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/base/file.h"
#include "data/tokenizer_impl.h"

#define MAX_MERGES 4000000

enum ht_status ht_token_table_init(struct ht_token_table *t, const struct ht_text *texts,
                                   size_t n_max)
{
    size_t n = 16;
    while (n < 2 * n_max) n *= 2;
    t->texts = texts;
    t->mask = n - 1;
    t->slots = malloc(n * sizeof *t->slots);
    if (!t->slots) return HT_FAIL(HT_ERR_MEMORY, "no memory for a table of %zu tokens", n_max);
    for (size_t i = 0; i < n; i++) t->slots[i] = -1;
    return HT_OK;
}

int32_t ht_token_table_find(const struct ht_token_table *t, const char *p, size_t n)
{
    for (size_t i = XXH3_64bits(p, n) & t->mask;; i = (i + 1) & t->mask) {
        const int32_t id = t->slots[i];
        if (id < 0 || (t->texts[id].n == n && memcmp(t->texts[id].p, p, n) == 0)) return id;
    }
}

int32_t ht_token_table_add(struct ht_token_table *t, int32_t id)
{
    const struct ht_text x = t->texts[id];
    size_t i = XXH3_64bits(x.p, x.n) & t->mask;
    for (; t->slots[i] >= 0; i = (i + 1) & t->mask) {
        const struct ht_text y = t->texts[t->slots[i]];
        if (y.n == x.n && memcmp(x.p, y.p, x.n) == 0) return t->slots[i];
    }
    t->slots[i] = id;
    return -1;
}

const struct ht_merge *ht_tokenizer_merge(const struct ht_tokenizer *t, int32_t left, int32_t right)
{
    const uint64_t key = (uint64_t)left << 32 | (uint32_t)right;
    for (size_t i = ht_hash_pair(key) & t->merge_mask;; i = (i + 1) & t->merge_mask) {
        if (t->merges[i].key == key) return &t->merges[i];
        if (t->merges[i].key == HT_MERGE_FREE) return NULL;
    }
}

static enum ht_status check_id(int64_t *id, const json_t *j, const char *name, const char *token)
{
    *id = json_is_integer(j) ? (int64_t)json_integer_value(j) : -1;
    if (*id < 0 || *id >= HT_TOKENIZER_MAX_VOCAB)
        return HT_FAIL(HT_ERR_FORMAT, "%s: token \"%.60s\" has id %lld; ids are 0 to %d", name,
                       token, (long long)*id, HT_TOKENIZER_MAX_VOCAB - 1);
    return HT_OK;
}

static enum ht_status check_text(const char *text, size_t n, const char *name)
{
    if (n > HT_TOKENIZER_MAX_TOKEN_BYTES)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: token \"%.60s\"... has %zu bytes; at most %zu are accepted", name, text,
                       n, HT_TOKENIZER_MAX_TOKEN_BYTES);
    return HT_OK;
}

/* Put a token's text into the pool at *used. */
static void place(struct ht_tokenizer *t, size_t *used, int64_t id, const char *text, size_t n)
{
    char *p = t->pool + *used;
    memcpy(p, text, n);
    p[n] = '\0';
    *used += n + 1;
    t->texts[id] = (struct ht_text){ p, n };
}

/* Sizes first, then texts: model vocabulary, then the added tokens that are not in it. */
static enum ht_status load_texts(struct ht_tokenizer *t, json_t *vocab, json_t *added,
                                 const char *name)
{
    const char *text;
    json_t *j;
    size_t i, bytes = 0, used = 0;
    int64_t id, max_id = -1;

    json_object_foreach(vocab, text, j)
    {
        const size_t n = json_object_iter_key_len(json_object_key_to_iter(text));
        HT_TRY(check_id(&id, j, name, text));
        HT_TRY(check_text(text, n, name));
        if (id > max_id) max_id = id;
        bytes += n + 1;
    }
    json_array_foreach(added, i, j)
    {
        const json_t *content = json_object_get(j, "content");
        if (!json_is_string(content) || json_string_length(content) == 0)
            return HT_FAIL(HT_ERR_FORMAT, "%s: added_tokens[%zu] has no content", name, i);
        HT_TRY(check_id(&id, json_object_get(j, "id"), name, json_string_value(content)));
        HT_TRY(check_text(json_string_value(content), json_string_length(content), name));
        if (id > max_id) max_id = id;
        bytes += json_string_length(content) + 1;
    }
    if (max_id < 0) return HT_FAIL(HT_ERR_FORMAT, "%s: the vocabulary is empty", name);
    t->n_ids = max_id + 1;
    t->texts = calloc((size_t)t->n_ids, sizeof *t->texts);
    t->raw = calloc((size_t)t->n_ids, sizeof *t->raw);
    t->special = calloc((size_t)t->n_ids, 1);
    t->pool = malloc(bytes + 1);
    t->raw_pool = malloc(bytes + 1);
    if (!t->texts || !t->raw || !t->special || !t->pool || !t->raw_pool)
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %lld tokens of %zu bytes", name,
                       (long long)t->n_ids, bytes);
    HT_TRY(ht_token_table_init(&t->by_text, t->texts, (size_t)t->n_ids));
    json_object_foreach(vocab, text, j)
    {
        id = json_integer_value(j);
        if (t->texts[id].p)
            return HT_FAIL(HT_ERR_FORMAT, "%s: tokens \"%.60s\" and \"%.60s\" both have id %lld",
                           name, t->texts[id].p, text, (long long)id);
        place(t, &used, id, text, json_object_iter_key_len(json_object_key_to_iter(text)));
        (void)ht_token_table_add(&t->by_text, (int32_t)id); // keys of an object differ
    }
    json_array_foreach(added, i, j)
    {
        const json_t *content = json_object_get(j, "content");
        const char *p = json_string_value(content);
        const size_t n = json_string_length(content);
        id = json_integer_value(json_object_get(j, "id"));
        const int32_t known = ht_token_table_find(&t->by_text, p, n);
        if (known >= 0 && known != id)
            return HT_FAIL(HT_ERR_FORMAT, "%s: added token \"%.60s\" has id %lld, but also %d",
                           name, p, (long long)id, known);
        if (known < 0 && t->texts[id].p)
            return HT_FAIL(HT_ERR_FORMAT, "%s: tokens \"%.60s\" and \"%.60s\" both have id %lld",
                           name, t->texts[id].p, p, (long long)id);
        if (known < 0) {
            place(t, &used, id, p, n);
            (void)ht_token_table_add(&t->by_text, (int32_t)id);
        }
        if (json_is_true(json_object_get(j, "special"))) t->special[id] = 1;
    }
    return HT_OK;
}

/* The bytes behind a token's characters; false when some character stands for none. */
static bool raw_bytes(char *out, size_t *n_out, struct ht_text x)
{
    size_t n = 0;
    for (size_t i = 0; i < x.n;) {
        const unsigned char c = (unsigned char)x.p[i];
        uint32_t code = c;
        if (c >= 0x80) {
            if (c >= 0xE0 || i + 1 >= x.n) return false;
            code = (uint32_t)(c & 0x1F) << 6 | ((unsigned char)x.p[i + 1] & 0x3F);
        }
        const int byte = ht_byte_from_char(code);
        if (byte < 0) return false;
        out[n++] = (char)byte;
        i += c >= 0x80 ? 2 : 1;
    }
    *n_out = n;
    return true;
}

/* What BPE looks words and symbols up in. */
static enum ht_status index_model(struct ht_tokenizer *t, json_t *vocab)
{
    const char *text;
    char key[8];
    json_t *j;
    size_t used = 0;

    for (int64_t id = 0; id < t->n_ids; id++) {
        size_t n = 0;
        if (!t->texts[id].p || !raw_bytes(t->raw_pool + used, &n, t->texts[id])) continue;
        t->raw[id] = (struct ht_text){ t->raw_pool + used, n };
        used += n;
    }
    HT_TRY(
        ht_token_table_init(&t->model, t->byte_level ? t->raw : t->texts, json_object_size(vocab)));
    json_object_foreach(vocab, text, j)
    {
        const int32_t id = (int32_t)json_integer_value(j);
        if (t->model.texts[id].p) (void)ht_token_table_add(&t->model, id);
    }
    for (int b = 0; b < 256; b++) {
        const char byte = (char)b;
        t->byte_ids[b] = t->byte_level ? ht_token_table_find(&t->model, &byte, 1) : -1;
        (void)snprintf(key, sizeof key, "<0x%02X>", (unsigned)b);
        t->fallback_ids[b] = json_is_integer(json_object_get(vocab, key))
                                 ? (int32_t)json_integer_value(json_object_get(vocab, key))
                                 : -1;
    }
    return HT_OK;
}

static enum ht_status load_merge(struct ht_tokenizer *t, const json_t *vocab, const json_t *j,
                                 size_t rank, const char *name)
{
    char joined[2 * HT_TOKENIZER_MAX_TOKEN_BYTES];
    const char *a = NULL, *b = NULL;
    size_t n_a = 0, n_b = 0;

    if (json_is_string(j)) {
        a = json_string_value(j);
        if (strncmp(a, "#version", 8) == 0)
            return HT_OK; // header line of merges.txt, kept by old converters
        const size_t n = json_string_length(j);
        const char *space = memchr(a, ' ', n);
        if (space) {
            n_a = (size_t)(space - a);
            b = space + 1;
            n_b = n - n_a - 1;
            if (memchr(b, ' ', n_b)) b = NULL;
        }
    } else if (json_array_size(j) == 2 && json_is_string(json_array_get(j, 0)) &&
               json_is_string(json_array_get(j, 1))) {
        a = json_string_value(json_array_get(j, 0));
        n_a = json_string_length(json_array_get(j, 0));
        b = json_string_value(json_array_get(j, 1));
        n_b = json_string_length(json_array_get(j, 1));
    }
    if (!b)
        return HT_FAIL(HT_ERR_FORMAT, "%s: model.merges[%zu] is not a pair of tokens", name, rank);
    const json_t *ja = json_object_getn(vocab, a, n_a), *jb = json_object_getn(vocab, b, n_b),
                 *jab = NULL;
    if (ja && jb && n_a + n_b <= HT_TOKENIZER_MAX_TOKEN_BYTES) {
        memcpy(joined, a, n_a);
        memcpy(joined + n_a, b, n_b);
        jab = json_object_getn(vocab, joined, n_a + n_b);
    }
    if (!jab)
        return HT_FAIL(HT_ERR_FORMAT,
                       "%s: model.merges[%zu], \"%.*s\" + \"%.*s\": %s is not in the vocabulary",
                       name, rank, (int)(n_a < 60 ? n_a : 60), a, (int)(n_b < 60 ? n_b : 60), b,
                       !ja   ? "the first"
                       : !jb ? "the second"
                             : "the result");
    const uint64_t key = (uint64_t)json_integer_value(ja) << 32 | (uint64_t)json_integer_value(jb);
    size_t i = ht_hash_pair(key) & t->merge_mask;
    while (t->merges[i].key != HT_MERGE_FREE && t->merges[i].key != key)
        i = (i + 1) & t->merge_mask;
    // A pair given twice keeps its later rank, as in the reference implementation.
    t->merges[i] = (struct ht_merge){ key, (int32_t)rank, (int32_t)json_integer_value(jab) };
    return HT_OK;
}

static enum ht_status load_merges(struct ht_tokenizer *t, const json_t *vocab, json_t *merges,
                                  const char *name)
{
    const size_t n_merges = json_array_size(merges);
    size_t n = 16, i;
    json_t *j;

    if (!json_is_array(merges)) return HT_FAIL(HT_ERR_FORMAT, "%s: model.merges is missing", name);
    if (n_merges > MAX_MERGES)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %zu merges; at most %d are accepted", name, n_merges,
                       MAX_MERGES);
    while (n < 2 * n_merges) n *= 2;
    t->merges = malloc(n * sizeof *t->merges);
    if (!t->merges) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu merges", name, n_merges);
    t->merge_mask = n - 1;
    for (i = 0; i < n; i++) t->merges[i].key = HT_MERGE_FREE;
    json_array_foreach(merges, i, j) HT_TRY(load_merge(t, vocab, j, i, name));
    return HT_OK;
}

/* Settings of the model that change its ids. */
static enum ht_status load_model(struct ht_tokenizer *t, const json_t *model, const json_t *vocab,
                                 const char *name)
{
    static const char *const affixes[] = { "continuing_subword_prefix", "end_of_word_suffix" };
    const json_t *dropout = json_object_get(model, "dropout");
    const json_t *unk = json_object_get(model, "unk_token");

    for (int i = 0; i < 2; i++) {
        const json_t *j = json_object_get(model, affixes[i]);
        if (json_is_string(j) && json_string_length(j) > 0)
            return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: model.%s is \"%.60s\"; only null is supported",
                           name, affixes[i], json_string_value(j));
    }
    if (json_is_number(dropout) && json_number_value(dropout) != 0.0)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: model.dropout is %g; only null is supported", name,
                       json_number_value(dropout));
    t->byte_fallback = json_is_true(json_object_get(model, "byte_fallback"));
    t->fuse_unk = json_is_true(json_object_get(model, "fuse_unk"));
    t->ignore_merges = json_is_true(json_object_get(model, "ignore_merges"));
    t->unk_id = -1;
    if (json_is_string(unk)) {
        const json_t *id = json_object_get(vocab, json_string_value(unk));
        if (!id)
            return HT_FAIL(HT_ERR_FORMAT, "%s: model.unk_token \"%.60s\" is not in the vocabulary",
                           name, json_string_value(unk));
        t->unk_id = (int32_t)json_integer_value(id);
    }
    return HT_OK;
}

enum ht_status ht_tokenizer_parse(struct ht_tokenizer **out, const char *json, size_t n_bytes,
                                  const char *name)
{
    enum ht_status st = HT_OK;
    struct ht_tokenizer *t = NULL;
    json_t *root = NULL, *model, *vocab, *added;
    json_error_t error;

    *out = NULL;
    if (n_bytes > HT_TOKENIZER_MAX_JSON_BYTES)
        return HT_FAIL(HT_ERR_FORMAT, "%s has %zu bytes; at most %zu are accepted", name, n_bytes,
                       HT_TOKENIZER_MAX_JSON_BYTES);
    root = json_loadb(json, n_bytes, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &error);
    if (!root)
        return HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", name, error.line, error.column, error.text);
    t = calloc(1, sizeof *t);
    if (!t) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a tokenizer", name);
        goto done;
    }
    model = json_object_get(root, "model");
    vocab = json_object_get(model, "vocab");
    added = json_object_get(root, "added_tokens");
    const json_t *type = json_object_get(model, "type");
    if (!json_is_object(model) || (type && !json_is_string(type))) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: there is no model; is it a tokenizer.json?", name);
        goto done;
    }
    if (type && strcmp(json_string_value(type), "BPE") != 0) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: model.type is \"%.60s\"; only \"BPE\" is known", name,
                     json_string_value(type));
        goto done;
    }
    if (!json_is_object(vocab)) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: model.vocab is missing", name);
        goto done;
    }
    HT_TRY_GOTO(st, done, load_texts(t, vocab, added, name));
    HT_TRY_GOTO(st, done, load_model(t, model, vocab, name));
    HT_TRY_GOTO(st, done, load_merges(t, vocab, json_object_get(model, "merges"), name));
    HT_TRY_GOTO(st, done, ht_tokenizer_load_parts(t, root, name));
    HT_TRY_GOTO(st, done, index_model(t, vocab));
    const XXH128_hash_t h = XXH3_128bits(json, n_bytes);
    (void)snprintf(t->hash, sizeof t->hash, "%016llx%016llx", (unsigned long long)h.high64,
                   (unsigned long long)h.low64);
    *out = t;
    t = NULL;
done:
    json_decref(root);
    ht_tokenizer_free(t);
    return st;
}

enum ht_status ht_tokenizer_load(struct ht_tokenizer **out, const char *path)
{
    char *json = NULL;
    size_t n = 0;

    *out = NULL;
    HT_TRY(ht_file_read(&json, &n, path, HT_TOKENIZER_MAX_JSON_BYTES));
    const enum ht_status st = ht_tokenizer_parse(out, json, n, path);
    free(json);
    return st;
}

void ht_tokenizer_free(struct ht_tokenizer *t)
{
    if (!t) return;
    for (int i = 0; i < t->n_norms; i++) {
        ht_splitter_free(t->norms[i].pattern);
        free(t->norms[i].content);
    }
    for (int i = 0; i < t->n_stages; i++) ht_splitter_free(t->stages[i].pattern);
    for (int i = 0; i < t->n_decodes; i++) {
        free(t->decodes[i].pattern);
        free(t->decodes[i].content);
    }
    for (int i = 0; i < 2; i++) {
        free(t->tries[i].keys);
        free(t->tries[i].next);
        free(t->tries[i].added);
    }
    ht_ids_free(&t->prefix);
    ht_ids_free(&t->suffix);
    free(t->added);
    free(t->added_pool);
    free(t->merges);
    free(t->model.slots);
    free(t->by_text.slots);
    free(t->raw_pool);
    free(t->pool);
    free(t->special);
    free(t->raw);
    free(t->texts);
    free(t);
}

int64_t ht_tokenizer_vocab_size(const struct ht_tokenizer *t)
{
    return t->n_ids;
}

const char *ht_tokenizer_hash(const struct ht_tokenizer *t)
{
    return t->hash;
}

int32_t ht_tokenizer_find(const struct ht_tokenizer *t, const char *token)
{
    return ht_token_table_find(&t->by_text, token, strlen(token));
}

const char *ht_tokenizer_token(const struct ht_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_ids ? t->texts[id].p : NULL;
}

bool ht_tokenizer_is_special(const struct ht_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_ids && t->special[id];
}
