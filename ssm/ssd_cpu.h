/* ssm/ssd_cpu.h: inside the CPU scan only: small matrix products, and one head's chunk (spec 4).
 *
 * Every product of the scan is C = A B with fp32 sums and all dimensions multiples of 16 (zeros
 * behind the end). Operands are fp32, or, where `half` is set, bf16 with the contraction in pairs:
 *   rows operand     A (m, k)           row-major
 *   columns operand  B (k/kp, n, kp)    kp = 1 (fp32) or 2 (bf16, what vdpbf16ps multiplies)
 * Seen as 32-bit words, the transpose of a rows operand (n, k) is a columns operand of the same
 * matrix with k contracted, and the transpose of a columns operand (k/kp, n, kp) is a rows operand
 * (n, k): one 32-bit transpose serves all layouts. `half` is set for bf16 inputs at the AVX512BF16
 * level; every other level widens to fp32. States and sums are fp32 always.
 *
 * Decay never appears as a difference of running sums. With da_k = dt_k A <= 0, all exponents are
 * sums of da over an interval, added up from one end, so they stay exact next to a token with
 * da = -1e4, where a_i - a_j would have lost all digits. Blocks of 16 tokens: within a block
 * interval sums row by row; between blocks exp(tail_j + blocks between) * exp(head_i), both <= 1.
 */
#ifndef HT_SSM_SSD_CPU_H
#define HT_SSM_SSD_CPU_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/simd.h"
#include "ssm/ssd_layout.h"
#include "ssm/ssm_ops.h"

enum { SSD_BLOCK = 16, SSD_MAX_CHUNK = 256, SSD_MAX_BLOCKS = SSD_MAX_CHUNK / SSD_BLOCK };

/* Whether products take bf16 operands at the level being compiled. */
static inline bool ssd_half(enum ht_dtype dtype)
{
#if defined(__AVX512BF16__)
    return dtype == HT_DTYPE_BF16;
#else
    (void)dtype;
    return false;
#endif
}

static inline size_t ssd_operand_bytes(bool half)
{
    return half ? sizeof(ht_bf16) : sizeof(float);
}

/* Sum of lanes in a fixed order. */
static inline float ssd_sum(ht_vf v)
{
#if HT_VLEN == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    return vf_sum(v);
#endif
}

static inline ht_vf ssd_load_n(const void *p, int64_t i, int64_t n, enum ht_dtype d)
{
    if (n >= HT_VLEN) return vf_load_any(p, i, d);
    if (n <= 0) return vf_set(0.0f);
    return d == HT_DTYPE_F32 ? vf_load_n((const float *)p + i, n)
                             : vf_load_bf16_n((const ht_bf16 *)p + i, n);
}

static inline void ssd_store_n(void *p, int64_t i, ht_vf v, int64_t n, enum ht_dtype d)
{
    if (n >= HT_VLEN)
        vf_store_any(p, i, d, v);
    else if (n > 0 && d == HT_DTYPE_F32)
        vf_store_n((float *)p + i, v, n);
    else if (n > 0)
        vf_store_bf16_n((ht_bf16 *)p + i, v, n);
}

/* ht_load_f32 and ht_store_f32, inline. */
static inline float ssd_load(const void *p, int64_t i, enum ht_dtype d)
{
    return d == HT_DTYPE_F32 ? ((const float *)p)[i] : ht_bf16_to_f32(((const ht_bf16 *)p)[i]);
}

static inline void ssd_store(void *p, int64_t i, enum ht_dtype d, float v)
{
    if (d == HT_DTYPE_F32)
        ((float *)p)[i] = v;
    else
        ((ht_bf16 *)p)[i] = ht_f32_to_bf16(v);
}

/* ---- ssd_mat_cpu.c ---- */

enum ssd_region {
    SSD_FULL,
    SSD_LOWER_K,   // row i contracts k <= i only (A is lower triangular)
    SSD_UPPER_K,   // row i contracts k >= i only
    SSD_LOWER_OUT, // only columns <= i are wanted (whole blocks of 16)
    SSD_UPPER_OUT, // only columns >= i are wanted
};

/* What the next head will touch: fetched into L2 a few lines per tile while this product computes.
 * A head's columns are 128 bytes of every row at P = 64, too short for the hardware's prefetchers.
 */
struct ssd_ahead {
    const void *p;
    int64_t n_rows, row_bytes, pitch_bytes;
};

/* Columns col..col+n_cols-1 of n_rows rows (may be 0 or less) from row t0 on. */
static inline struct ssd_ahead ssd_head_ahead(const void *p, int64_t stride, int64_t t0,
                                              int64_t n_rows, int64_t col, int64_t n_cols,
                                              enum ht_dtype dtype)
{
    const int64_t e = (int64_t)ht_dtype_bytes(dtype);
    return (struct ssd_ahead){ n_rows > 0 ? (const char *)p + (t0 * stride + col) * e : NULL,
                               n_rows, n_cols * e, stride * e };
}

/* v = row_scale[i] (A B)[i,j];  dot[j] += sum_i v t[i,j];  c = beta c_in + v col_scale[j]
 * Scales, dot and c_in may be NULL (1, none, 0). c_in has c's layout and may be c. */
struct ssd_gemm {
    bool half;
    enum ssd_region region;
    int64_t m, n, k;
    const void *a; // rows operand (m, k), rows lda apart
    int64_t lda;
    const void *b; // columns operand, ldb columns per slab
    int64_t ldb;
    float *c; // (m, n), rows ldc apart
    int64_t ldc;
    const float *c_in;
    float beta;
    const float *row_scale, *col_scale;
    const void *t; // rows-operand type (m, n), rows ldt apart
    int64_t ldt;
    float *dot; // (n)
    struct ssd_ahead ahead;
};
#define ssd_gemm_run HT_ISA_FN(ht_ssd_gemm_run)
void ssd_gemm_run(const struct ssd_gemm *g);

/* A matrix as the tensors hold it: n_rows x n_cols, rows `stride` apart. */
struct ssd_source {
    const void *p;
    int64_t stride, n_rows, n_cols;
    enum ht_dtype dtype;
    const float *scale; // per row, or NULL
};

/* Rows operand (rows, cols) of src, zeros behind its end. */
#define ssd_pack_rows HT_ISA_FN(ht_ssd_pack_rows)
void ssd_pack_rows(bool half, void *dst, int64_t rows, int64_t cols, const struct ssd_source *src);

/* Columns operand (rows/kp, cols, kp) of src: its rows are contracted. */
#define ssd_pack_pairs HT_ISA_FN(ht_ssd_pack_pairs)
void ssd_pack_pairs(bool half, void *dst, int64_t rows, int64_t cols, const struct ssd_source *src);

/* dst (cols, rows) = transpose of src (rows, cols), rows lds apart; 32-bit words; sizes multiples
 * of 8. */
#define ssd_transpose HT_ISA_FN(ht_ssd_transpose)
void ssd_transpose(void *dst, const void *src, int64_t lds, int64_t rows, int64_t cols);

/* Between a state in the tensors' layout (P, N) and ours (Np, Pp); NULL src: zeros. */
#define ssd_state_in HT_ISA_FN(ht_ssd_state_in)
void ssd_state_in(float *dst, const float *src, int64_t d_head, int64_t d_state);
#define ssd_state_out HT_ISA_FN(ht_ssd_state_out)
void ssd_state_out(float *dst, const float *src, int64_t d_head, int64_t d_state);

/* ---- ssd_chunk_cpu.c ---- */

/* One head, one chunk; n tokens, a multiple of 16, dt = da = 0 behind the end. */
struct ssd_decay {
    int64_t n, n_blocks;
    float A, gamma;              // gamma = exp(sum of da)
    float v[SSD_MAX_CHUNK];      // dt_raw + dt_bias
    float soft[SSD_MAX_CHUNK];   // softplus(v)
    float dt[SSD_MAX_CHUNK];     // clamp(softplus(v))
    float da[SSD_MAX_CHUNK];     // dt A
    float in[SSD_MAX_CHUNK];     // exp(sum_{k<=i} da)
    float out[SSD_MAX_CHUNK];    // w: exp(sum_{k>j} da)
    float dt_out[SSD_MAX_CHUNK]; // dt w
    float head[SSD_MAX_CHUNK];   // sum of da from the block's start to i
    float tail[SSD_MAX_CHUNK];   // sum of da after j to the block's end
    float total[SSD_MAX_BLOCKS]; // sum over the block
};
#define ssd_decay_fill HT_ISA_FN(ht_ssd_decay_fill)
void ssd_decay_fill(struct ssd_decay *d, const struct ht_ssd_args *a, int64_t head, int64_t t0,
                    int64_t n_tokens);

/* M[i,j] = K[i,j] exp(sum_{j<k<=i} da) dt_j, rows operand (n, n); zeros right of the diagonal
 * within its block of 16, nothing beyond. */
#define ssd_decay_scores HT_ISA_FN(ht_ssd_decay_scores)
void ssd_decay_scores(bool half, void *M, const float *K, const struct ssd_decay *d);

/* Transposed, for the backward pass; returns sum_j G[j,j]. Row j, column i >= j, L =
 * exp(sum_{j<k<=i} da), G = <x_j, Gy_i>: M[j,i] = K L (rows operand)   grad_K[j,i] += dt_j L G
 * grad_dt[j] = sum_i M G grad_da[k] = sum_{i>=k, j<k} dt_j M[j,i] G[j,i]   (G is overwritten) */
#define ssd_decay_scores_backward HT_ISA_FN(ht_ssd_decay_scores_backward)
float ssd_decay_scores_backward(bool half, void *M, float *grad_K, float *G, float *grad_dt,
                                float *grad_da, const float *K, const struct ssd_decay *d);

#endif
