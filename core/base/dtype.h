/* core/base/dtype.h: element types of tensors and scalar conversions between them. */
#ifndef HT_BASE_DTYPE_H
#define HT_BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum ht_dtype {
    HT_DTYPE_F32,
    HT_DTYPE_BF16, // upper half of an fp32; stored as ht_bf16
    HT_DTYPE_F16,  // files only; computed in F32 or BF16
    HT_DTYPE_COUNT
};

typedef uint16_t ht_bf16;

static inline size_t ht_dtype_bytes(enum ht_dtype d)
{
    return d == HT_DTYPE_F32 ? 4 : 2;
}

/* "fp32", "bf16", "fp16". */
const char *ht_dtype_name(enum ht_dtype d);

static inline float ht_bf16_to_f32(ht_bf16 v)
{
    const uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* Round to nearest even; NaN stays NaN. */
static inline ht_bf16 ht_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (ht_bf16)((u >> 16) | 0x40u);
    return (ht_bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

float ht_f16_to_f32(uint16_t v);

/* Element i of a buffer as fp32, whatever its type; and back (F32 or BF16). */
float ht_load_f32(const void *p, int64_t i, enum ht_dtype d);
void ht_store_f32(void *p, int64_t i, enum ht_dtype d, float v);

/* n elements from src (sd) to dst (dd); F32, BF16 or F16 in, F32 or BF16 out. No overlap. */
void ht_convert(void *dst, enum ht_dtype dd, const void *src, enum ht_dtype sd, int64_t n);

#endif
