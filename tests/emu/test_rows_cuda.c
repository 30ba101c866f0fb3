/* tests/emu/test_rows_cuda.c: RMSNorm, SwiGLU and embedding on the CUDA backend against fp64. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/embedding.h"
#include "core/ops/mlp.h"
#include "core/ops/rmsnorm.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ref/ops_ref.h"

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct shape {
    int64_t n_rows, d_model;
};
// one element; unaligned rows; several groups per thread; more rows than strips; over 4096 columns
static const struct shape shapes[] = { { 1, 1 },   { 3, 7 },    { 5, 33 },
                                       { 2, 64 },  { 300, 12 }, { 3, 1100 },
                                       { 2, 301 }, { 2, 4100 }, { 2, 4097 } };
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* Roundings of the largest value: products, a sum of terms, a root (as in test_rmsnorm.c). */
static double slack(const double *ref, int64_t n, double roundings)
{
    return roundings * FLT_EPSILON * max_abs(ref, n);
}

/* ---- RMSNorm ---- */

struct norm {
    struct tensor w, r_in, branch, r_out, y, rstd, grad_y, grad_r_out, grad_r_in, grad_branch,
        grad_w;
    struct ht_rmsnorm_args host, device;
    struct ops_ref_rmsnorm ref;
};

static struct norm norm_make(struct ht_backend *be, struct shape s, enum ht_dtype dtype)
{
    const int64_t n = s.n_rows * s.d_model;
    struct norm c = {
        .w = tensor_normal(s.d_model, HT_DTYPE_F32, 1.0, 1),
        .r_in = tensor_normal(n, HT_DTYPE_F32, 2.0, 2),
        .branch = tensor_normal(n, dtype, 1.5, 3),
        .r_out = tensor_make(n, HT_DTYPE_F32),
        .y = tensor_make(n, dtype),
        .rstd = tensor_make(s.n_rows, HT_DTYPE_F32),
        .grad_y = tensor_normal(n, dtype, 1.0, 4),
        .grad_r_out = tensor_normal(n, HT_DTYPE_F32, 0.5, 5),
        .grad_r_in = tensor_make(n, HT_DTYPE_F32),
        .grad_branch = tensor_make(n, dtype),
        .grad_w = tensor_normal(s.d_model, HT_DTYPE_F32, 1.0, 6),
    };
    c.device = (struct ht_rmsnorm_args){ .n_rows = s.n_rows,
                                         .d_model = s.d_model,
                                         .dtype = dtype,
                                         .eps = 1e-5f,
                                         .branch_scale = 0.22f,
                                         .w = to_gpu(be, &c.w),
                                         .r_in = to_gpu(be, &c.r_in),
                                         .branch = to_gpu(be, &c.branch),
                                         .r_out = to_gpu(be, &c.r_out),
                                         .y = to_gpu(be, &c.y),
                                         .rstd = to_gpu(be, &c.rstd),
                                         .grad_y = to_gpu(be, &c.grad_y),
                                         .grad_r_out = to_gpu(be, &c.grad_r_out),
                                         .grad_r_in = to_gpu(be, &c.grad_r_in),
                                         .grad_branch = to_gpu(be, &c.grad_branch),
                                         .grad_w = to_gpu(be, &c.grad_w) };
    c.ref = (struct ops_ref_rmsnorm){ .n_rows = s.n_rows,
                                      .d_model = s.d_model,
                                      .eps = (double)c.device.eps,
                                      .branch_scale = (double)c.device.branch_scale,
                                      .w = c.w.d,
                                      .r_in = c.r_in.d,
                                      .branch = c.branch.d,
                                      .r_out = c.r_out.d,
                                      .y = c.y.d,
                                      .rstd = c.rstd.d,
                                      .grad_y = c.grad_y.d,
                                      .grad_r_out = c.grad_r_out.d,
                                      .grad_r_in = c.grad_r_in.d,
                                      .grad_branch = c.grad_branch.d,
                                      .grad_w = c.grad_w.d };
    return c;
}

static void norm_free(struct norm *c)
{
    struct tensor *all[] = { &c->w,         &c->r_in,        &c->branch, &c->r_out,
                             &c->y,         &c->rstd,        &c->grad_y, &c->grad_r_out,
                             &c->grad_r_in, &c->grad_branch, &c->grad_w };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
}

START_TEST(rmsnorm_forward_matches_reference)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < N_SHAPES; s++)
        for (int mode = 0; mode < 3; mode++) { // branch; no branch; no branch, no r_out, no rstd
            struct ht_backend be;
            gpu_start(&be, 0);
            struct norm c = norm_make(&be, shapes[s], dtype);
            void *r_out = c.device.r_out, *rstd = c.device.rstd;
            if (mode > 0) c.device.branch = NULL, c.ref.branch = NULL;
            if (mode == 2) c.device.r_out = NULL, c.device.rstd = NULL;
            ops_ref_rmsnorm_forward(&c.ref);
            gpu_ok(ht_rmsnorm_forward(&be, &c.device));
            from_gpu(&be, &c.y, c.device.y);
            check_close(&c.y, c.y.d, slack(c.y.d, c.y.n, 16), "y");
            if (mode < 2) {
                from_gpu(&be, &c.r_out, r_out);
                from_gpu(&be, &c.rstd, rstd);
                check_close(&c.r_out, c.r_out.d, slack(c.r_out.d, c.r_out.n, 16), "r_out");
                check_close(&c.rstd, c.rstd.d, slack(c.rstd.d, c.rstd.n, 16), "rstd");
            }
            norm_free(&c);
            gpu_end(&be);
        }
}
END_TEST

START_TEST(rmsnorm_updates_in_place_and_rounds)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < N_SHAPES; s++) {
        struct ht_backend be;
        gpu_start(&be, 0);
        struct norm c = norm_make(&be, shapes[s], dtype);
        float *plain = malloc((size_t)c.r_in.n * sizeof *plain);
        gpu_ok(ht_rmsnorm_forward(&be, &c.device));
        gpu_get(&be, plain, c.device.r_out, (size_t)c.r_in.n * sizeof *plain);
        c.device.r_out = (float *)(uintptr_t)c.device.r_in;
        c.device.round_residual = true;
        gpu_ok(ht_rmsnorm_forward(&be, &c.device));
        from_gpu(&be, &c.r_in, c.device.r_in);
        for (int64_t i = 0; i < c.r_in.n; i++)
            ck_assert_float_eq(((float *)c.r_in.p)[i], ht_bf16_to_f32(ht_f32_to_bf16(plain[i])));
        free(plain);
        norm_free(&c);
        gpu_end(&be);
    }
}
END_TEST

START_TEST(rmsnorm_backward_matches_reference)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < N_SHAPES; s++)
        for (int mode = 0; mode < 3; mode++) { // all; in place; no incoming gradient, no branch
            struct ht_backend be;
            gpu_start(&be, ht_rmsnorm_scratch_bytes(shapes[s].n_rows, shapes[s].d_model));
            struct norm c = norm_make(&be, shapes[s], dtype);
            if (mode == 2) c.device.grad_r_out = NULL, c.device.grad_branch = NULL;
            if (mode == 2) c.ref.grad_r_out = NULL;
            ops_ref_rmsnorm_forward(&c.ref);
            for (int64_t i = 0; i < c.r_out.n; i++) // the backward reads what the forward stored
                ((float *)c.r_out.p)[i] = (float)c.r_out.d[i];
            for (int64_t t = 0; t < c.rstd.n; t++) ((float *)c.rstd.p)[t] = (float)c.rstd.d[t];
            c.device.r_out = to_gpu(&be, &c.r_out);
            c.device.rstd = to_gpu(&be, &c.rstd);
            if (mode == 1) c.device.grad_r_in = (float *)(uintptr_t)c.device.grad_r_out;
            const double gw_scale = max_abs(c.grad_w.d, c.grad_w.n);
            ops_ref_rmsnorm_backward(&c.ref);
            gpu_ok(ht_rmsnorm_backward(&be, &c.device));
            from_gpu(&be, &c.grad_r_in, c.device.grad_r_in);
            from_gpu(&be, &c.grad_w, c.device.grad_w);
            // e - c xh cancels: the error belongs to its terms
            const double terms = max_abs(c.rstd.d, c.rstd.n) * max_abs(c.w.d, c.w.n) *
                                 max_abs(c.grad_y.d, c.grad_y.n) * 32 * FLT_EPSILON;
            check_close(&c.grad_r_in, c.grad_r_in.d, terms, "grad_r_in");
            check_close(&c.grad_w, c.grad_w.d,
                        slack(c.grad_w.d, c.grad_w.n, 32) + 8 * FLT_EPSILON * gw_scale, "grad_w");
            if (c.device.grad_branch) {
                from_gpu(&be, &c.grad_branch, c.device.grad_branch);
                check_close(&c.grad_branch, c.grad_branch.d, terms, "grad_branch");
            }
            norm_free(&c);
            gpu_end(&be);
        }
}
END_TEST

START_TEST(rmsnorm_refuses_rows_that_do_not_fit)
{
    struct ht_backend be;
    gpu_start(&be, 0);
    float *p = gpu_new(&be, 16385 * sizeof *p), *q = gpu_new(&be, 16385 * sizeof *p);
    const struct ht_rmsnorm_args a = {
        .n_rows = 1, .d_model = 16385, .dtype = HT_DTYPE_F32, .w = p, .r_in = p, .y = q
    };
    ck_assert_int_eq(ht_rmsnorm_forward(&be, &a), HT_ERR_UNSUPPORTED);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "16385"));
    gpu_end(&be);
}
END_TEST

/* ---- SwiGLU ---- */

START_TEST(swiglu_matches_reference)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < N_SHAPES; s++) {
        const int64_t n = shapes[s].n_rows * shapes[s].d_model;
        struct ht_backend be;
        gpu_start(&be, 0);
        struct tensor gate_up = tensor_normal(2 * n, dtype, 2.0, 1), y = tensor_make(n, dtype),
                      grad_y = tensor_normal(n, dtype, 1.0, 2), again = tensor_make(n, dtype),
                      grad = tensor_make(2 * n, dtype);
        struct ht_swiglu_args a = { .n_rows = shapes[s].n_rows,
                                    .d_ff = shapes[s].d_model,
                                    .dtype = dtype,
                                    .gate_up = to_gpu(&be, &gate_up),
                                    .y = to_gpu(&be, &y),
                                    .grad_y = to_gpu(&be, &grad_y) };
        ops_ref_swiglu_forward(a.n_rows, a.d_ff, gate_up.d, y.d);
        ops_ref_swiglu_backward(a.n_rows, a.d_ff, gate_up.d, grad_y.d, grad.d);
        gpu_ok(ht_swiglu_forward(&be, &a));
        from_gpu(&be, &y, a.y);
        check_close(&y, y.d, slack(y.d, n, 8), "y");
        a.y = to_gpu(&be, &again);                     // written again, with the same bits
        a.grad_gate_up = (void *)(uintptr_t)a.gate_up; // in place
        gpu_ok(ht_swiglu_backward(&be, &a));
        from_gpu(&be, &again, a.y);
        from_gpu(&be, &grad, a.grad_gate_up);
        check_same_bits(&y, &again, "y of the backward");
        check_close(&grad, grad.d, slack(grad.d, 2 * n, 16), "grad_gate_up");
        tensor_free(&gate_up);
        tensor_free(&y);
        tensor_free(&grad_y);
        tensor_free(&again);
        tensor_free(&grad);
        gpu_end(&be);
    }
}
END_TEST

/* ---- embedding ---- */

// tokens, d_model, vocabulary: many repeats; more tokens than a block; several slabs of columns
static const int64_t tables[][3] = { { 1, 1, 1 },    { 9, 7, 3 },     { 600, 5, 40 },
                                     { 70, 12, 11 }, { 20, 2052, 6 }, { 5, 300, 100 } };
enum { N_TABLES = sizeof tables / sizeof *tables };

START_TEST(embedding_matches_cpu)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int k = 0; k < N_TABLES; k++) {
        const int64_t n = tables[k][0], d = tables[k][1], vocab = tables[k][2];
        struct ht_backend be, cpu = backend_make(HT_ISA_PLAIN, 1, 0);
        int32_t *ids = malloc((size_t)n * sizeof *ids);
        struct tensor weight = tensor_normal(vocab * d, dtype, 1.0, 1),
                      out = tensor_make(n * d, HT_DTYPE_F32),
                      expect = tensor_make(n * d, HT_DTYPE_F32),
                      grad = tensor_normal(n * d, HT_DTYPE_F32, 1.0, 2),
                      gw = tensor_normal(vocab * d, HT_DTYPE_F32, 1.0, 3),
                      gw_cpu = tensor_copy(&gw);
        for (int64_t t = 0; t < n; t++)
            ids[t] = (int32_t)(ht_rng_u64(7, 0, (uint64_t)t) % (uint64_t)vocab);
        struct ht_embedding_args host = { .n_tokens = n,
                                          .d_model = d,
                                          .vocab_size = vocab,
                                          .dtype = dtype,
                                          .multiplier = 1.5f,
                                          .ids = ids,
                                          .weight = weight.p,
                                          .residual = expect.p,
                                          .grad_residual = grad.p,
                                          .grad_weight = gw_cpu.p };
        gpu_start(&be, 0);
        struct ht_embedding_args a = host;
        a.ids = gpu_put(&be, ids, (size_t)n * sizeof *ids);
        a.weight = to_gpu(&be, &weight);
        a.residual = to_gpu(&be, &out);
        a.grad_residual = to_gpu(&be, &grad);
        a.grad_weight = to_gpu(&be, &gw);
        gpu_ok(ht_embedding_forward(&cpu, &host));
        gpu_ok(ht_embedding_backward(&cpu, &host));
        gpu_ok(ht_embedding_forward(&be, &a));
        gpu_ok(ht_embedding_backward(&be, &a));
        from_gpu(&be, &out, a.residual);
        from_gpu(&be, &gw, a.grad_weight);
        check_same_bits(&out, &expect, "residual");
        // the same order of additions; whether they are fused with the product is the compiler's
        for (int64_t i = 0; i < gw.n; i++)
            ck_assert_double_le(fabs(tensor_at(&gw, i) - tensor_at(&gw_cpu, i)),
                                FLT_EPSILON * (double)n * 4);
        tensor_free(&weight);
        tensor_free(&out);
        tensor_free(&expect);
        tensor_free(&grad);
        tensor_free(&gw);
        tensor_free(&gw_cpu);
        free(ids);
        gpu_end(&be);
        ht_backend_free(&cpu);
    }
}
END_TEST

START_TEST(embedding_shows_bad_ids)
{
    struct ht_backend be;
    const int32_t ids[3] = { 1, -1, 2 };
    float out[6], gw[4], grad[6] = { 1, 1, 1, 1, 1, 1 };
    const float weight[4] = { 1, 2, 3, 4 }, zeros[4] = { 0 };

    gpu_start(&be, 0);
    struct ht_embedding_args a = {
        .n_tokens = 3, .d_model = 2, .vocab_size = 2, .dtype = HT_DTYPE_F32, .multiplier = 1.0f
    };
    a.ids = gpu_put(&be, ids, sizeof ids);
    a.weight = gpu_put(&be, weight, sizeof weight);
    a.residual = gpu_new(&be, sizeof out);
    a.grad_residual = gpu_put(&be, grad, sizeof grad);
    a.grad_weight = gpu_put(&be, zeros, sizeof zeros);
    gpu_ok(ht_embedding_forward(&be, &a));
    gpu_ok(ht_embedding_backward(&be, &a));
    gpu_get(&be, out, a.residual, sizeof out);
    gpu_get(&be, gw, a.grad_weight, sizeof gw);
    ck_assert_float_eq(out[0], 3.0f);
    for (int i = 2; i < 6; i++) ck_assert_float_nan(out[i]);
    for (int i = 0; i < 4; i++) ck_assert_float_eq(gw[i], i < 2 ? 0.0f : 1.0f);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rows_cuda");
    TCase *t = tcase_create("rows_cuda");

    tcase_add_loop_test(t, rmsnorm_forward_matches_reference, 0, 2);
    tcase_add_loop_test(t, rmsnorm_updates_in_place_and_rounds, 0, 2);
    tcase_add_loop_test(t, rmsnorm_backward_matches_reference, 0, 2);
    tcase_add_test(t, rmsnorm_refuses_rows_that_do_not_fit);
    tcase_add_loop_test(t, swiglu_matches_reference, 0, 2);
    tcase_add_loop_test(t, embedding_matches_cpu, 0, 2);
    tcase_add_test(t, embedding_shows_bad_ids);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
