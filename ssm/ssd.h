/* ssm/ssd.h: the chunked SSD scan of Mamba-2 (spec 4; Dao & Gu 2024), forward, backward, one step.
 *
 *   dt = clamp(softplus(dt_raw + dt_bias), dt_min, dt_max)     A = -exp(A_log)     (fp32)
 *   S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t           y_t = S_t C_t + D x_t
 *
 * per head; S is (d_head, d_state), fp32. Every sequence is cut into its own chunks, so no chunk spans two.
 * Head k uses group k / (n_heads / n_groups). `chunk` changes speed and rounding, never the mathematics.
 * Backward recomputes decay, scores and states from the inputs (spec 4.2, B1..B6, rectangle sums). All
 * reductions (over t, heads, chunks) have a fixed order that does not depend on the thread count.
 */
#ifndef HT_SSM_SSD_H
#define HT_SSM_SSD_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"
#include "core/base/seqs.h"

struct ht_ssd_args {
    struct ht_seqs seqs;
    int64_t n_tokens, n_heads, d_head, d_state, n_groups, chunk; // T, H, P, N, G, Q
    enum ht_dtype dtype; // of x, B, C, dt_raw, y and their gradients
    float dt_min, dt_max; // clamp; 0 and INFINITY for none
    const void *x;       // (T, H*P), rows x_stride apart
    const void *B, *C;   // (T, G*N), rows x_stride apart: x | B | C are one conv output row
    int64_t x_stride;
    const void *dt_raw; // (T, H), rows dt_stride apart
    int64_t dt_stride;
    const float *dt_bias, *A_log, *D; // (H)
    void *y;                          // (T, H*P), rows y_stride apart
    int64_t y_stride;
    const float *init_state; // (n_seqs, H, P, N) entering each sequence, or NULL for zero
    float *final_state;      // (n_seqs, H, P, N) written, or NULL; may equal init_state
    // backward only (y is not read)
    const void *grad_y; // (T, H*P), rows grad_y_stride apart
    int64_t grad_y_stride;
    void *grad_x;            // (T, H*P), rows grad_x_stride apart
    void *grad_B, *grad_C;   // (T, G*N), rows grad_x_stride apart
    int64_t grad_x_stride;
    void *grad_dt_raw; // (T, H), rows grad_dt_stride apart
    int64_t grad_dt_stride;
    float *grad_dt_bias, *grad_A_log, *grad_D; // (H), added to
    const float *grad_final_state;             // (n_seqs, H, P, N), or NULL for zero
    float *grad_init_state;                    // (n_seqs, H, P, N) written, or NULL
};

/* HT_ERR_ARG: chunk not a power of two in 16..256, d_head or d_state not a multiple of 8 or above 256, H
 * not a multiple of G, a clamp that is not 0 <= dt_min <= dt_max. */
enum ht_status ht_ssd_forward(struct ht_backend *be, const struct ht_ssd_args *a);
enum ht_status ht_ssd_backward(struct ht_backend *be, const struct ht_ssd_args *a);

/* Enough for any way of cutting n_tokens into sequences (seqs is not read), with as many workers as OpenMP
 * would start here. With less scratch fewer workers run, to the same bits; HT_ERR_MEMORY below one. */
size_t ht_ssd_forward_scratch_bytes(const struct ht_ssd_args *a);
size_t ht_ssd_backward_scratch_bytes(const struct ht_ssd_args *a);

/* The same on the CUDA backend (arithmetic only: no GPU is needed to ask). The backward's suffices for
 * n_tokens / 64 or seqs.n_seqs sequences, whichever is more (starts are not read); with other amounts
 * it works on more or fewer heads at a time, and HT_ERR_MEMORY below one block of heads.
 *
 * CUDA kernels work in chunks of 64 tokens whatever `chunk` says. Rows of x, B, C, y, grad_y, grad_x,
 * grad_B and grad_C must start at multiples of 16 bytes (HT_ERR_ARG). */
size_t ht_ssd_forward_scratch_bytes_cuda(const struct ht_ssd_args *a);
size_t ht_ssd_backward_scratch_bytes_cuda(const struct ht_ssd_args *a);

/* States of many sequences. In bf16 they are rounded stochastically whenever they are written
 * (ssm/state_round.h): how token i of a call rounds depends on stream, its position and the element
 * alone. */
struct ht_ssm_states {
    void *p;             // (n_slots, H, P, N)
    enum ht_dtype dtype; // fp32 or bf16
    // for bf16
    uint32_t stream;         // of a layer
    const int64_t *position; // (n_tokens) of each token in its sequence; NULL: first_position + i
    int64_t first_position;
};

/* One token for each of n_tokens sequences (decode, spec 4.3), state updated in place at
 * slot[i] * H*P*N; slot -1 is a padding row: y = 0, no state touched. Uses x, B, C, dt_raw, dt_bias,
 * A_log, D, y, strides and the clamp of `a`; seqs and chunk are ignored. slot NULL means slot[i] = i. No two
 * tokens of a call may name the same slot. */
enum ht_status ht_ssd_step(struct ht_backend *be, const struct ht_ssd_args *a,
                           const struct ht_ssm_states *states, const int32_t *slot);

/* The state of a slot, n = H*P*N elements of it, as fp32 for a scan's init_state; and back after its
 * last token, at first_position. */
enum ht_status ht_ssm_state_load(struct ht_backend *be, float *to,
                                 const struct ht_ssm_states *states, int64_t slot, int64_t n);
enum ht_status ht_ssm_state_store(struct ht_backend *be, const struct ht_ssm_states *states,
                                  int64_t slot, int64_t n, const float *from);

#endif
