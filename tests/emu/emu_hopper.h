/* tests/emu/emu_hopper.h: the names of core/base/cuda_hopper.h on the host.
 *
 * Copies and products are done when they are issued, so a missing wait is not found; what is
 * checked are addresses, swizzles, barrier phases, masks and sums. A wait that nothing can end is
 * an error.
 */
#ifndef HT_EMU_HOPPER_H
#define HT_EMU_HOPPER_H

extern "C" {
#include "core/base/status.h"
}
#include "tests/emu/cuda_emu.h"

#define __grid_constant__

struct ht_tensor_map {
    const uint16_t *base;
    int64_t columns, rows, stride;
    int box_columns, box_rows;
};

enum ht_status tensor_map_make(ht_tensor_map *map, const void *base, int64_t columns, int64_t rows,
                               int64_t stride, int box_columns, int box_rows);
void tma_load(unsigned char *to, const ht_tensor_map *map, uint64_t *bar, int column, int row);

void mbarrier_init(uint64_t *bar, int arrivals);
static inline void mbarrier_init_fence() {}
void mbarrier_expect(uint64_t *bar, int bytes);
void mbarrier_arrive(uint64_t *bar);
void mbarrier_wait(uint64_t *bar, int parity, HT_EMU_SITE);

void ht_emu_arrive(int id, int n_threads, const char *file, int line); // cuda_emu.cpp
static inline void bar_arrive(int id, int n_threads, HT_EMU_SITE)
{
    ht_emu_arrive(id, n_threads, file, line);
}

template <int kRegisters>
static inline void registers_fewer()
{
}
template <int kRegisters>
static inline void registers_more()
{
}

uint64_t wgmma_tile(const unsigned char *tile, int leading);
void wgmma_rows(float (&c)[16][4], uint64_t a, uint64_t b, bool add, HT_EMU_SITE);
void wgmma_add(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, HT_EMU_SITE);
static inline void wgmma_fence() {}
static inline void wgmma_commit() {}
template <int kPending>
static inline void wgmma_wait(float (&)[16][4])
{
}

#endif
