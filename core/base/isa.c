/* core/base/isa.c: which CPU level this machine has. */
#include "core/base/isa.h"

#include <stdlib.h>
#include <string.h>

static const char *const names[HT_ISA_COUNT] = { "plain", "avx2", "avx512", "avx512bf16" };

enum ht_isa ht_isa_best(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return HT_ISA_PLAIN;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512cd"))
        return HT_ISA_AVX2;
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni"))
        return HT_ISA_AVX512;
    return HT_ISA_AVX512BF16;
#else
    return HT_ISA_PLAIN;
#endif
}

enum ht_isa ht_isa_detect(void)
{
    const enum ht_isa best = ht_isa_best();
    const char *wanted = getenv("HT_CPU_ISA");

    for (int i = 0; wanted && i < (int)best; i++)
        if (strcmp(wanted, names[i]) == 0) return (enum ht_isa)i;
    return best;
}

const char *ht_isa_name(enum ht_isa isa)
{
    return isa < HT_ISA_COUNT ? names[isa] : "unknown level";
}
