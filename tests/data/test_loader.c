/* tests/data/test_loader.c: every batch against a stream written out naively; stops, ranks, one
 * epoch. */
#include <math.h>
#include <string.h>

#include "tests/data/stream_ref.h"

/* One batch, which holds rows row .. row + n_rows - 1 of the run, against the stream. */
static void check_batch(const struct ht_batch *b, const struct stream_ref *r,
                        const struct ht_loader_options *o, int64_t row)
{
    int64_t seq = 0, counted = 0, pos = 0;
    double squares = 0;

    ck_assert_int_eq(b->n_rows, o->micro_rows);
    ck_assert_int_eq(b->n_tokens, o->micro_rows * o->seq_len);
    for (int64_t i = 0; i < b->n_tokens; i++) {
        const int64_t at = row_ref(r, row + i / o->seq_len) * o->seq_len + i % o->seq_len;
        const bool inside = at < r->n, row_begins = at % o->seq_len == 0;
        const bool doc_begins = at > 0 && at <= r->n && r->ends[at - 1];
        int32_t label = -1;
        if (inside && at + 1 < r->n && (o->pack_leak || !r->ends[at])) label = r->token[at + 1];
        ck_assert_msg(b->ids[i] == (inside ? r->token[at] : 0), "row %lld, token %lld",
                      (long long)row, (long long)i);
        ck_assert_msg(b->labels[i] == label, "row %lld, label %lld is %d, not %d", (long long)row,
                      (long long)i, (int)b->labels[i], (int)label);
        if (row_begins || (doc_begins && !o->pack_leak)) {
            squares += (double)(pos * pos);
            pos = 0;
            ck_assert_int_lt(seq, b->seqs.n_seqs);
            ck_assert_int_eq(b->seqs.starts[seq++], i);
        }
        ck_assert_int_eq(b->pos[i], pos++);
        counted += label >= 0;
    }
    squares += (double)(pos * pos);
    ck_assert_int_eq(seq, b->seqs.n_seqs);
    ck_assert_int_eq(b->seqs.starts[seq], b->n_tokens);
    ck_assert_int_eq(b->n_counted, counted);
    ck_assert_double_eq_tol(b->attended, squares / (double)b->n_tokens, 1e-9 * squares);
}

struct ranks {
    struct ht_loader_options o;
    struct ht_loader *l[4];
};

static void ranks_open(struct ranks *k, const struct ht_loader_options *o, int n_ranks,
                       const struct ht_loader_state *s)
{
    k->o = *o;
    k->o.n_ranks = n_ranks;
    for (int i = 0; i < n_ranks; i++) {
        k->o.rank = i;
        must(ht_loader_open(&k->l[i], &k->o));
        if (s) must(ht_loader_set_state(k->l[i], s));
    }
}

static void ranks_close(struct ranks *k)
{
    for (int i = 0; i < k->o.n_ranks; i++) ht_loader_close(k->l[i]);
}

/* One step of all ranks from global row `row` on; false at the end of the only epoch. */
static bool check_step(struct ranks *k, const struct stream_ref *r, int64_t row)
{
    const int64_t n_micro = k->o.rows_per_step / k->o.n_ranks / k->o.micro_rows;
    int64_t step_counted = -1, sum = 0;

    for (int i = 0; i < k->o.n_ranks; i++)
        for (int64_t m = 0; m < n_micro; m++) {
            const struct ht_batch *b;
            double wait_s = -1;
            must(ht_loader_next(k->l[i], &b, &wait_s));
            ck_assert_double_ge(wait_s, 0);
            if (!b) {
                ck_assert_int_eq(m, 0);
                ck_assert_int_eq(step_counted, -1);
                for (int j = i + 1; j < k->o.n_ranks; j++) { // the others end as well
                    must(ht_loader_next(k->l[j], &b, NULL));
                    ck_assert_ptr_null(b);
                }
                return false;
            }
            check_batch(b, r, &k->o, row + (i * n_micro + m) * k->o.micro_rows);
            ck_assert_int_eq(b->last_of_step, m == n_micro - 1);
            if (step_counted >= 0) ck_assert_int_eq(b->step_counted, step_counted);
            step_counted = b->step_counted;
            sum += b->n_counted;
        }
    ck_assert_int_eq(sum, step_counted);
    return true;
}

/* The state, the same on all ranks. */
static struct ht_loader_state ranks_state(const struct ranks *k)
{
    struct ht_loader_state s, other;

    ht_loader_get_state(k->l[0], &s);
    for (int i = 1; i < k->o.n_ranks; i++) {
        ht_loader_get_state(k->l[i], &other);
        ck_assert_mem_eq(&s, &other, sizeof s);
    }
    return s;
}

static const struct {
    int64_t seq_len, rows_per_step, micro_rows;
    int n_ranks;
    int64_t prefetch;
    bool pack_leak, shuffle;
    int64_t window_rows;
} shapes[] = {
    { 1, 4, 2, 1, 0, false, true, 0 },
    { 1, 4, 2, 2, 2, true, true, 999 },
    { 7, 6, 1, 3, 0, false, true, 1 },
    { 7, 6, 1, 2, 5, true, false, 50 }, // without shuffle: no windows
    { 7, 6, 1, 2, 5, true, true, 2 },
    { 64, 12, 2, 3, 1, false, true, 5 }, // smaller than a step
    { 64, 12, 3, 2, 0, true, true, 100 },
    { 64, 12, 3, 2, 0, false, true, 600 }, // the longest round has 625 rows or so
    { 1000, 4, 2, 2, 3, false, true, 10 },
    { 1000, 4, 4, 1, 0, true, true, 500 }, // and here 40
    { 333, 6, 1, 1, 16, false, false, 0 },
    { 97, 8, 1, 4, 1, false, true, 77 },
    { 20000, 2, 1, 2, 1, false, true, 8 }, // two rows a round
    { 50000, 1, 1, 1, 0, true, true, 8 },  // a row goes round several times
};

START_TEST(batches_match_the_written_out_stream)
{
    struct ht_loader_options o =
        options(shapes[_i].seq_len, shapes[_i].rows_per_step, shapes[_i].micro_rows);
    const int64_t n_steps = 1 + 60000 / (o.seq_len * o.rows_per_step * (o.seq_len < 8 ? 20 : 1));
    struct stream_ref r;
    struct ranks k;

    o.pack_leak = shapes[_i].pack_leak;
    o.shuffle = shapes[_i].shuffle;
    o.prefetch_batches = shapes[_i].prefetch;
    o.window_rows = shapes[_i].window_rows;
    stream_ref_make(&r, &o, n_steps * o.rows_per_step * o.seq_len + 1);
    ranks_open(&k, &o, shapes[_i].n_ranks, NULL);
    for (int64_t step = 0; step < n_steps; step++)
        ck_assert(check_step(&k, &r, step * o.rows_per_step));
    const struct ht_loader_state s = ranks_state(&k);
    ck_assert_int_eq(s.row, n_steps * o.rows_per_step);
    int64_t tokens = 0;
    for (int d = 0; d < 3; d++) {
        tokens += s.dataset[d].tokens;
        ck_assert_int_eq(s.dataset[d].docs_visited,
                         s.dataset[d].epoch * sets[d].n_docs + s.dataset[d].doc);
    }
    ck_assert_int_eq(tokens, (n_steps * o.rows_per_step - s.window_done) * o.seq_len);
    ck_assert_int_le(s.window_rows, o.window_rows);
    ranks_close(&k);
    stream_ref_free(&r);
}
END_TEST

/* 50 stops at random steps, in the middle of a step too, each time on another number of ranks and
 * through JSON: the stream goes on as if nothing had happened. */
START_TEST(stops_and_rescaling_change_nothing)
{
    static const int n_ranks[3] = { 1, 3, 2 };
    static const int64_t windows[] = { 1, 4, 100, 2000 };
    struct ht_loader_options o = options(50, 6, 1);
    struct ht_loader_state s;
    struct stream_ref r;
    struct ranks k;
    int64_t row = 0;
    int inside = 0; // stops in the middle of a window

    o.pack_leak = _i % 2;
    o.window_rows = windows[_i / 2];
    stream_ref_make(&r, &o, 50 * 8 * 6 * 50 + 1);
    for (uint64_t stop = 0; stop <= 50; stop++) {
        const uint64_t draw = ht_rng_u64(31, 1, stop);
        o.prefetch_batches = (int64_t)(draw >> 8) % 4;
        ranks_open(&k, &o, n_ranks[stop % 3], stop ? &s : NULL);
        for (uint64_t step = 0; step < draw % 8; step++, row += o.rows_per_step)
            ck_assert(check_step(&k, &r, row));
        for (uint64_t i = 0; i < (draw >> 16) % 2 && k.o.n_ranks < 3; i++) {
            const struct ht_batch *b; // a step begun and not finished does not count
            must(ht_loader_next(k.l[0], &b, NULL));
            ck_assert(!b->last_of_step);
        }
        s = ranks_state(&k);
        ck_assert_int_eq(s.row, row);
        inside += s.window_done > 0;
        ranks_close(&k);
        char *text;
        must(ht_loader_state_to_json(&text, &s));
        struct ht_loader_state back;
        must(ht_loader_state_from_json(&back, text, "state"));
        ck_assert_mem_eq(&s, &back, sizeof s);
        free(text);
    }
    ck_assert_int_ge(inside, o.window_rows < 50 ? 0 : 40);
    ck_assert_int_gt(s.dataset[0].epoch, 0); // the test went round
    ck_assert_int_gt(s.dataset[2].epoch, 5);
    stream_ref_free(&r);
}
END_TEST

/* Tokens numbered through: after each epoch every number was given out exactly as often, whatever
 * the stops, ranks and windows (the last one is larger than the data), and every document was
 * visited. */
START_TEST(every_token_once_per_epoch)
{
    enum { N_TOKENS = 6000, EPOCHS = 3 };
    static const int n_ranks[3] = { 1, 3, 2 };
    static const int64_t windows[4] = { 1, 7, 150, 1000 };
    char path[PATH_MAX];
    struct ht_shard_writer *w;
    const struct ht_loader_dataset one = { join(path, folder, "numbered.h5"), 2.5 };
    struct ht_loader_options o = options(20, 6, 1);
    struct ht_loader_state s;
    int32_t ids[200], seen[N_TOKENS] = { 0 }, next = 0;
    int64_t n_docs = 0, steps_left = EPOCHS * N_TOKENS / (20 * 6);

    must(ht_shard_writer_create(&w, path, N_TOKENS, ""));
    for (uint64_t doc = 0; next < N_TOKENS; doc++, n_docs++) {
        int64_t n = (int64_t)(ht_rng_u64(41, 1, doc) % 3 ? ht_rng_u64(41, 2, doc) % 200 : 0);
        if (n > N_TOKENS - next) n = N_TOKENS - next;
        for (int64_t i = 0; i < n; i++) ids[i] = next++;
        must(ht_shard_writer_add(w, ids, n, 0));
    }
    must(ht_shard_writer_add(w, ids, 0, 0)); // the last one is empty
    n_docs++;
    must(ht_shard_writer_finish(w, NULL, NULL));
    ht_shard_writer_free(w);
    o.n_datasets = 1;
    o.datasets = &one;
    o.prefetch_batches = 2;
    o.window_rows = windows[_i];
    for (uint64_t stop = 0; steps_left > 0; stop++) {
        struct ranks k;
        ranks_open(&k, &o, n_ranks[stop % 3], stop ? &s : NULL);
        for (uint64_t step = ht_rng_u64(42, 1, stop) % 6; step > 0 && steps_left > 0;
             step--, steps_left--)
            for (int i = 0; i < k.o.n_ranks; i++)
                for (int64_t m = 0; m < 6 / k.o.n_ranks; m++) {
                    const struct ht_batch *b;
                    must(ht_loader_next(k.l[i], &b, NULL));
                    for (int64_t j = 0; j < b->n_tokens; j++) seen[b->ids[j]]++;
                }
        s = ranks_state(&k);
        ranks_close(&k);
        const int32_t epoch = (int32_t)(s.row * o.seq_len / N_TOKENS);
        for (int i = 0; i < N_TOKENS; i++)
            ck_assert(seen[i] == epoch || (seen[i] == epoch + 1 && steps_left > 0));
    }
    for (int i = 0; i < N_TOKENS; i++) ck_assert_int_eq(seen[i], EPOCHS);
    ck_assert_int_eq(s.dataset[0].tokens, EPOCHS * N_TOKENS);
    // empty documents at the end of the last epoch are visited with the next draw
    ck_assert_int_le(s.dataset[0].docs_visited, EPOCHS * n_docs);
    ck_assert_int_gt(s.dataset[0].docs_visited, EPOCHS * n_docs - 20);
}
END_TEST

START_TEST(prefetched_rows_are_not_trained_rows)
{
    struct ht_loader_options o = options(64, 4, 1);
    struct ht_loader_state begin, s;
    struct ht_loader *l;
    const struct ht_batch *b;

    o.prefetch_batches = 16;
    must(ht_loader_open(&l, &o));
    ht_loader_get_state(l, &begin);
    ck_assert_int_eq(begin.row, 0);
    ck_assert_int_eq(begin.current, -1);
    for (int i = 0; i < 3; i++) {
        must(ht_loader_next(l, &b, NULL));
        ht_loader_get_state(l, &s);
        ck_assert_mem_eq(&s, &begin, sizeof s);
    }
    must(ht_loader_next(l, &b, NULL));
    ck_assert(b->last_of_step);
    ht_loader_get_state(l, &s);
    ck_assert_int_eq(s.row, 4);
    ck_assert_int_eq(ht_loader_set_state(l, &begin), HT_ERR_ARG);
    ht_loader_close(l);
}
END_TEST

START_TEST(mixture_keeps_its_shares)
{
    const struct ht_loader_options o = options(100, 1, 1);
    struct ht_loader_state s;
    struct ht_loader *l;
    const struct ht_batch *b;

    must(ht_loader_open(&l, &o));
    for (int step = 0; step < 2000; step++) {
        must(ht_loader_next(l, &b, NULL));
        ht_loader_get_state(l, &s);
        for (int d = 0; d < 3; d++) // longest document: 200 tokens
            ck_assert_double_le(
                fabs((double)s.dataset[d].tokens - datasets[d].weight * 100.0 * (double)s.row),
                2.0 * 200);
    }
    ht_loader_close(l);
}
END_TEST

/* Evaluation: all datasets once, the rest of the last step is padding, the end is the same on all
 * ranks. */
START_TEST(one_epoch_ends_with_padding)
{
    const int n_ranks = 1 + _i % 3;
    struct ht_loader_options o = options(70, 6, 1 + (_i == 2));
    struct stream_ref r;
    struct ranks k;
    int64_t row = 0, want = 0;

    o.one_epoch = true;
    o.shuffle = _i % 2;
    o.pack_leak = _i >= 3;
    o.prefetch_batches = _i % 4;
    stream_ref_make(&r, &o, INT32_MAX / 2000);
    for (int d = 0; d < 3; d++) {
        ck_assert_int_eq(r.visited[d], sets[d].n_docs);
        want += r.drawn[d];
    }
    ck_assert_int_eq(r.n, want);
    ranks_open(&k, &o, n_ranks, NULL);
    ck_assert_int_eq(ht_loader_n_tokens(k.l[0]), want);
    ck_assert_int_eq(ht_loader_text_bytes(k.l[0]), 3 * want);
    while (check_step(&k, &r, row)) row += o.rows_per_step;
    ck_assert_int_ge(row * o.seq_len, want);
    ck_assert_int_lt((row - o.rows_per_step) * o.seq_len, want);
    const struct ht_batch *b;
    must(ht_loader_next(k.l[0], &b, NULL)); // and stays at the end
    ck_assert_ptr_null(b);
    if (o.prefetch_batches == 0) {
        for (int64_t steps = 2; steps <= 1000;
             steps += 998) { // begin again from the end, from step 2
            struct ht_loader_state s;
            for (int i = 0; i < n_ranks; i++) must(ht_loader_rewind(k.l[i]));
            s = ranks_state(&k);
            ck_assert_int_eq(s.row, 0);
            int64_t step = 0;
            while (step < steps && check_step(&k, &r, step * o.rows_per_step)) step++;
            if (step < steps) ck_assert_int_eq(step * o.rows_per_step, row);
        }
    } else {
        ck_assert_int_eq(ht_loader_rewind(k.l[0]), HT_ERR_ARG);
    }
    ranks_close(&k);
    stream_ref_free(&r);
}
END_TEST

/* A stream that ends exactly with a row and a step: no padding, no further step. */
START_TEST(one_epoch_of_whole_rows)
{
    char path[PATH_MAX];
    const struct ht_loader_dataset one = { join(path, folder, "exact.h5"), 1 };
    struct ht_loader_options o = options(10, 2, 2);
    struct ht_shard_writer *w;
    struct ht_loader *l;
    const struct ht_batch *b;
    const int32_t ids[20] = { 1, 2, 3 };

    must(ht_shard_writer_create(&w, path, 10, ""));
    must(ht_shard_writer_add(w, ids, 20, 20));
    must(ht_shard_writer_add(w, ids, 0, 0));
    must(ht_shard_writer_finish(w, NULL, NULL));
    ht_shard_writer_free(w);
    o.n_datasets = 1;
    o.datasets = &one;
    o.one_epoch = true;
    o.pack_leak = _i;
    must(ht_loader_open(&l, &o));
    must(ht_loader_next(l, &b, NULL));
    ck_assert_int_eq(b->n_counted, 19);
    ck_assert_int_eq(b->step_counted, 19);
    ck_assert_int_eq(b->labels[19], -1);
    must(ht_loader_next(l, &b, NULL));
    ck_assert_ptr_null(b);
    ht_loader_close(l);
}
END_TEST

/* Closing while the thread fills, waits, or has not begun. */
START_TEST(closing_at_any_time)
{
    struct ht_loader_options o = options(64, 12, 2);

    for (int i = 0; i < 40; i++) {
        struct ht_loader *l;
        const struct ht_batch *b;
        o.prefetch_batches = 1 + i % 5;
        must(ht_loader_open(&l, &o));
        for (int k = 0; k < i % 7; k++) must(ht_loader_next(l, &b, NULL));
        if (i % 3 == 0) usleep((useconds_t)(100 * i));
        ht_loader_close(l);
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loader");
    TCase *order = tcase_create("order");

    tcase_add_checked_fixture(order, setup, teardown);
    tcase_add_loop_test(order, batches_match_the_written_out_stream, 0, COUNT(shapes));
    tcase_add_loop_test(order, stops_and_rescaling_change_nothing, 0, 8);
    tcase_add_loop_test(order, every_token_once_per_epoch, 0, 4);
    tcase_add_test(order, prefetched_rows_are_not_trained_rows);
    tcase_add_test(order, mixture_keeps_its_shares);
    tcase_add_loop_test(order, one_epoch_ends_with_padding, 0, 6);
    tcase_add_loop_test(order, one_epoch_of_whole_rows, 0, 2);
    tcase_add_test(order, closing_at_any_time);
    suite_add_tcase(s, order);
    return run_suite(s);
}
