/* tests/ssm/test_conv1d.c: the causal convolution against fp64 loops, its gradients, and its
 * carried state. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "ssm/ssm_ops.h"
#include "tests/core/ops/ops_case.h"
#include "tests/ref/ssm_ref.h"

enum { MAX_SEQS = 8, PAD = 8 };

// shorter than the window; ragged vectors of channels; several sequences; past one block of rows
// and of sums
static const struct shape {
    int64_t lengths[MAX_SEQS], CD, W;
} shapes[] = {
    { { 1 }, 8, 4 },          { { 2 }, 24, 3 },          { { 3, 1, 2, 40 }, 40, 4 },
    { { 67, 5 }, 16, 2 },     { { 1, 1, 1, 1 }, 24, 4 }, { { 33, 300 }, 72, 4 },
    { { 31, 1, 100 }, 8, 3 },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* x and y are the middle columns of wider rows. */
struct conv_case {
    int32_t starts[MAX_SEQS + 1];
    int64_t T, stride;
    struct tensor x, w, bias, state, grad_y, y, grad_x, grad_w, grad_bias;
    struct ht_conv1d_args args;
    struct ssm_ref_conv ref;
};

static double *dense(const struct tensor *t, int64_t T, int64_t stride, int64_t n)
{
    double *p = calloc((size_t)(T * n) + 1, sizeof *p);
    ck_assert_ptr_nonnull(p);
    for (int64_t i = 0; i < T; i++)
        memcpy(p + i * n, t->d + i * stride + PAD, (size_t)n * sizeof *p);
    return p;
}

static void *column(const struct tensor *t)
{
    return (char *)t->p + (size_t)PAD * ht_dtype_bytes(t->dtype);
}

static struct conv_case case_make(const struct shape *s, enum ht_dtype dtype, bool bias, bool state)
{
    struct conv_case k = { .stride = s->CD + 2 * PAD };
    int64_t n_seqs = 0;

    for (; n_seqs < MAX_SEQS && s->lengths[n_seqs] > 0; n_seqs++)
        k.starts[n_seqs + 1] = k.starts[n_seqs] + (int32_t)s->lengths[n_seqs];
    k.T = k.starts[n_seqs];
    k.x = tensor_normal(k.T * k.stride, dtype, 1.0, 1);
    k.w = tensor_normal(s->CD * s->W, HT_DTYPE_F32, 0.6, 2);
    k.bias = tensor_normal(s->CD, HT_DTYPE_F32, 0.5, 3);
    k.state = tensor_normal(n_seqs * (s->W - 1) * s->CD, HT_DTYPE_F32, 1.0, 4);
    k.grad_y = tensor_normal(k.T * k.stride, dtype, 1.0, 5);
    k.y = tensor_make(k.T * k.stride, dtype);
    k.grad_x = tensor_make(k.T * k.stride, dtype);
    k.grad_w = tensor_normal(s->CD * s->W, HT_DTYPE_F32, 1.0, 6); // is added to
    k.grad_bias = tensor_normal(s->CD, HT_DTYPE_F32, 1.0, 7);
    k.args = (struct ht_conv1d_args){ .seqs = { n_seqs, NULL },
                                      .n_tokens = k.T,
                                      .n_channels = s->CD,
                                      .d_conv = s->W,
                                      .dtype = dtype,
                                      .x = column(&k.x),
                                      .x_stride = k.stride,
                                      .w = k.w.p,
                                      .bias = bias ? k.bias.p : NULL,
                                      .y = column(&k.y),
                                      .y_stride = k.stride,
                                      .state = state ? k.state.p : NULL,
                                      .grad_y = column(&k.grad_y),
                                      .grad_y_stride = k.stride,
                                      .grad_x = column(&k.grad_x),
                                      .grad_x_stride = k.stride,
                                      .grad_w = k.grad_w.p,
                                      .grad_bias = bias ? k.grad_bias.p : NULL };
    k.ref = (struct ssm_ref_conv){ .n_seqs = n_seqs,
                                   .T = k.T,
                                   .CD = s->CD,
                                   .W = s->W,
                                   .x = dense(&k.x, k.T, k.stride, s->CD),
                                   .w = k.w.d,
                                   .bias = bias ? k.bias.d : NULL,
                                   .state = state ? k.state.d : NULL,
                                   .y = calloc((size_t)(k.T * s->CD), sizeof(double)),
                                   .new_state = calloc((size_t)k.state.n, sizeof(double)),
                                   .grad_y = dense(&k.grad_y, k.T, k.stride, s->CD),
                                   .grad_x = calloc((size_t)(k.T * s->CD), sizeof(double)),
                                   .grad_w = k.grad_w.d,
                                   .grad_bias = bias ? k.grad_bias.d : NULL };
    return k;
}

static void case_free(struct conv_case *k)
{
    struct tensor *all[] = { &k->x, &k->w,      &k->bias,   &k->state,    &k->grad_y,
                             &k->y, &k->grad_x, &k->grad_w, &k->grad_bias };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    free((void *)(uintptr_t)k->ref.x);
    free((void *)(uintptr_t)k->ref.grad_y);
    free(k->ref.y);
    free(k->ref.new_state);
    free(k->ref.grad_x);
}

static void run(struct conv_case *k, enum ht_isa isa, int threads, bool backward)
{
    const struct ht_conv1d_args *a = &k->args;
    struct ht_backend be =
        backend_make(isa, threads, ht_conv1d_scratch_bytes(a->n_tokens, a->n_channels, a->d_conv));

    k->args.seqs.starts = k->ref.starts = k->starts;
    ck_assert_msg((backward ? ht_conv1d_backward(&be, a) : ht_conv1d_forward(&be, a)) == HT_OK,
                  "%s", ht_error_message());
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    ht_backend_free(&be);
}

/* Middle columns against dense want; the columns around them untouched. */
static void check_rows(const struct tensor *t, const double *want, int64_t T, int64_t n,
                       double slack, const char *what)
{
    const struct tensor untouched = tensor_make(1, t->dtype);
    const int64_t stride = n + 2 * PAD;
    struct tensor middle = tensor_make(T * n, t->dtype);
    const size_t e = ht_dtype_bytes(t->dtype);

    for (int64_t i = 0; i < T; i++) {
        memcpy((char *)middle.p + (size_t)(i * n) * e,
               (char *)t->p + (size_t)(i * stride + PAD) * e, (size_t)n * e);
        for (int64_t j = 0; j < PAD; j++) {
            ck_assert_mem_eq((char *)t->p + (size_t)(i * stride + j) * e, untouched.p, e);
            ck_assert_mem_eq((char *)t->p + (size_t)(i * stride + PAD + n + j) * e, untouched.p, e);
        }
    }
    check_close(&middle, want, slack, what);
    tensor_free(&middle);
    tensor_free((struct tensor *)(uintptr_t)&untouched);
}

START_TEST(matches_fp64)
{
    const struct variant v = variant_at(_i / N_SHAPES);
    const struct shape *s = &shapes[_i % N_SHAPES];

    for (int mode = 0; mode < 3; mode++) { // bias; state; neither
        struct conv_case k = case_make(s, v.dtype, mode == 0, mode == 1);
        const double slack = 16.0 * (double)FLT_EPSILON;
        struct tensor state = tensor_copy(&k.state);

        run(&k, v.isa, 1, false);
        ssm_ref_conv_forward(&k.ref);
        check_rows(&k.y, k.ref.y, k.T, s->CD, slack * (max_abs(k.ref.y, k.T * s->CD) + 1.0), "y");
        if (mode == 1) {
            check_close(&k.state, k.ref.new_state, 0.0, "state");
        } else {
            check_same_bits(&k.state, &state, "a state that was not given");
            run(&k, v.isa, 1, true);
            ssm_ref_conv_backward(&k.ref);
            const double big = max_abs(k.ref.grad_x, k.T * s->CD) + 1.0;
            check_rows(&k.grad_x, k.ref.grad_x, k.T, s->CD, slack * big, "grad_x");
            check_close(&k.grad_w, k.ref.grad_w, slack * sqrt((double)k.T) * 8.0, "grad_w");
            if (mode == 0)
                check_close(&k.grad_bias, k.ref.grad_bias, slack * sqrt((double)k.T) * 8.0,
                            "grad_bias");
        }
        tensor_free(&state);
        case_free(&k);
    }
}
END_TEST

START_TEST(threads_do_not_change_bits)
{
    const struct variant v = variant_at(_i / N_SHAPES);
    const struct shape *s = &shapes[_i % N_SHAPES];
    struct conv_case one = case_make(s, v.dtype, true, true),
                     two = case_make(s, v.dtype, true, true);

    for (int backward = 0; backward < 2; backward++) {
        run(&one, v.isa, 1, backward);
        run(&two, v.isa, 2, backward);
        one.args.state = two.args.state = NULL;
    }
    check_same_bits(&one.y, &two.y, "y");
    check_same_bits(&one.state, &two.state, "state");
    check_same_bits(&one.grad_x, &two.grad_x, "grad_x");
    check_same_bits(&one.grad_w, &two.grad_w, "grad_w");
    check_same_bits(&one.grad_bias, &two.grad_bias, "grad_bias");
    case_free(&one);
    case_free(&two);
}
END_TEST

/* A weight of one at tap k moves the input by W-1-k tokens: tap W-1 is the current token. */
START_TEST(tap_order)
{
    static const int32_t starts[] = { 0, 9 };
    const struct variant v = variant_at(_i);
    struct ht_backend be = backend_make(v.isa, 1, 64);

    for (int64_t W = 2; W <= 4; W++)
        for (int64_t tap = 0; tap < W; tap++) {
            struct tensor x = tensor_make(9 * 8, v.dtype), y = tensor_make(9 * 8, v.dtype);
            float w[8 * 4] = { 0 };
            for (int64_t c = 0; c < 8; c++) w[c * W + tap] = 1.0f;
            tensor_fill(&x, 0.0);
            ht_store_f32(x.p, 4 * 8 + 5, v.dtype, 3.0f); // token 4, channel 5
            const struct ht_conv1d_args a = { .seqs = { 1, starts },
                                              .n_tokens = 9,
                                              .n_channels = 8,
                                              .d_conv = W,
                                              .dtype = v.dtype,
                                              .x = x.p,
                                              .x_stride = 8,
                                              .w = w,
                                              .y = y.p,
                                              .y_stride = 8 };
            ck_assert_int_eq(ht_conv1d_forward(&be, &a), HT_OK);
            for (int64_t i = 0; i < 72; i++) {
                const bool hit = i == (4 + W - 1 - tap) * 8 + 5;
                ck_assert_double_le(fabs(tensor_at(&y, i) - (hit ? 3.0 / (1.0 + exp(-3.0)) : 0.0)),
                                    hit ? 0.01 : 0.0);
            }
            tensor_free(&x);
            tensor_free(&y);
        }
    ht_backend_free(&be);
}
END_TEST

/* One sequence, in pieces of 1, 2, 3, 1, 7, ... tokens with a carried state: the same bits as
 * whole. */
START_TEST(pieces_equal_whole)
{
    static const int32_t pieces[] = { 1, 2, 3, 1, 7, 1, 1, 40, 2 };
    const struct variant v = variant_at(_i / 3);
    struct shape s = { { 58 }, 24, 2 + _i % 3 };
    struct conv_case whole = case_make(&s, v.dtype, true, true),
                     k = case_make(&s, v.dtype, true, true);
    struct ht_backend be = backend_make(v.isa, 2, 64);
    struct ht_conv1d_args a = k.args;

    run(&whole, v.isa, 1, false);
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        const int32_t starts[2] = { 0, pieces[i] };
        const size_t rows = (size_t)(pieces[i] * k.stride) * ht_dtype_bytes(v.dtype);
        a.seqs.starts = starts;
        a.n_tokens = pieces[i];
        ck_assert_int_eq(ht_conv1d_forward(&be, &a), HT_OK);
        a.x = (const char *)a.x + rows;
        a.y = (char *)a.y + rows;
    }
    check_same_bits(&k.y, &whole.y, "y");
    check_same_bits(&k.state, &whole.state, "state");
    ht_backend_free(&be);
    case_free(&whole);
    case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("conv1d");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_fp64, 0, n_variants() * N_SHAPES);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, threads_do_not_change_bits, 0, n_variants() * N_SHAPES);
    tcase_add_loop_test(property, tap_order, 0, n_variants());
    tcase_add_loop_test(property, pieces_equal_whole, 0, n_variants() * 3);
    suite_add_tcase(s, property);
    return run_suite(s);
}
