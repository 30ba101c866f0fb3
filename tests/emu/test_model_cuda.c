/* tests/emu/test_model_cuda.c: the whole stack on the CUDA backend against the CPU backend. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/model/model.h"
#include "core/model/params.h"
#include "tests/emu/gpu_case.h"

enum { T = 41 }; // tokens: ragged against every tile

/* Four layers: Mamba, attention, Mamba, attention; two groups, grouped queries, half RoPE. The
 * width of in_proj is a multiple of 8, as the kernels ask (16-byte rows in bf16). */
static struct ht_model_config small_config(int variant)
{
    struct ht_model_config c = { .naming = HT_NAMING_BAMBA,
                                 .vocab_size = 97,
                                 .d_model = 64,
                                 .n_layers = 4,
                                 .n_heads = 4,
                                 .n_kv_heads = 2,
                                 .d_head = 64,
                                 .rope_dims = 32,
                                 .rope_theta = 10000.0,
                                 .max_position = 64,
                                 .attention_scale = 0.125f,
                                 .d_inner = 128,
                                 .ssm_heads = 8,
                                 .ssm_d_head = 16,
                                 .d_state = 64,
                                 .n_groups = 1,
                                 .d_conv = 4,
                                 .chunk = 64,
                                 .conv_bias = true,
                                 .dt_limit_max = INFINITY,
                                 .dt_init_min = 0.001f,
                                 .dt_init_max = 0.1f,
                                 .dt_init_floor = 1e-4f,
                                 .d_ff = 72,
                                 .norm_eps = 1e-5f,
                                 .embedding_multiplier = 1.0f,
                                 .residual_multiplier = 1.0f,
                                 .logits_scaling = 1.0f,
                                 .residual_fp32 = true,
                                 .residual_init_div = 2.0 };
    c.layer_kind[1] = c.layer_kind[3] = HT_LAYER_ATTENTION;
    if (variant == 1) { // Granite's multipliers, a tied head, several groups
        c.tied_head = true;
        c.embedding_multiplier = 3.0f;
        c.residual_multiplier = 0.5f;
        c.logits_scaling = 2.0f;
        c.n_groups = 2;
    }
    return c;
}

struct side { // one backend's model and batch
    struct ht_backend be;
    struct ht_model *m;
    struct ht_model_batch b;
    float *grads; // (n_total) in the backend's memory
};

struct host_batch {
    int32_t ids[T], labels[T], pos[T], starts[4];
};

static void fill_batch(struct host_batch *h, int64_t vocab_size)
{
    const int32_t starts[4] = { 0, 18, 19, T }; // three documents: 18, 1 and 22 tokens
    int s = 0;

    memcpy(h->starts, starts, sizeof starts);
    for (int t = 0; t < T; t++) {
        if (t == starts[s + 1]) s++;
        h->ids[t] = (int32_t)(ht_rng_u64(3, 1, (uint64_t)t) % (uint64_t)vocab_size);
        h->pos[t] = t - starts[s];
    }
    for (int t = 0; t < T; t++)
        h->labels[t] = t + 1 == T || t + 1 == starts[1] || t + 1 == starts[2] ? -1 : h->ids[t + 1];
}

/* Parameters with norms off 1 and D off 1, so that nothing hides. */
static float *make_params(const struct ht_model_config *c, const struct ht_tensor_list *l)
{
    float *flat = calloc((size_t)l->n_total, sizeof *flat);

    ht_params_init(flat, c, l, 7, 0, l->n_total);
    for (int k = 0; k < l->n_tensors; k++) {
        const struct ht_tensor_info *t = &l->tensors[k];
        for (int64_t i = 0; i < t->n; i++) {
            float *v = &flat[t->offset + i];
            if (t->role == HT_T_EMBED) *v *= 20.0f;
            if (!t->matrix && t->role != HT_T_A_LOG && t->role != HT_T_DT_BIAS)
                *v += 0.3f * ht_rng_normal(1, (uint64_t)k, (uint64_t)i);
        }
    }
    return flat;
}

static void *put(struct ht_backend *be, const void *host, size_t bytes)
{
    void *p;
    gpu_ok(ht_backend_alloc(&p, be, "batch", bytes));
    gpu_ok(ht_backend_upload(be, p, host, bytes));
    return p;
}

/* Both sides are made by the same code: what differs is the backend. */
static void side_make(struct side *s, const struct ht_model_config *c, enum ht_dtype dtype)
{
    struct host_batch h;

    gpu_ok(ht_model_create(&s->m, &s->be, c, dtype, HT_DECAY_MATRICES, 0, 0, 64));
    const struct ht_tensor_list *l = &s->m->list;
    float *flat = make_params(c, l), *zero = calloc((size_t)l->n_total, sizeof *zero);
    void *matrix = malloc((size_t)l->n_matrix * sizeof(float));
    ht_convert(matrix, dtype, flat, HT_DTYPE_F32, l->n_matrix);
    gpu_ok(ht_backend_upload(&s->be, s->m->matrix, matrix,
                             (size_t)l->n_matrix * ht_dtype_bytes(dtype)));
    gpu_ok(ht_backend_upload(&s->be, s->m->vector, flat + l->n_matrix,
                             (size_t)(l->n_total - l->n_matrix) * sizeof(float)));
    fill_batch(&h, c->vocab_size);
    s->b = (struct ht_model_batch){ .n_tokens = T,
                                    .ids = put(&s->be, h.ids, sizeof h.ids),
                                    .labels = put(&s->be, h.labels, sizeof h.labels),
                                    .pos = put(&s->be, h.pos, sizeof h.pos),
                                    .seqs = { 3, put(&s->be, h.starts, sizeof h.starts) } };
    s->grads = put(&s->be, zero, (size_t)l->n_total * sizeof(float));
    gpu_ok(ht_backend_synchronize(&s->be));
    free(matrix);
    free(flat);
    free(zero);
}

static void side_free(struct side *s)
{
    ht_backend_free_memory(&s->be, (void *)(uintptr_t)s->b.ids);
    ht_backend_free_memory(&s->be, (void *)(uintptr_t)s->b.labels);
    ht_backend_free_memory(&s->be, (void *)(uintptr_t)s->b.pos);
    ht_backend_free_memory(&s->be, (void *)(uintptr_t)s->b.seqs.starts);
    ht_backend_free_memory(&s->be, s->grads);
    ht_model_free(s->m);
    ht_backend_free(&s->be);
}

static float *train(struct side *s, enum ht_recompute recompute, struct ht_loss *loss)
{
    struct ht_acts *acts;
    float *grads = malloc((size_t)s->m->list.n_total * sizeof *grads);

    gpu_ok(ht_acts_create(&acts, s->m, recompute, false, T));
    gpu_ok(ht_model_train(s->m, acts, &s->b, 0.1f, 1e-2f, s->grads, loss, NULL, NULL));
    gpu_ok(
        ht_backend_download(&s->be, grads, s->grads, (size_t)s->m->list.n_total * sizeof *grads));
    ht_acts_free(acts);
    return grads;
}

/* Norm of the difference of one tensor's gradients over the norm of the first. */
static double distance(const float *a, const float *b, const struct ht_tensor_info *t)
{
    double diff = 0.0, norm = 0.0;
    for (int64_t i = t->offset; i < t->offset + t->n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        norm += (double)a[i] * (double)a[i];
    }
    return sqrt(diff / (norm + 1e-30));
}

static const struct {
    int variant;
    enum ht_dtype dtype;
    enum ht_recompute recompute;
} cases[] = {
    { 0, HT_DTYPE_F32, HT_RECOMPUTE_NONE },       { 1, HT_DTYPE_F32, HT_RECOMPUTE_SELECTIVE },
    { 0, HT_DTYPE_F32, HT_RECOMPUTE_FULL },       { 1, HT_DTYPE_BF16, HT_RECOMPUTE_NONE },
    { 0, HT_DTYPE_BF16, HT_RECOMPUTE_SELECTIVE }, { 1, HT_DTYPE_BF16, HT_RECOMPUTE_FULL }
};
enum { N_CASES = sizeof cases / sizeof *cases };

/* In bf16 the CPU's own distance from its fp32 gradients is what 16 bits cost; the device may stand
 * twice as far from them. */
START_TEST(training_step_matches_cpu)
{
    const struct ht_model_config c = small_config(cases[_i].variant);
    const enum ht_dtype dtype = cases[_i].dtype;
    const enum ht_recompute recompute = cases[_i].recompute;
    struct side *exact = calloc(1, sizeof *exact), *cpu = calloc(1, sizeof *cpu),
                *gpu = calloc(1, sizeof *gpu); // models keep their backends' addresses
    struct ht_loss loss[3];

    gpu_start(&gpu->be, 0);
    gpu_ok(ht_backend_create_cpu(&cpu->be, 1, 1 << 20));
    gpu_ok(ht_backend_create_cpu(&exact->be, 1, 1 << 20));
    side_make(exact, &c, HT_DTYPE_F32);
    side_make(cpu, &c, dtype);
    side_make(gpu, &c, dtype);
    float *g0 = train(exact, recompute, &loss[0]), *g1 = train(cpu, recompute, &loss[1]),
          *g2 = train(gpu, recompute, &loss[2]);

    ck_assert_int_eq(loss[2].n_counted, T - 3);
    const double lost = fabs(loss[1].loss_sum - loss[0].loss_sum);
    ck_assert_double_le(fabs(loss[2].loss_sum - loss[0].loss_sum),
                        dtype == HT_DTYPE_F32 ? 1e-5 * loss[0].loss_sum
                                              : 2 * lost + 1e-2 * loss[0].loss_sum);
    for (int k = 0; k < gpu->m->list.n_tensors; k++) {
        const struct ht_tensor_info *t = &gpu->m->list.tensors[k];
        const double bound = dtype == HT_DTYPE_F32 ? 1e-4 : 2 * distance(g0, g1, t) + 4 * 0x1p-8;
        ck_assert_msg(distance(g0, g2, t) <= bound, "%s: gradient off by %.3g, at most %.3g",
                      t->name, distance(g0, g2, t), bound);
    }
    free(g0);
    free(g1);
    free(g2);
    side_free(exact);
    side_free(cpu);
    side_free(gpu);
    free(exact);
    free(cpu);
    free(gpu);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("model_cuda");
    TCase *t = tcase_create("model_cuda");

    tcase_add_loop_test(t, training_step_matches_cpu, 0, N_CASES);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
