/* tests/core/base/simd_probe_cpu.c: compiled once per CPU level. */
#include "core/base/simd.h"
#include "core/base/isa.h"
#include "tests/core/base/simd_probe.h"

float HT_ISA_FN(ht_simd_probe_one)(enum ht_probe what, float x);

float HT_ISA_FN(ht_simd_probe_one)(enum ht_probe what, float x)
{
    float lanes[HT_VLEN];

    switch (what) {
    case HT_PROBE_EXP: vf_store(lanes, vf_exp(vf_set(x))); break;
    case HT_PROBE_BF16: vf_store(lanes, vf_from_bf16(vf_to_bf16(vf_set(x)))); break;
    case HT_PROBE_SUM: return vf_sum(vf_set(x)) == x * HT_VLEN && vf_max_lane(vf_set(x)) == x;
    }
    return lanes[HT_VLEN - 1];
}
