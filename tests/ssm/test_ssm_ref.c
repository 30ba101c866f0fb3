/* tests/ssm/test_ssm_ref.c: the fp64 reference's backward functions against central differences. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/ssm/scan_case.h"

/* loss = sum(weight * output) + sum(weight2 * output2) */
static double weighted(const double *out, const double *weight, int64_t n)
{
    double sum = 0.0;
    for (int64_t i = 0; i < n; i++) sum += out[i] * weight[i];
    return sum;
}

static double scan_loss(struct scan_case *k)
{
    const struct ssm_ref_scan *r = &k->ref;
    ssm_ref_scan_forward(r);
    return weighted(r->y, r->grad_y, r->T * r->H * r->P) +
           (r->grad_final ? weighted(r->final, r->grad_final, r->n_seqs * r->H * r->P * r->N) : 0);
}

/* Every element of p (n) against grad, relative to the largest. */
#define CHECK_DIFFERENCES(loss, p, n, grad, what)                                                  \
    do {                                                                                           \
        double *p_ = (double *)(uintptr_t)(p);                                                     \
        const double largest_ = max_abs(grad, n);                                                  \
        ck_assert_msg(largest_ > 0.0, "%s: no gradient at all", what);                             \
        for (int64_t i_ = 0; i_ < (n); i_++) {                                                     \
            const double old_ = p_[i_], step_ = 1e-5 * fmax(1.0, fabs(old_));                      \
            p_[i_] = old_ + step_;                                                                 \
            const double up_ = (loss);                                                             \
            p_[i_] = old_ - step_;                                                                 \
            const double down_ = (loss);                                                           \
            p_[i_] = old_;                                                                         \
            const double want_ = (up_ - down_) / (2.0 * step_);                                    \
            ck_assert_msg(fabs(want_ - (grad)[i_]) <= 1e-6 * largest_,                             \
                          "%s[%lld]: %.12g, central difference %.12g", what, (long long)i_,        \
                          (grad)[i_], want_);                                                      \
        }                                                                                          \
    } while (0)

// groups, several sequences, states; and an active clamp
static const struct {
    struct scan_shape shape;
    enum scan_data data;
} scans[] = {
    { { { 5 }, 1, 8, 8, 1, 16 }, SCAN_PLAIN },
    { { { 3, 1, 4 }, 4, 8, 8, 2, 16 }, SCAN_STATES },
    { { { 6 }, 2, 8, 8, 1, 16 }, SCAN_CLAMPED },
};

START_TEST(scan_backward_is_the_derivative)
{
    struct scan_case k = scan_case_make(&scans[_i].shape, scans[_i].data, HT_DTYPE_F32, 3);
    const struct ssm_ref_scan *r = &k.ref;
    const int64_t HP = r->H * r->P, GN = r->G * r->N;

    scan_case_reference(&k);
    CHECK_DIFFERENCES(scan_loss(&k), r->x, r->T * HP, r->grad_x, "x");
    CHECK_DIFFERENCES(scan_loss(&k), r->B, r->T * GN, r->grad_B, "B");
    CHECK_DIFFERENCES(scan_loss(&k), r->C, r->T * GN, r->grad_C, "C");
    CHECK_DIFFERENCES(scan_loss(&k), r->dt_raw, r->T * r->H, r->grad_dt_raw, "dt_raw");
    CHECK_DIFFERENCES(scan_loss(&k), r->dt_bias, r->H, r->grad_dt_bias, "dt_bias");
    CHECK_DIFFERENCES(scan_loss(&k), r->A_log, r->H, r->grad_A_log, "A_log");
    CHECK_DIFFERENCES(scan_loss(&k), r->D, r->H, r->grad_D, "D");
    if (r->init)
        CHECK_DIFFERENCES(scan_loss(&k), r->init, r->n_seqs * HP * r->N, r->grad_init, "init");
    scan_case_free(&k);
}
END_TEST

START_TEST(scan_clamp_is_active)
{
    struct scan_case k = scan_case_make(&scans[2].shape, SCAN_CLAMPED, HT_DTYPE_F32, 3);
    int64_t stopped = 0, free_ones = 0;

    scan_case_reference(&k);
    for (int64_t i = 0; i < k.ref.T * k.ref.H; i++) {
        if (k.ref.grad_dt_raw[i] == 0.0)
            stopped++;
        else
            free_ones++;
    }
    ck_assert_int_gt(stopped, 0);
    ck_assert_int_gt(free_ones, 0);
    scan_case_free(&k);
}
END_TEST

static double conv_loss(const struct ssm_ref_conv *c)
{
    ssm_ref_conv_forward(c);
    return weighted(c->y, c->grad_y, c->T * c->CD);
}

START_TEST(conv_backward_is_the_derivative)
{
    static const int32_t starts[] = { 0, 2, 9, 10 };
    const int64_t W = 2 + _i, T = 10, CD = 3;
    struct tensor x = tensor_normal(T * CD, HT_DTYPE_F32, 1.0, 1);
    struct tensor w = tensor_normal(CD * W, HT_DTYPE_F32, 1.0, 2);
    struct tensor b = tensor_normal(CD, HT_DTYPE_F32, 1.0, 3);
    struct tensor gy = tensor_normal(T * CD, HT_DTYPE_F32, 1.0, 4);
    double y[30], gx[30], gw[12] = { 0 }, gb[3] = { 0 };
    const struct ssm_ref_conv c = { .n_seqs = 3,
                                    .starts = starts,
                                    .T = T,
                                    .CD = CD,
                                    .W = W,
                                    .x = x.d,
                                    .w = w.d,
                                    .bias = b.d,
                                    .y = y,
                                    .grad_y = gy.d,
                                    .grad_x = gx,
                                    .grad_w = gw,
                                    .grad_bias = gb };
    ssm_ref_conv_backward(&c);
    CHECK_DIFFERENCES(conv_loss(&c), x.d, T * CD, gx, "x");
    CHECK_DIFFERENCES(conv_loss(&c), w.d, CD * W, gw, "w");
    CHECK_DIFFERENCES(conv_loss(&c), b.d, CD, gb, "bias");
    tensor_free(&x);
    tensor_free(&w);
    tensor_free(&b);
    tensor_free(&gy);
}
END_TEST

static double norm_loss(const struct ssm_ref_norm *n)
{
    ssm_ref_norm_forward(n);
    return weighted(n->o, n->grad_o, n->T * n->d_inner);
}

START_TEST(norm_backward_is_the_derivative)
{
    const int64_t T = 3, d_inner = 8, groups = _i + 1;
    struct tensor w = tensor_normal(d_inner, HT_DTYPE_F32, 1.0, 1);
    struct tensor y = tensor_normal(T * d_inner, HT_DTYPE_F32, 1.0, 2);
    struct tensor z = tensor_normal(T * d_inner, HT_DTYPE_F32, 1.0, 3);
    struct tensor go = tensor_normal(T * d_inner, HT_DTYPE_F32, 1.0, 4);
    double o[24], rstd[6], gy[24], gz[24], gw[8] = { 0 };
    const struct ssm_ref_norm n = { .T = T,
                                    .d_inner = d_inner,
                                    .groups = groups,
                                    .eps = 1e-3,
                                    .w = w.d,
                                    .y = y.d,
                                    .z = z.d,
                                    .o = o,
                                    .rstd = rstd,
                                    .grad_o = go.d,
                                    .grad_y = gy,
                                    .grad_z = gz,
                                    .grad_w = gw };
    ssm_ref_norm_forward(&n);
    ssm_ref_norm_backward(&n);
    CHECK_DIFFERENCES(norm_loss(&n), w.d, d_inner, gw, "w");
    CHECK_DIFFERENCES(norm_loss(&n), y.d, T * d_inner, gy, "y");
    CHECK_DIFFERENCES(norm_loss(&n), z.d, T * d_inner, gz, "z");
    tensor_free(&w);
    tensor_free(&y);
    tensor_free(&z);
    tensor_free(&go);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ssm_ref");
    TCase *c = tcase_create("gradient");

    tcase_add_loop_test(c, scan_backward_is_the_derivative, 0, 3);
    tcase_add_test(c, scan_clamp_is_active);
    tcase_add_loop_test(c, conv_backward_is_the_derivative, 0, 3);
    tcase_add_loop_test(c, norm_backward_is_the_derivative, 0, 2);
    suite_add_tcase(s, c);
    return run_suite(s);
}
