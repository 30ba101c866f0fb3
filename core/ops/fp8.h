/* core/ops/fp8.h: numbers of 8 bits with an exponent, as NVIDIA, Arm and Intel define them
 * ("FP8 Formats for Deep Learning", arXiv 2209.05433) and tensor cores multiply them.
 *
 *          sign exponent fraction  largest  smallest normal  smallest   infinity  NaN
 *   e4m3    1      4        3      448      2^-6             2^-9       none      0x7f, 0xff
 *   e5m2    1      5        2      57344    2^-14            2^-16      0x7c      0x7d .. 0x7f
 *
 * Rounded to the nearest, ties to even; what is larger than the largest becomes the largest, NaN
 * stays NaN (0x7f): cvt.rn.satfinite of the GPU, bit for bit.
 */
#ifndef HT_OPS_FP8_H
#define HT_OPS_FP8_H

#include <stdint.h>
#include <string.h>

enum ht_fp8 { HT_FP8_E4M3, HT_FP8_E5M2 };

enum { HT_FP8_NAN = 0x7f };

#ifdef __CUDACC__
#define HT_FP8_EVERYWHERE static inline __host__ __device__
#else
#define HT_FP8_EVERYWHERE static inline
#endif

HT_FP8_EVERYWHERE uint32_t ht_fp8_bits(float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

HT_FP8_EVERYWHERE float ht_fp8_number(uint32_t bits)
{
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

HT_FP8_EVERYWHERE uint8_t ht_fp8_from_f32(float v, enum ht_fp8 f)
{
    const int n_fraction = f == HT_FP8_E4M3 ? 3 : 2, bias = f == HT_FP8_E4M3 ? 7 : 15;
    const uint32_t largest = f == HT_FP8_E4M3 ? 0x7e : 0x7b, bits = ht_fp8_bits(v);
    const uint32_t size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
    uint32_t code;

    if (size > 0x7f800000u) return HT_FP8_NAN;
    if (size >= (uint32_t)(128 - bias) << 23) {
        const int drop = 23 - n_fraction;
        const uint32_t half = (1u << (drop - 1)) - 1u + (size >> drop & 1u);
        code = ((size + half) >> drop) - ((uint32_t)(127 - bias) << n_fraction);
    } else { // adding this power of two leaves as many bits as a subnormal has
        const uint32_t magic = (uint32_t)(127 + 24 - bias - n_fraction) << 23;
        code = ht_fp8_bits(ht_fp8_number(size) + ht_fp8_number(magic)) - magic;
    }
    return (uint8_t)(sign | (code > largest ? largest : code));
}

HT_FP8_EVERYWHERE float ht_fp8_to_f32(uint8_t code, enum ht_fp8 f)
{
    const int n_fraction = f == HT_FP8_E4M3 ? 3 : 2, bias = f == HT_FP8_E4M3 ? 7 : 15;
    const uint32_t size = code & 0x7fu, sign = (uint32_t)(code & 0x80u) << 24;
    const uint32_t fraction = size & ((1u << n_fraction) - 1u), exponent = size >> n_fraction;

    if (f == HT_FP8_E4M3 && size == 0x7f) return ht_fp8_number(0x7fc00000u | sign);
    if (f == HT_FP8_E5M2 && exponent == 31)
        return ht_fp8_number(sign | 0x7f800000u | fraction << 21);
    if (exponent == 0) { // fraction * 2^(1 - bias - n_fraction)
        const float v = (float)fraction * ht_fp8_number((uint32_t)(128 - bias - n_fraction) << 23);
        return sign ? -v : v;
    }
    return ht_fp8_number(sign | (exponent + (uint32_t)(127 - bias)) << 23 |
                         fraction << (23 - n_fraction));
}

/* s of the smallest scale 2^s with which values up to `most` (finite, positive) fit, at least -126.
 * A power of two, so that nothing is lost but what the format has no bits for: dividing by it is
 * exact, and e4m3 times it is a bf16 number. Another scale would only use one more binade at the
 * small end. */
HT_FP8_EVERYWHERE int ht_fp8_scale_log2(float most, enum ht_fp8 f)
{
    const uint32_t bits = ht_fp8_bits(most);
    const int top = f == HT_FP8_E4M3 ? 8 : 15; // both largest numbers are 1.75 * 2^top
    const int s = (int)(bits >> 23) - 127 - top + ((bits & 0x7fffffu) > 0x600000u);

    return s < -126 ? -126 : s;
}

/* 2^s, s in -126 .. 127. */
HT_FP8_EVERYWHERE float ht_fp8_power(int s)
{
    return ht_fp8_number((uint32_t)(s + 127) << 23);
}

#endif
