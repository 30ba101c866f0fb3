/* tests/data/test_bpe_train.c: learnt merges against a recount of everything and against Hugging
 * Face's trainer. */
#include <jansson.h>

#include "data/bpe_train.h"
#include "data/pretokenize.h"
#include "tests/data/data_test.h"

#define GOLDEN HT_SOURCE_DIR "/tests/golden/tokenizer/"

struct documents {
    char *pool;
    const char *texts[4096];
    size_t lengths[4096];
    int64_t n;
};

static void learn(char **json, int64_t *learned, const struct documents *d, enum ht_bpe_style style,
                  int n_threads, int64_t vocab, const char *const *specials, int n_specials)
{
    struct ht_bpe_trainer *t;

    must(ht_bpe_trainer_create(&t, style, n_threads));
    must(ht_bpe_trainer_add(t, d->texts, d->lengths, d->n));
    must(ht_bpe_trainer_learn(t, vocab, specials, n_specials, json, learned));
    ht_bpe_trainer_free(t);
}

static json_t *parse(const char *text)
{
    json_error_t e;
    json_t *j = json_loads(text, JSON_REJECT_DUPLICATES, &e);
    ck_assert_msg(j != NULL, "line %d: %s", e.line, e.text);
    return j;
}

static json_t *model(const json_t *root)
{
    return json_object_get(root, "model");
}

/* Documents of random words over few letters: every pair is frequent, ties and overlaps abound. */
static void random_documents(struct documents *d, uint64_t seed)
{
    size_t at = 0;
    char *p = malloc((size_t)1 << 20);

    ck_assert_ptr_nonnull(p);
    d->pool = p;
    d->n = 1 + (int64_t)(ht_rng_u64(seed, 1, 0) % 20);
    for (int64_t i = 0; i < d->n; i++) {
        const uint64_t n_words = ht_rng_u64(seed, 2, (uint64_t)i) % 30;
        d->texts[i] = p + at;
        for (uint64_t w = 0; w < n_words; w++) {
            const uint64_t which = ht_rng_u64(seed, 3, (uint64_t)i << 8 | w) % 12;
            const uint64_t n = 1 + ht_rng_u64(seed, 4, which) % 24;
            p[at++] = ' ';
            for (uint64_t k = 0; k < n; k++)
                p[at++] = (char)('a' + ht_rng_u64(seed, 5, which << 8 | k) % (1 + seed % 3));
        }
        d->lengths[i] = (size_t)(p + at - d->texts[i]);
    }
}

/* --- the reference: tokens are strings, every merge counts all pairs of all words again --- */

struct ref_word {
    int32_t ids[64];
    int n;
};

static struct ref_word ref_words[4096];
static char ref_text[2048][64];

static int ref_cut(const struct documents *d, int n_specials)
{
    int n_words = 0;
    for (int64_t i = 0; i < d->n; i++) {
        for (size_t at = 0; at < d->lengths[i];) { // words: a blank and what follows
            struct ref_word *w = &ref_words[n_words++];
            w->n = 0;
            do { // the characters of byte b <= '~' are b itself, the blank's comes 188 + 32nd
                const char c = d->texts[i][at++];
                w->ids[w->n++] = n_specials + (c == ' ' ? 188 + 32 : c - '!');
            } while (at < d->lengths[i] && d->texts[i][at] != ' ');
        }
    }
    return n_words;
}

static int ref_best(int32_t best[2], int n_words, int32_t n_tokens)
{
    int *counts = calloc((size_t)n_tokens * (size_t)n_tokens, sizeof *counts), most = 0;

    ck_assert_ptr_nonnull(counts);
    for (int w = 0; w < n_words; w++)
        for (int i = 0; i + 1 < ref_words[w].n; i++)
            counts[ref_words[w].ids[i] * n_tokens + ref_words[w].ids[i + 1]]++;
    for (int32_t left = 0; left < n_tokens; left++)
        for (int32_t right = 0; right < n_tokens; right++)
            if (counts[left * n_tokens + right] > most) { // ties: the first, so the smallest ids
                most = counts[left * n_tokens + right];
                best[0] = left;
                best[1] = right;
            }
    free(counts);
    return most;
}

static void ref_apply(int n_words, const int32_t pair[2], int32_t id)
{
    for (int w = 0; w < n_words; w++) {
        int kept = 0;
        for (int i = 0; i < ref_words[w].n; i++) {
            const bool here = i + 1 < ref_words[w].n && ref_words[w].ids[i] == pair[0] &&
                              ref_words[w].ids[i + 1] == pair[1];
            ref_words[w].ids[kept++] = here ? id : ref_words[w].ids[i];
            i += here;
        }
        ref_words[w].n = kept;
    }
}

START_TEST(merges_match_a_full_recount)
{
    const char *specials[] = { "<|eos|>", "<|pad|>" };
    struct documents d;
    char *json;
    int64_t learned;

    random_documents(&d, (uint64_t)_i);
    learn(&json, &learned, &d, HT_BPE_GPT2, 2, 320, specials, 2);
    json_t *root = parse(json), *merges = json_object_get(model(root), "merges");
    const json_t *vocab = json_object_get(model(root), "vocab");
    const int n_words = ref_cut(&d, 2);
    int32_t n_tokens = 258, best[2] = { 0, 0 };

    for (int32_t id = 0; id < 94; id++) snprintf(ref_text[2 + id], 64, "%c", '!' + id);
    snprintf(ref_text[2 + 188 + 32], 64, "\xC4\xA0"); // the blank's character
    for (size_t i = 0; n_tokens < 320; i++) {
        if (ref_best(best, n_words, n_tokens) == 0) break;
        const json_t *merge = json_array_get(merges, i);
        ck_assert_msg(merge != NULL, "seed %d: merge %zu is missing", _i, i);
        ck_assert_str_eq(json_string_value(json_array_get(merge, 0)), ref_text[best[0]]);
        ck_assert_str_eq(json_string_value(json_array_get(merge, 1)), ref_text[best[1]]);
        snprintf(ref_text[n_tokens], 64, "%s%s", ref_text[best[0]], ref_text[best[1]]);
        ck_assert_int_eq(json_integer_value(json_object_get(vocab, ref_text[n_tokens])), n_tokens);
        ref_apply(n_words, best, n_tokens++);
    }
    ck_assert_int_eq(learned, n_tokens);
    ck_assert_uint_eq(json_object_size(vocab), (size_t)n_tokens);
    ck_assert_uint_eq(json_array_size(merges), (size_t)n_tokens - 258);
    json_decref(root);
    free(json);
    free(d.pool);
}
END_TEST

/* --- golden: tests/golden/tokenizer/train.py --- */

static void golden_documents(struct documents *d)
{
    size_t n;

    must(ht_file_read(&d->pool, &n, GOLDEN "train.corpus.txt", 1 << 20));
    d->n = 0;
    for (char *p = d->pool, *end; p <= d->pool + n; p = end + 1) {
        end = memchr(p, '\f', (size_t)(d->pool + n - p));
        if (!end) end = d->pool + n;
        d->texts[d->n] = p;
        d->lengths[d->n++] = (size_t)(end - p);
    }
    ck_assert_int_eq(d->n, 60);
}

static const char *const golden_specials[] = { "<|endoftext|>", "<|pad|>" };

START_TEST(golden_learns_what_hugging_face_learns)
{
    const char *path = _i ? GOLDEN "train.llama3.json" : GOLDEN "train.gpt2.json";
    struct documents d;
    char *json, *want_text;
    int64_t learned;
    size_t n;

    golden_documents(&d);
    learn(&json, &learned, &d, _i ? HT_BPE_LLAMA3 : HT_BPE_GPT2, 2, 1100, golden_specials, 2);
    must(ht_file_read(&want_text, &n, path, 1 << 20));
    json_t *root = parse(json), *want = parse(want_text);
    ck_assert(json_equal(json_object_get(model(root), "vocab"), json_object_get(want, "vocab")));
    ck_assert(json_equal(json_object_get(model(root), "merges"), json_object_get(want, "merges")));
    ck_assert_int_eq(learned, (int64_t)json_object_size(json_object_get(want, "vocab")));
    const json_t *added = json_object_get(root, "added_tokens");
    ck_assert_uint_eq(json_array_size(added), 2);
    ck_assert_str_eq(json_string_value(json_object_get(json_array_get(added, 1), "content")),
                     "<|pad|>");
    ck_assert_int_eq(json_integer_value(json_object_get(json_array_get(added, 1), "id")), 1);
    json_decref(root);
    json_decref(want);
    free(json);
    free(want_text);
    free(d.pool);
}
END_TEST

/* --- properties --- */

START_TEST(threads_and_order_change_nothing)
{
    struct documents d, turned;
    char *json, *other;
    int64_t learned;

    golden_documents(&d);
    turned = d;
    for (int64_t i = 0; i < d.n; i++) {
        turned.texts[i] = d.texts[d.n - 1 - i];
        turned.lengths[i] = d.lengths[d.n - 1 - i];
    }
    learn(&json, &learned, &d, HT_BPE_LLAMA3, 1, 700, golden_specials, 2);
    ck_assert_int_eq(learned, 700);
    for (int threads = 1; threads <= 5; threads += 2) {
        learn(&other, &learned, threads == 3 ? &turned : &d, HT_BPE_LLAMA3, threads, 700,
              golden_specials, 2);
        ck_assert_str_eq(json, other);
        free(other);
    }
    learn(&other, &learned, &turned, HT_BPE_LLAMA3, 1, 700, golden_specials, 2);
    ck_assert_str_eq(json, other);
    free(other);
    free(json);
    free(d.pool);
}
END_TEST

START_TEST(nothing_to_learn_from)
{
    struct documents d = { .texts = { "", "a", "\xFF\xFE" }, .lengths = { 0, 1, 2 }, .n = 3 };
    char *json;
    int64_t learned;

    learn(&json, &learned, &d, HT_BPE_GPT2, 2, 1000, NULL, 0);
    // "a" holds no pair; two broken bytes are two U+FFFD: EF BF BD EF BF BD
    ck_assert_int_eq(learned, 256 + 3);
    free(json);
    d.n = 0;
    learn(&json, &learned, &d, HT_BPE_GPT2, 2, 256, NULL, 0);
    ck_assert_int_eq(learned, 256);
    free(json);
}
END_TEST

/* Quadratic work would take hours: a word of 1 MiB of one letter, one of random letters, and runs
 * of blanks. */
START_TEST(huge_words_are_learnt_from)
{
    const size_t n = (size_t)1 << 20;
    struct documents d = { .n = 1, .lengths = { n } };
    char *json;
    int64_t learned;

    d.pool = malloc(n);
    ck_assert_ptr_nonnull(d.pool);
    d.texts[0] = d.pool;
    for (size_t i = 0; i < n; i++) {
        switch (_i) {
        case 0: d.pool[i] = 'a'; break;
        case 1: d.pool[i] = (char)('a' + ht_rng_u64(3, 1, i) % 26); break;
        default: d.pool[i] = i % 3 ? ' ' : '\n';
        }
    }
    learn(&json, &learned, &d, HT_BPE_LLAMA3, 2, 400, NULL, 0);
    ck_assert_int_le(learned, 400);
    ck_assert_int_gt(learned, 256 + 18);
    free(json);
    free(d.pool);
}
END_TEST

/* --- refusals --- */

static const struct {
    int64_t vocab;
    const char *specials[2], *message;
    int n_specials;
} bad[] = {
    { 255, { NULL }, "a vocabulary of 255", 0 },
    { 257, { "<a>", "<b>" }, "from 258", 2 },
    { 1000001, { NULL }, "a vocabulary of 1000001", 0 },
    { 500, { "<a>", "<a>" }, "'<a>' is given twice", 2 },
    { 500, { "<a>", "" }, "is empty", 2 },
    { 500, { "\xC3", NULL }, "not valid UTF-8", 1 },
    { 500, { "a", NULL }, "special token 'a' is also a piece", 1 },
    { 500, { "aa", NULL }, "special token 'aa' is also a piece", 1 },
};

START_TEST(bad_vocabularies_are_refused)
{
    const char *texts[] = { "aaaa bbb" };
    const size_t lengths[] = { 8 };
    struct ht_bpe_trainer *t;
    char *json = (char *)1;
    int64_t learned;

    must(ht_bpe_trainer_create(&t, HT_BPE_GPT2, 1));
    must(ht_bpe_trainer_add(t, texts, lengths, 1));
    expect(ht_bpe_trainer_learn(t, bad[_i].vocab, bad[_i].specials, bad[_i].n_specials, &json,
                                &learned),
           HT_ERR_ARG, bad[_i].message);
    ck_assert_ptr_null(json);
    ht_bpe_trainer_free(t);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("bpe_train");
    TCase *learns = tcase_create("learns"), *refuses = tcase_create("refuses");
    SRunner *runner = srunner_create(suite);

    tcase_add_loop_test(learns, merges_match_a_full_recount, 1, 13);
    tcase_add_loop_test(learns, golden_learns_what_hugging_face_learns, 0, 2);
    tcase_add_test(learns, threads_and_order_change_nothing);
    tcase_add_test(learns, nothing_to_learn_from);
    tcase_add_loop_test(learns, huge_words_are_learnt_from, 0, 3);
    suite_add_tcase(suite, learns);
    tcase_add_loop_test(refuses, bad_vocabularies_are_refused, 0, (int)(sizeof bad / sizeof *bad));
    suite_add_tcase(suite, refuses);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
