/* checkpoints/weights_quant.c: rows of tensors out of any source, dense or as packed matrices. */
#include "checkpoints/weights_quant.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/weights_impl.h"

enum { BLOCK = 1 << 18 }; // elements read, converted or quantised at a time

enum ht_qformat ht_weights_format(enum ht_qformat f, enum ht_tensor_role role, bool tied_head)
{
    const bool head = role == HT_T_HEAD || (role == HT_T_EMBED && tied_head);

    if (role == HT_T_EMBED && !tied_head) return HT_Q_BF16;
    return head && f != HT_Q_BF16 ? HT_Q_INT8 : f;
}

bool ht_weights_quantised(const struct ht_weights *w, enum ht_qformat *format, int *group)
{
    const struct ht_wf_form *f = w->own ? &ht_wf_manifest(w->own)->form : NULL;

    if (!f || !f->quantised) return false;
    if (format) *format = f->format;
    if (group) *group = f->group;
    return true;
}

/* ---- rows of one source ---- */

static int64_t row_of(const struct ht_tensor_info *t)
{
    return t->n / t->shape[0];
}

static int64_t block_rows(const struct ht_tensor_info *t)
{
    const int64_t n = BLOCK / row_of(t) / 16 * 16;
    return n < 16 ? 16 : n;
}

static enum ht_status no_memory(const struct ht_weights *w)
{
    return HT_FAIL(HT_ERR_MEMORY, "%s: no memory to read weights", w->path);
}

/* Data of safetensors may stand at any byte. */
static void read_shard(const struct ht_weights_place *p, int64_t from, int64_t n, void *out,
                       enum ht_dtype dtype)
{
    const int64_t bytes = (int64_t)ht_dtype_bytes(p->t->dtype);
    const char *src = (const char *)p->t->data + (p->first + from) * bytes;
    _Alignas(64) unsigned char block[4096];
    const int64_t step = (int64_t)sizeof block / bytes;

    if ((uintptr_t)src % (uintptr_t)bytes == 0) {
        ht_convert(out, dtype, src, p->t->dtype, n);
    } else {
        for (int64_t i = 0; i < n; i += step) {
            const int64_t some = n - i < step ? n - i : step;
            memcpy(block, src + i * bytes, (size_t)(some * bytes));
            ht_convert((char *)out + (size_t)i * ht_dtype_bytes(dtype), dtype, block, p->t->dtype,
                       some);
        }
    }
    ht_safetensors_drop(src, (size_t)(n * bytes)); // else a model stands twice in memory
}

static enum ht_status read_checkpoint(struct ht_weights *w, const struct ht_tensor_list *list,
                                      int64_t at, int64_t n, void *out, enum ht_dtype dtype)
{
    enum ht_status st = HT_OK;

    if (dtype == HT_DTYPE_F32) return ht_ckpt_read_flat(w->ckpt, HT_CKPT_MASTER, list, at, n, out);
    float *block = malloc(BLOCK * sizeof *block);
    if (!block) return no_memory(w);
    for (int64_t i = 0; i < n; i += BLOCK) {
        const int64_t some = n - i < BLOCK ? n - i : BLOCK;
        HT_TRY_GOTO(st, done,
                    ht_ckpt_read_flat(w->ckpt, HT_CKPT_MASTER, list, at + i, some, block));
        ht_convert((char *)out + (size_t)i * ht_dtype_bytes(dtype), dtype, block, HT_DTYPE_F32,
                   some);
    }
done:
    free(block);
    return st;
}

/* Stored codes of some rows, in memory. */
struct codes {
    unsigned char *codes;
    ht_bf16 *scales;
    uint8_t *zeros;
};

static void codes_free(struct codes *c)
{
    free(c->codes);
    free(c->scales);
    free(c->zeros);
    *c = (struct codes){ 0 };
}

static enum ht_status codes_create(struct codes *c, const struct ht_weights *w, enum ht_qformat f,
                                   int group, int64_t n_rows, int64_t k)
{
    const int64_t n_groups = ht_q_groups(f, group, k);

    c->codes = malloc((size_t)(n_rows * ht_q_code_bytes(f, k)));
    c->scales = malloc((size_t)(n_rows * n_groups + 1) * sizeof *c->scales);
    c->zeros = malloc((size_t)(n_rows * n_groups + 1));
    if (c->codes && c->scales && c->zeros) return HT_OK;
    codes_free(c);
    return no_memory(w);
}

static enum ht_status codes_read(const struct codes *c, struct ht_qrows *rows, struct ht_weights *w,
                                 const struct ht_wf_tensor *t, int64_t row0, int64_t n_rows)
{
    HT_TRY(ht_wf_read(w->own, t, 0, row0, n_rows, c->codes));
    if (t->n_parts > 1) HT_TRY(ht_wf_read(w->own, t, 1, row0, n_rows, c->scales));
    if (t->n_parts > 2) HT_TRY(ht_wf_read(w->own, t, 2, row0, n_rows, c->zeros));
    *rows = (struct ht_qrows){ .format = t->form.quantised ? t->form.format : HT_Q_BF16,
                               .group = t->form.group,
                               .n_rows = n_rows,
                               .k = t->k,
                               .codes = c->codes,
                               .scales = c->scales,
                               .zeros = c->zeros };
    return HT_OK;
}

/* A block at a time: dequantised where stored so, else converted. */
static enum ht_status read_own(struct ht_weights *w, const struct ht_wf_tensor *t, int64_t row0,
                               int64_t n_rows, void *out, enum ht_dtype dtype)
{
    int64_t turn = BLOCK / t->k;
    struct codes c = { 0 };
    float *block = NULL;
    enum ht_status st = HT_OK;

    if (!t->form.quantised && t->form.dtype == dtype)
        return ht_wf_read(w->own, t, 0, row0, n_rows, out);
    if (turn < 1) turn = 1;
    block = malloc((size_t)(turn * t->k) * sizeof *block);
    if (!block) return no_memory(w);
    if (t->form.quantised)
        HT_TRY_GOTO(st, done, codes_create(&c, w, t->form.format, t->form.group, turn, t->k));
    for (int64_t i = 0; i < n_rows; i += turn) {
        const int64_t n = n_rows - i < turn ? n_rows - i : turn;
        struct ht_qrows rows;
        if (t->form.quantised) {
            HT_TRY_GOTO(st, done, codes_read(&c, &rows, w, t, row0 + i, n));
            ht_dequantise_rows(&rows, block, t->k);
        } else {
            HT_TRY_GOTO(st, done, ht_wf_read(w->own, t, 0, row0 + i, n, block));
        }
        ht_convert((char *)out + (size_t)(i * t->k) * ht_dtype_bytes(dtype), dtype, block,
                   t->form.quantised ? HT_DTYPE_F32 : t->form.dtype, n * t->k);
    }
done:
    codes_free(&c);
    free(block);
    return st;
}

enum ht_status ht_weights_read(struct ht_weights *w, const struct ht_tensor_list *list,
                               const struct ht_tensor_info *t, int64_t row0, int64_t n_rows,
                               void *out, enum ht_dtype dtype)
{
    const int64_t k = row_of(t);

    if (w->ckpt) return read_checkpoint(w, list, t->offset + row0 * k, n_rows * k, out, dtype);
    if (w->own) return read_own(w, ht_wf_find(w->own, t->name), row0, n_rows, out, dtype);
    read_shard(&w->places[t - list->tensors], row0 * k, n_rows * k, out, dtype);
    return HT_OK;
}

/* ---- for callers ---- */

static enum ht_status check(struct ht_weights *w, const struct ht_tensor_list *list,
                            const struct ht_tensor_info *t, int64_t row0, int64_t n_rows)
{
    if (!t || t < list->tensors || t >= list->tensors + list->n_tensors)
        return HT_FAIL(HT_ERR_ARG, "%s: a tensor that is not of this list", w->path);
    if (row0 < 0 || n_rows < 0 || n_rows > t->shape[0] - row0)
        return HT_FAIL(HT_ERR_ARG, "%s: rows %" PRId64 " to %" PRId64 "; '%s' has %" PRId64,
                       w->path, row0, row0 + n_rows - 1, t->name, t->shape[0]);
    if (w->ckpt || w->indexed == list) return HT_OK;
    return ht_weights_index(w, list);
}

enum ht_status ht_weights_read_rows(struct ht_weights *w, const struct ht_tensor_list *list,
                                    const struct ht_tensor_info *t, int64_t row0, int64_t n_rows,
                                    void *out, enum ht_dtype dtype)
{
    HT_TRY(check(w, list, t, row0, n_rows));
    if (dtype != HT_DTYPE_F32 && dtype != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_ARG, "weights cannot be read as %s; fp32 or bf16",
                       ht_dtype_name(dtype));
    return ht_weights_read(w, list, t, row0, n_rows, out, dtype);
}

/* True when rows of t are stored as q wants them. */
static bool stored_as(const struct ht_wf_tensor *t, const struct ht_qmatrix *q)
{
    if (q->fp8_group)
        return t->form.quantised && t->form.format == HT_Q_FP8 && t->form.group == q->fp8_group;
    if (q->format == HT_Q_BF16) return !t->form.quantised && t->form.dtype == HT_DTYPE_BF16;
    return t->form.quantised && t->form.format == q->format && t->form.group == q->group;
}

static enum ht_status take_codes(struct ht_qmatrix *q, int64_t row0, struct ht_weights *w,
                                 const struct ht_wf_tensor *t, int64_t turn, struct ht_backend *be)
{
    struct codes c;
    enum ht_status st = HT_OK;

    HT_TRY(codes_create(&c, w, t->form.quantised ? t->form.format : HT_Q_BF16, t->form.group, turn,
                        q->k));
    for (int64_t i = 0; i < t->n_rows; i += turn) {
        struct ht_qrows rows;
        HT_TRY_GOTO(st, done,
                    codes_read(&c, &rows, w, t, i, t->n_rows - i < turn ? t->n_rows - i : turn));
        HT_TRY_GOTO(st, done, ht_qmatrix_set_qrows(q, be, row0 + i, &rows));
    }
done:
    codes_free(&c);
    return st;
}

static enum ht_status quantise(struct ht_qmatrix *q, int64_t row0, struct ht_weights *w,
                               const struct ht_tensor_list *list, const struct ht_tensor_info *t,
                               int64_t turn, struct ht_backend *be)
{
    float *block = malloc((size_t)(turn * q->k) * sizeof *block);
    enum ht_status st = HT_OK;

    if (!block) return no_memory(w);
    for (int64_t i = 0; i < t->shape[0]; i += turn) {
        const int64_t n = t->shape[0] - i < turn ? t->shape[0] - i : turn;
        HT_TRY_GOTO(st, done, ht_weights_read(w, list, t, i, n, block, HT_DTYPE_F32));
        HT_TRY_GOTO(st, done, ht_qmatrix_set_rows(q, be, row0 + i, n, block, HT_DTYPE_F32, q->k));
    }
done:
    free(block);
    return st;
}

enum ht_status ht_weights_load_qmatrix(struct ht_qmatrix *out, struct ht_weights *w,
                                       const struct ht_tensor_list *list,
                                       const struct ht_tensor_info *const *parts, int n_parts,
                                       enum ht_qformat format, int group, struct ht_arena *arena,
                                       struct ht_backend *be)
{
    struct ht_qmatrix q;
    enum ht_status st = HT_OK;
    int64_t n = 0;

    *out = (struct ht_qmatrix){ 0 };
    for (int p = 0; p < n_parts; p++) {
        HT_TRY(check(w, list, parts[p], 0, 0));
        if (!parts[p]->matrix || row_of(parts[p]) != row_of(parts[0]))
            return HT_FAIL(
                HT_ERR_ARG,
                "%s: '%s' has rows of %" PRId64 " elements; a matrix that begins with '%s' "
                "has %" PRId64,
                w->path, parts[p]->name, row_of(parts[p]), parts[0]->name, row_of(parts[0]));
        n += parts[p]->shape[0];
    }
    const int64_t k = n_parts > 0 ? row_of(parts[0]) : 0;
    HT_TRY(be && be->kind != HT_BACKEND_CPU ? ht_qmatrix_create_on(&q, be, format, group, n, k)
                                            : ht_qmatrix_create(&q, arena, format, group, n, k));
    n = 0;
    for (int p = 0; p < n_parts; p++) {
        const struct ht_wf_tensor *t = w->own ? ht_wf_find(w->own, parts[p]->name) : NULL;
        if (t && stored_as(t, &q))
            st = take_codes(&q, n, w, t, block_rows(parts[p]), be);
        else
            st = quantise(&q, n, w, list, parts[p], block_rows(parts[p]), be);
        if (st != HT_OK) {
            ht_qmatrix_free(&q);
            return ht_fail_while(st, "reading '%s'", parts[p]->name);
        }
        n += parts[p]->shape[0];
    }
    *out = q;
    return HT_OK;
}

enum ht_status ht_weights_load_vectors(struct ht_weights *w, const struct ht_tensor_list *list,
                                       float *vector)
{
    HT_TRY(ht_weights_index(w, list));
    for (int i = 0; i < list->n_tensors; i++) {
        const struct ht_tensor_info *t = &list->tensors[i];
        if (t->matrix) continue;
        HT_TRY(ht_weights_read(w, list, t, 0, t->shape[0], vector + (t->offset - list->n_matrix),
                               HT_DTYPE_F32));
    }
    return HT_OK;
}
