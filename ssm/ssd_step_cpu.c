/* ssm/ssd_step_cpu.c: one token of many sequences (spec 4.3), states updated in place.
 *
 *   S = exp(dt A) S + (dt x) (outer) B     y = S C + D x
 *
 * Bound by memory: a state (P, N) is read and written once, 8 P N bytes per head and token (4 P N
 * in bf16) for 5 P N FLOP. Rows of four p at a time keep B and C in registers' reach and the sums
 * apart.
 */
#include "ssm/ssd_cpu.h"
#include "ssm/state_round.h"

enum { ROWS = 4, MAX_STATE = 256 };

static float softplus_scalar(float v)
{
    return v > 20.0f ? v : log1pf(expf(v));
}

/* bf16 of v with ht_state_noise of elements i, i + 1, ... */
static inline ht_vh round_vector(ht_vf v, uint32_t key, uint32_t i)
{
    ht_vu x, infinite;
    for (int j = 0; j < HT_VLEN; j++) x[j] = (uint32_t)j;
    x = (x + i) * 0x9e3779b1u + key;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    const ht_vu bits = (ht_vu)v;
    infinite = (ht_vu)((bits & 0x7f800000u) == 0x7f800000u);
    const ht_vu quiet = (ht_vu)((bits & 0x7fffffu) != 0u) & 0x40u;
    const ht_vu rounded = (bits + (x & 0xffffu)) >> 16;
    return __builtin_convertvector((rounded & ~infinite) | ((bits >> 16 | quiet) & infinite),
                                   ht_vh);
}

struct state_rows { // of one head
    void *S;        // its (P, N) of a state
    enum ht_dtype dtype;
    uint32_t key;  // of the token
    int64_t first; // element of the state that S begins with
};

/* Elements `at` .. at + n - 1 (n at most HT_VLEN) of S. */
static inline __attribute__((always_inline)) void
store_state(const struct state_rows *rows, int64_t at, ht_vf v, int64_t n, enum ht_dtype dtype)
{
    if (dtype == HT_DTYPE_F32) {
        ssd_store_n(rows->S, at, v, n, dtype);
    } else {
        const ht_vh h = round_vector(v, rows->key, (uint32_t)(rows->first + at));
        memcpy((ht_bf16 *)rows->S + at, &h, (size_t)n * sizeof(ht_bf16));
    }
}

/* sum over n of the updated rows from p on, ROWS of them; d_head is a multiple of 8 */
static inline __attribute__((always_inline)) void
step_rows(float *y, const struct state_rows *rows, int64_t p, const float *B, const float *C,
          const float *x, float decay, int64_t N, enum ht_dtype dtype)
{
    const int64_t left = N % HT_VLEN, whole = N - left;
    ht_vf sum[ROWS];

    for (int r = 0; r < ROWS; r++) sum[r] = vf_set(0.0f);
    for (int64_t n = 0; n < whole; n += HT_VLEN) {
        const ht_vf b = vf_load(B + n), c = vf_load(C + n);
        for (int r = 0; r < ROWS; r++) {
            const int64_t at = (p + r) * N + n;
            const ht_vf s = decay * vf_load_any(rows->S, at, dtype) + x[r] * b;
            store_state(rows, at, s, HT_VLEN, dtype);
            sum[r] += s * c;
        }
    }
    for (int r = 0; r < ROWS && left; r++) {
        const int64_t at = (p + r) * N + whole;
        const ht_vf s =
            decay * ssd_load_n(rows->S, at, left, dtype) + x[r] * vf_load_n(B + whole, left);
        store_state(rows, at, s, left, dtype);
        sum[r] += s * vf_load_n(C + whole, left);
    }
    for (int r = 0; r < ROWS; r++) y[r] = ssd_sum(sum[r]);
}

static void step_head(const struct ht_ssd_args *a, const struct state_rows *rows, int64_t i,
                      int64_t h)
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
        if (rows->dtype == HT_DTYPE_F32)
            step_rows(y, rows, p, B, C, dt_x, decay, N, HT_DTYPE_F32);
        else
            step_rows(y, rows, p, B, C, dt_x, decay, N, HT_DTYPE_BF16);
        for (int r = 0; r < ROWS; r++)
            ssd_store(a->y, i * a->y_stride + at + r, a->dtype, y[r] + a->D[h] * x[r]);
    }
}

enum ht_status HT_ISA_FN(ht_ssd_step_cpu)(struct ht_backend *be, const struct ht_ssd_args *a,
                                          const struct ht_ssm_states *states, const int32_t *slot)
{
    const int64_t H = a->n_heads, P = a->d_head, n_items = a->n_tokens * H, PN = P * a->d_state;
    const bool parallel = n_items * PN > 16384; // below, a parallel region costs more

#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (parallel)
    for (int64_t item = 0; item < n_items; item++) {
        const int64_t i = item / H, h = item % H, s = slot ? slot[i] : i;
        if (s >= 0) {
            const int64_t position =
                states->position ? states->position[i] : states->first_position + i;
            const struct state_rows rows = { (char *)states->p + (size_t)((s * H + h) * PN) *
                                                                     ht_dtype_bytes(states->dtype),
                                             states->dtype, ht_state_key(states->stream, position),
                                             h * PN };
            step_head(a, &rows, i, h);
        } else {
            for (int64_t p = 0; p < P; p++)
                ssd_store(a->y, i * a->y_stride + h * P + p, a->dtype, 0.0f);
        }
    }
    return HT_OK;
}
