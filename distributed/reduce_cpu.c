/* distributed/reduce_cpu.c: sums over ranks, a block at a time so that the running sum stays in L1.
 */
#include "distributed/reduce.h"

#include "core/base/simd.h"

enum { BLOCK = 2048 }; // 8 KiB of sums

/* vf_to_bf16 flushes denormals on AVX512-BF16 machines; sums must not depend on the level. */
static inline ht_vh round_exact(ht_vf v)
{
    const ht_vu u = (ht_vu)v;
    const ht_vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const ht_vu is_nan = (ht_vu)((u & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((rounded & ~is_nan) | (((u >> 16) | 0x40u) & is_nan), ht_vh);
}

static void add_block(float *acc, const void *src, int64_t offset, int64_t n, enum ht_dtype d)
{
    int64_t i = 0;

    for (; i + HT_VLEN <= n; i += HT_VLEN)
        vf_store(acc + i, vf_load(acc + i) + vf_load_any(src, offset + i, d));
    for (; i < n; i++) acc[i] += ht_load_f32(src, offset + i, d);
}

static void copy_block(float *acc, const void *src, int64_t offset, int64_t n, enum ht_dtype d)
{
    int64_t i = 0;

    if (d == HT_DTYPE_F32) {
        memcpy(acc, (const float *)src + offset, (size_t)n * sizeof(float));
        return;
    }
    for (; i + HT_VLEN <= n; i += HT_VLEN) vf_store(acc + i, vf_load_any(src, offset + i, d));
    for (; i < n; i++) acc[i] = ht_load_f32(src, offset + i, d);
}

void HT_ISA_FN(ht_reduce_sum_cpu)(float *out, const void *const *src, int n_src, int64_t n,
                                  enum ht_dtype d)
{
    float acc[BLOCK];

    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t m = n - i < BLOCK ? n - i : BLOCK;
        copy_block(acc, src[0], i, m, d);
        for (int r = 1; r < n_src; r++) add_block(acc, src[r], i, m, d);
        memcpy(out + i, acc, (size_t)m * sizeof(float));
    }
}

void HT_ISA_FN(ht_reduce_round_cpu)(ht_bf16 *out, const float *in, int64_t n)
{
    int64_t i = 0;

    for (; i + HT_VLEN <= n; i += HT_VLEN) {
        const ht_vh h = round_exact(vf_load(in + i));
        memcpy(out + i, &h, sizeof h);
    }
    for (; i < n; i++) out[i] = ht_f32_to_bf16(in[i]);
}
