/* tests/emu/test_rope_cuda.c: the rotation on the device against fp64 and the CPU. */
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention/rope.h"
#include "core/base/rng.h"
#include "tests/emu/gpu_case.h"
#include "tests/ref/attention_ref.h"

struct shape {
    int64_t n_tokens, n_heads, n_kv_heads, d_head, rope_dims, pad; // pad: of a row
};

/* vectors of 16 bytes and single elements; halves that end inside a vector; odd strides */
static const struct shape shapes[] = {
    { 1, 1, 1, 8, 8, 8 },      { 5, 2, 1, 8, 2, 8 },     { 9, 4, 2, 40, 40, 8 },
    { 17, 3, 1, 80, 20, 8 },   { 7, 4, 4, 64, 64, 0 },   { 11, 4, 1, 128, 64, 8 },
    { 13, 2, 2, 128, 128, 3 }, { 3, 1, 1, 256, 256, 8 }, { 4, 2, 1, 16, 0, 8 },
    { 67, 4, 2, 32, 16, 8 },
};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0], N_POSITIONS = 300 };
static const enum ht_dtype dtypes[] = { HT_DTYPE_F32, HT_DTYPE_BF16 };

struct rope_case {
    struct ht_backend cpu, gpu;
    struct ht_rope_args args, device; // the same problem on host and device
    int64_t row, n;                   // used width; allocated elements
    double *before, *want;            // (n_tokens, row)
    float *tables, *got;              // got: (n)
    int32_t *pos;
};

static void rope_case_make(struct rope_case *c, const struct shape *s, enum ht_dtype dtype)
{
    const int64_t half = s->rope_dims / 2, row = (s->n_heads + 2 * s->n_kv_heads) * s->d_head;
    const int64_t stride = row + s->pad, n = s->n_tokens * stride;
    *c = (struct rope_case){ .row = row, .n = n };
    c->tables = calloc((size_t)(2 * N_POSITIONS * half + 1), sizeof(float));
    c->pos = calloc((size_t)s->n_tokens, sizeof(int32_t));
    c->before = calloc((size_t)(s->n_tokens * row), sizeof(double));
    c->want = calloc((size_t)(s->n_tokens * row), sizeof(double));
    c->got = calloc((size_t)n, sizeof(float));
    void *qkv = calloc((size_t)n, ht_dtype_bytes(dtype));
    for (int64_t i = 0; i < n; i++) ht_store_f32(qkv, i, dtype, ht_rng_normal(11, 1, (uint64_t)i));
    for (int64_t i = 0; i < s->n_tokens * row; i++)
        c->want[i] = c->before[i] = (double)ht_load_f32(qkv, i / row * stride + i % row, dtype);
    for (int64_t t = 0; t < s->n_tokens; t++)
        c->pos[t] = (int32_t)(ht_rng_u64(11, 2, (uint64_t)t) % N_POSITIONS);
    c->pos[0] = N_POSITIONS - 1;
    ht_rope_table(c->tables, c->tables + N_POSITIONS * half, N_POSITIONS, s->rope_dims, 1e4, NULL);
    c->args = (struct ht_rope_args){ s->n_tokens,
                                     s->n_heads,
                                     s->n_kv_heads,
                                     s->d_head,
                                     s->rope_dims,
                                     dtype,
                                     qkv,
                                     stride,
                                     c->pos,
                                     c->tables,
                                     c->tables + N_POSITIONS * half,
                                     N_POSITIONS,
                                     false };
    const struct rope_ref r = { s->n_tokens, s->n_heads + s->n_kv_heads,
                                s->d_head,   s->rope_dims,
                                row,         1e4,
                                0.0,         1.0,
                                4.0,         8192.0,
                                1.0 };
    rope_ref(&r, c->want, c->pos);
    gpu_ok(ht_backend_create_cpu(&c->cpu, 1, 0));
    gpu_start(&c->gpu, 1024);
    c->device = c->args;
    c->device.qkv = gpu_put(&c->gpu, qkv, (size_t)n * ht_dtype_bytes(dtype));
    c->device.pos = gpu_put(&c->gpu, c->pos, (size_t)s->n_tokens * sizeof(int32_t));
    c->device.cos_table =
        gpu_put(&c->gpu, c->args.cos_table, (size_t)(N_POSITIONS * half + 1) * sizeof(float));
    c->device.sin_table =
        gpu_put(&c->gpu, c->args.sin_table, (size_t)(N_POSITIONS * half + 1) * sizeof(float));
}

static void rope_case_free(struct rope_case *c)
{
    gpu_end(&c->gpu);
    ht_backend_free(&c->cpu);
    free(c->args.qkv);
    free(c->tables);
    free(c->pos);
    free(c->before);
    free(c->want);
    free(c->got);
}

static void rope_case_run(struct rope_case *c)
{
    gpu_ok(ht_rope_apply(&c->gpu, &c->device));
    gpu_get_as(&c->gpu, c->args.dtype, c->got, c->device.qkv, c->n);
}

/* One step of the dtype at the size of the largest values, 5. */
static double step_of(enum ht_dtype dtype)
{
    return dtype == HT_DTYPE_F32 ? 4.0 * 5.0 * (double)FLT_EPSILON : 5.0 / 256.0;
}

START_TEST(matches_reference_and_cpu)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct rope_case c;
        rope_case_make(&c, &shapes[_i], dtypes[dtype]);
        rope_case_run(&c);
        gpu_ok(ht_rope_apply(&c.cpu, &c.args));
        const double tol = step_of(dtypes[dtype]);
        const int64_t rotated = (c.args.n_heads + c.args.n_kv_heads) * c.args.d_head;
        for (int64_t i = 0; i < c.n; i++) {
            const int64_t token = i / c.args.qkv_stride, column = i % c.args.qkv_stride;
            const float cpu = ht_load_f32(c.args.qkv, i, dtypes[dtype]);
            ck_assert_double_eq_tol((double)c.got[i], (double)cpu, tol);
            if (column < c.row)
                ck_assert_double_eq_tol((double)c.got[i], c.want[token * c.row + column], tol);
            // v, the dims behind rope_dims and the guards keep their bits
            if (column >= rotated || column % c.args.d_head >= c.args.rope_dims)
                ck_assert(c.got[i] == cpu);
        }
        rope_case_free(&c);
    }
}
END_TEST

START_TEST(inverse_undoes_the_rotation)
{
    for (int dtype = 0; dtype < 2; dtype++) {
        struct rope_case c;
        rope_case_make(&c, &shapes[_i], dtypes[dtype]);
        gpu_ok(ht_rope_apply(&c.gpu, &c.device));
        c.device.inverse = true;
        rope_case_run(&c);
        for (int64_t i = 0; i < c.args.n_tokens * c.row; i++)
            ck_assert_double_eq_tol((double)c.got[i / c.row * c.args.qkv_stride + i % c.row],
                                    c.before[i], 2.0 * step_of(dtypes[dtype]));
        rope_case_free(&c);
    }
}
END_TEST

/* It cannot be refused without waiting for the device; it must not read outside of the table. */
START_TEST(position_outside_the_table_gives_nan)
{
    const struct shape s = { 4, 2, 1, 16, 16, 8 };
    struct rope_case c;
    rope_case_make(&c, &s, HT_DTYPE_F32);
    const int32_t bad[] = { 3, N_POSITIONS, -1, 5 };
    c.device.pos = gpu_put(&c.gpu, bad, sizeof bad);
    rope_case_run(&c);
    for (int64_t t = 0; t < 4; t++)
        for (int64_t i = 0; i < c.row; i++)
            ck_assert(isnan(c.got[t * c.args.qkv_stride + i]) ==
                      ((t == 1 || t == 2) && i < 3 * s.d_head));
    rope_case_free(&c);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("rope_cuda");
    TCase *all = tcase_create("rope");
    tcase_add_loop_test(all, matches_reference_and_cpu, 0, N_SHAPES);
    tcase_add_loop_test(all, inverse_undoes_the_rotation, 0, N_SHAPES);
    tcase_add_test(all, position_outside_the_table_gives_nan);
    suite_add_tcase(s, all);
    return gpu_run_suite(s);
}
