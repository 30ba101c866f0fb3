/* core/ops/quant_impl.h: inside core/ops only: how a packed matrix lies in memory, and its kernels.
 *
 * A strip holds 16 rows of W; strips follow each other, the last one is padded with zero rows:
 *
 *   scales  (n_groups, 16) bf16
 *   zeros   (n_groups, 16) uint8, int4z only; then padding to 64 bytes
 *   codes   int8   (k_padded/4, 16, 4) uint8: q + 128, four neighbours of k per row
 *           int4*  (k_padded/8, 16, 4) bytes: k = 8j + i in the low half, 8j + 4 + i in the high
 * half bf16   (k_padded/2, 16, 2)
 *
 * One 64-byte line is what one vpdpbusd (or vdpbf16ps) multiplies by four (two) neighbouring
 * elements of a row of x, giving 16 sums. The unsigned form of q is what that instruction wants;
 * its offset (128, 8 or the zero point) times the sum of x over the group is subtracted, exactly,
 * in int32. Columns behind k hold offsets, i.e. zeros.
 */
#ifndef HT_OPS_QUANT_IMPL_H
#define HT_OPS_QUANT_IMPL_H

#include "core/ops/quant.h"

enum { HT_Q_STRIP = 16 };

static inline int64_t ht_q_n_strips(const struct ht_qmatrix *q)
{
    return (q->n + HT_Q_STRIP - 1) / HT_Q_STRIP;
}

/* Offsets within a strip. */
static inline size_t ht_q_zeros_at(const struct ht_qmatrix *q)
{
    return (size_t)ht_q_groups(q->format, q->group, q->k) * HT_Q_STRIP * sizeof(ht_bf16);
}
static inline size_t ht_q_codes_at(const struct ht_qmatrix *q)
{
    const size_t zeros =
        q->format == HT_Q_INT4Z ? (size_t)ht_q_groups(q->format, q->group, q->k) * HT_Q_STRIP : 0;
    return ht_arena_bytes(ht_q_zeros_at(q) + zeros);
}

/* quant_pack.c: rows in and out of strips; arguments are checked. */
void ht_qmatrix_clear(struct ht_qmatrix *q);
void ht_qmatrix_pack(struct ht_qmatrix *q, int n_threads, int64_t row0,
                     const struct ht_qrows *rows);
void ht_qmatrix_unpack(const struct ht_qmatrix *q, int64_t row, float *out);

typedef enum ht_status ht_qgemm_fn(struct ht_backend *be, const struct ht_qgemm_args *a);

HT_ISA_DECLARE(ht_qgemm_fn, ht_qgemm_cpu);

#endif
