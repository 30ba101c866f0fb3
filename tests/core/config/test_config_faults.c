/* tests/core/config/test_config_faults.c: mutated recipes and config files never crash or leak; nor
 * does any single failing allocation. Linked with --wrap, so the library's allocations come through
 * here. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/rng.h"
#include "core/config/tensor_list.h"
#include "tests/core/config/config_case.h"

static long countdown = -1; // allocations until one fails; -1 = none

static bool fails(void)
{
    return countdown >= 0 && countdown-- == 0;
}

void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t size);
char *__real_strdup(const char *s);
char *__real_strndup(const char *s, size_t n);
void *__wrap_malloc(size_t n);
void *__wrap_calloc(size_t n, size_t size);
char *__wrap_strdup(const char *s);
char *__wrap_strndup(const char *s, size_t n);

void *__wrap_malloc(size_t n)
{
    return fails() ? NULL : __real_malloc(n);
}
void *__wrap_calloc(size_t n, size_t size)
{
    return fails() ? NULL : __real_calloc(n, size);
}
char *__wrap_strdup(const char *s)
{
    return fails() ? NULL : __real_strdup(s);
}
char *__wrap_strndup(const char *s, size_t n)
{
    return fails() ? NULL : __real_strndup(s, n);
}

/* libconfig 1.5 forgets the string it is reading when the text ends in a syntax error; all else is
 * ours. */
const char *__lsan_default_suppressions(void);
const char *__lsan_default_suppressions(void)
{
    return "leak:libconfig.so\n";
}

static struct ht_config c;
static struct ht_model_config m;

static const char recipe[] =
    "# a comment\n"
    "model: { arch = \"bamba\"; vocab_size = 512; d_model = 64; n_layers = 6; n_heads = 4;\n"
    "  attention_layers = [2, 5]; d_ff = 128; ssm_d_head = 16; d_state = 16; residual = \"fp32\"; "
    "};\n"
    "data: { seq_len = 128; pack_leak = true; seed = 12345678901L;\n"
    "  train = ( { path = \"a\\\"b.h5\"; weight = 0.25; }, { path = \"b.h5\"; weight = 3; } ); };\n"
    "train: { global_batch_tokens = 1024; total_tokens = \"2.2M\"; /* here */ name = \"x\"; };\n"
    "optimizer: { lr = 1e-3; beta2 = 0.95; };\n"
    "schedule: { kind = \"wsd\"; warmup_tokens = 0x400; };\n"
    "parallel: { bucket_bytes = \"64MiB\"; timeout_s = \"10min\"; };\n";

static const char json[] =
    "{\"model_type\": \"bamba\", \"vocab_size\": 64, \"hidden_size\": 64, \"num_hidden_layers\": 3,"
    "\"intermediate_size\": 64, \"num_attention_heads\": 4, \"mamba_n_heads\": 8,"
    "\"mamba_d_state\": 16, \"layer_types\": [\"linear_attention\", \"full_attention\", \"mamba\"],"
    "\"time_step_limit\": [0.0, Infinity], \"rope_parameters\": {\"rope_theta\": 1e4,"
    "\"rope_type\": \"llama3\", \"factor\": 8, \"low_freq_factor\": 1, \"high_freq_factor\": 4,"
    "\"original_max_position_embeddings\": 64}}";

static void parse(const char *text)
{
    struct ht_recipe *r = NULL;
    char *overrides[] = { "train.out_dir=elsewhere", "data.eval=( \"e.h5\" )",
                          "optimizer.lr=2e-3" };
    const enum ht_status st = ht_recipe_parse(&c, &r, text, "a.cfg", 3, overrides, 1);

    ck_assert_msg(st == HT_OK || st == HT_ERR_RECIPE || st == HT_ERR_MEMORY, "status %d", (int)st);
    ck_assert_int_eq(st == HT_OK, r != NULL);
    if (st != HT_OK) ck_assert_msg(*ht_error_message(), "no message");
    if (st == HT_OK) ck_assert_int_eq(ht_model_config_check(&c.model, "fuzz"), HT_OK);
    ht_recipe_free(r);
}

/* A few random edits: a byte changed, removed, doubled; a piece copied elsewhere; a telling token
 * put in. */
static size_t mutate(char *out, size_t room, const char *text, uint64_t seed)
{
    static const char *const tokens[] = {
        "{",  "}",  "(", ")",  "[",           "]",    ";",    ":",       "=",
        "\"", "L",  "-", "1e", "/*",          "*/",   "//",   "\n",      "@include \"a\"",
        ".",  "0x", ",", "\\", "99999999999", "true", "\"\"", "Infinity"
    };
    size_t n = strlen(text);
    uint64_t draw = 0;

    memcpy(out, text, n);
    const uint64_t edits = 1 + ht_rng_u64(seed, 1, draw++) % 4;
    for (uint64_t e = 0; e < edits && n > 2; e++) {
        const size_t at = ht_rng_u64(seed, 1, draw++) % n,
                     len = 1 + ht_rng_u64(seed, 1, draw++) % 16;
        const char *token = tokens[ht_rng_u64(seed, 1, draw++) % (sizeof tokens / sizeof *tokens)];
        switch (ht_rng_u64(seed, 1, draw++) % 4) {
        case 0: out[at] = (char)(1 + ht_rng_u64(seed, 1, draw++) % 255); break;
        case 1:
            if (at + len >= n) break;
            memmove(out + at, out + at + len, n - at - len);
            n -= len;
            break;
        case 2:
            if (n + strlen(token) >= room) break;
            memmove(out + at + strlen(token), out + at, n - at);
            memcpy(out + at, token, strlen(token));
            n += strlen(token);
            break;
        case 3:
            if (at + len >= n || n + len >= room) break;
            memmove(out + at + len, out + at, n - at);
            n += len;
            break;
        }
    }
    out[n] = 0;
    return n;
}

#define N_MUTATIONS 100000

START_TEST(mutated_recipes_do_not_crash)
{
    char text[4096];
    int accepted = 0;

    for (uint64_t seed = 0; seed < N_MUTATIONS; seed++) {
        mutate(text, sizeof text, recipe, seed);
        parse(text);
        accepted += c.train.total_steps > 0;
    }
    ck_assert_int_gt(accepted, N_MUTATIONS / 100); // the edits are small: some must be harmless
    ck_assert_int_lt(accepted, N_MUTATIONS);
}
END_TEST

START_TEST(mutated_config_files_do_not_crash)
{
    char text[4096];

    for (uint64_t seed = 0; seed < N_MUTATIONS; seed++) {
        const size_t n = mutate(text, sizeof text, json, seed);
        const enum ht_status st = ht_model_config_from_hf(&m, text, n, "config.json");
        ck_assert(st == HT_OK || st == HT_ERR_FORMAT);
        if (st == HT_OK) ck_assert_int_eq(ht_model_config_check(&m, "fuzz"), HT_OK);
    }
}
END_TEST

/* Fail the first, the second, ... allocation, until a run needs no more. */
START_TEST(every_failing_allocation_is_reported)
{
    long n = 0;

    for (;; n++) {
        struct ht_recipe *r = NULL;
        char *overrides[] = { "data.eval=e.h5", "data.train=[ \"x\", \"y\" ]" };
        countdown = n;
        const enum ht_status st = ht_recipe_parse(&c, &r, recipe, "a.cfg", 2, overrides, 1);
        const bool reached = countdown < 0;
        countdown = -1;
        ht_recipe_free(r);
        if (!reached) {
            ck_assert_int_eq(st, HT_OK);
            break;
        }
        ck_assert_msg(st == HT_ERR_MEMORY, "allocation %ld: status %d, %s", n, (int)st,
                      ht_error_message());
    }
    ck_assert_int_gt(n, 15);
    for (n = 0;; n++) {
        struct ht_tensor_list l;
        countdown = n;
        const enum ht_status st = ht_tensor_list_create(&l, &c.model, HT_DECAY_ALL);
        const bool reached = countdown < 0;
        countdown = -1;
        ht_tensor_list_free(&l);
        if (!reached) break;
        ck_assert_int_eq(st, HT_ERR_MEMORY);
    }
    ck_assert_int_ge(n, 4); // each of the four was met
    countdown = 0;
    const enum ht_status st = ht_model_config_from_hf(&m, json, strlen(json), "config.json");
    countdown = -1;
    ck_assert_int_eq(st, HT_ERR_MEMORY);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("config_faults");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_test(t, mutated_recipes_do_not_crash);
    tcase_add_test(t, mutated_config_files_do_not_crash);
    tcase_add_test(t, every_failing_allocation_is_reported);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
