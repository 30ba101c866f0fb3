/* bench/hybridbench/compare.c: the measurements. */
#include "bench/hybridbench/compare.h"

#include <stdlib.h>
#include <string.h>

#include "bench/hybridbench/samples.h"
#include "core/base/file.h"
#include "core/model/linear.h"
#include "core/model/packed.h"
#include "core/model/pool.h"
#include "inference/loaded.h"

enum { BLOCK = 512, N_READ = 1 << 25 }; // tokens; words of 8 bytes that the reading loop reads

struct bench {
    const struct ht_compare_options *o;
    struct ht_compare_result *r;
    struct ht_loaded l[2];
    double resident_bytes[2]; // by which opening a model made the process larger
    int64_t *read;            // (N_READ)
};

static const struct ht_model_config *config_of(const struct bench *b, int i)
{
    return &b->l[i].model->cfg;
}

/* ---- roofs ---- */

static enum ht_status open_read(struct bench *b)
{
    b->read = malloc((size_t)N_READ * sizeof *b->read);
    if (!b->read) return HT_FAIL(HT_ERR_MEMORY, "no memory for 256 MiB to read");
#pragma omp parallel for num_threads(b->r->threads) schedule(static)
    for (int64_t i = 0; i < N_READ; i++) b->read[i] = i;
    return HT_OK;
}

/* Bytes a second that all threads read, each from four places in turn, which keeps more reads under
 * way than one. */
static double read_rate(const struct bench *b)
{
    const int64_t quarter = N_READ / 4, *x = b->read;
    const double start = ht_time_s();
    int64_t total = 0;

#pragma omp parallel for simd num_threads(b->r->threads) schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < quarter; i++)
        total += x[i] + x[i + quarter] + x[i + 2 * quarter] + x[i + 3 * quarter];
    volatile int64_t sink = total; // or the loop would be left out
    (void)sink;
    return 8.0 * N_READ / (ht_time_s() - start);
}

/* Operations a second of a model's first product with BLOCK rows, the best of five; the better of
 * the two models, as small products run slower. */
static enum ht_status measure_flop(struct bench *b, struct ht_model *m)
{
    const bool mamba = m->cfg.layer_kind[0] == HT_LAYER_MAMBA;
    const struct ht_linear l = { BLOCK, m->cfg.d_model,
                                 mamba ? ht_in_proj_width(&m->cfg) : ht_qkv_width(&m->cfg),
                                 m->dtype };
    const size_t element = ht_dtype_bytes(m->dtype);
    void *x = calloc((size_t)(BLOCK * l.n_in), element);
    void *y = calloc((size_t)(BLOCK * l.n_out), element);
    enum ht_status st = HT_OK;

    if (!x || !y) st = HT_FAIL(HT_ERR_MEMORY, "no memory for a product of %d rows", BLOCK);
    if (st == HT_OK && m->packed)
        st = ht_backend_reserve_scratch(m->be, ht_qgemm_scratch_bytes(BLOCK, l.n_in));
    for (int k = 0; k < 6 && st == HT_OK; k++) {
        const double start = ht_time_s();
        st = ht_model_linear(m, 0, mamba ? HT_T_IN_PROJ : HT_T_Q, &l, y, x);
        const double rate = 2.0 * BLOCK * (double)l.n_in * (double)l.n_out / (ht_time_s() - start);
        if (k && rate > b->r->flop_per_s) b->r->flop_per_s = rate; // the first one warms up
    }
    free(x);
    free(y);
    return st;
}

static double attention_layers(const struct ht_model_config *c)
{
    double n = 0.0;
    for (int64_t i = 0; i < c->n_layers; i++) n += c->layer_kind[i] == HT_LAYER_ATTENTION;
    return n;
}

/* Matrix elements that a token is multiplied with. */
static double matmul_parameters(const struct ht_loaded *l)
{
    const struct ht_model_config *c = &l->model->cfg;
    const double table = c->tied_head ? 0.0 : (double)c->vocab_size * (double)c->d_model;
    return (double)l->model->list.n_matrix - table;
}

static void set_roof(const struct bench *b, struct ht_compare_cell *cell, double tokens)
{
    const double by_bytes = cell->step_bytes / cell->read_bytes_per_s;
    const double by_flop = cell->step_flop / b->r->flop_per_s;
    cell->roof_tokens_per_s = tokens / (by_bytes > by_flop ? by_bytes : by_flop);
}

/* A step of `rows` tokens, of `batch` sequences of `context` tokens: what it moves and computes. */
static void fill_costs(const struct bench *b, int i, struct ht_compare_cell *cell, int64_t context,
                       int64_t batch, int64_t rows)
{
    const struct ht_model_config *c = config_of(b, i);
    const struct ht_compare_model *m = &b->r->model[i];
    const double table = c->tied_head ? 0.0 : 2.0 * (double)c->vocab_size * (double)c->d_model;
    const double scores = 4.0 * (double)(c->n_heads * c->d_head) * attention_layers(c);
    const double ssm = m->slot_bytes / 4.0 * 5.0; // decay, input and output of every state element

    cell->batch = batch;
    cell->need_bytes = m->weight_bytes +
                       (double)batch * (m->slot_bytes + (double)(context + BLOCK) * m->token_bytes);
    cell->step_bytes = m->weight_bytes - table +
                       (double)batch * (2.0 * m->slot_bytes + (double)context * m->token_bytes);
    cell->step_flop =
        (double)rows * (2.0 * m->n_matmul + scores * (double)(context + rows / batch / 2) + ssm);
}

/* ---- one measurement ---- */

struct place {
    struct ht_pool *pool;
    struct ht_place *at, **list;
    int32_t *ids;
    float *logits;
};

static void close_place(struct place *p)
{
    ht_pool_free(p->pool);
    free(p->at);
    free(p->list);
    free(p->ids);
    free(p->logits);
    *p = (struct place){ 0 };
}

static enum ht_status open_place(struct place *p, const struct bench *b, int i, int64_t context,
                                 int64_t batch, int64_t block)
{
    struct ht_model *m = b->l[i].model;
    const int64_t room = context + BLOCK, n_ids = batch > BLOCK ? batch : BLOCK;

    *p = (struct place){ 0 };
    HT_TRY(ht_pool_create(
        &p->pool, m,
        &(struct ht_pool_options){ .n_slots = batch,
                                   .kv_tokens = attention_layers(&m->cfg) > 0.0 ? batch * room : 0,
                                   .block_tokens = block }));
    p->at = calloc((size_t)batch, sizeof *p->at);
    p->list = calloc((size_t)batch, sizeof *p->list);
    p->ids = calloc((size_t)n_ids, sizeof *p->ids);
    p->logits = malloc((size_t)(batch * m->cfg.vocab_size) * sizeof *p->logits);
    if (!p->at || !p->list || !p->ids || !p->logits)
        return HT_FAIL(HT_ERR_MEMORY, "no memory for %lld sequences", (long long)batch);
    for (int64_t s = 0; s < batch; s++) {
        p->list[s] = &p->at[s];
        p->at[s] = (struct ht_place){ .slot = (int32_t)s, .kv_start = s * room, .kv_n = room };
        HT_TRY(ht_pool_fill(p->pool, &p->at[s], context));
    }
    for (int64_t t = 0; t < n_ids; t++)
        p->ids[t] = (int32_t)((uint32_t)t * 2654435761u % (uint32_t)m->cfg.vocab_size);
    return HT_OK;
}

/* Decoding steps for cell_s seconds, at least three; *rate in tokens a second. */
static enum ht_status decode_round(const struct bench *b, int i, int64_t context, int64_t batch,
                                   struct ht_samples *steps, double *rate, double *resident)
{
    const double before = (double)ht_memory_resident_bytes();
    struct place p;
    enum ht_status st = HT_OK;
    double sum = 0.0;
    int n = 0;

    HT_TRY_GOTO(st, done, open_place(&p, b, i, context, batch, 16));
    for (int k = 0; k < BLOCK && (n < 3 || sum < b->o->cell_s); k++) {
        const double start = ht_time_s();
        HT_TRY_GOTO(st, done, ht_pool_decode(p.pool, p.list, p.ids, batch, p.logits));
        const double s = ht_time_s() - start;
        if (k == 0) continue; // touches what is new
        HT_TRY_GOTO(st, done, ht_samples_add(steps, s));
        sum += s;
        n++;
    }
    *rate = (double)(n * batch) / sum;
    const double now = (double)ht_memory_resident_bytes() - before + b->resident_bytes[i];
    if (now > *resident) *resident = now;
done:
    close_place(&p);
    return st;
}

/* One block of a prompt behind `context` tokens. */
static enum ht_status prefill_round(const struct bench *b, int i, int64_t context, double *rate)
{
    struct place p;
    enum ht_status st = HT_OK;

    HT_TRY_GOTO(st, done, open_place(&p, b, i, context, 1, BLOCK));
    HT_TRY_GOTO(st, done, ht_pool_prompt(p.pool, p.list[0], p.ids, BLOCK)); // warms up
    p.at[0].n_tokens = context;
    const double start = ht_time_s();
    HT_TRY_GOTO(st, done, ht_pool_prompt(p.pool, p.list[0], p.ids, BLOCK));
    *rate = BLOCK / (ht_time_s() - start);
done:
    close_place(&p);
    return st;
}

/* ---- cells: the models take turns ---- */

static double median(const double *x, int n)
{
    double s[HT_COMPARE_ROUNDS];

    memcpy(s, x, (size_t)n * sizeof *x);
    for (int i = 1; i < n; i++)
        for (int j = i; j > 0 && s[j] < s[j - 1]; j--) {
            const double t = s[j];
            s[j] = s[j - 1];
            s[j - 1] = t;
        }
    return (s[(n - 1) / 2] + s[n / 2]) / 2.0;
}

static enum ht_status measure_decode(const struct bench *b, int64_t context,
                                     struct ht_compare_cell *cells[2])
{
    double rate[2][HT_COMPARE_ROUNDS];
    struct ht_samples steps[2] = { { 0 } }, reads = { 0 };
    enum ht_status st = HT_OK;

    for (int k = 0; k < b->o->rounds; k++)
        for (int i = 0; i < 2; i++) {
            if (!cells[i]->batch) continue;
            HT_TRY_GOTO(st, done, ht_samples_add(&reads, read_rate(b)));
            HT_TRY_GOTO(st, done,
                        decode_round(b, i, context, cells[i]->batch, &steps[i], &rate[i][k],
                                     &cells[i]->resident_bytes));
        }
    for (int i = 0; i < 2; i++) {
        if (!cells[i]->batch) continue;
        cells[i]->tokens_per_s = median(rate[i], b->o->rounds);
        cells[i]->p50_s = ht_samples_quantile(&steps[i], 0.5);
        cells[i]->p90_s = ht_samples_quantile(&steps[i], 0.9);
        cells[i]->p99_s = ht_samples_quantile(&steps[i], 0.99);
        cells[i]->read_bytes_per_s = ht_samples_quantile(&reads, 0.5);
        set_roof(b, cells[i], (double)cells[i]->batch);
        if (b->o->progress)
            fprintf(b->o->progress, "%s: context %lld, %lld sequences: %.2f tokens/s, roof %.2f\n",
                    b->o->path[i], (long long)context, (long long)cells[i]->batch,
                    cells[i]->tokens_per_s, cells[i]->roof_tokens_per_s);
    }
done:
    for (int i = 0; i < 2; i++) ht_samples_free(&steps[i]);
    ht_samples_free(&reads);
    return st;
}

/* The largest batch that memory allows at this context, at most the list's last. */
static int64_t largest_batch(const struct bench *b, int i, int64_t context)
{
    const struct ht_compare_model *m = &b->r->model[i];
    const double each = m->slot_bytes + (double)(context + BLOCK) * m->token_bytes;
    const double n = (b->o->memory_bytes - m->weight_bytes) / each;
    const int64_t most = b->o->batch[b->o->n_batches - 1];

    return n < 1.0 ? 0 : n > (double)most ? most : (int64_t)n;
}

void ht_compare_pick_best(struct ht_compare_model *m, const struct ht_compare_options *o, int c)
{
    m->best[c] = -1;
    for (int k = 0; k <= o->n_batches; k++)
        if (m->decode[c][k].batch && (m->best[c] < 0 || m->decode[c][k].tokens_per_s >
                                                            m->decode[c][m->best[c]].tokens_per_s))
            m->best[c] = k;
}

static enum ht_status measure_prefill(const struct bench *b, int c)
{
    const int64_t context = b->o->context[c];
    double rate[2][HT_COMPARE_ROUNDS];
    struct ht_samples reads = { 0 };
    enum ht_status st = HT_OK;

    for (int k = 0; k < b->o->rounds; k++)
        for (int i = 0; i < 2; i++) {
            if (largest_batch(b, i, context) == 0) continue;
            HT_TRY_GOTO(st, done, ht_samples_add(&reads, read_rate(b)));
            HT_TRY_GOTO(st, done, prefill_round(b, i, context, &rate[i][k]));
        }
    for (int i = 0; i < 2; i++) {
        struct ht_compare_cell *cell = &b->r->model[i].prefill[c];
        fill_costs(b, i, cell, context, 1, BLOCK);
        if (largest_batch(b, i, context) == 0) {
            cell->batch = 0;
            continue;
        }
        cell->tokens_per_s = median(rate[i], b->o->rounds);
        cell->read_bytes_per_s = ht_samples_quantile(&reads, 0.5);
        set_roof(b, cell, BLOCK);
    }
done:
    ht_samples_free(&reads);
    return st;
}

static enum ht_status run_context(const struct bench *b, int c)
{
    const int64_t context = b->o->context[c];
    struct ht_compare_cell *cells[2];

    for (int k = 0; k <= b->o->n_batches; k++) { // the last: each model's largest
        for (int i = 0; i < 2; i++) {
            const int64_t most = largest_batch(b, i, context);
            const int64_t batch = k < b->o->n_batches ? b->o->batch[k] : most;
            bool listed = false;
            for (int j = 0; k == b->o->n_batches && j < k; j++) listed |= b->o->batch[j] == most;
            cells[i] = &b->r->model[i].decode[c][k];
            fill_costs(b, i, cells[i], context, batch > 1 ? batch : 1, batch > 1 ? batch : 1);
            if (most == 0 || batch > most || listed) cells[i]->batch = 0;
        }
        HT_TRY(measure_decode(b, context, cells));
    }
    for (int i = 0; i < 2; i++) ht_compare_pick_best(&b->r->model[i], b->o, c);
    return measure_prefill(b, c);
}

static enum ht_status open_models(struct bench *b)
{
    const int64_t room = b->o->context[b->o->n_contexts - 1] + 2 * BLOCK;

    for (int i = 0; i < 2; i++) {
        const char *path = b->o->path[i];
        const size_t n = strlen(path);
        const double before = (double)ht_memory_resident_bytes();
        if (n >= HT_COMPARE_NAME) return HT_FAIL(HT_ERR_ARG, "%s: the name is too long", path);
        if (n > 4 && strcmp(path + n - 4, ".cfg") == 0) {
            HT_TRY(ht_loaded_random(&b->l[i], path, b->o->weights, b->o->threads, room));
        } else {
            struct ht_weights *w;
            HT_TRY(ht_weights_open(&w, path, NULL));
            HT_TRY(ht_loaded_open(&b->l[i], w, NULL, b->o->weights, b->o->threads, room));
        }
        b->r->threads = b->l[i].backend.n_threads;
        b->resident_bytes[i] = (double)ht_memory_resident_bytes() - before;
        b->r->model[i] = (struct ht_compare_model){
            .weight_bytes = (double)ht_loaded_weight_bytes(&b->l[i]),
            .slot_bytes = (double)ht_pool_slot_bytes(config_of(b, i), HT_DTYPE_F32),
            .token_bytes = (double)ht_pool_token_bytes(config_of(b, i), b->l[i].model->dtype),
            .n_matmul = matmul_parameters(&b->l[i]),
        };
        memcpy(b->r->model[i].path, path, n + 1);
    }
    return HT_OK;
}

enum ht_status ht_compare_run(struct ht_compare_result *out, const struct ht_compare_options *o)
{
    struct bench b = { .o = o, .r = out };
    enum ht_status st = HT_OK;

    *out = (struct ht_compare_result){ 0 };
    snprintf(out->weights, sizeof out->weights, "%s", o->weights);
    HT_TRY_GOTO(st, done, open_models(&b));
    HT_TRY_GOTO(st, done, open_read(&b));
    for (int i = 0; i < 2; i++) HT_TRY_GOTO(st, done, measure_flop(&b, b.l[i].model));
    for (int c = 0; c < o->n_contexts; c++) HT_TRY_GOTO(st, done, run_context(&b, c));
    out->peak_bytes = (double)ht_memory_peak_bytes();
done:
    free(b.read);
    for (int i = 0; i < 2; i++) ht_loaded_close(&b.l[i]);
    return st;
}
