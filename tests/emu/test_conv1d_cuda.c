/* tests/emu/test_conv1d_cuda.c: the CUDA convolution against fp64 loops: ragged lengths, packing,
 * carried state, borders of strips and of blocks of tokens. */
#include <float.h>
#include <math.h>
#include <string.h>

#include "ssm/ssm_ops.h"
#include "tests/emu/ops_gpu.h"
#include "tests/ref/ssm_ref.h"

enum { MAX_SEQS = 8, PAD = 8 };

// shorter than the window; sequences that end at borders of strips (32) and blocks (256), and one
// row off; past one set of channels (128)
static const struct shape {
    int64_t lengths[MAX_SEQS], CD, W;
} shapes[] = {
    { { 1 }, 8, 4 },           { { 2 }, 24, 3 },       { { 3, 1, 2, 40 }, 40, 4 },
    { { 67, 5 }, 16, 2 },      { { 1, 1, 1 }, 8, 4 },  { { 31, 1, 32, 200 }, 136, 4 },
    { { 255, 2, 30 }, 16, 3 }, { { 300, 250 }, 8, 4 },
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

/* x and y are the middle columns of wider rows. */
struct conv_case {
    int32_t starts[MAX_SEQS + 1];
    int64_t n_seqs, T, CD, W, stride;
    struct tensor x, w, bias, state, grad_y, y, grad_x, grad_w, grad_bias;
    double *fp64; // dense copies and results of the reference
    struct ssm_ref_conv ref;
};

static struct conv_case case_make(const struct shape *s, enum ht_dtype dtype)
{
    struct conv_case k = { .CD = s->CD, .W = s->W, .stride = s->CD + 2 * PAD };

    for (; k.n_seqs < MAX_SEQS && s->lengths[k.n_seqs] > 0; k.n_seqs++)
        k.starts[k.n_seqs + 1] = k.starts[k.n_seqs] + (int32_t)s->lengths[k.n_seqs];
    k.T = k.starts[k.n_seqs];
    const int64_t n = k.T * k.CD, n_state = k.n_seqs * (k.W - 1) * k.CD;
    k.x = tensor_normal(k.T * k.stride, dtype, 1.0, 1);
    k.w = tensor_normal(k.CD * k.W, HT_DTYPE_F32, 0.6, 2);
    k.bias = tensor_normal(k.CD, HT_DTYPE_F32, 0.5, 3);
    k.state = tensor_normal(n_state, HT_DTYPE_F32, 1.0, 4);
    k.grad_y = tensor_normal(k.T * k.stride, dtype, 1.0, 5);
    k.y = tensor_make(k.T * k.stride, dtype);
    k.grad_x = tensor_make(k.T * k.stride, dtype);
    k.grad_w = tensor_normal(k.CD * k.W, HT_DTYPE_F32, 1.0, 6); // is added to
    k.grad_bias = tensor_normal(k.CD, HT_DTYPE_F32, 1.0, 7);
    k.fp64 = calloc((size_t)(4 * n + n_state), sizeof(double));
    ck_assert_ptr_nonnull(k.fp64);
    for (int64_t t = 0; t < k.T; t++) {
        memcpy(k.fp64 + t * k.CD, k.x.d + t * k.stride + PAD, (size_t)k.CD * sizeof(double));
        memcpy(k.fp64 + n + t * k.CD, k.grad_y.d + t * k.stride + PAD,
               (size_t)k.CD * sizeof(double));
    }
    k.ref = (struct ssm_ref_conv){ .n_seqs = k.n_seqs,
                                   .T = k.T,
                                   .CD = k.CD,
                                   .W = k.W,
                                   .x = k.fp64,
                                   .w = k.w.d,
                                   .grad_y = k.fp64 + n,
                                   .y = k.fp64 + 2 * n,
                                   .grad_x = k.fp64 + 3 * n,
                                   .new_state = k.fp64 + 4 * n,
                                   .grad_w = k.grad_w.d };
    return k;
}

static void case_free(struct conv_case *k)
{
    struct tensor *all[] = { &k->x, &k->w,      &k->bias,   &k->state,    &k->grad_y,
                             &k->y, &k->grad_x, &k->grad_w, &k->grad_bias };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) tensor_free(all[i]);
    free(k->fp64);
}

static void *column(void *p, enum ht_dtype dtype)
{
    return (char *)p + PAD * ht_dtype_bytes(dtype);
}

/* Results come back into the tensors. */
static void run(struct conv_case *k, bool bias, bool state, bool backward)
{
    const enum ht_dtype dtype = k->x.dtype;
    struct ht_backend be;

    gpu_start(&be, backward ? ht_conv1d_scratch_bytes(k->T, k->CD, k->W) : 0);
    void *y = to_gpu(&be, &k->y), *grad_x = to_gpu(&be, &k->grad_x);
    float *d_state = to_gpu(&be, &k->state), *grad_w = to_gpu(&be, &k->grad_w);
    float *grad_bias = to_gpu(&be, &k->grad_bias);
    const struct ht_conv1d_args a = {
        .seqs = { k->n_seqs, gpu_put(&be, k->starts, sizeof k->starts) },
        .n_tokens = k->T,
        .n_channels = k->CD,
        .d_conv = k->W,
        .dtype = dtype,
        .x = column(to_gpu(&be, &k->x), dtype),
        .x_stride = k->stride,
        .w = to_gpu(&be, &k->w),
        .bias = bias ? to_gpu(&be, &k->bias) : NULL,
        .y = column(y, dtype),
        .y_stride = k->stride,
        .state = state ? d_state : NULL,
        .grad_y = column(to_gpu(&be, &k->grad_y), dtype),
        .grad_y_stride = k->stride,
        .grad_x = column(grad_x, dtype),
        .grad_x_stride = k->stride,
        .grad_w = grad_w,
        .grad_bias = bias ? grad_bias : NULL,
    };
    gpu_ok(backward ? ht_conv1d_backward(&be, &a) : ht_conv1d_forward(&be, &a));
    ck_assert_uint_eq(be.scratch.used_bytes, 0);
    from_gpu(&be, &k->y, y);
    from_gpu(&be, &k->grad_x, grad_x);
    from_gpu(&be, &k->state, d_state);
    from_gpu(&be, &k->grad_w, grad_w);
    from_gpu(&be, &k->grad_bias, grad_bias);
    gpu_end(&be);
    k->ref.starts = k->starts;
    k->ref.bias = bias ? k->bias.d : NULL;
    k->ref.state = state ? k->state.d : NULL;
    k->ref.grad_bias = bias ? k->grad_bias.d : NULL;
}

/* Middle columns against dense want; the columns around them untouched. */
static void check_rows(const struct tensor *t, const double *want, int64_t T, int64_t n,
                       double slack, const char *what)
{
    struct tensor untouched = tensor_make(1, t->dtype), middle = tensor_make(T * n, t->dtype);
    const int64_t stride = n + 2 * PAD;
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
    tensor_free(&untouched);
}

START_TEST(matches_fp64)
{
    const struct shape *s = &shapes[_i % N_SHAPES];
    const enum ht_dtype dtype = _i / N_SHAPES ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    const double slack = 16.0 * (double)FLT_EPSILON;

    for (int mode = 0; mode < 3; mode++) { // bias; state; neither
        struct conv_case k = case_make(s, dtype);
        struct tensor state = tensor_copy(&k.state), grad_bias = tensor_copy(&k.grad_bias);
        const int64_t n = k.T * k.CD;

        run(&k, mode == 0, mode == 1, false);
        ssm_ref_conv_forward(&k.ref);
        check_rows(&k.y, k.ref.y, k.T, k.CD, slack * (max_abs(k.ref.y, n) + 1.0), "y");
        if (mode == 1) {
            check_close(&k.state, k.ref.new_state, 0.0, "state");
        } else {
            check_same_bits(&k.state, &state, "a state that was not given");
            run(&k, mode == 0, false, true);
            ssm_ref_conv_backward(&k.ref);
            check_rows(&k.grad_x, k.ref.grad_x, k.T, k.CD, slack * (max_abs(k.ref.grad_x, n) + 1.0),
                       "grad_x");
            check_close(&k.grad_w, k.ref.grad_w, slack * sqrt((double)k.T) * 8.0, "grad_w");
            if (mode == 0)
                check_close(&k.grad_bias, k.ref.grad_bias, slack * sqrt((double)k.T) * 8.0,
                            "grad_bias");
            else
                check_same_bits(&k.grad_bias, &grad_bias, "a gradient that was not asked for");
        }
        tensor_free(&state);
        tensor_free(&grad_bias);
        case_free(&k);
    }
}
END_TEST

START_TEST(bits_do_not_depend_on_the_run)
{
    const enum ht_dtype dtype = _i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    struct conv_case a = case_make(&shapes[5], dtype), b = case_make(&shapes[5], dtype);

    run(&a, true, false, true);
    run(&b, true, false, true);
    check_same_bits(&a.grad_x, &b.grad_x, "grad_x");
    check_same_bits(&a.grad_w, &b.grad_w, "grad_w");
    check_same_bits(&a.grad_bias, &b.grad_bias, "grad_bias");
    case_free(&a);
    case_free(&b);
}
END_TEST

/* One sequence, in pieces of 1, 2, 3, 1, 7, ... tokens with a carried state: the same bits as
 * whole. */
START_TEST(pieces_equal_whole)
{
    static const int32_t pieces[] = { 1, 2, 3, 1, 7, 1, 1, 40, 2 };
    const enum ht_dtype dtype = _i / 3 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    const struct shape s = { { 58 }, 24, 2 + _i % 3 };
    struct conv_case whole = case_make(&s, dtype), k = case_make(&s, dtype);
    struct ht_backend be;
    size_t at = 0;

    run(&whole, true, true, false);
    gpu_start(&be, 0);
    char *x = to_gpu(&be, &k.x), *y = to_gpu(&be, &k.y);
    struct ht_conv1d_args a = { .n_channels = k.CD,
                                .d_conv = k.W,
                                .dtype = dtype,
                                .x_stride = k.stride,
                                .w = to_gpu(&be, &k.w),
                                .bias = to_gpu(&be, &k.bias),
                                .y_stride = k.stride,
                                .state = to_gpu(&be, &k.state) };
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        const int32_t starts[2] = { 0, pieces[i] };
        a.seqs = (struct ht_seqs){ 1, gpu_put(&be, starts, sizeof starts) };
        a.n_tokens = pieces[i];
        a.x = column(x + at, dtype);
        a.y = column(y + at, dtype);
        gpu_ok(ht_conv1d_forward(&be, &a));
        at += (size_t)(pieces[i] * k.stride) * ht_dtype_bytes(dtype);
    }
    from_gpu(&be, &k.y, y);
    from_gpu(&be, &k.state, a.state);
    gpu_end(&be);
    check_same_bits(&k.y, &whole.y, "y");
    check_same_bits(&k.state, &whole.state, "state");
    case_free(&whole);
    case_free(&k);
}
END_TEST

/* Carried states that stand in other places, with others between them: the same bits, and the
 * others untouched. */
START_TEST(states_in_slots)
{
    static const int32_t slot[] = { 4, 0, 5, 2 };
    const enum ht_dtype dtype = _i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    struct conv_case whole = case_make(&shapes[2], dtype), k = case_make(&shapes[2], dtype);
    const int64_t one = (k.W - 1) * k.CD;
    struct tensor places = tensor_normal(6 * one, HT_DTYPE_F32, 1.0, 9);
    struct tensor before = tensor_copy(&places);
    struct ht_backend be;

    run(&whole, true, true, false);
    for (int i = 0; i < 4; i++)
        memcpy((float *)places.p + slot[i] * one, (float *)k.state.p + i * one,
               (size_t)one * sizeof(float));
    gpu_start(&be, 0);
    void *x = to_gpu(&be, &k.x), *y = to_gpu(&be, &k.y);
    const struct ht_conv1d_args a = {
        .seqs = { k.n_seqs, gpu_put(&be, k.starts, sizeof k.starts) },
        .n_tokens = k.T,
        .n_channels = k.CD,
        .d_conv = k.W,
        .dtype = dtype,
        .x = column(x, dtype),
        .x_stride = k.stride,
        .w = to_gpu(&be, &k.w),
        .bias = to_gpu(&be, &k.bias),
        .y = column(y, dtype),
        .y_stride = k.stride,
        .state = to_gpu(&be, &places),
        .slot = gpu_put(&be, slot, sizeof slot),
    };
    gpu_ok(ht_conv1d_forward(&be, &a));
    from_gpu(&be, &k.y, y);
    from_gpu(&be, &places, a.state);
    gpu_end(&be);
    check_same_bits(&k.y, &whole.y, "y");
    for (int i = 0; i < 4; i++)
        ck_assert_mem_eq((float *)places.p + slot[i] * one, (float *)whole.state.p + i * one,
                         (size_t)one * sizeof(float));
    for (int i = 1; i < 4; i += 2) // places 1 and 3 belong to nobody
        ck_assert_mem_eq((float *)places.p + i * one, (float *)before.p + i * one,
                         (size_t)one * sizeof(float));
    tensor_free(&places);
    tensor_free(&before);
    case_free(&whole);
    case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("conv1d_cuda");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property");

    tcase_add_loop_test(reference, matches_fp64, 0, 2 * N_SHAPES);
    suite_add_tcase(s, reference);
    tcase_add_loop_test(property, bits_do_not_depend_on_the_run, 0, 2);
    tcase_add_loop_test(property, pieces_equal_whole, 0, 6);
    tcase_add_loop_test(property, states_in_slots, 0, 2);
    suite_add_tcase(s, property);
    return gpu_run_suite(s);
}
