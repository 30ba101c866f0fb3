/* tests/distributed/fault_job.c: a small run that one rank spoils, for test_faults.c.
 *
 *   fault_job MODE TIMEOUT_S     steps of reductions; at step 20 the rank n - 2 does what MODE says
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "distributed/comm.h"
#include "distributed/zero.h"

enum { N = 65536, STEPS = 400 };

static enum ht_status run(struct ht_comm *c, struct ht_zero *z, float *grad, const char *mode)
{
    const int bad = ht_comm_size(c) - 2;
    float *shard;

    for (int step = 0; step < STEPS; step++) {
        if (step == 20 && ht_comm_rank(c) == bad) {
            if (!strcmp(mode, "abort")) return HT_FAIL(HT_ERR_NUMERIC, "loss is nan at step 20");
            if (!strcmp(mode, "kill")) raise(SIGKILL);
            if (!strcmp(mode, "stop")) raise(SIGSTOP);
            if (!strcmp(mode, "sleep")) sleep(60);
            if (!strcmp(mode, "leave")) _exit(0);
        }
        for (int i = 0; i < N; i++) grad[i] = (float)step;
        HT_TRY(ht_zero_grads_ready(z, grad, N / 2, false));
        HT_TRY(ht_zero_grads_ready(z, grad, 0, true));
        HT_TRY(ht_zero_reduced(z, &shard));
        double norm = (double)shard[0];
        HT_TRY(ht_comm_sum_f64(c, &norm, 1));
    }
    return HT_OK;
}

int main(int argc, char **argv)
{
    struct ht_comm *c;
    struct ht_zero *z;
    struct ht_backend be;
    const struct ht_zero_options options = {
        .stage = 1, .n_matrix = N, .n_total = N, .bucket_bytes = 32768, .wire = HT_DTYPE_F32
    };
    float *grad = calloc(N + 4096, sizeof *grad);

    if (ht_comm_init(&c, &argc, &argv) != HT_OK) ht_comm_abort(NULL, 1, ht_error_message());
    if (argc != 3 || !grad) ht_comm_abort(c, 2, "usage: fault_job MODE TIMEOUT_S");
    ht_comm_set_timeout(c, atof(argv[2]));
    if (ht_backend_create_cpu(&be, 1, 64) != HT_OK || ht_zero_create(&z, c, &be, &options) != HT_OK)
        ht_comm_abort(c, 1, ht_error_message());
    const enum ht_status st = run(c, z, grad, argv[1]);
    if (st != HT_OK) ht_comm_abort(c, ht_exit_code(st), ht_error_message());
    ht_zero_free(z);
    ht_backend_free(&be);
    ht_comm_finalize(c);
    free(grad);
    return !strcmp(argv[1], "requeue") ? 75 : 0;
}
