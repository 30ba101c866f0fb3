/* core/config/planner.h: sizes, FLOPs and memory of a run before it starts [3].
 *
 * The same numbers size the arenas of a real run and are printed by `hybridtrain --plan RECIPE`.
 * FLOPs per token follow spec 7. The planner itself allocates nothing and needs none of the
 * hardware it plans for.
 */
#ifndef HT_CONFIG_PLANNER_H
#define HT_CONFIG_PLANNER_H

#include <stdio.h>

#include "core/base/status.h"
#include "core/config/config.h"
#include "core/config/tensor_list.h"

/* Bytes of the activations that one micro-batch of n_tokens keeps and uses; core/model allocates
 * exactly these (ht_model_sizes fills them; see core/model/model.h). */
struct ht_plan_bytes {
    int64_t weights, gradients, optimizer; // per rank
    int64_t activations, scratch;          // per rank
    int64_t buffers;                       // communication, checkpoint snapshot, loader
    int64_t program; // libraries, code, file cache kept by us: measured constant
    int64_t total;
};

struct ht_device_model {                 // what step time is predicted from; stated in the output
    const char *name, *level;            // level: the CPU's, "" for a GPU
    const char *basis;                   // where the rates come from, for people
    double matmul_flops;                 // sustained, per device, in the run's precision
    double memory_bytes_s, link_bytes_s; // sustained
    double memory_bytes;                 // of the device
    double peak_flops;                   // what MFU is a share of
};

struct ht_plan {
    int64_t n_params, n_tensors;
    double flops_forward, flops_train; // per token
    int64_t n_ranks, tokens_per_step, n_micro_steps, total_steps;
    double total_tokens;
    struct ht_plan_bytes bytes;
    double step_s, tokens_per_s, mfu; // predicted with `device`
    double comm_exposed_s;            // of step_s: collectives that nothing hides
    struct ht_device_model device;
};

/* device_name: "cpu" (this machine, measured constants of docs/), "h100", "h200", "a100"; NULL
 * picks cpu for recipes that fit it and h100 otherwise. activations/scratch come from the caller
 * (core/model), which knows the layers. HT_ERR_MEMORY when it does not fit: the message names what
 * is short, by how much, and which key to change; *out is filled all the same. */
enum ht_status ht_plan_make(struct ht_plan *out, const struct ht_config *c, int n_ranks,
                            const char *device_name, int64_t activation_bytes,
                            int64_t scratch_bytes);

/* FLOPs per token (multiply-add = 2) of the forward pass with mean attended length seq. */
double ht_flops_forward(const struct ht_model_config *m, double seq);

/* The table that people read. */
void ht_plan_print(FILE *out, const struct ht_plan *p, const struct ht_config *c);

/* One rank count of a cluster: the recipe as it is, and the fastest of all stages, recomputations
 * and micro-batches that fits. core/model/cluster.h makes these. */
struct ht_plan_choice {
    bool fits;
    int64_t global_batch_tokens; // the recipe's, or the next that these ranks and rows divide
    int zero_stage;
    enum ht_recompute recompute;
    int64_t micro_batch;
    struct ht_plan plan;
};
struct ht_plan_cluster {
    int n_ranks;
    struct ht_plan_choice recipe, best;
};

void ht_plan_print_cluster(FILE *out, const struct ht_plan_cluster *rows, int n_rows,
                           const struct ht_config *c);

#endif
