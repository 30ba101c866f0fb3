/* checkpoints/agree.h: one outcome for all ranks. */
#ifndef HT_CHECKPOINTS_AGREE_H
#define HT_CHECKPOINTS_AGREE_H

#include "core/base/status.h"
#include "distributed/comm.h"

/* Collective; the main thread. HT_OK when every rank passes HT_OK. Otherwise the code and the
 * message of one failing rank, on every rank. comm may be NULL. */
enum ht_status ht_ckpt_agree(struct ht_comm *comm, enum ht_status mine);

#endif
