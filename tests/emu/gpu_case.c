/* tests/emu/gpu_case.c: see gpu_case.h. */
#include "tests/emu/gpu_case.h"

#include <stdio.h>

enum { MAX_ARRAYS = 4096 };
static void *arrays[MAX_ARRAYS];
static int n_arrays;

void gpu_start(struct ht_backend *be, size_t scratch_bytes)
{
    const enum ht_status st = ht_backend_create_cuda(be, 0, scratch_bytes);

    if (st == HT_ERR_UNSUPPORTED) {
        fprintf(stderr, "skipped: %s\n", ht_error_message());
        exit(77);
    }
    ck_assert_msg(st == HT_OK, "%s", ht_error_message());
}

void gpu_end(struct ht_backend *be)
{
    for (int i = 0; i < n_arrays; i++) ht_backend_free_memory(be, arrays[i]);
    n_arrays = 0;
    ht_backend_free(be);
}

void *gpu_new(struct ht_backend *be, size_t bytes)
{
    ck_assert_int_lt(n_arrays, MAX_ARRAYS);
    gpu_ok(ht_backend_alloc(&arrays[n_arrays], be, "test array", bytes));
    return arrays[n_arrays++];
}

void *gpu_put(struct ht_backend *be, const void *host, size_t bytes)
{
    void *p = gpu_new(be, bytes);
    gpu_ok(ht_backend_upload(be, p, host, bytes));
    return p;
}

void gpu_get(struct ht_backend *be, void *host, const void *device, size_t bytes)
{
    gpu_ok(ht_backend_download(be, host, device, bytes));
}

void *gpu_put_as(struct ht_backend *be, enum ht_dtype dtype, const float *host, int64_t n)
{
    const size_t bytes = (size_t)n * ht_dtype_bytes(dtype);
    void *tmp = malloc(bytes + 1), *p;

    ht_convert(tmp, dtype, host, HT_DTYPE_F32, n);
    p = gpu_put(be, tmp, bytes);
    free(tmp);
    return p;
}

void gpu_get_as(struct ht_backend *be, enum ht_dtype dtype, float *host, const void *device,
                int64_t n)
{
    const size_t bytes = (size_t)n * ht_dtype_bytes(dtype);
    void *tmp = malloc(bytes + 1);

    gpu_get(be, tmp, device, bytes);
    ht_convert(host, HT_DTYPE_F32, tmp, dtype, n);
    free(tmp);
}

int gpu_run_suite(Suite *s)
{
    SRunner *r = srunner_create(s);
    srunner_set_fork_status(r, CK_NOFORK);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed == 0 ? 0 : 1;
}
