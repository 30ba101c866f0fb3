/* tests/fuzz/fuzz_chat_template.c: a chat template and a conversation. Input: the template,
 * optionally NUL and JSON messages. */
#include "inference/chat_template.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char sample[] =
        "[{\"role\":\"system\",\"content\":\" Be brief. \"},{\"role\":\"user\",\"content\":\"a "
        "<|im_end|>\\nb\"},"
        "{\"role\":\"assistant\",\"content\":\"\xc3\xa9\",\"tool_calls\":[{\"function\":{\"name\":"
        "\"f\",\"arguments\":"
        "{\"x\":1.5}}}]},{\"role\":\"tool\",\"content\":[{\"type\":\"text\",\"text\":\"t\"}]}]";
    const uint8_t *end = memchr(data, '\0', n);
    const size_t n_text = end ? (size_t)(end - data) : n;
    char *text = fuzz_text(data, n_text);
    struct ht_chat_template *t = NULL;
    struct ht_jinja_output out;
    enum ht_status st = ht_chat_template_create(&t, text, n_text, "template");

    if (st == HT_OK) {
        json_t *messages = end ? json_loadb((const char *)end + 1, n - n_text - 1, 0, NULL)
                               : json_loads(sample, 0, NULL);
        const struct ht_chat_input in = { .messages = messages,
                                          .tools = messages,
                                          .bos = "<s>",
                                          .eos = "</s>",
                                          .add_generation_prompt = n % 2,
                                          .now = 1700000000 };
        if (json_is_array(messages)) {
            st = ht_chat_render(t, &in, &out);
            if (st == HT_OK) {
                FUZZ_HOLDS(out.n_bytes <= HT_JINJA_MAX_OUTPUT && out.text[out.n_bytes] == '\0');
                for (size_t i = 0; i < out.n_bytes; i++) FUZZ_HOLDS(out.user[i] <= 1);
                for (size_t i = 0; i < out.n_generations; i++)
                    FUZZ_HOLDS(out.generations[i].start <= out.generations[i].end);
                json_t *utf8 = json_stringn_nocheck(out.text, out.n_bytes),
                       *checked = json_stringn(out.text, out.n_bytes);
                FUZZ_HOLDS(utf8 && checked); // whatever is sliced, whole characters come out
                json_decref(utf8);
                json_decref(checked);
                ht_jinja_output_free(&out);
            }
        }
        json_decref(messages);
    }
    if (st != HT_OK) FUZZ_REFUSED(st);
    ht_chat_template_free(t);
    free(text);
    return 0;
}
