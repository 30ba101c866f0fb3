/* tests/emu/test_flash_cuda.c: flash attention on the device against fp64 and the CPU. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/cuda_device.h"
#include "core/base/rng.h"
#include "tests/attention/attention_case.h"
#include "tests/emu/gpu_case.h"

/* heads, kv heads, d_head, lengths: one token, ragged, each compiled width and padded ones, several
 * tiles of queries and keys, every ratio of heads, more sequences than one */
static const struct attention_shape shapes[] = {
    { 1, 1, 8, { 1 } },       { 2, 1, 16, { 7 } },          { 3, 3, 24, { 1, 2, 65, 8 } },
    { 4, 2, 32, { 33, 97 } }, { 2, 2, 64, { 193 } },        { 4, 1, 64, { 130, 1 } },
    { 2, 1, 80, { 71, 5 } },  { 2, 1, 128, { 140 } },       { 4, 2, 128, { 64, 63, 3 } },
    { 3, 1, 72, { 128 } },    { 1, 1, 256, { 70 } },        { 2, 1, 136, { 17, 40 } },
    { 1, 1, 16, { 260 } },    { 2, 1, 8, { 1, 1, 1, 66 } },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct device_case {
    struct attention_case c; // host arrays, references, CPU backend
    struct ht_backend be;
    struct ht_flash_args args; // arrays on the device
};

static void device_case_make(struct device_case *k, const struct attention_shape *s,
                             enum ht_dtype dtype, uint64_t seed, bool backward)
{
    attention_case_make(&k->c, s, dtype, ht_isa_best(), 1, seed, backward);
    const struct ht_flash_args *a = &k->c.args;
    gpu_start(&k->be, ht_flash_scratch_bytes(a, 1));
    k->args = *a;
    k->args.seqs.starts = gpu_put(&k->be, a->seqs.starts, (size_t)(k->c.n_seqs + 1) * 4);
    k->args.qkv = gpu_put(&k->be, a->qkv, k->c.qkv_bytes);
    k->args.o = gpu_new(&k->be, k->c.o_bytes);
    k->args.lse = gpu_new(&k->be, (size_t)(k->c.n_tokens * a->n_heads) * 4);
    k->args.grad_o = gpu_put(&k->be, a->grad_o, k->c.o_bytes);
    k->args.grad_qkv = gpu_put(&k->be, a->grad_qkv, k->c.qkv_bytes); // for its guards
}

static void device_case_free(struct device_case *k)
{
    gpu_end(&k->be);
    attention_case_free(&k->c);
}

/* Results replace what the CPU had left in the host arrays. */
static void device_forward(struct device_case *k)
{
    gpu_ok(ht_flash_forward(&k->be, &k->args));
    ck_assert_uint_eq(k->be.scratch.used_bytes, 0);
    gpu_get(&k->be, k->c.args.o, k->args.o, k->c.o_bytes);
    gpu_get(&k->be, k->c.args.lse, k->args.lse, (size_t)(k->c.n_tokens * k->args.n_heads) * 4);
}

static void device_backward(struct device_case *k)
{
    gpu_ok(ht_flash_backward(&k->be, &k->args));
    ck_assert_uint_eq(k->be.scratch.used_bytes, 0);
    gpu_get(&k->be, k->c.args.grad_qkv, k->args.grad_qkv, k->c.qkv_bytes);
}

/* 3 x tf32 and the tensor cores' sums, which may cut where the CPU rounds. */
static const double fp32_steps = 24.0;

START_TEST(forward_matches_reference_and_cpu)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct device_case k;
        device_case_make(&k, &shapes[_i], dtypes[dtype], 1, false);
        const int64_t n = k.c.n_tokens * k.args.n_heads, n_o = n * k.args.d_head;
        const double tol =
            attention_case_tolerance(&k.c, k.c.ref.o, k.c.plain16.o, n_o, fp32_steps);
        double *cpu = malloc((size_t)n_o * sizeof *cpu);
        attention_case_forward(&k.c);
        for (int64_t i = 0; i < n_o; i++)
            cpu[i] = (double)ht_load_f32(k.c.args.o, i, dtypes[dtype]);
        device_forward(&k);
        const double e = attention_case_o_error(&k.c, k.c.args.o, k.c.ref.o);
        const double from_cpu = attention_case_o_error(&k.c, k.c.args.o, cpu);
        ck_assert_msg(e <= tol, "shape %d, %s: error %g, allowed %g", _i,
                      ht_dtype_name(dtypes[dtype]), e, tol);
        ck_assert_msg(from_cpu <= 2.0 * tol, "shape %d, %s: %g from the CPU, allowed %g", _i,
                      ht_dtype_name(dtypes[dtype]), from_cpu, 2.0 * tol);
        for (int64_t i = 0; i < n; i++)
            ck_assert_double_eq_tol((double)k.c.args.lse[i], k.c.ref.lse[i], 8e-6);
        free(cpu);
        device_case_free(&k);
    }
}
END_TEST

/* The kernel of flash_fwd_sm90.cu: on a device of architecture 9.0, and on the emulated one, which
 * says that it is one. */
START_TEST(hopper_forward_matches_reference)
{
    static const struct attention_shape several[] = {
        { 1, 1, 128, { 1 } },   { 2, 1, 128, { 140 } },          { 4, 2, 128, { 64, 63, 3 } },
        { 1, 1, 128, { 700 } }, { 3, 3, 128, { 129, 257, 40 } },
    };
    struct device_case k;
    device_case_make(&k, &several[_i], HT_DTYPE_BF16, 12, false);
#ifdef HT_CUDA_EMU
    ht_cuda_device_of(&k.be)->arch = 90;
#endif
    if (ht_cuda_device_of(&k.be)->arch == 90) {
        const int64_t n = k.c.n_tokens * k.args.n_heads;
        ck_assert_int_eq(setenv("HT_FLASH_SM90", "1", 1), 0);
        device_forward(&k);
        ck_assert_int_eq(unsetenv("HT_FLASH_SM90"), 0);
        const double e = attention_case_o_error(&k.c, k.c.args.o, k.c.ref.o);
        const double tol =
            attention_case_tolerance(&k.c, k.c.ref.o, k.c.plain16.o, n * k.args.d_head, 0.0);
        ck_assert_msg(e <= tol, "shape %d: error %g, allowed %g", _i, e, tol);
        for (int64_t i = 0; i < n; i++)
            ck_assert_double_eq_tol((double)k.c.args.lse[i], k.c.ref.lse[i], 8e-6);
    }
    device_case_free(&k);
}
END_TEST

START_TEST(backward_matches_reference_and_cpu)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct device_case k;
        device_case_make(&k, &shapes[_i], dtypes[dtype], 2, true);
        const int64_t n = k.c.n_tokens * k.c.width, stride = k.args.grad_qkv_stride;
        const double tol = attention_case_tolerance(&k.c, k.c.ref.grad_qkv, k.c.plain16.grad_qkv, n,
                                                    2.0 * fp32_steps);
        double *cpu = malloc((size_t)n * sizeof *cpu);
        attention_case_forward(&k.c);
        attention_case_backward(&k.c);
        for (int64_t i = 0; i < n; i++)
            cpu[i] = (double)ht_load_f32(k.c.args.grad_qkv, i / k.c.width * stride + i % k.c.width,
                                         dtypes[dtype]);
        device_forward(&k);
        device_backward(&k);
        const double e = attention_case_qkv_error(&k.c, k.c.args.grad_qkv, k.c.ref.grad_qkv);
        const double from_cpu = attention_case_qkv_error(&k.c, k.c.args.grad_qkv, cpu);
        ck_assert_msg(e <= tol, "shape %d, %s: error %g, allowed %g", _i,
                      ht_dtype_name(dtypes[dtype]), e, tol);
        ck_assert_msg(from_cpu <= 2.0 * tol, "shape %d, %s: %g from the CPU, allowed %g", _i,
                      ht_dtype_name(dtypes[dtype]), from_cpu, 2.0 * tol);
        for (int64_t t = 0; t < k.c.n_tokens; t++) // nothing outside the rows' width is written
            for (int64_t i = 0; i < k.c.pad; i++)
                ck_assert(ht_load_f32(k.c.args.grad_qkv, t * stride + k.c.width + i,
                                      dtypes[dtype]) == 42.0f);
        free(cpu);
        device_case_free(&k);
    }
}
END_TEST

/* Scores of up to 2^19, exact in fp32: equal ones share the weight, all others get none. */
START_TEST(large_scores_do_not_overflow)
{
    const struct attention_shape s = { 2, 1, 64, { 150 } };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct device_case k;
        device_case_make(&k, &s, dtypes[dtype], 3, true);
        struct attention_case *c = &k.c;
        double *qkv64 = (double *)c->ref.qkv;
        for (int64_t i = 0; i < c->n_tokens * c->width; i++) {
            const int64_t at = i / c->width * c->args.qkv_stride + i % c->width;
            const bool is_v = i % c->width >= 3 * s.d_head;
            const float x = floorf(ht_rng_uniform(4, 1, (uint64_t)i) * 7.0f) - 3.0f;
            ht_store_f32((void *)c->args.qkv, at, dtypes[dtype], is_v ? x : 32.0f * x);
            qkv64[i] = (double)(is_v ? x : 32.0f * x);
        }
        gpu_ok(ht_backend_upload(&k.be, (void *)k.args.qkv, c->args.qkv, c->qkv_bytes));
        attention_ref_forward(&c->ref);
        attention_ref_backward(&c->ref);
        device_forward(&k);
        device_backward(&k);
        // lse is about 1e5, where an fp32 step is 0.008: P, and with it the gradients, are only as
        // exact as that step
        const double o_max = attention_case_max(c->ref.o, c->n_tokens * s.n_heads * s.d_head);
        ck_assert_double_le(attention_case_o_error(c, c->args.o, c->ref.o),
                            dtype == 0 ? 2e-6 : o_max / 256.0);
        for (int64_t i = 0; i < c->n_tokens * s.n_heads; i++)
            ck_assert_double_eq_tol((double)c->args.lse[i], c->ref.lse[i],
                                    2e-7 * fabs(c->ref.lse[i]) + 1e-6);
        const double g_max = attention_case_max(c->ref.grad_qkv, c->n_tokens * c->width);
        ck_assert_double_le(attention_case_qkv_error(c, c->args.grad_qkv, c->ref.grad_qkv),
                            g_max * 0.02);
        device_case_free(&k);
    }
}
END_TEST

/* Packed sequences give the bits of each sequence run alone; more sequences than a warp has lanes.
 */
START_TEST(sequences_are_independent)
{
    enum { N = 37, MOST = 70, NH = 2, NKV = 1, D = 40, WIDTH = (NH + 2 * NKV) * D };
    for (int dtype = 0; dtype < 2; dtype++) {
        const enum ht_dtype type = dtypes[dtype];
        const size_t element = ht_dtype_bytes(type), row = WIDTH * element;
        int32_t starts[N + 1] = { 0 };
        struct ht_backend be;
        for (int i = 0; i < N; i++) starts[i + 1] = starts[i] + (i == 34 ? MOST : 1 + i % 4);
        const size_t n = (size_t)starts[N], o_row = NH * D * element;
        void *qkv = calloc(n, row), *grad_o = calloc(n, o_row);
        char *o = calloc(n, o_row), *grad = calloc(n, row), *o1 = calloc(n, o_row),
             *grad1 = calloc(n, row);
        for (size_t i = 0; i < n * WIDTH; i++)
            ht_store_f32(qkv, (int64_t)i, type, ht_rng_normal(5, 1, i));
        for (size_t i = 0; i < n * NH * D; i++)
            ht_store_f32(grad_o, (int64_t)i, type, ht_rng_normal(5, 2, i));
        struct ht_flash_args a = { .seqs = { N, starts },
                                   .n_tokens = (int64_t)n,
                                   .n_heads = NH,
                                   .n_kv_heads = NKV,
                                   .d_head = D,
                                   .dtype = type,
                                   .scale = 0.2f,
                                   .qkv_stride = WIDTH,
                                   .grad_qkv_stride = WIDTH };
        gpu_start(&be, ht_flash_scratch_bytes(&a, 1));
        const char *qkv_d = gpu_put(&be, qkv, n * row), *grad_o_d = gpu_put(&be, grad_o, n * o_row);
        a.seqs.starts = gpu_put(&be, starts, sizeof starts);
        a.qkv = qkv_d, a.grad_o = grad_o_d;
        a.o = gpu_new(&be, n * o_row), a.grad_qkv = gpu_new(&be, n * row);
        a.lse = gpu_new(&be, n * NH * 4);
        gpu_ok(ht_flash_forward(&be, &a));
        gpu_ok(ht_flash_backward(&be, &a));
        gpu_get(&be, o, a.o, n * o_row);
        gpu_get(&be, grad, a.grad_qkv, n * row);
        for (int seq = 0; seq < N; seq += seq == 0 || seq == 33 ? 1 : 11) { // 0 1 12 23 34
            const size_t first = (size_t)starts[seq], rows = (size_t)(starts[seq + 1]) - first;
            const int32_t alone[] = { 0, (int32_t)rows };
            a.seqs = (struct ht_seqs){ 1, gpu_put(&be, alone, sizeof alone) };
            a.n_tokens = (int64_t)rows;
            a.qkv = qkv_d + first * row;
            a.grad_o = grad_o_d + first * o_row;
            gpu_ok(ht_flash_forward(&be, &a));
            gpu_ok(ht_flash_backward(&be, &a));
            gpu_get(&be, o1, a.o, rows * o_row);
            gpu_get(&be, grad1, a.grad_qkv, rows * row);
            ck_assert_mem_eq(o1, o + first * o_row, rows * o_row);
            ck_assert_mem_eq(grad1, grad + first * row, rows * row);
        }
        gpu_end(&be);
        free(qkv);
        free(grad_o);
        free(o);
        free(grad);
        free(o1);
        free(grad1);
    }
}
END_TEST

/* Rows before a changed token keep their bits: nothing looks ahead. */
START_TEST(output_ignores_the_future)
{
    const struct attention_shape s = { 2, 1, 32, { 150 } };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct device_case k;
        device_case_make(&k, &s, dtypes[dtype], 6, false);
        struct attention_case *c = &k.c;
        device_forward(&k);
        const int64_t changed = 77, row = s.n_heads * s.d_head;
        const size_t kept = (size_t)(changed * row) * ht_dtype_bytes(dtypes[dtype]);
        void *before = malloc(c->o_bytes);
        memcpy(before, c->args.o, c->o_bytes);
        for (int64_t i = 0; i < c->width; i++)
            ht_store_f32((void *)c->args.qkv, changed * c->args.qkv_stride + i, dtypes[dtype],
                         9.0f);
        gpu_ok(ht_backend_upload(&k.be, (void *)k.args.qkv, c->args.qkv, c->qkv_bytes));
        device_forward(&k);
        ck_assert_mem_eq(before, c->args.o, kept);
        ck_assert_mem_ne((char *)before + kept, (char *)c->args.o + kept, c->o_bytes - kept);
        free(before);
        device_case_free(&k);
    }
}
END_TEST

START_TEST(nan_is_not_hidden)
{
    const struct attention_shape s = { 1, 1, 16, { 20 } };
    for (int dtype = 0; dtype < 2; dtype++) {
        struct device_case k;
        device_case_make(&k, &s, dtypes[dtype], 8, false);
        struct attention_case *c = &k.c;
        ht_store_f32((void *)c->args.qkv, 12 * c->args.qkv_stride + 16, dtypes[dtype], NAN); // key
        gpu_ok(ht_backend_upload(&k.be, (void *)k.args.qkv, c->args.qkv, c->qkv_bytes));
        device_forward(&k);
        ck_assert(!isnan(ht_load_f32(c->args.o, 11 * 16, dtypes[dtype])));
        for (int64_t t = 12; t < 20; t++)
            ck_assert(isnan(ht_load_f32(c->args.o, t * 16, dtypes[dtype])));
        device_case_free(&k);
    }
}
END_TEST

START_TEST(lse_is_optional_in_forward)
{
    const struct attention_shape s = { 2, 1, 16, { 20 } };
    struct device_case k;
    device_case_make(&k, &s, HT_DTYPE_F32, 11, false);
    k.args.lse = NULL;
    gpu_ok(ht_flash_forward(&k.be, &k.args));
    gpu_get(&k.be, k.c.args.o, k.args.o, k.c.o_bytes);
    ck_assert_double_le(attention_case_o_error(&k.c, k.c.args.o, k.c.ref.o), 8e-6);
    device_case_free(&k);
}
END_TEST

static void refuse(struct device_case *k, const struct ht_flash_args *a, bool backward,
                   enum ht_status want, const char *text)
{
    const enum ht_status st = backward ? ht_flash_backward(&k->be, a) : ht_flash_forward(&k->be, a);
    ck_assert_int_eq(st, want);
    ck_assert_msg(strstr(ht_error_message(), text) != NULL, "'%s' lacks '%s'", ht_error_message(),
                  text);
}

START_TEST(bad_arguments_are_refused)
{
    const struct attention_shape s = { 4, 2, 16, { 5, 4 } };
    struct device_case k;
    device_case_make(&k, &s, HT_DTYPE_BF16, 9, false);
    for (int backward = 0; backward < 2; backward++) {
        struct ht_flash_args a = k.args;
        a.n_kv_heads = 3;
        refuse(&k, &a, backward, HT_ERR_ARG, "4 heads over 3 kv heads");
        a = k.args, a.dtype = HT_DTYPE_F16;
        refuse(&k, &a, backward, HT_ERR_UNSUPPORTED, "fp16");
        a = k.args, a.seqs.n_seqs = 10;
        refuse(&k, &a, backward, HT_ERR_ARG, "10 sequences do not cover rows 0 to 9");
        a = k.args, a.qkv_stride = 132;
        refuse(&k, &a, backward, HT_ERR_ARG,
               "264 bytes apart; on CUDA both must be multiples of 16");
        a = k.args, a.o = (char *)a.o + 2;
        refuse(&k, &a, backward, HT_ERR_ARG, "o at");
    }
    struct ht_flash_args a = k.args;
    a.grad_qkv_stride = 132;
    refuse(&k, &a, true, HT_ERR_ARG, "grad_qkv at");
    ht_backend_free(&k.be); // and with too little scratch
    gpu_start(&k.be, 64);
    refuse(&k, &k.args, true, HT_ERR_MEMORY, "scratch");
    ck_assert_uint_eq(k.be.scratch.used_bytes, 0);
    device_case_free(&k);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("flash_cuda");
    TCase *reference = tcase_create("reference"), *property = tcase_create("property"),
          *refusal = tcase_create("refusal");
    tcase_add_loop_test(reference, forward_matches_reference_and_cpu, 0, N_SHAPES);
    tcase_add_loop_test(reference, hopper_forward_matches_reference, 0, 5);
    tcase_add_loop_test(reference, backward_matches_reference_and_cpu, 0, N_SHAPES);
    tcase_add_test(reference, large_scores_do_not_overflow);
    tcase_add_test(property, sequences_are_independent);
    tcase_add_test(property, output_ignores_the_future);
    tcase_add_test(property, nan_is_not_hidden);
    tcase_add_test(property, lse_is_optional_in_forward);
    tcase_add_test(refusal, bad_arguments_are_refused);
    suite_add_tcase(s, reference);
    suite_add_tcase(s, property);
    suite_add_tcase(s, refusal);
    return gpu_run_suite(s);
}
