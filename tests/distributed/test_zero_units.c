/* tests/distributed/test_zero_units.c: ZeRO-2 and -3: gradients and weights of one unit at a time
 * against serial sums, bit for bit. */
#include "mpi_suite.h"

#include "distributed/zero.h"

enum { MAX_UNITS = 6, N_MICRO = 3 };

static const struct units_case {
    int n_units;
    int64_t start[MAX_UNITS + 1], n_total, bucket_bytes;
    bool keep_first;
} cases[] = {
    { 1, { 0, 64 }, 64, 1 << 20, false },                            // one line, no vectors
    { 3, { 0, 640, 1920, 3200 }, 3520, 4096, false },                // several buckets a unit
    { 5, { 0, 3008, 3072, 4096, 9984, 12992 }, 13120, 6000, false }, // ragged
    { 5, { 0, 3008, 3072, 4096, 9984, 12992 }, 13120, 6000, true },  // first unit kept
    { 6, { 0, 64, 4160, 8256, 12352, 16448, 16512 }, 17536, 1 << 20, true },
};
enum { N_CASES = sizeof cases / sizeof *cases };

static struct ht_backend backend;

static struct ht_zero *create(const struct units_case *k, int stage, enum ht_dtype wire)
{
    struct ht_zero *z;
    const enum ht_status st =
        ht_zero_create(&z, comm, &backend,
                       &(struct ht_zero_options){ .stage = stage,
                                                  .n_matrix = k->start[k->n_units],
                                                  .n_total = k->n_total,
                                                  .bucket_bytes = k->bucket_bytes,
                                                  .wire = wire,
                                                  .n_units = k->n_units,
                                                  .unit_start = k->start,
                                                  .keep_first = k->keep_first,
                                                  .weight_dtype = HT_DTYPE_BF16 });
    ck_assert_msg(st == HT_OK, "%s", ht_error_message());
    return z;
}

static uint64_t key(uint64_t step, uint64_t micro)
{
    return 100 * step + micro;
}

static void write_unit(struct ht_zero *z, const struct units_case *k, int unit, uint64_t round)
{
    float *g;

    ck_assert_msg(ht_zero_unit_grads(z, unit, &g) == HT_OK, "%s", ht_error_message());
    for (int64_t i = k->start[unit]; i < k->start[unit + 1]; i++) {
        CHECK(g[i - k->start[unit]] == 0.0f);
        g[i - k->start[unit]] += contribution(round, rank, i);
    }
}

/* One backward pass: the head first (which is the first unit where that is kept), then down. */
static void backward(struct ht_zero *z, const struct units_case *k, uint64_t round)
{
    if (k->keep_first) write_unit(z, k, 0, round);
    for (int u = k->n_units - 1; u >= k->keep_first; u--) {
        write_unit(z, k, u, round);
        ck_assert_int_eq(ht_zero_unit_grads_done(z, u), HT_OK);
    }
    if (k->keep_first) ck_assert_int_eq(ht_zero_unit_grads_done(z, 0), HT_OK);
}

static void reduce_case(const struct units_case *k, int stage, enum ht_dtype wire)
{
    struct ht_zero *z = create(k, stage, wire);
    const int64_t n_matrix = k->start[k->n_units], n_v = k->n_total - n_matrix;
    const int64_t size = ht_zero_shard_size(z);
    float *v = malloc(((size_t)n_v + 1) * sizeof *v), *shard;
    unsigned char *is_real = malloc((size_t)size + 1);

    for (uint64_t step = 0; step < 3; step++) {
        const uint64_t n_micro = 1 + step % N_MICRO;
        for (uint64_t m = 0; m < n_micro; m++) backward(z, k, key(step, m));
        for (int64_t i = 0; i < n_v; i++) v[i] = contribution(key(step, 0), rank, n_matrix + i);
        ck_assert_int_eq(ht_zero_vectors_ready(z, v), HT_OK);
        ck_assert_msg(ht_zero_reduced(z, &shard) == HT_OK, "%s", ht_error_message());
        memset(is_real, 0, (size_t)size);
        for (int s = 0; s < ht_zero_n_slices(z); s++) {
            const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
            for (int64_t i = 0; i < sl->n; i++) {
                const int64_t flat = sl->flat_start + i;
                float want = serial_sum(key(step, 0), flat, wire);
                for (uint64_t m = 1; flat < n_matrix && m < n_micro; m++)
                    want += serial_sum(key(step, m), flat, wire);
                CHECK_MSG(same_bits(shard[sl->shard_start + i], want),
                          "stage %d rank %d step %d flat %lld: %a, not %a", stage, rank, (int)step,
                          (long long)flat, (double)shard[sl->shard_start + i], (double)want);
                is_real[sl->shard_start + i] = 1;
            }
        }
        for (int64_t i = 0; i < size; i++) CHECK(is_real[i] || shard[i] == 0.0f);
    }
    free(v);
    free(is_real);
    ht_zero_free(z);
}

START_TEST(gradients_are_sums_over_ranks_then_micro_batches)
{
    reduce_case(&cases[_i], 2, HT_DTYPE_F32);
    reduce_case(&cases[_i], 3, HT_DTYPE_F32);
    reduce_case(&cases[_i], 2, HT_DTYPE_BF16);
}
END_TEST

/* Every element belongs to one slice of one rank. */
START_TEST(slices_cover_everything_once)
{
    struct ht_zero *z = create(&cases[_i], 2, HT_DTYPE_F32);
    const int64_t n = cases[_i].n_total;
    double *owners = calloc((size_t)n, sizeof *owners);

    for (int s = 0; s < ht_zero_n_slices(z); s++) {
        const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
        for (int64_t i = 0; i < sl->n; i++) owners[sl->flat_start + i] += 1;
        ck_assert_int_le(sl->shard_start + sl->n, ht_zero_shard_size(z));
    }
    ck_assert_int_eq(ht_comm_sum_f64(comm, owners, (int)n), HT_OK);
    for (int64_t i = 0; i < n; i++) CHECK(owners[i] == 1.0);
    free(owners);
    ht_zero_free(z);
}
END_TEST

static float weight_of(int64_t flat, int version)
{
    return (float)((flat + 17 * version) % 251) - 125; // exact in bf16
}

static void write_shard(struct ht_zero *z, const struct units_case *k, float *v, int version)
{
    const int64_t n_matrix = k->start[k->n_units];

    for (int s = 0; s < ht_zero_n_slices(z); s++) {
        const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
        for (int64_t i = 0; i < sl->n; i++) {
            const int64_t flat = sl->flat_start + i;
            if (flat < n_matrix)
                ht_store_f32(ht_zero_weight_shard(z), sl->shard_start + i, HT_DTYPE_BF16,
                             weight_of(flat, version));
            else
                v[flat - n_matrix] = weight_of(flat, version);
        }
    }
    ck_assert_int_eq(ht_zero_gather_weights(z, ht_zero_weight_shard(z), HT_DTYPE_BF16, v), HT_OK);
    for (int64_t i = n_matrix; i < k->n_total; i++) CHECK(v[i - n_matrix] == weight_of(i, version));
}

static void *use_unit(struct ht_zero *z, const struct units_case *k, int unit, int next,
                      int version)
{
    void *w;

    ck_assert_msg(ht_zero_unit_weights(z, unit, next, &w) == HT_OK, "%s", ht_error_message());
    for (int64_t i = k->start[unit]; i < k->start[unit + 1]; i++)
        CHECK_MSG(ht_load_f32(w, i - k->start[unit], HT_DTYPE_BF16) == weight_of(i, version),
                  "rank %d version %d unit %d element %lld", rank, version, unit, (long long)i);
    return w;
}

START_TEST(weights_come_unit_by_unit)
{
    const struct units_case *k = &cases[_i];
    const int n = k->n_units, head = k->keep_first ? 0 : n - 1;
    struct ht_zero *z = create(k, 3, HT_DTYPE_F32);
    const int64_t n_v = ht_zero_padded_vector(k->start[n], k->n_total, n_ranks);
    float *v = malloc(((size_t)n_v + 1) * sizeof *v);

    for (int version = 0; version < 3; version++) {
        write_shard(z, k, v, version);
        for (int u = 0; u < n; u++) { // forward; one unit ahead
            use_unit(z, k, u, u + 1 < n ? u + 1 : head, version);
            ht_zero_unit_weights_done(z, u);
        }
        void *const last = use_unit(z, k, head, n - 1, version);
        if (!k->keep_first) ht_zero_unit_weights_done(z, head);
        for (int u = n - 1; u >= k->keep_first; u--) { // backward
            // what the forward pass used last is still there
            void *const w = use_unit(z, k, u, u > k->keep_first ? u - 1 : -1, version);
            if (u == head) ck_assert_ptr_eq(w, last);
            ht_zero_unit_weights_done(z, u);
        }
        if (k->keep_first) ht_zero_unit_weights_done(z, 0);
    }
    free(v);
    ht_zero_free(z);
}
END_TEST

/* Stage 2 keeps them whole: units stand side by side, their padding in between does not exist. */
START_TEST(whole_weights_are_gathered_in_place)
{
    enum { GUARD = 64 };
    const struct units_case *k = &cases[_i];
    struct ht_zero *z = create(k, 2, HT_DTYPE_F32);
    const int64_t n = k->start[k->n_units], n_m = ht_zero_padded_matrix(n, n_ranks);
    const int64_t n_v = ht_zero_padded_vector(n, k->n_total, n_ranks);
    ht_bf16 *m = calloc((size_t)n_m + GUARD, sizeof *m);
    float *v = calloc((size_t)n_v + GUARD, sizeof *v);

    for (int version = 0; version < 3; version++) {
        for (int64_t i = 0; i < GUARD; i++) m[n_m + i] = 77;
        for (int s = 0; s < ht_zero_n_slices(z); s++) {
            const struct ht_zero_slice *sl = &ht_zero_slices(z)[s];
            for (int64_t i = sl->flat_start; i < sl->flat_start + sl->n; i++)
                if (i < n)
                    m[i] = ht_f32_to_bf16(weight_of(i, version));
                else
                    v[i - n] = weight_of(i, version);
        }
        ck_assert_int_eq(ht_zero_gather_weights(z, m, HT_DTYPE_F32, v), HT_ERR_ARG);
        ck_assert_int_eq(ht_zero_gather_weights(z, m, HT_DTYPE_BF16, v), HT_OK);
        for (int64_t i = 0; i < n; i++)
            CHECK_MSG(ht_bf16_to_f32(m[i]) == weight_of(i, version), "rank %d element %lld", rank,
                      (long long)i);
        for (int64_t i = n; i < k->n_total; i++) CHECK(v[i - n] == weight_of(i, version));
        for (int64_t i = 0; i < GUARD; i++) CHECK(m[n_m + i] == 77);
    }
    free(m);
    free(v);
    ht_zero_free(z);
}
END_TEST

START_TEST(misuse_is_refused)
{
    const struct units_case *k = &cases[2];
    struct ht_zero *z = create(k, 3, HT_DTYPE_F32);
    float *g, *shard, v[128] = { 0 };
    void *w;

    ck_assert_int_eq(ht_zero_unit_grads(z, 5, &g), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_unit_weights(z, -1, -1, &w), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_grads_ready(z, v, 0, true), HT_ERR_ARG);
    ck_assert_int_eq(ht_zero_unit_grads_done(z, 4), HT_ERR_ARG); // was never begun
    ck_assert_int_eq(ht_zero_unit_grads(z, 4, &g), HT_OK);
    ck_assert_int_eq(ht_zero_unit_grads(z, 4, &g), HT_ERR_ARG); // is in use
    ck_assert_int_eq(ht_zero_unit_grads(z, 3, &g), HT_OK);
    ck_assert_int_eq(ht_zero_unit_grads(z, 2, &g), HT_ERR_ARG); // two at a time
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "all are in use"));
    ck_assert_int_eq(ht_zero_unit_grads_done(z, 4), HT_OK);
    ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_ERR_ARG); // others are missing
    ck_assert_ptr_nonnull(strstr(ht_error_message(), "not declared ready"));
    ck_assert_int_eq(ht_zero_unit_grads_done(z, 3), HT_OK);
    for (int u = 2; u >= 0; u--) {
        ck_assert_int_eq(ht_zero_unit_grads(z, u, &g), HT_OK);
        ck_assert_int_eq(ht_zero_unit_grads_done(z, u), HT_OK);
    }
    ck_assert_int_eq(ht_zero_vectors_ready(z, v), HT_OK);
    ck_assert_int_eq(ht_zero_reduced(z, &shard), HT_OK);
    ht_zero_free(z);
}
END_TEST

START_TEST(units_must_cover_the_matrices)
{
    const int64_t short_of[3] = { 0, 64, 128 }, ragged[3] = { 0, 100, 256 },
                  empty[3] = { 0, 0, 256 };
    const int64_t *const wrong[] = { short_of, ragged, empty };

    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const struct ht_zero_options o = { .stage = 2,
                                           .n_matrix = 256,
                                           .n_total = 320,
                                           .bucket_bytes = 4096,
                                           .n_units = 2,
                                           .unit_start = wrong[i] };
        struct ht_zero *z;
        ck_assert_int_eq(ht_zero_create(&z, comm, &backend, &o), HT_ERR_ARG);
        ck_assert_ptr_null(z);
    }
}
END_TEST

int main(int argc, char **argv)
{
    if (ht_backend_create_cpu(&backend, 1, 1 << 16) != HT_OK) return 1;
    Suite *s = suite_create("zero_units");
    TCase *tc = tcase_create("zero_units");

    tcase_add_loop_test(tc, gradients_are_sums_over_ranks_then_micro_batches, 0, N_CASES);
    tcase_add_loop_test(tc, slices_cover_everything_once, 0, N_CASES);
    tcase_add_loop_test(tc, weights_come_unit_by_unit, 0, N_CASES);
    tcase_add_loop_test(tc, whole_weights_are_gathered_in_place, 0, N_CASES);
    tcase_add_test(tc, misuse_is_refused);
    tcase_add_test(tc, units_must_cover_the_matrices);
    suite_add_tcase(s, tc);
    return run_mpi_suite(s, argc, argv);
}
