/* tests/emu/emu_impl.h: what the emulation's own files share. */
#ifndef HT_EMU_IMPL_H
#define HT_EMU_IMPL_H

#include "tests/emu/cuda_emu.h"

/* An H100 gives a block 227 KiB and an A100 163 KiB: portable kernels must fit the latter. */
enum {
    EMU_ARCH = 80,
    EMU_SMS = 4,
    EMU_SMEM_MAX = 163 * 1024,
    EMU_THREADS_MAX = 1024,
    EMU_WARPS = 32
};

bool emu_in_kernel();
bool emu_reverse(); // HT_EMU_ORDER=reverse

/* cuda_emu.cpp: keeps the first message since the last check; kernel, block and thread are added.
 */
const char *emu_error_take(); // NULL when there is none
void emu_error_place(const char *format, ...) __attribute__((format(printf, 1, 2))); // as is

/* emu_check.cpp: the pool of shared memory and who touched it. */
void emu_pool_launch(size_t dynamic_bytes);
void emu_pool_block(int n_warps);
void emu_pool_block_end();
void emu_clock_join(uint32_t warps); // a barrier of these warps
void emu_clock_tick(int warp);       // __syncwarp
void emu_shared_read(const void *p, size_t bytes, const char *file, int line);
/* cp.async: p must be in the pool. issue: from now to landing nobody may touch it. */
bool emu_shared_issue(void *p, size_t bytes);
void emu_shared_land(void *p, size_t bytes);

/* emu_memory.cpp */
void emu_heap_open();
void emu_heap_close();
bool emu_heap_contains(const void *p);            // anywhere in the device's address range
bool emu_heap_valid(const void *p, size_t bytes); // inside one allocation

/* Streams. Kernels and copies are done at once; nccl_emu.cpp has work that is done later, in the order
 * of its tickets (1, 2, ...), by whoever waits for it. */
struct emu_later_hooks {
    bool (*is_done)(uint64_t ticket); // from any thread
    void (*wait)(uint64_t ticket);
};
extern struct emu_later_hooks emu_later;
void emu_count_work(); // a kernel or a copy
void emu_stream_defer(cudaStream_t s, uint64_t ticket);
bool emu_stream_is_current(cudaStream_t s); // it has waited for all kernels and copies so far

#endif
