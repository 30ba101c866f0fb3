/* ssm/ssd_bwd_cpu.c: the chunked scan, backward (spec 4.2). One task walks one sequence backwards
 * for a block of heads of one group.
 *
 * States entering each chunk are recomputed: those at the start of every segment are kept, those of
 * one segment at a time are held (ssd_layout.h), so memory grows with T / segment. Everything lies
 * transposed here: state (N, P), scores (j, i), gradients of B and C (N, tokens). With G = x Gy^T:
 *
 *   B3  grad_u = diag(w) B dS + M Gy    M = K L, i >= j    grad_x = dt grad_u + D Gy
 *   B4  grad_K += dt L G
 *       grad_C += B^T grad_K + S Gy^T diag(in)
 *       grad_B += C^T grad_K^T + dS x^T diag(dt w)
 *   B5  U_i = in_i <C_i, S Gy_i>    V_j = dt_j w_j <B_j, dS x_j>
 *       grad_da = rectangles + U + V + gamma <dS, S>
 *   B1  dS = gamma dS + C^T diag(in) Gy
 *
 * where <du_j, x_j> = sum_i M G + V_j / dt_j needs no product of its own. Five products of P N per
 * token and head with the recomputed state: 10 P N + 2 (Q + 1) P FLOP, plus 3 (Q + 1) N per block.
 * grad_B and grad_C of a block go to partial sums, added over blocks in order at the end.
 */
#include "ssm/ssd_cpu.h"

#include <omp.h>

struct walk {
    const struct ht_ssd_args *a;
    const struct ht_ssd_backward_worker *w;
    struct ht_ssd_task task;
    bool half;
    int64_t P, N, Pp, Np, state; // state = Np * Pp
};

static struct ssd_source rows_of(const struct ht_ssd_args *a, const void *p, int64_t stride,
                                 int64_t t0, int64_t n_tokens, int64_t col, int64_t n_cols)
{
    const size_t at = (size_t)(t0 * stride + col) * ht_dtype_bytes(a->dtype);
    return (struct ssd_source){ (const char *)p + at, stride, n_tokens, n_cols, a->dtype, NULL };
}

/* (Np, n) rows operand of B or C: tokens contracted. */
static void transposed_rows(const struct walk *k, void *dst, const struct ssd_source *src,
                            int64_t n)
{
    ssd_pack_pairs(k->half, k->w->pairs, n, k->Np, src);
    ssd_transpose(dst, k->w->pairs, k->Np, k->half ? n / 2 : n, k->Np);
}

/* The next head's rows of a tensor with H*P columns, for the product that runs meanwhile. */
static struct ssd_ahead next_head(const struct walk *k, const void *p, int64_t stride, int64_t h,
                                  int64_t t0, int64_t n_rows)
{
    return ssd_head_ahead(p, stride, t0, n_rows, h * k->P, k->P, k->a->dtype);
}

/* S = gamma S + B^T diag(dt w) x for all heads of the task: from the state entering the chunk to
 * the one leaving it. */
static void advance(const struct walk *k, int64_t t0, int64_t n_tokens, int64_t rows_ahead)
{
    const struct ht_ssd_args *a = k->a;
    const struct ht_ssd_backward_worker *w = k->w;
    const int64_t n = ht_ssd_pad(n_tokens);
    const struct ssd_source B =
        rows_of(a, a->B, a->x_stride, t0, n_tokens, k->task.group * k->N, k->N);

    transposed_rows(k, w->B_t, &B, n);
    for (int64_t h = k->task.head0; h < k->task.head1; h++) {
        float *S = w->S + (h - k->task.head0) * k->state;
        const bool last = h + 1 == k->task.head1;
        struct ssd_source x = rows_of(a, a->x, a->x_stride, t0, n_tokens, h * k->P, k->P);
        ssd_decay_fill(w->decay, a, h, t0, n_tokens);
        x.scale = w->decay->dt_out;
        ssd_pack_pairs(k->half, w->x_out, n, k->Pp, &x);
        ssd_gemm_run(&(struct ssd_gemm){
            .half = k->half,
            .m = k->Np,
            .n = k->Pp,
            .k = n,
            .a = w->B_t,
            .lda = n,
            .b = w->x_out,
            .ldb = k->Pp,
            .c = S,
            .ldc = k->Pp,
            .c_in = S,
            .beta = w->decay->gamma,
            .ahead = next_head(k, a->x, a->x_stride, last ? k->task.head0 : h + 1,
                               last ? t0 + n_tokens : t0, last ? rows_ahead : n_tokens) });
    }
}

/* Operands of B and C, the scores, and zeroed sums over heads. */
static void prepare_group(const struct walk *k, int64_t t0, int64_t n_tokens)
{
    const struct ht_ssd_args *a = k->a;
    const struct ht_ssd_backward_worker *w = k->w;
    const int64_t n = ht_ssd_pad(n_tokens), Np = k->Np, col = k->task.group * k->N;
    const struct ssd_source B = rows_of(a, a->B, a->x_stride, t0, n_tokens, col, k->N);
    const struct ssd_source C = rows_of(a, a->C, a->x_stride, t0, n_tokens, col, k->N);

    ssd_pack_rows(k->half, w->B_rows, n, Np, &B);
    ssd_pack_rows(k->half, w->C_rows, n, Np, &C);
    const int64_t words = k->half ? Np / 2 : Np;
    ssd_transpose(w->C_cols, w->C_rows, words, n, words);
    transposed_rows(k, w->B_t, &B, n);
    transposed_rows(k, w->C_t, &C, n);
    ssd_gemm_run(&(struct ssd_gemm){ .half = k->half, // K[j,i] = B_j . C_i
                                     .region = SSD_UPPER_OUT,
                                     .m = n,
                                     .n = n,
                                     .k = Np,
                                     .a = w->B_rows,
                                     .lda = Np,
                                     .b = w->C_cols,
                                     .ldb = n,
                                     .c = w->K,
                                     .ldc = n });
    memset(w->grad_K, 0, (size_t)(n * n) * sizeof(float));
    memset(w->grad_B_t, 0, (size_t)(Np * n) * sizeof(float));
    memset(w->grad_C_t, 0, (size_t)(Np * n) * sizeof(float));
}

/* B5, B6: from U, V and the rectangle sums in grad_da to grad_dt_raw and the head's own gradients.
 */
static void time_step_gradients(const struct walk *k, int64_t head, int64_t t0, int64_t n_tokens,
                                const float *U, const float *V_dt, const float *grad_dt,
                                float *grad_da, float from_gamma)
{
    const struct ht_ssd_args *a = k->a;
    const struct ssd_decay *d = k->w->decay;
    double *sums = k->w->head_sums + 3 * (head - k->task.head0);
    float grad_v[SSD_MAX_CHUNK], before = 0.0f, after = 0.0f;
    ht_vf bias = vf_set(0.0f), A = bias;

    for (int64_t i = n_tokens - 1; i >= 0; i--) { // U_i passes through every da up to i
        after += U[i];
        grad_da[i] += after;
    }
    for (int64_t i = 0; i < n_tokens; i++) { // V_j through every da after j
        grad_da[i] += before + from_gamma;
        before += V_dt[i] * d->dt[i];
    }
    for (int64_t i = n_tokens; i < d->n; i++) grad_da[i] = 0.0f;
    for (int64_t i = 0; i < d->n; i += HT_VLEN) {
        const ht_vf v = vf_load(d->v + i), soft = vf_load(d->soft + i), da = vf_load(grad_da + i);
        const ht_vf grad = d->A * da + (vf_load(grad_dt + i) + vf_load(V_dt + i));
        const ht_vf slope = vf_select(v > 20.0f, vf_set(1.0f), vf_sigmoid(v));
        const ht_vi in_range = (soft >= a->dt_min) & (soft <= a->dt_max);
        const ht_vf gv = vf_select(in_range, grad * slope, vf_set(0.0f));
        vf_store(grad_v + i, gv);
        bias += gv; // zero behind the end: U, V, x and grad_y are
        A += vf_load(d->dt + i) * da;
    }
    for (int64_t i = 0; i < n_tokens; i++)
        ssd_store(a->grad_dt_raw, (t0 + i) * a->grad_dt_stride + head, a->dtype, grad_v[i]);
    sums[0] += (double)ssd_sum(bias);
    sums[1] += (double)ssd_sum(A);
}

static inline float dot(const float *a, const void *b, const enum ht_dtype d, int64_t n)
{
    ht_vf s0 = vf_set(0.0f), s1 = s0;
    for (int64_t i = 0; i < n; i += 2 * HT_VLEN) {
        s0 += vf_load(a + i) * vf_load_any(b, i, d);
        s1 += vf_load(a + i + HT_VLEN) * vf_load_any(b, i + HT_VLEN, d);
    }
    return ssd_sum(s0 + s1);
}

/* Rows operand (n, Pp) of src: the tensor itself where it has the type and needs no zeros behind
 * its end. */
struct operand {
    const void *p;
    int64_t ld;
};

static struct operand rows_operand(const struct walk *k, void *buffer, const struct ssd_source *src,
                                   int64_t n)
{
    const enum ht_dtype type = k->half ? HT_DTYPE_BF16 : HT_DTYPE_F32;

    if (src->dtype == type && src->n_rows == n && src->n_cols == k->Pp && src->stride % 2 == 0)
        return (struct operand){ src->p, src->stride };
    ssd_pack_rows(k->half, buffer, n, k->Pp, src);
    return (struct operand){ buffer, k->Pp };
}

/* What the head or chunk after this one reads and writes. */
struct next {
    struct ssd_ahead x, gy, grad_x, S;
};

/* S (rows operand) enters the chunk; grad_S leaves it, and becomes the gradient of S. */
static void head_chunk(const struct walk *k, float *grad_S, const void *S, int64_t head, int64_t t0,
                       int64_t n_tokens, const struct next *next)
{
    const struct ht_ssd_args *a = k->a;
    const struct ht_ssd_backward_worker *w = k->w;
    const bool half = k->half;
    const int64_t n = ht_ssd_pad(n_tokens), P = k->P, Pp = k->Pp, Np = k->Np;
    const int64_t words = half ? Pp / 2 : Pp;
    const struct ssd_source x = rows_of(a, a->x, a->x_stride, t0, n_tokens, head * P, P);
    const struct ssd_source gy = rows_of(a, a->grad_y, a->grad_y_stride, t0, n_tokens, head * P, P);
    const struct ssd_source grad_state = { grad_S, Pp, Np, Pp, HT_DTYPE_F32, NULL };
    struct ssd_decay *d = w->decay;
    float U[SSD_MAX_CHUNK], V[SSD_MAX_CHUNK], grad_dt[SSD_MAX_CHUNK], grad_da[SSD_MAX_CHUNK];
    const void *grad_S_rows = grad_S, *grad_S_cols = grad_S;

    ssd_decay_fill(d, a, head, t0, n_tokens);
    struct ssd_source gy_in = gy;
    gy_in.scale = d->in;
    const struct operand x_rows = rows_operand(k, w->x_rows, &x, n);
    const struct operand gy_rows = rows_operand(k, w->gy_rows, &gy, n);
    ssd_transpose(w->x_cols, x_rows.p, half ? x_rows.ld / 2 : x_rows.ld, n, words);
    ssd_transpose(w->gy_cols, gy_rows.p, half ? gy_rows.ld / 2 : gy_rows.ld, n, words);
    ssd_pack_pairs(half, w->gy_pairs, n, Pp, &gy);
    ssd_pack_pairs(half, w->gy_in_pairs, n, Pp, &gy_in);
    if (half) {
        ssd_pack_rows(half, w->grad_S_rows, Np, Pp, &grad_state);
        ssd_pack_pairs(half, w->grad_S_pairs, Np, Pp, &grad_state);
        grad_S_rows = w->grad_S_rows;
        grad_S_cols = w->grad_S_pairs;
    }
    const float from_gamma = d->gamma * (half ? dot(grad_S, S, HT_DTYPE_BF16, Np * Pp)
                                              : dot(grad_S, S, HT_DTYPE_F32, Np * Pp));

    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // G = x Gy^T
                                     .region = SSD_UPPER_OUT,
                                     .m = n,
                                     .n = n,
                                     .k = Pp,
                                     .a = x_rows.p,
                                     .lda = x_rows.ld,
                                     .b = w->gy_cols,
                                     .ldb = n,
                                     .c = w->G,
                                     .ldc = n });
    w->head_sums[3 * (head - k->task.head0) + 2] +=
        (double)ssd_decay_scores_backward(half, w->M, w->grad_K, w->G, grad_dt, grad_da, w->K, d);

    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // grad_u = diag(w) B dS
                                     .m = n,
                                     .n = Pp,
                                     .k = Np,
                                     .a = w->B_rows,
                                     .lda = Np,
                                     .b = grad_S_cols,
                                     .ldb = Pp,
                                     .c = w->grad_u,
                                     .ldc = Pp,
                                     .row_scale = d->out,
                                     .ahead = next->x });
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // + M Gy
                                     .region = SSD_UPPER_K,
                                     .m = n,
                                     .n = Pp,
                                     .k = n,
                                     .a = w->M,
                                     .lda = n,
                                     .b = w->gy_pairs,
                                     .ldb = Pp,
                                     .c = w->grad_u,
                                     .ldc = Pp,
                                     .c_in = w->grad_u,
                                     .beta = 1.0f,
                                     .ahead = next->gy });
    const float D = a->D[head];
    for (int64_t i = 0; i < n_tokens; i++)
        for (int64_t p = 0; p < P; p += HT_VLEN) {
            const ht_vf g = ssd_load_n(gy.p, i * gy.stride + p, P - p, a->dtype);
            ssd_store_n(a->grad_x, (t0 + i) * a->grad_x_stride + head * P + p,
                        d->dt[i] * vf_load(w->grad_u + i * Pp + p) + D * g, P - p, a->dtype);
        }

    memset(U, 0, (size_t)n * sizeof *U);
    memset(V, 0, (size_t)n * sizeof *V);
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // grad_C^T += S Gy^T diag(in)
                                     .m = Np,
                                     .n = n,
                                     .k = Pp,
                                     .a = S,
                                     .lda = Pp,
                                     .b = w->gy_cols,
                                     .ldb = n,
                                     .c = w->grad_C_t,
                                     .ldc = n,
                                     .c_in = w->grad_C_t,
                                     .beta = 1.0f,
                                     .col_scale = d->in,
                                     .t = w->C_t,
                                     .ldt = n,
                                     .dot = U,
                                     .ahead = next->S });
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // grad_B^T += dS x^T diag(dt w)
                                     .m = Np,
                                     .n = n,
                                     .k = Pp,
                                     .a = grad_S_rows,
                                     .lda = Pp,
                                     .b = w->x_cols,
                                     .ldb = n,
                                     .c = w->grad_B_t,
                                     .ldc = n,
                                     .c_in = w->grad_B_t,
                                     .beta = 1.0f,
                                     .col_scale = d->dt_out,
                                     .t = w->B_t,
                                     .ldt = n,
                                     .dot = V,
                                     .ahead = next->grad_x });
    ssd_gemm_run(&(struct ssd_gemm){ .half = half, // dS = gamma dS + C^T diag(in) Gy
                                     .m = Np,
                                     .n = Pp,
                                     .k = n,
                                     .a = w->C_t,
                                     .lda = n,
                                     .b = w->gy_in_pairs,
                                     .ldb = Pp,
                                     .c = grad_S,
                                     .ldc = Pp,
                                     .c_in = grad_S,
                                     .beta = d->gamma });
    for (int64_t i = 0; i < n; i += HT_VLEN) {
        vf_store(U + i, vf_load(U + i) * vf_load(d->in + i));
        vf_store(V + i, vf_load(V + i) * vf_load(d->out + i)); // V_j / dt_j
    }
    time_step_gradients(k, head, t0, n_tokens, U, V, grad_dt, grad_da, from_gamma);
}

/* grad_C^T += B^T grad_K, grad_B^T += C^T grad_K^T; then rows of the block's partial sums. */
static void finish_group(const struct walk *k, float *partial, int64_t n_tokens)
{
    const struct ht_ssd_backward_worker *w = k->w;
    const int64_t n = ht_ssd_pad(n_tokens), N = k->N, Np = k->Np;
    const struct ssd_source grad_K = { w->grad_K, n, n, n, HT_DTYPE_F32, NULL };
    const struct ssd_source grad_K_t = { w->G, n, n, n, HT_DTYPE_F32, NULL };
    float *rows = w->pairs; // (n, Np)

    struct ssd_gemm product = { .half = k->half,
                                .m = Np,
                                .n = n,
                                .k = n,
                                .a = w->B_t,
                                .lda = n,
                                .b = w->M,
                                .ldb = n,
                                .c = w->grad_C_t,
                                .ldc = n,
                                .c_in = w->grad_C_t,
                                .beta = 1.0f };
    ssd_pack_pairs(k->half, w->M, n, n, &grad_K);
    ssd_gemm_run(&product);
    ssd_transpose(w->G, w->grad_K, n, n, n);
    ssd_pack_pairs(k->half, w->M, n, n, &grad_K_t);
    product.a = w->C_t;
    product.c = w->grad_B_t;
    product.c_in = w->grad_B_t;
    ssd_gemm_run(&product);

    for (int which = 0; which < 2; which++) {
        ssd_transpose(rows, which ? w->grad_C_t : w->grad_B_t, n, Np, n);
        for (int64_t i = 0; i < n_tokens; i++)
            memcpy(partial + (2 * i + which) * N, rows + i * Np, (size_t)N * sizeof(float));
    }
}

/* The segment's chunks backwards; states of the segment are in w->states. */
static void segment_backward(const struct walk *k, const struct ht_ssd_backward_shared *shared,
                             int64_t begin, int64_t end)
{
    const struct ht_ssd_args *a = k->a;
    const struct ht_ssd_backward_worker *w = k->w;
    const int64_t n_chunks = (end - begin + a->chunk - 1) / a->chunk;
    const int64_t all = ht_ssd_backward_blocks(a).heads * k->state;
    const int64_t e = (int64_t)ssd_operand_bytes(k->half);
    const char *states = w->states;

    for (int64_t c = n_chunks - 1; c >= 0; c--) {
        const int64_t t0 = begin + c * a->chunk;
        const int64_t n_tokens = end - t0 < a->chunk ? end - t0 : a->chunk;
        prepare_group(k, t0, n_tokens);
        for (int64_t h = k->task.head0; h < k->task.head1; h++) {
            const int64_t s = (h - k->task.head0) * k->state;
            const char *S = states + (c * all + s) * e;
            const bool last = h + 1 == k->task.head1; // then the first head of the chunk before
            const int64_t h1 = last ? k->task.head0 : h + 1, at = last ? t0 - a->chunk : t0;
            const int64_t rows = !last ? n_tokens : c > 0 ? a->chunk : 0;
            const int64_t next_S = last ? (c - 1) * all : c * all + s + k->state;
            const struct next next = {
                .x = next_head(k, a->x, a->x_stride, h1, at, rows),
                .gy = next_head(k, a->grad_y, a->grad_y_stride, h1, at, rows),
                .grad_x = next_head(k, a->grad_x, a->grad_x_stride, h1, at, rows),
                .S = { rows > 0 ? states + next_S * e : NULL, rows > 0 ? k->Np : 0, k->Pp * e,
                       k->Pp * e },
            };
            head_chunk(k, w->grad_S + s, S, h, t0, n_tokens, &next);
        }
        finish_group(k, shared->partial + (k->task.block * a->n_tokens + t0) * 2 * k->N, n_tokens);
    }
}

static void run_task(const struct walk *k, const struct ht_ssd_backward_shared *shared)
{
    const struct ht_ssd_args *a = k->a;
    const struct ht_ssd_backward_worker *w = k->w;
    const struct ht_ssd_task *t = &k->task;
    const int64_t begin = a->seqs.starts[t->seq], end = a->seqs.starts[t->seq + 1], Q = a->chunk;
    const int64_t span = ht_ssd_segments(a).chunks * Q, n_heads = t->head1 - t->head0;
    const int64_t n_segments = (end - begin + span - 1) / span;
    const int64_t all = ht_ssd_backward_blocks(a).heads * k->state; // states of a block
    const size_t all_bytes = (size_t)(n_heads * k->state) * sizeof(float);
    const int64_t tensor = (t->seq * a->n_heads + t->head0) * k->P * k->N;

    for (int64_t h = 0; h < n_heads; h++) {
        const int64_t at = tensor + h * k->P * k->N;
        ssd_state_in(w->kept + h * k->state, a->init_state ? a->init_state + at : NULL, k->P, k->N);
        ssd_state_in(w->grad_S + h * k->state,
                     a->grad_final_state ? a->grad_final_state + at : NULL, k->P, k->N);
    }
    memset(w->head_sums, 0, (size_t)(3 * n_heads) * sizeof *w->head_sums);
    for (int64_t s = 0; s + 1 < n_segments; s++) {
        memcpy(w->S, w->kept + s * all, all_bytes);
        for (int64_t t0 = begin + s * span; t0 < begin + (s + 1) * span; t0 += Q)
            advance(k, t0, Q, end - t0 - Q < Q ? end - t0 - Q : Q);
        memcpy(w->kept + (s + 1) * all, w->S, all_bytes);
    }
    for (int64_t s = n_segments - 1; s >= 0; s--) {
        const int64_t from = begin + s * span, to = from + span < end ? from + span : end;
        char *states = w->states;
        memcpy(w->S, w->kept + s * all, all_bytes);
        for (int64_t t0 = from; t0 < to; t0 += Q) {
            const struct ssd_source S = { w->S, k->Pp, n_heads * k->Np, k->Pp, HT_DTYPE_F32, NULL };
            ssd_pack_rows(k->half, states, n_heads * k->Np, k->Pp, &S);
            states += (size_t)all * ssd_operand_bytes(k->half);
            if (t0 + Q < to) advance(k, t0, Q, to - t0 - Q < Q ? to - t0 - Q : Q);
        }
        segment_backward(k, shared, from, to);
    }
    for (int64_t h = 0; h < n_heads; h++) {
        float *sums = shared->sums + (t->seq * a->n_heads + t->head0 + h) * 3;
        for (int i = 0; i < 3; i++) sums[i] = (float)w->head_sums[3 * h + i];
        if (a->grad_init_state)
            ssd_state_out(a->grad_init_state + tensor + h * k->P * k->N, w->grad_S + h * k->state,
                          k->P, k->N);
    }
}

/* grad_B and grad_C of one token: the blocks of each group in order. */
static void reduce_token(const struct ht_ssd_args *a, const struct ht_ssd_backward_shared *shared,
                         int64_t per_group, int64_t t)
{
    const int64_t N = a->d_state, block = a->n_tokens * 2 * N;

    for (int64_t g = 0; g < a->n_groups; g++)
        for (int which = 0; which < 2; which++) {
            const float *p = shared->partial + g * per_group * block + (2 * t + which) * N;
            for (int64_t i = 0; i < N; i += HT_VLEN) {
                ht_vf sum = ssd_load_n(p, i, N - i, HT_DTYPE_F32);
                for (int64_t b = 1; b < per_group; b++)
                    sum += ssd_load_n(p + b * block, i, N - i, HT_DTYPE_F32);
                ssd_store_n(which ? a->grad_C : a->grad_B, t * a->grad_x_stride + g * N + i, sum,
                            N - i, a->dtype);
            }
        }
}

enum ht_status HT_ISA_FN(ht_ssd_backward_cpu)(struct ht_backend *be, const struct ht_ssd_args *a)
{
    const struct ht_ssd_blocks blocks = ht_ssd_backward_blocks(a);
    const int64_t n_tasks = a->seqs.n_seqs * a->n_groups * blocks.per_group;
    const size_t mark = ht_arena_mark(&be->scratch);
    struct ht_ssd_backward_worker size;
    struct ht_ssd_backward_shared shared;
    const size_t worker_bytes = ht_ssd_backward_worker_layout(&size, NULL, a);
    const size_t shared_bytes = ht_ssd_backward_shared_layout(&shared, NULL, a);
    unsigned char *common, *slices;
    int n_workers;

    HT_TRY(
        ht_ssd_take_workers(&common, &slices, &n_workers, be, shared_bytes, worker_bytes, n_tasks));
    ht_ssd_backward_shared_layout(&shared, common, a);
#pragma omp parallel num_threads(n_workers) if (n_workers > 1)
    {
        struct ht_ssd_backward_worker w;
        ht_ssd_backward_worker_layout(&w, slices + (size_t)omp_get_thread_num() * worker_bytes, a);
        struct walk k = { .a = a,
                          .w = &w,
                          .half = ssd_half(a->dtype),
                          .P = a->d_head,
                          .N = a->d_state,
                          .Pp = ht_ssd_pad(a->d_head),
                          .Np = ht_ssd_pad(a->d_state) };
        k.state = k.Np * k.Pp;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_tasks; i++) {
            k.task = ht_ssd_task_at(a, &blocks, i);
            run_task(&k, &shared);
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < a->n_tokens; t++) reduce_token(a, &shared, blocks.per_group, t);
    }
    for (int64_t h = 0; h < a->n_heads; h++) {
        const float A = -expf(a->A_log[h]);
        for (int64_t s = 0; s < a->seqs.n_seqs; s++) {
            const float *sums = shared.sums + (s * a->n_heads + h) * 3;
            a->grad_dt_bias[h] += sums[0];
            a->grad_A_log[h] += A * sums[1];
            a->grad_D[h] += sums[2];
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
