/* inference/loaded.h: a model opened for inference: weights dense or packed, tokenizer, template.
 */
#ifndef HT_INFERENCE_LOADED_H
#define HT_INFERENCE_LOADED_H

#include "checkpoints/weights.h"
#include "core/base/team.h"
#include "core/model/model.h"
#include "data/tokenizer.h"

struct ht_loaded {
    struct ht_weights *weights;
    struct ht_tokenizer *tokenizer; // NULL when the folder has none
    struct ht_backend backend;
    struct ht_model *model;
    struct ht_team team; // of the model's passes
    // eos: the folder's; else, as in this project's own run folders, the tokenizer's special token
    // of a usual name, or its only special one where that has no other usual name. -1 when unknown
    int32_t eos, bos;
};

/* w: from ht_weights_open; owned by l from now on, also after a failure. format: "stored" (packed
 * as they are: bf16 and quantised ones packed, fp32 dense), "fp32" (dense, bit for bit the training
 * forward pass), or the name of a packed format, made while loading. n_positions: the longest
 * sequence. The address of l must stay. Close it after a failure too. */
enum ht_status ht_loaded_open(struct ht_loaded *l, struct ht_weights *w, const char *tokenizer,
                              const char *format, int threads, int64_t n_positions);

/* The same on a device: "cpu", "cuda" (HT_ERR_UNSUPPORTED where there is none), or "auto": cuda
 * where there is a device, else cpu. For ht_pool; ht_decoder is for the cpu. */
enum ht_status ht_loaded_open_on(struct ht_loaded *l, const char *device, struct ht_weights *w,
                                 const char *tokenizer, const char *format, int threads,
                                 int64_t n_positions);

/* Packed weights drawn at random for the model of a recipe, on the CPU: for measurements. No
 * tokenizer. */
enum ht_status ht_loaded_random(struct ht_loaded *l, const char *recipe, const char *format,
                                int threads, int64_t n_positions);

void ht_loaded_close(struct ht_loaded *l);

int64_t ht_loaded_weight_bytes(const struct ht_loaded *l);

#endif
