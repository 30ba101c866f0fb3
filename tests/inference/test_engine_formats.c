/* tests/inference/test_engine_formats.c: states in 16 bits change an answer a little, and by the
 * same bits whatever else the engine does. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/rng.h"
#include "tests/inference/engine_case.h"

static const struct ht_engine_options formats[] = {
    { .state = HT_STATE_16 },
    { .state = HT_STATE_16, .weights = "int8" },
};
enum { N_FORMATS = sizeof formats / sizeof *formats };
// most and mean error of a log-probability; activations are rounded to 8 bits beside int8 weights,
// where a small difference can become a step
static const double tolerance[N_FORMATS][2] = { { 0.02, 0.004 }, { 0.5, 0.05 } };

/* Request i of a mixture: some share beginnings, some guess, some are there twice. */
static struct ht_request request(int i, int32_t ids[CONTEXT], int64_t vocab_size, void *user)
{
    const uint64_t x = ht_rng_u64(8, 0, (uint64_t)i);
    const int64_t n = 1 + (int64_t)(x % 80), period = 3 + (int64_t)(x >> 40 & 7);

    prompt_of(ids, n, x >> 8 & 3, vocab_size);
    for (int64_t t = period; t < n && x >> 48 & 1; t++) ids[t] = ids[t - period];
    struct ht_request r = greedy(ids, n, 1 + (int64_t)(x >> 16 & 31), user);
    r.speculate = x >> 28 & 1;
    r.priority = (int)(x >> 25 & 3);
    r.n = 1 + (int)(x >> 24 & 1);
    return r;
}

/* Batches, forks, guesses, preemption, snapshots of prefixes: as one sequence alone in the same
 * formats. */
START_TEST(answers_do_not_depend_on_company)
{
    enum { N = 60 };
    const int folder = _i % N_FOLDERS;
    struct ht_engine_options o = formats[_i / N_FOLDERS];
    static struct answer got[N][2], want[2];
    int32_t ids[CONTEXT];
    int n_choices = 0;

    o.max_seqs = 6;
    o.max_drafts = 2;
    o.prefix_cache_bytes = 1 << 20;
    struct ht_engine *e = engine_with(folder, o);
    const int64_t vocab_size = ht_engine_vocab_size(e);
    memset(got, 0, sizeof got);
    for (int i = 0; i < N; i++) {
        const struct ht_request r = request(i, ids, vocab_size, got[i]);
        n_choices += r.n;
        submit(e, &r);
        if (i % 10 == 0) usleep(500);
    }
    collect(e, n_choices);
    nothing_left(e);
    ht_engine_free(e);

    o.max_seqs = 2;
    o.max_drafts = -1;
    o.prefix_cache_bytes = 0;
    e = engine_with(folder, o);
    for (int i = 0; i < N; i++) {
        memset(want, 0, sizeof want);
        struct ht_request r = request(i, ids, vocab_size, want);
        const int n = r.n;
        r.n = 1;
        r.speculate = false;
        submit(e, &r);
        collect(e, 1);
        for (int c = 0; c < n; c++) same(&got[i][c], &want[0]);
    }
    ht_engine_free(e);
}
END_TEST

/* Log-probabilities of a given text, by echo: near those with states in fp32, and not the same. */
START_TEST(errors_are_small)
{
    enum { N = 90 };
    struct ht_engine_options exact = formats[_i / N_FOLDERS], o = exact;
    static struct answer a, b;
    int32_t ids[CONTEXT];
    double sum = 0.0;
    int n_different = 0;

    exact.kv = HT_KV_MODEL;
    exact.state = HT_STATE_F32;
    struct ht_engine *e[2] = { engine_with(_i % N_FOLDERS, exact), engine_with(_i % N_FOLDERS, o) };
    for (int k = 0; k < 2; k++) {
        prompt_of(ids, N, 4, ht_engine_vocab_size(e[k]));
        struct answer *to = k ? &b : &a;
        memset(to, 0, sizeof *to);
        struct ht_request r = greedy(ids, N, 1, to);
        r.echo = true;
        submit(e[k], &r);
        collect(e[k], 1);
        ck_assert_int_eq(to->n, N + 1);
        ht_engine_free(e[k]);
    }
    for (int t = 1; t < N; t++) { // the first block's states are rounded at its end
        const double d = fabs((double)a.logprobs[t] - (double)b.logprobs[t]);
        if (t <= CHUNK) ck_assert_double_eq(d, 0.0);
        ck_assert_double_le(d, tolerance[_i / N_FOLDERS][0]);
        n_different += d > 0.0;
        sum += d;
    }
    if (_i % N_FOLDERS == 2)
        ck_assert_int_eq(n_different, 0); // no Mamba-2 layer
    else
        ck_assert_int_gt(n_different, N / 4);
    ck_assert_double_le(sum / N, tolerance[_i / N_FOLDERS][1]);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine formats");
    TCase *t = tcase_create("all");

    tcase_set_timeout(t, 300);
    tcase_add_loop_test(t, answers_do_not_depend_on_company, 0, N_FORMATS * N_FOLDERS);
    tcase_add_loop_test(t, errors_are_small, 0, N_FORMATS * N_FOLDERS);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
