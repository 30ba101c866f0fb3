/* checkpoints/safetensors.h: reader of the safetensors format (8-byte header length, JSON header,
 * data).
 *
 * Bounds: header at most 100 MB and inside the file, starts with '{', no duplicate keys, known
 * dtypes, shape product equals bytes, offsets without hole or overlap, end = file size. The data is
 * mapped read-only; tensors are borrowed until close, in the order of their places in the file.
 */
#ifndef HT_CHECKPOINTS_SAFETENSORS_H
#define HT_CHECKPOINTS_SAFETENSORS_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/dtype.h"
#include "core/base/status.h"

struct ht_safetensors;

struct ht_safetensors_tensor {
    const char *name;
    enum ht_dtype dtype;
    int n_dims;
    int64_t shape[8], n;
    const void *data; // may stand at any byte: the format does not align
};

enum ht_status ht_safetensors_open(struct ht_safetensors **out, const char *path);
void ht_safetensors_close(struct ht_safetensors *s);
int ht_safetensors_count(const struct ht_safetensors *s);
const struct ht_safetensors_tensor *ht_safetensors_at(const struct ht_safetensors *s, int i);
const struct ht_safetensors_tensor *ht_safetensors_find(const struct ht_safetensors *s,
                                                        const char *name);

/* These n_bytes of a tensor have been read: their pages need not stay in this process. Reading them
 * again is possible, at a cost. */
void ht_safetensors_drop(const void *data, size_t n_bytes);

#endif
