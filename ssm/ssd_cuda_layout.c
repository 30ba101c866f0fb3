/* ssm/ssd_cuda_layout.c: see ssd_cuda_layout.h. */
#include "ssm/ssd_cuda_layout.h"

enum {
    WANTED_BLOCKS = 128,       // of a walk: one per SM of an H100 (132) or A100 (108)
    MIN_SEGMENT = 256,         // tokens; shorter ones cost more in passing states than they gain
    WANTED_CHUNK_BLOCKS = 256, // of the backward's last phase: two per SM
    MAX_HEADS = 16,            // of one of them: partial sums of 8 N / 16 bytes per token and head
};
static const size_t ROUND_BYTES = (size_t)256 << 20; // 31 heads of Bamba-9B at 8192 tokens

static int64_t ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t min64(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t whole_chunks(int64_t n)
{
    return ceil_div(n, HT_SSD_CUDA_CHUNK) * HT_SSD_CUDA_CHUNK;
}

int64_t ht_ssd_cuda_span(int64_t n_tokens, int64_t n_seqs, int64_t n_columns)
{
    const int64_t wanted = ceil_div(WANTED_BLOCKS, n_columns);
    const int64_t whole = whole_chunks(n_tokens) + HT_SSD_CUDA_CHUNK; // longer than any sequence

    if (n_seqs >= wanted || n_tokens <= MIN_SEGMENT) return whole;
    const int64_t span = whole_chunks(ceil_div(n_tokens, wanted));
    return span < MIN_SEGMENT ? MIN_SEGMENT : span;
}

struct ht_ssd_cuda_blocks ht_ssd_cuda_backward_blocks(const struct ht_ssd_args *a)
{
    const int64_t of_group = a->n_heads / a->n_groups;
    const int64_t chunks = ceil_div(a->n_tokens > 0 ? a->n_tokens : 1, HT_SSD_CUDA_CHUNK);
    int64_t heads = MAX_HEADS;

    while (heads > 2 && chunks * a->n_groups * ceil_div(of_group, heads) < WANTED_CHUNK_BLOCKS)
        heads /= 2;
    heads = min64(heads, of_group);
    return (struct ht_ssd_cuda_blocks){ heads, ceil_div(of_group, heads) };
}

size_t ht_ssd_cuda_segment_bytes(const struct ht_ssd_args *a, int64_t n_heads, int64_t span)
{
    const size_t slots = (size_t)ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, span);
    const size_t state = (size_t)(a->d_head * a->d_state);

    if (span > a->n_tokens) return 0;
    return ht_arena_bytes(slots * (size_t)n_heads * state * sizeof(float)) +
           ht_arena_bytes(slots * (size_t)n_heads * sizeof(float));
}

/* Heads of n_blocks blocks, which may include a shorter last one. */
static int64_t heads_of(const struct ht_ssd_args *a, int64_t n_blocks)
{
    return min64(n_blocks * ht_ssd_cuda_backward_blocks(a).heads, a->n_heads);
}

size_t ht_ssd_cuda_round_bytes(const struct ht_ssd_args *a, int64_t n_blocks)
{
    const size_t slots = (size_t)ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, HT_SSD_CUDA_CHUNK);
    const int64_t heads = heads_of(a, n_blocks);
    const size_t state = (size_t)(a->d_head * a->d_state) * ht_dtype_bytes(a->dtype);
    // a walk has a column per head, two heads or part of a head; none takes more than one per head
    const int64_t span = ht_ssd_cuda_span(a->n_tokens, a->seqs.n_seqs, ceil_div(heads, 2));

    return 2 * ht_arena_bytes(slots * (size_t)heads * state) +
           ht_ssd_cuda_segment_bytes(a, heads, span);
}

size_t ht_ssd_cuda_shared_bytes(const struct ht_ssd_args *a)
{
    const size_t slots = (size_t)ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, HT_SSD_CUDA_CHUNK);
    const size_t blocks = (size_t)(a->n_groups * ht_ssd_cuda_backward_blocks(a).per_group);

    return ht_arena_bytes(blocks * (size_t)(a->n_tokens * 2 * a->d_state) * sizeof(float)) +
           ht_arena_bytes(slots * (size_t)a->n_heads * HT_SSD_CUDA_SUMS * sizeof(float));
}

int64_t ht_ssd_cuda_round(const struct ht_ssd_args *a, size_t bytes)
{
    const int64_t all = a->n_groups * ht_ssd_cuda_backward_blocks(a).per_group;
    int64_t n = 1;

    while (n < all && ht_ssd_cuda_round_bytes(a, n + 1) <= bytes) n++;
    return n;
}

/* The planner knows the tokens, not the documents: one per chunk on average is allowed for. */
static struct ht_ssd_args many_sequences(const struct ht_ssd_args *a)
{
    struct ht_ssd_args b = *a;
    const int64_t n = ceil_div(a->n_tokens, HT_SSD_CUDA_CHUNK);
    b.seqs.n_seqs = n > a->seqs.n_seqs ? n : a->seqs.n_seqs;
    return b;
}

size_t ht_ssd_forward_scratch_bytes_cuda(const struct ht_ssd_args *a)
{
    const int64_t columns = ceil_div(a->n_heads, 2); // of a walk, at least
    struct ht_ssd_args b = *a;
    size_t most = 0;

    // more sequences need more slots until there are enough not to cut them
    for (b.seqs.n_seqs = 1; b.seqs.n_seqs <= WANTED_BLOCKS; b.seqs.n_seqs++) {
        const int64_t span = ht_ssd_cuda_span(b.n_tokens, b.seqs.n_seqs, columns);
        const size_t n = ht_ssd_cuda_segment_bytes(&b, b.n_heads, span);
        if (n > most) most = n;
    }
    return most;
}

size_t ht_ssd_backward_scratch_bytes_cuda(const struct ht_ssd_args *a)
{
    const struct ht_ssd_args many = many_sequences(a);
    size_t least = ht_ssd_cuda_round_bytes(&many, 1), most = 0;

    // the largest number of blocks that a round may take for one sequence, or for many
    for (int i = 0; i < 2; i++) {
        const struct ht_ssd_args *b = i ? &many : a;
        const size_t n = ht_ssd_cuda_round_bytes(b, ht_ssd_cuda_round(b, ROUND_BYTES));
        if (n > most) most = n;
    }
    return ht_ssd_cuda_shared_bytes(&many) + (most > least ? most : least);
}
