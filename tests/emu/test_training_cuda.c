/* tests/emu/test_training_cuda.c: the loss curve of some training steps on the CUDA backend against
 * the CPU's, and with the projections in fp8 against bf16's: forward and backward passes over
 * several micro-batches, norm, clipping, AdamW. Needs neither MPI nor HDF5 (hybridtrain itself:
 * test_train_emu.sh); the text is the project's own.
 *
 * On a GPU the model is that of recipes/quickstart.cfg and a step has a quarter of its tokens (the
 * CPU's products may be plain loops there); emulated, all is small.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/model/fp8.h"
#include "core/model/model.h"
#include "core/model/params.h"
#include "core/ops/adamw.h"
#include "tests/emu/gpu_case.h"

#ifdef HT_CUDA_EMU
enum {
    D_MODEL = 64,
    N_LAYERS = 3,
    D_FF = 80,
    VOCAB = 256,
    ROW = 48,
    ROWS = 1,
    MICRO = 2,
    STEPS = 6
};
#else
enum {
    D_MODEL = 256,
    N_LAYERS = 8,
    D_FF = 704,
    VOCAB = 4096,
    ROW = 512,
    ROWS = 2,
    MICRO = 2,
    STEPS = 20
};
#endif
enum { T = ROW * ROWS };
#ifdef HT_CUDA_EMU
static const double FP32_BOUND = 1e-5, FP8_BOUND = 0.01,
                    FALLS_BY = 0.1; // measured: 2e-8, 0.003, 0.25
#else
static const double FP32_BOUND = 1e-3, FP8_BOUND = 0.1,
                    FALLS_BY = 1.0; // over more steps and larger sums
#endif

static struct ht_model_config model_config(void)
{
    struct ht_model_config c = { .naming = HT_NAMING_BAMBA,
                                 .vocab_size = VOCAB,
                                 .d_model = D_MODEL,
                                 .n_layers = N_LAYERS,
                                 .n_heads = 4,
                                 .n_kv_heads = 2,
                                 .d_head = D_MODEL / 4,
                                 .rope_dims = D_MODEL / 8,
                                 .rope_theta = 10000.0,
                                 .max_position = ROW,
                                 .attention_scale = (float)(1.0 / sqrt(D_MODEL / 4)),
                                 .d_inner = 2 * D_MODEL,
                                 .ssm_heads = 16,
                                 .ssm_d_head = D_MODEL / 8,
                                 .d_state = 64,
                                 .n_groups = 1,
                                 .d_conv = 4,
                                 .chunk = 64,
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
                                 .residual_init_div = 2.0,
                                 .tied_head = true };
    c.layer_kind[N_LAYERS / 2] = HT_LAYER_ATTENTION;
    return c;
}

/* Bytes of the documentation, again from the start at its end. */
struct text {
    unsigned char *bytes;
    size_t n, at;
};

static void text_open(struct text *t)
{
    FILE *f = fopen(HT_SOURCE_DIR "/docs/design.md", "rb");

    ck_assert_msg(f != NULL, "no docs/design.md");
    t->bytes = malloc(1 << 20);
    t->n = fread(t->bytes, 1, 1 << 20, f);
    t->at = 0;
    fclose(f);
    ck_assert_msg(t->n > 1000, "docs/design.md is short");
}

struct host_batch {
    int32_t ids[T], labels[T], pos[T], starts[ROWS + 1];
};

static void next_batch(struct host_batch *b, struct text *t)
{
    for (int i = 0; i < T; i++) {
        const bool last = (i + 1) % ROW == 0;
        b->ids[i] = t->bytes[t->at++ % t->n];
        b->labels[i] = last ? -1 : (int32_t)t->bytes[t->at % t->n];
        b->pos[i] = i % ROW;
        if (i % ROW == 0) b->starts[i / ROW] = i;
    }
    b->starts[ROWS] = T;
}

struct side { // one backend's run
    struct ht_backend be;
    struct ht_model *m;
    struct ht_acts *acts;
    struct host_batch *batch;                     // in the backend's memory
    float *master, *exp_avg, *exp_avg_sq, *grads; // the same
    double *sums, *squares;                       // (MICRO, 3), (1)
    float *clip;
};

static void *take(struct side *s, size_t bytes)
{
    void *p;
    gpu_ok(ht_backend_alloc(&p, &s->be, "training", bytes));
    gpu_ok(ht_backend_zero(&s->be, p, bytes));
    return p;
}

static void side_make(struct side *s, enum ht_dtype dtype)
{
    const struct ht_model_config c = model_config();

    gpu_ok(ht_model_create(&s->m, &s->be, &c, dtype, HT_DECAY_MATRICES, 0, 0, ROW));
    gpu_ok(ht_acts_create(&s->acts, s->m, HT_RECOMPUTE_NONE, false, T));
    const struct ht_tensor_list *l = &s->m->list;
    const size_t bytes = (size_t)l->n_total * sizeof(float);
    float *flat = malloc(bytes), *narrow = malloc(bytes);
    ht_params_init(flat, &c, l, 7, 0, l->n_total);
    s->batch = take(s, sizeof *s->batch);
    s->master = take(s, bytes);
    s->exp_avg = take(s, bytes);
    s->exp_avg_sq = take(s, bytes);
    s->grads = take(s, bytes);
    s->sums = take(s, MICRO * 3 * sizeof(double));
    s->squares = take(s, sizeof(double));
    s->clip = take(s, sizeof(float));
    ht_convert(narrow, dtype, flat, HT_DTYPE_F32, l->n_matrix);
    gpu_ok(ht_backend_upload(&s->be, s->master, flat, bytes));
    gpu_ok(ht_backend_upload(&s->be, s->m->matrix, narrow,
                             (size_t)l->n_matrix * ht_dtype_bytes(dtype)));
    gpu_ok(ht_backend_upload(&s->be, s->m->vector, flat + l->n_matrix,
                             (size_t)(l->n_total - l->n_matrix) * sizeof(float)));
    gpu_ok(ht_backend_synchronize(&s->be));
    free(flat);
    free(narrow);
}

static void side_free(struct side *s)
{
    void *arrays[] = { s->batch, s->master, s->exp_avg, s->exp_avg_sq,
                       s->grads, s->sums,   s->squares, s->clip };
    for (int i = 0; i < 8; i++) ht_backend_free_memory(&s->be, arrays[i]);
    ht_acts_free(s->acts);
    ht_model_free(s->m);
    ht_backend_free(&s->be);
    free(s);
}

static void update(struct side *s, int64_t step, int64_t first, int64_t n, bool matrix)
{
    const struct ht_model *m = s->m;
    char *weight = matrix ? m->matrix : (char *)(m->vector + (first - m->list.n_matrix));

    gpu_ok(ht_adamw_step(
        &s->be, &(struct ht_adamw_args){ .n = n,
                                         .step = step,
                                         .lr = 3e-3f * (float)fmin(1.0, (double)step / 10.0),
                                         .beta1 = 0.9f,
                                         .beta2 = 0.95f,
                                         .eps = 1e-8f,
                                         .weight_decay = matrix ? 0.1f : 0.0f,
                                         .grad_scale = 1.0f,
                                         .master = s->master + first,
                                         .exp_avg = s->exp_avg + first,
                                         .exp_avg_sq = s->exp_avg_sq + first,
                                         .grad = s->grads + first,
                                         .weight = weight,
                                         .weight_dtype = matrix ? m->dtype : HT_DTYPE_F32,
                                         .clip = s->clip }));
}

/* Mean loss of a step, before its update. */
static double step(struct side *s, struct text *text, int64_t number)
{
    const struct ht_tensor_list *l = &s->m->list;
    const double labels = (double)(MICRO * ROWS * (ROW - 1));
    struct host_batch *host = malloc(sizeof *host);
    double sums[MICRO * 3], loss = 0.0;

    gpu_ok(ht_backend_zero(&s->be, s->grads, (size_t)l->n_total * sizeof(float)));
    for (int i = 0; i < MICRO; i++) {
        struct ht_loss unused;
        next_batch(host, text);
        gpu_ok(ht_backend_upload(&s->be, s->batch, host, sizeof *host));
        const struct ht_model_batch b = { .n_tokens = T,
                                          .ids = s->batch->ids,
                                          .labels = s->batch->labels,
                                          .pos = s->batch->pos,
                                          .seqs = { ROWS, s->batch->starts },
                                          .loss_sums = s->sums + 3 * (ptrdiff_t)i };
        gpu_ok(ht_model_train(s->m, s->acts, &b, (float)(1.0 / labels), 0.0f, s->grads, &unused,
                              NULL, NULL));
    }
    ht_model_weights_changed(s->m);
    gpu_ok(ht_sum_squares(&s->be, s->squares, s->grads, l->n_total));
    gpu_ok(ht_clip_factor(&s->be, s->clip, s->squares, s->sums, 1.0, 1.0));
    update(s, number, 0, l->n_matrix, true);
    update(s, number, l->n_matrix, l->n_total - l->n_matrix, false);
    gpu_ok(ht_backend_download(&s->be, sums, s->sums, sizeof sums));
    for (int i = 0; i < MICRO; i++) loss += sums[3 * i] / labels;
    free(host);
    return loss;
}

static void run(struct side *s, enum ht_dtype dtype, double losses[STEPS])
{
    struct text text;

    side_make(s, dtype);
    text_open(&text);
    for (int i = 0; i < STEPS; i++) losses[i] = step(s, &text, i + 1);
    free(text.bytes);
    side_free(s);
}

static struct side *cpu_side(void)
{
    struct side *s = calloc(1, sizeof *s); // models keep their backends' addresses
    gpu_ok(ht_backend_create_cpu(&s->be, 0, 1 << 20));
    return s;
}

/* fp32: the same sums in another order, which training carries on. bf16: what 16 bits cost the CPU
 * on the way is the measure; the device may stand twice as far from the fp32 curve. */
START_TEST(loss_curve_of_the_cpu)
{
    const enum ht_dtype dtype = _i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    double exact[STEPS], cpu[STEPS], gpu[STEPS], lost = 0.0, most = 0.0;
    struct side *s = calloc(1, sizeof *s);

    gpu_start(&s->be, 0);
    run(s, dtype, gpu);
    run(cpu_side(), HT_DTYPE_F32, exact);
    run(cpu_side(), dtype, cpu);
    for (int i = 0; i < STEPS; i++) {
        lost = fmax(lost, fabs(cpu[i] - exact[i]));
        most = fmax(most, fabs(gpu[i] - exact[i]));
    }
    const double bound = dtype == HT_DTYPE_F32 ? FP32_BOUND : 2.0 * lost + 1e-2;
    printf(
        "%s: loss %.4f to %.4f (CPU %.4f); off the fp32 curve by at most %.3g, the CPU by %.3g\n",
        ht_dtype_name(dtype), gpu[0], gpu[STEPS - 1], cpu[STEPS - 1], most, lost);
    ck_assert_msg(most <= bound, "loss off by %.3g, at most %.3g", most, bound);
    ck_assert_msg(gpu[STEPS - 1] < gpu[0] - FALLS_BY, "the loss goes from %g to %g", gpu[0],
                  gpu[STEPS - 1]);
}
END_TEST

/* ---- fp8 ---- */

/* Skipped where the GPU has no fp8. */
static struct side *fp8_side(bool fp8, bool every_weight)
{
    struct side *s = calloc(1, sizeof *s);

#ifdef HT_CUDA_EMU
    setenv("HT_EMU_ARCH", "89", 1);
#endif
    gpu_start(&s->be, 0);
    if (ht_fp8_check_backend(&s->be) != HT_OK) {
        ht_backend_free(&s->be);
        free(s);
        return NULL;
    }
    side_make(s, HT_DTYPE_BF16);
    if (fp8) gpu_ok(ht_model_use_fp8(s->m, T, every_weight));
    return s;
}

static void run_made(struct side *s, double losses[STEPS])
{
    struct text text;

    text_open(&text);
    for (int i = 0; i < STEPS; i++) losses[i] = step(s, &text, i + 1);
    free(text.bytes);
    side_free(s);
}

/* The curve stays near bf16's and falls as far; and copies that are made once a step give the bits
 * of copies that are made for every product. */
START_TEST(fp8_follows_bf16)
{
    const struct ht_model_config c = model_config();
    const struct ht_fp8_cover cover = ht_model_fp8_cover(&c, T);
    double bf16[STEPS], once[STEPS], each[STEPS], most = 0.0;
    struct side *s = fp8_side(true, true);

    if (!s) return;
    ck_assert_int_eq(cover.n_fp8, 4 * N_LAYERS);
    ck_assert_int_eq(cover.n_all, 4 * N_LAYERS);
    run_made(s, once);
    run_made(fp8_side(true, false), each);
    run_made(fp8_side(false, false), bf16);
    ck_assert_mem_eq(once, each, sizeof once);
    for (int i = 0; i < STEPS; i++) most = fmax(most, fabs(once[i] - bf16[i]));
    printf("fp8: loss %.4f to %.4f (bf16 %.4f); off the bf16 curve by at most %.3g\n", once[0],
           once[STEPS - 1], bf16[STEPS - 1], most);
    ck_assert_msg(once[0] != bf16[0], "nothing was computed in fp8");
    ck_assert_msg(most <= FP8_BOUND, "loss off by %.3g, at most %.3g", most, FP8_BOUND);
    ck_assert_msg(once[STEPS - 1] < once[0] - FALLS_BY, "the loss goes from %g to %g", once[0],
                  once[STEPS - 1]);
}
END_TEST

/* Sum of the losses of a forward pass over the first n_tokens of a row. */
static double evaluate(struct side *s, int n_tokens)
{
    struct host_batch *host = malloc(sizeof *host);
    struct ht_loss unused;
    struct text text;
    double sums[3];

    text_open(&text);
    next_batch(host, &text);
    host->starts[0] = 0;
    host->starts[1] = n_tokens;
    gpu_ok(ht_backend_upload(&s->be, s->batch, host, sizeof *host));
    const struct ht_model_batch b = { .n_tokens = n_tokens,
                                      .ids = s->batch->ids,
                                      .labels = s->batch->labels,
                                      .pos = s->batch->pos,
                                      .seqs = { 1, s->batch->starts },
                                      .loss_sums = s->sums };
    gpu_ok(ht_model_evaluate(s->m, s->acts, &b, &unused, NULL));
    gpu_ok(ht_backend_download(&s->be, sums, s->sums, sizeof sums));
    free(text.bytes);
    free(host);
    return sums[0];
}

START_TEST(ragged_batches_are_bf16)
{
    struct side *fp8 = fp8_side(true, true), *plain;

    if (!fp8) return;
    plain = fp8_side(false, false);
    ck_assert(evaluate(fp8, ROW) != evaluate(plain, ROW));
    ck_assert_double_eq(evaluate(fp8, ROW - 7), evaluate(plain, ROW - 7));
    const struct ht_fp8_cover none = ht_model_fp8_cover(&plain->m->cfg, ROW - 7);
    ck_assert(none.n_fp8 == 0 && none.n_in == D_MODEL);
    side_free(fp8);
    side_free(plain);
}
END_TEST

/* Weights are rounded once, until they are said to have changed; one that is not finite makes the
 * loss NaN and the step changes nothing. */
START_TEST(weights_are_rounded_once)
{
    struct side *s = fp8_side(true, true);

    if (!s) return;
    const struct ht_tensor_info *t = ht_tensor_find(&s->m->list, 0, HT_T_IN_PROJ);
    ht_bf16 *place = (ht_bf16 *)s->m->matrix + t->offset;
    const ht_bf16 large = ht_f32_to_bf16(3.0f), infinite = ht_f32_to_bf16(INFINITY);
    const double before = evaluate(s, ROW);
    gpu_ok(ht_backend_upload(&s->be, place, &large, sizeof large));
    ck_assert_double_eq(evaluate(s, ROW), before);
    ht_model_weights_changed(s->m);
    ck_assert(evaluate(s, ROW) != before);

    const size_t bytes = (size_t)s->m->list.n_total * sizeof(float);
    float *was = malloc(bytes), *is = malloc(bytes);
    struct text text;
    gpu_ok(ht_backend_upload(&s->be, place, &infinite, sizeof infinite));
    ht_model_weights_changed(s->m);
    gpu_ok(ht_backend_download(&s->be, was, s->master, bytes));
    text_open(&text);
    ck_assert(isnan(step(s, &text, 1)));
    gpu_ok(ht_backend_download(&s->be, is, s->master, bytes));
    ck_assert_mem_eq(was, is, bytes);
    free(was);
    free(is);
    free(text.bytes);
    side_free(s);
}
END_TEST

START_TEST(fp8_is_refused_where_there_is_none)
{
    struct side *s = cpu_side();

    side_make(s, HT_DTYPE_BF16);
    ck_assert_int_eq(ht_model_use_fp8(s->m, T, true), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "not on the CPU backend; set it to"));
    side_free(s);
    s = cpu_side();
    side_make(s, HT_DTYPE_F32);
    ck_assert_int_eq(ht_model_use_fp8(s->m, T, true), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "train.precision"));
    side_free(s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("training_cuda");
    TCase *t = tcase_create("training_cuda");

    tcase_add_loop_test(t, loss_curve_of_the_cpu, 0, 2);
    tcase_add_test(t, fp8_follows_bf16);
    tcase_add_test(t, ragged_batches_are_bf16);
    tcase_add_test(t, weights_are_rounded_once);
    tcase_add_test(t, fp8_is_refused_where_there_is_none);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
