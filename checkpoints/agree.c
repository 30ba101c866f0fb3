/* checkpoints/agree.c: one outcome for all ranks. */
#include "checkpoints/agree.h"

#include <stdio.h>

enum ht_status ht_ckpt_agree(struct ht_comm *comm, enum ht_status mine)
{
    char message[1024];

    if (!comm || ht_comm_size(comm) == 1) return mine;
    const int rank = ht_comm_rank(comm);
    int64_t worst = mine == HT_OK ? 0 : (int64_t)mine << 32 | rank;
    snprintf(message, sizeof message, "%s", ht_error_message());
    HT_TRY(ht_comm_max_i64(comm, &worst, 1));
    if (worst == 0) return HT_OK;
    const int from = (int)(worst & 0x7fffffff);
    HT_TRY(ht_comm_broadcast(comm, message, sizeof message, from));
    message[sizeof message - 1] = '\0';
    return HT_FAIL((enum ht_status)(worst >> 32), "%s", message);
}
