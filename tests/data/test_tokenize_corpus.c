/* tests/data/test_tokenize_corpus.c: documents through all threads equal documents one by one. */
#include "data/shard.h"
#include "data/tokenize_corpus.h"
#include "tests/data/data_test.h"

#define TOKENIZER HT_SOURCE_DIR "/tests/golden/tokenizer/llama3.tokenizer.json"

enum { N_DOCS = 20000 }; // more than two batches

static char folder[PATH_MAX], text_path[PATH_MAX], shard_path[PATH_MAX], held_path[PATH_MAX];
static struct ht_tokenizer *tokenizer;

/* Document i as a line; the source drops empty lines, so none is empty. */
static size_t line(char out[512], int64_t i)
{
    const int64_t n_words = 1 + (int64_t)(ht_rng_u64(9, 1, (uint64_t)i) % 30);
    size_t at = 0;
    for (int64_t k = 0; k < n_words; k++)
        at +=
            (size_t)sprintf(out + at, "%s%llx", k ? " " : "",
                            (unsigned long long)(ht_rng_u64(9, 2, (uint64_t)(i << 8 | k)) % 5000));
    return at;
}

static void write_lines(const char *path, int64_t n_docs)
{
    FILE *f = fopen(path, "w");
    char text[512];
    ck_assert_ptr_nonnull(f);
    for (int64_t i = 0; i < n_docs; i++) {
        line(text, i);
        fprintf(f, "%s\n", text);
    }
    ck_assert_int_eq(fclose(f), 0);
}

static void setup(void)
{
    make_folder(folder);
    join(text_path, folder, "lines.txt");
    join(shard_path, folder, "out.h5");
    join(held_path, folder, "held.h5");
    must(ht_tokenizer_load(&tokenizer, TOKENIZER));
}

static void teardown(void)
{
    ht_tokenizer_free(tokenizer);
    ht_file_remove_tree(folder);
}

static enum ht_status tokenize(struct ht_corpus_job job, struct ht_corpus_counts counts[2])
{
    const struct ht_text_options lines = { .lines = true };
    char *path = text_path;
    struct ht_text_source *s;

    must(ht_text_open(&s, &path, 1, &lines));
    job.source = s;
    job.tokenizer = tokenizer;
    job.out_path = shard_path;
    const enum ht_status st = ht_corpus_tokenize(&job, counts);
    ht_text_close(s);
    return st;
}

/* Document i of the corpus is document `at` of the shard. */
static void expect_document(const struct ht_shard *s, struct ht_encoder *e, int64_t at, int64_t i,
                            int32_t eos)
{
    struct ht_ids want = { 0 };
    int32_t got[2048];
    char text[512];

    must(ht_encode(e, text, line(text, i), false, &want));
    if (eos >= 0) must(ht_ids_append(&want, &eos, 1));
    ck_assert_int_eq(ht_shard_doc_length(s, at), want.n);
    must(ht_shard_read(s, at, 0, want.n, got));
    ck_assert_mem_eq(got, want.ids, (size_t)want.n * sizeof *got);
    ht_ids_free(&want);
}

static const struct {
    int n_threads;
    int64_t every;
    int32_t eos;
} ways[] = { { 1, 0, -1 }, { 2, 0, 0 }, { 3, 7, 0 }, { 2, 2, -1 }, { 1, N_DOCS + 1, 0 } };

START_TEST(documents_keep_order_and_every_nth_is_held_out)
{
    const int64_t every = ways[_i].every;
    struct ht_corpus_counts counts[2];
    struct ht_shard *s, *held = NULL;
    struct ht_encoder *e;
    int64_t n[2] = { 0, 0 };

    write_lines(text_path, N_DOCS);
    must(tokenize((struct ht_corpus_job){ .eos_id = ways[_i].eos,
                                          .n_threads = ways[_i].n_threads,
                                          .holdout_every = every,
                                          .holdout_path = every ? held_path : NULL },
                  counts));
    must(ht_encoder_create(&e, tokenizer));
    must(ht_shard_open(&s, shard_path));
    if (every) must(ht_shard_open(&held, held_path));
    for (int64_t i = 0; i < N_DOCS; i++) {
        const int to = every > 0 && i % every == every - 1;
        expect_document(to ? held : s, e, n[to]++, i, ways[_i].eos);
    }
    ck_assert_int_eq(ht_shard_n_docs(s), n[0]);
    ck_assert_int_eq(counts[0].n_docs, n[0]);
    ck_assert_int_eq(counts[0].n_tokens, ht_shard_n_tokens(s));
    ck_assert_int_eq(counts[0].n_bytes, ht_shard_text_bytes(s));
    ck_assert_int_eq(counts[1].n_docs, n[1]);
    if (held) ck_assert_int_eq(ht_shard_n_docs(held), n[1]);
    if (held) ck_assert_int_eq(counts[1].n_tokens, ht_shard_n_tokens(held));
    ck_assert_str_eq(ht_shard_tokenizer_hash(s), ht_tokenizer_hash(tokenizer));
    ck_assert_int_eq(ht_shard_vocab_size(s), ht_tokenizer_vocab_size(tokenizer));
    ht_shard_close(s);
    ht_shard_close(held);
    ht_encoder_free(e);
}
END_TEST

/* Not threads and not the hour: a shard can be made again and compared by its hash. */
START_TEST(same_documents_same_bytes)
{
    struct ht_corpus_counts counts[2];
    char *first, *second;
    size_t n_first, n_second;

    write_lines(text_path, N_DOCS);
    must(tokenize((struct ht_corpus_job){ .eos_id = 0, .n_threads = 1 }, counts));
    must(ht_file_read(&first, &n_first, shard_path, (size_t)1 << 30));
    usleep(1100000);
    must(tokenize((struct ht_corpus_job){ .eos_id = 0, .n_threads = 3 }, counts));
    must(ht_file_read(&second, &n_second, shard_path, (size_t)1 << 30));
    ck_assert_uint_eq(n_first, n_second);
    ck_assert(memcmp(first, second, n_first) == 0);
    free(first);
    free(second);
}
END_TEST

START_TEST(no_documents_is_an_empty_shard)
{
    struct ht_corpus_counts counts[2];
    struct ht_shard *s;

    write_lines(text_path, 0);
    must(tokenize((struct ht_corpus_job){ .eos_id = 0, .n_threads = 2 }, counts));
    must(ht_shard_open(&s, shard_path));
    ck_assert_int_eq(ht_shard_n_docs(s), 0);
    ht_shard_close(s);
}
END_TEST

static bool stop_late(void *user, uint64_t done, uint64_t total, int64_t n_docs, int64_t n_tokens)
{
    int *calls = user;
    ck_assert_uint_le(done, total);
    ck_assert_int_le(n_docs, N_DOCS);
    ck_assert(n_tokens >= n_docs);
    return ++*calls < 2;
}

START_TEST(stopping_and_failing_leave_nothing)
{
    struct ht_corpus_counts counts[2];
    struct ht_corpus_job job = { .n_threads = 2, .holdout_every = 3, .holdout_path = held_path };
    int calls = 0;
    FILE *f;

    write_lines(text_path, N_DOCS);
    job.progress = stop_late;
    job.user = &calls;
    expect(tokenize(job, counts), HT_ERR_STOPPED, "stopped after");
    ck_assert_int_eq(calls, 2);
    ck_assert(!ht_file_exists(shard_path) && !ht_file_exists(held_path));

    strcat(text_path, ".jsonl"); // the last line is broken: the source fails in the third batch
    f = fopen(text_path, "w");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < N_DOCS; i++) fprintf(f, "{\"text\": \"%d\"}\n", i);
    fprintf(f, "{\"text\": 1}\n");
    ck_assert_int_eq(fclose(f), 0);
    job.progress = NULL;
    expect(tokenize(job, counts), HT_ERR_FORMAT, "lines.txt.jsonl:20001: not a string");
    ck_assert(!ht_file_exists(shard_path) && !ht_file_exists(held_path));
    ck_assert_int_eq(unlink(text_path), 0);
    text_path[strlen(text_path) - strlen(".jsonl")] = '\0';
    ck_assert_int_eq(unlink(text_path), 0);
    ck_assert_int_eq(rmdir(folder), 0); // no temporary file either
}
END_TEST

START_TEST(bad_holdout_is_refused)
{
    struct ht_corpus_counts counts[2];

    write_lines(text_path, 3);
    expect(
        tokenize((struct ht_corpus_job){ .holdout_every = _i, .holdout_path = held_path }, counts),
        HT_ERR_ARG, "it must be 2 or more");
}
END_TEST

START_TEST(words_are_counted_over_all_batches)
{
    const struct ht_text_options lines = { .lines = true };
    char *path = text_path, *json[2];
    int64_t learned;

    write_lines(text_path, N_DOCS);
    for (int k = 0; k < 2; k++) {
        struct ht_text_source *s;
        struct ht_bpe_trainer *t;
        must(ht_text_open(&s, &path, 1, &lines));
        must(ht_bpe_trainer_create(&t, HT_BPE_GPT2, 1 + k));
        must(ht_corpus_count_words(s, t, NULL, NULL));
        must(ht_bpe_trainer_learn(t, 600, NULL, 0, &json[k], &learned));
        ck_assert_int_eq(learned, 600);
        ht_bpe_trainer_free(t);
        ht_text_close(s);
    }
    ck_assert_str_eq(json[0], json[1]);
    free(json[0]);
    free(json[1]);
}
END_TEST

int main(void)
{
    Suite *suite = suite_create("tokenize_corpus");
    TCase *corpus = tcase_create("corpus");
    SRunner *runner = srunner_create(suite);

    tcase_add_checked_fixture(corpus, setup, teardown);
    tcase_add_loop_test(corpus, documents_keep_order_and_every_nth_is_held_out, 0,
                        (int)(sizeof ways / sizeof *ways));
    tcase_add_test(corpus, same_documents_same_bytes);
    tcase_add_test(corpus, no_documents_is_an_empty_shard);
    tcase_add_test(corpus, stopping_and_failing_leave_nothing);
    tcase_add_loop_test(corpus, bad_holdout_is_refused, -1, 0);
    tcase_add_loop_test(corpus, bad_holdout_is_refused, 1, 2);
    tcase_add_test(corpus, words_are_counted_over_all_batches);
    suite_add_tcase(suite, corpus);
    srunner_run_all(runner, CK_ENV);
    const int n_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return n_failed != 0;
}
