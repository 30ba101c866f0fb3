/* core/model/params.h: initial values of parameters (spec 5, the state-spaces rules).
 *
 *   linear weights U(-1/sqrt(fan_in), 1/sqrt(fan_in)); embedding N(0, 0.02); norms 1; D = 1
 *   conv weight and bias U(-1/sqrt(W), 1/sqrt(W)); A ~ U(1, 16), A_log = log A
 *   dt = exp(U(log dt_min, log dt_max)) floored, dt_bias = dt + log(-expm1(-dt))
 *   mixer and MLP output projections divided by residual_init_div
 * Every value is a function of (seed, tensor name, element): any rank can compute any range.
 */
#ifndef HT_MODEL_PARAMS_H
#define HT_MODEL_PARAMS_H

#include "core/config/tensor_list.h"

/* Elements [flat_start, flat_start + n) of the flat index space into out; gaps become 0. */
void ht_params_init(float *out, const struct ht_model_config *cfg,
                    const struct ht_tensor_list *list, uint64_t seed, int64_t flat_start,
                    int64_t n);

#endif
