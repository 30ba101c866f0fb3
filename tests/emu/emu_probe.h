/* tests/emu/emu_probe.h: small kernels, right and wrong ones, for test_emu.c. */
#ifndef HT_EMU_PROBE_H
#define HT_EMU_PROBE_H

#include <stdint.h>

#include "core/base/backend.h"

/* out[i] = i * 3 for n threads of several blocks. */
enum ht_status probe_index(struct ht_backend *be, int *out, int n);
/* out[b] = sum over the threads of block b of in[b * 128 + t], by block_sum. */
enum ht_status probe_block_sum(struct ht_backend *be, float *out, const float *in, int n_blocks);
/* c (16 x 8 fp32) = a (16 x 16 bf16, row-major) * b (16 x 8 bf16, row-major): cp.async, ldmatrix,
 * mma. */
enum ht_status probe_mma(struct ht_backend *be, float *c, const void *a, const void *b);
/* c (16 x 8) = a (16 x 8) * b (8 x 8) through tf32. */
enum ht_status probe_mma_tf32(struct ht_backend *be, float *c, const float *a, const float *b);
/* Shuffles, votes and integer atomics; out[0..] as test_emu.c expects. */
enum ht_status probe_warp(struct ht_backend *be, int *out);

/* Wrong kernels: each must make the launch fail with a message that says what. */
enum probe_mistake {
    PROBE_NO_BARRIER,        // reads a neighbour's value without __syncthreads
    PROBE_NO_BARRIER_AFTER,  // overwrites what a neighbour may still read
    PROBE_DIVERGENT_BARRIER, // half the threads skip a barrier
    PROBE_TWO_BARRIERS,      // halves wait at different lines
    PROBE_MISSING_LANE,      // a shuffle that one lane skips
    PROBE_UNINITIALISED,     // shared memory that nobody wrote
    PROBE_OUT_OF_BOUNDS,     // one element past dynamic shared memory
    PROBE_STATIC_BOUNDS,     // one element past a static array
    PROBE_NO_WAIT,           // cp.async without wait
    PROBE_WAIT_TOO_FEW,      // wait that leaves the needed group pending
    PROBE_COPY_OVER_READ,    // cp.async into a buffer that others still read
    PROBE_GLOBAL_BOUNDS,     // one element past a device array
    PROBE_NO_SYNCWARP,       // lanes exchange through shared memory without __syncwarp
    PROBE_TOO_MUCH_SMEM,     // more than a block may have
    PROBE_MISTAKES
};
enum ht_status probe_mistake(struct ht_backend *be, enum probe_mistake m, float *out, float *in,
                             int n);

#endif
