/* core/ops/quant_device.c: packed matrices in the memory of a device (layout: quant_impl.h).
 *
 * Rows are packed on the host into whole strips, which are then copied. A strip of which only some
 * rows are set is fetched first, so rows may come in any pieces.
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/core_ops.h"
#include "core/ops/fp8.h"
#include "core/ops/quant_impl.h"

enum ht_status ht_qmatrix_device_create(struct ht_qmatrix *q)
{
    void *data;

    HT_TRY(ht_backend_alloc(&data, q->be, "packed weights", q->bytes));
    q->data = data;
    q->owned = true;
    const enum ht_status st = ht_backend_zero(q->be, data, q->bytes); // scales 0: all values are 0
    if (st != HT_OK) ht_qmatrix_free(q);
    return st;
}

static void put_code(struct ht_qmatrix *q, unsigned char *strip, int64_t row, int64_t k,
                     const unsigned char *src)
{
    const struct ht_q_place at = ht_q_device_place(q->format, row, k);
    unsigned char *to = strip + ht_q_device_codes_at(q) + at.byte;

    switch (q->format) {
    case HT_Q_BF16: memcpy(to, src + 2 * k, 2); break;
    case HT_Q_INT8:
    case HT_Q_FP8: *to = src[k]; break;
    default:
        *to = (unsigned char)((*to & ~(15 << at.shift)) | (src[k / 2] >> (k % 2 ? 4 : 0) & 15)
                                                              << at.shift);
    }
}

static void pack_row(struct ht_qmatrix *q, unsigned char *strip, int64_t row,
                     const struct ht_qrows *rows, int64_t i)
{
    const int64_t n_groups = ht_q_groups(q->format, q->group, q->k);
    const unsigned char *src =
        (const unsigned char *)rows->codes + i * ht_q_code_bytes(q->format, q->k);

    for (int64_t g = 0; g < n_groups; g++) {
        const int64_t at = g * HT_Q_STRIP + ht_q_device_scale(row);
        memcpy(strip + 2 * at, &rows->scales[i * n_groups + g], 2);
        if (q->format == HT_Q_INT4Z)
            strip[(int64_t)ht_q_device_zeros_at(q) + at] = rows->zeros[i * n_groups + g];
    }
    for (int64_t k = 0; k < q->k; k++) put_code(q, strip, row, k, src);
}

static float value(const struct ht_qmatrix *q, const unsigned char *strip, int64_t row, int64_t k)
{
    const struct ht_q_place at = ht_q_device_place(q->format, row, k);
    const unsigned char *code = strip + ht_q_device_codes_at(q) + at.byte;
    ht_bf16 b;

    if (q->format == HT_Q_BF16) {
        memcpy(&b, code, 2);
        return ht_bf16_to_f32(b);
    }
    const int64_t s = k / q->group * HT_Q_STRIP + ht_q_device_scale(row);
    memcpy(&b, strip + 2 * s, 2);
    if (q->format == HT_Q_INT8) return ht_bf16_to_f32(b) * (float)(int8_t)*code;
    if (q->format == HT_Q_FP8) return ht_bf16_to_f32(b) * ht_fp8_to_f32(*code, HT_FP8_E4M3);
    const int zero = q->format == HT_Q_INT4 ? 8 : strip[(int64_t)ht_q_device_zeros_at(q) + s];
    return ht_bf16_to_f32(b) * (float)((*code >> at.shift & 15) - zero);
}

/* Strips first .. last on the host, with the content of those that rows row0 .. do not cover. */
enum ht_status ht_qmatrix_device_pack(struct ht_qmatrix *q, int n_threads, int64_t row0,
                                      const struct ht_qrows *rows)
{
    const int64_t end = row0 + rows->n_rows, first = row0 / HT_Q_STRIP;
    const int64_t last = (end - 1) / HT_Q_STRIP, n = last - first + 1;
    const size_t bytes = q->strip_bytes;
    enum ht_status st = HT_OK;

    if (rows->n_rows == 0) return HT_OK;
    unsigned char *host = calloc((size_t)n, bytes);
    unsigned char *to = q->data + (size_t)first * bytes;
    if (!host)
        return HT_FAIL(HT_ERR_MEMORY, "quant: no memory to pack %" PRId64 " rows", rows->n_rows);
    if (row0 % HT_Q_STRIP != 0 || (n == 1 && end % HT_Q_STRIP != 0 && end < q->n))
        HT_TRY_GOTO(st, done, ht_backend_download(q->be, host, to, bytes));
    if (n > 1 && end % HT_Q_STRIP != 0 && end < q->n)
        HT_TRY_GOTO(st, done,
                    ht_backend_download(q->be, host + (size_t)(n - 1) * bytes,
                                        to + (size_t)(n - 1) * bytes, bytes));
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t i = 0; i < rows->n_rows; i++)
        pack_row(q, host + (size_t)((row0 + i) / HT_Q_STRIP - first) * bytes,
                 (row0 + i) % HT_Q_STRIP, rows, i);
    HT_TRY_GOTO(st, done, ht_backend_upload(q->be, to, host, (size_t)n * bytes));
    HT_TRY_GOTO(st, done, ht_backend_synchronize(q->be)); // before the host copy goes
done:
    free(host);
    return st;
}

enum ht_status ht_qmatrix_device_unpack(const struct ht_qmatrix *q, int64_t row0, int64_t n_rows,
                                        float *out, int64_t ldo)
{
    enum ht_status st = HT_OK;
    int64_t there = -1;
    unsigned char *strip = malloc(q->strip_bytes);

    if (!strip) return HT_FAIL(HT_ERR_MEMORY, "quant: no memory for a strip");
    for (int64_t i = 0; i < n_rows; i++) {
        const int64_t row = row0 + i, s = row / HT_Q_STRIP;
        if (s != there)
            HT_TRY_GOTO(st, done,
                        ht_backend_download(q->be, strip, q->data + (size_t)s * q->strip_bytes,
                                            q->strip_bytes));
        there = s;
        for (int64_t k = 0; k < q->k; k++) out[i * ldo + k] = value(q, strip, row % HT_Q_STRIP, k);
    }
done:
    free(strip);
    return st;
}
