/* bench/train_step.c: training throughput of a recipe's model on this machine, and where the time
 * goes.
 *
 *   bench_train_step RECIPE [section.key=value ...] [--seq N] [--rows N] [--steps N] [--threads N]
 * [--recompute none|selective|full]
 *
 * A step is forward, backward and AdamW on random tokens. Beside it, in the same run and on the
 * same shapes: the step's matrix products alone (oneDNN), and scan + convolution + gated norm
 * alone, forward and backward. One JSON object goes to stdout.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/config/planner.h"
#include "core/config/recipe.h"
#include "core/model/model.h"
#include "core/model/params.h"
#include "core/ops/adamw.h"
#include "core/ops/gemm.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

struct bench {
    struct ht_config cfg;
    struct ht_backend be;
    struct ht_model *m;
    int64_t seq, rows, n_tokens;
    int32_t *ids, *labels, *pos, *starts;
    float *grads, *master, *exp_avg, *exp_avg_sq;
    struct ht_acts *acts;
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_train_step: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static void *zeros(size_t bytes)
{
    void *p = calloc(1, bytes);
    if (!p) check(HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes", bytes));
    return p;
}

static void setup(struct bench *b, enum ht_recompute recompute)
{
    const struct ht_model_config *c = &b->cfg.model;

    check(
        ht_model_create(&b->m, &b->be, c, b->cfg.train.precision, HT_DECAY_MATRICES, 0, 0, b->seq));
    const int64_t n = b->m->list.n_total;
    b->n_tokens = b->seq * b->rows;
    b->grads = zeros((size_t)n * 4);
    b->master = zeros((size_t)n * 4);
    b->exp_avg = zeros((size_t)n * 4);
    b->exp_avg_sq = zeros((size_t)n * 4);
    b->ids = zeros((size_t)b->n_tokens * 4);
    b->labels = zeros((size_t)b->n_tokens * 4);
    b->pos = zeros((size_t)b->n_tokens * 4);
    b->starts = zeros((size_t)(b->rows + 1) * 4);
    ht_params_init(b->master, c, &b->m->list, 1, 0, n);
    ht_convert(b->m->matrix, b->m->dtype, b->master, HT_DTYPE_F32, b->m->list.n_matrix);
    memcpy(b->m->vector, b->master + b->m->list.n_matrix, (size_t)(n - b->m->list.n_matrix) * 4);
    for (int64_t t = 0; t < b->n_tokens; t++) {
        b->ids[t] = (int32_t)(ht_rng_u64(1, 2, (uint64_t)t) % (uint64_t)c->vocab_size);
        b->labels[t] = (int32_t)(ht_rng_u64(1, 3, (uint64_t)t) % (uint64_t)c->vocab_size);
        b->pos[t] = (int32_t)(t % b->seq);
    }
    for (int64_t r = 0; r <= b->rows; r++) b->starts[r] = (int32_t)(r * b->seq);
    check(ht_acts_create(&b->acts, b->m, recompute, false, b->n_tokens));
}

static double one_step(struct bench *b, int64_t step)
{
    const struct ht_model_batch batch = {
        b->n_tokens, b->ids, b->labels, b->pos, { b->rows, b->starts }, NULL
    };
    const struct ht_tensor_list *l = &b->m->list;
    const double start_s = ht_time_s();
    struct ht_loss loss;
    double squares;

    memset(b->grads, 0, (size_t)l->n_total * 4);
    check(ht_model_train(b->m, b->acts, &batch, 1.0f / (float)b->n_tokens, 0.0f, b->grads, &loss,
                         NULL, NULL));
    check(ht_sum_squares(&b->be, &squares, b->grads, l->n_total));
    for (int part = 0; part < 2; part++) {
        const int64_t at = part ? l->n_matrix : 0,
                      n = part ? l->n_total - l->n_matrix : l->n_matrix;
        check(ht_adamw_step(
            &b->be, &(struct ht_adamw_args){ .n = n,
                                             .step = step,
                                             .lr = 1e-4f,
                                             .beta1 = 0.9f,
                                             .beta2 = 0.95f,
                                             .eps = 1e-8f,
                                             .weight_decay = 0.1f,
                                             .grad_scale = 1.0f,
                                             .master = b->master + at,
                                             .exp_avg = b->exp_avg + at,
                                             .exp_avg_sq = b->exp_avg_sq + at,
                                             .grad = b->grads + at,
                                             .weight = part ? (void *)b->m->vector : b->m->matrix,
                                             .weight_dtype = part ? HT_DTYPE_F32 : b->m->dtype }));
    }
    if (!isfinite(loss.loss_sum)) check(HT_FAIL(HT_ERR_NUMERIC, "the loss is not finite"));
    return ht_time_s() - start_s;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

/* Median time of a product of this shape on its own buffers. */
static double gemm_s(struct bench *b, int64_t m, int64_t n, int64_t k, bool ta, bool tb,
                     bool to_f32)
{
    const size_t e = ht_dtype_bytes(b->m->dtype);
    void *x = zeros((size_t)(m * k) * e), *w = zeros((size_t)(n * k) * e),
         *y = zeros((size_t)(m * n) * 4);
    const struct ht_gemm_args a = { .m = m,
                                    .n = n,
                                    .k = k,
                                    .trans_a = ta,
                                    .trans_b = tb,
                                    .ab_dtype = b->m->dtype,
                                    .c_dtype = to_f32 ? HT_DTYPE_F32 : b->m->dtype,
                                    .a = x,
                                    .lda = ta ? m : k,
                                    .b = w,
                                    .ldb = tb ? k : n,
                                    .c = y,
                                    .ldc = n,
                                    .alpha = 1.0f };
    double s[5];
    check(ht_gemm(&b->be, &a));
    for (int i = 0; i < 5; i++) {
        const double start_s = ht_time_s();
        check(ht_gemm(&b->be, &a));
        s[i] = ht_time_s() - start_s;
    }
    free(x);
    free(w);
    free(y);
    return median(s, 5);
}

/* Forward, input gradient and weight gradient of y = x W^T. */
static double linear_s(struct bench *b, int64_t n_in, int64_t n_out)
{
    return gemm_s(b, b->n_tokens, n_out, n_in, false, true, false) +
           gemm_s(b, b->n_tokens, n_in, n_out, false, false, false) +
           gemm_s(b, n_out, n_in, b->n_tokens, true, false, true);
}

static double all_gemms_s(struct bench *b)
{
    const struct ht_model_config *c = &b->cfg.model;
    double mamba = 0.0, attention = 0.0, mlp = 0.0, total = linear_s(b, c->d_model, c->vocab_size);
    int64_t n_mamba = 0;

    for (int64_t i = 0; i < c->n_layers; i++) n_mamba += c->layer_kind[i] == HT_LAYER_MAMBA;
    if (n_mamba)
        mamba = linear_s(b, c->d_model, ht_in_proj_width(c)) + linear_s(b, c->d_inner, c->d_model);
    if (n_mamba < c->n_layers)
        attention = linear_s(b, c->d_model, ht_qkv_width(c)) +
                    linear_s(b, c->n_heads * c->d_head, c->d_model);
    if (c->d_ff) mlp = linear_s(b, c->d_model, 2 * c->d_ff) + linear_s(b, c->d_ff, c->d_model);
    total += (double)n_mamba * mamba + (double)(c->n_layers - n_mamba) * attention;
    return total + (double)c->n_layers * mlp;
}

/* Median time of scan, convolution and gated norm of one layer, forward and backward. */
static double ssm_layer_s(struct bench *b)
{
    const struct ht_model_config *c = &b->cfg.model;
    const int64_t T = b->n_tokens, width = ht_in_proj_width(c), channels = ht_conv_channels(c);
    const int64_t gn = c->n_groups * c->d_state, dI = c->d_inner;
    const enum ht_dtype d = b->m->dtype;
    const size_t e = ht_dtype_bytes(d);
    char *in = zeros((size_t)(T * width) * e), *conv = zeros((size_t)(T * channels) * e);
    char *y = zeros((size_t)(T * dI) * e), *o = zeros((size_t)(T * dI) * e);
    char *g_in = zeros((size_t)(T * width) * e), *g_conv = zeros((size_t)(T * channels) * e);
    char *g_y = zeros((size_t)(T * dI) * e);
    float *rstd = zeros((size_t)(T * c->n_groups) * 4),
          *g_small = zeros((size_t)(channels * 8) * 4);
    const struct ht_seqs seqs = { b->rows, b->starts };
    int layer = 0;
    double s[5];

    while (c->layer_kind[layer] != HT_LAYER_MAMBA) layer++;
    for (int64_t i = 0; i < T * width; i++)
        ht_store_f32(in, i, d, ht_rng_normal(1, 9, (uint64_t)i % 65536));
    for (int64_t i = 0; i < T * dI; i++)
        ht_store_f32(g_y, i, d, ht_rng_normal(1, 10, (uint64_t)i % 65536));
    for (int i = -1; i < 5; i++) {
        const double start_s = ht_time_s();
        struct ht_conv1d_args cv = { .seqs = seqs,
                                     .n_tokens = T,
                                     .n_channels = channels,
                                     .d_conv = c->d_conv,
                                     .dtype = d,
                                     .x = in + (size_t)dI * e,
                                     .x_stride = width,
                                     .w = ht_model_vector(b->m, layer, HT_T_CONV_W),
                                     .bias = ht_model_vector(b->m, layer, HT_T_CONV_B),
                                     .y = conv,
                                     .y_stride = channels };
        struct ht_ssd_args ssd = { .seqs = seqs,
                                   .n_tokens = T,
                                   .n_heads = c->ssm_heads,
                                   .d_head = c->ssm_d_head,
                                   .d_state = c->d_state,
                                   .n_groups = c->n_groups,
                                   .chunk = c->chunk,
                                   .dtype = d,
                                   .dt_max = INFINITY,
                                   .x = conv,
                                   .B = conv + (size_t)dI * e,
                                   .C = conv + (size_t)(dI + gn) * e,
                                   .x_stride = channels,
                                   .dt_raw = in + (size_t)(width - c->ssm_heads) * e,
                                   .dt_stride = width,
                                   .dt_bias = ht_model_vector(b->m, layer, HT_T_DT_BIAS),
                                   .A_log = ht_model_vector(b->m, layer, HT_T_A_LOG),
                                   .D = ht_model_vector(b->m, layer, HT_T_D),
                                   .y = y,
                                   .y_stride = dI };
        struct ht_gated_norm_args gn_args = { .n_tokens = T,
                                              .d_inner = dI,
                                              .n_groups = c->n_groups,
                                              .eps = c->norm_eps,
                                              .dtype = d,
                                              .w = ht_model_vector(b->m, layer, HT_T_GATED_NORM),
                                              .y = y,
                                              .z = in,
                                              .z_stride = width,
                                              .o = o,
                                              .rstd = rstd };
        check(ht_conv1d_forward(&b->be, &cv));
        check(ht_ssd_forward(&b->be, &ssd));
        check(ht_gated_norm_forward(&b->be, &gn_args));
        gn_args.o = NULL;
        gn_args.grad_o = g_y;
        gn_args.grad_y = o;
        gn_args.grad_z = g_in;
        gn_args.grad_z_stride = width;
        gn_args.grad_w = g_small;
        check(ht_gated_norm_backward(&b->be, &gn_args));
        ssd.grad_y = o;
        ssd.grad_y_stride = dI;
        ssd.grad_x = g_conv;
        ssd.grad_B = g_conv + (size_t)dI * e;
        ssd.grad_C = g_conv + (size_t)(dI + gn) * e;
        ssd.grad_x_stride = channels;
        ssd.grad_dt_raw = g_in + (size_t)(width - c->ssm_heads) * e;
        ssd.grad_dt_stride = width;
        ssd.grad_dt_bias = g_small;
        ssd.grad_A_log = g_small + channels;
        ssd.grad_D = g_small + 2 * channels;
        check(ht_ssd_backward(&b->be, &ssd));
        cv.grad_y = g_conv;
        cv.grad_y_stride = channels;
        cv.grad_x = g_in + (size_t)dI * e;
        cv.grad_x_stride = width;
        cv.grad_w = g_small + 3 * channels;
        cv.grad_bias = g_small + 7 * channels;
        check(ht_conv1d_backward(&b->be, &cv));
        if (i >= 0) s[i] = ht_time_s() - start_s;
    }
    free(in), free(conv), free(y), free(o), free(g_in), free(g_conv), free(g_y), free(rstd);
    free(g_small);
    return median(s, 5);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "seq", 1, NULL, 's' },     { "rows", 1, NULL, 'r' },      { "steps", 1, NULL, 'n' },
        { "threads", 1, NULL, 't' }, { "recompute", 1, NULL, 'c' }, { NULL, 0, NULL, 0 }
    };
    struct bench b = { .seq = 1024, .rows = 4 };
    enum ht_recompute recompute = HT_RECOMPUTE_NONE;
    int steps = 5, threads = 0, opt;
    double s[100];

    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (opt) {
        case 's': b.seq = atoll(optarg); break;
        case 'r': b.rows = atoll(optarg); break;
        case 'n': steps = atoi(optarg); break;
        case 't': threads = atoi(optarg); break;
        case 'c':
            recompute = optarg[0] == 'f'   ? HT_RECOMPUTE_FULL
                        : optarg[0] == 's' ? HT_RECOMPUTE_SELECTIVE
                                           : HT_RECOMPUTE_NONE;
            break;
        default: return 2;
        }
    }
    if (optind >= argc || steps < 1 || steps > 100 || b.seq < 1 || b.rows < 1) {
        fprintf(stderr, "usage: bench_train_step RECIPE [section.key=value ...] [--seq N] [--rows "
                        "N] [--steps 1..100]\n");
        return 2;
    }
    check(ht_recipe_load(&b.cfg, NULL, argv[optind], argc - optind - 1, argv + optind + 1, 1));
    check(ht_backend_create_cpu(&b.be, threads, 1 << 20));
    setup(&b, recompute);
    one_step(&b, 1);
    for (int i = 0; i < steps; i++) s[i] = one_step(&b, i + 2);
    const double step_s = median(s, steps), gemm_only_s = all_gemms_s(&b);
    int64_t n_mamba = 0;
    for (int64_t i = 0; i < b.cfg.model.n_layers; i++)
        n_mamba += b.cfg.model.layer_kind[i] == HT_LAYER_MAMBA;
    const double ssm_s = n_mamba ? (double)n_mamba * ssm_layer_s(&b) : 0.0;
    const double flops = 3.0 * ht_flops_forward(&b.cfg.model, (double)b.seq) * (double)b.n_tokens;
    printf("{\"recipe\": \"%s\", \"isa\": \"%s\", \"threads\": %d, \"precision\": \"%s\", "
           "\"parameters\": %lld, \"seq\": %lld, \"rows\": %lld, \"steps\": %d, "
           "\"step_s\": %.4f, \"step_s_min\": %.4f, \"tokens_per_s\": %.1f, \"gflop_per_s\": %.1f, "
           "\"gemm_only_s\": %.4f, \"gemm_fraction\": %.3f, \"ssm_only_s\": %.4f, "
           "\"ssm_fraction\": %.3f, \"ssm_us_per_token_layer\": %.3f, \"peak_rss_bytes\": %llu}\n",
           argv[optind], ht_isa_name(b.be.isa), b.be.n_threads, ht_dtype_name(b.m->dtype),
           (long long)b.m->list.n_params, (long long)b.seq, (long long)b.rows, steps, step_s, s[0],
           (double)b.n_tokens / step_s, flops / step_s * 1e-9, gemm_only_s, gemm_only_s / step_s,
           ssm_s, ssm_s / step_s,
           n_mamba ? 1e6 * ssm_s / (double)n_mamba / (double)b.n_tokens : 0.0,
           (unsigned long long)ht_memory_peak_bytes());
    return 0;
}
