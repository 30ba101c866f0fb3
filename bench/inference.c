/* bench/inference.c: prefill and decode speed of a model folder, as the engine runs it, without
 * sampling.
 *
 *   bench_inference --model PATH [--weights FORMAT] [--threads N] [--reps N]
 *       --prefill N                            one prompt of N tokens, blocks of 512
 *       --decode N [--batch B] [--depth D]     N steps of B sequences that hold D tokens each
 *
 * Depth is made of random keys and values, not read token by token. One JSON object goes to stdout:
 * tokens/s of every repetition and their median, bytes that a step must read, the rate at which
 * this machine read as many bytes in the same run, peak memory.
 */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/base/thread.h"
#include "core/model/packed.h"
#include "core/model/pool.h"
#include "inference/loaded.h"

enum { BLOCK = 512, MAX_REPS = 64 };

struct bench {
    const char *path, *weights;
    int threads, reps;
    int64_t prefill, decode, batch, depth;
    struct ht_loaded l;
    struct ht_pool *pool;
    struct ht_place *place; // (batch)
    float *logits;
    int32_t *ids;
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_inference: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static void *zeros(size_t n, size_t size)
{
    void *p = calloc(n ? n : 1, size);
    if (!p) check(HT_FAIL(HT_ERR_MEMORY, "no memory for %zu bytes", n * size));
    return p;
}

static double peak_gb(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)u.ru_maxrss * 1024.0 / 1e9;
}

static void open_model(struct bench *b)
{
    struct ht_weights *w;
    const int64_t room = b->depth + b->prefill + (b->decode + 4) * (b->reps + 1) + 8;

    check(ht_weights_open(&w, b->path, NULL));
    check(ht_loaded_open(&b->l, w, NULL, b->weights, b->threads, room));
    const struct ht_model_config *c = &b->l.model->cfg;
    check(
        ht_pool_create(&b->pool, b->l.model,
                       &(struct ht_pool_options){
                           .n_slots = b->batch,
                           .kv_tokens = ht_pool_token_bytes(c, HT_DTYPE_F32) ? b->batch * room : 0,
                           .block_tokens = b->prefill ? BLOCK : 16 }));
    b->place = zeros((size_t)b->batch, sizeof *b->place);
    b->logits = zeros((size_t)(b->batch * c->vocab_size), sizeof *b->logits);
    b->ids = zeros((size_t)(b->batch > BLOCK ? b->batch : BLOCK), sizeof *b->ids);
    for (int64_t i = 0; i < b->batch; i++)
        b->place[i] = (struct ht_place){ .slot = (int32_t)i, .kv_start = i * room, .kv_n = room };
}

static void random_ids(struct bench *b, int64_t n, uint64_t from)
{
    for (int64_t i = 0; i < n; i++)
        b->ids[i] = (int32_t)((uint32_t)ht_rng_u64(7, 0, from + (uint64_t)i) %
                              (uint32_t)b->l.model->cfg.vocab_size);
}

static void fill_depth(struct bench *b)
{
    for (int64_t i = 0; i < b->batch; i++) check(ht_pool_fill(b->pool, &b->place[i], b->depth));
}

static double prefill_s(struct bench *b)
{
    check(ht_pool_reset(b->pool, &b->place[0]));
    const double start = ht_time_s();
    for (int64_t done = 0, n; done < b->prefill; done += n) {
        n = b->prefill - done < BLOCK ? b->prefill - done : BLOCK;
        random_ids(b, n, (uint64_t)done);
        check(ht_pool_prompt(b->pool, &b->place[0], b->ids, n));
        if (done + n == b->prefill) check(ht_pool_prompt_logits(b->pool, n - 1, 1, b->logits));
    }
    return ht_time_s() - start;
}

static double decode_s(struct bench *b, struct ht_place **at, int64_t steps)
{
    const double start = ht_time_s();
    for (int64_t k = 0; k < steps; k++) {
        random_ids(b, b->batch, (uint64_t)(k * b->batch));
        check(ht_pool_decode(b->pool, at, b->ids, b->batch, b->logits));
    }
    return ht_time_s() - start;
}

/* Bytes that one decoding step has to move: weights once, but for the embedding's other rows;
 * states read and written, keys and values read. */
static double step_bytes(const struct bench *b)
{
    const struct ht_model_config *c = &b->l.model->cfg;
    const double table = c->tied_head ? 0.0 : 2.0 * (double)c->vocab_size * (double)c->d_model;
    return (double)ht_loaded_weight_bytes(&b->l) - table +
           (double)b->batch *
               (2.0 * (double)ht_pool_slot_bytes(c, HT_DTYPE_F32) +
                (double)b->depth * (double)ht_pool_token_bytes(c, b->l.model->dtype));
}

/* GB/s at which all threads read 1 GiB, best of five. */
static double read_gbs(int threads)
{
    const int64_t n = (int64_t)1 << 27; // of 8 bytes
    int64_t *x = malloc((size_t)n * 8), total = 0;
    double best = 0.0;

    if (!x) check(HT_FAIL(HT_ERR_MEMORY, "no memory for the bandwidth test"));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; i++) x[i] = i;
    for (int k = 0; k < 5; k++) {
        const double start = ht_time_s();
#pragma omp parallel for simd num_threads(threads) schedule(static) reduction(+ : total)
        for (int64_t i = 0; i < n; i++) total += x[i];
        const double gbs = (double)n * 8e-9 / (ht_time_s() - start);
        best = gbs > best ? gbs : best;
    }
    free(x);
    return total == 42 ? 0.0 : best;
}

static int ascending(const void *x, const void *y)
{
    const double a = *(const double *)x, b = *(const double *)y;
    return (a > b) - (a < b);
}

static void report(const struct bench *b, double *rates, double memory_gb)
{
    double sorted[MAX_REPS];

    memcpy(sorted, rates, (size_t)b->reps * sizeof *rates);
    qsort(sorted, (size_t)b->reps, sizeof *sorted, ascending);
    const double median = (sorted[(b->reps - 1) / 2] + sorted[b->reps / 2]) / 2.0;
    printf(
        "{\"program\": \"hybridtrain\", \"model\": \"%s\", \"weights\": \"%s\", \"threads\": %d, ",
        b->path, b->weights, b->l.backend.n_threads);
    if (b->prefill)
        printf("\"test\": \"prefill\", \"tokens\": %lld, ", (long long)b->prefill);
    else
        printf("\"test\": \"decode\", \"batch\": %lld, \"depth\": %lld, \"step_GB\": %.3f, "
               "\"step_GB_per_s\": %.1f, ",
               (long long)b->batch, (long long)b->depth, step_bytes(b) * 1e-9,
               step_bytes(b) * 1e-9 * median / (double)b->batch);
    printf("\"tokens_per_s\": %.2f, \"all\": [", median);
    for (int i = 0; i < b->reps; i++) printf("%s%.2f", i ? ", " : "", rates[i]);
    printf("], \"read_GB_per_s\": %.1f, \"weights_GB\": %.3f, \"state_GB\": %.3f, \"peak_GB\": "
           "%.3f}\n",
           read_gbs(b->l.backend.n_threads), (double)ht_loaded_weight_bytes(&b->l) * 1e-9,
           (double)b->batch *
               ((double)ht_pool_slot_bytes(&b->l.model->cfg, HT_DTYPE_F32) +
                (double)(b->depth + b->prefill) *
                    (double)ht_pool_token_bytes(&b->l.model->cfg, b->l.model->dtype)) *
               1e-9,
           memory_gb);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "model", 1, NULL, 'm' },   { "weights", 1, NULL, 'w' }, { "threads", 1, NULL, 't' },
        { "prefill", 1, NULL, 'p' }, { "decode", 1, NULL, 'd' },  { "batch", 1, NULL, 'b' },
        { "depth", 1, NULL, 'D' },   { "reps", 1, NULL, 'r' },    { NULL, 0, NULL, 0 },
    };
    struct bench b = { .weights = "stored", .reps = 3, .batch = 1 };
    double rates[MAX_REPS];
    int code;

    ht_thread_limit_spinning(argv); // as the programs do
    while ((code = getopt_long(argc, argv, "", options, NULL)) != -1) switch (code) {
        case 'm': b.path = optarg; break;
        case 'w': b.weights = optarg; break;
        case 't': b.threads = atoi(optarg); break;
        case 'p': b.prefill = atoll(optarg); break;
        case 'd': b.decode = atoll(optarg); break;
        case 'b': b.batch = atoll(optarg); break;
        case 'D': b.depth = atoll(optarg); break;
        case 'r': b.reps = atoi(optarg); break;
        default: return 64;
        }
    if (!b.path || (b.prefill > 0) == (b.decode > 0) || b.batch < 1 || b.depth < 0 || b.reps < 1 ||
        b.reps > MAX_REPS) {
        fprintf(stderr, "bench_inference: give --model and one of --prefill N, --decode N\n");
        return 64;
    }
    open_model(&b);
    struct ht_place **at = zeros((size_t)b.batch, sizeof *at);
    for (int64_t i = 0; i < b.batch; i++) at[i] = &b.place[i];
    if (b.decode) {
        fill_depth(&b);
        decode_s(&b, at, 4);
    } else {
        prefill_s(&b);
    }
    for (int k = 0; k < b.reps; k++)
        rates[k] = b.prefill ? (double)b.prefill / prefill_s(&b)
                             : (double)(b.batch * b.decode) / decode_s(&b, at, b.decode);
    report(&b, rates, peak_gb());
    ht_pool_free(b.pool);
    ht_loaded_close(&b.l);
    return 0;
}
