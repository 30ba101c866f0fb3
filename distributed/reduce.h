/* distributed/reduce.h: the arithmetic of a reduction, apart from its transport (internal to the
 * folder).
 *
 *   out[i] = ((src[0][i] + src[1][i]) + src[2][i]) + ...      in fp32, in rank order
 *
 * Only additions and exact conversions: every CPU level gives the same bits.
 */
#ifndef HT_DISTRIBUTED_REDUCE_H
#define HT_DISTRIBUTED_REDUCE_H

#include <stdint.h>

#include "core/base/backend.h"
#include "core/base/dtype.h"
#include "core/base/isa.h"

/* src: n_src pointers to n values of dtype d. out may be one of the sources (F32). */
typedef void ht_reduce_sum_fn(float *out, const void *const *src, int n_src, int64_t n,
                              enum ht_dtype d);
/* Round n values to bf16, to nearest even. */
typedef void ht_reduce_round_fn(ht_bf16 *out, const float *in, int64_t n);

HT_ISA_DECLARE(ht_reduce_sum_fn, ht_reduce_sum_cpu);
HT_ISA_DECLARE(ht_reduce_round_fn, ht_reduce_round_cpu);

/* dst += src, in the backend's memory. */
enum ht_status ht_reduce_add(struct ht_backend *be, float *dst, const float *src, int64_t n);

/* wire_cuda.cu */
enum ht_status ht_reduce_add_cuda(struct ht_backend *be, float *dst, const float *src, int64_t n);
enum ht_status ht_reduce_round_cuda(struct ht_backend *be, void *out, const float *in, int64_t n);
enum ht_status ht_reduce_widen_cuda(struct ht_backend *be, float *out, const void *in, int64_t n);

#endif
