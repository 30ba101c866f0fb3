/* ssm/ssd_layout.c: see ssd_layout.h. */
#include "ssm/ssd_layout.h"

#include <omp.h>

#include "ssm/ssd_cpu.h"

enum {
    FORWARD_HEADS = 8,       // their states at P 64, N 128: 256 KiB, a quarter of 1 MiB L2
    SEGMENT_BYTES = 8 << 20, // of states held by a backward task: two tasks fit in a 32 MiB L3
    MIN_SEGMENT = 4
};

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

struct ht_ssd_blocks ht_ssd_forward_blocks(const struct ht_ssd_args *a, int n_threads)
{
    const int64_t of_group = a->n_heads / a->n_groups;
    // two tasks per thread at least, while a block shares its scores among enough heads
    const int64_t wanted = ceil_div(2 * (int64_t)n_threads, a->seqs.n_seqs * a->n_groups);
    const int64_t heads = min64(FORWARD_HEADS, ceil_div(of_group, min64(wanted, of_group)));
    return (struct ht_ssd_blocks){ heads, ceil_div(of_group, heads) };
}

struct ht_ssd_blocks ht_ssd_backward_blocks(const struct ht_ssd_args *a)
{
    const int64_t of_group = a->n_heads / a->n_groups;
    // Eight heads share the scores' gradient well (one thread, 24 heads: blocks of 2, 4, 6, 8, 12
    // took 12.2, 11.2, 9.8, 8.7, 8.7 us per token on a busy 2-core Zen 5 VM) and cost 8 N bytes of
    // partial sums per token; but a single sequence should still make four tasks.
    const int64_t at_least = min64(of_group, ceil_div(4, a->n_groups));
    const int64_t by_heads = ceil_div(of_group, 8);
    const int64_t heads = ceil_div(of_group, by_heads > at_least ? by_heads : at_least);
    return (struct ht_ssd_blocks){ heads, ceil_div(of_group, heads) };
}

struct ht_ssd_task ht_ssd_task_at(const struct ht_ssd_args *a, const struct ht_ssd_blocks *blocks,
                                  int64_t index)
{
    const int64_t of_group = a->n_heads / a->n_groups;
    const int64_t of_seq = blocks->per_group * a->n_groups, block = index % of_seq;
    const int64_t group = block / blocks->per_group;
    struct ht_ssd_task t = { .seq = index / of_seq, .group = group, .block = block };

    t.head0 = group * of_group + block % blocks->per_group * blocks->heads;
    t.head1 = min64(t.head0 + blocks->heads, (group + 1) * of_group);
    return t;
}

struct ht_ssd_segments ht_ssd_segments(const struct ht_ssd_args *a)
{
    const int64_t n_chunks = ceil_div(a->n_tokens > 0 ? a->n_tokens : 1, a->chunk);
    const int64_t bytes = ht_ssd_backward_blocks(a).heads * ht_ssd_pad(a->d_head) *
                          ht_ssd_pad(a->d_state) * (int64_t)sizeof(float);
    int64_t chunks = SEGMENT_BYTES / bytes;

    if (chunks < MIN_SEGMENT) chunks = MIN_SEGMENT;
    chunks = min64(chunks, n_chunks);
    return (struct ht_ssd_segments){ chunks, ceil_div(n_chunks, chunks) };
}

/* The next n elements of e bytes. */
static void *take(uintptr_t *at, int64_t n, size_t e)
{
    void *p = (void *)*at;
    *at += ht_arena_bytes((size_t)n * e);
    return p;
}

size_t ht_ssd_forward_worker_layout(struct ht_ssd_forward_worker *w, void *base,
                                    const struct ht_ssd_args *a)
{
    const int64_t Q = a->chunk, Np = ht_ssd_pad(a->d_state), Pp = ht_ssd_pad(a->d_head);
    const size_t e = sizeof(float);
    uintptr_t at = (uintptr_t)base;

    w->B_rows = take(&at, Q * Np, e);
    w->C_rows = take(&at, Q * Np, e);
    w->B_cols = take(&at, Q * Np, e);
    w->B_pairs = take(&at, Q * Np, e);
    w->B_t = take(&at, Q * Np, e);
    w->K = take(&at, Q * Q, e);
    w->x = take(&at, Q * Pp, e);
    w->x_out = take(&at, Q * Pp, e);
    w->M = take(&at, Q * Q, e);
    w->S_pairs = take(&at, Np * Pp, e);
    w->y = take(&at, Q * Pp, e);
    w->decay = take(&at, 1, sizeof(struct ssd_decay));
    w->S = take(&at, min64(FORWARD_HEADS, a->n_heads / a->n_groups) * Np * Pp, e);
    return at - (uintptr_t)base;
}

size_t ht_ssd_backward_worker_layout(struct ht_ssd_backward_worker *w, void *base,
                                     const struct ht_ssd_args *a)
{
    const struct ht_ssd_segments seg = ht_ssd_segments(a);
    const int64_t heads = ht_ssd_backward_blocks(a).heads;
    const int64_t Q = a->chunk, Np = ht_ssd_pad(a->d_state), Pp = ht_ssd_pad(a->d_head);
    const size_t e = sizeof(float);
    uintptr_t at = (uintptr_t)base;

    w->B_rows = take(&at, Q * Np, e);
    w->C_rows = take(&at, Q * Np, e);
    w->C_cols = take(&at, Q * Np, e);
    w->pairs = take(&at, Q * Np, e);
    w->B_t = take(&at, Q * Np, e);
    w->C_t = take(&at, Q * Np, e);
    w->K = take(&at, Q * Q, e);
    w->grad_K = take(&at, Q * Q, e);
    w->grad_B_t = take(&at, Q * Np, e);
    w->grad_C_t = take(&at, Q * Np, e);
    w->x_rows = take(&at, Q * Pp, e);
    w->gy_rows = take(&at, Q * Pp, e);
    w->x_cols = take(&at, Q * Pp, e);
    w->gy_cols = take(&at, Q * Pp, e);
    w->gy_pairs = take(&at, Q * Pp, e);
    w->gy_in_pairs = take(&at, Q * Pp, e);
    w->x_out = take(&at, Q * Pp, e);
    w->G = take(&at, Q * Q, e);
    w->M = take(&at, Q * Q, e);
    w->grad_u = take(&at, Q * Pp, e);
    w->grad_S_rows = take(&at, Np * Pp, e);
    w->grad_S_pairs = take(&at, Np * Pp, e);
    w->decay = take(&at, 1, sizeof(struct ssd_decay));
    w->S = take(&at, heads * Np * Pp, e);
    w->grad_S = take(&at, heads * Np * Pp, e);
    w->states = take(&at, seg.chunks * heads * Np * Pp, e);
    w->kept = take(&at, seg.n_segments * heads * Np * Pp, e);
    w->head_sums = take(&at, heads * 3, sizeof(double));
    return at - (uintptr_t)base;
}

size_t ht_ssd_backward_shared_layout(struct ht_ssd_backward_shared *s, void *base,
                                     const struct ht_ssd_args *a)
{
    const int64_t blocks = a->n_groups * ht_ssd_backward_blocks(a).per_group;
    uintptr_t at = (uintptr_t)base;

    s->partial = take(&at, blocks * a->n_tokens * 2 * a->d_state, sizeof(float));
    // sizes must not depend on how tokens are cut: there are at most n_tokens sequences
    s->sums = take(&at, a->n_tokens * a->n_heads * 3, sizeof(float));
    return at - (uintptr_t)base;
}

enum ht_status ht_ssd_take_workers(unsigned char **shared, unsigned char **slices, int *n_workers,
                                   struct ht_backend *be, size_t shared_bytes, size_t worker_bytes,
                                   int64_t n_tasks)
{
    int64_t n = be->n_threads > 1 ? be->n_threads : 1;
    void *p = NULL;

    if (n > n_tasks) n = n_tasks;
    const size_t left = be->scratch.size_bytes - be->scratch.used_bytes;
    while (n > 1 && ht_arena_bytes(shared_bytes) + (size_t)n * worker_bytes > left) n--;
    HT_TRY(ht_arena_take(&p, &be->scratch, shared_bytes));
    *shared = p;
    HT_TRY(ht_arena_take(&p, &be->scratch, (size_t)n * worker_bytes));
    *slices = p;
    *n_workers = (int)n;
    return HT_OK;
}

size_t ht_ssd_forward_scratch_bytes(const struct ht_ssd_args *a)
{
    struct ht_ssd_forward_worker w;
    return ht_ssd_forward_worker_layout(&w, NULL, a) * (size_t)omp_get_max_threads();
}

size_t ht_ssd_backward_scratch_bytes(const struct ht_ssd_args *a)
{
    struct ht_ssd_backward_worker w;
    struct ht_ssd_backward_shared s;
    return ht_ssd_backward_shared_layout(&s, NULL, a) +
           ht_ssd_backward_worker_layout(&w, NULL, a) * (size_t)omp_get_max_threads();
}
