/* checkpoints/h5_image.c: the HDF5 structure of rank files and of the index. */
#include "checkpoints/h5_image.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/h5_driver.h"

struct ht_h5_image {
    struct ht_h5_pages pages;
};

/* What is open while an image is made; every handle -1 or open. */
struct maker {
    struct ht_h5_image *image;
    hid_t driver, fapl, fcpl, lcpl, gcpl, file;
};

static enum ht_status h5_fail(const char *what, const char *name)
{
    char text[256];
    return HT_FAIL(HT_ERR_MEMORY, "HDF5: %s %s: %s", what, name, ht_h5_error(text));
}

static enum ht_status maker_open(struct maker *k, const char *name)
{
    *k = (struct maker){ NULL, -1, -1, -1, -1, -1, -1 };
    k->image = calloc(1, sizeof *k->image);
    if (!k->image) return HT_FAIL(HT_ERR_MEMORY, "no memory for %s", name);
    HT_TRY(ht_h5_driver_access(&k->fapl, &k->driver, &k->image->pages));
    k->fcpl = H5Pcreate(H5P_FILE_CREATE);
    k->lcpl = H5Pcreate(H5P_LINK_CREATE);
    k->gcpl = H5Pcreate(H5P_GROUP_CREATE);
    // no times in the files: equal states give equal bytes
    if (k->fcpl < 0 || k->lcpl < 0 || k->gcpl < 0 || H5Pset_obj_track_times(k->fcpl, 0) < 0 ||
        H5Pset_obj_track_times(k->gcpl, 0) < 0)
        return h5_fail("properties of", name);
    k->file = H5Fcreate(name, H5F_ACC_TRUNC, k->fcpl, k->fapl);
    return k->file < 0 ? h5_fail("creating", name) : HT_OK;
}

/* Close everything; the image goes to *out when all went well. */
static enum ht_status maker_close(struct maker *k, struct ht_h5_image **out, enum ht_status st,
                                  const char *name)
{
    if (k->file >= 0 && H5Fclose(k->file) < 0 && st == HT_OK) st = h5_fail("finishing", name);
    if (k->gcpl >= 0) H5Pclose(k->gcpl);
    if (k->lcpl >= 0) H5Pclose(k->lcpl);
    if (k->fcpl >= 0) H5Pclose(k->fcpl);
    if (k->fapl >= 0) H5Pclose(k->fapl);
    if (k->driver >= 0) H5FDunregister(k->driver);
    *out = NULL;
    if (st == HT_OK)
        *out = k->image;
    else
        ht_h5_image_free(k->image);
    return st;
}

static enum ht_status make_group(const struct maker *k, const char *name)
{
    const hid_t g = H5Gcreate2(k->file, name, k->lcpl, k->gcpl, H5P_DEFAULT);
    if (g < 0) return h5_fail("group", name);
    return H5Gclose(g) < 0 ? h5_fail("group", name) : HT_OK;
}

/* ---- rank files ---- */

static enum ht_status make_piece(const struct maker *k, hid_t dcpl, const char *name, int64_t n,
                                 int64_t *at)
{
    const hsize_t size = (hsize_t)n;
    const hid_t space = H5Screate_simple(1, &size, NULL);
    hid_t set = -1;

    if (space >= 0)
        set = H5Dcreate2(k->file, name, H5T_IEEE_F32LE, space, k->lcpl, dcpl, H5P_DEFAULT);
    const haddr_t place = set >= 0 ? H5Dget_offset(set) : HADDR_UNDEF;
    const enum ht_status st = place == HADDR_UNDEF ? h5_fail("dataset", name) : HT_OK;
    if (set >= 0) H5Dclose(set);
    if (space >= 0) H5Sclose(space);
    *at = (int64_t)place;
    return st;
}

enum ht_status ht_h5_image_rank(struct ht_h5_image **out, const struct ht_manifest *m,
                                struct ht_mf_piece *pieces, int64_t n_pieces)
{
    enum ht_status st;
    struct maker k;
    char name[160];
    hid_t dcpl = -1;
    int array = -1, tensor = -1;

    *out = NULL;
    HT_TRY_GOTO(st, done, maker_open(&k, "a rank's file"));
    dcpl = H5Pcreate(H5P_DATASET_CREATE);
    // contiguous and allotted now, never filled: only the snapshot writes the data
    if (dcpl < 0 || H5Pset_layout(dcpl, H5D_CONTIGUOUS) < 0 ||
        H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY) < 0 ||
        H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER) < 0 || H5Pset_obj_track_times(dcpl, 0) < 0) {
        st = h5_fail("properties of", "a rank's file");
        goto done;
    }
    for (int a = 0; a < HT_CKPT_ARRAYS; a++)
        HT_TRY_GOTO(st, done, make_group(&k, ht_ckpt_array_names[a]));
    for (int64_t i = 0; i < n_pieces; i++) {
        struct ht_mf_piece *p = &pieces[i];
        const char *array_name = ht_ckpt_array_names[p->array], *t = m->tensors[p->tensor].name;
        if (p->array != array || p->tensor != tensor) {
            snprintf(name, sizeof name, "/%s/%s", array_name, t);
            HT_TRY_GOTO(st, done, make_group(&k, name));
            array = p->array;
            tensor = p->tensor;
        }
        snprintf(name, sizeof name, "/%s/%s/%lld", array_name, t, (long long)p->start);
        HT_TRY_GOTO(st, done, make_piece(&k, dcpl, name, p->n, &p->at));
    }
done:
    if (dcpl >= 0) H5Pclose(dcpl);
    return maker_close(&k, out, st, "a rank's file");
}

/* ---- the index ---- */

int ht_h5_boxes(struct ht_box boxes[HT_MAX_BOXES], const struct ht_mf_tensor *t, int64_t start,
                int64_t n)
{
    int64_t at = start, end = start + n;
    int n_boxes = 0;

    while (at < end) {
        struct ht_box *b = &boxes[n_boxes++];
        int64_t block = t->n; // elements below one index of dimension d
        int64_t rest = at;
        *b = (struct ht_box){ .first = at };
        // the outermost dimension along which a whole index fits from here
        for (int d = 0; d < t->n_dims; d++) {
            block /= t->shape[d];
            b->start[d] = rest / block;
            b->count[d] = 1;
            rest %= block;
            if (rest == 0 && end - at >= block) {
                const int64_t left = t->shape[d] - b->start[d], fit = (end - at) / block;
                b->count[d] = left < fit ? left : fit;
                b->n = b->count[d] * block;
                for (int e = d + 1; e < t->n_dims; e++) b->count[e] = t->shape[e];
                break;
            }
        }
        at += b->n;
    }
    return n_boxes;
}

static enum ht_status map_piece(hid_t dcpl, hid_t space, const struct ht_manifest *m,
                                const struct ht_mf_piece *p)
{
    const struct ht_mf_tensor *t = &m->tensors[p->tensor];
    struct ht_box boxes[HT_MAX_BOXES];
    char file[64], source[160];
    const hsize_t size = (hsize_t)p->n;
    const hid_t src = H5Screate_simple(1, &size, NULL);
    bool ok = src >= 0;

    ht_ckpt_rank_file(file, p->file, m->world);
    snprintf(source, sizeof source, "/%s/%s/%lld", ht_ckpt_array_names[p->array], t->name,
             (long long)p->start);
    const int n_boxes = ht_h5_boxes(boxes, t, p->start, p->n);
    for (int i = 0; i < n_boxes && ok; i++) {
        const struct ht_box *b = &boxes[i];
        hsize_t start[3], count[3];
        const hsize_t from = (hsize_t)(b->first - p->start), n = (hsize_t)b->n;
        for (int d = 0; d < t->n_dims; d++) {
            start[d] = (hsize_t)b->start[d];
            count[d] = (hsize_t)b->count[d];
        }
        ok = H5Sselect_hyperslab(space, H5S_SELECT_SET, start, NULL, count, NULL) >= 0 &&
             H5Sselect_hyperslab(src, H5S_SELECT_SET, &from, NULL, &n, NULL) >= 0 &&
             H5Pset_virtual(dcpl, space, file, source, src) >= 0;
    }
    const enum ht_status st = ok ? HT_OK : h5_fail("virtual dataset", t->name);
    if (src >= 0) H5Sclose(src);
    return st;
}

/* The whole tensor of pieces[0 .. n). */
static enum ht_status make_virtual(const struct maker *k, const struct ht_manifest *m,
                                   const struct ht_mf_piece *pieces, int64_t n)
{
    static const char *const prefix[HT_CKPT_ARRAYS] = { "", "optimizer/exp_avg/",
                                                        "optimizer/exp_avg_sq/" };
    const struct ht_mf_tensor *t = &m->tensors[pieces[0].tensor];
    const float missing = NAN; // a file that is not there must not read as zeros
    enum ht_status st = HT_OK;
    hsize_t shape[3];
    char name[160];
    hid_t set = -1;

    for (int d = 0; d < t->n_dims; d++) shape[d] = (hsize_t)t->shape[d];
    snprintf(name, sizeof name, "/%s%s", prefix[pieces[0].array], t->name);
    const hid_t space = H5Screate_simple(t->n_dims, shape, NULL);
    const hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
    if (space < 0 || dcpl < 0 || H5Pset_obj_track_times(dcpl, 0) < 0 ||
        H5Pset_fill_value(dcpl, H5T_NATIVE_FLOAT, &missing) < 0) {
        st = h5_fail("virtual dataset", name);
        goto done;
    }
    for (int64_t i = 0; i < n; i++) HT_TRY_GOTO(st, done, map_piece(dcpl, space, m, &pieces[i]));
    H5Sselect_all(space);
    set = H5Dcreate2(k->file, name, H5T_IEEE_F32LE, space, k->lcpl, dcpl, H5P_DEFAULT);
    if (set < 0) st = h5_fail("virtual dataset", name);
done:
    if (set >= 0 && H5Dclose(set) < 0 && st == HT_OK) st = h5_fail("virtual dataset", name);
    if (dcpl >= 0) H5Pclose(dcpl);
    if (space >= 0) H5Sclose(space);
    return st;
}

enum ht_status ht_h5_image_index(struct ht_h5_image **out, const struct ht_manifest *m)
{
    enum ht_status st;
    struct maker k;

    *out = NULL;
    HT_TRY_GOTO(st, done, maker_open(&k, "index.h5"));
    HT_TRY_GOTO(st, done, make_group(&k, "optimizer"));
    HT_TRY_GOTO(st, done, make_group(&k, "optimizer/exp_avg"));
    HT_TRY_GOTO(st, done, make_group(&k, "optimizer/exp_avg_sq"));
    for (int64_t i = 0; i < m->n_pieces;) {
        const struct ht_mf_piece *p = &m->pieces[i];
        int64_t n = 1;
        while (i + n < m->n_pieces && p[n].array == p->array && p[n].tensor == p->tensor) n++;
        HT_TRY_GOTO(st, done, make_virtual(&k, m, p, n));
        i += n;
    }
done:
    return maker_close(&k, out, st, "index.h5");
}

/* ---- use ---- */

void ht_h5_image_free(struct ht_h5_image *image)
{
    if (!image) return;
    ht_h5_pages_free(&image->pages);
    free(image);
}

int64_t ht_h5_image_bytes(const struct ht_h5_image *image)
{
    return image->pages.end;
}

void ht_h5_image_copy(const struct ht_h5_image *image, void *out, int64_t at, int64_t n)
{
    ht_h5_pages_copy(&image->pages, out, at, n);
}
