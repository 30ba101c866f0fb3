/* ssm/ssd_fwd_cpu.c: the chunked scan, forward (spec 4.1). One task walks one sequence for a block
 * of heads of one group, chunk by chunk, with the states of those heads in cache.
 *
 *   once per chunk and block    K = C B^T (lower half)
 *   per head                    y = diag(in) C S + M x + D x     M = K L dt
 *                               S = gamma S + B^T diag(dt w) x   S is (N, P) here
 *
 * Per token and head 4 P N + (Q + 1) P FLOP, plus (Q + 1) N for K, shared by the block. No result
 * depends on how heads are dealt into blocks, so the block may follow the thread count.
 */
#include "ssm/ssd_cpu.h"

#include <omp.h>

/* Operands of B and C, and the scores, for the chunk of n tokens at t0. */
static void prepare_group(const struct ht_ssd_args *a, const struct ht_ssd_forward_worker *w,
                          int64_t group, int64_t t0, int64_t n_tokens, bool half)
{
    const int64_t N = a->d_state, Np = ht_ssd_pad(N), n = ht_ssd_pad(n_tokens);
    const int64_t words = half ? Np / 2 : Np;
    const size_t at = (size_t)(t0 * a->x_stride + group * N) * ht_dtype_bytes(a->dtype);
    const struct ssd_source B = {
        (const char *)a->B + at, a->x_stride, n_tokens, N, a->dtype, NULL
    };
    const struct ssd_source C = {
        (const char *)a->C + at, a->x_stride, n_tokens, N, a->dtype, NULL
    };

    ssd_pack_rows(half, w->C_rows, n, Np, &C);
    ssd_pack_rows(half, w->B_rows, n, Np, &B);
    ssd_transpose(w->B_cols, w->B_rows, words, n, words);
    if (half) {
        ssd_pack_pairs(half, w->B_pairs, n, Np, &B);
        ssd_transpose(w->B_t, w->B_pairs, Np, n / 2, Np);
    }
    ssd_gemm_run(&(struct ssd_gemm){ .half = half,
                                     .region = SSD_LOWER_OUT,
                                     .m = n,
                                     .n = n,
                                     .k = Np,
                                     .a = w->C_rows,
                                     .lda = Np,
                                     .b = w->B_cols,
                                     .ldb = n,
                                     .c = w->K,
                                     .ldc = n });
}

/* y of one head and chunk; S becomes the state after it. */
static void head_chunk(const struct ht_ssd_args *a, const struct ht_ssd_forward_worker *w, float *S,
                       int64_t head, int64_t t0, int64_t n_tokens, bool half,
                       const struct ssd_ahead *next_x, const struct ssd_ahead *next_y)
{
    const int64_t P = a->d_head, Np = ht_ssd_pad(a->d_state), Pp = ht_ssd_pad(P);
    const int64_t n = ht_ssd_pad(n_tokens);
    const int64_t x_at = t0 * a->x_stride + head * P;
    const void *x_p = (const char *)a->x + (size_t)x_at * ht_dtype_bytes(a->dtype);
    struct ssd_decay *d = w->decay;
    const struct ssd_source x = { x_p, a->x_stride, n_tokens, P, a->dtype, NULL };
    const struct ssd_source x_out = { x_p, a->x_stride, n_tokens, P, a->dtype, d->dt_out };
    const struct ssd_source state = { S, Pp, Np, Pp, HT_DTYPE_F32, NULL };
    const void *S_cols = S;

    ssd_decay_fill(d, a, head, t0, n_tokens);
    if (half) {
        ssd_pack_pairs(half, w->S_pairs, Np, Pp, &state);
        S_cols = w->S_pairs;
    }
    ssd_pack_pairs(half, w->x, n, Pp, &x);
    ssd_pack_pairs(half, w->x_out, n, Pp, &x_out);
    ssd_decay_scores(half, w->M, w->K, d);

    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // diag(in) C S
                                     .m = n,
                                     .n = Pp,
                                     .k = Np,
                                     .a = w->C_rows,
                                     .lda = Np,
                                     .b = S_cols,
                                     .ldb = Pp,
                                     .c = w->y,
                                     .ldc = Pp,
                                     .row_scale = d->in,
                                     .ahead = *next_x });
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // + M x
                                     .region = SSD_LOWER_K,
                                     .m = n,
                                     .n = Pp,
                                     .k = n,
                                     .a = w->M,
                                     .lda = n,
                                     .b = w->x,
                                     .ldb = Pp,
                                     .c = w->y,
                                     .ldc = Pp,
                                     .c_in = w->y,
                                     .beta = 1.0f });
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // S = gamma S + B^T diag(dt w) x
                                     .m = Np,
                                     .n = Pp,
                                     .k = n,
                                     .a = half ? w->B_t : w->B_cols,
                                     .lda = n,
                                     .b = w->x_out,
                                     .ldb = Pp,
                                     .c = S,
                                     .ldc = Pp,
                                     .c_in = S,
                                     .beta = d->gamma,
                                     .ahead = *next_y });
    const float D = a->D[head];
    for (int64_t i = 0; i < n_tokens; i++)
        for (int64_t p = 0; p < P; p += HT_VLEN) {
            const ht_vf xv = ssd_load_n(a->x, x_at + i * a->x_stride + p, P - p, a->dtype);
            ssd_store_n(a->y, (t0 + i) * a->y_stride + head * P + p,
                        vf_load(w->y + i * Pp + p) + D * xv, P - p, a->dtype);
        }
}

static void run_task(const struct ht_ssd_args *a, const struct ht_ssd_forward_worker *w,
                     const struct ht_ssd_task *t)
{
    const int64_t P = a->d_head, N = a->d_state, size = ht_ssd_pad(P) * ht_ssd_pad(N);
    const int64_t begin = a->seqs.starts[t->seq], end = a->seqs.starts[t->seq + 1];
    const int64_t states = t->seq * a->n_heads;
    const bool half = ssd_half(a->dtype);

    for (int64_t h = t->head0; h < t->head1; h++)
        ssd_state_in(w->S + (h - t->head0) * size,
                     a->init_state ? a->init_state + (states + h) * P * N : NULL, P, N);
    for (int64_t t0 = begin; t0 < end; t0 += a->chunk) {
        const int64_t n = end - t0 < a->chunk ? end - t0 : a->chunk, t1 = t0 + n;
        prepare_group(a, w, t->group, t0, n, half);
        for (int64_t h = t->head0; h < t->head1; h++) {
            // the next head of this chunk, or the first of the next
            const bool last = h + 1 == t->head1;
            const int64_t rows = !last ? n : end - t1 < a->chunk ? end - t1 : a->chunk;
            const struct ssd_ahead x = ssd_head_ahead(a->x, a->x_stride, last ? t1 : t0, rows,
                                                      (last ? t->head0 : h + 1) * P, P, a->dtype);
            const struct ssd_ahead y = ssd_head_ahead(a->y, a->y_stride, last ? t1 : t0, rows,
                                                      (last ? t->head0 : h + 1) * P, P, a->dtype);
            head_chunk(a, w, w->S + (h - t->head0) * size, h, t0, n, half, &x, &y);
        }
    }
    for (int64_t h = t->head0; a->final_state && h < t->head1; h++)
        ssd_state_out(a->final_state + (states + h) * P * N, w->S + (h - t->head0) * size, P, N);
}

enum ht_status HT_ISA_FN(ht_ssd_forward_cpu)(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const struct ht_ssd_blocks blocks = ht_ssd_forward_blocks(a, be->n_threads);
    const int64_t n_tasks = a->seqs.n_seqs * a->n_groups * blocks.per_group;
    const size_t mark = ht_arena_mark(&be->scratch);
    struct ht_ssd_forward_worker size;
    const size_t worker_bytes = ht_ssd_forward_worker_layout(&size, NULL, a);
    unsigned char *shared, *slices;
    int n_workers;

    HT_TRY(ht_ssd_take_workers(&shared, &slices, &n_workers, be, 0, worker_bytes, n_tasks));
#pragma omp parallel num_threads(n_workers) if (n_workers > 1)
    {
        struct ht_ssd_forward_worker w;
        ht_ssd_forward_worker_layout(&w, slices + (size_t)omp_get_thread_num() * worker_bytes, a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_tasks; i++) {
            const struct ht_ssd_task t = ht_ssd_task_at(a, &blocks, i);
            run_task(a, &w, &t);
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
