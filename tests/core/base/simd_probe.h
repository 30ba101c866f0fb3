/* tests/core/base/simd_probe.h: one lane of core/base/simd.h's functions at a given CPU level. */
#ifndef HT_TESTS_SIMD_PROBE_H
#define HT_TESTS_SIMD_PROBE_H

#include "core/base/isa.h"

enum ht_probe { HT_PROBE_EXP, HT_PROBE_BF16, HT_PROBE_SUM };

float ht_simd_probe(enum ht_isa isa, enum ht_probe what, float x);

#endif
