/* attention/kv_append.c: new k and v rows into their sequences' caches. */
#include <string.h>

#include "attention/attention_cuda.h"

enum ht_status ht_kv_append(struct ht_backend *be, const struct ht_kv_append_args *a)
{
    const size_t element = ht_dtype_bytes(a->dtype), row_bytes = (size_t)a->width * element;

    if (a->seqs.n_seqs < 1 || a->n_tokens < a->seqs.n_seqs || a->n_tokens > INT32_MAX)
        return HT_FAIL(HT_ERR_ARG, "kv_append: %lld rows of %lld sequences", (long long)a->n_tokens,
                       (long long)a->seqs.n_seqs);
    if (a->stride < a->width)
        return HT_FAIL(HT_ERR_ARG, "kv_append: rows are %lld elements apart and have %lld",
                       (long long)a->stride, (long long)a->width);
#ifdef HT_WITH_CUDA
    if (be->kind == HT_BACKEND_CUDA) return ht_kv_append_cuda(be, a);
#endif
    if (be->kind != HT_BACKEND_CPU)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "kv_append: this build has no kernels for backend %d",
                       (int)be->kind);
    for (int64_t s = 0; s < a->seqs.n_seqs; s++)
        for (int64_t t = a->seqs.starts[s]; t < a->seqs.starts[s + 1]; t++) {
            const size_t to = (size_t)(a->past[s] + t - a->seqs.starts[s]) * row_bytes;
            const size_t from = (size_t)(t * a->stride) * element;
            memcpy((char *)a->k_cache[s] + to, (const char *)a->k + from, row_bytes);
            memcpy((char *)a->v_cache[s] + to, (const char *)a->v + from, row_bytes);
        }
    return HT_OK;
}
