/* attention/rope.c: the rotation tables, in fp64 (spec 3.5). */
#include "attention/rope.h"

#include <math.h>

static double scaled_frequency(double freq, const struct ht_rope_scaling *s)
{
    if (!s || s->factor == 0.0 || s->factor == 1.0) return freq;
    const double two_pi = 6.28318530717958647692, original = (double)s->original_max_position;
    const double wavelength = two_pi / freq;
    if (wavelength < original / s->high_freq_factor) return freq;
    if (wavelength > original / s->low_freq_factor) return freq / s->factor;
    const double blend =
        (original / wavelength - s->low_freq_factor) / (s->high_freq_factor - s->low_freq_factor);
    return (1.0 - blend) * freq / s->factor + blend * freq;
}

void ht_rope_table(float *cos_table, float *sin_table, int64_t n_positions, int64_t rope_dims,
                   double theta, const struct ht_rope_scaling *scaling)
{
    const int64_t half = rope_dims / 2;

    for (int64_t i = 0; i < half; i++) {
        const double freq =
            scaled_frequency(pow(theta, -2.0 * (double)i / (double)rope_dims), scaling);
        for (int64_t p = 0; p < n_positions; p++) {
            cos_table[p * half + i] = (float)cos((double)p * freq);
            sin_table[p * half + i] = (float)sin((double)p * freq);
        }
    }
}
