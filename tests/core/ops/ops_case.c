/* tests/core/ops/ops_case.c: see ops_case.h. */
#include "tests/core/ops/ops_case.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD = 64, FILL = 0xa5 };

struct tensor tensor_make(int64_t n, enum ht_dtype dtype)
{
    struct tensor t = { .n = n, .dtype = dtype };
    const size_t bytes = (size_t)n * ht_dtype_bytes(dtype) + 2 * GUARD;

    t.block = malloc(bytes);
    t.d = calloc((size_t)n + 1, sizeof *t.d);
    ck_assert_ptr_nonnull(t.block);
    ck_assert_ptr_nonnull(t.d);
    memset(t.block, FILL, bytes);
    t.p = t.block + GUARD;
    return t;
}

/* Nearly normal, deviation 1: the sum of four uniform 16-bit numbers from one step of splitmix64.
 * The exact normal of core/base/rng.h took most of the suites' time. */
static double nearly_normal(uint64_t seed, int64_t i)
{
    uint64_t z = (seed << 40) + (uint64_t)(i + 1) * 0x9e3779b97f4a7c15u;
    double sum = -2.0;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    for (int part = 0; part < 4; part++) sum += (double)(z >> (16 * part) & 0xffff) / 65535.0;
    return sum * 1.7320508; // the variance of four uniforms is 1/3
}

struct tensor tensor_normal(int64_t n, enum ht_dtype dtype, double sd, uint64_t seed)
{
    struct tensor t = tensor_make(n, dtype);

    for (int64_t i = 0; i < n; i++) {
        ht_store_f32(t.p, i, dtype, (float)(sd * nearly_normal(seed, i)));
        t.d[i] = tensor_at(&t, i);
    }
    return t;
}

struct tensor tensor_copy(const struct tensor *from)
{
    struct tensor t = tensor_make(from->n, from->dtype);

    memcpy(t.p, from->p, (size_t)t.n * ht_dtype_bytes(t.dtype));
    memcpy(t.d, from->d, (size_t)t.n * sizeof *t.d);
    return t;
}

void tensor_free(struct tensor *t)
{
    const size_t bytes = (size_t)t->n * ht_dtype_bytes(t->dtype);

    // assertions write to a file each: only a failure may reach one inside a loop over elements
    for (int i = 0; t->block && i < GUARD; i++) {
        if (t->block[i] != FILL) ck_abort_msg("byte %d before a tensor was written", GUARD - i);
        if (t->block[GUARD + bytes + (size_t)i] != FILL)
            ck_abort_msg("byte %d after a tensor was written", i);
    }
    free(t->block);
    free(t->d);
    *t = (struct tensor){ 0 };
}

void tensor_fill(struct tensor *t, double value)
{
    for (int64_t i = 0; i < t->n; i++) {
        ht_store_f32(t->p, i, t->dtype, (float)value);
        t->d[i] = tensor_at(t, i);
    }
}

double tensor_at(const struct tensor *t, int64_t i)
{
    return (double)ht_load_f32(t->p, i, t->dtype);
}

double max_abs(const double *d, int64_t n)
{
    double m = 0.0;
    for (int64_t i = 0; i < n; i++) m = fmax(m, fabs(d[i]));
    return m;
}

void check_close(const struct tensor *t, const double *ref, double slack, const char *what)
{
    double loss = 0.0;

    for (int64_t i = 0; t->dtype == HT_DTYPE_BF16 && i < t->n; i++)
        loss = fmax(loss, fabs((double)ht_bf16_to_f32(ht_f32_to_bf16((float)ref[i])) - ref[i]));
    for (int64_t i = 0; i < t->n; i++) {
        const double err = fabs(tensor_at(t, i) - ref[i]);
        if (!(err <= slack + 2.0 * loss)) // also for NaN
            ck_abort_msg("%s[%lld] is %.9g, reference %.9g: error %.3g above %.3g + 2 * %.3g", what,
                         (long long)i, tensor_at(t, i), ref[i], err, slack, loss);
    }
}

void check_same_bits(const struct tensor *a, const struct tensor *b, const char *what)
{
    ck_assert_int_eq(a->n, b->n);
    ck_assert_msg(memcmp(a->p, b->p, (size_t)a->n * ht_dtype_bytes(a->dtype)) == 0,
                  "%s differs in its bits", what);
}

int n_variants(void)
{
    return 2 * ((int)ht_isa_best() + 1);
}

struct variant variant_at(int i)
{
    return (struct variant){ (enum ht_isa)(i / 2), i % 2 ? HT_DTYPE_BF16 : HT_DTYPE_F32 };
}

struct ht_backend backend_make(enum ht_isa isa, int n_threads, size_t scratch_bytes)
{
    struct ht_backend be;

    ck_assert_int_eq(ht_backend_create_cpu(&be, n_threads, scratch_bytes), HT_OK);
    be.isa = isa;
    return be;
}

int run_suite(Suite *s)
{
    SRunner *r = srunner_create(s);

    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
