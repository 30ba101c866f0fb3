/* attention/flash_fwd_cpu.c: attention of query columns over keys, online softmax (spec 3.4).
 *
 *   S   = K Q^T                              keys x queries: softmax runs down the rows, so no sum
 *   m'  = max(m, max_k S)                    across lanes is ever needed
 *   P   = exp2((S - m') scale log2 e)
 *   l   = l exp2(m - m') + sum_k P           (exponents again times scale log2 e)
 *   O^T = O^T exp2(m - m') + V^T P           at the end o = O^T / l, lse = scale m + ln l
 *
 * A task is up to 384 columns of one kv head. Per tile of 64 keys it packs K and V once, then walks
 * panels of TILE_PANEL columns, whose S and P (12 KiB and 6 KiB) stay in L1. Products: 4 * keys *
 * columns * d_head FLOP over the causal half; tiles above the diagonal are skipped in steps of 8
 * keys. With pair = 2, P is rounded to bf16 for the second product, while l sums the unrounded
 * values.
 */
#include "attention/tile_pack_cpu.h"

#include <omp.h>

ht_attention_columns_fn HT_ISA_FN(ht_attention_columns);

struct panel {               // the state of TILE_PANEL columns
    float *q;                // (d_head / pair, TILE_PANEL) words
    float *o;                // (d_head, TILE_PANEL)
    float *m, *l;            // (TILE_PANEL) running maximum of S, and sum
    int32_t pos[TILE_PANEL]; // absolute position of each column's token
};

/* One tile of n_keys (a multiple of 8) keys from absolute position key0. */
TILE_INLINE void panel_step(const struct panel *p, const float *k_tile, const float *v_tile,
                            float *s, float *prob, int64_t key0, int64_t n_keys, int64_t d_head,
                            float scale_log2, int pair)
{
    const int64_t words = d_head / pair, key_words = HT_ATTENTION_KEY_TILE / pair;
    ht_vf m[TILE_NV], scaled_m[TILE_NV], corr[TILE_NV], l[TILE_NV];

    for (int v = 0; v < TILE_NV; v++) m[v] = vf_load(p->m + v * HT_VLEN);
    for (int64_t row = 0; row < n_keys; row += TILE_MR) {
        struct tile_acc acc;
        tile_zero(&acc, TILE_NV);
        tile_multiply(&acc, TILE_NV, k_tile + row / 8 * 8 * words + row % 8, 1, 8, p->q, TILE_PANEL,
                      words, pair);
        if (key0 + row + TILE_MR - 1 > p->pos[0]) {
#pragma GCC unroll 4
            for (int v = 0; v < TILE_NV; v++) {
                ht_vi pos;
                memcpy(&pos, p->pos + v * HT_VLEN, sizeof pos);
#pragma GCC unroll 8
                for (int r = 0; r < TILE_MR; r++)
                    acc.v[r][v] = tile_causal(acc.v[r][v], pos, (int32_t)(key0 + row + r));
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_NV; v++) m[v] = tile_max(acc.v[r][v], m[v]);
        tile_store(&acc, TILE_NV, s + row * TILE_PANEL, TILE_PANEL);
    }

    for (int v = 0; v < TILE_NV; v++) {
        const ht_vf old = vf_load(p->m + v * HT_VLEN);
        scaled_m[v] = m[v] * scale_log2;
        corr[v] = tile_exp2((old - m[v]) * scale_log2, 1);
        l[v] = vf_load(p->l + v * HT_VLEN) * corr[v];
        vf_store(p->m + v * HT_VLEN, m[v]);
    }
    for (int64_t row = 0; row < n_keys; row += pair) {
        const float *in = s + row * TILE_PANEL;
        float *out = prob + row / pair * TILE_PANEL;
#pragma GCC unroll 4
        for (int v = 0; v < TILE_NV; v++) {
            const ht_vf p0 = tile_exp2(vf_load(in + v * HT_VLEN) * scale_log2 - scaled_m[v], pair);
            l[v] += p0;
#if TILE_HAS_PAIRS
            if (pair == 2) {
                const ht_vf p1 = tile_exp2(
                    vf_load(in + TILE_PANEL + v * HT_VLEN) * scale_log2 - scaled_m[v], pair);
                l[v] += p1;
                vf_store(out + v * HT_VLEN, tile_pair_rows(p0, p1));
                continue;
            }
#endif
            vf_store(out + v * HT_VLEN, p0);
        }
    }
    for (int v = 0; v < TILE_NV; v++) vf_store(p->l + v * HT_VLEN, l[v]);

    for (int64_t dim = 0; dim < d_head; dim += TILE_MR) {
        struct tile_acc acc;
        tile_load(&acc, TILE_NV, p->o + dim * TILE_PANEL, TILE_PANEL);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
            for (int v = 0; v < TILE_NV; v++) acc.v[r][v] *= corr[v];
        tile_multiply(&acc, TILE_NV, v_tile + dim / 8 * 8 * key_words + dim % 8, 1, 8, prob,
                      TILE_PANEL, n_keys / pair, pair);
        tile_store(&acc, TILE_NV, p->o + dim * TILE_PANEL, TILE_PANEL);
    }
}

static void panel_start(struct panel *p, const struct ht_attention_view *a, int64_t col0,
                        int64_t n_columns)
{
    memset(p->o, 0, (size_t)(a->d_head * TILE_PANEL) * sizeof(float));
    for (int64_t c = 0; c < TILE_PANEL; c++) {
        p->m[c] = TILE_MASKED;
        p->l[c] = 0.0f;
        p->pos[c] = (int32_t)(a->past + tile_min(col0 + c, n_columns - 1) / a->group);
    }
}

static void panel_finish(const struct panel *p, const struct ht_attention_view *a, int64_t col0,
                         int64_t n_columns, float *rows)
{
    const int64_t element = (int64_t)ht_dtype_bytes(a->dtype);

    tile_unpack_panel(rows, p->o, a->d_head);
    for (int64_t c = 0; c < TILE_PANEL && col0 + c < n_columns; c++) {
        const int64_t token = (col0 + c) / a->group, head = (col0 + c) % a->group;
        tile_store_row(a->o + (token * a->o_stride + head * a->d_head) * element, a->dtype,
                       rows + c * a->d_head, a->d_head, 1.0f / p->l[c]);
        if (a->lse) a->lse[token * a->lse_stride + head] = p->m[c] * a->scale + logf(p->l[c]);
    }
}

/* Columns col0 .. n_columns, at most HT_ATTENTION_MAX_COLUMNS; columns from n_columns on are
 * padding. */
TILE_INLINE void columns(const struct ht_attention_view *a, int64_t col0, int64_t n_columns,
                         float *scratch, int pair)
{
    const int64_t d = a->d_head, words = d / pair, key_tile = HT_ATTENTION_KEY_TILE;
    const int64_t n_panels = (n_columns - col0 + TILE_PANEL - 1) / TILE_PANEL;
    const int64_t n_keys = a->past + (n_columns - 1) / a->group + 1;
    const struct tile_rows q = { a->q, a->q_stride, a->group, d, n_columns, a->dtype };
    const struct tile_rows k = { a->k, a->kv_stride, 1, d, n_keys, a->dtype };
    const struct tile_rows v = { a->v, a->kv_stride, 1, d, n_keys, a->dtype };
    float *q_all = tile_take(&scratch, HT_ATTENTION_MAX_COLUMNS * d);
    float *o_all = tile_take(&scratch, HT_ATTENTION_MAX_COLUMNS * d);
    float *m_all = tile_take(&scratch, HT_ATTENTION_MAX_COLUMNS);
    float *l_all = tile_take(&scratch, HT_ATTENTION_MAX_COLUMNS);
    float *k_tile = tile_take(&scratch, key_tile * d), *v_tile = tile_take(&scratch, key_tile * d);
    float *s = tile_take(&scratch, key_tile * TILE_PANEL);
    float *prob = tile_take(&scratch, key_tile * TILE_PANEL);
    float *tmp = tile_take(&scratch, HT_ATTENTION_QUERY_TILE * d);
    struct panel panels[HT_ATTENTION_MAX_COLUMNS / TILE_PANEL];

    for (int64_t i = 0; i < n_panels; i++) {
        struct panel *p = &panels[i];
        p->q = q_all + i * TILE_PANEL * words;
        p->o = o_all + i * TILE_PANEL * d;
        p->m = m_all + i * TILE_PANEL;
        p->l = l_all + i * TILE_PANEL;
        panel_start(p, a, col0 + i * TILE_PANEL, n_columns);
        tile_pack_transposed(p->q, TILE_PANEL, 8, &q, col0 + i * TILE_PANEL, TILE_PANEL, tmp, pair);
    }
    for (int64_t key0 = 0; key0 < n_keys; key0 += key_tile) {
        const int64_t in_tile = tile_min(key_tile, tile_round_up(n_keys - key0, 8));
        tile_pack_transposed(k_tile, 8, 8 * words, &k, key0, in_tile, tmp, pair);
        tile_pack_interleaved(v_tile, 8, 8 * (key_tile / pair), &v, key0, in_tile, tmp, pair);
        for (int64_t i = 0; i < n_panels; i++) {
            const int64_t ahead = key0 + key_tile + i * key_tile / n_panels;
            const int64_t share = (key_tile + n_panels - 1) / n_panels;
            tile_prefetch(&k, ahead, share);
            tile_prefetch(&v, ahead, share);
            const int64_t left = panels[i].pos[TILE_PANEL - 1] + 1 - key0;
            if (left <= 0) continue;
            panel_step(&panels[i], k_tile, v_tile, s, prob, key0,
                       tile_min(in_tile, tile_round_up(left, 8)), d, a->scale * TILE_LOG2E, pair);
        }
    }
    for (int64_t i = 0; i < n_panels; i++)
        panel_finish(&panels[i], a, col0 + i * TILE_PANEL, n_columns, tmp);
}

void HT_ISA_FN(ht_attention_columns)(const struct ht_attention_view *a, int64_t col0, int64_t col1,
                                     float *scratch)
{
    if (TILE_HAS_PAIRS && a->dtype == HT_DTYPE_BF16)
        columns(a, col0, col1, scratch, 2);
    else
        columns(a, col0, col1, scratch, 1);
}

/* Tasks of `columns` columns: tiles of sequence s are numbered from its end, the longest first. */
static int64_t n_tiles(const struct ht_flash_args *a, int64_t seq, int64_t n_columns)
{
    const int64_t n = a->seqs.starts[seq + 1] - a->seqs.starts[seq];
    return (n * (a->n_heads / a->n_kv_heads) + n_columns - 1) / n_columns;
}

enum ht_status HT_ISA_FN(ht_flash_forward_cpu)(struct ht_backend *be, const struct ht_flash_args *a)
{
    const int64_t floats = ht_attention_forward_floats(a->d_head);
    const size_t mark = ht_arena_mark(&be->scratch);
    int64_t n_columns = HT_ATTENTION_MAX_COLUMNS, tasks;
    void *scratch;

    HT_TRY(ht_arena_take(&scratch, &be->scratch, (size_t)(floats * be->n_threads) * sizeof(float)));
    for (;; n_columns /= 2) { // results do not depend on how columns are grouped
        tasks = 0;
        for (int64_t s = 0; s < a->seqs.n_seqs; s++) tasks += n_tiles(a, s, n_columns);
        tasks *= a->n_kv_heads;
        if (n_columns == HT_ATTENTION_QUERY_TILE || tasks >= 8 * be->n_threads) break;
    }
#pragma omp parallel for schedule(dynamic, 1) num_threads(be->n_threads)
    for (int64_t task = 0; task < tasks; task++) {
        int64_t seq = 0, tile = task / a->n_kv_heads;
        for (; tile >= n_tiles(a, seq, n_columns); seq++) tile -= n_tiles(a, seq, n_columns);
        const struct ht_attention_view view = ht_attention_flash_view(a, seq, task % a->n_kv_heads);
        const int64_t col0 = (n_tiles(a, seq, n_columns) - 1 - tile) * n_columns;
        HT_ISA_FN(ht_attention_columns)
        (&view, col0, tile_min(col0 + n_columns, view.n_new * view.group),
         (float *)scratch + omp_get_thread_num() * floats);
    }
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
