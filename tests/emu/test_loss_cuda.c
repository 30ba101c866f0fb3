/* tests/emu/test_loss_cuda.c: products, softmax and the output head on the CUDA backend. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/ops/gemm.h"
#include "core/ops/loss.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ref/ops_ref.h"

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

/* ---- gemm ---- */

static const int64_t products[][3] = {
    { 1, 1, 1 }, { 5, 7, 3 }, { 33, 16, 40 }, { 8, 70, 24 }, { 3, 4, 0 }
};
enum { N_PRODUCTS = sizeof products / sizeof *products };

START_TEST(gemm_matches_reference)
{
    const enum ht_dtype dtype = dtypes[_i / 4 % 2], c_dtype = _i < 8 ? HT_DTYPE_F32 : dtype;
    const bool ta = _i & 1, tb = _i & 2;

    for (int p = 0; p < N_PRODUCTS; p++)
        for (int beta = 0; beta < 2; beta++) {
            const int64_t m = products[p][0], n = products[p][1], k = products[p][2];
            // strides beyond the row, multiples of 8 for the real library's alignment
            const int64_t lda = (ta ? m : k) + 8, ldb = (tb ? k : n) + 8, ldc = n + 8;
            struct ht_backend be;
            gpu_start(&be, 0);
            struct tensor a = tensor_normal((ta ? k : m) * lda, dtype, 1.0, 1),
                          b = tensor_normal((tb ? n : k) * ldb, dtype, 1.0, 2),
                          c = tensor_normal(m * ldc, c_dtype, 1.0, 3);
            const struct ops_ref_gemm ref = { m,  n,   k,    lda, ldb, ldc, ta,
                                              tb, 0.5, beta, a.d, b.d, c.d };
            const struct ht_gemm_args g = { .m = m,
                                            .n = n,
                                            .k = k,
                                            .trans_a = ta,
                                            .trans_b = tb,
                                            .ab_dtype = dtype,
                                            .c_dtype = c_dtype,
                                            .a = to_gpu(&be, &a),
                                            .lda = lda,
                                            .b = to_gpu(&be, &b),
                                            .ldb = ldb,
                                            .c = to_gpu(&be, &c),
                                            .ldc = ldc,
                                            .alpha = 0.5f,
                                            .beta = (float)beta };
            ops_ref_gemm(&ref);
            gpu_ok(ht_gemm(&be, &g));
            from_gpu(&be, &c, g.c);
            check_close(&c, c.d, 8 * FLT_EPSILON * sqrt((double)k + 1) * (max_abs(c.d, c.n) + 1),
                        "C");
            tensor_free(&a);
            tensor_free(&b);
            tensor_free(&c);
            gpu_end(&be);
        }
}
END_TEST

/* ---- the output head ---- */

struct shape {
    int64_t n_tokens, d_model, vocab_size;
    int64_t rows; // that scratch holds: chunks of so many tokens
};
static const struct shape shapes[] = {
    { 1, 1, 1, 1 },      { 3, 5, 7, 3 },      { 40, 16, 33, 16 },
    { 70, 24, 301, 30 }, { 20, 8, 2100, 20 }, { 37, 8, 4099, 17 }
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

struct head {
    struct tensor u, weight, grad_u, grad_weight, logprobs;
    int32_t *labels;
    struct ht_linear_ce_args host, device;
    struct ops_ref_linear_ce ref;
};

static size_t scratch_for(struct shape s)
{
    return 1024 + (size_t)s.rows * ((size_t)s.vocab_size * 4 + 16) + 256;
}

static struct head head_make(struct ht_backend *be, struct shape s, enum ht_dtype dtype)
{
    struct head c = {
        .u = tensor_normal(s.n_tokens * s.d_model, dtype, 1.0, 1),
        .weight = tensor_normal(s.vocab_size * s.d_model, dtype, 0.7, 2),
        .grad_u = tensor_make(s.n_tokens * s.d_model, dtype),
        .grad_weight = tensor_normal(s.vocab_size * s.d_model, HT_DTYPE_F32, 1e-3, 3),
        .logprobs = tensor_make(s.n_tokens, HT_DTYPE_F32),
        .labels = malloc((size_t)s.n_tokens * sizeof(int32_t)),
    };
    for (int64_t t = 0; t < s.n_tokens; t++) // every fourth token is not counted
        c.labels[t] =
            t % 4 == 3 ? -100 : (int32_t)(ht_rng_u64(4, 0, (uint64_t)t) % (uint64_t)s.vocab_size);
    c.host = (struct ht_linear_ce_args){ .n_tokens = s.n_tokens,
                                         .d_model = s.d_model,
                                         .vocab_size = s.vocab_size,
                                         .dtype = dtype,
                                         .logit_scale = 0.4f,
                                         .loss_scale = 0.01f,
                                         .z_coef = 0.03f,
                                         .u = c.u.p,
                                         .weight = c.weight.p,
                                         .labels = c.labels,
                                         .grad_u = c.grad_u.p,
                                         .grad_weight = c.grad_weight.p,
                                         .logprobs = c.logprobs.p };
    c.device = c.host;
    c.device.u = to_gpu(be, &c.u);
    c.device.weight = to_gpu(be, &c.weight);
    c.device.labels = gpu_put(be, c.labels, (size_t)s.n_tokens * sizeof(int32_t));
    c.device.grad_u = to_gpu(be, &c.grad_u);
    c.device.grad_weight = to_gpu(be, &c.grad_weight);
    c.device.logprobs = to_gpu(be, &c.logprobs);
    c.ref = (struct ops_ref_linear_ce){ .n_tokens = s.n_tokens,
                                        .d_model = s.d_model,
                                        .vocab_size = s.vocab_size,
                                        .logit_scale = (double)c.host.logit_scale,
                                        .loss_scale = (double)c.host.loss_scale,
                                        .z_coef = (double)c.host.z_coef,
                                        .u = c.u.d,
                                        .weight = c.weight.d,
                                        .labels = c.labels,
                                        .grad_u = c.grad_u.d,
                                        .grad_weight = c.grad_weight.d,
                                        .logprobs = c.logprobs.d };
    return c;
}

static void head_free(struct head *c)
{
    tensor_free(&c->u);
    tensor_free(&c->weight);
    tensor_free(&c->grad_u);
    tensor_free(&c->grad_weight);
    tensor_free(&c->logprobs);
    free(c->labels);
}

/* Largest difference of two tensors of one type, fp64 values of the first in `d`. */
static double distance(const struct tensor *t, const double *d)
{
    double most = 0.0;
    for (int64_t i = 0; i < t->n; i++) most = fmax(most, fabs(tensor_at(t, i) - d[i]));
    return most;
}

START_TEST(loss_and_gradients_match_reference)
{
    const enum ht_dtype dtype = dtypes[_i];

    for (int s = 0; s < N_SHAPES; s++) {
        struct ht_backend be,
            cpu = backend_make(HT_ISA_PLAIN, 1,
                               ht_linear_ce_scratch_bytes(shapes[s].n_tokens, shapes[s].d_model,
                                                          shapes[s].vocab_size, dtype));
        gpu_start(&be, scratch_for(shapes[s]));
        struct head c = head_make(&be, shapes[s], dtype);
        ops_ref_linear_ce(&c.ref);
        gpu_ok(ht_linear_ce(&cpu, &c.host)); // what the CPU loses in this type
        const double f = 64 * FLT_EPSILON, lost_u = distance(&c.grad_u, c.grad_u.d),
                     lost_w = distance(&c.grad_weight, c.grad_weight.d);

        gpu_ok(ht_linear_ce(&be, &c.device));
        from_gpu(&be, &c.grad_u, c.device.grad_u);
        from_gpu(&be, &c.grad_weight, c.device.grad_weight);
        from_gpu(&be, &c.logprobs, c.device.logprobs);
        ck_assert_int_eq(c.device.n_counted, c.ref.n_counted);
        const double per_token = 32 * FLT_EPSILON * sqrt((double)shapes[s].d_model);
        ck_assert_double_eq_tol(c.device.loss_sum, c.ref.loss_sum,
                                per_token * (double)(c.ref.n_counted + 1));
        ck_assert_double_eq_tol(c.device.z_sum, c.ref.z_sum,
                                per_token * 20 * (double)(c.ref.n_counted + 1));
        check_close(&c.logprobs, c.logprobs.d,
                    per_token + 2 * FLT_EPSILON * max_abs(c.logprobs.d, c.logprobs.n), "logprobs");
        ck_assert_double_le(distance(&c.grad_u, c.grad_u.d),
                            2 * lost_u + f * max_abs(c.grad_u.d, c.grad_u.n));
        ck_assert_double_le(distance(&c.grad_weight, c.grad_weight.d),
                            2 * lost_w + f * max_abs(c.grad_weight.d, c.grad_weight.n));
        ck_assert_uint_eq(be.scratch.used_bytes, 0);
        head_free(&c);
        gpu_end(&be);
        ht_backend_free(&cpu);
    }
}
END_TEST

START_TEST(sums_can_stay_on_the_device)
{
    const struct shape s = { 70, 24, 301, 30 };
    struct ht_backend be;
    double sums[3];

    gpu_start(&be, scratch_for(s));
    struct head c = head_make(&be, s, dtypes[_i]);
    gpu_ok(ht_linear_ce(&be, &c.device));
    const struct ht_linear_ce_args waited = c.device;
    c.device.grad_u = NULL;
    c.device.grad_weight = NULL;
    c.device.logprobs = NULL;
    c.device.sums = gpu_new(&be, sizeof sums);
    gpu_ok(ht_linear_ce(&be, &c.device));
    gpu_get(&be, sums, c.device.sums, sizeof sums);
    ck_assert_double_eq(sums[0], waited.loss_sum);
    ck_assert_double_eq(sums[1], waited.z_sum);
    ck_assert_double_eq(sums[2], (double)waited.n_counted);
    ck_assert_double_eq(c.device.loss_sum, 0.0);
    head_free(&c);
    gpu_end(&be);
}
END_TEST

START_TEST(chunks_change_only_the_order_of_sums)
{
    struct shape s = { 70, 24, 301, 70 };
    double loss[2];

    for (int k = 0; k < 2; k++) {
        struct ht_backend be;
        gpu_start(&be, scratch_for(s));
        struct head c = head_make(&be, s, HT_DTYPE_F32);
        gpu_ok(ht_linear_ce(&be, &c.device));
        loss[k] = c.device.loss_sum;
        head_free(&c);
        gpu_end(&be);
        s.rows = 16;
    }
    ck_assert_double_eq_tol(loss[0], loss[1], 1e-12 * loss[0]);
}
END_TEST

START_TEST(too_little_scratch_is_refused)
{
    struct ht_backend be;
    const struct shape s = { 70, 24, 301, 4 };

    gpu_start(&be, scratch_for(s));
    struct head c = head_make(&be, s, HT_DTYPE_F32);
    ck_assert_int_eq(ht_linear_ce(&be, &c.device), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "scratch"));
    head_free(&c);
    gpu_end(&be);
}
END_TEST

START_TEST(bad_labels_make_the_loss_nan)
{
    struct ht_backend be;
    const struct shape s = { 3, 5, 7, 3 };

    gpu_start(&be, scratch_for(s));
    struct head c = head_make(&be, s, HT_DTYPE_F32);
    c.labels[1] = 7;
    c.device.labels = gpu_put(&be, c.labels, 3 * sizeof(int32_t));
    gpu_ok(ht_linear_ce(&be, &c.device));
    ck_assert_double_nan(c.device.loss_sum);
    head_free(&c);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("loss_cuda");
    TCase *t = tcase_create("loss_cuda");

    tcase_add_loop_test(t, gemm_matches_reference, 0, 16);
    tcase_add_loop_test(t, loss_and_gradients_match_reference, 0, 2);
    tcase_add_loop_test(t, sums_can_stay_on_the_device, 0, 2);
    tcase_add_test(t, chunks_change_only_the_order_of_sums);
    tcase_add_test(t, too_little_scratch_is_refused);
    tcase_add_test(t, bad_labels_make_the_loss_nan);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
