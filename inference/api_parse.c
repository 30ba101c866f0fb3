/* inference/api_parse.c: bodies -> requests. */
#include <stdlib.h>
#include <string.h>

#include "inference/api_impl.h"

static enum ht_status get_stops(struct ht_api_request *r, struct ht_api_error *e)
{
    const json_t *v = ht_api_get(r->body, "stop");
    const size_t n = json_is_array(v) ? json_array_size(v) : v ? 1 : 0;

    if (n > HT_ENGINE_MAX_STOPS)
        return HT_API_BAD(e, "stop", "stop has %zu strings; at most %d are allowed", n,
                          HT_ENGINE_MAX_STOPS);
    for (size_t i = 0; i < n; i++) {
        const json_t *s = json_is_array(v) ? json_array_get(v, i) : v;
        if (!json_is_string(s))
            return HT_API_BAD(e, "stop", "stop is %s; it must be a string or strings",
                              ht_api_type_name(s));
        const size_t len = json_string_length(s);
        if (len == 0 || len > HT_ENGINE_MAX_STOP_BYTES)
            return HT_API_BAD(e, "stop", "stop %zu has %zu bytes; it must have 1 to %d", i, len,
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
    json_t *v = ht_api_get(r->body, key), *value;
    const char *name;
    if (!v) return HT_OK;
    if (!json_is_object(v))
        return HT_API_BAD(e, key, "%s is %s; it must be an object of token ids", key,
                          ht_api_type_name(v));
    const size_t n = json_object_size(v);
    if (n > HT_ENGINE_MAX_BIASES)
        return HT_API_BAD(e, key, "%s has %zu entries; at most %d are allowed", key, n,
                          HT_ENGINE_MAX_BIASES);
    if (n == 0) return HT_OK;
    r->biases = calloc(n, sizeof *r->biases);
    if (!r->biases) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu biases", n);
    json_object_foreach(v, name, value)
    {
        char *end;
        const long long id = strtoll(name, &end, 10);
        if (*end || end == name || id < 0 || id >= c->vocab_size)
            return HT_API_BAD(e, key, "%s: '%.40s' is no token id from 0 to %lld", key, name,
                              (long long)c->vocab_size - 1);
        const double bias = json_number_value(value);
        if (!json_is_number(value) || !(bias >= -100 && bias <= 100))
            return HT_API_BAD(e, key, "%s of %s must be a number from -100 to 100", key, name);
        r->biases[r->request.n_bias++] = (struct ht_logit_bias){ (int32_t)id, (float)bias };
    }
    r->request.bias = r->biases;
    return HT_OK;
}

static enum ht_status get_format(struct ht_api_request *r, struct ht_api_error *e)
{
    static const char key[] = "response_format";
    const json_t *v = ht_api_get(r->body, key), *schema = ht_api_get(r->body, "guided_json");
    const char *type = "text";

    if (v && !json_is_object(v))
        return HT_API_BAD(e, key, "%s is %s; it must be an object", key, ht_api_type_name(v));
    if (v && !json_is_string(json_object_get(v, "type")))
        return HT_API_BAD(e, key, "%s has no type", key);
    if (v) type = json_string_value(json_object_get(v, "type"));
    if (strcmp(type, "json_object") == 0) {
        r->format = HT_API_JSON_OBJECT;
    } else if (strcmp(type, "json_schema") == 0) {
        r->format = HT_API_JSON_SCHEMA;
        r->schema = json_object_get(json_object_get(v, "json_schema"), "schema");
        if (!json_is_object(r->schema) && !json_is_boolean(r->schema))
            return HT_API_BAD(e, key, "%s.json_schema.schema is %s; it must be an object", key,
                              ht_api_type_name(r->schema));
    } else if (strcmp(type, "text") != 0) {
        return HT_API_BAD(e, key, "%s.type is '%.40s'; it must be text, json_object or json_schema",
                          key, type);
    }
    if (!schema) return HT_OK;
    if (!json_is_object(schema))
        return HT_API_BAD(e, "guided_json", "guided_json is %s; it must be an object",
                          ht_api_type_name(schema));
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
    HT_TRY(ht_api_get_real(o, "temperature", 0, 2, false, &q->temperature, e));
    HT_TRY(ht_api_get_real(o, "top_p", 0, 1, true, &q->top_p, e));
    HT_TRY(ht_api_get_real(o, "min_p", 0, 0.999, false, &q->min_p, e));
    HT_TRY(ht_api_get_real(o, "presence_penalty", -2, 2, false, &q->presence_penalty, e));
    HT_TRY(ht_api_get_real(o, "frequency_penalty", -2, 2, false, &q->frequency_penalty, e));
    HT_TRY(ht_api_get_real(o, "repetition_penalty", 0.01, 100, false, &q->repetition_penalty, e));
    HT_TRY(ht_api_get_int(o, "top_k", -1, c->vocab_size, true, &q->top_k, e));
    if (q->top_k < 0) q->top_k = 0; // -1: all, as vLLM has it
    HT_TRY(ht_api_get_int(o, "n", 1, HT_ENGINE_MAX_CHOICES, false, &n, e));
    HT_TRY(ht_api_get_int(o, "best_of", 1, HT_ENGINE_MAX_CHOICES, false, &best_of, e));
    if (best_of && best_of < n)
        return HT_API_BAD(e, "best_of", "best_of is %lld, below n, which is %lld",
                          (long long)best_of, (long long)n);
    r->n = (int)n;
    q->n = (int)(best_of > n ? best_of : n);
    if (ht_api_get(o, "seed")) {
        HT_TRY(ht_api_get_int(o, "seed", INT64_MIN, INT64_MAX, false, &seed, e));
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
    HT_TRY(ht_api_get_bool(o, "ignore_eos", &q->ignore_eos, e));
    HT_TRY(ht_api_get_bool(o, "stream", &r->stream, e));
    const json_t *options = ht_api_get(o, "stream_options");
    if (options && !json_is_object(options))
        return HT_API_BAD(e, "stream_options", "stream_options is %s; it must be an object",
                          ht_api_type_name(options));
    if (options && !r->stream)
        return HT_API_BAD(e, "stream_options", "stream_options without stream");
    if (options) HT_TRY(ht_api_get_bool(options, "include_usage", &r->include_usage, e));
    if (r->stream && q->n > r->n)
        return HT_API_BAD(e, "best_of", "best_of cannot be streamed: the best is known at the end");
    if (ht_api_get(o, "prompt_logprobs"))
        return HT_API_BAD(e, "prompt_logprobs",
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
        ht_api_get(r->body, "max_completion_tokens") ? "max_completion_tokens" : "max_tokens";
    int64_t longest = 0, tokens = otherwise;
    for (int i = 0; i < r->n_prompts; i++)
        if (r->prompts[i].n > longest) longest = r->prompts[i].n;
    HT_TRY(ht_api_get_int(r->body, key, r->request.echo ? 0 : 1, INT32_MAX, true, &tokens, e));
    const int64_t room = c->max_context - longest;
    if (room < (tokens > 0)) {
        e->code = "context_length_exceeded";
        return HT_API_BAD(e, r->kind == HT_API_CHAT ? "messages" : "prompt",
                          "the prompt has %lld tokens; the context holds %lld with the answer",
                          (long long)longest, (long long)c->max_context);
    }
    r->request.max_tokens = tokens < room ? tokens : room;
    if (r->request.echo && r->request.logprobs >= 0) {
        int64_t scores = 0;
        for (int i = 0; i < r->n_prompts; i++)
            scores += r->prompts[i].n * (r->request.logprobs + 1) * r->request.n;
        if (scores > HT_API_MAX_SCORES)
            return HT_API_BAD(e, "logprobs", "log-probabilities of %lld echoed entries; at most %d",
                              (long long)scores, HT_API_MAX_SCORES);
    }
    return HT_OK;
}

// ---- /v1/completions ----

/* A string, strings, ids, or lists of ids. */
static enum ht_status get_prompts(struct ht_api_request *r, const struct ht_api_context *c,
                                  struct ht_api_error *e)
{
    const json_t *v = ht_api_get(r->body, "prompt");
    const bool list =
        json_is_array(v) && (json_array_size(v) == 0 || !json_is_integer(json_array_get(v, 0)));
    const size_t n = list ? json_array_size(v) : 1;
    bool special = true;

    HT_TRY(ht_api_get_bool(r->body, "add_special_tokens", &special, e));
    if (!json_is_string(v) && !json_is_array(v))
        return HT_API_BAD(
            e, "prompt",
            "prompt is %s; it must be a string, strings, token ids, or lists of token ids",
            ht_api_type_name(v));
    if (n == 0 || n > HT_API_MAX_PROMPTS)
        return HT_API_BAD(e, "prompt", "%zu prompts; 1 to %d are allowed", n, HT_API_MAX_PROMPTS);
    r->prompts = calloc(n, sizeof *r->prompts);
    if (!r->prompts) return HT_FAIL(HT_ERR_MEMORY, "no memory for %zu prompts", n);
    for (; r->n_prompts < (int)n; r->n_prompts++) {
        struct ht_ids *ids = &r->prompts[r->n_prompts];
        const json_t *p = list ? json_array_get(v, (size_t)r->n_prompts) : v;
        enum ht_status st;
        if (json_is_string(p))
            st = ht_api_add_text(ids, p, special, c, e);
        else if (json_is_array(p))
            st = ht_api_add_ids(ids, p, c, "prompt", e);
        else
            st = HT_API_BAD(e, "prompt", "prompt %d is %s; it must be a string or token ids",
                            r->n_prompts, ht_api_type_name(p));
        if (st == HT_OK && ids->n == 0) {
            if (c->bos_id >= 0)
                st = ht_ids_append(ids, &c->bos_id, 1);
            else
                st = HT_API_BAD(e, "prompt", "prompt %d is empty: give at least one token",
                                r->n_prompts);
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

    HT_TRY(ht_api_get_string(r->body, "suffix", &suffix, e));
    if (suffix && *suffix) return HT_API_BAD(e, "suffix", "suffix is not supported");
    HT_TRY(ht_api_get_bool(r->body, "echo", &r->request.echo, e));
    HT_TRY(ht_api_get_int(r->body, "logprobs", 0, HT_ENGINE_MAX_LOGPROBS, false, &logprobs, e));
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
        return HT_API_BAD(e, param, "%s is %s; it must be a string or parts", param,
                          ht_api_type_name(parts));
    }
    for (size_t k = 0; k < json_array_size(parts) && st == HT_OK; k++) {
        const json_t *part = json_array_get(parts, k), *t = json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (!type || strcmp(type, "text") != 0 || !json_is_string(t))
            st = HT_API_BAD(e, param, "%s[%zu] is of type '%.40s'; only text is supported", param,
                            k, type ? type : "?");
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
        return HT_API_BAD(e, "messages", "messages is %s; it must be an array",
                          ht_api_type_name(messages));
    if (n == 0 || n > HT_API_MAX_MESSAGES)
        return HT_API_BAD(e, "messages", "messages has %zu entries; 1 to %d are allowed", n,
                          HT_API_MAX_MESSAGES);
    for (size_t i = 0; i < n; i++) {
        json_t *m = json_array_get(messages, i);
        snprintf(param, sizeof param, "messages[%zu]", i);
        if (!json_is_object(m))
            return HT_API_BAD(e, param, "%s is %s; it must be an object", param,
                              ht_api_type_name(m));
        const json_t *role = json_object_get(m, "role");
        snprintf(param, sizeof param, "messages[%zu].role", i);
        if (!json_is_string(role))
            return HT_API_BAD(e, param, "%s is %s; it must be a string", param,
                              ht_api_type_name(role));
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
        ht_api_bad(e, 400, "messages");
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
        st = HT_API_BAD(e, "messages", "the chat template makes an empty prompt of these messages");
done:
    ht_jinja_output_free(&text);
    return st;
}

static enum ht_status parse_chat(struct ht_api_request *r, const struct ht_api_context *c,
                                 struct ht_api_error *e)
{
    struct ht_chat_input in = { .bos = c->bos, .eos = c->eos, .add_generation_prompt = true };
    json_t *messages = ht_api_get(r->body, "messages");
    const json_t *choice = ht_api_get(r->body, "tool_choice");
    bool logprobs = false;
    int64_t top = 0;

    if (!c->chat || !c->tokenizer)
        return HT_API_BAD(
            e, NULL,
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template");
    HT_TRY(ht_api_get_bool(r->body, "logprobs", &logprobs, e));
    HT_TRY(ht_api_get_int(r->body, "top_logprobs", 0, HT_ENGINE_MAX_LOGPROBS, false, &top, e));
    if (top && !logprobs) return HT_API_BAD(e, "top_logprobs", "top_logprobs needs logprobs: true");
    r->request.logprobs = logprobs ? (int)top : -1;
    HT_TRY(ht_api_get_bool(r->body, "add_generation_prompt", &in.add_generation_prompt, e));
    HT_TRY(check_messages(messages, e));
    in.messages = messages;
    in.tools = ht_api_get(r->body, "tools");
    if (in.tools && !json_is_array(in.tools))
        return HT_API_BAD(e, "tools", "tools is %s; it must be an array",
                          ht_api_type_name(in.tools));
    if ((json_is_string(choice) && strcmp(json_string_value(choice), "none") == 0) ||
        json_array_size(in.tools) == 0)
        in.tools = NULL;
    in.documents = ht_api_get(r->body, "documents");
    if (in.documents && !json_is_array(in.documents))
        return HT_API_BAD(e, "documents", "documents is %s; it must be an array",
                          ht_api_type_name(in.documents));
    in.extra = ht_api_get(r->body, "chat_template_kwargs");
    if (in.extra && !json_is_object(in.extra))
        return HT_API_BAD(e, "chat_template_kwargs",
                          "chat_template_kwargs is %s; it must be an object",
                          ht_api_type_name(in.extra));
    HT_TRY(encode_chat(r, c, &in, e));
    return get_length(r, c, c->max_context, e);
}

static enum ht_status parse(struct ht_api_request *r, const struct ht_api_context *c,
                            struct ht_api_error *e)
{
    const char *model = NULL;
    HT_TRY(ht_api_get_string(r->body, "model", &model, e));
    if (model && strcmp(model, c->model) != 0) {
        ht_api_bad(e, 404, "model");
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
