/* ssm/ssd_cuda_layout.h: inside the CUDA scan only: how work is cut and what scratch it takes.
 *
 * Plain arithmetic on shapes, so that a run can be planned without a GPU. Kernels read the borders
 * of sequences on the device; the host knows only how many there are. Hence slots: cut every
 * sequence into pieces of `span` tokens; piece k of sequence s has slot starts[s] / span + s + k,
 * and T / span + n_seqs slots are always enough (some stay empty).
 */
#ifndef HT_SSM_SSD_CUDA_LAYOUT_H
#define HT_SSM_SSD_CUDA_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "ssm/ssd.h"

enum {
    HT_SSD_CUDA_CHUNK = 64,   // of the kernels, whatever ht_ssd_args.chunk says
    HT_SSD_CUDA_SUMS = 8 * 3, // per slot and head: 8 warps x grad of dt_bias, A, D
};

static inline int64_t ht_ssd_cuda_slots(int64_t n_tokens, int64_t n_seqs, int64_t span)
{
    return n_tokens / span + n_seqs;
}

/* Tokens per piece of a walk over chunks that has n_columns thread blocks per piece: the whole
 * sequence where there are enough of them, otherwise segments that are combined. */
int64_t ht_ssd_cuda_span(int64_t n_tokens, int64_t n_seqs, int64_t n_columns);

/* Heads of one thread block of the backward's last phase, which is the order in which grad_B and
 * grad_C are summed; from the shape alone. */
struct ht_ssd_cuda_blocks {
    int64_t heads, per_group;
};
struct ht_ssd_cuda_blocks ht_ssd_cuda_backward_blocks(const struct ht_ssd_args *a);

/* Scratch of the states that enter (or leave) the pieces of a walk over n_heads heads. */
size_t ht_ssd_cuda_segment_bytes(const struct ht_ssd_args *a, int64_t n_heads, int64_t span);

/* Blocks of heads per round of the backward: the states of one round fit into `bytes` (at least one
 * block is returned). */
int64_t ht_ssd_cuda_round(const struct ht_ssd_args *a, size_t bytes);

/* Scratch of a round of n_blocks blocks, and what all rounds share. */
size_t ht_ssd_cuda_round_bytes(const struct ht_ssd_args *a, int64_t n_blocks);
size_t ht_ssd_cuda_shared_bytes(const struct ht_ssd_args *a);

#endif
