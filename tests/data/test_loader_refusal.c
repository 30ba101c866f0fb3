/* tests/data/test_loader_refusal.c: options, data and states that the loader must refuse, by name.
 */
#include <fcntl.h>
#include <string.h>

#include "tests/data/loader_world.h"

START_TEST(options_are_checked)
{
    struct ht_loader *l;
    struct ht_loader_options o;
    struct ht_loader_dataset d = { paths[1], 1 };
    char path[PATH_MAX];

#define REFUSED(change, want, text)                                                                \
    do {                                                                                           \
        o = options(64, 12, 2);                                                                    \
        change;                                                                                    \
        expect(ht_loader_open(&l, &o), want, text);                                                \
        ck_assert_ptr_null(l);                                                                     \
    } while (0)
    REFUSED(o.n_datasets = 0, HT_ERR_ARG, "0 datasets");
    REFUSED(o.n_datasets = 65, HT_ERR_ARG, "65 datasets");
    REFUSED(o.n_ranks = 5, HT_ERR_ARG, "12 rows a step do not divide into 5 ranks");
    REFUSED(o.micro_rows = 5, HT_ERR_ARG, "micro-batches of 5");
    REFUSED(o.rank = 1, HT_ERR_ARG, "rank 1 of 1");
    REFUSED(o.seq_len = 0, HT_ERR_ARG, "rows of 0 tokens");
    REFUSED(o.seq_len = INT64_MAX, HT_ERR_ARG, "below 2^31");
    REFUSED(o.seq_len = 1 << 30, HT_ERR_ARG, "below 2^31");
    REFUSED(o.window_rows = -1, HT_ERR_ARG, "window of -1 rows");
    REFUSED(o.window_rows = 1 << 21, HT_ERR_ARG, "window of 2097152 rows; 0 to 1048576");
    REFUSED(o.seed = UINT64_MAX, HT_ERR_ARG, "seed is 18446744073709551615");
    REFUSED(o.prefetch_batches = -1, HT_ERR_ARG, "prefetch_batches is -1");
    o = options(64, 12, 2);
    o.datasets = &d;
    o.n_datasets = 1;
    d.weight = -1;
    expect(ht_loader_open(&l, &o), HT_ERR_ARG, "dataset 0 is -1");
    d.weight = 1;
    d.path = join(path, folder, "nowhere.h5");
    expect(ht_loader_open(&l, &o), HT_ERR_IO, "nowhere.h5: No such file");
    must(ht_file_make_dirs(join(path, folder, "empty")));
    expect(ht_loader_open(&l, &o), HT_ERR_FORMAT, "no *.h5 shard");
    const struct doc_set none = { 9, 1, 0, 10 };
    write_shard(join(path, folder, "none.h5"), &none, 0, 1);
    expect(ht_loader_open(&l, &o), HT_ERR_FORMAT, "no tokens in 1 documents");
    ht_loader_close(NULL);
}
END_TEST

START_TEST(tokenizers_must_agree)
{
    char path[PATH_MAX];
    struct ht_shard_writer *w;
    struct ht_loader_options o = options(64, 12, 2);
    struct ht_loader *l;
    const int32_t id = 1;
    const struct ht_loader_dataset two[2] = { { paths[1], 1 },
                                              { join(path, folder, "web/other.h5"), 1 } };

    must(ht_shard_writer_create(&w, path, 70000, "beef"));
    must(ht_shard_writer_add(w, &id, 1, 1));
    must(ht_shard_writer_finish(w, NULL, NULL));
    ht_shard_writer_free(w);
    expect(ht_loader_open(&l, &o), HT_ERR_FORMAT, "web/other.h5 has tokenizer beef");
    o.n_datasets = 2;
    o.datasets = two;
    expect(ht_loader_open(&l, &o), HT_ERR_FORMAT, "has tokenizer beef");
}
END_TEST

/* The model's vocabulary is smaller than the shards': an id beyond it is refused where it is read.
 */
START_TEST(ids_fit_the_model)
{
    struct ht_loader_options o = options(64, 12, 2);
    struct ht_loader *l;
    const struct ht_batch *b;

    o.vocab_size = 60000;
    o.prefetch_batches = _i;
    must(ht_loader_open(&l, &o));
    enum ht_status st = HT_OK;
    for (int i = 0; i < 100 && st == HT_OK; i++) st = ht_loader_next(l, &b, NULL);
    expect(st, HT_ERR_FORMAT, "the model has 60000");
    ck_assert_ptr_null(b);
    expect(ht_loader_next(l, &b, NULL), HT_ERR_FORMAT, "the model has 60000"); // and stays so
    ht_loader_close(l);
    o.vocab_size = 70000;
    must(ht_loader_open(&l, &o));
    for (int i = 0; i < 100; i++) must(ht_loader_next(l, &b, NULL));
    ht_loader_close(l);
}
END_TEST

START_TEST(damage_reaches_the_caller)
{
    struct ht_loader_options o = options(64, 12, 2);
    struct ht_loader *l;
    const struct ht_batch *b;
    enum ht_status st = HT_OK;
    char *text;
    size_t n;

    o.prefetch_batches = _i;
    must(ht_file_read(&text, &n, paths[1], 1 << 28));
    const int fd = open(paths[1], O_RDWR); // tokens are the largest part: its middle is theirs
    text[n / 2] ^= 4;
    ck_assert_int_eq(pwrite(fd, text + n / 2, 1, (off_t)n / 2), 1);
    close(fd);
    free(text);
    must(ht_loader_open(&l, &o));
    for (int i = 0; i < 100 && st == HT_OK; i++) st = ht_loader_next(l, &b, NULL);
    expect(st, HT_ERR_FORMAT, "books.h5: /tokens block 0");
    ht_loader_close(l);
}
END_TEST

/* A state taken in the middle of a run, for the tests that spoil it. */
static struct ht_loader_state some_state(const struct ht_loader_options *o)
{
    struct ht_loader_state s;
    struct ht_loader *l;
    const struct ht_batch *b;

    must(ht_loader_open(&l, o));
    do {
        must(ht_loader_next(l, &b, NULL));
        ht_loader_get_state(l, &s);
    } while (s.row < 1000 || s.current != 0 || (o->window_rows > 1 && s.window_done == 0));
    ht_loader_close(l);
    return s;
}

START_TEST(states_are_checked)
{
    struct ht_loader_options o = options(64, 2, 2);
    const struct ht_loader_state good = some_state(&o);
    struct ht_loader_state s;
    struct ht_loader *l;

    must(ht_loader_open(&l, &o));
#define SPOILED(change, text)                                                                      \
    do {                                                                                           \
        s = good;                                                                                  \
        change;                                                                                    \
        expect(ht_loader_set_state(l, &s), HT_ERR_FORMAT, text);                                   \
    } while (0)
    SPOILED(s.n_datasets = 2, "2 datasets; the recipe has 3");
    SPOILED(s.row = -1, "row is -1");
    SPOILED(s.dataset[1].fingerprint ^= 1, "dataset 1 has fingerprint");
    SPOILED(s.dataset[1].epoch = -1, "epoch of dataset 1 is -1");
    SPOILED(s.dataset[0].doc = 401, "doc of dataset 0 is 401");
    SPOILED(s.dataset[0].docs_visited++, "docs_visited of dataset 0");
    SPOILED(s.dataset[0].epoch++, "docs_visited of dataset 0");
    SPOILED(s.dataset[0].tokens = 1, "tokens of dataset 0 is 1 in epoch");
    SPOILED(s.current = 3, "current is 3");
    SPOILED(s.current = -1, "current is -1, yet");
    SPOILED(s.seed = 6, "seed is 6, the recipe's is 5");
    SPOILED(s.window_rows = 1, "window_rows is 1; 0, or 2 to");
    SPOILED(s.window_rows = -1, "window_rows is -1");
    SPOILED(s.window_rows = 1 << 20, "window_rows is 1048576");
    SPOILED(s.window_rows = 9, "window_done is 0 of 9 rows");
    SPOILED(s.window_done = 1, "window_rows is 0");
    SPOILED(s.current_doc++, "current_doc is");
    SPOILED(s.current_pos = 0, "current_pos is 0");
    SPOILED(s.current_pos = 1000, "current_pos is 1000");
    must(ht_loader_set_state(l, &good)); // a refusal leaves the loader usable
    ht_loader_get_state(l, &s);
    ck_assert_mem_eq(&s, &good, sizeof s);
    ht_loader_close(l);

    o.seed = 6; // documents would be seen twice and others not at all
    must(ht_loader_open(&l, &o));
    expect(ht_loader_set_state(l, &good), HT_ERR_FORMAT, "resume with data.seed = 5");
    s = good;
    s.seed = -1; // a state of format 1 does not know it
    expect(ht_loader_set_state(l, &s), HT_ERR_FORMAT, "seed 6 puts document");
    ht_loader_close(l);
}
END_TEST

/* States taken inside a window: its rows must be cut and shuffled again as they were. */
START_TEST(windows_are_checked)
{
    struct ht_loader_options o = options(64, 2, 2);
    struct ht_loader_state s;
    struct ht_loader *l;

    o.window_rows = 100;
    const struct ht_loader_state good = some_state(&o);
    must(ht_loader_open(&l, &o));
    SPOILED(s.window_rows = s.window_done, "window_done is");
    SPOILED(s.window_done = s.row + 1; s.window_rows = s.row + 2, "window_");
    SPOILED(s.window_done = -1, "window_done is -1");
    SPOILED(s.window_rows = 0, "window_rows is 0");
    SPOILED(s.seq_len = 32, "data.seq_len is 64: resume with data.seq_len = 32");
    SPOILED(s.seed++, "seed is 6");
    must(ht_loader_set_state(l, &good));
    ht_loader_get_state(l, &s);
    ck_assert_mem_eq(&s, &good, sizeof s);
    ht_loader_close(l);
    o.shuffle = false;
    must(ht_loader_open(&l, &o));
    expect(ht_loader_set_state(l, &good), HT_ERR_FORMAT, "resume with data.shuffle = true");
    ht_loader_close(l);
}
END_TEST

START_TEST(other_data_are_refused)
{
    const struct ht_loader_options o = options(64, 2, 2);
    const struct ht_loader_state good = some_state(&o);
    struct doc_set changed = sets[1];
    struct ht_loader *l;
    char path[PATH_MAX], to[PATH_MAX];

    changed.seed = 23; // as many documents, other tokens
    write_shard(paths[1], &changed, 0, changed.n_docs);
    must(ht_loader_open(&l, &o));
    expect(ht_loader_set_state(l, &good), HT_ERR_FORMAT, "the data have changed since");
    ht_loader_close(l);
    write_shard(paths[1], &sets[1], 0, sets[1].n_docs); // the old ones again
    must(ht_loader_open(&l, &o));
    must(ht_loader_set_state(l, &good));
    ht_loader_close(l);
    rename(join(path, folder, "web/a.h5"), join(to, folder, "web/z.h5")); // another order of shards
    must(ht_loader_open(&l, &o));
    expect(ht_loader_set_state(l, &good), HT_ERR_FORMAT, "dataset 0 has fingerprint");
    ht_loader_close(l);
}
END_TEST

static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    char *out = malloc(strlen(text) + strlen(to) + 1);

    ck_assert_msg(at != NULL, "'%s' is not in %s", from, text);
    sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return out;
}

/* As earlier versions wrote it, with rows in the order of the stream: a window begins there. */
START_TEST(old_states_are_read)
{
    struct ht_loader_options o = options(64, 2, 2);
    const struct ht_loader_state good = some_state(&o);
    struct ht_loader_state s;
    struct ht_loader *l;
    char *text, *old;

    must(ht_loader_state_to_json(&text, &good));
    char *begin = strstr(text, "\"window_rows\""), *end = strstr(text, "\"current\"");
    memmove(begin, end, strlen(end) + 1);
    old = replaced(text, "\"format\": 2", "\"format\": 1");
    must(ht_loader_state_from_json(&s, old, "state.json"));
    ck_assert_int_eq(s.seed, -1);
    ck_assert_int_eq(s.row, good.row);
    o.window_rows = 100;
    must(ht_loader_open(&l, &o));
    must(ht_loader_set_state(l, &s));
    ht_loader_get_state(l, &s);
    ck_assert_mem_eq(&s, &good, sizeof s);
    ht_loader_close(l);
    free(old);
    free(text);
}
END_TEST

START_TEST(mangled_json_is_refused)
{
    static const struct {
        const char *from, *to, *message;
    } mangled[] = {
        { "\"format\": 2", "\"format\": 3", "\"format\" is 3; this program reads 1 and 2" },
        { "\"format\": 2", "\"format\": 1", "10 keys; 6 are known" },
        { "\"row\":", "\"rows\":", "\"row\" is missing" },
        { "\"row\":", "\"extra\": 1, \"row\":", "11 keys; 10 are known" },
        { "\"row\":", "\"row\": 1, \"row\":", "duplicate" },
        { "\"row\": ", "\"row\": -", "\"row\" is -" },
        { "\"row\": ", "\"row\": 0.", "of another type" },
        { "\"row\": ", "\"row\": 99999999999999999999", "state.json:" },
        { "\"current\": 0", "\"current\": 3", "\"current\" is 3; there are 3" },
        { "\"current\": 0", "\"current\": -2", "the least is -1" },
        { "\"datasets\": [", "\"datasets\": [7, ", "datasets[0]: not an object" },
        { "\"datasets\": [", "\"other\": [], \"datasets\": [", "keys" },
        { "\"epoch\": ", "\"epoch\": -1", "datasets[0]: \"epoch\" is -1" },
        { "\"doc\": ", "\"doc\": null, \"x\": ", "\"doc\" is of another type" },
        { "\"docs_visited\"", "\"docs\"", "\"docs_visited\" is missing" },
        { "\"fingerprint\": \"", "\"fingerprint\": \"0", "16 hexadecimal digits" },
        { "\"fingerprint\": \"", "\"fingerprint\": 3, \"x\": \"", "keys" },
        { "{", "[", "state.json:" },
    };
    const struct ht_loader_options o = options(64, 2, 2);
    const struct ht_loader_state good = some_state(&o);
    struct ht_loader_state s;
    char *text, *bad;

    must(ht_loader_state_to_json(&text, &good));
    for (size_t i = 0; i < sizeof mangled / sizeof *mangled; i++) {
        bad = replaced(text, mangled[i].from, mangled[i].to);
        expect(ht_loader_state_from_json(&s, bad, "state.json"), HT_ERR_FORMAT, mangled[i].message);
        free(bad);
    }
    for (size_t n = strlen(text); n-- > 0;) { // every beginning of it
        bad = strndup(text, n);
        ck_assert_int_eq(ht_loader_state_from_json(&s, bad, "state.json"), HT_ERR_FORMAT);
        free(bad);
    }
    expect(ht_loader_state_from_json(&s, "[]", "state.json"), HT_ERR_FORMAT, "not an object");
    // one byte changed anywhere: refused here or by the loader, or the numbers are still good ones
    struct ht_loader *l;
    must(ht_loader_open(&l, &o));
    int refused = 0;
    for (uint64_t k = 0; k < 3000; k++) {
        const size_t at = ht_rng_u64(51, 1, k) % strlen(text);
        const char old = text[at];
        text[at] = (char)(32 + ht_rng_u64(51, 2, k) % 95);
        if (ht_loader_state_from_json(&s, text, "state.json") != HT_OK ||
            ht_loader_set_state(l, &s) != HT_OK)
            refused++;
        text[at] = old;
    }
    ck_assert_int_gt(refused, 2000);
    must(ht_loader_state_from_json(&s, text, "state.json"));
    ck_assert_mem_eq(&s, &good, sizeof s);
    ht_loader_close(l);
    free(text);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loader refusal");
    TCase *refusal = tcase_create("refusal");

    tcase_add_checked_fixture(refusal, setup, teardown);
    tcase_add_test(refusal, options_are_checked);
    tcase_add_test(refusal, tokenizers_must_agree);
    tcase_add_loop_test(refusal, ids_fit_the_model, 0, 2);
    tcase_add_loop_test(refusal, damage_reaches_the_caller, 0, 2);
    tcase_add_test(refusal, states_are_checked);
    tcase_add_test(refusal, windows_are_checked);
    tcase_add_test(refusal, old_states_are_read);
    tcase_add_test(refusal, other_data_are_refused);
    tcase_add_test(refusal, mangled_json_is_refused);
    suite_add_tcase(s, refusal);
    return run_suite(s);
}
