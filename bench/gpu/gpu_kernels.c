/* bench/gpu/gpu_kernels.c: times of the CUDA operations at the shapes of Bamba-9B.
 *
 *   bench_gpu_kernels [TOKENS [DATE COMMIT]] > kernels.tsv
 *
 * One line per kernel as scripts/gpu_status reads it; a table for people on stderr. CUDA events,
 * median of 20 runs after 3, the L2 cache overwritten before each. The ceiling is the larger of
 * necessary bytes over the device's bandwidth and necessary operations over its peak (bf16, fp8;
 * spec figures; "-" for a device that is not listed here).
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention/flash.h"
#include "bench/gpu/gpu_ops.h"
#include "core/base/cuda_device.h"
#include "core/ops/gemm_fp8.h"
#include "core/ops/loss.h"
#include "core/ops/rmsnorm.h"
#include "ssm/conv1d.h"
#include "ssm/gated_norm.h"
#include "ssm/ssd.h"

enum { WARM = RUNS > 1 ? 3 : 0 };

static const struct {
    const char *name; // part of the device's name
    double bytes_per_s, flops_per_s, fp8_per_s;
} devices[] = { { "H100", 3.35e12, 989e12, 1979e12 },
                { "H200", 4.8e12, 989e12, 1979e12 },
                { "A100", 2.0e12, 312e12, 0 } };

static enum ht_status reserve(struct bench_world *w)
{
    const int32_t starts[2] = { 0, (int32_t)w->n_tokens };
    const struct ht_ssd_args ssd = { .seqs = { 1, starts },
                                     .n_tokens = w->n_tokens,
                                     .n_heads = SSM_HEADS,
                                     .d_head = SSM_D_HEAD,
                                     .d_state = D_STATE,
                                     .n_groups = 1,
                                     .chunk = 256,
                                     .dtype = HT_DTYPE_BF16 };
    const struct ht_flash_args flash = { .seqs = { 1, starts },
                                         .n_tokens = w->n_tokens,
                                         .n_heads = N_HEADS,
                                         .n_kv_heads = N_KV_HEADS,
                                         .d_head = D_HEAD,
                                         .dtype = HT_DTYPE_BF16 };
    const size_t needs[] = { ht_ssd_forward_scratch_bytes_cuda(&ssd),
                             ht_ssd_backward_scratch_bytes_cuda(&ssd),
                             ht_flash_scratch_bytes(&flash, w->be.n_threads),
                             ht_rmsnorm_scratch_bytes(w->n_tokens, D_MODEL),
                             ht_conv1d_scratch_bytes(w->n_tokens, CHANNELS, 4),
                             ht_gated_norm_scratch_bytes(w->n_tokens, D_INNER),
                             (size_t)2048 * (4 * VOCAB + 16) + 4096,
                             (size_t)256 << 20 };
    size_t most = 0;

    for (size_t i = 0; i < sizeof needs / sizeof *needs; i++)
        if (needs[i] > most) most = needs[i];
    return ht_backend_reserve_scratch(&w->be, most);
}

static enum ht_status new_array(void *out, struct bench_world *w, int64_t n, enum ht_dtype dtype,
                                float sd)
{
    static uint32_t seed = 1;
    void *p;
    HT_TRY(ht_backend_alloc(&p, &w->be, "benchmark", (size_t)n * ht_dtype_bytes(dtype)));
    memcpy(out, &p, sizeof p);
    return gpu_fill(&w->be, p, n, dtype, sd, seed++);
}

static enum ht_status new_caches(struct bench_world *w)
{
    const int64_t row = N_KV_HEADS * D_HEAD, per_seq = (KV_PAST + 1) * row;
    void *k[KV_SEQS], *v[KV_SEQS], *p;
    int64_t past[KV_SEQS];

    HT_TRY(new_array(&w->cache, w, 2 * KV_SEQS * per_seq, HT_DTYPE_BF16, 1.0f));
    for (int i = 0; i < KV_SEQS; i++) {
        k[i] = (char *)w->cache + 2 * per_seq * i;
        v[i] = (char *)w->cache + 2 * per_seq * (KV_SEQS + i);
        past[i] = KV_PAST;
    }
    HT_TRY(ht_backend_alloc(&p, &w->be, "cache addresses", 3 * sizeof k));
    w->k_cache = p;
    w->v_cache = w->k_cache + KV_SEQS;
    w->past = (int64_t *)(void *)(w->v_cache + KV_SEQS);
    HT_TRY(ht_backend_upload(&w->be, w->k_cache, k, sizeof k));
    HT_TRY(ht_backend_upload(&w->be, w->v_cache, v, sizeof v));
    return ht_backend_upload(&w->be, w->past, past, sizeof past);
}

enum ht_status bench_world_create(struct bench_world *w, int64_t n_tokens)
{
    const int64_t t = n_tokens;
    void *p;

    *w = (struct bench_world){ .n_tokens = t, .n_flat = (int64_t)D_MODEL * VOCAB };
    HT_TRY(ht_backend_create_cuda(&w->be, 0, 1 << 20));
    HT_TRY(reserve(w));
    HT_TRY(new_array(&w->r, w, t * D_MODEL, HT_DTYPE_F32, 1.0f));
    HT_TRY(new_array(&w->grad_r, w, t * D_MODEL, HT_DTYPE_F32, 1e-3f));
    HT_TRY(new_array(&w->rstd, w, t * 128, HT_DTYPE_F32, 0.1f));
    HT_TRY(new_array(&w->vec, w, (int64_t)IN_PROJ * 8, HT_DTYPE_F32, 0.5f));
    for (int i = 0; i < 4; i++) HT_TRY(new_array(&w->flat[i], w, w->n_flat, HT_DTYPE_F32, 0.02f));
    for (int i = 0; i < 2; i++)
        HT_TRY(new_array(&w->wide[i], w, t * 2 * D_FF, HT_DTYPE_BF16, 0.7f));
    for (int i = 0; i < 3; i++) HT_TRY(new_array(&w->act[i], w, t * D_FF, HT_DTYPE_BF16, 0.7f));
    HT_TRY(new_array(&w->weight, w, w->n_flat, HT_DTYPE_BF16, 0.02f));
    HT_TRY(new_array(&w->state, w, (int64_t)DECODE_SEQS * SSM_HEADS * SSM_D_HEAD * D_STATE,
                     HT_DTYPE_F32, 0.1f));
    HT_TRY(new_array(&w->cos_table, w, t * D_HEAD / 4, HT_DTYPE_F32, 0.5f));
    HT_TRY(new_array(&w->sin_table, w, t * D_HEAD / 4, HT_DTYPE_F32, 0.5f));
    HT_TRY(ht_backend_alloc(&p, &w->be, "sums", 3 * sizeof(double)));
    w->sums = p;
    HT_TRY(ht_backend_alloc(&p, &w->be, "ids", (size_t)t * sizeof(int32_t)));
    w->ids = p;
    HT_TRY(gpu_fill_ids(&w->be, w->ids, t, VOCAB));

    const int64_t n_pos = t > KV_SEQS ? t : KV_SEQS + 1;
    const int32_t starts[2] = { 0, (int32_t)t };
    int32_t *pos = malloc((size_t)n_pos * sizeof *pos);
    if (!pos) return HT_FAIL(HT_ERR_MEMORY, "no memory for positions");
    for (int64_t i = 0; i < n_pos; i++) pos[i] = (int32_t)i;
    enum ht_status st = ht_backend_alloc(&p, &w->be, "positions", (size_t)n_pos * sizeof *pos);
    w->pos = p;
    if (st == HT_OK) st = ht_backend_upload(&w->be, w->pos, pos, (size_t)n_pos * sizeof *pos);
    if (st == HT_OK) st = ht_backend_synchronize(&w->be);
    free(pos);
    HT_TRY(st);
    HT_TRY(ht_backend_alloc(&p, &w->be, "starts", sizeof starts));
    w->starts = p;
    HT_TRY(ht_backend_upload(&w->be, w->starts, starts, sizeof starts));
    HT_TRY(new_caches(w));
    return ht_backend_synchronize(&w->be);
}

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static enum ht_status time_op(struct bench_world *w, const struct bench_op *op, struct gpu_timer *t,
                              void *flush, double *us)
{
    float ms[RUNS];

    for (int i = 0; i < WARM; i++) HT_TRY(op->run(w));
    for (int i = 0; i < RUNS; i++) {
        HT_TRY(ht_backend_zero(&w->be, flush, (size_t)FLUSH_BYTES));
        HT_TRY(gpu_timer_start(t, &w->be));
        HT_TRY(op->run(w));
        HT_TRY(gpu_timer_stop(t, &w->be, &ms[i]));
    }
    qsort(ms, RUNS, sizeof *ms, by_value);
    *us = 1e3 * (double)ms[RUNS / 2];
    return ht_backend_synchronize(&w->be);
}

static void report(const struct bench_world *w, const struct bench_op *op, bool fp8, double us,
                   const char *date, const char *commit)
{
    const struct ht_cuda_device *d = ht_cuda_device_of(&w->be);
    const double n = (double)w->n_tokens, flops = op->flops ? op->flops(n) : 0.0;
    char ceiling[96] = "-", names[256];

    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++) {
        if (!strstr(d->name, devices[i].name)) continue;
        const double memory = 1e6 * op->bytes(n) / devices[i].bytes_per_s;
        const double compute = 1e6 * flops / (fp8 ? devices[i].fp8_per_s : devices[i].flops_per_s);
        const double best = memory > compute ? memory : compute;
        snprintf(ceiling, sizeof ceiling, "%.1f us (%s), %.0f %% of it", best,
                 memory > compute ? "memory" : "tensor", 100.0 * best / us);
        break;
    }
    fprintf(stderr, "%-38s %10.1f us %8.2f TB/s %8.1f TF/s   ceiling %s\n", op->name, us,
            1e-6 * op->bytes(n) / us, 1e-6 * flops / us, ceiling);
    snprintf(names, sizeof names, "%s", op->kernels);
    for (char *save, *k = strtok_r(names, ",", &save); k; k = strtok_r(NULL, ",", &save))
        printf("%s\t%s, %lld tokens\tsuites\t%.1f\t%s\t-\t%s\t%s\n", k, op->name,
               (long long)w->n_tokens, us, ceiling, date, commit);
}

int main(int argc, char **argv)
{
    static struct bench_world w;
    const int64_t n_tokens = argc > 1 ? strtoll(argv[1], NULL, 10) : 4096;
    struct gpu_timer *timer = NULL;
    void *flush = NULL;
    int failed = 0;

    if (n_tokens < 1 || n_tokens > 1 << 20 || bench_world_create(&w, n_tokens) != HT_OK ||
        gpu_timer_create(&timer) != HT_OK ||
        ht_backend_alloc(&flush, &w.be, "cache flush", (size_t)FLUSH_BYTES) != HT_OK) {
        fprintf(stderr, "bench_gpu_kernels: %s\n", ht_error_message());
        return 1;
    }
    fprintf(stderr, "%s, %lld tokens, bf16, median of %d\n", ht_cuda_device_of(&w.be)->name,
            (long long)n_tokens, RUNS);
    const int n_fp8 = ht_fp8_check_backend(&w.be) == HT_OK ? n_bench_fp8_ops : 0;
    for (int i = 0; i < n_bench_ops + n_fp8; i++) {
        const struct bench_op *op =
            i < n_bench_ops ? &bench_ops[i] : &bench_fp8_ops[i - n_bench_ops];
        double us;
        if (time_op(&w, op, timer, flush, &us) == HT_OK) {
            report(&w, op, i >= n_bench_ops, us, argc > 2 ? argv[2] : "-",
                   argc > 3 ? argv[3] : "-");
        } else {
            fprintf(stderr, "%s: %s\n", op->name, ht_error_message());
            failed++;
        }
    }
    gpu_timer_free(timer);
    return failed > 0; // the process's end frees the device's memory
}
