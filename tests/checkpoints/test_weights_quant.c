/* tests/checkpoints/test_weights_quant.c: folders of our own, rows and packed matrices out of any
 * source, and damage. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "checkpoints/hash.h"
#include "checkpoints/manifest_seal.h"
#include "checkpoints/weights_file.h"
#include "checkpoints/weights_quant.h"
#include "checkpoints/weights_save.h"
#include "core/base/file.h"
#include "core/base/rng.h"
#include "core/config/recipe.h"

/* d_model 96: a row ends with half a group of 64. */
static const char config[] =
    "{\"model_type\": \"bamba\", \"architectures\": [\"BambaForCausalLM\"], \"vocab_size\": 40,\n"
    " \"hidden_size\": 96, \"num_hidden_layers\": 2, \"attn_layer_indices\": [1],\n"
    " \"intermediate_size\": 128, \"num_attention_heads\": 6, \"num_key_value_heads\": 2,\n"
    " \"head_dim\": 16, \"mamba_expand\": 2, \"mamba_n_heads\": 12, \"mamba_d_head\": 16,\n"
    " \"mamba_d_state\": 16, \"mamba_n_groups\": 1, \"mamba_d_conv\": 4, \"mamba_chunk_size\": "
    "16,\n"
    " \"mamba_conv_bias\": true, \"mamba_proj_bias\": false, \"hidden_act\": \"silu\",\n"
    " \"rms_norm_eps\": 1e-05, \"tie_word_embeddings\": %s, \"max_position_embeddings\": 256,\n"
    " \"eos_token_id\": 6}\n";

static char dir[64], source[96], target[96];
static struct ht_model_config model;
static struct ht_tensor_list list;

static void put(const char *folder, const char *name, const char *text, size_t n)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, n, f), n);
    ck_assert_int_eq(fclose(f), 0);
}

static float value(const struct ht_tensor_info *t, int64_t i)
{
    return 0.05f * ht_rng_normal(3, ht_rng_stream(t->name), (uint64_t)i);
}

/* A Hugging Face folder of fp32 tensors with those values. */
static void make_source(bool tied)
{
    static char header[1 << 16], text[2048];
    size_t used, at = 0;

    snprintf(text, sizeof text, config, tied ? "true" : "false");
    ck_assert_int_eq(ht_file_make_dirs(source), HT_OK);
    ck_assert_msg(ht_model_config_from_hf(&model, text, strlen(text), "config.json") == HT_OK, "%s",
                  ht_error_message());
    ck_assert_int_eq(ht_tensor_list_create(&list, &model, HT_DECAY_MATRICES), HT_OK);
    put(source, "config.json", text, strlen(text));
    put(source, "tokenizer.json", "{\"a\": 1}", 8);
    used = (size_t)sprintf(header, "{");
    for (int i = 0; i < list.n_tensors; i++) {
        const struct ht_tensor_info *t = &list.tensors[i];
        used += (size_t)sprintf(header + used, "%s\"%s\":{\"dtype\":\"F32\",\"shape\":[%lld",
                                i ? "," : "", t->name, (long long)t->shape[0]);
        for (int d = 1; d < t->n_dims; d++)
            used += (size_t)sprintf(header + used, ",%lld", (long long)t->shape[d]);
        used += (size_t)sprintf(header + used, "],\"data_offsets\":[%zu,%zu]}", at,
                                at + (size_t)t->n * 4);
        at += (size_t)t->n * 4;
    }
    used += (size_t)sprintf(header + used, "}");
    char *file = malloc(8 + used + at);
    const uint64_t length = used;
    memcpy(file, &length, 8);
    memcpy(file + 8, header, used);
    float *data = (float *)malloc(at);
    for (int64_t i = 0, k = 0; i < list.n_tensors; i++)
        for (int64_t e = 0; e < list.tensors[i].n; e++) data[k++] = value(&list.tensors[i], e);
    memcpy(file + 8 + used, data, at);
    put(source, "model.safetensors", file, 8 + used + at);
    free(data);
    free(file);
}

static void setup(void)
{
    snprintf(dir, sizeof dir, "/tmp/ht-wq-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(dir));
    snprintf(source, sizeof source, "%s/source", dir);
    snprintf(target, sizeof target, "%s/target", dir);
    make_source(false);
}

static void teardown(void)
{
    ht_tensor_list_free(&list);
    ck_assert_int_eq(ht_file_remove_tree(dir), HT_OK);
}

static struct ht_weights *opened(const char *path)
{
    struct ht_weights *w;
    ck_assert_msg(ht_weights_open(&w, path, NULL) == HT_OK, "%s", ht_error_message());
    return w;
}

static struct ht_weights_save_report save(const char *to, bool quantise, enum ht_qformat f,
                                          int group, enum ht_dtype dtype)
{
    struct ht_weights *w = opened(source);
    struct ht_weights_save_report r;
    const struct ht_weights_save_options o = {
        .quantise = quantise, .format = f, .group = group, .dtype = dtype, .n_threads = 1
    };
    ck_assert_msg(ht_weights_save_h5(w, to, &o, &r) == HT_OK, "%s", ht_error_message());
    ht_weights_close(w);
    return r;
}

/* ---- what is stored ---- */

START_TEST(dense_folders_hold_the_values)
{
    const enum ht_dtype dtype = _i ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    const int64_t n_vector = list.n_total - list.n_matrix;

    save(target, false, HT_Q_INT8, 32, dtype);
    struct ht_weights *w = opened(target);
    float *matrix = calloc((size_t)list.n_matrix, 4), *vector = calloc((size_t)n_vector, 4);
    float *master = calloc((size_t)list.n_total, 4);
    ck_assert_int_eq(ht_weights_stored_dtype(w), dtype);
    ck_assert(!ht_weights_quantised(w, NULL, NULL));
    ck_assert_int_eq(ht_weights_eos_id(w), 6);
    ck_assert_ptr_nonnull(ht_weights_tokenizer_path(w));
    ck_assert_msg(ht_weights_load(w, &list, matrix, HT_DTYPE_F32, vector, master) == HT_OK, "%s",
                  ht_error_message());
    for (int i = 0; i < list.n_tensors; i++)
        for (int64_t e = 0; e < list.tensors[i].n; e++) {
            const struct ht_tensor_info *t = &list.tensors[i];
            const float v = value(t, e);
            const float want = t->matrix && _i ? ht_bf16_to_f32(ht_f32_to_bf16(v)) : v;
            const float got =
                t->matrix ? matrix[t->offset + e] : vector[t->offset + e - list.n_matrix];
            ck_assert_msg(got == want && master[t->offset + e] == want, "%s[%d]", t->name, (int)e);
        }
    ht_weights_close(w);
    free(matrix);
    free(vector);
    free(master);
}
END_TEST

/* q|k|v as one matrix from the source and from a quantised folder: the same bytes as quantising the
 * values oneself. */
START_TEST(packed_matrices_are_the_same_from_everywhere)
{
    const enum ht_qformat f = (enum ht_qformat)(_i % HT_Q_COUNT);
    const int group = _i / HT_Q_COUNT ? 64 : 32;
    const struct ht_tensor_info *qkv[] = { ht_tensor_find(&list, 1, HT_T_Q),
                                           ht_tensor_find(&list, 1, HT_T_K),
                                           ht_tensor_find(&list, 1, HT_T_V) };
    struct ht_qmatrix want, got;
    const int64_t k = model.d_model;
    int64_t row = 0;

    ck_assert_int_eq(ht_qmatrix_create(&want, NULL, f, group, ht_qkv_width(&model), k), HT_OK);
    for (int p = 0; p < 3; p++) {
        float *v = malloc((size_t)qkv[p]->n * 4);
        for (int64_t e = 0; e < qkv[p]->n; e++) v[e] = value(qkv[p], e);
        ck_assert_int_eq(
            ht_qmatrix_set_rows(&want, NULL, row, qkv[p]->shape[0], v, HT_DTYPE_F32, k), HT_OK);
        row += qkv[p]->shape[0];
        free(v);
    }
    const struct ht_weights_save_report r = save(target, true, f, group, HT_DTYPE_F32);
    const double bound[] = { 1e-9, 0.007, 0.1, 0.1, 0.03 };
    ck_assert_double_le(r.worst, bound[f]);
    for (int from = 0; from < 2; from++) {
        struct ht_weights *w = opened(from ? target : source);
        enum ht_qformat stored;
        int stored_group;
        ck_assert_int_eq(ht_weights_quantised(w, &stored, &stored_group), from && f != HT_Q_BF16);
        if (from && f != HT_Q_BF16) ck_assert(stored == f && stored_group == group);
        ck_assert_msg(ht_weights_load_qmatrix(&got, w, &list, qkv, 3, f, group, NULL, NULL) ==
                          HT_OK,
                      "%s", ht_error_message());
        ck_assert_uint_eq(got.bytes, want.bytes);
        ck_assert_mem_eq(got.data, want.data, want.bytes);
        ht_qmatrix_free(&got);
        // dense rows of the folder are what the codes stand for
        float *rows = malloc((size_t)(5 * k) * 4), *dense = malloc((size_t)(5 * k) * 4);
        ck_assert_int_eq(ht_weights_read_rows(w, &list, qkv[0], 3, 5, dense, HT_DTYPE_F32), HT_OK);
        ck_assert_int_eq(ht_qmatrix_get_rows(&want, 3, 5, rows, k), HT_OK);
        if (from) ck_assert_mem_eq(rows, dense, (size_t)(5 * k) * 4);
        free(rows);
        free(dense);
        ht_weights_close(w);
    }
    ht_qmatrix_free(&want);
}
END_TEST

START_TEST(roles_have_their_formats)
{
    for (int f = 0; f < HT_Q_COUNT; f++) {
        const enum ht_qformat q = (enum ht_qformat)f, head = f == HT_Q_BF16 ? HT_Q_BF16 : HT_Q_INT8;
        ck_assert_int_eq(ht_weights_format(q, HT_T_IN_PROJ, false), q);
        ck_assert_int_eq(ht_weights_format(q, HT_T_EMBED, false), HT_Q_BF16);
        ck_assert_int_eq(ht_weights_format(q, HT_T_EMBED, true), head);
        ck_assert_int_eq(ht_weights_format(q, HT_T_HEAD, false), head);
    }
    // a tied model stores its embedding as the head
    ht_tensor_list_free(&list);
    make_source(true);
    save(target, true, HT_Q_INT4, 32, HT_DTYPE_F32);
    struct ht_wf *f;
    ck_assert_int_eq(ht_wf_open(&f, target), HT_OK);
    const struct ht_wf_tensor *t = ht_wf_find(f, "model.embed_tokens.weight");
    ck_assert(t && t->form.quantised && t->form.format == HT_Q_INT8);
    ck_assert_ptr_null(ht_wf_find(f, "lm_head.weight"));
    t = ht_wf_find(f, list.tensors[list.n_tensors - 1].name);
    ck_assert(t && !t->form.quantised && t->form.dtype == HT_DTYPE_F32);
    ht_wf_close(f);
}
END_TEST

START_TEST(vectors_alone)
{
    save(target, true, HT_Q_INT4Z, 32, HT_DTYPE_F32);
    struct ht_weights *w = opened(target);
    float *vector = calloc((size_t)(list.n_total - list.n_matrix), 4);
    ck_assert_int_eq(ht_weights_load_vectors(w, &list, vector), HT_OK);
    for (int i = 0; i < list.n_tensors; i++)
        for (int64_t e = 0; !list.tensors[i].matrix && e < list.tensors[i].n; e++)
            ck_assert_float_eq(vector[list.tensors[i].offset + e - list.n_matrix],
                               value(&list.tensors[i], e));
    free(vector);
    ht_weights_close(w);
}
END_TEST

/* ---- refusals ---- */

static void refused(enum ht_status st, enum ht_status want, const char *message)
{
    ck_assert_msg(st == want && strstr(ht_error_message(), message), "%d, expected %d and '%s': %s",
                  (int)st, (int)want, message, ht_error_message());
}

START_TEST(bad_requests_are_refused)
{
    struct ht_weights *w = opened(source);
    const struct ht_tensor_info *mixed[] = { ht_tensor_find(&list, 1, HT_T_Q),
                                             ht_tensor_find(&list, 1, HT_T_DOWN) };
    const struct ht_tensor_info *norm = ht_tensor_find(&list, 1, HT_T_NORM1);
    struct ht_weights_save_options o = { .dtype = HT_DTYPE_F16 };
    struct ht_tensor_info stranger = *norm;
    struct ht_qmatrix q;
    float out[96];

    refused(ht_weights_load_qmatrix(&q, w, &list, mixed, 2, HT_Q_INT8, 32, NULL, NULL), HT_ERR_ARG,
            "rows of 128");
    refused(ht_weights_load_qmatrix(&q, w, &list, &norm, 1, HT_Q_INT8, 32, NULL, NULL), HT_ERR_ARG,
            "norm");
    refused(ht_weights_load_qmatrix(&q, w, &list, mixed, 1, HT_Q_INT8, 31, NULL, NULL), HT_ERR_ARG,
            "group is 31");
    refused(ht_weights_read_rows(w, &list, mixed[0], 90, 7, out, HT_DTYPE_F32), HT_ERR_ARG,
            "rows 90 to 96");
    refused(ht_weights_read_rows(w, &list, mixed[0], 0, 1, out, HT_DTYPE_F16), HT_ERR_ARG, "fp16");
    refused(ht_weights_read_rows(w, &list, &stranger, 0, 1, out, HT_DTYPE_F32), HT_ERR_ARG, "list");
    refused(ht_weights_save_h5(w, target, &o, NULL), HT_ERR_ARG, "fp16");
    o = (struct ht_weights_save_options){ .quantise = true, .group = 16, .n_threads = 1 };
    refused(ht_weights_save_h5(w, target, &o, NULL), HT_ERR_ARG, "group is 16");
    o.group = 32;
    refused(ht_weights_save_safetensors(w, target, &o, NULL), HT_ERR_ARG, "dense weights only");
    refused(ht_weights_save_h5(w, source, &o, NULL), HT_ERR_ARG, "there already");
    refused(ht_weights_save_h5(w, "", &o, NULL), HT_ERR_ARG, "usable path");
    ck_assert(!ht_file_exists(target));
    ht_weights_close(w);
}
END_TEST

/* A single bit anywhere in the folder's files is noticed. */
START_TEST(every_flipped_bit_is_refused)
{
    static const char *const names[] = { HT_WEIGHTS_H5, HT_WEIGHTS_MANIFEST, "config.json",
                                         "tokenizer.json" };
    const char *many = getenv("HT_TEST_FLIPS");
    const int n_flips = many ? atoi(many) : 400;

    save(target, true, HT_Q_INT4Z, 32, HT_DTYPE_F32);
    for (int i = 0; i < n_flips; i++) {
        char path[200], *data;
        size_t n;
        struct ht_wf *f;
        snprintf(path, sizeof path, "%s/%s", target, names[i % 4]);
        ck_assert_int_eq(ht_file_read(&data, &n, path, 1 << 30), HT_OK);
        const uint64_t r = ht_rng_u64(7, 1, (uint64_t)i);
        data[r % n] = (char)(data[r % n] ^ (1 << (r >> 40 & 7)));
        put(target, names[i % 4], data, n);
        ck_assert_msg(ht_wf_open(&f, target) == HT_ERR_FORMAT, "flip %d of %s: bit %d of byte %zu",
                      i, names[i % 4], (int)(r >> 40 & 7), (size_t)(r % n));
        data[r % n] = (char)(data[r % n] ^ (1 << (r >> 40 & 7)));
        put(target, names[i % 4], data, n);
        free(data);
    }
    struct ht_wf *f;
    ck_assert_int_eq(ht_wf_open(&f, target), HT_OK);
    ht_wf_close(f);
}
END_TEST

/* Sealed manifests that lie: `from` replaced by `to`, sealed anew. */
START_TEST(sealed_manifests_that_lie_are_refused)
{
    static const struct {
        const char *from, *to, *message;
    } lies[] = {
        { "hybridtrain-weights", "hybridtrain-checkpoint", "not the manifest" },
        { "\"version\": 1", "\"version\": 2", "another version" },
        { "\"projections\": \"int4z\"", "\"projections\": \"int5\"", "projections" },
        { "\"group\": 32", "\"group\": 48", "projections or group" },
        { "\"config.json\"", "\"../config.json\"", "entry" },
        { "\"config.json\"", "\"config.jsox\"", "config.jsox" },
        { "\"int4z\",\n   32", "\"int4z\",\n   64", "entry" },
        { "\"int4z\",\n   32", "\"int4\",\n   32", "entry" },
        { "\"fp32\",\n   0", "\"fp32\",\n   32", "entry" },
        { "\"fp32\",\n   0", "\"bf16\",\n   0", "entry" },
        { "[\n    96\n   ]", "[\n    0\n   ]", "entry" },
        { "[\n    96\n   ]", "[\n    -96\n   ]", "entry" },
        { "[\n    96\n   ]", "[\n    96.0\n   ]", "entry" },
        { "[\n    96\n   ]", "[]", "entry" },
        { "[\n    96\n   ]", "[\n    4294967296\n   ]", "entry" },
        { "model.layers.0.mamba.D", "", "entry" },
        { "\"files\": [", "\"files\": 3, \"x\": [", "files or tensors" },
        { "\"tensors\": [\n", "\"tensors\": [3,\n", "entry 0" },
    };
    char path[200], *text;
    size_t n;

    save(target, true, HT_Q_INT4Z, 32, HT_DTYPE_F32);
    snprintf(path, sizeof path, "%s/" HT_WEIGHTS_MANIFEST, target);
    ck_assert_int_eq(ht_file_read(&text, &n, path, 1 << 24), HT_OK);
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        char *lie = malloc(n + 200), hex[HT_HASH_HEX];
        const char *at = strstr(text, lies[i].from);
        struct ht_wf *f = NULL;
        ck_assert_msg(at, "lie %zu: '%s' is not in the manifest", i, lies[i].from);
        size_t used = (size_t)(at - text);
        memcpy(lie, text, used);
        used += (size_t)sprintf(lie + used, "%s", lies[i].to);
        const char *rest = at + strlen(lies[i].from);
        const size_t n_rest = n - HT_MANIFEST_SEAL_BYTES - (size_t)(rest - text);
        memcpy(lie + used, rest, n_rest);
        used += n_rest;
        const struct ht_hash h = ht_hash_of(lie, used);
        ht_hash_print(hex, &h);
        used += (size_t)sprintf(lie + used, HT_MANIFEST_SEAL, hex);
        put(target, HT_WEIGHTS_MANIFEST, lie, used);
        const enum ht_status st = ht_wf_open(&f, target);
        ck_assert_msg(st == HT_ERR_FORMAT || (st == HT_ERR_IO && strstr(lies[i].to, "jsox")),
                      "lie %zu: status %d", i, (int)st);
        refused(st, st, lies[i].message);
        free(lie);
    }
    free(text);
}
END_TEST

/* A folder of another model: right hashes, wrong shapes. */
START_TEST(folders_of_other_models_are_refused)
{
    save(target, true, HT_Q_INT8, 32, HT_DTYPE_F32);
    struct ht_weights *w = opened(target);
    struct ht_model_config other = model;
    struct ht_tensor_list l;
    float *vector;

    other.d_ff = 64;
    ck_assert_int_eq(ht_tensor_list_create(&l, &other, HT_DECAY_MATRICES), HT_OK);
    vector = calloc((size_t)(l.n_total - l.n_matrix), 4);
    refused(ht_weights_load_vectors(w, &l, vector), HT_ERR_FORMAT, "gate_proj");
    ht_tensor_list_free(&l);
    free(vector);
    other = model;
    other.n_layers = 1;
    ck_assert_int_eq(ht_tensor_list_create(&l, &other, HT_DECAY_MATRICES), HT_OK);
    vector = calloc((size_t)(l.n_total - l.n_matrix), 4);
    refused(ht_weights_load_vectors(w, &l, vector), HT_ERR_FORMAT, "the model has");
    ht_tensor_list_free(&l);
    free(vector);
    ht_weights_close(w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("weights_quant");
    TCase *t = tcase_create("weights_quant");

    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, dense_folders_hold_the_values, 0, 2);
    tcase_add_loop_test(t, packed_matrices_are_the_same_from_everywhere, 0, 2 * HT_Q_COUNT);
    tcase_add_test(t, roles_have_their_formats);
    tcase_add_test(t, vectors_alone);
    tcase_add_test(t, bad_requests_are_refused);
    tcase_add_test(t, every_flipped_bit_is_refused);
    tcase_add_test(t, sealed_manifests_that_lie_are_refused);
    tcase_add_test(t, folders_of_other_models_are_refused);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
