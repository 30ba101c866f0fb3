/* bench/hybridbench/compare_report.c: the figures as Markdown tables. */
#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/compare.h"
#include "core/base/file.h"

enum ht_status ht_compare_publish(const char *path, char *text, size_t n)
{
    enum ht_status st = HT_OK;

    if (!text) return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    if (strcmp(path, "-") == 0)
        fwrite(text, 1, n, stdout);
    else
        st = ht_file_publish(path, text, n);
    free(text);
    return st;
}

static void put_cell(FILE *f, const struct ht_compare_cell *c)
{
    if (c->batch)
        fprintf(f, " %.1f (%.0f%%) |", c->tokens_per_s,
                100.0 * c->tokens_per_s / c->roof_tokens_per_s);
    else
        fprintf(f, " %.2f GB |", c->need_bytes * 1e-9);
}

/* Ratio of the models, and what their roofs allow. */
static void put_ratio(FILE *f, const struct ht_compare_cell *a, const struct ht_compare_cell *b)
{
    if (!a->batch || !b->batch) {
        fprintf(f, " | | |\n");
        return;
    }
    const double ratio = a->tokens_per_s / b->tokens_per_s;
    const double ideal = a->roof_tokens_per_s / b->roof_tokens_per_s;
    fprintf(f, " %.2f | %.2f | %.0f%% |\n", ratio, ideal, 100.0 * ratio / ideal);
}

/* Rates of the reading loop, of all decoding cells. */
static void read_range(const struct ht_compare_result *r, const struct ht_compare_options *o,
                       double *low, double *high)
{
    *low = *high = 0.0;
    for (int i = 0; i < 2; i++)
        for (int c = 0; c < o->n_contexts; c++)
            for (int k = 0; k <= o->n_batches; k++) {
                const struct ht_compare_cell *cell = &r->model[i].decode[c][k];
                if (!cell->batch) continue;
                if (*low == 0.0 || cell->read_bytes_per_s < *low) *low = cell->read_bytes_per_s;
                if (cell->read_bytes_per_s > *high) *high = cell->read_bytes_per_s;
            }
}

/* Time of a step, which is that of a token of each sequence: one sequence and the best batch. */
static void put_latency(FILE *f, const struct ht_compare_result *r,
                        const struct ht_compare_options *o)
{
    fprintf(f,
            "\n| context | model | sequences | ms per token: p50 | p90 | p99 | memory, counted GB "
            "| resident GB |\n|---:|---|---:|---:|---:|---:|---:|---:|\n");
    for (int c = 0; c < o->n_contexts; c++)
        for (int i = 0; i < 2; i++) {
            const struct ht_compare_model *m = &r->model[i];
            for (int pass = 0; pass < 2; pass++) {
                const int k = pass ? m->best[c] : 0;
                if (k < 0 || (pass && k == 0) || !m->decode[c][k].batch) continue;
                const struct ht_compare_cell *cell = &m->decode[c][k];
                fprintf(f, "| %lld | %c%s | %lld | %.2f | %.2f | %.2f | %.2f | %.2f |\n",
                        (long long)o->context[c], "AB"[i], k == m->best[c] ? ", best" : "",
                        (long long)cell->batch, 1e3 * cell->p50_s, 1e3 * cell->p90_s,
                        1e3 * cell->p99_s, cell->need_bytes * 1e-9, cell->resident_bytes * 1e-9);
            }
        }
}

enum ht_status ht_compare_table(const struct ht_compare_result *r,
                                const struct ht_compare_options *o, const char *path)
{
    const struct ht_compare_model *a = &r->model[0], *b = &r->model[1];
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);

    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    fprintf(f, "A: %s, weights %.4g GB, state %.4g MB, %.4g KB per token\n\n", a->path,
            a->weight_bytes * 1e-9, a->slot_bytes * 1e-6, a->token_bytes * 1e-3);
    fprintf(f, "B: %s, weights %.4g GB, state %.4g MB, %.4g KB per token\n\n", b->path,
            b->weight_bytes * 1e-9, b->slot_bytes * 1e-6, b->token_bytes * 1e-3);
    double low, high;
    read_range(r, o, &low, &high);
    fprintf(f,
            "Weights as %s, %d threads, %.3g GB for one model; memory was read at %.1f to %.1f "
            "GB/s between the rounds, products of 512 rows ran at up to %.0f GFLOP/s. Tokens/s, "
            "medians of %d rounds in turn, and their share of the roof at the rate of the same "
            "minute; what does not fit shows the memory it would take.\n\n",
            r->weights, r->threads, o->memory_bytes * 1e-9, low * 1e-9, high * 1e-9,
            r->flop_per_s * 1e-9, o->rounds);
    fprintf(f, "| decode at context | sequences | A | B | A / B | roofs' A / B | of that |\n"
               "|---:|---:|---:|---:|---:|---:|---:|\n");
    for (int c = 0; c < o->n_contexts; c++)
        for (int k = 0; k < o->n_batches; k++) {
            fprintf(f, "| %lld | %lld |", (long long)o->context[c], (long long)o->batch[k]);
            put_cell(f, &a->decode[c][k]);
            put_cell(f, &b->decode[c][k]);
            put_ratio(f, &a->decode[c][k], &b->decode[c][k]);
        }
    fprintf(f,
            "\n| each at its best batch, context | A, sequences | A | B, sequences | B | A / B | "
            "roofs' A / B | of that |\n|---:|---:|---:|---:|---:|---:|---:|---:|\n");
    for (int c = 0; c < o->n_contexts; c++) {
        static const struct ht_compare_cell none;
        const struct ht_compare_cell *best[2];
        fprintf(f, "| %lld |", (long long)o->context[c]);
        for (int i = 0; i < 2; i++) {
            const struct ht_compare_model *m = &r->model[i];
            best[i] = m->best[c] < 0 ? &none : &m->decode[c][m->best[c]];
            fprintf(f, " %lld |", (long long)best[i]->batch);
            put_cell(f, best[i]);
        }
        put_ratio(f, best[0], best[1]);
    }
    fprintf(f, "\n| prefill of 512 tokens behind | A | B | A / B | roofs' A / B | of that |\n"
               "|---:|---:|---:|---:|---:|---:|\n");
    for (int c = 0; c < o->n_contexts; c++) {
        fprintf(f, "| %lld |", (long long)o->context[c]);
        put_cell(f, &a->prefill[c]);
        put_cell(f, &b->prefill[c]);
        put_ratio(f, &a->prefill[c], &b->prefill[c]);
    }
    put_latency(f, r, o);
    if (fclose(f) != 0) {
        free(text);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    }
    return ht_compare_publish(path, text, n);
}
