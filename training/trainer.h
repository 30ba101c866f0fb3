/* training/trainer.h: the optimisation loop of one run, on every rank. */
#ifndef HT_TRAINING_TRAINER_H
#define HT_TRAINING_TRAINER_H

#include "core/base/log.h"
#include "core/config/config.h"
#include "core/config/recipe.h"
#include "distributed/comm.h"

/* Train until total_steps, a stop signal, or too many non-finite steps in a row. log's terminal and file are
 * used on rank 0; other ranks pass one without. Returns HT_OK when the run is complete, HT_ERR_STOPPED after a
 * requested stop with its checkpoint saved, HT_ERR_NUMERIC after max_bad_steps; or what failed. Collective. */
enum ht_status ht_train(const struct ht_config *cfg, const struct ht_recipe *recipe,
                        struct ht_comm *comm, const struct ht_log *log);

#endif
