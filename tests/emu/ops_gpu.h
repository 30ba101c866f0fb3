/* tests/emu/ops_gpu.h: the tensors of tests/core/ops/ops_case.h on the device. */
#ifndef HT_TEST_OPS_GPU_H
#define HT_TEST_OPS_GPU_H

#include "tests/core/ops/ops_case.h"
#include "tests/emu/gpu_case.h"

static inline size_t tensor_bytes(const struct tensor *t)
{
    return (size_t)t->n * ht_dtype_bytes(t->dtype);
}

/* A copy on the device; of a tensor_make tensor its fill bytes go along, which are no valid result.
 */
static inline void *to_gpu(struct ht_backend *be, const struct tensor *t)
{
    return gpu_put(be, t->p, tensor_bytes(t));
}

static inline void from_gpu(struct ht_backend *be, struct tensor *t, const void *device)
{
    gpu_get(be, t->p, device, tensor_bytes(t));
}

#endif
