/* core/base/dtype.c: scalar conversions; hot loops use core/base/simd.h instead. */
#include "core/base/dtype.h"

const char *ht_dtype_name(enum ht_dtype d)
{
    switch (d) {
    case HT_DTYPE_F32: return "fp32";
    case HT_DTYPE_BF16: return "bf16";
    case HT_DTYPE_F16: return "fp16";
    case HT_DTYPE_COUNT: break;
    }
    return "unknown dtype";
}

float ht_f16_to_f32(uint16_t v)
{
    const uint32_t sign = (uint32_t)(v & 0x8000u) << 16;
    uint32_t exponent = (v >> 10) & 0x1fu, mantissa = v & 0x3ffu, u;
    float f;

    if (exponent == 31) {
        u = sign | 0x7f800000u | (mantissa << 13);
    } else if (exponent != 0) {
        u = sign | ((exponent + 112) << 23) | (mantissa << 13);
    } else { // zero or subnormal: mantissa * 2^-24 is exact in fp32
        f = (float)mantissa * 0x1p-24f;
        return sign ? -f : f;
    }
    memcpy(&f, &u, sizeof f);
    return f;
}

float ht_load_f32(const void *p, int64_t i, enum ht_dtype d)
{
    switch (d) {
    case HT_DTYPE_F32: return ((const float *)p)[i];
    case HT_DTYPE_BF16: return ht_bf16_to_f32(((const ht_bf16 *)p)[i]);
    case HT_DTYPE_F16: return ht_f16_to_f32(((const uint16_t *)p)[i]);
    case HT_DTYPE_COUNT: break;
    }
    return 0.0f;
}

void ht_store_f32(void *p, int64_t i, enum ht_dtype d, float v)
{
    if (d == HT_DTYPE_F32)
        ((float *)p)[i] = v;
    else
        ((ht_bf16 *)p)[i] = ht_f32_to_bf16(v);
}

void ht_convert(void *dst, enum ht_dtype dd, const void *src, enum ht_dtype sd, int64_t n)
{
    if (dd == sd) {
        memcpy(dst, src, (size_t)n * ht_dtype_bytes(dd));
        return;
    }
    for (int64_t i = 0; i < n; i++) ht_store_f32(dst, i, dd, ht_load_f32(src, i, sd));
}
