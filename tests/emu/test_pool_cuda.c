/* tests/emu/test_pool_cuda.c: states of many sequences on the device against the CPU backend. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/model/packed.h"
#include "core/model/params.h"
#include "core/model/pool.h"
#include "core/model/stack.h"
#include "tests/emu/gpu_case.h"

enum { VOCAB = 97, SLOTS = 4, DRAFTS = 2, BLOCK = 64, POSITIONS = 128 };

/* Mamba, attention, Mamba: two groups of B and C, grouped queries, half RoPE. */
static struct ht_model_config small_config(bool tied)
{
    struct ht_model_config c = { .naming = HT_NAMING_BAMBA,
                                 .vocab_size = VOCAB,
                                 .d_model = 64,
                                 .n_layers = 3,
                                 .n_heads = 4,
                                 .n_kv_heads = 2,
                                 .d_head = 16,
                                 .rope_dims = 8,
                                 .rope_theta = 10000.0,
                                 .max_position = POSITIONS,
                                 .attention_scale = 0.25f,
                                 .d_inner = 128,
                                 .ssm_heads = 8,
                                 .ssm_d_head = 16,
                                 .d_state = 16,
                                 .n_groups = 2,
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
                                 .residual_init_div = 1.0,
                                 .tied_head = tied };
    c.layer_kind[1] = HT_LAYER_ATTENTION;
    return c;
}

struct side { // one backend's model and pool
    struct ht_backend be;
    struct ht_model *m;
    struct ht_pool *pool;
    struct ht_place at[SLOTS];
};

struct form { // packed: format and group; else dense fp32
    bool packed, tied;
    enum ht_qformat format;
    int group;
};
static const struct form forms[] = { { false, false, HT_Q_BF16, 32 },
                                     { true, false, HT_Q_BF16, 32 },
                                     { true, true, HT_Q_INT8, 32 },
                                     { true, false, HT_Q_INT4, 64 },
                                     { true, true, HT_Q_INT4Z, 32 },
                                     { true, false, HT_Q_FP8, 32 } };
enum { N_FORMS = sizeof forms / sizeof *forms };

static void pack_one(struct side *s, const struct form *f, const float *flat, int layer,
                     enum ht_tensor_role first, unsigned n_parts)
{
    struct ht_qmatrix *q = ht_packed_matrix(s->m->packed, layer, first);
    int64_t rows = 0, at = 0;

    for (unsigned i = 0; i < n_parts; i++)
        rows += ht_tensor_find(&s->m->list, layer, (enum ht_tensor_role)(first + i))->shape[0];
    const struct ht_tensor_info *t = ht_tensor_find(&s->m->list, layer, first);
    const int64_t k = t->n / t->shape[0];
    gpu_ok(ht_qmatrix_create_on(q, &s->be, f->format, f->group, rows, k));
    for (unsigned i = 0; i < n_parts; i++) {
        t = ht_tensor_find(&s->m->list, layer, (enum ht_tensor_role)(first + i));
        gpu_ok(ht_qmatrix_set_rows(q, &s->be, at, t->shape[0], flat + t->offset, HT_DTYPE_F32, k));
        at += t->shape[0];
    }
}

static void pack(struct side *s, const struct form *f, const float *flat)
{
    const struct ht_model_config *c = &s->m->cfg;

    for (int i = 0; i < (int)c->n_layers; i++) {
        if (c->layer_kind[i] == HT_LAYER_MAMBA) {
            pack_one(s, f, flat, i, HT_T_IN_PROJ, 1);
            pack_one(s, f, flat, i, HT_T_OUT_PROJ, 1);
        } else {
            pack_one(s, f, flat, i, HT_T_Q, 3);
            pack_one(s, f, flat, i, HT_T_O, 1);
        }
        pack_one(s, f, flat, i, HT_T_GATE, 2);
        pack_one(s, f, flat, i, HT_T_DOWN, 1);
    }
    pack_one(s, f, flat, -1, ht_head_role(s->m), 1);
    if (c->tied_head) return;
    const struct ht_tensor_info *t = ht_tensor_find(&s->m->list, -1, HT_T_EMBED);
    ht_bf16 *rows = malloc((size_t)t->n * sizeof *rows);
    void *embed;
    ht_convert(rows, HT_DTYPE_BF16, flat + t->offset, HT_DTYPE_F32, t->n);
    gpu_ok(ht_backend_alloc(&embed, &s->be, "embedding", (size_t)t->n * sizeof *rows));
    gpu_ok(ht_backend_upload(&s->be, embed, rows, (size_t)t->n * sizeof *rows));
    gpu_ok(ht_backend_synchronize(&s->be));
    s->m->packed->embed = embed;
    free(rows);
}

/* The backend is there. Places do not follow the order of slots. */
static void side_make(struct side *s, const struct form *f)
{
    const struct ht_model_config c = small_config(f->tied);
    const struct ht_pool_options o = { .n_slots = SLOTS + DRAFTS,
                                       .n_drafts = DRAFTS,
                                       .kv_tokens = SLOTS * POSITIONS,
                                       .block_tokens = BLOCK };

    if (f->packed)
        gpu_ok(ht_model_create_packed(&s->m, &s->be, &c, HT_DTYPE_BF16, POSITIONS));
    else
        gpu_ok(
            ht_model_create(&s->m, &s->be, &c, HT_DTYPE_F32, HT_DECAY_MATRICES, 0, 0, POSITIONS));
    const struct ht_tensor_list *l = &s->m->list;
    float *flat = calloc((size_t)l->n_total, sizeof *flat);
    ht_params_init(flat, &c, l, 7, 0, l->n_total);
    for (int64_t i = 0; i < ht_tensor_find(l, -1, HT_T_EMBED)->n; i++)
        flat[ht_tensor_find(l, -1, HT_T_EMBED)->offset + i] *= 20.0f;
    gpu_ok(ht_backend_upload(&s->be, s->m->vector, flat + l->n_matrix,
                             (size_t)(l->n_total - l->n_matrix) * sizeof *flat));
    if (f->packed)
        pack(s, f, flat);
    else
        gpu_ok(ht_backend_upload(&s->be, s->m->matrix, flat, (size_t)l->n_matrix * sizeof *flat));
    gpu_ok(ht_backend_synchronize(&s->be));
    free(flat);
    gpu_ok(ht_pool_create(&s->pool, s->m, &o));
    for (int i = 0; i < SLOTS; i++) {
        s->at[i] = (struct ht_place){ .slot = SLOTS - 1 - i,
                                      .kv_start = (i + 1) % SLOTS * POSITIONS,
                                      .kv_n = POSITIONS };
        gpu_ok(ht_pool_reset(s->pool, &s->at[i]));
    }
}

static void side_free(struct side *s)
{
    ht_pool_free(s->pool);
    ht_model_free(s->m);
    ht_backend_free(&s->be);
}

static void prompt_ids(int32_t *ids, int64_t n, uint64_t which)
{
    for (int64_t i = 0; i < n; i++) ids[i] = (int32_t)(ht_rng_u64(5, which, (uint64_t)i) % VOCAB);
}

static double distance(const float *a, const float *b, int64_t n)
{
    double diff = 0.0, size = 0.0;
    for (int64_t i = 0; i < n; i++) {
        diff += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        size += (double)a[i] * (double)a[i];
    }
    return sqrt(diff / size);
}

/* Prompts of several blocks, decoding together, a fork, an export and import, and a run of guesses
 * of which some are right. Every row of logits that this gives, in order, goes to out. */
static int64_t story(struct side *s, float *out)
{
    static const int64_t lengths[3] = { 70, 9, 1 };
    struct ht_place *at[SLOTS];
    int32_t ids[POSITIONS], next[SLOTS];
    int64_t rows = 0;

    for (int i = 0; i < 3; i++) {
        prompt_ids(ids, lengths[i], (uint64_t)i);
        for (int64_t done = 0, n; done < lengths[i]; done += n) {
            n = lengths[i] - done < BLOCK ? lengths[i] - done : BLOCK;
            gpu_ok(ht_pool_prompt(s->pool, &s->at[i], ids + done, n));
            gpu_ok(ht_pool_prompt_logits(s->pool, n - 1, 1, out + rows++ * VOCAB));
        }
    }
    gpu_ok(ht_pool_copy(s->pool, &s->at[3], &s->at[0]));
    for (int i = 0; i < SLOTS; i++) at[i] = &s->at[i];
    for (int step = 0; step < 3; step++) {
        for (int i = 0; i < SLOTS; i++) next[i] = (17 * step + 5 * i) % VOCAB;
        gpu_ok(ht_pool_decode(s->pool, at, next, SLOTS, out + rows * VOCAB));
        rows += SLOTS;
    }
    // the second sequence leaves and comes back to another extent
    const int64_t n_tokens = s->at[1].n_tokens;
    char *kept = malloc((size_t)ht_pool_export_bytes(s->pool, n_tokens));
    gpu_ok(ht_pool_export(s->pool, &s->at[1], kept));
    gpu_ok(ht_pool_reset(s->pool, &s->at[1]));
    gpu_ok(ht_pool_import(s->pool, &s->at[1], n_tokens, kept));
    free(kept);
    // guesses: of the first run two tokens are right, of the second all three
    struct ht_pool_run runs[3] = {
        { .at = &s->at[0], .ids = { 3, 4, 5, 6 }, .n = 4, .spare = SLOTS },
        { .at = &s->at[1], .ids = { 7, 8, 9 }, .n = 3, .spare = SLOTS + 1 },
        { .at = &s->at[2], .ids = { 10 }, .n = 1 }
    };
    gpu_ok(ht_pool_decode_runs(s->pool, runs, 3, out + rows * VOCAB));
    rows += 8;
    gpu_ok(ht_pool_accept(s->pool, &runs[0], 2));
    gpu_ok(ht_pool_accept(s->pool, &runs[1], 3));
    gpu_ok(ht_pool_accept(s->pool, &runs[2], 1));
    for (int i = 0; i < SLOTS; i++) next[i] = 20 + i;
    gpu_ok(ht_pool_decode(s->pool, at, next, SLOTS, out + rows * VOCAB));
    return rows + SLOTS;
}

enum { ROWS = 4 + 3 * SLOTS + 8 + SLOTS };

/* fp32: the same to rounding. Packed: both backends round activations to bf16 (and the CPU's
 * integer products round them to 8 bits), so they stand as far from each other as from the exact
 * values. */
START_TEST(logits_match_the_cpu)
{
    const struct form *f = &forms[_i];
    struct side *cpu = calloc(1, sizeof *cpu), *gpu = calloc(1, sizeof *gpu);
    float *a = malloc(ROWS * VOCAB * sizeof *a), *b = malloc(ROWS * VOCAB * sizeof *b);
    const double bound = !f->packed ? 2e-5 : f->format == HT_Q_BF16 ? 0.02 : 0.04;

    gpu_start(&gpu->be, 0);
    gpu_ok(ht_backend_create_cpu(&cpu->be, 1, 1 << 20));
    side_make(cpu, f);
    side_make(gpu, f);
    ck_assert_int_eq(story(cpu, a), ROWS);
    ck_assert_int_eq(story(gpu, b), ROWS);
    for (int i = 0; i < ROWS; i++)
        ck_assert_msg(distance(a + i * VOCAB, b + i * VOCAB, VOCAB) <= bound,
                      "row %d is off by %.3g; at most %.3g", i,
                      distance(a + i * VOCAB, b + i * VOCAB, VOCAB), bound);
    side_free(cpu);
    side_free(gpu);
    free(cpu);
    free(gpu);
    free(a);
    free(b);
}
END_TEST

/* Packed: what a sequence gets alone, it gets in a batch, after a copy, from a saved state and
 * through guesses, bit for bit. */
START_TEST(a_sequence_is_as_alone)
{
    const struct form *f = &forms[1 + _i];
    struct side *s = calloc(1, sizeof *s);
    float *rows = malloc(ROWS * VOCAB * sizeof *rows), *one = malloc(VOCAB * sizeof *one);
    int32_t ids[POSITIONS];

    gpu_start(&s->be, 0);
    side_make(s, f);
    story(s, rows);
    struct ht_place *alone = &s->at[3];
    const int32_t tail[] = { 5, 22, 39, 7, 8, 9, 21 }; // of the second sequence
    const int place[] = { 4 + 1, 4 + SLOTS + 1, 4 + 2 * SLOTS + 1 };
    prompt_ids(ids, 9, 1);
    gpu_ok(ht_pool_reset(s->pool, alone));
    gpu_ok(ht_pool_prompt(s->pool, alone, ids, 9));
    for (int i = 0; i < 7; i++) {
        gpu_ok(ht_pool_decode(s->pool, &alone, &tail[i], 1, one));
        const float *want = i < 3    ? rows + place[i] * VOCAB
                            : i == 6 ? rows + (ROWS - SLOTS + 1) * VOCAB
                                     : NULL;
        if (want) ck_assert_mem_eq(one, want, VOCAB * sizeof *one);
    }
    side_free(s);
    free(s);
    free(rows);
    free(one);
}
END_TEST

START_TEST(misuse_is_refused)
{
    struct side *s = calloc(1, sizeof *s);
    const int32_t bad = VOCAB;
    float logits[VOCAB];

    gpu_start(&s->be, 0);
    side_make(s, &forms[3]);
    struct ht_place *at = &s->at[0];
    ck_assert_int_eq(ht_pool_prompt(s->pool, at, &bad, 1), HT_ERR_ARG);
    ck_assert_int_eq(ht_pool_decode(s->pool, &at, &bad, 1, logits), HT_ERR_ARG);
    ck_assert_int_eq(s->at[0].n_tokens, 0);
    side_free(s);
    free(s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("pool_cuda");
    TCase *t = tcase_create("pool_cuda");

    tcase_add_loop_test(t, logits_match_the_cpu, 0, N_FORMS);
    tcase_add_loop_test(t, a_sequence_is_as_alone, 0, N_FORMS - 1);
    tcase_add_test(t, misuse_is_refused);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
