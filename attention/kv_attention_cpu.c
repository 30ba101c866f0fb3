/* attention/kv_attention_cpu.c: new tokens over a KV cache: decode and continued prefill
 * (spec 3.4, 4.4).
 *
 * Many new rows: the tiles of flash_fwd_cpu.c with `past` keys before the first query.
 * Few new rows (decode): memory-bound. A task is one row, one kv head and one block of 1024 keys;
 * all query heads of the kv head run together, so K and V are read from memory once: 2 * keys *
 * d_head elements. Lanes run over d_head. Each block leaves (o, m, l) with o unnormalised; a row's
 * blocks are combined in order: m = max_b m_b    o = sum_b exp2(m_b - m) o_b / sum_b exp2(m_b - m)
 * l_b The blocks are fixed, so the bits do not depend on the number of threads.
 */
#include "attention/attention_cpu.h"
#include "attention/tile_cpu.h"

#include <omp.h>

ht_attention_columns_fn HT_ISA_FN(ht_attention_columns); // flash_fwd_cpu.c
ht_kv_attention_fn HT_ISA_FN(ht_kv_attention_cpu);

enum {
    STEP = 4 * HT_VLEN, // keys between two looks at the maximum
    HEADS = 4,          // heads that share one pass over a step
    MAX_VECTORS = HT_ATTENTION_MAX_D_HEAD / HT_VLEN,
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

/* `n` heads over keys 0 .. n_keys (at most STEP) of k and v. */
TILE_INLINE void heads_step(struct head_state *heads, int n, const char *k, const char *v,
                            int64_t row_bytes, int64_t n_keys, int64_t d, enum ht_dtype dtype,
                            float scale_log2, int pair)
{
    const int64_t words = d / pair, n_vectors = (words + HT_VLEN - 1) / HT_VLEN;
    float prob[HEADS][STEP];
    float corr[HEADS];

    for (int h = 0; h < n; h++) {
        ht_vf q[MAX_VECTORS], m = vf_set(heads[h].m), sum = { 0 };
        for (int64_t i = 0; i < n_vectors; i++) q[i] = row_words(heads[h].q, i, words, dtype, pair);
        for (int64_t key0 = 0; key0 < n_keys; key0 += HT_VLEN) {
            ht_vf part[HT_VLEN];
#pragma GCC unroll 16
            for (int64_t j = 0; j < HT_VLEN; j++) {
                const char *row = k + tile_min(key0 + j, n_keys - 1) * row_bytes;
                part[j] = (ht_vf){ 0 };
                for (int64_t i = 0; i < n_vectors; i++)
                    part[j] = tile_dot(part[j], row_words(row, i, words, dtype, pair), q[i], pair);
            }
            ht_vf s = sum_rows(part);
            if (key0 + HT_VLEN > n_keys) {
                ht_vi lane;
                for (int j = 0; j < HT_VLEN; j++) lane[j] = j;
                s = vf_select(lane >= (int32_t)(n_keys - key0), vf_set(TILE_MASKED), s);
            }
            m = tile_max(s, m);
            vf_store(prob[h] + key0, s);
        }
        const float old = heads[h].m, now = vf_max_lane(m);
        heads[h].m = now;
        for (int64_t key0 = 0; key0 < n_keys; key0 += HT_VLEN) {
            const ht_vf p = tile_exp2((vf_load(prob[h] + key0) - now) * scale_log2, 1);
            sum += p;
            vf_store(prob[h] + key0, p);
        }
        corr[h] = exp2f((old - now) * scale_log2);
        heads[h].l = heads[h].l * corr[h] + vf_sum(sum);
    }
    for (int64_t i = 0; i < d; i += 2 * HT_VLEN) {
        const int nv = i + HT_VLEN < d ? 2 : 1;
        ht_vf acc[HEADS][2];
#pragma GCC unroll 4
        for (int h = 0; h < n; h++)
#pragma GCC unroll 2
            for (int u = 0; u < 2; u++)
                acc[h][u] = u < nv ? vf_load(heads[h].o + i + u * HT_VLEN) * corr[h] : vf_set(0.0f);
        for (int64_t j = 0; j < n_keys; j++) {
            const char *row = v + j * row_bytes;
            const ht_vf v0 = row_words(row, i / HT_VLEN, d, dtype, 1);
            const ht_vf v1 = nv == 2 ? row_words(row, i / HT_VLEN + 1, d, dtype, 1) : vf_set(0.0f);
#pragma GCC unroll 4
            for (int h = 0; h < n; h++) {
                acc[h][0] += v0 * prob[h][j];
                acc[h][1] += v1 * prob[h][j];
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < n; h++)
            for (int u = 0; u < nv; u++) vf_store(heads[h].o + i + u * HT_VLEN, acc[h][u]);
    }
}

/* One block of keys: writes (o (d_head), m, l) of each head of the group to `part`. */
TILE_INLINE void decode_block(const struct ht_attention_view *a, int64_t row, int64_t key0,
                              int64_t key1, float *part, int pair)
{
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype), d = a->d_head;
    const int64_t row_bytes = a->kv_stride * element;
    const float scale_log2 = a->scale * TILE_LOG2E;

    for (int64_t h0 = 0; h0 < a->group; h0 += HEADS) {
        const int n = (int)tile_min(HEADS, a->group - h0);
        struct head_state heads[HEADS];
        float o[HEADS][HT_ATTENTION_MAX_D_HEAD];
        memset(o, 0, sizeof o);
        for (int h = 0; h < n; h++)
            heads[h] = (struct head_state){ a->q + (row * a->q_stride + (h0 + h) * d) * element,
                                            o[h], TILE_MASKED, 0.0f };
        for (int64_t key = key0; key < key1; key += STEP) {
            const char *k = a->k + key * row_bytes, *v = a->v + key * row_bytes;
            const int64_t n_keys = tile_min(STEP, key1 - key);
            if (n == HEADS)
                heads_step(heads, HEADS, k, v, row_bytes, n_keys, d, a->dtype, scale_log2, pair);
            else
                for (int h = 0; h < n; h++)
                    heads_step(heads + h, 1, k, v, row_bytes, n_keys, d, a->dtype, scale_log2,
                               pair);
        }
        for (int h = 0; h < n; h++, part += d + 2) {
            memcpy(part, o[h], (size_t)d * sizeof(float));
            part[d] = heads[h].m;
            part[d + 1] = heads[h].l;
        }
    }
}

/* A head's blocks, `stride` floats apart, to one output row. */
static void combine(char *out, enum ht_dtype dtype, float *part, int64_t stride, int64_t n_blocks,
                    int64_t d, float scale_log2)
{
    float m = part[d], l = 0.0f;

    for (int64_t b = 1; b < n_blocks; b++) m = fmaxf(m, part[b * stride + d]);
    for (int64_t b = 0; b < n_blocks; b++) {
        const float *from = part + b * stride;
        const float weight = exp2f((from[d] - m) * scale_log2);
        l += from[d + 1] * weight;
        for (int64_t i = 0; i < d; i++) part[i] = (b ? part[i] : 0.0f) + from[i] * weight;
    }
    for (int64_t i = 0; i < d; i++) ht_store_f32(out, i, dtype, part[i] / l);
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

/* Tasks of sequence `seq` in the tile path, per kv head. */
static int64_t n_tiles(const struct ht_kv_attention_args *a, int64_t seq, int64_t n_columns)
{
    const int64_t group = a->n_heads / a->n_kv_heads;
    const int64_t n_new = a->seqs.starts[seq + 1] - a->seqs.starts[seq];
    return ht_attention_is_decode(n_new, group) ? 0 : (n_new * group + n_columns - 1) / n_columns;
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

struct decode_row {
    int64_t seq, row, first_block, n_blocks;
};

/* Row number `index` (n_rows in all) of the decode path, or the one that holds block `index`. */
static struct decode_row find_row(const struct ht_kv_attention_args *a, int64_t index,
                                  bool by_block)
{
    const int64_t group = a->n_heads / a->n_kv_heads;
    struct decode_row r = { 0 };
    int64_t rows = 0;

    for (r.seq = 0; r.seq < a->seqs.n_seqs; r.seq++) {
        const int64_t n_new = a->seqs.starts[r.seq + 1] - a->seqs.starts[r.seq];
        if (!ht_attention_is_decode(n_new, group)) continue;
        for (r.row = 0; r.row < n_new; r.row++, rows++) {
            r.n_blocks = ht_attention_key_blocks(a->past[r.seq] + r.row + 1);
            if (by_block ? index < r.first_block + r.n_blocks : rows == index) return r;
            r.first_block += r.n_blocks;
        }
    }
    r.row = rows; // past the end: how many there are
    return r;
}

static void decode_task(const struct ht_kv_attention_args *a, int64_t task, float *parts)
{
    const int64_t stride = (a->d_head + 2) * (a->n_heads / a->n_kv_heads);
    const int64_t index = task / a->n_kv_heads, kv_head = task % a->n_kv_heads;
    const struct decode_row r = find_row(a, index, true);
    const struct ht_attention_view v = cache_view(a, r.seq, kv_head);
    const int64_t key0 = (index - r.first_block) * HT_DECODE_KEY_BLOCK;
    const int64_t key1 = tile_min(key0 + HT_DECODE_KEY_BLOCK, v.past + r.row + 1);
    float *part = parts + task * stride;
    if (TILE_HAS_PAIRS && a->dtype == HT_DTYPE_BF16)
        decode_block(&v, r.row, key0, key1, part, 2);
    else
        decode_block(&v, r.row, key0, key1, part, 1);
}

enum ht_status HT_ISA_FN(ht_kv_attention_cpu)(struct ht_backend *be,
                                              const struct ht_kv_attention_args *a)
{
    const int64_t floats = ht_attention_forward_floats(a->d_head), d = a->d_head;
    const int64_t group = a->n_heads / a->n_kv_heads, part = (d + 2) * group;
    const struct decode_row all = find_row(a, -1, false);
    const int64_t n_tasks = all.first_block * a->n_kv_heads;
    const size_t mark = ht_arena_mark(&be->scratch);
    void *tiles, *parts;

    HT_TRY(ht_arena_take(&tiles, &be->scratch, (size_t)(floats * be->n_threads) * sizeof(float)));
    const enum ht_status st =
        ht_arena_take(&parts, &be->scratch, (size_t)(n_tasks * part) * sizeof(float));
    if (st != HT_OK) {
        ht_arena_reset(&be->scratch, mark);
        return st;
    }
    prefill(be, a, tiles, floats);
    if (n_tasks > 0) {
#pragma omp parallel num_threads(be->n_threads)
        {
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < n_tasks; task++) decode_task(a, task, parts);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < all.row * a->n_heads; i++) {
                const int64_t head = i % a->n_heads, kv_head = head / group;
                const struct decode_row r = find_row(a, i / a->n_heads, false);
                const struct ht_attention_view v = cache_view(a, r.seq, kv_head);
                float *first = (float *)parts + (r.first_block * a->n_kv_heads + kv_head) * part +
                               head % group * (d + 2);
                char *out = v.o + (r.row * v.o_stride + head % group * d) *
                                      (int64_t)ht_dtype_bytes(a->dtype);
                combine(out, a->dtype, first, a->n_kv_heads * part, r.n_blocks, d,
                        a->scale * TILE_LOG2E);
            }
        }
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
