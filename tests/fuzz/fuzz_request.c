/* tests/fuzz/fuzz_request.c: bodies of the server's requests, and JSON schemas. Input: a byte
 * (which endpoint), the body. */
#include "inference/api.h"
#include "inference/grammar.h"
#include "tests/fuzz/fuzz.h"

static const char tokenizer_json[] =
    "{\"added_tokens\":[{\"id\":8,\"content\":\"<|im_end|>\",\"single_word\":false,\"lstrip\":"
    "false,\"rstrip\":false,"
    "\"normalized\":false,\"special\":true}],\"normalizer\":null,\"pre_tokenizer\":{\"type\":"
    "\"ByteLevel\","
    "\"add_prefix_space\":false,\"use_regex\":true},\"post_processor\":null,\"decoder\":{\"type\":"
    "\"ByteLevel\"},"
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"{\":2,\"}\":3,\"\\\"\":4,\":\":5,"
    "\"1\":6,\"ab\":7},\"merges\":[\"a b\"]}}";
static const char chatml[] = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ "
                             "tools|tojson if tools }}<|im_end|>{% endfor %}";

static struct ht_api_context context;
static struct ht_grammar_vocab *vocab;

static void set_up(void)
{
    static struct ht_tokenizer *t;
    static struct ht_chat_template *chat;
    if (t) return;
    if (ht_tokenizer_parse(&t, tokenizer_json, sizeof tokenizer_json - 1, "t") != HT_OK ||
        ht_encoder_create(&context.encoder, t) != HT_OK ||
        ht_token_decoder_create(&context.decoder, t, false) != HT_OK ||
        ht_chat_template_create(&chat, chatml, sizeof chatml - 1, "c") != HT_OK ||
        ht_grammar_vocab_create(&vocab, t, 9, 8) != HT_OK)
        abort();
    context.tokenizer = t;
    context.chat = chat;
    context.model = "m";
    context.bos_id = -1;
    context.max_context = 4096;
    context.vocab_size = 9;
    context.top_p = 1;
}

/* Walk a grammar as far as single letters go. */
static void use_grammar(struct ht_grammar *g)
{
    for (int k = 0; k < 50; k++) {
        int32_t id = 0;
        while (id < 9 && !ht_grammar_allows(g, (id + k) % 9)) id++;
        if (id == 9 || (id + k) % 9 == 8) break;
        FUZZ_HOLDS(ht_grammar_accept(g, (id + k) % 9) == HT_OK);
    }
    ht_grammar_free(g);
}

static void use_request(struct ht_api_request *r)
{
    const struct ht_request *q = &r->request;
    struct ht_grammar *g;
    FUZZ_HOLDS(r->n_prompts >= 1 && r->n_prompts <= HT_API_MAX_PROMPTS && r->n >= 1 &&
               q->n >= r->n && q->n <= HT_ENGINE_MAX_CHOICES);
    FUZZ_HOLDS(q->temperature >= 0 && q->temperature <= 2 && q->top_p > 0 && q->top_p <= 1 &&
               q->min_p >= 0 && q->min_p < 1);
    FUZZ_HOLDS(q->n_stops >= 0 && q->n_stops <= HT_ENGINE_MAX_STOPS && q->logprobs >= -1 &&
               q->logprobs <= HT_ENGINE_MAX_LOGPROBS);
    for (int i = 0; i < r->n_prompts; i++) {
        FUZZ_HOLDS(r->prompts[i].n >= 1 && r->prompts[i].n + q->max_tokens <= context.max_context);
        for (int64_t k = 0; k < r->prompts[i].n; k++)
            FUZZ_HOLDS(r->prompts[i].ids[k] >= 0 && r->prompts[i].ids[k] < 9);
    }
    if (r->format == HT_API_JSON_SCHEMA && ht_grammar_create_schema(&g, vocab, r->schema) == HT_OK)
        use_grammar(g);
    ht_api_request_free(r);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    struct ht_api_text out = { 0 };
    struct ht_api_error e = { 0 };
    struct ht_api_request r;
    struct ht_grammar *g = NULL;
    enum ht_status st;

    set_up();
    if (n == 0) return 0;
    char *body = fuzz_text(data + 1, n - 1);
    json_t *schema;
    switch (data[0] % 5) {
    case 0:
    case 1:
        st = ht_api_parse(&r, data[0] % 5 ? HT_API_CHAT : HT_API_COMPLETION, body, n - 1, &context,
                          &e);
        if (st == HT_OK)
            use_request(&r);
        else
            FUZZ_HOLDS(e.http >= 400 && e.type);
        break;
    case 2: st = ht_api_tokenize(&out, body, n - 1, &context, &e); break;
    case 3: st = ht_api_detokenize(&out, body, n - 1, &context, &e); break;
    default:
        schema = json_loadb(body, n - 1, JSON_DECODE_ANY, NULL);
        st = schema ? ht_grammar_create_schema(&g, vocab, schema) : HT_OK;
        if (g) use_grammar(g);
        json_decref(schema);
    }
    if (st != HT_OK) {
        FUZZ_REFUSED(st);
        if (e.http) ht_api_add_error(&out, &e);
    }
    if (out.n) { // what we write is JSON
        json_t *j = json_loadb(out.p, out.n, 0, NULL);
        FUZZ_HOLDS(j != NULL);
        json_decref(j);
    }
    free(out.p);
    free(body);
    return 0;
}
