/* core/ops/quant.h: quantised weight matrices and their products y = x W^T.
 *
 * W is [out, in] = (n, k), quantised in groups of `group` elements along k, per row:
 *
 *   HT_Q_BF16    w = bf16                                   16 bits per weight
 *   HT_Q_INT8    w = scale * q,          q in -127..127      8.5 (group 32), 8.25 (64)
 *   HT_Q_INT4    w = scale * (q - 8),    q in 0..15          4.5,            4.25
 *   HT_Q_INT4Z   w = scale * (q - zero), q, zero in 0..15    4.75,           4.375
 *   HT_Q_FP8     w = scale * e4m3 (fp8.h)                    8.5,            8.25 (host: 16)
 *
 * Scales are bf16, zero points are integers. int8 scales come from the largest magnitude, those of
 * 4 bits from a search for the least squared error (quant_rows.c); those of fp8 are powers of two,
 * so every value is a bf16 number: a matrix of the host holds those numbers as HT_Q_BF16 does and
 * its format is HT_Q_BF16, as no CPU multiplies fp8; one of a device holds the codes. A matrix is
 * packed once, into strips of 16 rows (quant_impl.h), and then streamed.
 *
 * Arithmetic of a product, for every m:
 *   int8, int4, int4z  a row of x is quantised to int8 with one fp32 scale per group (`precise`: to
 *                      15 bits, as two int8 digits); the sum over a group is exact in int32; group
 *                      sums are added in fp32 in order of k.
 *   bf16               x is rounded to bf16; sums are fp32 in order of k.
 * CUDA: x is rounded to bf16 in every format (`precise` is refused for fp32 x), codes are exact in
 * bf16; group sums and sums over an eighth of k are fp32 in order of k, then added in order.
 * A row of y depends on its row of x, on W and on the CPU level alone: not on m (1 to thousands),
 * on its place in the batch, nor on the threads. So decoding and prefill give the same bits.
 *
 * Error from x alone, root mean square over that of y, normal data (measured; test_quant.c bounds
 * it): int8, int4, int4z 0.0052 (group 64: 0.0056), `precise` 0.00002, bf16 0.0017 from fp32 x and
 * none from bf16 x. From W alone: bf16 0.0017, int8 0.0051 (64: 0.0056), int4 0.076 (0.083), int4z
 * 0.074 (0.082), fp8 0.026 (0.026). A NaN or infinity in a row of x makes its row of y NaN (bf16:
 * NaN or infinite).
 */
#ifndef HT_OPS_QUANT_H
#define HT_OPS_QUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/arena.h"
#include "core/base/backend.h"
#include "core/base/dtype.h"

enum ht_qformat { HT_Q_BF16, HT_Q_INT8, HT_Q_INT4, HT_Q_INT4Z, HT_Q_FP8, HT_Q_COUNT };

/* "bf16", "int8", "int4", "int4z", "fp8"; and back (HT_ERR_ARG lists the names). */
const char *ht_qformat_name(enum ht_qformat f);
enum ht_status ht_qformat_parse(enum ht_qformat *out, const char *name);

/* ---- rows as files hold them: row-major, readable with any tool ---- */

struct ht_qrows {
    enum ht_qformat format;
    int group;             // 32 or 64; ignored by bf16
    int64_t n_rows, k;     // n_groups = ceil(k / group), the last one may be short
    const void *codes;     // bf16: (n_rows, k) ht_bf16; int8: (n_rows, k) int8_t; fp8: the same
                           // of bytes, none of them NaN;
                           // int4: (n_rows, ceil(k/2)) bytes, even k in the low half
    const ht_bf16 *scales; // (n_rows, n_groups); NULL for bf16
    const uint8_t *zeros;  // (n_rows, n_groups); int4z only
};

static inline int64_t ht_q_groups(enum ht_qformat f, int group, int64_t k)
{
    return f == HT_Q_BF16 ? 0 : (k + group - 1) / group;
}
/* Bytes of one row's codes. */
static inline int64_t ht_q_code_bytes(enum ht_qformat f, int64_t k)
{
    return f == HT_Q_BF16 ? 2 * k : f == HT_Q_INT8 || f == HT_Q_FP8 ? k : (k + 1) / 2;
}

/* Quantise n_rows rows of w (fp32 or bf16, ldw elements apart) into codes, scales and zeros laid
 * out as above. Any thread. HT_ERR_NUMERIC names the first element that is not finite. */
enum ht_status ht_quantise_rows(int n_threads, enum ht_qformat f, int group, const void *w,
                                enum ht_dtype dtype, int64_t ldw, int64_t n_rows, int64_t k,
                                void *codes, ht_bf16 *scales, uint8_t *zeros);

/* The values that they stand for: (n_rows, k) fp32, ldo elements apart. */
void ht_dequantise_rows(const struct ht_qrows *rows, float *out, int64_t ldo);

/* ---- packed matrices ---- */

struct ht_qmatrix { // read-only for callers
    enum ht_qformat format;
    int group;
    int64_t n, k;        // out, in
    int64_t k_padded;    // multiple of the group (bf16: of 32)
    size_t strip_bytes;  // of 16 rows
    size_t bytes;        // of data: what a product with few rows of x reads
    unsigned char *data; // 64-byte aligned
    bool owned;
    int fp8_group;         // not 0: format is bf16, values are those of HT_Q_FP8 in such groups
    struct ht_backend *be; // whose memory data is (borrowed); NULL: the host's
};

/* Bytes that ht_qmatrix_create takes from an arena. */
size_t ht_qmatrix_bytes(enum ht_qformat f, int group, int64_t n, int64_t k);

/* A matrix of zeros, in arena (NULL: in memory of its own). Set its rows next. */
enum ht_status ht_qmatrix_create(struct ht_qmatrix *q, struct ht_arena *arena, enum ht_qformat f,
                                 int group, int64_t n, int64_t k);
/* The same in memory of its own of that backend, packed as its kernels want it: for products on it
 * alone. be must outlive the matrix. */
enum ht_status ht_qmatrix_create_on(struct ht_qmatrix *q, struct ht_backend *be, enum ht_qformat f,
                                    int group, int64_t n, int64_t k);
void ht_qmatrix_free(struct ht_qmatrix *q); // nothing to free when it lives in an arena

/* Quantise and pack rows row0 .. row0 + n_rows - 1. Several sources (q, k, v) may fill one matrix.
 * Not from two threads at once; uses the OpenMP threads of be (NULL: one). */
enum ht_status ht_qmatrix_set_rows(struct ht_qmatrix *q, struct ht_backend *be, int64_t row0,
                                   int64_t n_rows, const void *w, enum ht_dtype dtype, int64_t ldw);

/* Pack rows that are quantised already; format, group and k must be those that q was created with.
 * HT_ERR_NUMERIC: an fp8 code that is NaN. */
enum ht_status ht_qmatrix_set_qrows(struct ht_qmatrix *q, struct ht_backend *be, int64_t row0,
                                    const struct ht_qrows *rows);

/* Dequantise rows row0 .. row0 + n_rows - 1 to fp32 (embedding lookup, tests, fallbacks). */
enum ht_status ht_qmatrix_get_rows(const struct ht_qmatrix *q, int64_t row0, int64_t n_rows,
                                   float *out, int64_t ldo);

/* out (n_tokens, k) fp32 = multiplier * rows ids of q, in the memory of be. CPU: HT_ERR_ARG for an
 * id that is not a row of q. CUDA: its row becomes NaN (the host cannot look without waiting). */
enum ht_status ht_qmatrix_embed(struct ht_backend *be, const struct ht_qmatrix *q, int64_t n_tokens,
                                const int32_t *ids, float multiplier, float *out);

/* ---- product ---- */

/* y = alpha * x W^T + beta * y */
struct ht_qgemm_args {
    int64_t m;
    const struct ht_qmatrix *w;     // (n, k)
    enum ht_dtype x_dtype, y_dtype; // F32 or BF16, each
    const void *x;                  // (m, k)
    int64_t ldx;                    // elements between rows
    void *y;                        // (m, n), must not overlap x
    int64_t ldy;
    float alpha, beta; // beta is 0 (y need not be initialised) or 1
    bool precise;      // two int8 digits per activation: half the speed where m > ~8
};

/* HT_ERR_ARG: a negative size, a stride below the row, beta not 0 or 1, a matrix without data. One
 * thread at a time may use a backend. */
enum ht_status ht_qgemm(struct ht_backend *be, const struct ht_qgemm_args *a);

/* Taken from be->scratch during the call: for up to m rows of x and this k. */
size_t ht_qgemm_scratch_bytes(int64_t m, int64_t k);

#endif
