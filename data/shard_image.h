/* data/shard_image.h: an HDF5 file driver over a file descriptor of ours; not for users of shards.
 *
 * For writing: HDF5 1.10 crashes when a write fails while it closes a file (tried: a segmentation
 * fault at a limit on file sizes), so it gets no disk that could be full: it lays the file out in a
 * memfd, with holes where the arrays go, and we write what it made. For reading: it sees the very
 * file that has been checked, whatever happens to the name, and takes no locks, which some network
 * file systems refuse.
 */
#ifndef HT_DATA_SHARD_IMAGE_H
#define HT_DATA_SHARD_IMAGE_H

#include <hdf5.h>

/* Register the driver (*driver: H5FDunregister it) and make a file that is created with plist live
 * in fd, which stays the caller's. Negative on failure, HDF5's error stack says why. */
herr_t ht_shard_image_use(hid_t plist, int fd, hid_t *driver);

#endif
