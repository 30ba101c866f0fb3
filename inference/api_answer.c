/* inference/api_answer.c: engine events -> JSON. */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "inference/api.h"

// ---- text ----

static bool make_room(struct ht_api_text *t, size_t n)
{
    if (t->failed) return false;
    if (t->capacity - t->n > n) return true; // one more for the NUL of printf
    size_t capacity = t->capacity ? t->capacity : 256;
    while (capacity - t->n <= n) capacity *= 2;
    char *p = capacity < SIZE_MAX / 4 ? realloc(t->p, capacity) : NULL;
    if (!p) {
        t->failed = true;
        return false;
    }
    t->p = p;
    t->capacity = capacity;
    return true;
}

void ht_api_add_bytes(struct ht_api_text *t, const char *p, size_t n)
{
    if (n == 0 || !make_room(t, n)) return;
    memcpy(t->p + t->n, p, n);
    t->n += n;
    t->p[t->n] = '\0';
}

void ht_api_add(struct ht_api_text *t, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    const int n = vsnprintf(NULL, 0, format, args);
    if (n >= 0 && make_room(t, (size_t)n)) {
        vsnprintf(t->p + t->n, (size_t)n + 1, format, again);
        t->n += (size_t)n;
    }
    va_end(again);
    va_end(args);
}

/* Bytes of the character at p; 0 when it is not UTF-8. Messages may quote what a client sent. */
static size_t whole_char(const unsigned char *p, size_t n)
{
    const size_t k = p[0] < 0x80   ? 1
                     : p[0] < 0xC2 ? 0
                     : p[0] < 0xE0 ? 2
                     : p[0] < 0xF0 ? 3
                     : p[0] < 0xF5 ? 4
                                   : 0;
    if (k == 0 || k > n) return 0;
    for (size_t i = 1; i < k; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F) ||
        (p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F))
        return 0;
    return k;
}

void ht_api_add_string(struct ht_api_text *t, const char *p, size_t n)
{
    ht_api_add_bytes(t, "\"", 1);
    for (size_t i = 0, end; i < n; i = end) {
        size_t k = 0;
        for (end = i; end < n; end += k) {
            const unsigned char c = (unsigned char)p[end];
            k = whole_char((const unsigned char *)p + end, n - end);
            if (k == 0 || c < 32 || c == '"' || c == '\\' || c == 127) break;
        }
        ht_api_add_bytes(t, p + i, end - i);
        if (end == n) break;
        const char c = p[end++];
        if (k == 0)
            ht_api_add_bytes(t, "\\ufffd", 6);
        else if (c == '"' || c == '\\')
            ht_api_add(t, "\\%c", c);
        else if (c == '\n')
            ht_api_add_bytes(t, "\\n", 2);
        else
            ht_api_add(t, "\\u%04x", (unsigned char)c);
    }
    ht_api_add_bytes(t, "\"", 1);
}

void ht_api_add_error(struct ht_api_text *t, const struct ht_api_error *e)
{
    const char *message = ht_error_message();
    ht_api_add(t, "{\"error\":{\"message\":");
    ht_api_add_string(t, message, strlen(message));
    ht_api_add(t, ",\"type\":\"%s\",\"param\":", e->type);
    if (e->param[0])
        ht_api_add_string(t, e->param, strlen(e->param));
    else
        ht_api_add(t, "null");
    ht_api_add(t, e->code ? ",\"code\":\"%s\"}}" : ",\"code\":null}}", e->code);
}

void ht_api_models(struct ht_api_text *out, const struct ht_api_context *c, int64_t created)
{
    ht_api_add(out, "{\"object\":\"list\",\"data\":[{\"id\":");
    ht_api_add_string(out, c->model, strlen(c->model));
    ht_api_add(out,
               ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"hybridtrain\",\"max_model_"
               "len\":%lld}]}",
               (long long)created, (long long)c->max_context);
}

static void add_or_null(struct ht_api_text *out, const char *key, const char *text)
{
    ht_api_add(out, "\"%s\":", key);
    if (text)
        ht_api_add_string(out, text, strlen(text));
    else
        ht_api_add(out, "null");
}

void ht_api_tokenizer_info(struct ht_api_text *out, const struct ht_api_context *c)
{
    ht_api_add(out, "{");
    add_or_null(out, "bos_token", c->bos);
    ht_api_add(out, ",");
    add_or_null(out, "eos_token", c->eos);
    ht_api_add(out, ",");
    add_or_null(out, "pad_token", c->eos);
    ht_api_add(out, ",");
    add_or_null(out, "chat_template", c->chat ? ht_chat_template_text(c->chat) : NULL);
    ht_api_add(out, ",\"vocab_size\":%lld,\"max_model_len\":%lld}", (long long)c->vocab_size,
               (long long)c->max_context);
}

// ---- choices ----

struct choice {
    struct ht_api_text text;
    struct ht_api_text tokens, logprobs, tops, offsets; // completions: items of the four arrays
    struct ht_api_text content;                         // chat: items of logprobs.content
    int64_t n_tokens, n_chars;
    double logprob_sum; // of generated tokens
    int64_t n_generated;
    enum ht_finish finish;
    int64_t prompt_tokens, cached_tokens, generated_tokens;
};

struct ht_api_answer {
    enum ht_api_kind kind;
    const struct ht_api_context *c;
    char *id;
    int64_t created;
    int n_prompts, n, n_made; // choices answered and made per prompt
    bool stream, include_usage, logprobs, failed;
    int alternatives, n_ended;
    char *error;            // of the first choice that failed
    struct choice *choices; // (n_prompts * n_made)
};

enum ht_status ht_api_answer_create(struct ht_api_answer **out, const struct ht_api_request *r,
                                    const struct ht_api_context *c, const char *id, int64_t created)
{
    struct ht_api_answer *a = calloc(1, sizeof *a);
    *out = NULL;
    if (a) {
        *a = (struct ht_api_answer){ .kind = r->kind,
                                     .c = c,
                                     .created = created,
                                     .n_prompts = r->n_prompts,
                                     .n = r->n,
                                     .n_made = r->request.n,
                                     .stream = r->stream,
                                     .include_usage = r->include_usage,
                                     .logprobs = r->request.logprobs >= 0,
                                     .alternatives = r->request.logprobs };
        a->id = strdup(id);
        a->choices = calloc((size_t)(a->n_prompts * a->n_made), sizeof *a->choices);
    }
    if (!a || !a->id || !a->choices) {
        ht_api_answer_free(a);
        return HT_FAIL(HT_ERR_MEMORY, "no memory for an answer of %d choices",
                       r->n_prompts * r->request.n);
    }
    *out = a;
    return HT_OK;
}

void ht_api_answer_free(struct ht_api_answer *a)
{
    if (!a) return;
    for (int i = 0; a->choices && i < a->n_prompts * a->n_made; i++) {
        struct choice *k = &a->choices[i];
        struct ht_api_text *const texts[] = { &k->text, &k->tokens,  &k->logprobs,
                                              &k->tops, &k->offsets, &k->content };
        for (size_t t = 0; t < 6; t++) free(texts[t]->p);
    }
    free(a->choices);
    free(a->error);
    free(a->id);
    free(a);
}

static size_t count_chars(const char *p, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)p[i] & 0xC0) != 0x80;
    return count;
}

/* A token as text of its own: what it decodes to alone. */
static void add_token_text(struct ht_api_text *out, const struct ht_api_context *c, int32_t id)
{
    char name[32];
    const char *p;
    size_t n;
    if (!c->tokenizer) {
        ht_api_add_string(out, name, (size_t)snprintf(name, sizeof name, "token_id:%d", id));
        return;
    }
    struct ht_api_text text = { 0 };
    if (ht_token_decoder_push(c->decoder, id, &p, &n) == HT_OK) ht_api_add_bytes(&text, p, n);
    if (ht_token_decoder_finish(c->decoder, &p, &n) == HT_OK) ht_api_add_bytes(&text, p, n);
    ht_api_add_string(out, text.p, text.n);
    free(text.p);
}

/* Nine digits give the same float back, so equal floats are equal texts and the other way round. */
static void add_float(struct ht_api_text *out, float f)
{
    ht_api_add(out, "%.9g", (double)(f > -9999.0f ? f : -9999.0f)); // -inf is not JSON
}

/* {"token": logprob, ..}: of tokens with the same text the most probable one stands (they come in
 * falling order). */
static void add_tops(struct ht_api_text *out, const struct ht_api_context *c,
                     const struct ht_engine_event *ev)
{
    struct ht_api_text names[HT_ENGINE_MAX_LOGPROBS + 2] = { 0 };
    int n = 0;
    ht_api_add(out, "{");
    for (int i = 0; i < ev->n_top && n < HT_ENGINE_MAX_LOGPROBS + 2; i++) {
        struct ht_api_text *name = &names[n];
        bool there = false;
        name->n = 0;
        add_token_text(name, c, ev->top[i].id);
        for (int k = 0; k < n; k++)
            there |= names[k].n == name->n && memcmp(names[k].p, name->p, name->n) == 0;
        if (there || name->failed) continue;
        if (n++) ht_api_add(out, ",");
        ht_api_add_bytes(out, name->p, name->n);
        ht_api_add(out, ":");
        add_float(out, ev->top[i].logprob);
    }
    ht_api_add(out, "}");
    for (int i = 0; i < HT_ENGINE_MAX_LOGPROBS + 2; i++) free(names[i].p);
}

static void comma(struct ht_api_text *t)
{
    if (t->n) ht_api_add_bytes(t, ",", 1);
}

static void add_chat_token(struct ht_api_text *out, const struct ht_api_context *c, int32_t id,
                           float logprob)
{
    struct ht_api_text name = { 0 };
    add_token_text(&name, c, id);
    ht_api_add(out, "{\"token\":");
    ht_api_add_bytes(out, name.p, name.n);
    ht_api_add(out, ",\"logprob\":");
    add_float(out, logprob);
    ht_api_add(out, ",\"bytes\":[");
    json_t *text = name.p ? json_loadb(name.p, name.n, JSON_DECODE_ANY, NULL) : NULL;
    for (size_t i = 0; i < json_string_length(text); i++)
        ht_api_add(out, i ? ",%u" : "%u", (unsigned)(unsigned char)json_string_value(text)[i]);
    ht_api_add(out, "]");
    json_decref(text);
    free(name.p);
}

/* The log-probabilities of one token, into the choice's arrays. */
static void add_logprobs(const struct ht_api_answer *a, struct choice *k,
                         const struct ht_engine_event *ev)
{
    if (a->kind == HT_API_CHAT) {
        comma(&k->content);
        add_chat_token(&k->content, a->c, ev->id, ev->logprob);
        ht_api_add(&k->content, ",\"top_logprobs\":[");
        for (int i = 0, n = 0; i < ev->n_top && n < a->alternatives; i++, n++) {
            if (n) ht_api_add(&k->content, ",");
            add_chat_token(&k->content, a->c, ev->top[i].id, ev->top[i].logprob);
            ht_api_add(&k->content, "}");
        }
        ht_api_add(&k->content, "]}");
        return;
    }
    comma(&k->tokens);
    add_token_text(&k->tokens, a->c, ev->id);
    comma(&k->offsets);
    ht_api_add(&k->offsets, "%lld", (long long)k->n_chars);
    comma(&k->logprobs);
    comma(&k->tops);
    if (!ev->has_logprob) {
        ht_api_add(&k->logprobs, "null");
        ht_api_add(&k->tops, "null");
        return;
    }
    add_float(&k->logprobs, ev->logprob);
    add_tops(&k->tops, a->c, ev);
}

static void write_logprobs(const struct ht_api_answer *a, struct choice *k, struct ht_api_text *out)
{
    ht_api_add(out, ",\"logprobs\":");
    if (!a->logprobs) {
        ht_api_add(out, "null");
        return;
    }
    struct ht_api_text *const parts[] = { &k->tokens, &k->logprobs, &k->tops, &k->offsets };
    static const char *const names[] = { "{\"tokens\":[", "],\"token_logprobs\":[",
                                         "],\"top_logprobs\":[", "],\"text_offset\":[" };
    if (a->kind == HT_API_CHAT) {
        ht_api_add(out, "{\"content\":[");
        ht_api_add_bytes(out, k->content.p, k->content.n);
    }
    for (int i = 0; i < 4 && a->kind == HT_API_COMPLETION; i++) {
        ht_api_add(out, "%s", names[i]);
        ht_api_add_bytes(out, parts[i]->p, parts[i]->n);
    }
    ht_api_add(out, "]}");
    for (int i = 0; i < 4; i++) parts[i]->n = 0;
    k->content.n = 0;
}

static void write_finish(enum ht_finish f, struct ht_api_text *out)
{
    static const char *const names[] = { NULL, "\"stop\"", "\"length\"", "\"cancelled\"",
                                         "\"error\"" };
    ht_api_add(out, ",\"finish_reason\":%s", f == HT_FINISH_NONE ? "null" : names[f]);
}

static void write_head(const struct ht_api_answer *a, struct ht_api_text *out)
{
    static const char *const objects[2][2] = { { "text_completion", "text_completion" },
                                               { "chat.completion", "chat.completion.chunk" } };
    ht_api_add(out, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", a->id,
               objects[a->kind][a->stream], (long long)a->created);
    ht_api_add_string(out, a->c->model, strlen(a->c->model));
}

static void write_usage(const struct ht_api_answer *a, struct ht_api_text *out)
{
    struct ht_api_usage u;
    ht_api_answer_usage(a, &u);
    ht_api_add(
        out,
        ",\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
        "\"prompt_tokens_details\":{\"cached_tokens\":%lld}}",
        (long long)u.prompt_tokens, (long long)u.completion_tokens,
        (long long)(u.prompt_tokens + u.completion_tokens), (long long)u.cached_tokens);
}

void ht_api_answer_start(struct ht_api_answer *a, struct ht_api_text *sse)
{
    if (!a->stream || a->kind != HT_API_CHAT) return;
    for (int i = 0; i < a->n; i++) {
        ht_api_add(sse, "data: ");
        write_head(a, sse);
        ht_api_add(
            sse,
            ",\"choices\":[{\"index\":%d,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
            "\"logprobs\":null,\"finish_reason\":null}]}\n\n",
            i);
    }
}

static void write_chunk(const struct ht_api_answer *a, int index, struct choice *k,
                        const struct ht_engine_event *ev, struct ht_api_text *sse)
{
    const bool quiet =
        ev->text_bytes == 0 && ev->finish == HT_FINISH_NONE && !(a->logprobs && ev->id >= 0);
    if (quiet) return; // held back: half a character, or the start of a stop string
    ht_api_add(sse, "data: ");
    write_head(a, sse);
    ht_api_add(sse,
               a->kind == HT_API_CHAT ? ",\"choices\":[{\"index\":%d,\"delta\":{\"content\":"
                                      : ",\"choices\":[{\"index\":%d,\"text\":",
               index);
    ht_api_add_string(sse, ev->text, ev->text_bytes);
    if (a->kind == HT_API_CHAT) ht_api_add(sse, "}");
    write_logprobs(a, k, sse);
    write_finish(ev->finish, sse);
    ht_api_add(sse, "}]%s}\n\n", a->include_usage ? ",\"usage\":null" : "");
}

enum ht_status ht_api_answer_event(struct ht_api_answer *a, int prompt,
                                   const struct ht_engine_event *ev, struct ht_api_text *sse)
{
    if (prompt < 0 || prompt >= a->n_prompts || ev->choice < 0 || ev->choice >= a->n_made)
        return HT_OK;
    struct choice *k = &a->choices[prompt * a->n_made + ev->choice];
    if (k->finish != HT_FINISH_NONE) return HT_OK;
    if (ev->id >= 0) {
        if (a->logprobs) add_logprobs(a, k, ev);
        k->n_tokens++;
        if (!ev->from_prompt) {
            k->n_generated++;
            k->logprob_sum += (double)ev->logprob;
        }
    }
    if (!a->stream) ht_api_add_bytes(&k->text, ev->text, ev->text_bytes);
    k->n_chars += (int64_t)count_chars(ev->text, ev->text_bytes);
    k->finish = ev->finish;
    if (ev->finish != HT_FINISH_NONE) {
        a->n_ended++;
        k->prompt_tokens = ev->prompt_tokens;
        k->cached_tokens = ev->cached_tokens;
        k->generated_tokens = ev->generated_tokens;
        if (ev->finish == HT_FINISH_ERROR && !a->failed) {
            a->failed = true;
            a->error = strdup(ev->message ? ev->message : "the engine failed");
        }
    }
    if (a->stream && ev->finish == HT_FINISH_ERROR) {
        const struct ht_api_error e = { .http = 500, .type = "server_error" };
        (void)HT_FAIL(HT_ERR_ARG, "%s", ev->message ? ev->message : "the engine failed");
        ht_api_add(sse, "data: ");
        ht_api_add_error(sse, &e);
        ht_api_add(sse, "\n\n");
    } else if (a->stream) {
        write_chunk(a, prompt * a->n + ev->choice, k, ev, sse);
    }
    const bool failed = k->text.failed || k->tokens.failed || k->logprobs.failed ||
                        k->tops.failed || k->offsets.failed || k->content.failed ||
                        (sse && sse->failed);
    return failed ? HT_FAIL(HT_ERR_MEMORY, "no memory for the answer") : HT_OK;
}

bool ht_api_answer_complete(const struct ht_api_answer *a)
{
    return a->n_ended == a->n_prompts * a->n_made;
}

bool ht_api_answer_failed(const struct ht_api_answer *a)
{
    return a->failed;
}

void ht_api_answer_usage(const struct ht_api_answer *a, struct ht_api_usage *out)
{
    *out = (struct ht_api_usage){ 0 };
    for (int i = 0; i < a->n_prompts * a->n_made; i++) {
        const struct choice *k = &a->choices[i];
        if (i % a->n_made == 0) out->prompt_tokens += k->prompt_tokens; // choices share it
        if (i % a->n_made == 0) out->cached_tokens += k->cached_tokens;
        out->completion_tokens += k->generated_tokens;
    }
}

/* Of the choices of a prompt the one with the best mean log-probability that is not yet taken. */
static struct choice *best(struct choice *choices, int n, bool *taken)
{
    int found = -1;
    double most = 0;
    for (int i = 0; i < n; i++) {
        const double mean = choices[i].n_generated
                                ? choices[i].logprob_sum / (double)choices[i].n_generated
                                : -1e30;
        if (taken[i] || (found >= 0 && mean <= most)) continue;
        found = i;
        most = mean;
    }
    taken[found] = true;
    return &choices[found];
}

enum ht_status ht_api_answer_finish(struct ht_api_answer *a, struct ht_api_text *out)
{
    if (a->stream) {
        if (a->include_usage) {
            ht_api_add(out, "data: ");
            write_head(a, out);
            ht_api_add(out, ",\"choices\":[]");
            write_usage(a, out);
            ht_api_add(out, "}\n\n");
        }
        ht_api_add(out, "data: [DONE]\n\n");
        return out->failed ? HT_FAIL(HT_ERR_MEMORY, "no memory for the answer") : HT_OK;
    }
    if (a->failed) return HT_FAIL(HT_ERR_ARG, "%s", a->error ? a->error : "the engine failed");
    write_head(a, out);
    ht_api_add(out, ",\"choices\":[");
    for (int p = 0; p < a->n_prompts; p++) {
        bool taken[HT_ENGINE_MAX_CHOICES] = { false };
        for (int i = 0; i < a->n; i++) {
            struct choice *all = a->choices + p * a->n_made;
            struct choice *k = a->n_made > a->n ? best(all, a->n_made, taken) : &all[i];
            const bool chat = a->kind == HT_API_CHAT;
            ht_api_add(out, "%s{\"index\":%d,", p + i ? "," : "", p * a->n + i);
            ht_api_add(out,
                       chat ? "\"message\":{\"role\":\"assistant\",\"content\":" : "\"text\":");
            ht_api_add_string(out, k->text.p, k->text.n);
            if (chat) ht_api_add(out, ",\"refusal\":null}");
            write_logprobs(a, k, out);
            write_finish(k->finish, out);
            ht_api_add(out, "}");
        }
    }
    ht_api_add(out, "]");
    write_usage(a, out);
    ht_api_add(out, "}");
    return out->failed ? HT_FAIL(HT_ERR_MEMORY, "no memory for the answer") : HT_OK;
}
