/* core/config/hf_export.c: model config -> Hugging Face config.json. */
#include <jansson.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/recipe_impl.h"

struct writer {
    json_t *root;
    bool failed; // out of memory
};

static void put(struct writer *w, json_t *object, const char *key, json_t *v)
{
    w->failed |= json_object_set_new(object, key, v) != 0; // takes v, also when it is NULL
}

static void put_int(struct writer *w, const char *key, int64_t i)
{
    put(w, w->root, key, json_integer(i));
}

static void put_bool(struct writer *w, const char *key, bool b)
{
    put(w, w->root, key, json_boolean(b));
}

/* A float as the shortest decimal that reads back to it: 1e-05, not 9.99999974737875e-06. */
static double shortest(float f)
{
    char digits[32];

    for (int precision = 1; precision <= 9; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, (double)f);
        if (strtof(digits, NULL) == f) break;
    }
    return strtod(digits, NULL);
}

static void put_float(struct writer *w, const char *key, float f)
{
    put(w, w->root, key, json_real(shortest(f)));
}

static void put_common(struct writer *w, const struct ht_model_config *m, const char *type,
                       const char *class)
{
    put(w, w->root, "architectures", json_pack("[s]", class));
    put(w, w->root, "model_type", json_string(type));
    put_int(w, "vocab_size", m->vocab_size);
    put_int(w, "hidden_size", m->d_model);
    put_int(w, "num_hidden_layers", m->n_layers);
    put(w, w->root, "hidden_act", json_string("silu"));
    put_bool(w, "tie_word_embeddings", m->tied_head);
}

static void put_attention(struct writer *w, const struct ht_model_config *m)
{
    put_int(w, "num_attention_heads", m->n_heads);
    put_int(w, "num_key_value_heads", m->n_kv_heads);
    put_int(w, "head_dim", m->d_head);
    put_bool(w, "attention_bias", false);
}

static void put_scaling(struct writer *w, json_t *o, const struct ht_model_config *m)
{
    put(w, o, "rope_type", json_string(m->rope_factor != 0.0 ? "llama3" : "default"));
    if (m->rope_factor == 0.0) return;
    put(w, o, "factor", json_real(m->rope_factor));
    put(w, o, "low_freq_factor", json_real(m->rope_low_freq));
    put(w, o, "high_freq_factor", json_real(m->rope_high_freq));
    put(w, o, "original_max_position_embeddings", json_integer(m->rope_original_max));
}

/* Both forms: old releases read the separate keys, new ones the object. */
static void put_rope(struct writer *w, const struct ht_model_config *m)
{
    const double fraction = (double)m->rope_dims / (double)m->d_head;
    json_t *all = json_object();

    put(w, w->root, "rope_theta", json_real(m->rope_theta));
    if (m->rope_factor != 0.0) {
        json_t *scaling = json_object();
        put_scaling(w, scaling, m);
        put(w, w->root, "rope_scaling", scaling);
    }
    put(w, all, "rope_theta", json_real(m->rope_theta));
    if (m->naming == HT_NAMING_BAMBA) {
        put(w, w->root, "partial_rotary_factor", json_real(fraction));
        put(w, all, "partial_rotary_factor", json_real(fraction));
    }
    put_scaling(w, all, m);
    put(w, w->root, "rope_parameters", all);
}

/* The default (0, inf) is left out: plain JSON has no infinity. */
static void put_time_steps(struct writer *w, const struct ht_model_config *m)
{
    put_float(w, "time_step_min", m->dt_init_min);
    put_float(w, "time_step_max", m->dt_init_max);
    if (m->dt_limit_min == 0.0f && isinf(m->dt_limit_max)) return;
    put(w, w->root, "time_step_limit",
        isinf(m->dt_limit_max)
            ? json_pack("[f,{s:s}]", shortest(m->dt_limit_min), "__float__", "Infinity")
            : json_pack("[f,f]", shortest(m->dt_limit_min), shortest(m->dt_limit_max)));
}

static void put_bamba(struct writer *w, const struct ht_model_config *m)
{
    json_t *indices = json_array();
    bool has_attention = false, has_mamba = false;

    put_common(w, m, "bamba", "BambaForCausalLM");
    for (int64_t i = 0; i < m->n_layers; i++) {
        const bool attention = m->layer_kind[i] == HT_LAYER_ATTENTION;
        has_attention |= attention;
        has_mamba |= !attention;
        if (attention) w->failed |= json_array_append_new(indices, json_integer(i)) != 0;
    }
    put(w, w->root, "attn_layer_indices", indices);
    put_int(w, "intermediate_size", m->d_ff);
    put_float(w, "rms_norm_eps", m->norm_eps);
    put_int(w, "max_position_embeddings", m->max_position);
    put_bool(w, "mlp_bias", false);
    if (has_attention) {
        put_attention(w, m);
        put_rope(w, m);
    }
    if (!has_mamba) return;
    put(w, w->root, "mamba_expand",
        m->d_inner % m->d_model ? json_real((double)m->d_inner / (double)m->d_model)
                                : json_integer(m->d_inner / m->d_model));
    put_int(w, "mamba_n_heads", m->ssm_heads);
    put_int(w, "mamba_d_head", m->ssm_d_head);
    put_int(w, "mamba_d_state", m->d_state);
    put_int(w, "mamba_n_groups", m->n_groups);
    put_int(w, "mamba_d_conv", m->d_conv);
    put_int(w, "mamba_chunk_size", m->chunk);
    put_bool(w, "mamba_conv_bias", m->conv_bias);
    put_bool(w, "mamba_proj_bias", false);
    put_time_steps(w, m);
}

static void put_llama(struct writer *w, const struct ht_model_config *m)
{
    put_common(w, m, "llama", "LlamaForCausalLM");
    put_int(w, "intermediate_size", m->d_ff);
    put_float(w, "rms_norm_eps", m->norm_eps);
    put_int(w, "max_position_embeddings", m->max_position);
    put_bool(w, "mlp_bias", false);
    put_attention(w, m);
    put_rope(w, m);
}

static void put_mamba2(struct writer *w, const struct ht_model_config *m)
{
    put_common(w, m, "mamba2", "Mamba2ForCausalLM");
    put_float(w, "layer_norm_epsilon", m->norm_eps);
    put(w, w->root, "expand",
        m->d_inner % m->d_model ? json_real((double)m->d_inner / (double)m->d_model)
                                : json_integer(m->d_inner / m->d_model));
    put_int(w, "num_heads", m->ssm_heads);
    put_int(w, "head_dim", m->ssm_d_head);
    put_int(w, "state_size", m->d_state);
    put_int(w, "n_groups", m->n_groups);
    put_int(w, "conv_kernel", m->d_conv);
    put_int(w, "chunk_size", m->chunk);
    put_bool(w, "use_conv_bias", m->conv_bias);
    put_bool(w, "use_bias", false);
    put_bool(w, "rms_norm", true);
    put_bool(w, "residual_in_fp32", m->residual_fp32);
    put_float(w, "time_step_floor", m->dt_init_floor);
    put_time_steps(w, m);
}

/* What the Hugging Face classes cannot say. */
static enum ht_status check_expressible(const struct ht_model_config *m)
{
    const bool attention = m->n_heads > 0;
    const double scale = attention ? 1.0 / sqrt((double)m->d_head) : 0.0;

    if (m->embedding_multiplier != 1.0f || m->residual_multiplier != 1.0f ||
        m->logits_scaling != 1.0f)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "config.json: multipliers are %g, %g, %g (embedding, residual, logits); the "
                       "classes of bamba, llama and mamba2 have none",
                       (double)m->embedding_multiplier, (double)m->residual_multiplier,
                       (double)m->logits_scaling);
    if (attention && fabs((double)m->attention_scale - scale) > 1e-6 * scale)
        return HT_FAIL(
            HT_ERR_UNSUPPORTED,
            "config.json: attention_scale is %g; the classes have 1/sqrt(d_head) = %g only",
            (double)m->attention_scale, scale);
    if (attention && m->naming == HT_NAMING_LLAMA && m->rope_dims != m->d_head)
        return HT_FAIL(
            HT_ERR_UNSUPPORTED,
            "config.json: %lld of %lld dimensions are rotary; llama has all or nothing of it",
            (long long)m->rope_dims, (long long)m->d_head);
    if (attention && m->naming == HT_NAMING_BAMBA && m->rope_dims == 0)
        return HT_FAIL(
            HT_ERR_UNSUPPORTED,
            "config.json: attention has no position encoding; bamba has no way to say so");
    return HT_OK;
}

enum ht_status ht_model_config_to_hf(char **json, const struct ht_model_config *m)
{
    struct writer w = { .root = json_object() };

    *json = NULL;
    if (!w.root) return HT_FAIL(HT_ERR_MEMORY, "no memory for a config.json");
    const enum ht_status st = check_expressible(m);
    if (st == HT_OK) {
        switch (m->naming) {
        case HT_NAMING_BAMBA: put_bamba(&w, m); break;
        case HT_NAMING_LLAMA: put_llama(&w, m); break;
        case HT_NAMING_MAMBA2: put_mamba2(&w, m); break;
        }
        if (!w.failed) *json = json_dumps(w.root, JSON_INDENT(2) | JSON_REAL_PRECISION(15));
    }
    json_decref(w.root);
    HT_TRY(st);
    return *json ? HT_OK : HT_FAIL(HT_ERR_MEMORY, "no memory for a config.json");
}
