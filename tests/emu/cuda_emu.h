/* tests/emu/cuda_emu.h: the CUDA constructs that our kernels use, on the host.
 *
 * Every thread of a block is a fiber; blocks run one after another. A fiber runs until it must wait
 * for others: at a barrier, or at a collective of its warp (shuffle, ballot, ldmatrix, mma), whose
 * last lane does the work of all lanes. Threads run in rising order, or in falling order with
 * HT_EMU_ORDER=reverse: what works in one order only lacks a barrier.
 *
 * What is found, with kernel, block, thread and place, and reported by ht_cuda_check_launch:
 *   barriers and collectives that not all threads reach, or reach at different lines
 *   shared memory read before this block wrote it (it starts as NaN), or before cp_async_wait
 *   shared memory: races between barriers, accesses outside of the arrays      (emu_check.cpp; with
 *     accesses to global memory outside of allocations      HT_SANITIZE=address the latter are
 * ASan's) more shared memory or threads than a block may have host code that touches device memory:
 * a segmentation fault at that line (emu_memory.cpp)
 *
 * One emulated device, one host thread. Not modelled: caches, mbarriers, wgmma, TMA, several
 * streams at once (work is done when it is enqueued).
 */
#ifndef HT_CUDA_EMU_H
#define HT_CUDA_EMU_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "tests/emu/emu_runtime.h"
#include "tests/emu/emu_types.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

/* Where a construct was written: default arguments are evaluated at the caller. */
#define HT_EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

/* ---- the thread that runs ---- */

struct ht_emu_thread {
    uint3 thread_idx;
    int flat, lane, warp;
};
extern struct ht_emu_thread *ht_emu_self;
extern uint3 ht_emu_block_idx;
extern dim3 ht_emu_block_dim, ht_emu_grid_dim;

#define threadIdx (ht_emu_self->thread_idx)
#define blockIdx ht_emu_block_idx
#define blockDim ht_emu_block_dim
#define gridDim ht_emu_grid_dim
#define warpSize 32

/* ---- launches ---- */

void ht_emu_launch(const char *kernel, dim3 grid, dim3 block, size_t smem_bytes,
                   void (*body)(void *), void *context);

template <typename... P, typename... A>
static inline void ht_emu_launch_kernel(const char *name, void (*kernel)(P...), dim3 grid,
                                        dim3 block, size_t smem_bytes, A &&...args)
{
    struct context {
        void (*kernel)(P...);
        std::tuple<P...> args;
    } c = { kernel, std::tuple<P...>(static_cast<P>(args)...) };
    ht_emu_launch(
        name, grid, block, smem_bytes,
        [](void *p) {
            struct context *k = static_cast<struct context *>(p);
            std::apply(k->kernel, k->args);
        },
        &c);
}

#define HT_LAUNCH(be, kernel, grid, block, smem_bytes, ...)                                        \
    ((void)(be), ht_emu_launch_kernel(#kernel, kernel, dim3(grid), dim3(block),                    \
                                      (size_t)(smem_bytes), __VA_ARGS__))

/* ---- shared memory ---- */

/* The block's array behind `key`, made (and filled with NaN) at its first use in the block. */
void *ht_emu_shared(const void *key, const char *name, size_t bytes, size_t align);
void *ht_emu_shared_dynamic();

#define HT_SHARED(type, name, dims)                                                                \
    static const char name##_key = 0;                                                              \
    using name##_type = type dims;                                                                 \
    auto &name = *static_cast<name##_type *>(ht_emu_shared(                                        \
        &name##_key, #name, sizeof(name##_type), alignof(type) > 16 ? alignof(type) : 16))
#define HT_SHARED_DYNAMIC(type, name) type *name = static_cast<type *>(ht_emu_shared_dynamic())

/* ---- barriers ---- */

/* All threads of the block (n_threads 0), or n_threads threads at barrier `id`. Returns the sum of
 * `vote` over the threads. */
int ht_emu_barrier(int id, int n_threads, int vote, const char *file, int line);
void ht_emu_yield();

static inline void ht_emu_syncthreads(HT_EMU_SITE)
{
    ht_emu_barrier(0, 0, 0, file, line);
}
#define __syncthreads() ht_emu_syncthreads()

static inline int __syncthreads_count(int p, HT_EMU_SITE)
{
    return ht_emu_barrier(0, 0, p != 0, file, line);
}
static inline int __syncthreads_or(int p, HT_EMU_SITE)
{
    return ht_emu_barrier(0, 0, p != 0, file, line) > 0;
}
static inline int __syncthreads_and(int p, HT_EMU_SITE)
{
    return ht_emu_barrier(0, 0, p == 0, file, line) == 0;
}
static inline void bar_sync(int id, int n_threads, HT_EMU_SITE)
{
    ht_emu_barrier(id, n_threads, 0, file, line);
}
static inline void __threadfence() {}
static inline void __threadfence_block() {}
static inline void __nanosleep(unsigned)
{
    ht_emu_yield();
}

/* ---- warp collectives ---- */

/* Waits for the lanes of `mask`; the last one calls work(lanes, mask), where lanes[i] is what lane
 * i gave as `data`. All lanes must come from the same line. */
void ht_emu_collective(unsigned mask, void *data, void (*work)(void **lanes, unsigned mask),
                       const char *what, const char *file, int line);
void ht_emu_syncwarp(unsigned mask, const char *file, int line);
/* A misuse found inside `work`. */
void ht_emu_error(const char *format, ...) __attribute__((format(printf, 1, 2)));

static inline void __syncwarp(unsigned mask = 0xffffffffu, HT_EMU_SITE)
{
    ht_emu_syncwarp(mask, file, line);
}

template <typename T>
struct ht_emu_shuffle {
    T value, result;
    int source; // lane
};

template <typename T>
static inline T ht_emu_shuffle_run(unsigned mask, T v, int source, const char *file, int line)
{
    struct ht_emu_shuffle<T> s = {
        v, v, source
    };
    ht_emu_collective(
        mask, &s,
        [](void **lanes, unsigned m) {
            for (int i = 0; i < 32; i++) {
                if (!(m >> i & 1)) continue;
                auto *mine = static_cast<struct ht_emu_shuffle<T> *>(lanes[i]);
                if (!(m >> mine->source & 1))
                    ht_emu_error("lane %d shuffles from lane %d, which is not in the mask %#x", i,
                                 mine->source, m);
                else
                    mine->result =
                        static_cast<struct ht_emu_shuffle<T> *>(lanes[mine->source])->value;
            }
        },
        "shuffle", file, line);
    return s.result;
}

template <typename T>
static inline T __shfl_sync(unsigned mask, T v, int src, int width = 32, HT_EMU_SITE)
{
    const int lane = ht_emu_self->lane;
    return ht_emu_shuffle_run(mask, v, (lane & ~(width - 1)) | (src & (width - 1)), file, line);
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, HT_EMU_SITE)
{
    const int lane = ht_emu_self->lane, from = lane ^ x;
    return ht_emu_shuffle_run(mask, v, from / width > lane / width ? lane : from, file, line);
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32, HT_EMU_SITE)
{
    const int lane = ht_emu_self->lane, from = lane - (int)d;
    return ht_emu_shuffle_run(mask, v, from < (lane & ~(width - 1)) ? lane : from, file, line);
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32, HT_EMU_SITE)
{
    const int lane = ht_emu_self->lane, from = lane + (int)d;
    return ht_emu_shuffle_run(mask, v, from > (lane | (width - 1)) ? lane : from, file, line);
}

static inline unsigned ht_emu_ballot(unsigned mask, int p, const char *file, int line)
{
    unsigned v = p != 0;
    ht_emu_collective(
        mask, &v,
        [](void **lanes, unsigned m) {
            unsigned all = 0;
            for (int i = 0; i < 32; i++)
                if (m >> i & 1) all |= *static_cast<unsigned *>(lanes[i]) << i;
            for (int i = 0; i < 32; i++)
                if (m >> i & 1) *static_cast<unsigned *>(lanes[i]) = all;
        },
        "vote", file, line);
    return v;
}
static inline unsigned __ballot_sync(unsigned mask, int p, HT_EMU_SITE)
{
    return ht_emu_ballot(mask, p, file, line);
}
static inline int __any_sync(unsigned mask, int p, HT_EMU_SITE)
{
    return ht_emu_ballot(mask, p, file, line) != 0;
}
static inline int __all_sync(unsigned mask, int p, HT_EMU_SITE)
{
    return ht_emu_ballot(mask, p, file, line) == mask;
}

/* ---- tensor cores and asynchronous copies (emu_mma.cpp); see core/base/cuda_instr.h ---- */

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HT_EMU_SITE);
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HT_EMU_SITE);
uint32_t to_tf32(float v);
static inline uint32_t bf16x2_sub(uint32_t a, uint32_t b)
{
    const auto sub = [](uint32_t x, uint32_t y) {
        return (uint32_t)ht_f32_to_bf16(ht_bf16_to_f32((uint16_t)x) - ht_bf16_to_f32((uint16_t)y));
    };
    return sub(a & 0xffff, b & 0xffff) | sub(a >> 16, b >> 16) << 16;
}
static inline uint32_t bf16x2_mul(uint32_t a, uint32_t b)
{
    const auto mul = [](uint32_t x, uint32_t y) {
        return (uint32_t)ht_f32_to_bf16(ht_bf16_to_f32((uint16_t)x) * ht_bf16_to_f32((uint16_t)y));
    };
    return mul(a & 0xffff, b & 0xffff) | mul(a >> 16, b >> 16) << 16;
}
void ldmatrix_x4(uint32_t (&r)[4], const void *row, HT_EMU_SITE);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void *row, HT_EMU_SITE);
void ldmatrix_x2(uint32_t (&r)[2], const void *row, HT_EMU_SITE);
void ldmatrix_x2_trans(uint32_t (&r)[2], const void *row, HT_EMU_SITE);

/* The destination holds NaN until the wait that covers the copy. */
void cp_async_16_zero(void *smem, const void *global, int n_bytes);
static inline void cp_async_16(void *smem, const void *global)
{
    cp_async_16_zero(smem, global, 16);
}
void cp_async_commit();
void ht_emu_cp_async_wait(int n_pending);
template <int kPending>
static inline void cp_async_wait()
{
    ht_emu_cp_async_wait(kPending);
}

/* ---- atomics: one fiber runs at a time ---- */

void ht_emu_atomic(const void *p, size_t bytes); // an access that races with nothing

template <typename T, typename F>
__attribute__((no_sanitize("thread"))) static inline T ht_emu_update(T *p, F f)
{
    static_assert(std::is_integral<T>::value, "no float atomics: sums must have a fixed order");
    ht_emu_atomic(p, sizeof *p);
    const T old = *p;
    *p = f(old);
    return old;
}
template <typename T>
static inline T atomicAdd(T *p, typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [v](T old) { return (T)(old + v); });
}
template <typename T>
static inline T atomicMax(T *p, typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [v](T old) { return old > v ? old : v; });
}
template <typename T>
static inline T atomicMin(T *p, typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [v](T old) { return old < v ? old : v; });
}
template <typename T>
static inline T atomicOr(T *p, typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [v](T old) { return (T)(old | v); });
}
template <typename T>
static inline T atomicExch(T *p, typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [v](T) { return v; });
}
template <typename T>
static inline T atomicCAS(T *p, typename std::common_type<T>::type cmp,
                          typename std::common_type<T>::type v)
{
    return ht_emu_update(p, [cmp, v](T old) { return old == cmp ? v : old; });
}

#endif
