/* tests/emu/emu_types.h: CUDA's vector types, bf16, bit casts and mathematics, on the host. */
#ifndef HT_EMU_TYPES_H
#define HT_EMU_TYPES_H

#include <cmath>
#include <cstdint>
#include <cstring>

extern "C" {
#include "core/base/dtype.h"
}

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    template <typename X = unsigned, typename Y = unsigned, typename Z = unsigned>
    constexpr dim3(X x_ = 1, Y y_ = 1, Z z_ = 1) : x((unsigned)x_), y((unsigned)y_), z((unsigned)z_)
    {
    }
};

#define HT_EMU_VECTOR2(name, type, align)                                                          \
    struct alignas(align) name {                                                                   \
        type x, y;                                                                                 \
    };                                                                                             \
    static inline name make_##name(type x, type y)                                                 \
    {                                                                                              \
        return { x, y };                                                                           \
    }
#define HT_EMU_VECTOR4(name, type, align)                                                          \
    struct alignas(align) name {                                                                   \
        type x, y, z, w;                                                                           \
    };                                                                                             \
    static inline name make_##name(type x, type y, type z, type w)                                 \
    {                                                                                              \
        return { x, y, z, w };                                                                     \
    }
HT_EMU_VECTOR2(float2, float, 8)
HT_EMU_VECTOR2(int2, int, 8)
HT_EMU_VECTOR2(uint2, unsigned, 8)
HT_EMU_VECTOR2(double2, double, 16)
HT_EMU_VECTOR4(float4, float, 16)
HT_EMU_VECTOR4(int4, int, 16)
HT_EMU_VECTOR4(uint4, unsigned, 16)

/* ---- bf16 ---- */

struct __nv_bfloat16 {
    uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
static inline float __bfloat162float(__nv_bfloat16 v)
{
    return ht_bf16_to_f32(v.bits);
}
static inline __nv_bfloat16 __float2bfloat16(float v)
{
    return { ht_f32_to_bf16(v) };
}
static inline __nv_bfloat16 __float2bfloat16_rn(float v)
{
    return { ht_f32_to_bf16(v) };
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return { __float2bfloat16(x), __float2bfloat16(y) };
}
static inline float2 __bfloat1622float2(__nv_bfloat162 v)
{
    return { __bfloat162float(v.x), __bfloat162float(v.y) };
}
static inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 v)
{
    return v.bits;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t v)
{
    return { v };
}

/* ---- bits ---- */

template <typename To, typename From>
static inline To ht_emu_bits(From v)
{
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
}
static inline float __uint_as_float(unsigned u)
{
    return ht_emu_bits<float>(u);
}
static inline unsigned __float_as_uint(float f)
{
    return ht_emu_bits<unsigned>(f);
}
static inline float __int_as_float(int u)
{
    return ht_emu_bits<float>(u);
}
static inline int __float_as_int(float f)
{
    return ht_emu_bits<int>(f);
}
static inline double __longlong_as_double(long long u)
{
    return ht_emu_bits<double>(u);
}
static inline long long __double_as_longlong(double d)
{
    return ht_emu_bits<long long>(d);
}
static inline int __popc(unsigned u)
{
    return __builtin_popcount(u);
}
static inline int __clz(int u)
{
    return u ? __builtin_clz((unsigned)u) : 32;
}
static inline int __ffs(int u)
{
    return __builtin_ffs(u);
}
static inline unsigned __brev(unsigned u)
{
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (u >> i & 1) << (31 - i);
    return r;
}
static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)((uint64_t)a * b >> 32);
}

/* ---- loads with a cache hint: plain loads ---- */

template <typename T>
static inline T __ldg(const T *p)
{
    return *p;
}
template <typename T>
static inline T __ldcs(const T *p)
{
    return *p;
}
template <typename T>
static inline T __ldcg(const T *p)
{
    return *p;
}
template <typename T>
static inline void __stcs(T *p, T v)
{
    *p = v;
}
template <typename T>
static inline void __stcg(T *p, T v)
{
    *p = v;
}

/* ---- mathematics: the fast forms are as exact as the host's library ---- */

using std::isfinite;
using std::isinf;
using std::isnan;
static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
#define __expf(x) expf(x) // macros: glibc has symbols of these names
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
static inline float __fdividef(float a, float b)
{
    return a / b;
}
static inline float __frcp_rn(float x)
{
    return 1.0f / x;
}
static inline float __frsqrt_rn(float x)
{
    return 1.0f / sqrtf(x);
}
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __saturatef(float x)
{
    return x < 0 ? 0.0f : x > 1 ? 1.0f : x;
}
static inline int __float2int_rn(float x)
{
    return (int)rintf(x);
}
static inline float fast_exp2(float x)
{
    const float y = exp2f(x);
    return fabsf(y) < 1.17549435e-38f ? 0.0f : y;
}
template <typename T>
static inline T min(T a, T b)
{
    return a < b ? a : b;
}
template <typename T>
static inline T max(T a, T b)
{
    return a > b ? a : b;
}

#endif
