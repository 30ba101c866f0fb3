/* tests/ssm/test_ssm_ops.c: the table has no empty cell, and bad arguments are refused with their
 * value. */
#include <math.h>
#include <string.h>

#include "tests/ssm/scan_case.h"

START_TEST(no_cell_is_empty)
{
    const struct ht_ssm_ops *ops = ht_ssm_ops_get(HT_BACKEND_CPU);

    ck_assert_ptr_nonnull(ops);
    for (int i = 0; i < HT_ISA_COUNT; i++) {
        ck_assert(ops->conv1d_forward[i] && ops->conv1d_backward[i]);
        ck_assert(ops->ssd_forward[i] && ops->ssd_backward[i] && ops->ssd_step[i]);
        ck_assert(ops->gated_norm_forward[i] && ops->gated_norm_backward[i]);
    }
    ck_assert_ptr_null(ht_ssm_ops_get(HT_BACKEND_COUNT));
}
END_TEST

static void refused(enum ht_status st, enum ht_status want, const char *part)
{
    ck_assert_int_eq(st, want);
    ck_assert_msg(strstr(ht_error_message(), part), "\"%s\" does not name \"%s\"",
                  ht_error_message(), part);
}

/* Sets one field of the args, expects refusal of forward and backward, and puts it back. */
#define REFUSE(field, value, status, part)                                                         \
    do {                                                                                           \
        struct ht_ssd_args a_ = k.args;                                                            \
        a_.field = (value);                                                                        \
        refused(ht_ssd_forward(&be, &a_), status, part);                                           \
        refused(ht_ssd_backward(&be, &a_), status, part);                                          \
    } while (0)

START_TEST(scan_refuses)
{
    static const int32_t empty[] = { 0, 3, 3, 5 }, late[] = { 1, 3, 4, 5 }, cut[] = { 0, 1, 2, 4 };
    const struct scan_shape shape = { { 2, 1, 2 }, 4, 16, 16, 2, 16 };
    struct scan_case k = scan_case_make(&shape, SCAN_PLAIN, HT_DTYPE_F32, 1);
    struct ht_backend be = backend_make(ht_isa_best(), 1, 64);

    k.args.seqs.starts = k.starts;
    REFUSE(chunk, 100, HT_ERR_ARG, "chunk is 100");
    REFUSE(chunk, 8, HT_ERR_ARG, "chunk is 8");
    REFUSE(chunk, 512, HT_ERR_ARG, "chunk is 512");
    REFUSE(d_head, 12, HT_ERR_ARG, "d_head is 12");
    REFUSE(d_head, 264, HT_ERR_ARG, "d_head is 264");
    REFUSE(d_state, 0, HT_ERR_ARG, "d_state is 0");
    REFUSE(d_state, 260, HT_ERR_ARG, "d_state is 260");
    REFUSE(n_groups, 3, HT_ERR_ARG, "n_groups is 3");
    REFUSE(n_groups, 0, HT_ERR_ARG, "n_groups is 0");
    REFUSE(dt_min, -1.0f, HT_ERR_ARG, "[-1, inf]");
    REFUSE(dt_max, NAN, HT_ERR_ARG, "nan");
    REFUSE(x_stride, 63, HT_ERR_ARG, "x_stride is 63");
    REFUSE(dt_stride, 3, HT_ERR_ARG, "dt_stride is 3");
    REFUSE(x, NULL, HT_ERR_ARG, "x is NULL");
    REFUSE(A_log, NULL, HT_ERR_ARG, "A_log is NULL");
    REFUSE(seqs.starts, empty, HT_ERR_ARG, "sequence 1 is rows 3 to 3");
    REFUSE(seqs.starts, late, HT_ERR_ARG, "rows 1 to 5");
    REFUSE(seqs.starts, cut, HT_ERR_ARG, "rows 0 to 4");
    REFUSE(seqs.n_seqs, 0, HT_ERR_ARG, "n_seqs is 0");
    REFUSE(dtype, HT_DTYPE_F16, HT_ERR_UNSUPPORTED, "dtype");
    be.kind = HT_BACKEND_CUDA;
    if (!ht_ssm_ops_get(HT_BACKEND_CUDA)) REFUSE(chunk, 16, HT_ERR_UNSUPPORTED, "backend");
    be.kind = HT_BACKEND_CPU;
    struct ht_ssd_args a = k.args;
    a.grad_B = NULL;
    refused(ht_ssd_backward(&be, &a), HT_ERR_ARG, "grad_B is NULL");
    a = k.args;
    a.y_stride = 63;
    refused(ht_ssd_forward(&be, &a), HT_ERR_ARG, "y_stride is 63");
    const int32_t slot[5] = { 0, 1, -2, 3, 4 };
    refused(ht_ssd_step(&be, &k.args, &(struct ht_ssm_states){ .p = k.init.p }, slot), HT_ERR_ARG,
            "slot[2] is -2");
    refused(ht_ssd_step(&be, &k.args, &(struct ht_ssm_states){ .p = NULL }, NULL), HT_ERR_ARG,
            "state is NULL");
    // nothing was written
    for (int64_t i = 0; i < k.y.n; i++) ck_assert_double_le(fabs(tensor_at(&k.y, i)), 1e-12);
    ht_backend_free(&be);
    scan_case_free(&k);
}
END_TEST

START_TEST(convolution_refuses)
{
    static const int32_t starts[] = { 0, 4 };
    float x[4 * 16], y[4 * 16], w[16 * 4], g[16 * 4], gy[4 * 16];
    struct ht_backend be = backend_make(ht_isa_best(), 1, 64);
    const struct ht_conv1d_args good = { .seqs = { 1, starts },
                                         .n_tokens = 4,
                                         .n_channels = 16,
                                         .d_conv = 4,
                                         .dtype = HT_DTYPE_F32,
                                         .x = x,
                                         .x_stride = 16,
                                         .w = w,
                                         .y = y,
                                         .y_stride = 16,
                                         .grad_y = gy,
                                         .grad_y_stride = 16,
                                         .grad_x = y,
                                         .grad_x_stride = 16,
                                         .grad_w = g };
    struct ht_conv1d_args a = good;
    a.d_conv = 5;
    refused(ht_conv1d_forward(&be, &a), HT_ERR_ARG, "d_conv is 5");
    refused(ht_conv1d_backward(&be, &a), HT_ERR_ARG, "d_conv is 5");
    a = good;
    a.n_channels = 12;
    refused(ht_conv1d_forward(&be, &a), HT_ERR_ARG, "n_channels is 12");
    a = good;
    a.y = x + 8;
    refused(ht_conv1d_forward(&be, &a), HT_ERR_ARG, "overlaps");
    a = good;
    a.grad_x = x;
    refused(ht_conv1d_backward(&be, &a), HT_ERR_ARG, "overlaps");
    a.grad_x = gy;
    refused(ht_conv1d_backward(&be, &a), HT_ERR_ARG, "overlaps");
    a = good;
    a.state = g;
    refused(ht_conv1d_backward(&be, &a), HT_ERR_ARG, "state is given");
    a = good;
    a.w = NULL;
    refused(ht_conv1d_forward(&be, &a), HT_ERR_ARG, "w is NULL");
    refused(ht_conv1d_backward(&be, &good), HT_ERR_MEMORY, "scratch"); // 64 bytes are too few
    // neighbouring columns of one matrix do not overlap
    float rows[4 * 32] = { 0 };
    memset(w, 0, sizeof w);
    a = good;
    a.x = rows;
    a.y = rows + 16;
    a.x_stride = a.y_stride = 32;
    ck_assert_int_eq(ht_conv1d_forward(&be, &a), HT_OK);
    ht_backend_free(&be);
}
END_TEST

START_TEST(gated_norm_refuses)
{
    float v[64] = { 0 };
    struct ht_backend be = backend_make(ht_isa_best(), 1, 64);
    const struct ht_gated_norm_args good = { .n_tokens = 2,
                                             .d_inner = 32,
                                             .n_groups = 2,
                                             .eps = 1e-5f,
                                             .dtype = HT_DTYPE_F32,
                                             .w = v,
                                             .y = v,
                                             .z = v,
                                             .z_stride = 32,
                                             .o = v,
                                             .rstd = v };
    struct ht_gated_norm_args a = good;
    a.n_groups = 8; // groups of 4
    refused(ht_gated_norm_forward(&be, &a), HT_ERR_ARG, "n_groups is 8");
    refused(ht_gated_norm_backward(&be, &a), HT_ERR_ARG, "n_groups is 8");
    a.n_groups = 3;
    refused(ht_gated_norm_forward(&be, &a), HT_ERR_ARG, "n_groups is 3");
    a = good;
    a.eps = -1.0f;
    refused(ht_gated_norm_forward(&be, &a), HT_ERR_ARG, "eps is -1");
    a = good;
    a.z_stride = 31;
    refused(ht_gated_norm_forward(&be, &a), HT_ERR_ARG, "z_stride is 31");
    refused(ht_gated_norm_backward(&be, &good), HT_ERR_ARG, "grad_o is NULL");
    ht_backend_free(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("ssm_ops");
    TCase *c = tcase_create("refusal");

    tcase_add_test(c, no_cell_is_empty);
    tcase_add_test(c, scan_refuses);
    tcase_add_test(c, convolution_refuses);
    tcase_add_test(c, gated_norm_refuses);
    suite_add_tcase(s, c);
    return run_suite(s);
}
