/* tests/core/config/test_recipe.c: values, defaults, overrides, refusals, and the printed recipe.
 */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tests/core/config/config_case.h"

static struct ht_config c, d;

#define MODEL                                                                                      \
    "model: { arch = \"bamba\"; vocab_size = 512; d_model = 64; n_layers = 6; n_heads = 4;\n"      \
    "attention_layers = [2, 5]; d_ff = 128; ssm_d_head = 16; d_state = 16; };\n"
#define REST                                                                                       \
    "data: { seq_len = 128; };\n"                                                                  \
    "train: { global_batch_tokens = 1024; steps = 100; };\n"                                       \
    "optimizer: { lr = 1e-3; };\n"
#define GOOD MODEL REST

static enum ht_status parse(const char *text, int n, char *const *overrides, int n_ranks)
{
    return ht_recipe_parse(&c, NULL, text, "a.cfg", n, overrides, n_ranks);
}

static void parse_ok(const char *text)
{
    ck_assert_msg(parse(text, 0, NULL, 1) == HT_OK, "%s\n%s", ht_error_message(), text);
}

static enum ht_status override(const char *text)
{
    char copy[512];
    char *one[] = { copy };

    snprintf(copy, sizeof copy, "%s", text);
    return parse(GOOD, 1, one, 1);
}

static void override_ok(const char *text)
{
    ck_assert_msg(override(text) == HT_OK, "%s: %s", text, ht_error_message());
}

START_TEST(defaults_and_derived_sizes)
{
    parse_ok(GOOD);
    ck_assert_int_eq(c.model.naming, HT_NAMING_BAMBA);
    ck_assert_int_eq(c.model.layer_kind[2], HT_LAYER_ATTENTION);
    ck_assert_int_eq(c.model.layer_kind[3], HT_LAYER_MAMBA);
    ck_assert_int_eq(c.model.d_head, 16);
    ck_assert_int_eq(c.model.n_kv_heads, 4);
    ck_assert_int_eq(c.model.rope_dims, 8);
    ck_assert_float_eq(c.model.attention_scale, 0.25f);
    ck_assert_int_eq(c.model.d_inner, 128);
    ck_assert_int_eq(c.model.ssm_heads, 8);
    ck_assert_int_eq(c.model.max_position, 128);
    ck_assert(isinf(c.model.dt_limit_max));
    ck_assert_double_eq(c.model.residual_init_div, sqrt(6.0));
    ck_assert(c.model.residual_fp32);
    ck_assert_int_eq(c.train.precision, HT_DTYPE_BF16);
    ck_assert_int_eq(c.train.total_steps, 100);
    ck_assert_int_eq(c.schedule.warmup_steps, 5);
    ck_assert_str_eq(c.train.name, "a");
    ck_assert_str_eq(c.train.out_dir, "runs");
    ck_assert_double_eq(c.parallel.timeout_s, 600.0);
    ck_assert_int_eq(c.parallel.bucket_bytes, 32 << 20);
    ck_assert(c.checkpoint.on_full_pause);
    ck_assert_int_eq(c.data.n_train, 0);
}
END_TEST

/* One override, and a test that it arrived. */
START_TEST(every_kind_of_value)
{
    override_ok("train.total_tokens=2.2T");
    ck_assert_int_eq(c.train.total_steps, 2148437500);
    override_ok("train.total_tokens=2.2e12");
    ck_assert_int_eq(c.train.total_steps, 2148437500);
    override_ok("train.steps=3000000000L");
    ck_assert_int_eq(c.train.total_steps, 3000000000);
    override_ok("train.total_tokens=1025");
    ck_assert_int_eq(c.train.total_steps, 2); // whole steps, rounded up
    override_ok("parallel.bucket_bytes=64MiB");
    ck_assert_int_eq(c.parallel.bucket_bytes, 64 << 20);
    override_ok("parallel.bucket_bytes=5 MB");
    ck_assert_int_eq(c.parallel.bucket_bytes, 5000000);
    override_ok("parallel.timeout_s=2h");
    ck_assert_double_eq(c.parallel.timeout_s, 7200.0);
    override_ok("optimizer.lr=2");
    ck_assert_float_eq(c.optimizer.lr, 2.0f);
    override_ok("train.precision=fp32");
    ck_assert_int_eq(c.train.precision, HT_DTYPE_F32);
    override_ok("model.residual=model");
    ck_assert(!c.model.residual_fp32);
    override_ok("checkpoint.on_full=stop");
    ck_assert(!c.checkpoint.on_full_pause);
    override_ok("checkpoint.background=false");
    ck_assert(!c.checkpoint.background);
    override_ok("model.dt_limit_max=0.5");
    ck_assert_float_eq(c.model.dt_limit_max, 0.5f);
    override_ok("model.residual_init_div=sqrt(2L)");
    ck_assert_double_eq(c.model.residual_init_div, sqrt(12.0));
    override_ok("model.residual_init_div=3");
    ck_assert_double_eq(c.model.residual_init_div, 3.0);
    override_ok("data.seed=8999999999999999");
    ck_assert_uint_eq(c.data.seed, 8999999999999999u);
    override_ok("data.train=x/y.h5");
    ck_assert_int_eq(c.data.n_train, 1);
    ck_assert_str_eq(c.data.train[0].path, "x/y.h5");
    override_ok("data.train=( { path = \"p\"; weight = 2; }, \"q\" )");
    ck_assert_int_eq(c.data.n_train, 2);
    ck_assert_double_eq(c.data.train[0].weight, 2.0);
    ck_assert_double_eq(c.data.train[1].weight, 1.0);
    override_ok("schedule.decay_tokens=2048");
    ck_assert_int_eq(c.schedule.decay_steps, 2);
    override_ok("schedule.kind=wsd");
    ck_assert_int_eq(c.schedule.decay_steps, 10);
}
END_TEST

START_TEST(four_ways_to_say_where_attention_is)
{
    static const char *const ways[] = { "model.attention_layers=[1, 4]", "model.attention_every=3",
                                        "model.layer_types=[\"mamba\", \"attention\", \"mamba\", "
                                        "\"mamba\", \"attention\", \"mamba\"]" };

    for (size_t w = 0; w < 3; w++) {
        override_ok(ways[w]);
        for (int i = 0; i < 6; i++)
            ck_assert_int_eq(c.model.layer_kind[i],
                             i == 1 || i == 4 ? HT_LAYER_ATTENTION : HT_LAYER_MAMBA);
    }
    char *offset[] = { "model.attention_every=3", "model.attention_offset=0" };
    ck_assert_int_eq(parse(GOOD, 2, offset, 1), HT_OK);
    ck_assert_int_eq(c.model.layer_kind[0], HT_LAYER_ATTENTION);
    ck_assert_int_eq(c.model.layer_kind[1], HT_LAYER_MAMBA);
}
END_TEST

START_TEST(the_last_override_wins)
{
    char *two[] = { "optimizer.lr=1", "optimizer.lr=2" };

    ck_assert_int_eq(parse(GOOD, 2, two, 1), HT_OK);
    ck_assert_float_eq(c.optimizer.lr, 2.0f);
}
END_TEST

/* The traps of libconfig 1.5, and our own rules: text, and what the message has to say. */
START_TEST(bad_text_is_refused_with_place_and_remedy)
{
    REFUSED(GOOD "eval: { max_tokens = 2200000000000; };", "a.cfg:6", "2200000000000L", "32 bits");
    REFUSED(GOOD "eval: { max_tokens = 99999999999999999999999; };", "a.cfg:6", "64 bits");
    REFUSED(GOOD "eval: { max_tokens = 0x1ffffffff; };", "a.cfg:6", "32 bits");
    REFUSED(GOOD "eval: { max_tokens = 1e400; };", "a.cfg:6", "1e400");
    REFUSED(GOOD "eval: { max_tokens = 010; };", "a.cfg:6", "zero");
    REFUSED(GOOD "eval: { max_tokens = 12MB; };", "a.cfg:6", "12MB", "quotes");
    REFUSED(GOOD "eval: { every_steps = 1; every_steps = 2; };", "a.cfg:6", "duplicate");
    REFUSED(GOOD "eval: { every_steps = 1; };\neval: { };", "a.cfg:7", "duplicate");
    REFUSED(GOOD "eval: { every_steps = true; };", "a.cfg:6", "eval.every_steps is a boolean");
    REFUSED(GOOD "checkpoint: { background = 1; };", "checkpoint.background is a whole number",
            "true or false");
    REFUSED(GOOD "log: { tensorboard = \"yes\"; };", "log.tensorboard is a string");
    REFUSED(GOOD "eval: { every_steps = 1.5; };", "eval.every_steps is 1.5", "whole");
    REFUSED(GOOD "eval: { every_steps = -1; };", "eval.every_steps is -1", "from 0");
    REFUSED(GOOD "eval: { max_token = 1; };", "a.cfg:6", "eval.max_token is not a key",
            "did you mean eval.max_tokens?");
    REFUSED(GOOD "eval: { precision = \"bf16\"; };", "did you mean train.precision?");
    REFUSED(GOOD "evla: { };", "a.cfg:6", "evla is not a section", "did you mean eval?");
    REFUSED(GOOD "beta1 = 1;", "belongs inside optimizer");
    REFUSED(GOOD "eval = 3;", "eval is a section");
    REFUSED(GOOD "a = ;", "a.cfg:6", "syntax error");
    REFUSED(GOOD "a.b = 1;", "a.cfg:6", "command line");
    REFUSED(GOOD "eval: { max_tokens = \"2.2X\"; };", "\"2.2X\"", "count");
    REFUSED(GOOD "parallel: { bucket_bytes = \"1KiB\"; };", "parallel.bucket_bytes is 1024",
            "4096");
    REFUSED(GOOD "# \"\n\"", "a.cfg:7", "no closing quote");
    REFUSED(GOOD "/* ", "a.cfg:6", "no closing */");
    REFUSED(GOOD "eval: {\n @include \"x\"\n};", "a.cfg:7", "inside a group");
    REFUSED(GOOD "@include \"x\"\n", "a.cfg:6", "cannot include");
    REFUSED(GOOD "x = @;", "a.cfg:6", "@");
    REFUSED(GOOD "schedule: { kind = \"cosin\"; };", "\"cosin\"",
            "\"cosine\", \"linear\", \"constant\" or \"wsd\"");
}
END_TEST

START_TEST(deep_nesting_is_refused_quickly)
{
    char *text = malloc(100000);

    ck_assert_ptr_nonnull(text);
    strcpy(text, "data: { train = ");
    memset(text + strlen(text), '(', 20000);
    text[20016] = 0;
    REFUSED(text, "nested deeper");
    free(text);
}
END_TEST

/* What does not fit together: the override, and the words of the message. */
static const struct {
    const char *override, *words[4];
} unfit[] = {
    { "model.chunk=100", { "command line: model.chunk is 100", "power of two from 16 to 256" } },
    { "model.n_kv_heads=3", { "model.n_kv_heads is 3", "divide n_heads = 4" } },
    { "model.n_heads=7", { "model.n_heads is 7", "divide model.d_model = 64" } },
    { "model.d_head=12", { "model.d_head is 12", "multiple of 8" } },
    { "model.rope_fraction=0.3", { "model.rope_fraction is 0.3", "even" } },
    { "model.n_groups=3", { "model.n_groups is 3", "divide ssm_heads = 8" } },
    { "model.ssm_heads=5", { "model.ssm_heads is 5", "d_inner = 128" } },
    { "model.d_state=12", { "model.d_state is 12", "multiple of 8" } },
    { "model.d_conv=5", { "model.d_conv is 5", "from 2 to 4 taps" } },
    { "model.expand=1.01", { "model.expand is 1.01", "whole" } },
    { "model.d_ff=0", { "model.d_ff is 0", "MLP" } },
    { "model.arch=llama", { "model.arch is llama", "4 of 6 layers are Mamba-2" } },
    { "model.arch=mamba2", { "model.arch is mamba2", "2 layers are attention" } },
    { "model.attention_layers=[6]", { "model.attention_layers names layer 6", "0 to 5" } },
    { "model.layer_types=[\"mamba\"]", { "has 1 entries", "n_layers is 6" } },
    { "model.attention_offset=1", { "without model.attention_every" } },
    { "model.dt_limit_max=0", { "model.dt_limit_max is 0" } },
    { "model.dt_init_max=1e-5", { "model.dt_init_max is 1e-05" } },
    { "data.seq_len=100",
      { "a.cfg:4: train.global_batch_tokens is 1024", "= 100", "1000 or 1100" } },
    { "train.micro_batch=16", { "128 * 16 * 1 = 2048", "nearest: 2048" } },
    { "schedule.warmup_steps=101", { "schedule.warmup_steps gives 101 steps", "has 100" } },
    { "schedule.warmup_tokens=1M", { "schedule.warmup_tokens gives 977 steps" } },
    { "train.name=a/b", { "train.name is \"a/b\"", "no slash" } },
    { "train.name=", { "train.name is \"\"" } },
    { "train.total_tokens=0", { "train.total_tokens is 0", "from 1" } },
    { "train.linear_dtype=e4m3", { "\"e4m3\"", "\"model\" or \"fp8\"" } },
    { "train.precision=fp16", { "\"fp16\"", "\"fp32\" or \"bf16\"" } },
    { "optimizer.beta2=1", { "optimizer.beta2 is 1.0" } },
    { "optimizer.lr=nan", { "optimizer.lr" } },
    { "optimizer.lr=1e-3x", { "optimizer.lr is \"1e-3x\"", "a number" } },
    { "data.train=( { path = \"\"; } )", { "data.train", "path" } },
    { "data.train=( { path = \"a\"; weight = 0; } )", { "weight of a is 0", "above 0" } },
    { "data.train=( { path = \"a\"; wieght = 1; } )", { "wieght" } },
    { "data.train=", { "a path has 1" } },
    { "nosection=1", { "section.key=value" } },
    { "lr", { "section.key=value" } },
};

START_TEST(sizes_that_do_not_fit_are_refused)
{
    ck_assert_msg(override(unfit[_i].override) == HT_ERR_RECIPE, "%s is accepted",
                  unfit[_i].override);
    for (int w = 0; w < 4 && unfit[_i].words[w]; w++)
        ck_assert_msg(strstr(ht_error_message(), unfit[_i].words[w]) != NULL,
                      "%s: \"%s\" is not in \"%s\"", unfit[_i].override, unfit[_i].words[w],
                      ht_error_message());
}
END_TEST

START_TEST(the_batch_must_divide_by_the_ranks)
{
    ck_assert_int_eq(parse(GOOD, 0, NULL, 8), HT_OK);
    ck_assert_int_eq(parse(GOOD, 0, NULL, 3), HT_ERR_RECIPE);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "128 * 1 * 3 = 384"));
}
END_TEST

START_TEST(missing_keys_are_named_and_never_zero)
{
    REFUSED(MODEL "data: { seq_len = 128; };\ntrain: { global_batch_tokens = 1024; steps = 1; };",
            "a.cfg: optimizer.lr is missing");
    REFUSED(MODEL "data: { seq_len = 128; };\ntrain: { global_batch_tokens = 1024; };\n"
                  "optimizer: { lr = 1.0; };",
            "train.total_tokens or train.steps");
    REFUSED(REST, "model.arch is missing");
    REFUSED(
        "model: { arch = \"llama\"; vocab_size = 5; d_model = 64; n_layers = 1; d_ff = 64; };" REST,
        "model.n_heads is missing");
    REFUSED("model: { arch = \"bamba\"; vocab_size = 5; d_model = 64; n_layers = 1; };" REST,
            "model.d_ff is missing");
    REFUSED("", "is missing");
}
END_TEST

START_TEST(two_ways_of_saying_one_thing_exclude_each_other)
{
    char *two[] = { "train.steps=4", "train.total_tokens=4096" };

    REFUSED(MODEL "data: { seq_len = 128; };\n"
                  "train: { global_batch_tokens = 1024; steps = 100; total_tokens = 5; };",
            "train.total_tokens and train.steps", "keep one");
    ck_assert_int_eq(parse(GOOD, 2, two, 1), HT_ERR_RECIPE);
    ck_assert_ptr_nonnull(
        strstr(ht_error_message(), "command line: train.total_tokens and train.steps"));
    override_ok("train.total_tokens=1M"); // displaces the steps of the file
    ck_assert_int_eq(c.train.total_steps, 977);
}
END_TEST

START_TEST(long_texts_are_refused)
{
    char text[4096];
    int n = snprintf(text, sizeof text, "%sdata_", "data.tokenizer=");

    memset(text + n, 'x', 1500);
    text[n + 1500] = 0;
    char *one[] = { text };
    ck_assert_int_eq(parse(GOOD, 1, one, 1), HT_ERR_RECIPE);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "1023 fit"));
}
END_TEST

/* print -> parse gives the same config, whatever the values are. */
static void check_round_trip(const char *text, int n, char *const *overrides, int with_origin)
{
    struct ht_recipe *r = NULL;
    char *printed = NULL, *again = NULL;

    ck_assert_msg(ht_recipe_parse(&c, &r, text, "a.cfg", n, overrides, 1) == HT_OK, "%s",
                  ht_error_message());
    ck_assert_int_eq(ht_recipe_print(&printed, r, with_origin), HT_OK);
    ht_recipe_free(r);
    ck_assert_msg(ht_recipe_parse(&d, &r, printed, "printed.cfg", 0, NULL, 1) == HT_OK, "%s\n%s",
                  ht_error_message(), printed);
    ck_assert_mem_eq(&c, &d, sizeof c);
    ck_assert_int_eq(ht_recipe_print(&again, r, 0), HT_OK);
    if (!with_origin) ck_assert_str_eq(printed, again);
    ht_recipe_free(r);
    free(printed);
    free(again);
}

START_TEST(print_and_parse_give_the_same_config)
{
    char *odd[] = {
        "optimizer.lr=0.1234567890123",
        "optimizer.eps=1e-30",
        "train.total_tokens=8999999999999999",
        "data.tokenizer=a \"quoted\" \\ path\nwith a newline",
        "data.train=( { path = \"p\"; weight = 0.1; }, { path = \"q\"; weight = 1e-3; } )",
        "model.dt_limit_max=0.7",
        "model.residual_init_div=3.3",
        "data.seed=8999999999999999",
        "schedule.kind=wsd"
    };

    check_round_trip(GOOD, 0, NULL, 0);
    check_round_trip(GOOD, 0, NULL, 1);
    check_round_trip(GOOD, sizeof odd / sizeof *odd, odd, 0);
    for (int i = 0; i < n_published; i++) {
        char text[2048];
        case_text(text, sizeof text, published[i].model);
        check_round_trip(text, 0, NULL, _i);
    }
}
END_TEST

START_TEST(origins_are_printed)
{
    char *one[] = { "optimizer.lr=2e-3" };
    struct ht_recipe *r = NULL;
    char *text = NULL;

    ck_assert_int_eq(ht_recipe_parse(&c, &r, GOOD, "a.cfg", 1, one, 1), HT_OK);
    ck_assert_int_eq(ht_recipe_print(&text, r, 1), HT_OK);
    ck_assert_ptr_nonnull(strstr(text, "lr = 0.002;  # command line\n"));
    ck_assert_ptr_nonnull(strstr(text, "seq_len = 128;  # a.cfg:3\n"));
    ck_assert_ptr_nonnull(strstr(text, "beta1 = 0.9;  # default\n"));
    ck_assert_ptr_nonnull(strstr(text, "d_ff = 128;  # a.cfg:2\n"));
    free(text);
    ht_recipe_free(r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("recipe");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_test(t, defaults_and_derived_sizes);
    tcase_add_test(t, every_kind_of_value);
    tcase_add_test(t, four_ways_to_say_where_attention_is);
    tcase_add_test(t, the_last_override_wins);
    tcase_add_test(t, bad_text_is_refused_with_place_and_remedy);
    tcase_add_test(t, deep_nesting_is_refused_quickly);
    tcase_add_loop_test(t, sizes_that_do_not_fit_are_refused, 0, sizeof unfit / sizeof *unfit);
    tcase_add_test(t, the_batch_must_divide_by_the_ranks);
    tcase_add_test(t, missing_keys_are_named_and_never_zero);
    tcase_add_test(t, two_ways_of_saying_one_thing_exclude_each_other);
    tcase_add_test(t, long_texts_are_refused);
    tcase_add_loop_test(t, print_and_parse_give_the_same_config, 0, 2);
    tcase_add_test(t, origins_are_printed);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
