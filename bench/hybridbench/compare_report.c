/* bench/hybridbench/compare_report.c: JSON, Markdown and gnuplot. */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/hybridbench/compare.h"
#include "core/base/file.h"

extern char **environ;

static enum ht_status publish(const char *path, char *text, size_t n)
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

/* ---- JSON ---- */

static json_t *cell_json(const struct ht_compare_cell *c, int64_t context)
{
    return json_pack("{s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "context",
                     (json_int_t)context, "batch", (json_int_t)c->batch, "tokens_per_s",
                     c->tokens_per_s, "roof_tokens_per_s", c->roof_tokens_per_s, "step_p50_s",
                     c->p50_s, "step_p90_s", c->p90_s, "step_p99_s", c->p99_s, "need_GB",
                     c->need_bytes * 1e-9, "step_GB", c->step_bytes * 1e-9, "step_GFLOP",
                     c->step_flop * 1e-9);
}

enum ht_status ht_compare_json(const struct ht_compare_result *r,
                               const struct ht_compare_options *o, const char *path)
{
    json_t *models = json_array();

    for (int i = 0; i < 2; i++) {
        const struct ht_compare_model *m = &r->model[i];
        json_t *decode = json_array(), *prefill = json_array(), *best = json_array();
        for (int c = 0; c < o->n_contexts; c++) {
            for (int k = 0; k <= o->n_batches; k++)
                if (m->decode[c][k].batch)
                    json_array_append_new(decode, cell_json(&m->decode[c][k], o->context[c]));
            if (m->prefill[c].batch)
                json_array_append_new(prefill, cell_json(&m->prefill[c], o->context[c]));
            json_array_append_new(
                best, m->best[c] < 0 ? json_null()
                                     : json_integer((json_int_t)m->decode[c][m->best[c]].batch));
        }
        json_array_append_new(models,
                              json_pack("{s:s, s:f, s:f, s:f, s:f, s:o, s:o, s:o}", "model",
                                        m->path, "weights_GB", m->weight_bytes * 1e-9, "state_MB",
                                        m->slot_bytes * 1e-6, "kv_KB_per_token",
                                        m->token_bytes * 1e-3, "matmul_parameters", m->n_matmul,
                                        "decode", decode, "prefill", prefill, "best_batch", best));
    }
    json_t *j =
        json_pack("{s:s, s:i, s:f, s:f, s:f, s:f, s:i, s:o}", "weights", o->weights, "threads",
                  r->threads, "memory_GB", o->memory_bytes * 1e-9, "read_GB_per_s",
                  r->read_bytes_per_s * 1e-9, "GFLOP_per_s", r->flop_per_s * 1e-9, "peak_GB",
                  r->peak_bytes * 1e-9, "rounds", o->rounds, "models", models);
    char *text = j ? json_dumps(j, JSON_INDENT(1) | JSON_REAL_PRECISION(6)) : NULL;
    json_decref(j);
    return publish(path, text, text ? strlen(text) : 0);
}

/* ---- Markdown ---- */

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

enum ht_status ht_compare_table(const struct ht_compare_result *r,
                                const struct ht_compare_options *o, const char *path)
{
    const struct ht_compare_model *a = &r->model[0], *b = &r->model[1];
    char *text = NULL;
    size_t n = 0;
    FILE *f = open_memstream(&text, &n);

    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    fprintf(f, "A: %s, weights %.3f GB, state %.1f MB, %.1f KB per token\n\n", a->path,
            a->weight_bytes * 1e-9, a->slot_bytes * 1e-6, a->token_bytes * 1e-3);
    fprintf(f, "B: %s, weights %.3f GB, state %.1f MB, %.1f KB per token\n\n", b->path,
            b->weight_bytes * 1e-9, b->slot_bytes * 1e-6, b->token_bytes * 1e-3);
    fprintf(
        f,
        "Weights as %s, %d threads, %.3g GB for one model; memory is read at %.1f GB/s, products "
        "of 512 rows run at %.0f GFLOP/s. Tokens/s, medians of %d rounds in turn, and their "
        "share of the roof; what does not fit shows the memory it would take.\n\n",
        o->weights, r->threads, o->memory_bytes * 1e-9, r->read_bytes_per_s * 1e-9,
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
            "\n| each at its best batch, context | A, sequences | A | A, ms per token: p50, p90, "
            "p99 | B, sequences | B | B, ms per token | A / B | roofs' A / B | of that |\n"
            "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n");
    for (int c = 0; c < o->n_contexts; c++) {
        static const struct ht_compare_cell none;
        const struct ht_compare_cell *best[2];
        fprintf(f, "| %lld |", (long long)o->context[c]);
        for (int i = 0; i < 2; i++) {
            const struct ht_compare_model *m = &r->model[i];
            best[i] = m->best[c] < 0 ? &none : &m->decode[c][m->best[c]];
            fprintf(f, " %lld |", (long long)best[i]->batch);
            put_cell(f, best[i]);
            fprintf(f, " %.2f, %.2f, %.2f |", 1e3 * best[i]->p50_s, 1e3 * best[i]->p90_s,
                    1e3 * best[i]->p99_s);
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
    if (fclose(f) != 0) {
        free(text);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for the figures");
    }
    return publish(path, text, n);
}

/* ---- plots ---- */

static void put_series(FILE *f, const struct ht_compare_result *r,
                       const struct ht_compare_options *o)
{
    for (int i = 0; i < 2; i++) {
        const struct ht_compare_model *m = &r->model[i];
        fprintf(f, "$best%d << EOD\n", i);
        for (int c = 0; c < o->n_contexts; c++)
            if (m->best[c] >= 0)
                fprintf(f, "%lld %g %g %lld\n", (long long)o->context[c],
                        m->decode[c][m->best[c]].tokens_per_s,
                        m->decode[c][m->best[c]].roof_tokens_per_s,
                        (long long)m->decode[c][m->best[c]].batch);
        fprintf(f, "EOD\n$one%d << EOD\n", i);
        for (int c = 0; c < o->n_contexts; c++)
            if (m->decode[c][0].batch)
                fprintf(f, "%lld %g %g\n", (long long)o->context[c], m->decode[c][0].tokens_per_s,
                        m->decode[c][0].roof_tokens_per_s);
        fprintf(f, "EOD\n");
    }
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash && slash[1] ? slash + 1 : path;
}

static enum ht_status run_gnuplot(const char *script)
{
    char *argv[] = { (char *)(uintptr_t) "gnuplot", (char *)(uintptr_t)script, NULL };
    pid_t pid;
    int code;

    const int rc = posix_spawnp(&pid, "gnuplot", NULL, NULL, argv, environ);
    if (rc) return HT_FAIL(HT_ERR_IO, "gnuplot: %s; install it, or leave --plot out", strerror(rc));
    while (waitpid(pid, &code, 0) < 0)
        if (errno != EINTR) return HT_FAIL(HT_ERR_IO, "gnuplot: %s", strerror(errno));
    if (!WIFEXITED(code) || WEXITSTATUS(code) != 0)
        return HT_FAIL(HT_ERR_IO, "gnuplot failed on %s", script);
    return HT_OK;
}

enum ht_status ht_compare_plot(const struct ht_compare_result *r,
                               const struct ht_compare_options *o, const char *prefix)
{
    char *text = NULL, script[4096];
    size_t n = 0;

    if (strpbrk(prefix, "'\"\n`"))
        return HT_FAIL(HT_ERR_ARG, "--plot %s: quotes and line ends are not taken", prefix);
    if (snprintf(script, sizeof script, "%s-decode.gp", prefix) >= (int)sizeof script)
        return HT_FAIL(HT_ERR_ARG, "--plot: the name is too long");
    FILE *f = open_memstream(&text, &n);
    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for a plot");
    put_series(f, r, o);
    fprintf(f, "set logscale xy\nset xlabel 'context, tokens'\nset ylabel 'decoded tokens/s'\n"
               "set key bottom left\nset grid\nset format x '%%.0s%%c'\n");
    static const char *const formats[][2] = { { "svg size 760,460 font 'sans,13'", "svg" },
                                              { "pngcairo size 760,460", "png" } };
    for (int k = 0; k < 2; k++) {
        fprintf(f, "set terminal %s\nset output '%s-decode.%s'\nplot ", formats[k][0], prefix,
                formats[k][1]);
        for (int i = 0; i < 2; i++) {
            const char *name = base_name(r->model[i].path);
            fprintf(f,
                    "$best%d using 1:2 with linespoints lw 2 pt 7 lc %d title '%s, best batch' "
                    "noenhanced, "
                    "$best%d using 1:3 with lines dt 3 lc %d title 'its roof', "
                    "$one%d using 1:2 with linespoints lw 1 pt 6 lc %d title '%s, %lld "
                    "sequence(s)' noenhanced%s",
                    i, i + 1, name, i, i + 1, i, i + 1, name, (long long)o->batch[0],
                    i ? "\n" : ", ");
        }
    }
    fprintf(f, "set output\n");
    if (fclose(f) != 0) {
        free(text);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a plot");
    }
    HT_TRY(publish(script, text, n));
    const enum ht_status st = run_gnuplot(script);
    unlink(script);
    return st;
}
