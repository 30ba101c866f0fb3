/* checkpoints/h5_driver.h: an HDF5 file driver that keeps the written bytes in memory pages.
 *
 * Bytes that are allotted and never written take no memory. One HDF5 thread.
 */
#ifndef HT_CHECKPOINTS_H5_DRIVER_H
#define HT_CHECKPOINTS_H5_DRIVER_H

#include <hdf5.h>
#include <stdint.h>

#include "core/base/status.h"

#define HT_H5_PAGE 4096

struct ht_h5_page {
    int64_t number; // of bytes [number * HT_H5_PAGE, ...)
    unsigned char *bytes;
};

struct ht_h5_pages {
    int64_t n_pages, max_pages;
    struct ht_h5_page *pages; // ascending
    int64_t end;              // bytes of the finished file
};

/* A file access list whose files live in *pages (which must outlive the files). Close it with
 * H5Pclose and unregister *driver with H5FDunregister. HT_ERR_MEMORY with HDF5's own text on
 * failure. */
enum ht_status ht_h5_driver_access(hid_t *fapl, hid_t *driver, struct ht_h5_pages *pages);

void ht_h5_pages_copy(const struct ht_h5_pages *p, void *out, int64_t at, int64_t n);
void ht_h5_pages_free(struct ht_h5_pages *p);

/* The innermost message on HDF5's error stack, for our messages; and keep HDF5 from printing. */
const char *ht_h5_error(char text[256]);
void ht_h5_quiet(void);

#endif
