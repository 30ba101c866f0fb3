/* core/config/recipe_table.c: the keys of a recipe. */
#include "core/config/recipe_table.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "core/config/config.h"

#define FIELD(f) offsetof(struct ht_config, f), sizeof(((struct ht_config *)0)->f)
#define NO_FIELD 0, 0
#define NO_LIMIT 0, 0
#define BIG 9e15 // counts are exact in a double up to here
#define ONE_BELOW 0.9999999

const struct recipe_section recipe_sections[] = {
    { "model", "the network" },
    { "data", "what it reads" },
    { "train", "the run: its length, its batch, its precision" },
    { "optimizer", "AdamW" },
    { "schedule", "the learning rate over time" },
    { "parallel", "how ranks share the work" },
    { "checkpoint", "what is saved, and when" },
    { "log", "what is reported, and when" },
    { "eval", "evaluation on held-out data during the run" },
    { NULL, NULL },
};

const struct recipe_key recipe_keys[] = {
    // section, name, type, field, default, derived default, bounds, choices, unit, meaning,
    // exclusive
    { "model", "arch", RECIPE_CHOICE, FIELD(model.naming), NULL, NULL, NO_LIMIT,
      "bamba|llama|mamba2", "",
      "family, whose weight names are used: `bamba` mixes Mamba-2 and attention layers, each with "
      "an "
      "MLP; `llama` is a transformer; `mamba2` has Mamba-2 layers only, without MLP",
      NULL, 0 },
    { "model", "vocab_size", RECIPE_COUNT, FIELD(model.vocab_size), NULL, NULL, 1, 1 << 24, NULL,
      "tokens", "rows of embedding and head; at least the tokenizer's size", NULL, 0 },
    { "model", "d_model", RECIPE_INT, FIELD(model.d_model), NULL, NULL, 1, 65536, NULL, "",
      "width of the residual stream", NULL, 0 },
    { "model", "n_layers", RECIPE_INT, FIELD(model.n_layers), NULL, NULL, 1, HT_MAX_LAYERS, NULL,
      "", "layers; a layer is a mixer and, if d_ff > 0, an MLP", NULL, 0 },
    { "model", "attention_layers", RECIPE_INT_LIST, NO_FIELD, NULL,
      "none for bamba and mamba2, all for llama", 0, HT_MAX_LAYERS - 1, NULL, "",
      "layers whose mixer is attention, counted from 0; all others are Mamba-2", "layers", 1 },
    { "model", "layer_types", RECIPE_TEXT_LIST, NO_FIELD, NULL, "see attention_layers", NO_LIMIT,
      NULL, "", "the same as a list of `\"mamba\"` and `\"attention\"`, one per layer", "layers",
      2 },
    { "model", "attention_every", RECIPE_INT, NO_FIELD, NULL, "see attention_layers", 1,
      HT_MAX_LAYERS, NULL, "layers",
      "the same as a period: layer i is attention when "
      "i % attention_every == attention_offset",
      "layers", 3 },
    { "model", "attention_offset", RECIPE_INT, NO_FIELD, NULL, "attention_every / 2", 0,
      HT_MAX_LAYERS, NULL, "", "see attention_every", "layers", 3 },
    { "model", "n_heads", RECIPE_INT, FIELD(model.n_heads), NULL, "required with attention layers",
      1, 65536, NULL, "", "query heads of attention", NULL, 0 },
    { "model", "n_kv_heads", RECIPE_INT, FIELD(model.n_kv_heads), NULL, "n_heads", 1, 65536, NULL,
      "", "key and value heads; divides n_heads", NULL, 0 },
    { "model", "d_head", RECIPE_INT, FIELD(model.d_head), NULL, "d_model / n_heads", 8, 256, NULL,
      "", "width of an attention head, a multiple of 8", NULL, 0 },
    { "model", "rope_fraction", RECIPE_REAL, NO_FIELD, NULL, "0.5 for bamba, 1 for llama", 0, 1,
      NULL, "", "share of d_head that rotary position encoding turns; 0 = no position encoding",
      NULL, 0 },
    { "model", "rope_theta", RECIPE_REAL, FIELD(model.rope_theta), "10000.0", NULL, 1, 1e12, NULL,
      "", "base of the rotary wavelengths", NULL, 0 },
    { "model", "rope_scaling", RECIPE_CHOICE, NO_FIELD, "none", NULL, NO_LIMIT, "none|llama3", "",
      "stretching of long wavelengths for contexts beyond the original one", NULL, 0 },
    { "model", "rope_factor", RECIPE_REAL, NO_FIELD, "8.0", NULL, 1, 1e6, NULL, "",
      "llama3 scaling: stretch of the longest wavelengths", NULL, 0 },
    { "model", "rope_low_freq", RECIPE_REAL, NO_FIELD, "1.0", NULL, 1e-3, 1e6, NULL, "",
      "llama3 scaling: wavelengths above original / this are stretched in full", NULL, 0 },
    { "model", "rope_high_freq", RECIPE_REAL, NO_FIELD, "4.0", NULL, 1e-3, 1e6, NULL, "",
      "llama3 scaling: wavelengths below original / this are kept", NULL, 0 },
    { "model", "rope_original_max", RECIPE_COUNT, NO_FIELD, "8192", NULL, 1, 1 << 30, NULL,
      "tokens", "llama3 scaling: context of the original training", NULL, 0 },
    { "model", "max_position", RECIPE_COUNT, FIELD(model.max_position), NULL, "data.seq_len", 1,
      1 << 30, NULL, "tokens", "longest sequence that the model is meant for", NULL, 0 },
    { "model", "attention_scale", RECIPE_REAL, FIELD(model.attention_scale), NULL,
      "1 / sqrt(d_head)", 1e-6, 1e3, NULL, "", "factor of q k^T before the softmax", NULL, 0 },
    { "model", "expand", RECIPE_REAL, NO_FIELD, NULL, "2", 1e-3, 64, NULL, "",
      "width of the Mamba-2 mixer as a multiple of d_model", "inner", 1 },
    { "model", "d_inner", RECIPE_INT, FIELD(model.d_inner), NULL, "expand * d_model", 8, 1 << 20,
      NULL, "", "width of the Mamba-2 mixer = ssm_heads * ssm_d_head", "inner", 2 },
    { "model", "ssm_heads", RECIPE_INT, FIELD(model.ssm_heads), NULL, "d_inner / ssm_d_head", 1,
      65536, NULL, "", "heads of the Mamba-2 mixer", NULL, 0 },
    { "model", "ssm_d_head", RECIPE_INT, FIELD(model.ssm_d_head), "64", NULL, 8, 256, NULL, "",
      "width of a Mamba-2 head, a multiple of 8", NULL, 0 },
    { "model", "d_state", RECIPE_INT, FIELD(model.d_state), "128", NULL, 8, 256, NULL, "",
      "state size of the scan, a multiple of 8", NULL, 0 },
    { "model", "n_groups", RECIPE_INT, FIELD(model.n_groups), "1", NULL, 1, 4096, NULL, "",
      "groups of heads that share B and C; divides ssm_heads", NULL, 0 },
    { "model", "d_conv", RECIPE_INT, FIELD(model.d_conv), "4", NULL, 2, 4, NULL, "taps",
      "width of the causal convolution", NULL, 0 },
    { "model", "chunk", RECIPE_INT, FIELD(model.chunk), "256", NULL, 16, 256, NULL, "tokens",
      "chunk of the scan, a power of two; changes speed and rounding, never the mathematics", NULL,
      0 },
    { "model", "conv_bias", RECIPE_BOOL, FIELD(model.conv_bias), "true", NULL, NO_LIMIT, NULL, "",
      "the convolution has a bias", NULL, 0 },
    { "model", "gated_norm_full", RECIPE_BOOL, FIELD(model.gated_norm_full), "false", NULL,
      NO_LIMIT, NULL, "",
      "gated norm over all of d_inner instead of per group, as Hugging Face's slow path does", NULL,
      0 },
    { "model", "dt_limit_min", RECIPE_REAL, FIELD(model.dt_limit_min), "0.0", NULL, 0, 1e6, NULL,
      "", "lower clamp of the time step after softplus", NULL, 0 },
    { "model", "dt_limit_max", RECIPE_REAL, FIELD(model.dt_limit_max), "inf", NULL, 0, INFINITY,
      NULL, "", "upper clamp of the time step after softplus", NULL, 0 },
    { "model", "dt_init_min", RECIPE_REAL, FIELD(model.dt_init_min), "0.001", NULL, 1e-8, 1e3, NULL,
      "", "initial time steps are log-uniform from here", NULL, 0 },
    { "model", "dt_init_max", RECIPE_REAL, FIELD(model.dt_init_max), "0.1", NULL, 1e-8, 1e3, NULL,
      "", "to here", NULL, 0 },
    { "model", "dt_init_floor", RECIPE_REAL, FIELD(model.dt_init_floor), "0.0001", NULL, 1e-8, 1e3,
      NULL, "", "and never below this", NULL, 0 },
    { "model", "d_ff", RECIPE_INT, FIELD(model.d_ff), NULL, "0 for mamba2, required otherwise", 0,
      1 << 20, NULL, "", "width of the MLP; 0 = no MLP", NULL, 0 },
    { "model", "norm_eps", RECIPE_REAL, FIELD(model.norm_eps), "1e-5", NULL, 1e-12, 1, NULL, "",
      "added to the mean square in every norm", NULL, 0 },
    { "model", "embedding_multiplier", RECIPE_REAL, FIELD(model.embedding_multiplier), "1.0", NULL,
      1e-6, 1e6, NULL, "", "factor of the embeddings", NULL, 0 },
    { "model", "residual_multiplier", RECIPE_REAL, FIELD(model.residual_multiplier), "1.0", NULL,
      1e-6, 1e6, NULL, "", "factor of each branch before it is added to the residual stream", NULL,
      0 },
    { "model", "logits_scaling", RECIPE_REAL, FIELD(model.logits_scaling), "1.0", NULL, 1e-6, 1e6,
      NULL, "", "divisor of the logits", NULL, 0 },
    { "model", "tied_head", RECIPE_BOOL, FIELD(model.tied_head), "false", NULL, NO_LIMIT, NULL, "",
      "the head is the embedding matrix", NULL, 0 },
    { "model", "residual", RECIPE_CHOICE, FIELD(model.residual_fp32), "fp32", NULL, NO_LIMIT,
      "fp32|model", "",
      "precision of the residual stream: fp32, or rounded to train.precision after "
      "each addition",
      NULL, 0 },
    { "model", "residual_init_div", RECIPE_DIVISOR, NO_FIELD, "sqrt(L)", NULL, 1e-3, 1e6, NULL, "",
      "divisor of the initial output projections: `\"sqrt(L)\"` as in the reference, "
      "`\"sqrt(2L)\"`, "
      "or a number; L = n_layers",
      NULL, 0 },

    { "data", "train", RECIPE_DATASETS, NO_FIELD, NULL, "none: the recipe describes a model only",
      0, 1e12, NULL, "",
      "token shards (.h5) or folders of them, with the share of tokens that each gets", NULL, 0 },
    { "data", "eval", RECIPE_DATASETS, NO_FIELD, NULL, "no evaluation", 0, 1e12, NULL, "",
      "the same for evaluation", NULL, 0 },
    { "data", "tokenizer", RECIPE_TEXT, FIELD(data.tokenizer), "", NULL, NO_LIMIT, NULL, "",
      "tokenizer.json, copied into every checkpoint", NULL, 0 },
    { "data", "seq_len", RECIPE_COUNT, FIELD(data.seq_len), NULL, NULL, 1, 1 << 24, NULL, "tokens",
      "length of a packed row", NULL, 0 },
    { "data", "pack_leak", RECIPE_BOOL, FIELD(data.pack_leak), "false", NULL, NO_LIMIT, NULL, "",
      "true: documents packed into one row see each other, as in Bamba's pretraining; false: "
      "state, "
      "convolution and attention stop at each document's border",
      NULL, 0 },
    { "data", "shuffle", RECIPE_BOOL, FIELD(data.shuffle), "true", NULL, NO_LIMIT, NULL, "",
      "documents in a random order that depends on data.seed alone, and rows in windows of "
      "shuffle_window_rows; data.eval is never shuffled",
      NULL, 0 },
    { "data", "shuffle_window_rows", RECIPE_COUNT, FIELD(data.shuffle_window_rows), "8192", NULL, 1,
      1 << 20, NULL, "rows",
      "rows that are shuffled together, so that a step's rows come from many documents; at most "
      "one epoch; 1 = rows in the order of the documents",
      NULL, 0 },
    { "data", "seed", RECIPE_INT, FIELD(data.seed), "1", NULL, 0, BIG, NULL, "",
      "seed of both orders", NULL, 0 },
    { "data", "prefetch_batches", RECIPE_INT, FIELD(data.prefetch_batches), "4", NULL, 0, 1024,
      NULL, "micro-batches", "read ahead by a thread of the loader; 0 = read in the step", NULL,
      0 },

    { "train", "name", RECIPE_TEXT, FIELD(train.name), NULL, "the recipe's file name", NO_LIMIT,
      NULL, "", "name of the run; its folder is out_dir/name", NULL, 0 },
    { "train", "out_dir", RECIPE_TEXT, FIELD(train.out_dir), "runs", NULL, NO_LIMIT, NULL, "",
      "folder of all runs", NULL, 0 },
    { "train", "init_from", RECIPE_TEXT, FIELD(train.init_from), "", NULL, NO_LIMIT, NULL, "",
      "checkpoint or Hugging Face folder whose weights the run starts from; empty = random weights",
      NULL, 0 },
    { "train", "resume", RECIPE_TEXT, FIELD(train.resume), "auto", NULL, NO_LIMIT, NULL, "",
      "`auto` continues from the newest good checkpoint of the run if there is one, `never` starts "
      "anew; else the folder of a checkpoint",
      NULL, 0 },
    { "train", "precision", RECIPE_CHOICE, FIELD(train.precision), "bf16", NULL, NO_LIMIT,
      "fp32|bf16", "",
      "of weights and activations; master weights, moments, norms, scan states and loss are fp32",
      NULL, 0 },
    { "train", "linear_dtype", RECIPE_CHOICE, FIELD(train.linear_dtype), "model", NULL, NO_LIMIT,
      "model|fp8", "",
      "in which the projections of the layers multiply: as train.precision, or `fp8` (e4m3, the "
      "gradients of outputs e5m2, one scale per matrix, found anew each time), which needs "
      "precision \"bf16\" and GPUs of compute capability 8.9 or later (H100, L4); embedding, head, "
      "scan, convolution, attention and norms stay as they are, as do projections whose sizes or "
      "rows are no multiples of 16",
      NULL, 0 },
    { "train", "seed", RECIPE_INT, FIELD(train.seed), "1", NULL, 0, BIG, NULL, "",
      "seed of the initial weights", NULL, 0 },
    { "train", "global_batch_tokens", RECIPE_COUNT, FIELD(train.global_batch_tokens), NULL, NULL, 1,
      BIG, NULL, "tokens",
      "per optimiser step over all ranks; a multiple of data.seq_len * "
      "micro_batch * ranks",
      NULL, 0 },
    { "train", "micro_batch", RECIPE_INT, FIELD(train.micro_batch), "1", NULL, 1, 65536, NULL,
      "rows", "rows of data.seq_len tokens per rank and pass; the rest of the batch is accumulated",
      NULL, 0 },
    { "train", "total_tokens", RECIPE_COUNT, NO_FIELD, NULL,
      "one of total_tokens and steps is required", 1, BIG, NULL, "tokens",
      "length of the run, rounded up to whole steps", "length", 1 },
    { "train", "steps", RECIPE_COUNT, NO_FIELD, NULL, "see total_tokens", 1, BIG, NULL, "steps",
      "length of the run in optimiser steps", "length", 2 },
    { "train", "recompute", RECIPE_CHOICE, FIELD(train.recompute), "selective", NULL, NO_LIMIT,
      "none|selective|full", "",
      "activations computed again in the backward pass: none of them, the "
      "cheap ones, or all but one residual per layer",
      NULL, 0 },
    { "train", "z_loss", RECIPE_REAL, FIELD(train.z_loss), "0.0", NULL, 0, 1, NULL, "",
      "factor of the mean squared log-sum-exp of the logits, added to the loss", NULL, 0 },
    { "train", "grad_clip", RECIPE_REAL, FIELD(train.grad_clip), "1.0", NULL, 0, 1e9, NULL, "",
      "largest norm of the whole gradient; 0 = off", NULL, 0 },
    { "train", "max_bad_steps", RECIPE_INT, FIELD(train.max_bad_steps), "10", NULL, 0, 1e6, NULL,
      "steps",
      "steps in a row with a loss or gradient that is not finite (each is skipped) before the "
      "run stops",
      NULL, 0 },
    { "train", "threads", RECIPE_INT, FIELD(train.threads), "0", NULL, 0, 1024, NULL, "",
      "OpenMP threads per rank; 0 = cores / ranks of the host", NULL, 0 },

    { "optimizer", "lr", RECIPE_REAL, FIELD(optimizer.lr), NULL, NULL, 0, 100, NULL, "",
      "peak learning rate", NULL, 0 },
    { "optimizer", "beta1", RECIPE_REAL, FIELD(optimizer.beta1), "0.9", NULL, 0, ONE_BELOW, NULL,
      "", "decay of the first moment", NULL, 0 },
    { "optimizer", "beta2", RECIPE_REAL, FIELD(optimizer.beta2), "0.95", NULL, 0, ONE_BELOW, NULL,
      "", "decay of the second moment", NULL, 0 },
    { "optimizer", "eps", RECIPE_REAL, FIELD(optimizer.eps), "1e-8", NULL, 1e-30, 1, NULL, "",
      "added to the root of the second moment", NULL, 0 },
    { "optimizer", "weight_decay", RECIPE_REAL, FIELD(optimizer.weight_decay), "0.1", NULL, 0, 10,
      NULL, "", "decoupled, times the learning rate", NULL, 0 },
    { "optimizer", "decay", RECIPE_CHOICE, FIELD(optimizer.decay), "matrices", NULL, NO_LIMIT,
      "matrices|all|ssm_exempt", "",
      "what decays: `matrices` exempts A_log, D, dt_bias, biases and "
      "norms; `all` exempts nothing, as in Bamba v1 and v2; `ssm_exempt` exempts A_log, D, dt_bias",
      NULL, 0 },

    { "schedule", "kind", RECIPE_CHOICE, FIELD(schedule.kind), "cosine", NULL, NO_LIMIT,
      "cosine|linear|constant|wsd", "",
      "after the warm-up: cosine or linear to min_lr_ratio, constant, "
      "or constant with a linear decay at the end (wsd)",
      NULL, 0 },
    { "schedule", "warmup", RECIPE_CHOICE, FIELD(schedule.warmup), "linear", NULL, NO_LIMIT,
      "linear|quadratic", "", "shape of the warm-up; quadratic is 1 - (1 - x)^2", NULL, 0 },
    { "schedule", "warmup_tokens", RECIPE_COUNT, NO_FIELD, NULL, "see warmup_steps", 0, BIG, NULL,
      "tokens", "length of the warm-up, rounded up to whole steps", "warmup", 1 },
    { "schedule", "warmup_steps", RECIPE_COUNT, FIELD(schedule.warmup_steps), NULL,
      "min(2000, steps / 20)", 0, BIG, NULL, "steps", "length of the warm-up", "warmup", 2 },
    { "schedule", "decay_tokens", RECIPE_COUNT, NO_FIELD, NULL, "see decay_steps", 0, BIG, NULL,
      "tokens", "wsd: length of the final decay, rounded up to whole steps", "decay", 1 },
    { "schedule", "decay_steps", RECIPE_COUNT, FIELD(schedule.decay_steps), NULL, "steps / 10", 0,
      BIG, NULL, "steps", "wsd: length of the final decay", "decay", 2 },
    { "schedule", "min_lr_ratio", RECIPE_REAL, FIELD(schedule.min_lr_ratio), "0.1", NULL, 0, 1,
      NULL, "", "last learning rate as a share of optimizer.lr", NULL, 0 },

    { "parallel", "device", RECIPE_CHOICE, FIELD(parallel.device), "auto", NULL, NO_LIMIT,
      "auto|cpu|cuda", "",
      "what the ranks compute on: `cuda` one GPU each, by their number on the host; `auto` GPUs "
      "where "
      "every rank has one that is usable, else the CPU",
      NULL, 0 },
    { "parallel", "share_gpus", RECIPE_BOOL, FIELD(parallel.share_gpus), "false", NULL, NO_LIMIT,
      NULL, "", "let several ranks of a host use one GPU; for tests, NCCL refuses it", NULL, 0 },
    { "parallel", "zero_stage", RECIPE_INT, FIELD(parallel.zero_stage), "1", NULL, 0, 3, NULL, "",
      "sharded over the ranks: 0 nothing, 1 optimiser state, 2 also gradients, 3 also weights; 2 "
      "and 3 move more bytes in every pass",
      NULL, 0 },
    { "parallel", "bucket_bytes", RECIPE_BYTES, FIELD(parallel.bucket_bytes), "32MiB", NULL, 4096,
      1 << 30, NULL, "bytes", "gradients that are reduced together during the backward pass", NULL,
      0 },
    { "parallel", "wire", RECIPE_CHOICE, FIELD(parallel.wire), "fp32", NULL, NO_LIMIT, "fp32|bf16",
      "", "in which gradients travel; bf16 halves the bytes and rounds each rank's contribution",
      NULL, 0 },
    { "parallel", "timeout_s", RECIPE_SECONDS, FIELD(parallel.timeout_s), "10min", NULL, 1, 1e6,
      NULL, "seconds", "a collective that takes longer ends the run and names the rank", NULL, 0 },

    { "checkpoint", "every_steps", RECIPE_COUNT, FIELD(checkpoint.every_steps), "1000", NULL, 0,
      BIG, NULL, "steps", "between checkpoints; 0 = only at the end", NULL, 0 },
    { "checkpoint", "keep_last", RECIPE_INT, FIELD(checkpoint.keep_last), "3", NULL, 1, 1e6, NULL,
      "", "newest checkpoints that are kept", NULL, 0 },
    { "checkpoint", "keep_every", RECIPE_COUNT, FIELD(checkpoint.keep_every), "0", NULL, 0, BIG,
      NULL, "steps", "checkpoints at multiples of this are kept for ever; 0 = none", NULL, 0 },
    { "checkpoint", "background", RECIPE_BOOL, FIELD(checkpoint.background), "true", NULL, NO_LIMIT,
      NULL, "", "written by a thread from a copy in memory while training goes on", NULL, 0 },
    { "checkpoint", "on_full", RECIPE_CHOICE, FIELD(checkpoint.on_full_pause), "pause", NULL,
      NO_LIMIT, "pause|stop", "",
      "when the disk is full: wait for room, or stop the run with exit code 5", NULL, 0 },

    { "log", "every_steps", RECIPE_COUNT, FIELD(log.every_steps), "10", NULL, 1, BIG, NULL, "steps",
      "between lines on the terminal and in metrics.jsonl", NULL, 0 },
    { "log", "tensorboard", RECIPE_BOOL, FIELD(log.tensorboard), "true", NULL, NO_LIMIT, NULL, "",
      "write event files", NULL, 0 },
    { "log", "plot", RECIPE_BOOL, FIELD(log.plot), "true", NULL, NO_LIMIT, NULL, "",
      "draw the loss curve with gnuplot at the end, if it is installed", NULL, 0 },

    { "eval", "every_steps", RECIPE_COUNT, FIELD(eval.every_steps), "0", NULL, 0, BIG, NULL,
      "steps", "between evaluations on data.eval; 0 = only at the end", NULL, 0 },
    { "eval", "max_tokens", RECIPE_COUNT, FIELD(eval.max_tokens), "0", NULL, 0, BIG, NULL, "tokens",
      "per evaluation; 0 = all of data.eval", NULL, 0 },
};

const int recipe_n_keys = (int)(sizeof recipe_keys / sizeof *recipe_keys);

int recipe_find(const char *section, const char *name)
{
    for (int i = 0; i < recipe_n_keys; i++)
        if (!strcmp(recipe_keys[i].section, section) && !strcmp(recipe_keys[i].name, name))
            return i;
    return -1;
}

/* Levenshtein distance; names longer than the row are not near anything. */
static int distance(const char *a, const char *b)
{
    enum { LONGEST = 63 };
    int row[LONGEST + 1];
    const size_t na = strlen(a), nb = strlen(b);

    if (na > LONGEST || nb > LONGEST) return LONGEST;
    for (size_t j = 0; j <= nb; j++) row[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            const int change = diagonal + (a[i - 1] != b[j - 1]);
            const int remove = row[j] + 1, add = row[j - 1] + 1;
            diagonal = row[j];
            row[j] = change < remove ? change : remove;
            if (add < row[j]) row[j] = add;
        }
    }
    return row[nb];
}

/* How far off a name may be and still be meant: a third of its letters, at least two. */
static int tolerance(const char *name)
{
    const int third = (int)(strlen(name) / 3);
    return third > 2 ? third : 2;
}

int recipe_nearest_key(const char *section, const char *name)
{
    int best = -1, best_distance = tolerance(name) + 1;

    for (int i = 0; i < recipe_n_keys; i++) {
        if (section && strcmp(recipe_keys[i].section, section)) continue;
        const int d = distance(name, recipe_keys[i].name);
        if (d < best_distance) {
            best = i;
            best_distance = d;
        }
    }
    return best;
}

const char *recipe_nearest_section(const char *name)
{
    const char *best = NULL;
    int best_distance = tolerance(name) + 1;

    for (const struct recipe_section *s = recipe_sections; s->name; s++) {
        const int d = distance(name, s->name);
        if (d < best_distance) {
            best = s->name;
            best_distance = d;
        }
    }
    return best;
}
