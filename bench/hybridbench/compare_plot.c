/* bench/hybridbench/compare_plot.c: the figures as curves over context, by gnuplot. */
#include <errno.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench/hybridbench/compare.h"
#include "core/base/file.h"

extern char **environ;

enum what { RATE, ROOF, P50, P99 };
enum { BEST = -1 };

struct curve {
    int model, batch; // index of the list, or BEST
    enum what what;
};

struct plot {
    const char *name, *title, *label;
    struct curve curve[4 * HT_COMPARE_MOST];
    int n;
};

static const struct ht_compare_cell *cell_at(const struct ht_compare_result *r,
                                             const struct curve *v, int c)
{
    const struct ht_compare_model *m = &r->model[v->model];
    const int k = v->batch == BEST ? m->best[c] : v->batch;
    return k >= 0 && m->decode[c][k].batch ? &m->decode[c][k] : NULL;
}

static double value_of(const struct ht_compare_cell *cell, enum what what)
{
    switch (what) {
    case RATE: return cell->tokens_per_s;
    case ROOF: return cell->roof_tokens_per_s;
    case P50: return 1e3 * cell->p50_s;
    default: return 1e3 * cell->p99_s;
    }
}

/* Adds a curve that has a point. */
static void add(struct plot *p, const struct ht_compare_result *r,
                const struct ht_compare_options *o, int model, int batch, enum what what)
{
    const struct curve v = { model, batch, what };

    for (int c = 0; c < o->n_contexts; c++)
        if (cell_at(r, &v, c)) {
            p->curve[p->n++] = v;
            return;
        }
}

/* A model's name between single quotes: the end of its path, without what gnuplot would read. */
static void put_title(FILE *f, const struct ht_compare_result *r,
                      const struct ht_compare_options *o, const struct curve *v)
{
    static const char *const words[] = { "", ", roof", ", median", ", 99 of 100" };
    const char *path = r->model[v->model].path, *slash = strrchr(path, '/');

    fputs("title '", f);
    for (const char *c = slash && slash[1] ? slash + 1 : path; *c; c++)
        if (*c != '\'' && (unsigned char)*c >= ' ') fputc(*c, f);
    if (v->batch == BEST)
        fputs(", best batch", f);
    else if (o->batch[v->batch] == 1)
        fputs(", 1 sequence", f);
    else
        fprintf(f, ", %lld sequences", (long long)o->batch[v->batch]);
    fprintf(f, "%s' noenhanced", words[v->what]);
}

static void put_plot(FILE *f, const struct plot *p, const struct ht_compare_result *r,
                     const struct ht_compare_options *o, const char *prefix)
{
    static const char *const terminals[][2] = {
        { "svg size 860,520 font 'sans-serif,13' background 'white'", "svg" },
        { "pngcairo size 1290,780 fontscale 1.4 linewidth 1.5 background 'white'", "png" },
    };
    static const int points[] = { 7, 6, 5, 4, 9, 8, 11, 10, 13, 12 };
    static const char *const colours[] = { "#1f5fa8", "#d95f02" };

    for (int i = 0; i < p->n; i++) {
        fprintf(f, "$%s%d << EOD\n", p->name, i);
        for (int c = 0; c < o->n_contexts; c++) {
            const struct ht_compare_cell *cell = cell_at(r, &p->curve[i], c);
            if (cell)
                fprintf(f, "%lld %g\n", (long long)o->context[c], value_of(cell, p->curve[i].what));
        }
        fputs("EOD\n", f);
    }
    fprintf(f, "set title '%s, %s weights' noenhanced\nset ylabel '%s'\n", p->title, r->weights,
            p->label);
    for (size_t t = 0; t < sizeof terminals / sizeof *terminals; t++) {
        fprintf(f, "set terminal %s\nset output '%s-%s.%s'\nplot ", terminals[t][0], prefix,
                p->name, terminals[t][1]);
        for (int i = 0; i < p->n; i++) {
            const struct curve *v = &p->curve[i];
            const bool dashed = v->what == ROOF || v->what == P99;
            const size_t point = (size_t)(v->batch + 1) % (sizeof points / sizeof *points);
            fprintf(f, "%s$%s%d using 1:2 with linespoints lw %g pt %d ps %g dt %d lc rgb '%s' ",
                    i ? ", \\\n  " : "", p->name, i, v->batch == BEST ? 2.0 : 1.2, points[point],
                    dashed ? 0.0 : 0.8, dashed ? 3 : 1, colours[v->model]);
            put_title(f, r, o, v);
        }
        fputs("\nunset output\n", f);
    }
}

static void put_plots(FILE *f, const struct ht_compare_result *r,
                      const struct ht_compare_options *o, const char *prefix)
{
    struct plot best = { .name = "decode",
                         .title = "Decoding, each at its own best batch",
                         .label = "tokens/s" };
    struct plot equal = { .name = "equal",
                          .title = "Decoding at equal batch",
                          .label = "tokens/s" };
    struct plot latency = { .name = "latency",
                            .title = "Time of a decoded token",
                            .label = "ms per token and sequence" };

    for (int i = 0; i < 2; i++) {
        add(&best, r, o, i, BEST, RATE);
        add(&best, r, o, i, BEST, ROOF);
        add(&best, r, o, i, 0, RATE);
        for (int k = 0; k < o->n_batches; k++) add(&equal, r, o, i, k, RATE);
        add(&latency, r, o, i, BEST, P50);
        add(&latency, r, o, i, BEST, P99);
        add(&latency, r, o, i, 0, P50);
        add(&latency, r, o, i, 0, P99);
    }
    fputs("set encoding utf8\nset logscale xy\nset xlabel 'context, tokens'\nset border 3\n"
          "set grid lw 0.8 lc rgb '#d0d0d0' dt solid back\nset tics nomirror out scale 0.6\n"
          "set key below maxcols 3 samplen 2 spacing 1.2\n"
          "set xtics (",
          f);
    for (int c = 0; c < o->n_contexts; c++)
        if (o->context[c] % 1024 == 0)
            fprintf(f, "%s'%lldk' %lld", c ? ", " : "", (long long)(o->context[c] / 1024),
                    (long long)o->context[c]);
        else
            fprintf(f, "%s'%lld' %lld", c ? ", " : "", (long long)o->context[c],
                    (long long)o->context[c]);
    fprintf(f, ")\nset xrange [%g:%g]\n", 0.85 * (double)o->context[0],
            1.15 * (double)o->context[o->n_contexts - 1]);
    put_plot(f, &best, r, o, prefix);
    put_plot(f, &equal, r, o, prefix);
    put_plot(f, &latency, r, o, prefix);
}

static enum ht_status run_gnuplot(const char *script)
{
    char *argv[] = { (char *)(uintptr_t) "gnuplot", (char *)(uintptr_t) "-d",
                     (char *)(uintptr_t)script, NULL };
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
    if (snprintf(script, sizeof script, "%s.gp", prefix) >= (int)sizeof script)
        return HT_FAIL(HT_ERR_ARG, "--plot: the name is too long");
    if (r->model[0].best[0] < 0 && r->model[1].best[0] < 0)
        return HT_FAIL(HT_ERR_ARG, "--plot: nothing fits the memory, nothing to draw");
    FILE *f = open_memstream(&text, &n);
    if (!f) return HT_FAIL(HT_ERR_MEMORY, "no memory for a plot");
    put_plots(f, r, o, prefix);
    if (fclose(f) != 0) {
        free(text);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for a plot");
    }
    HT_TRY(ht_compare_publish(script, text, n));
    const enum ht_status st = run_gnuplot(script);
    unlink(script);
    return st;
}
