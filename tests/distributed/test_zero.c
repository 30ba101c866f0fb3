/* tests/distributed/test_zero.c: bucketed reduction and gathering against serial sums, bit for bit.
 */
#include "mpi_suite.h"

#include <stdio.h>

#include "distributed/zero.h"

static const struct zero_case {
    int64_t n_matrix, n_total, bucket_bytes;
} cases[] = {
    { 64, 64, 1 << 20 },     // less than one line per rank
    { 0, 640, 1024 },        // vectors only
    { 6400, 6400, 4096 },    // matrices only
    { 12992, 13120, 6000 },  // ragged, several buckets
    { 30016, 31040, 20480 }, // more buckets than slots
    { 4096, 8192, 1 << 20 }, // one bucket each
};
enum { N_CASES = sizeof cases / sizeof *cases };

static struct ht_backend backend;

static struct ht_zero_options options(const struct zero_case *k, enum ht_dtype wire, int stage)
{
    return (struct ht_zero_options){ .stage = stage,
                                     .n_matrix = k->n_matrix,
                                     .n_total = k->n_total,
                                     .bucket_bytes = k->bucket_bytes,
                                     .wire = wire };
}

static enum ht_status create(struct ht_zero **out, int64_t n_matrix, int64_t n_total,
                             int64_t bucket_bytes, enum ht_dtype wire, int stage)
{
    const struct zero_case k = { n_matrix, n_total, bucket_bytes };
    const struct ht_zero_options o = options(&k, wire, stage);
    return ht_zero_create(out, comm, &backend, &o);
}

static const float canary = 12345.0f;

/* Another cut of the same backward pass on every rank and round. */
static void declare_ready(struct ht_zero *z, float *grad, const struct zero_case *k, uint64_t round)
{
    int64_t done = k->n_matrix;
    const uint64_t draw = ht_rng_u64(77, (uint64_t)rank, round);
    const bool vectors_first = draw % 3 == 0;

    if (draw % 5 == 0) { // all at the very end
        ck_assert_int_eq(ht_zero_grads_ready(z, grad, 0, true), HT_OK);
        return;
    }
    for (uint64_t i = 0; done > 0; i++) {
        const int64_t step = 1 + (int64_t)(ht_rng_u64(78, draw, i) % 4000);
        done = done > step ? done - step : 0;
        ck_assert_int_eq(ht_zero_grads_ready(z, grad, done, vectors_first), HT_OK);
    }
    ck_assert_int_eq(ht_zero_grads_ready(z, grad, 0, true), HT_OK);
    ck_assert_int_eq(ht_zero_grads_ready(z, grad, 0, true), HT_OK); // nothing is left: harmless
}

static void reduce_case(const struct zero_case *k, enum ht_dtype wire, int stage)
{
    const int64_t padded = ht_zero_padded_total(k->n_matrix, k->n_total, k->bucket_bytes, n_ranks);
    float *grad = malloc((size_t)padded * sizeof *grad), *shard;
    struct ht_zero *z;

    ck_assert_int_eq(create(&z, k->n_matrix, k->n_total, k->bucket_bytes, wire, stage), HT_OK);
    const int64_t size = ht_zero_shard_size(z);
    unsigned char *is_real = malloc((size_t)size + 1);
    for (uint64_t round = 0; round < 3; round++) {
        for (int64_t i = 0; i < padded; i++)
            grad[i] = i < k->n_total ? contribution(round, rank, i) : canary; // must not leak
        declare_ready(z, grad, k, round);
        ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_OK);
        memset(is_real, 0, (size_t)size);
        for (int s = 0; s < ht_zero_n_slices(z); s++) {
            const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
            for (int64_t i = 0; i < sl->n; i++) {
                const float want = serial_sum(round, sl->flat_start + i, wire);
                CHECK_MSG(same_bits(shard[sl->shard_start + i], want),
                          "rank %d flat %lld: %a, not %a", rank, (long long)(sl->flat_start + i),
                          (double)shard[sl->shard_start + i], (double)want);
                is_real[sl->shard_start + i] = 1;
            }
        }
        for (int64_t i = 0; i < size; i++) CHECK(is_real[i] || shard[i] == 0.0f);
    }
    free(is_real);
    free(grad);
    ht_zero_free(z);
}

START_TEST(reduced_gradients_are_rank_order_sums)
{
    reduce_case(&cases[_i], HT_DTYPE_F32, 1);
    reduce_case(&cases[_i], HT_DTYPE_BF16, 1);
    reduce_case(&cases[_i], HT_DTYPE_F32, 0);
    reduce_case(&cases[_i], HT_DTYPE_BF16, 0);
}
END_TEST

START_TEST(random_sizes_reduce_too)
{
    for (uint64_t i = 0; i < 12; i++) {
        const int64_t m = 64 * (int64_t)(ht_rng_u64(5, 0, 3 * i) % 150);
        const int64_t v = 64 * (int64_t)(ht_rng_u64(5, 0, 3 * i + 1) % 30);
        const struct zero_case k = { m, m + v, 1 + (int64_t)(ht_rng_u64(5, 0, 3 * i + 2) % 9000) };
        reduce_case(&k, HT_DTYPE_F32, 1);
    }
}
END_TEST

static float weight_of(int64_t flat)
{
    return (float)(flat % 251) - 125;
} // exact in bf16

static void gather_case(const struct zero_case *k, enum ht_dtype dtype)
{
    enum { GUARD = 64 };
    const int64_t n_m = ht_zero_padded_matrix(k->n_matrix, n_ranks);
    const int64_t n_v = ht_zero_padded_vector(k->n_matrix, k->n_total, n_ranks);
    char *m = malloc((size_t)(n_m + GUARD) * sizeof(float));
    float *v = malloc((size_t)(n_v + GUARD) * sizeof *v);
    struct ht_zero *z;

    ck_assert_int_eq(create(&z, k->n_matrix, k->n_total, k->bucket_bytes, HT_DTYPE_F32, 1), HT_OK);
    for (int64_t i = 0; i < n_m + GUARD; i++) ht_store_f32(m, i, dtype, canary);
    for (int64_t i = 0; i < n_v + GUARD; i++) v[i] = canary;
    const float guard = ht_load_f32(m, n_m, dtype);
    for (int s = 0; s < ht_zero_n_slices(z); s++) {
        const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
        for (int64_t i = sl->flat_start; i < sl->flat_start + sl->n; i++) {
            if (i < k->n_matrix)
                ht_store_f32(m, i, dtype, weight_of(i));
            else
                v[i - k->n_matrix] = weight_of(i);
        }
    }
    ck_assert_int_eq(ht_zero_gather_weights(z, m, dtype, v), HT_OK);
    for (int64_t i = 0; i < k->n_total; i++)
        CHECK(weight_of(i) == (i < k->n_matrix ? ht_load_f32(m, i, dtype) : v[i - k->n_matrix]));
    for (int64_t i = 0; i < GUARD; i++)
        CHECK(ht_load_f32(m, n_m + i, dtype) == guard && v[n_v + i] == canary);
    ht_zero_free(z);
    free(m);
    free(v);
}

START_TEST(gathered_weights_reach_every_rank)
{
    gather_case(&cases[_i], HT_DTYPE_F32);
    gather_case(&cases[_i], HT_DTYPE_BF16);
}
END_TEST

START_TEST(slices_match_the_plan)
{
    struct ht_zero_slice *s;
    struct ht_zero *z;
    int n;
    int64_t size;

    ck_assert_int_eq(
        create(&z, cases[_i].n_matrix, cases[_i].n_total, cases[_i].bucket_bytes, HT_DTYPE_F32, 1),
        HT_OK);
    ck_assert_int_eq(ht_zero_plan(&s, &n, &size, cases[_i].n_matrix, cases[_i].n_total,
                                  cases[_i].bucket_bytes, n_ranks, rank),
                     HT_OK);
    ck_assert_int_eq(n, ht_zero_n_slices(z));
    ck_assert_int_eq(size, ht_zero_shard_size(z));
    CHECK(memcmp(s, ht_zero_slices(z), (size_t)n * sizeof *s) == 0);
    const struct ht_zero_bytes held = ht_zero_buffer_bytes(z);
    ck_assert_uint_eq(held.weights, 0);
    if (n_ranks == 1) ck_assert_uint_eq(held.staging + held.gradients, 0); // nothing to hold
    free(s);
    ht_zero_free(z);
}
END_TEST

START_TEST(misuse_is_refused)
{
    struct ht_zero *z;
    float grad[4096] = { 0 }, other[4096] = { 0 }, *shard;

    ck_assert_int_eq(create(&z, 100, 128, 4096, HT_DTYPE_F32, 1), HT_ERR_ARG);
    ck_assert_ptr_null(z);
    ck_assert_int_eq(create(&z, 64, 128, 4096, HT_DTYPE_F16, 1), HT_ERR_ARG);
    ck_assert_int_eq(create(&z, 64, 128, 4096, HT_DTYPE_F32, 4), HT_ERR_ARG);
    ck_assert_int_eq(create(&z, 64, 128, 4096, HT_DTYPE_F32, 2), HT_ERR_ARG); // units of what?
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "units"));
    ck_assert_int_eq(create(&z, 2048, 2560, 64, HT_DTYPE_F32, 1), HT_OK);
    float *place;
    void *weights;
    ck_assert_int_eq(ht_zero_unit_grads(z, 0, &place), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_unit_weights(z, 0, -1, &weights), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_vectors_ready(z, grad), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_ERR_ARG);
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "declared ready"));
    ck_assert_int_eq(ht_zero_grads_ready(z, grad, 1024, false), HT_OK);
    ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_ERR_ARG); // half of them are missing
    ck_assert_int_eq(ht_zero_grads_ready(z, other, 0, true), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_grads_ready(z, grad, -1, true), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_grads_ready(z, grad, 0, true), HT_OK);
    ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_OK);
    ht_zero_free(z);
    ht_zero_free(NULL);
}
END_TEST

int main(int argc, char **argv)
{
    if (ht_backend_create_cpu(&backend, 1, 1 << 16) != HT_OK) return 1;
    Suite *s = suite_create("zero");
    TCase *tc = tcase_create("zero");

    tcase_add_loop_test(tc, reduced_gradients_are_rank_order_sums, 0, N_CASES);
    tcase_add_test(tc, random_sizes_reduce_too);
    tcase_add_loop_test(tc, gathered_weights_reach_every_rank, 0, N_CASES);
    tcase_add_loop_test(tc, slices_match_the_plan, 0, N_CASES);
    tcase_add_test(tc, misuse_is_refused);
    suite_add_tcase(s, tc);
    return run_mpi_suite(s, argc, argv);
}
