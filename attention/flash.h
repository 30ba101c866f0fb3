/* attention/flash.h: causal grouped-query attention, tiled, never a T x T matrix
 * (spec 3.4; Dao 2023).
 *
 *   o[t,j] = sum_{s<=t, same sequence} softmax_s(scale * q[t,j] . k[s,g]) v[s,g]
 *   lse[t,j] = logsumexp_s(scale * q[t,j] . k[s,g])       g = j / (nh/nkv), softmax in fp32
 *
 * Backward recomputes the probabilities from lse: with Di = sum(grad_o o) per row,
 *
 *   P  = exp(scale q.k - lse)        grad_v += P^T grad_o
 *   dP = grad_o v^T                  grad_q += dS k
 *   dS = P (dP - Di) scale           grad_k += dS^T q       fixed order, no atomics.
 */
#ifndef HT_ATTENTION_FLASH_H
#define HT_ATTENTION_FLASH_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"
#include "core/base/seqs.h"

struct ht_flash_args {
    struct ht_seqs seqs;
    int64_t n_tokens, n_heads, n_kv_heads, d_head;
    enum ht_dtype dtype;
    float scale;
    const void *qkv; // (T, (n_heads + 2*n_kv_heads) * d_head), q | k | v, rows qkv_stride apart
    int64_t qkv_stride;
    void *o;    // (T, n_heads * d_head), contiguous
    float *lse; // (T, n_heads) written by forward (or NULL), read by backward
    // backward only
    const void *grad_o; // (T, n_heads * d_head), contiguous
    void *grad_qkv;     // like qkv, written (not added to), rows grad_qkv_stride apart
    int64_t grad_qkv_stride;
};

/* HT_ERR_ARG: n_heads not a multiple of n_kv_heads, d_head not a multiple of 8 or above 256, scale
 * not positive, rows narrower than their content, sequences that do not cover the rows. Scratch
 * depends on n_tokens and the heads only, however the tokens are divided into sequences.
 * On CUDA the starts are device memory and not checked, and rows must be 16-byte aligned. */
enum ht_status ht_flash_forward(struct ht_backend *be, const struct ht_flash_args *a);
enum ht_status ht_flash_backward(struct ht_backend *be, const struct ht_flash_args *a);
size_t ht_flash_scratch_bytes(const struct ht_flash_args *a, int n_threads);

/* Attention of new tokens over a KV cache (prefill continuation and decode). Query row i of
 * sequence s sits at position past[s] + (i - starts[s]) and sees all keys up to itself. The caller
 * has already appended the new (rotated) k and v rows to the cache. */
struct ht_kv_attention_args {
    struct ht_seqs seqs; // the new rows of each sequence
    int64_t n_tokens, n_heads, n_kv_heads, d_head;
    enum ht_dtype dtype; // of q, o and the cache
    float scale;
    const void *q; // (T, n_heads * d_head), rows q_stride apart
    int64_t q_stride;
    const void *const *k_cache, *const *v_cache; // per sequence: (past + new, n_kv_heads, d_head)
    const int64_t *past;                         // (n_seqs) tokens in the cache before the new ones
    void *o;                                     // (T, n_heads * d_head), contiguous
};

/* Errors as in flash_forward, and a negative past. On CUDA starts, past and the arrays of cache
 * addresses are device memory and not checked, and rows of the caches must be 16-byte aligned. */
enum ht_status ht_kv_attention(struct ht_backend *be, const struct ht_kv_attention_args *a);

/* Reads seqs and past. The most any call needs: every sequence with one new row and the longest
 * past. */
size_t ht_kv_attention_scratch_bytes(const struct ht_kv_attention_args *a, int n_threads);

/* Rows of k and v behind what the caches hold: row i of sequence s goes to place past[s] + (i -
 * starts[s]). */
struct ht_kv_append_args {
    struct ht_seqs seqs;
    int64_t n_tokens, width; // width: n_kv_heads * d_head
    enum ht_dtype dtype;
    const void *k, *v; // (T, width), rows stride apart
    int64_t stride;
    void *const *k_cache, *const *v_cache; // per sequence
    const int64_t *past;                   // (n_seqs)
};

/* HT_ERR_ARG: more sequences than rows, rows narrower than their content. On CUDA as in
 * ht_kv_attention. */
enum ht_status ht_kv_append(struct ht_backend *be, const struct ht_kv_append_args *a);

#endif
