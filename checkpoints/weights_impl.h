/* checkpoints/weights_impl.h: inside checkpoints only: an opened source of weights. */
#ifndef HT_CHECKPOINTS_WEIGHTS_IMPL_H
#define HT_CHECKPOINTS_WEIGHTS_IMPL_H

#include "checkpoints/checkpoint.h"
#include "checkpoints/safetensors.h"
#include "checkpoints/weights.h"
#include "checkpoints/weights_file.h"

enum { HT_WEIGHTS_PATH_BYTES = HT_MAX_PATH + 600 };

struct ht_weights_shard {
    char name[256];
    struct ht_safetensors *file;
};

struct ht_weights_place { // of one tensor of the list in the shards
    const struct ht_safetensors_tensor *t;
    int64_t first; // element
};

struct ht_weights {
    char path[HT_WEIGHTS_PATH_BYTES]; // resolved folder
    char tokenizer[HT_WEIGHTS_PATH_BYTES + 32];
    struct ht_model_config model;
    struct ht_ckpt *ckpt; // or
    struct ht_wf *own;    // or
    int n_shards;
    struct ht_weights_shard *shards;
    enum ht_dtype stored;
    int64_t eos_id, bos_id;
    const struct ht_tensor_list *indexed; // for which the places are; shards only
    struct ht_weights_place *places;      // (n_tensors)
};

/* Every tensor of the list is in the source, once, with its shape, and nothing else is. */
enum ht_status ht_weights_index(struct ht_weights *w, const struct ht_tensor_list *list);

/* Rows row0 .. row0 + n_rows - 1 of tensor t as dense values (F32 or BF16). The list is indexed. */
enum ht_status ht_weights_read(struct ht_weights *w, const struct ht_tensor_list *list,
                               const struct ht_tensor_info *t, int64_t row0, int64_t n_rows,
                               void *out, enum ht_dtype dtype);

struct ht_h5_pages;

/* The HDF5 structure of weights.h5 for the tensors of m; the places of datasets go to their parts.
 */
enum ht_status ht_weights_h5_structure(struct ht_h5_pages *pages, struct ht_wf_manifest *m);

#endif
