/* inference/api.h: OpenAI-compatible requests and answers, between bytes and the engine [11].
 *
 * Nothing here knows of HTTP: a body becomes prompts and a struct ht_request, or an error with the
 * name of the wrong parameter; engine events become a JSON answer or the data of server-sent
 * events. Everything in a body is untrusted: sizes, depth and ranges are checked before anything is
 * allocated for them.
 */
#ifndef HT_INFERENCE_API_H
#define HT_INFERENCE_API_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "data/tokenizer.h"
#include "inference/chat_template.h"
#include "inference/engine.h"

enum {
    HT_API_MAX_DEPTH = 64, // of JSON
    HT_API_MAX_MESSAGES = 1024,
    HT_API_MAX_PROMPTS = 256,    // of one completion request
    HT_API_MAX_SCORES = 4000000, // echoed tokens * (logprobs + 1) of one request
};

enum ht_api_kind { HT_API_COMPLETION, HT_API_CHAT };
enum ht_api_format { HT_API_TEXT, HT_API_JSON_OBJECT, HT_API_JSON_SCHEMA };

struct ht_api_error {
    int http;         // 400, 401, 404, 413, 422, 429, 500, 503
    char param[96];   // "" when no parameter is to blame
    const char *type; // "invalid_request_error", ..
    const char *code; // NULL, or "context_length_exceeded", ..
};                    // the message is ht_error_message()

/* What requests are checked against; filled once the model is there. */
struct ht_api_context {
    const struct ht_tokenizer *tokenizer; // NULL: token ids only
    struct ht_encoder *encoder;
    struct ht_token_decoder *decoder;    // special tokens shown
    const struct ht_chat_template *chat; // NULL: /v1/chat/completions is refused
    const char *model;                   // served name
    const char *bos, *eos;               // their texts, NULL when unknown
    int32_t bos_id;
    int64_t max_context, vocab_size;
    float temperature, top_p, min_p; // when the request names none
    int64_t top_k;
    bool speculate; // every request
};

struct ht_api_request {
    enum ht_api_kind kind;
    struct ht_ids *prompts; // (n_prompts)
    int n_prompts;
    int n;                     // choices per prompt that are answered
    struct ht_request request; // ids, n_ids are set per prompt; n: choices to make (best_of)
    const char *stops[HT_ENGINE_MAX_STOPS];
    struct ht_logit_bias *biases;
    bool stream, include_usage;
    enum ht_api_format format;
    const json_t *schema; // of HT_API_JSON_SCHEMA, lent from body
    json_t *body;
};

/* Any text in JSON form. HT_ERR_FORMAT with line and column; depth and duplicate keys are checked.
 */
enum ht_status ht_api_parse_json(json_t **out, const char *body, size_t n_bytes,
                                 struct ht_api_error *e);

/* On failure e says how to answer and out needs no free. */
enum ht_status ht_api_parse(struct ht_api_request *out, enum ht_api_kind kind, const char *body,
                            size_t n_bytes, const struct ht_api_context *c, struct ht_api_error *e);
void ht_api_request_free(struct ht_api_request *r);

// ---- text being written ----

struct ht_api_text { // zero-initialise; free(p)
    char *p;
    size_t n, capacity;
    bool failed; // no memory: later writes do nothing
};
void ht_api_add(struct ht_api_text *t, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
void ht_api_add_bytes(struct ht_api_text *t, const char *p, size_t n);
void ht_api_add_string(struct ht_api_text *t, const char *p, size_t n); // as JSON, in quotes

/* {"error": {..}} with the message of this thread. */
void ht_api_add_error(struct ht_api_text *t, const struct ht_api_error *e);

/* /tokenize and /detokenize: body in, answer out. */
enum ht_status ht_api_tokenize(struct ht_api_text *out, const char *body, size_t n_bytes,
                               const struct ht_api_context *c, struct ht_api_error *e);
enum ht_status ht_api_detokenize(struct ht_api_text *out, const char *body, size_t n_bytes,
                                 const struct ht_api_context *c, struct ht_api_error *e);
void ht_api_models(struct ht_api_text *out, const struct ht_api_context *c, int64_t created);
void ht_api_tokenizer_info(struct ht_api_text *out, const struct ht_api_context *c);

// ---- answers ----

struct ht_api_answer;

/* One per request; id is copied. Not streaming: answers are collected until all choices have ended.
 */
enum ht_status ht_api_answer_create(struct ht_api_answer **out, const struct ht_api_request *r,
                                    const struct ht_api_context *c, const char *id,
                                    int64_t created);
void ht_api_answer_free(struct ht_api_answer *a);

/* An event of prompt number `prompt`. With streaming, what goes to the client now is added to sse
 * ("data: ..\n\n"). HT_ERR_MEMORY only. */
enum ht_status ht_api_answer_event(struct ht_api_answer *a, int prompt,
                                   const struct ht_engine_event *ev, struct ht_api_text *sse);
bool ht_api_answer_complete(const struct ht_api_answer *a); // every choice has ended
bool ht_api_answer_failed(const struct ht_api_answer *a);   // one of them with an error

/* Not streaming: the whole answer. Streaming: usage if asked for, and [DONE]. */
enum ht_status ht_api_answer_finish(struct ht_api_answer *a, struct ht_api_text *out);
/* Streaming: the first chunks of a chat (role). */
void ht_api_answer_start(struct ht_api_answer *a, struct ht_api_text *sse);

struct ht_api_usage {
    int64_t prompt_tokens, cached_tokens, completion_tokens;
};
void ht_api_answer_usage(const struct ht_api_answer *a, struct ht_api_usage *out);

#endif
