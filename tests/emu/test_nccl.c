/* tests/emu/test_nccl.c: collectives and ZeRO on device memory, over a double of NCCL that does its
 * work only when it is waited for. Values are small integers: sums are exact in every order. */
#include "tests/distributed/mpi_suite.h"
#include "tests/emu/gpu_case.h"

#include "distributed/reduce.h"
#include "distributed/zero.h"

static struct ht_backend be;

static void setup(void)
{
    gpu_start(&be, 1 << 16);
    ck_assert_msg(ht_comm_use_device(comm, &be) == HT_OK, "%s", ht_error_message());
}
static void teardown(void)
{
    ck_assert_int_eq(ht_comm_use_device(comm, NULL), HT_OK);
    gpu_end(&be);
}

/* Whole numbers from -8 to 7: exact in bf16, as their sums over four ranks are. */
static float value(uint64_t round, int r, int64_t i)
{
    return (float)(int)(ht_rng_u64(round, (uint64_t)r, (uint64_t)i) % 16) - 8;
}
static float sum_of(uint64_t round, int64_t i)
{
    float s = 0;
    for (int r = 0; r < n_ranks; r++) s += value(round, r, i);
    return s;
}
static float *values(uint64_t round, int64_t n)
{
    float *x = malloc(((size_t)n + 1) * sizeof *x);
    for (int64_t i = 0; i < n; i++) x[i] = value(round, rank, i);
    return x;
}

START_TEST(reduce_scatter)
{
    const enum ht_dtype wire = _i % 2 ? HT_DTYPE_BF16 : HT_DTYPE_F32;
    const int64_t n = _i / 2 ? 131 : 1024, all = n * n_ranks;
    float *host = values(1, all), *got = malloc((size_t)n * sizeof *got);
    float *in = gpu_put(&be, host, (size_t)all * 4), *out = gpu_new(&be, (size_t)n * 4);
    const size_t staging_bytes = ht_comm_staging_bytes(comm, n, wire);
    void *staging = gpu_new(&be, staging_bytes);
    struct ht_comm_request *req;

    gpu_ok(ht_comm_reduce_scatter_start(comm, &req, out, in, n, wire, staging));
    gpu_get(&be, got, out, (size_t)n * 4);
    CHECK(isnan(got[0])); // nothing waits in start: a device runs it later
    gpu_ok(ht_comm_wait(comm, &req));
    gpu_get(&be, got, out, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) CHECK(got[i] == sum_of(1, rank * n + i));
    // in place
    gpu_ok(ht_comm_reduce_scatter_start(comm, &req, in + rank * n, in, n, wire, staging));
    gpu_ok(ht_comm_wait(comm, &req));
    gpu_get(&be, got, in + rank * n, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) CHECK(got[i] == sum_of(1, rank * n + i));
    free(host);
    free(got);
}
END_TEST

START_TEST(all_gather)
{
    const int64_t n = 37, all = n * n_ranks;
    unsigned char *host = malloc((size_t)all);
    struct ht_comm_request *req;

    for (int64_t i = 0; i < all; i++) host[i] = i / n == rank ? (unsigned char)(3 * i + 1) : 0;
    unsigned char *data = gpu_put(&be, host, (size_t)all);
    gpu_ok(ht_comm_all_gather_start(comm, &req, data, n));
    gpu_ok(ht_comm_wait(comm, &req));
    gpu_get(&be, host, data, (size_t)all);
    for (int64_t i = 0; i < all; i++) CHECK(host[i] == (unsigned char)(3 * i + 1));
    free(host);
}
END_TEST

/* Many at a time, waited for in another order, with host collectives between; events are used
 * again. */
START_TEST(many_under_way)
{
    enum { AT_ONCE = 7, ROUNDS = 40, N = 64 };
    struct ht_comm_request *req[AT_ONCE];
    float *in[AT_ONCE], *out[AT_ONCE], got[N];

    for (int k = 0; k < AT_ONCE; k++) {
        float *host = values((uint64_t)k, N * n_ranks);
        in[k] = gpu_put(&be, host, (size_t)(N * n_ranks) * 4);
        out[k] = gpu_new(&be, N * 4);
        free(host);
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int k = 0; k < AT_ONCE; k++)
            gpu_ok(
                ht_comm_reduce_scatter_start(comm, &req[k], out[k], in[k], N, HT_DTYPE_F32, NULL));
        double x = 1;
        gpu_ok(ht_comm_sum_f64(comm, &x, 1));
        CHECK(x == n_ranks);
        ht_comm_progress(comm);
        for (int k = AT_ONCE - 1; k >= 0; k--) {
            gpu_ok(ht_comm_wait(comm, &req[k]));
            gpu_get(&be, got, out[k], N * 4);
            for (int i = 0; i < N; i++) CHECK(got[i] == sum_of((uint64_t)k, rank * N + i));
            gpu_ok(ht_backend_zero(&be, out[k], N * 4)); // the next round must write it again
        }
    }
}
END_TEST

START_TEST(sums_over_micro_batches)
{
    const int64_t n = 1000 + 13 * _i;
    float *a = values(3, n), *b = values(4, n), *got = malloc((size_t)n * sizeof *got);
    float *x = gpu_put(&be, a, (size_t)n * 4), *y = gpu_put(&be, b, (size_t)n * 4);
    const int64_t skip = _i % 4; // unaligned too

    gpu_ok(ht_reduce_add(&be, x + skip, y + skip, n - skip));
    gpu_get(&be, got, x, (size_t)n * 4);
    for (int64_t i = 0; i < n; i++) CHECK(got[i] == a[i] + (i >= skip ? b[i] : 0));
    free(a);
    free(b);
    free(got);
}
END_TEST

/* ---- ZeRO in device memory, all stages ---- */

enum { UNITS = 4 };
static const int64_t unit_start[UNITS + 1] = { 0, 1984, 2048, 4096, 6336 };
static const int64_t n_total = 6336 + 320;

static struct ht_zero *create(int stage, enum ht_dtype wire)
{
    struct ht_zero *z;
    gpu_ok(ht_zero_create(&z, comm, &be,
                          &(struct ht_zero_options){ .stage = stage,
                                                     .n_matrix = unit_start[UNITS],
                                                     .n_total = n_total,
                                                     .bucket_bytes = 4096,
                                                     .wire = wire,
                                                     .n_units = UNITS,
                                                     .unit_start = unit_start,
                                                     .keep_first = stage == 3,
                                                     .weight_dtype = HT_DTYPE_BF16 }));
    return z;
}

/* The gradient of one micro-batch of a unit, added to what stands at g on the device. */
static void add_unit(float *g, int64_t start, int64_t end, uint64_t round)
{
    float *host = malloc((size_t)(end - start) * sizeof *host);

    gpu_get(&be, host, g, (size_t)(end - start) * 4);
    for (int64_t i = start; i < end; i++) host[i - start] += value(round, rank, i);
    gpu_ok(ht_backend_upload(&be, g, host, (size_t)(end - start) * 4));
    free(host);
}

static void by_unit(struct ht_zero *z, uint64_t round, bool keep_first)
{
    float *g;

    if (keep_first) {
        gpu_ok(ht_zero_unit_grads(z, 0, &g));
        add_unit(g, 0, unit_start[1], round);
    }
    for (int u = UNITS - 1; u >= keep_first; u--) {
        gpu_ok(ht_zero_unit_grads(z, u, &g));
        add_unit(g, unit_start[u], unit_start[u + 1], round);
        gpu_ok(ht_zero_unit_grads_done(z, u));
    }
    if (keep_first) gpu_ok(ht_zero_unit_grads_done(z, 0));
}

START_TEST(gradients)
{
    const int stage = _i % 4;
    struct ht_zero *z = create(stage, _i / 4 ? HT_DTYPE_BF16 : HT_DTYPE_F32);
    const int64_t size = ht_zero_shard_size(z), n_matrix = unit_start[UNITS];
    const int64_t room = ht_zero_padded_total(n_matrix, n_total, 4096, n_ranks);
    float *grad = gpu_new(&be, (size_t)room * 4), *got = malloc((size_t)size * sizeof *got), *shard;

    for (uint64_t step = 0; step < 2; step++) {
        gpu_ok(ht_backend_zero(&be, grad, (size_t)room * 4));
        if (stage < 2) {
            add_unit(grad, 0, n_total, 7);
            add_unit(grad, 0, n_matrix, 8);
            gpu_ok(ht_zero_grads_ready(z, grad, 3000, false));
            gpu_ok(ht_zero_grads_ready(z, grad, 0, true));
        } else {
            add_unit(grad, n_matrix, n_total, 7);
            by_unit(z, 7, stage == 3);
            by_unit(z, 8, stage == 3);
            gpu_ok(ht_zero_vectors_ready(z, grad));
        }
        gpu_ok(ht_zero_reduced(z, &shard));
        gpu_get(&be, got, shard, (size_t)size * 4);
        for (int s = 0; s < ht_zero_n_slices(z); s++) {
            const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
            for (int64_t i = 0; i < sl->n; i++) {
                const int64_t flat = sl->flat_start + i;
                const float want = sum_of(7, flat) + (flat < n_matrix ? sum_of(8, flat) : 0);
                CHECK_MSG(got[sl->shard_start + i] == want,
                          "stage %d rank %d flat %lld: %g, not %g", stage, rank, (long long)flat,
                          (double)got[sl->shard_start + i], (double)want);
            }
        }
    }
    free(got);
    ht_zero_free(z);
}
END_TEST

static ht_bf16 weight(int64_t flat, int version)
{
    return (ht_bf16)(0x3f80 + (flat * 7 + version) % 128);
}

/* This rank's part of the weights, in the host's copy of what stands at m (flat or shard order). */
static void own_weights(struct ht_zero *z, ht_bf16 *m, bool flat_order, float *v, int version)
{
    const int64_t n_matrix = unit_start[UNITS];

    for (int s = 0; s < ht_zero_n_slices(z); s++) {
        const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
        for (int64_t i = 0; i < sl->n; i++) {
            const int64_t flat = sl->flat_start + i;
            if (flat >= n_matrix)
                v[flat - n_matrix] = (float)(flat + version);
            else
                m[flat_order ? flat : sl->shard_start + i] = weight(flat, version);
        }
    }
}

START_TEST(weights)
{
    const int stage = 1 + _i;
    struct ht_zero *z = create(stage, HT_DTYPE_F32);
    const int64_t n_matrix = unit_start[UNITS], size = ht_zero_shard_size(z);
    const int64_t n_m = ht_zero_padded_matrix(n_matrix, n_ranks);
    const int64_t n_v = ht_zero_padded_vector(n_matrix, n_total, n_ranks);
    const size_t m_bytes = (size_t)(stage == 3 ? size : n_m) * 2, v_bytes = (size_t)n_v * 4;
    ht_bf16 *m = calloc(1, m_bytes + 8192 * 2);
    float *v = calloc(1, v_bytes);
    float *device_v = gpu_new(&be, v_bytes);
    void *device_m = stage == 3 ? ht_zero_weight_shard(z) : gpu_new(&be, m_bytes);

    for (int version = 0; version < 2; version++) {
        memset(m, 0, m_bytes);
        memset(v, 0, v_bytes);
        own_weights(z, m, stage < 3, v, version);
        size_t put = m_bytes;
        if (stage == 3) // of a shard only the matrices' part is in z
            for (int s = 0; s < ht_zero_n_slices(z); s++)
                if (ht_zero_slices(z)[s].flat_start < n_matrix)
                    put = (size_t)(ht_zero_slices(z)[s].shard_start + ht_zero_slices(z)[s].n) * 2;
        gpu_ok(ht_backend_upload(&be, device_m, m, put));
        gpu_ok(ht_backend_upload(&be, device_v, v, v_bytes));
        gpu_ok(ht_zero_gather_weights(z, device_m, HT_DTYPE_BF16, device_v));
        gpu_get(&be, v, device_v, v_bytes);
        for (int64_t i = n_matrix; i < n_total; i++) CHECK(v[i - n_matrix] == (float)(i + version));
        if (stage < 3) {
            gpu_get(&be, m, device_m, m_bytes);
            for (int64_t i = 0; i < n_matrix; i++) CHECK(m[i] == weight(i, version));
            continue;
        }
        for (int u = 0; u < UNITS; u++) {
            const int64_t n = unit_start[u + 1] - unit_start[u];
            void *w;
            gpu_ok(ht_zero_unit_weights(z, u, u + 1 < UNITS ? u + 1 : 0, &w));
            gpu_get(&be, m, w, (size_t)n * 2);
            for (int64_t i = 0; i < n; i++) CHECK(m[i] == weight(unit_start[u] + i, version));
            ht_zero_unit_weights_done(z, u);
        }
    }
    free(m);
    free(v);
    ht_zero_free(z);
}
END_TEST

START_TEST(the_device_is_entered_once)
{
    struct ht_backend cpu;

    ck_assert_int_eq(ht_comm_use_device(comm, &be), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "they are there"));
    ck_assert_int_eq(ht_comm_use_device(comm, NULL), HT_OK);
    ck_assert_int_eq(ht_comm_use_device(comm, NULL), HT_OK);
    ck_assert_int_eq(ht_backend_create_cpu(&cpu, 1, 1 << 12), HT_OK);
    ck_assert_int_eq(ht_comm_use_device(comm, &cpu), HT_OK); // host memory, as before
    float x[64 * 4], sum[64];
    struct ht_comm_request *req;
    void *staging = malloc(ht_comm_staging_bytes(comm, 64, HT_DTYPE_F32) + 1);
    for (int i = 0; i < 64 * n_ranks; i++) x[i] = value(5, rank, i);
    ck_assert_int_eq(ht_comm_reduce_scatter_start(comm, &req, sum, x, 64, HT_DTYPE_F32, staging),
                     HT_OK);
    ck_assert_int_eq(ht_comm_wait(comm, &req), HT_OK);
    for (int i = 0; i < 64; i++) CHECK(sum[i] == sum_of(5, rank * 64 + i));
    free(staging);
    ht_backend_free(&cpu);
    ck_assert_int_eq(ht_comm_use_device(comm, &be), HT_OK);
}
END_TEST

int main(int argc, char **argv)
{
    Suite *s = suite_create("nccl");
    TCase *tc = tcase_create("nccl");

    tcase_add_checked_fixture(tc, setup, teardown);
    tcase_add_loop_test(tc, reduce_scatter, 0, 4);
    tcase_add_test(tc, all_gather);
    tcase_add_test(tc, many_under_way);
    tcase_add_loop_test(tc, sums_over_micro_batches, 0, 5);
    tcase_add_loop_test(tc, gradients, 0, 8);
    tcase_add_loop_test(tc, weights, 0, 3);
    tcase_add_test(tc, the_device_is_entered_once);
    suite_add_tcase(s, tc);
    return run_mpi_suite(s, argc, argv);
}
