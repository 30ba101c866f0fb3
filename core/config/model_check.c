/* core/config/model_check.c: which sizes of a model fit together. */
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include "core/config/recipe_impl.h"

__attribute__((format(printf, 3, 4))) static void problem(struct model_problem *p, const char *key,
                                                          const char *format, ...)
{
    va_list ap;

    if (p->key) return; // the first one is the one to fix
    p->key = key;
    va_start(ap, format);
    vsnprintf(p->text, sizeof p->text, format, ap);
    va_end(ap);
}

static void need_range(struct model_problem *p, const char *key, int64_t v, int64_t min,
                       int64_t max)
{
    if (v < min || v > max)
        problem(p, key, "is %" PRId64 "; it must be from %" PRId64 " to %" PRId64, v, min, max);
}

static void need_multiple(struct model_problem *p, const char *key, int64_t v, int64_t of,
                          const char *of_name)
{
    if (of < 1 || v % of)
        problem(p, key, "is %" PRId64 "; it must be a multiple of %s%s%" PRId64, v, of_name,
                *of_name ? " = " : "", of);
}

static void need_positive(struct model_problem *p, const char *key, double v)
{
    if (!(v > 0) || isinf(v)) problem(p, key, "is %g; it must be above 0 and finite", v);
}

static void check_attention(struct model_problem *p, const struct ht_model_config *m)
{
    need_range(p, "n_heads", m->n_heads, 1, 65536);
    need_range(p, "n_kv_heads", m->n_kv_heads, 1, 65536);
    need_range(p, "d_head", m->d_head, 8, 256);
    if (p->key) return;
    if (m->n_heads % m->n_kv_heads)
        problem(p, "n_kv_heads", "is %" PRId64 "; it must divide n_heads = %" PRId64, m->n_kv_heads,
                m->n_heads);
    need_multiple(p, "d_head", m->d_head, 8, "");
    if (m->rope_dims < 0 || m->rope_dims > m->d_head || m->rope_dims % 2)
        problem(p, "rope_fraction",
                "turns %" PRId64 " of %" PRId64
                " dimensions of a head; it must be an even number of "
                "them",
                m->rope_dims, m->d_head);
    if (m->n_kv_heads * m->d_head * m->d_model % 64)
        problem(p, "n_kv_heads",
                "gives k and v %" PRId64 " elements (n_kv_heads * d_head * d_model); it must be a "
                "multiple of 64",
                m->n_kv_heads * m->d_head * m->d_model);
    need_positive(p, "attention_scale", (double)m->attention_scale);
    if (m->rope_dims) {
        need_positive(p, "rope_theta", m->rope_theta);
        need_range(p, "max_position", m->max_position, 1, INT64_C(1) << 30);
    }
    if (m->rope_factor != 0.0) {
        if (!(m->rope_factor >= 1.0) || isinf(m->rope_factor))
            problem(p, "rope_factor", "is %g; it must be at least 1", m->rope_factor);
        need_positive(p, "rope_low_freq", m->rope_low_freq);
        if (!(m->rope_high_freq > m->rope_low_freq) || isinf(m->rope_high_freq))
            problem(p, "rope_high_freq", "is %g; it must be above rope_low_freq = %g",
                    m->rope_high_freq, m->rope_low_freq);
        need_range(p, "rope_original_max", m->rope_original_max, 1, INT64_C(1) << 30);
    }
}

static void check_mamba(struct model_problem *p, const struct ht_model_config *m)
{
    need_range(p, "ssm_heads", m->ssm_heads, 1, 65536);
    need_range(p, "ssm_d_head", m->ssm_d_head, 8, 256);
    need_range(p, "d_inner", m->d_inner, 8, 1 << 20);
    need_range(p, "d_state", m->d_state, 8, 256);
    need_range(p, "n_groups", m->n_groups, 1, 4096);
    need_range(p, "d_conv", m->d_conv, 2, 4);
    need_range(p, "chunk", m->chunk, 16, 256);
    if (p->key) return;
    if (m->ssm_heads * m->ssm_d_head != m->d_inner)
        problem(p, "ssm_heads",
                "is %" PRId64 "; ssm_heads * ssm_d_head (%" PRId64 ") must be d_inner = %" PRId64,
                m->ssm_heads, m->ssm_d_head, m->d_inner);
    need_multiple(p, "ssm_d_head", m->ssm_d_head, 8, "");
    need_multiple(p, "d_state", m->d_state, 8, "");
    if (m->ssm_heads % m->n_groups)
        problem(p, "n_groups", "is %" PRId64 "; it must divide ssm_heads = %" PRId64, m->n_groups,
                m->ssm_heads);
    if (m->d_inner / m->n_groups % 8)
        problem(p, "n_groups", "is %" PRId64 "; d_inner / n_groups must be a multiple of 8",
                m->n_groups);
    if (m->chunk & (m->chunk - 1))
        problem(p, "chunk", "is %" PRId64 "; it must be a power of two from 16 to 256", m->chunk);
    if (!(m->dt_limit_min >= 0.0f) || !(m->dt_limit_max > m->dt_limit_min) ||
        isinf(m->dt_limit_min))
        problem(p, "dt_limit_max",
                "is %g; it must be above dt_limit_min = %g, which must be at least 0",
                (double)m->dt_limit_max, (double)m->dt_limit_min);
    need_positive(p, "dt_init_min", (double)m->dt_init_min);
    need_positive(p, "dt_init_floor", (double)m->dt_init_floor);
    if (!(m->dt_init_max >= m->dt_init_min) || isinf(m->dt_init_max))
        problem(p, "dt_init_max", "is %g; it must be at least dt_init_min = %g",
                (double)m->dt_init_max, (double)m->dt_init_min);
}

static void check_family(struct model_problem *p, const struct ht_model_config *m,
                         int64_t n_attention)
{
    if (m->naming == HT_NAMING_LLAMA && n_attention != m->n_layers)
        problem(p, "arch",
                "is llama, and %" PRId64 " of %" PRId64
                " layers are Mamba-2; use bamba for a hybrid",
                m->n_layers - n_attention, m->n_layers);
    if (m->naming == HT_NAMING_MAMBA2 && n_attention)
        problem(p, "arch",
                "is mamba2, and %" PRId64 " layers are attention; use bamba for a hybrid",
                n_attention);
    if (m->naming == HT_NAMING_MAMBA2 && m->d_ff)
        problem(p, "d_ff", "is %" PRId64 "; mamba2 has no MLP (use bamba, or d_ff = 0)", m->d_ff);
    if (m->naming != HT_NAMING_MAMBA2 && !m->d_ff)
        problem(p, "d_ff", "is 0; every layer of bamba and llama has an MLP");
}

void model_find_problem(struct model_problem *p, const struct ht_model_config *m)
{
    int64_t n_attention = 0;

    *p = (struct model_problem){ 0 };
    need_range(p, "arch", (int64_t)m->naming, HT_NAMING_BAMBA, HT_NAMING_MAMBA2);
    need_range(p, "vocab_size", m->vocab_size, 1, 1 << 24);
    need_range(p, "d_model", m->d_model, 1, 65536);
    need_range(p, "n_layers", m->n_layers, 1, HT_MAX_LAYERS);
    need_range(p, "d_ff", m->d_ff, 0, 1 << 20);
    if (p->key) return;
    for (int64_t i = 0; i < m->n_layers; i++) n_attention += m->layer_kind[i] == HT_LAYER_ATTENTION;
    check_family(p, m, n_attention);
    if (n_attention) check_attention(p, m);
    if (n_attention < m->n_layers) check_mamba(p, m);
    if (m->d_ff * m->d_model % 64)
        problem(p, "d_ff",
                "is %" PRId64 "; d_ff * d_model must be a multiple of 64 (d_model is %" PRId64 ")",
                m->d_ff, m->d_model);
    need_positive(p, "norm_eps", (double)m->norm_eps);
    need_positive(p, "embedding_multiplier", (double)m->embedding_multiplier);
    need_positive(p, "residual_multiplier", (double)m->residual_multiplier);
    need_positive(p, "logits_scaling", (double)m->logits_scaling);
    need_positive(p, "residual_init_div", m->residual_init_div);
}

enum ht_status ht_model_config_check(const struct ht_model_config *m, const char *where)
{
    struct model_problem p;

    model_find_problem(&p, m);
    if (!p.key) return HT_OK;
    return HT_FAIL(HT_ERR_RECIPE, "%s: model.%s %s", where, p.key, p.text);
}
