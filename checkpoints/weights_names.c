/* checkpoints/weights_names.c: stored names -> tensors of the model. */
#include "checkpoints/weights_names.h"

#include <stdlib.h>
#include <string.h>

static bool has_suffix(const char *name, const char *suffix)
{
    const size_t n = strlen(name), m = strlen(suffix);
    return n >= m && strcmp(name + n - m, suffix) == 0;
}

static int one(const struct ht_tensor_info *targets[3], const struct ht_tensor_info *t)
{
    targets[0] = t;
    return t ? 1 : HT_WEIGHT_UNKNOWN;
}

/* Names of tensors that hold exactly one of ours, below backbone.layers.I. */
static const struct {
    const char *name;
    enum ht_tensor_role mamba, attention; // ROLE_COUNT: not in such a layer
} layer_names[] = {
    { "norm.weight", HT_T_NORM1, HT_T_NORM1 },
    { "norm2.weight", HT_T_NORM2, HT_T_NORM2 },
    { "mixer.in_proj.weight", HT_T_IN_PROJ, HT_T_ROLE_COUNT },
    { "mixer.out_proj.weight", HT_T_OUT_PROJ, HT_T_O },
    { "mixer.conv1d.weight", HT_T_CONV_W, HT_T_ROLE_COUNT },
    { "mixer.conv1d.bias", HT_T_CONV_B, HT_T_ROLE_COUNT },
    { "mixer.dt_bias", HT_T_DT_BIAS, HT_T_ROLE_COUNT },
    { "mixer.A_log", HT_T_A_LOG, HT_T_ROLE_COUNT },
    { "mixer.D", HT_T_D, HT_T_ROLE_COUNT },
    { "mixer.norm.weight", HT_T_GATED_NORM, HT_T_ROLE_COUNT },
    { "mlp.fc2.weight", HT_T_DOWN, HT_T_DOWN },
};

static int layer_targets(const struct ht_tensor_info *targets[3], const char *name, int layer,
                         const struct ht_tensor_list *list, const struct ht_model_config *m)
{
    const bool attention = m->layer_kind[layer] == HT_LAYER_ATTENTION;

    if (strcmp(name, "mlp.fc1.weight") == 0) {
        targets[0] = ht_tensor_find(list, layer, HT_T_UP);
        targets[1] = ht_tensor_find(list, layer, HT_T_GATE);
        return targets[0] && targets[1] ? 2 : HT_WEIGHT_UNKNOWN;
    }
    if (attention && strcmp(name, "mixer.in_proj.weight") == 0) {
        targets[0] = ht_tensor_find(list, layer, HT_T_Q);
        targets[1] = ht_tensor_find(list, layer, HT_T_K);
        targets[2] = ht_tensor_find(list, layer, HT_T_V);
        return targets[0] && targets[1] && targets[2] ? 3 : HT_WEIGHT_UNKNOWN;
    }
    for (size_t i = 0; i < sizeof layer_names / sizeof *layer_names; i++)
        if (strcmp(name, layer_names[i].name) == 0) {
            const enum ht_tensor_role role =
                attention ? layer_names[i].attention : layer_names[i].mamba;
            if (role == HT_T_ROLE_COUNT) return HT_WEIGHT_UNKNOWN;
            return one(targets, ht_tensor_find(list, layer, role));
        }
    return HT_WEIGHT_UNKNOWN;
}

static int state_spaces_targets(const struct ht_tensor_info *targets[3], const char *name,
                                const struct ht_tensor_list *list, const struct ht_model_config *m)
{
    static const char layers[] = "layers.";
    char *end;

    if (strcmp(name, "embedding.weight") == 0 || strcmp(name, "embeddings.weight") == 0)
        return one(targets, ht_tensor_find(list, -1, HT_T_EMBED));
    if (strcmp(name, "norm_f.weight") == 0)
        return one(targets, ht_tensor_find(list, -1, HT_T_FINAL_NORM));
    if (strncmp(name, layers, sizeof layers - 1) != 0) return HT_WEIGHT_UNKNOWN;
    name += sizeof layers - 1;
    if (*name < '0' || *name > '9') return HT_WEIGHT_UNKNOWN;
    const long layer = strtol(name, &end, 10);
    if (*end != '.' || layer < 0 || layer >= m->n_layers) return HT_WEIGHT_UNKNOWN;
    return layer_targets(targets, end + 1, (int)layer, list, m);
}

int ht_weights_targets(const struct ht_tensor_info *targets[3], const char *name,
                       const struct ht_tensor_list *list, const struct ht_model_config *m)
{
    static const char backbone[] = "backbone.";
    const struct ht_tensor_info *t = ht_tensor_find_name(list, name);

    if (t) return one(targets, t);
    // Codestral's files put one more "model." before everything
    if (strncmp(name, "model.backbone.", 15) == 0 || strcmp(name, "model.lm_head.weight") == 0)
        name += 6;
    if (strcmp(name, "lm_head.weight") == 0)
        return m->tied_head ? HT_WEIGHT_IGNORED : one(targets, ht_tensor_find(list, -1, HT_T_HEAD));
    if (has_suffix(name, ".rotary_emb.inv_freq")) return HT_WEIGHT_IGNORED;
    if (strncmp(name, backbone, sizeof backbone - 1) != 0) return HT_WEIGHT_UNKNOWN;
    return state_spaces_targets(targets, name + sizeof backbone - 1, list, m);
}
