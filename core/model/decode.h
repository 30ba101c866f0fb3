/* core/model/decode.h: generation: a sequence's state and its extension by one or many tokens
 * (spec 4.3, 4.4).
 *
 * The state of a sequence is {convolution windows, SSM states, keys and values}. Extending by many
 * tokens is the training forward pass with states in and out, in blocks aligned to the chunk;
 * extending by one is the recurrent step. Both agree with the forward pass over the whole sequence
 * to rounding.
 */
#ifndef HT_MODEL_DECODE_H
#define HT_MODEL_DECODE_H

#include "core/model/model.h"

struct ht_state;   // of one sequence
struct ht_decoder; // buffers of the forward pass

/* Room for capacity tokens of keys and values (no limit without attention layers). */
enum ht_status ht_state_create(struct ht_state **out, const struct ht_model *m, int64_t capacity);
void ht_state_free(struct ht_state *s);
void ht_state_reset(struct ht_state *s); // as before the first token
int64_t ht_state_n_tokens(const struct ht_state *s);
int64_t ht_state_bytes(const struct ht_state *s);

/* block_tokens: most tokens of one pass, a multiple of the chunk; longer prompts take several. */
enum ht_status ht_decoder_create(struct ht_decoder **out, struct ht_model *m, int64_t block_tokens);
void ht_decoder_free(struct ht_decoder *d);

/* Append n tokens (n >= 1); logits (vocab_size) of the last one, fp32, or NULL for none.
 * HT_ERR_ARG: an id outside the vocabulary, more tokens than the state's capacity or than the
 * model's positions. */
enum ht_status ht_decoder_extend(struct ht_decoder *d, struct ht_state *s, const int32_t *ids,
                                 int64_t n, float *logits);

/* Append n tokens (n >= 0) and give, for each, the natural log-probability that it had after all
 * tokens before it: logprobs[i] of ids[i]. The state must be empty (HT_ERR_ARG); the first token
 * has no prediction: 0. */
enum ht_status ht_decoder_score(struct ht_decoder *d, struct ht_state *s, const int32_t *ids,
                                int64_t n, float *logprobs);

#endif
