/* core/base/rng.h: counter-based random numbers (Philox4x32-10, Salmon et al. 2011).
 *
 * A draw is a pure function of (seed, stream, counter): nothing is carried along, so ranks, resumes
 * and backends agree. `stream` names the purpose (a hash of a tensor's name, a sample index, ...).
 */
#ifndef HT_BASE_RNG_H
#define HT_BASE_RNG_H

#include <stdint.h>

/* Four independent 32-bit words. */
void ht_rng_philox(uint32_t out[4], uint64_t seed, uint64_t stream, uint64_t counter);

/* 64 bits. */
uint64_t ht_rng_u64(uint64_t seed, uint64_t stream, uint64_t counter);

/* Uniform in [0, 1), 24 bits. */
float ht_rng_uniform(uint64_t seed, uint64_t stream, uint64_t counter);

/* Standard normal (Box-Muller in fp64, same bits everywhere libm agrees). */
float ht_rng_normal(uint64_t seed, uint64_t stream, uint64_t counter);

/* A stream number from a name (FNV-1a, 64 bits). */
uint64_t ht_rng_stream(const char *name);

#endif
