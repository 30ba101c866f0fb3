/* core/config/linears.h: the projections of a layer: what train.linear_dtype concerns, and what its
 * 8-bit copies take (core/model/fp8.h uses them, the planner counts them). */
#ifndef HT_CONFIG_LINEARS_H
#define HT_CONFIG_LINEARS_H

#include "core/config/tensor_list.h"

enum { HT_MAX_LINEARS = 4 };

struct ht_linear_shape {
    enum ht_tensor_role role; // of the first matrix: q, k, v and gate, up are one product
    int64_t n_in, n_out;
};

/* in_proj and out_proj, or qkv and o, then gate_up and down; returns how many. */
int ht_layer_linears(struct ht_linear_shape out[HT_MAX_LINEARS], const struct ht_model_config *c,
                     int layer);

/* Whether products with n_tokens rows are computed in fp8: cuBLASLt wants multiples of 16. */
static inline bool ht_linear_fits_fp8(int64_t n_in, int64_t n_out, int64_t n_tokens)
{
    return n_in % 16 == 0 && n_out % 16 == 0 && n_tokens % 16 == 0;
}

/* Bytes of the 8-bit copies for micro-batches of n_tokens; every_weight: of all weights, made once
 * a step, otherwise of the one in use (ZeRO-3). */
struct ht_fp8_bytes {
    int64_t weights; // codes in both orders
    int64_t tokens;  // of x or y of one product
    int64_t scales;  // one per matrix
    int64_t total;
    int64_t widest_in, widest_out, widest; // n_in, n_out, n_in * n_out
};
struct ht_fp8_bytes ht_fp8_sizes(const struct ht_model_config *c, int64_t n_tokens,
                                 bool every_weight);

#endif
