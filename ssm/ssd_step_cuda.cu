/* ssm/ssd_step_cuda.cu: one token of many sequences (spec 4.3), states updated in place.
 *
 *   S = exp(dt A) S + (dt x) (outer) B     y = S C + D x
 *
 * One thread block per token and head; a warp owns rows of the state, four at a time, 16 bytes per
 * lane: B and C in registers, y by a sum over the warp. Bound by memory: 8 P N bytes per token and
 * head (4 P N with states in bf16) for 5 P N FLOP (8.4 MB per layer and sequence at Bamba's shape).
 * Slots are read on the
 * device, so that the composition of a batch changes without moving states; -1 is a padding row.
 */
#include "ssm/rows_cuda.h"
#include "ssm/state_round.h"

namespace {

constexpr int kThreads = 128, kRows = 4;
constexpr int kParts = 2; // of 128 columns: d_state up to 256

struct step_args {
    int n_heads, d_head, d_state, of_group;
    const void *x, *B, *C, *dt_raw;
    int64_t x_stride, dt_stride, y_stride;
    const float *dt_bias, *A_log, *D;
    float lo, hi;
    void *y;
    void *states; // float or bf16
    const int32_t *slot;
    uint32_t stream;
    const int64_t *position;
    int64_t first_position;
};

/* Four elements of a state, of which the first is element i. */
__device__ __forceinline__ void store_state4(float *p, const float (&v)[4], uint32_t, uint32_t)
{
    store4(p, v);
}

__device__ __forceinline__ void store_state4(bf16 *p, const float (&v)[4], uint32_t key, uint32_t i)
{
    uint32_t h[4];
#pragma unroll
    for (int e = 0; e < 4; e++)
        h[e] = ht_state_bf16(__float_as_uint(v[e]), ht_state_noise(key, i + (uint32_t)e));
    *reinterpret_cast<uint2 *>(p) = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
}

template <typename T, typename S>
__global__ void __launch_bounds__(kThreads) ssd_step_kernel(step_args a)
{
    const int64_t i = blockIdx.x / (unsigned)a.n_heads;
    const int head = (int)(blockIdx.x % (unsigned)a.n_heads), P = a.d_head, N = a.d_state;
    const int warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    const int64_t slot = a.slot ? a.slot[i] : i;
    T *y = (T *)a.y + i * a.y_stride + head * P;

    if (slot < 0) {
        for (int p = (int)threadIdx.x; p < P; p += kThreads) y[p] = from_f32<T>(0.0f);
        return;
    }
    const float v = to_f32(((const T *)a.dt_raw)[i * a.dt_stride + head]) + a.dt_bias[head];
    const float soft = v > 20.0f ? v : log1pf(expf(v));
    const float dt = soft < a.lo ? a.lo : soft > a.hi ? a.hi : soft; // a NaN passes through
    const float decay = expf(dt * -expf(a.A_log[head])), D = a.D[head];
    const T *x = (const T *)a.x + i * a.x_stride + head * P;
    const int64_t of_group = i * a.x_stride + head / a.of_group * N;
    S *state = (S *)a.states + (slot * a.n_heads + head) * P * N;
    const uint32_t key = ht_state_key(a.stream, a.position ? a.position[i] : a.first_position + i);
    float B[kParts][4], C[kParts][4];

#pragma unroll
    for (int k = 0; k < kParts; k++) {
        const int n = (k * kWarp + lane) * 4;
#pragma unroll
        for (int e = 0; e < 4; e++) B[k][e] = C[k][e] = 0.0f;
        if (n < N) {
            load4(B[k], (const T *)a.B + of_group + n);
            load4(C[k], (const T *)a.C + of_group + n);
        }
    }
    for (int p0 = warp * kRows; p0 < P; p0 += kThreads / kWarp * kRows) { // P is a multiple of 8
        float s[kRows][kParts][4], sum[kRows], xs[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            xs[r] = to_f32(x[p0 + r]);
            sum[r] = 0.0f;
#pragma unroll
            for (int k = 0; k < kParts; k++)
                if ((k * kWarp + lane) * 4 < N)
                    load4(s[r][k], state + (int64_t)(p0 + r) * N + (k * kWarp + lane) * 4);
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
#pragma unroll
            for (int k = 0; k < kParts; k++) {
                if ((k * kWarp + lane) * 4 >= N) continue;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    s[r][k][e] = decay * s[r][k][e] + dt * xs[r] * B[k][e];
                    sum[r] += s[r][k][e] * C[k][e];
                }
                const int at = (p0 + r) * N + (k * kWarp + lane) * 4;
                store_state4(state + at, s[r][k], key, (uint32_t)(head * P * N + at));
            }
            sum[r] = warp_sum(sum[r]);
            if (lane == 0) y[p0 + r] = from_f32<T>(sum[r] + D * xs[r]);
        }
    }
}

constexpr int kConvertThreads = 256;

__global__ void __launch_bounds__(kConvertThreads)
    ssm_state_load_kernel(float *to, const bf16 *from, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * kConvertThreads + threadIdx.x;
    if (i < n) to[i] = to_f32(from[i]);
}

__global__ void __launch_bounds__(kConvertThreads)
    ssm_state_store_kernel(uint16_t *to, const float *from, int64_t n, uint32_t key)
{
    const int64_t i = (int64_t)blockIdx.x * kConvertThreads + threadIdx.x;
    if (i < n)
        to[i] = (uint16_t)ht_state_bf16(__float_as_uint(from[i]), ht_state_noise(key, (uint32_t)i));
}

template <typename T>
enum ht_status launch(struct ht_backend *be, const struct ht_ssd_args *a,
                      const struct ht_ssm_states *states, const int32_t *slot)
{
    step_args k;
    k.n_heads = (int)a->n_heads;
    k.d_head = (int)a->d_head;
    k.d_state = (int)a->d_state;
    k.of_group = (int)(a->n_heads / a->n_groups);
    k.x = a->x;
    k.B = a->B;
    k.C = a->C;
    k.dt_raw = a->dt_raw;
    k.x_stride = a->x_stride;
    k.dt_stride = a->dt_stride;
    k.y_stride = a->y_stride;
    k.dt_bias = a->dt_bias;
    k.A_log = a->A_log;
    k.D = a->D;
    k.lo = a->dt_min;
    k.hi = a->dt_max;
    k.y = a->y;
    k.states = states->p;
    k.slot = slot;
    k.stream = states->stream;
    k.position = states->position;
    k.first_position = states->first_position;
    const unsigned blocks = (unsigned)(a->n_tokens * a->n_heads);
    if (states->dtype == HT_DTYPE_F32)
        HT_LAUNCH(be, (ssd_step_kernel<T, float>), blocks, kThreads, 0, k);
    else
        HT_LAUNCH(be, (ssd_step_kernel<T, bf16>), blocks, kThreads, 0, k);
    return ht_cuda_check_launch(be, "ssd_step");
}

} // namespace

extern "C" enum ht_status ht_ssd_step_cuda(struct ht_backend *be, const struct ht_ssd_args *a,
                                           const struct ht_ssm_states *states, const int32_t *slot)
{
    const char *op = "ssd_step";

    HT_TRY(check_rows_aligned(op, "B", a->B, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "C", a->C, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "state", states->p, a->d_state, states->dtype));
    return HT_DISPATCH(a->dtype, op, launch, be, a, states, slot);
}

extern "C" enum ht_status ht_ssm_state_load_cuda(struct ht_backend *be, float *to,
                                                 const ht_bf16 *from, int64_t n)
{
    const unsigned blocks = (unsigned)((n + kConvertThreads - 1) / kConvertThreads);
    HT_LAUNCH(be, ssm_state_load_kernel, blocks, kConvertThreads, 0, to, (const bf16 *)from, n);
    return ht_cuda_check_launch(be, "ssm_state_load");
}

extern "C" enum ht_status ht_ssm_state_store_cuda(struct ht_backend *be, ht_bf16 *to,
                                                  const float *from, int64_t n, uint32_t key)
{
    const unsigned blocks = (unsigned)((n + kConvertThreads - 1) / kConvertThreads);
    HT_LAUNCH(be, ssm_state_store_kernel, blocks, kConvertThreads, 0, to, from, n, key);
    return ht_cuda_check_launch(be, "ssm_state_store");
}
