/* inference/session.h: a model opened for generation or scoring: weights, tokenizer, one sequence's
 * state. */
#ifndef HT_INFERENCE_SESSION_H
#define HT_INFERENCE_SESSION_H

#include "checkpoints/weights.h"
#include "core/model/decode.h"
#include "data/tokenizer.h"

struct ht_session {
    struct ht_weights *weights;
    struct ht_tokenizer *tokenizer; // NULL when the folder has none
    struct ht_backend backend;
    struct ht_model *model;
    struct ht_decoder *decoder;
    struct ht_state *state;
    int64_t context; // tokens that the state holds
    int64_t eos_id;  // where a text ends; -1 when not known
};

struct ht_session_options {
    const char *path;      // run folder, checkpoint, or Hugging Face folder
    const char *tokenizer; // tokenizer.json instead of the folder's; NULL
    int64_t context;       // 0: 4096, or less when the model has fewer positions
    int threads;           // 0: all cores
    bool fp32;             // compute in fp32 whatever is stored
    const struct ht_log *log;
};

/* The address must stay: parts point at each other. Free it after a failure too. */
enum ht_status ht_session_open(struct ht_session *s, const struct ht_session_options *o);
void ht_session_close(struct ht_session *s);

/* The token that ends a text: the folder's eos_token_id; else, as in this project's own run folders,
 * the tokenizer's special token of a usual name (<|end_of_text|>, <|endoftext|>, </s>, <eos>, [EOS]),
 * or its only special token. -1 when none of that tells. tokenizer may be NULL. */
int64_t ht_session_find_eos(const struct ht_weights *weights, const struct ht_tokenizer *tokenizer);

#endif
