/* inference/session.h: a model opened for one sequence: generation in a terminal, scoring. */
#ifndef HT_INFERENCE_SESSION_H
#define HT_INFERENCE_SESSION_H

#include "core/model/decode.h"
#include "inference/loaded.h"

struct ht_session {
    struct ht_loaded l;
    struct ht_decoder *decoder;
    struct ht_state *state;
    int64_t context; // tokens that the state holds
};

struct ht_session_options {
    const char *path;      // run folder, checkpoint, converted folder, or Hugging Face folder
    const char *tokenizer; // tokenizer.json instead of the folder's; NULL
    const char *weights;   // as ht_loaded_open takes it; NULL: "stored"
    int64_t context;       // 0: 4096
    int threads;           // 0: all cores
    const struct ht_log *log;
};

/* The address must stay: parts point at each other. Close it after a failure too. */
enum ht_status ht_session_open(struct ht_session *s, const struct ht_session_options *o);
void ht_session_close(struct ht_session *s);

#endif
