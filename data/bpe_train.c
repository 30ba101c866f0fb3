/* data/bpe_train.c: counting words, learning merges, writing tokenizer.json. */
#include "data/bpe_train.h"

#include <jansson.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "data/bpe_learn.h"
#include "data/pretokenize.h"

/* Words of one thread: open addressing over strings kept in one pool. */
struct word_map {
    struct ht_bpe_word *words; // order of first appearance
    int64_t n_words, word_room;
    int64_t *slots; // word number + 1, 0 = empty; n_slots is a power of two
    int64_t n_slots;
    char *pool;
    size_t pool_n, pool_room;
};

struct ht_bpe_trainer {
    enum ht_bpe_style style;
    int n_threads;
    struct ht_splitter *splitter;
    struct ht_splitter_work **work; // (n_threads)
    struct word_map *maps;          // (n_threads)
};

static uint64_t hash_bytes(const char *p, size_t n)
{
    uint64_t h = 0x9E3779B97F4A7C15u ^ n;
    for (size_t i = 0; i < n; i++) h = (h ^ (unsigned char)p[i]) * 0x100000001b3u;
    return h ^ (h >> 29);
}

static enum ht_status no_memory(void)
{
    return HT_FAIL(HT_ERR_MEMORY, "no memory to count words");
}

static enum ht_status grow_slots(struct word_map *m)
{
    const int64_t n = m->n_slots ? 2 * m->n_slots : 4096;
    int64_t *slots = calloc((size_t)n, sizeof *slots);

    if (!slots) return no_memory();
    for (int64_t i = 0; i < m->n_words; i++) {
        uint64_t at = hash_bytes(m->pool + m->words[i].text, m->words[i].n_bytes);
        while (slots[at & (uint64_t)(n - 1)]) at++;
        slots[at & (uint64_t)(n - 1)] = i + 1;
    }
    free(m->slots);
    m->slots = slots;
    m->n_slots = n;
    return HT_OK;
}

static enum ht_status new_word(struct word_map *m, const char *text, size_t n, int64_t count)
{
    if (m->n_words == m->word_room) {
        const int64_t room = m->word_room ? 2 * m->word_room : 4096;
        struct ht_bpe_word *words = realloc(m->words, (size_t)room * sizeof *words);
        if (!words) return no_memory();
        m->words = words;
        m->word_room = room;
    }
    if (m->pool_n + n > m->pool_room) {
        const size_t room = 2 * (m->pool_n + n) + 65536;
        char *pool = realloc(m->pool, room);
        if (!pool) return no_memory();
        m->pool = pool;
        m->pool_room = room;
    }
    memcpy(m->pool + m->pool_n, text, n);
    m->words[m->n_words++] = (struct ht_bpe_word){ m->pool_n, n, count };
    m->pool_n += n;
    return HT_OK;
}

static enum ht_status count_word(struct word_map *m, const char *text, size_t n, int64_t count)
{
    if (m->n_words * 2 >= m->n_slots) HT_TRY(grow_slots(m));
    uint64_t at = hash_bytes(text, n);
    for (;; at++) {
        int64_t *slot = &m->slots[at & (uint64_t)(m->n_slots - 1)];
        if (!*slot) {
            *slot = m->n_words + 1;
            return new_word(m, text, n, count);
        }
        struct ht_bpe_word *w = &m->words[*slot - 1];
        if (w->n_bytes == n && memcmp(m->pool + w->text, text, n) == 0) {
            w->count += count;
            return HT_OK;
        }
    }
}

static void free_map(struct word_map *m)
{
    free(m->words);
    free(m->slots);
    free(m->pool);
    *m = (struct word_map){ 0 };
}

enum ht_status ht_bpe_trainer_create(struct ht_bpe_trainer **out, enum ht_bpe_style style,
                                     int n_threads)
{
    enum ht_status st = HT_OK;
    struct ht_bpe_trainer *t = calloc(1, sizeof *t);

    *out = NULL;
    if (!t) return no_memory();
    t->style = style;
    t->n_threads = n_threads > 0 ? n_threads : omp_get_max_threads();
    t->work = calloc((size_t)t->n_threads, sizeof(struct ht_splitter_work *));
    t->maps = calloc((size_t)t->n_threads, sizeof *t->maps);
    if (!t->work || !t->maps) {
        st = no_memory();
        goto done;
    }
    HT_TRY_GOTO(st, done,
                ht_splitter_create(&t->splitter,
                                   style == HT_BPE_GPT2 ? HT_PATTERN_GPT2 : HT_PATTERN_LLAMA3));
    for (int i = 0; i < t->n_threads; i++)
        HT_TRY_GOTO(st, done, ht_splitter_work_create(&t->work[i], t->splitter));
    *out = t;
    t = NULL;
done:
    ht_bpe_trainer_free(t);
    return st;
}

void ht_bpe_trainer_free(struct ht_bpe_trainer *t)
{
    if (!t) return;
    for (int i = 0; i < t->n_threads; i++) {
        if (t->work) ht_splitter_work_free(t->work[i]);
        if (t->maps) free_map(&t->maps[i]);
    }
    free(t->work);
    free(t->maps);
    ht_splitter_free(t->splitter);
    free(t);
}

static enum ht_status count_text(struct word_map *m, struct ht_splitter_work *work,
                                 const char *text, size_t n)
{
    char *repaired = NULL;
    size_t n_repaired, at = 0, start, end;
    enum ht_status st = HT_OK;
    int matched;

    HT_TRY(ht_utf8_repair(&repaired, &n_repaired, text, n));
    if (repaired) text = repaired, n = n_repaired;
    for (;;) {
        HT_TRY_GOTO(st, done, ht_splitter_next(work, text, n, &at, &start, &end, &matched));
        if (end == start) break;
        HT_TRY_GOTO(st, done, count_word(m, text + start, end - start, 1));
    }
done:
    free(repaired);
    return st;
}

enum ht_status ht_bpe_trainer_add(struct ht_bpe_trainer *t, const char *const *texts,
                                  const size_t *n_bytes, int64_t n)
{
    enum ht_status first = HT_OK;
    char message[512] = "";

#pragma omp parallel for num_threads(t->n_threads) schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
        const int me = omp_get_thread_num();
        const enum ht_status st = count_text(&t->maps[me], t->work[me], texts[i], n_bytes[i]);
        if (st != HT_OK)
#pragma omp critical(bpe_trainer_failure)
            if (first == HT_OK) { // the message lives in the thread that failed
                first = st;
                strncpy(message, ht_error_message(), sizeof message - 1);
            }
    }
    return first == HT_OK ? HT_OK : HT_FAIL(first, "%s", message);
}

/* UTF-8 of the characters that stand for the bytes of a token. */
static char *token_text(const unsigned char *bytes, size_t n)
{
    char *text = malloc(2 * n + 1);
    size_t at = 0;
    for (size_t i = 0; text && i < n; i++) at += (size_t)ht_byte_char_utf8(text + at, bytes[i]);
    if (text) text[at] = '\0';
    return text;
}

static json_t *pre_tokenizer(enum ht_bpe_style style)
{
    if (style == HT_BPE_GPT2)
        return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0,
                         "trim_offsets", 1, "use_regex", 1);
    return json_pack("{s:s, s:[{s:s, s:{s:s}, s:s, s:b}, {s:s, s:b, s:b, s:b}]}", "type",
                     "Sequence", "pretokenizers", "type", "Split", "pattern", "Regex",
                     HT_PATTERN_LLAMA3, "behavior", "Isolated", "invert", 0, "type", "ByteLevel",
                     "add_prefix_space", 0, "trim_offsets", 1, "use_regex", 0);
}

static json_t *byte_level(void)
{
    return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 1,
                     "trim_offsets", 1, "use_regex", 1);
}

/* The model's vocabulary and merges. */
static enum ht_status describe_model(json_t *vocab, json_t *merges, const struct ht_bpe_vocab *v,
                                     const char *const *specials, int n_specials)
{
    for (int64_t id = 0; id < v->n_tokens; id++) {
        char *text = id < n_specials ? strdup(specials[id])
                                     : token_text(v->bytes + v->start[id], (size_t)v->length[id]);
        if (text && id >= n_specials && json_object_get(vocab, text)) {
            const enum ht_status st =
                HT_FAIL(HT_ERR_ARG,
                        "special token '%s' is also a piece of the text's words; choose "
                        "a text of its own, such as <|%s|>",
                        text, text);
            free(text);
            return st;
        }
        const int failed = !text || json_object_set_new(vocab, text, json_integer(id)) != 0;
        free(text);
        if (failed) return HT_FAIL(HT_ERR_MEMORY, "no memory for the vocabulary");
    }
    for (int64_t i = 0; i < v->n_merges; i++) {
        char *a =
            token_text(v->bytes + v->start[v->merges[2 * i]], (size_t)v->length[v->merges[2 * i]]);
        char *b = token_text(v->bytes + v->start[v->merges[2 * i + 1]],
                             (size_t)v->length[v->merges[2 * i + 1]]);
        const int failed =
            !a || !b || json_array_append_new(merges, json_pack("[s, s]", a, b)) != 0;
        free(a);
        free(b);
        if (failed) return HT_FAIL(HT_ERR_MEMORY, "no memory for the merges");
    }
    return HT_OK;
}

static enum ht_status describe(char **json, enum ht_bpe_style style, const struct ht_bpe_vocab *v,
                               const char *const *specials, int n_specials)
{
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array(), *root = NULL;
    enum ht_status st = HT_OK;

    for (int i = 0; i < n_specials; i++)
        json_array_append_new(added, json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", i,
                                               "content", specials[i], "single_word", 0, "lstrip",
                                               0, "rstrip", 0, "normalized", 0, "special", 1));
    HT_TRY_GOTO(st, done, describe_model(vocab, merges, v, specials, n_specials));
    root = json_pack(
        "{s:s, s:n, s:n, s:O, s:n, s:o, s:o, s:o, s:{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b,"
        " s:O, s:O}}",
        "version", "1.0", "truncation", "padding", "added_tokens", added, "normalizer",
        "pre_tokenizer", pre_tokenizer(style), "post_processor", byte_level(), "decoder",
        byte_level(), "model", "type", "BPE", "dropout", "unk_token", "continuing_subword_prefix",
        "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "ignore_merges", 0, "vocab", vocab,
        "merges", merges);
    *json = root ? json_dumps(root, JSON_INDENT(1)) : NULL;
    if (!*json) st = HT_FAIL(HT_ERR_MEMORY, "no memory for tokenizer.json");
done:
    json_decref(root);
    json_decref(vocab);
    json_decref(merges);
    json_decref(added);
    return st;
}

static enum ht_status check_special(const char *const *specials, int i)
{
    char *repaired = NULL;
    size_t n;

    if (!specials[i][0]) return HT_FAIL(HT_ERR_ARG, "a special token is empty");
    HT_TRY(ht_utf8_repair(&repaired, &n, specials[i], strlen(specials[i])));
    if (repaired) {
        free(repaired);
        return HT_FAIL(HT_ERR_ARG, "special token %d is not valid UTF-8", i);
    }
    for (int j = 0; j < i; j++)
        if (strcmp(specials[i], specials[j]) == 0)
            return HT_FAIL(HT_ERR_ARG, "special token '%s' is given twice", specials[i]);
    return HT_OK;
}

enum ht_status ht_bpe_trainer_learn(struct ht_bpe_trainer *t, int64_t vocab_size,
                                    const char *const *specials, int n_specials, char **json,
                                    int64_t *learned)
{
    struct word_map *all = &t->maps[0];
    struct ht_bpe_vocab vocab = { 0 };
    enum ht_status st = HT_OK;

    *json = NULL;
    if (vocab_size < 256 + n_specials || vocab_size > 1000000)
        return HT_FAIL(HT_ERR_ARG,
                       "a vocabulary of %lld; it must be from %d (256 bytes and the special "
                       "tokens) to 1000000",
                       (long long)vocab_size, 256 + n_specials);
    for (int i = 0; i < n_specials; i++) HT_TRY(check_special(specials, i));
    for (int k = 1; k < t->n_threads; k++) {
        for (int64_t i = 0; i < t->maps[k].n_words; i++) {
            const struct ht_bpe_word *w = &t->maps[k].words[i];
            HT_TRY(count_word(all, t->maps[k].pool + w->text, w->n_bytes, w->count));
        }
        free_map(&t->maps[k]);
    }
    HT_TRY_GOTO(st, done,
                ht_bpe_learn(&vocab, all->words, all->n_words, all->pool, vocab_size, n_specials));
    *learned = vocab.n_tokens;
    HT_TRY_GOTO(st, done, describe(json, t->style, &vocab, specials, n_specials));
done:
    ht_bpe_vocab_free(&vocab);
    return st;
}
