/* core/base/cuda_device.h: what a CUDA backend holds; for kernel launchers and collectives.
 *
 * Streams and events are void pointers here, so that C files may include this header.
 */
#ifndef HT_BASE_CUDA_DEVICE_H
#define HT_BASE_CUDA_DEVICE_H

#include <stdbool.h>
#include <stddef.h>

#include "core/base/backend.h"

struct ht_cuda_device {
    int ordinal;            // CUDA's number of the device
    int arch;               // 10 * major + minor: 80, 90, ...
    int n_sms;              // multiprocessors
    size_t smem_block_max;  // most shared memory of one block, bytes (opt-in limit)
    size_t memory_bytes;    // of the device
    void *compute, *comm;   // cudaStream_t: operations; collectives (higher priority)
    bool sync_every_launch; // HT_CUDA_SYNC=1: an error is reported by the launch that caused it
    char name[256];
};

/* The device of a CUDA backend. */
static inline struct ht_cuda_device *ht_cuda_device_of(const struct ht_backend *be)
{
    return (struct ht_cuda_device *)be->device;
}

/* backend_cuda.cu, for backend.c only: the functions behind backend.h. */
enum ht_status ht_cuda_device_create(void **out, int local_rank);
void ht_cuda_device_free(void *device); // accepts NULL
enum ht_status ht_cuda_alloc(void **out, struct ht_backend *be, const char *what, size_t bytes);
void ht_cuda_free(struct ht_backend *be, void *p);
enum ht_status ht_cuda_host_alloc(void **out, struct ht_backend *be, const char *what,
                                  size_t bytes);
void ht_cuda_host_free(struct ht_backend *be, void *p);
enum ht_status ht_cuda_upload(struct ht_backend *be, void *dst, const void *src, size_t bytes);
enum ht_status ht_cuda_download(struct ht_backend *be, void *dst, const void *src, size_t bytes);
enum ht_status ht_cuda_copy(struct ht_backend *be, void *dst, const void *src, size_t bytes);
enum ht_status ht_cuda_zero(struct ht_backend *be, void *dst, size_t bytes);
enum ht_status ht_cuda_download_start(struct ht_backend *be, void *dst, const void *src,
                                      size_t bytes);
enum ht_status ht_cuda_synchronize(struct ht_backend *be);
enum ht_status ht_cuda_count(int *n, size_t *memory_bytes);
enum ht_status ht_cuda_uuid(unsigned char uuid[16], int local_rank);
enum ht_status ht_cuda_mark_set(struct ht_backend *be, struct ht_backend_mark *m);
enum ht_status ht_cuda_mark_wait(struct ht_backend *be, const struct ht_backend_mark *m);
enum ht_status ht_cuda_mark_ms(float *ms, struct ht_backend *be, const struct ht_backend_mark *from,
                               const struct ht_backend_mark *to);
void ht_cuda_mark_free(struct ht_backend *be, struct ht_backend_mark *m);

/* HT_OK, or HT_ERR_CUDA with the runtime's text when a launch since the last check failed. */
enum ht_status ht_cuda_check_launch(struct ht_backend *be, const char *what);

/* HT_OK for 0 (cudaSuccess); otherwise HT_ERR_CUDA (HT_ERR_MEMORY when memory is short), with
 * `what` and the runtime's name and text of the error. */
enum ht_status ht_cuda_check(int cuda_error, const char *what);

#endif
