/* tests/emu/emu_check.cpp: shared memory, and who touched it when.
 *
 * The kernel files are compiled with -fsanitize=thread, so every load and store calls a __tsan_
 * function; the ones here take the place of the sanitizer's library and know CUDA's rules:
 *
 *   two threads touch the same place, one of them writes, and no barrier is between them -> race
 *   a place is read that this block has not written                                      -> error
 *   a place is touched between cp.async and its wait                                     -> error
 *
 * "A barrier between": every warp has a clock, which a barrier or __syncwarp advances; seen[w][v]
 * is what warp w knows of warp v's clock. A place remembers its last writer and readers with their
 * clocks. Shuffles and mma order nothing, as in CUDA. Places are 2 bytes.
 */
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <dlfcn.h>

#include "tests/emu/emu_impl.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define EMU_TRACKED false // loads and stores are ASan's: who wrote what is not known
#else
#define EMU_TRACKED true
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace {
constexpr size_t kGranule = 2, kGap = 64; // bytes; kGap lies between arrays
constexpr size_t kPoolBytes = 512 * 1024;

struct place {
    uint32_t w_serial, w_clock, r_serial, r_clock; // serial: of the block that wrote or read
    uint16_t w_thread, r_thread;
    uint8_t in_flight;  // cp.async issued, not landed
    uint8_t r_several;  // 1: lanes of one warp, 2: several warps
    uint8_t live, free; // live: inside an array
};

struct piece {
    const void *key;
    const char *name;
    size_t begin, bytes;
};

alignas(1024) unsigned char pool[kPoolBytes];
place shadow[kPoolBytes / kGranule];
std::vector<piece> pieces;
size_t dynamic_bytes, used_bytes;
uint32_t serial;
uint32_t clocks[EMU_WARPS], seen[EMU_WARPS][EMU_WARPS];

bool in_pool(const void *p)
{
    return (uintptr_t)p - (uintptr_t)pool < kPoolBytes;
}

/* Whether `thread` (of the running block) at `clock` is before the running thread. */
bool ordered(int thread, uint32_t clock)
{
    const int w = ht_emu_self->warp, v = thread / 32;
    if (thread == ht_emu_self->flat) return true;
    return v == w ? clocks[w] > clock : seen[w][v] > clock;
}

const char *where(size_t at, char *text, size_t n)
{
    for (const piece &p : pieces)
        if (at >= p.begin && at < p.begin + p.bytes) {
            snprintf(text, n, "byte %zu of shared %s", at - p.begin, p.name);
            return text;
        }
    snprintf(text, n, "byte %zu of dynamic shared memory (%zu bytes)", at, dynamic_bytes);
    return text;
}

/* "file:line", or what addr2line needs. */
const char *site(const void *pc, const char *file, int line, char *text, size_t n)
{
    Dl_info info;
    if (file)
        snprintf(text, n, "%s:%d", file, line);
    else if (pc && dladdr(pc, &info))
        snprintf(text, n, "addr2line -fCie %s %#zx", info.dli_fname,
                 (size_t)((uintptr_t)pc - (uintptr_t)info.dli_fbase - 1));
    else
        snprintf(text, n, "%p", pc);
    return text;
}

void report(const char *what, int other, size_t at, const void *pc, const char *file, int line)
{
    char a[128], b[512];
    if (other >= 0)
        ht_emu_error("%s thread %d at %s [%s]", what, other, where(at, a, sizeof a),
                     site(pc, file, line, b, sizeof b));
    else
        ht_emu_error("%s at %s [%s]", what, where(at, a, sizeof a),
                     site(pc, file, line, b, sizeof b));
}

void read_place(place *s, size_t at, const void *pc, const char *file, int line)
{
    const int me = ht_emu_self->flat, warp = ht_emu_self->warp;

    if (s->in_flight)
        return report("reads before cp_async_wait what was copied by", s->w_thread, at, pc, file,
                      line);
    if (!EMU_TRACKED) return;
    if (s->w_serial != serial) return report("reads what nobody wrote", -1, at, pc, file, line);
    if (!ordered(s->w_thread, s->w_clock))
        return report("race: reads without a barrier what was written by", s->w_thread, at, pc,
                      file, line);
    if (s->r_serial != serial || s->r_thread == me || s->r_clock != clocks[s->r_thread / 32] ||
        ordered(s->r_thread, s->r_clock)) {
        if (!(s->r_serial == serial && s->r_thread == me && s->r_clock == clocks[warp]))
            s->r_several = 0;
        s->r_serial = serial;
        s->r_thread = (uint16_t)me;
    } else if (s->r_thread / 32 != warp) {
        s->r_several = 2;
        s->r_thread = (uint16_t)me;
    } else if (s->r_several == 0) {
        s->r_several = 1;
    }
    s->r_clock = clocks[warp];
}

/* Whether a read since the last barrier forbids a write now. */
bool read_conflict(const place *s)
{
    if (s->r_serial != serial) return false;
    if (s->r_several > 0 && s->r_thread / 32 == ht_emu_self->warp)
        return s->r_clock == clocks[ht_emu_self->warp];
    return !ordered(s->r_thread, s->r_clock);
}

void write_place(place *s, size_t at, const void *pc)
{
    if (s->in_flight)
        return report("writes over a cp.async under way, issued by", s->w_thread, at, pc, nullptr,
                      0);
    if (!EMU_TRACKED) {
        s->w_thread = (uint16_t)ht_emu_self->flat;
        return;
    }
    if (s->w_serial == serial && !ordered(s->w_thread, s->w_clock))
        return report("race: writes without a barrier what was written by", s->w_thread, at, pc,
                      nullptr, 0);
    if (read_conflict(s))
        return report("race: writes without a barrier what was read by", s->r_thread, at, pc,
                      nullptr, 0);
    s->w_serial = serial;
    s->w_thread = (uint16_t)ht_emu_self->flat;
    s->w_clock = clocks[ht_emu_self->warp];
}

void access_pool(const void *p, size_t bytes, bool write, const void *pc, const char *file,
                 int line)
{
    const size_t at = (size_t)((const unsigned char *)p - pool);

    for (size_t i = at / kGranule; i <= (at + bytes - 1) / kGranule; i++) {
        if (i >= kPoolBytes / kGranule || !shadow[i].live)
            return report("out of bounds", -1, at, pc, file, line);
        if (write)
            write_place(&shadow[i], i * kGranule, pc);
        else
            read_place(&shadow[i], i * kGranule, pc, file, line);
    }
}

[[maybe_unused]] void access(const void *p, size_t bytes, bool write, const void *pc)
{
    if (in_pool(p)) {
        if (emu_in_kernel() && ht_emu_self) access_pool(p, bytes, write, pc, nullptr, 0);
    } else if (emu_heap_contains(p) && emu_in_kernel() && !emu_heap_valid(p, bytes)) {
        char text[512];
        ht_emu_error("%s %zu bytes at %p, outside of device allocations [%s]",
                     write ? "writes" : "reads", bytes, p, site(pc, nullptr, 0, text, sizeof text));
    }
}

void make_live(size_t begin, size_t bytes)
{
    for (size_t i = begin / kGranule; i < (begin + bytes + kGranule - 1) / kGranule; i++)
        shadow[i].live = 1;
    ASAN_UNPOISON_MEMORY_REGION(pool + begin, bytes);
    memset(pool + begin, 0xff, bytes); // NaN in fp32 and bf16
}
} // namespace

void emu_pool_launch(size_t bytes)
{
    dynamic_bytes = bytes;
}

void emu_pool_block(int n_warps)
{
    serial++;
    pieces.clear();
    used_bytes = (dynamic_bytes + kGap + 15) / 16 * 16;
    ASAN_POISON_MEMORY_REGION(pool, kPoolBytes);
    make_live(0, dynamic_bytes);
    for (int w = 0; w < n_warps; w++) {
        clocks[w] = 1;
        for (int v = 0; v < n_warps; v++) seen[w][v] = 0;
    }
}

void emu_pool_block_end()
{
    for (size_t i = 0; i < (dynamic_bytes + 1) / kGranule; i++)
        shadow[i].live = shadow[i].in_flight = 0;
    for (const piece &p : pieces)
        for (size_t i = p.begin / kGranule; i < (p.begin + p.bytes + 1) / kGranule; i++)
            shadow[i].live = shadow[i].in_flight = 0;
    ASAN_UNPOISON_MEMORY_REGION(pool, kPoolBytes);
}

void *ht_emu_shared(const void *key, const char *name, size_t bytes, size_t align)
{
    for (const piece &p : pieces)
        if (p.key == key) return pool + p.begin;
    const size_t begin = (used_bytes + align - 1) / align * align;
    size_t total = dynamic_bytes + bytes;
    for (const piece &p : pieces) total += p.bytes;
    if (total > EMU_SMEM_MAX)
        ht_emu_error("%zu bytes of shared memory with %s; an sm_80 block has %d", total, name,
                     (int)EMU_SMEM_MAX);
    if (begin + bytes + kGap > kPoolBytes) abort();
    pieces.push_back({ key, name, begin, bytes });
    used_bytes = (begin + bytes + kGap + 15) / 16 * 16;
    make_live(begin, bytes);
    return pool + begin;
}

void *ht_emu_shared_dynamic()
{
    return pool;
}

void emu_clock_join(uint32_t warps)
{
    uint32_t joined[EMU_WARPS] = {};
    for (int w = 0; w < EMU_WARPS; w++) {
        if (!(warps >> w & 1)) continue;
        for (int v = 0; v < EMU_WARPS; v++)
            if (seen[w][v] > joined[v]) joined[v] = seen[w][v];
    }
    for (int w = 0; w < EMU_WARPS; w++)
        if (warps >> w & 1) joined[w] = ++clocks[w]; // what was done before: clock < joined
    for (int w = 0; w < EMU_WARPS; w++)
        if (warps >> w & 1) memcpy(seen[w], joined, sizeof joined);
}

void emu_clock_tick(int warp)
{
    clocks[warp]++;
}

void emu_shared_read(const void *p, size_t bytes, const char *file, int line)
{
    if (!in_pool(p))
        ht_emu_error("ldmatrix at %s:%d reads %p, which is not shared memory", file, line, p);
    else
        access_pool(p, bytes, false, nullptr, file, line);
}

bool emu_shared_issue(void *p, size_t bytes)
{
    if (!in_pool(p)) {
        ht_emu_error("cp.async writes to %p, which is not shared memory", p);
        return false;
    }
    access_pool(p, bytes, true, __builtin_return_address(0), nullptr, 0);
    const size_t at = (size_t)((unsigned char *)p - pool) / kGranule;
    if (!shadow[at].live || !shadow[at + bytes / kGranule - 1].live) return false;
    for (size_t i = 0; i < bytes / kGranule; i++) shadow[at + i].in_flight = 1;
    memset(p, 0xff, bytes);
    return true;
}

void emu_shared_land(void *p, size_t bytes)
{
    const size_t at = (size_t)((unsigned char *)p - pool) / kGranule;
    for (size_t i = 0; i < bytes / kGranule; i++) {
        shadow[at + i].in_flight = 0;
        shadow[at + i].w_clock = clocks[ht_emu_self->warp];
    }
}

void ht_emu_atomic(const void *p, size_t bytes)
{
    if (in_pool(p)) {
        const size_t at = (size_t)((const unsigned char *)p - pool) / kGranule;
        for (size_t i = 0; i < (bytes + 1) / kGranule; i++)
            if (!shadow[at + i].live)
                return report("atomic out of bounds", -1, at * kGranule, nullptr, nullptr, 0);
            else if (EMU_TRACKED && shadow[at + i].w_serial != serial)
                return report("atomic on what nobody wrote", -1, at * kGranule, nullptr, nullptr,
                              0);
    } else if (!emu_heap_valid(p, bytes)) {
        ht_emu_error("atomic on %zu bytes at %p, outside of device allocations", bytes, p);
    }
}

/* ---- what -fsanitize=thread calls ---- */

#if !defined(__SANITIZE_ADDRESS__)
#define EMU_PC __builtin_return_address(0)
#define EMU_HOOKS(n)                                                                               \
    void __tsan_read##n(void *p)                                                                   \
    {                                                                                              \
        access(p, n, false, EMU_PC);                                                               \
    }                                                                                              \
    void __tsan_write##n(void *p)                                                                  \
    {                                                                                              \
        access(p, n, true, EMU_PC);                                                                \
    }                                                                                              \
    void __tsan_unaligned_read##n(void *p)                                                         \
    {                                                                                              \
        access(p, n, false, EMU_PC);                                                               \
    }                                                                                              \
    void __tsan_unaligned_write##n(void *p)                                                        \
    {                                                                                              \
        access(p, n, true, EMU_PC);                                                                \
    }                                                                                              \
    void __tsan_volatile_read##n(void *p)                                                          \
    {                                                                                              \
        access(p, n, false, EMU_PC);                                                               \
    }                                                                                              \
    void __tsan_volatile_write##n(void *p)                                                         \
    {                                                                                              \
        access(p, n, true, EMU_PC);                                                                \
    }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void *, void *) {}
void __tsan_read_range(void *p, size_t n)
{
    access(p, n, false, EMU_PC);
}
void __tsan_write_range(void *p, size_t n)
{
    access(p, n, true, EMU_PC);
}
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
}
#endif
