/* checkpoints/weights_h5.c: the HDF5 structure of weights.h5, made in memory; data go in by pwrite
 * (h5_driver.h says why). */
#include <hdf5.h>
#include <stdio.h>
#include <string.h>

#include "checkpoints/h5_driver.h"
#include "checkpoints/weights_impl.h"

struct maker {
    hid_t fapl, driver, fcpl, gcpl, dcpl, file;
};

static enum ht_status h5_fail(const char *what, const char *name)
{
    char text[256];
    return HT_FAIL(HT_ERR_MEMORY, "HDF5: %s '%s' in " HT_WEIGHTS_H5 ": %s", what, name,
                   ht_h5_error(text));
}

static enum ht_status attribute(hid_t object, const char *name, hid_t type, hsize_t n,
                                const void *value)
{
    const hid_t space = n ? H5Screate_simple(1, &n, NULL) : H5Screate(H5S_SCALAR);
    const hid_t a =
        space < 0 ? -1 : H5Acreate2(object, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    const bool ok = a >= 0 && H5Awrite(a, type, value) >= 0;

    if (a >= 0) H5Aclose(a);
    if (space >= 0) H5Sclose(space);
    return ok ? HT_OK : h5_fail("attribute", name);
}

static enum ht_status attributes(hid_t group, const struct ht_wf_tensor *t)
{
    const char *form = ht_wf_form_name(&t->form);
    const hid_t text = H5Tcopy(H5T_C_S1);

    if (text < 0 || H5Tset_size(text, strlen(form)) < 0) return h5_fail("type of", t->name);
    const enum ht_status st = attribute(group, "format", text, 0, form);
    H5Tclose(text);
    HT_TRY(st);
    if (t->form.quantised) HT_TRY(attribute(group, "group", H5T_NATIVE_INT, 0, &t->form.group));
    return attribute(group, "shape", H5T_NATIVE_INT64, (hsize_t)t->n_dims, t->shape);
}

/* Dataset p, allotted and not written; its place to the manifest. */
static enum ht_status dataset(struct maker *k, hid_t group, struct ht_wf_tensor *t, int p)
{
    const bool data = !t->form.quantised, codes = t->form.quantised && p == 0;
    const int64_t n_groups = data ? 0 : ht_q_groups(t->form.format, t->form.group, t->k);
    hsize_t shape[3] = { (hsize_t)t->n_rows,
                         (hsize_t)(codes ? ht_q_code_bytes(t->form.format, t->k) : n_groups), 1 };
    const hid_t type = data     ? t->form.dtype == HT_DTYPE_F32 ? H5T_IEEE_F32LE : H5T_STD_U16LE
                       : codes  ? t->form.format == HT_Q_INT8 ? H5T_STD_I8LE : H5T_STD_U8LE
                       : p == 1 ? H5T_STD_U16LE
                                : H5T_STD_U8LE;

    for (int d = 0; data && d < t->n_dims; d++) shape[d] = (hsize_t)t->shape[d];
    const hid_t space = H5Screate_simple(data ? t->n_dims : 2, shape, NULL);
    const hid_t set = space < 0 ? -1
                                : H5Dcreate2(group, ht_wf_part_name(t, p), type, space, H5P_DEFAULT,
                                             k->dcpl, H5P_DEFAULT);
    const haddr_t place = set >= 0 ? H5Dget_offset(set) : HADDR_UNDEF;

    if (set >= 0) H5Dclose(set);
    if (space >= 0) H5Sclose(space);
    if (place == HADDR_UNDEF) return h5_fail("dataset", t->name);
    t->parts[p].at = (int64_t)place;
    t->parts[p].n_bytes = ht_wf_part_bytes(t, p);
    return HT_OK;
}

static enum ht_status tensor(struct maker *k, struct ht_wf_tensor *t)
{
    const hid_t group = H5Gcreate2(k->file, t->name, H5P_DEFAULT, k->gcpl, H5P_DEFAULT);
    enum ht_status st = HT_OK;

    if (group < 0) return h5_fail("group", t->name);
    HT_TRY_GOTO(st, done, attributes(group, t));
    for (int p = 0; p < t->n_parts; p++) HT_TRY_GOTO(st, done, dataset(k, group, t, p));
done:
    H5Gclose(group);
    return st;
}

static enum ht_status open_maker(struct maker *k, struct ht_h5_pages *pages)
{
    HT_TRY(ht_h5_driver_access(&k->fapl, &k->driver, pages));
    k->fcpl = H5Pcreate(H5P_FILE_CREATE);
    k->gcpl = H5Pcreate(H5P_GROUP_CREATE);
    k->dcpl = H5Pcreate(H5P_DATASET_CREATE);
    if (k->fcpl < 0 || k->gcpl < 0 || k->dcpl < 0 || // no times: equal weights give equal bytes
        H5Pset_obj_track_times(k->fcpl, 0) < 0 || H5Pset_obj_track_times(k->gcpl, 0) < 0 ||
        H5Pset_obj_track_times(k->dcpl, 0) < 0 || H5Pset_layout(k->dcpl, H5D_CONTIGUOUS) < 0 ||
        H5Pset_alloc_time(k->dcpl, H5D_ALLOC_TIME_EARLY) < 0 ||
        H5Pset_fill_time(k->dcpl, H5D_FILL_TIME_NEVER) < 0)
        return h5_fail("properties of", HT_WEIGHTS_H5);
    k->file = H5Fcreate(HT_WEIGHTS_H5, H5F_ACC_TRUNC, k->fcpl, k->fapl);
    return k->file < 0 ? h5_fail("creating", HT_WEIGHTS_H5) : HT_OK;
}

enum ht_status ht_weights_h5_structure(struct ht_h5_pages *pages, struct ht_wf_manifest *m)
{
    struct maker k = { -1, -1, -1, -1, -1, -1 };
    enum ht_status st = HT_OK;

    ht_h5_quiet();
    HT_TRY_GOTO(st, done, open_maker(&k, pages));
    for (int i = 0; i < m->n_tensors; i++) HT_TRY_GOTO(st, done, tensor(&k, &m->tensors[i]));
done:
    if (k.file >= 0 && H5Fclose(k.file) < 0 && st == HT_OK)
        st = h5_fail("finishing", HT_WEIGHTS_H5);
    if (k.dcpl >= 0) H5Pclose(k.dcpl);
    if (k.gcpl >= 0) H5Pclose(k.gcpl);
    if (k.fcpl >= 0) H5Pclose(k.fcpl);
    if (k.fapl >= 0) H5Pclose(k.fapl);
    if (k.driver >= 0) H5FDunregister(k.driver);
    return st;
}
