/* checkpoints/weights_file.h: a folder of weights of our own: dense or quantised, hashed, HDF5.
 *
 * DIR/
 *   weights.h5     per tensor a group under its name, with attributes `format` (fp32, bf16, int8,
 * int4, int4z, fp8), `group` and `shape`, and contiguous datasets: data    fp32, or bf16 as uint16
 * (dense) codes   int8, fp8 (e4m3 as uint8): (out, in); int4*: (out, ceil(in/2)) bytes, even columns in the low half
 *                    scales  bf16 as uint16 (out, n_groups)
 *                    zeros   uint8 (out, n_groups), int4z only
 *   config.json or recipe.cfg, tokenizer.json and the like, as the source had them
 *   weights.json   the manifest: bytes and XXH3-128 of every file, and of every dataset with its
 * place in weights.h5; its own hash last
 *
 * A folder appears by rename, whole. Readers check every hash first and read datasets at their
 * places with pread: no damaged file reaches HDF5. The text is untrusted.
 */
#ifndef HT_CHECKPOINTS_WEIGHTS_FILE_H
#define HT_CHECKPOINTS_WEIGHTS_FILE_H

#include <stdbool.h>
#include <stdint.h>

#include "checkpoints/hash.h"
#include "core/config/tensor_list.h"
#include "core/ops/quant.h"

#define HT_WEIGHTS_MANIFEST "weights.json"
#define HT_WEIGHTS_H5 "weights.h5"

enum { HT_WF_MAX_PARTS = 3, HT_WF_MAX_FILES = 32 };

struct ht_wf_form {         // how a tensor is stored
    bool quantised;         // codes, scales, zeros; otherwise data
    enum ht_dtype dtype;    // of data
    enum ht_qformat format; // of codes (never bf16: that is data)
    int group;
};

/* "fp32", "bf16", "int8", "int4", "int4z", "fp8"; and back. */
const char *ht_wf_form_name(const struct ht_wf_form *f);
bool ht_wf_form_parse(struct ht_wf_form *f, const char *name, int64_t group);

struct ht_wf_part {      // one dataset
    int64_t at, n_bytes; // place in weights.h5
    struct ht_hash hash;
};

struct ht_wf_tensor {
    char name[96];
    struct ht_wf_form form;
    int n_dims;
    int64_t shape[3], n, n_rows, k; // k: elements behind the first dimension
    int n_parts;                    // 1 dense, 2 or 3 quantised
    struct ht_wf_part parts[HT_WF_MAX_PARTS];
};

struct ht_wf_file {
    char name[64];
    int64_t n_bytes;
    struct ht_hash hash;
};

struct ht_wf_manifest {
    struct ht_wf_form form; // of the projections
    int n_files, n_tensors;
    struct ht_wf_file files[HT_WF_MAX_FILES];
    struct ht_wf_tensor *tensors; // owned
};

/* Dataset p of a tensor: "data" or "codes", "scales", "zeros"; and its bytes. */
const char *ht_wf_part_name(const struct ht_wf_tensor *t, int p);
int64_t ht_wf_part_bytes(const struct ht_wf_tensor *t, int p);

/* Shape, form and number of parts from a tensor of the model. */
void ht_wf_tensor_set(struct ht_wf_tensor *t, const struct ht_tensor_info *info,
                      const struct ht_wf_form *form);

/* The text, sealed. Caller frees. */
enum ht_status ht_wf_print(char **text, size_t *n_bytes, const struct ht_wf_manifest *m);
/* Seal, structure and bounds checked; path is for messages. HT_ERR_FORMAT. */
enum ht_status ht_wf_parse(struct ht_wf_manifest *out, const char *text, size_t n_bytes,
                           const char *path);
void ht_wf_manifest_free(struct ht_wf_manifest *m);

/* ---- reading ---- */

struct ht_wf; // an opened, verified folder

enum ht_status ht_wf_open(struct ht_wf **out, const char *path);
void ht_wf_close(struct ht_wf *f);
const struct ht_wf_manifest *ht_wf_manifest(const struct ht_wf *f);
/* NULL when it is not among them. */
const struct ht_wf_tensor *ht_wf_find(const struct ht_wf *f, const char *name);

/* Rows row0 .. row0 + n_rows - 1 of dataset p as stored. Any thread. */
enum ht_status ht_wf_read(struct ht_wf *f, const struct ht_wf_tensor *t, int p, int64_t row0,
                          int64_t n_rows, void *out);

#endif
