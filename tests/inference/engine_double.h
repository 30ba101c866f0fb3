/* tests/inference/engine_double.h: an engine without a model, for tests of the server alone. */
#ifndef HT_TESTS_ENGINE_DOUBLE_H
#define HT_TESTS_ENGINE_DOUBLE_H

#include "inference/engine.h"

struct engine_double_options {
    int step_us;
    int64_t max_seqs, max_queue;
    int64_t fail_after; // tokens, then an error; 0: never
    bool stale_stats;   // they always say that nothing waits
};
struct ht_engine *engine_double_create(const struct engine_double_options *o,
                                       const struct ht_tokenizer *t);
int64_t engine_double_unfinished(struct ht_engine *e); // requests it still works for

#endif
