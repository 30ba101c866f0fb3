/* tests/distributed/test_comm.c: collectives against serial loops, bit for bit. */
#include "mpi_suite.h"

#include <stdio.h>
#include <time.h>

#include "core/base/file.h"
#include "distributed/reduce.h"

static const int64_t counts[] = { 0, 1, 7, 63, 64, 1000, 5003, 70001 };

static void sleep_ms(long ms)
{
    const struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
    nanosleep(&t, NULL);
}

START_TEST(small_reductions_match_serial)
{
    enum { N = 37 };
    double sum[N], max[N];
    int64_t lo[N], hi[N];

    for (int i = 0; i < N; i++) {
        sum[i] = max[i] = (double)contribution(1, rank, i) * 1e17 + rank;
        lo[i] = hi[i] = INT64_MAX / (rank + 2) * (i % 2 ? 1 : -1);
    }
    ck_assert_int_eq(ht_comm_sum_f64(comm, sum, N), HT_OK);
    ck_assert_int_eq(ht_comm_max_f64(comm, max, N), HT_OK);
    ck_assert_int_eq(ht_comm_min_i64(comm, lo, N), HT_OK);
    ck_assert_int_eq(ht_comm_max_i64(comm, hi, N), HT_OK);
    for (int i = 0; i < N; i++) {
        double s = 0, m = -INFINITY;
        int64_t a = INT64_MAX, b = INT64_MIN;
        for (int r = 0; r < n_ranks; r++) {
            const double x = (double)contribution(1, r, i) * 1e17 + r;
            const int64_t k = INT64_MAX / (r + 2) * (i % 2 ? 1 : -1);
            s = r ? s + x : x;
            m = x > m ? x : m;
            a = k < a ? k : a;
            b = k > b ? k : b;
        }
        CHECK(memcmp(&s, &sum[i], sizeof s) == 0);
        CHECK(max[i] == m);
        CHECK(lo[i] == a && hi[i] == b);
    }
    ck_assert_int_eq(ht_comm_sum_f64(comm, sum, 0), HT_OK);
}
END_TEST

START_TEST(a_nan_of_any_rank_reaches_all)
{
    for (int bad = 0; bad < n_ranks; bad++) {
        double x[2] = { rank == bad ? (double)NAN : rank, rank };
        ck_assert_int_eq(ht_comm_max_f64(comm, x, 2), HT_OK);
        CHECK(isnan(x[0]));
        CHECK(x[1] == n_ranks - 1);
    }
}
END_TEST

static void reduce_scatter_case(int64_t n, enum ht_dtype wire, bool in_place)
{
    const int64_t all = n * n_ranks;
    float *in = malloc((size_t)(all + 1) * sizeof *in);
    float *out = malloc((size_t)(n + 1) * sizeof *out);
    void *staging = malloc(ht_comm_staging_bytes(comm, n, wire) + 1);
    struct ht_comm_request *req;

    for (int64_t i = 0; i < all; i++) in[i] = contribution(2, rank, i);
    float *to = in_place ? in + rank * n : out;
    ck_assert_int_eq(ht_comm_reduce_scatter_start(comm, &req, to, in, n, wire, staging), HT_OK);
    ck_assert_int_eq(ht_comm_wait(comm, &req), HT_OK);
    ck_assert_ptr_null(req);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = rank * n + i;
        CHECK_MSG(same_bits(to[i], serial_sum(2, at, wire)), "n %lld element %lld: %a, not %a",
                  (long long)n, (long long)at, (double)to[i], (double)serial_sum(2, at, wire));
        double exact = 0, size = 0;
        for (int r = 0; r < n_ranks; r++) {
            exact += (double)contribution(2, r, at);
            size += fabs((double)contribution(2, r, at));
        }
        // half a unit in the last of 8 (bf16) bits once each, of 24 bits per addition
        const double u = (wire == HT_DTYPE_BF16 ? 0x1p-8 : 0) + n_ranks * 0x1p-24;
        const double least = n_ranks * 0x1p-134; // half the spacing of bf16 denormals, each
        CHECK(fabs((double)to[i] - exact) <= size * u * 1.01 + least);
    }
    for (int64_t i = 0; i < all; i++) // the other parts are only read
        if (!in_place || i < rank * n || i >= (rank + 1) * n)
            CHECK(same_bits(in[i], contribution(2, rank, i)));
    free(in);
    free(out);
    free(staging);
}

START_TEST(reduce_scatter_is_the_sum_in_rank_order)
{
    reduce_scatter_case(counts[_i], HT_DTYPE_F32, false);
    reduce_scatter_case(counts[_i], HT_DTYPE_F32, true);
    reduce_scatter_case(counts[_i], HT_DTYPE_BF16, false);
    reduce_scatter_case(counts[_i], HT_DTYPE_BF16, true);
}
END_TEST

static unsigned char byte_of(int r, int64_t i)
{
    return (unsigned char)(r * 41 + i * 7 + i / 256);
}

START_TEST(all_gather_and_broadcast_move_every_byte)
{
    const int64_t n = counts[_i];
    unsigned char *data = calloc((size_t)(n * n_ranks + 1), 1);
    struct ht_comm_request *req;

    for (int64_t i = 0; i < n; i++) data[rank * n + i] = byte_of(rank, i);
    ck_assert_int_eq(ht_comm_all_gather_start(comm, &req, data, n), HT_OK);
    ck_assert_int_eq(ht_comm_wait(comm, &req), HT_OK);
    for (int r = 0; r < n_ranks; r++)
        for (int64_t i = 0; i < n; i++) CHECK(data[r * n + i] == byte_of(r, i));
    CHECK(data[n * n_ranks] == 0);

    for (int root = 0; root < n_ranks; root++) {
        for (int64_t i = 0; i < n; i++) data[i] = rank == root ? byte_of(root + 50, i) : 0;
        ck_assert_int_eq(ht_comm_broadcast(comm, data, n, root), HT_OK);
        for (int64_t i = 0; i < n; i++) CHECK(data[i] == byte_of(root + 50, i));
    }
    free(data);
}
END_TEST

START_TEST(many_under_way_finish_in_any_order)
{
    enum { K = 23, N = 301 };
    struct ht_comm_request *req[K];
    float *in[K], out[K][N];
    void *staging[K];

    for (int k = 0; k < K; k++) {
        in[k] = malloc((size_t)(N * n_ranks) * sizeof(float));
        staging[k] = malloc(ht_comm_staging_bytes(comm, N, HT_DTYPE_F32) + 1);
        for (int64_t i = 0; i < N * n_ranks; i++)
            in[k][i] = contribution(30 + (uint64_t)k, rank, i);
        ck_assert_int_eq(
            ht_comm_reduce_scatter_start(comm, &req[k], out[k], in[k], N, HT_DTYPE_F32, staging[k]),
            HT_OK);
        if (k % 4 == rank % 4) ht_comm_progress(comm);
    }
    for (int j = 0; j < K; j++) {
        const int k = (j * 7 + rank * 3) % K; // another order on every rank
        ck_assert_int_eq(ht_comm_wait(comm, &req[k]), HT_OK);
        for (int64_t i = 0; i < N; i++)
            CHECK(same_bits(out[k][i], serial_sum(30 + (uint64_t)k, rank * N + i, HT_DTYPE_F32)));
        free(in[k]);
        free(staging[k]);
    }
}
END_TEST

START_TEST(barrier_holds_until_the_last_comes)
{
    struct ht_comm_request *req;
    bool done = false;
    double entered, left;

    for (int late = 0; late < n_ranks; late++) {
        if (rank == late) sleep_ms(60);
        entered = ht_time_s(); // one clock for all: the ranks share the host
        ck_assert_int_eq(ht_comm_ibarrier_start(comm, &req), HT_OK);
        done = false;
        while (!done) {
            ck_assert_int_eq(ht_comm_test(comm, &req, &done), HT_OK);
            sleep_ms(1);
        }
        left = -ht_time_s();
        ck_assert_ptr_null(req);
        ck_assert_int_eq(ht_comm_max_f64(comm, &entered, 1), HT_OK);
        ck_assert_int_eq(ht_comm_max_f64(comm, &left, 1), HT_OK);
        ck_assert_double_ge(-left, entered);

        if (rank == late) sleep_ms(20);
        entered = ht_time_s();
        ck_assert_int_eq(ht_comm_barrier(comm), HT_OK);
        left = -ht_time_s();
        ck_assert_int_eq(ht_comm_max_f64(comm, &entered, 1), HT_OK);
        ck_assert_int_eq(ht_comm_max_f64(comm, &left, 1), HT_OK);
        ck_assert_double_ge(-left, entered);
    }
    ck_assert_int_eq(ht_comm_test(comm, &req, &done), HT_OK); // NULL is done
    CHECK(done);
    ck_assert_int_eq(ht_comm_wait(comm, &req), HT_OK);
}
END_TEST

START_TEST(local_ranks_count_this_host)
{
    int64_t lo = ht_comm_local_rank(comm), hi = lo;

    ck_assert_int_eq(ht_comm_local_size(comm), n_ranks); // the suite runs on one host
    ck_assert_int_eq(ht_comm_min_i64(comm, &lo, 1), HT_OK);
    ck_assert_int_eq(ht_comm_max_i64(comm, &hi, 1), HT_OK);
    CHECK(lo == 0 && hi == n_ranks - 1);
}
END_TEST

START_TEST(bad_arguments_are_refused)
{
    struct ht_comm_request *req;
    float x = 0;

    ck_assert_int_eq(ht_comm_broadcast(comm, &x, 4, n_ranks), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "broadcast"));
    ck_assert_int_eq(ht_comm_broadcast(comm, &x, -1, 0), HT_ERR_ARG);
    ck_assert_int_eq(ht_comm_reduce_scatter_start(comm, &req, &x, &x, 1, HT_DTYPE_F16, NULL),
                     HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "fp16"));
    ck_assert_int_eq(ht_comm_all_gather_start(comm, &req, &x, -5), HT_ERR_ARG);
    ck_assert_int_eq(ht_comm_barrier(comm), HT_OK); // and nothing is broken
}
END_TEST

START_TEST(every_cpu_level_adds_the_same_bits)
{
    static ht_reduce_sum_fn *const sums[HT_ISA_COUNT] = HT_ISA_ROW(ht_reduce_sum_cpu);
    static ht_reduce_round_fn *const rounds[HT_ISA_COUNT] = HT_ISA_ROW(ht_reduce_round_cpu);
    enum { N = 5003, R = 5 };
    static float in[R][N], out[N];
    static ht_bf16 half[R][N];
    const void *src[R], *src_half[R];
    // bits that rounding treats apart: ties, the largest, infinities, NaN, denormals
    static const uint32_t odd_bits[] = {
        0x3f808000, 0x3f818000, 0x7f7fffff, 0x7f800000, 0xff800000,
        0x7f800001, 0x00000001, 0x00018000, 0x80000000, 0xffffffff
    };

    for (int r = 0; r < R; r++) {
        for (int64_t i = 0; i < N; i++) in[r][i] = contribution(4, r, i);
        memcpy(in[r] + 100, odd_bits, sizeof odd_bits);
        src[r] = in[r];
        src_half[r] = half[r];
    }
    for (int isa = 0; isa <= (int)ht_isa_best(); isa++) {
        for (int r = 0; r < R; r++) {
            rounds[isa](half[r], in[r], N);
            for (int i = 0; i < N; i++) CHECK(half[r][i] == ht_f32_to_bf16(in[r][i]));
        }
        for (int wire = HT_DTYPE_F32; wire <= HT_DTYPE_BF16; wire++) {
            sums[isa](out, wire == HT_DTYPE_F32 ? src : src_half, R, N, (enum ht_dtype)wire);
            for (int i = 0; i < N; i++) {
                float s = 0;
                for (int r = 0; r < R; r++) {
                    const float x = wire == HT_DTYPE_F32 ? in[r][i] : ht_bf16_to_f32(half[r][i]);
                    s = r ? s + x : x;
                }
                CHECK(same_bits(out[i], s) || (isnan(out[i]) && isnan(s)));
            }
        }
    }
}
END_TEST

int main(int argc, char **argv)
{
    Suite *s = suite_create("comm");
    TCase *tc = tcase_create("comm");

    tcase_add_test(tc, small_reductions_match_serial);
    tcase_add_test(tc, a_nan_of_any_rank_reaches_all);
    tcase_add_loop_test(tc, reduce_scatter_is_the_sum_in_rank_order, 0,
                        sizeof counts / sizeof *counts);
    tcase_add_loop_test(tc, all_gather_and_broadcast_move_every_byte, 0,
                        sizeof counts / sizeof *counts);
    tcase_add_test(tc, many_under_way_finish_in_any_order);
    tcase_add_test(tc, barrier_holds_until_the_last_comes);
    tcase_add_test(tc, local_ranks_count_this_host);
    tcase_add_test(tc, bad_arguments_are_refused);
    tcase_add_test(tc, every_cpu_level_adds_the_same_bits);
    suite_add_tcase(s, tc);
    return run_mpi_suite(s, argc, argv);
}
