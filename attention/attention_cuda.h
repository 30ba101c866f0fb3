/* attention/attention_cuda.h: the CUDA entry points and their scratch memory; private to
 * attention/.
 */
#ifndef HT_ATTENTION_ATTENTION_CUDA_H
#define HT_ATTENTION_ATTENTION_CUDA_H

#include "attention/flash.h"
#include "attention/rope.h"

enum ht_status ht_flash_forward_cuda(struct ht_backend *be, const struct ht_flash_args *a);
enum ht_status ht_flash_forward_sm90(struct ht_backend *be, const struct ht_flash_args *a);
enum ht_status ht_flash_backward_cuda(struct ht_backend *be, const struct ht_flash_args *a);
enum ht_status ht_kv_attention_cuda(struct ht_backend *be, const struct ht_kv_attention_args *a);
enum ht_status ht_rope_apply_cuda(struct ht_backend *be, const struct ht_rope_args *a);

/* Most splits of a decoding sequence's keys. With 8 kv heads, one long sequence gives 256 blocks.
 */
enum { HT_DECODE_MAX_SPLITS = 32 };

/* Floats of one head's partial result: o, offset, sum; whole 16 bytes. */
static inline int64_t ht_attention_cuda_slot(int64_t d_head)
{
    return d_head + 4;
}

/* Scratch of flash_backward: lse and rowsum(grad_o o) of every row and head. */
static inline size_t ht_attention_cuda_backward_bytes(const struct ht_flash_args *a)
{
    return (size_t)(a->n_tokens * a->n_heads) * 2 * sizeof(float);
}

/* Scratch of kv_attention: any sequence may decode, with any past. */
static inline size_t ht_attention_cuda_decode_bytes(const struct ht_kv_attention_args *a)
{
    return (size_t)(a->seqs.n_seqs * a->n_heads * HT_DECODE_MAX_SPLITS *
                    ht_attention_cuda_slot(a->d_head)) *
           sizeof(float);
}

enum ht_status ht_kv_append_cuda(struct ht_backend *be, const struct ht_kv_append_args *a);

#endif
