/* ssm/ssd_step_cpu.c: one token of many sequences (spec 4.3), states updated in place.
 *
 *   S = exp(dt A) S + (dt x) (outer) B     y = S C + D x
 *
 * Bound by memory: a state (P, N) is read and written once, 8 P N bytes per head and token for 5 P
 * N FLOP. Rows of four p at a time keep B and C in registers' reach and the sums apart.
 */
#include "ssm/ssd_cpu.h"

enum { ROWS = 4, MAX_STATE = 256 };

static float softplus_scalar(float v)
{
    return v > 20.0f ? v : log1pf(expf(v));
}

/* sum over n of the updated rows, ROWS of them; d_head is a multiple of 8 */
static inline void step_rows(float *y, float *S, const float *B, const float *C, const float *x,
                             float decay, int64_t N)
{
    ht_vf sum[ROWS];

    for (int r = 0; r < ROWS; r++) sum[r] = vf_set(0.0f);
    for (int64_t n = 0; n + HT_VLEN <= N; n += HT_VLEN) {
        const ht_vf b = vf_load(B + n), c = vf_load(C + n);
        for (int r = 0; r < ROWS; r++) {
            const ht_vf s = decay * vf_load(S + r * N + n) + x[r] * b;
            vf_store(S + r * N + n, s);
            sum[r] += s * c;
        }
    }
    const int64_t left = N % HT_VLEN, n = N - left;
    for (int r = 0; r < ROWS && left; r++) {
        const ht_vf s = decay * vf_load_n(S + r * N + n, left) + x[r] * vf_load_n(B + n, left);
        vf_store_n(S + r * N + n, s, left);
        sum[r] += s * vf_load_n(C + n, left);
    }
    for (int r = 0; r < ROWS; r++) y[r] = ssd_sum(sum[r]);
}

static void step_head(const struct ht_ssd_args *a, float *S, int64_t i, int64_t h)
{
    const int64_t P = a->d_head, N = a->d_state, g = h / (a->n_heads / a->n_groups);
    const float v = ssd_load(a->dt_raw, i * a->dt_stride + h, a->dtype) + a->dt_bias[h];
    const float soft = softplus_scalar(v);
    const float dt = soft < a->dt_min ? a->dt_min : soft > a->dt_max ? a->dt_max : soft;
    const float decay = expf(dt * -expf(a->A_log[h]));
    float B[MAX_STATE], C[MAX_STATE];

    for (int64_t n = 0; n < N; n += HT_VLEN) {
        const int64_t at = i * a->x_stride + g * N + n;
        ssd_store_n(B, n, ssd_load_n(a->B, at, N - n, a->dtype), N - n, HT_DTYPE_F32);
        ssd_store_n(C, n, ssd_load_n(a->C, at, N - n, a->dtype), N - n, HT_DTYPE_F32);
    }
    for (int64_t p = 0; p < P; p += ROWS) {
        const int64_t at = h * P + p;
        float x[ROWS], dt_x[ROWS], y[ROWS];
        for (int r = 0; r < ROWS; r++) {
            x[r] = ssd_load(a->x, i * a->x_stride + at + r, a->dtype);
            dt_x[r] = dt * x[r];
        }
        step_rows(y, S + p * N, B, C, dt_x, decay, N);
        for (int r = 0; r < ROWS; r++)
            ssd_store(a->y, i * a->y_stride + at + r, a->dtype, y[r] + a->D[h] * x[r]);
    }
}

enum ht_status HT_ISA_FN(ht_ssd_step_cpu)(struct ht_backend *be, const struct ht_ssd_args *a,
                                          float *state, const int32_t *slot)
{
    const int64_t H = a->n_heads, P = a->d_head, n_items = a->n_tokens * H;
    const bool parallel = n_items * P * a->d_state > 16384; // below, a parallel region costs more

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t item = 0; item < n_items; item++) {
        const int64_t i = item / H, h = item % H, s = slot ? slot[i] : i;
        if (s >= 0) {
            step_head(a, state + (s * H + h) * P * a->d_state, i, h);
        } else {
            for (int64_t p = 0; p < P; p++)
                ssd_store(a->y, i * a->y_stride + h * P + p, a->dtype, 0.0f);
        }
    }
    return HT_OK;
}
