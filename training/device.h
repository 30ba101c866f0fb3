/* training/device.h: what the ranks of a run compute on. */
#ifndef HT_TRAINING_DEVICE_H
#define HT_TRAINING_DEVICE_H

#include "core/base/backend.h"
#include "core/config/config.h"
#include "distributed/comm.h"

/* The backend that parallel.device means here, the same on all ranks. *memory_bytes gets what the
 * smallest GPU has (0 without any). HT_ERR_UNSUPPORTED when the recipe says cuda and some rank has
 * no usable GPU, or more ranks than GPUs are on a host; the message says what to do. Collective. */
enum ht_status ht_train_device(enum ht_backend_kind *kind, size_t *memory_bytes,
                               const struct ht_config *cfg, struct ht_comm *comm);

#endif
