/* core/config/recipe_resolve.c: values to config: derived defaults, and what concerns several keys.
 */
#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/recipe_impl.h"

struct resolver {
    struct ht_config *out;
    const struct ht_recipe *r;
};

static const struct recipe_value *value(const struct resolver *v, const char *section,
                                        const char *name)
{
    const int key = recipe_find(section, name);

    assert(key >= 0);
    return &v->r->values[key];
}

static bool given(const struct resolver *v, const char *section, const char *name)
{
    return value(v, section, name)->set;
}

/* "a.cfg:14: model.chunk": the value with its place, for the start of a message. */
#define NAME_BYTES (RECIPE_WHERE_BYTES + 64)
static const char *named(char out[NAME_BYTES], const struct resolver *v, const char *section,
                         const char *name)
{
    char where[RECIPE_WHERE_BYTES];

    recipe_where(where, v->r, value(v, section, name));
    snprintf(out, NAME_BYTES, "%s: %s.%s", where, section, name);
    return out;
}

/* ---- fields that are copied as they are ---- */

static void store(struct ht_config *c, const struct recipe_key *k, const struct recipe_value *v)
{
    char *field = (char *)c + k->offset;
    const float f = (float)v->d;
    const int number = (int)v->i;
    const bool flag = k->type == RECIPE_CHOICE ? v->i == 0 : v->i != 0;

    switch (k->type) {
    case RECIPE_TEXT: snprintf(field, k->size, "%s", v->text); break;
    case RECIPE_REAL:
    case RECIPE_SECONDS:
        if (k->size == sizeof f)
            memcpy(field, &f, sizeof f);
        else
            memcpy(field, &v->d, sizeof v->d);
        break;
    default:
        if (k->size == sizeof flag)
            memcpy(field, &flag, sizeof flag);
        else if (k->size == sizeof number)
            memcpy(field, &number, sizeof number);
        else
            memcpy(field, &v->i, sizeof v->i);
    }
}

static void store_fields(const struct resolver *v)
{
    for (int i = 0; i < recipe_n_keys; i++)
        if (recipe_keys[i].size && v->r->values[i].set)
            store(v->out, &recipe_keys[i], &v->r->values[i]);
}

/* ---- model ---- */

static enum ht_status bad_layer(const struct resolver *v, const char *key, int64_t layer)
{
    char at[NAME_BYTES];

    return HT_FAIL(HT_ERR_RECIPE, "%s names layer %" PRId64 "; the layers are 0 to %" PRId64,
                   named(at, v, "model", key), layer, v->out->model.n_layers - 1);
}

static enum ht_status layer_types(const struct resolver *v, const struct recipe_value *types)
{
    struct ht_model_config *m = &v->out->model;
    char at[NAME_BYTES];

    if (types->n_items != m->n_layers)
        return HT_FAIL(HT_ERR_RECIPE, "%s has %d entries; model.n_layers is %" PRId64,
                       named(at, v, "model", "layer_types"), types->n_items, m->n_layers);
    for (int i = 0; i < types->n_items; i++) {
        if (!strcmp(types->items[i].text, "attention"))
            m->layer_kind[i] = HT_LAYER_ATTENTION;
        else if (strcmp(types->items[i].text, "mamba"))
            return HT_FAIL(HT_ERR_RECIPE,
                           "%s: entry %d is \"%.40s\"; it must be \"mamba\" or \"attention\"",
                           named(at, v, "model", "layer_types"), i, types->items[i].text);
    }
    return HT_OK;
}

static enum ht_status layers(const struct resolver *v)
{
    struct ht_model_config *m = &v->out->model;
    const struct recipe_value *list = value(v, "model", "attention_layers");
    const struct recipe_value *types = value(v, "model", "layer_types");
    const struct recipe_value *every = value(v, "model", "attention_every");
    const struct recipe_value *offset = value(v, "model", "attention_offset");
    char at[NAME_BYTES];

    if (list->set) {
        for (int i = 0; i < list->n_items; i++) {
            if (list->items[i].i >= m->n_layers)
                return bad_layer(v, "attention_layers", list->items[i].i);
            m->layer_kind[list->items[i].i] = HT_LAYER_ATTENTION;
        }
    } else if (types->set) {
        HT_TRY(layer_types(v, types));
    } else if (every->set) {
        const int64_t first = offset->set ? offset->i : every->i / 2;
        if (first >= every->i)
            return HT_FAIL(HT_ERR_RECIPE,
                           "%s is %" PRId64 "; it must be below model.attention_every = %" PRId64,
                           named(at, v, "model", "attention_offset"), first, every->i);
        for (int64_t i = first; i < m->n_layers; i += every->i)
            m->layer_kind[i] = HT_LAYER_ATTENTION;
    } else if (offset->set) {
        return HT_FAIL(HT_ERR_RECIPE, "%s is given without model.attention_every",
                       named(at, v, "model", "attention_offset"));
    } else if (m->naming == HT_NAMING_LLAMA) {
        memset(m->layer_kind, HT_LAYER_ATTENTION, (size_t)m->n_layers);
    }
    return HT_OK;
}

static enum ht_status attention(const struct resolver *v)
{
    struct ht_model_config *m = &v->out->model;
    char at[NAME_BYTES];

    if (!given(v, "model", "n_heads"))
        return HT_FAIL(HT_ERR_RECIPE, "%s is missing; the model has attention layers",
                       named(at, v, "model", "n_heads"));
    if (!given(v, "model", "n_kv_heads")) m->n_kv_heads = m->n_heads;
    if (!given(v, "model", "d_head")) {
        if (m->d_model % m->n_heads)
            return HT_FAIL(HT_ERR_RECIPE,
                           "%s is %" PRId64 "; it must divide model.d_model = %" PRId64
                           " (or give model.d_head)",
                           named(at, v, "model", "n_heads"), m->n_heads, m->d_model);
        m->d_head = m->d_model / m->n_heads;
    }
    const struct recipe_value *fraction = value(v, "model", "rope_fraction");
    const double share = fraction->set ? fraction->d : m->naming == HT_NAMING_LLAMA ? 1.0 : 0.5;
    const double dims = share * (double)m->d_head;
    m->rope_dims = (int64_t)llround(dims);
    if (fabs(dims - (double)m->rope_dims) > 1e-6 || m->rope_dims % 2)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s is %g, which turns %g of the %" PRId64
                       " dimensions of a head; it must be an "
                       "even number of them",
                       named(at, v, "model", "rope_fraction"), share, dims, m->d_head);
    if (value(v, "model", "rope_scaling")->i) {
        m->rope_factor = value(v, "model", "rope_factor")->d;
        m->rope_low_freq = value(v, "model", "rope_low_freq")->d;
        m->rope_high_freq = value(v, "model", "rope_high_freq")->d;
        m->rope_original_max = value(v, "model", "rope_original_max")->i;
    }
    if (!given(v, "model", "attention_scale"))
        m->attention_scale = (float)(1.0 / sqrt((double)m->d_head));
    return HT_OK;
}

static enum ht_status mamba(const struct resolver *v)
{
    struct ht_model_config *m = &v->out->model;
    const struct recipe_value *expand = value(v, "model", "expand");
    char at[NAME_BYTES];

    if (!given(v, "model", "d_inner")) {
        const double factor = expand->set ? expand->d : 2.0;
        const double wide = factor * (double)m->d_model;
        if (wide != nearbyint(wide))
            return HT_FAIL(HT_ERR_RECIPE,
                           "%s is %g; expand * d_model is %g, which must be a whole number",
                           named(at, v, "model", "expand"), factor, wide);
        m->d_inner = (int64_t)wide;
    }
    if (!given(v, "model", "ssm_heads")) {
        if (m->d_inner % m->ssm_d_head)
            return HT_FAIL(HT_ERR_RECIPE, "%s is %" PRId64 "; it must divide d_inner = %" PRId64,
                           named(at, v, "model", "ssm_d_head"), m->ssm_d_head, m->d_inner);
        m->ssm_heads = m->d_inner / m->ssm_d_head;
    }
    return HT_OK;
}

static double init_divisor(const struct resolver *v)
{
    const char *text = value(v, "model", "residual_init_div")->text;
    const double n_layers = (double)v->out->model.n_layers;

    if (!strcmp(text, "sqrt(L)")) return sqrt(n_layers);
    if (!strcmp(text, "sqrt(2L)")) return sqrt(2.0 * n_layers);
    return strtod(text, NULL);
}

/* Sizes of mixers that the model has not got are 0, whatever the recipe says. */
static void clear_absent(struct ht_model_config *m, bool has_attention, bool has_mamba)
{
    if (!has_attention) {
        m->n_heads = m->n_kv_heads = m->d_head = m->rope_dims = 0;
        m->attention_scale = 0.0f;
    }
    if (!has_mamba)
        m->d_inner = m->ssm_heads = m->ssm_d_head = m->d_state = m->n_groups = m->d_conv =
            m->chunk = 0;
}

static enum ht_status model(const struct resolver *v)
{
    struct ht_model_config *m = &v->out->model;
    bool has_attention = false, has_mamba = false;
    char at[NAME_BYTES];
    struct model_problem p;

    HT_TRY(layers(v));
    for (int64_t i = 0; i < m->n_layers; i++) {
        has_attention |= m->layer_kind[i] == HT_LAYER_ATTENTION;
        has_mamba |= m->layer_kind[i] == HT_LAYER_MAMBA;
    }
    if (m->naming != HT_NAMING_MAMBA2 && !given(v, "model", "d_ff"))
        return HT_FAIL(HT_ERR_RECIPE, "%s is missing; every layer of bamba and llama has an MLP",
                       named(at, v, "model", "d_ff"));
    if (has_attention) HT_TRY(attention(v));
    if (has_mamba) HT_TRY(mamba(v));
    clear_absent(m, has_attention, has_mamba);
    if (!given(v, "model", "max_position")) m->max_position = v->out->data.seq_len;
    m->residual_init_div = init_divisor(v);
    model_find_problem(&p, m);
    if (!p.key) return HT_OK;
    return HT_FAIL(HT_ERR_RECIPE, "%s %s", named(at, v, "model", p.key), p.text);
}

/* ---- data ---- */

static void datasets(struct ht_dataset_config *out, int *n, const struct recipe_value *list)
{
    *n = list->n_items; // at most HT_MAX_DATASETS: checked when it was read
    for (int i = 0; i < list->n_items; i++) {
        snprintf(out[i].path, sizeof out[i].path, "%s", list->items[i].text);
        out[i].weight = list->items[i].weight;
    }
}

/* ---- length of the run and its parts ---- */

static enum ht_status precision(const struct resolver *v)
{
    const struct ht_config *c = v->out;
    char at[NAME_BYTES];

    if (c->train.linear_dtype != HT_LINEAR_FP8) return HT_OK;
    named(at, v, "train", "linear_dtype");
    if (c->train.precision != HT_DTYPE_BF16)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s is \"fp8\" and train.precision is \"fp32\"; set that to \"bf16\"", at);
    if (c->parallel.device == HT_DEVICE_CPU)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s is \"fp8\" and parallel.device is \"cpu\"; only GPUs multiply fp8: set "
                       "train.linear_dtype to \"model\"",
                       at);
    return HT_OK;
}

static int64_t steps_of(int64_t n_tokens, int64_t batch)
{
    return n_tokens / batch + (n_tokens % batch != 0);
}

static enum ht_status batch(const struct resolver *v, int n_ranks)
{
    const struct ht_config *c = v->out;
    const int64_t per_pass = c->data.seq_len * c->train.micro_batch;
    char at[NAME_BYTES];

    if (per_pass > INT32_MAX / 2)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s is %" PRId64 "; micro_batch * data.seq_len is %" PRId64
                       " tokens, at most %d fit in a pass",
                       named(at, v, "train", "micro_batch"), c->train.micro_batch, per_pass,
                       INT32_MAX / 2);
    const int64_t unit = per_pass * n_ranks, wanted = c->train.global_batch_tokens;
    if (wanted % unit) {
        const int64_t below = wanted / unit * unit;
        char nearest[64];
        if (below)
            snprintf(nearest, sizeof nearest, "%" PRId64 " or %" PRId64, below, below + unit);
        else
            snprintf(nearest, sizeof nearest, "%" PRId64, unit);
        return HT_FAIL(
            HT_ERR_RECIPE,
            "%s is %" PRId64
            "; it must be a multiple of data.seq_len * train.micro_batch * ranks = %" PRId64
            " * %" PRId64 " * %d = %" PRId64 "; nearest: %s",
            named(at, v, "train", "global_batch_tokens"), wanted, c->data.seq_len,
            c->train.micro_batch, n_ranks, unit, nearest);
    }
    return HT_OK;
}

static enum ht_status length(const struct resolver *v)
{
    struct ht_config *c = v->out;
    const struct recipe_value *tokens = value(v, "train", "total_tokens");
    const struct recipe_value *steps = value(v, "train", "steps");
    const int64_t size = c->train.global_batch_tokens;

    if (!tokens->set && !steps->set)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s: train.total_tokens or train.steps is missing: the length of "
                       "the run",
                       v->r->files[0]);
    c->train.total_steps = tokens->set ? steps_of(tokens->i, size) : steps->i;
    return HT_OK;
}

static enum ht_status schedule(const struct resolver *v)
{
    struct ht_config *c = v->out;
    struct ht_schedule_config *s = &c->schedule;
    const int64_t size = c->train.global_batch_tokens, total = c->train.total_steps;
    const struct recipe_value *warmup = value(v, "schedule", "warmup_tokens");
    const struct recipe_value *decay = value(v, "schedule", "decay_tokens");
    char at[NAME_BYTES];

    if (warmup->set)
        s->warmup_steps = steps_of(warmup->i, size);
    else if (!given(v, "schedule", "warmup_steps"))
        s->warmup_steps = total / 20 < 2000 ? total / 20 : 2000; // as the Bamba runs (spec 6.3)
    if (decay->set)
        s->decay_steps = steps_of(decay->i, size);
    else if (!given(v, "schedule", "decay_steps"))
        s->decay_steps = s->kind == HT_SCHEDULE_WSD ? total / 10 : 0;
    if (s->warmup_steps > total)
        return HT_FAIL(HT_ERR_RECIPE, "%s gives %" PRId64 " steps; the whole run has %" PRId64,
                       named(at, v, "schedule", warmup->set ? "warmup_tokens" : "warmup_steps"),
                       s->warmup_steps, total);
    if (s->kind == HT_SCHEDULE_WSD && s->decay_steps > total - s->warmup_steps)
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s gives %" PRId64 " steps; after the warm-up the run has %" PRId64,
                       named(at, v, "schedule", decay->set ? "decay_tokens" : "decay_steps"),
                       s->decay_steps, total - s->warmup_steps);
    return HT_OK;
}

static enum ht_status names(const struct resolver *v)
{
    const struct ht_train_config *t = &v->out->train;
    char at[NAME_BYTES];

    if (!*t->name || *t->name == '.' || strchr(t->name, '/'))
        return HT_FAIL(HT_ERR_RECIPE,
                       "%s is \"%s\"; it names a folder: not empty, no slash, no dot at the start",
                       named(at, v, "train", "name"), t->name);
    if (!*t->out_dir)
        return HT_FAIL(HT_ERR_RECIPE, "%s is empty; use \".\" for the current folder",
                       named(at, v, "train", "out_dir"));
    if (!*t->resume)
        return HT_FAIL(HT_ERR_RECIPE, "%s is empty; use \"auto\", \"never\" or a checkpoint folder",
                       named(at, v, "train", "resume"));
    return HT_OK;
}

enum ht_status recipe_resolve(struct ht_config *out, const struct ht_recipe *r, int n_ranks)
{
    const struct resolver v = { out, r };

    if (n_ranks < 1) return HT_FAIL(HT_ERR_ARG, "%d ranks; at least 1", n_ranks);
    store_fields(&v);
    HT_TRY(model(&v));
    datasets(out->data.train, &out->data.n_train, value(&v, "data", "train"));
    datasets(out->data.eval, &out->data.n_eval, value(&v, "data", "eval"));
    HT_TRY(precision(&v));
    HT_TRY(batch(&v, n_ranks));
    HT_TRY(length(&v));
    HT_TRY(schedule(&v));
    return names(&v);
}
