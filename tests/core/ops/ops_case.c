/* tests/core/ops/ops_case.c: see ops_case.h. */
#include "tests/core/ops/ops_case.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"

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

struct tensor tensor_normal(int64_t n, enum ht_dtype dtype, double sd, uint64_t seed)
{
    struct tensor t = tensor_make(n, dtype);

    for (int64_t i = 0; i < n; i++) {
        ht_store_f32(t.p, i, dtype, (float)(sd * (double)ht_rng_normal(seed, 7, (uint64_t)i)));
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

    for (int i = 0; t->block && i < GUARD; i++) {
        ck_assert_msg(t->block[i] == FILL, "byte %d before a tensor was overwritten", GUARD - i);
        ck_assert_msg(t->block[GUARD + bytes + (size_t)i] == FILL,
                      "byte %d after a tensor was overwritten", i);
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
        ck_assert_msg(err <= slack + 2.0 * loss, // also false for NaN
                      "%s[%lld] is %.9g, reference %.9g: error %.3g above %.3g + 2 * %.3g", what,
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
