/* inference/api_parse.c: bodies -> requests. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "inference/api.h"

/* A failure that is the client's: param may be NULL. */
#define BAD(e, p, ...) (bad((e), 400, (p)), HT_FAIL(HT_ERR_ARG, __VA_ARGS__))

static void bad(struct ht_api_error *e, int http, const char *param)
{
    e->http = http;
    e->type = "invalid_request_error";
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
}

static const char *type_name(const json_t *j)
{
    static const char *const names[] = { "an object", "an array", "a string", "an integer",
                                         "a number",  "true",     "false",    "null" };
    return j ? names[json_typeof(j)] : "missing";
}

/* Brackets inside strings do not count. */
static bool is_too_deep(const char *p, size_t n)
{
    bool quoted = false;
    int depth = 0;
    for (size_t i = 0; i < n; i++) {
        if (quoted) {
            if (p[i] == '\\')
                i++;
            else if (p[i] == '"')
                quoted = false;
        } else if (p[i] == '"') {
            quoted = true;
        } else if (p[i] == '[' || p[i] == '{') {
            if (++depth > HT_API_MAX_DEPTH) return true;
        } else if (p[i] == ']' || p[i] == '}') {
            depth--;
        }
    }
    return false;
}

enum ht_status ht_api_parse_json(json_t **out, const char *body, size_t n_bytes,
                                 struct ht_api_error *e)
{
    json_error_t where;
    *out = NULL;
    if (is_too_deep(body, n_bytes))
        return BAD(e, NULL, "the body is nested more than %d deep", HT_API_MAX_DEPTH);
    *out = json_loadb(body, n_bytes, JSON_REJECT_DUPLICATES, &where);
    if (!*out)
        return BAD(e, NULL, "the body is not JSON: line %d, column %d: %s", where.line,
                   where.column, where.text);
    if (json_is_object(*out)) return HT_OK;
    json_decref(*out);
    *out = NULL;
    return BAD(e, NULL, "the body is not a JSON object");
}

/* NULL when the key is missing or null. */
static json_t *get(const json_t *o, const char *key)
{
    json_t *v = json_object_get(o, key);
    return json_is_null(v) ? NULL : v;
}

static enum ht_status get_bool(const json_t *o, const char *key, bool *out, struct ht_api_error *e)
{
    const json_t *v = get(o, key);
    if (!v) return HT_OK;
    if (!json_is_boolean(v))
        return BAD(e, key, "%s is %s; it must be true or false", key, type_name(v));
    *out = json_is_true(v);
    return HT_OK;
}

/* A number without fraction counts as an integer; high values are clipped when `clip`. */
static enum ht_status get_int(const json_t *o, const char *key, int64_t low, int64_t high,
                              bool clip, int64_t *out, struct ht_api_error *e)
{
    const json_t *v = get(o, key);
    if (!v) return HT_OK;
    double real = json_number_value(v);
    if (!json_is_number(v) || real != floor(real))
        return BAD(e, key, "%s is %s; it must be an integer", key,
                   json_is_number(v) ? "a fraction" : type_name(v));
    if (json_is_integer(v)) {
        *out = json_integer_value(v);
    } else {
        if (real < -9e18 || (real > 9e18 && !clip))
            return BAD(e, key, "%s is %g; it must be from %lld to %lld", key, real, (long long)low,
                       (long long)high);
        *out = real > 9e18 ? INT64_MAX : (int64_t)real;
    }
    if (clip && *out > high) *out = high;
    if (*out < low || *out > high)
        return BAD(e, key, "%s is %lld; it must be from %lld to %lld", key, (long long)*out,
                   (long long)low, (long long)high);
    return HT_OK;
}

/* low and high belong to the range unless `open`: then low does not. */
static enum ht_status get_real(const json_t *o, const char *key, double low, double high, bool open,
                               float *out, struct ht_api_error *e)
{
    const json_t *v = get(o, key);
    if (!v) return HT_OK;
    if (!json_is_number(v)) return BAD(e, key, "%s is %s; it must be a number", key, type_name(v));
    const double real = json_number_value(v);
    if (!(real >= low && real <= high) || (open && (float)real <= (float)low))
        return BAD(e, key, "%s is %g; it must be %s %g and at most %g", key, real,
                   open ? "above" : "at least", low, high);
    *out = (float)real + 0.0f; // no -0
    return HT_OK;
}

static enum ht_status get_string(const json_t *o, const char *key, const char **out,
                                 struct ht_api_error *e)
{
    const json_t *v = get(o, key);
    if (!v) return HT_OK;
    if (!json_is_string(v)) return BAD(e, key, "%s is %s; it must be a string", key, type_name(v));
    *out = json_string_value(v);
    return HT_OK;
}

// ---- fields ----

static enum ht_status get_stops(struct ht_api_request *r, struct ht_api_error *e)
{
    const json_t *v = get(r->body, "stop");
    const size_t n = json_is_array(v) ? json_array_size(v) : v ? 1 : 0;

    if (n > HT_ENGINE_MAX_STOPS)
        return BAD(e, "stop", "stop has %zu strings; at most %d are allowed", n,
                   HT_ENGINE_MAX_STOPS);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_string(s))
            return BAD(e, "stop", "stop is %s; it must be a string or strings", type_name(s));
        const size_t len = json_string_length(s);
        if (len == 0 || len > HT_ENGINE_MAX_STOP_BYTES)
            return BAD(e, "stop", "stop %zu has %zu bytes; it must have 1 to %d", i, len,
                       HT_ENGINE_MAX_STOP_BYTES);
        r->stops[i] = json_string_value(s);
    }
    r->request.stops = r->stops;
    r->request.n_stops = (int)n;
    return HT_OK;
}

static enum ht_status get_biases(struct ht_api_request *r, const struct ht_api_context *c,
                                 struct ht_api_error *e)
{
    static const char key[] = "logit_bias";
    json_t *v = get(r->body, key), *value;
    const char *name;
    if (!v) return HT_OK;
    if (!json_is_object(v))
        return BAD(e, key, "%s is %s; it must be an object of token ids", key, type_name(v));
    const size_t n = json_object_size(v);
    if (n > HT_ENGINE_MAX_BIASES)
        return BAD(e, key, "%s has %zu entries; at most %d are allowed", key, n,
                   HT_ENGINE_MAX_BIASES);
    if (n == 0) return HT_OK;
    r->biases = calloc(n, sizeof *r->biases);
    if (!r->biases) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu biases", n);
    json_object_foreach(v, name, value)
    {
        char *end;
        const long long id = strtoll(name, &end, 10);
        if (*end || end == name || id < 0 || id >= c->vocab_size)
            return BAD(e, key, "%s: '%.40s' is no token id from 0 to %lld", key, name,
                       (long long)c->vocab_size - 1);
        const double bias = json_number_value(value);
        if (!json_is_number(value) || !(bias >= -100 && bias <= 100))
            return BAD(e, key, "%s of %s must be a number from -100 to 100", key, name);
        r->biases[r->request.n_bias++] = (struct ht_logit_bias){ (int32_t)id, (float)bias };
    }
    r->request.bias = r->biases;
    return HT_OK;
}

static enum ht_status get_format(struct ht_api_request *r, struct ht_api_error *e)
{
    static const char key[] = "response_format";
    const json_t *v = get(r->body, key), *schema = get(r->body, "guided_json");
    const char *type = "text";

    if (v && !json_is_object(v))
        return BAD(e, key, "%s is %s; it must be an object", key, type_name(v));
    if (v && !json_is_string(json_object_get(v, "type"))) return BAD(e, key, "%s has no type", key);
    if (v) type = json_string_value(json_object_get(v, "type"));
    if (strcmp(type, "json_object") == 0) {
        r->format = HT_API_JSON_OBJECT;
    } else if (strcmp(type, "json_schema") == 0) {
        r->format = HT_API_JSON_SCHEMA;
        r->schema = json_object_get(json_object_get(v, "json_schema"), "schema");
        if (!json_is_object(r->schema) && !json_is_boolean(r->schema))
            return BAD(e, key, "%s.json_schema.schema is %s; it must be an object", key,
                       type_name(r->schema));
    } else if (strcmp(type, "text") != 0) {
        return BAD(e, key, "%s.type is '%.40s'; it must be text, json_object or json_schema", key,
                   type);
    }
    if (!schema) return HT_OK;
    if (!json_is_object(schema))
        return BAD(e, "guided_json", "guided_json is %s; it must be an object", type_name(schema));
    r->format = HT_API_JSON_SCHEMA;
    r->schema = schema;
    return HT_OK;
}

static enum ht_status get_sampling(struct ht_api_request *r, const struct ht_api_context *c,
                                   struct ht_api_error *e)
{
    struct ht_request *q = &r->request;
    const json_t *o = r->body;
    int64_t n = 1, seed = 0, best_of = 0;

    *q = (struct ht_request){ .temperature = c->temperature,
                              .top_p = c->top_p,
                              .min_p = c->min_p,
                              .top_k = c->top_k,
                              .repetition_penalty = 1.0f,
                              .speculate = c->speculate,
                              .logprobs = -1 };
    HT_TRY(get_real(o, "temperature", 0, 2, false, &q->temperature, e));
    HT_TRY(get_real(o, "top_p", 0, 1, true, &q->top_p, e));
    HT_TRY(get_real(o, "min_p", 0, 0.999, false, &q->min_p, e));
    HT_TRY(get_real(o, "presence_penalty", -2, 2, false, &q->presence_penalty, e));
    HT_TRY(get_real(o, "frequency_penalty", -2, 2, false, &q->frequency_penalty, e));
    HT_TRY(get_real(o, "repetition_penalty", 0.01, 100, false, &q->repetition_penalty, e));
    HT_TRY(get_int(o, "top_k", -1, c->vocab_size, true, &q->top_k, e));
    if (q->top_k < 0) q->top_k = 0; // -1: all, as vLLM has it
    HT_TRY(get_int(o, "n", 1, HT_ENGINE_MAX_CHOICES, false, &n, e));
    HT_TRY(get_int(o, "best_of", 1, HT_ENGINE_MAX_CHOICES, false, &best_of, e));
    if (best_of && best_of < n)
        return BAD(e, "best_of", "best_of is %lld, below n, which is %lld", (long long)best_of,
                   (long long)n);
    r->n = (int)n;
    q->n = (int)(best_of > n ? best_of : n);
    if (get(o, "seed")) {
        HT_TRY(get_int(o, "seed", INT64_MIN, INT64_MAX, false, &seed, e));
        q->seed = (uint64_t)seed;
    } else {
        uint64_t random = 0;
        FILE *f = fopen("/dev/urandom", "rb");
        if (f) {
            if (fread(&random, sizeof random, 1, f) != 1) random = 0;
            fclose(f);
        }
        q->seed = random;
    }
    HT_TRY(get_bool(o, "ignore_eos", &q->ignore_eos, e));
    HT_TRY(get_bool(o, "stream", &r->stream, e));
    const json_t *options = get(o, "stream_options");
    if (options && !json_is_object(options))
        return BAD(e, "stream_options", "stream_options is %s; it must be an object",
                   type_name(options));
    if (options && !r->stream) return BAD(e, "stream_options", "stream_options without stream");
    if (options) HT_TRY(get_bool(options, "include_usage", &r->include_usage, e));
    if (r->stream && q->n > r->n)
        return BAD(e, "best_of", "best_of cannot be streamed: the best is known at the end");
    if (get(o, "prompt_logprobs"))
        return BAD(e, "prompt_logprobs",
                   "prompt_logprobs is not supported; use echo with logprobs");
    HT_TRY(get_stops(r, e));
    HT_TRY(get_biases(r, c, e));
    return get_format(r, e);
}

/* How many tokens may follow: max_tokens cut to what the context holds. */
static enum ht_status get_length(struct ht_api_request *r, const struct ht_api_context *c,
                                 int64_t otherwise, struct ht_api_error *e)
{
    const char *key =
        get(r->body, "max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
    int64_t longest = 0, tokens = otherwise;
    for (int i = 0; i < r->n_prompts; i++)
        if (r->prompts[i].n > longest) longest = r->prompts[i].n;
    HT_TRY(get_int(r->body, key, r->request.echo ? 0 : 1, INT32_MAX, true, &tokens, e));
    const int64_t room = c->max_context - longest;
    if (room < (tokens > 0)) {
        e->code = "context_length_exceeded";
        return BAD(e, r->kind == HT_API_CHAT ? "messages" : "prompt",
                   "the prompt has %lld tokens; the context holds %lld with the answer",
                   (long long)longest, (long long)c->max_context);
    }
    r->request.max_tokens = tokens < room ? tokens : room;
    if (r->request.echo && r->request.logprobs >= 0) {
        int64_t scores = 0;
        for (int i = 0; i < r->n_prompts; i++)
            scores += r->prompts[i].n * (r->request.logprobs + 1) * r->request.n;
        if (scores > HT_API_MAX_SCORES)
            return BAD(e, "logprobs", "log-probabilities of %lld echoed entries; at most %d",
                       (long long)scores, HT_API_MAX_SCORES);
    }
    return HT_OK;
}

// ---- /v1/completions ----

static enum ht_status add_text(struct ht_ids *ids, const json_t *text, bool special,
                               const struct ht_api_context *c, struct ht_api_error *e)
{
    if (!c->tokenizer) return BAD(e, "prompt", "this model has no tokenizer; give token ids");
    return ht_encode(c->encoder, json_string_value(text), json_string_length(text), special, ids);
}

static enum ht_status add_ids(struct ht_ids *ids, const json_t *list,
                              const struct ht_api_context *c, const char *param,
                              struct ht_api_error *e)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        const json_int_t id = json_integer_value(v);
        if (!json_is_integer(v))
            return BAD(e, param, "%s: item %zu is %s; it must be a token id", param, i,
                       type_name(v));
        if (id < 0 || id >= c->vocab_size)
            return BAD(e, param, "%s: token id %lld; ids are from 0 to %lld", param, (long long)id,
                       (long long)c->vocab_size - 1);
        const int32_t token = (int32_t)id;
        HT_TRY(ht_ids_append(ids, &token, 1));
    }
    return HT_OK;
}

/* A string, strings, ids, or lists of ids. */
static enum ht_status get_prompts(struct ht_api_request *r, const struct ht_api_context *c,
                                  struct ht_api_error *e)
{
    const json_t *v = get(r->body, "prompt");
    const bool list =
        json_is_array(v) && (json_array_size(v) == 0 || !json_is_integer(json_array_get(v, 0)));
    const size_t n = list ? json_array_size(v) : 1;
    bool special = true;

    HT_TRY(get_bool(r->body, "add_special_tokens", &special, e));
    if (!json_is_string(v) && !json_is_array(v))
        return BAD(e, "prompt",
                   "prompt is %s; it must be a string, strings, token ids, or lists of token ids",
                   type_name(v));
    if (n == 0 || n > HT_API_MAX_PROMPTS)
        return BAD(e, "prompt", "%zu prompts; 1 to %d are allowed", n, HT_API_MAX_PROMPTS);
    r->prompts = calloc(n, sizeof *r->prompts);
    if (!r->prompts) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu prompts", n);
    for (; r->n_prompts < (int)n; r->n_prompts++) {
        struct ht_ids *ids = &r->prompts[r->n_prompts];
        const json_t *p = list ? json_array_get(v, (size_t)r->n_prompts) : v;
        enum ht_status st;
        if (json_is_string(p))
            st = add_text(ids, p, special, c, e);
        else if (json_is_array(p))
            st = add_ids(ids, p, c, "prompt", e);
        else
            st = BAD(e, "prompt", "prompt %d is %s; it must be a string or token ids", r->n_prompts,
                     type_name(p));
        if (st == HT_OK && ids->n == 0) {
            if (c->bos_id >= 0)
                st = ht_ids_append(ids, &c->bos_id, 1);
            else
                st = BAD(e, "prompt", "prompt %d is empty: give at least one token", r->n_prompts);
        }
        if (st != HT_OK) {
            r->n_prompts++; // for the clean-up
            return st;
        }
    }
    return HT_OK;
}

static enum ht_status parse_completion(struct ht_api_request *r, const struct ht_api_context *c,
                                       struct ht_api_error *e)
{
    const char *suffix = NULL;
    int64_t logprobs = -1;

    HT_TRY(get_string(r->body, "suffix", &suffix, e));
    if (suffix && *suffix) return BAD(e, "suffix", "suffix is not supported");
    HT_TRY(get_bool(r->body, "echo", &r->request.echo, e));
    HT_TRY(get_int(r->body, "logprobs", 0, HT_ENGINE_MAX_LOGPROBS, false, &logprobs, e));
    r->request.logprobs = (int)logprobs;
    HT_TRY(get_prompts(r, c, e));
    return get_length(r, c, 16, e);
}

// ---- /v1/chat/completions ----

/* Text of a message's parts, joined by newlines, in their place. */
static enum ht_status flatten(json_t *message, size_t i, struct ht_api_error *e)
{
    const json_t *parts = json_object_get(message, "content");
    struct ht_api_text text = { 0 };
    enum ht_status st = HT_OK;
    char param[64];

    snprintf(param, sizeof param, "messages[%zu].content", i);
    if (!json_is_array(parts)) {
        if (!parts || json_is_null(parts) || json_is_string(parts)) return HT_OK;
        return BAD(e, param, "%s is %s; it must be a string or parts", param, type_name(parts));
    }
    for (size_t k = 0; k < json_array_size(parts) && st == HT_OK; k++) {
        const json_t *part = json_array_get(parts, k), *t = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") != 0 || !json_is_string(t))
            st = BAD(e, param, "%s[%zu] is of type '%.40s'; only text is supported", param, k,
                     type ? type : "?");
        if (st == HT_OK && k) ht_api_add_bytes(&text, "\n", 1);
        if (st == HT_OK) ht_api_add_bytes(&text, json_string_value(t), json_string_length(t));
    }
    if (st == HT_OK &&
        (text.failed ||
         json_object_set_new(message, "content", json_stringn(text.n ? text.p : "", text.n)) != 0))
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for message %zu", i);
    free(text.p);
    return st;
}

static enum ht_status check_messages(json_t *messages, struct ht_api_error *e)
{
    const size_t n = json_array_size(messages);
    char param[64];

    if (!json_is_array(messages))
        return BAD(e, "messages", "messages is %s; it must be an array", type_name(messages));
    if (n == 0 || n > HT_API_MAX_MESSAGES)
        return BAD(e, "messages", "messages has %zu entries; 1 to %d are allowed", n,
                   HT_API_MAX_MESSAGES);
    for (size_t i = 0; i < n; i++) {
        json_t *m = json_array_get(messages, i);
        snprintf(param, sizeof param, "messages[%zu]", i);
        if (!json_is_object(m))
            return BAD(e, param, "%s is %s; it must be an object", param, type_name(m));
        const json_t *role = json_object_get(m, "role");
        snprintf(param, sizeof param, "messages[%zu].role", i);
        if (!json_is_string(role))
            return BAD(e, param, "%s is %s; it must be a string", param, type_name(role));
        HT_TRY(flatten(m, i, e));
    }
    return HT_OK;
}

static enum ht_status encode_chat(struct ht_api_request *r, const struct ht_api_context *c,
                                  const struct ht_chat_input *in, struct ht_api_error *e)
{
    struct ht_jinja_output text;
    enum ht_status st = ht_chat_render(c->chat, in, &text);
    if (st != HT_OK) {
        bad(e, 400, "messages");
        return st;
    }
    r->prompts = calloc(1, sizeof *r->prompts);
    if (!r->prompts) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a prompt");
        goto done;
    }
    r->n_prompts = 1;
    HT_TRY_GOTO(st, done, ht_chat_encode(c->encoder, &text, r->prompts));
    if (r->prompts->n == 0)
        st = BAD(e, "messages", "the chat template makes an empty prompt of these messages");
done:
    ht_jinja_output_free(&text);
    return st;
}

static enum ht_status parse_chat(struct ht_api_request *r, const struct ht_api_context *c,
                                 struct ht_api_error *e)
{
    struct ht_chat_input in = { .bos = c->bos, .eos = c->eos, .add_generation_prompt = true };
    json_t *messages = get(r->body, "messages");
    const json_t *choice = get(r->body, "tool_choice");
    bool logprobs = false;
    int64_t top = 0;

    if (!c->chat || !c->tokenizer)
        return BAD(e, NULL,
                   "this model has no chat template; use /v1/completions, or start the server with "
                   "--chat-template");
    HT_TRY(get_bool(r->body, "logprobs", &logprobs, e));
    HT_TRY(get_int(r->body, "top_logprobs", 0, HT_ENGINE_MAX_LOGPROBS, false, &top, e));
    if (top && !logprobs) return BAD(e, "top_logprobs", "top_logprobs needs logprobs: true");
    r->request.logprobs = logprobs ? (int)top : -1;
    HT_TRY(get_bool(r->body, "add_generation_prompt", &in.add_generation_prompt, e));
    HT_TRY(check_messages(messages, e));
    in.messages = messages;
    in.tools = get(r->body, "tools");
    if (in.tools && !json_is_array(in.tools))
        return BAD(e, "tools", "tools is %s; it must be an array", type_name(in.tools));
    if ((json_is_string(choice) && strcmp(json_string_value(choice), "none") == 0) ||
        json_array_size(in.tools) == 0)
        in.tools = NULL;
    in.documents = get(r->body, "documents");
    if (in.documents && !json_is_array(in.documents))
        return BAD(e, "documents", "documents is %s; it must be an array", type_name(in.documents));
    in.extra = get(r->body, "chat_template_kwargs");
    if (in.extra && !json_is_object(in.extra))
        return BAD(e, "chat_template_kwargs", "chat_template_kwargs is %s; it must be an object",
                   type_name(in.extra));
    HT_TRY(encode_chat(r, c, &in, e));
    return get_length(r, c, c->max_context, e);
}

static enum ht_status parse(struct ht_api_request *r, const struct ht_api_context *c,
                            struct ht_api_error *e)
{
    const char *model = NULL;
    HT_TRY(get_string(r->body, "model", &model, e));
    if (model && strcmp(model, c->model) != 0) {
        bad(e, 404, "model");
        e->code = "model_not_found";
        return HT_FAIL(HT_ERR_ARG, "the model '%.100s' is not served here; '%s' is", model,
                       c->model);
    }
    HT_TRY(get_sampling(r, c, e));
    return r->kind == HT_API_CHAT ? parse_chat(r, c, e) : parse_completion(r, c, e);
}

enum ht_status ht_api_parse(struct ht_api_request *out, enum ht_api_kind kind, const char *body,
                            size_t n_bytes, const struct ht_api_context *c, struct ht_api_error *e)
{
    *out = (struct ht_api_request){ .kind = kind };
    *e = (struct ht_api_error){ .http = 500, .type = "server_error" };
    HT_TRY(ht_api_parse_json(&out->body, body, n_bytes, e));
    const enum ht_status st = parse(out, c, e);
    if (st != HT_OK) ht_api_request_free(out);
    return st;
}

void ht_api_request_free(struct ht_api_request *r)
{
    for (int i = 0; i < r->n_prompts; i++) ht_ids_free(&r->prompts[i]);
    free(r->prompts);
    free(r->biases);
    json_decref(r->body);
    *r = (struct ht_api_request){ 0 };
}

// ---- /tokenize, /detokenize ----

enum ht_status ht_api_tokenize(struct ht_api_text *out, const char *body, size_t n_bytes,
                               const struct ht_api_context *c, struct ht_api_error *e)
{
    enum ht_status st = HT_OK;
    struct ht_ids ids = { 0 };
    json_t *o = NULL;
    bool special = true;

    *e = (struct ht_api_error){ .http = 500, .type = "server_error" };
    HT_TRY_GOTO(st, done, ht_api_parse_json(&o, body, n_bytes, e));
    if (!get(o, "prompt")) special = false; // {content}: llama.cpp's form adds nothing
    const json_t *text = get(o, "prompt") ? get(o, "prompt") : get(o, "content");
    HT_TRY_GOTO(st, done, get_bool(o, "add_special_tokens", &special, e));
    HT_TRY_GOTO(st, done, get_bool(o, "add_special", &special, e));
    if (!json_is_string(text)) {
        st = BAD(e, "prompt", "prompt is %s; it must be a string", type_name(text));
        goto done;
    }
    HT_TRY_GOTO(st, done, add_text(&ids, text, special, c, e));
    ht_api_add(out, "{\"count\":%lld,\"max_model_len\":%lld,\"tokens\":[", (long long)ids.n,
               (long long)c->max_context);
    for (int64_t i = 0; i < ids.n; i++) ht_api_add(out, i ? ",%d" : "%d", ids.ids[i]);
    ht_api_add(out, "]}");
done:
    ht_ids_free(&ids);
    json_decref(o);
    return st;
}

enum ht_status ht_api_detokenize(struct ht_api_text *out, const char *body, size_t n_bytes,
                                 const struct ht_api_context *c, struct ht_api_error *e)
{
    enum ht_status st = HT_OK;
    struct ht_api_text text = { 0 };
    struct ht_ids ids = { 0 };
    json_t *o = NULL;
    const char *p;
    size_t n;

    *e = (struct ht_api_error){ .http = 500, .type = "server_error" };
    HT_TRY_GOTO(st, done, ht_api_parse_json(&o, body, n_bytes, e));
    const json_t *tokens = get(o, "tokens");
    if (!json_is_array(tokens)) {
        st = BAD(e, "tokens", "tokens is %s; it must be an array of token ids", type_name(tokens));
        goto done;
    }
    if (!c->tokenizer) {
        st = BAD(e, NULL, "this model has no tokenizer");
        goto done;
    }
    HT_TRY_GOTO(st, done, add_ids(&ids, tokens, c, "tokens", e));
    for (int64_t i = 0; i < ids.n; i++) {
        HT_TRY_GOTO(st, done, ht_token_decoder_push(c->decoder, ids.ids[i], &p, &n));
        ht_api_add_bytes(&text, p, n);
    }
    HT_TRY_GOTO(st, done, ht_token_decoder_finish(c->decoder, &p, &n));
    ht_api_add_bytes(&text, p, n);
    ht_api_add(out, "{\"prompt\":");
    ht_api_add_string(out, text.p, text.n);
    ht_api_add(out, ",\"content\":");
    ht_api_add_string(out, text.p, text.n);
    ht_api_add(out, "}");
    if (text.failed) st = HT_FAIL(HT_ERR_MEMORY, "no memory for the text");
done:
    free(text.p);
    ht_ids_free(&ids);
    json_decref(o);
    return st;
}
