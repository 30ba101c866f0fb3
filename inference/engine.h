/* inference/engine.h: many requests on one model: continuous batching, chunked prefill, prefix
 * cache, forks [11].
 *
 * One engine thread owns the model, the states and the scheduler; callers only put requests into a
 * queue and take events out of another, so no lock is held while the model runs. A step takes one
 * token of every decoding sequence and up to max_step_tokens of prompts. Prompts are cut at
 * multiples of prefill_chunk counted from the sequence's first token, and decoding rows are
 * multiplied apart from prompt rows: what a request gets does not depend on its neighbours, on the
 * prefix cache, on preemption or on save and restore, to the bit.
 *
 * Memory is two pools taken at creation: fixed-size state slots (convolution windows and SSM
 * states) and KV extents; a request is admitted when its worst case fits into what is not promised.
 */
#ifndef HT_INFERENCE_ENGINE_H
#define HT_INFERENCE_ENGINE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/log.h"
#include "core/base/status.h"

struct ht_engine;
struct ht_tokenizer;
struct ht_grammar; // inference/grammar.h; one per request, owned by the engine after submit

enum ht_kv_format { HT_KV_MODEL, HT_KV_BF16, HT_KV_INT8 }; // MODEL: the model's dtype
enum ht_state_format { HT_STATE_F32, HT_STATE_16 };        // 16: stochastic rounding

struct ht_engine_options {
    const char *path;      // run folder, checkpoint, converted folder, or Hugging Face folder
    const char *tokenizer; // tokenizer.json instead of the folder's; NULL
    const char *weights;   // "stored", "fp32", "bf16", "int8", "int4", "int4z", "fp8": quantised
                           // while loading
    const char *device;    // "cpu", "cuda", or "auto": cuda where there is a device; NULL: "cpu"
    int threads;           // 0: all cores
    int64_t
        max_context;  // tokens of one sequence; 0: 4096, or less when the model has fewer positions
    int64_t max_seqs; // sequences that run at once; 0: 16
    int64_t max_queue;          // requests that wait; 0: 1024
    int64_t max_step_tokens;    // prompt tokens of one step; 0: 512
    int64_t prefill_chunk;      // 0: 256 or the model's chunk, whichever is larger
    int64_t memory_bytes;       // of both pools together; 0: what max_seqs * max_context needs
    int64_t prefix_cache_bytes; // 0: no prefix cache
    int64_t max_drafts; // sequences that may run ahead of themselves in one step (speculate), each
                        // with a state slot more; 0: 4, or max_seqs when that is less; -1: none
    enum ht_kv_format kv;
    enum ht_state_format state;
    const struct ht_log *log;
};

enum ht_finish { // why a choice ended
    HT_FINISH_NONE,
    HT_FINISH_STOP,      // end-of-text token, or a stop string
    HT_FINISH_LENGTH,    // max_tokens or the context
    HT_FINISH_CANCELLED, // ht_engine_cancel
    HT_FINISH_ERROR      // event->message says what
};

struct ht_logit_bias {
    int32_t id;
    float bias;
};

enum {
    HT_ENGINE_MAX_CHOICES = 8,
    HT_ENGINE_MAX_STOPS = 16,
    HT_ENGINE_MAX_STOP_BYTES = 256,
    HT_ENGINE_MAX_LOGPROBS = 20,
    HT_ENGINE_MAX_BIASES = 1024
};

struct ht_request {     // copied by submit
    const int32_t *ids; // the prompt
    int64_t n_ids;      // at least 1
    int64_t max_tokens; // generated per choice; 0 is allowed with echo (scoring)
    int n;              // choices, 1..HT_ENGINE_MAX_CHOICES: the prompt is read once, then forked
    // sampling: as in sampler.h; choice i draws with seed + i
    float temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty;
    int64_t top_k;
    uint64_t seed;
    const struct ht_logit_bias *bias;
    int64_t n_bias;
    const char *const *stops; // strings, not part of the text
    int n_stops;
    bool ignore_eos;
    bool echo;      // events for the prompt's tokens first, with their log-probabilities when asked
    int logprobs;   // -1 none, 0..HT_ENGINE_MAX_LOGPROBS alternatives per token
    bool speculate; // n-gram lookup in the request's own tokens; the output is the same
    struct ht_grammar *grammar; // NULL: unconstrained
    int priority;               // larger first; equal ones in order of arrival
    double deadline_s; // on ht_time_s's clock; 0 none: answers with HT_FINISH_LENGTH what it has by
                       // then
    void *user;
};

struct ht_token_logprob {
    int32_t id;
    float logprob; // natural logarithm, of the model's distribution before sampling changes it
};

/* One token of one choice, or its end. Pointers live until ht_engine_event_free. */
struct ht_engine_event {
    struct ht_engine_event *next;
    uint64_t request;
    void *user;
    int choice;
    int32_t id;       // -1: no token, only text held back or the end
    bool from_prompt; // an echoed token
    const char *text; // UTF-8 that became complete; stop strings are held back and cut off
    size_t text_bytes;
    bool has_logprob; // false for the first prompt token
    float logprob;
    int n_top;
    const struct ht_token_logprob *top; // most probable first; holds the token itself as well
    enum ht_finish finish;
    const char *message; // with HT_FINISH_ERROR
    // with the last event of a choice
    int64_t prompt_tokens, cached_tokens, generated_tokens;
    double queue_s, first_token_s, total_s;
};

enum ht_status ht_engine_create(struct ht_engine **out, const struct ht_engine_options *o);
void ht_engine_free(struct ht_engine *e); // cancels what runs, joins the thread

/* NULL when the folder has none: then only ids go in and out and stops must be 0. Lent. */
const struct ht_tokenizer *ht_engine_tokenizer(const struct ht_engine *e);
const char *
ht_engine_chat_template(const struct ht_engine *e); // Jinja text, NULL when there is none
int32_t ht_engine_bos(const struct ht_engine *e);   // -1 when unknown
int32_t ht_engine_eos(const struct ht_engine *e);
int64_t ht_engine_max_context(const struct ht_engine *e);
int64_t ht_engine_vocab_size(const struct ht_engine *e);

/* Any thread. HT_ERR_ARG names the field, its value and its bounds; HT_ERR_MEMORY: the queue is
 * full or memory is short just now. Nothing is kept of a refused request (its grammar stays the
 * caller's). */
enum ht_status ht_engine_submit(struct ht_engine *e, const struct ht_request *r, uint64_t *id);

/* Any thread; takes effect within one step, unknown and finished ids are ignored. */
void ht_engine_cancel(struct ht_engine *e, uint64_t id);

/* Events in order, oldest first, NULL when none is there. event_fd becomes readable when there are
 * some (an eventfd, reset by take). wait blocks at most timeout_s. One consumer. */
struct ht_engine_event *ht_engine_take_events(struct ht_engine *e);
struct ht_engine_event *ht_engine_wait_events(struct ht_engine *e, double timeout_s);
void ht_engine_event_free(struct ht_engine_event *list); // the whole list
int ht_engine_event_fd(const struct ht_engine *e);

/* Finish what runs and waits, refuse new requests (HT_ERR_STOPPED). Returns at once; idle() tells.
 */
void ht_engine_drain(struct ht_engine *e);
bool ht_engine_idle(const struct ht_engine *e);

struct ht_engine_stats { // a snapshot; counters since creation
    int64_t running, waiting;
    int64_t prompt_tokens, generated_tokens, cached_tokens; // cached: prompt tokens not computed
    int64_t prefix_queries, prefix_hits, prefix_bytes, preemptions;
    int64_t speculated, accepted; // draft tokens
    int64_t steps;
    double state_usage, kv_usage; // share of the pools in use, 0..1
    int64_t pool_bytes, weight_bytes;
};
void ht_engine_get_stats(const struct ht_engine *e, struct ht_engine_stats *out);

/* The state after these tokens (computed or from the prefix cache) to a file, published by rename;
 * and back into the prefix cache, so that a request that begins with them goes on from there. The
 * file carries the model's fingerprint and XXH3-128 of its content; HT_ERR_FORMAT names what does
 * not fit. Any thread; waits for the engine's thread. */
enum ht_status ht_engine_save_state(struct ht_engine *e, const int32_t *ids, int64_t n,
                                    const char *path);
enum ht_status ht_engine_restore_state(struct ht_engine *e, const char *path, int64_t *n_tokens);

#endif
