/* tests/inference/test_engine.c: whatever else the engine does, a request gets what it gets alone:
 * the tokens and log-probabilities of the plain decoder, bit for bit in fp32. */
#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "checkpoints/weights.h"
#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/model/decode.h"
#include "core/model/pool.h"
#include "inference/grammar.h"
#include "inference/loaded.h"
#include "tests/inference/engine_case.h"
#include "tests/inference/small_tokenizer.h"

/* ---- the plain way: one sequence, one decoder ---- */

struct plain {
    struct ht_loaded l;
    struct ht_decoder *decoder;
    struct ht_state *state;
    float *logits;
};

static struct plain *plain_open(int folder, const char *format)
{
    struct plain *p = calloc(1, sizeof *p);
    struct ht_weights *w;

    ck_assert_int_eq(ht_weights_open(&w, folder_path(folder), NULL), HT_OK);
    ck_assert_int_eq(ht_loaded_open(&p->l, w, NULL, format, 1, CONTEXT), HT_OK);
    ck_assert_int_eq(ht_decoder_create(&p->decoder, p->l.model, CHUNK), HT_OK);
    ck_assert_int_eq(ht_state_create(&p->state, p->l.model, CONTEXT), HT_OK);
    p->logits = calloc((size_t)p->l.model->cfg.vocab_size, sizeof *p->logits);
    return p;
}

static void plain_close(struct plain *p)
{
    free(p->logits);
    ht_state_free(p->state);
    ht_decoder_free(p->decoder);
    ht_loaded_close(&p->l);
    free(p);
}

static int32_t best_of(const float *x, int64_t n)
{
    int64_t best = 0;

    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return (int32_t)best;
}

static float logprob_of(const float *x, int64_t n, int32_t id)
{
    double top = -INFINITY, sum = 0.0;

    for (int64_t i = 0; i < n; i++) top = (double)x[i] > top ? (double)x[i] : top;
    for (int64_t i = 0; i < n; i++) sum += exp((double)x[i] - top);
    return (float)((double)x[id] - (top + log(sum)));
}

/* Greedy continuation, token by token. */
static void plain_answer(struct plain *p, const int32_t *ids, int64_t n, int n_new,
                         struct answer *out)
{
    const int64_t vocab_size = p->l.model->cfg.vocab_size;

    *out = (struct answer){ .n = n_new };
    ht_state_reset(p->state);
    ck_assert_msg(ht_decoder_extend(p->decoder, p->state, ids, n, p->logits) == HT_OK, "%s",
                  ht_error_message());
    for (int i = 0; i < n_new; i++) {
        const int32_t id = best_of(p->logits, vocab_size);
        out->ids[i] = id;
        out->logprobs[i] = logprob_of(p->logits, vocab_size, id);
        if (i + 1 < n_new)
            ck_assert_int_eq(ht_decoder_extend(p->decoder, p->state, &id, 1, p->logits), HT_OK);
    }
}

// one token, around a block's border, several blocks
static const int64_t lengths[] = {
    1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7, 90
};
enum { N_LENGTHS = 8, N_NEW = 12 };

/* Every length, all at once, in waves that share steps with others' prompts. */
static void batch_equals_plain(int folder, const char *format, int64_t max_seqs)
{
    struct plain *p = plain_open(folder, format);
    struct ht_engine *e =
        engine_with(folder, (struct ht_engine_options){ .weights = format, .max_seqs = max_seqs });
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    static struct answer got[3 * N_LENGTHS], want;
    int32_t ids[CONTEXT];

    memset(got, 0, sizeof got);
    for (int i = 0; i < 3 * N_LENGTHS; i++) {
        prompt_of(ids, lengths[i % N_LENGTHS], (uint64_t)i, vocab_size);
        const struct ht_request r = greedy(ids, lengths[i % N_LENGTHS], N_NEW, &got[i]);
        submit(e, &r);
    }
    collect(e, 3 * N_LENGTHS);
    nothing_left(e);
    for (int i = 0; i < 3 * N_LENGTHS; i++) {
        prompt_of(ids, lengths[i % N_LENGTHS], (uint64_t)i, vocab_size);
        plain_answer(p, ids, lengths[i % N_LENGTHS], N_NEW, &want);
        same(&got[i], &want);
        ck_assert_int_eq(got[i].finish, HT_FINISH_LENGTH);
        ck_assert_int_eq(got[i].prompt_tokens, lengths[i % N_LENGTHS]);
        ck_assert_int_eq(got[i].generated, N_NEW);
    }
    ht_engine_free(e);
    plain_close(p);
}

START_TEST(batches_equal_one_sequence_alone)
{
    batch_equals_plain(_i % N_FOLDERS, "fp32", _i < N_FOLDERS ? 24 : 5);
}
END_TEST

static const char *const packed_formats[] = { "bf16", "int8", "int4", "int4z", "fp8" };

START_TEST(batches_equal_one_sequence_alone_when_packed)
{
    batch_equals_plain(0, packed_formats[_i], 7);
}
END_TEST

START_TEST(cached_prefixes_change_nothing)
{
    struct plain *p = plain_open(_i, "fp32");
    struct ht_engine *e = engine_with(
        _i, (struct ht_engine_options){ .max_seqs = 4, .prefix_cache_bytes = 16 << 20 });
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    static struct answer got[12], want;
    struct ht_engine_stats stats;
    int32_t ids[CONTEXT];

    memset(got, 0, sizeof got);
    for (int i = 0; i < 12;
         i++) { // one after the other: two chunks shared by all, tails of their own
        prompt_of(ids, 90, 99, vocab_size);
        prompt_of(ids + 2 * CHUNK, 26, (uint64_t)(i % 5), vocab_size);
        const int64_t n = 2 * CHUNK + 1 + i % 3 * 12;
        const struct ht_request r = greedy(ids, n, N_NEW, &got[i]);
        submit(e, &r);
        collect(e, 1);
        plain_answer(p, ids, n, N_NEW, &want);
        same(&got[i], &want);
        ck_assert_int_eq(got[i].cached_tokens, i == 0 ? 0 : 2 * CHUNK);
    }
    ht_engine_get_stats(e, &stats);
    ck_assert_int_eq(stats.prefix_hits, 11);
    ck_assert_int_eq(stats.cached_tokens, 11 * 2 * CHUNK);
    nothing_left(e);
    ht_engine_free(e);
    plain_close(p);
}
END_TEST

START_TEST(a_junction_is_kept_when_it_is_seen)
{
    struct ht_engine *e =
        engine_with(0, (struct ht_engine_options){ .max_seqs = 2, .prefix_cache_bytes = 16 << 20 });
    static struct answer got[3];
    int32_t ids[CONTEXT];

    memset(got, 0, sizeof got);
    for (int i = 0; i < 3; i++) { // share one chunk; the first ones end two chunks later
        prompt_of(ids, CHUNK, 7, ht_engine_vocab_size(e));
        prompt_of(ids + CHUNK, 60, (uint64_t)(20 + i), ht_engine_vocab_size(e));
        const struct ht_request r = greedy(ids, CHUNK + 60, 2, &got[i]);
        submit(e, &r);
        collect(e, 1);
    }
    ck_assert_int_eq(got[0].cached_tokens, 0);
    ck_assert_int_eq(got[1].cached_tokens, 0); // sees the junction and keeps it
    ck_assert_int_eq(got[2].cached_tokens, CHUNK);
    ht_engine_free(e);
}
END_TEST

START_TEST(forks_draw_what_requests_with_their_seeds_draw)
{
    struct ht_engine *e = engine_with(_i, (struct ht_engine_options){ .max_seqs = 8 });
    static struct answer forked[4], alone[4];
    int32_t ids[CONTEXT];

    memset(forked, 0, sizeof forked);
    memset(alone, 0, sizeof alone);
    prompt_of(ids, 45, 3, ht_engine_vocab_size(e));
    struct ht_request r = greedy(ids, 45, N_NEW, forked);
    r.temperature = 1.5f;
    r.seed = 1000;
    r.n = 4;
    submit(e, &r);
    r.n = 1;
    for (int i = 0; i < 4; i++) {
        r.seed = 1000 + (uint64_t)i;
        r.user = &alone[i];
        submit(e, &r);
    }
    collect(e, 8);
    for (int i = 0; i < 4; i++) same(&forked[i], &alone[i]);
    ck_assert(memcmp(forked[0].ids, forked[1].ids, sizeof forked[0].ids) != 0);
    nothing_left(e);
    ht_engine_free(e);
}
END_TEST

START_TEST(preempted_requests_go_on_where_they_were)
{
    struct plain *p = plain_open(_i, "fp32");
    struct ht_engine *e = engine_with(_i, (struct ht_engine_options){ .max_seqs = 2 });
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    enum { N_LOW = 60 }; // enough that some still run when the others come
    static struct answer low[N_LOW], high[4], want;
    struct ht_engine_stats stats;
    int32_t ids[CONTEXT];

    memset(low, 0, sizeof low);
    memset(high, 0, sizeof high);
    for (int i = 0; i < N_LOW; i++) {
        prompt_of(ids, 40, (uint64_t)i, vocab_size);
        const struct ht_request r = greedy(ids, 40, 70, &low[i]);
        submit(e, &r);
    }
    do { // they are under way
        ht_engine_get_stats(e, &stats);
        usleep(200);
    } while (stats.generated_tokens < 4);
    for (int i = 0; i < 4; i++) {
        prompt_of(ids, 50, (uint64_t)(10 + i), vocab_size);
        struct ht_request r = greedy(ids, 50, 10, &high[i]);
        r.priority = 1;
        submit(e, &r);
    }
    collect(e, N_LOW + 4);
    ht_engine_get_stats(e, &stats);
    ck_assert_int_ge(stats.preemptions, 1);
    for (int i = 0; i < N_LOW; i++) {
        prompt_of(ids, 40, (uint64_t)i, vocab_size);
        plain_answer(p, ids, 40, 70, &want);
        same(&low[i], &want);
    }
    for (int i = 0; i < 4; i++) {
        prompt_of(ids, 50, (uint64_t)(10 + i), vocab_size);
        plain_answer(p, ids, 50, 10, &want);
        same(&high[i], &want);
    }
    nothing_left(e);
    ht_engine_free(e);
    plain_close(p);
}
END_TEST

START_TEST(saved_states_come_back)
{
    const struct ht_engine_options o = { .max_seqs = 2, .prefix_cache_bytes = 16 << 20 };
    struct plain *p = plain_open(_i, "fp32");
    static struct answer got, want;
    char path[] = "/tmp/ht-state-XXXXXX";
    int32_t ids[CONTEXT];
    int64_t n;

    close(mkstemp(path));
    prompt_of(ids, 100, 5, p->l.model->cfg.vocab_size);
    struct ht_engine *e = engine_with(_i, o);
    ck_assert_int_eq(ht_engine_save_state(e, ids, CHUNK - 1, path), HT_ERR_ARG);
    ck_assert_msg(ht_engine_save_state(e, ids, 100, path) == HT_OK, "%s", ht_error_message());
    ht_engine_free(e);

    e = engine_with(_i, o); // another process, as far as the file knows
    ck_assert_msg(ht_engine_restore_state(e, path, &n) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(n, 3 * CHUNK);
    memset(&got, 0, sizeof got);
    const struct ht_request r = greedy(ids, 100, N_NEW, &got);
    submit(e, &r);
    collect(e, 1);
    ck_assert_int_eq(got.cached_tokens, 3 * CHUNK);
    plain_answer(p, ids, 100, N_NEW, &want);
    same(&got, &want);

    // another model, and damage
    struct ht_engine *other = engine_with((_i + 1) % N_FOLDERS, o);
    ck_assert_int_eq(ht_engine_restore_state(other, path, &n), HT_ERR_FORMAT);
    ht_engine_free(other);
    FILE *f = fopen(path, "r+b");
    fseek(f, 500, SEEK_SET);
    const int byte = fgetc(f);
    fseek(f, 500, SEEK_SET);
    fputc(byte ^ 4, f);
    fclose(f);
    ck_assert_int_eq(ht_engine_restore_state(e, path, &n), HT_ERR_FORMAT);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), path));
    ht_engine_free(e);
    unlink(path);
    plain_close(p);
}
END_TEST

START_TEST(echo_gives_what_the_scorer_gives)
{
    struct plain *p = plain_open(_i, "fp32");
    struct ht_engine *e = engine_with(
        _i, (struct ht_engine_options){ .max_seqs = 3, .prefix_cache_bytes = 16 << 20 });
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    static struct answer got[3];
    int32_t ids[CONTEXT];
    float want[CONTEXT];

    memset(got, 0, sizeof got);
    prompt_of(ids, 75, 8, vocab_size);
    for (int i = 0; i < 3; i++) {
        struct ht_request r = greedy(ids, 75, i, &got[i]); // 0 tokens: scoring alone
        r.echo = true;
        submit(e, &r);
    }
    collect(e, 3);
    ck_assert_int_eq(ht_decoder_score(p->decoder, p->state, ids, 75, want), HT_OK);
    for (int i = 0; i < 3; i++) {
        ck_assert_int_eq(got[i].n, 75 + i);
        for (int t = 0; t < 75; t++) {
            ck_assert_int_eq(got[i].ids[t], ids[t]);
            // products of other widths, another sum of exponentials
            ck_assert_float_eq_tol(got[i].logprobs[t], t ? want[t] : 0.0f, 2e-5f);
        }
    }
    ht_engine_free(e);
    plain_close(p);
}
END_TEST

START_TEST(penalties_bias_and_limits_are_heeded)
{
    struct ht_engine *e = engine_with(0, (struct ht_engine_options){ .max_seqs = 2 });
    const struct ht_logit_bias only = { 5, 100.0f };
    static struct answer got;
    int32_t ids[8];
    uint64_t id;

    memset(&got, 0, sizeof got);
    prompt_of(ids, 8, 1, ht_engine_vocab_size(e));
    struct ht_request r = greedy(ids, 8, 6, &got);
    r.bias = &only;
    r.n_bias = 1;
    submit(e, &r);
    collect(e, 1);
    for (int i = 0; i < 6; i++) ck_assert_int_eq(got.ids[i], 5);
    // each occurrence takes 2 off: the biased token is left once it costs more than others
    memset(&got, 0, sizeof got);
    r = greedy(ids, 8, 40, &got);
    r.presence_penalty = 2.0f;
    r.frequency_penalty = 2.0f;
    submit(e, &r);
    collect(e, 1);
    for (int i = 0; i < 40; i++) { // the model is small: no token is worth a third visit
        int n = 0;
        for (int j = 0; j < 40; j++) n += got.ids[j] == got.ids[i];
        ck_assert_int_le(n, 3);
    }
    // the answer is cut to the context
    memset(&got, 0, sizeof got);
    r = greedy(ids, 8, 100000, &got);
    submit(e, &r);
    collect(e, 1);
    ck_assert_int_eq(got.generated, CONTEXT - 8);

    r = greedy(ids, 0, 1, NULL);
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_ARG);
    r = greedy(ids, 8, 0, NULL);
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_ARG);
    r = greedy(ids, 8, 1, NULL);
    r.n = 3;
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_ARG);
    r = greedy(ids, 8, 1, NULL);
    r.temperature = NAN;
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_ARG);
    ids[3] = (int32_t)ht_engine_vocab_size(e);
    r = greedy(ids, 8, 1, NULL);
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "token 3"));
    ck_assert(ht_engine_idle(e));
    ht_engine_drain(e);
    ids[3] = 0;
    r = greedy(ids, 8, 1, NULL);
    ck_assert_int_eq(ht_engine_submit(e, &r, &id), HT_ERR_STOPPED);
    ht_engine_free(e);
}
END_TEST

/* Random requests, cancels, priorities, forks, little memory: all end, uncancelled ones are right.
 */
START_TEST(random_schedules_leave_nothing_behind)
{
    enum { N = 120 };
    struct plain *p = plain_open(_i, "fp32");
    static struct answer got[N][2], want;
    static uint64_t names[N];
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    int n_choices = 0, n_right = 0;
    int32_t ids[CONTEXT];

    // keys and values of 300 tokens for six sequences of up to 96: extents lie in each other's way
    const int64_t slots = (6 + 2) * ht_pool_slot_bytes(&p->l.model->cfg, HT_DTYPE_F32);
    const int64_t token = ht_pool_token_bytes(&p->l.model->cfg, HT_DTYPE_F32);
    struct ht_engine *e = engine_with(
        _i, (struct ht_engine_options){ .max_seqs = 6,
                                        .max_drafts = 2,
                                        .memory_bytes = slots + (token ? 300 * token : 1),
                                        .prefix_cache_bytes = 1 << 20 });
    memset(got, 0, sizeof got);
    for (int i = 0; i < N; i++) {
        const uint64_t x = ht_rng_u64(5, (uint64_t)_i, (uint64_t)i);
        const int64_t n = 1 + (int64_t)(x % 80);
        prompt_of(ids, n, x >> 8 & 7, vocab_size); // few seeds: prefixes are shared
        struct ht_request r = greedy(ids, n, 1 + (int64_t)(x >> 16 & 15), got[i]);
        r.n = 1 + (int)(x >> 24 & 1);
        r.speculate = x >> 28 & 1;
        r.priority = (int)(x >> 25 & 3);
        n_choices += r.n;
        names[i] = submit(e, &r);
        if (x >> 27 & 1) ht_engine_cancel(e, names[ht_rng_u64(6, 0, x) % (uint64_t)(i + 1)]);
        if (i % 10 == 0) usleep(500);
    }
    collect(e, n_choices);
    nothing_left(e);
    for (int i = 0; i < N; i++) {
        const uint64_t x = ht_rng_u64(5, (uint64_t)_i, (uint64_t)i);
        const int64_t n = 1 + (int64_t)(x % 80);
        if (got[i][0].finish == HT_FINISH_CANCELLED) continue;
        prompt_of(ids, n, x >> 8 & 7, vocab_size);
        plain_answer(p, ids, n, 1 + (int)(x >> 16 & 15), &want);
        same(&got[i][0], &want);
        if (x >> 24 & 1) same(&got[i][1], &want); // greedy: both choices are the same
        n_right++;
    }
    ck_assert_int_gt(n_right, N / 4);
    ck_assert_int_lt(n_right, N);
    ht_engine_free(e);
    plain_close(p);
}
END_TEST

/* Prompts that repeat themselves, as text does. */
static void repetitive_prompt(int32_t *ids, int64_t n, uint64_t seed, int64_t vocab_size)
{
    const int64_t period = 3 + (int64_t)(seed % 7);

    prompt_of(ids, period, seed, vocab_size);
    for (int64_t i = period; i < n; i++) ids[i] = ids[i - period];
    if (seed % 3 == 0) ids[n / 2] = (int32_t)(seed % (uint64_t)vocab_size); // not quite
}

static const char *const speculate_formats[] = { "fp32", "bf16", "int8", "int4z" };

// random models do not repeat themselves unless few tokens are left to them
static const struct ht_logit_bias few[] = { { 5, 100.0f }, { 9, 100.0f }, { 11, 100.0f } };

/* Sequences that guess, some at once, beside ones that do not: everyone gets what goes without, bit
 * for bit. */
START_TEST(guessing_changes_nothing)
{
    enum { N = 12, LONG = 60 };
    const int folder = _i % N_FOLDERS;
    const char *format = speculate_formats[_i / N_FOLDERS];
    struct plain *p = plain_open(folder, format);
    struct ht_engine *e = engine_with(
        folder,
        (struct ht_engine_options){ .weights = format, .max_seqs = 5, .max_drafts = 1 + _i % 4 });
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    static struct answer got[N][2], want;
    struct ht_engine_stats stats;
    int32_t ids[CONTEXT];

    memset(got, 0, sizeof got);
    for (int i = 0; i < 2 * N; i++) {
        const int64_t n = 20 + 3 * (i / 2), n_new = i / 2 % 4 ? LONG : 2;
        repetitive_prompt(ids, n, (uint64_t)(i / 2), vocab_size);
        struct ht_request r = greedy(ids, n, n_new, &got[i / 2][i % 2]);
        r.speculate = i % 2;
        r.bias = few;
        r.n_bias = i / 2 % 3 ? 3 : 0;
        submit(e, &r);
    }
    collect(e, 2 * N);
    nothing_left(e);
    for (int i = 0; i < N; i++) {
        same(&got[i][0], &got[i][1]);
        if (i % 3) continue;
        repetitive_prompt(ids, 20 + 3 * i, (uint64_t)i, vocab_size);
        plain_answer(p, ids, 20 + 3 * i, i % 4 ? LONG : 2, &want);
        same(&got[i][1], &want);
    }
    ht_engine_get_stats(e, &stats);
    ck_assert_int_gt(stats.accepted, 0);
    ck_assert_int_gt(stats.speculated, stats.accepted); // some guesses were wrong, too
    ht_engine_free(e);
    plain_close(p);
}
END_TEST

/* Draws, penalties, forks, log-probabilities: the same with guesses. */
START_TEST(guessing_draws_the_same)
{
    static struct answer got[2][3];
    struct ht_engine_stats stats;
    int32_t ids[CONTEXT];
    int n_same = 0;

    for (int speculate = 0; speculate < 2; speculate++) {
        struct ht_engine *e = engine_with(_i, (struct ht_engine_options){ .max_seqs = 4 });
        memset(got[speculate], 0, sizeof got[speculate]);
        repetitive_prompt(ids, 50, 4, ht_engine_vocab_size(e));
        struct ht_request r = greedy(ids, 50, 60, got[speculate]);
        r.temperature = 0.8f;
        r.top_p = 0.95f;
        r.repetition_penalty = 1.01f;
        r.frequency_penalty = 0.001f;
        r.bias = few;
        r.n_bias = 3;
        r.logprobs = 3;
        r.seed = 17;
        r.n = 3;
        r.speculate = speculate;
        submit(e, &r);
        collect(e, 3);
        nothing_left(e);
        ht_engine_get_stats(e, &stats);
        ck_assert_int_eq(stats.speculated > 0, speculate);
        ht_engine_free(e);
    }
    ck_assert_int_gt(stats.accepted, 0);
    for (int i = 0; i < 3; i++) {
        same(&got[0][i], &got[1][i]);
        n_same += memcmp(got[0][i].ids, got[0][(i + 1) % 3].ids, sizeof got[0][i].ids) == 0;
    }
    ck_assert_int_lt(n_same, 3);
}
END_TEST

/* Forks, a grammar, penalties, log-probabilities and guesses together: each choice is what a
 * request with its seed gets alone and without guesses, and nothing but a list comes out (of
 * characters that the small vocabularies have). */
START_TEST(forks_grammar_penalties_and_guesses_agree)
{
    enum { N = 3, LONG = 50 };
    struct ht_engine *e = engine_with(_i, (struct ht_engine_options){ .max_seqs = 6 });
    struct ht_tokenizer *t = small_tokenizer();
    json_t *list = json_loads("{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}", 0, NULL);
    struct ht_grammar_vocab *v;
    static struct answer forked[N], alone[N];
    int32_t ids[CONTEXT];

    ck_assert_int_eq(ht_grammar_vocab_create(&v, t, ht_engine_vocab_size(e), -1), HT_OK);
    memset(forked, 0, sizeof forked);
    memset(alone, 0, sizeof alone);
    repetitive_prompt(ids, 40, 2, ht_engine_vocab_size(e));
    struct ht_request r = greedy(ids, 40, LONG, forked);
    r.temperature = 1.0f;
    r.top_k = 30;
    r.repetition_penalty = 1.1f;
    r.presence_penalty = 0.2f;
    r.logprobs = 4;
    r.seed = 5;
    r.n = N;
    r.speculate = true;
    ck_assert_int_eq(ht_grammar_create_schema(&r.grammar, v, list), HT_OK);
    submit(e, &r);
    for (int i = 0; i < N; i++) {
        r.n = 1;
        r.seed = 5 + (uint64_t)i;
        r.speculate = false;
        r.user = &alone[i];
        ck_assert_int_eq(ht_grammar_create_schema(&r.grammar, v, list), HT_OK);
        submit(e, &r);
    }
    collect(e, 2 * N);
    nothing_left(e);
    for (int i = 0; i < N; i++) {
        struct ht_grammar *g;
        same(&forked[i], &alone[i]);
        ck_assert_int_eq(forked[i].finish, alone[i].finish);
        ck_assert_int_ge(forked[i].n, 2);
        ck_assert_int_eq(ht_grammar_create_schema(&g, v, list), HT_OK);
        for (int k = 0; k < forked[i].n; k++)
            ck_assert_int_eq(ht_grammar_accept(g, forked[i].ids[k]), HT_OK);
        ck_assert(forked[i].finish == HT_FINISH_LENGTH || ht_grammar_may_end(g));
        ht_grammar_free(g);
    }
    ht_engine_free(e);
    ht_grammar_vocab_free(v);
    ht_tokenizer_free(t);
    json_decref(list);
}
END_TEST

/* Every number of right guesses, from the pool itself: the state is that of so many single steps.
 */
START_TEST(a_run_leaves_the_state_of_its_accepted_tokens)
{
    struct plain *p = plain_open(_i % N_FOLDERS, _i < N_FOLDERS ? "fp32" : "int8");
    const struct ht_pool_options o = {
        .n_slots = 5, .n_drafts = 2, .kv_tokens = 200, .block_tokens = CHUNK
    };
    const int64_t vocab_size = p->l.model->cfg.vocab_size;
    struct ht_pool *pool;
    struct ht_place at[3] = { { .slot = 0, .kv_start = 0, .kv_n = 60 },
                              { .slot = 3, .kv_start = 60, .kv_n = 60 },
                              { .slot = 1, .kv_start = 120, .kv_n = 60 } };
    struct ht_pool_run runs[3];
    struct ht_place *places[1];
    int32_t ids[40];
    float *logits = calloc((size_t)((3 + 2 * 8) * vocab_size), sizeof *logits);
    float *row = calloc((size_t)vocab_size, sizeof *row);

    ck_assert_msg(ht_pool_create(&pool, p->l.model, &o) == HT_OK, "%s", ht_error_message());
    const int64_t most = ht_pool_export_bytes(pool, 60);
    char *want = malloc((size_t)most), *got = malloc((size_t)most);
    prompt_of(ids, 40, 3, vocab_size);
    for (int64_t n = 2; n <= HT_POOL_RUN; n++)
        for (int64_t right = 1; right <= n; right++) {
            for (int i = 0; i < 3; i++) {
                ht_pool_reset(pool, &at[i]);
                ck_assert_int_eq(ht_pool_prompt(pool, &at[i], ids + i, 7), HT_OK);
            }
            int32_t spare[2] = { 0 };
            for (int k = 0, slot = 0; k < 2; slot++) // slots may have been exchanged before
                if (slot != at[0].slot && slot != at[1].slot && slot != at[2].slot)
                    spare[k++] = slot;
            for (int i = 0; i < 3; i++) { // the middle one has no guesses, the last one fewer
                runs[i] = (struct ht_pool_run){ .at = &at[i],
                                                .n = i == 0   ? n
                                                     : i == 1 ? 1
                                                              : 1 + n / 2,
                                                .spare = spare[i / 2] };
                memcpy(runs[i].ids, ids + 10 + i, sizeof runs[i].ids);
            }
            ck_assert_msg(ht_pool_decode_runs(pool, runs, 3, logits) == HT_OK, "%s",
                          ht_error_message());
            for (int i = 0; i < 3; i++) {
                const int64_t take = right < runs[i].n ? right : runs[i].n;
                ck_assert_int_eq(ht_pool_accept(pool, &runs[i], take), HT_OK);
                ck_assert_int_eq(at[i].n_tokens, 7 + take);
            }
            for (int i = 0; i < 3; i++) { // the same alone and one by one, at a free place
                const int64_t take = right < runs[i].n ? right : runs[i].n;
                struct ht_place alone = { .slot = spare[0], .kv_start = 180, .kv_n = 20 };
                for (int s = 0; s < 5; s++)
                    if (s != at[0].slot && s != at[1].slot && s != at[2].slot) alone.slot = s;
                ht_pool_export(pool, &at[i], got);
                ht_pool_reset(pool, &alone);
                ck_assert_int_eq(ht_pool_prompt(pool, &alone, ids + i, 7), HT_OK);
                places[0] = &alone;
                for (int64_t t = 0; t < take; t++) {
                    ck_assert_int_eq(ht_pool_decode(pool, places, ids + 10 + i + t, 1, row), HT_OK);
                    ck_assert_mem_eq(row, runs[i].logits[t], (size_t)vocab_size * sizeof *row);
                }
                ht_pool_export(pool, &alone, want);
                ck_assert_mem_eq(got, want, (size_t)ht_pool_export_bytes(pool, 7 + take));
            }
        }
    runs[0].n = HT_POOL_RUN + 1;
    ck_assert_int_eq(ht_pool_decode_runs(pool, runs, 1, logits), HT_ERR_ARG);
    for (int i = 0; i < 3; i++) runs[i].n = 2;
    ck_assert_int_eq(ht_pool_decode_runs(pool, runs, 3, logits), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "3 sequences with guesses"));
    free(want);
    free(got);
    free(logits);
    free(row);
    ht_pool_free(pool);
    plain_close(p);
}
END_TEST

START_TEST(closing_in_mid_work_frees_everything)
{
    struct ht_engine *e = engine_with(0, (struct ht_engine_options){ .max_seqs = 2 });
    static struct answer got[6];
    int32_t ids[60];

    memset(got, 0, sizeof got);
    for (int i = 0; i < 6; i++) {
        prompt_of(ids, 60, (uint64_t)i, ht_engine_vocab_size(e));
        const struct ht_request r = greedy(ids, 60, 50, &got[i]);
        submit(e, &r);
    }
    usleep(2000);
    ht_engine_free(e); // the leak checker says whether it did
}
END_TEST

static const char *const bad_options[] = { "max_seqs", "max_context", "memory_bytes", "int9" };

START_TEST(bad_options_are_refused_by_name)
{
    struct ht_engine *e;
    struct ht_engine_options o = { .path = folder_path(0), .threads = 1 };

    if (_i == 0) o.max_seqs = 5000;
    if (_i == 1) o.max_context = 1 << 30;
    if (_i == 2) o.memory_bytes = 10;
    if (_i == 3) o.weights = "int9";
    ck_assert_int_eq(ht_engine_create(&e, &o), HT_ERR_ARG);
    ck_assert_ptr_null(e);
    ck_assert_msg(strstr(ht_error_message(), bad_options[_i]) != NULL, "%s", ht_error_message());
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine");
    TCase *t = tcase_create("all");

    tcase_set_timeout(t, 300);
    tcase_add_loop_test(t, batches_equal_one_sequence_alone, 0, 2 * N_FOLDERS);
    tcase_add_loop_test(t, batches_equal_one_sequence_alone_when_packed, 0, 5);
    tcase_add_loop_test(t, cached_prefixes_change_nothing, 0, N_FOLDERS);
    tcase_add_test(t, a_junction_is_kept_when_it_is_seen);
    tcase_add_loop_test(t, forks_draw_what_requests_with_their_seeds_draw, 0, N_FOLDERS);
    tcase_add_loop_test(t, preempted_requests_go_on_where_they_were, 0, N_FOLDERS);
    tcase_add_loop_test(t, saved_states_come_back, 0, N_FOLDERS);
    tcase_add_loop_test(t, echo_gives_what_the_scorer_gives, 0, N_FOLDERS);
    tcase_add_test(t, penalties_bias_and_limits_are_heeded);
    tcase_add_loop_test(t, random_schedules_leave_nothing_behind, 0, N_FOLDERS);
    tcase_add_loop_test(t, guessing_changes_nothing, 0, 4 * N_FOLDERS);
    tcase_add_loop_test(t, guessing_draws_the_same, 0, N_FOLDERS);
    tcase_add_loop_test(t, forks_grammar_penalties_and_guesses_agree, 0, N_FOLDERS);
    tcase_add_loop_test(t, a_run_leaves_the_state_of_its_accepted_tokens, 0, 2 * N_FOLDERS);
    tcase_add_test(t, closing_in_mid_work_frees_everything);
    tcase_add_loop_test(t, bad_options_are_refused_by_name, 0, 4);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
