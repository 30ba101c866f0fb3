/* attention/flash_cuda.h: the forward kernel's launcher, for flash and for the KV cache; private to
 * attention/. */
#ifndef HT_ATTENTION_FLASH_CUDA_H
#define HT_ATTENTION_FLASH_CUDA_H

#include "attention/tile_cuda.h"

template <typename T>
struct flash_forward_params {
    const T *q;     // first head of row 0; heads d_head apart
    const T *k, *v; // the same, rows of the sequences; unless a cache is given:
    const void *const *k_cache, *const *v_cache; // per sequence, past rows before the new ones
    const int64_t *past;                         // per sequence; NULL: none
    T *o;
    float *lse; // (T, n_heads) or NULL
    int64_t q_stride, kv_stride, o_stride;
    const int32_t *starts;
    int n_seqs, n_heads, group, d_head;
    int skip; // sequences of at most that many rows are left out
    float scale_log2;
};

/* flash_fwd_cuda.cu: n_tokens rows, all heads. */
template <typename T>
enum ht_status flash_forward_launch(struct ht_backend *be, const flash_forward_params<T> &p,
                                    int64_t n_tokens);
extern template enum ht_status flash_forward_launch(struct ht_backend *,
                                                    const flash_forward_params<float> &, int64_t);
extern template enum ht_status flash_forward_launch(struct ht_backend *,
                                                    const flash_forward_params<bf16> &, int64_t);

/* The smallest compiled row width that holds d_head. */
#define HT_D_HEAD_SWITCH(d_head, launch, T, ...)                                                   \
    ((d_head) <= 64    ? launch<T, 64>(__VA_ARGS__)                                                \
     : (d_head) <= 128 ? launch<T, 128>(__VA_ARGS__)                                               \
                       : launch<T, 256>(__VA_ARGS__))

#endif
