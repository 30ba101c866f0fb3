/* tests/emu/cuda_emu.cpp: fibers, barriers and warp collectives (cuda_emu.h).
 *
 * A fiber is made once with ucontext and from then on switched with setjmp and longjmp, which make
 * no system calls. Whoever must wait takes the next fiber of the ready queue; when there is none
 * and not all are done, the block hangs and the launch fails with the list of who waits where.
 */
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>

#include "tests/emu/emu_hopper.h"
#include "tests/emu/emu_impl.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

struct ht_emu_thread *ht_emu_self;
uint3 ht_emu_block_idx;
dim3 ht_emu_block_dim, ht_emu_grid_dim;

namespace {
constexpr size_t kStackBytes = EMU_ASAN ? 512 * 1024 : 128 * 1024;

struct copy { // an asynchronous copy under way
    void *dst;
    const void *src;
    int n_bytes;
};

struct fiber {
    ht_emu_thread thread; // first: ht_emu_self points here
    char *stack;
    bool started, done;
    jmp_buf at;
    ucontext_t first;
    const char *wait_what, *wait_file; // where it waits
    int wait_line;
    void *fake_stack; // ASan's
    std::vector<copy> open;
    std::vector<std::vector<copy>> groups;
};

struct barrier {
    int arrived, expected, votes, line;
    const char *file;
    std::vector<fiber *> waiting;
};

struct collective {
    unsigned mask, arrived;
    const char *what, *file;
    int line;
    void *lanes[32];
};

struct emulator {
    std::vector<fiber *> fibers;
    fiber *current; // NULL: the host
    jmp_buf host;
    void *host_fake_stack;
    const void *host_stack;
    size_t host_stack_bytes;
    bool from_host;             // the last switch
    std::vector<fiber *> ready; // a ring
    size_t ready_head, ready_count;
    int n_threads, n_warps, n_done;
    bool in_kernel, failed, abandoned;
    std::string error;
    const char *kernel;
    void (*body)(void *);
    void *context;
    barrier barriers[16];
    int votes[16]; // of the barrier's last completion
    collective slots[EMU_WARPS][4];
    ~emulator();
} e;

emulator::~emulator()
{
    for (fiber *f : fibers) {
        munmap(f->stack - 4096, kStackBytes + 4096);
        delete f;
    }
}

void push_ready(fiber *f)
{
    e.ready[(e.ready_head + e.ready_count++) % e.ready.size()] = f;
}

fiber *pop_ready()
{
    if (e.ready_count == 0) return nullptr;
    fiber *f = e.ready[e.ready_head];
    e.ready_head = (e.ready_head + 1) % e.ready.size();
    e.ready_count--;
    return f;
}

/* ---- switching ---- */

void enter_from([[maybe_unused]] void *fake_stack)
{
#if EMU_ASAN
    const void *bottom;
    size_t bytes;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &bytes);
    if (e.from_host) e.host_stack = bottom, e.host_stack_bytes = bytes;
#endif
}

/* NULL: to the host. Comes back when somebody switches to the caller. */
void switch_to(fiber *to)
{
    fiber *from = e.current;

    if (from == to) return;
    e.from_host = !from;
    e.current = to;
    ht_emu_self = to ? &to->thread : nullptr;
    if (_setjmp(from ? from->at : e.host) != 0) {
        enter_from(from ? from->fake_stack : e.host_fake_stack);
        return;
    }
#if EMU_ASAN
    __sanitizer_start_switch_fiber(from ? &from->fake_stack : &e.host_fake_stack,
                                   to ? to->stack : e.host_stack,
                                   to ? kStackBytes : e.host_stack_bytes);
#endif
    if (!to) _longjmp(e.host, 1);
    if (to->started) _longjmp(to->at, 1);
    to->started = true;
    setcontext(&to->first);
    abort(); // setcontext does not fail with a context of getcontext
}

void fiber_main()
{
    enter_from(nullptr);
    for (;;) {
        fiber *self = e.current;
        e.body(e.context);
        for (const auto &g : self->groups)
            for (const copy &c : g) emu_shared_land(c.dst, 16);
        for (const copy &c : self->open) emu_shared_land(c.dst, 16);
        self->groups.clear();
        self->open.clear();
        self->done = true;
        e.n_done++;
        switch_to(pop_ready());
    }
}

void make_fiber(fiber *f)
{
    if (!f->stack) {
        void *p = mmap(nullptr, kStackBytes + 4096, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) abort();
        mprotect(p, 4096, PROT_NONE); // the stack grows down into this page
        f->stack = (char *)p + 4096;
    }
    f->started = false;
    f->fake_stack = nullptr;
    getcontext(&f->first);
    f->first.uc_stack.ss_sp = f->stack;
    f->first.uc_stack.ss_size = kStackBytes;
    f->first.uc_link = nullptr;
    makecontext(&f->first, fiber_main, 0);
}

/* Wait for whatever was noted in the fiber. */
void wait_at(const char *what, const char *file, int line)
{
    fiber *self = e.current;
    self->wait_what = what;
    self->wait_file = file;
    self->wait_line = line;
    switch_to(pop_ready());
    self->wait_what = nullptr;
}

/* The block cannot go on: back to the host, which gives the fibers up. */
[[noreturn]] void abandon()
{
    e.abandoned = true;
    switch_to(nullptr);
    abort(); // an abandoned fiber is never switched to
}

void describe_hang()
{
    std::string text;
    int listed = 0, waiting = 0;

    for (int i = 0; i < e.n_threads; i++) {
        const fiber *f = e.fibers[(size_t)i];
        if (f->done) continue;
        waiting++;
        const fiber *before = i > 0 ? e.fibers[(size_t)i - 1] : nullptr;
        if (before && !before->done && before->wait_line == f->wait_line &&
            before->wait_file == f->wait_file)
            continue;
        if (listed++ == 4) continue;
        char part[256];
        snprintf(part, sizeof part, "%s thread %d waits at %s, %s:%d", listed > 1 ? ";" : "", i,
                 f->wait_what ? f->wait_what : "?", f->wait_file ? f->wait_file : "?",
                 f->wait_line);
        text += part;
    }
    emu_error_place("block (%u,%u,%u): %d of %d threads wait for ever, %d have ended:%s",
                    ht_emu_block_idx.x, ht_emu_block_idx.y, ht_emu_block_idx.z, waiting,
                    e.n_threads, e.n_done, text.c_str());
}

void run_block()
{
    e.n_done = 0;
    e.abandoned = false;
    e.ready_head = e.ready_count = 0;
    for (barrier &b : e.barriers) b.arrived = 0, b.waiting.clear();
    for (auto &w : e.slots)
        for (collective &c : w) c.arrived = 0;
    emu_pool_block(e.n_warps);
    for (int i = 0; i < e.n_threads; i++) {
        fiber *f = e.fibers[(size_t)(emu_reverse() ? e.n_threads - 1 - i : i)];
        f->done = false;
        f->wait_what = nullptr;
        push_ready(f);
    }
    switch_to(pop_ready()); // comes back when the queue is empty
    if (!e.abandoned && e.n_done < e.n_threads) {
        describe_hang();
        e.abandoned = true;
    }
    if (e.abandoned)
        for (int i = 0; i < e.n_threads; i++) {
            fiber *f = e.fibers[(size_t)i];
            f->groups.clear();
            f->open.clear();
            make_fiber(f);
        }
    emu_pool_block_end();
}
} // namespace

/* ---- errors ---- */

void emu_error_place(const char *format, ...)
{
    char text[1024];
    va_list args;

    if (e.failed) return; // the first one counts
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    e.failed = true;
    e.error = std::string(e.kernel ? e.kernel : "?") + ", " + text;
}

void ht_emu_error(const char *format, ...)
{
    char text[768];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    emu_error_place("block (%u,%u,%u), thread %d: %s", ht_emu_block_idx.x, ht_emu_block_idx.y,
                    ht_emu_block_idx.z, ht_emu_self ? ht_emu_self->flat : -1, text);
}

const char *emu_error_take()
{
    static std::string taken;
    if (!e.failed) return nullptr;
    taken = e.error;
    e.failed = false;
    return taken.c_str();
}

bool emu_in_kernel()
{
    return e.in_kernel;
}

bool emu_reverse()
{
    static const bool reverse =
        getenv("HT_EMU_ORDER") && strcmp(getenv("HT_EMU_ORDER"), "reverse") == 0;
    return reverse;
}

/* ---- launches ---- */

void ht_emu_launch(const char *kernel, dim3 grid, dim3 block, size_t smem_bytes,
                   void (*body)(void *), void *context)
{
    const size_t n = (size_t)block.x * block.y * block.z;

    emu_count_work();
    e.kernel = kernel;
    if (n < 1 || n > EMU_THREADS_MAX || grid.x < 1 || grid.y < 1 || grid.z < 1 ||
        grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
        emu_error_place("grid (%u,%u,%u), block (%u,%u,%u): invalid configuration", grid.x, grid.y,
                        grid.z, block.x, block.y, block.z);
        return;
    }
    if (smem_bytes > EMU_SMEM_MAX) {
        emu_error_place("%zu bytes of dynamic shared memory; an sm_80 block has %d", smem_bytes,
                        (int)EMU_SMEM_MAX);
        return;
    }
    while (e.fibers.size() < n) {
        fiber *f = new fiber();
        make_fiber(f);
        e.fibers.push_back(f);
    }
    if (e.ready.size() < n) e.ready.resize(n);
    e.n_threads = (int)n;
    e.n_warps = (int)((n + 31) / 32);
    e.body = body;
    e.context = context;
    ht_emu_block_dim = block;
    ht_emu_grid_dim = grid;
    for (size_t i = 0; i < n; i++)
        e.fibers[i]->thread = { { (unsigned)(i % block.x), (unsigned)(i / block.x % block.y),
                                  (unsigned)(i / block.x / block.y) },
                                (int)i,
                                (int)(i % 32),
                                (int)(i / 32) };
    e.in_kernel = true;
    emu_heap_open();
    emu_pool_launch(smem_bytes);
    const uint64_t n_blocks = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t i = 0; i < n_blocks && !e.failed; i++) {
        const uint64_t b = emu_reverse() ? n_blocks - 1 - i : i;
        ht_emu_block_idx = { (unsigned)(b % grid.x), (unsigned)(b / grid.x % grid.y),
                             (unsigned)(b / grid.x / grid.y) };
        run_block();
    }
    emu_heap_close();
    e.in_kernel = false;
}

/* ---- barriers ---- */

int ht_emu_barrier(int id, int n_threads, int vote, const char *file, int line)
{
    if (id < 0 || id > 15 || n_threads % 32 != 0) {
        ht_emu_error("barrier %d of %d threads at %s:%d; ids are 0 to 15, threads whole warps", id,
                     n_threads, file, line);
        abandon();
    }
    barrier &b = e.barriers[id];
    const int expected = n_threads > 0 ? n_threads : e.n_threads;

    if (b.arrived == 0) {
        b.expected = expected;
        b.file = file;
        b.line = line;
        b.votes = 0;
    } else if (b.expected != expected || (id == 0 && (b.line != line || b.file != file))) {
        ht_emu_error("a barrier at %s:%d meets one at %s:%d (%d and %d threads)", file, line,
                     b.file, b.line, expected, b.expected);
        abandon();
    }
    b.votes += vote;
    b.arrived++;
    b.waiting.push_back(e.current);
    if (b.arrived < b.expected) {
        wait_at("a barrier", file, line);
        return e.votes[id];
    }
    uint32_t warps = 0;
    for (const fiber *f : b.waiting) warps |= 1u << f->thread.warp;
    emu_clock_join(warps);
    e.votes[id] = b.votes;
    // in the order of the block, not of arrival
    std::vector<bool> here((size_t)e.n_threads);
    for (const fiber *f : b.waiting) here[(size_t)f->thread.flat] = true;
    for (int i = 0; i < e.n_threads; i++) {
        const size_t at = (size_t)(emu_reverse() ? e.n_threads - 1 - i : i);
        if (here[at]) push_ready(e.fibers[at]);
    }
    b.waiting.clear();
    b.arrived = 0;
    fiber *next = pop_ready();
    switch_to(next);
    return e.votes[id];
}

/* Counts at barrier `id` without waiting. */
void ht_emu_arrive(int id, int n_threads, const char *file, int line)
{
    barrier &b = e.barriers[id];
    if (b.arrived > 0 && b.expected != n_threads) {
        ht_emu_error("bar_arrive at %s:%d meets a barrier at %s:%d (%d and %d threads)", file, line,
                     b.file, b.line, n_threads, b.expected);
        abandon();
    }
    b.expected = n_threads;
    b.file = file;
    b.line = line;
    if (++b.arrived < n_threads) return;
    for (fiber *f : b.waiting) push_ready(f);
    b.waiting.clear();
    b.arrived = 0;
}

void ht_emu_yield()
{
    fiber *self = e.current;
    if (e.ready_count == 0) return;
    push_ready(self);
    switch_to(pop_ready());
}

/* ---- warp collectives ---- */

void ht_emu_collective(unsigned mask, void *data, void (*work)(void **lanes, unsigned mask),
                       const char *what, const char *file, int line)
{
    const int lane = ht_emu_self->lane, warp = ht_emu_self->warp;
    collective *slot = nullptr;

    if (!(mask >> lane & 1)) {
        ht_emu_error("lane %d is not in the mask %#x of its %s at %s:%d", lane, mask, what, file,
                     line);
        abandon();
    }
    for (collective &c : e.slots[warp]) {
        if (c.arrived && (c.mask & mask)) {
            slot = &c;
            break;
        }
        if (!c.arrived && !slot) slot = &c;
    }
    for (collective &c : e.slots[warp])
        if (c.arrived && (c.mask & mask)) slot = &c;
    if (!slot) {
        ht_emu_error("more than 4 collectives of a warp at once, %s:%d", file, line);
        abandon();
    }
    if (slot->arrived == 0) {
        slot->mask = mask;
        slot->what = what;
        slot->file = file;
        slot->line = line;
    } else if (slot->mask != mask || slot->line != line || slot->what != what) {
        ht_emu_error("lanes diverge: lane %d is at %s %s:%d with mask %#x, others at %s %s:%d with "
                     "mask %#x",
                     lane, what, file, line, mask, slot->what, slot->file, slot->line, slot->mask);
        abandon();
    }
    slot->arrived |= 1u << lane;
    slot->lanes[lane] = data;
    if (slot->arrived != mask) {
        wait_at(what, file, line);
        return;
    }
    if (work) work(slot->lanes, mask);
    slot->arrived = 0;
    for (int i = 0; i < 32; i++) {
        const int l = emu_reverse() ? 31 - i : i;
        if (mask >> l & 1) push_ready(e.fibers[(size_t)(warp * 32 + l)]);
    }
    switch_to(pop_ready());
}

void ht_emu_syncwarp(unsigned mask, const char *file, int line)
{
    ht_emu_collective(
        mask, nullptr, [](void **, unsigned) { emu_clock_tick(ht_emu_self->warp); }, "__syncwarp",
        file, line);
}

/* ---- cp.async ---- */

void cp_async_16_zero(void *smem, const void *global, int n_bytes)
{
    if (((uintptr_t)smem | (n_bytes > 0 ? (uintptr_t)global : 0)) % 16 != 0 || n_bytes < 0 ||
        n_bytes > 16) {
        ht_emu_error("cp.async of %d bytes from %p to %p; 16-byte alignment, 0 to 16 bytes",
                     n_bytes, global, smem);
        return;
    }
    if (n_bytes > 0 && !emu_heap_valid(global, (size_t)n_bytes)) {
        ht_emu_error("cp.async reads %d bytes at %p, outside of device allocations", n_bytes,
                     global);
        return;
    }
    if (!emu_shared_issue(smem, 16)) return;
    e.current->open.push_back({ smem, global, n_bytes });
}

void cp_async_commit()
{
    e.current->groups.push_back(std::move(e.current->open));
    e.current->open.clear();
}

void ht_emu_cp_async_wait(int n_pending)
{
    fiber *f = e.current;
    if ((int)f->groups.size() <= n_pending) return;
    const size_t n = f->groups.size() - (size_t)n_pending;
    for (size_t i = 0; i < n; i++)
        for (const copy &c : f->groups[i]) {
            emu_shared_land(c.dst, 16);
            memset(c.dst, 0, 16);
            memcpy(c.dst, c.src, (size_t)c.n_bytes);
        }
    f->groups.erase(f->groups.begin(), f->groups.begin() + (std::ptrdiff_t)n);
}
