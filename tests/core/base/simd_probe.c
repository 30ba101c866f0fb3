/* tests/core/base/simd_probe.c: which copy of the probe runs. */
#include "tests/core/base/simd_probe.h"

typedef float probe_fn(enum ht_probe what, float x);
HT_ISA_DECLARE(extern probe_fn, ht_simd_probe_one);

float ht_simd_probe(enum ht_isa isa, enum ht_probe what, float x)
{
    static probe_fn *const probes[HT_ISA_COUNT] = HT_ISA_ROW(ht_simd_probe_one);
    return probes[isa](what, x);
}
