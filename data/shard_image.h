/* data/shard_image.h: an HDF5 file driver over a file descriptor in memory; not for users of
 * shards.
 *
 * HDF5 1.10 crashes when a write fails while it closes a file (tried: a segmentation fault at a
 * limit on file sizes), so the writer gives it no disk that could be full: HDF5 lays the file out
 * in a memfd, with holes where the arrays go, and we write what it made.
 */
#ifndef HT_DATA_SHARD_IMAGE_H
#define HT_DATA_SHARD_IMAGE_H

#include <hdf5.h>

/* Register the driver (*driver: H5FDunregister it) and make a file that is created with plist live
 * in fd, which stays the caller's. Negative on failure, HDF5's error stack says why. */
herr_t ht_shard_image_use(hid_t plist, int fd, hid_t *driver);

#endif
