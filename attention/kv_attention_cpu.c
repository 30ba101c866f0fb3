/* attention/kv_attention_cpu.c: new tokens over a KV cache: decode and continued prefill
 * (spec 3.4, 4.4).
 *
 * Several new rows: the tiles of flash_fwd_cpu.c with `past` keys before the first query.
 * One new row (decode): bound by memory. A task is one block of 256 keys with all heads; the query
 * heads of a kv head share each key, so K and V are read once: 2 * keys * n_kv_heads * d_head
 * elements. Lanes run over d_head. A block leaves (o, m, l) per head with o unnormalised; blocks
 * are combined in order:
 *
 *   m = max_b m_b    w_b = exp(scale (m_b - m))    o = sum_b w_b o_b / sum_b w_b l_b
 *
 * The blocks are fixed, so the bits do not depend on the number of threads. With pair = 2, P is
 * rounded to bf16 for the product with V, as in the tiles.
 */
#include "attention/attention_cpu.h"
#include "attention/tile_cpu.h"

#include <omp.h>

ht_attention_columns_fn HT_ISA_FN(ht_attention_columns); // flash_fwd_cpu.c
ht_kv_attention_fn HT_ISA_FN(ht_kv_attention_cpu);

enum {
    STEP = 64, // keys between two looks at the maximum
    HEADS = 4, // heads that share one pass over a step
};

/* Vector i of a row of n words; zeros beyond its end. */
TILE_INLINE ht_vf row_words(const char *row, int64_t i, int64_t n, enum ht_dtype dtype, int pair)
{
    const int64_t at = i * HT_VLEN, left = n - at;
    const bool widen = dtype == HT_DTYPE_BF16 && pair == 1;
    if (left >= HT_VLEN)
        return widen ? vf_load_bf16((const ht_bf16 *)row + at) : vf_load((const float *)row + at);
    return widen ? vf_load_bf16_n((const ht_bf16 *)row + at, left)
                 : vf_load_n((const float *)row + at, left);
}

#if HT_VLEN == 16
#define EVEN                                                                                       \
    {                                                                                              \
        0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30                                  \
    }
#elif HT_VLEN == 8
#define EVEN                                                                                       \
    {                                                                                              \
        0, 2, 4, 6, 8, 10, 12, 14                                                                  \
    }
#else
#define EVEN                                                                                       \
    {                                                                                              \
        0, 2, 4, 6                                                                                 \
    }
#endif

/* Lane i of the result is the sum of v[i]'s lanes, in a fixed tree. */
TILE_INLINE ht_vf sum_rows(ht_vf v[HT_VLEN])
{
    const ht_vi even = EVEN, odd = even + 1;
#pragma GCC unroll 4
    for (int n = HT_VLEN / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) +
                   __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    return v[0];
}

struct head_state { // of one query head within a block
    const char *q;
    float *o; // (d_head) rounded up to vectors
    float m, l;
};

/* Bytes that will be wanted after this step, asked for in small pieces between the arithmetic: a
 * burst of requests would fill the core's queue of misses and stop it. */
struct ahead {
    const char *at, *end;
    int64_t piece;
};

TILE_INLINE void fetch_piece(struct ahead *a)
{
    const char *const to = a->end - a->at < a->piece ? a->end : a->at + a->piece;
    for (; a->at < to; a->at += 64) __builtin_prefetch(a->at, 0, 3);
}

/* prob[h][key + j] = q[h] . (row key + j of k) for HT_VLEN rows, the last valid one repeated beyond
 * n_keys. A few rows at a time against all heads: each row is loaded once, and the sums stay in
 * registers. */
TILE_INLINE void key_scores(const struct head_state *heads, int n, float prob[HEADS][STEP],
                            int64_t key, const char *k, int64_t row_bytes, int64_t n_keys,
                            int64_t n_words, enum ht_dtype dtype, int pair, struct ahead *ahead)
{
    enum { AT_ONCE = HT_VLEN == 16 ? 4 : 2 };
    const int64_t q_bytes = dtype == HT_DTYPE_BF16 && pair == 1 ? 2 : 4; // of a stored word
    const int64_t whole = n_words / HT_VLEN;
    ht_vf part[HEADS][HT_VLEN];

    for (int64_t j = 0; j < HT_VLEN; j += AT_ONCE) {
        const char *rows[AT_ONCE];
        ht_vf acc[HEADS][AT_ONCE];
        fetch_piece(ahead);
#pragma GCC unroll 4
        for (int u = 0; u < AT_ONCE; u++) {
            rows[u] = k + tile_min(key + j + u, n_keys - 1) * row_bytes;
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) acc[h][u] = (ht_vf){ 0 };
        }
        for (int64_t at = 0; at < whole * HT_VLEN * q_bytes; at += HT_VLEN * q_bytes) {
            ht_vf row[AT_ONCE];
#pragma GCC unroll 4
            for (int u = 0; u < AT_ONCE; u++)
                row[u] = q_bytes == 2 ? vf_load_bf16((const ht_bf16 *)(rows[u] + at))
                                      : vf_load((const float *)(rows[u] + at));
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) {
                const ht_vf q = q_bytes == 2 ? vf_load_bf16((const ht_bf16 *)(heads[h].q + at))
                                             : vf_load((const float *)(heads[h].q + at));
#pragma GCC unroll 4
                for (int u = 0; u < AT_ONCE; u++) acc[h][u] = tile_dot(acc[h][u], row[u], q, pair);
            }
        }
        if (whole * HT_VLEN < n_words)
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) {
                const ht_vf q = row_words(heads[h].q, whole, n_words, dtype, pair);
#pragma GCC unroll 4
                for (int u = 0; u < AT_ONCE; u++)
                    acc[h][u] = tile_dot(acc[h][u], row_words(rows[u], whole, n_words, dtype, pair),
                                         q, pair);
            }
#pragma GCC unroll 4
        for (int h = 0; h < n; h++)
#pragma GCC unroll 4
            for (int u = 0; u < AT_ONCE; u++) part[h][j + u] = acc[h][u];
    }
    for (int h = 0; h < n; h++) {
        ht_vf s = sum_rows(part[h]);
        if (key + HT_VLEN > n_keys) {
            ht_vi lane;
            for (int j = 0; j < HT_VLEN; j++) lane[j] = j;
            s = vf_select(lane >= (int32_t)(n_keys - key), vf_set(TILE_MASKED), s);
        }
        vf_store(&prob[h][key], s);
    }
}

/* Scores to probabilities of one head; returns what its older sums must be multiplied by. */
TILE_INLINE float head_softmax(struct head_state *h, float *prob, int64_t n_keys, float scale_log2)
{
    ht_vf m = vf_set(h->m), sum = { 0 };
    for (int64_t j = 0; j < n_keys; j += HT_VLEN) m = tile_max(vf_load(prob + j), m);
    const float now = vf_max_lane(m), corr = exp2f((h->m - now) * scale_log2);
    for (int64_t j = 0; j < n_keys; j += HT_VLEN) {
        const ht_vf p = tile_exp2((vf_load(prob + j) - now) * scale_log2, 1);
        sum += p;
        vf_store(prob + j, p);
    }
    h->m = now;
    h->l = h->l * corr + vf_sum(sum);
    return corr;
}

#if TILE_HAS_PAIRS
/* 64 dims from `dim` of add_values, two keys at a time: their rows interleaved, P rounded to bf16.
 */
TILE_INLINE void add_paired_values(struct head_state *heads, int n, ht_bf16 prob[HEADS][STEP],
                                   const float *corr, const char *v, int64_t row_bytes,
                                   int64_t n_keys, int64_t dim, int64_t d, bool ragged,
                                   struct ahead *ahead)
{
    const __m512i low =
        (__m512i)(__v32hi){ 0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47 };
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const uint64_t mask = ragged ? ((uint64_t)1 << (d - dim)) - 1 : ~(uint64_t)0;
    ht_vf acc[HEADS][4];

#pragma GCC unroll 4
    for (int h = 0; h < n; h++)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) acc[h][u] = vf_load(heads[h].o + dim + u * HT_VLEN) * corr[h];
    v += 2 * dim;
    for (int64_t j = 0; j < n_keys; j += 2, v += 2 * row_bytes) {
        const char *odd = j + 1 < n_keys ? v + row_bytes : v; // that key meets P = 0
        __m512i row[4];
        fetch_piece(ahead);
        if (ragged) {
            row[0] = _mm512_maskz_loadu_epi16((__mmask32)mask, v);
            row[1] = _mm512_maskz_loadu_epi16((__mmask32)mask, odd);
            row[2] = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), v + 64);
            row[3] = _mm512_maskz_loadu_epi16((__mmask32)(mask >> 32), odd + 64);
        } else {
            row[0] = _mm512_loadu_si512(v);
            row[1] = _mm512_loadu_si512(odd);
            row[2] = _mm512_loadu_si512(v + 64);
            row[3] = _mm512_loadu_si512(odd + 64);
        }
        const ht_vf v0 = (ht_vf)_mm512_permutex2var_epi16(row[0], low, row[1]);
        const ht_vf v1 = (ht_vf)_mm512_permutex2var_epi16(row[0], high, row[1]);
        const ht_vf v2 = (ht_vf)_mm512_permutex2var_epi16(row[2], low, row[3]);
        const ht_vf v3 = (ht_vf)_mm512_permutex2var_epi16(row[2], high, row[3]);
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) {
            const ht_vf p = tile_broadcast((const float *)&prob[h][j]);
            acc[h][0] = tile_dot(acc[h][0], v0, p, 2);
            acc[h][1] = tile_dot(acc[h][1], v1, p, 2);
            acc[h][2] = tile_dot(acc[h][2], v2, p, 2);
            acc[h][3] = tile_dot(acc[h][3], v3, p, 2);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < n; h++)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) vf_store(heads[h].o + dim + u * HT_VLEN, acc[h][u]);
}
#endif

/* o[h] = o[h] * corr[h] + sum_j prob[h][j] v[j], n heads; prob is zero from n_keys to whole
 * vectors. */
TILE_INLINE void add_values(struct head_state *heads, int n, float prob[HEADS][STEP],
                            const float *corr, const char *v, int64_t row_bytes, int64_t n_keys,
                            int64_t d, enum ht_dtype dtype, int pair, struct ahead *ahead)
{
    (void)pair;
#if TILE_HAS_PAIRS
    if (pair == 2) {
        ht_bf16 prob16[HEADS][STEP];
        int64_t dim = 0;
        for (int h = 0; h < n; h++)
            for (int64_t j = 0; j < n_keys; j += HT_VLEN)
                vf_store_bf16(&prob16[h][j], vf_load(&prob[h][j]));
        for (; dim + 64 <= d; dim += 64)
            add_paired_values(heads, n, prob16, corr, v, row_bytes, n_keys, dim, d, false, ahead);
        if (dim < d)
            add_paired_values(heads, n, prob16, corr, v, row_bytes, n_keys, dim, d, true, ahead);
        return;
    }
#endif
    for (int64_t i = 0; i * HT_VLEN < d; i++) {
        ht_vf acc[HEADS];
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) acc[h] = vf_load(heads[h].o + i * HT_VLEN) * corr[h];
        for (int64_t j = 0; j < n_keys; j++) {
            if (j % 2 == 0) fetch_piece(ahead);
            const ht_vf vj = row_words(v + j * row_bytes, i, d, dtype, 1);
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) acc[h] += vj * prob[h][j];
        }
#pragma GCC unroll 4
        for (int h = 0; h < n; h++) vf_store(heads[h].o + i * HT_VLEN, acc[h]);
    }
}

/* `n` heads over keys 0 .. n_keys (at most STEP) of k and v. */
TILE_INLINE void heads_step(struct head_state *heads, int n, const char *k, const char *v,
                            int64_t row_bytes, int64_t n_keys, int64_t d, enum ht_dtype dtype,
                            float scale_log2, int pair, struct ahead *k_ahead,
                            struct ahead *v_ahead)
{
    _Alignas(64) float prob[HEADS][STEP];
    float corr[HEADS];

    for (int64_t key = 0; key < n_keys; key += HT_VLEN)
        key_scores(heads, n, prob, key, k, row_bytes, n_keys, d / pair, dtype, pair, k_ahead);
    for (int h = 0; h < n; h++) corr[h] = head_softmax(&heads[h], prob[h], n_keys, scale_log2);
    add_values(heads, n, prob, corr, v, row_bytes, n_keys, d, dtype, pair, v_ahead);
}

static struct ht_attention_view cache_view(const struct ht_kv_attention_args *a, int64_t seq,
                                           int64_t kv_head)
{
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype), d = a->d_head;
    const int64_t group = a->n_heads / a->n_kv_heads, first = a->seqs.starts[seq];
    const int64_t head_at = kv_head * group * d;
    return (struct ht_attention_view){
        .q = (const char *)a->q + (first * a->q_stride + head_at) * element,
        .k = (const char *)a->k_cache[seq] + kv_head * d * element,
        .v = (const char *)a->v_cache[seq] + kv_head * d * element,
        .q_stride = a->q_stride,
        .kv_stride = a->n_kv_heads * d,
        .o = (char *)a->o + (first * a->n_heads * d + head_at) * element,
        .o_stride = a->n_heads * d,
        .n_new = a->seqs.starts[seq + 1] - first,
        .past = a->past[seq],
        .group = group,
        .d_head = d,
        .dtype = a->dtype,
        .scale = a->scale,
    };
}

/* All heads of the one new row of `seq` over keys key0 .. key1: a slot of (o, m, l) per head. All
 * kv heads advance together, a step of 64 keys at a time, so that memory is read in order; while
 * one kv head is computed, its share of the next step's contiguous bytes is fetched. */
TILE_INLINE void decode_block(const struct ht_kv_attention_args *args, int64_t seq, int64_t key0,
                              int64_t key1, float *slots, int pair)
{
    const struct ht_attention_view a = cache_view(args, seq, 0);
    const int64_t element = (int64_t)ht_dtype_bytes(a.dtype), d = a.d_head;
    const int64_t row_bytes = a.kv_stride * element, slot = ht_attention_decode_slot(d);
    const int64_t n_kv = args->n_kv_heads, at_m = slot - 2, at_l = slot - 1;
    const char *const k_end = a.k + key1 * row_bytes, *const v_end = a.v + key1 * row_bytes;
    const float scale_log2 = a.scale * TILE_LOG2E;
    // a kv head's share of a step over the loops of key_scores and add_values
    const int64_t share = STEP * row_bytes / n_kv, passes = (d + 63) / 64;
    const int64_t k_piece = (share / (STEP / 4) + 63) / 64 * 64;
    const int64_t v_piece = (share / (passes * STEP / 2) + 63) / 64 * 64;

    for (int64_t h = 0; h < args->n_heads; h++) {
        memset(slots + h * slot, 0, (size_t)slot * sizeof(float));
        slots[h * slot + at_m] = TILE_MASKED;
    }
    for (int64_t key = key0; key < key1; key += STEP) {
        const char *k = a.k + key * row_bytes, *v = a.v + key * row_bytes;
        const int64_t n_keys = tile_min(STEP, key1 - key), step_bytes = STEP * row_bytes;
        for (int64_t kv = 0; kv < n_kv; kv++) {
            const int64_t from = step_bytes + step_bytes * kv / n_kv;
            const int64_t to = step_bytes + step_bytes * (kv + 1) / n_kv;
            struct ahead k_ahead = { k + from, k + to < k_end ? k + to : k_end, k_piece };
            struct ahead v_ahead = { v + from, v + to < v_end ? v + to : v_end, v_piece };
            const char *kh = k + kv * d * element, *vh = v + kv * d * element;
            for (int64_t h0 = 0; h0 < a.group;) {
                const int64_t left = a.group - h0, head0 = kv * a.group + h0;
                const int n = left >= 4 ? 4 : left >= 2 ? 2 : 1; // of at most HEADS
                struct head_state hs[HEADS];
                for (int h = 0; h < n; h++) {
                    float *at = slots + (head0 + h) * slot;
                    hs[h] = (struct head_state){ a.q + (head0 + h) * d * element, at, at[at_m],
                                                 at[at_l] };
                }
                if (n == 4)
                    heads_step(hs, 4, kh, vh, row_bytes, n_keys, d, a.dtype, scale_log2, pair,
                               &k_ahead, &v_ahead);
                else if (n == 2)
                    heads_step(hs, 2, kh, vh, row_bytes, n_keys, d, a.dtype, scale_log2, pair,
                               &k_ahead, &v_ahead);
                else
                    heads_step(hs, 1, kh, vh, row_bytes, n_keys, d, a.dtype, scale_log2, pair,
                               &k_ahead, &v_ahead);
                h0 += n;
                for (int h = 0; h < n; h++) {
                    hs[h].o[at_m] = hs[h].m;
                    hs[h].o[at_l] = hs[h].l;
                }
            }
        }
    }
}

/* A head's slots, `stride` floats apart, to one output row; uses the first slot for the sum. */
static void combine(char *out, enum ht_dtype dtype, float *slots, int64_t stride, int64_t n_blocks,
                    int64_t d, float scale_log2)
{
    const int64_t at_m = ht_attention_decode_slot(d) - 2, at_l = at_m + 1;
    float m = slots[at_m], l = 0.0f;

    for (int64_t b = 1; b < n_blocks; b++) m = fmaxf(m, slots[b * stride + at_m]);
    for (int64_t b = 0; b < n_blocks; b++) {
        const float *from = slots + b * stride;
        const float weight = exp2f((from[at_m] - m) * scale_log2);
        l += from[at_l] * weight;
        for (int64_t i = 0; i < d; i++) slots[i] = (b ? slots[i] : 0.0f) + from[i] * weight;
    }
    for (int64_t i = 0; i < d; i++) ht_store_f32(out, i, dtype, slots[i] / l);
}

/* Tasks of sequence `seq` in the tile path, per kv head. */
static int64_t n_tiles(const struct ht_kv_attention_args *a, int64_t seq, int64_t n_columns)
{
    const int64_t n_new = a->seqs.starts[seq + 1] - a->seqs.starts[seq];
    if (ht_attention_is_decode(&a->seqs, seq)) return 0;
    return (n_new * (a->n_heads / a->n_kv_heads) + n_columns - 1) / n_columns;
}

static void prefill(struct ht_backend *be, const struct ht_kv_attention_args *a, float *scratch,
                    int64_t floats)
{
    int64_t n_columns = HT_ATTENTION_MAX_COLUMNS, tasks;

    for (;; n_columns /= 2) { // results do not depend on how columns are grouped
        tasks = 0;
        for (int64_t s = 0; s < a->seqs.n_seqs; s++) tasks += n_tiles(a, s, n_columns);
        tasks *= a->n_kv_heads;
        if (n_columns == HT_ATTENTION_QUERY_TILE || tasks >= 8 * be->n_threads) break;
    }
    if (tasks == 0) return;
#pragma omp parallel for schedule(dynamic, 1) num_threads(be->n_threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t seq = 0, tile = task / a->n_kv_heads;
        for (; tile >= n_tiles(a, seq, n_columns); seq++) tile -= n_tiles(a, seq, n_columns);
        const struct ht_attention_view view = cache_view(a, seq, task % a->n_kv_heads);
        const int64_t col0 = (n_tiles(a, seq, n_columns) - 1 - tile) * n_columns;
        HT_ISA_FN(ht_attention_columns)
        (&view, col0, tile_min(col0 + n_columns, view.n_new * view.group),
         scratch + omp_get_thread_num() * floats);
    }
}

struct decode_seq {
    int64_t seq, first_block, n_blocks;
};

/* The decoding sequence that holds block `index`; past the end, first_block is the number of
 * blocks. */
static struct decode_seq find_block(const struct ht_kv_attention_args *a, int64_t index)
{
    struct decode_seq r = { 0 };

    for (r.seq = 0; r.seq < a->seqs.n_seqs; r.seq++) {
        if (!ht_attention_is_decode(&a->seqs, r.seq)) continue;
        r.n_blocks = ht_attention_key_blocks(a->past[r.seq] + 1);
        if (index < r.first_block + r.n_blocks) return r;
        r.first_block += r.n_blocks;
    }
    return r;
}

static void decode_task(const struct ht_kv_attention_args *a, int64_t index, float *slots)
{
    const struct decode_seq r = find_block(a, index);
    const int64_t key0 = (index - r.first_block) * HT_DECODE_KEY_BLOCK;
    const int64_t key1 = tile_min(key0 + HT_DECODE_KEY_BLOCK, a->past[r.seq] + 1);
    float *own = slots + index * a->n_heads * ht_attention_decode_slot(a->d_head);
    if (TILE_HAS_PAIRS && a->dtype == HT_DTYPE_BF16)
        decode_block(a, r.seq, key0, key1, own, 2);
    else
        decode_block(a, r.seq, key0, key1, own, 1);
}

/* If block `index` is the first of its row: the row's blocks, in order, to the output. */
static void decode_finish(const struct ht_kv_attention_args *a, int64_t index, float *slots)
{
    const int64_t slot = ht_attention_decode_slot(a->d_head), block = a->n_heads * slot;
    const struct decode_seq r = find_block(a, index);
    if (index != r.first_block) return;
    const struct ht_attention_view v = cache_view(a, r.seq, 0);
    for (int64_t h = 0; h < a->n_heads; h++)
        combine(v.o + h * a->d_head * (int64_t)ht_dtype_bytes(a->dtype), a->dtype,
                slots + index * block + h * slot, block, r.n_blocks, a->d_head,
                a->scale * TILE_LOG2E);
}

enum ht_status HT_ISA_FN(ht_kv_attention_cpu)(struct ht_backend *be,
                                              const struct ht_kv_attention_args *a)
{
    const int64_t floats = ht_attention_forward_floats(a->d_head);
    const int64_t n_blocks = find_block(a, INT64_MAX).first_block;
    const int64_t slots_floats = n_blocks * a->n_heads * ht_attention_decode_slot(a->d_head);
    const size_t mark = ht_arena_mark(&be->scratch);
    void *tiles, *slots;

    HT_TRY(ht_arena_take(&tiles, &be->scratch, (size_t)(floats * be->n_threads) * sizeof(float)));
    const enum ht_status st =
        ht_arena_take(&slots, &be->scratch, (size_t)slots_floats * sizeof(float));
    if (st != HT_OK) {
        ht_arena_reset(&be->scratch, mark);
        return st;
    }
    prefill(be, a, tiles, floats);
    if (n_blocks > 0) {
#pragma omp parallel num_threads(be->n_threads)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < n_blocks; i++) decode_task(a, i, slots);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n_blocks; i++) decode_finish(a, i, slots);
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
