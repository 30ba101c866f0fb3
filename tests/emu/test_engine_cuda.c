/* tests/emu/test_engine_cuda.c: the inference engine on the device: the tokens of the CPU's engine,
 * whatever runs beside a request. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "inference/engine.h"
#include "tests/emu/gpu_case.h"

enum { CHUNK = 32, CONTEXT = 100, NEW = 6, REQUESTS = 3, VOCAB = 96 };

struct answer {
    int n;
    int32_t ids[NEW];
    float logprobs[NEW];
};

static struct ht_engine *engine_on(const char *device, const char *folder, const char *weights)
{
    char path[1024];
    struct ht_engine *e;

    snprintf(path, sizeof path, "%s/tests/golden/hf/%s", HT_SOURCE_DIR, folder);
    const struct ht_engine_options o = { .path = path,
                                         .weights = weights,
                                         .device = device,
                                         .threads = 1,
                                         .max_context = CONTEXT,
                                         .prefill_chunk = CHUNK,
                                         .prefix_cache_bytes = 1 << 20 };
    gpu_ok(ht_engine_create(&e, &o));
    return e;
}

/* Requests first .. first + n - 1 at once, greedy, with guesses. */
static void ask(struct ht_engine *e, int first, int n, struct answer *answers)
{
    static const int64_t lengths[REQUESTS] = { 41, 3, 70 };
    const double start_s = ht_time_s();
    int left = n;

    memset(answers, 0, (size_t)n * sizeof *answers);
    for (int i = 0; i < n; i++) {
        int32_t ids[CONTEXT];
        uint64_t id;
        for (int t = 0; t < lengths[first + i]; t++)
            ids[t] = (int32_t)(ht_rng_u64((uint64_t)(first + i), 1, (uint64_t)(t % 20)) % VOCAB);
        gpu_ok(ht_engine_submit(e,
                                &(struct ht_request){ .ids = ids,
                                                      .n_ids = lengths[first + i],
                                                      .max_tokens = NEW,
                                                      .n = 1,
                                                      .top_p = 1.0f,
                                                      .repetition_penalty = 1.0f,
                                                      .ignore_eos = true,
                                                      .speculate = true,
                                                      .user = &answers[i] },
                                &id));
    }
    while (left > 0) {
        struct ht_engine_event *list = ht_engine_wait_events(e, 1.0);
        ck_assert_msg(ht_time_s() - start_s < 200.0, "%d requests never ended", left);
        for (struct ht_engine_event *v = list; v; v = v->next) {
            struct answer *a = v->user;
            ck_assert_msg(v->finish != HT_FINISH_ERROR, "%s", v->message);
            if (v->id >= 0) {
                ck_assert_int_lt(a->n, NEW);
                a->ids[a->n] = v->id;
                a->logprobs[a->n++] = v->has_logprob ? v->logprob : 0.0f;
            }
            if (v->finish != HT_FINISH_NONE) left--;
        }
        ht_engine_event_free(list);
    }
}

static void skip_without_device(void)
{
    struct ht_backend be;

    gpu_start(&be, 0);
    gpu_end(&be);
}

/* fp32: rounding alone differs; and what is asked together is what is asked alone. */
START_TEST(tokens_are_those_of_the_cpu)
{
    static const char *const folders[] = { "bamba", "mamba2", "llama" };
    struct answer cpu[REQUESTS], gpu[REQUESTS], alone;

    skip_without_device();
    struct ht_engine *e = engine_on("cpu", folders[_i], "fp32");
    ask(e, 0, REQUESTS, cpu);
    ht_engine_free(e);
    e = engine_on("auto", folders[_i], "fp32");
    ask(e, 0, REQUESTS, gpu);
    for (int i = 0; i < REQUESTS; i++) {
        ck_assert_int_eq(cpu[i].n, NEW);
        ck_assert_int_eq(gpu[i].n, NEW);
        for (int t = 0; t < NEW; t++) {
            ck_assert_int_eq(gpu[i].ids[t], cpu[i].ids[t]);
            ck_assert_double_le(fabs((double)gpu[i].logprobs[t] - (double)cpu[i].logprobs[t]),
                                1e-3);
        }
        ask(e, i, 1, &alone); // its beginning comes from the prefix cache
        ck_assert_mem_eq(alone.ids, gpu[i].ids, sizeof alone.ids);
    }
    ht_engine_free(e);
}
END_TEST

/* Packed weights: bit for bit, log-probabilities too. */
START_TEST(packed_requests_do_not_see_each_other)
{
    static const char *const formats[] = { "bf16", "int8", "int4", "int4z", "fp8" };
    struct answer together[REQUESTS], alone;

    skip_without_device();
    struct ht_engine *e = engine_on("cuda", "llama", formats[_i]);
    ask(e, 0, REQUESTS, together);
    for (int i = 0; i < REQUESTS; i++) {
        ask(e, i, 1, &alone);
        ck_assert_mem_eq(&alone, &together[i], sizeof alone);
    }
    ht_engine_free(e);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("engine_cuda");
    TCase *t = tcase_create("engine_cuda");

    tcase_add_loop_test(t, tokens_are_those_of_the_cpu, 0, 3);
    tcase_add_loop_test(t, packed_requests_do_not_see_each_other, 0, 5);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
