/* inference/api_tokenize.c: /tokenize and /detokenize. */
#include <stdlib.h>

#include "inference/api_impl.h"

enum ht_status ht_api_tokenize(struct ht_api_text *out, const char *body, size_t n_bytes,
                               const struct ht_api_context *c, struct ht_api_error *e)
{
    enum ht_status st = HT_OK;
    struct ht_ids ids = { 0 };
    json_t *o = NULL;
    bool special = true;

    *e = (struct ht_api_error){ .http = 500, .type = "server_error" };
    HT_TRY_GOTO(st, done, ht_api_parse_json(&o, body, n_bytes, e));
    if (!ht_api_get(o, "prompt")) special = false; // {content}: llama.cpp's form adds nothing
    const json_t *text =
        ht_api_get(o, "prompt") ? ht_api_get(o, "prompt") : ht_api_get(o, "content");
    HT_TRY_GOTO(st, done, ht_api_get_bool(o, "add_special_tokens", &special, e));
    HT_TRY_GOTO(st, done, ht_api_get_bool(o, "add_special", &special, e));
    if (!json_is_string(text)) {
        st = HT_API_BAD(e, "prompt", "prompt is %s; it must be a string", ht_api_type_name(text));
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_api_add_text(&ids, text, special, c, e));
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
    const json_t *tokens = ht_api_get(o, "tokens");
    if (!json_is_array(tokens)) {
        st = HT_API_BAD(e, "tokens", "tokens is %s; it must be an array of token ids",
                        ht_api_type_name(tokens));
        goto done;
    }
    if (!c->tokenizer) {
        st = HT_API_BAD(e, NULL, "this model has no tokenizer");
        goto done;
    }
    HT_TRY_GOTO(st, done, ht_api_add_ids(&ids, tokens, c, "tokens", e));
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
