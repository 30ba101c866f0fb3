/* core/ops/quant_pack.c: rows in and out of strips of 16 (layout: quant_impl.h). */
#include <string.h>

#include "core/ops/quant_impl.h"

void ht_qmatrix_clear(struct ht_qmatrix *q)
{
    const size_t codes_at = ht_q_codes_at(q);
    const int fill = q->format == HT_Q_INT8 ? 128 : q->format == HT_Q_INT4 ? 0x88 : 0;

    for (int64_t s = 0; s < ht_q_n_strips(q); s++) {
        unsigned char *strip = q->data + (size_t)s * q->strip_bytes;
        memset(strip, 0, codes_at);
        memset(strip + codes_at, fill, q->strip_bytes - codes_at);
    }
}

/* Half-byte codes of 8 neighbours of k, files' order to ours: 0 1|2 3|4 5|6 7 to 0 4|1 5|2 6|3 7.
 */
static void to_strip_order(unsigned char out[4], const unsigned char in[4])
{
    for (int i = 0; i < 4; i++) {
        const int low = in[i / 2] >> (i % 2 ? 4 : 0) & 15;
        const int high = in[2 + i / 2] >> (i % 2 ? 4 : 0) & 15;
        out[i] = (unsigned char)(low | high << 4);
    }
}

static void pack_row(struct ht_qmatrix *q, int64_t row, const struct ht_qrows *rows, int64_t i)
{
    const int64_t lane = row % HT_Q_STRIP, n_groups = ht_q_groups(q->format, q->group, q->k);
    const int64_t code = ht_q_code_bytes(q->format, q->k);
    unsigned char *strip = q->data + (size_t)(row / HT_Q_STRIP) * q->strip_bytes;
    unsigned char *zeros = strip + ht_q_zeros_at(q), *codes = strip + ht_q_codes_at(q);
    const unsigned char *src = (const unsigned char *)rows->codes + i * code;

    for (int64_t g = 0; g < n_groups; g++) {
        memcpy(strip + (g * HT_Q_STRIP + lane) * 2, &rows->scales[i * n_groups + g], 2);
        if (q->format == HT_Q_INT4Z) zeros[g * HT_Q_STRIP + lane] = rows->zeros[i * n_groups + g];
    }
    // 4 bytes per lane and line: 2 (bf16), 4 (int8) or 8 elements
    const int64_t step = q->format == HT_Q_BF16 ? 2 : q->format == HT_Q_INT8 ? 4 : 8;
    for (int64_t k = 0, at = 0; k < q->k; k += step, at += 4) {
        unsigned char v[4] = { 0 }, *dst = codes + (at * HT_Q_STRIP) + lane * 4;
        const int64_t left = code - at;
        if (q->format == HT_Q_INT4 && left < 4) memset(v, 0x88, 4);
        memcpy(v, src + at, left < 4 ? (size_t)left : 4);
        if (q->format == HT_Q_INT8)
            for (int b = 0; b < 4; b++) dst[b] = (unsigned char)(v[b] + 128);
        else if (q->format == HT_Q_BF16)
            memcpy(dst, v, 4);
        else
            to_strip_order(dst, v);
    }
}

void ht_qmatrix_pack(struct ht_qmatrix *q, int n_threads, int64_t row0, const struct ht_qrows *rows)
{
#pragma omp parallel for num_threads(n_threads) schedule(static)
    for (int64_t i = 0; i < rows->n_rows; i++) pack_row(q, row0 + i, rows, i);
}

void ht_qmatrix_unpack(const struct ht_qmatrix *q, int64_t row, float *out)
{
    const int64_t lane = row % HT_Q_STRIP;
    const unsigned char *strip = q->data + (size_t)(row / HT_Q_STRIP) * q->strip_bytes;
    const unsigned char *zeros = strip + ht_q_zeros_at(q);
    const unsigned char *codes = strip + ht_q_codes_at(q) + lane * 4;

    for (int64_t k = 0; k < q->k; k++) {
        const int64_t g = k / q->group;
        ht_bf16 b;
        if (q->format == HT_Q_BF16) {
            memcpy(&b, codes + k / 2 * 64 + k % 2 * 2, 2);
            out[k] = ht_bf16_to_f32(b);
            continue;
        }
        memcpy(&b, strip + (g * HT_Q_STRIP + lane) * 2, 2);
        const float scale = ht_bf16_to_f32(b);
        if (q->format == HT_Q_INT8) {
            out[k] = scale * (float)(codes[k / 4 * 64 + k % 4] - 128);
        } else {
            const int half = codes[k / 8 * 64 + k % 4] >> (k % 8 < 4 ? 0 : 4) & 15;
            const int offset = q->format == HT_Q_INT4 ? 8 : zeros[g * HT_Q_STRIP + lane];
            out[k] = scale * (float)(half - offset);
        }
    }
}
