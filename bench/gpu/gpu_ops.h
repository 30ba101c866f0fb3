/* bench/gpu/gpu_ops.h: one layer of Bamba-9B and its operations, for gpu_kernels.c. */
#ifndef HT_BENCH_GPU_OPS_H
#define HT_BENCH_GPU_OPS_H

#include "bench/gpu/gpu_timer.h"

#ifndef HT_BENCH_SMALL
/* Widths of Bamba-9B (29 Mamba-2 and 3 attention layers). */
enum {
    D_MODEL = 4096,
    D_FF = 14336,
    VOCAB = 128256,
    D_INNER = 8192,
    SSM_HEADS = 128,
    SSM_D_HEAD = 64,
    D_STATE = 128,
    N_HEADS = 32,
    N_KV_HEADS = 8,
    D_HEAD = 128,
    DECODE_SEQS = 256,
    KV_SEQS = 64,
    KV_PAST = 4096,
    FLUSH_BYTES = 256 << 20, // more than any cache: 50 MB on an H100
    RUNS = 20,
};
#else // what the emulation runs in a second: that every argument is right
enum {
    D_MODEL = 64,
    D_FF = 192,
    VOCAB = 400,
    D_INNER = 128,
    SSM_HEADS = 8,
    SSM_D_HEAD = 16,
    D_STATE = 16,
    N_HEADS = 4,
    N_KV_HEADS = 2,
    D_HEAD = 16,
    DECODE_SEQS = 4,
    KV_SEQS = 4,
    KV_PAST = 40,
    FLUSH_BYTES = 4096,
    RUNS = 1,
};
#endif
enum {
    CHANNELS = D_INNER + 2 * D_STATE,
    IN_PROJ = 2 * D_INNER + 2 * D_STATE + SSM_HEADS,
    QKV = (N_HEADS + 2 * N_KV_HEADS) * D_HEAD,
};

/* Buffers for T tokens, shared by all operations: timing reads no results. bf16 unless float. */
struct bench_world {
    struct ht_backend be;
    int64_t n_tokens;
    float *r, *grad_r, *rstd, *vec; // (T, D_MODEL), ..., (T, 128), (IN_PROJ * 8)
    float *flat[4]; // (n_flat) optimiser state and gradient; flat[0] also grad of V x D
    int64_t n_flat;
    void *wide[2]; // (T, 2 * D_FF) each: any activation
    void *act[3];  // (T, D_FF) each
    void *weight;  // (VOCAB, D_MODEL): any matrix
    int32_t *ids, *starts, *pos;
    double *sums;
    float *state; // (256, H, P, N)
    float *cos_table, *sin_table;
    void **k_cache, **v_cache; // device arrays of device addresses
    int64_t *past;
    void *cache; // keys and values of KV_SEQS sequences
};

enum ht_status bench_world_create(struct bench_world *w, int64_t n_tokens);

struct bench_op {
    const char *name;    // of the operation
    const char *kernels; // separated by commas: what docs/gpu-status.md lists
    enum ht_status (*run)(struct bench_world *w);
    double (*bytes)(double n_tokens), (*flops)(double n_tokens); // necessary; flops may be NULL
};
extern const struct bench_op bench_ops[];
extern const int n_bench_ops;

/* gpu_fp8.c, in this order: the products take what the first three leave. Multiplied at the fp8
 * peak, and left out where the device has none. */
extern const struct bench_op bench_fp8_ops[];
extern const int n_bench_fp8_ops;

#endif
