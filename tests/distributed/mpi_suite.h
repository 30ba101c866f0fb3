/* tests/distributed/mpi_suite.h: a suite whose every rank runs every test, in step. */
#ifndef HT_TESTS_MPI_SUITE_H
#define HT_TESTS_MPI_SUITE_H

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/rng.h"
#include "distributed/comm.h"

/* For loops over elements: libcheck's own assertions cost a system call each. */
#define CHECK_MSG(condition, ...)                                                                  \
    do {                                                                                           \
        if (!(condition)) ck_abort_msg(__VA_ARGS__);                                               \
    } while (0)
#define CHECK(condition) CHECK_MSG(condition, "%s", #condition)

static struct ht_comm *comm; // of this rank, for all tests
static int rank, n_ranks;

/* Run the suite under MPI; a rank with a failed test takes the others down. */
static int run_mpi_suite(Suite *s, int argc, char **argv)
{
    if (ht_comm_init(&comm, &argc, &argv) != HT_OK) ht_comm_abort(NULL, 1, ht_error_message());
    rank = ht_comm_rank(comm);
    n_ranks = ht_comm_size(comm);
    ht_comm_set_timeout(comm, 30);
    SRunner *sr = srunner_create(s);
    srunner_set_fork_status(sr, CK_NOFORK);
    srunner_run_all(sr, CK_NORMAL);
    const int n_failed = srunner_ntests_failed(sr);
    srunner_free(sr);
    if (n_failed) {
        sleep(1); // the others may be about to report theirs
        ht_comm_abort(comm, 1, "a test failed");
    }
    ht_comm_finalize(comm);
    return 0;
}

/* What rank r contributes at index i of round `seed`: all magnitudes from 2^-4 to 2^4, some
 * special. */
static inline float contribution(uint64_t seed, int r, int64_t i)
{
    if (i % 97 == 13) return r % 2 ? -0.0f : 0.0f;
    if (i % 89 == 7) return 1e-39f * (float)(1 + r); // denormal
    const float u = ht_rng_uniform(seed, (uint64_t)r, (uint64_t)i);
    return ldexpf(u * 2 - 1, (int)(i % 9) - 4);
}

static inline float rounded(float x, enum ht_dtype wire)
{
    return wire == HT_DTYPE_BF16 && n_ranks > 1 ? ht_bf16_to_f32(ht_f32_to_bf16(x)) : x;
}

/* The sum in rank order that every test compares bits with. */
static inline float serial_sum(uint64_t seed, int64_t i, enum ht_dtype wire)
{
    float s = rounded(contribution(seed, 0, i), wire);
    for (int r = 1; r < n_ranks; r++) s += rounded(contribution(seed, r, i), wire);
    return s;
}

static inline bool same_bits(float a, float b)
{
    return memcmp(&a, &b, sizeof a) == 0;
}

#endif
