/* bench/gpu/gpu_ops.c: arguments, necessary bytes and operations of each operation (gpu_ops.h).
 *
 * Bytes are what must move at least (operands once), in bf16 with an fp32 residual; so a fraction
 * of the ceiling is not flattered by what a kernel reads twice.
 */
#include "bench/gpu/gpu_ops.h"

#include <math.h>
#include <stdlib.h>

#include "attention/flash.h"
#include "attention/rope.h"
#include "core/ops/adamw.h"
#include "core/ops/embedding.h"
#include "core/ops/gemm.h"
#include "core/ops/loss.h"
#include "core/ops/mlp.h"
#include "core/ops/rmsnorm.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

static void *column(void *base, int64_t c)
{
    return (char *)base + 2 * c;
}

/* ---- rows ---- */

static struct ht_rmsnorm_args norm_args(struct bench_world *w)
{
    return (struct ht_rmsnorm_args){ .n_rows = w->n_tokens,
                                     .d_model = D_MODEL,
                                     .dtype = HT_DTYPE_BF16,
                                     .eps = 1e-5f,
                                     .branch_scale = 1.0f,
                                     .w = w->vec,
                                     .r_in = w->r,
                                     .branch = w->act[0],
                                     .r_out = w->r,
                                     .y = w->act[1],
                                     .rstd = w->rstd,
                                     .grad_y = w->act[0],
                                     .grad_r_out = w->grad_r,
                                     .grad_r_in = w->grad_r,
                                     .grad_branch = w->act[1],
                                     .grad_w = w->flat[0] };
}
static enum ht_status norm_forward(struct bench_world *w)
{
    const struct ht_rmsnorm_args a = norm_args(w);
    return ht_rmsnorm_forward(&w->be, &a);
}
static enum ht_status norm_backward(struct bench_world *w)
{
    const struct ht_rmsnorm_args a = norm_args(w);
    return ht_rmsnorm_backward(&w->be, &a);
}
static double norm_forward_bytes(double t)
{
    return 12 * D_MODEL * t;
}
static double norm_backward_bytes(double t)
{
    return 16 * D_MODEL * t;
}

static struct ht_swiglu_args swiglu_args(struct bench_world *w)
{
    return (struct ht_swiglu_args){ .n_rows = w->n_tokens,
                                    .d_ff = D_FF,
                                    .dtype = HT_DTYPE_BF16,
                                    .gate_up = w->wide[0],
                                    .y = w->act[0],
                                    .grad_y = w->act[1],
                                    .grad_gate_up = w->wide[1] };
}
static enum ht_status swiglu_forward(struct bench_world *w)
{
    const struct ht_swiglu_args a = swiglu_args(w);
    return ht_swiglu_forward(&w->be, &a);
}
static enum ht_status swiglu_backward(struct bench_world *w)
{
    const struct ht_swiglu_args a = swiglu_args(w);
    return ht_swiglu_backward(&w->be, &a);
}
static double swiglu_forward_bytes(double t)
{
    return 6.0 * D_FF * t;
}
static double swiglu_backward_bytes(double t)
{
    return 12.0 * D_FF * t;
}

static struct ht_embedding_args embedding_args(struct bench_world *w)
{
    return (struct ht_embedding_args){ .n_tokens = w->n_tokens,
                                       .d_model = D_MODEL,
                                       .vocab_size = VOCAB,
                                       .dtype = HT_DTYPE_BF16,
                                       .multiplier = 1.0f,
                                       .ids = w->ids,
                                       .weight = w->weight,
                                       .residual = w->r,
                                       .grad_residual = w->grad_r,
                                       .grad_weight = w->flat[0] };
}
static enum ht_status embedding_forward(struct bench_world *w)
{
    const struct ht_embedding_args a = embedding_args(w);
    return ht_embedding_forward(&w->be, &a);
}
static enum ht_status embedding_backward(struct bench_world *w)
{
    const struct ht_embedding_args a = embedding_args(w);
    return ht_embedding_backward(&w->be, &a);
}
static double embedding_forward_bytes(double t)
{
    return 6.0 * D_MODEL * t;
}
static double embedding_backward_bytes(double t)
{
    return 12.0 * D_MODEL * t;
}

static enum ht_status linear_ce(struct bench_world *w)
{
    struct ht_linear_ce_args a = { .n_tokens = w->n_tokens,
                                   .d_model = D_MODEL,
                                   .vocab_size = VOCAB,
                                   .dtype = HT_DTYPE_BF16,
                                   .logit_scale = 1.0f,
                                   .loss_scale = 1e-4f,
                                   .u = w->act[0],
                                   .weight = w->weight,
                                   .labels = w->ids,
                                   .grad_u = w->act[1],
                                   .grad_weight = w->flat[0],
                                   .sums = w->sums };
    return ht_linear_ce(&w->be, &a);
}
static double linear_ce_bytes(double t)
{
    return 4.0 * D_MODEL * t + 10.0 * D_MODEL * VOCAB;
}
static double linear_ce_flops(double t)
{
    return 6.0 * D_MODEL * VOCAB * t;
}

static enum ht_status adamw(struct bench_world *w)
{
    const struct ht_adamw_args a = { .n = w->n_flat,
                                     .step = 10,
                                     .lr = 1e-4f,
                                     .beta1 = 0.9f,
                                     .beta2 = 0.95f,
                                     .eps = 1e-8f,
                                     .weight_decay = 0.1f,
                                     .grad_scale = 1.0f,
                                     .master = w->flat[0],
                                     .exp_avg = w->flat[1],
                                     .exp_avg_sq = w->flat[2],
                                     .grad = w->flat[3],
                                     .weight = w->weight,
                                     .weight_dtype = HT_DTYPE_BF16 };
    return ht_adamw_step(&w->be, &a);
}
static enum ht_status sum_squares(struct bench_world *w)
{
    return ht_sum_squares(&w->be, w->sums, w->flat[3], w->n_flat);
}
static double adamw_bytes(double t)
{
    (void)t;
    return 30.0 * D_MODEL * VOCAB;
}
static double sum_squares_bytes(double t)
{
    (void)t;
    return 4.0 * D_MODEL * VOCAB;
}

/* ---- products ---- */

static enum ht_status product(struct bench_world *w, int64_t n, int64_t k)
{
    const struct ht_gemm_args g = { .m = w->n_tokens,
                                    .n = n,
                                    .k = k,
                                    .trans_b = true,
                                    .ab_dtype = HT_DTYPE_BF16,
                                    .c_dtype = HT_DTYPE_BF16,
                                    .a = w->act[0],
                                    .lda = k,
                                    .b = w->weight,
                                    .ldb = k,
                                    .c = w->wide[0],
                                    .ldc = n,
                                    .alpha = 1.0f };
    return ht_gemm(&w->be, &g);
}
static enum ht_status gemm_in_proj(struct bench_world *w)
{
    return product(w, IN_PROJ, D_MODEL);
}
static enum ht_status gemm_gate_up(struct bench_world *w)
{
    return product(w, 2 * D_FF, D_MODEL);
}
static enum ht_status gemm_down(struct bench_world *w)
{
    return product(w, D_MODEL, D_FF);
}
static enum ht_status gemm_weight_grad(struct bench_world *w)
{
    const struct ht_gemm_args g = { .m = 2 * D_FF,
                                    .n = D_MODEL,
                                    .k = w->n_tokens,
                                    .trans_a = true,
                                    .ab_dtype = HT_DTYPE_BF16,
                                    .c_dtype = HT_DTYPE_F32,
                                    .a = w->wide[0],
                                    .lda = 2 * D_FF,
                                    .b = w->act[0],
                                    .ldb = D_MODEL,
                                    .c = w->flat[0],
                                    .ldc = D_MODEL,
                                    .alpha = 1.0f,
                                    .beta = 1.0f };
    return ht_gemm(&w->be, &g);
}
static double product_bytes(double t, double n, double k)
{
    return 2 * (t * n + t * k + n * k);
}
static double in_proj_bytes(double t)
{
    return product_bytes(t, IN_PROJ, D_MODEL);
}
static double gate_up_bytes(double t)
{
    return product_bytes(t, 2 * D_FF, D_MODEL);
}
static double down_bytes(double t)
{
    return product_bytes(t, D_MODEL, D_FF);
}
static double weight_grad_bytes(double t)
{
    return 2 * t * (2.0 * D_FF + D_MODEL) + 16.0 * D_FF * D_MODEL;
}
static double in_proj_flops(double t)
{
    return 2.0 * IN_PROJ * D_MODEL * t;
}
static double gate_up_flops(double t)
{
    return 4.0 * D_FF * D_MODEL * t;
}
static double down_flops(double t)
{
    return 2.0 * D_FF * D_MODEL * t;
}

/* ---- Mamba-2 ---- */

static struct ht_conv1d_args conv_args(struct bench_world *w)
{
    return (struct ht_conv1d_args){ .seqs = { 1, w->starts },
                                    .n_tokens = w->n_tokens,
                                    .n_channels = CHANNELS,
                                    .d_conv = 4,
                                    .dtype = HT_DTYPE_BF16,
                                    .x = column(w->wide[0], D_INNER),
                                    .x_stride = IN_PROJ,
                                    .w = w->vec,
                                    .bias = w->vec,
                                    .y = w->act[0],
                                    .y_stride = CHANNELS,
                                    .grad_y = w->act[0],
                                    .grad_y_stride = CHANNELS,
                                    .grad_x = column(w->wide[1], D_INNER),
                                    .grad_x_stride = IN_PROJ,
                                    .grad_w = w->flat[0],
                                    .grad_bias = w->flat[1] };
}
static enum ht_status conv_forward(struct bench_world *w)
{
    const struct ht_conv1d_args a = conv_args(w);
    return ht_conv1d_forward(&w->be, &a);
}
static enum ht_status conv_backward(struct bench_world *w)
{
    const struct ht_conv1d_args a = conv_args(w);
    return ht_conv1d_backward(&w->be, &a);
}
static double conv_forward_bytes(double t)
{
    return 4.0 * CHANNELS * t;
}
static double conv_backward_bytes(double t)
{
    return 6.0 * CHANNELS * t;
}

static struct ht_gated_norm_args gated_args(struct bench_world *w)
{
    return (struct ht_gated_norm_args){ .n_tokens = w->n_tokens,
                                        .d_inner = D_INNER,
                                        .n_groups = 1,
                                        .eps = 1e-5f,
                                        .dtype = HT_DTYPE_BF16,
                                        .w = w->vec,
                                        .y = w->act[0],
                                        .z = w->wide[0],
                                        .z_stride = IN_PROJ,
                                        .o = w->act[1],
                                        .rstd = w->rstd,
                                        .grad_o = w->act[2],
                                        .grad_y = w->act[2],
                                        .grad_z = w->wide[1],
                                        .grad_z_stride = IN_PROJ,
                                        .grad_w = w->flat[0] };
}
static enum ht_status gated_forward(struct bench_world *w)
{
    const struct ht_gated_norm_args a = gated_args(w);
    return ht_gated_norm_forward(&w->be, &a);
}
static enum ht_status gated_backward(struct bench_world *w)
{
    const struct ht_gated_norm_args a = gated_args(w);
    return ht_gated_norm_backward(&w->be, &a);
}
static double gated_forward_bytes(double t)
{
    return 6.0 * D_INNER * t;
}
static double gated_backward_bytes(double t)
{
    return 12.0 * D_INNER * t;
}

static struct ht_ssd_args ssd_args(struct bench_world *w)
{
    return (struct ht_ssd_args){ .seqs = { 1, w->starts },
                                 .n_tokens = w->n_tokens,
                                 .n_heads = SSM_HEADS,
                                 .d_head = SSM_D_HEAD,
                                 .d_state = D_STATE,
                                 .n_groups = 1,
                                 .chunk = 256,
                                 .dtype = HT_DTYPE_BF16,
                                 .dt_max = INFINITY,
                                 .x = w->act[0],
                                 .B = column(w->act[0], D_INNER),
                                 .C = column(w->act[0], D_INNER + D_STATE),
                                 .x_stride = CHANNELS,
                                 .dt_raw = column(w->wide[0], IN_PROJ - SSM_HEADS),
                                 .dt_stride = IN_PROJ,
                                 .dt_bias = w->vec,
                                 .A_log = w->vec,
                                 .D = w->vec,
                                 .y = w->act[1],
                                 .y_stride = D_INNER,
                                 .grad_y = w->act[1],
                                 .grad_y_stride = D_INNER,
                                 .grad_x = w->act[2],
                                 .grad_B = column(w->act[2], D_INNER),
                                 .grad_C = column(w->act[2], D_INNER + D_STATE),
                                 .grad_x_stride = CHANNELS,
                                 .grad_dt_raw = column(w->wide[1], IN_PROJ - SSM_HEADS),
                                 .grad_dt_stride = IN_PROJ,
                                 .grad_dt_bias = w->flat[0],
                                 .grad_A_log = w->flat[1],
                                 .grad_D = w->flat[2] };
}
static enum ht_status ssd_forward(struct bench_world *w)
{
    const struct ht_ssd_args a = ssd_args(w);
    return ht_ssd_forward(&w->be, &a);
}
static enum ht_status ssd_backward(struct bench_world *w)
{
    const struct ht_ssd_args a = ssd_args(w);
    return ht_ssd_backward(&w->be, &a);
}
static enum ht_status ssd_step(struct bench_world *w)
{
    struct ht_ssd_args a = ssd_args(w);
    a.n_tokens = DECODE_SEQS;
    return ht_ssd_step(&w->be, &a, &(struct ht_ssm_states){ .p = w->state }, NULL);
}
// per token, 64-wide tiles: x, y, B, C, dt; backward adds dy, dx and states in bf16
// (spec/gpu.md 3.3)
static double ssd_forward_bytes(double t)
{
    return (4.0 * D_INNER + 4 * D_STATE + 2 * SSM_HEADS) * t;
}
static double ssd_forward_flops(double t)
{
    return (SSM_HEADS * (2.0 * 64 * SSM_D_HEAD + 4.0 * D_STATE * SSM_D_HEAD) + 2.0 * 64 * D_STATE) *
           t;
}
static double ssd_backward_bytes(double t)
{
    return 100900.0 * t;
}
static double ssd_backward_flops(double t)
{
    return (SSM_HEADS * (4.0 * 64 * SSM_D_HEAD + 10.0 * D_STATE * SSM_D_HEAD) +
            6.0 * 64 * D_STATE) *
           t;
}
static double ssd_step_bytes(double t)
{
    (void)t;
    return 8.0 * DECODE_SEQS * SSM_HEADS * SSM_D_HEAD * D_STATE;
}

/* ---- attention ---- */

static struct ht_flash_args flash_args(struct bench_world *w)
{
    return (struct ht_flash_args){ .seqs = { 1, w->starts },
                                   .n_tokens = w->n_tokens,
                                   .n_heads = N_HEADS,
                                   .n_kv_heads = N_KV_HEADS,
                                   .d_head = D_HEAD,
                                   .dtype = HT_DTYPE_BF16,
                                   .scale = 0.0883883f,
                                   .qkv = w->wide[0],
                                   .qkv_stride = QKV,
                                   .o = w->act[0],
                                   .lse = w->rstd,
                                   .grad_o = w->act[1],
                                   .grad_qkv = w->wide[1],
                                   .grad_qkv_stride = QKV };
}
static enum ht_status flash_forward(struct bench_world *w)
{
    const struct ht_flash_args a = flash_args(w);
    return ht_flash_forward(&w->be, &a);
}
static enum ht_status flash_backward(struct bench_world *w)
{
    const struct ht_flash_args a = flash_args(w);
    return ht_flash_backward(&w->be, &a);
}
static double flash_forward_bytes(double t)
{
    return 2.0 * (QKV + N_HEADS * D_HEAD) * t;
}
static double flash_backward_bytes(double t)
{
    return 2.0 * (2 * QKV + 2 * N_HEADS * D_HEAD) * t;
}
static double flash_forward_flops(double t)
{
    return 2.0 * t * t * N_HEADS * D_HEAD;
}
static double flash_backward_flops(double t)
{
    return 5.0 * t * t * N_HEADS * D_HEAD;
}

static enum ht_status rope(struct bench_world *w)
{
    return ht_rope_apply(&w->be, &(struct ht_rope_args){ .n_tokens = w->n_tokens,
                                                         .n_heads = N_HEADS,
                                                         .n_kv_heads = N_KV_HEADS,
                                                         .d_head = D_HEAD,
                                                         .rope_dims = D_HEAD / 2,
                                                         .dtype = HT_DTYPE_BF16,
                                                         .qkv = w->wide[0],
                                                         .qkv_stride = QKV,
                                                         .pos = w->pos,
                                                         .cos_table = w->cos_table,
                                                         .sin_table = w->sin_table,
                                                         .n_positions = w->n_tokens });
}
static double rope_bytes(double t)
{
    return 4.0 * (N_HEADS + N_KV_HEADS) * D_HEAD / 2 * t;
}

static enum ht_status kv_decode(struct bench_world *w)
{
    const struct ht_kv_attention_args a = { .seqs = { KV_SEQS, w->pos }, // 0, 1, 2, ...
                                            .n_tokens = KV_SEQS,
                                            .n_heads = N_HEADS,
                                            .n_kv_heads = N_KV_HEADS,
                                            .d_head = D_HEAD,
                                            .dtype = HT_DTYPE_BF16,
                                            .scale = 0.0883883f,
                                            .q = w->wide[0],
                                            .q_stride = QKV,
                                            .k_cache = (const void *const *)w->k_cache,
                                            .v_cache = (const void *const *)w->v_cache,
                                            .past = w->past,
                                            .o = w->act[0] };
    return ht_kv_attention(&w->be, &a);
}
static double kv_decode_bytes(double t)
{
    (void)t;
    return 4.0 * KV_SEQS * (KV_PAST + 1) * N_KV_HEADS * D_HEAD;
}

const struct bench_op bench_ops[] = {
    { "rmsnorm forward", "rmsnorm_forward_kernel", norm_forward, norm_forward_bytes, NULL },
    { "rmsnorm backward", "rmsnorm_backward_kernel,rmsnorm_strips_kernel", norm_backward,
      norm_backward_bytes, NULL },
    { "swiglu forward", "swiglu_forward_kernel", swiglu_forward, swiglu_forward_bytes, NULL },
    { "swiglu backward", "swiglu_backward_kernel", swiglu_backward, swiglu_backward_bytes, NULL },
    { "embedding forward", "embedding_forward_kernel", embedding_forward, embedding_forward_bytes,
      NULL },
    { "embedding backward", "embedding_backward_kernel", embedding_backward,
      embedding_backward_bytes, NULL },
    { "head and loss, forward and backward", "softmax_ce_kernel,add_losses_kernel", linear_ce,
      linear_ce_bytes, linear_ce_flops },
    { "adamw", "adamw_step_kernel", adamw, adamw_bytes, NULL },
    { "sum of squares", "sum_squares_kernel,sum_partials_kernel", sum_squares, sum_squares_bytes,
      NULL },
    { "gemm in_proj", "cublaslt_in_proj", gemm_in_proj, in_proj_bytes, in_proj_flops },
    { "gemm gate_up", "cublaslt_gate_up", gemm_gate_up, gate_up_bytes, gate_up_flops },
    { "gemm down", "cublaslt_down", gemm_down, down_bytes, down_flops },
    { "gemm gate_up weight gradient", "cublaslt_weight_grad", gemm_weight_grad, weight_grad_bytes,
      gate_up_flops },
    { "conv1d forward", "conv1d_forward_kernel", conv_forward, conv_forward_bytes, NULL },
    { "conv1d backward", "conv1d_backward_kernel,conv1d_sum_kernel", conv_backward,
      conv_backward_bytes, NULL },
    { "gated norm forward", "gated_norm_forward_kernel", gated_forward, gated_forward_bytes, NULL },
    { "gated norm backward", "gated_norm_backward_kernel,gated_norm_sum_kernel", gated_backward,
      gated_backward_bytes, NULL },
    { "ssd forward", "ssd_forward_kernel,ssd_walk_kernel,ssd_combine_kernel", ssd_forward,
      ssd_forward_bytes, ssd_forward_flops },
    { "ssd backward", "ssd_backward_kernel,ssd_sum_blocks_kernel,ssd_sum_chunks_kernel",
      ssd_backward, ssd_backward_bytes, ssd_backward_flops },
    { "ssd step, 256 sequences", "ssd_step_kernel", ssd_step, ssd_step_bytes, NULL },
    { "attention forward", "flash_forward_kernel", flash_forward, flash_forward_bytes,
      flash_forward_flops },
    { "attention backward", "flash_backward_kernel,flash_row_sums_kernel", flash_backward,
      flash_backward_bytes, flash_backward_flops },
    { "rope", "rope_kernel", rope, rope_bytes, NULL },
    { "kv attention, 64 sequences of 4096", "kv_decode_kernel,kv_combine_kernel", kv_decode,
      kv_decode_bytes, NULL },
};
const int n_bench_ops = sizeof bench_ops / sizeof *bench_ops;
