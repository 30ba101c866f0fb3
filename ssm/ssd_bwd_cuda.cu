/* ssm/ssd_bwd_cuda.cu: the chunked scan backward (spec 4.2, B1 to B6) in three phases, each with
 * sums in a fixed order.
 *
 *   A  states S entering every chunk           (ssd_states_cuda.cu, forward in time)
 *   B  gradients dS of the states leaving it   (ssd_states_cuda.cu, backward in time)
 *   C  everything else, all chunks at once     (ssd_bwd_chunk_cuda.cu)
 *
 * and the partial sums of C over blocks of heads and over chunks in order. A and B store states in
 * the tensors' type; they run in rounds over the heads, so that those states fit into scratch.
 *
 * Cost of A and B per token and head: 4 P N FLOP; the states take 2 P N / 64 elements written and
 * read again: 131 KB per token at Bamba's shape in bf16, most of the traffic.
 */
#include "ssm/ssd_bwd_cuda.h"

namespace {

/* grad_B and grad_C: partial sums over the blocks of heads of a group, in order. Two elements per
 * thread. */
template <typename T>
__global__ void __launch_bounds__(kSsdThreads)
    ssd_sum_blocks_kernel(T *grad_B, T *grad_C, int64_t stride, const float *partial, int n_tokens,
                          int n_groups, int per_group, int d_state)
{
    const int64_t i = ((int64_t)blockIdx.x * kSsdThreads + threadIdx.x) * 2;
    const int64_t per_token = (int64_t)n_groups * 2 * d_state;
    const int64_t t = i / per_token, block_size = (int64_t)n_tokens * 2 * d_state;
    if (t >= n_tokens) return;
    const int g = (int)(i % per_token / (2 * d_state)), which = (int)(i / d_state % 2);
    const int n = (int)(i % d_state);
    const float *p = partial + g * per_group * block_size + (2 * t + which) * d_state + n;
    float2 sum = load_pair(p);
    for (int b = 1; b < per_group; b++) {
        const float2 v = load_pair(p + b * block_size);
        sum.x += v.x;
        sum.y += v.y;
    }
    store_pair((which ? grad_C : grad_B) + t * stride + g * d_state + n, sum.x, sum.y);
}

/* grad of dt_bias, A_log and D: one thread block per head, over chunks and warps in order. */
__global__ void __launch_bounds__(kSsdThreads)
    ssd_sum_chunks_kernel(float *grad_dt_bias, float *grad_A_log, float *grad_D, const float *sums,
                          const float *A_log, int n_slots, int n_heads)
{
    const int head = (int)blockIdx.x;
    double sum[3] = { 0, 0, 0 };
    for (int i = (int)threadIdx.x; i < n_slots * kSsdWarps; i += kSsdThreads) {
        const float *p = sums + ((int64_t)(i / kSsdWarps) * n_heads + head) * HT_SSD_CUDA_SUMS +
                         i % kSsdWarps * 3;
        for (int k = 0; k < 3; k++) sum[k] += (double)p[k];
    }
    for (int k = 0; k < 3; k++) sum[k] = block_sum<kSsdThreads>(sum[k]);
    if (threadIdx.x == 0) {
        grad_dt_bias[head] += (float)sum[0];
        grad_A_log[head] += -expf(A_log[head]) * (float)sum[1];
        grad_D[head] += (float)sum[2];
    }
}

/* Phases A, B and C for blocks of heads from `first` on; b.S, b.grad_S and the segments of the
 * walks lie in scratch behind `mark`. */
template <typename T>
enum ht_status round_of_heads(struct ht_backend *be, const struct ht_ssd_args *a,
                              ssd_backward_args b, int64_t slots)
{
    const int n_heads = n_heads_of(b.heads);
    const size_t bytes =
        (size_t)slots * (size_t)n_heads * (size_t)(a->d_head * a->d_state) * sizeof(T);
    void *S = NULL, *grad_S = NULL;
    ssd_walk w;

    HT_TRY(ht_arena_take(&S, &be->scratch, bytes));
    HT_TRY(ht_arena_take(&grad_S, &be->scratch, bytes));
    b.S = S;
    b.grad_S = grad_S;
    w.starts = b.starts;
    w.n_seqs = b.n_seqs;
    w.n_tokens = b.n_tokens;
    w.n_heads = b.n_heads;
    w.d_head = b.d_head;
    w.d_state = b.d_state;
    w.heads = b.heads;
    w.steps = b.steps;
    w.u = a->x;
    w.u_stride = w.v_stride = a->x_stride;
    w.v = a->B;
    w.reverse = false;
    w.seed = a->init_state;
    w.final = NULL;
    w.chunk_states = S;
    const size_t mark = ht_arena_mark(&be->scratch);
    HT_TRY(ssd_walk_states<T>(be, w));
    ht_arena_reset(&be->scratch, mark); // the stream keeps the order
    w.u = a->grad_y;
    w.u_stride = a->grad_y_stride;
    w.v = a->C;
    w.reverse = true;
    w.seed = a->grad_final_state;
    w.final = a->grad_init_state;
    w.chunk_states = grad_S;
    HT_TRY(ssd_walk_states<T>(be, w));
    return ssd_backward_chunks<T>(be, b, slots);
}

template <typename T>
enum ht_status launch(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const struct ht_ssd_cuda_blocks blocks = ht_ssd_cuda_backward_blocks(a);
    const int64_t slots = ht_ssd_cuda_slots(a->n_tokens, a->seqs.n_seqs, kChunk);
    const int n_blocks = (int)(a->n_groups * blocks.per_group);
    const size_t sums_bytes = (size_t)slots * (size_t)a->n_heads * HT_SSD_CUDA_SUMS * sizeof(float);
    using widest = backward_shape<T, sizeof(T) == 2 ? 128 : 64, sizeof(T) == 2 ? 64 : 32, false>;
    void *partial = NULL, *sums = NULL;
    ssd_backward_args b;
    int n_stages;

    // before anything is written
    HT_TRY(pick_stages(&n_stages, be, "ssd_backward", widest::bytes(1), widest::bytes(2)));
    HT_TRY(
        ht_arena_take(&partial, &be->scratch,
                      (size_t)n_blocks * (size_t)(a->n_tokens * 2 * a->d_state) * sizeof(float)));
    HT_TRY(ht_arena_take(&sums, &be->scratch, sums_bytes));
    const size_t mark = ht_arena_mark(&be->scratch);
    const int round = (int)ht_ssd_cuda_round(a, be->scratch.size_bytes - be->scratch.used_bytes);
    b.starts = a->seqs.starts;
    b.n_seqs = (int)a->seqs.n_seqs;
    b.n_tokens = (int)a->n_tokens;
    b.n_heads = (int)a->n_heads;
    b.d_head = (int)a->d_head;
    b.d_state = (int)a->d_state;
    b.heads = ssd_heads{ (int)(a->n_heads / a->n_groups), (int)blocks.heads, (int)blocks.per_group,
                         0, 0 };
    b.steps = time_steps_of(a);
    b.x = a->x;
    b.B = a->B;
    b.C = a->C;
    b.grad_y = a->grad_y;
    b.x_stride = a->x_stride;
    b.grad_y_stride = a->grad_y_stride;
    b.D = a->D;
    b.grad_x = a->grad_x;
    b.grad_x_stride = a->grad_x_stride;
    b.grad_dt_raw = a->grad_dt_raw;
    b.grad_dt_stride = a->grad_dt_stride;
    b.partial = (float *)partial;
    b.sums = (float *)sums;
    for (int first = 0; first < n_blocks; first += round) {
        b.heads.first = first;
        b.heads.n_blocks = first + round < n_blocks ? round : n_blocks - first;
        HT_TRY(round_of_heads<T>(be, a, b, slots));
        ht_arena_reset(&be->scratch, mark);
    }
    const int64_t pairs = a->n_tokens * a->n_groups * a->d_state;
    HT_LAUNCH(be, ssd_sum_blocks_kernel<T>, (unsigned)ceil_div(pairs, kSsdThreads), kSsdThreads, 0,
              (T *)a->grad_B, (T *)a->grad_C, a->grad_x_stride, b.partial, b.n_tokens,
              (int)a->n_groups, (int)blocks.per_group, b.d_state);
    HT_LAUNCH(be, ssd_sum_chunks_kernel, (unsigned)a->n_heads, kSsdThreads, 0, a->grad_dt_bias,
              a->grad_A_log, a->grad_D, b.sums, a->A_log, (int)slots, b.n_heads);
    return ht_cuda_check_launch(be, "ssd_backward sums");
}

} // namespace

extern "C" enum ht_status ht_ssd_backward_cuda(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const char *op = "ssd_backward";
    const size_t mark = ht_arena_mark(&be->scratch);

    HT_TRY(check_rows_aligned(op, "x", a->x, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "B", a->B, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "C", a->C, a->x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_y", a->grad_y, a->grad_y_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_x", a->grad_x, a->grad_x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_B", a->grad_B, a->grad_x_stride, a->dtype));
    HT_TRY(check_rows_aligned(op, "grad_C", a->grad_C, a->grad_x_stride, a->dtype));
    const enum ht_status st = HT_DISPATCH(a->dtype, op, launch, be, a);
    ht_arena_reset(&be->scratch, mark);
    return st;
}
