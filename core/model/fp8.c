/* core/model/fp8.c: see fp8.h. */
#include "core/model/fp8.h"

#include <stdio.h>
#include <stdlib.h>

#include "core/model/layers.h"

struct weight {
    uint8_t *codes, *codes_t; // (n_out, n_in), (n_in, n_out)
    float *scale;
    int64_t version; // of the weights that they are of; 0: of none
};

struct ht_model_fp8 {
    struct ht_arena arena;
    int64_t version, max_tokens;
    bool every_weight;
    struct weight *weights; // (n_layers, HT_T_ROLE_COUNT); all the same memory unless every_weight
    uint8_t *x;             // (T, n_in) or its transpose
    uint8_t *grad_y, *grad_y_t; // (T, n_out), (n_out, T)
    float *scale_x, *scale_grad_y;
    const struct weight *grad_of; // whose grad_y is there, between its two products; or NULL
};

static struct weight *weight_of(const struct ht_model *m, int layer, enum ht_tensor_role role)
{
    return &m->fp8->weights[(int64_t)layer * HT_T_ROLE_COUNT + role];
}

static void layout(struct ht_model *m, int64_t n_tokens, const struct ht_fp8_bytes *sizes)
{
    struct ht_model_fp8 *f = m->fp8;
    const bool every = f->every_weight;
    struct weight one = { 0 };
    float *scales = ht_arena_get(&f->arena, (size_t)sizes->scales);

    f->scale_x = scales++;
    f->scale_grad_y = scales++;
    f->x = ht_arena_get(&f->arena, (size_t)(n_tokens * sizes->widest_in));
    f->grad_y = ht_arena_get(&f->arena, (size_t)(n_tokens * sizes->widest_out));
    f->grad_y_t = ht_arena_get(&f->arena, (size_t)(n_tokens * sizes->widest_out));
    if (!every) {
        one.codes = ht_arena_get(&f->arena, (size_t)sizes->widest);
        one.codes_t = ht_arena_get(&f->arena, (size_t)sizes->widest);
    }
    for (int i = 0; i < (int)m->cfg.n_layers; i++) {
        struct ht_linear_shape l[HT_MAX_LINEARS];
        const int n = ht_layer_linears(l, &m->cfg, i);
        for (int j = 0; j < n; j++) {
            struct weight *w = weight_of(m, i, l[j].role);
            const size_t bytes = (size_t)(l[j].n_in * l[j].n_out);
            if (!ht_linear_fits_fp8(l[j].n_in, l[j].n_out, n_tokens)) continue;
            *w = one;
            w->scale = scales++;
            if (!every) continue;
            w->codes = ht_arena_get(&f->arena, bytes);
            w->codes_t = ht_arena_get(&f->arena, bytes);
        }
    }
}

static enum ht_status check(const struct ht_model *m)
{
    char why[512];

    if (m->dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "train.linear_dtype is \"fp8\" and the model is %s; set train.precision to "
                       "\"bf16\"",
                       ht_dtype_name(m->dtype));
    const enum ht_status st = ht_fp8_check_backend(m->be);
    if (st == HT_OK) return HT_OK;
    snprintf(why, sizeof why, "%s", ht_error_message());
    return HT_FAIL(st, "train.linear_dtype is \"fp8\": %s; set it to \"model\"", why);
}

enum ht_status ht_model_use_fp8(struct ht_model *m, int64_t n_tokens, bool every_weight)
{
    const struct ht_fp8_bytes sizes = ht_fp8_sizes(&m->cfg, n_tokens, every_weight);
    enum ht_status st = HT_OK;

    HT_TRY(check(m));
    ht_model_fp8_free(m);
    struct ht_model_fp8 *f = calloc(1, sizeof *f);
    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for the fp8 copies' list");
    m->fp8 = f;
    f->version = 1;
    f->max_tokens = n_tokens;
    f->every_weight = every_weight;
    f->weights = calloc((size_t)m->cfg.n_layers * HT_T_ROLE_COUNT, sizeof *f->weights);
    if (!f->weights) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for the fp8 copies' list");
        goto done;
    }
    HT_TRY_GOTO(st, done,
                ht_backend_arena_create(&f->arena, m->be, "fp8 copies", (size_t)sizes.total));
    layout(m, n_tokens, &sizes);
done:
    if (st != HT_OK) ht_model_fp8_free(m);
    return st;
}

void ht_model_fp8_free(struct ht_model *m)
{
    if (!m->fp8) return;
    ht_backend_arena_free(&m->fp8->arena, m->be);
    free(m->fp8->weights);
    free(m->fp8);
    m->fp8 = NULL;
}

void ht_model_weights_changed(struct ht_model *m)
{
    if (m->fp8) m->fp8->version++;
}

struct ht_fp8_cover ht_model_fp8_cover(const struct ht_model_config *c, int64_t n_tokens)
{
    struct ht_fp8_cover out = { 0 };

    for (int i = 0; i < (int)c->n_layers; i++) {
        struct ht_linear_shape l[HT_MAX_LINEARS];
        const int n = ht_layer_linears(l, c, i);
        for (int j = 0; j < n; j++) {
            const bool fits = ht_linear_fits_fp8(l[j].n_in, l[j].n_out, n_tokens);
            if (!fits && out.n_fp8 == out.n_all) out.n_in = l[j].n_in, out.n_out = l[j].n_out;
            out.n_fp8 += fits;
            out.n_all++;
        }
    }
    return out;
}

bool ht_fp8_applies(const struct ht_model *m, const struct ht_linear *l)
{
    return m->fp8 && l->n_tokens <= m->fp8->max_tokens &&
           ht_linear_fits_fp8(l->n_in, l->n_out, l->n_tokens);
}

/* ---- copies ---- */

static enum ht_status quantise(struct ht_model *m, enum ht_fp8 format, int64_t rows, int64_t cols,
                               const void *x, uint8_t *codes, uint8_t *codes_t, float *scale)
{
    return ht_fp8_quantise(m->be, &(struct ht_fp8_quantise_args){ .rows = rows,
                                                                  .cols = cols,
                                                                  .format = format,
                                                                  .x = x,
                                                                  .codes = codes,
                                                                  .codes_t = codes_t,
                                                                  .scale = scale });
}

/* The weight's codes: as stored, or (backward) transposed. */
static enum ht_status need_weight(struct weight **out, struct ht_model *m, int layer,
                                  enum ht_tensor_role role, const struct ht_linear *l,
                                  bool backward)
{
    const struct ht_model_fp8 *f = m->fp8;
    struct weight *w = weight_of(m, layer, role);
    const bool every = f->every_weight;

    *out = w;
    if (every && w->version == f->version) return HT_OK;
    HT_TRY(quantise(m, HT_FP8_E4M3, l->n_out, l->n_in, ht_model_matrix(m, layer, role),
                    every || !backward ? w->codes : NULL, every || backward ? w->codes_t : NULL,
                    w->scale));
    w->version = f->version;
    return HT_OK;
}

/* grad_y in both orders, for the first of its two products. */
static enum ht_status need_grad_y(struct ht_model *m, const struct weight *w,
                                  const struct ht_linear *l, const void *grad_y)
{
    struct ht_model_fp8 *f = m->fp8;

    if (f->grad_of == w) {
        f->grad_of = NULL;
        return HT_OK;
    }
    f->grad_of = w;
    return quantise(m, HT_FP8_E5M2, l->n_tokens, l->n_out, grad_y, f->grad_y, f->grad_y_t,
                    f->scale_grad_y);
}

/* ---- products ---- */

enum ht_status ht_fp8_forward(struct ht_model *m, int layer, enum ht_tensor_role role,
                              const struct ht_linear *l, void *y, const void *x)
{
    struct ht_model_fp8 *f = m->fp8;
    struct weight *w;

    f->grad_of = NULL; // a pass that failed between two products is forgotten
    HT_TRY(need_weight(&w, m, layer, role, l, false));
    HT_TRY(quantise(m, HT_FP8_E4M3, l->n_tokens, l->n_in, x, f->x, NULL, f->scale_x));
    return ht_gemm_fp8(m->be, &(struct ht_gemm_fp8_args){ .m = l->n_tokens,
                                                          .n = l->n_out,
                                                          .k = l->n_in,
                                                          .a = f->x,
                                                          .b = w->codes,
                                                          .scale_a = f->scale_x,
                                                          .scale_b = w->scale,
                                                          .c_dtype = l->dtype,
                                                          .c = y,
                                                          .fast = true });
}

enum ht_status ht_model_linear_backward_x(struct ht_model *m, int layer, enum ht_tensor_role role,
                                          const struct ht_linear *l, void *grad_x,
                                          const void *grad_y)
{
    const struct ht_model_fp8 *f = m->fp8;
    struct weight *w;

    if (!ht_fp8_applies(m, l))
        return ht_linear_backward_x(m->be, l, grad_x, grad_y, ht_model_matrix(m, layer, role));
    HT_TRY(need_weight(&w, m, layer, role, l, true));
    HT_TRY(need_grad_y(m, w, l, grad_y));
    return ht_gemm_fp8(m->be, &(struct ht_gemm_fp8_args){ .m = l->n_tokens,
                                                          .n = l->n_in,
                                                          .k = l->n_out,
                                                          .a_format = HT_FP8_E5M2,
                                                          .a = f->grad_y,
                                                          .b = w->codes_t,
                                                          .scale_a = f->scale_grad_y,
                                                          .scale_b = w->scale,
                                                          .c_dtype = l->dtype,
                                                          .c = grad_x });
}

enum ht_status ht_model_linear_backward_w(struct ht_model *m, int layer, enum ht_tensor_role role,
                                          const struct ht_linear *l, float *grads,
                                          const void *grad_y, const void *x)
{
    float *grad_w = ht_grad_of(m, grads, layer, role);
    const struct ht_model_fp8 *f = m->fp8;

    if (!ht_fp8_applies(m, l)) return ht_linear_backward_w(m->be, l, grad_w, grad_y, x);
    HT_TRY(need_grad_y(m, weight_of(m, layer, role), l, grad_y));
    HT_TRY(quantise(m, HT_FP8_E4M3, l->n_tokens, l->n_in, x, NULL, f->x, f->scale_x));
    return ht_gemm_fp8(m->be, &(struct ht_gemm_fp8_args){ .m = l->n_out,
                                                          .n = l->n_in,
                                                          .k = l->n_tokens,
                                                          .a_format = HT_FP8_E5M2,
                                                          .a = f->grad_y_t,
                                                          .b = f->x,
                                                          .scale_a = f->scale_grad_y,
                                                          .scale_b = f->scale_x,
                                                          .c_dtype = HT_DTYPE_F32,
                                                          .c = grad_w,
                                                          .beta = 1.0f });
}
