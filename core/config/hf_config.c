/* core/config/hf_config.c: Hugging Face config.json -> model config (spec 1.1, 1.2, 1.4). */
#include <inttypes.h>
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/recipe_impl.h"

#define REQUIRED NAN // as a default: the key must be there

struct reader {
    const json_t *root;
    const char *name;  // of the file, for messages
    enum ht_status st; // the first failure; later reads do nothing
};

/* ---- text ---- */

char *ht_hf_json_text(const char *json, size_t n_bytes)
{
    static const char word[] = "Infinity";
    const size_t n_word = sizeof word - 1;
    char *out = malloc(n_bytes + n_bytes / n_word * 2 + 3), *o = out;
    bool in_string = false;

    if (!out) return NULL;
    for (size_t i = 0; i < n_bytes;) {
        const bool minus = json[i] == '-' && i + 1 < n_bytes && json[i + 1] == 'I';
        const size_t start = i + minus;
        if (!in_string && n_bytes - start >= n_word && !memcmp(json + start, word, n_word)) {
            *o++ = '"';
            memcpy(o, json + i, n_word + minus);
            o += n_word + minus;
            *o++ = '"';
            i = start + n_word;
            continue;
        }
        if (in_string && json[i] == '\\' && i + 1 < n_bytes)
            *o++ = json[i++];
        else if (json[i] == '"')
            in_string = !in_string;
        *o++ = json[i++];
    }
    *o = 0;
    return out;
}

/* ---- values ---- */

/* NULL for absent and for null. */
static const json_t *find(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return json_is_null(v) ? NULL : v;
}

static bool missing(struct reader *r, const char *key, double fallback)
{
    if (isnan(fallback) && r->st == HT_OK)
        r->st = HT_FAIL(HT_ERR_FORMAT, "%s: key \"%s\" is missing", r->name, key);
    return isnan(fallback);
}

static void wrong(struct reader *r, const char *key, const char *must_be)
{
    if (r->st == HT_OK)
        r->st = HT_FAIL(HT_ERR_FORMAT, "%s: key \"%s\" must be %s", r->name, key, must_be);
}

static int64_t get_int(struct reader *r, const char *key, double fallback)
{
    const json_t *v = find(r->root, key);

    if (!v) return missing(r, key, fallback) ? 0 : (int64_t)fallback;
    if (!json_is_integer(v) || json_integer_value(v) < 0) {
        wrong(r, key, "a whole number");
        return 0;
    }
    return json_integer_value(v);
}

/* Numbers, "Infinity" and {"__float__": "Infinity"}. */
static bool number_of(double *out, const json_t *v)
{
    const json_t *wrapped = json_object_get(v, "__float__");

    if (wrapped) v = wrapped;
    if (json_is_number(v)) {
        *out = json_number_value(v);
        return true;
    }
    if (!json_is_string(v)) return false;
    if (!strcmp(json_string_value(v), "Infinity"))
        *out = INFINITY;
    else if (!strcmp(json_string_value(v), "-Infinity"))
        *out = -INFINITY;
    else
        return false;
    return true;
}

static double get_real_in(struct reader *r, const json_t *object, const char *key, double fallback)
{
    const json_t *v = find(object, key);
    double d = 0.0;

    if (!v) return missing(r, key, fallback) ? 0.0 : fallback;
    if (!number_of(&d, v)) wrong(r, key, "a number");
    return d;
}

static double get_real(struct reader *r, const char *key, double fallback)
{
    return get_real_in(r, r->root, key, fallback);
}

static bool get_bool(struct reader *r, const char *key, bool fallback)
{
    const json_t *v = find(r->root, key);

    if (!v) return fallback;
    if (!json_is_boolean(v)) wrong(r, key, "true or false");
    return json_is_true(v);
}

/* Things that a file may say and that this program has only one way of doing. */
static void must_be_false(struct reader *r, const char *key)
{
    if (get_bool(r, key, false)) wrong(r, key, "false; the other is not supported");
}

static void must_be_silu(struct reader *r)
{
    const json_t *v = find(r->root, "hidden_act");

    if (v && (!json_is_string(v) || strcmp(json_string_value(v), "silu")))
        wrong(r, "hidden_act", "\"silu\"; no other is supported");
}

/* ---- parts that several families share ---- */

static void read_attention(struct reader *r, struct ht_model_config *m)
{
    m->n_heads = get_int(r, "num_attention_heads", REQUIRED);
    m->n_kv_heads = get_int(r, "num_key_value_heads", (double)m->n_heads);
    m->d_head = get_int(r, "head_dim", 0);
    if (r->st != HT_OK) return;
    if (!m->d_head && (m->n_heads < 1 || m->d_model % m->n_heads)) {
        wrong(r, "num_attention_heads", "a divisor of hidden_size, or head_dim be given");
        return;
    }
    if (!m->d_head) m->d_head = m->d_model / m->n_heads;
    m->attention_scale = (float)(1.0 / sqrt((double)m->d_head));
    must_be_false(r, "attention_bias");
}

/* rope_theta, rope_scaling and partial_rotary_factor, or one object rope_parameters with all of
 * them. */
static void read_rope(struct reader *r, struct ht_model_config *m, double fraction)
{
    const json_t *all = find(r->root, "rope_parameters"), *scaling = find(r->root, "rope_scaling");

    if ((all && !json_is_object(all)) || (scaling && !json_is_object(scaling))) {
        wrong(r, all ? "rope_parameters" : "rope_scaling", "an object");
        return;
    }
    m->rope_theta = get_real(r, "rope_theta", 10000.0);
    fraction = get_real(r, "partial_rotary_factor", fraction);
    if (all) {
        m->rope_theta = get_real_in(r, all, "rope_theta", m->rope_theta);
        fraction = get_real_in(r, all, "partial_rotary_factor", fraction);
        if (!scaling) scaling = all;
    }
    if (r->st != HT_OK) return;
    if (!(fraction >= 0.0 && fraction <= 1.0)) {
        wrong(r, "partial_rotary_factor", "from 0 to 1");
        return;
    }
    m->rope_dims = (int64_t)(fraction * (double)m->d_head + 1e-6);
    if (!scaling) return;
    const json_t *type = find(scaling, "rope_type");
    if (!type) type = find(scaling, "type");
    const char *kind = json_is_string(type) ? json_string_value(type) : "default";
    if (!strcmp(kind, "default")) return;
    if (strcmp(kind, "llama3")) {
        r->st = HT_FAIL(HT_ERR_FORMAT,
                        "%s: rope_type is \"%.40s\"; \"default\" and \"llama3\" are supported",
                        r->name, kind);
        return;
    }
    m->rope_factor = get_real_in(r, scaling, "factor", REQUIRED);
    m->rope_low_freq = get_real_in(r, scaling, "low_freq_factor", REQUIRED);
    m->rope_high_freq = get_real_in(r, scaling, "high_freq_factor", REQUIRED);
    const double original = get_real_in(r, scaling, "original_max_position_embeddings", REQUIRED);
    if (!(original >= 1.0 && original <= 1e9))
        wrong(r, "original_max_position_embeddings", "1 to 1e9");
    else
        m->rope_original_max = (int64_t)original;
}

static void read_time_steps(struct reader *r, struct ht_model_config *m)
{
    const json_t *limit = find(r->root, "time_step_limit");
    double lo = 0.0, hi = INFINITY;

    if (limit &&
        (!json_is_array(limit) || json_array_size(limit) != 2 ||
         !number_of(&lo, json_array_get(limit, 0)) || !number_of(&hi, json_array_get(limit, 1))))
        wrong(r, "time_step_limit", "two numbers");
    m->dt_limit_min = (float)lo;
    m->dt_limit_max = (float)hi;
    m->dt_init_min = (float)get_real(r, "time_step_min", 0.001);
    m->dt_init_max = (float)get_real(r, "time_step_max", 0.1);
    m->dt_init_floor = (float)get_real(r, "time_step_floor", 1e-4);
}

/* The chunk changes speed and rounding only, so one that the kernels have not got is replaced. */
static int64_t usable_chunk(int64_t chunk)
{
    return chunk >= 16 && chunk <= 256 && !(chunk & (chunk - 1)) ? chunk : 256;
}

/* expand * hidden_size = heads * head width; expand may be a real number. */
static void set_inner(struct reader *r, struct ht_model_config *m, const char *key, double expand)
{
    const double inner = expand * (double)m->d_model;

    if (r->st != HT_OK) return;
    if (!(inner >= 1.0 && inner <= 1 << 20) || inner != nearbyint(inner)) {
        wrong(r, key, "such that its product with hidden_size is a whole number up to 2^20");
        return;
    }
    m->d_inner = (int64_t)inner;
    if (!m->ssm_d_head && m->ssm_heads > 0 && m->d_inner % m->ssm_heads == 0)
        m->ssm_d_head = m->d_inner / m->ssm_heads;
    if (m->ssm_heads * m->ssm_d_head != m->d_inner)
        r->st = HT_FAIL(HT_ERR_FORMAT,
                        "%s: %" PRId64 " Mamba heads of %" PRId64
                        " are not %s * hidden_size = %" PRId64,
                        r->name, m->ssm_heads, m->ssm_d_head, key, m->d_inner);
}

/* ---- families ---- */

/* Layer kinds as a list of names; false when the key is absent. */
static bool read_layer_types(struct reader *r, struct ht_model_config *m, const char *key)
{
    const json_t *list = find(r->root, key), *v;
    size_t i;

    if (!list || r->st != HT_OK) return false;
    if (!json_is_array(list) || (int64_t)json_array_size(list) != m->n_layers) {
        wrong(r, key, "a list with one entry per layer");
        return false;
    }
    json_array_foreach(list, i, v)
    {
        const char *kind = json_is_string(v) ? json_string_value(v) : "";
        if (!strcmp(kind, "attention") || !strcmp(kind, "full_attention"))
            m->layer_kind[i] = HT_LAYER_ATTENTION;
        else if (!strcmp(kind, "mamba") || !strcmp(kind, "linear_attention"))
            m->layer_kind[i] = HT_LAYER_MAMBA;
        else
            wrong(r, key, "a list of \"mamba\" and \"attention\"");
    }
    return true;
}

static void read_bamba_layers(struct reader *r, struct ht_model_config *m)
{
    const json_t *indices = find(r->root, "attn_layer_indices"), *v;
    uint8_t listed[HT_MAX_LAYERS] = { 0 };
    const bool named =
        read_layer_types(r, m, "layer_types") || read_layer_types(r, m, "layers_block_type");
    size_t i;

    if (!indices || r->st != HT_OK) return;
    if (!json_is_array(indices)) {
        wrong(r, "attn_layer_indices", "a list of layer numbers");
        return;
    }
    json_array_foreach(indices, i, v)
    {
        const json_int_t layer = json_is_integer(v) ? json_integer_value(v) : -1;
        if (layer < 0 || layer >= m->n_layers) {
            wrong(r, "attn_layer_indices", "a list of numbers from 0 to num_hidden_layers - 1");
            return;
        }
        listed[layer] = HT_LAYER_ATTENTION;
    }
    if (named && memcmp(listed, m->layer_kind, (size_t)m->n_layers))
        r->st = HT_FAIL(HT_ERR_FORMAT,
                        "%s: attn_layer_indices and the list of layer types name different layers",
                        r->name);
    memcpy(m->layer_kind, listed, (size_t)m->n_layers);
}

static void read_bamba(struct reader *r, struct ht_model_config *m)
{
    const json_t *d_head = find(r->root, "mamba_d_head");

    m->naming = HT_NAMING_BAMBA;
    read_bamba_layers(r, m);
    m->d_ff = get_int(r, "intermediate_size", REQUIRED);
    m->norm_eps = (float)get_real(r, "rms_norm_eps", 1e-5);
    m->max_position = get_int(r, "max_position_embeddings", 262144);
    if (r->st == HT_OK && memchr(m->layer_kind, HT_LAYER_ATTENTION, (size_t)m->n_layers)) {
        read_attention(r, m);
        read_rope(r, m, 0.5);
    }
    if (r->st == HT_OK && memchr(m->layer_kind, HT_LAYER_MAMBA, (size_t)m->n_layers)) {
        m->ssm_heads = get_int(r, "mamba_n_heads", REQUIRED);
        if (!json_is_string(d_head)) // "auto"
            m->ssm_d_head = get_int(r, "mamba_d_head", 0);
        m->d_state = get_int(r, "mamba_d_state", REQUIRED);
        m->n_groups = get_int(r, "mamba_n_groups", 1);
        m->d_conv = get_int(r, "mamba_d_conv", 4);
        m->chunk = usable_chunk(get_int(r, "mamba_chunk_size", 256));
        m->conv_bias = get_bool(r, "mamba_conv_bias", true);
        set_inner(r, m, "mamba_expand", get_real(r, "mamba_expand", 2));
        read_time_steps(r, m);
        must_be_false(r, "mamba_proj_bias");
    }
    must_be_false(r, "mlp_bias");
}

static void read_llama(struct reader *r, struct ht_model_config *m)
{
    m->naming = HT_NAMING_LLAMA;
    memset(m->layer_kind, HT_LAYER_ATTENTION, (size_t)m->n_layers);
    m->d_ff = get_int(r, "intermediate_size", REQUIRED);
    m->norm_eps = (float)get_real(r, "rms_norm_eps", 1e-6);
    m->max_position = get_int(r, "max_position_embeddings", 2048);
    read_attention(r, m);
    read_rope(r, m, 1.0);
    must_be_false(r, "mlp_bias");
}

static void read_mamba2(struct reader *r, struct ht_model_config *m)
{
    m->naming = HT_NAMING_MAMBA2;
    m->norm_eps = (float)get_real(r, "layer_norm_epsilon", 1e-5);
    m->max_position = 1 << 20; // no position encoding, so no limit but this
    m->ssm_heads = get_int(r, "num_heads", REQUIRED);
    m->ssm_d_head = get_int(r, "head_dim", 64);
    m->d_state = get_int(r, "state_size", REQUIRED);
    m->n_groups = get_int(r, "n_groups", 8);
    m->d_conv = get_int(r, "conv_kernel", 4);
    m->chunk = usable_chunk(get_int(r, "chunk_size", 256));
    m->conv_bias = get_bool(r, "use_conv_bias", true);
    m->residual_fp32 = get_bool(r, "residual_in_fp32", true);
    set_inner(r, m, "expand", get_real(r, "expand", 2));
    read_time_steps(r, m);
    must_be_false(r, "use_bias");
    if (!get_bool(r, "rms_norm", true)) wrong(r, "rms_norm", "true; the other is not supported");
}

static void read_model(struct reader *r, struct ht_model_config *m)
{
    const json_t *type = find(r->root, "model_type");
    const char *kind = json_is_string(type) ? json_string_value(type) : "";

    m->vocab_size = get_int(r, "vocab_size", REQUIRED);
    m->d_model = get_int(r, "hidden_size", REQUIRED);
    m->n_layers = get_int(r, "num_hidden_layers", REQUIRED);
    if (r->st != HT_OK) return;
    if (m->n_layers < 1 || m->n_layers > HT_MAX_LAYERS || m->d_model < 1 || m->d_model > 65536) {
        r->st =
            HT_FAIL(HT_ERR_FORMAT,
                    "%s: %" PRId64 " layers of width %" PRId64 "; at most %d of 65536, at least 1",
                    r->name, m->n_layers, m->d_model, HT_MAX_LAYERS);
        return;
    }
    m->embedding_multiplier = m->residual_multiplier = m->logits_scaling = 1.0f;
    m->residual_fp32 = true;
    m->tied_head = get_bool(r, "tie_word_embeddings", false);
    m->residual_init_div = sqrt((double)m->n_layers);
    must_be_silu(r);
    if (!strcmp(kind, "bamba"))
        read_bamba(r, m);
    else if (!strcmp(kind, "llama"))
        read_llama(r, m);
    else if (!strcmp(kind, "mamba2"))
        read_mamba2(r, m);
    else if (r->st == HT_OK)
        r->st = HT_FAIL(HT_ERR_FORMAT,
                        "%s: model_type is \"%.60s\"; bamba, llama and mamba2 are supported",
                        r->name, kind);
}

enum ht_status ht_model_config_from_hf(struct ht_model_config *out, const char *json,
                                       size_t n_bytes, const char *name)
{
    struct ht_model_config m = { 0 };
    struct reader r = { .name = name };
    struct model_problem problem;
    json_error_t error;

    memset(out, 0, sizeof *out);
    char *text = ht_hf_json_text(json, n_bytes);
    if (!text) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %zu bytes", name, n_bytes);
    json_t *root = json_loadb(text, strlen(text), JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root)
        return HT_FAIL(HT_ERR_FORMAT, "%s:%d:%d: %s", name, error.line, error.column, error.text);
    r.root = root;
    if (json_is_object(root))
        read_model(&r, &m);
    else
        r.st = HT_FAIL(HT_ERR_FORMAT, "%s: not a JSON object", name);
    json_decref(root);
    if (r.st != HT_OK) return r.st;
    model_find_problem(&problem, &m);
    if (problem.key)
        return HT_FAIL(HT_ERR_FORMAT, "%s: describes a model that cannot be run: %s %s", name,
                       problem.key, problem.text);
    *out = m;
    return HT_OK;
}
