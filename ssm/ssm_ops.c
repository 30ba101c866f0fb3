/* ssm/ssm_ops.c: which function runs where, and the checks every backend relies on. */
#include "ssm/ssm_ops.h"

#include <inttypes.h>
#include <string.h>

#include "ssm/state_round.h"

static const struct ht_ssm_ops table[HT_BACKEND_COUNT] = {
    [HT_BACKEND_CPU] = {
        .conv1d_forward = HT_ISA_ROW(ht_conv1d_forward_cpu),
        .conv1d_backward = HT_ISA_ROW(ht_conv1d_backward_cpu),
        .ssd_forward = HT_ISA_ROW(ht_ssd_forward_cpu),
        .ssd_backward = HT_ISA_ROW(ht_ssd_backward_cpu),
        .ssd_step = HT_ISA_ROW(ht_ssd_step_cpu),
        .gated_norm_forward = HT_ISA_ROW(ht_gated_norm_forward_cpu),
        .gated_norm_backward = HT_ISA_ROW(ht_gated_norm_backward_cpu),
    },
#ifdef HT_WITH_CUDA
#define ALL_LEVELS(name)                                                                           \
    {                                                                                              \
        [0 ... HT_ISA_COUNT - 1] = name                                                            \
    } // of the CPU: they do not matter here
    [HT_BACKEND_CUDA] = {
        .conv1d_forward = ALL_LEVELS(ht_conv1d_forward_cuda),
        .conv1d_backward = ALL_LEVELS(ht_conv1d_backward_cuda),
        .ssd_forward = ALL_LEVELS(ht_ssd_forward_cuda),
        .ssd_backward = ALL_LEVELS(ht_ssd_backward_cuda),
        .ssd_step = ALL_LEVELS(ht_ssd_step_cuda),
        .gated_norm_forward = ALL_LEVELS(ht_gated_norm_forward_cuda),
        .gated_norm_backward = ALL_LEVELS(ht_gated_norm_backward_cuda),
    },
#endif
};

const struct ht_ssm_ops *ht_ssm_ops_get(enum ht_backend_kind kind)
{
    if ((unsigned)kind >= HT_BACKEND_COUNT || !table[kind].ssd_forward[0]) return NULL;
    return &table[kind];
}

static enum ht_status row(const struct ht_ssm_ops **out, const struct ht_backend *be,
                          const char *op, enum ht_dtype dtype)
{
    *out = ht_ssm_ops_get(be->kind);
    if (!*out)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: this build has no kernels for backend %d", op,
                       (int)be->kind);
    if ((unsigned)be->isa >= HT_ISA_COUNT)
        return HT_FAIL(HT_ERR_ARG, "%s: CPU level %d; must be 0 to %d", op, (int)be->isa,
                       HT_ISA_COUNT - 1);
    if (dtype != HT_DTYPE_F32 && dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: dtype %d; compute types are fp32 and bf16", op,
                       (int)dtype);
    return HT_OK;
}

struct named {
    const char *name;
    const void *p;
};

/* All pointers there. */
static enum ht_status check_pointers(const char *op, const struct named *list, int n)
{
    for (int i = 0; i < n; i++)
        if (!list[i].p) return HT_FAIL(HT_ERR_ARG, "%s: %s is NULL", op, list[i].name);
    return HT_OK;
}
#define CHECK_POINTERS(op, ...)                                                                    \
    check_pointers(op, (const struct named[]){ __VA_ARGS__ },                                      \
                   (int)(sizeof((const struct named[]){ __VA_ARGS__ }) / sizeof(struct named)))

static enum ht_status check_stride(const char *op, const char *what, int64_t stride, int64_t width)
{
    if (stride >= width) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: %s is %" PRId64 "; a row has %" PRId64 " elements", op, what,
                   stride, width);
}

static enum ht_status check_seqs(const struct ht_backend *be, const char *op,
                                 const struct ht_seqs *s, int64_t n_tokens)
{
    if (s->n_seqs < 1 || !s->starts)
        return HT_FAIL(HT_ERR_ARG, "%s: n_seqs is %" PRId64 ", starts is %s; at least one sequence",
                       op, s->n_seqs, s->starts ? "there" : "NULL");
    if (be->kind == HT_BACKEND_CUDA) { // starts are device memory; kernels count with int
        if (n_tokens <= INT32_MAX && s->n_seqs <= n_tokens) return HT_OK;
        return HT_FAIL(HT_ERR_ARG,
                       "%s: %" PRId64 " tokens in %" PRId64 " sequences; at most %d tokens, and a "
                       "token in every sequence",
                       op, n_tokens, s->n_seqs, INT32_MAX);
    }
    if (s->starts[0] != 0 || s->starts[s->n_seqs] != n_tokens)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: sequences cover rows %d to %d; they must cover 0 to %" PRId64, op,
                       (int)s->starts[0], (int)s->starts[s->n_seqs], n_tokens);
    for (int64_t i = 0; i < s->n_seqs; i++)
        if (s->starts[i + 1] <= s->starts[i])
            return HT_FAIL(HT_ERR_ARG,
                           "%s: sequence %" PRId64 " is rows %d to %d; none may be empty", op, i,
                           (int)s->starts[i], (int)s->starts[i + 1]);
    return HT_OK;
}

static bool overlaps(const void *a, int64_t a_stride, const void *b, int64_t b_stride,
                     int64_t n_rows, int64_t width, enum ht_dtype d)
{
    const uintptr_t e = ht_dtype_bytes(d), a0 = (uintptr_t)a, b0 = (uintptr_t)b;
    const uintptr_t row_bytes = (uintptr_t)width * e;
    const uintptr_t a1 = a0 + (uintptr_t)((n_rows - 1) * a_stride) * e + row_bytes;
    const uintptr_t b1 = b0 + (uintptr_t)((n_rows - 1) * b_stride) * e + row_bytes;

    if (a1 <= b0 || b1 <= a0) return false;
    if (a_stride != b_stride) return true;
    // columns of one matrix: the rows interleave; they meet when the columns do
    const uintptr_t pitch = (uintptr_t)a_stride * e;
    const uintptr_t shift = (a0 > b0 ? a0 - b0 : b0 - a0) % pitch;
    return shift < row_bytes || pitch - shift < row_bytes;
}

/* ---- convolution ---- */

static enum ht_status conv1d_check(const struct ht_backend *be, const char *op,
                                   const struct ht_conv1d_args *a)
{
    if (a->d_conv < 2 || a->d_conv > 4)
        return HT_FAIL(HT_ERR_ARG, "%s: d_conv is %" PRId64 "; it must be 2, 3 or 4", op,
                       a->d_conv);
    if (a->n_channels < 8 || a->n_channels % 8 != 0)
        return HT_FAIL(HT_ERR_ARG, "%s: n_channels is %" PRId64 "; it must be a multiple of 8", op,
                       a->n_channels);
    HT_TRY(check_stride(op, "x_stride", a->x_stride, a->n_channels));
    HT_TRY(CHECK_POINTERS(op, { "x", a->x }, { "w", a->w }));
    return check_seqs(be, op, &a->seqs, a->n_tokens);
}

enum ht_status ht_conv1d_forward(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    const char *op = "conv1d_forward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(conv1d_check(be, op, a));
    HT_TRY(CHECK_POINTERS(op, { "y", a->y }));
    HT_TRY(check_stride(op, "y_stride", a->y_stride, a->n_channels));
    if (overlaps(a->x, a->x_stride, a->y, a->y_stride, a->n_tokens, a->n_channels, a->dtype))
        return HT_FAIL(HT_ERR_ARG, "%s: y overlaps x; it needs memory of its own", op);
    return ops->conv1d_forward[be->isa](be, a);
}

enum ht_status ht_conv1d_backward(struct ht_backend *be, const struct ht_conv1d_args *a)
{
    const char *op = "conv1d_backward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(conv1d_check(be, op, a));
    HT_TRY(CHECK_POINTERS(op, { "grad_y", a->grad_y }, { "grad_x", a->grad_x },
                          { "grad_w", a->grad_w }));
    HT_TRY(check_stride(op, "grad_y_stride", a->grad_y_stride, a->n_channels));
    HT_TRY(check_stride(op, "grad_x_stride", a->grad_x_stride, a->n_channels));
    if (a->state)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: state is given; gradients of a carried state are not computed", op);
    if (overlaps(a->grad_x, a->grad_x_stride, a->grad_y, a->grad_y_stride, a->n_tokens,
                 a->n_channels, a->dtype) ||
        overlaps(a->grad_x, a->grad_x_stride, a->x, a->x_stride, a->n_tokens, a->n_channels,
                 a->dtype))
        return HT_FAIL(HT_ERR_ARG, "%s: grad_x overlaps grad_y or x; it needs memory of its own",
                       op);
    return ops->conv1d_backward[be->isa](be, a);
}

size_t ht_conv1d_scratch_bytes(int64_t n_tokens, int64_t n_channels, int64_t d_conv)
{
    const int64_t blocks = (n_tokens + HT_CONV1D_BLOCK - 1) / HT_CONV1D_BLOCK;
    return ht_arena_bytes((size_t)(blocks * (d_conv + 1) * n_channels) * sizeof(float));
}

/* ---- scan ---- */

/* What forward, backward and step share. */
static enum ht_status ssd_check(const char *op, const struct ht_ssd_args *a)
{
    if (a->d_head < 8 || a->d_head > 256 || a->d_head % 8 != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: d_head is %" PRId64 "; it must be a multiple of 8 up to 256", op,
                       a->d_head);
    if (a->d_state < 8 || a->d_state > 256 || a->d_state % 8 != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: d_state is %" PRId64 "; it must be a multiple of 8 up to 256", op,
                       a->d_state);
    if (a->n_groups < 1 || a->n_heads < 1 || a->n_heads % a->n_groups != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: n_heads is %" PRId64 ", n_groups is %" PRId64 "; the heads must divide "
                       "evenly among the groups",
                       op, a->n_heads, a->n_groups);
    if (!(a->dt_min >= 0.0f && a->dt_max >= a->dt_min))
        return HT_FAIL(HT_ERR_ARG,
                       "%s: dt is clamped to [%g, %g]; it must be 0 <= dt_min <= dt_max", op,
                       (double)a->dt_min, (double)a->dt_max);
    HT_TRY(check_stride(op, "x_stride", a->x_stride, a->n_heads * a->d_head));
    HT_TRY(check_stride(op, "x_stride", a->x_stride, a->n_groups * a->d_state));
    HT_TRY(check_stride(op, "dt_stride", a->dt_stride, a->n_heads));
    return CHECK_POINTERS(op, { "x", a->x }, { "B", a->B }, { "C", a->C }, { "dt_raw", a->dt_raw },
                          { "dt_bias", a->dt_bias }, { "A_log", a->A_log }, { "D", a->D });
}

static enum ht_status ssd_check_chunk(const struct ht_backend *be, const char *op,
                                      const struct ht_ssd_args *a)
{
    if (a->chunk < 16 || a->chunk > 256 || (a->chunk & (a->chunk - 1)) != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: chunk is %" PRId64 "; it must be a power of two from 16 to 256", op,
                       a->chunk);
    return check_seqs(be, op, &a->seqs, a->n_tokens);
}

enum ht_status ht_ssd_forward(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const char *op = "ssd_forward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(ssd_check(op, a));
    HT_TRY(ssd_check_chunk(be, op, a));
    HT_TRY(CHECK_POINTERS(op, { "y", a->y }));
    HT_TRY(check_stride(op, "y_stride", a->y_stride, a->n_heads * a->d_head));
    return ops->ssd_forward[be->isa](be, a);
}

enum ht_status ht_ssd_backward(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const char *op = "ssd_backward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(ssd_check(op, a));
    HT_TRY(ssd_check_chunk(be, op, a));
    HT_TRY(CHECK_POINTERS(op, { "grad_y", a->grad_y }, { "grad_x", a->grad_x },
                          { "grad_B", a->grad_B }, { "grad_C", a->grad_C },
                          { "grad_dt_raw", a->grad_dt_raw }, { "grad_dt_bias", a->grad_dt_bias },
                          { "grad_A_log", a->grad_A_log }, { "grad_D", a->grad_D }));
    HT_TRY(check_stride(op, "grad_y_stride", a->grad_y_stride, a->n_heads * a->d_head));
    HT_TRY(check_stride(op, "grad_x_stride", a->grad_x_stride, a->n_heads * a->d_head));
    HT_TRY(check_stride(op, "grad_x_stride", a->grad_x_stride, a->n_groups * a->d_state));
    HT_TRY(check_stride(op, "grad_dt_stride", a->grad_dt_stride, a->n_heads));
    return ops->ssd_backward[be->isa](be, a);
}

static enum ht_status check_states(const char *op, const struct ht_ssm_states *states)
{
    if (states->dtype != HT_DTYPE_F32 && states->dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: states are %s; they can be fp32 and bf16", op,
                       ht_dtype_name(states->dtype));
    return CHECK_POINTERS(op, { "state", states->p });
}

enum ht_status ht_ssd_step(struct ht_backend *be, const struct ht_ssd_args *a,
                           const struct ht_ssm_states *states, const int32_t *slot)
{
    const char *op = "ssd_step";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(ssd_check(op, a));
    HT_TRY(CHECK_POINTERS(op, { "y", a->y }));
    HT_TRY(check_states(op, states));
    HT_TRY(check_stride(op, "y_stride", a->y_stride, a->n_heads * a->d_head));
    const bool readable = slot && be->kind == HT_BACKEND_CPU;
    for (int64_t i = 0; readable && i < a->n_tokens; i++)
        if (slot[i] < -1)
            return HT_FAIL(HT_ERR_ARG,
                           "%s: slot[%" PRId64 "] is %d; it must be -1 or a state's number", op, i,
                           (int)slot[i]);
    return ops->ssd_step[be->isa](be, a, states, slot);
}

enum ht_status ht_ssm_state_load(struct ht_backend *be, float *to,
                                 const struct ht_ssm_states *states, int64_t slot, int64_t n)
{
    HT_TRY(check_states("ssm_state_load", states));
    if (states->dtype == HT_DTYPE_F32)
        return ht_backend_copy(be, to, (const float *)states->p + slot * n, (size_t)n * sizeof *to);
    const ht_bf16 *from = (const ht_bf16 *)states->p + slot * n;
#ifdef HT_WITH_CUDA
    if (be->kind == HT_BACKEND_CUDA) return ht_ssm_state_load_cuda(be, to, from, n);
#endif
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (n > 65536)
    for (int64_t i = 0; i < n; i++) to[i] = ht_bf16_to_f32(from[i]);
    return HT_OK;
}

enum ht_status ht_ssm_state_store(struct ht_backend *be, const struct ht_ssm_states *states,
                                  int64_t slot, int64_t n, const float *from)
{
    const uint32_t key = ht_state_key(states->stream, states->first_position);

    HT_TRY(check_states("ssm_state_store", states));
    if (states->dtype == HT_DTYPE_F32)
        return ht_backend_copy(be, (float *)states->p + slot * n, from, (size_t)n * sizeof *from);
    ht_bf16 *to = (ht_bf16 *)states->p + slot * n;
#ifdef HT_WITH_CUDA
    if (be->kind == HT_BACKEND_CUDA) return ht_ssm_state_store_cuda(be, to, from, n, key);
#endif
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (n > 65536)
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, from + i, sizeof bits);
        to[i] = (ht_bf16)ht_state_bf16(bits, ht_state_noise(key, (uint32_t)i));
    }
    return HT_OK;
}

/* ---- gated norm ---- */

static enum ht_status gated_norm_check(const char *op, const struct ht_gated_norm_args *a)
{
    if (a->n_groups < 1 || a->d_inner < 8 || a->d_inner % a->n_groups != 0 ||
        a->d_inner / a->n_groups % 8 != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: d_inner is %" PRId64 ", n_groups is %" PRId64 "; a group must be a "
                       "multiple of 8 wide",
                       op, a->d_inner, a->n_groups);
    if (!(a->eps >= 0.0f))
        return HT_FAIL(HT_ERR_ARG, "%s: eps is %g; it must be >= 0", op, (double)a->eps);
    HT_TRY(check_stride(op, "z_stride", a->z_stride, a->d_inner));
    return CHECK_POINTERS(op, { "w", a->w }, { "y", a->y }, { "z", a->z });
}

enum ht_status ht_gated_norm_forward(struct ht_backend *be, const struct ht_gated_norm_args *a)
{
    const char *op = "gated_norm_forward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(gated_norm_check(op, a));
    HT_TRY(CHECK_POINTERS(op, { "o", a->o }));
    return ops->gated_norm_forward[be->isa](be, a);
}

enum ht_status ht_gated_norm_backward(struct ht_backend *be, const struct ht_gated_norm_args *a)
{
    const char *op = "gated_norm_backward";
    const struct ht_ssm_ops *ops;

    HT_TRY(row(&ops, be, op, a->dtype));
    if (a->n_tokens == 0) return HT_OK;
    HT_TRY(gated_norm_check(op, a));
    HT_TRY(CHECK_POINTERS(op, { "rstd", a->rstd }, { "grad_o", a->grad_o }, { "grad_y", a->grad_y },
                          { "grad_z", a->grad_z }, { "grad_w", a->grad_w }));
    HT_TRY(check_stride(op, "grad_z_stride", a->grad_z_stride, a->d_inner));
    return ops->gated_norm_backward[be->isa](be, a);
}

size_t ht_gated_norm_scratch_bytes(int64_t n_tokens, int64_t d_inner)
{
    const int64_t blocks = (n_tokens + HT_GATED_NORM_BLOCK - 1) / HT_GATED_NORM_BLOCK;
    return ht_arena_bytes((size_t)(blocks * d_inner) * sizeof(float));
}
