/* bench/hybridbench/compare_json.c: the figures as JSON, and back from several runs. */
#include <jansson.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/compare.h"

/* ---- out ---- */

/* What does not fit has its batch and its need alone. */
static json_t *cell_json(const struct ht_compare_cell *c, int64_t context, int64_t batch)
{
    json_t *j = json_pack("{s:I, s:I, s:b, s:f, s:f, s:f}", "context", (json_int_t)context, "batch",
                          (json_int_t)batch, "fits", c->batch != 0, "need_GB", c->need_bytes * 1e-9,
                          "step_GB", c->step_bytes * 1e-9, "step_GFLOP", c->step_flop * 1e-9);
    if (!j || !c->batch) return j;
    json_t *rates =
        json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "tokens_per_s", c->tokens_per_s,
                  "roof_tokens_per_s", c->roof_tokens_per_s, "step_p50_s", c->p50_s, "step_p90_s",
                  c->p90_s, "step_p99_s", c->p99_s, "read_GB_per_s", c->read_bytes_per_s * 1e-9,
                  "resident_GB", c->resident_bytes * 1e-9);
    json_object_update(j, rates);
    json_decref(rates);
    return j;
}

static json_t *numbers(const int64_t *x, int n)
{
    json_t *a = json_array();
    for (int i = 0; i < n; i++) json_array_append_new(a, json_integer((json_int_t)x[i]));
    return a;
}

static json_t *model_json(const struct ht_compare_model *m, const struct ht_compare_options *o)
{
    json_t *decode = json_array(), *prefill = json_array(), *best = json_array();

    for (int c = 0; c < o->n_contexts; c++) {
        for (int k = 0; k <= o->n_batches; k++) {
            const struct ht_compare_cell *cell = &m->decode[c][k];
            if (k < o->n_batches || cell->batch)
                json_array_append_new(
                    decode,
                    cell_json(cell, o->context[c], k < o->n_batches ? o->batch[k] : cell->batch));
        }
        json_array_append_new(prefill, cell_json(&m->prefill[c], o->context[c], 1));
        json_array_append_new(best, m->best[c] < 0
                                        ? json_null()
                                        : json_integer((json_int_t)m->decode[c][m->best[c]].batch));
    }
    return json_pack("{s:s, s:f, s:f, s:f, s:f, s:o, s:o, s:o}", "model", m->path, "weights_GB",
                     m->weight_bytes * 1e-9, "state_MB", m->slot_bytes * 1e-6, "kv_KB_per_token",
                     m->token_bytes * 1e-3, "matmul_parameters", m->n_matmul, "decode", decode,
                     "prefill", prefill, "best_batch", best);
}

enum ht_status ht_compare_json(const struct ht_compare_result *r,
                               const struct ht_compare_options *o, const char *path)
{
    json_t *j = json_pack(
        "{s:s, s:i, s:f, s:f, s:f, s:i, s:f, s:o, s:o, s:[o, o]}", "weights", r->weights, "threads",
        r->threads, "memory_GB", o->memory_bytes * 1e-9, "GFLOP_per_s", r->flop_per_s * 1e-9,
        "peak_GB", r->peak_bytes * 1e-9, "rounds", o->rounds, "seconds", o->cell_s, "contexts",
        numbers(o->context, o->n_contexts), "batches", numbers(o->batch, o->n_batches), "models",
        model_json(&r->model[0], o), model_json(&r->model[1], o));
    char *text = j ? json_dumps(j, JSON_INDENT(1) | JSON_REAL_PRECISION(9)) : NULL;
    json_decref(j);
    return ht_compare_publish(path, text, text ? strlen(text) : 0);
}

/* ---- back ---- */

struct piece {
    const char *path;
    json_t *j;
};

static enum ht_status bad(const struct piece *p, const char *what)
{
    return HT_FAIL(HT_ERR_FORMAT, "%s: not figures of hybridbench compare: %s", p->path, what);
}

static enum ht_status get_numbers(const struct piece *p, const char *key, int64_t *x, int *n)
{
    const json_t *a = json_object_get(p->j, key);
    const size_t size = json_array_size(a);

    if (size < 1 || size > HT_COMPARE_MOST) return bad(p, key);
    for (size_t i = 0; i < size; i++) {
        x[i] = json_integer_value(json_array_get(a, i));
        if (x[i] < 1 || (i && x[i] <= x[i - 1])) return bad(p, key);
    }
    *n = (int)size;
    return HT_OK;
}

static enum ht_status get_cell(const struct piece *p, const json_t *j, struct ht_compare_cell *c)
{
    double need, gb, gflop, read = 0.0, resident = 0.0;
    json_int_t batch;
    int fits;

    if (json_unpack((json_t *)(uintptr_t)j, "{s:I, s:b, s:F, s:F, s:F}", "batch", &batch, "fits",
                    &fits, "need_GB", &need, "step_GB", &gb, "step_GFLOP", &gflop) != 0)
        return bad(p, "a cell without batch, fits, need_GB, step_GB or step_GFLOP");
    *c = (struct ht_compare_cell){ .need_bytes = need * 1e9,
                                   .step_bytes = gb * 1e9,
                                   .step_flop = gflop * 1e9 };
    if (!fits) return HT_OK;
    c->batch = batch;
    if (json_unpack((json_t *)(uintptr_t)j, "{s:F, s:F, s:F, s:F, s:F, s:F, s:F}", "tokens_per_s",
                    &c->tokens_per_s, "roof_tokens_per_s", &c->roof_tokens_per_s, "step_p50_s",
                    &c->p50_s, "step_p90_s", &c->p90_s, "step_p99_s", &c->p99_s, "read_GB_per_s",
                    &read, "resident_GB", &resident) != 0 ||
        !(c->tokens_per_s > 0.0 && c->roof_tokens_per_s > 0.0) || batch < 1)
        return bad(p, "a cell without its rates");
    c->read_bytes_per_s = read * 1e9;
    c->resident_bytes = resident * 1e9;
    return HT_OK;
}

static int index_of(const int64_t *x, int n, int64_t value)
{
    for (int i = 0; i < n; i++)
        if (x[i] == value) return i;
    return -1;
}

static enum ht_status get_cells(const struct piece *p, const json_t *model, const char *key,
                                struct ht_compare_model *m, const struct ht_compare_options *o)
{
    const json_t *list = json_object_get(model, key), *j;
    const bool decode = strcmp(key, "decode") == 0;
    size_t i;

    if (!json_is_array(list)) return bad(p, key);
    json_array_foreach(list, i, j)
    {
        const int c =
            index_of(o->context, o->n_contexts, json_integer_value(json_object_get(j, "context")));
        const int k =
            index_of(o->batch, o->n_batches, json_integer_value(json_object_get(j, "batch")));
        if (c < 0) return bad(p, "a cell of a context that is not listed");
        HT_TRY(get_cell(p, j, decode ? &m->decode[c][k < 0 ? o->n_batches : k] : &m->prefill[c]));
    }
    return HT_OK;
}

/* What all pieces have in common; compared from the second on. */
static enum ht_status get_head(const struct piece *p, bool first, struct ht_compare_result *r,
                               struct ht_compare_options *o)
{
    struct ht_compare_options mine = { 0 };
    double memory, gflop, peak;
    const char *weights;
    int threads;

    if (json_unpack(p->j, "{s:s, s:i, s:F, s:F, s:F, s:i, s:F}", "weights", &weights, "threads",
                    &threads, "memory_GB", &memory, "GFLOP_per_s", &gflop, "peak_GB", &peak,
                    "rounds", &mine.rounds, "seconds", &mine.cell_s) != 0 ||
        strlen(weights) >= sizeof r->weights || mine.rounds < 1 ||
        json_array_size(json_object_get(p->j, "models")) != 2)
        return bad(p, "weights, threads, memory, rates, rounds, seconds or models are missing");
    HT_TRY(get_numbers(p, "batches", mine.batch, &mine.n_batches));
    if (first) {
        memcpy(r->weights, weights, strlen(weights) + 1);
        r->threads = threads;
        o->rounds = mine.rounds;
        o->cell_s = mine.cell_s;
        o->memory_bytes = memory * 1e9;
        o->n_batches = mine.n_batches;
        memcpy(o->batch, mine.batch, sizeof o->batch);
    }
    if (strcmp(r->weights, weights) != 0 || r->threads != threads || o->rounds != mine.rounds ||
        fabs(o->memory_bytes - memory * 1e9) > 1e3 || o->n_batches != mine.n_batches ||
        memcmp(o->batch, mine.batch, (size_t)mine.n_batches * sizeof *mine.batch) != 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%s: weights, threads, memory, rounds or batches are not those of the "
                       "figures before it; only contexts may differ",
                       p->path);
    if (gflop * 1e9 > r->flop_per_s) r->flop_per_s = gflop * 1e9;
    if (peak * 1e9 > r->peak_bytes) r->peak_bytes = peak * 1e9;
    for (int i = 0; i < 2; i++) {
        struct ht_compare_model *m = &r->model[i];
        double gb, mb, kb, n;
        const char *path;
        if (json_unpack(json_array_get(json_object_get(p->j, "models"), (size_t)i),
                        "{s:s, s:F, s:F, s:F, s:F}", "model", &path, "weights_GB", &gb, "state_MB",
                        &mb, "kv_KB_per_token", &kb, "matmul_parameters", &n) != 0 ||
            strlen(path) >= sizeof m->path)
            return bad(p, "a model without name or sizes");
        if (!first && (strcmp(m->path, path) != 0 || fabs(m->weight_bytes - gb * 1e9) > 1e3))
            return HT_FAIL(HT_ERR_ARG, "%s: figures of %s; those before it are of %s", p->path,
                           path, m->path);
        memcpy(m->path, path, strlen(path) + 1);
        m->weight_bytes = gb * 1e9;
        m->slot_bytes = mb * 1e6;
        m->token_bytes = kb * 1e3;
        m->n_matmul = n;
    }
    return HT_OK;
}

/* Contexts of a piece, sorted into those before it. */
static enum ht_status add_contexts(const struct piece *p, struct ht_compare_options *o)
{
    int64_t x[HT_COMPARE_MOST];
    int n;

    HT_TRY(get_numbers(p, "contexts", x, &n));
    for (int i = 0; i < n; i++) {
        int at = o->n_contexts;
        if (index_of(o->context, o->n_contexts, x[i]) >= 0)
            return HT_FAIL(HT_ERR_ARG, "%s: context %lld is in a file before it", p->path,
                           (long long)x[i]);
        if (o->n_contexts == HT_COMPARE_MOST)
            return HT_FAIL(HT_ERR_ARG, "%s: more than %d contexts together", p->path,
                           HT_COMPARE_MOST);
        for (; at > 0 && o->context[at - 1] > x[i]; at--) o->context[at] = o->context[at - 1];
        o->context[at] = x[i];
        o->n_contexts++;
    }
    return HT_OK;
}

enum ht_status ht_compare_merge(struct ht_compare_result *out, struct ht_compare_options *o,
                                const char *const *paths, int n)
{
    struct piece *pieces = calloc((size_t)(n > 0 ? n : 1), sizeof *pieces);
    enum ht_status st = HT_OK;
    json_error_t error;

    *out = (struct ht_compare_result){ 0 };
    *o = (struct ht_compare_options){ 0 };
    if (!pieces) return HT_FAIL(HT_ERR_MEMORY, "no memory for %d files", n);
    for (int i = 0; i < n; i++) {
        pieces[i] = (struct piece){ paths[i], json_load_file(paths[i], 0, &error) };
        if (!pieces[i].j) {
            st = HT_FAIL(HT_ERR_FORMAT, "%s: line %d: %s", paths[i], error.line, error.text);
            goto done;
        }
        HT_TRY_GOTO(st, done, get_head(&pieces[i], i == 0, out, o));
        HT_TRY_GOTO(st, done, add_contexts(&pieces[i], o));
    }
    for (int i = 0; i < n; i++)
        for (int m = 0; m < 2; m++) {
            const json_t *j = json_array_get(json_object_get(pieces[i].j, "models"), (size_t)m);
            HT_TRY_GOTO(st, done, get_cells(&pieces[i], j, "decode", &out->model[m], o));
            HT_TRY_GOTO(st, done, get_cells(&pieces[i], j, "prefill", &out->model[m], o));
        }
    for (int c = 0; c < o->n_contexts; c++)
        for (int m = 0; m < 2; m++) ht_compare_pick_best(&out->model[m], o, c);
    for (int m = 0; m < 2; m++) o->path[m] = out->model[m].path;
    o->weights = out->weights;
    o->threads = out->threads;
done:
    for (int i = 0; i < n; i++) json_decref(pieces[i].j);
    free(pieces);
    return st;
}
