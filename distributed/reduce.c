/* distributed/reduce.c: which function adds where. */
#include "distributed/reduce.h"

typedef enum ht_status add_fn(struct ht_backend *be, float *dst, const float *src, int64_t n);

static ht_reduce_sum_fn *const sums[HT_ISA_COUNT] = HT_ISA_ROW(ht_reduce_sum_cpu);

static enum ht_status add_cpu(struct ht_backend *be, float *dst, const float *src, int64_t n)
{
    const void *both[2] = { dst, src };

    sums[be->isa](dst, both, 2, n, HT_DTYPE_F32);
    return HT_OK;
}

static add_fn *const adds[HT_BACKEND_COUNT] = {
    [HT_BACKEND_CPU] = add_cpu,
#ifdef HT_WITH_CUDA
    [HT_BACKEND_CUDA] = ht_reduce_add_cuda,
#endif
};

enum ht_status ht_reduce_add(struct ht_backend *be, float *dst, const float *src, int64_t n)
{
    return adds[be->kind](be, dst, src, n);
}
