/* core/ops/gemm_fp8_impl.h: inside core/ops only: the CUDA functions behind gemm_fp8.h. */
#ifndef HT_OPS_GEMM_FP8_IMPL_H
#define HT_OPS_GEMM_FP8_IMPL_H

#include "core/ops/gemm_fp8.h"

enum ht_status ht_fp8_quantise_cuda(struct ht_backend *be, const struct ht_fp8_quantise_args *a);
enum ht_status ht_gemm_fp8_cuda(struct ht_backend *be, const struct ht_gemm_fp8_args *a);

#endif
