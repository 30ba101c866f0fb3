/* core/model/params.c: initial values, element by element. */
#include "core/model/params.h"

#include <math.h>
#include <string.h>

#include "core/base/rng.h"

/* Uniform in [0, 1) for element i: the four words of one Philox block serve four elements. */
struct draws {
    uint64_t seed, stream;
    int64_t block; // of the words below, -1 = none
    uint32_t words[4];
};

static float draw_uniform(struct draws *d, int64_t i)
{
    if (i / 4 != d->block) {
        d->block = i / 4;
        ht_rng_philox(d->words, d->seed, d->stream, (uint64_t)d->block);
    }
    return (float)(d->words[i % 4] >> 8) * 0x1p-24f;
}

static float init_value(struct draws *d, const struct ht_model_config *cfg,
                        const struct ht_tensor_info *t, int64_t i)
{
    const float u = draw_uniform(d, i);
    double bound, dt;

    switch (t->role) {
    case HT_T_FINAL_NORM:
    case HT_T_NORM1:
    case HT_T_NORM2:
    case HT_T_GATED_NORM:
    case HT_T_D: return 1.0f;
    case HT_T_EMBED: return 0.02f * ht_rng_normal(d->seed, d->stream, (uint64_t)i);
    case HT_T_A_LOG: return (float)log(1.0 + 15.0 * (double)u);
    case HT_T_DT_BIAS:
        dt = exp(log((double)cfg->dt_init_min) +
                 (double)u * (log((double)cfg->dt_init_max) - log((double)cfg->dt_init_min)));
        if (dt < (double)cfg->dt_init_floor) dt = (double)cfg->dt_init_floor;
        return (float)(dt + log(-expm1(-dt)));
    case HT_T_CONV_W:
    case HT_T_CONV_B: bound = 1.0 / sqrt((double)cfg->d_conv); break;
    default: // linear weights [out, in]
        bound = 1.0 / sqrt((double)t->shape[1]);
        if (t->role == HT_T_OUT_PROJ || t->role == HT_T_O || t->role == HT_T_DOWN)
            bound /= cfg->residual_init_div;
    }
    return (float)((2.0 * (double)u - 1.0) * bound);
}

void ht_params_init(float *out, const struct ht_model_config *cfg,
                    const struct ht_tensor_list *list, uint64_t seed, int64_t flat_start, int64_t n)
{
    memset(out, 0, (size_t)n * sizeof *out);
    for (int k = 0; k < list->n_tensors; k++) {
        const struct ht_tensor_info *t = &list->tensors[k];
        const int64_t first = t->offset > flat_start ? t->offset : flat_start;
        const int64_t t_end = t->offset + t->n,
                      end = t_end < flat_start + n ? t_end : flat_start + n;
        const uint64_t stream = ht_rng_stream(t->name);

        if (first >= end) continue;
#pragma omp parallel for schedule(static)
        for (int64_t block = first / 4096; block <= (end - 1) / 4096; block++) {
            struct draws d = { .seed = seed, .stream = stream, .block = -1 };
            const int64_t lo = block * 4096 > first ? block * 4096 : first;
            const int64_t hi = (block + 1) * 4096 < end ? (block + 1) * 4096 : end;
            for (int64_t e = lo; e < hi; e++)
                out[e - flat_start] = init_value(&d, cfg, t, e - t->offset);
        }
    }
}
