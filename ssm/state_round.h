/* ssm/state_round.h: inside ssm only: SSM states in bf16, rounded stochastically.
 *
 * S = exp(dt A) S + dt x B adds small terms to a large state: rounded to nearest, terms below half
 * a unit in the last place (2^-9 of the state) vanish for ever. Rounded up with a probability equal
 * to what is cut off, the state is right on average: E[round(s)] = s. The noise of an element is a
 * hash of (stream, position of the token, element): a result depends neither on the batch nor on
 * the place of the state, and is the same on every backend for the same fp32 value.
 */
#ifndef HT_SSM_STATE_ROUND_H
#define HT_SSM_STATE_ROUND_H

#include <stdint.h>

#ifdef __CUDACC__
#define HT_STATE_FN static __host__ __device__ __forceinline__
#else
#define HT_STATE_FN static inline
#endif

/* A permutation of 32-bit words in which every bit depends on all (lowbias32, Wellons 2018). */
HT_STATE_FN uint32_t ht_state_mix(uint32_t x)
{
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

HT_STATE_FN uint32_t ht_state_key(uint32_t stream, int64_t position)
{
    return ht_state_mix(ht_state_mix((uint32_t)position) + stream * 0x9e3779b1u);
}

/* bf16 of the fp32 value with these bits; `noise` decides by its low 16 bits. inf and NaN stay. */
HT_STATE_FN uint32_t ht_state_bf16(uint32_t bits, uint32_t noise)
{
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits >> 16 | (bits & 0x7fffffu ? 0x40u : 0u);
    return (bits + (noise & 0xffffu)) >> 16;
}

/* Noise of element i of a state (n_heads, d_head, d_state). */
HT_STATE_FN uint32_t ht_state_noise(uint32_t key, uint32_t i)
{
    return ht_state_mix(i * 0x9e3779b1u + key);
}

#endif
