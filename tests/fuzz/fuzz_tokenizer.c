/* tests/fuzz/fuzz_tokenizer.c: tokenizer.json, and any text through what it describes. Input: the
 * JSON, optionally NUL and a text. */
#include "data/tokenizer.h"
#include "tests/fuzz/fuzz.h"

static void use(const struct ht_tokenizer *t, const char *text, size_t n)
{
    struct ht_encoder *e = NULL;
    struct ht_token_decoder *d = NULL;
    struct ht_ids ids = { 0 };
    const char *piece;
    size_t n_piece;

    if (ht_encoder_create(&e, t) == HT_OK && ht_encode(e, text, n, true, &ids) == HT_OK &&
        ht_token_decoder_create(&d, t, false) == HT_OK) {
        for (int64_t i = 0; i < ids.n; i++) {
            FUZZ_HOLDS(ids.ids[i] >= 0 && ids.ids[i] < ht_tokenizer_vocab_size(t));
            FUZZ_HOLDS(ht_token_decoder_push(d, ids.ids[i], &piece, &n_piece) == HT_OK);
            FUZZ_HOLDS(strlen(piece) <= n_piece); // a decoded NUL is possible
        }
        FUZZ_HOLDS(ht_token_decoder_finish(d, &piece, &n_piece) == HT_OK);
    }
    ht_token_decoder_free(d);
    ht_ids_free(&ids);
    ht_encoder_free(e);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char sample[] =
        "Hello, world! \xf0\x9f\x98\x80 \xc3\xa9t\xc3\xa9 e\xcc\x81 12345\r\n\t "
        "it's \xe4\xb8\xad\xe6\x96\x87 \xff\xfe<|endoftext|><s>";
    const uint8_t *end = memchr(data, '\0', n);
    const size_t n_json = end ? (size_t)(end - data) : n;
    char *json = fuzz_text(data, n_json);
    struct ht_tokenizer *t = NULL;
    const enum ht_status st = ht_tokenizer_parse(&t, json, n_json, "tokenizer.json");

    if (st == HT_OK) {
        use(t, sample, sizeof sample - 1);
        if (end) {
            char *text = fuzz_text(end + 1, n - n_json - 1);
            use(t, text, n - n_json - 1);
            free(text);
        }
    } else {
        FUZZ_REFUSED(st);
    }
    ht_tokenizer_free(t);
    free(json);
    return 0;
}
