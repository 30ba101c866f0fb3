/* attention/rope_cpu.c: rotary embedding in place (spec 3.5). Bound by memory: q and k are read and
 * written once; a token's row of the table stays in L1 for all its heads. Arithmetic in fp32. */
#include "attention/attention_cpu.h"
#include "core/base/simd.h"

ht_rope_fn HT_ISA_FN(ht_rope_apply_cpu);

static void rotate_head(void *x, int64_t at, int64_t half, const float *c, const float *s,
                        float sign, enum ht_dtype dtype)
{
    int64_t i = 0;

    for (; i + HT_VLEN <= half; i += HT_VLEN) {
        const ht_vf a = vf_load_any(x, at + i, dtype), b = vf_load_any(x, at + half + i, dtype);
        const ht_vf cos_a = vf_load(c + i), sin_a = vf_load(s + i) * sign;
        vf_store_any(x, at + i, dtype, a * cos_a - b * sin_a);
        vf_store_any(x, at + half + i, dtype, b * cos_a + a * sin_a);
    }
    for (; i < half; i++) {
        const float a = ht_load_f32(x, at + i, dtype), b = ht_load_f32(x, at + half + i, dtype);
        const float sin_a = s[i] * sign;
        ht_store_f32(x, at + i, dtype, a * c[i] - b * sin_a);
        ht_store_f32(x, at + half + i, dtype, b * c[i] + a * sin_a);
    }
}

enum ht_status HT_ISA_FN(ht_rope_apply_cpu)(struct ht_backend *be, const struct ht_rope_args *a)
{
    const int64_t half = a->rope_dims / 2;
    const float sign = a->inverse ? -1.0f : 1.0f;

#pragma omp parallel for schedule(static) num_threads(be->n_threads)
    for (int64_t t = 0; t < a->n_tokens; t++) {
        const float *c = a->cos_table + a->pos[t] * half, *s = a->sin_table + a->pos[t] * half;
        for (int64_t h = 0; h < a->n_heads + a->n_kv_heads; h++)
            rotate_head(a->qkv, t * a->qkv_stride + h * a->d_head, half, c, s, sign, a->dtype);
    }
    return HT_OK;
}
