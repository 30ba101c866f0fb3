/* core/ops/gemm_cpu.c: matrix products on the CPU.
 *
 * Three ways, chosen by pick_path:
 *   gemv     few rows of A against W stored [out, in] (decode): bound by reading W, see gemv_cpu.c
 *   oneDNN   everything else in fp32, and bf16 where the CPU has AVX512-BF16
 *   widened  bf16 on older CPUs, where oneDNN 2.6 emulates or falls back to plain loops: tiles of A
 * and B are converted to fp32 in scratch and go through oneDNN's fp32 product
 *
 * Weight gradients (trans_a, beta = 1, bf16 into fp32) run at 0.74 to 0.78 TFLOP/s on a 2-core Zen
 * 5 VM, y = x W^T at 0.84 to 0.9. Turning both operands in scratch first was tried and lost (0.54
 * to 0.74 beside 0.67 to 0.74 in the same minutes): the passes over A and B cost what the better
 * layout gives.
 *
 * Creating a oneDNN primitive compiles code (0.2 to 2 ms), so primitives are kept per shape.
 * oneDNN's own scratchpad is one buffer that all primitives share; it grows only when a new shape
 * appears.
 */
#include <assert.h>
#include <dnnl.h>
#include <inttypes.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/core_ops.h"

enum gemm_path { PATH_GEMV, PATH_ONEDNN, PATH_WIDENED };

static enum gemm_path pick_path(const struct ht_backend *be, const struct ht_gemm_args *a)
{
    const int64_t few = a->ab_dtype == HT_DTYPE_BF16 ? HT_GEMV_MAX_M_BF16 : HT_GEMV_MAX_M_F32;

    if (a->trans_b && !a->trans_a && a->m <= few) return PATH_GEMV;
    if (a->ab_dtype == HT_DTYPE_BF16 && be->isa < HT_ISA_AVX512BF16) return PATH_WIDENED;
    return PATH_ONEDNN;
}

/* ---- cache of primitives ---- */

struct gemm_key { // compared as bytes: no padding between or after the fields
    int64_t m, n, k, lda, ldb, ldc;
    uint32_t trans, ab_dtype, c_dtype, beta, alpha_bits, n_threads;
};
static_assert(sizeof(struct gemm_key) == 72, "a gap in gemm_key would be compared too");

struct gemm_entry {
    struct gemm_key key;
    uint64_t last_use;              // 0: empty
    dnnl_primitive_t primitive;     // owned
    dnnl_memory_t a, b, c, scratch; // owned, their data pointers set per call
};

enum {
    SETS = 256,
    WAYS = 4
}; // a serving run meets a new m for every prompt length: keep 1024 shapes

struct gemm_cache {
    dnnl_engine_t engine;
    dnnl_stream_t stream;
    void *scratch; // shared by all primitives: they run one after another
    size_t scratch_bytes;
    uint64_t clock;
    struct gemm_entry entries[SETS][WAYS];
};

static const char *dnnl_name(dnnl_status_t s)
{
    switch (s) {
    case dnnl_success: return "success";
    case dnnl_out_of_memory: return "out of memory";
    case dnnl_invalid_arguments: return "invalid arguments";
    case dnnl_unimplemented: return "unimplemented";
    case dnnl_runtime_error: return "runtime error";
    default: return "unknown status";
    }
}

static enum ht_status dnnl_check(dnnl_status_t s, const char *what)
{
    if (s == dnnl_success) return HT_OK;
    return HT_FAIL(s == dnnl_out_of_memory ? HT_ERR_MEMORY : HT_ERR_UNSUPPORTED,
                   "gemm: oneDNN: %s: %s (%d)", what, dnnl_name(s), (int)s);
}

static void entry_clear(struct gemm_entry *e)
{
    if (e->primitive) dnnl_primitive_destroy(e->primitive);
    if (e->a) dnnl_memory_destroy(e->a);
    if (e->b) dnnl_memory_destroy(e->b);
    if (e->c) dnnl_memory_destroy(e->c);
    if (e->scratch) dnnl_memory_destroy(e->scratch);
    *e = (struct gemm_entry){ 0 };
}

static void cache_free(void *p)
{
    struct gemm_cache *g = p;

    if (!g) return;
    for (int s = 0; s < SETS; s++)
        for (int w = 0; w < WAYS; w++) entry_clear(&g->entries[s][w]);
    if (g->stream) dnnl_stream_destroy(g->stream);
    if (g->engine) dnnl_engine_destroy(g->engine);
    free(g->scratch);
    free(g);
}

static enum ht_status cache_get(struct gemm_cache **out, struct ht_backend *be)
{
    enum ht_status st = HT_OK;
    struct gemm_cache *g = be->gemm;

    *out = g;
    if (g) return HT_OK;
    g = calloc(1, sizeof *g);
    if (!g)
        return HT_FAIL(HT_ERR_MEMORY, "gemm: no memory for the cache of primitives (%zu bytes)",
                       sizeof *g);
    HT_TRY_GOTO(st, done, dnnl_check(dnnl_engine_create(&g->engine, dnnl_cpu, 0), "engine"));
    HT_TRY_GOTO(
        st, done,
        dnnl_check(dnnl_stream_create(&g->stream, g->engine, dnnl_stream_default_flags), "stream"));
    be->gemm = g; // owned by the backend from here on
    be->gemm_free = cache_free;
    *out = g;
    g = NULL;
done:
    cache_free(g);
    return st;
}

static enum ht_status reserve_scratch(struct gemm_cache *g, size_t bytes)
{
    if (bytes <= g->scratch_bytes) return HT_OK;
    const size_t rounded = (bytes + 4095) & ~(size_t)4095;
    void *p = aligned_alloc(4096, rounded);
    if (!p) return HT_FAIL(HT_ERR_MEMORY, "gemm: no memory for a scratchpad (%zu bytes)", rounded);
    free(g->scratch);
    g->scratch = p;
    g->scratch_bytes = rounded;
    return HT_OK;
}

enum ht_status ht_gemm_own_scratch(void **out, struct ht_backend *be, size_t bytes)
{
    struct gemm_cache *g;

    *out = NULL;
    HT_TRY(cache_get(&g, be));
    HT_TRY(reserve_scratch(g, bytes));
    *out = g->scratch;
    return HT_OK;
}

static dnnl_data_type_t dnnl_type(uint32_t d)
{
    return d == HT_DTYPE_F32 ? dnnl_f32 : dnnl_bf16;
}

static enum ht_status matrix_desc(dnnl_memory_desc_t *d, uint32_t dtype, int64_t rows, int64_t cols,
                                  int64_t ld, bool transposed)
{
    const dnnl_dims_t dims = { rows, cols };
    const dnnl_dims_t plain = { ld, 1 }, turned = { 1, ld };
    return dnnl_check(
        dnnl_memory_desc_init_by_strides(d, 2, dims, dnnl_type(dtype), transposed ? turned : plain),
        "matrix description");
}

/* alpha as an output scale, beta = 1 as a sum post-op: both inside the product's last pass over C.
 */
static enum ht_status set_attributes(dnnl_primitive_attr_t attr, dnnl_post_ops_t post,
                                     const struct gemm_key *k)
{
    float alpha;

    HT_TRY(dnnl_check(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user),
                      "scratchpad mode"));
    memcpy(&alpha, &k->alpha_bits, sizeof alpha);
    if (alpha != 1.0f)
        HT_TRY(
            dnnl_check(dnnl_primitive_attr_set_output_scales(attr, 1, 0, &alpha), "output scale"));
    if (!k->beta) return HT_OK;
    HT_TRY(dnnl_check(dnnl_post_ops_append_sum(post, 1.0f), "sum post-op"));
    return dnnl_check(dnnl_primitive_attr_set_post_ops(attr, post), "post-ops");
}

static enum ht_status entry_create(struct gemm_entry *e, struct gemm_cache *g,
                                   const struct gemm_key *k)
{
    enum ht_status st = HT_OK;
    dnnl_memory_desc_t a, b, c;
    dnnl_matmul_desc_t op;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t post = NULL;
    dnnl_primitive_desc_t pd = NULL;

    HT_TRY_GOTO(st, done, matrix_desc(&a, k->ab_dtype, k->m, k->k, k->lda, k->trans & 1));
    HT_TRY_GOTO(st, done, matrix_desc(&b, k->ab_dtype, k->k, k->n, k->ldb, k->trans & 2));
    HT_TRY_GOTO(st, done, matrix_desc(&c, k->c_dtype, k->m, k->n, k->ldc, false));
    HT_TRY_GOTO(st, done, dnnl_check(dnnl_primitive_attr_create(&attr), "attributes"));
    HT_TRY_GOTO(st, done, dnnl_check(dnnl_post_ops_create(&post), "post-ops"));
    HT_TRY_GOTO(st, done, set_attributes(attr, post, k));
    HT_TRY_GOTO(st, done, dnnl_check(dnnl_matmul_desc_init(&op, &a, &b, NULL, &c), "matmul"));
    HT_TRY_GOTO(st, done,
                dnnl_check(dnnl_primitive_desc_create(&pd, &op, attr, g->engine, NULL), "matmul"));
    const dnnl_memory_desc_t *sd = dnnl_primitive_desc_query_md(pd, dnnl_query_scratchpad_md, 0);
    HT_TRY_GOTO(st, done, reserve_scratch(g, dnnl_memory_desc_get_size(sd)));
    HT_TRY_GOTO(st, done, dnnl_check(dnnl_primitive_create(&e->primitive, pd), "matmul"));
    HT_TRY_GOTO(st, done,
                dnnl_check(dnnl_memory_create(&e->a, &a, g->engine, DNNL_MEMORY_NONE), "A"));
    HT_TRY_GOTO(st, done,
                dnnl_check(dnnl_memory_create(&e->b, &b, g->engine, DNNL_MEMORY_NONE), "B"));
    HT_TRY_GOTO(st, done,
                dnnl_check(dnnl_memory_create(&e->c, &c, g->engine, DNNL_MEMORY_NONE), "C"));
    HT_TRY_GOTO(
        st, done,
        dnnl_check(dnnl_memory_create(&e->scratch, sd, g->engine, DNNL_MEMORY_NONE), "scratchpad"));
    e->key = *k;
done:
    if (pd) dnnl_primitive_desc_destroy(pd);
    if (post) dnnl_post_ops_destroy(post);
    if (attr) dnnl_primitive_attr_destroy(attr);
    if (st != HT_OK) entry_clear(e);
    return st;
}

/* The entry of a key, made on its first use; the least recently used of its set gives way. */
static enum ht_status entry_get(struct gemm_entry **out, struct gemm_cache *g,
                                const struct gemm_key *k)
{
    const unsigned char *bytes = (const unsigned char *)k;
    uint32_t h = 2166136261u; // FNV-1a
    struct gemm_entry *oldest = NULL;

    for (size_t i = 0; i < sizeof *k; i++) h = (h ^ bytes[i]) * 16777619u;
    struct gemm_entry *set = g->entries[(h ^ h >> 15) % SETS];
    g->clock++;
    for (int w = 0; w < WAYS; w++) {
        if (set[w].last_use && memcmp(&set[w].key, k, sizeof *k) == 0) {
            set[w].last_use = g->clock;
            *out = &set[w];
            return HT_OK;
        }
        if (!oldest || set[w].last_use < oldest->last_use) oldest = &set[w];
    }
    *out = oldest;
    entry_clear(oldest);
    HT_TRY(entry_create(oldest, g, k));
    oldest->last_use = g->clock;
    return HT_OK;
}

static enum ht_status run_onednn(struct ht_backend *be, const struct ht_gemm_args *a)
{
    struct gemm_cache *g;
    struct gemm_entry *e;
    struct gemm_key key = {
        .m = a->m,
        .n = a->n,
        .k = a->k,
        .lda = a->lda,
        .ldb = a->ldb,
        .ldc = a->ldc,
        .trans = (a->trans_a ? 1u : 0u) | (a->trans_b ? 2u : 0u),
        .ab_dtype = (uint32_t)a->ab_dtype,
        .c_dtype = (uint32_t)a->c_dtype,
        .beta = a->beta != 0.0f,
        .n_threads = (uint32_t)be->n_threads,
    };

    memcpy(&key.alpha_bits, &a->alpha, sizeof a->alpha);
    // oneDNN divides the work by OpenMP's setting of the calling thread, not by an argument
    if (omp_get_max_threads() != be->n_threads) omp_set_num_threads(be->n_threads);
    HT_TRY(cache_get(&g, be));
    HT_TRY(entry_get(&e, g, &key));
    // the casts drop const: the C interface of oneDNN has one type for inputs and outputs
    HT_TRY(dnnl_check(dnnl_memory_set_data_handle(e->a, (void *)(uintptr_t)a->a), "A"));
    HT_TRY(dnnl_check(dnnl_memory_set_data_handle(e->b, (void *)(uintptr_t)a->b), "B"));
    HT_TRY(dnnl_check(dnnl_memory_set_data_handle(e->c, a->c), "C"));
    HT_TRY(dnnl_check(dnnl_memory_set_data_handle(e->scratch, g->scratch), "scratchpad"));
    const dnnl_exec_arg_t args[] = { { DNNL_ARG_SRC, e->a },
                                     { DNNL_ARG_WEIGHTS, e->b },
                                     { DNNL_ARG_DST, e->c },
                                     { DNNL_ARG_SCRATCHPAD, e->scratch } };
    HT_TRY(dnnl_check(dnnl_primitive_execute(e->primitive, g->stream, 4, args), "execute"));
    return dnnl_check(dnnl_stream_wait(g->stream), "wait");
}

/* ---- bf16 without AVX512-BF16 ---- */

enum { TILE_M = 256, TILE_N = 512, TILE_K = 2048 }; // 6.5 MiB of scratch in fp32

static int64_t min64(int64_t x, int64_t y)
{
    return x < y ? x : y;
}

/* dst (rows, cols) fp32 = the same part of a stored matrix of leading dimension ld. */
static void widen(struct ht_backend *be, float *dst, const ht_bf16 *src, int64_t rows, int64_t cols,
                  int64_t ld)
{
#pragma omp parallel for num_threads(be->n_threads) schedule(static) if (rows * cols > 16384)
    for (int64_t r = 0; r < rows; r++)
        ht_convert(dst + r * cols, HT_DTYPE_F32, src + r * ld, HT_DTYPE_BF16, cols);
}

/* One tile of C: its sum over k in fp32, then into C. c32 has TILE_M x TILE_N elements. */
static enum ht_status widened_tile(struct ht_backend *be, const struct ht_gemm_args *a, float *a32,
                                   float *b32, float *c32, int64_t i0, int64_t j0)
{
    const int64_t m = min64(TILE_M, a->m - i0), n = min64(TILE_N, a->n - j0);
    const ht_bf16 *src_a = a->a, *src_b = a->b;

    for (int64_t k0 = 0; k0 < a->k; k0 += TILE_K) {
        const int64_t k = min64(TILE_K, a->k - k0);
        if (a->trans_a)
            widen(be, a32, src_a + k0 * a->lda + i0, k, m, a->lda);
        else
            widen(be, a32, src_a + i0 * a->lda + k0, m, k, a->lda);
        if (a->trans_b)
            widen(be, b32, src_b + j0 * a->ldb + k0, n, k, a->ldb);
        else
            widen(be, b32, src_b + k0 * a->ldb + j0, k, n, a->ldb);
        const struct ht_gemm_args tile = {
            .m = m,
            .n = n,
            .k = k,
            .trans_a = a->trans_a,
            .trans_b = a->trans_b,
            .ab_dtype = HT_DTYPE_F32,
            .c_dtype = HT_DTYPE_F32,
            .a = a32,
            .lda = a->trans_a ? m : k,
            .b = b32,
            .ldb = a->trans_b ? k : n,
            .c = c32,
            .ldc = n,
            .alpha = 1.0f,
            .beta = k0 > 0 ? 1.0f : 0.0f,
        };
        HT_TRY(run_onednn(be, &tile));
    }
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) {
            const int64_t o = (i0 + i) * a->ldc + j0 + j;
            const float old = a->beta != 0.0f ? ht_load_f32(a->c, o, a->c_dtype) : 0.0f;
            ht_store_f32(a->c, o, a->c_dtype, a->alpha * c32[i * n + j] + old);
        }
    return HT_OK;
}

static enum ht_status run_widened(struct ht_backend *be, const struct ht_gemm_args *a)
{
    enum ht_status st = HT_OK;
    const size_t mark = ht_arena_mark(&be->scratch);
    const int64_t m = min64(TILE_M, a->m), n = min64(TILE_N, a->n), k = min64(TILE_K, a->k);
    void *a32, *b32, *c32;

    HT_TRY_GOTO(st, done, ht_arena_take(&a32, &be->scratch, (size_t)(m * k) * sizeof(float)));
    HT_TRY_GOTO(st, done, ht_arena_take(&b32, &be->scratch, (size_t)(k * n) * sizeof(float)));
    HT_TRY_GOTO(st, done, ht_arena_take(&c32, &be->scratch, (size_t)(m * n) * sizeof(float)));
    for (int64_t i = 0; i < a->m; i += TILE_M)
        for (int64_t j = 0; j < a->n; j += TILE_N)
            HT_TRY_GOTO(st, done, widened_tile(be, a, a32, b32, c32, i, j));
done:
    ht_arena_reset(&be->scratch, mark);
    return st;
}

size_t ht_gemm_scratch_bytes(int64_t m, int64_t n, int64_t k, enum ht_dtype ab_dtype)
{
    if (ab_dtype == HT_DTYPE_F32) return 0;
    m = min64(TILE_M, m);
    n = min64(TILE_N, n);
    k = min64(TILE_K, k);
    return ht_arena_bytes((size_t)(m * k) * sizeof(float)) +
           ht_arena_bytes((size_t)(k * n) * sizeof(float)) +
           ht_arena_bytes((size_t)(m * n) * sizeof(float));
}

/* ---- */

enum ht_status ht_gemm_cpu(struct ht_backend *be, const struct ht_gemm_args *a)
{
    if (a->k == 0) { // an empty sum
        if (a->beta == 0.0f)
            for (int64_t i = 0; i < a->m; i++)
                memset((char *)a->c + (size_t)(i * a->ldc) * ht_dtype_bytes(a->c_dtype), 0,
                       (size_t)a->n * ht_dtype_bytes(a->c_dtype));
        return HT_OK;
    }
    switch (pick_path(be, a)) {
    case PATH_GEMV: return ht_core_ops_get(HT_BACKEND_CPU)->gemv[be->isa](be, a);
    case PATH_WIDENED: return run_widened(be, a);
    case PATH_ONEDNN: break;
    }
    return run_onednn(be, a);
}
