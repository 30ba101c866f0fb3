/* checkpoints/h5_image.h: the HDF5 structure of a checkpoint file, made in memory once per run.
 *
 * The tensors of a run keep their places, so the structure (superblock, groups, dataset headers) of
 * its files never changes from save to save. HDF5 makes it once, through a file driver that keeps
 * what is written in memory pages; the data are allotted, not written. A save then writes the file
 * front to back without HDF5: bytes between the datasets come from here, the datasets from the
 * snapshot. So HDF5 is never called from the writing thread, a full disk never reaches it (its own
 * recovery from failed writes leaves files that it cannot close), and hashing needs no second pass.
 *
 * All functions: the main thread (HDF5 is not thread-safe), except ht_h5_image_copy.
 */
#ifndef HT_CHECKPOINTS_H5_IMAGE_H
#define HT_CHECKPOINTS_H5_IMAGE_H

#include <stdint.h>

#include "checkpoints/manifest.h"
#include "core/base/status.h"

struct ht_h5_image;

/* The file of one rank: dataset /ARRAY/TENSOR/START (1-D, fp32, little endian, contiguous) for each
 * piece; the place of each is written to its `at`. Names and shapes come from m. */
enum ht_status ht_h5_image_rank(struct ht_h5_image **out, const struct ht_manifest *m,
                                struct ht_mf_piece *pieces, int64_t n_pieces);

/* index.h5: virtual datasets of whole tensors over the pieces of m (sorted by ht_manifest_index;
 * `file` is the rank): /TENSOR, /optimizer/exp_avg/TENSOR, /optimizer/exp_avg_sq/TENSOR. */
enum ht_status ht_h5_image_index(struct ht_h5_image **out, const struct ht_manifest *m);

void ht_h5_image_free(struct ht_h5_image *image);
int64_t ht_h5_image_bytes(const struct ht_h5_image *image);

/* Bytes [at, at + n) of the structure; zeros where HDF5 wrote nothing. Any thread. */
void ht_h5_image_copy(const struct ht_h5_image *image, void *out, int64_t at, int64_t n);

/* A box of a row-major tensor that is one run of elements: start and count per dimension. */
struct ht_box {
    int64_t start[3], count[3], first, n; // first element in the flat tensor, elements
};
#define HT_MAX_BOXES 5

/* Elements [start, start + n) of a tensor as at most 2 * n_dims - 1 boxes (partial first row, whole
 * rows, partial last row, and the same within the partial rows of a 3-D tensor). */
int ht_h5_boxes(struct ht_box boxes[HT_MAX_BOXES], const struct ht_mf_tensor *t, int64_t start,
                int64_t n);

#endif
