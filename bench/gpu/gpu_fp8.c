/* bench/gpu/gpu_fp8.c: the product of gate and up in fp8, and what rounding its matrices takes
 * (gpu_ops.h). Tokens are cut to a multiple of 16. */
#include "bench/gpu/gpu_ops.h"
#include "core/ops/gemm_fp8.h"

/* Where copies stand, in memory of operations that are not under way: codes of x, of the weight and
 * of grad_y in both orders, and their scales. */
static uint8_t *x_codes(struct bench_world *w)
{
    return w->act[1];
}
static uint8_t *w_codes(struct bench_world *w)
{
    return (uint8_t *)w->flat[1];
}

static int64_t tokens(const struct bench_world *w)
{
    return w->n_tokens / HT_FP8_UNIT * HT_FP8_UNIT;
}

static enum ht_status round_x(struct bench_world *w)
{
    return ht_fp8_quantise(&w->be, &(struct ht_fp8_quantise_args){ .rows = tokens(w),
                                                                   .cols = D_MODEL,
                                                                   .x = w->act[0],
                                                                   .codes = x_codes(w),
                                                                   .scale = w->rstd });
}

static enum ht_status round_weight(struct bench_world *w)
{
    return ht_fp8_quantise(
        &w->be, &(struct ht_fp8_quantise_args){ .rows = 2 * D_FF,
                                                .cols = D_MODEL,
                                                .x = w->weight,
                                                .codes = w_codes(w),
                                                .codes_t = w_codes(w) + 2L * D_FF * D_MODEL,
                                                .scale = w->rstd + 1 });
}

static enum ht_status round_grad(struct bench_world *w)
{
    uint8_t *codes = w->wide[1];

    return ht_fp8_quantise(&w->be,
                           &(struct ht_fp8_quantise_args){ .rows = tokens(w),
                                                           .cols = 2 * D_FF,
                                                           .format = HT_FP8_E5M2,
                                                           .x = w->wide[0],
                                                           .codes = codes,
                                                           .codes_t = codes + tokens(w) * 2 * D_FF,
                                                           .scale = w->rstd + 2 });
}

static enum ht_status product(struct bench_world *w, bool fast)
{
    return ht_gemm_fp8(&w->be, &(struct ht_gemm_fp8_args){ .m = tokens(w),
                                                           .n = 2 * D_FF,
                                                           .k = D_MODEL,
                                                           .a = x_codes(w),
                                                           .b = w_codes(w),
                                                           .scale_a = w->rstd,
                                                           .scale_b = w->rstd + 1,
                                                           .c_dtype = HT_DTYPE_BF16,
                                                           .c = w->wide[0],
                                                           .fast = fast });
}
static enum ht_status product_fast(struct bench_world *w)
{
    return product(w, true);
}
static enum ht_status product_exact(struct bench_world *w)
{
    return product(w, false);
}
static enum ht_status forward(struct bench_world *w)
{
    const enum ht_status st = round_x(w);
    return st == HT_OK ? product(w, true) : st;
}

static double x_bytes(double t)
{
    return 3.0 * D_MODEL * t;
}
static double weight_bytes(double t)
{
    (void)t;
    return 8.0 * D_FF * D_MODEL;
}
static double grad_bytes(double t)
{
    return 8.0 * D_FF * t;
}
static double product_bytes(double t)
{
    return D_MODEL * t + 2.0 * D_FF * D_MODEL + 4.0 * D_FF * t;
}
static double forward_bytes(double t)
{
    return product_bytes(t) + D_MODEL * t;
}
static double flops(double t)
{
    return 4.0 * D_FF * D_MODEL * t;
}

const struct bench_op bench_fp8_ops[] = {
    { "fp8: x to one order", "fp8_most_kernel,fp8_quantise_kernel", round_x, x_bytes, NULL },
    { "fp8: gate_up weight to both orders", "fp8_quantise_weight", round_weight, weight_bytes,
      NULL },
    { "fp8: gate_up gradient to both orders", "fp8_quantise_grad", round_grad, grad_bytes, NULL },
    { "fp8: gemm gate_up, fast sums", "cublaslt_fp8_gate_up", product_fast, product_bytes, flops },
    { "fp8: gemm gate_up, fp32 sums", "cublaslt_fp8_gate_up_exact", product_exact, product_bytes,
      flops },
    { "fp8: gate_up, x rounded and multiplied", "fp8_gate_up", forward, forward_bytes, flops },
};
const int n_bench_fp8_ops = sizeof bench_fp8_ops / sizeof *bench_fp8_ops;
