/* tests/emu/gpu_case.h: helpers of suites over the CUDA backend, on the emulated device or a GPU.
 */
#ifndef HT_TEST_GPU_CASE_H
#define HT_TEST_GPU_CASE_H

#include <check.h>
#include <stdlib.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"

/* A CUDA backend. Exits with 77 (skipped) on a machine without a GPU in the gpu flavour. */
void gpu_start(struct ht_backend *be, size_t scratch_bytes);
/* Frees every array of gpu_new and gpu_put, and the backend. */
void gpu_end(struct ht_backend *be);

/* Arrays on the device: with undefined content (NaN under emulation), or a copy of host memory. */
void *gpu_new(struct ht_backend *be, size_t bytes);
void *gpu_put(struct ht_backend *be, const void *host, size_t bytes);
/* Back to the host; fails the test with the kernel's message when something went wrong on the way.
 */
void gpu_get(struct ht_backend *be, void *host, const void *device, size_t bytes);

/* fp32 values as a device array of dtype (F32 or BF16), and back. */
void *gpu_put_as(struct ht_backend *be, enum ht_dtype dtype, const float *host, int64_t n);
void gpu_get_as(struct ht_backend *be, enum ht_dtype dtype, float *host, const void *device,
                int64_t n);

/* Fails the test with the library's message. */
#define gpu_ok(call)                                                                               \
    do {                                                                                           \
        const enum ht_status gpu_st_ = (call);                                                     \
        ck_assert_msg(gpu_st_ == HT_OK, "%s: %s", #call, ht_error_message());                      \
    } while (0)

/* main() of a suite: all tests in one process, exit code for ctest. */
int gpu_run_suite(Suite *s);

#endif
