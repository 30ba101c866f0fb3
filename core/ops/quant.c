/* core/ops/quant.c: quantised matrices: the checks that kernels rely on, and the table of kernels.
 */
#include "core/ops/quant.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "core/ops/core_ops.h"
#include "core/ops/fp8.h"
#include "core/ops/quant_impl.h"

static ht_qgemm_fn *const table[HT_BACKEND_COUNT][HT_ISA_COUNT] = {
    [HT_BACKEND_CPU] = HT_ISA_ROW(ht_qgemm_cpu),
#ifdef HT_WITH_CUDA
    [HT_BACKEND_CUDA] = { ht_qgemm_cuda, ht_qgemm_cuda, ht_qgemm_cuda, ht_qgemm_cuda },
#endif
};

static const char *const names[HT_Q_COUNT] = { "bf16", "int8", "int4", "int4z", "fp8" };

const char *ht_qformat_name(enum ht_qformat f)
{
    return (unsigned)f < HT_Q_COUNT ? names[f] : "unknown format";
}

enum ht_status ht_qformat_parse(enum ht_qformat *out, const char *name)
{
    for (int f = 0; f < HT_Q_COUNT; f++)
        if (strcmp(names[f], name) == 0) {
            *out = (enum ht_qformat)f;
            return HT_OK;
        }
    return HT_FAIL(HT_ERR_ARG, "weight format '%.40s'; it must be bf16, int8, int4, int4z or fp8",
                   name);
}

/* ---- matrices ---- */

static enum ht_status check_format(enum ht_qformat f, int group)
{
    if ((unsigned)f >= HT_Q_COUNT)
        return HT_FAIL(HT_ERR_ARG, "quant: weight format %d; formats are 0 to %d", (int)f,
                       HT_Q_COUNT - 1);
    if (f != HT_Q_BF16 && group != 32 && group != 64)
        return HT_FAIL(HT_ERR_ARG, "quant: group is %d; it must be 32 or 64", group);
    return HT_OK;
}

/* Everything but data. device: NULL for host memory, where fp8 is held as bf16. */
static void set_sizes(struct ht_qmatrix *q, struct ht_backend *device, enum ht_qformat f, int group,
                      int64_t n, int64_t k)
{
    const bool fp8 = f == HT_Q_FP8 && !device;
    if (fp8) f = HT_Q_BF16;
    const int64_t unit = device ? HT_Q_DEVICE_UNIT : f == HT_Q_BF16 ? 32 : group;

    *q = (struct ht_qmatrix){ .format = f,
                              .group = f == HT_Q_BF16 ? 32 : group,
                              .n = n,
                              .k = k,
                              .fp8_group = fp8 ? group : 0,
                              .be = device };
    q->k_padded = (k + unit - 1) / unit * unit;
    const int64_t code_bytes = ht_q_code_bytes(f, q->k_padded);
    q->strip_bytes =
        (device ? ht_q_device_codes_at(q) : ht_q_codes_at(q)) + (size_t)(HT_Q_STRIP * code_bytes);
    q->bytes = q->strip_bytes * (size_t)ht_q_n_strips(q);
}

size_t ht_qmatrix_bytes(enum ht_qformat f, int group, int64_t n, int64_t k)
{
    struct ht_qmatrix q;

    set_sizes(&q, NULL, f, group, n, k);
    return ht_arena_bytes(q.bytes);
}

enum { HUGE_PAGE = 2 << 20 };

/* Whole huge pages where there are some: one core reads a matrix faster with fewer page walks. The
 * rest stays in small ones, so that no memory is taken that nothing uses. */
static void *own_memory(size_t bytes)
{
    const bool large = bytes >= HUGE_PAGE;
    void *p;

    if (posix_memalign(&p, large ? HUGE_PAGE : 64, ht_arena_bytes(bytes)) != 0) return NULL;
    if (large) (void)madvise(p, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    return p;
}

static enum ht_status check_matrix(enum ht_qformat f, int group, int64_t n, int64_t k)
{
    HT_TRY(check_format(f, group));
    if (n < 1 || k < 1 || n > INT32_MAX || k > INT32_MAX)
        return HT_FAIL(HT_ERR_ARG,
                       "quant: a matrix of %" PRId64 " x %" PRId64 "; both must be 1 to 2^31 - 1",
                       n, k);
    return HT_OK;
}

enum ht_status ht_qmatrix_create(struct ht_qmatrix *out, struct ht_arena *arena, enum ht_qformat f,
                                 int group, int64_t n, int64_t k)
{
    struct ht_qmatrix q;
    void *data;

    *out = (struct ht_qmatrix){ 0 };
    HT_TRY(check_matrix(f, group, n, k));
    set_sizes(&q, NULL, f, group, n, k);
    if (arena) {
        HT_TRY(ht_arena_take(&data, arena, q.bytes));
    } else {
        data = own_memory(q.bytes);
        if (!data)
            return HT_FAIL(HT_ERR_MEMORY, "quant: no memory for a matrix of %zu bytes", q.bytes);
    }
    q.data = data;
    q.owned = !arena;
    ht_qmatrix_clear(&q);
    *out = q;
    return HT_OK;
}

enum ht_status ht_qmatrix_create_on(struct ht_qmatrix *out, struct ht_backend *be,
                                    enum ht_qformat f, int group, int64_t n, int64_t k)
{
    struct ht_qmatrix q;

    if (be->kind == HT_BACKEND_CPU) return ht_qmatrix_create(out, NULL, f, group, n, k);
    *out = (struct ht_qmatrix){ 0 };
    HT_TRY(check_matrix(f, group, n, k));
    set_sizes(&q, be, f, group, n, k);
    HT_TRY(ht_qmatrix_device_create(&q));
    *out = q;
    return HT_OK;
}

void ht_qmatrix_free(struct ht_qmatrix *q)
{
    if (!q) return;
    if (q->owned && q->be)
        ht_backend_free_memory(q->be, q->data);
    else if (q->owned)
        free(q->data);
    *q = (struct ht_qmatrix){ 0 };
}

static enum ht_status check_rows(const struct ht_qmatrix *q, int64_t row0, int64_t n_rows)
{
    if (!q->data) return HT_FAIL(HT_ERR_ARG, "quant: the matrix has no data; create it first");
    if (row0 < 0 || n_rows < 0 || n_rows > q->n - row0)
        return HT_FAIL(HT_ERR_ARG,
                       "quant: rows %" PRId64 " to %" PRId64 "; the matrix has %" PRId64, row0,
                       row0 + n_rows - 1, q->n);
    return HT_OK;
}

static enum ht_status check_ld(const char *what, int64_t ld, int64_t row)
{
    if (ld >= row) return HT_OK;
    return HT_FAIL(HT_ERR_ARG, "quant: %s is %" PRId64 "; a row has %" PRId64 " elements", what, ld,
                   row);
}

/* Format and group that rows for q have. */
static enum ht_qformat rows_format(const struct ht_qmatrix *q)
{
    return q->fp8_group ? HT_Q_FP8 : q->format;
}
static int rows_group(const struct ht_qmatrix *q)
{
    return q->fp8_group ? q->fp8_group : q->group;
}

/* Checked rows, fp8 as bf16 where q holds it so. */
static enum ht_status pack_rows(struct ht_qmatrix *q, int n_threads, int64_t row0,
                                const struct ht_qrows *rows)
{
    if (q->be) return ht_qmatrix_device_pack(q, n_threads, row0, rows);
    if (!q->fp8_group) {
        ht_qmatrix_pack(q, n_threads, row0, rows);
        return HT_OK;
    }
    const int64_t k = q->k, n_groups = ht_q_groups(HT_Q_FP8, rows->group, k);
    const unsigned char *codes = rows->codes;
    ht_bf16 *held = malloc((size_t)(rows->n_rows * k + 1) * sizeof *held);
    if (!held)
        return HT_FAIL(HT_ERR_MEMORY, "quant: no memory for %" PRId64 " rows of fp8", rows->n_rows);
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t i = 0; i < rows->n_rows; i++)
        for (int64_t j = 0; j < k; j++)
            held[i * k + j] =
                ht_f32_to_bf16(ht_bf16_to_f32(rows->scales[i * n_groups + j / rows->group]) *
                               ht_fp8_to_f32(codes[i * k + j], HT_FP8_E4M3));
    ht_qmatrix_pack(
        q, n_threads, row0,
        &(struct ht_qrows){
            .format = HT_Q_BF16, .group = 32, .n_rows = rows->n_rows, .k = k, .codes = held });
    free(held);
    return HT_OK;
}

/* A NaN would not be one in the kernels, which have no time to look. */
static enum ht_status check_fp8(const struct ht_qrows *rows)
{
    const unsigned char *codes = rows->codes;

    for (int64_t i = 0; i < rows->n_rows * rows->k; i++)
        if ((codes[i] & 0x7f) == HT_FP8_NAN)
            return HT_FAIL(HT_ERR_NUMERIC,
                           "quant: the fp8 code at row %" PRId64 ", column %" PRId64 " is NaN",
                           i / rows->k, i % rows->k);
    return HT_OK;
}

enum ht_status ht_qmatrix_set_qrows(struct ht_qmatrix *q, struct ht_backend *be, int64_t row0,
                                    const struct ht_qrows *rows)
{
    HT_TRY(check_rows(q, row0, rows->n_rows));
    const enum ht_qformat format = rows_format(q);
    if (rows->format != format || rows->k != q->k ||
        (format != HT_Q_BF16 && rows->group != rows_group(q)))
        return HT_FAIL(HT_ERR_ARG,
                       "quant: rows of %s, group %d, %" PRId64
                       " columns for a matrix of %s, group %d, "
                       "%" PRId64 " columns",
                       ht_qformat_name(rows->format), rows->group, rows->k, ht_qformat_name(format),
                       rows_group(q), q->k);
    HT_TRY(ht_ops_check_ptr("quant", "codes", rows->codes, rows->n_rows));
    if (format != HT_Q_BF16)
        HT_TRY(ht_ops_check_ptr("quant", "scales", rows->scales, rows->n_rows));
    if (q->format == HT_Q_INT4Z)
        HT_TRY(ht_ops_check_ptr("quant", "zeros", rows->zeros, rows->n_rows));
    if (format == HT_Q_FP8) HT_TRY(check_fp8(rows));
    return pack_rows(q, be ? be->n_threads : 1, row0, rows);
}

enum ht_status ht_qmatrix_get_rows(const struct ht_qmatrix *q, int64_t row0, int64_t n_rows,
                                   float *out, int64_t ldo)
{
    HT_TRY(check_rows(q, row0, n_rows));
    HT_TRY(check_ld("ldo", ldo, q->k));
    HT_TRY(ht_ops_check_ptr("quant", "out", out, n_rows));
    if (q->be) return ht_qmatrix_device_unpack(q, row0, n_rows, out, ldo);
    for (int64_t i = 0; i < n_rows; i++) ht_qmatrix_unpack(q, row0 + i, out + i * ldo);
    return HT_OK;
}

/* A product or a look-up runs where the matrix is. */
static enum ht_status check_backend(const struct ht_backend *be, const struct ht_qmatrix *q)
{
    if (!q || !q->data)
        return HT_FAIL(HT_ERR_ARG, "qgemm: the matrix has no data; create it first");
    if ((q->be ? q->be->kind : HT_BACKEND_CPU) != be->kind)
        return HT_FAIL(HT_ERR_ARG,
                       "qgemm: the matrix is packed for %s, the backend is %s; create it "
                       "there",
                       ht_backend_kind_name(q->be ? q->be->kind : HT_BACKEND_CPU),
                       ht_backend_kind_name(be->kind));
    return HT_OK;
}

enum ht_status ht_qmatrix_embed(struct ht_backend *be, const struct ht_qmatrix *q, int64_t n_tokens,
                                const int32_t *ids, float multiplier, float *out)
{
    HT_TRY(check_backend(be, q));
    HT_TRY(ht_ops_check_ptr("quant", "ids", ids, n_tokens));
    HT_TRY(ht_ops_check_ptr("quant", "out", out, n_tokens));
#ifdef HT_WITH_CUDA
    if (be->kind == HT_BACKEND_CUDA)
        return ht_qmatrix_embed_cuda(be, q, n_tokens, ids, multiplier, out);
#endif
    for (int64_t t = 0; t < n_tokens; t++) {
        if (ids[t] < 0 || ids[t] >= q->n)
            return HT_FAIL(HT_ERR_ARG,
                           "token %" PRId64 " has id %d; the vocabulary has 0 to %" PRId64, t,
                           (int)ids[t], q->n - 1);
        ht_qmatrix_unpack(q, ids[t], out + t * q->k);
        for (int64_t i = 0; i < q->k; i++) out[t * q->k + i] *= multiplier;
    }
    return HT_OK;
}

enum { SET_BYTES = 1 << 20 }; // of codes per turn of set_rows

enum ht_status ht_qmatrix_set_rows(struct ht_qmatrix *q, struct ht_backend *be, int64_t row0,
                                   int64_t n_rows, const void *w, enum ht_dtype dtype, int64_t ldw)
{
    const int n_threads = be ? be->n_threads : 1;
    enum ht_status st = HT_OK;

    HT_TRY(check_rows(q, row0, n_rows));
    HT_TRY(check_ld("ldw", ldw, q->k));
    HT_TRY(ht_ops_check_dtype("quant", dtype));
    HT_TRY(ht_ops_check_ptr("quant", "w", w, n_rows));
    const enum ht_qformat format = rows_format(q);
    const int group = rows_group(q);
    const int64_t code = ht_q_code_bytes(format, q->k);
    const int64_t n_groups = ht_q_groups(format, group, q->k);
    int64_t turn = SET_BYTES / code / 16 * 16;
    if (turn < 16 * n_threads) turn = 16 * n_threads;
    if (turn > n_rows) turn = n_rows;
    unsigned char *codes = malloc((size_t)(turn * (code + 3 * n_groups) + 8));
    if (!codes)
        return HT_FAIL(HT_ERR_MEMORY, "quant: no memory to quantise %" PRId64 " rows", turn);
    ht_bf16 *scales = malloc((size_t)(turn * n_groups + 1) * sizeof *scales);
    uint8_t *zeros = codes + turn * code;
    if (!scales) {
        st = HT_FAIL(HT_ERR_MEMORY, "quant: no memory to quantise %" PRId64 " rows", turn);
        goto done;
    }
    for (int64_t i = 0; i < n_rows; i += turn) {
        const int64_t n = n_rows - i < turn ? n_rows - i : turn;
        HT_TRY_GOTO(st, done,
                    ht_quantise_rows(n_threads, format, group,
                                     (const char *)w + (size_t)(i * ldw) * ht_dtype_bytes(dtype),
                                     dtype, ldw, n, q->k, codes, scales, zeros));
        const struct ht_qrows rows = { .format = format,
                                       .group = group,
                                       .n_rows = n,
                                       .k = q->k,
                                       .codes = codes,
                                       .scales = scales,
                                       .zeros = zeros };
        HT_TRY_GOTO(st, done, pack_rows(q, n_threads, row0 + i, &rows));
    }
done:
    free(codes);
    free(scales);
    return st;
}

/* ---- product ---- */

size_t ht_qgemm_scratch_bytes(int64_t m, int64_t k)
{
    // k padded to 64, at most 8 rows of padding; two digits with a scale and a sum per 32 elements,
    // or one row of bf16
    const int64_t k_padded = (k + 63) / 64 * 64;
    const int64_t digits = (2 * m + 8) * (k_padded + k_padded / 4), bf16 = (m + 8) * 2 * k_padded;
    return (size_t)((digits > bf16 ? digits : bf16) + (2 * m + 8) * 64 + 64);
}

enum ht_status ht_qgemm(struct ht_backend *be, const struct ht_qgemm_args *a)
{
    if ((unsigned)be->kind >= HT_BACKEND_COUNT || !table[be->kind][0])
        return HT_FAIL(HT_ERR_UNSUPPORTED, "qgemm: this build has no kernels for backend %d",
                       (int)be->kind);
    if ((unsigned)be->isa >= HT_ISA_COUNT)
        return HT_FAIL(HT_ERR_ARG, "qgemm: CPU level %d; must be 0 to %d", (int)be->isa,
                       HT_ISA_COUNT - 1);
    HT_TRY(check_backend(be, a->w));
    if (a->m < 0) return HT_FAIL(HT_ERR_ARG, "qgemm: m is %" PRId64 "; it must be >= 0", a->m);
    HT_TRY(ht_ops_check_dtype("qgemm", a->x_dtype));
    HT_TRY(ht_ops_check_dtype("qgemm", a->y_dtype));
    HT_TRY(check_ld("ldx", a->ldx, a->w->k));
    HT_TRY(check_ld("ldy", a->ldy, a->w->n));
    if (a->beta != 0.0f && a->beta != 1.0f)
        return HT_FAIL(HT_ERR_ARG, "qgemm: beta is %g; it must be 0 or 1", (double)a->beta);
    if (a->m == 0) return HT_OK;
    HT_TRY(ht_ops_check_ptr("qgemm", "x", a->x, a->m * a->w->k));
    HT_TRY(ht_ops_check_ptr("qgemm", "y", a->y, a->m * a->w->n));
    if (a->x == a->y)
        return HT_FAIL(HT_ERR_ARG, "qgemm: y is the same buffer as x; it must not overlap");
    return table[be->kind][be->isa](be, a);
}
