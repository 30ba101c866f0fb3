/* tests/core/config/test_hf_config.c: config.json of the three families, there and back, and
 * refusals. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/base/file.h"
#include "core/config/tensor_list.h"
#include "tests/core/config/config_case.h"

static struct ht_model_config m;
static struct ht_config c;

static enum ht_status read_json(const char *json)
{
    return ht_model_config_from_hf(&m, json, strlen(json), "config.json");
}

static void read_ok(const char *json)
{
    ck_assert_msg(read_json(json) == HT_OK, "%s", ht_error_message());
}

static void read_refused(const char *json, const char *words)
{
    ck_assert_msg(read_json(json) == HT_ERR_FORMAT, "accepted: %s", json);
    ck_assert_msg(strstr(ht_error_message(), words) != NULL, "\"%s\" is not in \"%s\"", words,
                  ht_error_message());
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "config.json"));
}

/* Bamba-9B as released: old keys, unknown keys, Infinity. */
#define BAMBA_KEYS                                                                                 \
    "\"model_type\": \"bamba\", \"vocab_size\": 128256, \"hidden_size\": 4096,"                    \
    "\"num_hidden_layers\": 32, \"intermediate_size\": 14336, \"num_attention_heads\": 32,"        \
    "\"num_key_value_heads\": 8, \"mamba_n_heads\": 128, \"mamba_d_head\": \"auto\","              \
    "\"mamba_d_state\": 128, \"attn_rotary_emb\": 64, \"use_mamba_kernels\": true"
#define BAMBA(more) "{" BAMBA_KEYS ", " more "}"
#define LLAMA(more)                                                                                \
    "{\"model_type\": \"llama\", \"vocab_size\": 128256, \"hidden_size\": 4096,"                   \
    "\"num_hidden_layers\": 32, \"intermediate_size\": 14336, \"num_attention_heads\": 32,"        \
    "\"num_key_value_heads\": 8" more "}"
#define MAMBA2(more)                                                                               \
    "{\"model_type\": \"mamba2\", \"vocab_size\": 32768, \"hidden_size\": 4096,"                   \
    "\"num_hidden_layers\": 64, \"num_heads\": 128, \"state_size\": 128" more "}"

START_TEST(released_files_give_the_published_counts)
{
    static const char *const files[] = { BAMBA("\"attn_layer_indices\": [9, 18, 27]"), MAMBA2(""),
                                         NULL, LLAMA("") };
    struct ht_tensor_list l;

    if (!files[_i]) return; // Mamba-2 2.7B was released in another format
    read_ok(files[_i]);
    ck_assert_int_eq(ht_tensor_list_create(&l, &m, HT_DECAY_MATRICES), HT_OK);
    ck_assert_int_eq(l.n_params, published[_i].n_params);
    ck_assert_int_eq(l.n_tensors, published[_i].n_tensors);
    ht_tensor_list_free(&l);
}
END_TEST

START_TEST(defaults_are_the_classes)
{
    read_ok(BAMBA("\"attn_layer_indices\": [9, 18, 27]"));
    ck_assert_int_eq(m.rope_dims, 64);
    ck_assert_double_eq(m.rope_theta, 10000.0);
    ck_assert_int_eq(m.ssm_d_head, 64);
    ck_assert_int_eq(m.n_groups, 1);
    ck_assert_int_eq(m.chunk, 256);
    ck_assert_float_eq(m.norm_eps, 1e-5f);
    ck_assert(m.conv_bias && !m.tied_head && isinf(m.dt_limit_max));
    read_ok(MAMBA2(""));
    ck_assert_int_eq(m.n_groups, 8);
    read_ok(LLAMA(""));
    ck_assert_int_eq(m.rope_dims, 128);
    ck_assert_float_eq(m.norm_eps, 1e-6f);
}
END_TEST

START_TEST(spellings_of_the_same_thing)
{
    struct ht_model_config first;

    read_ok(BAMBA("\"time_step_limit\": [0.0, Infinity]"));
    first = m;
    read_ok(BAMBA("\"time_step_limit\": [0.0, {\"__float__\": \"Infinity\"}]"));
    ck_assert_mem_eq(&first, &m, sizeof m);
    read_ok(BAMBA("\"layer_types\": null, \"rope_scaling\": null"));
    ck_assert_mem_eq(&first, &m, sizeof m);

    read_ok("{\"model_type\": \"bamba\", \"vocab_size\": 64, \"hidden_size\": 64,"
            "\"num_hidden_layers\": 3, \"intermediate_size\": 64, \"num_attention_heads\": 4,"
            "\"mamba_n_heads\": 8, \"mamba_d_state\": 16,"
            "\"layer_types\": [\"linear_attention\", \"full_attention\", \"mamba\"]}");
    ck_assert_int_eq(m.layer_kind[0], HT_LAYER_MAMBA);
    ck_assert_int_eq(m.layer_kind[1], HT_LAYER_ATTENTION);
    ck_assert_int_eq(m.layer_kind[2], HT_LAYER_MAMBA);
    ck_assert_int_eq(m.n_kv_heads, 4);

    read_ok(LLAMA(
        ", \"rope_theta\": 5e5, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0,"
        "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
        "\"original_max_position_embeddings\": 8192}"));
    first = m;
    ck_assert_double_eq(m.rope_factor, 8.0);
    ck_assert_int_eq(m.rope_original_max, 8192);
    read_ok(LLAMA(", \"rope_parameters\": {\"rope_theta\": 500000, \"rope_type\": \"llama3\","
                  "\"factor\": 8, \"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
                  "\"original_max_position_embeddings\": 8192}"));
    ck_assert_mem_eq(&first, &m, sizeof m);
    // a word inside a string is left alone
    read_ok(LLAMA(", \"_name_or_path\": \"to \\\"Infinity\\\\\""));
}
END_TEST

START_TEST(a_chunk_that_the_kernels_have_not_got_is_replaced)
{
    read_ok(BAMBA("\"mamba_chunk_size\": 100"));
    ck_assert_int_eq(m.chunk, 256);
    read_ok(BAMBA("\"mamba_chunk_size\": 64"));
    ck_assert_int_eq(m.chunk, 64);
}
END_TEST

START_TEST(bad_files_are_refused)
{
    read_refused("", "config.json:");
    read_refused("[1]", "not a JSON object");
    read_refused("{\"model_type\": \"gpt2\", \"vocab_size\": 1, \"hidden_size\": 1,"
                 "\"num_hidden_layers\": 1}",
                 "model_type is \"gpt2\"; bamba, llama and mamba2");
    read_refused("{}", "\"vocab_size\" is missing");
    read_refused(LLAMA(", \"vocab_size\": 3"), "duplicate");
    read_refused("{\"model_type\": \"llama\", \"vocab_size\": \"many\"}", "\"vocab_size\" must be");
    read_refused(LLAMA(", \"hidden_act\": \"gelu\""), "\"hidden_act\" must be \"silu\"");
    read_refused(LLAMA(", \"attention_bias\": true"), "\"attention_bias\" must be false");
    read_refused(LLAMA(", \"rope_scaling\": {\"type\": \"yarn\"}"), "\"yarn\"");
    read_refused(LLAMA(", \"rope_scaling\": {\"type\": \"llama3\"}"), "\"factor\" is missing");
    read_refused(BAMBA("\"mamba_proj_bias\": true"), "\"mamba_proj_bias\"");
    read_refused(BAMBA("\"attn_layer_indices\": [32]"), "attn_layer_indices");
    read_refused(BAMBA("\"layer_types\": [\"mamba\"]"),
                 "\"layer_types\" must be a list with one entry");
    read_refused(MAMBA2(", \"expand\": 3"), "128 Mamba heads");
    read_refused(BAMBA("\"mamba_expand\": 2.0001"), "\"mamba_expand\" must be");
    read_refused(BAMBA("\"time_step_limit\": [NaN, 1]"), "config.json:1");
    read_refused(BAMBA("\"time_step_limit\": [1]"), "two numbers");
    read_refused(MAMBA2(", \"rms_norm\": false"), "rms_norm");
    read_refused(MAMBA2(", \"n_groups\": 7"), "n_groups is 7");
    read_refused("{\"model_type\": \"bamba\", \"vocab_size\": 8, \"hidden_size\": 64,"
                 "\"num_hidden_layers\": 2, \"intermediate_size\": 64, \"num_attention_heads\": 4,"
                 "\"mamba_n_heads\": 8, \"mamba_d_state\": 16, \"attn_layer_indices\": [0],"
                 "\"layer_types\": [\"mamba\", \"attention\"]}",
                 "name different layers");
}
END_TEST

static const char *const models[] = {
    "arch = \"bamba\"; vocab_size = 97; d_model = 64; n_layers = 4; n_heads = 4; n_kv_heads = 2;"
    "attention_layers = [1]; ssm_d_head = 16; d_state = 16; n_groups = 2; d_ff = 128; norm_eps = "
    "1e-6;"
    "rope_fraction = 0.25; rope_theta = 12345.5; chunk = 32; dt_init_min = 0.002; conv_bias = "
    "false;",
    "arch = \"bamba\"; vocab_size = 97; d_model = 64; n_layers = 2; ssm_d_head = 16; d_state = 16;"
    "d_ff = 128; expand = 1.5; tied_head = true; dt_limit_min = 0.001; dt_limit_max = 0.3;",
    "arch = \"bamba\"; vocab_size = 97; d_model = 64; n_layers = 2; attention_layers = [0, 1];"
    "n_heads = 2; d_ff = 128; dt_limit_min = 0.0; dt_init_max = 0.1;",
    "arch = \"llama\"; vocab_size = 97; d_model = 64; n_layers = 2; n_heads = 4; d_head = 8; d_ff "
    "= 128;"
    "rope_scaling = \"llama3\"; rope_factor = 4.5; rope_original_max = 64;",
    "arch = \"mamba2\"; vocab_size = 97; d_model = 64; n_layers = 3; ssm_d_head = 16; d_state = 32;"
    "n_groups = 4; residual = \"model\"; max_position = 1048576; dt_limit_min = 0.01;",
};

START_TEST(there_and_back)
{
    char *json = NULL;

    case_config(&c, models[_i]);
    ck_assert_msg(ht_model_config_to_hf(&json, &c.model) == HT_OK, "%s", ht_error_message());
    read_ok(json);
    // what a family without these parts does not write down
    if (!c.model.d_inner) {
        m.dt_init_min = c.model.dt_init_min, m.dt_init_max = c.model.dt_init_max;
        m.dt_init_floor = c.model.dt_init_floor, m.dt_limit_max = c.model.dt_limit_max;
        m.conv_bias = c.model.conv_bias;
    }
    if (!c.model.n_heads) m.rope_theta = c.model.rope_theta;
    ck_assert_mem_eq(&m, &c.model, sizeof m);
    free(json);
}
END_TEST

START_TEST(what_the_classes_cannot_say_is_refused)
{
    static const struct {
        const char *key, *words;
    } bad[] = { { "embedding_multiplier = 12", "multipliers are 12" },
                { "attention_scale = 0.015625", "attention_scale" },
                { "rope_fraction = 0.0", "position encoding" } };
    char model[1024], *json = NULL;

    for (size_t i = 0; i < 3; i++) {
        snprintf(model, sizeof model,
                 "arch = \"bamba\"; vocab_size = 97; d_model = 64; n_layers = 2; n_heads = 4;"
                 "attention_layers = [1]; ssm_d_head = 16; d_state = 16; d_ff = 128; %s;",
                 bad[i].key);
        case_config(&c, model);
        ck_assert_int_eq(ht_model_config_to_hf(&json, &c.model), HT_ERR_UNSUPPORTED);
        ck_assert_ptr_null(json);
        ck_assert_ptr_nonnull(strstr(ht_error_message(), bad[i].words));
    }
}
END_TEST

/* Files that transformers 5 wrote (tests/golden/hf/generate.py). */
START_TEST(files_of_transformers_are_read)
{
    static const struct {
        const char *name;
        enum ht_naming naming;
        int64_t n_layers;
    } golden[] = { { "bamba", HT_NAMING_BAMBA, 4 },
                   { "llama", HT_NAMING_LLAMA, 3 },
                   { "mamba2", HT_NAMING_MAMBA2, 3 } };
    char path[512], *json = NULL;
    size_t n = 0;

    snprintf(path, sizeof path, "%s/tests/golden/hf/%s/config.json", HT_SOURCE_DIR,
             golden[_i].name);
    ck_assert_int_eq(ht_file_read(&json, &n, path, 1 << 20), HT_OK);
    ck_assert_msg(ht_model_config_from_hf(&m, json, n, path) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(m.naming, golden[_i].naming);
    ck_assert_int_eq(m.n_layers, golden[_i].n_layers);
    ck_assert_int_eq(m.vocab_size, 96);
    ck_assert_int_eq(m.d_model, 32);
    if (m.naming == HT_NAMING_LLAMA) ck_assert_double_eq(m.rope_factor, 8.0);
    if (m.naming == HT_NAMING_BAMBA) ck_assert_int_eq(m.layer_kind[1], HT_LAYER_ATTENTION);
    free(json);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("hf_config");
    TCase *t = tcase_create("core");
    SRunner *r = srunner_create(s);

    tcase_add_loop_test(t, released_files_give_the_published_counts, 0, 4);
    tcase_add_test(t, defaults_are_the_classes);
    tcase_add_test(t, spellings_of_the_same_thing);
    tcase_add_test(t, a_chunk_that_the_kernels_have_not_got_is_replaced);
    tcase_add_test(t, bad_files_are_refused);
    tcase_add_loop_test(t, there_and_back, 0, sizeof models / sizeof *models);
    tcase_add_test(t, what_the_classes_cannot_say_is_refused);
    tcase_add_loop_test(t, files_of_transformers_are_read, 0, 3);
    suite_add_tcase(s, t);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
