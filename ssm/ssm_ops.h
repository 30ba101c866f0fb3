/* ssm/ssm_ops.h: inside ssm only: the kernels' types and the copies that the table lists.
 *
 * The public functions (conv1d.h, ssd.h, gated_norm.h) check their arguments once and call the
 * table in ssm_ops.c. Kernels may assume checked arguments and at least one token.
 */
#ifndef HT_SSM_SSM_OPS_H
#define HT_SSM_SSM_OPS_H

#include "core/base/backend.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

typedef enum ht_status ht_conv1d_fn(struct ht_backend *be, const struct ht_conv1d_args *a);
typedef enum ht_status ht_ssd_fn(struct ht_backend *be, const struct ht_ssd_args *a);
typedef enum ht_status ht_ssd_step_fn(struct ht_backend *be, const struct ht_ssd_args *a,
                                      const struct ht_ssm_states *states, const int32_t *slot);
typedef enum ht_status ht_gated_norm_fn(struct ht_backend *be, const struct ht_gated_norm_args *a);

HT_ISA_DECLARE(ht_conv1d_fn, ht_conv1d_forward_cpu);
HT_ISA_DECLARE(ht_conv1d_fn, ht_conv1d_backward_cpu);
HT_ISA_DECLARE(ht_ssd_fn, ht_ssd_forward_cpu);
HT_ISA_DECLARE(ht_ssd_fn, ht_ssd_backward_cpu);
HT_ISA_DECLARE(ht_ssd_step_fn, ht_ssd_step_cpu);
HT_ISA_DECLARE(ht_gated_norm_fn, ht_gated_norm_forward_cpu);
HT_ISA_DECLARE(ht_gated_norm_fn, ht_gated_norm_backward_cpu);

#ifdef HT_WITH_CUDA
ht_conv1d_fn ht_conv1d_forward_cuda, ht_conv1d_backward_cuda;
ht_ssd_fn ht_ssd_forward_cuda, ht_ssd_backward_cuda;
ht_ssd_step_fn ht_ssd_step_cuda;
enum ht_status ht_ssm_state_load_cuda(struct ht_backend *be, float *to, const ht_bf16 *from,
                                      int64_t n);
enum ht_status ht_ssm_state_store_cuda(struct ht_backend *be, ht_bf16 *to, const float *from,
                                       int64_t n, uint32_t key);
ht_gated_norm_fn ht_gated_norm_forward_cuda, ht_gated_norm_backward_cuda;
#endif

struct ht_ssm_ops {
    ht_conv1d_fn *conv1d_forward[HT_ISA_COUNT];
    ht_conv1d_fn *conv1d_backward[HT_ISA_COUNT];
    ht_ssd_fn *ssd_forward[HT_ISA_COUNT];
    ht_ssd_fn *ssd_backward[HT_ISA_COUNT];
    ht_ssd_step_fn *ssd_step[HT_ISA_COUNT];
    ht_gated_norm_fn *gated_norm_forward[HT_ISA_COUNT];
    ht_gated_norm_fn *gated_norm_backward[HT_ISA_COUNT];
};

/* The row of a backend, or NULL when this build has no kernels for it. */
const struct ht_ssm_ops *ht_ssm_ops_get(enum ht_backend_kind kind);

/* Tokens of one partial sum of grad_w, here because scratch sizes follow from them. */
enum { HT_CONV1D_BLOCK = 256, HT_GATED_NORM_BLOCK = 64 };

#endif
