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

/* ---- on a device ----
 *
 * Strips of 16 rows again, k padded to 64. Codes stand in the order in which the lanes of a warp
 * want them as the A operand of mma.m16n8k16: lane 4g + t has rows g and g + 8, and of every unit
 * of 64 columns those that are 8t .. 8t + 7 of either half of 32; one step of the product takes
 * four of them. So a lane reads 16 bytes at a time, 16 (int8, fp8), 32 (int4) or 8 (bf16) codes.
 *
 *   scales  (k_padded / group, 8, 2) bf16: rows g, g + 8
 *   zeros   the same in uint8, int4z only; then padding to 64 bytes
 *   codes   bf16    (units, 4 steps, 32 lanes, 2 pairs of k, 2 rows, 2)
 *           int8    (units, 2 halves, 32 lanes, 2 steps, 2 rows, 4) q, k in the order 0 2 1 3
 *           fp8     the same places, e4m3
 *           int4*   (units, 32 lanes, 4 steps, 32 bits): bits 4 (2 pair + row) .. of the low (even
 *                   k) and the high half word (odd k)
 */
enum { HT_Q_DEVICE_UNIT = 64 };

#ifdef __CUDACC__
#define HT_Q_EVERYWHERE static inline __host__ __device__
#else
#define HT_Q_EVERYWHERE static inline
#endif

struct ht_q_place {
    int64_t byte; // within the codes of a strip
    int shift;    // int4
};

/* Where the code of a strip's row and column k is. */
HT_Q_EVERYWHERE struct ht_q_place ht_q_device_place(enum ht_qformat f, int64_t row, int64_t k)
{
    const int64_t unit = k / 64, half = k % 64 / 32, step = 2 * half + k % 8 / 4;
    const int64_t lane = row % 8 * 4 + k % 32 / 8, e = k % 4, pair_row = e / 2 * 2 + row / 8;
    struct ht_q_place at;

    at.shift = 0;
    if (f == HT_Q_BF16) {
        at.byte = ((unit * 4 + step) * 32 + lane) * 16 + pair_row * 4 + e % 2 * 2;
    } else if (f == HT_Q_INT8 || f == HT_Q_FP8) {
        at.byte =
            ((unit * 2 + half) * 32 + lane) * 16 + (step % 2 * 2 + row / 8) * 4 + e % 2 * 2 + e / 2;
    } else {
        const int64_t bit = e % 2 * 16 + pair_row * 4;
        at.byte = (unit * 32 + lane) * 16 + step * 4 + bit / 8;
        at.shift = (int)(bit % 8);
    }
    return at;
}

/* Of a row within a group's scales or zero points. */
HT_Q_EVERYWHERE int64_t ht_q_device_scale(int64_t row)
{
    return row % 8 * 2 + row / 8;
}

static inline size_t ht_q_device_zeros_at(const struct ht_qmatrix *q)
{
    return q->format == HT_Q_BF16 ? 0
                                  : (size_t)(q->k_padded / q->group) * HT_Q_STRIP * sizeof(ht_bf16);
}
static inline size_t ht_q_device_codes_at(const struct ht_qmatrix *q)
{
    const size_t zeros =
        q->format == HT_Q_INT4Z ? (size_t)(q->k_padded / q->group) * HT_Q_STRIP : 0;
    return ht_arena_bytes(ht_q_device_zeros_at(q) + zeros);
}

/* quant_device.c. q: all but data. */
enum ht_status ht_qmatrix_device_create(struct ht_qmatrix *q);
enum ht_status ht_qmatrix_device_pack(struct ht_qmatrix *q, int n_threads, int64_t row0,
                                      const struct ht_qrows *rows);
enum ht_status ht_qmatrix_device_unpack(const struct ht_qmatrix *q, int64_t row0, int64_t n_rows,
                                        float *out, int64_t ldo);

ht_qgemm_fn ht_qgemm_cuda;
enum ht_status ht_qmatrix_embed_cuda(struct ht_backend *be, const struct ht_qmatrix *q,
                                     int64_t n_tokens, const int32_t *ids, float multiplier,
                                     float *out);

#endif
