/* tests/emu/emu_hopper.cpp: see emu_hopper.h. Descriptors are decoded as the hardware does: logical
 * address first, then bits 4 to 6 are permuted by bits 7 to 9. */
#include "tests/emu/emu_hopper.h"
#include "tests/emu/emu_impl.h"

namespace {
struct phase { // in the 64 bits of an mbarrier
    uint8_t arrivals, pending;
    uint16_t parity;
    int32_t bytes;
};
static_assert(sizeof(phase) == sizeof(uint64_t), "an mbarrier is 64 bits");

phase load(const uint64_t *bar)
{
    phase p;
    memcpy(&p, bar, sizeof p);
    return p;
}

void store(uint64_t *bar, phase p)
{
    if (p.pending == 0 && p.bytes == 0) {
        p.parity ^= 1;
        p.pending = p.arrivals;
    }
    memcpy(bar, &p, sizeof p);
}

struct wgmma_lane {
    float (*c)[4];
    const uint32_t *a; // registers, or NULL
    uint64_t a_tile, b_tile;
    bool add;
};

float element(uint64_t tile, int64_t offset)
{
    uint64_t at = ((tile & 0x3fff) << 4) + (uint64_t)offset;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    memcpy(&bits, static_cast<unsigned char *>(ht_emu_shared_dynamic()) + at, sizeof bits);
    return __uint_as_float((uint32_t)bits << 16);
}

int64_t leading(uint64_t tile)
{
    return (int64_t)(tile >> 16 & 0x3fff) << 4;
}

int64_t stride(uint64_t tile)
{
    return (int64_t)(tile >> 32 & 0x3fff) << 4;
}

void work(void **lanes, unsigned)
{
    const auto *first = static_cast<const wgmma_lane *>(lanes[0]);
    const int row0 = ht_emu_self->warp % 4 * 16;
    float a[16][16];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < 16; k++) {
            const int m = row0 + row;
            a[row][k] = element(first->a_tile, m / 8 * stride(first->a_tile) + m % 8 * 128 + k * 2);
        }
    if (first->a)
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 8; i++)
                a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = __uint_as_float(
                    i % 2 ? static_cast<wgmma_lane *>(lanes[l])->a[i / 2] & 0xffff0000u
                          : static_cast<wgmma_lane *>(lanes[l])->a[i / 2] << 16);
    for (int n = 0; n < 128; n++) {
        float b[16];
        for (int k = 0; k < 16; k++)
            b[k] =
                first->a
                    ? element(first->b_tile, n / 64 * leading(first->b_tile) + n % 64 * 2 +
                                                 k / 8 * stride(first->b_tile) + k % 8 * 128)
                    : element(first->b_tile, n / 8 * stride(first->b_tile) + n % 8 * 128 + k * 2);
        for (int row = 0; row < 16; row++) {
            auto *mine = static_cast<wgmma_lane *>(lanes[row % 8 * 4 + n % 8 / 2]);
            float &c = mine->c[n / 8][row / 8 * 2 + n % 2];
            float sum = mine->add ? c : 0.0f;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k];
            c = sum;
        }
    }
}
} // namespace

enum ht_status tensor_map_make(ht_tensor_map *map, const void *base, int64_t columns, int64_t rows,
                               int64_t row_stride, int box_columns, int box_rows)
{
    if ((uintptr_t)base % 16 != 0 || row_stride % 8 != 0 || box_columns != 64 || box_rows > 256)
        return HT_FAIL(HT_ERR_CUDA, "tensor map of %p, rows %lld apart, boxes %d x %d", base,
                       (long long)row_stride, box_rows, box_columns);
    *map = {
        static_cast<const uint16_t *>(base), columns, rows, row_stride, box_columns, box_rows
    };
    return HT_OK;
}

void tma_load(unsigned char *to, const ht_tensor_map *map, uint64_t *bar, int column, int row)
{
    if ((uintptr_t)to % 1024 != 0)
        ht_emu_error("a TMA box at %p; it must be 1024-byte aligned", to);
    for (int r = 0; r < map->box_rows; r++)
        for (int c = 0; c < map->box_columns; c++) {
            const bool inside = row + r < map->rows && column + c < map->columns;
            const uint16_t v = inside ? map->base[(row + r) * map->stride + column + c] : 0;
            memcpy(to + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &v, sizeof v);
        }
    phase p = load(bar);
    p.bytes -= map->box_rows * map->box_columns * 2;
    store(bar, p);
}

void mbarrier_init(uint64_t *bar, int arrivals)
{
    const phase p = { (uint8_t)arrivals, (uint8_t)arrivals, 0, 0 };
    memcpy(bar, &p, sizeof p);
}

void mbarrier_expect(uint64_t *bar, int bytes)
{
    phase p = load(bar);
    p.bytes += bytes;
    p.pending--;
    store(bar, p);
}

void mbarrier_arrive(uint64_t *bar)
{
    phase p = load(bar);
    if (p.pending == 0) ht_emu_error("more arrivals at an mbarrier than its %d", p.arrivals);
    p.pending--;
    store(bar, p);
}

void mbarrier_wait(uint64_t *bar, int parity, const char *file, int line)
{
    for (int64_t spins = 0; load(bar).parity == parity; spins++) {
        if (spins == 1000000) {
            ht_emu_error("the wait at %s:%d for parity %d of an mbarrier never ends", file, line,
                         parity);
            return;
        }
        ht_emu_yield();
    }
}

uint64_t wgmma_tile(const unsigned char *tile, int leading_bytes)
{
    const uint64_t at = (uint64_t)(tile - static_cast<unsigned char *>(ht_emu_shared_dynamic()));
    return at >> 4 | (uint64_t)(leading_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}

void wgmma_rows(float (&c)[16][4], uint64_t a, uint64_t b, bool add, const char *file, int line)
{
    wgmma_lane mine = { c, nullptr, a, b, add };
    ht_emu_collective(0xffffffffu, &mine, work, "wgmma", file, line);
}

void wgmma_add(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, const char *file, int line)
{
    wgmma_lane mine = { c, a, b, b, true };
    ht_emu_collective(0xffffffffu, &mine, work, "wgmma", file, line);
}
