/* core/config/linears.c: see linears.h. */
#include "core/config/linears.h"

#include "core/base/arena.h"

int ht_layer_linears(struct ht_linear_shape out[HT_MAX_LINEARS], const struct ht_model_config *c,
                     int layer)
{
    int n = 0;

    if (c->layer_kind[layer] == HT_LAYER_MAMBA) {
        out[n++] = (struct ht_linear_shape){ HT_T_IN_PROJ, c->d_model, ht_in_proj_width(c) };
        out[n++] = (struct ht_linear_shape){ HT_T_OUT_PROJ, c->d_inner, c->d_model };
    } else {
        out[n++] = (struct ht_linear_shape){ HT_T_Q, c->d_model, ht_qkv_width(c) };
        out[n++] = (struct ht_linear_shape){ HT_T_O, c->n_heads * c->d_head, c->d_model };
    }
    if (c->d_ff) {
        out[n++] = (struct ht_linear_shape){ HT_T_GATE, c->d_model, 2 * c->d_ff };
        out[n++] = (struct ht_linear_shape){ HT_T_DOWN, c->d_ff, c->d_model };
    }
    return n;
}

static void widen(int64_t *a, int64_t b)
{
    if (b > *a) *a = b;
}

struct ht_fp8_bytes ht_fp8_sizes(const struct ht_model_config *c, int64_t n_tokens,
                                 bool every_weight)
{
    struct ht_fp8_bytes b = { 0 };

    for (int i = 0; i < (int)c->n_layers; i++) {
        struct ht_linear_shape l[HT_MAX_LINEARS];
        const int n = ht_layer_linears(l, c, i);
        for (int j = 0; j < n; j++) {
            if (!ht_linear_fits_fp8(l[j].n_in, l[j].n_out, n_tokens)) continue;
            widen(&b.widest_in, l[j].n_in);
            widen(&b.widest_out, l[j].n_out);
            widen(&b.widest, l[j].n_in * l[j].n_out);
            b.weights += 2 * (int64_t)ht_arena_bytes((size_t)(l[j].n_in * l[j].n_out));
        }
    }
    if (!every_weight) b.weights = 2 * (int64_t)ht_arena_bytes((size_t)b.widest);
    b.tokens = (int64_t)ht_arena_bytes((size_t)(n_tokens * b.widest_in)) +
               2 * (int64_t)ht_arena_bytes((size_t)(n_tokens * b.widest_out));
    b.scales = (int64_t)ht_arena_bytes((size_t)(4 * (HT_MAX_LINEARS * c->n_layers + 2)));
    b.total = b.weights + b.tokens + b.scales;
    return b;
}
