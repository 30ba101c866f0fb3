/* inference/sampler.c: penalties, truncation and one draw. */
#include "inference/sampler.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "core/base/rng.h"

struct candidate {
    float logit;
    int32_t id;
};

struct ht_sampler {
    struct ht_sampler_options o;
    int64_t vocab_size;
    unsigned char *seen; // (vocab_size)
    int32_t *count;      // (vocab_size) generated
    float *bias;         // (vocab_size), NULL for none
    struct candidate *candidates;
    double *weights;
};

enum ht_status ht_sampler_create(struct ht_sampler **out, const struct ht_sampler_options *o,
                                 int64_t vocab_size)
{
    *out = NULL;
    // written so that NaN fails too
    if (!(o->temperature >= 0.0f && o->temperature <= 100.0f))
        return HT_FAIL(HT_ERR_ARG, "temperature is %g; it must be from 0 to 100",
                       (double)o->temperature);
    if (!(o->top_p > 0.0f && o->top_p <= 1.0f))
        return HT_FAIL(HT_ERR_ARG, "top-p is %g; it must be above 0 and at most 1",
                       (double)o->top_p);
    if (!(o->min_p >= 0.0f && o->min_p < 1.0f))
        return HT_FAIL(HT_ERR_ARG, "min-p is %g; it must be at least 0 and below 1",
                       (double)o->min_p);
    if (!(o->repetition_penalty > 0.0f && o->repetition_penalty <= 100.0f))
        return HT_FAIL(HT_ERR_ARG, "repetition penalty is %g; it must be above 0 and at most 100",
                       (double)o->repetition_penalty);
    if (!(o->frequency_penalty >= -2.0f && o->frequency_penalty <= 2.0f))
        return HT_FAIL(HT_ERR_ARG, "frequency penalty is %g; it must be from -2 to 2",
                       (double)o->frequency_penalty);
    if (!(o->presence_penalty >= -2.0f && o->presence_penalty <= 2.0f))
        return HT_FAIL(HT_ERR_ARG, "presence penalty is %g; it must be from -2 to 2",
                       (double)o->presence_penalty);
    if (o->top_k < 0)
        return HT_FAIL(HT_ERR_ARG, "top-k is %lld; it must be 0 (all) or more",
                       (long long)o->top_k);
    struct ht_sampler *s = calloc(1, sizeof *s);
    if (!s) return HT_FAIL(HT_ERR_MEMORY, "no memory for a sampler");
    s->o = *o;
    s->vocab_size = vocab_size;
    s->seen = calloc((size_t)vocab_size, 1);
    s->count = calloc((size_t)vocab_size, sizeof *s->count);
    s->candidates = calloc((size_t)vocab_size, sizeof *s->candidates);
    s->weights = calloc((size_t)vocab_size, sizeof *s->weights);
    if (!s->seen || !s->count || !s->candidates || !s->weights) {
        ht_sampler_free(s);
        return HT_FAIL(HT_ERR_MEMORY, "no memory to sample from %lld tokens",
                       (long long)vocab_size);
    }
    *out = s;
    return HT_OK;
}

void ht_sampler_free(struct ht_sampler *s)
{
    if (!s) return;
    free(s->seen);
    free(s->count);
    free(s->bias);
    free(s->candidates);
    free(s->weights);
    free(s);
}

void ht_sampler_accept(struct ht_sampler *s, int32_t id)
{
    if (id >= 0 && id < s->vocab_size) s->seen[id] = 1;
}

void ht_sampler_accept_generated(struct ht_sampler *s, int32_t id)
{
    ht_sampler_accept(s, id);
    if (id >= 0 && id < s->vocab_size) s->count[id]++;
}

enum ht_status ht_sampler_bias(struct ht_sampler *s, int32_t id, float bias)
{
    if (id < 0 || id >= s->vocab_size)
        return HT_FAIL(HT_ERR_ARG, "bias of token %d; the vocabulary has 0 to %lld", id,
                       (long long)s->vocab_size - 1);
    if (!(bias >= -100.0f && bias <= 100.0f))
        return HT_FAIL(HT_ERR_ARG, "bias of token %d is %g; it must be from -100 to 100", id,
                       (double)bias);
    if (!s->bias) s->bias = calloc((size_t)s->vocab_size, sizeof *s->bias);
    if (!s->bias) return HT_FAIL(HT_ERR_MEMORY, "no memory for biases");
    s->bias[id] = bias;
    return HT_OK;
}

/* Everything that changes logits. */
static void adjust(const struct ht_sampler *s, float *logits)
{
    const float penalty = s->o.repetition_penalty;
    const float frequency = s->o.frequency_penalty, presence = s->o.presence_penalty;

    for (int64_t i = 0; s->bias && i < s->vocab_size; i++) logits[i] += s->bias[i];
    for (int64_t i = 0; penalty != 1.0f && i < s->vocab_size; i++)
        if (s->seen[i]) logits[i] = logits[i] > 0.0f ? logits[i] / penalty : logits[i] * penalty;
    if (frequency == 0.0f && presence == 0.0f) return;
    for (int64_t i = 0; i < s->vocab_size; i++)
        if (s->count[i] > 0) logits[i] -= (float)s->count[i] * frequency + presence;
}

static int larger_first(const void *pa, const void *pb)
{
    const struct candidate *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit < b->logit ? 1 : -1;
    return a->id < b->id ? -1 : 1;
}

static enum ht_status pick_greedy(const struct ht_sampler *s, const float *logits, int32_t *id)
{
    int64_t best = -1;
    for (int64_t i = 0; i < s->vocab_size; i++)
        if (isfinite(logits[i]) && (best < 0 || logits[i] > logits[best])) best = i;
    if (best < 0)
        return HT_FAIL(HT_ERR_NUMERIC, "none of the %lld logits is finite",
                       (long long)s->vocab_size);
    *id = (int32_t)best;
    return HT_OK;
}

/* Keep the first n candidates (sorted) that top-k, top-p and min-p leave; their weights and sum. */
static int64_t keep_best(struct ht_sampler *s, int64_t n, double *sum)
{
    const struct ht_sampler_options *o = &s->o;
    const double top = (double)s->candidates[0].logit;
    double total = 0.0, kept = 0.0;
    int64_t k = 0;

    if (o->top_k > 0 && o->top_k < n) n = o->top_k;
    for (int64_t i = 0; i < n; i++) {
        s->weights[i] = exp(((double)s->candidates[i].logit - top) / (double)o->temperature);
        total += s->weights[i];
    }
    while (k < n && kept < (double)o->top_p * total &&
           (k == 0 || s->weights[k] >= (double)o->min_p * s->weights[0]))
        kept += s->weights[k++];
    *sum = kept;
    return k;
}

enum ht_status ht_sampler_pick(struct ht_sampler *s, float *logits, int64_t position, int32_t *id)
{
    int64_t n = 0;
    double sum = 0.0;

    adjust(s, logits);
    if (s->o.temperature == 0.0f) return pick_greedy(s, logits, id);

    for (int64_t i = 0; i < s->vocab_size; i++)
        if (isfinite(logits[i])) s->candidates[n++] = (struct candidate){ logits[i], (int32_t)i };
    if (n == 0)
        return HT_FAIL(HT_ERR_NUMERIC, "none of the %lld logits is finite",
                       (long long)s->vocab_size);
    qsort(s->candidates, (size_t)n, sizeof *s->candidates, larger_first);
    n = keep_best(s, n, &sum);
    const uint64_t bits = ht_rng_u64(s->o.seed, ht_rng_stream("sampler"), (uint64_t)position);
    double left = (double)(bits >> 11) * 0x1p-53 * sum;
    int64_t chosen = 0;
    while (chosen + 1 < n && left >= s->weights[chosen]) left -= s->weights[chosen++];
    *id = s->candidates[chosen].id;
    return HT_OK;
}
