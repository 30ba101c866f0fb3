/* bench/gpu/gpu_slice.c: training steps of a slice of Bamba-9B on one GPU: six Mamba-2 layers, one
 * attention layer, embedding and head, all at full width; per layer it costs what the whole model
 * costs.
 *
 *   bench_gpu_slice [--seq 4096] [--rows 2] [--steps 10] [--recompute none|selective|full] [--fp8]
 *                   [--date DATE] [--commit COMMIT]
 *
 * A step is the forward and backward pass over one micro-batch, the norm of the gradient, clipping
 * and AdamW with fp32 masters. Times are the device's clock, median over the steps after two. One
 * JSON object goes to stdout: model FLOPs are those that are multiplied (no look-up, half of causal
 * attention, recomputation not counted), the MFU beside it takes 6 per parameter and token. "pass"
 * leaves the optimiser out, which a run divides over its micro-batches and ranks.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/gpu/gpu_ops.h"
#include "core/base/cuda_device.h"
#include "core/base/rng.h"
#include "core/config/planner.h"
#include "core/model/fp8.h"
#include "core/model/model.h"
#include "core/model/params.h"
#include "core/ops/adamw.h"

enum { N_LAYERS = 7, ATTENTION_LAYER = 3, SLICE_WARM = 2, MAX_STEPS = 100 };

struct slice {
    struct ht_backend be;
    struct ht_model *m;
    struct ht_acts *acts;
    int64_t seq, rows, n_tokens;
    int32_t *ids, *labels, *pos, *starts; // device memory, as all that follows
    float *master, *exp_avg, *exp_avg_sq, *grads, *clip;
    double *sums, *squares; // (3), (1)
};

struct times { // of one step, milliseconds
    float pass, optimiser;
};

static const struct {
    const char *name; // part of the device's name
    double flops_per_s;
} peaks[] = { { "H100", 989e12 }, { "H200", 989e12 }, { "A100", 312e12 } };

static struct ht_model_config slice_config(int64_t seq)
{
    struct ht_model_config c = { .naming = HT_NAMING_BAMBA,
                                 .vocab_size = VOCAB,
                                 .d_model = D_MODEL,
                                 .n_layers = N_LAYERS,
                                 .n_heads = N_HEADS,
                                 .n_kv_heads = N_KV_HEADS,
                                 .d_head = D_HEAD,
                                 .rope_dims = D_HEAD / 2,
                                 .rope_theta = 10000.0,
                                 .max_position = seq,
                                 .attention_scale = (float)(1.0 / sqrt(D_HEAD)),
                                 .d_inner = D_INNER,
                                 .ssm_heads = SSM_HEADS,
                                 .ssm_d_head = SSM_D_HEAD,
                                 .d_state = D_STATE,
                                 .n_groups = 1,
                                 .d_conv = 4,
                                 .chunk = 256,
                                 .conv_bias = true,
                                 .dt_limit_max = INFINITY,
                                 .dt_init_min = 0.001f,
                                 .dt_init_max = 0.1f,
                                 .dt_init_floor = 1e-4f,
                                 .d_ff = D_FF,
                                 .norm_eps = 1e-5f,
                                 .embedding_multiplier = 1.0f,
                                 .residual_multiplier = 1.0f,
                                 .logits_scaling = 1.0f,
                                 .residual_fp32 = true,
                                 .residual_init_div = sqrt(2.0 * N_LAYERS) };
    c.layer_kind[ATTENTION_LAYER] = HT_LAYER_ATTENTION;
    return c;
}

static enum ht_status new_zeros(void *out, struct slice *s, const char *what, int64_t bytes)
{
    void *p;
    HT_TRY(ht_backend_alloc(&p, &s->be, what, (size_t)bytes));
    memcpy(out, &p, sizeof p);
    return ht_backend_zero(&s->be, p, (size_t)bytes);
}

/* Matrices: random on the device, masters and working copies from the same numbers (billions of
 * them take the host minutes). Vectors: as a run initialises them. */
static enum ht_status fill_weights(struct slice *s)
{
    const struct ht_tensor_list *l = &s->m->list;
    const int64_t n_vector = l->n_total - l->n_matrix;
    float *v = malloc((size_t)n_vector * sizeof *v);

    if (!v)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld vector elements", (long long)n_vector);
    ht_params_init(v, &s->m->cfg, l, 1, l->n_matrix, n_vector);
    enum ht_status st = gpu_fill(&s->be, s->master, l->n_matrix, HT_DTYPE_F32, 0.02f, 1);
    if (st == HT_OK) st = gpu_fill(&s->be, s->m->matrix, l->n_matrix, HT_DTYPE_BF16, 0.02f, 1);
    if (st == HT_OK)
        st = ht_backend_upload(&s->be, s->master + l->n_matrix, v, (size_t)n_vector * sizeof *v);
    if (st == HT_OK) st = ht_backend_upload(&s->be, s->m->vector, v, (size_t)n_vector * sizeof *v);
    if (st == HT_OK) st = ht_backend_synchronize(&s->be);
    free(v);
    return st;
}

static enum ht_status fill_batch(struct slice *s)
{
    const int64_t t = s->n_tokens;
    int32_t *host = malloc((size_t)(3 * t + s->rows + 1) * sizeof *host);
    enum ht_status st;

    if (!host) return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld tokens", (long long)t);
    for (int64_t i = 0; i < t; i++) {
        host[i] = (int32_t)(ht_rng_u64(1, 2, (uint64_t)i) % VOCAB);
        host[t + i] = (int32_t)(ht_rng_u64(1, 3, (uint64_t)i) % VOCAB);
        host[2 * t + i] = (int32_t)(i % s->seq);
    }
    for (int64_t r = 0; r <= s->rows; r++) host[3 * t + r] = (int32_t)(r * s->seq);
    st = new_zeros(&s->ids, s, "batch", (3 * t + s->rows + 1) * (int64_t)sizeof *host);
    if (st == HT_OK)
        st = ht_backend_upload(&s->be, s->ids, host, (size_t)(3 * t + s->rows + 1) * sizeof *host);
    if (st == HT_OK) st = ht_backend_synchronize(&s->be);
    free(host);
    s->labels = s->ids + t;
    s->pos = s->ids + 2 * t;
    s->starts = s->ids + 3 * t;
    return st;
}

static enum ht_status slice_create(struct slice *s, enum ht_recompute recompute, bool fp8)
{
    const struct ht_model_config c = slice_config(s->seq);

    s->n_tokens = s->seq * s->rows;
    HT_TRY(ht_backend_create_cuda(&s->be, 0, 1 << 20));
    HT_TRY(ht_model_create(&s->m, &s->be, &c, HT_DTYPE_BF16, HT_DECAY_MATRICES, 0, 0, s->seq));
    HT_TRY(ht_acts_create(&s->acts, s->m, recompute, false, s->n_tokens));
    if (fp8) HT_TRY(ht_model_use_fp8(s->m, s->n_tokens, true));
    const int64_t bytes = s->m->list.n_total * (int64_t)sizeof(float);
    HT_TRY(new_zeros(&s->master, s, "masters", bytes));
    HT_TRY(new_zeros(&s->exp_avg, s, "first moments", bytes));
    HT_TRY(new_zeros(&s->exp_avg_sq, s, "second moments", bytes));
    HT_TRY(new_zeros(&s->grads, s, "gradients", bytes));
    HT_TRY(new_zeros(&s->sums, s, "sums", 3 * (int64_t)sizeof(double)));
    HT_TRY(new_zeros(&s->squares, s, "norm", sizeof(double)));
    HT_TRY(new_zeros(&s->clip, s, "clip factor", sizeof(float)));
    HT_TRY(fill_batch(s));
    return fill_weights(s);
}

static enum ht_status update(struct slice *s, int64_t step)
{
    const struct ht_model *m = s->m;

    for (int matrix = 0; matrix < 2; matrix++) {
        const int64_t at = matrix ? 0 : m->list.n_matrix;
        const struct ht_adamw_args a = { .n = matrix ? m->list.n_matrix
                                                     : m->list.n_total - m->list.n_matrix,
                                         .step = step,
                                         .lr = 1e-4f,
                                         .beta1 = 0.9f,
                                         .beta2 = 0.95f,
                                         .eps = 1e-8f,
                                         .weight_decay = matrix ? 0.1f : 0.0f,
                                         .grad_scale = 1.0f,
                                         .master = s->master + at,
                                         .exp_avg = s->exp_avg + at,
                                         .exp_avg_sq = s->exp_avg_sq + at,
                                         .grad = s->grads + at,
                                         .weight = matrix ? m->matrix : (void *)m->vector,
                                         .weight_dtype = matrix ? m->dtype : HT_DTYPE_F32,
                                         .clip = s->clip };
        HT_TRY(ht_adamw_step(&s->be, &a));
    }
    ht_model_weights_changed(s->m);
    return HT_OK;
}

static enum ht_status one_step(struct slice *s, int64_t step, struct ht_backend_mark marks[3],
                               struct times *out)
{
    const struct ht_model_batch b = { .n_tokens = s->n_tokens,
                                      .ids = s->ids,
                                      .labels = s->labels,
                                      .pos = s->pos,
                                      .seqs = { s->rows, s->starts },
                                      .loss_sums = s->sums };
    const struct ht_tensor_list *l = &s->m->list;
    struct ht_loss unused;

    HT_TRY(ht_backend_mark_set(&s->be, &marks[0]));
    HT_TRY(ht_backend_zero(&s->be, s->grads, (size_t)l->n_total * sizeof(float)));
    HT_TRY(ht_model_train(s->m, s->acts, &b, 1.0f / (float)s->n_tokens, 0.0f, s->grads, &unused,
                          NULL, NULL));
    HT_TRY(ht_backend_mark_set(&s->be, &marks[1]));
    HT_TRY(ht_sum_squares(&s->be, s->squares, s->grads, l->n_total));
    HT_TRY(ht_clip_factor(&s->be, s->clip, s->squares, s->sums, 1.0, 1.0));
    HT_TRY(update(s, step));
    HT_TRY(ht_backend_mark_set(&s->be, &marks[2]));
    HT_TRY(ht_backend_mark_wait(&s->be, &marks[2]));
    HT_TRY(ht_backend_mark_ms(&out->pass, &s->be, &marks[0], &marks[1]));
    return ht_backend_mark_ms(&out->optimiser, &s->be, &marks[1], &marks[2]);
}

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static double median(float *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return (double)x[n / 2];
}

static void report(const struct slice *s, const struct times *t, int steps, double losses[2],
                   const char *settings, const char *date, const char *commit)
{
    const char *device = ht_cuda_device_of(&s->be)->name;
    const double tokens = (double)s->n_tokens, params = (double)s->m->list.n_params;
    const double flops = 3.0 * ht_flops_forward(&s->m->cfg, (double)s->seq) * tokens;
    float pass[MAX_STEPS], optimiser[MAX_STEPS], whole[MAX_STEPS];
    double peak = 0.0;

    for (int i = 0; i < steps; i++) {
        pass[i] = t[i].pass;
        optimiser[i] = t[i].optimiser;
        whole[i] = t[i].pass + t[i].optimiser;
    }
    for (size_t i = 0; i < sizeof peaks / sizeof *peaks; i++)
        if (strstr(device, peaks[i].name)) peak = peaks[i].flops_per_s;
    const double pass_s = 1e-3 * median(pass, steps), step_s = 1e-3 * median(whole, steps);
    printf("{\"device\": \"%s\", \"date\": \"%s\", \"commit\": \"%s\", %s, "
           "\"parameters\": %.0f, \"seq\": %lld, \"rows\": %lld, \"steps\": %d",
           device, date, commit, settings, params, (long long)s->seq, (long long)s->rows, steps);
    if (pass_s > 0.0) // the emulated device has no clock
        printf(", \"pass_ms\": %.3f, \"optimiser_ms\": %.3f, \"step_ms\": %.3f, "
               "\"tokens_per_s\": %.1f, \"tflop_per_s_pass\": %.2f",
               1e3 * pass_s, median(optimiser, steps), 1e3 * step_s, tokens / step_s,
               1e-12 * flops / pass_s);
    if (peak > 0.0)
        printf(", \"peak_tflop_per_s\": %.0f, \"roof_pass_ms\": %.3f, \"mfu_pass\": %.4f, "
               "\"mfu_step\": %.4f, \"mfu_pass_6n\": %.4f",
               1e-12 * peak, 1e3 * flops / peak, flops / peak / pass_s, flops / peak / step_s,
               6.0 * params * tokens / peak / pass_s);
    printf(", \"loss_first\": %.4f, \"loss_last\": %.4f}\n", losses[0], losses[1]);
}

static enum ht_status run(struct slice *s, int steps, const char *settings, const char *date,
                          const char *commit)
{
    struct ht_backend_mark marks[3] = { { NULL } };
    struct times t[MAX_STEPS + SLICE_WARM];
    double losses[2], sums[3];

    for (int i = 0; i < steps + SLICE_WARM; i++) {
        HT_TRY(one_step(s, i + 1, marks, &t[i]));
        HT_TRY(ht_backend_download(&s->be, sums, s->sums, sizeof sums));
        losses[i > 0] = sums[0] / (double)s->n_tokens;
        if (!isfinite(losses[i > 0]))
            return HT_FAIL(HT_ERR_NUMERIC, "the loss of step %d is not finite", i + 1);
    }
    if (!(losses[1] < losses[0])) // the same batch every time: it is learnt by heart
        return HT_FAIL(HT_ERR_NUMERIC, "the loss goes from %g to %g on a repeated batch", losses[0],
                       losses[1]);
    report(s, t + SLICE_WARM, steps, losses, settings, date, commit);
    for (int i = 0; i < 3; i++) ht_backend_mark_free(&s->be, &marks[i]);
    return HT_OK;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "seq", 1, NULL, 's' },    { "rows", 1, NULL, 'r' },      { "steps", 1, NULL, 'n' },
        { "fp8", 0, NULL, '8' },    { "recompute", 1, NULL, 'c' }, { "date", 1, NULL, 'd' },
        { "commit", 1, NULL, 'h' }, { NULL, 0, NULL, 0 }
    };
    static const char *const recomputes[] = { "none", "selective", "full" };
    static struct slice s = { .seq = 4096, .rows = 2 };
    enum ht_recompute recompute = HT_RECOMPUTE_SELECTIVE;
    const char *date = "-", *commit = "-";
    char settings[96];
    bool fp8 = false, bad = false;
    int steps = 10, opt;

    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (opt) {
        case 's': s.seq = atoll(optarg); break;
        case 'r': s.rows = atoll(optarg); break;
        case 'n': steps = atoi(optarg); break;
        case '8': fp8 = true; break;
        case 'd': date = optarg; break;
        case 'h': commit = optarg; break;
        case 'c': {
            int i = 0;
            while (i < 3 && strcmp(optarg, recomputes[i]) != 0) i++;
            recompute = (enum ht_recompute)i;
            bad |= i == 3;
            break;
        }
        default: bad = true;
        }
    }
    if (bad || optind < argc || s.seq < 1 || s.rows < 1 || s.seq * s.rows > 1 << 20 || steps < 1 ||
        steps > MAX_STEPS) {
        fprintf(stderr,
                "usage: bench_gpu_slice [--seq N] [--rows N] [--steps 1..%d] [--recompute "
                "none|selective|full] [--fp8] [--date DATE] [--commit COMMIT]\n",
                MAX_STEPS);
        return 2;
    }
    snprintf(settings, sizeof settings, "\"recompute\": \"%s\", \"linears\": \"%s\"",
             recomputes[recompute], fp8 ? "fp8" : "bf16");
    enum ht_status st = slice_create(&s, recompute, fp8);
    if (st == HT_OK) st = run(&s, steps, settings, date, commit);
    if (st != HT_OK) fprintf(stderr, "bench_gpu_slice: %s\n", ht_error_message());
    return ht_exit_code(st); // the process's end frees the device's memory
}
