/* tests/inference/test_engine_faults.c: copies of states that fail (as on a device that is lost)
 * end the requests with a message, leave nothing behind, and the engine serves the next one.
 *
 * Linked with --wrap: the pool's functions go through the ones below.
 */
#include <check.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/model/pool.h"
#include "inference/engine.h"

enum kind { EXPORT, IMPORT, RESET, COPY, KINDS };

static atomic_int fail_at[KINDS]; // counts down; the call that makes it 0 fails

enum ht_status __real_ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out);
enum ht_status __real_ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens,
                                     const void *in);
enum ht_status __real_ht_pool_reset(struct ht_pool *p, struct ht_place *at);
enum ht_status __real_ht_pool_copy(struct ht_pool *p, struct ht_place *to,
                                   const struct ht_place *from);
enum ht_status __wrap_ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out);
enum ht_status __wrap_ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens,
                                     const void *in);
enum ht_status __wrap_ht_pool_reset(struct ht_pool *p, struct ht_place *at);
enum ht_status __wrap_ht_pool_copy(struct ht_pool *p, struct ht_place *to,
                                   const struct ht_place *from);

static bool fails(enum kind k)
{
    return atomic_load(&fail_at[k]) > 0 && atomic_fetch_sub(&fail_at[k], 1) == 1;
}

enum ht_status __wrap_ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out)
{
    if (fails(EXPORT)) return HT_FAIL(HT_ERR_CUDA, "the device is lost");
    return __real_ht_pool_export(p, at, out);
}

enum ht_status __wrap_ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens,
                                     const void *in)
{
    if (fails(IMPORT)) return HT_FAIL(HT_ERR_CUDA, "the device is lost");
    return __real_ht_pool_import(p, at, n_tokens, in);
}

enum ht_status __wrap_ht_pool_reset(struct ht_pool *p, struct ht_place *at)
{
    if (fails(RESET)) return HT_FAIL(HT_ERR_CUDA, "the device is lost");
    return __real_ht_pool_reset(p, at);
}

enum ht_status __wrap_ht_pool_copy(struct ht_pool *p, struct ht_place *to,
                                   const struct ht_place *from)
{
    if (fails(COPY)) return HT_FAIL(HT_ERR_CUDA, "the device is lost");
    return __real_ht_pool_copy(p, to, from);
}

enum { PROMPT = 64, N_IDS = PROMPT + 8 };

static uint64_t submit(struct ht_engine *e, int64_t n_ids, int64_t max_tokens, int n, int priority)
{
    int32_t ids[N_IDS];
    uint64_t id;

    for (int i = 0; i < N_IDS; i++) ids[i] = 3 + i % 20;
    const struct ht_request r = { .ids = ids,
                                  .n_ids = n_ids,
                                  .max_tokens = max_tokens,
                                  .n = n,
                                  .top_p = 1.0f,
                                  .repetition_penalty = 1.0f,
                                  .ignore_eos = true,
                                  .logprobs = -1,
                                  .priority = priority };
    ck_assert_msg(ht_engine_submit(e, &r, &id) == HT_OK, "%s", ht_error_message());
    return id;
}

/* Wait until n choices are over; how many of them with the device's message. */
static int collect(struct ht_engine *e, int n)
{
    const double start_s = ht_time_s();
    int lost = 0;

    while (n > 0) {
        struct ht_engine_event *list = ht_engine_wait_events(e, 1.0);
        ck_assert_msg(ht_time_s() - start_s < 120.0, "%d choices never ended", n);
        for (const struct ht_engine_event *v = list; v; v = v->next) {
            if (v->finish == HT_FINISH_ERROR) {
                ck_assert_msg(strstr(v->message, "the device is lost") != NULL, "%s", v->message);
                lost++;
            }
            n -= v->finish != HT_FINISH_NONE;
        }
        ht_engine_event_free(list);
    }
    return lost;
}

static struct ht_engine *engine(void)
{
    struct ht_engine *e;
    const struct ht_engine_options o = { .path = HT_SOURCE_DIR "/tests/golden/hf/bamba",
                                         .weights = "fp32",
                                         .threads = 1,
                                         .max_context = 120,
                                         .prefill_chunk = 32,
                                         .max_seqs = 2,
                                         .prefix_cache_bytes = 1 << 20 };

    ck_assert_msg(ht_engine_create(&e, &o) == HT_OK, "%s", ht_error_message());
    return e;
}

/* The next requests are served as if nothing had been. */
static void still_serves(struct ht_engine *e)
{
    for (int k = 0; k < KINDS; k++) ck_assert_int_eq(atomic_load(&fail_at[k]), 0);
    for (int i = 0; i < 2; i++) submit(e, PROMPT, 4, 1, 0);
    ck_assert_int_eq(collect(e, 2), 0);
    ck_assert(ht_engine_idle(e));
    ht_engine_free(e);
}

START_TEST(admission_that_fails_is_said)
{
    struct ht_engine *e = engine();

    atomic_store(&fail_at[RESET], 1);
    submit(e, PROMPT, 4, 1, 0);
    ck_assert_int_eq(collect(e, 1), 1);
    still_serves(e);
}
END_TEST

START_TEST(a_snapshot_that_fails_is_not_kept)
{
    struct ht_engine *e = engine();
    struct ht_engine_stats stats;

    atomic_store(&fail_at[EXPORT], 1);
    submit(e, PROMPT, 4, 1, 0);
    ck_assert_int_eq(collect(e, 1), 1);
    submit(e, PROMPT, 4, 1, 0);
    ck_assert_int_eq(collect(e, 1), 0);
    ht_engine_get_stats(e, &stats);
    ck_assert_int_eq(stats.prefix_hits, 0);
    still_serves(e);
}
END_TEST

START_TEST(a_snapshot_that_cannot_be_read_is_said)
{
    struct ht_engine *e = engine();

    submit(e, PROMPT + 8, 4, 1, 0);
    ck_assert_int_eq(collect(e, 1), 0);
    atomic_store(&fail_at[IMPORT], 1);
    submit(e, PROMPT + 8, 4, 1, 0);
    ck_assert_int_eq(collect(e, 1), 1);
    still_serves(e);
}
END_TEST

START_TEST(a_fork_that_fails_is_said)
{
    struct ht_engine *e = engine();

    atomic_store(&fail_at[COPY], 1);
    submit(e, PROMPT, 4, 2, 0);
    ck_assert_int_eq(collect(e, 2), 2);
    still_serves(e);
}
END_TEST

/* Prompts of two tokens leave no snapshot: the exports and imports are those of preemption. */
START_TEST(a_preemption_that_fails_is_said)
{
    struct ht_engine *e = engine();
    struct ht_engine_stats stats;
    const enum kind kind = _i ? IMPORT : EXPORT;
    enum { N_LOW = 60 }; // enough that some still run when the other comes

    for (int i = 0; i < N_LOW; i++) submit(e, 2, 110, 1, 0);
    do ht_engine_get_stats(e, &stats);
    while (stats.generated_tokens < 2);
    atomic_store(&fail_at[kind], 1);
    submit(e, 2, 4, 1, 1);
    ck_assert_int_ge(collect(e, N_LOW + 1), 1);
    still_serves(e);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine faults");
    TCase *t = tcase_create("all");

    tcase_set_timeout(t, 120);
    tcase_add_test(t, admission_that_fails_is_said);
    tcase_add_test(t, a_snapshot_that_fails_is_not_kept);
    tcase_add_test(t, a_snapshot_that_cannot_be_read_is_said);
    tcase_add_test(t, a_fork_that_fails_is_said);
    tcase_add_loop_test(t, a_preemption_that_fails_is_said, 0, 2);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
