/* core/ops/gemm_cublaslt.cu: matrix products on CUDA through cuBLASLt (gemm.h).
 *
 * cuBLASLt thinks in columns: a row-major C = op(A) op(B) is its C^T = op(B)^T op(A)^T, so A and B
 * change places and keep their transposition flags. Sums are fp32 for both types (no TF32: fp32 is
 * what parity tests use).
 *
 * Per shape, the first call asks for algorithms and keeps the first one; with HT_GEMM_TUNE=1 it
 * times the kCandidates best (the only place that waits for the device) and keeps the fastest, also
 * in a file, so that later runs compute the same bits: $XDG_CACHE_HOME/hybridtrain/gemm-<device>-
 * <version>.txt, one line per shape. Never run on a GPU yet (docs/gpu-status.md).
 *
 * fp8 (gemm_fp8.h): the same with A and B^T as they stand, which is the one layout that tensor
 * cores of sm_90 take, and scales that the device reads when the product runs.
 *
 * The library (0.5 GB) is opened when the first CUDA backend multiplies, so programs start without
 * it and run on machines without it.
 */
#include "core/base/cuda_kernel.h"

#include <cublasLt.h>
#include <dlfcn.h>

extern "C" {
#include "core/base/file.h"
#include "core/ops/core_ops.h"
#include "core/ops/gemm_fp8_impl.h"
}

#ifndef HT_CUDA_LIBRARY_DIR
#define HT_CUDA_LIBRARY_DIR "."
#endif

#define LT_FUNCTIONS(f)                                                                            \
    f(cublasLtCreate) f(cublasLtDestroy) f(cublasLtGetVersion) f(cublasLtGetStatusString)          \
        f(cublasLtMatmul) f(cublasLtMatmulAlgoGetHeuristic) f(cublasLtMatmulDescCreate)            \
            f(cublasLtMatmulDescDestroy) f(cublasLtMatmulDescSetAttribute)                         \
                f(cublasLtMatrixLayoutCreate) f(cublasLtMatrixLayoutDestroy)                       \
                    f(cublasLtMatmulPreferenceCreate) f(cublasLtMatmulPreferenceDestroy)           \
                        f(cublasLtMatmulPreferenceSetAttribute)

constexpr size_t kWorkspaceBytes = (size_t)32 << 20; // what NVIDIA recommends for Hopper
constexpr int kCandidates = 8, kRepeats = 5;
/* ab_dtype of an fp8 product: kFp8 + format of A + 2 * format of B + 4 * fast. */
constexpr uint32_t kFp8 = 128;
constexpr int kSets = 256, kWays = 4; // as the CPU's cache: 1024 shapes

struct lt_api {
#define LT_DECLARE(name) decltype(&::name) name;
    LT_FUNCTIONS(LT_DECLARE)
};

struct gemm_key { // compared as bytes: no padding
    int64_t m, n, k, lda, ldb, ldc;
    uint32_t trans, ab_dtype, c_dtype, beta,
        align; // ab_dtype: also kFp8 + ...; align: log2 of A, B, C, 8 bits each
    uint32_t zero;
};
static_assert(sizeof(struct gemm_key) == 72, "a gap in gemm_key would be compared too");

struct gemm_entry {
    struct gemm_key key;
    uint64_t last_use; // 0: empty
    cublasLtMatmulDesc_t op;
    cublasLtMatrixLayout_t a, b, c; // as stored, in columns
    cublasLtMatmulAlgo_t algo;
    size_t workspace_bytes;
};

struct gemm_cache {
    void *library; // of dlopen
    struct lt_api lt;
    cublasLtHandle_t handle;
    struct ht_backend *be;
    const float *scale_a, *scale_b; // of the fp8 product at hand
    void *workspace;                // device memory; products run one after another on one stream
    bool tune;
    char path[512];   // of the file of tuned algorithms; "" without one
    char *tuned_text; // its content, or NULL
    uint64_t clock;
    struct gemm_entry entries[kSets][kWays];
};

static enum ht_status lt_check(const struct gemm_cache *g, cublasStatus_t s, const char *what)
{
    if (s == CUBLAS_STATUS_SUCCESS) return HT_OK;
    return HT_FAIL(s == CUBLAS_STATUS_NOT_SUPPORTED ? HT_ERR_UNSUPPORTED : HT_ERR_CUDA,
                   "gemm: cuBLASLt: %s: %s (%d)", what, g->lt.cublasLtGetStatusString(s), (int)s);
}

/* ---- library and cache ---- */

static enum ht_status open_library(struct gemm_cache *g)
{
    char name[64], path[512];

    snprintf(name, sizeof name, "libcublasLt.so.%d", CUBLAS_VER_MAJOR);
    g->library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!g->library) { // where it was when this was built
        snprintf(path, sizeof path, "%s/%s", HT_CUDA_LIBRARY_DIR, name);
        g->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    if (!g->library)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "gemm: %s; install the CUDA %d runtime libraries or name their folder in "
                       "LD_LIBRARY_PATH",
                       dlerror(), CUBLAS_VER_MAJOR);
#define LT_LOAD(function)                                                                          \
    *(void **)(&g->lt.function) = dlsym(g->library, #function);                                    \
    if (!g->lt.function) return HT_FAIL(HT_ERR_UNSUPPORTED, "gemm: %s has no " #function, name);
    LT_FUNCTIONS(LT_LOAD)
    return HT_OK;
}

/* Spaces of a device's name become dashes: "NVIDIA-H100-80GB-HBM3". */
static void name_tuned_file(struct gemm_cache *g, const char *device)
{
    const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
    char folder[384];

    if (cache && *cache)
        snprintf(folder, sizeof folder, "%s/hybridtrain", cache);
    else if (home && *home)
        snprintf(folder, sizeof folder, "%s/.cache/hybridtrain", home);
    else
        return;
    if (g->tune && ht_file_make_dirs(folder) != HT_OK) return; // then nothing is kept
    const int n = snprintf(g->path, sizeof g->path, "%s/gemm-%s-%zu.txt", folder, device,
                           g->lt.cublasLtGetVersion());
    if (n < 0 || (size_t)n >= sizeof g->path) g->path[0] = '\0';
    for (char *p = g->path; *p; p++)
        if (*p == ' ') *p = '-';
}

static void entry_clear(struct gemm_cache *g, struct gemm_entry *e)
{
    if (e->op) g->lt.cublasLtMatmulDescDestroy(e->op);
    if (e->a) g->lt.cublasLtMatrixLayoutDestroy(e->a);
    if (e->b) g->lt.cublasLtMatrixLayoutDestroy(e->b);
    if (e->c) g->lt.cublasLtMatrixLayoutDestroy(e->c);
    memset(e, 0, sizeof *e);
}

static void cache_free(void *p)
{
    struct gemm_cache *g = (struct gemm_cache *)p;

    if (!g) return;
    for (int s = 0; s < kSets; s++)
        for (int w = 0; w < kWays; w++) entry_clear(g, &g->entries[s][w]);
    if (g->handle) g->lt.cublasLtDestroy(g->handle);
    if (g->workspace) (void)cudaFree(g->workspace);
    if (g->library) dlclose(g->library);
    free(g->tuned_text);
    free(g);
}

static enum ht_status cache_get(struct gemm_cache **out, struct ht_backend *be)
{
    enum ht_status st = HT_OK;
    struct gemm_cache *g = (struct gemm_cache *)be->gemm;
    const char *tune = getenv("HT_GEMM_TUNE");
    size_t bytes;

    *out = g;
    if (g) return HT_OK;
    g = (struct gemm_cache *)calloc(1, sizeof *g);
    if (!g) return HT_FAIL(HT_ERR_MEMORY, "gemm: no memory for the cache (%zu bytes)", sizeof *g);
    HT_TRY_GOTO(st, done, open_library(g));
    HT_TRY_GOTO(st, done, lt_check(g, g->lt.cublasLtCreate(&g->handle), "create"));
    HT_TRY_GOTO(st, done, ht_backend_alloc(&g->workspace, be, "gemm workspace", kWorkspaceBytes));
    g->tune = tune && strcmp(tune, "1") == 0;
    name_tuned_file(g, ht_cuda_device_of(be)->name);
    if (g->path[0] && ht_file_exists(g->path))
        HT_TRY_GOTO(st, done, ht_file_read(&g->tuned_text, &bytes, g->path, (size_t)16 << 20));
    be->gemm = g; // owned by the backend from here on
    be->gemm_free = cache_free;
    *out = g;
    g = NULL;
done:
    cache_free(g);
    return st;
}

/* ---- tuned algorithms: "m n k lda ldb ldc trans ab c beta align  8 words in hexadecimal" ---- */

static int key_text(char *text, size_t n, const struct gemm_key *k)
{
    return snprintf(text, n, "%lld %lld %lld %lld %lld %lld %u %u %u %u %u ", (long long)k->m,
                    (long long)k->n, (long long)k->k, (long long)k->lda, (long long)k->ldb,
                    (long long)k->ldc, k->trans, k->ab_dtype, k->c_dtype, k->beta, k->align);
}

static bool tuned_find(const struct gemm_cache *g, struct gemm_entry *e)
{
    char key[256];
    const int n = key_text(key, sizeof key, &e->key);
    unsigned long long w[9];

    for (const char *line = g->tuned_text; line && *line;) {
        if (strncmp(line, key, (size_t)n) == 0 &&
            sscanf(line + n, "%llx %llx %llx %llx %llx %llx %llx %llx %llx", &w[0], &w[1], &w[2],
                   &w[3], &w[4], &w[5], &w[6], &w[7], &w[8]) == 9 &&
            w[8] <= kWorkspaceBytes) {
            for (int i = 0; i < 8; i++) e->algo.data[i] = (uint64_t)w[i];
            e->workspace_bytes = (size_t)w[8];
            return true;
        }
        line = strchr(line, '\n');
        if (line) line++;
    }
    return false;
}

/* The whole file is written anew, so that it is never read half written. */
static enum ht_status tuned_add(struct gemm_cache *g, const struct gemm_entry *e)
{
    char line[512];
    int n = key_text(line, sizeof line, &e->key);
    const size_t old = g->tuned_text ? strlen(g->tuned_text) : 0;

    for (int i = 0; i < 8; i++)
        n += snprintf(line + n, sizeof line - (size_t)n, "%llx ",
                      (unsigned long long)e->algo.data[i]);
    n += snprintf(line + n, sizeof line - (size_t)n, "%llx\n",
                  (unsigned long long)e->workspace_bytes);
    char *text = (char *)realloc(g->tuned_text, old + (size_t)n + 1);
    if (!text)
        return HT_FAIL(HT_ERR_MEMORY, "gemm: no memory for tuned algorithms (%zu bytes)", old);
    g->tuned_text = text;
    memcpy(text + old, line, (size_t)n + 1);
    return g->path[0] ? ht_file_publish(g->path, text, old + (size_t)n) : HT_OK;
}

/* ---- a shape's first call ---- */

static cudaDataType_t cuda_type(uint32_t d)
{
    if (d >= kFp8) return d == kFp8 + HT_FP8_E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_8F_E5M2;
    return d == HT_DTYPE_F32 ? CUDA_R_32F : CUDA_R_16BF;
}

/* The matrix `rows x cols` in row-major with stride ld is `cols x rows` in columns. */
static enum ht_status layout(struct gemm_cache *g, cublasLtMatrixLayout_t *out, uint32_t dtype,
                             int64_t rows, int64_t cols, int64_t ld)
{
    return lt_check(
        g,
        g->lt.cublasLtMatrixLayoutCreate(out, cuda_type(dtype), (uint64_t)cols, (uint64_t)rows, ld),
        "matrix layout");
}

static enum ht_status set_pointer(struct gemm_cache *g, struct gemm_entry *e,
                                  cublasLtMatmulDescAttributes_t which, const float *p)
{
    return lt_check(g, g->lt.cublasLtMatmulDescSetAttribute(e->op, which, &p, sizeof p), "scale");
}

/* Their A is our B. */
static enum ht_status set_scales(struct gemm_cache *g, struct gemm_entry *e)
{
    if (e->key.ab_dtype < kFp8) return HT_OK;
    HT_TRY(set_pointer(g, e, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, g->scale_b));
    return set_pointer(g, e, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, g->scale_a);
}

static enum ht_status multiply(struct gemm_cache *g, struct gemm_entry *e,
                               const struct ht_gemm_args *a, const cublasLtMatmulAlgo_t *algo,
                               size_t workspace_bytes)
{
    HT_TRY(set_scales(g, e));
    return lt_check(g,
                    g->lt.cublasLtMatmul(g->handle, e->op, &a->alpha, a->b, e->b, a->a, e->a,
                                         &a->beta, a->c, e->c, a->c, e->c, algo, g->workspace,
                                         workspace_bytes,
                                         (cudaStream_t)ht_cuda_device_of(g->be)->compute),
                    "matmul");
}

/* Median of kRepeats runs in milliseconds. With beta = 1 the product is added again and again: C is
 * restored from `saved` by the caller. */
static enum ht_status time_algorithm(struct gemm_cache *g, struct gemm_entry *e,
                                     const struct ht_gemm_args *a,
                                     const cublasLtMatmulHeuristicResult_t *r, float *ms)
{
    enum ht_status st = HT_OK;
    cudaStream_t stream = (cudaStream_t)ht_cuda_device_of(g->be)->compute;
    cudaEvent_t start = NULL, stop = NULL;
    float times[kRepeats];

    HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventCreate(&start), "event"));
    HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventCreate(&stop), "event"));
    HT_TRY_GOTO(st, done, multiply(g, e, a, &r->algo, r->workspaceSize)); // warm
    for (int i = 0; i < kRepeats; i++) {
        HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventRecord(start, stream), "event"));
        HT_TRY_GOTO(st, done, multiply(g, e, a, &r->algo, r->workspaceSize));
        HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventRecord(stop, stream), "event"));
        HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventSynchronize(stop), "event"));
        HT_TRY_GOTO(st, done, ht_cuda_check(cudaEventElapsedTime(&times[i], start, stop), "event"));
        for (int j = i; j > 0 && times[j] < times[j - 1]; j--) {
            const float t = times[j];
            times[j] = times[j - 1];
            times[j - 1] = t;
        }
    }
    *ms = times[kRepeats / 2];
done:
    if (start) cudaEventDestroy(start);
    if (stop) cudaEventDestroy(stop);
    return st;
}

/* Times the candidates with C as it is, then puts C back. */
static enum ht_status tune(struct gemm_cache *g, struct gemm_entry *e, const struct ht_gemm_args *a,
                           const cublasLtMatmulHeuristicResult_t *r, int n)
{
    enum ht_status st = HT_OK;
    const size_t bytes = (size_t)((a->m - 1) * a->ldc + a->n) * ht_dtype_bytes(a->c_dtype);
    void *saved = NULL;
    int best = 0;
    float best_ms = INFINITY;

    HT_TRY(ht_backend_alloc(&saved, g->be, "copy of C while tuning", bytes));
    HT_TRY_GOTO(st, done, ht_backend_copy(g->be, saved, a->c, bytes));
    for (int i = 0; i < n; i++) {
        float ms = INFINITY;
        if (r[i].state != CUBLAS_STATUS_SUCCESS) continue;
        HT_TRY_GOTO(st, done, time_algorithm(g, e, a, &r[i], &ms));
        if (ms < best_ms) best = i, best_ms = ms;
    }
    HT_TRY_GOTO(st, done, ht_backend_copy(g->be, a->c, saved, bytes));
    e->algo = r[best].algo;
    e->workspace_bytes = r[best].workspaceSize;
    st = tuned_add(g, e);
done:
    ht_backend_free_memory(g->be, saved);
    return st;
}

static enum ht_status choose_algorithm(struct gemm_cache *g, struct gemm_entry *e,
                                       const struct ht_gemm_args *a)
{
    enum ht_status st = HT_OK;
    cublasLtMatmulPreference_t pref = NULL;
    cublasLtMatmulHeuristicResult_t found[kCandidates];
    const cublasLtMatmulPreferenceAttributes_t which[3] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, // their B is our A
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES
    };
    int n = 0;

    if (tuned_find(g, e)) return HT_OK;
    HT_TRY(lt_check(g, g->lt.cublasLtMatmulPreferenceCreate(&pref), "preference"));
    HT_TRY_GOTO(st, done,
                lt_check(g,
                         g->lt.cublasLtMatmulPreferenceSetAttribute(
                             pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                             sizeof kWorkspaceBytes),
                         "workspace preference"));
    for (int i = 0; i < 3; i++) {
        const uint32_t bytes = 1u << (e->key.align >> 8 * i & 0xff);
        HT_TRY_GOTO(st, done,
                    lt_check(g,
                             g->lt.cublasLtMatmulPreferenceSetAttribute(pref, which[i], &bytes,
                                                                        sizeof bytes),
                             "alignment preference"));
        if (i == 2)
            HT_TRY_GOTO(st, done,
                        lt_check(g,
                                 g->lt.cublasLtMatmulPreferenceSetAttribute(
                                     pref, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &bytes,
                                     sizeof bytes),
                                 "alignment preference"));
    }
    HT_TRY_GOTO(st, done,
                lt_check(g,
                         g->lt.cublasLtMatmulAlgoGetHeuristic(g->handle, e->op, e->b, e->a, e->c,
                                                              e->c, pref, kCandidates, found, &n),
                         "choosing an algorithm"));
    if (n == 0) {
        st = HT_FAIL(HT_ERR_UNSUPPORTED,
                     "gemm: cuBLASLt has no algorithm for m %lld, n %lld, k %lld in %s",
                     (long long)a->m, (long long)a->n, (long long)a->k,
                     e->key.ab_dtype >= kFp8 ? "fp8" : ht_dtype_name(a->ab_dtype));
        goto done;
    }
    e->algo = found[0].algo;
    e->workspace_bytes = found[0].workspaceSize;
    if (g->tune) st = tune(g, e, a, found, n);
done:
    g->lt.cublasLtMatmulPreferenceDestroy(pref);
    return st;
}

static enum ht_status entry_fill(struct gemm_cache *g, struct gemm_entry *e,
                                 const struct ht_gemm_args *a)
{
    const cublasOperation_t op_a = a->trans_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasOperation_t op_b = a->trans_b ? CUBLAS_OP_T : CUBLAS_OP_N;

    HT_TRY(lt_check(g, g->lt.cublasLtMatmulDescCreate(&e->op, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                    "operation"));
    HT_TRY(lt_check(g,
                    g->lt.cublasLtMatmulDescSetAttribute(e->op, CUBLASLT_MATMUL_DESC_TRANSA, &op_b,
                                                         sizeof op_b),
                    "transposition"));
    HT_TRY(lt_check(g,
                    g->lt.cublasLtMatmulDescSetAttribute(e->op, CUBLASLT_MATMUL_DESC_TRANSB, &op_a,
                                                         sizeof op_a),
                    "transposition"));
    const uint32_t ab = e->key.ab_dtype;
    const int8_t fast = ab >= kFp8 && (ab - kFp8) / 4 == 1;
    if (ab >= kFp8)
        HT_TRY(lt_check(g,
                        g->lt.cublasLtMatmulDescSetAttribute(e->op, CUBLASLT_MATMUL_DESC_FAST_ACCUM,
                                                             &fast, sizeof fast),
                        "accumulation"));
    HT_TRY(set_scales(g, e));
    HT_TRY(layout(g, &e->a, ab < kFp8 ? ab : kFp8 + (ab & 1u), a->trans_a ? a->k : a->m,
                  a->trans_a ? a->m : a->k, a->lda));
    HT_TRY(layout(g, &e->b, ab < kFp8 ? ab : kFp8 + (ab >> 1 & 1u), a->trans_b ? a->n : a->k,
                  a->trans_b ? a->k : a->n, a->ldb));
    HT_TRY(layout(g, &e->c, e->key.c_dtype, a->m, a->n, a->ldc));
    return choose_algorithm(g, e, a);
}

/* The entry of a key, made on its first use; the least recently used of its set gives way. */
static enum ht_status entry_get(struct gemm_entry **out, struct gemm_cache *g,
                                const struct gemm_key *k, const struct ht_gemm_args *a)
{
    const unsigned char *bytes = (const unsigned char *)k;
    uint32_t h = 2166136261u; // FNV-1a
    struct gemm_entry *oldest = NULL;

    for (size_t i = 0; i < sizeof *k; i++) h = (h ^ bytes[i]) * 16777619u;
    struct gemm_entry *set = g->entries[(h ^ h >> 15) % kSets];
    g->clock++;
    for (int w = 0; w < kWays; w++) {
        if (set[w].last_use && memcmp(&set[w].key, k, sizeof *k) == 0) {
            set[w].last_use = g->clock;
            *out = &set[w];
            return HT_OK;
        }
        if (!oldest || set[w].last_use < oldest->last_use) oldest = &set[w];
    }
    *out = oldest;
    entry_clear(g, oldest);
    oldest->key = *k;
    const enum ht_status st = entry_fill(g, oldest, a);
    if (st != HT_OK)
        entry_clear(g, oldest);
    else
        oldest->last_use = g->clock;
    return st;
}

/* log2 of the largest power of two up to 256 that divides the address. */
static uint32_t alignment(const void *p)
{
    uint32_t n = 0;
    while (n < 8 && ((uintptr_t)p >> n & 1) == 0) n++;
    return n;
}

/* Through the entry of this shape, which is made on its first use. */
static enum ht_status run_product(struct gemm_cache *g, const struct ht_gemm_args *a,
                                  uint32_t ab_dtype)
{
    struct gemm_entry *e;
    struct gemm_key key = {};

    key.m = a->m, key.n = a->n, key.k = a->k;
    key.lda = a->lda, key.ldb = a->ldb, key.ldc = a->ldc;
    key.trans = (a->trans_a ? 1u : 0u) | (a->trans_b ? 2u : 0u);
    key.ab_dtype = ab_dtype;
    key.c_dtype = (uint32_t)a->c_dtype;
    key.beta = a->beta != 0.0f;
    key.align = alignment(a->a) | alignment(a->b) << 8 | alignment(a->c) << 16;
    HT_TRY(entry_get(&e, g, &key, a));
    return multiply(g, e, a, &e->algo, e->workspace_bytes);
}

static enum ht_status zero_c(struct ht_backend *be, const struct ht_gemm_args *a)
{
    const size_t bytes = ht_dtype_bytes(a->c_dtype);

    if (a->beta != 0.0f) return HT_OK;
    return ht_cuda_check(cudaMemset2DAsync(a->c, (size_t)a->ldc * bytes, 0, (size_t)a->n * bytes,
                                           (size_t)a->m,
                                           (cudaStream_t)ht_cuda_device_of(be)->compute),
                         "gemm: zero");
}

extern "C" enum ht_status ht_gemm_cuda(struct ht_backend *be, const struct ht_gemm_args *a)
{
    struct gemm_cache *g;

    if (a->k == 0) return zero_c(be, a); // an empty sum
    HT_TRY(cache_get(&g, be));
    g->be = be;
    return run_product(g, a, (uint32_t)a->ab_dtype);
}

extern "C" enum ht_status ht_gemm_fp8_cuda(struct ht_backend *be, const struct ht_gemm_fp8_args *a)
{
    struct gemm_cache *g;
    struct ht_gemm_args p = {};

    p.m = a->m, p.n = a->n, p.k = a->k;
    p.trans_b = true;
    p.c_dtype = a->c_dtype;
    p.a = a->a, p.b = a->b, p.c = a->c;
    p.lda = p.ldb = a->k;
    p.ldc = a->n;
    p.alpha = 1.0f;
    p.beta = a->beta;
    if (a->k == 0) return zero_c(be, &p);
    HT_TRY(cache_get(&g, be));
    g->be = be;
    g->scale_a = a->scale_a;
    g->scale_b = a->scale_b;
    return run_product(
        g, &p, kFp8 + (uint32_t)a->a_format + 2u * (uint32_t)a->b_format + (a->fast ? 4u : 0u));
}
