/* core/base/isa.h: CPU levels, and how one kernel file becomes one function per level.
 *
 * A kernel file (*_cpu.c, listed under KERNELS in CMake) is compiled once per level with HT_ISA
 * set, and names what it exports HT_ISA_FN(ht_conv1d_forward_cpu). The operation's table declares
 * and lists all copies with HT_ISA_DECLARE and HT_ISA_ROW, and indexes by be->isa.
 */
#ifndef HT_BASE_ISA_H
#define HT_BASE_ISA_H

enum ht_isa {
    HT_ISA_PLAIN,      // what the compiler assumes of the architecture (SSE2 on x86-64)
    HT_ISA_AVX2,       // AVX2, FMA, F16C
    HT_ISA_AVX512,     // AVX-512 F, BW, DQ, VL, CD
    HT_ISA_AVX512BF16, // the same with BF16 and VNNI
    HT_ISA_COUNT
};

#define HT_CAT2_(a, b) a##_##b
#define HT_CAT_(a, b) HT_CAT2_(a, b)
#define HT_ISA_FN(name) HT_CAT_(name, HT_ISA)

#if defined(__x86_64__)
#define HT_ISA_DECLARE(type, name)                                                                 \
    type name##_plain;                                                                             \
    type name##_avx2;                                                                              \
    type name##_avx512;                                                                            \
    type name##_avx512bf16
#define HT_ISA_ROW(name)                                                                           \
    {                                                                                              \
        [HT_ISA_PLAIN] = name##_plain, [HT_ISA_AVX2] = name##_avx2,                                \
        [HT_ISA_AVX512] = name##_avx512, [HT_ISA_AVX512BF16] = name##_avx512bf16                   \
    }
#else
#define HT_ISA_DECLARE(type, name) type name##_plain
#define HT_ISA_ROW(name)                                                                           \
    {                                                                                              \
        [HT_ISA_PLAIN] = name##_plain, [HT_ISA_AVX2] = name##_plain,                               \
        [HT_ISA_AVX512] = name##_plain, [HT_ISA_AVX512BF16] = name##_plain                         \
    }
#endif

/* The best level of this machine, or a lower one named by HT_CPU_ISA=plain|avx2|avx512|avx512bf16.
 */
enum ht_isa ht_isa_detect(void);

/* The best level of this machine, whatever the environment says. */
enum ht_isa ht_isa_best(void);

const char *ht_isa_name(enum ht_isa isa);

#endif
