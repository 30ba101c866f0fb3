/* tests/checkpoints/test_weights.c: weights from Hugging Face folders, under both namings, and from
 * checkpoints. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoints/checkpoint.h"
#include "checkpoints/safetensors.h"
#include "checkpoints/weights.h"
#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/config/recipe.h"

static const char config[] =
    "{\"model_type\": \"bamba\", \"architectures\": [\"BambaForCausalLM\"], \"vocab_size\": 64,\n"
    " \"hidden_size\": 64, \"num_hidden_layers\": 2, \"attn_layer_indices\": [1],\n"
    " \"intermediate_size\": 128, \"num_attention_heads\": 4, \"num_key_value_heads\": 2,\n"
    " \"mamba_expand\": 2, \"mamba_n_heads\": 8, \"mamba_d_head\": 16, \"mamba_d_state\": 16,\n"
    " \"mamba_n_groups\": 1, \"mamba_d_conv\": 4, \"mamba_chunk_size\": 16,\n"
    " \"mamba_conv_bias\": true, \"mamba_proj_bias\": false, \"hidden_act\": \"silu\",\n"
    " \"rms_norm_eps\": 1e-05, \"tie_word_embeddings\": false, \"max_position_embeddings\": 256,\n"
    " \"bos_token_id\": 5, \"eos_token_id\": 6}\n";

static char dir[64];
static struct ht_model_config model;
static struct ht_tensor_list list;

static void put(const char *name, const char *text)
{
    char path[200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_int_eq(ht_file_publish(path, text, strlen(text)), HT_OK);
}

static void setup(void)
{
    snprintf(dir, sizeof dir, "/tmp/ht-w-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    ck_assert_msg(ht_model_config_from_hf(&model, config, sizeof config - 1, "config.json") ==
                      HT_OK,
                  "%s", ht_error_message());
    ck_assert_int_eq(ht_tensor_list_create(&list, &model, HT_DECAY_MATRICES), HT_OK);
    put("config.json", config);
}

static void teardown(void)
{
    ht_tensor_list_free(&list);
    ck_assert_int_eq(ht_file_remove_tree(dir), HT_OK);
}

/* Element i of a tensor: exact in bf16 and f16. */
static float value(const struct ht_tensor_info *t, int64_t i)
{
    return (float)(int)(ht_rng_u64(3, ht_rng_stream(t->name), (uint64_t)i) % 255) / 64.0f - 2.0f;
}

/* ---- a writer of safetensors, just enough ---- */

struct stored {
    char name[128];
    const struct ht_tensor_info *parts[3]; // rows of these, one after the other
    int n_parts;
    int64_t extra_rows; // to spoil the shape
};

static uint16_t to_f16(float f) // exact small numbers only
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if (f == 0) return 0;
    return (uint16_t)((u >> 16 & 0x8000) | ((u >> 23 & 255) - 112) << 10 | (u >> 13 & 0x3ff));
}

static void put_value(FILE *f, float v, enum ht_dtype d)
{
    const ht_bf16 b = ht_f32_to_bf16(v);
    const uint16_t h = to_f16(v);
    if (d == HT_DTYPE_F32)
        fwrite(&v, 4, 1, f);
    else
        fwrite(d == HT_DTYPE_BF16 ? &b : &h, 2, 1, f);
}

static void write_safetensors(const char *name, const struct stored *s, int n, enum ht_dtype d,
                              int pad)
{
    static const char *const names[] = { "F32", "BF16", "F16" };
    char path[200], *header = malloc(1 << 20);
    size_t used = 0, at = 0;

    ck_assert_ptr_nonnull(header);
    used += (size_t)sprintf(header, "{");
    for (int i = 0; i < n; i++) {
        const struct ht_tensor_info *first = s[i].parts[0];
        int64_t rows = s[i].extra_rows, rest = 1;
        for (int k = 0; k < s[i].n_parts; k++) rows += s[i].parts[k]->shape[0];
        used += (size_t)sprintf(header + used, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%lld",
                                i ? "," : "", s[i].name, names[d], (long long)rows);
        for (int k = 1; k < first->n_dims; k++) {
            used += (size_t)sprintf(header + used, ",%lld", (long long)first->shape[k]);
            rest *= first->shape[k];
        }
        const size_t n_bytes = (size_t)(rows * rest) * ht_dtype_bytes(d);
        used += (size_t)sprintf(header + used, "],\"data_offsets\":[%zu,%zu]}", at, at + n_bytes);
        at += n_bytes;
    }
    used += (size_t)sprintf(header + used, "}%*s", pad, "");
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    const uint64_t said = used;
    fwrite(&said, 8, 1, f);
    fwrite(header, 1, used, f);
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < s[i].n_parts; k++)
            for (int64_t e = 0; e < s[i].parts[k]->n; e++) put_value(f, value(s[i].parts[k], e), d);
        const struct ht_tensor_info *t = s[i].parts[0];
        for (int64_t e = 0; e < s[i].extra_rows * (t->n / t->shape[0]); e++) put_value(f, 0, d);
    }
    ck_assert_int_eq(fclose(f), 0);
    free(header);
}

/* All tensors under their own names. */
static int store_all(struct stored *s)
{
    for (int i = 0; i < list.n_tensors; i++) {
        s[i] = (struct stored){ .parts = { &list.tensors[i] }, .n_parts = 1 };
        snprintf(s[i].name, sizeof s[i].name, "%s", list.tensors[i].name);
    }
    return list.n_tensors;
}

/* The same model under the state-spaces names (spec 2.3). */
static int store_state_spaces(struct stored *s, const char *prefix)
{
    static const struct {
        enum ht_tensor_role role;
        const char *name;
    } names[] = { { HT_T_NORM1, "norm.weight" },
                  { HT_T_NORM2, "norm2.weight" },
                  { HT_T_IN_PROJ, "mixer.in_proj.weight" },
                  { HT_T_OUT_PROJ, "mixer.out_proj.weight" },
                  { HT_T_CONV_W, "mixer.conv1d.weight" },
                  { HT_T_CONV_B, "mixer.conv1d.bias" },
                  { HT_T_DT_BIAS, "mixer.dt_bias" },
                  { HT_T_A_LOG, "mixer.A_log" },
                  { HT_T_D, "mixer.D" },
                  { HT_T_GATED_NORM, "mixer.norm.weight" },
                  { HT_T_O, "mixer.out_proj.weight" },
                  { HT_T_DOWN, "mlp.fc2.weight" } };
    int n = 0;

    s[n] = (struct stored){ .parts = { ht_tensor_find(&list, -1, HT_T_EMBED) }, .n_parts = 1 };
    sprintf(s[n++].name, "%sbackbone.embedding.weight", prefix);
    s[n] = (struct stored){ .parts = { ht_tensor_find(&list, -1, HT_T_FINAL_NORM) }, .n_parts = 1 };
    sprintf(s[n++].name, "%sbackbone.norm_f.weight", prefix);
    s[n] = (struct stored){ .parts = { ht_tensor_find(&list, -1, HT_T_HEAD) }, .n_parts = 1 };
    sprintf(s[n++].name, "%slm_head.weight", prefix);
    for (int layer = 0; layer < 2; layer++) {
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            const struct ht_tensor_info *t = ht_tensor_find(&list, layer, names[i].role);
            if (!t) continue;
            s[n] = (struct stored){ .parts = { t }, .n_parts = 1 };
            sprintf(s[n++].name, "%sbackbone.layers.%d.%s", prefix, layer, names[i].name);
        }
        s[n] = (struct stored){ .parts = { ht_tensor_find(&list, layer, HT_T_UP),
                                           ht_tensor_find(&list, layer, HT_T_GATE) },
                                .n_parts = 2 };
        sprintf(s[n++].name, "%sbackbone.layers.%d.mlp.fc1.weight", prefix, layer);
    }
    s[n] = (struct stored){ .parts = { ht_tensor_find(&list, 1, HT_T_Q),
                                       ht_tensor_find(&list, 1, HT_T_K),
                                       ht_tensor_find(&list, 1, HT_T_V) },
                            .n_parts = 3 };
    sprintf(s[n++].name, "%sbackbone.layers.1.mixer.in_proj.weight", prefix);
    return n;
}

/* ---- checks ---- */

static void check_all(const char *path, enum ht_dtype dtype)
{
    struct ht_weights *w;
    const int64_t n_vector = list.n_total - list.n_matrix;
    void *matrix = calloc((size_t)list.n_matrix + 1, 4);
    float *vector = calloc((size_t)n_vector + 1, 4), *master = calloc((size_t)list.n_total + 1, 4);

    ck_assert(matrix && vector && master);
    ck_assert_msg(ht_weights_open(&w, path, NULL) == HT_OK, "%s", ht_error_message());
    ck_assert_msg(ht_weights_load(w, &list, matrix, dtype, vector, master) == HT_OK, "%s",
                  ht_error_message());
    for (int i = 0; i < list.n_tensors; i++) {
        const struct ht_tensor_info *t = &list.tensors[i];
        for (int64_t k = 0; k < t->n; k++) {
            const float want = value(t, k);
            const float got = t->matrix ? ht_load_f32(matrix, t->offset + k, dtype)
                                        : vector[t->offset + k - list.n_matrix];
            ck_assert_msg(got == want && master[t->offset + k] == want, "%s[%lld]: %g, want %g",
                          t->name, (long long)k, (double)got, (double)want);
        }
    }
    ck_assert_int_eq(ht_weights_model(w)->d_model, 64);
    ht_weights_close(w);
    free(master);
    free(vector);
    free(matrix);
}

static struct stored stored[64];

START_TEST(hugging_face_names_in_every_dtype)
{
    const enum ht_dtype d = (enum ht_dtype)(_i % 3);
    const int pad = _i / 3; // data at odd bytes as well
    struct ht_weights *w;

    write_safetensors("model.safetensors", stored, store_all(stored), d, pad);
    check_all(dir, HT_DTYPE_F32);
    check_all(dir, HT_DTYPE_BF16);
    ck_assert_int_eq(ht_weights_open(&w, dir, NULL), HT_OK);
    ck_assert_int_eq(ht_weights_stored_dtype(w), d);
    ck_assert_int_eq(ht_weights_eos_id(w), 6);
    ck_assert_int_eq(ht_weights_bos_id(w), 5);
    ck_assert_ptr_null(ht_weights_tokenizer_path(w));
    ck_assert_str_eq(ht_weights_resolved_path(w), dir);
    ht_weights_close(w);
}
END_TEST

START_TEST(state_spaces_names)
{
    const int n = store_state_spaces(stored, _i ? "model." : "");
    write_safetensors(_i ? "consolidated.safetensors" : "model.safetensors", stored, n,
                      HT_DTYPE_BF16, 0);
    check_all(dir, HT_DTYPE_F32);
}
END_TEST

START_TEST(generation_config_and_tokenizer)
{
    struct ht_weights *w;

    write_safetensors("model.safetensors", stored, store_all(stored), HT_DTYPE_F32, 0);
    put("generation_config.json", "{\"eos_token_id\": [9, 6]}");
    put("tokenizer.json", "{}");
    ck_assert_int_eq(ht_weights_open(&w, dir, NULL), HT_OK);
    ck_assert_int_eq(ht_weights_eos_id(w), 9);
    ck_assert_int_eq(ht_weights_bos_id(w), 5);
    ck_assert_ptr_nonnull(strstr(ht_weights_tokenizer_path(w), "/tokenizer.json"));
    ht_weights_close(w);
}
END_TEST

static void write_index(int split, const char *first, const char *second)
{
    static char text[32768];
    size_t used = (size_t)sprintf(text, "{\"weight_map\": {");
    for (int i = 0; i < list.n_tensors; i++)
        used += (size_t)sprintf(text + used, "%s\"%s\": \"%s\"", i ? "," : "", stored[i].name,
                                i < split ? first : second);
    sprintf(text + used, "}}");
    put("model.safetensors.index.json", text);
}

START_TEST(shards_with_an_index)
{
    const int n = store_all(stored), split = n / 3;

    write_safetensors("a.safetensors", stored, split, HT_DTYPE_BF16, 0);
    write_safetensors("b.safetensors", stored + split, n - split, HT_DTYPE_F16, 0);
    write_index(split, "a.safetensors", "b.safetensors");
    check_all(dir, HT_DTYPE_BF16);
}
END_TEST

static void refused(enum ht_status code, const char *names)
{
    struct ht_weights *w = NULL;
    static float matrix[1 << 18], vector[1 << 16];

    ck_assert_int_lt(list.n_matrix, 1 << 18);
    enum ht_status st = ht_weights_open(&w, dir, NULL);
    if (st == HT_OK) st = ht_weights_load(w, &list, matrix, HT_DTYPE_F32, vector, NULL);
    ck_assert_msg(st == code && strstr(ht_error_message(), names), "%d, expected %d and %s: %s",
                  (int)st, (int)code, names, ht_error_message());
    ht_weights_close(w);
}

START_TEST(indexes_that_lead_elsewhere)
{
    static const char *const names[] = {
        "../b.safetensors", "/etc/passwd", "x/../b", "..", ".b", ""
    };
    const int n = store_all(stored), split = n / 3;

    write_safetensors("a.safetensors", stored, split, HT_DTYPE_BF16, 0);
    write_safetensors("b.safetensors", stored + split, n - split, HT_DTYPE_BF16, 0);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        write_index(split, "a.safetensors", names[i]);
        refused(HT_ERR_FORMAT, "plain name");
    }
    write_index(split, "a.safetensors", "c.safetensors");
    refused(HT_ERR_IO, "c.safetensors");
    write_index(split + 1, "a.safetensors", "b.safetensors"); // one tensor is in the other file
    refused(HT_ERR_FORMAT, stored[split].name);
    put("model.safetensors.index.json", "{\"weight_map\": {}}");
    refused(HT_ERR_FORMAT, "weight_map");
    put("model.safetensors.index.json", "{\"weight_map\": {\"a\": 1}}");
    refused(HT_ERR_FORMAT, "names no file");
    put("model.safetensors.index.json", "{\"weight_map\":");
    refused(HT_ERR_FORMAT, "index.json:1");
}
END_TEST

START_TEST(tensors_that_do_not_fit)
{
    const int n = store_all(stored);

    write_safetensors("model.safetensors", stored, n - 1, HT_DTYPE_F32, 0);
    refused(HT_ERR_FORMAT, stored[n - 1].name); // missing
    stored[2].extra_rows = 1;
    write_safetensors("model.safetensors", stored, n, HT_DTYPE_F32, 0);
    refused(HT_ERR_FORMAT, stored[2].name);
    stored[2].extra_rows = 0;
    stored[n] = stored[0];
    strcpy(stored[n].name, "model.layers.7.input_layernorm.weight");
    write_safetensors("model.safetensors", stored, n + 1, HT_DTYPE_F32, 0);
    refused(HT_ERR_FORMAT, "model.layers.7");
    strcpy(stored[n].name, "backbone.embedding.weight"); // a second name for the first
    write_safetensors("model.safetensors", stored, n + 1, HT_DTYPE_F32, 0);
    refused(HT_ERR_FORMAT, "second time");
    strcpy(stored[n].name, "model.layers.1.self_attn.rotary_emb.inv_freq"); // a known buffer
    write_safetensors("model.safetensors", stored, n + 1, HT_DTYPE_F32, 0);
    check_all(dir, HT_DTYPE_F32);
    char path[200];
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    ck_assert_int_eq(unlink(path), 0);
    refused(HT_ERR_FORMAT, "neither");
}
END_TEST

/* ---- checkpoints ---- */

static const char recipe[] =
    "model: { arch = \"bamba\"; vocab_size = 64; d_model = 64; n_layers = 2;\n"
    " attention_layers = [1]; n_heads = 4; n_kv_heads = 2; d_head = 16; ssm_d_head = 16;\n"
    " d_state = 16; n_groups = 1; d_conv = 4; chunk = 16; d_ff = 128; };\n"
    "data: { train = \"x.h5\"; seq_len = 32; };\n"
    "train: { global_batch_tokens = 64; micro_batch = 1; steps = 10; };\n"
    "optimizer: { lr = 1e-3; };\n";

START_TEST(runs_and_checkpoints)
{
    const struct ht_zero_slice slice = { 0, list.n_total, 0 };
    char checkpoints[100], step[128];
    struct ht_ckpt_writer *w;
    float *all = calloc((size_t)list.n_total, 4), *zero = calloc((size_t)list.n_total, 4);
    double stall_s;

    ck_assert(all && zero);
    put("config.json", ""); // a run has none
    snprintf(step, sizeof step, "%s/config.json", dir);
    ck_assert_int_eq(unlink(step), 0);
    for (int i = 0; i < list.n_tensors; i++)
        for (int64_t k = 0; k < list.tensors[i].n; k++)
            all[list.tensors[i].offset + k] = value(&list.tensors[i], k);
    snprintf(checkpoints, sizeof checkpoints, "%s/checkpoints", dir);
    put("tok.json", "{\"a\": 1}");
    snprintf(step, sizeof step, "%s/tok.json", dir);
    const struct ht_ckpt_writer_options o = { .dir = checkpoints,
                                              .tensors = &list,
                                              .slices = &slice,
                                              .n_slices = 1,
                                              .shard_size = list.n_total,
                                              .keep_last = 2,
                                              .tokenizer_path = step };
    ck_assert_msg(ht_ckpt_writer_create(&w, NULL, &o) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_ckpt_save(w,
                                  &(struct ht_ckpt_source){ .step = 10,
                                                            .tokens = 640,
                                                            .master = all,
                                                            .exp_avg = zero,
                                                            .exp_avg_sq = zero,
                                                            .recipe_text = recipe,
                                                            .loader_json = "{}",
                                                            .state_json = "{}" },
                                  &stall_s),
                     HT_OK);
    ht_ckpt_writer_free(w);
    check_all(dir, HT_DTYPE_BF16);        // the run
    check_all(checkpoints, HT_DTYPE_F32); // its folder of checkpoints
    snprintf(step, sizeof step, "%s/step-00000010", checkpoints);
    check_all(step, HT_DTYPE_F32);
    struct ht_weights *k;
    ck_assert_int_eq(ht_weights_open(&k, dir, NULL), HT_OK);
    ck_assert_ptr_nonnull(strstr(ht_weights_resolved_path(k), "step-00000010"));
    ck_assert_ptr_nonnull(strstr(ht_weights_tokenizer_path(k), "step-00000010/tokenizer.json"));
    ck_assert_int_eq(ht_weights_stored_dtype(k), HT_DTYPE_F32);
    ck_assert_int_eq(ht_weights_eos_id(k), -1);
    ht_weights_close(k);
    free(zero);
    free(all);
}
END_TEST

START_TEST(places_without_weights)
{
    struct ht_weights *w;
    char path[200];

    ck_assert_int_eq(ht_weights_open(&w, "/nowhere", NULL), HT_ERR_IO);
    snprintf(path, sizeof path, "%s/config.json", dir);
    ck_assert_int_eq(ht_weights_open(&w, path, NULL), HT_ERR_ARG);
    ck_assert_int_eq(unlink(path), 0);
    refused(HT_ERR_FORMAT, "holds no checkpoint");
    ck_assert_int_eq(mkfifo(path, 0600), 0);
    ck_assert_int_eq(ht_weights_open(&w, dir, NULL), HT_ERR_FORMAT);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("weights");
    TCase *t = tcase_create("weights");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, hugging_face_names_in_every_dtype, 0, 12);
    tcase_add_loop_test(t, state_spaces_names, 0, 2);
    tcase_add_test(t, generation_config_and_tokenizer);
    tcase_add_test(t, shards_with_an_index);
    tcase_add_test(t, indexes_that_lead_elsewhere);
    tcase_add_test(t, tensors_that_do_not_fit);
    tcase_add_test(t, runs_and_checkpoints);
    tcase_add_test(t, places_without_weights);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int n_failed = srunner_ntests_failed(r);
    srunner_free(r);
    return n_failed != 0;
}
