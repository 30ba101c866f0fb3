/* tests/emu/test_emu.c: the emulation computes what CUDA does and finds what is wrong. */
#include <math.h>
#include <string.h>

#include "tests/emu/emu_probe.h"
#include "tests/emu/gpu_case.h"

START_TEST(threads_have_their_indices)
{
    struct ht_backend be;
    int host[1000];

    gpu_start(&be, 0);
    int *out = gpu_new(&be, sizeof host);
    gpu_ok(probe_index(&be, out, 1000));
    gpu_get(&be, host, out, sizeof host);
    for (int i = 0; i < 1000; i++) ck_assert_int_eq(host[i], 3 * i);
    gpu_end(&be);
}
END_TEST

START_TEST(block_sum_is_the_sum)
{
    struct ht_backend be;
    float in[5 * 128], out[5];

    for (int i = 0; i < 5 * 128; i++) in[i] = (float)(i % 17);
    gpu_start(&be, 0);
    float *d_in = gpu_put(&be, in, sizeof in), *d_out = gpu_new(&be, sizeof out);
    gpu_ok(probe_block_sum(&be, d_out, d_in, 5));
    gpu_get(&be, out, d_out, sizeof out);
    for (int b = 0; b < 5; b++) {
        float sum = 0;
        for (int i = 0; i < 128; i++) sum += in[b * 128 + i];
        ck_assert_float_eq(out[b], sum); // integers: exact in any order
    }
    gpu_end(&be);
}
END_TEST

START_TEST(mma_multiplies)
{
    struct ht_backend be;
    float a[16 * 16], b[16 * 8], c[16 * 8];

    for (int i = 0; i < 256; i++) a[i] = (float)(i % 13 - 6);
    for (int i = 0; i < 128; i++) b[i] = (float)(i % 11 - 5);
    gpu_start(&be, 0);
    void *da = gpu_put_as(&be, HT_DTYPE_BF16, a, 256), *db = gpu_put_as(&be, HT_DTYPE_BF16, b, 128);
    float *dc = gpu_new(&be, sizeof c);
    gpu_ok(probe_mma(&be, dc, da, db));
    gpu_get(&be, c, dc, sizeof c);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[m * 16 + k] * b[k * 8 + n];
            ck_assert_float_eq(c[m * 8 + n], sum);
        }
    float *fa = gpu_put(&be, a, 128 * sizeof *a), *fb = gpu_put(&be, b, 64 * sizeof *b);
    gpu_ok(probe_mma_tf32(&be, dc, fa, fb));
    gpu_get(&be, c, dc, sizeof c);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 8; n++) {
            float sum = 0;
            for (int k = 0; k < 8; k++) sum += a[m * 8 + k] * b[k * 8 + n];
            ck_assert_float_eq(c[m * 8 + n], sum);
        }
    gpu_end(&be);
}
END_TEST

START_TEST(warps_exchange)
{
    struct ht_backend be;
    int out[256];
    unsigned thirds = 0;

    for (int i = 0; i < 32; i += 3) thirds |= 1u << i;
    gpu_start(&be, 0);
    int *d = gpu_new(&be, sizeof out);
    gpu_ok(probe_warp(&be, d));
    gpu_get(&be, out, d, sizeof out);
    for (int l = 0; l < 32; l++) {
        ck_assert_int_eq(out[l], (l + 5) % 32);
        ck_assert_int_eq(out[32 + l], l < 3 ? l : l - 3);
        ck_assert_int_eq(out[64 + l], l % 16 < 13 ? l + 3 : l);
        ck_assert_int_eq(out[96 + l], l ^ 1);
        ck_assert_uint_eq((unsigned)out[128 + l], thirds);
        ck_assert_int_eq(out[160 + l], 1);
        ck_assert_int_eq(out[192 + l], 31 * 32 / 2);
        ck_assert_int_eq(out[224 + l], 16);
    }
    gpu_end(&be);
}
END_TEST

static const struct {
    enum probe_mistake mistake;
    const char *says;      // part of the message
    const char *says_asan; // with the address sanitizer, whose loads and stores we do not see
} mistakes[] = {
    { PROBE_NO_BARRIER, "nobody wrote", NULL },
    { PROBE_NO_BARRIER_AFTER, "race:", NULL },
    { PROBE_DIVERGENT_BARRIER, "wait for ever", "wait for ever" },
    { PROBE_TWO_BARRIERS, "meets one at", "meets one at" },
    { PROBE_MISSING_LANE, "wait for ever", "wait for ever" },
    { PROBE_UNINITIALISED, "nobody wrote", NULL },
    { PROBE_OUT_OF_BOUNDS, "out of bounds", NULL },
    { PROBE_STATIC_BOUNDS, "out of bounds", NULL },
    { PROBE_NO_WAIT, "before cp_async_wait", NULL },
    { PROBE_WAIT_TOO_FEW, "before cp_async_wait", NULL },
    { PROBE_COPY_OVER_READ, "race:", NULL },
    { PROBE_GLOBAL_BOUNDS, "outside of device allocations", NULL },
    { PROBE_NO_SYNCWARP, "nobody wrote", NULL },
    { PROBE_TOO_MUCH_SMEM, "bytes of dynamic shared memory", "bytes of dynamic shared memory" },
};

START_TEST(mistakes_are_found)
{
    struct ht_backend be;
    float in[128] = { 0 };
#if defined(__SANITIZE_ADDRESS__)
    const char *says = mistakes[_i].says_asan;
#else
    const char *says = mistakes[_i].says;
#endif

    if (!says) return;
    gpu_start(&be, 0);
    float *d_in = gpu_put(&be, in, sizeof in), *d_out = gpu_new(&be, sizeof in);
    ck_assert_int_eq(probe_mistake(&be, mistakes[_i].mistake, d_out, d_in, 128), HT_ERR_CUDA);
    ck_assert_msg(strstr(ht_error_message(), says), "mistake %d, expected \"%s\": %s", _i, says,
                  ht_error_message());
    gpu_ok(probe_index(&be, (int *)(void *)d_out, 128)); // the next launch is not affected
    gpu_end(&be);
}
END_TEST

START_TEST(the_device_has_an_end)
{
    struct ht_backend be;
    void *p;

    gpu_start(&be, 4096);
    ck_assert_ptr_nonnull(be.scratch.base);
    ck_assert_int_eq(ht_backend_alloc(&p, &be, "activations", (size_t)1 << 50), HT_ERR_MEMORY);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "activations"));
    ck_assert_ptr_null(p);
    gpu_end(&be);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("emu");
    TCase *t = tcase_create("emu");

    tcase_add_test(t, threads_have_their_indices);
    tcase_add_test(t, block_sum_is_the_sum);
    tcase_add_test(t, mma_multiplies);
    tcase_add_test(t, warps_exchange);
    tcase_add_loop_test(t, mistakes_are_found, 0, sizeof mistakes / sizeof mistakes[0]);
    tcase_add_test(t, the_device_has_an_end);
    suite_add_tcase(s, t);
    return gpu_run_suite(s);
}
