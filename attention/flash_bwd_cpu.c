/* attention/flash_bwd_cpu.c: gradient of attention, P recomputed from lse (spec 3.4; Dao 2023).
 *
 * Per tile of 64 keys and tile of 96 query columns, keys x queries as in the forward pass:
 *
 *   S  = K Q^T         P  = exp2(scale log2e S - log2e lse)     grad_v   += P grad_o
 *   dP = V grad_o^T    dS = P (dP - D)                          grad_k   += dS Q
 *                      D  = sum(grad_o o) per query             grad_q^T += K^T dS
 *
 * and grad_q, grad_k are multiplied by scale once, at the end. Five products of
 * 2 * 64 * 96 * d_head FLOP. With pair = 2, P and dS are rounded to bf16; all sums are fp32.
 *
 * Order: grad_k and grad_v of a key sum over query tiles upwards, grad_q of a query over key tiles
 * upwards, each by one thread. One pass gives a thread a kv head of a sequence; two passes give it
 * a block of keys (grad_k, grad_v), then up to four query tiles (grad_q). Every sum has the same
 * terms in the same order in both, so the bits depend neither on the pass nor on the number of
 * threads.
 */
#include "attention/tile_pack_cpu.h"

#include <omp.h>

ht_flash_fn HT_ISA_FN(ht_flash_backward_cpu);

enum { QUERIES = HT_ATTENTION_QUERY_TILE, KEYS = HT_ATTENTION_KEY_TILE };
enum { N_PANELS = QUERIES / TILE_PANEL };

struct query_tile {
    float *q, *grad_o;             // panels (panel, d_head / pair, TILE_PANEL) words
    float *q_strip, *grad_o_strip; // (QUERIES / pair, d_pad) words
    float *lse, *dot;              // (QUERIES): log2e * lse; D
    int32_t *pos;                  // (QUERIES)
    float *grad_q;                 // (panel, d_head, TILE_PANEL)
    int64_t col0;
};

struct key_tile {           // words, but for the gradients
    float *k, *v;           // block8 (KEYS / 8, d_head / pair, 8)
    float *k_dims;          // block8 of the transpose (d_head / 8, KEYS / pair, 8)
    float *grad_k, *grad_v; // (KEYS, d_pad) fp32
};

struct pair_work {        // of one thread
    float *prob, *grad_s; // (KEYS, QUERIES / pair) words
    float *grad_s_panel;  // (panel, KEYS / pair, TILE_PANEL) words
    float *p_tile;        // (TILE_MR, TILE_PANEL)
    float *rows;          // (QUERIES, d_head)
};

enum wanted { WANT_KV = 1, WANT_Q = 2 };

static int64_t padded(int64_t d_head)
{
    return tile_round_up(d_head, HT_ATTENTION_LANES);
}

static void take_query_tile(struct query_tile *t, float **scratch, int64_t d)
{
    t->q = tile_take(scratch, QUERIES * d);
    t->grad_o = tile_take(scratch, QUERIES * d);
    t->q_strip = tile_take(scratch, QUERIES * padded(d));
    t->grad_o_strip = tile_take(scratch, QUERIES * padded(d));
    t->lse = tile_take(scratch, QUERIES);
    t->dot = tile_take(scratch, QUERIES);
    t->pos = (int32_t *)tile_take(scratch, QUERIES);
    t->grad_q = tile_take(scratch, QUERIES * d);
}

static void take_work(struct pair_work *w, float **scratch, int64_t d)
{
    w->prob = tile_take(scratch, KEYS * QUERIES);
    w->grad_s = tile_take(scratch, KEYS * QUERIES);
    w->grad_s_panel = tile_take(scratch, KEYS * QUERIES);
    w->p_tile = tile_take(scratch, HT_ATTENTION_LANES * QUERIES);
    w->rows = tile_take(scratch, QUERIES * d);
}

static float row_dot(const void *x, const void *y, int64_t n, enum ht_dtype dtype)
{
    ht_vf sum = { 0 };
    int64_t i = 0;
    for (; i + HT_VLEN <= n; i += HT_VLEN)
        sum += vf_load_any(x, i, dtype) * vf_load_any(y, i, dtype);
    float total = vf_sum(sum);
    for (; i < n; i++) total += ht_load_f32(x, i, dtype) * ht_load_f32(y, i, dtype);
    return total;
}

TILE_INLINE void load_query_tile(const struct query_tile *t, const struct ht_attention_view *a,
                                 float *rows, int want, int pair)
{
    const int64_t d = a->d_head, words = d / pair, n_columns = a->n_new * a->group;
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype);
    const struct tile_rows q = { a->q, a->q_stride, a->group, d, n_columns, a->dtype };
    const struct tile_rows g = { a->grad_o, a->o_stride, a->group, d, n_columns, a->dtype };

    for (int64_t p = 0; p < N_PANELS; p++) {
        const int64_t col = t->col0 + p * TILE_PANEL, at = p * TILE_PANEL * words;
        tile_pack_transposed(t->q + at, TILE_PANEL, 8, &q, col, TILE_PANEL, rows, pair);
        tile_pack_transposed(t->grad_o + at, TILE_PANEL, 8, &g, col, TILE_PANEL, rows, pair);
    }
    if (want & WANT_KV) {
        tile_pack_interleaved(t->q_strip, padded(d), 8, &q, t->col0, QUERIES, rows, pair);
        tile_pack_interleaved(t->grad_o_strip, padded(d), 8, &g, t->col0, QUERIES, rows, pair);
    }
    for (int64_t c = 0; c < QUERIES; c++) {
        const int64_t col = tile_min(t->col0 + c, n_columns - 1);
        const int64_t token = col / a->group, head = col % a->group;
        const int64_t at = (token * a->o_stride + head * d) * element;
        t->pos[c] = (int32_t)token;
        t->lse[c] = a->lse[token * a->lse_stride + head] * TILE_LOG2E;
        t->dot[c] = row_dot(a->o + at, a->grad_o + at, d, a->dtype);
        if (t->col0 + c >= n_columns) t->lse[c] = -TILE_MASKED; // padding: P = 0
    }
    if (want & WANT_Q) memset(t->grad_q, 0, (size_t)(QUERIES * d) * sizeof(float));
}

TILE_INLINE void load_key_tile(const struct key_tile *t, const struct ht_attention_view *a,
                               int64_t key0, float *rows, int want, int pair)
{
    const int64_t d = a->d_head, words = d / pair, n = a->n_new;
    const struct tile_rows k = { a->k, a->kv_stride, 1, d, n, a->dtype };
    const struct tile_rows v = { a->v, a->kv_stride, 1, d, n, a->dtype };

    tile_pack_transposed(t->k, 8, 8 * words, &k, key0, KEYS, rows, pair);
    tile_pack_transposed(t->v, 8, 8 * words, &v, key0, KEYS, rows, pair);
    if (want & WANT_Q)
        tile_pack_interleaved(t->k_dims, 8, 8 * (KEYS / pair), &k, key0, KEYS, rows, pair);
}

/* P and dS of one panel: TILE_MR keys from `row`, as rows for grad_k and grad_v, as panel for
 * grad_q. */
TILE_INLINE void probabilities(const struct key_tile *kt, const struct query_tile *qt,
                               const struct pair_work *w, int64_t p, int64_t row, int64_t key0,
                               int64_t d, float scale_log2, int want, int pair)
{
    const int64_t words = d / pair, block = row / 8 * 8 * words + row % 8;
    const int64_t at = p * TILE_PANEL * words, lanes0 = p * TILE_PANEL;
    struct tile_acc acc;

    tile_zero(&acc, TILE_NV);
    tile_multiply(&acc, TILE_NV, kt->k + block, 1, 8, qt->q + at, TILE_PANEL, words, pair);
#pragma GCC unroll 4
    for (int v = 0; v < TILE_NV; v++) {
        const ht_vf lse = vf_load(qt->lse + lanes0 + v * HT_VLEN);
        ht_vi pos;
        memcpy(&pos, qt->pos + lanes0 + v * HT_VLEN, sizeof pos);
        if (key0 + row + TILE_MR - 1 > qt->pos[lanes0]) {
#pragma GCC unroll 8
            for (int r = 0; r < TILE_MR; r++)
                acc.v[r][v] = tile_causal(acc.v[r][v], pos, (int32_t)(key0 + row + r));
        }
#pragma GCC unroll 8
        for (int r = 0; r < TILE_MR; r++)
            vf_store(w->p_tile + r * TILE_PANEL + v * HT_VLEN,
                     tile_exp2(acc.v[r][v] * scale_log2 - lse, pair));
    }

    tile_zero(&acc, TILE_NV);
    tile_multiply(&acc, TILE_NV, kt->v + block, 1, 8, qt->grad_o + at, TILE_PANEL, words, pair);
#pragma GCC unroll 4
    for (int v = 0; v < TILE_NV; v++) {
        const ht_vf dot = vf_load(qt->dot + lanes0 + v * HT_VLEN);
#pragma GCC unroll 4
        for (int r = 0; r < TILE_MR; r += 2) {
            const ht_vf p0 = vf_load(w->p_tile + r * TILE_PANEL + v * HT_VLEN);
            const ht_vf p1 = vf_load(w->p_tile + (r + 1) * TILE_PANEL + v * HT_VLEN);
            const ht_vf s0 = p0 * (acc.v[r][v] - dot), s1 = p1 * (acc.v[r + 1][v] - dot);
            const int64_t col = lanes0 + v * HT_VLEN, key = row + r;
            float *panel = w->grad_s_panel + p * (KEYS / pair) * TILE_PANEL +
                           key / pair * TILE_PANEL + v * HT_VLEN;
            if (pair == 1) {
                if (want & WANT_KV) {
                    vf_store(w->prob + key * QUERIES + col, p0);
                    vf_store(w->prob + (key + 1) * QUERIES + col, p1);
                    vf_store(w->grad_s + key * QUERIES + col, s0);
                    vf_store(w->grad_s + (key + 1) * QUERIES + col, s1);
                }
                if (want & WANT_Q) {
                    vf_store(panel, s0);
                    vf_store(panel + TILE_PANEL, s1);
                }
            } else {
#if TILE_HAS_PAIRS
                if (want & WANT_KV) {
                    vf_store_bf16((ht_bf16 *)w->prob + key * QUERIES + col, p0);
                    vf_store_bf16((ht_bf16 *)w->prob + (key + 1) * QUERIES + col, p1);
                    vf_store_bf16((ht_bf16 *)w->grad_s + key * QUERIES + col, s0);
                    vf_store_bf16((ht_bf16 *)w->grad_s + (key + 1) * QUERIES + col, s1);
                }
                if (want & WANT_Q) vf_store(panel, tile_pair_rows(s0, s1));
#endif
            }
        }
    }
}

/* grad (keys, d_pad) += A (keys, queries) * strip (queries, d_pad), nv vectors of dims. */
TILE_INLINE void add_key_gradient(float *grad, const float *a, const float *strip, int64_t n_keys,
                                  int64_t d_pad, int nv, int pair)
{
    for (int64_t row = 0; row < n_keys; row += TILE_MR) {
        struct tile_acc acc;
        tile_load(&acc, nv, grad + row * d_pad, d_pad);
        tile_multiply(&acc, nv, a + row * (QUERIES / pair), QUERIES / pair, 1, strip, d_pad,
                      QUERIES / pair, pair);
        tile_store(&acc, nv, grad + row * d_pad, d_pad);
    }
}

TILE_INLINE void add_key_gradients(float *grad, const float *a, const float *strip, int64_t n_keys,
                                   int64_t d_pad, int pair)
{
    for (int64_t lane = 0; lane < d_pad;) {
        const int64_t left = (d_pad - lane) / HT_VLEN; // 4 vectors are 2 + 2, not 3 + 1
        if (TILE_NV == 3 && (left == 3 || left > 4)) {
            add_key_gradient(grad + lane, a, strip + lane, n_keys, d_pad, TILE_NV, pair);
            lane += 3 * HT_VLEN;
        } else if (left >= 2) {
            add_key_gradient(grad + lane, a, strip + lane, n_keys, d_pad, 2, pair);
            lane += 2 * HT_VLEN;
        } else {
            add_key_gradient(grad + lane, a, strip + lane, n_keys, d_pad, 1, pair);
            lane += HT_VLEN;
        }
    }
}

TILE_INLINE void tile_pair(const struct key_tile *kt, const struct query_tile *qt,
                           const struct pair_work *w, int64_t key0, int64_t d, float scale,
                           int want, int pair)
{
    const int64_t key_words = KEYS / pair;
    const int64_t n_keys = tile_min(KEYS, tile_round_up(qt->pos[QUERIES - 1] + 1 - key0, 8));

    for (int64_t p = 0; p < N_PANELS; p++)
        for (int64_t row = 0; row < n_keys; row += TILE_MR)
            probabilities(kt, qt, w, p, row, key0, d, scale * TILE_LOG2E, want, pair);
    if (want & WANT_KV) {
        add_key_gradients(kt->grad_v, w->prob, qt->grad_o_strip, n_keys, padded(d), pair);
        add_key_gradients(kt->grad_k, w->grad_s, qt->q_strip, n_keys, padded(d), pair);
    }
    if (!(want & WANT_Q)) return;
    for (int64_t p = 0; p < N_PANELS; p++)
        for (int64_t dim = 0; dim < d; dim += TILE_MR) {
            float *grad = qt->grad_q + (p * d + dim) * TILE_PANEL;
            struct tile_acc acc;
            tile_load(&acc, TILE_NV, grad, TILE_PANEL);
            tile_multiply(&acc, TILE_NV, kt->k_dims + dim / 8 * 8 * key_words + dim % 8, 1, 8,
                          w->grad_s_panel + p * key_words * TILE_PANEL, TILE_PANEL, n_keys / pair,
                          pair);
            tile_store(&acc, TILE_NV, grad, TILE_PANEL);
        }
}

/* Not inlined: four callers would each get a copy, minutes of compile time under sanitizers. */
static __attribute__((noinline)) void
run_tile_pair(const struct key_tile *kt, const struct query_tile *qt, const struct pair_work *w,
              int64_t key0, const struct ht_attention_view *a, int want, int pair)
{
    if (TILE_HAS_PAIRS && pair == 2)
        tile_pair(kt, qt, w, key0, a->d_head, a->scale, want, 2);
    else
        tile_pair(kt, qt, w, key0, a->d_head, a->scale, want, 1);
}

static void finish_query_tile(const struct query_tile *t, const struct ht_attention_view *a,
                              float *rows)
{
    const int64_t d = a->d_head, element = (int64_t)ht_dtype_bytes(a->dtype);

    for (int64_t p = 0; p < N_PANELS; p++) {
        tile_unpack_panel(rows, t->grad_q + p * d * TILE_PANEL, d);
        for (int64_t c = 0; c < TILE_PANEL; c++) {
            const int64_t col = t->col0 + p * TILE_PANEL + c;
            if (col >= a->n_new * a->group) return;
            const int64_t at = col / a->group * a->grad_stride + col % a->group * d;
            tile_store_row(a->grad_q + at * element, a->dtype, rows + c * d, d, a->scale);
        }
    }
}

/* The i-th key tile of a thread's block. */
TILE_INLINE struct key_tile key_tile_at(const struct key_tile *first, int64_t i, int64_t d)
{
    return (struct key_tile){ .k = first->k + i * KEYS * d,
                              .v = first->v + i * KEYS * d,
                              .k_dims = first->k_dims + i * KEYS * d,
                              .grad_k = first->grad_k + i * KEYS * padded(d),
                              .grad_v = first->grad_v + i * KEYS * padded(d) };
}

static void take_key_tiles(struct key_tile *t, float **scratch, int64_t n_keys, int64_t d)
{
    n_keys = tile_round_up(n_keys, KEYS);
    t->k = tile_take(scratch, n_keys * d);
    t->v = tile_take(scratch, n_keys * d);
    t->k_dims = tile_take(scratch, n_keys * d);
    t->grad_k = tile_take(scratch, n_keys * padded(d));
    t->grad_v = tile_take(scratch, n_keys * padded(d));
}

/* grad_k and grad_v of keys key0 .. key1 (key0 a multiple of KEYS), and grad_q if wanted, which
 * needs all keys. */
TILE_INLINE void key_block(const struct ht_attention_view *a, int64_t key0, int64_t key1,
                           float *scratch, int want, int pair)
{
    const int64_t d = a->d_head, element = (int64_t)ht_dtype_bytes(a->dtype);
    const int64_t n_tiles = (key1 - key0 + KEYS - 1) / KEYS;
    const size_t grad_bytes = (size_t)(n_tiles * KEYS * padded(d)) * sizeof(float);
    struct key_tile keys;
    struct query_tile qt;
    struct pair_work w;

    take_key_tiles(&keys, &scratch, key1 - key0, d);
    take_query_tile(&qt, &scratch, d);
    take_work(&w, &scratch, d);
    memset(keys.grad_k, 0, grad_bytes);
    memset(keys.grad_v, 0, grad_bytes);
    // padding lanes of the strips meet padding lanes of the gradients only, but must be numbers
    memset(qt.q_strip, 0, (size_t)(QUERIES * padded(d)) * sizeof(float));
    memset(qt.grad_o_strip, 0, (size_t)(QUERIES * padded(d)) * sizeof(float));
    for (int64_t i = 0; i < n_tiles; i++) {
        const struct key_tile kt = key_tile_at(&keys, i, d);
        load_key_tile(&kt, a, key0 + i * KEYS, w.rows, want, pair);
    }
    for (qt.col0 = key0 * a->group / QUERIES * QUERIES; qt.col0 < a->n_new * a->group;
         qt.col0 += QUERIES) {
        load_query_tile(&qt, a, w.rows, want, pair);
        for (int64_t i = 0; i < n_tiles && key0 + i * KEYS <= qt.pos[QUERIES - 1]; i++) {
            const struct key_tile kt = key_tile_at(&keys, i, d);
            run_tile_pair(&kt, &qt, &w, key0 + i * KEYS, a, want, pair);
        }
        if (want & WANT_Q) finish_query_tile(&qt, a, w.rows);
    }
    for (int64_t key = key0; key < key1; key++) {
        const int64_t at = (key - key0) * padded(d), out = key * a->grad_stride * element;
        tile_store_row(a->grad_k + out, a->dtype, keys.grad_k + at, d, a->scale);
        tile_store_row(a->grad_v + out, a->dtype, keys.grad_v + at, d, 1.0f);
    }
}

/* grad_q of columns col0 .. col0 + HT_ATTENTION_MAX_COLUMNS. */
TILE_INLINE void query_block(const struct ht_attention_view *a, int64_t col0, float *scratch,
                             int pair)
{
    enum { MAX_TILES = HT_ATTENTION_MAX_COLUMNS / QUERIES };
    const int64_t d = a->d_head, n_columns = a->n_new * a->group;
    struct key_tile kt;
    struct query_tile tiles[MAX_TILES];
    struct pair_work w;
    int64_t n_tiles = 0;

    take_key_tiles(&kt, &scratch, KEYS, d);
    take_work(&w, &scratch, d);
    for (; n_tiles < MAX_TILES && col0 < n_columns; n_tiles++, col0 += QUERIES) {
        take_query_tile(&tiles[n_tiles], &scratch, d);
        tiles[n_tiles].col0 = col0;
        load_query_tile(&tiles[n_tiles], a, w.rows, WANT_Q, pair);
    }
    for (int64_t key0 = 0; key0 <= tiles[n_tiles - 1].pos[QUERIES - 1]; key0 += KEYS) {
        load_key_tile(&kt, a, key0, w.rows, WANT_Q, pair);
        for (int64_t i = 0; i < n_tiles; i++)
            if (key0 <= tiles[i].pos[QUERIES - 1])
                run_tile_pair(&kt, &tiles[i], &w, key0, a, WANT_Q, pair);
    }
    for (int64_t i = 0; i < n_tiles; i++) finish_query_tile(&tiles[i], a, w.rows);
}

struct task { // block `at` of sequence `seq`, kv head `kv_head`
    int64_t seq, kv_head, at;
};

/* The heaviest blocks first; false past the end. Blocks of a sequence: ceil(tokens * per_token /
 * block). */
static bool find_task(struct task *t, const struct ht_flash_args *a, int64_t index,
                      int64_t per_token, int64_t block, bool last_first)
{
    t->kv_head = index % a->n_kv_heads;
    index /= a->n_kv_heads;
    for (t->seq = 0; t->seq < a->seqs.n_seqs; t->seq++) {
        const int64_t n = a->seqs.starts[t->seq + 1] - a->seqs.starts[t->seq];
        const int64_t blocks = (n * per_token + block - 1) / block;
        if (index < blocks) {
            t->at = (last_first ? blocks - 1 - index : index) * block;
            return true;
        }
        index -= blocks;
    }
    return false;
}

static int64_t count_tasks(const struct ht_flash_args *a, int64_t per_token, int64_t block)
{
    int64_t blocks = 0;
    for (int64_t s = 0; s < a->seqs.n_seqs; s++)
        blocks += ((a->seqs.starts[s + 1] - a->seqs.starts[s]) * per_token + block - 1) / block;
    return blocks * a->n_kv_heads;
}

static void run_key_block(const struct ht_flash_args *a, int64_t index, int64_t block,
                          bool one_pass, float *scratch)
{
    struct task t;
    const bool found = find_task(&t, a, index, 1, block, false);
    if (!found) return;
    const struct ht_attention_view v = ht_attention_flash_view(a, t.seq, t.kv_head);
    const int64_t end = tile_min(t.at + block, v.n_new);
    const int want = one_pass ? WANT_KV | WANT_Q : WANT_KV;
    if (TILE_HAS_PAIRS && a->dtype == HT_DTYPE_BF16)
        key_block(&v, t.at, end, scratch, want, 2);
    else
        key_block(&v, t.at, end, scratch, want, 1);
}

static void run_query_block(const struct ht_flash_args *a, int64_t index, float *scratch)
{
    struct task t;
    const int64_t group = a->n_heads / a->n_kv_heads;
    if (!find_task(&t, a, index, group, HT_ATTENTION_MAX_COLUMNS, true)) return;
    const struct ht_attention_view v = ht_attention_flash_view(a, t.seq, t.kv_head);
    if (TILE_HAS_PAIRS && a->dtype == HT_DTYPE_BF16)
        query_block(&v, t.at, scratch, 2);
    else
        query_block(&v, t.at, scratch, 1);
}

enum ht_status HT_ISA_FN(ht_flash_backward_cpu)(struct ht_backend *be,
                                                const struct ht_flash_args *a)
{
    const bool one_pass = ht_attention_backward_one_pass(a, be->n_threads);
    const int64_t floats = ht_attention_backward_floats(a->d_head, a->n_tokens);
    const int64_t block = one_pass ? HT_ATTENTION_ONE_PASS_MAX : HT_ATTENTION_KEY_BLOCK;
    const int64_t n_key_tasks = count_tasks(a, 1, block);
    const int64_t n_query_tasks =
        count_tasks(a, a->n_heads / a->n_kv_heads, HT_ATTENTION_MAX_COLUMNS);
    const size_t mark = ht_arena_mark(&be->scratch);
    void *scratch;

    HT_TRY(ht_arena_take(&scratch, &be->scratch, (size_t)(floats * be->n_threads) * sizeof(float)));
#pragma omp parallel num_threads(be->n_threads)
    {
        float *own = (float *)scratch + omp_get_thread_num() * floats;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_key_tasks; i++) run_key_block(a, i, block, one_pass, own);
        if (!one_pass) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n_query_tasks; i++) run_query_block(a, i, own);
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
