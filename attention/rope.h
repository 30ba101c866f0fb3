/* attention/rope.h: rotary position embedding on part of each head (spec 3.5; Su et al. 2021).
 *
 *   a = pos * freq[i],  i in [0, rd/2):   (v_i, v_{i+rd/2}) -> (v_i cos a - v_{i+rd/2} sin a,
 *                                                              v_{i+rd/2} cos a + v_i sin a)
 * on the first rd = rope_dims of each q and k head; the other dims pass through. backward is the
 * rotation by -a. Tables are computed in fp64 and stored in fp32.
 */
#ifndef HT_ATTENTION_ROPE_H
#define HT_ATTENTION_ROPE_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

struct ht_rope_scaling { // "llama3" rule; factor 0 or 1 = none
    double factor, low_freq_factor, high_freq_factor;
    int64_t original_max_position;
};

/* cos and sin, each (n_positions, rope_dims/2). */
void ht_rope_table(float *cos_table, float *sin_table, int64_t n_positions, int64_t rope_dims,
                   double theta, const struct ht_rope_scaling *scaling);

struct ht_rope_args {
    int64_t n_tokens, n_heads, n_kv_heads, d_head, rope_dims; // rope_dims even, 0..d_head
    enum ht_dtype dtype;
    void *qkv; // (T, (n_heads + 2*n_kv_heads) * d_head), q | k | v, rotated in place
    int64_t qkv_stride;
    const int32_t *pos;                 // (T)
    const float *cos_table, *sin_table; // (n_positions, rope_dims/2)
    int64_t n_positions;                // HT_ERR_ARG if a pos is outside; on CUDA the row is NaN
    bool inverse;                       // rotate by -a: the gradient
};

enum ht_status ht_rope_apply(struct ht_backend *be, const struct ht_rope_args *a);

#endif
