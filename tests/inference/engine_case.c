/* tests/inference/engine_case.c: requests and answers. */
#include "tests/inference/engine_case.h"

#include <check.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/rng.h"

static const char *const folders[] = { "bamba", "mamba2", "llama" };

const char *folder_path(int i)
{
    static char path[1024];

    snprintf(path, sizeof path, "%s/tests/golden/hf/%s", HT_SOURCE_DIR, folders[i]);
    return path;
}

struct ht_engine *engine_with(int folder, struct ht_engine_options o)
{
    struct ht_engine *e;

    o.path = folder_path(folder);
    if (!o.weights) o.weights = "fp32";
    o.threads = 1;
    o.max_context = CONTEXT;
    o.prefill_chunk = CHUNK;
    ck_assert_msg(ht_engine_create(&e, &o) == HT_OK, "%s", ht_error_message());
    return e;
}

void prompt_of(int32_t *ids, int64_t n, uint64_t seed, int64_t vocab_size)
{
    for (int64_t i = 0; i < n; i++)
        ids[i] = (int32_t)(ht_rng_u64(seed, 1, (uint64_t)i) % (uint64_t)vocab_size);
}

struct ht_request greedy(const int32_t *ids, int64_t n, int64_t max_tokens, void *user)
{
    return (struct ht_request){ .ids = ids,
                                .n_ids = n,
                                .max_tokens = max_tokens,
                                .n = 1,
                                .top_p = 1.0f,
                                .repetition_penalty = 1.0f,
                                .ignore_eos = true,
                                .logprobs = 0,
                                .user = user };
}

void collect(struct ht_engine *e, int n)
{
    const double start_s = ht_time_s();

    while (n > 0) {
        struct ht_engine_event *list = ht_engine_wait_events(e, 1.0);
        ck_assert_msg(ht_time_s() - start_s < 120.0, "%d choices never ended", n);
        for (struct ht_engine_event *v = list; v; v = v->next) {
            struct answer *a = (struct answer *)v->user + v->choice;
            ck_assert_msg(v->finish != HT_FINISH_ERROR, "%s", v->message);
            if (v->id >= 0) {
                ck_assert_int_lt(a->n, MOST);
                a->ids[a->n] = v->id;
                a->logprobs[a->n++] = v->has_logprob ? v->logprob : 0.0f;
            }
            if (v->finish != HT_FINISH_NONE) {
                a->finish = v->finish;
                a->prompt_tokens = v->prompt_tokens;
                a->cached_tokens = v->cached_tokens;
                a->generated = v->generated_tokens;
                n--;
            }
        }
        ht_engine_event_free(list);
    }
}

void same(const struct answer *a, const struct answer *b)
{
    ck_assert_int_eq(a->n, b->n);
    for (int i = 0; i < a->n; i++) {
        ck_assert_msg(a->ids[i] == b->ids[i], "token %d: %d and %d", i, a->ids[i], b->ids[i]);
        ck_assert_msg(memcmp(&a->logprobs[i], &b->logprobs[i], sizeof(float)) == 0,
                      "log-probability %d: %.9g and %.9g", i, (double)a->logprobs[i],
                      (double)b->logprobs[i]);
    }
}

uint64_t submit(struct ht_engine *e, const struct ht_request *r)
{
    uint64_t id;

    ck_assert_msg(ht_engine_submit(e, r, &id) == HT_OK, "%s", ht_error_message());
    return id;
}

void nothing_left(struct ht_engine *e)
{
    struct ht_engine_stats s;

    ck_assert(ht_engine_idle(e));
    for (int i = 0; i < 200; i++) { // the last publication comes just after the last event
        ht_engine_get_stats(e, &s);
        if (s.running == 0 && s.waiting == 0 && s.kv_usage == 0.0) return;
        usleep(10000);
    }
    ck_abort_msg("%lld running, %lld waiting, %g of the pool in use", (long long)s.running,
                 (long long)s.waiting, s.kv_usage);
}
