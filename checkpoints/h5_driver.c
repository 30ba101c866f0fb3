/* checkpoints/h5_driver.c: the file driver behind ht_h5_image. */
#include "checkpoints/h5_driver.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if H5_VERSION_GE(1, 14, 0)
#include <H5FDdevelop.h>
#endif

struct image_file {
    H5FD_t pub; // HDF5's part, must be first
    struct ht_h5_pages *pages;
    haddr_t eoa;
};

struct access_info {
    struct ht_h5_pages *pages;
};

/* Index of the first page with a number >= the given one. */
static int64_t lower_bound(const struct ht_h5_pages *p, int64_t number)
{
    int64_t lo = 0, hi = p->n_pages;

    while (lo < hi) {
        const int64_t mid = (lo + hi) / 2;
        if (p->pages[mid].number < number)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The page of that number, made when absent; NULL without memory. */
static unsigned char *page_get(struct ht_h5_pages *p, int64_t number)
{
    const int64_t i = lower_bound(p, number);

    if (i < p->n_pages && p->pages[i].number == number) return p->pages[i].bytes;
    if (p->n_pages == p->max_pages) {
        const int64_t max = p->max_pages ? 2 * p->max_pages : 64;
        struct ht_h5_page *grown = realloc(p->pages, (size_t)max * sizeof *grown);
        if (!grown) return NULL;
        p->pages = grown;
        p->max_pages = max;
    }
    unsigned char *bytes = calloc(1, HT_H5_PAGE);
    if (!bytes) return NULL;
    memmove(&p->pages[i + 1], &p->pages[i], (size_t)(p->n_pages - i) * sizeof *p->pages);
    p->pages[i] = (struct ht_h5_page){ number, bytes };
    p->n_pages++;
    return bytes;
}

void ht_h5_pages_copy(const struct ht_h5_pages *p, void *out, int64_t at, int64_t n)
{
    const int64_t end = at + n;

    memset(out, 0, (size_t)n);
    for (int64_t i = lower_bound(p, at / HT_H5_PAGE); i < p->n_pages; i++) {
        const int64_t first = p->pages[i].number * HT_H5_PAGE;
        const int64_t from = first > at ? first : at;
        const int64_t to = first + HT_H5_PAGE < end ? first + HT_H5_PAGE : end;
        if (first >= end) break;
        memcpy((char *)out + (from - at), p->pages[i].bytes + (from - first), (size_t)(to - from));
    }
}

void ht_h5_pages_free(struct ht_h5_pages *p)
{
    for (int64_t i = 0; i < p->n_pages; i++) free(p->pages[i].bytes);
    free(p->pages);
    memset(p, 0, sizeof *p);
}

/* ---- what HDF5 calls ---- */

static H5FD_t *driver_open(const char *name, unsigned flags, hid_t fapl, haddr_t maxaddr)
{
    const struct access_info *info = H5Pget_driver_info(fapl);
    struct image_file *f = info ? calloc(1, sizeof *f) : NULL;

    (void)name;
    (void)maxaddr;
    if (!f) return NULL;
    f->pages = info->pages;
    if (flags & H5F_ACC_TRUNC) ht_h5_pages_free(f->pages);
    return &f->pub;
}

static herr_t driver_close(H5FD_t *file)
{
    free(file);
    return 0;
}

static herr_t driver_query(const H5FD_t *file, unsigned long *flags)
{
    (void)file;
    *flags = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_DATA_SIEVE |
             H5FD_FEAT_AGGREGATE_SMALLDATA | H5FD_FEAT_DEFAULT_VFD_COMPATIBLE;
    return 0;
}

static haddr_t driver_get_eoa(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return ((const struct image_file *)file)->eoa;
}

static herr_t driver_set_eoa(H5FD_t *file, H5FD_mem_t type, haddr_t addr)
{
    (void)type;
    ((struct image_file *)file)->eoa = addr;
    return 0;
}

static haddr_t driver_get_eof(const H5FD_t *file, H5FD_mem_t type)
{
    (void)type;
    return (haddr_t)((const struct image_file *)file)->pages->end;
}

static herr_t driver_read(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t addr, size_t size,
                          void *buffer)
{
    (void)type;
    (void)dxpl;
    ht_h5_pages_copy(((struct image_file *)file)->pages, buffer, (int64_t)addr, (int64_t)size);
    return 0;
}

static herr_t driver_write(H5FD_t *file, H5FD_mem_t type, hid_t dxpl, haddr_t addr, size_t size,
                           const void *buffer)
{
    struct ht_h5_pages *p = ((struct image_file *)file)->pages;
    const char *from = buffer;

    (void)type;
    (void)dxpl;
    while (size > 0) {
        const size_t in_page = (size_t)(addr % HT_H5_PAGE);
        const size_t n = size < HT_H5_PAGE - in_page ? size : HT_H5_PAGE - in_page;
        unsigned char *page = page_get(p, (int64_t)(addr / HT_H5_PAGE));
        if (!page) return -1;
        memcpy(page + in_page, from, n);
        from += n;
        addr += n;
        size -= n;
    }
    if ((int64_t)addr > p->end) p->end = (int64_t)addr;
    return 0;
}

static herr_t driver_truncate(H5FD_t *file, hid_t dxpl, hbool_t closing)
{
    struct image_file *f = (struct image_file *)file;

    (void)dxpl;
    (void)closing;
    f->pages->end = (int64_t)f->eoa;
    return 0;
}

static herr_t driver_lock(H5FD_t *file, hbool_t rw)
{
    (void)file;
    (void)rw;
    return 0;
}

static herr_t driver_unlock(H5FD_t *file)
{
    (void)file;
    return 0;
}

static const H5FD_class_t driver_class = {
#if H5_VERSION_GE(1, 14, 0)
    .version = H5FD_CLASS_VERSION,
    .value = 511, // of the numbers that HDF5 leaves to private use
#endif
    .name = "ht_image",
    .maxaddr = (haddr_t)INT64_MAX,
    .fc_degree = H5F_CLOSE_STRONG,
    .fapl_size = sizeof(struct access_info),
    .open = driver_open,
    .close = driver_close,
    .query = driver_query,
    .get_eoa = driver_get_eoa,
    .set_eoa = driver_set_eoa,
    .get_eof = driver_get_eof,
    .read = driver_read,
    .write = driver_write,
    .truncate = driver_truncate,
    .lock = driver_lock,
    .unlock = driver_unlock,
    .fl_map = H5FD_FLMAP_DICHOTOMY,
};

enum ht_status ht_h5_driver_access(hid_t *fapl, hid_t *driver, struct ht_h5_pages *pages)
{
    const struct access_info info = { pages };
    char text[256];

    ht_h5_quiet();
    *fapl = -1;
    *driver = H5FDregister(&driver_class);
    if (*driver >= 0) *fapl = H5Pcreate(H5P_FILE_ACCESS);
    // superblock version 2: metadata with checksums, readable by HDF5 1.8 and later
    if (*fapl >= 0 && H5Pset_driver(*fapl, *driver, &info) >= 0 &&
        H5Pset_libver_bounds(*fapl, H5F_LIBVER_V18, H5F_LIBVER_LATEST) >= 0)
        return HT_OK;
    return HT_FAIL(HT_ERR_MEMORY, "HDF5: no file driver: %s", ht_h5_error(text));
}

/* ---- errors ---- */

static herr_t keep_first(unsigned n, const H5E_error2_t *e, void *out)
{
    if (n == 0 && e->desc) snprintf(out, 256, "%s (%s)", e->desc, e->func_name);
    return 0;
}

const char *ht_h5_error(char text[256])
{
    strcpy(text, "no further information");
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_first, text); // upward: the innermost comes first
    return text;
}

void ht_h5_quiet(void)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}
