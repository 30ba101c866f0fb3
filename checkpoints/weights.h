/* checkpoints/weights.h: weights for inference and fine-tuning, from wherever they are.
 *
 * PATH is a run folder (its newest good checkpoint), a checkpoint folder, a folder that
 * hybridconvert wrote (weights.json + weights.h5, weights_file.h), or a folder in Hugging Face form
 * (config.json + model.safetensors, or shards with model.safetensors.index.json; F32, F16 and
 * BF16). State-spaces names (spec 2.3) are mapped to Hugging Face's. Everything in the folder is
 * untrusted.
 */
#ifndef HT_CHECKPOINTS_WEIGHTS_H
#define HT_CHECKPOINTS_WEIGHTS_H

#include "core/base/log.h"
#include "core/config/config.h"
#include "core/config/tensor_list.h"

struct ht_weights;

enum ht_status ht_weights_open(struct ht_weights **out, const char *path, const struct ht_log *log);
void ht_weights_close(struct ht_weights *w);

const struct ht_model_config *ht_weights_model(const struct ht_weights *w);
enum ht_dtype ht_weights_stored_dtype(
    const struct ht_weights *w); // of the matrices as stored; bf16 when quantised
const char *ht_weights_tokenizer_path(const struct ht_weights *w); // tokenizer.json, or NULL
const char *ht_weights_resolved_path(const struct ht_weights *w);  // the folder really used
int64_t ht_weights_eos_id(const struct ht_weights *w);             // -1 when not known
int64_t ht_weights_bos_id(const struct ht_weights *w);

/* All tensors of `list` into the flat working copies: matrix part in dtype at matrix (indexed by
 * offset), vector part fp32 at vector (indexed by offset - n_matrix). Missing, extra or wrongly
 * shaped tensors: HT_ERR_FORMAT naming file and tensor. master, if not NULL, gets everything in
 * fp32 (n_total); with it matrix may be NULL. Gaps between tensors are not touched. */
enum ht_status ht_weights_load(struct ht_weights *w, const struct ht_tensor_list *list,
                               void *matrix, enum ht_dtype dtype, float *vector, float *master);

#endif
