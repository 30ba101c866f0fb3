/* core/ops/mlp_cpu.c: SwiGLU forward and backward (mlp.h): every element is touched once.
 *
 * Backward reads gate and up of a vector before it writes their gradients, so the two may share a
 * buffer.
 */
#include "core/base/simd.h"
#include "core/ops/core_ops.h"

enum { PARALLEL_MIN = 4096 }; // elements below which a parallel region costs more than the work

static inline ht_vf load(const void *p, int64_t i, int64_t n, enum ht_dtype d)
{
    if (n >= HT_VLEN) return vf_load_any(p, i, d);
    return d == HT_DTYPE_F32 ? vf_load_n((const float *)p + i, n)
                             : vf_load_bf16_n((const ht_bf16 *)p + i, n);
}

static inline void store(void *p, int64_t i, ht_vf v, int64_t n, enum ht_dtype d)
{
    if (n >= HT_VLEN)
        vf_store_any(p, i, d, v);
    else if (d == HT_DTYPE_F32)
        vf_store_n((float *)p + i, v, n);
    else
        vf_store_bf16_n((ht_bf16 *)p + i, v, n);
}

/* y of `left` elements (at most a vector) at column j of row t */
static inline void forward_vector(const struct ht_swiglu_args *a, int64_t t, int64_t j,
                                  int64_t left, const enum ht_dtype d)
{
    const int64_t g = t * 2 * a->d_ff + j;
    const ht_vf gate = load(a->gate_up, g, left, d), up = load(a->gate_up, g + a->d_ff, left, d);
    // x * sigmoid(x) as in backward, not vf_silu: a recomputed y must have the same bits
    store(a->y, t * a->d_ff + j, gate * vf_sigmoid(gate) * up, left, d);
}

static inline void backward_vector(const struct ht_swiglu_args *a, int64_t t, int64_t j,
                                   int64_t left, const enum ht_dtype d)
{
    const int64_t g = t * 2 * a->d_ff + j, o = t * a->d_ff + j;
    const ht_vf gate = load(a->gate_up, g, left, d), up = load(a->gate_up, g + a->d_ff, left, d);
    const ht_vf gy = load(a->grad_y, o, left, d);
    const ht_vf s = vf_sigmoid(gate), silu = gate * s;

    store(a->grad_gate_up, g, gy * up * (s * (1.0f + gate * (1.0f - s))), left, d);
    store(a->grad_gate_up, g + a->d_ff, gy * silu, left, d);
    if (a->y) store(a->y, o, silu * up, left, d);
}

static void forward_row(const struct ht_swiglu_args *a, int64_t t, const enum ht_dtype d)
{
    int64_t j = 0;

    for (; j + HT_VLEN <= a->d_ff; j += HT_VLEN) forward_vector(a, t, j, HT_VLEN, d);
    if (j < a->d_ff) forward_vector(a, t, j, a->d_ff - j, d);
}

static void backward_row(const struct ht_swiglu_args *a, int64_t t, const enum ht_dtype d)
{
    int64_t j = 0;

    for (; j + HT_VLEN <= a->d_ff; j += HT_VLEN) backward_vector(a, t, j, HT_VLEN, d);
    if (j < a->d_ff) backward_vector(a, t, j, a->d_ff - j, d);
}

enum ht_status HT_ISA_FN(ht_swiglu_forward_cpu)(struct ht_backend *be,
                                                const struct ht_swiglu_args *a)
{
    const bool parallel = a->n_rows * a->d_ff > PARALLEL_MIN;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_rows; t++) {
        if (a->dtype == HT_DTYPE_F32) // a constant type makes a loop without branches
            forward_row(a, t, HT_DTYPE_F32);
        else
            forward_row(a, t, HT_DTYPE_BF16);
    }
    return HT_OK;
}

enum ht_status HT_ISA_FN(ht_swiglu_backward_cpu)(struct ht_backend *be,
                                                 const struct ht_swiglu_args *a)
{
    const bool parallel = a->n_rows * a->d_ff > PARALLEL_MIN;

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t t = 0; t < a->n_rows; t++) {
        if (a->dtype == HT_DTYPE_F32)
            backward_row(a, t, HT_DTYPE_F32);
        else
            backward_row(a, t, HT_DTYPE_BF16);
    }
    return HT_OK;
}
