/* checkpoints/weights_save.h: weights of any source to another folder: what hybridconvert does.
 *
 * A folder is written beside its final name and appears by rename: complete or not at all. Values
 * pass in blocks of rows; memory does not grow with the model. HDF5 is used from the calling
 * thread.
 */
#ifndef HT_CHECKPOINTS_WEIGHTS_SAVE_H
#define HT_CHECKPOINTS_WEIGHTS_SAVE_H

#include "checkpoints/weights.h"
#include "core/ops/quant.h"

struct ht_weights_save_options {
    bool quantise;          // matrices as ht_weights_format says for `format`; HDF5 only
    enum ht_qformat format; // bf16: the projections and the head are dense bf16
    int group;              // 32 or 64
    enum ht_dtype dtype;    // of the matrices where nothing is quantised (F32 or BF16)
    int n_threads;
    const struct ht_log *log;
};

struct ht_weights_save_report {
    int64_t n_bytes; // of the weights file
    int64_t n_params;
    // projections and head, quantised: root mean square of the error over that of the values
    double error, worst; // over all, and of the worst tensor
    char worst_name[96];
};

/* Our own folder (weights_file.h). HT_ERR_ARG: dir is there already. report may be NULL. */
enum ht_status ht_weights_save_h5(struct ht_weights *w, const char *dir,
                                  const struct ht_weights_save_options *o,
                                  struct ht_weights_save_report *report);

/* Hugging Face form: config.json, model.safetensors (one file; vectors fp32), tokenizer files.
 * HT_ERR_UNSUPPORTED when no Hugging Face class can express the model. */
enum ht_status ht_weights_save_safetensors(struct ht_weights *w, const char *dir,
                                           const struct ht_weights_save_options *o,
                                           struct ht_weights_save_report *report);

#endif
