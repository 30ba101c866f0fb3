/* inference/engine_impl.h: the engine's parts, for inference/ alone.
 *
 *   engine.c         the thread, the queues in and out
 *   request.c        one request: checked copy, its choices, their text and events
 *   scheduler.c      who runs: admission, forks, preemption, cancellation
 *   engine_step.c    one step: decoding rows, prompt blocks, samples
 *   engine_state.c   states in files
 */
#ifndef HT_INFERENCE_ENGINE_IMPL_H
#define HT_INFERENCE_ENGINE_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "core/model/pool.h"
#include "inference/chat_template.h"
#include "inference/draft.h"
#include "inference/engine.h"
#include "inference/extents.h"
#include "inference/grammar.h"
#include "inference/loaded.h"
#include "inference/prefix_cache.h"
#include "inference/sampler.h"

enum ht_phase {
    HT_PHASE_FORK,   // waits for the prompt of choice 0
    HT_PHASE_PROMPT, // reads its prompt
    HT_PHASE_DECODE, // its last token is not in its state yet
    HT_PHASE_OVER
};

struct ht_choice { // one sequence
    struct ht_open_request *request;
    int number;
    enum ht_phase phase;
    bool placed;
    struct ht_place place;
    void *swapped; // its state while it is preempted
    int32_t *ids;  // prompt, then generated
    int64_t n_ids, n_generated;
    struct ht_draft draft;
    struct ht_sampler *sampler;
    struct ht_grammar *grammar;    // NULL: unconstrained
    struct ht_token_decoder *text; // NULL without a tokenizer
    char *held;                    // text that may be the beginning of a stop string
    size_t n_held, held_capacity;
};

struct ht_open_request {
    struct ht_open_request *next; // waiting, or in the inbox
    uint64_t id;
    struct ht_request o; // its pointers belong to this copy
    int64_t kv_tokens;   // of each choice: prompt and all that may follow
    struct ht_choice *choices;
    int n_live;
    bool cancelled, swapped;
    int64_t cached_tokens, snapshot_at[2]; // multiples of prefill_chunk; 0 = none
    float *last_row; // (vocab_size) of the prompt token read last, for echoed log-probabilities
    double arrived_s, admitted_s, first_token_s;
};

struct ht_logprobs { // of one row of logits
    float chosen;
    int n_top;
    struct ht_token_logprob top[HT_ENGINE_MAX_LOGPROBS + 1];
};

/* A decoding sequence in a step: its run of tokens, and what was drawn from the first row. */
struct ht_engine_row {
    struct ht_choice *choice;
    int32_t id;
    struct ht_logprobs lp; // when asked for
    char *error;           // NULL: drawn
};

struct ht_state_command { // of save and restore; the caller waits for `done`
    bool is_save, done;
    const int32_t *ids;
    int64_t n;
    const char *path;
    enum ht_status status;
    char message[1024];
};

struct ht_engine {
    struct ht_engine_options o;
    struct ht_loaded loaded;
    struct ht_chat_template *chat_template; // NULL when the folder has none
    struct ht_pool *pool;
    struct ht_extents extents;
    struct ht_prefix_cache *cache; // NULL for none
    int64_t token_bytes;           // keys and values of a token; 0 without attention

    // the engine thread's
    pthread_t thread;
    bool thread_runs;
    struct ht_open_request *waiting; // by priority, then by arrival
    struct ht_choice **running;      // (max_seqs) placed ones, in order of admission
    int n_running;
    bool *slot_taken;          // (max_seqs + max_drafts)
    int32_t *spare_slots;      // (max_drafts) taken for good, one for each draft
    struct ht_engine_row *row; // (max_seqs) of a decoding pass
    struct ht_pool_run *run;   // (max_seqs) of the same
    float *logits;             // (n_logits, vocab_size): rows of a pass
    int draw_threads;          // that draw at once
    float *changed; // (draw_threads, vocab_size): a thread's row after mask and penalties
    struct ht_engine_event *fresh, **fresh_end; // of this step, not given out yet

    pthread_mutex_t in_lock; // guards the inbox
    pthread_cond_t in_changed, command_done;
    struct ht_open_request *inbox, **inbox_end;
    uint64_t next_id, *cancels;
    size_t n_cancels, cancels_capacity;
    struct ht_state_command *command;
    bool quit;

    pthread_mutex_t out_lock; // guards the events
    pthread_cond_t out_changed;
    struct ht_engine_event *events, **events_end;
    int event_fd;

    atomic_bool draining;
    atomic_llong n_open; // submitted and not over
    pthread_mutex_t stats_lock;
    struct ht_engine_stats published; // guarded by it
    struct ht_engine_stats stats;     // the engine thread's
};

/* request.c */
enum ht_status ht_open_request_create(struct ht_open_request **out, const struct ht_engine *e,
                                      const struct ht_request *r);
/* The grammar stays the caller's when keep_grammar. */
void ht_open_request_free(struct ht_open_request *r, bool keep_grammar);

/* Log-probabilities of id and of the n_top best; id is always among them. */
void ht_logprobs_of(struct ht_logprobs *out, const float *logits, int64_t vocab_size, int32_t id,
                    int n_top);

/* A token of the choice, its text, an event. *stopped: a stop string is complete. lp: NULL for
 * none. */
enum ht_status ht_choice_emit(struct ht_engine *e, struct ht_choice *c, int32_t id,
                              bool from_prompt, const struct ht_logprobs *lp, bool *stopped);
/* The last event of a choice. message: with HT_FINISH_ERROR. */
void ht_choice_end(struct ht_engine *e, struct ht_choice *c, enum ht_finish why,
                   const char *message);

/* scheduler.c */
void ht_scheduler_enqueue(struct ht_engine *e, struct ht_open_request *r);
enum ht_status ht_scheduler_admit(struct ht_engine *e);
void ht_scheduler_cancel(struct ht_engine *e, uint64_t id);
void ht_scheduler_expire(struct ht_engine *e); // deadlines
void ht_scheduler_end_choice(struct ht_engine *e, struct ht_choice *c, enum ht_finish why,
                             const char *message);
void ht_scheduler_end_all(struct ht_engine *e, enum ht_finish why, const char *message);
/* A free place for n tokens of keys and values. */
bool ht_scheduler_take_place(struct ht_engine *e, struct ht_place *place, int64_t kv_tokens);
void ht_scheduler_give_place(struct ht_engine *e, const struct ht_place *place);

/* engine_step.c */
enum ht_status ht_engine_step(struct ht_engine *e);

/* engine_state.c */
enum ht_status ht_engine_run_command(struct ht_engine *e, struct ht_state_command *c);

#endif
