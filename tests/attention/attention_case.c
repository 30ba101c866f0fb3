/* tests/attention/attention_case.c */
#include "tests/attention/attention_case.h"

#include <check.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

static double *doubles(int64_t n)
{
    double *p = calloc((size_t)n, sizeof *p);
    ck_assert_ptr_nonnull(p);
    return p;
}

static void *elements(int64_t n, enum ht_dtype dtype)
{
    void *p = calloc((size_t)n, ht_dtype_bytes(dtype));
    ck_assert_ptr_nonnull(p);
    return p;
}

static void run_reference(struct attention_ref *r, int64_t n_o, int64_t n_qkv, int64_t n_lse,
                          bool backward)
{
    r->o = doubles(n_o);
    r->lse = doubles(n_lse);
    attention_ref_forward(r);
    if (!backward) return;
    r->grad_qkv = doubles(n_qkv);
    attention_ref_backward(r);
}

void attention_case_make(struct attention_case *c, const struct attention_shape *s,
                         enum ht_dtype dtype, enum ht_isa isa, int n_threads, uint64_t seed,
                         bool backward)
{
    *c = (struct attention_case){ .pad = 8 };
    while (c->n_seqs < CASE_MAX_SEQS && s->lengths[c->n_seqs] > 0) {
        c->starts[c->n_seqs + 1] = c->starts[c->n_seqs] + (int32_t)s->lengths[c->n_seqs];
        c->n_seqs++;
    }
    c->n_tokens = c->starts[c->n_seqs];
    c->width = (s->n_heads + 2 * s->n_kv_heads) * s->d_head;
    const int64_t n_o = c->n_tokens * s->n_heads * s->d_head, n_qkv = c->n_tokens * c->width;
    const int64_t stride = c->width + c->pad;
    double *qkv64 = doubles(n_qkv), *grad_o64 = doubles(n_o);
    void *qkv = elements(c->n_tokens * stride, dtype), *grad_o = elements(n_o, dtype);

    for (int64_t i = 0; i < n_qkv; i++) {
        const int64_t at = i / c->width * stride + i % c->width;
        ht_store_f32(qkv, at, dtype, ht_rng_normal(seed, 1, (uint64_t)i));
        qkv64[i] = (double)ht_load_f32(qkv, at, dtype);
    }
    for (int64_t i = 0; i < n_o; i++) {
        ht_store_f32(grad_o, i, dtype, ht_rng_normal(seed, 2, (uint64_t)i));
        grad_o64[i] = (double)ht_load_f32(grad_o, i, dtype);
    }
    c->o_bytes = (size_t)n_o * ht_dtype_bytes(dtype);
    c->qkv_bytes = (size_t)(c->n_tokens * stride) * ht_dtype_bytes(dtype);
    c->args = (struct ht_flash_args){
        .seqs = { c->n_seqs, c->starts },
        .n_tokens = c->n_tokens,
        .n_heads = s->n_heads,
        .n_kv_heads = s->n_kv_heads,
        .d_head = s->d_head,
        .dtype = dtype,
        .scale = (float)(1.0 / sqrt((double)s->d_head)),
        .qkv = qkv,
        .qkv_stride = stride,
        .o = elements(n_o, dtype),
        .lse = calloc((size_t)(c->n_tokens * s->n_heads), sizeof(float)),
        .grad_o = grad_o,
        .grad_qkv = elements(c->n_tokens * stride, dtype),
        .grad_qkv_stride = stride,
    };
    for (int64_t t = 0; t < c->n_tokens; t++) // guards
        for (int64_t i = 0; i < c->pad; i++)
            ht_store_f32(c->args.grad_qkv, t * stride + c->width + i, dtype, 42.0f);
    c->ref = (struct attention_ref){ c->n_seqs,     c->starts, s->n_heads,
                                     s->n_kv_heads, s->d_head, (double)c->args.scale,
                                     qkv64,         NULL,      NULL,
                                     grad_o64,      NULL,      false };
    c->plain16 = c->ref;
    c->plain16.round16 = true;
    run_reference(&c->ref, n_o, n_qkv, c->n_tokens * s->n_heads, backward);
    if (dtype == HT_DTYPE_BF16)
        run_reference(&c->plain16, n_o, n_qkv, c->n_tokens * s->n_heads, backward);
    ck_assert_int_eq(
        ht_backend_create_cpu(&c->be, n_threads, ht_flash_scratch_bytes(&c->args, n_threads)),
        HT_OK);
    c->be.isa = isa;
}

void attention_case_free(struct attention_case *c)
{
    free((void *)c->args.qkv);
    free(c->args.o);
    free(c->args.lse);
    free((void *)c->args.grad_o);
    free(c->args.grad_qkv);
    free((void *)c->ref.qkv);
    free((void *)c->ref.grad_o);
    free(c->ref.o);
    free(c->ref.lse);
    free(c->ref.grad_qkv);
    free(c->plain16.o);
    free(c->plain16.lse);
    free(c->plain16.grad_qkv);
    ht_backend_free(&c->be);
}

void attention_case_forward(struct attention_case *c)
{
    ck_assert_msg(ht_flash_forward(&c->be, &c->args) == HT_OK, "%s", ht_error_message());
    ck_assert_uint_eq(c->be.scratch.used_bytes, 0);
}

void attention_case_backward(struct attention_case *c)
{
    ck_assert_msg(ht_flash_backward(&c->be, &c->args) == HT_OK, "%s", ht_error_message());
    ck_assert_uint_eq(c->be.scratch.used_bytes, 0);
}

static double larger_error(double so_far, double got, double want)
{
    const double e = fabs(got - want);
    return e <= so_far ? so_far : isnan(e) ? INFINITY : e;
}

double attention_case_o_error(const struct attention_case *c, const void *got, const double *want)
{
    const int64_t n = c->n_tokens * c->args.n_heads * c->args.d_head;
    double e = 0.0;
    for (int64_t i = 0; i < n; i++)
        e = larger_error(e, (double)ht_load_f32(got, i, c->args.dtype), want[i]);
    return e;
}

double attention_case_qkv_error(const struct attention_case *c, const void *got, const double *want)
{
    double e = 0.0;
    for (int64_t i = 0; i < c->n_tokens * c->width; i++) {
        const int64_t at = i / c->width * (c->width + c->pad) + i % c->width;
        e = larger_error(e, (double)ht_load_f32(got, at, c->args.dtype), want[i]);
    }
    return e;
}

double attention_case_max(const double *x, int64_t n)
{
    double m = 0.0;
    for (int64_t i = 0; i < n; i++) m = fmax(m, fabs(x[i]));
    return m;
}

double attention_case_tolerance(const struct attention_case *c, const double *want,
                                const double *plain16, int64_t n, double fp32_steps)
{
    double lost = 0.0;
    if (c->args.dtype == HT_DTYPE_F32)
        return fp32_steps * (double)FLT_EPSILON * attention_case_max(want, n);
    for (int64_t i = 0; i < n; i++) lost = fmax(lost, fabs(plain16[i] - want[i]));
    return 2.0 * lost;
}
