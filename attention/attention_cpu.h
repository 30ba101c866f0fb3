/* attention/attention_cpu.h: what the attention kernels share; private to attention/.
 *
 * Columns: the `group` query heads that read one kv head are laid side by side, so column c of a kv
 * head is query token c / group, head kv_head * group + c % group. A tile of columns then uses
 * every key and value `group` times, and grouped and multi-head attention are one code path.
 */
#ifndef HT_ATTENTION_ATTENTION_CPU_H
#define HT_ATTENTION_ATTENTION_CPU_H

#include <stdbool.h>

#include "attention/flash.h"
#include "attention/rope.h"
#include "core/base/isa.h"

enum {
    HT_ATTENTION_QUERY_TILE = 96,   // columns; a multiple of every level's panel
    HT_ATTENTION_MAX_COLUMNS = 384, // of one task: packing K and V is shared by four tiles
    HT_ATTENTION_KEY_TILE = 64,
    HT_ATTENTION_MAX_D_HEAD = 256,
    HT_ATTENTION_LANES = 16,           // the widest vector; strips are padded to it on every level
    HT_ATTENTION_KEY_BLOCK = 512,      // keys of one task, backward in two passes
    HT_ATTENTION_ONE_PASS_MAX = 16384, // longest sequence whose K, V and gradients one thread holds
    HT_DECODE_KEY_BLOCK = 256,         // keys of one task of a decode step
};

/* One kv head of one sequence. Pointers are at its first element; strides count elements between
 * tokens. */
struct ht_attention_view {
    const char *q, *k, *v;
    int64_t q_stride, kv_stride;
    char *o; // heads contiguous, o_stride between tokens
    int64_t o_stride;
    float *lse; // (token, head), lse_stride between tokens; or NULL
    int64_t lse_stride;
    int64_t n_new, past; // query tokens; keys before the first of them
    int64_t group, d_head;
    enum ht_dtype dtype;
    float scale;
    const char *grad_o; // strides as o
    char *grad_q, *grad_k, *grad_v;
    int64_t grad_stride;
};

typedef enum ht_status ht_flash_fn(struct ht_backend *, const struct ht_flash_args *);
typedef enum ht_status ht_kv_attention_fn(struct ht_backend *, const struct ht_kv_attention_args *);
typedef enum ht_status ht_rope_fn(struct ht_backend *, const struct ht_rope_args *);
typedef void ht_attention_columns_fn(const struct ht_attention_view *, int64_t, int64_t, float *);

/* Kv head `kv_head` of sequence `seq`, gradients included (forward callers ignore those). */
struct ht_attention_view ht_attention_flash_view(const struct ht_flash_args *a, int64_t seq,
                                                 int64_t kv_head);

/* Scratch of one thread, in floats (attention_ops.c); the kernels take exactly this much. */
int64_t ht_attention_forward_floats(int64_t d_head);
int64_t ht_attention_backward_floats(int64_t d_head, int64_t max_tokens);

/* Backward in one pass (a task is a kv head of a sequence) or, where that leaves threads idle or
 * takes too much memory, in two (key blocks, then query tiles; 7 products instead of 5). Both give
 * the same bits. */
bool ht_attention_backward_one_pass(const struct ht_flash_args *a, int n_threads);

/* A sequence with one new row decodes; with more, its rows go through the tiles, which is faster
 * from about four rows on and needs no scratch per key. */
static inline bool ht_attention_is_decode(const struct ht_seqs *s, int64_t seq)
{
    return s->starts[seq + 1] - s->starts[seq] == 1;
}

/* Floats of one head's partial result: o, padded to the kernel's 64 dims, and at its end m and l.
 */
static inline int64_t ht_attention_decode_slot(int64_t d_head)
{
    return (d_head + 63) / 64 * 64 + HT_ATTENTION_LANES;
}

/* Partial results of a row that sees n_keys keys. */
static inline int64_t ht_attention_key_blocks(int64_t n_keys)
{
    return (n_keys + HT_DECODE_KEY_BLOCK - 1) / HT_DECODE_KEY_BLOCK;
}

#endif
