/* tests/inference/test_grammar.c: what a grammar lets through is JSON of its schema; texts that are
 * not are stopped. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "inference/grammar.h"
#include "tests/inference/small_tokenizer.h"

static struct ht_tokenizer *t;
static struct ht_grammar_vocab *v;

static void setup(void)
{
    t = small_tokenizer();
    ck_assert_int_eq(ht_grammar_vocab_create(&v, t, SMALL_VOCAB, SMALL_IM_END), HT_OK);
}

static void teardown(void)
{
    ht_grammar_vocab_free(v);
    ht_tokenizer_free(t);
}

static enum ht_status make(struct ht_grammar **g, const char *schema)
{
    if (!schema) return ht_grammar_create_json(g, v);
    json_t *j = json_loads(schema, JSON_DECODE_ANY, NULL);
    ck_assert_ptr_nonnull(j);
    const enum ht_status st = ht_grammar_create_schema(g, v, j);
    json_decref(j);
    return st;
}

/* Does the grammar take the text, character by character, and may it end there? */
static bool takes(const char *schema, const char *text)
{
    struct ht_grammar *g;
    ck_assert_msg(make(&g, schema) == HT_OK, "%s: %s", schema, ht_error_message());
    bool ok = true;
    for (const char *p = text; *p && ok; p++) {
        ok = ht_grammar_allows(g, *p);
        ck_assert_int_eq(ht_grammar_accept(g, *p), ok ? HT_OK : HT_ERR_ARG);
    }
    ok = ok && ht_grammar_may_end(g);
    ck_assert(!ok || ht_grammar_allows(g, SMALL_IM_END));
    ht_grammar_free(g);
    return ok;
}

#define PERSON                                                                                     \
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"age\":{\"type\":"       \
    "\"integer\"},"                                                                                \
    "\"tags\":{\"type\":\"array\",\"items\":{\"type\":\"string\"},\"maxItems\":2}},\"required\":[" \
    "\"name\",\"age\"]}"
#define TREE                                                                                       \
    "{\"$ref\":\"#/$defs/"                                                                         \
    "node\",\"$defs\":{\"node\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":\"integer\"}" \
    ","                                                                                            \
    "\"next\":{\"anyOf\":[{\"$ref\":\"#/$defs/"                                                    \
    "node\"},{\"type\":\"null\"}]}},\"required\":[\"v\",\"next\"]}}}"

static const struct {
    const char *schema, *text;
    bool ok;
} cases[] = {
    { NULL, "{}", true },
    { NULL, "{\"a\": [1, -2.5e+3, true, null, \"x\\n\\u00e9\"], \"b\": {}}", true },
    { NULL, " {\n  \"a\": 1\n}", true },
    { NULL, "[]", false },
    { NULL, "{\"a\": 01}", false },
    { NULL, "{\"a\": 1,}", false },
    { NULL, "{\"a\" 1}", false },
    { NULL, "{\"a\": \"\\x\"}", false },
    { NULL, "{\"a\": \"\\ud800\"}", false },
    { NULL, "{\"a\": nul}", false },
    { NULL, "{", false },
    { NULL, "{}}", false },
    { NULL, "{\"a\": .5}", false },
    { NULL, "{\"a\": [1,[2,[]],[{}]]}", true },
    { PERSON, "{\"name\": \"x\", \"age\": 3}", true },
    { PERSON, "{\"name\": \"x\", \"age\": 3, \"tags\": [\"a\", \"b\"]}", true },
    { PERSON, "{\"name\": \"x\", \"age\": 3, \"tags\": [\"a\", \"b\", \"c\"]}", false },
    { PERSON, "{\"name\": \"x\"}", false },
    { PERSON, "{\"age\": 3, \"name\": \"x\"}", false },
    { PERSON, "{\"name\": \"x\", \"age\": 3.5}", false },
    { PERSON, "{\"name\": 1, \"age\": 3}", false },
    { PERSON, "{\"name\": \"x\", \"age\": 3, \"other\": 1}", false },
    { TREE, "{\"v\": 1, \"next\": {\"v\": 2, \"next\": null}}", true },
    { TREE, "{\"v\": 1, \"next\": 2}", false },
    { "{\"enum\":[\"red\",\"green\",3,null]}", "\"red\"", true },
    { "{\"enum\":[\"red\",\"green\",3,null]}", "3", true },
    { "{\"enum\":[\"red\",\"green\",3,null]}", "\"blue\"", false },
    { "{\"const\":{\"a\":[1]}}", "{\"a\":[1]}", true },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"ab\"", true },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"a\"", false },
    { "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"abcd\"", false },
    { "{\"type\":\"string\",\"minLength\":2}", "\"abcdef\"", true },
    { "{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":2}", "[1]", false },
    { "{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":2}", "[1, 2, 3]", true },
    { "{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}", "[]", true },
    { "{\"type\":\"array\",\"prefixItems\":[{\"type\":\"string\"}],\"items\":false}", "[\"a\"]",
      true },
    { "{\"type\":\"array\",\"prefixItems\":[{\"type\":\"string\"}],\"items\":false}", "[\"a\",1]",
      false },
    { "{\"type\":[\"string\",\"null\"]}", "null", true },
    { "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"boolean\"}}",
      "{\"x\": true, \"y\": false}", true },
    { "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"boolean\"}}", "{\"x\": 1}",
      false },
    { "{\"type\":\"object\",\"additionalProperties\":false}", "{}", true },
    { "{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{}}}", "{\"b\": 1}", true },
    { "{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{}}}", "{}", true },
    { "{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{}}}", "{\"a\": 1, \"b\": [2]}", true },
    { "{\"type\":\"number\"}", "-0.5E-10", true },
    { "true", "[1, \"x\"]", true },
};

START_TEST(texts_are_taken_or_stopped)
{
    ck_assert_msg(takes(cases[_i].schema, cases[_i].text) == cases[_i].ok, "%s: %s",
                  cases[_i].schema, cases[_i].text);
}
END_TEST

/* Random allowed tokens, towards the end sooner or later, give JSON of the schema. */
static void random_walk(const char *schema, uint64_t seed)
{
    char text[200000];
    struct ht_grammar *g, *fork;
    float logits[SMALL_VOCAB];
    size_t n = 0;
    uint64_t x = seed * 0x9E3779B97F4A7C15u + 1;

    ck_assert_int_eq(make(&g, schema), HT_OK);
    for (int k = 0; !ht_grammar_must_end(g); k++) {
        int32_t allowed[SMALL_VOCAB];
        int m = 0;
        for (int i = 0; i < SMALL_VOCAB; i++) logits[i] = 1.0f;
        ck_assert_int_eq(ht_grammar_mask(g, logits), HT_OK);
        for (int i = 0; i < SMALL_VOCAB; i++)
            if (logits[i] == 1.0f)
                allowed[m++] = i;
            else
                ck_assert(isinf(logits[i]) && !ht_grammar_allows(g, i));
        ck_assert_int_gt(m, 0); // never a dead end
        int32_t id = -1;
        if (k > 60) { // close what is open
            const bool quoted = ht_grammar_allows(g, '\\') && ht_grammar_allows(g, '"');
            for (const char *p = quoted ? "\"" : "}]\""; *p && id < 0; p++)
                if (ht_grammar_allows(g, *p)) id = *p;
        }
        if (id < 0) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            id = allowed[x % (uint64_t)m];
        }
        if (id == SMALL_IM_END) break;
        // a fork goes its own way
        ck_assert_int_eq(ht_grammar_clone(&fork, g), HT_OK);
        ck_assert_int_eq(ht_grammar_accept(fork, allowed[0]), HT_OK);
        ht_grammar_free(fork);
        ck_assert_int_eq(ht_grammar_accept(g, id), HT_OK);
        const char *token = ht_tokenizer_token(t, id);
        ck_assert_uint_lt(n + 32, sizeof text);
        if (id == 10 || id == 32)
            text[n++] = (char)id;
        else
            n += (size_t)sprintf(text + n, "%s", token);
    }
    text[n] = '\0';
    ck_assert(ht_grammar_may_end(g));
    json_error_t e;
    json_t *j = json_loads(text, JSON_DECODE_ANY, &e);
    ck_assert_msg(j != NULL, "seed %llu: %s: %s", (unsigned long long)seed, e.text, text);
    if (schema && strcmp(schema, PERSON) == 0) {
        ck_assert(json_is_string(json_object_get(j, "name")) &&
                  json_is_integer(json_object_get(j, "age")));
        ck_assert_uint_le(json_array_size(json_object_get(j, "tags")), 2);
    }
    json_decref(j);
    ht_grammar_free(g);
}

START_TEST(random_walks_end_in_valid_json)
{
    for (uint64_t seed = 1; seed <= 40; seed++) {
        random_walk(NULL, seed);
        random_walk(PERSON, seed);
        random_walk(TREE, seed);
    }
}
END_TEST

static const struct {
    const char *schema, *says;
} refused[] = {
    { "{\"type\":\"string\",\"pattern\":\"a+\"}", "pattern" },
    { "{\"type\":\"thing\"}", "thing" },
    { "{\"$ref\":\"#/nowhere\"}", "nowhere" },
    { "{\"$ref\":\"http://x/y\"}", "outside" },
    { "{\"$ref\":\"#\"}", "back to itself" },
    { "{\"anyOf\":[{\"$ref\":\"#\"}]}", "back to itself" },
    { "{\"type\":\"object\",\"properties\":{},\"required\":[\"a\"]}", "'a'" },
    { "{\"type\":\"array\",\"minItems\":3,\"maxItems\":2}", "no length" },
    { "{\"type\":\"string\",\"maxLength\":1000000}", "maxLength" },
    { "{\"enum\":[]}", "enum" },
    { "{\"type\":3}", "type" },
    { "false", "neither" },
    { "{\"type\":\"array\",\"items\":{\"type\":\"array\",\"items\":{\"type\":\"string\","
      "\"minLength\":4096},\"minItems\":4096},"
      "\"minItems\":4096,\"allOf\":[]}",
      "allOf" },
};

START_TEST(bad_schemas_are_refused)
{
    struct ht_grammar *g;
    ck_assert_int_ne(make(&g, refused[_i].schema), HT_OK);
    ck_assert_msg(strstr(ht_error_message(), refused[_i].says), "%s", ht_error_message());
}
END_TEST

int main(void)
{
    Suite *s = suite_create("grammar");
    TCase *c = tcase_create("grammar");
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, texts_are_taken_or_stopped, 0, sizeof cases / sizeof *cases);
    tcase_add_test(c, random_walks_end_in_valid_json);
    tcase_add_loop_test(c, bad_schemas_are_refused, 0, sizeof refused / sizeof *refused);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
