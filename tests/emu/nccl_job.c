/* tests/emu/nccl_job.c: a small run on emulated devices, for test_nccl_faults.c.
 *
 *   nccl_job MODE TIMEOUT_S     steps of reductions and gathers; faults come from HT_EMU_NCCL
 *                               (nccl_emu.cpp), or at step 10 the rank n - 2 does what MODE says
 */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "distributed/comm.h"
#include "distributed/zero.h"

enum { N = 4096, STEPS = 60 };

static enum ht_status run(struct ht_comm *c, struct ht_backend *be, const char *mode)
{
    const struct ht_zero_options o = {
        .stage = 1, .n_matrix = N, .n_total = N, .bucket_bytes = 4096, .wire = HT_DTYPE_F32
    };
    void *grad, *weights;
    struct ht_zero *z;
    float *shard, first;

    HT_TRY(ht_comm_use_device(c, be));
    HT_TRY(ht_zero_create(&z, c, be, &o));
    HT_TRY(ht_backend_alloc(&grad, be, "gradient", 2 * N * sizeof(float)));
    HT_TRY(ht_backend_alloc(&weights, be, "weights", 2 * N * sizeof(float)));
    for (int step = 0; step < STEPS; step++) {
        if (step == 10 && ht_comm_rank(c) == ht_comm_size(c) - 2) {
            if (!strcmp(mode, "kill")) raise(SIGKILL);
            if (!strcmp(mode, "stop")) raise(SIGSTOP);
            if (!strcmp(mode, "abort")) return HT_FAIL(HT_ERR_NUMERIC, "loss is nan at step 10");
        }
        HT_TRY(ht_backend_zero(be, grad, 2 * N * sizeof(float)));
        HT_TRY(ht_backend_zero(be, weights, 2 * N * sizeof(float)));
        HT_TRY(ht_zero_grads_ready(z, grad, 0, true));
        HT_TRY(ht_zero_reduced(z, &shard));
        HT_TRY(ht_backend_download(be, &first, shard, sizeof first)); // as the loss of a step
        double norm = (double)first;
        HT_TRY(ht_comm_sum_f64(c, &norm, 1));
        HT_TRY(ht_zero_gather_weights(z, weights, HT_DTYPE_F32, NULL));
    }
    ht_zero_free(z);
    ht_backend_free_memory(be, grad);
    ht_backend_free_memory(be, weights);
    return ht_comm_use_device(c, NULL);
}

int main(int argc, char **argv)
{
    struct ht_backend be;
    struct ht_comm *c;

    if (ht_comm_init(&c, &argc, &argv) != HT_OK) ht_comm_abort(NULL, 1, ht_error_message());
    if (argc != 3) ht_comm_abort(c, 2, "usage: nccl_job MODE TIMEOUT_S");
    ht_comm_set_timeout(c, atof(argv[2]));
    if (ht_backend_create_cuda(&be, ht_comm_local_rank(c), 1 << 16) != HT_OK)
        ht_comm_abort(c, 1, ht_error_message());
    const enum ht_status st = run(c, &be, argv[1]);
    if (st != HT_OK) ht_comm_abort(c, ht_exit_code(st), ht_error_message());
    ht_backend_free(&be);
    ht_comm_finalize(c);
    return 0;
}
