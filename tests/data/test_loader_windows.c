/* tests/data/test_loader_windows.c: what shuffling rows in windows is for, and windows of changing
 * size. */
#include "tests/data/stream_ref.h"

/* Long documents, short rows: a step of the stream is one document, a step of a window is of many.
 */
START_TEST(steps_mix_documents)
{
    enum { N_DOCS = 40, DOC_ROWS = 25, STEP = 20 };
    char path[PATH_MAX];
    struct ht_shard_writer *w;
    const struct ht_loader_dataset one = { join(path, folder, "long.h5"), 1 };
    struct ht_loader_options o = options(8, STEP, STEP);
    struct ht_loader *l;
    const struct ht_batch *b;
    int32_t ids[DOC_ROWS * 8];

    must(ht_shard_writer_create(&w, path, N_DOCS, ""));
    for (int32_t doc = 0; doc < N_DOCS; doc++) { // the token says which document
        for (int i = 0; i < DOC_ROWS * 8; i++) ids[i] = doc;
        must(ht_shard_writer_add(w, ids, DOC_ROWS * 8, 0));
    }
    must(ht_shard_writer_finish(w, NULL, NULL));
    ht_shard_writer_free(w);
    o.n_datasets = 1;
    o.datasets = &one;
    for (int shuffled = 0; shuffled < 2; shuffled++) {
        int fewest = N_DOCS, most = 0;
        o.window_rows = shuffled ? N_DOCS * DOC_ROWS : 1;
        must(ht_loader_open(&l, &o));
        for (int step = 0; step < 2 * N_DOCS * DOC_ROWS / STEP; step++) {
            bool seen[N_DOCS] = { false };
            int n = 0;
            must(ht_loader_next(l, &b, NULL));
            for (int64_t i = 0; i < b->n_tokens; i++) {
                n += !seen[b->ids[i]];
                seen[b->ids[i]] = true;
            }
            fewest = n < fewest ? n : fewest;
            most = n > most ? n : most;
        }
        if (shuffled) // 20 draws of 40 documents: 15.9 in the mean
            ck_assert_int_ge(fewest, 10);
        else
            ck_assert_int_le(most, 2);
        ht_loader_close(l);
    }
}
END_TEST

/* A resumed run ends the window that it is in as it was begun, then its own size holds: no row is
 * lost or comes twice. A state of a run without windows begins one. */
START_TEST(windows_may_change_size)
{
    static const int64_t sizes[] = { 300, 1, 40, 5000, 7 };
    struct ht_loader_options o = options(8, 3, 3);
    const struct ht_loader_dataset one = { paths[0], 1 };
    struct ht_loader_state s;
    struct ht_loader *l;
    const struct ht_batch *b;
    struct stream_ref r;
    uint8_t seen[2500] = { 0 };
    int64_t n_rows = 0, row = 0;

    o.n_datasets = 1;
    o.datasets = &one;
    for (int64_t doc = 0; doc < sets[0].n_docs; doc++) n_rows += doc_length(&sets[0], doc);
    n_rows = (n_rows + 7) / 8; // of one epoch: no row taken is behind it
    ck_assert_int_lt(n_rows, COUNT(seen));
    ck_assert_int_gt(n_rows, 1400);
    stream_ref_make(&r, &o, n_rows * 8);
    for (int i = 0; row < 1200; i++) {
        o.window_rows = sizes[i % COUNT(sizes)];
        must(ht_loader_open(&l, &o));
        if (i) must(ht_loader_set_state(l, &s));
        for (int step = 0; step < 31; step++, row += 3) {
            must(ht_loader_next(l, &b, NULL));
            for (int64_t k = 0; k < 3; k++) { // which row of the stream is it?
                int found = 0;
                for (int64_t at = 0; at < n_rows; at++)
                    if (memcmp(b->ids + 8 * k, r.token + 8 * at, 8 * sizeof *r.token) == 0) {
                        seen[at]++;
                        found++;
                    }
                ck_assert_int_eq(found, 1);
            }
        }
        ht_loader_get_state(l, &s);
        ck_assert_int_eq(s.row, row);
        if (s.window_done == 0) {
            s.seed = -1; // as a state of format 1 is read
            s.seq_len = 0;
        }
        ht_loader_close(l);
    }
    const int64_t whole = s.row - s.window_done;
    int64_t n = 0;
    for (int64_t at = 0; at < whole; at++) ck_assert_int_eq(seen[at], 1);
    for (int64_t at = 0; at < n_rows; at++) n += seen[at];
    ck_assert_int_eq(n, row);
    stream_ref_free(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loader windows");
    TCase *windows = tcase_create("windows");

    tcase_add_checked_fixture(windows, setup, teardown);
    tcase_add_test(windows, steps_mix_documents);
    tcase_add_test(windows, windows_may_change_size);
    suite_add_tcase(s, windows);
    return run_suite(s);
}
