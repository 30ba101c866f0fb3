/* tests/inference/small_tokenizer.h: a byte-level tokenizer of visible ASCII, newline and space,
 * ids being the characters, with two special tokens (256, 257) and some longer plain ones (258 and
 * up). */
#ifndef HT_TESTS_SMALL_TOKENIZER_H
#define HT_TESTS_SMALL_TOKENIZER_H

#include <check.h>
#include <stdio.h>
#include <string.h>

#include "core/base/status.h"
#include "data/tokenizer.h"

enum { SMALL_IM_START = 256, SMALL_IM_END, SMALL_TOOL, SMALL_VOCAB = 266 };

static inline struct ht_tokenizer *small_tokenizer(void)
{
    static const char *const added[] = { "<|im_start|>", "<|im_end|>", "<tool>", "true,", "{\\\"a",
                                         "\\\": \\\"",   "}}",         "null]",  "12",    "\\\"," };
    char json[16384];
    size_t n = 0;
    n += (size_t)snprintf(json + n, sizeof json - n, "{\"version\":\"1.0\",\"added_tokens\":[");
    for (int i = 0; i < SMALL_VOCAB - 256; i++)
        n += (size_t)snprintf(json + n, sizeof json - n,
                              "%s{\"id\":%d,\"content\":\"%s\",\"single_word\":false,\"lstrip\":"
                              "false,\"rstrip\":false,"
                              "\"normalized\":false,\"special\":%s}",
                              i ? "," : "", 256 + i, added[i], i < 2 ? "true" : "false");
    n += (size_t)snprintf(
        json + n, sizeof json - n,
        "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":"
        "false,"
        "\"trim_offsets\":true,\"use_regex\":true},\"post_processor\":null,\"decoder\":{\"type\":"
        "\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true},"
        "\"model\":{\"type\":\"BPE\",\"vocab\":{");
    for (int c = 33; c < 127; c++)
        n += (size_t)snprintf(json + n, sizeof json - n, "\"%s%c\":%d,",
                              c == '"' || c == '\\' ? "\\" : "", c, c);
    n += (size_t)snprintf(json + n, sizeof json - n,
                          "\"\xC4\x8A\":10,\"\xC4\xA0\":32},\"merges\":[]}}");
    struct ht_tokenizer *t;
    ck_assert_msg(ht_tokenizer_parse(&t, json, n, "small") == HT_OK, "%s", ht_error_message());
    return t;
}

#endif
