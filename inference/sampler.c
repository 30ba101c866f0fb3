/* inference/sampler.c: penalties, truncation and one draw.
 *
 * The definition sorts all logits; nothing here does. The k largest come from counting logits in
 * buckets by their distance from the largest (sampler_cpu.h) and sorting those down to the bucket
 * where the count passes k. Without top-k, sums of exponentials per bucket say in which buckets
 * top-p, min-p and the draw end; only these are sorted.
 */
#include "inference/sampler.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "inference/sampler_cpu.h"

/* Buckets end at this distance in units of the temperature: 128k tokens further away have 2e-17 of
 * the largest one's probability. */
#define FARTHEST 50.0f

struct candidate {
    float logit;
    int32_t id;
};

struct bias {
    int32_t id;
    float value;
};

struct ht_sampler {
    struct ht_sampler_options o;
    int64_t vocab_size;
    enum ht_isa isa;
    // of a sampler with penalties
    unsigned char *seen; // (vocab_size)
    int32_t *count;      // (vocab_size) generated
    int32_t *touched;    // (vocab_size) the n_touched tokens with either
    int64_t n_touched;
    struct bias *bias; // (n_bias)
    int64_t n_bias;
    struct candidate *candidates; // (capacity)
    double *weights;              // (capacity)
    int64_t capacity;
};

static ht_sampler_scan_fn *const scan_fn[HT_ISA_COUNT] = HT_ISA_ROW(ht_sampler_scan);
static ht_sampler_buckets_fn *const buckets_fn[HT_ISA_COUNT] = HT_ISA_ROW(ht_sampler_buckets);
static ht_sampler_sums_fn *const sums_fn[HT_ISA_COUNT] = HT_ISA_ROW(ht_sampler_sums);

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
    s->isa = ht_isa_detect();
    if (o->repetition_penalty != 1.0f || o->frequency_penalty != 0.0f ||
        o->presence_penalty != 0.0f) {
        s->seen = calloc((size_t)vocab_size, 1);
        s->count = calloc((size_t)vocab_size, sizeof *s->count);
        s->touched = malloc((size_t)vocab_size * sizeof *s->touched);
        if (!s->seen || !s->count || !s->touched) {
            ht_sampler_free(s);
            return HT_FAIL(HT_ERR_MEMORY, "no memory to count %lld tokens", (long long)vocab_size);
        }
    }
    *out = s;
    return HT_OK;
}

void ht_sampler_free(struct ht_sampler *s)
{
    if (!s) return;
    free(s->seen);
    free(s->count);
    free(s->touched);
    free(s->bias);
    free(s->candidates);
    free(s->weights);
    free(s);
}

void ht_sampler_accept(struct ht_sampler *s, int32_t id)
{
    if (!s->seen || id < 0 || id >= s->vocab_size || s->seen[id]) return;
    s->seen[id] = 1;
    s->touched[s->n_touched++] = id;
}

void ht_sampler_accept_generated(struct ht_sampler *s, int32_t id)
{
    ht_sampler_accept(s, id);
    if (s->count && id >= 0 && id < s->vocab_size) s->count[id]++;
}

enum ht_status ht_sampler_bias(struct ht_sampler *s, int32_t id, float bias)
{
    if (id < 0 || id >= s->vocab_size)
        return HT_FAIL(HT_ERR_ARG, "bias of token %d; the vocabulary has 0 to %lld", id,
                       (long long)s->vocab_size - 1);
    if (!(bias >= -100.0f && bias <= 100.0f))
        return HT_FAIL(HT_ERR_ARG, "bias of token %d is %g; it must be from -100 to 100", id,
                       (double)bias);
    for (int64_t i = 0; i < s->n_bias; i++)
        if (s->bias[i].id == id) {
            s->bias[i].value = bias;
            return HT_OK;
        }
    struct bias *grown = realloc(s->bias, (size_t)(s->n_bias + 1) * sizeof *grown);
    if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for biases");
    s->bias = grown;
    s->bias[s->n_bias++] = (struct bias){ id, bias };
    return HT_OK;
}

/* Everything that changes logits. */
static void adjust(const struct ht_sampler *s, float *logits)
{
    const float penalty = s->o.repetition_penalty;
    const float frequency = s->o.frequency_penalty, presence = s->o.presence_penalty;

    for (int64_t i = 0; i < s->n_bias; i++) logits[s->bias[i].id] += s->bias[i].value;
    for (int64_t i = 0; i < s->n_touched; i++) {
        float *x = &logits[s->touched[i]];
        const int32_t n = s->count[s->touched[i]];
        if (penalty != 1.0f) *x = *x > 0.0f ? *x / penalty : *x * penalty;
        if (n > 0) *x -= (float)n * frequency + presence;
    }
}

static int larger_first(const void *pa, const void *pb)
{
    const struct candidate *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit < b->logit ? 1 : -1;
    return a->id < b->id ? -1 : 1;
}

/* The lowest id of the largest logit. */
static int32_t first_of(const struct ht_sampler_row *row)
{
    int32_t id = 0;
    while (row->logits[id] != row->top) id++;
    return id;
}

/* ---- candidates ---- */

static enum ht_status reserve(struct ht_sampler *s, int64_t n)
{
    if (n <= s->capacity) return HT_OK;
    const int64_t capacity = n + n / 2 + 1024;
    struct candidate *candidates = realloc(s->candidates, (size_t)capacity * sizeof *s->candidates);
    if (candidates) s->candidates = candidates;
    double *weights = realloc(s->weights, (size_t)capacity * sizeof *s->weights);
    if (weights) s->weights = weights;
    if (!candidates || !weights)
        return HT_FAIL(HT_ERR_MEMORY, "no memory to sample from %lld tokens", (long long)n);
    s->capacity = capacity;
    return HT_OK;
}

/* Those of buckets first .. last, largest first, with their weights. */
static enum ht_status collect(struct ht_sampler *s, const struct ht_sampler_row *row, int32_t first,
                              int32_t last, int64_t *n)
{
    int32_t bucket[HT_SAMPLER_BLOCK + 16];

    *n = 0;
    for (int64_t from = 0; from < row->n; from += HT_SAMPLER_BLOCK) {
        const int64_t left = row->n - from, m = left < HT_SAMPLER_BLOCK ? left : HT_SAMPLER_BLOCK;
        buckets_fn[s->isa](row, from, m, bucket);
        HT_TRY(reserve(s, *n + m));
        for (int64_t i = 0; i < m; i++) { // written always, kept sometimes: no branch to guess
            s->candidates[*n] = (struct candidate){ row->logits[from + i], (int32_t)(from + i) };
            *n += bucket[i] >= first && bucket[i] <= last;
        }
    }
    qsort(s->candidates, (size_t)*n, sizeof *s->candidates, larger_first);
    for (int64_t i = 0; i < *n; i++)
        s->weights[i] = exp(((double)s->candidates[i].logit - (double)row->top) / row->temperature);
    return HT_OK;
}

/* A number in [0, 1) of this seed and position. */
static double draw(const struct ht_sampler *s, int64_t position)
{
    const uint64_t bits = ht_rng_u64(s->o.seed, ht_rng_stream("sampler"), (uint64_t)position);
    return (double)(bits >> 11) * 0x1p-53;
}

/* ---- top-k ---- */

/* The bucket in which the k-th largest is. */
static int32_t bucket_of_kth(const struct ht_sampler *s, const struct ht_sampler_row *row,
                             int64_t k)
{
    int32_t bucket[HT_SAMPLER_BLOCK + 16], count[HT_SAMPLER_BUCKETS + 1], b = 0;

    memset(count, 0, sizeof count);
    for (int64_t from = 0; from < row->n; from += HT_SAMPLER_BLOCK) {
        const int64_t left = row->n - from, m = left < HT_SAMPLER_BLOCK ? left : HT_SAMPLER_BLOCK;
        buckets_fn[s->isa](row, from, m, bucket);
        for (int64_t i = 0; i < m; i++) count[bucket[i]]++;
    }
    while ((k -= count[b]) > 0) b++;
    return b;
}

/* Among the k largest: top-p, min-p, draw. */
static enum ht_status pick_of_k(struct ht_sampler *s, const struct ht_sampler_row *row, int64_t k,
                                int64_t position, int32_t *id)
{
    double total = 0.0, kept = 0.0;
    int64_t n, m = 0, chosen = 0;

    HT_TRY(collect(s, row, 0, bucket_of_kth(s, row, k), &n));
    for (int64_t i = 0; i < k; i++) total += s->weights[i];
    while (m < k && kept < (double)s->o.top_p * total &&
           (m == 0 || s->weights[m] >= (double)s->o.min_p * s->weights[0]))
        kept += s->weights[m++];
    double left = draw(s, position) * kept;
    while (chosen + 1 < m && left >= s->weights[chosen]) left -= s->weights[chosen++];
    *id = s->candidates[chosen].id;
    return HT_OK;
}

/* ---- without it ---- */

struct kept { // a prefix of the order: whole buckets, and the first ones of another
    int32_t bucket;
    int64_t n_in_bucket;
    double sum;
};

/* Where top-p and min-p end. */
static enum ht_status find_end(struct ht_sampler *s, const struct ht_sampler_row *row,
                               const double *sum, struct kept *out)
{
    const double min_p = (double)s->o.min_p;
    double total = 0.0, wanted, kept = 0.0;
    // buckets whose weights are all min_p at least; one less, for rounding at the border
    const double far = min_p > 0.0 ? -log(min_p) * row->temperature * (double)row->scale - 1.0
                                   : (double)HT_SAMPLER_BUCKETS;
    int32_t b = 0;

    for (int32_t i = 0; i < HT_SAMPLER_BUCKETS; i++) total += sum[i];
    wanted = s->o.top_p < 1.0f ? (double)s->o.top_p * total : INFINITY;
    while (b < HT_SAMPLER_BUCKETS && (double)b < far && kept + sum[b] < wanted) kept += sum[b++];
    for (; b < HT_SAMPLER_BUCKETS; b++) {
        int64_t n, i = 0;
        if (sum[b] == 0.0) continue;
        HT_TRY(collect(s, row, b, b, &n));
        while (i < n && kept < wanted && ((b == 0 && i == 0) || s->weights[i] >= min_p))
            kept += s->weights[i++];
        *out = (struct kept){ b, i, kept };
        if (i < n) return HT_OK;
    }
    *out = (struct kept){ HT_SAMPLER_BUCKETS, 0, kept };
    return HT_OK;
}

static enum ht_status pick_of_all(struct ht_sampler *s, const struct ht_sampler_row *row,
                                  int64_t position, int32_t *id)
{
    double sum[HT_SAMPLER_BUCKETS + 1];
    struct kept end;

    memset(sum, 0, sizeof sum);
    sums_fn[s->isa](row, sum);
    HT_TRY(find_end(s, row, sum, &end));
    double left = draw(s, position) * end.sum;
    *id = first_of(row);
    for (int32_t b = 0; b <= end.bucket && b < HT_SAMPLER_BUCKETS; b++) {
        const bool is_last = b == end.bucket;
        int64_t n;
        if (!is_last && left >= sum[b]) {
            left -= sum[b];
            continue;
        }
        HT_TRY(collect(s, row, b, b, &n));
        if (is_last) n = end.n_in_bucket;
        for (int64_t i = 0; i < n; i++) {
            *id = s->candidates[i].id;
            if (left < s->weights[i]) return HT_OK;
            left -= s->weights[i];
        }
    }
    return HT_OK; // rounding took the draw past the end: the last one seen
}

enum ht_status ht_sampler_pick(struct ht_sampler *s, float *logits, int64_t position, int32_t *id)
{
    const float temperature = s->o.temperature;
    struct ht_sampler_row row = { .logits = logits, .n = s->vocab_size };

    adjust(s, logits);
    scan_fn[s->isa](&row);
    if (row.n_finite == 0)
        return HT_FAIL(HT_ERR_NUMERIC, "none of the %lld logits is finite",
                       (long long)s->vocab_size);
    if (temperature == 0.0f || s->o.top_k == 1) {
        *id = first_of(&row);
        return HT_OK;
    }
    const float farthest = FARTHEST * temperature, range = row.top - row.low;
    const float used = range < farthest ? range : farthest;
    row.temperature = (double)temperature;
    row.scale = used > 0.0f ? (float)(HT_SAMPLER_BUCKETS - 1) / used : 0.0f;
    if (!isfinite(row.scale)) row.scale = 0.0f; // logits that differ by rounding alone
    const int64_t k = s->o.top_k > 0 && s->o.top_k < row.n_finite ? s->o.top_k : row.n_finite;
    if (k < row.n_finite || k <= 64) return pick_of_k(s, &row, k, position, id);
    return pick_of_all(s, &row, position, id);
}
