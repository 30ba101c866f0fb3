/* core/ops/quant_cuda.cu: y = x W^T with W packed on the device (quant_impl.h), x rounded to bf16.
 *
 * Both kernels multiply with mma.sync, 16 rows of W by 8 rows of x by 16 columns, W as the A
 * operand: its codes come from memory in the lanes' order, 16 bytes at a time, and become bf16 in
 * registers by two logic operations and one subtraction per pair (int4: 0x4300 | q is the bf16 128
 * + q; fp8: e4m3's exponent and fraction in their places are a bf16 2^120 times too small). Scales
 * multiply the fp32 sum over a group.
 *
 *   sum = 0;  for the 8 parts of k, in order:  sum += part
 *   part = 0; for its groups, in order:        part += scale * (sum of the group's products)
 *   y = alpha * sum + beta * y
 *
 *   skinny  m <= 16: a block has one strip of 16 rows, its 8 warps one part of k each, with four
 * loads of 16 bytes per lane ahead of what is multiplied; x comes from L1 and L2 tile    64 rows of
 * W by 32 or 64 rows of x: a warp has one strip and all of k, x goes through shared memory in 4
 * stages
 *
 * Both add in the same order, so a row of y has the same bits for every m.
 */
#include "core/base/cuda_kernel.h"

extern "C" {
#include "core/ops/core_ops.h"
#include "core/ops/fp8.h"
#include "core/ops/quant_impl.h"
}

namespace {

constexpr int kParts = 8, kUnit = HT_Q_DEVICE_UNIT, kStages = 4;
constexpr int kSkinnyThreads = kParts * kWarp, kTileWarps = 4, kTileThreads = kTileWarps * kWarp;

struct qgemm_params {
    const unsigned char *w;
    int64_t strip_bytes, zeros_at, codes_at;
    const bf16 *x; // rows of whole units, 16-byte aligned
    int64_t ldx, ldy;
    void *y;
    int y_is_bf16, m, n, n_units, n_strips;
    float alpha, beta;
};

/* ---- weights ---- */

/* Loads of 16 bytes per lane and unit; groups per unit. */
template <int kF>
constexpr int kLoads = kF == HT_Q_BF16                     ? 4
                       : kF == HT_Q_INT8 || kF == HT_Q_FP8 ? 2
                                                           : 1;

template <int kF, int kGroups>
struct unit_codes {
    uint4 codes[kLoads<kF>];
    uint32_t scales[kGroups]; // bf16 of rows g, g + 8
    uint32_t zeros[kGroups];  // bytes of them
};

template <int kF, int kGroups>
static __device__ __forceinline__ void load_unit(unit_codes<kF, kGroups> &out,
                                                 const qgemm_params &p, const unsigned char *strip,
                                                 int unit, int lane)
{
    const uint4 *codes = reinterpret_cast<const uint4 *>(strip + p.codes_at) +
                         (int64_t)unit * kLoads<kF> * kWarp + lane;
#pragma unroll
    for (int i = 0; i < kLoads<kF>; i++) out.codes[i] = codes[i * kWarp];
    if constexpr (kF != HT_Q_BF16) {
#pragma unroll
        for (int h = 0; h < kGroups; h++) {
            const int64_t at = ((int64_t)unit * kGroups + h) * 8 + lane / 4;
            out.scales[h] = reinterpret_cast<const uint32_t *>(strip)[at];
            if constexpr (kF == HT_Q_INT4Z)
                out.zeros[h] = reinterpret_cast<const uint16_t *>(strip + p.zeros_at)[at];
        }
    }
}

static __device__ __forceinline__ uint32_t word_of(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* The A operand of one step (of four). */
template <int kF, int kGroups>
static __device__ __forceinline__ void fragment(uint32_t (&a)[4], const unit_codes<kF, kGroups> &u,
                                                int step)
{
    if constexpr (kF == HT_Q_BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[i] = word_of(u.codes[step], i);
    } else if constexpr (kF == HT_Q_INT8) { // (128 + low 7 bits) - (128 or 256)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t w = word_of(u.codes[step / 2], step % 2 * 2 + i % 2) >> (i / 2 * 8);
            a[i] = bf16x2_sub((w & 0x007f007fu) | 0x43004300u, (w & 0x00800080u) | 0x43004300u);
        }
    } else if constexpr (kF == HT_Q_FP8) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t w = word_of(u.codes[step / 2], step % 2 * 2 + i % 2) >> (i / 2 * 8);
            a[i] = bf16x2_mul((w & 0x007f007fu) << 4 | (w & 0x00800080u) << 8, 0x7b807b80u);
        }
    } else {
        uint32_t offset[2] = { 0x43084308u, 0x43084308u };
        if constexpr (kF == HT_Q_INT4Z) {
            const uint32_t z = u.zeros[step / 2 * (kGroups - 1)];
            offset[0] = 0x43004300u | (z & 15) * 0x10001u;
            offset[1] = 0x43004300u | (z >> 8 & 15) * 0x10001u;
        }
        const uint32_t w = word_of(u.codes[0], step);
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = bf16x2_sub((w >> 4 * i & 0x000f000fu) | 0x43004300u, offset[i % 2]);
    }
}

/* part += unit of W times unit of x, for kTiles times 8 rows of x. b(half, tile): a lane's 8
 * columns of that half, for row lane / 4 of the tile. */
template <int kF, int kGroups, int kTiles, typename B>
static __device__ __forceinline__ void multiply_unit(float (&part)[kTiles][4],
                                                     const unit_codes<kF, kGroups> &u, B b)
{
    float sum[kTiles][4];

#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint32_t a0[4], a1[4];
        fragment<kF, kGroups>(a0, u, 2 * h);
        fragment<kF, kGroups>(a1, u, 2 * h + 1);
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
            const uint4 x = b(h, j);
            const uint32_t b0[2] = { x.x, x.y }, b1[2] = { x.z, x.w };
            if constexpr (kF == HT_Q_BF16) {
                mma_bf16(part[j], a0, b0);
                mma_bf16(part[j], a1, b1);
            } else {
                if (h == 0 || kGroups == 2)
#pragma unroll
                    for (int i = 0; i < 4; i++) sum[j][i] = 0.0f;
                mma_bf16(sum[j], a0, b0);
                mma_bf16(sum[j], a1, b1);
                if (h == 1 || kGroups == 2) {
                    const uint32_t s = u.scales[h * (kGroups - 1)];
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        part[j][i] = fmaf(i < 2 ? bf16_lo(s) : bf16_hi(s), sum[j][i], part[j][i]);
                }
            }
        }
    }
}

static __device__ __forceinline__ int part_start(int part, int n_units)
{
    return (int)((int64_t)n_units * part / kParts);
}

static __device__ __forceinline__ void put(const qgemm_params &p, int row, int column, float sum)
{
    if (row >= p.m || column >= p.n) return;
    const int64_t at = row * p.ldy + column;
    float v = p.alpha * sum;
    if (p.y_is_bf16) {
        bf16 *const y = static_cast<bf16 *>(p.y) + at;
        if (p.beta != 0.0f) v += to_f32(*y);
        *y = from_f32<bf16>(v);
    } else {
        float *const y = static_cast<float *>(p.y) + at;
        if (p.beta != 0.0f) v += *y;
        *y = v;
    }
}

/* ---- few rows ---- */

template <int kF, int kGroups, int kTiles>
__global__ void __launch_bounds__(kSkinnyThreads) qgemm_skinny_kernel(const qgemm_params p)
{
    constexpr int kAhead = 4 / kLoads<kF>; // units
    HT_SHARED(float, sums, [kParts][8 * kTiles][17]);
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    const int g = lane / 4, t = lane % 4;
    const unsigned char *const strip = p.w + (int64_t)blockIdx.x * p.strip_bytes;
    const int begin = part_start(warp, p.n_units), end = part_start(warp + 1, p.n_units);
    unit_codes<kF, kGroups> now[kAhead], next[kAhead];
    float part[kTiles][4];

#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) part[j][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kAhead; i++)
        if (begin + i < end) load_unit<kF, kGroups>(next[i], p, strip, begin + i, lane);
    for (int unit = begin; unit < end; unit += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; i++) now[i] = next[i];
#pragma unroll
        for (int i = 0; i < kAhead; i++)
            if (unit + kAhead + i < end)
                load_unit<kF, kGroups>(next[i], p, strip, unit + kAhead + i, lane);
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            if (unit + i >= end) break;
            multiply_unit<kF, kGroups, kTiles>(part, now[i], [&](int half, int tile) {
                const int row = 8 * tile + g;
                if (row >= p.m) return make_uint4(0u, 0u, 0u, 0u);
                return *reinterpret_cast<const uint4 *>(
                    p.x + row * p.ldx + (int64_t)(unit + i) * kUnit + 32 * half + 8 * t);
            });
        }
    }
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[warp][8 * j + 2 * t + i % 2][g + i / 2 * 8] = part[j][i];
    __syncthreads();
    for (int at = (int)threadIdx.x; at < 16 * 8 * kTiles; at += kSkinnyThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kParts; w++) sum += sums[w][at / 16][at % 16];
        put(p, at / 16, (int)blockIdx.x * HT_Q_STRIP + at % 16, sum);
    }
}

/* ---- many rows ---- */

/* Chunks of 8 columns change places by row, so that the 8 lanes of a phase read different banks. */
static __device__ __forceinline__ int chunk_at(int row, int chunk)
{
    return row * kUnit + 8 * (chunk ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

template <int kF, int kGroups, int kTiles>
__global__ void __launch_bounds__(kTileThreads) qgemm_tile_kernel(const qgemm_params p)
{
    constexpr int kRows = 8 * kTiles;
    HT_SHARED(bf16, stages, [kStages][kRows * kUnit]);
    const int lane = (int)threadIdx.x % kWarp, warp = (int)threadIdx.x / kWarp;
    const int g = lane / 4, t = lane % 4, row0 = (int)blockIdx.y * kRows;
    const int own = (int)blockIdx.x * kTileWarps + warp; // strip; the last block's may be none
    const unsigned char *const strip = p.w + (int64_t)min(own, p.n_strips - 1) * p.strip_bytes;
    unit_codes<kF, kGroups> now, next;
    float total[kTiles][4], part[kTiles][4];

    const auto fetch = [&](int unit) {
        if (unit < p.n_units)
#pragma unroll
            for (int i = 0; i < kRows * 8 / kTileThreads; i++) {
                const int at = (int)threadIdx.x + i * kTileThreads, row = at / 8, chunk = at % 8;
                const bool there = row0 + row < p.m;
                cp_async_16_zero(&stages[unit % kStages][chunk_at(row, chunk)],
                                 p.x + (there ? row0 + row : 0) * p.ldx + (int64_t)unit * kUnit +
                                     8 * chunk,
                                 there ? 16 : 0);
            }
        cp_async_commit();
    };

#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) total[j][i] = part[j][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < kStages - 1; i++) fetch(i);
    load_unit<kF, kGroups>(next, p, strip, 0, lane);
    int n_parts = 1, border = part_start(1, p.n_units);
    for (int unit = 0; unit < p.n_units; unit++) {
        cp_async_wait<kStages - 2>();
        __syncthreads(); // this unit is there, and the stage before it is free
        fetch(unit + kStages - 1);
        now = next;
        if (unit + 1 < p.n_units) load_unit<kF, kGroups>(next, p, strip, unit + 1, lane);
        while (unit >= border) { // empty parts add 0, as in the other kernel
#pragma unroll
            for (int j = 0; j < kTiles; j++)
#pragma unroll
                for (int i = 0; i < 4; i++) total[j][i] += part[j][i], part[j][i] = 0.0f;
            border = part_start(++n_parts, p.n_units);
        }
        const bf16 *const stage = stages[unit % kStages];
        multiply_unit<kF, kGroups, kTiles>(part, now, [&](int half, int tile) {
            return *reinterpret_cast<const uint4 *>(stage + chunk_at(8 * tile + g, 4 * half + t));
        });
    }
    cp_async_wait<0>();
    if (own >= p.n_strips) return;
#pragma unroll
    for (int j = 0; j < kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
            put(p, row0 + 8 * j + 2 * t + i % 2, own * HT_Q_STRIP + g + i / 2 * 8,
                total[j][i] + part[j][i]);
}

/* ---- x as the kernels want it ---- */

template <typename T>
__global__ void __launch_bounds__(256)
    qgemm_x_kernel(bf16 *out, const T *x, int64_t ldx, int64_t k, int64_t k_padded)
{
    const int64_t row = blockIdx.x;

    for (int64_t i = threadIdx.x; i < k_padded; i += 256)
        out[row * k_padded + i] = from_f32<bf16>(i < k ? to_f32(x[row * ldx + i]) : 0.0f);
}

template <typename T>
enum ht_status convert_x(struct ht_backend *be, const struct ht_qgemm_args *a, bf16 *out)
{
    HT_LAUNCH(be, qgemm_x_kernel<T>, (unsigned)a->m, 256, 0, out, static_cast<const T *>(a->x),
              a->ldx, a->w->k, a->w->k_padded);
    return ht_cuda_check_launch(be, "qgemm_x");
}

/* ---- launches ---- */

template <int kF, int kGroups>
enum ht_status launch(struct ht_backend *be, const qgemm_params &p)
{
    const unsigned blocks = (unsigned)ceil_div(p.n_strips, kTileWarps);

    if (p.m <= 8)
        HT_LAUNCH(be, (qgemm_skinny_kernel<kF, kGroups, 1>), (unsigned)p.n_strips, kSkinnyThreads,
                  0, p);
    else if (p.m <= 16)
        HT_LAUNCH(be, (qgemm_skinny_kernel<kF, kGroups, 2>), (unsigned)p.n_strips, kSkinnyThreads,
                  0, p);
    else if (p.m <= 32)
        HT_LAUNCH(be, (qgemm_tile_kernel<kF, kGroups, 4>), dim3(blocks, 1), kTileThreads, 0, p);
    else
        HT_LAUNCH(be, (qgemm_tile_kernel<kF, kGroups, 8>),
                  dim3(blocks, (unsigned)ceil_div(p.m, 64)), kTileThreads, 0, p);
    return ht_cuda_check_launch(be, "qgemm");
}

enum ht_status launch_format(struct ht_backend *be, const qgemm_params &p, enum ht_qformat f,
                             int group)
{
    switch (f) {
    case HT_Q_BF16: return launch<HT_Q_BF16, 1>(be, p);
    case HT_Q_INT8: return group == 32 ? launch<HT_Q_INT8, 2>(be, p) : launch<HT_Q_INT8, 1>(be, p);
    case HT_Q_FP8: return group == 32 ? launch<HT_Q_FP8, 2>(be, p) : launch<HT_Q_FP8, 1>(be, p);
    case HT_Q_INT4: return group == 32 ? launch<HT_Q_INT4, 2>(be, p) : launch<HT_Q_INT4, 1>(be, p);
    default: return group == 32 ? launch<HT_Q_INT4Z, 2>(be, p) : launch<HT_Q_INT4Z, 1>(be, p);
    }
}

/* ---- rows as fp32 ---- */

struct embed_params {
    const unsigned char *w;
    int64_t strip_bytes, zeros_at, codes_at, n, k;
    enum ht_qformat format;
    int group;
    const int32_t *ids;
    float multiplier;
    float *out;
};

__global__ void __launch_bounds__(256) qmatrix_embed_kernel(const embed_params p)
{
    const int64_t token = blockIdx.x, id = p.ids[token];
    const bool valid = id >= 0 && id < p.n;
    const int64_t row = valid ? id % HT_Q_STRIP : 0;
    const unsigned char *const strip = p.w + (valid ? id / HT_Q_STRIP : 0) * p.strip_bytes;

    for (int64_t k = threadIdx.x; k < p.k; k += 256) {
        const struct ht_q_place at = ht_q_device_place(p.format, row, k);
        const unsigned char *const code = strip + p.codes_at + at.byte;
        const int64_t s = k / p.group * HT_Q_STRIP + ht_q_device_scale(row);
        float v = NAN;
        if (valid && p.format == HT_Q_BF16) {
            v = to_f32(*reinterpret_cast<const bf16 *>(code));
        } else if (valid) {
            const float scale = to_f32(reinterpret_cast<const bf16 *>(strip)[s]);
            const int zero = p.format == HT_Q_INT4Z ? strip[p.zeros_at + s] : 8;
            const int q =
                p.format == HT_Q_INT8 ? (int)(int8_t)*code : (*code >> at.shift & 15) - zero;
            v = scale * (p.format == HT_Q_FP8 ? ht_fp8_to_f32(*code, HT_FP8_E4M3) : (float)q);
        }
        p.out[token * p.k + k] = v * p.multiplier;
    }
}

} // namespace

extern "C" enum ht_status ht_qgemm_cuda(struct ht_backend *be, const struct ht_qgemm_args *a)
{
    const struct ht_qmatrix *w = a->w;
    const size_t mark = ht_arena_mark(&be->scratch);
    const bool direct = a->x_dtype == HT_DTYPE_BF16 && w->k == w->k_padded &&
                        rows_aligned(static_cast<const bf16 *>(a->x), a->ldx);
    qgemm_params p = {};
    void *copy;

    if (a->precise && a->x_dtype == HT_DTYPE_F32 && w->format != HT_Q_BF16)
        return HT_FAIL(HT_ERR_UNSUPPORTED, "qgemm: precise products of fp32 rows are not on CUDA; "
                                           "give bf16 rows, which are multiplied exactly");
    if (a->m > INT_MAX)
        return HT_FAIL(HT_ERR_ARG, "qgemm: m is %lld; at most %d", (long long)a->m, INT_MAX);
    p.x = static_cast<const bf16 *>(a->x);
    p.ldx = a->ldx;
    if (!direct) {
        HT_TRY(ht_arena_take(&copy, &be->scratch, (size_t)(a->m * w->k_padded) * sizeof(bf16)));
        ht_arena_reset(&be->scratch,
                       mark); // the stream keeps later operations off until it is used
        p.x = static_cast<const bf16 *>(copy);
        p.ldx = w->k_padded;
        HT_TRY(HT_DISPATCH(a->x_dtype, "qgemm", convert_x, be, a, static_cast<bf16 *>(copy)));
    }
    p.w = w->data;
    p.strip_bytes = (int64_t)w->strip_bytes;
    p.zeros_at = (int64_t)ht_q_device_zeros_at(w);
    p.codes_at = (int64_t)ht_q_device_codes_at(w);
    p.ldy = a->ldy;
    p.y = a->y;
    p.y_is_bf16 = a->y_dtype == HT_DTYPE_BF16;
    p.m = (int)a->m;
    p.n = (int)w->n;
    p.n_units = (int)(w->k_padded / kUnit);
    p.n_strips = (int)ht_q_n_strips(w);
    p.alpha = a->alpha;
    p.beta = a->beta;
    return launch_format(be, p, w->format, w->group);
}

extern "C" enum ht_status ht_qmatrix_embed_cuda(struct ht_backend *be, const struct ht_qmatrix *q,
                                                int64_t n_tokens, const int32_t *ids,
                                                float multiplier, float *out)
{
    embed_params p = {};

    if (n_tokens == 0) return HT_OK;
    p.w = q->data;
    p.strip_bytes = (int64_t)q->strip_bytes;
    p.zeros_at = (int64_t)ht_q_device_zeros_at(q);
    p.codes_at = (int64_t)ht_q_device_codes_at(q);
    p.n = q->n;
    p.k = q->k;
    p.format = q->format;
    p.group = q->group;
    p.ids = ids;
    p.multiplier = multiplier;
    p.out = out;
    HT_LAUNCH(be, qmatrix_embed_kernel, (unsigned)n_tokens, 256, 0, p);
    return ht_cuda_check_launch(be, "qmatrix_embed");
}
