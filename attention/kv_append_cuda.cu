/* attention/kv_append_cuda.cu: new k and v rows into their sequences' caches (flash.h). Bound by
 * memory: 4 * n_kv_heads * d_head * sizeof(T) bytes per token, read and written once. One block per
 * token; starts, past and the caches' addresses are read on the device. */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "attention/attention_cuda.h"
}

namespace {

constexpr int kThreads = 128;

struct append_params {
    const unsigned char *k, *v;
    int64_t row_bytes, stride_bytes;
    void *const *k_cache, *const *v_cache;
    const int64_t *past;
    const int32_t *starts;
    int n_seqs;
};

__global__ void __launch_bounds__(kThreads) kv_append_kernel(const append_params p)
{
    const int token = (int)blockIdx.x;
    int low = 0, high = p.n_seqs; // starts[low] <= token < starts[high]

    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (p.starts[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    const int64_t to = (p.past[low] + token - p.starts[low]) * p.row_bytes;
    const int64_t from = token * p.stride_bytes;
    unsigned char *const k = static_cast<unsigned char *>(p.k_cache[low]) + to;
    unsigned char *const v = static_cast<unsigned char *>(p.v_cache[low]) + to;
    for (int64_t i = (int64_t)threadIdx.x * 16; i < p.row_bytes; i += kThreads * 16) {
        *reinterpret_cast<uint4 *>(k + i) = *reinterpret_cast<const uint4 *>(p.k + from + i);
        *reinterpret_cast<uint4 *>(v + i) = *reinterpret_cast<const uint4 *>(p.v + from + i);
    }
}

} // namespace

extern "C" enum ht_status ht_kv_append_cuda(struct ht_backend *be,
                                            const struct ht_kv_append_args *a)
{
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype);
    append_params p = {};

    p.row_bytes = a->width * element;
    p.stride_bytes = a->stride * element;
    if (((uintptr_t)a->k | (uintptr_t)a->v | (uintptr_t)p.row_bytes | (uintptr_t)p.stride_bytes) %
            16 !=
        0)
        return HT_FAIL(
            HT_ERR_ARG,
            "kv_append: rows of %lld elements, %lld apart; on CUDA rows are multiples of "
            "16 bytes and aligned to them",
            (long long)a->width, (long long)a->stride);
    p.k = static_cast<const unsigned char *>(a->k);
    p.v = static_cast<const unsigned char *>(a->v);
    p.k_cache = a->k_cache;
    p.v_cache = a->v_cache;
    p.past = a->past;
    p.starts = a->seqs.starts;
    p.n_seqs = (int)a->seqs.n_seqs;
    HT_LAUNCH(be, kv_append_kernel, (unsigned)a->n_tokens, kThreads, 0, p);
    return ht_cuda_check_launch(be, "kv_append");
}
