/* attention/attention_ops.c: which attention function runs where, checks, scratch sizes. */
#include <math.h>

#include "attention/attention_cpu.h"
#include "attention/attention_cuda.h"

HT_ISA_DECLARE(ht_flash_fn, ht_flash_forward_cpu);
HT_ISA_DECLARE(ht_flash_fn, ht_flash_backward_cpu);
HT_ISA_DECLARE(ht_kv_attention_fn, ht_kv_attention_cpu);
HT_ISA_DECLARE(ht_rope_fn, ht_rope_apply_cpu);

static const struct {
    ht_flash_fn *flash_forward[HT_ISA_COUNT], *flash_backward[HT_ISA_COUNT];
    ht_kv_attention_fn *kv_attention[HT_ISA_COUNT];
    ht_rope_fn *rope_apply[HT_ISA_COUNT];
} ops[HT_BACKEND_COUNT] = {
    [HT_BACKEND_CPU] = { HT_ISA_ROW(ht_flash_forward_cpu), HT_ISA_ROW(ht_flash_backward_cpu),
                         HT_ISA_ROW(ht_kv_attention_cpu), HT_ISA_ROW(ht_rope_apply_cpu) },
#ifdef HT_WITH_CUDA
#define ANY_ISA(name)                                                                              \
    {                                                                                              \
        [0 ... HT_ISA_COUNT - 1] = name                                                            \
    }
    [HT_BACKEND_CUDA] = { ANY_ISA(ht_flash_forward_cuda), ANY_ISA(ht_flash_backward_cuda),
                          ANY_ISA(ht_kv_attention_cuda), ANY_ISA(ht_rope_apply_cuda) },
#undef ANY_ISA
#endif
};

static enum ht_status unsupported(const char *what)
{
    return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: this build has no kernels for the backend", what);
}

static enum ht_status check_dtype(const char *what, enum ht_dtype dtype)
{
    if (dtype == HT_DTYPE_F32 || dtype == HT_DTYPE_BF16) return HT_OK;
    return HT_FAIL(HT_ERR_UNSUPPORTED, "%s: dtype %s; fp32 and bf16 are computed", what,
                   ht_dtype_name(dtype));
}

static enum ht_status check_heads(const char *what, int64_t n_heads, int64_t n_kv_heads,
                                  int64_t d_head, float scale)
{
    if (n_kv_heads < 1 || n_heads < 1 || n_heads % n_kv_heads != 0)
        return HT_FAIL(HT_ERR_ARG, "%s: %lld heads over %lld kv heads; must be a multiple", what,
                       (long long)n_heads, (long long)n_kv_heads);
    if (d_head < 8 || d_head > HT_ATTENTION_MAX_D_HEAD || d_head % 8 != 0)
        return HT_FAIL(HT_ERR_ARG, "%s: d_head is %lld; must be a multiple of 8 from 8 to %d", what,
                       (long long)d_head, HT_ATTENTION_MAX_D_HEAD);
    if (!(scale > 0.0f) || !isfinite(scale))
        return HT_FAIL(HT_ERR_ARG, "%s: scale is %g; must be positive and finite", what,
                       (double)scale);
    return HT_OK;
}

/* On CUDA the starts are on the device, where only the kernels see them. */
static enum ht_status check_seqs(const char *what, const struct ht_backend *be,
                                 const struct ht_seqs *s, int64_t n_tokens)
{
    if (s->n_seqs < 1 || n_tokens < s->n_seqs || n_tokens > INT32_MAX)
        return HT_FAIL(HT_ERR_ARG, "%s: %lld sequences do not cover rows 0 to %lld", what,
                       (long long)s->n_seqs, (long long)n_tokens);
    if (be->kind != HT_BACKEND_CPU) return HT_OK;
    if (s->starts[0] != 0 || s->starts[s->n_seqs] != n_tokens)
        return HT_FAIL(HT_ERR_ARG, "%s: %lld sequences do not cover rows 0 to %lld", what,
                       (long long)s->n_seqs, (long long)n_tokens);
    for (int64_t i = 0; i < s->n_seqs; i++)
        if (s->starts[i] >= s->starts[i + 1])
            return HT_FAIL(HT_ERR_ARG, "%s: sequence %lld starts at row %d and ends at %d", what,
                           (long long)i, s->starts[i], s->starts[i + 1]);
    return HT_OK;
}

static enum ht_status check_stride(const char *what, const char *name, int64_t stride,
                                   int64_t width)
{
    if (stride >= width) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "%s: %s is %lld, below the row's width %lld", what, name,
                   (long long)stride, (long long)width);
}

static enum ht_status flash_check(const char *what, const struct ht_backend *be,
                                  const struct ht_flash_args *a)
{
    HT_TRY(check_dtype(what, a->dtype));
    HT_TRY(check_heads(what, a->n_heads, a->n_kv_heads, a->d_head, a->scale));
    HT_TRY(check_seqs(what, be, &a->seqs, a->n_tokens));
    return check_stride(what, "qkv_stride", a->qkv_stride,
                        (a->n_heads + 2 * a->n_kv_heads) * a->d_head);
}

enum ht_status ht_flash_forward(struct ht_backend *be, const struct ht_flash_args *a)
{
    HT_TRY(flash_check("flash_forward", be, a));
    ht_flash_fn *fn = ops[be->kind].flash_forward[be->isa];
    return fn ? fn(be, a) : unsupported("flash_forward");
}

enum ht_status ht_flash_backward(struct ht_backend *be, const struct ht_flash_args *a)
{
    HT_TRY(flash_check("flash_backward", be, a));
    HT_TRY(check_stride("flash_backward", "grad_qkv_stride", a->grad_qkv_stride,
                        (a->n_heads + 2 * a->n_kv_heads) * a->d_head));
    if (!a->lse || !a->o || !a->grad_o || !a->grad_qkv)
        return HT_FAIL(HT_ERR_ARG, "flash_backward: o, lse, grad_o and grad_qkv are all needed");
    ht_flash_fn *fn = ops[be->kind].flash_backward[be->isa];
    return fn ? fn(be, a) : unsupported("flash_backward");
}

enum ht_status ht_kv_attention(struct ht_backend *be, const struct ht_kv_attention_args *a)
{
    const char *what = "kv_attention";
    HT_TRY(check_dtype(what, a->dtype));
    HT_TRY(check_heads(what, a->n_heads, a->n_kv_heads, a->d_head, a->scale));
    HT_TRY(check_seqs(what, be, &a->seqs, a->n_tokens));
    HT_TRY(check_stride(what, "q_stride", a->q_stride, a->n_heads * a->d_head));
    for (int64_t s = 0; s < a->seqs.n_seqs && be->kind == HT_BACKEND_CPU; s++)
        if (a->past[s] < 0)
            return HT_FAIL(HT_ERR_ARG, "kv_attention: sequence %lld has %lld past tokens",
                           (long long)s, (long long)a->past[s]);
    ht_kv_attention_fn *fn = ops[be->kind].kv_attention[be->isa];
    return fn ? fn(be, a) : unsupported(what);
}

enum ht_status ht_rope_apply(struct ht_backend *be, const struct ht_rope_args *a)
{
    HT_TRY(check_dtype("rope", a->dtype));
    HT_TRY(check_heads("rope", a->n_heads, a->n_kv_heads, a->d_head, 1.0f));
    HT_TRY(check_stride("rope", "qkv_stride", a->qkv_stride,
                        (a->n_heads + 2 * a->n_kv_heads) * a->d_head));
    if (a->rope_dims < 0 || a->rope_dims > a->d_head || a->rope_dims % 2 != 0)
        return HT_FAIL(HT_ERR_ARG, "rope: rope_dims is %lld; must be even, from 0 to d_head = %lld",
                       (long long)a->rope_dims, (long long)a->d_head);
    for (int64_t t = 0; t < a->n_tokens && be->kind == HT_BACKEND_CPU; t++)
        if (a->pos[t] < 0 || a->pos[t] >= a->n_positions)
            return HT_FAIL(HT_ERR_ARG, "rope: token %lld has position %d; the table has 0 to %lld",
                           (long long)t, a->pos[t], (long long)a->n_positions - 1);
    if (a->rope_dims == 0) return HT_OK;
    ht_rope_fn *fn = ops[be->kind].rope_apply[be->isa];
    return fn ? fn(be, a) : unsupported("rope");
}

struct ht_attention_view ht_attention_flash_view(const struct ht_flash_args *a, int64_t seq,
                                                 int64_t kv_head)
{
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype), d = a->d_head;
    const int64_t group = a->n_heads / a->n_kv_heads, first = a->seqs.starts[seq];
    const int64_t q_at = kv_head * group * d, k_at = (a->n_heads + kv_head) * d;
    const int64_t v_at = k_at + a->n_kv_heads * d, o_at = (first * a->n_heads) * d + q_at;
    const char *row = (const char *)a->qkv + first * a->qkv_stride * element;
    struct ht_attention_view view = {
        .q = row + q_at * element,
        .k = row + k_at * element,
        .v = row + v_at * element,
        .q_stride = a->qkv_stride,
        .kv_stride = a->qkv_stride,
        .o = (char *)a->o + o_at * element,
        .o_stride = a->n_heads * d,
        .lse = a->lse ? a->lse + first * a->n_heads + kv_head * group : NULL,
        .lse_stride = a->n_heads,
        .n_new = a->seqs.starts[seq + 1] - first,
        .group = group,
        .d_head = d,
        .dtype = a->dtype,
        .scale = a->scale,
    };
    if (a->grad_qkv) {
        char *grad_row = (char *)a->grad_qkv + first * a->grad_qkv_stride * element;
        view.grad_o = (const char *)a->grad_o + o_at * element;
        view.grad_q = grad_row + q_at * element;
        view.grad_k = grad_row + k_at * element;
        view.grad_v = grad_row + v_at * element;
        view.grad_stride = a->grad_qkv_stride;
    }
    return view;
}

bool ht_attention_backward_one_pass(const struct ht_flash_args *a, int n_threads)
{
    double longest = 0.0, total = 0.0;

    for (int64_t s = 0; s < a->seqs.n_seqs; s++) {
        const double n = a->seqs.starts[s + 1] - a->seqs.starts[s];
        if (n > HT_ATTENTION_ONE_PASS_MAX) return false;
        total += n * n * (double)a->n_kv_heads;
        longest = fmax(longest, n * n);
    }
    const double tasks = (double)(a->seqs.n_seqs * a->n_kv_heads);
    const double rounds = ceil(tasks / n_threads), one_pass = fmax(rounds * total / tasks, longest);
    return 5.0 * one_pass <= 7.0 * total / n_threads;
}

int64_t ht_attention_forward_floats(int64_t d_head)
{
    const int64_t columns = HT_ATTENTION_MAX_COLUMNS, keys = HT_ATTENTION_KEY_TILE;
    return 2 * columns * d_head + 2 * columns   // Q, O; m, l
           + 2 * keys * d_head                  // K, V
           + 2 * keys * HT_ATTENTION_QUERY_TILE // S, P (one panel)
           + HT_ATTENTION_QUERY_TILE * d_head;  // temporary rows
}

int64_t ht_attention_backward_floats(int64_t d_head, int64_t max_tokens)
{
    const int64_t lanes = HT_ATTENTION_LANES, d_pad = (d_head + lanes - 1) / lanes * lanes;
    const int64_t tile = HT_ATTENTION_QUERY_TILE, keys = HT_ATTENTION_KEY_TILE;
    const int64_t tiles = HT_ATTENTION_MAX_COLUMNS / tile;
    int64_t held = max_tokens < HT_ATTENTION_ONE_PASS_MAX ? max_tokens : HT_ATTENTION_ONE_PASS_MAX;
    if (held < HT_ATTENTION_KEY_BLOCK) held = HT_ATTENTION_KEY_BLOCK;
    held = (held + keys - 1) / keys * keys;
    return held * (3 * d_head + 2 * d_pad)                   // K, V, K^T; grad_k, grad_v
           + tiles * tile * (3 * d_head + 2 * d_pad + 3)     // per query tile
           + 3 * keys * tile + lanes * tile + tile * d_head; // P, dS twice, a register tile, rows
}

size_t ht_flash_scratch_bytes(const struct ht_flash_args *a, int n_threads)
{
    const int64_t forward = ht_attention_forward_floats(a->d_head);
    const int64_t backward = ht_attention_backward_floats(a->d_head, a->n_tokens);
    const int64_t floats = forward > backward ? forward : backward;
    const size_t cpu = (size_t)floats * (size_t)n_threads * sizeof(float);
    const size_t cuda = ht_attention_cuda_backward_bytes(a);
    return ht_arena_bytes(cpu > cuda ? cpu : cuda); // for either backend
}

size_t ht_kv_attention_scratch_bytes(const struct ht_kv_attention_args *a, int n_threads)
{
    const size_t tiles =
        (size_t)ht_attention_forward_floats(a->d_head) * (size_t)n_threads * sizeof(float);
    int64_t blocks = 0;

    for (int64_t s = 0; s < a->seqs.n_seqs; s++)
        if (ht_attention_is_decode(&a->seqs, s)) blocks += ht_attention_key_blocks(a->past[s] + 1);
    const size_t partial =
        (size_t)(blocks * a->n_heads * ht_attention_decode_slot(a->d_head)) * sizeof(float);
    const size_t cpu = ht_arena_bytes(tiles) + ht_arena_bytes(partial);
    const size_t cuda = ht_arena_bytes(ht_attention_cuda_decode_bytes(a));
    return cpu > cuda ? cpu : cuda; // for either backend
}
