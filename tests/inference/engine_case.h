/* tests/inference/engine_case.h: requests to an engine on the small models of tests/golden/hf, and
 * their answers. */
#ifndef HT_TESTS_ENGINE_CASE_H
#define HT_TESTS_ENGINE_CASE_H

#include "inference/engine.h"

enum { CHUNK = 32, CONTEXT = 120, MOST = 128 };
enum { N_FOLDERS = 3 };

struct answer {
    int n;
    int32_t ids[MOST];
    float logprobs[MOST];
    enum ht_finish finish;
    int64_t prompt_tokens, cached_tokens, generated;
};

const char *folder_path(int i);

/* With blocks of CHUNK, room for CONTEXT, one thread, and fp32 weights unless told. */
struct ht_engine *engine_with(int folder, struct ht_engine_options o);

void prompt_of(int32_t *ids, int64_t n, uint64_t seed, int64_t vocab_size);
struct ht_request greedy(const int32_t *ids, int64_t n, int64_t max_tokens, void *user);
uint64_t submit(struct ht_engine *e, const struct ht_request *r);

/* Take events until n choices are over; event->user is an array of answers, by choice. */
void collect(struct ht_engine *e, int n);

/* The same tokens and log-probabilities, bit for bit. */
void same(const struct answer *a, const struct answer *b);

/* Pools are whole again. */
void nothing_left(struct ht_engine *e);

#endif
