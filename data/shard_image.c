/* data/shard_image.c: the HDF5 driver: pread and pwrite on a descriptor that it does not own. */
#include "data/shard_image.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/shard_format.h"

struct image {
    H5FD_t base; // first, as HDF5 wants it
    int fd;
    haddr_t end; // of what HDF5 has allotted
};

static const char name_of_image[] = "shard behind a descriptor";

static H5FD_t *image_open(const char *name, unsigned flags, hid_t plist, haddr_t max)
{
    const int *fd = H5Pget_driver_info(plist);
    struct image *f = fd ? calloc(1, sizeof *f) : NULL;

    (void)name;
    (void)max;
    if (!f) return NULL;
    f->fd = *fd;
    if ((flags & H5F_ACC_TRUNC) && ftruncate(f->fd, 0) != 0) {
        free(f);
        return NULL;
    }
    return &f->base;
}

static herr_t image_close(H5FD_t *file)
{
    free(file);
    return 0;
}

static int image_compare(const H5FD_t *a, const H5FD_t *b)
{
    const int x = ((const struct image *)a)->fd, y = ((const struct image *)b)->fd;
    return (x > y) - (x < y);
}

static herr_t image_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_AGGREGATE_SMALLDATA;
    return 0;
}

static haddr_t image_get_eoa(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const struct image *)file)->end;
}

static herr_t image_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t end)
{
    (void)type;
    ((struct image *)file)->end = end;
    return 0;
}

static haddr_t image_get_eof(const H5FD_t *file, H5FD_mem_t type)
{
    struct stat sb;

    (void)type;
    return fstat(((const struct image *)file)->fd, &sb) == 0 ? (haddr_t)sb.st_size : HADDR_UNDEF;
}

static herr_t image_read(H5FD_t *file, H5FD_mem_t type, hid_t plist, haddr_t at, size_t n,
                         void *out)
{
    const int fd = ((struct image *)file)->fd;

    (void)type;
    (void)plist;
    return ht_shard_pread(fd, name_of_image, out, n, (int64_t)at) == HT_OK ? 0 : -1;
}

static herr_t image_write(H5FD_t *file, H5FD_mem_t type, hid_t plist, haddr_t at, size_t n,
                          const void *data)
{
    const int fd = ((struct image *)file)->fd;

    (void)type;
    (void)plist;
    return ht_shard_pwrite(fd, name_of_image, data, n, (int64_t)at) == HT_OK ? 0 : -1;
}

static herr_t image_truncate(H5FD_t *file, hid_t plist, hbool_t closing)
{
    const struct image *f = (struct image *)file;

    (void)plist;
    (void)closing;
    return ftruncate(f->fd, (off_t)f->end);
}

static const H5FD_class_t image_class = {
    .name = name_of_image,
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_WEAK,
    .fapl_size = sizeof(int), // copied byte by byte
    .open = image_open,
    .close = image_close,
    .cmp = image_compare,
    .query = image_query,
    .get_eoa = image_get_eoa,
    .set_eoa = image_set_eoa,
    .get_eof = image_get_eof,
    .read = image_read,
    .write = image_write,
    .truncate = image_truncate,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

herr_t ht_shard_image_use(hid_t plist, int fd, hid_t *driver)
{
    *driver = H5FDregister(&image_class);
    return *driver < 0 ? -1 : H5Pset_driver(plist, *driver, &fd);
}
