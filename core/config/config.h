/* core/config/config.h: the checked configuration of a run, in plain structs [2].
 *
 * A recipe (core/config/recipe.h) fills it; every field is valid afterwards: ranges checked,
 * defaults applied, derived sizes set. Nothing below programs/ reads a recipe in any other way. The
 * table in recipe.c is the only place where a key's name, type, default, bound and meaning are
 * written; docs/recipes.md is generated from it.
 */
#ifndef HT_CONFIG_CONFIG_H
#define HT_CONFIG_CONFIG_H

#include <stdbool.h>
#include <stdint.h>

#include "core/base/dtype.h"

#define HT_MAX_LAYERS 512
#define HT_MAX_DATASETS 64
#define HT_MAX_PATH 1024

enum ht_layer_kind { HT_LAYER_MAMBA, HT_LAYER_ATTENTION };
enum ht_naming {
    HT_NAMING_BAMBA,
    HT_NAMING_LLAMA,
    HT_NAMING_MAMBA2
}; // whose weight names are used

struct ht_model_config {
    enum ht_naming naming;
    int64_t vocab_size, d_model, n_layers;
    uint8_t layer_kind[HT_MAX_LAYERS]; // enum ht_layer_kind
    // attention
    int64_t n_heads, n_kv_heads, d_head;
    int64_t rope_dims; // even, 0 = no position encoding; recipe: rope_fraction * d_head
    double rope_theta;
    double rope_factor, rope_low_freq, rope_high_freq; // "llama3" scaling; factor 0 = none
    int64_t rope_original_max, max_position;           // positions that tables are made for
    float attention_scale;                             // resolved: 1/sqrt(d_head) unless given
    // Mamba-2
    int64_t d_inner, ssm_heads, ssm_d_head, d_state, n_groups, d_conv, chunk;
    bool conv_bias, gated_norm_full;
    float dt_limit_min, dt_limit_max; // clamp after softplus; 0, INFINITY
    float dt_init_min, dt_init_max, dt_init_floor;
    // both
    int64_t d_ff; // 0 = no MLP in any layer
    float norm_eps, embedding_multiplier, residual_multiplier, logits_scaling;
    bool tied_head;
    bool residual_fp32;       // false: residual rounded to the model dtype after each addition
    double residual_init_div; // divisor of the initial out projections (spec 5); resolved
};

struct ht_dataset_config {
    char path[HT_MAX_PATH]; // token shard (.h5) or a folder of them
    double weight;          // share of tokens, relative
};

struct ht_data_config {
    int n_train, n_eval;
    struct ht_dataset_config train[HT_MAX_DATASETS], eval[HT_MAX_DATASETS];
    char tokenizer[HT_MAX_PATH]; // tokenizer.json, copied into checkpoints; may be empty
    int64_t seq_len;
    bool pack_leak; // true: documents of a row see each other (Bamba's pretraining)
    bool shuffle;
    int64_t shuffle_window_rows; // rows shuffled together, 1 = none
    uint64_t seed;
    int64_t prefetch_batches;
};

enum ht_linear_dtype { HT_LINEAR_AS_MODEL, HT_LINEAR_FP8 };
enum ht_recompute { HT_RECOMPUTE_NONE, HT_RECOMPUTE_SELECTIVE, HT_RECOMPUTE_FULL };
enum ht_decay_rule { HT_DECAY_MATRICES, HT_DECAY_ALL, HT_DECAY_SSM_EXEMPT };
enum ht_schedule { HT_SCHEDULE_COSINE, HT_SCHEDULE_LINEAR, HT_SCHEDULE_CONSTANT, HT_SCHEDULE_WSD };
enum ht_warmup { HT_WARMUP_LINEAR, HT_WARMUP_QUADRATIC };

struct ht_train_config {
    char name[256]; // run name; run folder is out_dir/name
    char out_dir[HT_MAX_PATH];
    char init_from[HT_MAX_PATH]; // weights to start from (checkpoint or HF folder), empty = random
    char resume[HT_MAX_PATH];    // "auto", "never", or a checkpoint folder
    enum ht_dtype precision;     // F32 or BF16
    enum ht_linear_dtype linear_dtype; // of the projections' products
    uint64_t seed;
    int64_t global_batch_tokens, micro_batch; // micro_batch: rows of seq_len per rank and pass
    int64_t total_steps;                      // resolved from total_tokens or steps
    enum ht_recompute recompute;
    float z_loss, grad_clip; // grad_clip 0 = off
    int64_t max_bad_steps;   // non-finite steps in a row before the run stops
    int threads;             // OpenMP threads per rank; 0 = cores / local ranks
};

struct ht_optimizer_config {
    float lr, beta1, beta2, eps, weight_decay;
    enum ht_decay_rule decay;
};

struct ht_schedule_config {
    enum ht_schedule kind;
    enum ht_warmup warmup;
    int64_t warmup_steps, decay_steps; // resolved; decay_steps for WSD
    float min_lr_ratio;
};

enum ht_device_choice { HT_DEVICE_AUTO, HT_DEVICE_CPU, HT_DEVICE_CUDA };

struct ht_parallel_config {
    enum ht_device_choice device;
    bool share_gpus;      // more ranks on a host than it has GPUs
    int zero_stage;       // 0 to 3
    int64_t bucket_bytes; // gradient bucket
    enum ht_dtype wire;   // F32 or BF16: in which gradients travel
    double timeout_s;
};

struct ht_checkpoint_config {
    int64_t every_steps; // 0 = only at the end
    int keep_last;
    int64_t keep_every; // steps kept for ever, 0 = none
    bool background;
    bool on_full_pause;
};

struct ht_log_config {
    int64_t every_steps;
    bool tensorboard, plot;
};

struct ht_eval_config {
    int64_t every_steps; // 0 = only at the end
    int64_t max_tokens;  // per evaluation, 0 = all
};

struct ht_config {
    struct ht_model_config model;
    struct ht_data_config data;
    struct ht_train_config train;
    struct ht_optimizer_config optimizer;
    struct ht_schedule_config schedule;
    struct ht_parallel_config parallel;
    struct ht_checkpoint_config checkpoint;
    struct ht_log_config log;
    struct ht_eval_config eval;
};

/* Derived widths used everywhere. */
static inline int64_t ht_conv_channels(const struct ht_model_config *m)
{
    return m->d_inner + 2 * m->n_groups * m->d_state;
}
static inline int64_t ht_in_proj_width(const struct ht_model_config *m)
{
    return 2 * m->d_inner + 2 * m->n_groups * m->d_state + m->ssm_heads;
}
static inline int64_t ht_qkv_width(const struct ht_model_config *m)
{
    return (m->n_heads + 2 * m->n_kv_heads) * m->d_head;
}

#endif
