/* core/ops/gemm_fp8_cuda.cu: bf16 matrices to fp8 with one scale each (gemm_fp8.h).
 *
 *   most  = max |x|                            fp8_most_kernel: one maximum per block
 *   scale = 2^s, the smallest that most fits   fp8_quantise_kernel: every block from the maxima
 *   codes = round(x / scale), codes_t = its transpose
 *
 * Bound by memory: x is read twice (the second time from L2 where it fits: 50 MB on H100), one byte
 * per element and order is written. Floor per element: 4 bytes read, 1 or 2 written. Maxima are
 * taken of the bits without the sign, as integers: infinity and NaN are larger than every number,
 * and the order of blocks does not matter.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/gemm_fp8_impl.h"
}

namespace {

constexpr int kThreads = 256, kMaxBlocks = 256;
constexpr int kTile = 64, kPitch = kTile + 4; // bytes of a row in shared memory: banks alternate
static_assert(kMaxBlocks * sizeof(uint32_t) <= HT_FP8_QUANTISE_SCRATCH_BYTES, "scratch");
static_assert(kMaxBlocks == kThreads, "a thread reads one maximum");

static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Largest of v over the block, in every thread. */
static __device__ __forceinline__ uint32_t block_largest(uint32_t v)
{
    HT_SHARED(uint32_t, part, [kThreads / kWarp]);
    for (int o = kWarp / 2; o > 0; o >>= 1) v = larger(v, __shfl_xor_sync(kAllLanes, v, o));
    if (threadIdx.x % kWarp == 0) part[threadIdx.x / kWarp] = v;
    __syncthreads();
    uint32_t most = part[0];
    for (int i = 1; i < kThreads / kWarp; i++) most = larger(most, part[i]);
    return most;
}

__global__ void __launch_bounds__(kThreads)
    fp8_most_kernel(uint32_t *most, const uint4 *x, int64_t n_vectors)
{
    uint32_t v = 0;

    for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < n_vectors;
         i += (int64_t)gridDim.x * kThreads) {
        const uint4 u = x[i];
        const uint32_t words[4] = { u.x, u.y, u.z, u.w };
#pragma unroll
        for (int j = 0; j < 4; j++)
            v = larger(v, larger(words[j] << 16 & 0x7fff0000u, words[j] & 0x7fff0000u));
    }
    v = block_largest(v);
    if (threadIdx.x == 0) most[blockIdx.x] = v;
}

/* Codes of lo (in the lower byte) and hi. */
template <int kFormat>
static __device__ __forceinline__ uint32_t fp8x2(float lo, float hi)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t codes;
    if constexpr (kFormat == HT_FP8_E4M3)
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
    else
        asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(hi), "f"(lo));
    return codes;
#else
    return ht_fp8_from_f32(lo, (enum ht_fp8)kFormat) |
           (uint32_t)ht_fp8_from_f32(hi, (enum ht_fp8)kFormat) << 8;
#endif
}

/* A tile of 64 x 64: a thread rounds 16 neighbours of a row, and writes 16 of a column. */
template <int kFormat>
__global__ void __launch_bounds__(kThreads)
    fp8_quantise_kernel(uint8_t *codes, uint8_t *codes_t, float *scale, const bf16 *x, int64_t rows,
                        int64_t cols, const uint32_t *mosts, int n_mosts)
{
    HT_SHARED(uint32_t, tile, [kTile * kPitch / 4]);
    const int thread = (int)threadIdx.x, line = thread / 4, chunk = thread % 4 * 16;
    const int64_t n_across = (cols + kTile - 1) / kTile;
    const int64_t row0 = blockIdx.x / n_across * kTile, col0 = blockIdx.x % n_across * kTile;
    const uint32_t most = block_largest(thread < n_mosts ? mosts[thread] : 0u);
    float inverse = 1.0f, unit = 1.0f;

    if (most >= 0x7f800000u) {
        inverse = unit = NAN;
    } else if (most > 0u) {
        const int s = ht_fp8_scale_log2(__uint_as_float(most), (enum ht_fp8)kFormat);
        inverse = ht_fp8_power(-s);
        unit = ht_fp8_power(s);
    }
    if (blockIdx.x == 0 && thread == 0) *scale = unit;

    if (row0 + line < rows && col0 + chunk < cols) {
        const int64_t at = (row0 + line) * cols + col0 + chunk;
        float v[16];
        uint32_t word[4];
        load_n(v, x + at);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            word[i] = fp8x2<kFormat>(v[4 * i] * inverse, v[4 * i + 1] * inverse) |
                      fp8x2<kFormat>(v[4 * i + 2] * inverse, v[4 * i + 3] * inverse) << 16;
            tile[(line * kPitch + chunk) / 4 + i] = word[i];
        }
        if (codes)
            *reinterpret_cast<uint4 *>(codes + at) = make_uint4(word[0], word[1], word[2], word[3]);
    }
    if (!codes_t) return; // the whole block
    __syncthreads();
    if (col0 + line < cols && row0 + chunk < rows) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            word[i] = 0u;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int byte = (chunk + 4 * i + j) * kPitch + line;
                word[i] |= (tile[byte / 4] >> byte % 4 * 8 & 0xffu) << 8 * j;
            }
        }
        *reinterpret_cast<uint4 *>(codes_t + (col0 + line) * rows + row0 + chunk) =
            make_uint4(word[0], word[1], word[2], word[3]);
    }
}

} // namespace

extern "C" enum ht_status ht_fp8_quantise_cuda(struct ht_backend *be,
                                               const struct ht_fp8_quantise_args *a)
{
    const int64_t n_vectors = a->rows * a->cols / 8;
    const int64_t wanted = ceil_div(n_vectors, 4 * kThreads);
    const int n_mosts = (int)(wanted < 1 ? 1 : wanted < kMaxBlocks ? wanted : kMaxBlocks);
    const int64_t n_tiles = ceil_div(a->rows, kTile) * ceil_div(a->cols, kTile);
    const size_t mark = ht_arena_mark(&be->scratch);
    void *mosts;

    if (n_vectors == 0) return HT_OK;
    if (n_tiles > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "fp8 quantise: a matrix of %lld x %lld is too large",
                       (long long)a->rows, (long long)a->cols);
    HT_TRY(ht_arena_take(&mosts, &be->scratch, HT_FP8_QUANTISE_SCRATCH_BYTES));
    ht_arena_reset(&be->scratch, mark); // whoever takes it next comes later on the stream
    HT_LAUNCH(be, fp8_most_kernel, (unsigned)n_mosts, kThreads, 0, static_cast<uint32_t *>(mosts),
              reinterpret_cast<const uint4 *>(a->x), n_vectors);
    const bf16 *const x = reinterpret_cast<const bf16 *>(a->x);
    if (a->format == HT_FP8_E4M3)
        HT_LAUNCH(be, fp8_quantise_kernel<HT_FP8_E4M3>, (unsigned)n_tiles, kThreads, 0, a->codes,
                  a->codes_t, a->scale, x, a->rows, a->cols, static_cast<const uint32_t *>(mosts),
                  n_mosts);
    else
        HT_LAUNCH(be, fp8_quantise_kernel<HT_FP8_E5M2>, (unsigned)n_tiles, kThreads, 0, a->codes,
                  a->codes_t, a->scale, x, a->rows, a->cols, static_cast<const uint32_t *>(mosts),
                  n_mosts);
    return ht_cuda_check_launch(be, "fp8_quantise");
}
