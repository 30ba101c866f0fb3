/* core/ops/gemm_onednn.c: products through oneDNN 2.6, with its primitives kept per shape.
 *
 * Creating a primitive compiles code (0.2 to 2 ms), so each is kept until its place is needed.
 * oneDNN's scratchpad is one buffer that all primitives share; it grows only when a new shape
 * appears.
 *
 * On a 2-core Zen 5 VM, bf16: y = x W^T runs at 0.84 to 0.9 TFLOP/s, a weight gradient (trans_a,
 * beta = 1, into fp32) at 0.74 to 0.78. Turning both operands of the latter in scratch first was
 * tried and lost (0.54 to 0.74 beside 0.67 to 0.74 in the same minutes): the passes over A and B
 * cost what the layout gives.
 */
#include <assert.h>
#include <dnnl.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "core/ops/core_ops.h"

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

enum ht_status ht_gemm_onednn(struct ht_backend *be, const struct ht_gemm_args *a)
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
