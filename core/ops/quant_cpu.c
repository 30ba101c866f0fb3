/* core/ops/quant_cpu.c: y = x W^T with W packed in strips of 16 rows (quant_impl.h).
 *
 *   y[i, j] = sum_g ws[j, g] xs[i, g] (sum_k u[j, k] xq[i, k] - z[j, g] sum_k xq[i, k]),  k in g
 *
 * u is the unsigned code, z its offset, xq the int8 code of x. The inner difference is exact in
 * int32: the accumulator starts at its second term. Rows of x are packed in blocks of a few rows,
 * four neighbours of k (two in bf16) of all rows together, so that a tile reads both operands in
 * order.
 *
 * Few rows: bound by reading W once. Strips are multiplied by one block of rows as they come from
 * memory; further blocks find them in L2, and fetch the next strips into L2 meanwhile (16 rows from
 * memory on one Zen 5 core: bf16 429 instead of 290 GFLOP/s, int8 582 instead of 410, int4 646
 * instead of 500). Many rows: bound by the dot products; rows and k are cut so that what is used
 * again stays in L2. Sums over groups (over k in bf16) go in one order whatever the cut, so a row's
 * result depends on that row alone.
 */
#include "core/ops/quant_x_cpu.h"

enum {
    AHEAD_BYTES = 700 << 10, // this and the next strips in L2 together, of 1 MiB
    LINE_AHEAD = 8 << 10,    // one row: bytes between what is multiplied and what is fetched
    PARALLEL_MIN = 1 << 15,  // elements of W below which a parallel region costs more than the work
    PACK_MIN = 1 << 17,      // the same for elements of x
    // many rows: panels of rows and strips whose sums wait in a buffer while k goes by in pieces
    FEW_ROWS = 48,
    PANEL_ROWS = 128,  // multiple of every block's rows
    PANEL_STRIPS = 24, // multiple of STRIPS; sums of a panel: 192 KiB
    PANEL_K = 1024     // of x 256 KiB in bf16, of each 3 strips 96 KiB
};

/* ---- y ---- */

/* A tile's sums (R, S * 16) to y, whose columns begin at j0. */
static void write_back(const struct ht_qgemm_args *a, const float *out, int digits, int64_t row0,
                       int R, int S, int64_t j0)
{
    const int64_t n = a->w->n - j0 < S * HT_Q_STRIP ? a->w->n - j0 : S * HT_Q_STRIP;

    for (int r = 0; r < R; r += digits, row0++) {
        const float *o = out + r * S * HT_Q_STRIP;
        for (int64_t j = 0; j < n; j += HT_VLEN) {
            const int64_t left = n - j, y = row0 * a->ldy + j0 + j;
            ht_vf v = vf_load(o + j);
            if (digits == 2) v += vf_load(o + S * HT_Q_STRIP + j);
            v *= a->alpha;
            if (left >= HT_VLEN) {
                if (a->beta != 0.0f) v += vf_load_any(a->y, y, a->y_dtype);
                vf_store_any(a->y, y, a->y_dtype, v);
            } else if (a->y_dtype == HT_DTYPE_F32) {
                if (a->beta != 0.0f) v += vf_load_n((float *)a->y + y, left);
                vf_store_n((float *)a->y + y, v, left);
            } else {
                if (a->beta != 0.0f) v += vf_load_bf16_n((ht_bf16 *)a->y + y, left);
                vf_store_bf16_n((ht_bf16 *)a->y + y, v, left);
            }
        }
    }
}

static struct tile tile_of(const struct ht_qmatrix *w, int64_t s0)
{
    return (struct tile){ .strip = w->data + (size_t)s0 * w->strip_bytes,
                          .strip_bytes = w->strip_bytes,
                          .zeros_at = ht_q_zeros_at(w),
                          .codes_at = ht_q_codes_at(w),
                          .n_units = w->k_padded / w->group,
                          .pieces = w->group / 32 };
}

static void run(const struct tile *t, const struct ht_qmatrix *w, int R, int S)
{
    (S == STRIPS ? wide_tiles : edge_tiles)[w->format][R](t);
}

/* ---- few rows ---- */

/* Strips s0 .. s0 + S - 1 against all rows; `ahead`: the S strips behind them come next. */
static void strips(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0, int S,
                   bool ahead)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t n_blocks = (p->n_rows + p->max_r - 1) / p->max_r;
    const int64_t n_lines = (int64_t)(w->strip_bytes / 64);
    _Alignas(64) float out[MAX_R * STRIPS * HT_Q_STRIP];
    struct tile t = tile_of(w, s0);

    t.out = out;
    for (int64_t b = 0; b < n_blocks; b++) {
        const int R = block_rows(p, b);
        const int64_t from = n_lines * b / n_blocks;
        t.x = block_at(p, w, b);
        t.ahead = ahead ? t.strip + (size_t)S * w->strip_bytes + (size_t)from * 64 : NULL;
        t.ahead_lines = n_lines * (b + 1) / n_blocks - from;
        run(&t, w, R, S);
        write_back(a, out, p->digits, b * p->max_r / p->digits, R, S, s0 * HT_Q_STRIP);
    }
}

/* One row: strip after strip, so that memory is read in one line. */
static void one_row(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0, int64_t s1)
{
    const struct ht_qmatrix *w = a->w;
    _Alignas(64) float out[HT_Q_STRIP];

    for (; s0 < s1; s0++) {
        struct tile t = tile_of(w, s0);
        t.out = out;
        t.x = block_at(p, w, 0);
        t.ahead = t.strip + LINE_AHEAD; // past the last strip it asks in vain
        t.ahead_lines = (int64_t)(w->strip_bytes / 64);
        run(&t, w, 1, 1);
        write_back(a, out, 1, 0, 1, 1, s0 * HT_Q_STRIP);
    }
}

static void few_rows(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0, int64_t s1)
{
    if (p->n_rows == 1 && a->w->format != HT_Q_BF16) return one_row(a, p, s0, s1);
    // with one row of bf16 the loop is no more than loads, and gains nothing
    const bool ahead = p->n_rows > 1 && 2 * STRIPS * a->w->strip_bytes <= AHEAD_BYTES;

    for (; s0 + STRIPS <= s1; s0 += STRIPS)
        strips(a, p, s0, STRIPS, ahead && s0 + 2 * STRIPS <= s1);
    for (; s0 < s1; s0++) strips(a, p, s0, 1, false);
}

/* ---- many rows ---- */

struct panel {
    int64_t s0, s1, b0, b1, first, n_units; // strips, blocks of rows, units of k
    bool last;                              // these units are the last ones
    float *sums;                            // (PANEL_STRIPS / S, PANEL_ROWS, S * 16)
};

/* One piece of k: every group of strips against every block. */
static void panel_piece(const struct ht_qgemm_args *a, const struct packed *p,
                        const struct panel *c)
{
    const struct ht_qmatrix *w = a->w;
    const size_t unit_lines =
        (w->strip_bytes - ht_q_codes_at(w)) / 64 / (size_t)(w->k_padded / w->group);
    const int64_t n_lines = (int64_t)unit_lines * c->n_units;

    for (int64_t s = c->s0, S; s < c->s1; s += S) {
        S = c->s1 - s >= STRIPS ? STRIPS : 1;
        struct tile t = tile_of(w, s);
        const unsigned char *next =
            t.strip + (size_t)S * w->strip_bytes + t.codes_at + (size_t)c->first * unit_lines * 64;
        t.first = c->first;
        t.n_units = c->n_units;
        t.go_on = c->first > 0;
        for (int64_t b = c->b0; b < c->b1; b++) {
            const int64_t i = b - c->b0, n = c->b1 - c->b0, from = n_lines * i / n;
            const int R = block_rows(p, b);
            t.x = block_at(p, w, b);
            t.out = c->sums + (s - c->s0) * HT_Q_STRIP * PANEL_ROWS + i * p->max_r * S * HT_Q_STRIP;
            t.ahead = s + S + STRIPS <= c->s1 ? next + (size_t)from * 64 : NULL;
            t.ahead_lines = n_lines * (i + 1) / n - from;
            run(&t, w, R, (int)S);
            if (c->last)
                write_back(a, t.out, p->digits, b * p->max_r / p->digits, R, (int)S,
                           s * HT_Q_STRIP);
        }
    }
}

static void many_rows(const struct ht_qgemm_args *a, const struct packed *p, int64_t s0, int64_t s1)
{
    const int64_t n_blocks = (p->n_rows + p->max_r - 1) / p->max_r, rows = PANEL_ROWS / p->max_r;
    const int64_t n_units = a->w->k_padded / a->w->group, units = PANEL_K / a->w->group;
    _Alignas(64) float sums[PANEL_ROWS * PANEL_STRIPS * HT_Q_STRIP];
    struct panel c = { .s0 = s0, .s1 = s1, .sums = sums };

    for (c.b0 = 0; c.b0 < n_blocks; c.b0 += rows) {
        c.b1 = n_blocks - c.b0 < rows ? n_blocks : c.b0 + rows;
        for (c.first = 0; c.first < n_units; c.first += units) {
            c.n_units = n_units - c.first < units ? n_units - c.first : units;
            c.last = c.first + c.n_units == n_units;
            panel_piece(a, p, &c);
        }
    }
}

/* ---- */

/* Strips per turn, a multiple of STRIPS. Eight turns per thread: one that shares its core with
 * another program takes fewer. */
static int64_t strips_per_turn(const struct ht_qmatrix *w, int n_threads, bool many)
{
    const int64_t n_blocks = (ht_q_n_strips(w) + STRIPS - 1) / STRIPS;
    const int64_t blocks = n_blocks / (8 * n_threads), turn = STRIPS * (blocks < 1 ? 1 : blocks);

    return many && turn > PANEL_STRIPS ? PANEL_STRIPS : turn;
}

enum ht_status HT_ISA_FN(ht_qgemm_cpu)(struct ht_backend *be, const struct ht_qgemm_args *a)
{
    const struct ht_qmatrix *w = a->w;
    const int64_t n_groups = ht_q_groups(w->format, w->group, w->k), n_strips = ht_q_n_strips(w);
    const size_t mark = ht_arena_mark(&be->scratch);
    const bool parallel = w->n * w->k > PARALLEL_MIN;
    struct packed p = { .digits = a->precise && w->format != HT_Q_BF16 ? 2 : 1,
                        .max_r = w->format == HT_Q_BF16 ? MAX_R : INT_R };
    void *base;

    p.n_rows = a->m * p.digits;
    p.block_bytes = (int64_t)ht_arena_bytes((
        size_t)(p.max_r * (w->format == HT_Q_BF16 ? 2 * w->k_padded : w->k_padded + 8 * n_groups)));
    HT_TRY(ht_arena_take(&base, &be->scratch,
                         (size_t)((p.n_rows + p.max_r - 1) / p.max_r * p.block_bytes)));
    p.base = base;
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (a->m * w->k > PACK_MIN)
    for (int64_t i = 0; i < a->m; i++) pack_row(&p, a, i);
    const bool many = p.n_rows > FEW_ROWS;
    const int64_t turn = strips_per_turn(w, be->n_threads, many);
#pragma omp parallel for num_threads(be->n_threads) schedule(dynamic, 1) if (parallel)
    for (int64_t s0 = 0; s0 < n_strips; s0 += turn)
        (many ? many_rows : few_rows)(a, &p, s0, s0 + turn < n_strips ? s0 + turn : n_strips);
    ht_arena_reset(&be->scratch, mark);
    return HT_OK;
}
