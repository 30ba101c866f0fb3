/* ssm/ssd_layout.h: inside the CPU scan only: how work is cut and where a worker's memory lies.
 *
 * A task is one sequence and one block of heads of one group. Every worker (thread) owns one slice
 * of scratch; threads beyond the slices that fit stay idle, which changes no bit of the result.
 * Sizes assume fp32 operands, so they hold at every CPU level.
 */
#ifndef HT_SSM_SSD_LAYOUT_H
#define HT_SSM_SSD_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "ssm/ssd.h"

struct ssd_decay;

static inline int64_t ht_ssd_pad(int64_t n) // to whole blocks of 16
{
    return (n + 15) / 16 * 16;
}

/* Which heads a block covers. */
struct ht_ssd_blocks {
    int64_t heads;     // of a block, at most
    int64_t per_group; // blocks of a group
};

/* Forward: follows the thread count, for no result depends on it. */
struct ht_ssd_blocks ht_ssd_forward_blocks(const struct ht_ssd_args *a, int n_threads);

/* Backward: from the shape alone, because it is the order in which grad_B and grad_C are summed. */
struct ht_ssd_blocks ht_ssd_backward_blocks(const struct ht_ssd_args *a);

/* One sequence, one block of heads. Tasks are numbered block first, then group, then sequence. */
struct ht_ssd_task {
    int64_t seq, group, block; // block counts through all groups
    int64_t head0, head1;
};
struct ht_ssd_task ht_ssd_task_at(const struct ht_ssd_args *a, const struct ht_ssd_blocks *blocks,
                                  int64_t index);

/* Operands as in ssd_cpu.h; Q chunk, Np and Pp padded d_state and d_head. */
struct ht_ssd_forward_worker {
    void *B_rows, *C_rows; // (Q, Np) rows operands
    void *B_cols;          // (Np, Q) columns operand: n contracted
    void *B_pairs, *B_t;   // j contracted: columns operand (Q, Np); rows operand (Np, Q)
    float *K;              // (Q, Q) scores
    void *x, *x_out;       // (Q, Pp) columns operands: x, and dt w x
    void *M;               // (Q, Q) rows operand: decayed scores
    void *S_pairs;         // (Np, Pp) columns operand: the state
    float *y;              // (Q, Pp)
    struct ssd_decay *decay;
    float *S; // (heads, Np, Pp)
};

struct ht_ssd_backward_worker {
    void *B_rows, *C_rows;        // (Q, Np) rows operands
    void *C_cols;                 // (Np, Q) columns operand: n contracted
    void *pairs;                  // (Q, Np) on the way to B_t and C_t
    void *B_t, *C_t;              // (Np, Q) rows operands
    float *K, *grad_K;            // (Q, Q), row j, column i >= j
    float *grad_B_t, *grad_C_t;   // (Np, Q)
    void *x_rows, *gy_rows;       // (Q, Pp) rows operands
    void *x_cols, *gy_cols;       // (Pp, Q) columns operands: p contracted
    void *gy_pairs, *gy_in_pairs; // (Q, Pp) columns operands: grad_y, and in grad_y
    void *x_out;                  // (Q, Pp) columns operand: dt w x
    float *G;                     // (Q, Q) <x_j, grad_y_i>, row j
    void *M;                      // (Q, Q) rows operand
    float *grad_u;                // (Q, Pp)
    void *grad_S_rows;            // (Np, Pp) rows operand
    void *grad_S_pairs;           // (Np, Pp) columns operand
    struct ssd_decay *decay;
    float *S, *grad_S; // (heads, Np, Pp)
    void *states;      // (segment, heads, Np, Pp) rows operands: S entering each chunk of a segment
    float *kept;       // (n_segments, heads, Np, Pp): S entering each segment
    double *head_sums; // (heads, 3): grad of dt_bias, A, D
};

struct ht_ssd_backward_shared {
    float *partial; // (blocks, T, 2, N): grad_B and grad_C of each block of heads
    float *sums;    // (n_seqs, H, 3): grad of dt_bias, A, D
};

/* Chunks whose states are held at once, and how many such segments a sequence of T tokens has. */
struct ht_ssd_segments {
    int64_t chunks, n_segments;
};
struct ht_ssd_segments ht_ssd_segments(const struct ht_ssd_args *a);

/* Bytes from `base` on; the pointers are valid when base is. */
size_t ht_ssd_forward_worker_layout(struct ht_ssd_forward_worker *w, void *base,
                                    const struct ht_ssd_args *a);
size_t ht_ssd_backward_worker_layout(struct ht_ssd_backward_worker *w, void *base,
                                     const struct ht_ssd_args *a);
size_t ht_ssd_backward_shared_layout(struct ht_ssd_backward_shared *s, void *base,
                                     const struct ht_ssd_args *a);

/* Takes the shared part and one slice for each of at most n_tasks workers from be->scratch (the
 * caller marks and resets). HT_ERR_MEMORY when not even one fits. */
enum ht_status ht_ssd_take_workers(unsigned char **shared, unsigned char **slices, int *n_workers,
                                   struct ht_backend *be, size_t shared_bytes, size_t worker_bytes,
                                   int64_t n_tasks);

#endif
