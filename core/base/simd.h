/* core/base/simd.h: fp32 vectors of the width of the level being compiled, for kernel files only.
 *
 * GCC vector extensions: `a * b + c` is a fused multiply-add where the level has one. HT_VLEN is 16
 * (AVX-512), 8 (AVX2) or 4. Loads and stores need no alignment. Transcendentals are polynomials
 * with their error beside them. For bf16 dot products see the intrinsics under __AVX512BF16__.
 */
#ifndef HT_BASE_SIMD_H
#define HT_BASE_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/base/dtype.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HT_VLEN 16
#elif defined(__AVX2__)
#define HT_VLEN 8
#else
#define HT_VLEN 4
#endif

typedef float ht_vf __attribute__((vector_size(4 * HT_VLEN)));
typedef int32_t ht_vi __attribute__((vector_size(4 * HT_VLEN)));
typedef uint32_t ht_vu __attribute__((vector_size(4 * HT_VLEN)));
typedef uint16_t ht_vh __attribute__((vector_size(2 * HT_VLEN)));

static inline ht_vf vf_set(float x)
{
    return x - (ht_vf){ 0 };
}

static inline ht_vf vf_load(const float *p)
{
    ht_vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

static inline void vf_store(float *p, ht_vf v)
{
    memcpy(p, &v, sizeof v);
}

/* n < HT_VLEN elements, zeros above. */
static inline ht_vf vf_load_n(const float *p, int64_t n)
{
    ht_vf v = { 0 };
    memcpy(&v, p, (size_t)n * sizeof(float));
    return v;
}

static inline void vf_store_n(float *p, ht_vf v, int64_t n)
{
    memcpy(p, &v, (size_t)n * sizeof(float));
}

static inline ht_vf vf_from_bf16(ht_vh h)
{
#if HT_VLEN == 16 // gcc 12 splits the conversion of a whole vector into quarters
    const ht_vu u = (ht_vu)_mm512_cvtepu16_epi32((__m256i)h) << 16;
#elif HT_VLEN == 8
    const ht_vu u = (ht_vu)_mm256_cvtepu16_epi32((__m128i)h) << 16;
#else
    const ht_vu u = __builtin_convertvector(h, ht_vu) << 16;
#endif
    return (ht_vf)u;
}

/* Round to nearest even; NaN stays NaN. */
static inline ht_vh vf_to_bf16(ht_vf v)
{
#if defined(__AVX512BF16__) && HT_VLEN == 16
    return (ht_vh)_mm512_cvtneps_pbh((__m512)v);
#else
    const ht_vu u = (ht_vu)v;
    const ht_vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const ht_vu is_nan = (ht_vu)((u & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector((rounded & ~is_nan) | (((u >> 16) | 0x40u) & is_nan), ht_vh);
#endif
}

static inline ht_vf vf_load_bf16(const ht_bf16 *p)
{
    ht_vh h;
    memcpy(&h, p, sizeof h);
    return vf_from_bf16(h);
}

static inline void vf_store_bf16(ht_bf16 *p, ht_vf v)
{
    const ht_vh h = vf_to_bf16(v);
    memcpy(p, &h, sizeof h);
}

static inline ht_vf vf_load_bf16_n(const ht_bf16 *p, int64_t n)
{
    ht_vh h = { 0 };
    memcpy(&h, p, (size_t)n * sizeof(ht_bf16));
    return vf_from_bf16(h);
}

static inline void vf_store_bf16_n(ht_bf16 *p, ht_vf v, int64_t n)
{
    const ht_vh h = vf_to_bf16(v);
    memcpy(p, &h, (size_t)n * sizeof(ht_bf16));
}

/* Element offset i of a buffer of dtype d: one predictable branch, for memory-bound kernels. */
static inline ht_vf vf_load_any(const void *p, int64_t i, enum ht_dtype d)
{
    return d == HT_DTYPE_F32 ? vf_load((const float *)p + i) : vf_load_bf16((const ht_bf16 *)p + i);
}

static inline void vf_store_any(void *p, int64_t i, enum ht_dtype d, ht_vf v)
{
    if (d == HT_DTYPE_F32)
        vf_store((float *)p + i, v);
    else
        vf_store_bf16((ht_bf16 *)p + i, v);
}

/* Sum of the lanes in a fixed tree order. */
static inline float vf_sum(ht_vf v)
{
    float a[HT_VLEN];
    memcpy(a, &v, sizeof a);
    for (int w = HT_VLEN / 2; w > 0; w /= 2)
        for (int i = 0; i < w; i++) a[i] += a[i + w];
    return a[0];
}

static inline float vf_max_lane(ht_vf v)
{
    float a[HT_VLEN];
    memcpy(a, &v, sizeof a);
    for (int i = 1; i < HT_VLEN; i++) a[0] = a[i] > a[0] ? a[i] : a[0];
    return a[0];
}

/* Where mask lanes are all ones, a; else b. */
static inline ht_vf vf_select(ht_vi mask, ht_vf a, ht_vf b)
{
    return (ht_vf)(((ht_vi)a & mask) | ((ht_vi)b & ~mask));
}

static inline ht_vf vf_max(ht_vf a, ht_vf b)
{
    return vf_select(a > b, a, b);
}
static inline ht_vf vf_min(ht_vf a, ht_vf b)
{
    return vf_select(a < b, a, b);
}

/* exp: 2^n * p(r), degree 6; relative error below 2e-7 on [-87, 88]. Below -87.33 gives 0 (so
 * exp(-inf) is 0), above 88.73 gives inf, NaN gives NaN. */
static inline ht_vf vf_exp(ht_vf x)
{
#if HT_VLEN == 16
    // rounding and 2^n are instructions here: 1.9 ns per vector on Zen 5, where the lines for the
    // other levels take 4.9. max and min return their second operand for a NaN.
    const __m512 clamped =
        _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-88.0f), (__m512)x));
    const ht_vf n = (ht_vf)_mm512_roundscale_ps(
        _mm512_mul_ps(clamped, _mm512_set1_ps(1.44269504088896341f)), 8);
    ht_vf r = (ht_vf)clamped - n * 0.693359375f; // ln 2 in two parts
#else
    const ht_vf clamped = vf_min(vf_max(x, vf_set(-87.33f)), vf_set(88.72f));
    const ht_vf magic = vf_set(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const ht_vf shifted = clamped * 1.44269504088896341f + magic;
    const ht_vf n = shifted - magic;
    ht_vf r = clamped - n * 0.693359375f; // ln 2 in two parts
#endif
    r = r + n * 2.12194440e-4f;
    ht_vf p = vf_set(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
#if HT_VLEN == 16
    const __mmask16 not_tiny = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.33f), _CMP_NLT_UQ);
    return (ht_vf)_mm512_maskz_scalef_ps(not_tiny, (__m512)p, (__m512)n);
#else
    // 2^n in two factors, so that n = 128 does not overflow the exponent field
    const ht_vi ni = (ht_vi)shifted - (ht_vi)magic;
    const ht_vi half = ni >> 1;
    const ht_vf s1 = (ht_vf)((half + 127) << 23), s2 = (ht_vf)((ni - half + 127) << 23);
    ht_vf y = p * s1 * s2;
    y = vf_select(x < vf_set(-87.33f), vf_set(0.0f), y);
    y = vf_select(x > vf_set(88.72f), vf_set(INFINITY), y);
    return vf_select(x != x, x, y);
#endif
}

static inline ht_vf vf_sigmoid(ht_vf x)
{
    return 1.0f / (1.0f + vf_exp(-x));
}
static inline ht_vf vf_silu(ht_vf x)
{
    return x / (1.0f + vf_exp(-x));
}

/* silu'(x) = s * (1 + x * (1 - s)), s = sigmoid(x) */
static inline ht_vf vf_silu_grad(ht_vf x)
{
    const ht_vf s = vf_sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

#endif
