/* tests/ref/attention_ref.h: causal attention and rotary embedding in fp64, by the equations of
 * attention/flash.h and attention/rope.h, one score at a time. The backward is written from the
 * softmax's Jacobian and is itself checked by central differences. */
#ifndef HT_TESTS_REF_ATTENTION_REF_H
#define HT_TESTS_REF_ATTENTION_REF_H

#include <stdbool.h>
#include <stdint.h>

struct attention_ref {
    int64_t n_seqs;
    const int32_t *starts; // (n_seqs + 1)
    int64_t n_heads, n_kv_heads, d_head;
    double scale;
    const double *qkv; // (T, (n_heads + 2*n_kv_heads) * d_head), dense
    double *o;         // (T, n_heads * d_head)
    double *lse;       // (T, n_heads) or NULL
    const double *grad_o;
    double *grad_qkv; // like qkv, written
    /* Round scores, probabilities, their gradients and all results to bf16, as code that keeps
     * every intermediate tensor in 16 bits does: the yardstick of the bf16 tolerances. */
    bool round16;
};

void attention_ref_forward(const struct attention_ref *a);
void attention_ref_backward(const struct attention_ref *a);

/* In place on the first rope_dims of the first n_heads heads of each row. factor 0: no scaling. */
struct rope_ref {
    int64_t n_tokens, n_heads, d_head, rope_dims, row_width;
    double theta, factor, low_freq_factor, high_freq_factor, original_max_position;
    double sign; // +1, or -1 for the inverse
};
void rope_ref(const struct rope_ref *r, double *qkv, const int32_t *pos);

#endif
