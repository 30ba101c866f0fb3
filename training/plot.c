/* training/plot.c: a gnuplot script with its data inside, run in the run folder without a shell. */
#include "training/plot.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "core/base/file.h"
#include "training/metrics_file.h"

extern char **environ;

enum {
    MAX_POINTS = 1500, // more than the picture has pixels
    TIME_LIMIT_S = 120,
};

static const char script_name[] = ".loss.gp", message_name[] = ".loss.err";
static const char *const pictures[][2] = { { ".loss.svg.tmp", "loss.svg" },
                                           { ".loss.png.tmp", "loss.png" } };

/* ---- the data ---- */

/* Centred mean: the window grows with the step, up to a fiftieth of the run, so that the steep
 * start is neither flattened nor shifted. */
static double *smoothed(const struct ht_curve *c)
{
    double *sum = malloc((size_t)(c->n + 1) * sizeof *sum);
    double *out = malloc((size_t)c->n * sizeof *out + 1);

    if (sum && out) {
        sum[0] = 0;
        for (int64_t i = 0; i < c->n; i++) sum[i + 1] = sum[i] + c->value[i];
        for (int64_t i = 0; i < c->n; i++) {
            const int64_t most = c->n / 50 > 3 ? c->n / 50 : 3, half = i / 8 < most ? i / 8 : most;
            const int64_t end = i + half + 1 < c->n ? i + half + 1 : c->n;
            out[i] = (sum[end] - sum[i - half]) / (double)(end - (i - half));
        }
    } else {
        free(out);
        out = NULL;
    }
    free(sum);
    return out;
}

/* A data block $name of (step, value), neighbours averaged so that at most MAX_POINTS remain. */
static void put_block(FILE *f, const char *name, const double *step, const double *value, int64_t n)
{
    const int64_t width = (n + MAX_POINTS - 1) / MAX_POINTS;

    fprintf(f, "$%s << EOD\n", name);
    for (int64_t i = 0; i < n; i += width) {
        const int64_t m = n - i < width ? n - i : width;
        double s = 0, v = 0;
        for (int64_t k = i; k < i + m; k++) {
            s += step[k];
            v += value[k];
        }
        fprintf(f, "%.10g %.9g\n", s / (double)m, v / (double)m);
    }
    fputs("EOD\n", f);
}

/* Inside gnuplot's single quotes only the quote itself is special; control characters become
 * spaces. */
static void put_quoted(FILE *f, const char *text)
{
    fputc('\'', f);
    for (const char *p = text; *p; p++) {
        if (*p == '\'') fputc('\'', f);
        fputc((unsigned char)*p < 32 || *p == 127 ? ' ' : *p, f);
    }
    fputc('\'', f);
}

static int compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The picture's upper limit: the first steps from a random start must not squeeze the rest. */
static double top_of(const struct ht_curve *c, double *low)
{
    double *v = malloc((size_t)c->n * sizeof *v), top = 0;

    *low = top = c->value[0];
    if (v) {
        memcpy(v, c->value, (size_t)c->n * sizeof *v);
        qsort(v, (size_t)c->n, sizeof *v, compare);
        *low = v[0];
        top = v[(int64_t)(0.995 * (double)(c->n - 1))];
    }
    free(v);
    return top;
}

static const char style[] = "set encoding utf8\n"
                            "set border 3 lw 1 lc rgb '#555555'\n"
                            "set grid lw 0.8 lc rgb '#d0d0d0' dt solid back\n"
                            "set tics nomirror out scale 0.6 tc rgb '#333333'\n"
                            "set xlabel 'step' tc rgb '#333333'\n"
                            "set ylabel 'loss (nats per token)' tc rgb '#333333'\n"
                            "set key top right samplen 2 spacing 1.2 noenhanced\n"
                            "set lmargin 9\n";

static void put_script(FILE *f, const struct ht_metrics_curves *c, const double *smooth,
                       const char *title)
{
    const struct ht_curve *loss = &c->loss, *eval = &c->eval_loss;
    double low = 0, top = 0, peak = 0;
    const char *comma = "";

    fputs(style, f);
    fputs("set title ", f);
    put_quoted(f, title);
    fputs(" noenhanced font ',16' tc rgb '#111111'\n", f);
    if (loss->n > 0) top = top_of(loss, &low);
    for (int64_t i = 0; i < eval->n; i++) {
        low = loss->n == 0 && i == 0 ? eval->value[0] : fmin(low, eval->value[i]);
        top = fmax(top, eval->value[i]);
    }
    const double margin = top > low ? 0.06 * (top - low) : 0.5;
    const double last =
        fmax(loss->n ? loss->step[loss->n - 1] : 0, eval->n ? eval->step[eval->n - 1] : 0);
    // so many digits that neighbouring ticks differ
    fprintf(f, "set format x '%s'\n", last < 2e4 ? "%.0f" : last < 1e6 ? "%.0s%c" : "%.1s%c");
    fprintf(f, "set yrange [%.9g:%.9g]\n", low - margin, top + margin);
    for (int64_t i = 0; i < c->lr.n; i++) peak = fmax(peak, c->lr.value[i]);
    if (peak > 0) { // low in the picture, below the curves
        fprintf(f,
                "set border 11\nset y2label 'learning rate' tc rgb '#999999'\n"
                "set y2range [0:%.9g]\n"
                "set y2tics nomirror tc rgb '#999999' ('0' 0, '%.2g' %.9g, '%.2g' %.9g)\n",
                4 * peak, peak / 2, peak / 2, peak, peak);
        put_block(f, "lr", c->lr.step, c->lr.value, c->lr.n);
    }
    put_block(f, "loss", loss->step, loss->value, loss->n);
    put_block(f, "smooth", loss->step, smooth, loss->n);
    put_block(f, "eval", eval->step, eval->value, eval->n);

    static const char *const terminals[] = {
        "set terminal svg size 960,600 font 'sans-serif,14' background 'white'",
        "set terminal pngcairo size 1440,900 fontscale 1.5 linewidth 1.5 pointscale 1.5 "
        "background 'white'",
    };
    for (int i = 0; i < 2; i++) {
        fprintf(f, "%s\nset output '%s'\nplot ", terminals[i], pictures[i][0]);
        comma = "";
        if (peak > 0) {
            fputs("$lr using 1:2 axes x1y2 with lines lw 1.5 dt 2 lc rgb '#aaaaaa' "
                  "title 'learning rate'",
                  f);
            comma = ", \\\n  ";
        }
        if (loss->n > 0) {
            fprintf(f,
                    "%s$loss using 1:2 with lines lw 1 lc rgb '#b3cde3' title 'training', \\\n"
                    "  $smooth using 1:2 with lines lw 2.5 lc rgb '#1f5fa8' "
                    "title 'training, smoothed'",
                    comma);
            comma = ", \\\n  ";
        }
        if (eval->n > 0)
            fprintf(f,
                    "%s$eval using 1:2 with linespoints lw 1.5 pt 7 ps 0.7 lc rgb '#d95f02' "
                    "title 'held-out'",
                    comma);
        fputs("\nunset output\n", f);
    }
}

/* ---- gnuplot ---- */

/* Wait for the child, at most TIME_LIMIT_S. */
static enum ht_status wait_for(pid_t pid, const char *run_dir)
{
    const double start = ht_time_s();
    const struct timespec pause = { 0, 10000000 };
    int status = 0;
    char path[PATH_MAX], *text = NULL;

    for (;;) {
        const pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid) break;
        if (got < 0 && errno != EINTR)
            return HT_FAIL(HT_ERR_IO, "%s: gnuplot: waitpid: %s", run_dir, strerror(errno));
        if (ht_time_s() - start > TIME_LIMIT_S) {
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return HT_FAIL(HT_ERR_IO, "%s: gnuplot did not end within %d s", run_dir, TIME_LIMIT_S);
        }
        nanosleep(&pause, NULL);
    }
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return HT_OK;
    if (WIFEXITED(status) && WEXITSTATUS(status) == 127)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "gnuplot is not installed: no loss plot (package gnuplot-nox)");
    snprintf(path, sizeof path, "%.*s/%s", PATH_MAX - 32, run_dir, message_name);
    if (ht_file_read(&text, NULL, path, 1 << 20) != HT_OK) text = NULL;
    const enum ht_status st = HT_FAIL(HT_ERR_IO, "%s: gnuplot failed (status %d): %.400s", run_dir,
                                      status, text ? text : "");
    free(text);
    return st;
}

static enum ht_status run_gnuplot(const char *run_dir)
{
    char name[] = "gnuplot", defaults[] = "-d", script[sizeof script_name];
    char *const argv[] = { name, defaults, script, NULL };
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    sigset_t none, handled;
    pid_t pid = 0;

    memcpy(script, script_name, sizeof script);
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addchdir_np(&files, run_dir);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&files, 2, message_name, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    posix_spawnattr_init(&attr);
    sigemptyset(&none);
    sigemptyset(&handled);
    sigaddset(&handled, SIGPIPE); // ignored signals would stay ignored
    posix_spawnattr_setsigmask(&attr, &none);
    posix_spawnattr_setsigdefault(&attr, &handled);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    const int error = posix_spawnp(&pid, name, &files, &attr, argv, environ);
    posix_spawnattr_destroy(&attr);
    posix_spawn_file_actions_destroy(&files);
    if (error == ENOENT && ht_file_is_dir(run_dir))
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "gnuplot is not installed: no loss plot (package gnuplot-nox)");
    if (error) return HT_FAIL(HT_ERR_IO, "%s: starting gnuplot: %s", run_dir, strerror(error));
    return wait_for(pid, run_dir);
}

static void path_in(char path[PATH_MAX], const char *dir, const char *name)
{
    snprintf(path, PATH_MAX, "%s/%s", dir, name);
}

static enum ht_status publish(const char *run_dir)
{
    char from[PATH_MAX], to[PATH_MAX];

    for (int i = 0; i < 2; i++) {
        path_in(from, run_dir, pictures[i][0]);
        path_in(to, run_dir, pictures[i][1]);
        if (rename(from, to) != 0)
            return HT_FAIL(HT_ERR_IO, "%s: rename to %s: %s", from, to, strerror(errno));
    }
    return HT_OK;
}

enum ht_status ht_plot_loss(const char *run_dir, const char *title)
{
    enum ht_status st = HT_OK;
    struct ht_metrics_curves curves = { 0 };
    char path[PATH_MAX], *script = NULL;
    size_t n_script = 0;
    double *smooth = NULL;
    FILE *f = NULL;

    if (strlen(run_dir) > PATH_MAX - 32)
        return HT_FAIL(HT_ERR_ARG, "%.60s...: path is too long", run_dir);
    path_in(path, run_dir, "metrics.jsonl");
    HT_TRY(ht_metrics_file_read(&curves, path));
    if (curves.loss.n + curves.eval_loss.n == 0) {
        st = HT_FAIL(HT_ERR_ARG, "%s: no train/loss and no eval/loss to plot", path);
        goto done;
    }
    smooth = smoothed(&curves.loss);
    f = open_memstream(&script, &n_script);
    if (!smooth || !f) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a plot", path);
        goto done;
    }
    put_script(f, &curves, smooth, title);
    const int error = ferror(f) | fclose(f);
    f = NULL;
    if (error) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a plot", path);
        goto done;
    }
    path_in(path, run_dir, script_name);
    HT_TRY_GOTO(st, done, ht_file_publish(path, script, n_script));
    HT_TRY_GOTO(st, done, run_gnuplot(run_dir));
    HT_TRY_GOTO(st, done, publish(run_dir));
done:
    if (f) fclose(f);
    path_in(path, run_dir, script_name);
    unlink(path);
    path_in(path, run_dir, message_name);
    unlink(path);
    for (int i = 0; i < 2; i++) {
        path_in(path, run_dir, pictures[i][0]);
        unlink(path);
    }
    free(script);
    free(smooth);
    ht_metrics_curves_free(&curves);
    return st;
}
