/* bench/hybridbench/samples.c: collected values, sorted when first asked. */
#include "bench/hybridbench/samples.h"

#include <math.h>
#include <stdlib.h>

enum ht_status ht_samples_add(struct ht_samples *s, double value)
{
    if (s->n == s->capacity) {
        const size_t capacity = s->capacity ? 2 * s->capacity : 256;
        double *grown = realloc(s->values, capacity * sizeof *grown);
        if (!grown) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu measurements", capacity);
        s->values = grown;
        s->capacity = capacity;
    }
    s->values[s->n++] = value;
    s->sorted = false;
    return HT_OK;
}

void ht_samples_free(struct ht_samples *s)
{
    free(s->values);
    *s = (struct ht_samples){ 0 };
}

double ht_samples_mean(const struct ht_samples *s)
{
    double sum = 0.0;

    for (size_t i = 0; i < s->n; i++) sum += s->values[i];
    return s->n ? sum / (double)s->n : NAN;
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double ht_samples_quantile(struct ht_samples *s, double q)
{
    if (s->n == 0) return NAN;
    if (!s->sorted) qsort(s->values, s->n, sizeof *s->values, ascending);
    s->sorted = true;
    const double at = q * (double)(s->n - 1);
    const size_t low = (size_t)at, high = low + 1 < s->n ? low + 1 : low;
    return s->values[low] + (at - (double)low) * (s->values[high] - s->values[low]);
}
