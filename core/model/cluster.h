/* core/model/cluster.h: plans of a recipe (core/config/planner.h) with what its layers need, for
 * one cluster or a range of them. */
#ifndef HT_MODEL_CLUSTER_H
#define HT_MODEL_CLUSTER_H

#include "core/config/planner.h"

/* ht_plan_make with the activations and scratch of this model. */
enum ht_status ht_model_plan(struct ht_plan *out, const struct ht_config *c, int n_ranks,
                             const char *device_name);

/* The recipe on n_ranks GPUs of that name: as it is, and the fastest choice of parallel.zero_stage,
 * train.recompute and train.micro_batch that fits. Where the ranks do not divide the global batch,
 * with the next larger one. */
enum ht_status ht_model_plan_cluster(struct ht_plan_cluster *out, const struct ht_config *c,
                                     int n_ranks, const char *device_name);

#endif
