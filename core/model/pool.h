/* core/model/pool.h: the states of many sequences in two pools, and the passes that extend them
 * (spec 4.3, 4.4).
 *
 * State slots hold what has a fixed size (convolution windows, SSM states); extents of one long
 * row of tokens hold keys and values. A decoding pass takes one token of each of many sequences:
 * its products run over all rows at once, states are updated where they stand. A prompt pass takes
 * one block of one sequence. Nothing is allocated after creation.
 *
 * States are in the memory of the model's backend; ids, places, exported bytes and logits are the
 * host's. On a device a pass uploads its tables and, for logits, waits; what fails in a copy of a
 * state there fails the passes after it too.
 */
#ifndef HT_MODEL_POOL_H
#define HT_MODEL_POOL_H

#include "core/model/model.h"

struct ht_pool;

struct ht_place {           // of one sequence, given out by the caller
    int32_t slot;           // 0 .. n_slots-1
    int64_t kv_start, kv_n; // its extent of the row of tokens
    int64_t n_tokens;       // in its state
};

struct ht_pool_options {
    int64_t n_slots;         // sequences, and one more for each that is extended by guesses
    int64_t n_drafts;        // sequences that are extended by guesses in one pass; 0 = none
    int64_t kv_tokens;       // of all extents together; 0 without attention layers
    int64_t block_tokens;    // most tokens of a prompt pass
    enum ht_dtype ssm_dtype; // of SSM states: fp32, or bf16 rounded stochastically
};

enum ht_status ht_pool_create(struct ht_pool **out, struct ht_model *m,
                              const struct ht_pool_options *o);
void ht_pool_free(struct ht_pool *p);

/* Bytes of a slot with SSM states of a dtype, and of a token's keys and values of a model of that
 * activation dtype. */
int64_t ht_pool_slot_bytes(const struct ht_model_config *c, enum ht_dtype ssm_dtype);
int64_t ht_pool_token_bytes(const struct ht_model_config *c, enum ht_dtype dtype);

enum ht_status ht_pool_reset(struct ht_pool *p, struct ht_place *at); // as before the first token

/* The whole state of `from` also at `to`, whose extent holds at least as many tokens. */
enum ht_status ht_pool_copy(struct ht_pool *p, struct ht_place *to, const struct ht_place *from);

/* The state as bytes: slot, then keys and values of its tokens, layer by layer; and back, for
 * n_tokens of them. */
int64_t ht_pool_export_bytes(const struct ht_pool *p, int64_t n_tokens);
enum ht_status ht_pool_export(const struct ht_pool *p, const struct ht_place *at, void *out);
enum ht_status ht_pool_import(struct ht_pool *p, struct ht_place *at, int64_t n_tokens,
                              const void *in);

/* As if n_tokens had been read, for measurements: reset states, made-up keys and values of
 * magnitude 0.25 to 0.5. A pass behind them costs what it costs behind real ones. */
enum ht_status ht_pool_fill(struct ht_pool *p, struct ht_place *at, int64_t n_tokens);

/* ids[i] follows the tokens of sequence at[i], for n of them (1 .. n_slots); logits (n,
 * vocab_size), fp32. Row i depends on sequence i alone. HT_ERR_ARG: an id outside the vocabulary, a
 * full extent; nothing has changed then. */
enum ht_status ht_pool_decode(struct ht_pool *p, struct ht_place *const *at, const int32_t *ids,
                              int64_t n, float *logits);

enum { HT_POOL_RUN = 9 }; // most tokens of a run: the one that is known, and guesses

/* A token that follows a sequence, and guesses at those after it. Row j of the logits is what comes
 * after ids[0 .. j], with the bits that ht_pool_decode gives token by token. */
struct ht_pool_run {
    struct ht_place *at;
    int32_t ids[HT_POOL_RUN];
    int64_t n;     // 1 .. HT_POOL_RUN
    int32_t spare; // a slot of its own where n > 1
    // by the pass
    const float *logits[HT_POOL_RUN];
    int64_t saved[HT_POOL_RUN], n_before;
};

/* One pass over n runs (at most n_slots, n_drafts of them with guesses): products read the weights
 * once for all rows. logits: room for all rows, in the pool's order. Each sequence is longer by one
 * token then; ht_pool_accept adds those guesses that were right. */
enum ht_status ht_pool_decode_runs(struct ht_pool *p, struct ht_pool_run *runs, int64_t n,
                                   float *logits);

/* The state after the first n tokens of a run (1 .. run->n) of the last pass; at->slot and spare
 * are exchanged when all guesses were right. To be called before any other pass. */
enum ht_status ht_pool_accept(struct ht_pool *p, struct ht_pool_run *run, int64_t n);

/* n tokens (1 .. block_tokens) follow in one pass. Their hidden rows stay until the next pass. */
enum ht_status ht_pool_prompt(struct ht_pool *p, struct ht_place *at, const int32_t *ids,
                              int64_t n);

/* Logits (n, vocab_size) of rows first .. first + n - 1 of the last prompt pass. */
enum ht_status ht_pool_prompt_logits(struct ht_pool *p, int64_t first, int64_t n, float *logits);

#endif
