/* training/metrics_file.c: metrics.jsonl line by line; the file of a long run may exceed memory's
 * worth. */
#include "training/metrics_file.h"

#include <errno.h>
#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"

/* The step of a line as metrics.c writes it; -1 for anything else, superseded lines included. */
static int64_t step_of(const char *line)
{
    static const char start[] = "{\"step\": ";
    char *end;

    if (strncmp(line, start, sizeof start - 1) != 0) return -1;
    errno = 0;
    const long long step = strtoll(line + sizeof start - 1, &end, 10);
    return errno == 0 && *end == ',' ? (int64_t)step : -1;
}

/* Does any line need a change? */
static bool needs_change(FILE *f, int64_t start_step, char **line, size_t *capacity)
{
    ssize_t n;

    while ((n = getline(line, capacity, f)) > 0)
        if ((*line)[n - 1] != '\n' || step_of(*line) > start_step) return true;
    return false;
}

static enum ht_status rewrite(FILE *in, FILE *out, const char *path, int64_t start_step,
                              char **line, size_t *capacity)
{
    ssize_t n;

    while ((n = getline(line, capacity, in)) > 0) {
        if ((*line)[n - 1] != '\n') break;
        if (step_of(*line) > start_step) {
            fputs("{\"superseded\": true, ", out);
            fputs(*line + 1, out);
        } else {
            fwrite(*line, 1, (size_t)n, out);
        }
    }
    if (ferror(in)) return HT_FAIL(HT_ERR_IO, "%s: read: %s", path, strerror(errno));
    if (fflush(out) != 0 || ferror(out) || fsync(fileno(out)) != 0)
        return HT_FAIL(errno == ENOSPC ? HT_ERR_MEMORY : HT_ERR_IO, "%s: rewriting it: %s", path,
                       strerror(errno));
    return HT_OK;
}

enum ht_status ht_metrics_file_supersede(const char *path, int64_t start_step)
{
    enum ht_status st = HT_OK;
    char tmp[PATH_MAX] = "", *line = NULL;
    size_t capacity = 0;
    FILE *out = NULL, *in = fopen(path, "re");

    if (!in && errno == ENOENT) return HT_OK;
    if (!in) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (!needs_change(in, start_step, &line, &capacity)) {
        if (ferror(in)) st = HT_FAIL(HT_ERR_IO, "%s: read: %s", path, strerror(errno));
        goto done;
    }
    rewind(in);
    if (snprintf(tmp, sizeof tmp, "%s.tmp-%ld", path, (long)getpid()) >= (int)sizeof tmp) {
        st = HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
        goto done;
    }
    out = fopen(tmp, "we");
    if (!out) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", tmp, strerror(errno));
        goto done;
    }
    HT_TRY_GOTO(st, done, rewrite(in, out, path, start_step, &line, &capacity));
    if (rename(tmp, path) != 0)
        st = HT_FAIL(HT_ERR_IO, "%s: rename to %s: %s", tmp, path, strerror(errno));
done:
    if (out) fclose(out);
    if (out && st != HT_OK) unlink(tmp);
    fclose(in);
    free(line);
    return st;
}

/* ---- reading ---- */

static enum ht_status curve_add(struct ht_curve *c, int64_t step, const json_t *value)
{
    if (!json_is_number(value)) return HT_OK;
    if ((c->n & (c->n - 1)) == 0) { // a power of two: full
        const size_t room = c->n ? 2 * (size_t)c->n : 1;
        double *s = realloc(c->step, room * sizeof *s);
        if (s) c->step = s;
        double *v = realloc(c->value, room * sizeof *v);
        if (v) c->value = v;
        if (!s || !v) return HT_FAIL(HT_ERR_MEMORY, "no memory for a curve of %zu points", room);
    }
    c->step[c->n] = (double)step;
    c->value[c->n++] = json_number_value(value);
    return HT_OK;
}

enum ht_status ht_metrics_file_read(struct ht_metrics_curves *out, const char *path)
{
    enum ht_status st = HT_OK;
    char *line = NULL;
    size_t capacity = 0;
    ssize_t n;
    FILE *f = fopen(path, "re");

    *out = (struct ht_metrics_curves){ 0 };
    if (!f) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    while (st == HT_OK && (n = getline(&line, &capacity, f)) > 0) {
        json_t *o = json_loadb(line, (size_t)n, 0, NULL);
        const json_t *step = json_object_get(o, "step");
        if (json_is_integer(step) && !json_is_true(json_object_get(o, "superseded"))) {
            const int64_t at = (int64_t)json_integer_value(step);
            st = curve_add(&out->loss, at, json_object_get(o, "train/loss"));
            if (st == HT_OK)
                st = curve_add(&out->lr, at, json_object_get(o, "train/learning_rate"));
            if (st == HT_OK) st = curve_add(&out->eval_loss, at, json_object_get(o, "eval/loss"));
        }
        json_decref(o);
    }
    if (st == HT_OK && ferror(f)) st = HT_FAIL(HT_ERR_IO, "%s: read: %s", path, strerror(errno));
    if (st != HT_OK) ht_metrics_curves_free(out);
    free(line);
    fclose(f);
    return st;
}

static void curve_free(struct ht_curve *c)
{
    free(c->step);
    free(c->value);
    *c = (struct ht_curve){ 0 };
}

void ht_metrics_curves_free(struct ht_metrics_curves *c)
{
    curve_free(&c->loss);
    curve_free(&c->lr);
    curve_free(&c->eval_loss);
}
