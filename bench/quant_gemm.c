/* bench/quant_gemm.c: products with quantised weights on the matrices of a recipe's model.
 *
 *   bench_quant_gemm RECIPE [section.key=value ...] [--formats bf16,int8,int4,int4z] [--group
 * 32|64]
 *                    [--rows 1,4,16,512] [--repeat N] [--threads N] [--precise] [--cpu-time]
 *
 * All matrices of all layers are there at once, so that what is read with few rows comes from
 * memory. Each measurement goes once over all matrices of one kind ("all": over the whole model),
 * and stands between two readings of the same bytes by a plain loop; peaks of the dot-product
 * instructions are measured in registers. Medians over --repeat. One JSON object per line goes to
 * stdout.
 */
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/base/thread.h"
#include "core/config/recipe.h"
#include "core/ops/quant.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { MAX_KINDS = 8, MAX_REPEAT = 101, MAX_LIST = 8 };

struct kind {
    const char *name;
    int64_t n, k;
    int count;
    struct ht_qmatrix *q; // (count)
};

struct bench {
    struct ht_config cfg;
    struct ht_backend be;
    struct kind kinds[MAX_KINDS];
    int n_kinds;
    struct ht_arena arena;
    float *x, *y;
    int group, repeat;
    bool precise, cpu_time;
    double peak_bf16, peak_int8; // GOP/s
};

static void check(enum ht_status st)
{
    if (st == HT_OK) return;
    fprintf(stderr, "bench_quant_gemm: %s\n", ht_error_message());
    exit(ht_exit_code(st));
}

static double now_s(const struct bench *b)
{
    struct timespec t;

    if (!b->cpu_time) return ht_time_s();
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[n / 2];
}

/* ---- roofs ---- */

/* GB/s of a plain parallel sum over the bytes. */
static double read_rate(const struct bench *b, const unsigned char *p, size_t n_bytes)
{
    const int64_t n = (int64_t)(n_bytes / 256);
    uint64_t total = 0;
    const double start_s = now_s(b);

#pragma omp parallel for num_threads(b->be.n_threads) schedule(static) reduction(+ : total)
    for (int64_t i = 0; i < n; i++) {
        typedef uint64_t line __attribute__((vector_size(64)));
        line v[4];
        __builtin_prefetch(p + i * 256 + 4096);
        memcpy(v, p + i * 256, sizeof v);
        const line s = v[0] + v[1] + v[2] + v[3];
        total += s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
    }
    const double s = now_s(b) - start_s;
    __asm__ volatile("" ::"r"(total));
    return (double)n_bytes / s / 1e9;
}

#if defined(__x86_64__)
enum { PEAK_STEPS = 4000000, PEAK_CHAINS = 16 };

__attribute__((target("avx512f,avx512bf16"))) static void spin_bf16(void)
{
    __m512 acc[PEAK_CHAINS];
    __m512i a = _mm512_set1_epi32(1);
    for (int i = 0; i < PEAK_CHAINS; i++) acc[i] = _mm512_setzero_ps();
    for (int s = 0; s < PEAK_STEPS; s++) {
        __asm__ volatile("" : "+v"(a));
        _Pragma("GCC unroll 16") for (int i = 0; i < PEAK_CHAINS; i++) acc[i] =
            _mm512_dpbf16_ps(acc[i], (__m512bh)a, (__m512bh)a);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < PEAK_CHAINS;
                                  i++) __asm__ volatile("" ::"v"(acc[i]));
}

__attribute__((target("avx512f,avx512vnni"))) static void spin_int8(void)
{
    __m512i acc[PEAK_CHAINS], a = _mm512_set1_epi32(1);
    for (int i = 0; i < PEAK_CHAINS; i++) acc[i] = _mm512_setzero_si512();
    for (int s = 0; s < PEAK_STEPS; s++) {
        __asm__ volatile("" : "+v"(a));
        _Pragma("GCC unroll 16") for (int i = 0; i < PEAK_CHAINS; i++) acc[i] =
            _mm512_dpbusd_epi32(acc[i], a, a);
    }
    _Pragma("GCC unroll 16") for (int i = 0; i < PEAK_CHAINS;
                                  i++) __asm__ volatile("" ::"v"(acc[i]));
}

static double peak_rate(const struct bench *b, void (*spin)(void), double ops_per_step)
{
    double v[5];

    for (int r = 0; r < 5; r++) {
        const double start_s = now_s(b);
#pragma omp parallel num_threads(b->be.n_threads)
        spin();
        v[r] =
            ops_per_step * PEAK_CHAINS * PEAK_STEPS * b->be.n_threads / (now_s(b) - start_s) / 1e9;
    }
    return median(v, 5);
}
#endif

static void measure_peaks(struct bench *b)
{
#if defined(__x86_64__)
    if (ht_isa_best() < HT_ISA_AVX512BF16) return;
    b->peak_bf16 = peak_rate(b, spin_bf16, 64);
    b->peak_int8 = peak_rate(b, spin_int8, 128);
#endif
}

/* ---- the model's matrices ---- */

static void add(struct bench *b, const char *name, int64_t n, int64_t k, int count)
{
    if (count > 0) b->kinds[b->n_kinds++] = (struct kind){ name, n, k, count, NULL };
}

static void list_kinds(struct bench *b)
{
    const struct ht_model_config *m = &b->cfg.model;
    int n_attention = 0;

    for (int64_t i = 0; i < m->n_layers; i++) n_attention += m->layer_kind[i] == HT_LAYER_ATTENTION;
    const int n_mamba = (int)m->n_layers - n_attention;
    add(b, "in_proj", ht_in_proj_width(m), m->d_model, n_mamba);
    add(b, "out_proj", m->d_model, m->d_inner, n_mamba);
    add(b, "qkv", ht_qkv_width(m), m->d_model, n_attention);
    add(b, "o", m->d_model, m->n_heads * m->d_head, n_attention);
    add(b, "gate_up", 2 * m->d_ff, m->d_model, m->d_ff ? (int)m->n_layers : 0);
    add(b, "down", m->d_model, m->d_ff, m->d_ff ? (int)m->n_layers : 0);
    add(b, "head", m->vocab_size, m->d_model, 1);
}

/* One matrix of each kind is quantised, the others are copies at other addresses. */
static void fill(struct bench *b, enum ht_qformat f)
{
    size_t total = 0;

    for (int i = 0; i < b->n_kinds; i++)
        total +=
            (size_t)b->kinds[i].count * ht_qmatrix_bytes(f, b->group, b->kinds[i].n, b->kinds[i].k);
    check(ht_arena_create(&b->arena, "weights", total));
    for (int i = 0; i < b->n_kinds; i++) {
        struct kind *kd = &b->kinds[i];
        const double start_s = ht_time_s();
        float *w = malloc((size_t)(kd->n * kd->k) * sizeof *w);
        kd->q = calloc((size_t)kd->count, sizeof *kd->q);
        if (!w || !kd->q) check(HT_FAIL(HT_ERR_MEMORY, "no memory for %s", kd->name));
        for (int64_t e = 0; e < kd->n * kd->k; e += 4) {
            uint32_t u[4];
            ht_rng_philox(u, 1, (uint64_t)i, (uint64_t)e);
            for (int j = 0; j < 4 && e + j < kd->n * kd->k; j++) // four bytes: nearly normal
                w[e + j] = 1e-4f * (float)((int)(u[j] & 255) + (int)(u[j] >> 8 & 255) +
                                           (int)(u[j] >> 16 & 255) + (int)(u[j] >> 24) - 510);
        }
        const double filled_s = ht_time_s();
        for (int c = 0; c < kd->count; c++)
            check(ht_qmatrix_create(&kd->q[c], &b->arena, f, b->group, kd->n, kd->k));
        check(ht_qmatrix_set_rows(&kd->q[0], &b->be, 0, kd->n, w, HT_DTYPE_F32, kd->k));
        fprintf(stderr, "%s %s: random %.2f s, quantised %.2f s\n", ht_qformat_name(f), kd->name,
                filled_s - start_s, ht_time_s() - filled_s);
        for (int c = 1; c < kd->count; c++) memcpy(kd->q[c].data, kd->q[0].data, kd->q[0].bytes);
        free(w);
    }
}

static void clear(struct bench *b)
{
    for (int i = 0; i < b->n_kinds; i++) free(b->kinds[i].q);
    ht_arena_free(&b->arena);
}

static double pass(struct bench *b, int first, int last, int64_t m)
{
    const double start_s = now_s(b);

    for (int i = first; i <= last; i++)
        for (int c = 0; c < b->kinds[i].count; c++)
            check(ht_qgemm(&b->be, &(struct ht_qgemm_args){ .m = m,
                                                            .w = &b->kinds[i].q[c],
                                                            .x = b->x,
                                                            .ldx = b->kinds[i].k,
                                                            .y = b->y,
                                                            .ldy = b->kinds[i].n,
                                                            .alpha = 1.0f,
                                                            .precise = b->precise }));
    return now_s(b) - start_s;
}

static void measure(struct bench *b, enum ht_qformat f, int first, int last, int64_t m)
{
    double pass_s[MAX_REPEAT], rate[MAX_REPEAT], of_read[MAX_REPEAT];
    double n_bytes = 0, flop = 0;
    const unsigned char *from = b->kinds[first].q[0].data;

    for (int i = first; i <= last; i++) {
        const struct kind *kd = &b->kinds[i];
        n_bytes += (double)kd->q[0].bytes * kd->count;
        flop += 2.0 * (double)m * (double)kd->n * (double)kd->k * kd->count;
    }
    const int repeat = m > 64 && first != last ? 3 : b->repeat;
    pass(b, first, first == last ? last : first, m); // first touch, scratch
    for (int r = 0; r < repeat; r++) {
        rate[r] = read_rate(b, from, (size_t)n_bytes);
        pass_s[r] = pass(b, first, last, m);
        of_read[r] =
            n_bytes / pass_s[r] / 1e9 / rate[r]; // neighbours in time: a busy machine slows both
    }
    const double s = median(pass_s, repeat), read = median(rate, repeat);
    const double peak = f == HT_Q_BF16 ? b->peak_bf16 : b->peak_int8;
    printf(
        "{\"format\": \"%s\", \"group\": %d, \"precise\": %s, \"matrix\": \"%s\", \"n\": %" PRId64
        ", \"k\": %" PRId64 ", \"count\": %d, \"m\": %" PRId64
        ", \"threads\": %d, \"time\": \"%s\", \"ms\": %.3f, "
        "\"mib\": %.1f, \"gb_per_s\": %.1f, \"read_gb_per_s\": %.1f, \"of_read\": %.3f, "
        "\"gflop_per_s\": %.1f, \"peak_gop_per_s\": %.0f, \"of_peak\": %.3f}\n",
        ht_qformat_name(f), b->group, b->precise ? "true" : "false",
        first == last ? b->kinds[first].name : "all", first == last ? b->kinds[first].n : 0,
        first == last ? b->kinds[first].k : 0, first == last ? b->kinds[first].count : 0, m,
        b->be.n_threads, b->cpu_time ? "cpu" : "wall", 1e3 * s, n_bytes / 1048576.0,
        n_bytes / s / 1e9, read, median(of_read, repeat), flop / s / 1e9, peak,
        peak > 0 ? (b->precise && f != HT_Q_BF16 ? 2 : 1) * flop / s / 1e9 / peak : 0.0);
    fflush(stdout);
}

static int parse_list(int64_t *out, char *text)
{
    int n = 0;
    for (char *save, *t = strtok_r(text, ",", &save); t && n < MAX_LIST;
         t = strtok_r(NULL, ",", &save))
        out[n++] = strtoll(t, NULL, 10);
    return n;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        { "formats", 1, NULL, 'f' },  { "group", 1, NULL, 'g' },   { "rows", 1, NULL, 'r' },
        { "repeat", 1, NULL, 'n' },   { "threads", 1, NULL, 't' }, { "precise", 0, NULL, 'p' },
        { "cpu-time", 0, NULL, 'c' }, { NULL, 0, NULL, 0 }
    };
    static struct bench b = { .group = 32, .repeat = 7 };
    int64_t rows[MAX_LIST] = { 1, 4, 16, 512 }, most = 1, widest = 1;
    int n_rows = 4, threads = 0, opt;
    char all[] = "bf16,int8,int4,int4z", *formats = all;
    struct ht_recipe *recipe;

    ht_thread_limit_spinning(argv);
    while ((opt = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (opt) {
        case 'f': formats = optarg; break;
        case 'g': b.group = atoi(optarg); break;
        case 'r': n_rows = parse_list(rows, optarg); break;
        case 'n': b.repeat = atoi(optarg) < MAX_REPEAT ? atoi(optarg) : MAX_REPEAT; break;
        case 't': threads = atoi(optarg); break;
        case 'p': b.precise = true; break;
        case 'c': b.cpu_time = true; break;
        default: return 2;
        }
    }
    if (optind >= argc || b.repeat < 1) {
        fputs("usage: bench_quant_gemm RECIPE [section.key=value ...] [options]\n", stderr);
        return 2;
    }
    check(ht_recipe_load(&b.cfg, &recipe, argv[optind], argc - optind - 1, argv + optind + 1, 1));
    ht_recipe_free(recipe);
    check(ht_backend_create_cpu(&b.be, b.cpu_time ? 1 : threads, 0));
    list_kinds(&b);
    for (int i = 0; i < n_rows; i++) most = rows[i] > most ? rows[i] : most;
    size_t scratch = 0;
    for (int i = 0; i < b.n_kinds; i++) {
        const size_t need = ht_qgemm_scratch_bytes(most, b.kinds[i].k);
        scratch = need > scratch ? need : scratch;
        widest = b.kinds[i].n > widest ? b.kinds[i].n : widest;
        widest = b.kinds[i].k > widest ? b.kinds[i].k : widest;
    }
    check(ht_backend_reserve_scratch(&b.be, scratch));
    b.x = malloc((size_t)(most * widest) * sizeof *b.x);
    b.y = malloc((size_t)(most * widest) * sizeof *b.y);
    if (!b.x || !b.y) check(HT_FAIL(HT_ERR_MEMORY, "no memory for activations"));
    for (int64_t i = 0; i < most * widest; i++)
        b.x[i] = (float)(ht_rng_u64(2, 0, (uint64_t)i) % 2001) / 1000.0f - 1.0f;
    measure_peaks(&b);
    for (char *save, *t = strtok_r(formats, ",", &save); t; t = strtok_r(NULL, ",", &save)) {
        enum ht_qformat f;
        check(ht_qformat_parse(&f, t));
        fill(&b, f);
        for (int r = 0; r < n_rows; r++) {
            for (int i = 0; i < b.n_kinds; i++) measure(&b, f, i, i, rows[r]);
            measure(&b, f, 0, b.n_kinds - 1, rows[r]);
        }
        clear(&b);
    }
    free(b.x);
    free(b.y);
    ht_backend_free(&b.be);
    return 0;
}
