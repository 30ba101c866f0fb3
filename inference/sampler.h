/* inference/sampler.h: the next token from its logits.
 *
 * Order: bias, repetition penalty (Keskar et al. 2019: logit/p when positive, logit*p when
 * negative, for tokens seen), frequency and presence penalties (logit - count * f - (count > 0) *
 * p, of tokens generated), temperature, top-k, top-p (smallest set of largest probabilities whose
 * sum reaches p), min-p (probability at least p times the largest). temperature 0 is greedy (ties
 * to the lowest id). The draw is a function of (seed, position): reproducible whatever else runs.
 */
#ifndef HT_INFERENCE_SAMPLER_H
#define HT_INFERENCE_SAMPLER_H

#include <stdint.h>

#include "core/base/status.h"

struct ht_sampler_options {
    float temperature;                         // 0..100
    int64_t top_k;                             // 0 = all
    float top_p;                               // (0, 1]
    float min_p;                               // [0, 1)
    float repetition_penalty;                  // (0, 100], 1 = none
    float frequency_penalty, presence_penalty; // [-2, 2], 0 = none
    uint64_t seed;
};

struct ht_sampler;

/* HT_ERR_ARG names the option, its value and its bounds. */
enum ht_status ht_sampler_create(struct ht_sampler **out, const struct ht_sampler_options *o,
                                 int64_t vocab_size);
void ht_sampler_free(struct ht_sampler *s);

/* Tokens of the prompt, which the repetition penalty counts as seen; and generated ones, which the
 * other penalties count too. */
void ht_sampler_accept(struct ht_sampler *s, int32_t id);
void ht_sampler_accept_generated(struct ht_sampler *s, int32_t id);

/* Added to the logit of id before anything else; HT_ERR_ARG: id outside the vocabulary, a bias
 * outside -100..100. */
enum ht_status ht_sampler_bias(struct ht_sampler *s, int32_t id, float bias);

/* Pick from logits (vocab_size; changed in place by the penalty). HT_ERR_NUMERIC when no logit is
 * finite. */
enum ht_status ht_sampler_pick(struct ht_sampler *s, float *logits, int64_t position, int32_t *id);

#endif
