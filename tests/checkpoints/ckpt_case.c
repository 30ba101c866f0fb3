/* tests/checkpoints/ckpt_case.c: small training states with known bits. */
#include "ckpt_case.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checkpoints/folder.h"
#include "core/base/file.h"
#include "core/base/rng.h"

static const struct {
    const char *name;
    int n_dims;
    int64_t shape[3];
    bool matrix;
} tensors[] = {
    { "model.embed_tokens.weight", 2, { 37, 24 }, true },
    { "model.layers.0.mamba.in_proj.weight", 2, { 70, 24 }, true },
    { "model.layers.0.mamba.conv1d.weight", 3, { 40, 1, 4 }, false },
    { "model.layers.0.mamba.A_log", 1, { 3 }, false },
    { "model.layers.0.three.weight", 3, { 5, 7, 11 }, true },
    { "model.final_layernorm.weight", 1, { 24 }, false },
    { "lm_head.weight", 2, { 37, 24 }, true },
};

enum { N_TENSORS = sizeof tensors / sizeof *tensors };

static void *need(void *p)
{
    if (!p) abort();
    return p;
}

void ckpt_case_make(struct ckpt_case *c)
{
    int64_t at = 0;

    memset(c, 0, sizeof *c);
    c->list.n_tensors = N_TENSORS;
    c->list.tensors = need(calloc(N_TENSORS, sizeof *c->list.tensors));
    for (int part = 0; part < 2; part++) { // matrices first, as the real list has them
        for (int i = 0; i < N_TENSORS; i++) {
            struct ht_tensor_info *t = &c->list.tensors[i];
            if (tensors[i].matrix != (part == 0)) continue;
            snprintf(t->name, sizeof t->name, "%s", tensors[i].name);
            t->n_dims = tensors[i].n_dims;
            t->matrix = tensors[i].matrix;
            t->n = 1;
            for (int d = 0; d < t->n_dims; d++) t->n *= t->shape[d] = tensors[i].shape[d];
            t->offset = at;
            at += (t->n + 63) / 64 * 64;
            c->list.n_params += t->n;
        }
        if (part == 0) c->list.n_matrix = at;
    }
    c->list.n_total = at;
    snprintf(c->dir, sizeof c->dir, "/tmp/ht-ckpt-XXXXXX");
    need(mkdtemp(c->dir));
}

void ckpt_case_free(struct ckpt_case *c)
{
    ck_assert_int_eq(ht_file_remove_tree(c->dir), HT_OK);
    free(c->list.tensors);
}

uint32_t ckpt_bits(int array, int64_t flat, int64_t step)
{
    uint32_t out[4];
    ht_rng_philox(out, (uint64_t)step, (uint64_t)array, (uint64_t)flat);
    return out[0];
}

/* The shard arrays of a rank; slices as given. */
static void fill(float *shard[3], const struct ht_zero_slice *slices, int n, int64_t step)
{
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < n; i++)
            for (int64_t k = 0; k < slices[i].n; k++) {
                const uint32_t u = ckpt_bits(a, slices[i].flat_start + k, step);
                memcpy(&shard[a][slices[i].shard_start + k], &u, sizeof u);
            }
}

struct rank {
    struct ht_zero_slice *slices;
    int n_slices;
    int64_t shard_size;
    float *shard[3];
    struct ht_ckpt_job job;
    bool created;
};

static void rank_make(struct rank *r, const struct ckpt_case *c, int rank, int world,
                      bool replicated, int64_t step)
{
    memset(r, 0, sizeof *r);
    ck_assert_int_eq(ht_zero_plan(&r->slices, &r->n_slices, &r->shard_size, c->list.n_matrix,
                                  c->list.n_total, CKPT_BUCKET, world, rank),
                     HT_OK);
    if (replicated) {
        r->slices[0] = (struct ht_zero_slice){ 0, c->list.n_total, 0 };
        r->n_slices = 1;
        r->shard_size = c->list.n_total;
    }
    for (int a = 0; a < 3; a++) r->shard[a] = need(calloc((size_t)r->shard_size + 1, 4));
    fill(r->shard, r->slices, r->n_slices, step);
}

static void rank_free(struct rank *r)
{
    if (r->created) ht_ckpt_job_free(&r->job);
    for (int a = 0; a < 3; a++) free(r->shard[a]);
    free(r->slices);
}

static struct ht_ckpt_source source_of(float *shard[3], int64_t step)
{
    return (struct ht_ckpt_source){ .step = step,
                                    .tokens = 1000 * step,
                                    .master = shard[0],
                                    .exp_avg = shard[1],
                                    .exp_avg_sq = shard[2],
                                    .recipe_text = "train: { seed = 1; };\n",
                                    .loader_json = "{\"row\": 7}\n",
                                    .state_json = "{}\n" };
}

enum ht_status ckpt_save_as(const struct ckpt_case *c, int world, bool replicated, int64_t step,
                            int keep_last, int64_t keep_every)
{
    struct rank *r = need(calloc((size_t)world, sizeof *r));
    enum { MAX_RANGES = 512 };
    struct ht_ckpt_range *all = need(calloc((size_t)world * MAX_RANGES, sizeof *all));
    enum ht_status st = HT_OK;

    for (int k = 0; k < world; k++) {
        rank_make(&r[k], c, k, world, replicated, step);
        ck_assert_int_lt(r[k].n_slices, MAX_RANGES);
        for (int i = 0; i < r[k].n_slices; i++)
            all[k * MAX_RANGES + i] =
                (struct ht_ckpt_range){ r[k].slices[i].flat_start, r[k].slices[i].n };
    }
    struct ht_ckpt_writer_options *o = need(calloc((size_t)world, sizeof *o));
    for (int k = world - 1; k >= 0 && st == HT_OK; k--) {
        o[k] = (struct ht_ckpt_writer_options){ .dir = c->dir,
                                                .tensors = &c->list,
                                                .slices = r[k].slices,
                                                .n_slices = r[k].n_slices,
                                                .shard_size = r[k].shard_size,
                                                .keep_last = keep_last,
                                                .keep_every = keep_every };
        st = ht_ckpt_job_create(&r[k].job, &o[k], k, world, 12345, all, MAX_RANGES);
        if (st != HT_OK) break;
        r[k].created = true;
        const struct ht_ckpt_source s = source_of(r[k].shard, step);
        st = ht_ckpt_job_snapshot(&r[k].job, &s);
        if (st == HT_OK) st = ht_ckpt_job_write(&r[k].job);
    }
    if (st == HT_OK) st = ht_ckpt_job_publish(&r[0].job);
    for (int k = 0; k < world; k++) rank_free(&r[k]);
    free(o);
    free(all);
    free(r);
    return st;
}

static void check_range(const struct ckpt_case *c, struct ht_ckpt *k, int array, int64_t start,
                        int64_t n, int64_t step)
{
    float *out = need(malloc((size_t)n * 4));
    uint32_t *want = need(calloc((size_t)n, 4));

    for (int64_t i = 0; i < n; i++) out[i] = 3.0f;
    ck_assert_int_eq(ht_ckpt_read_flat(k, (enum ht_ckpt_array)array, &c->list, start, n, out),
                     HT_OK);
    for (int t = 0; t < c->list.n_tensors; t++) {
        const struct ht_tensor_info *x = &c->list.tensors[t];
        for (int64_t i = 0; i < x->n; i++)
            if (x->offset + i >= start && x->offset + i < start + n)
                want[x->offset + i - start] = ckpt_bits(array, x->offset + i, step);
    }
    ck_assert_int_eq(memcmp(out, want, (size_t)n * 4), 0);
    free(want);
    free(out);
}

void ckpt_check(const struct ckpt_case *c, const char *path, int n_readers, int64_t step)
{
    struct ht_ckpt *k;

    ck_assert_msg(ht_ckpt_open(&k, path) == HT_OK, "%s", ht_error_message());
    ck_assert_int_eq(ht_ckpt_step(k), step);
    ck_assert_int_eq(ht_ckpt_tokens(k), 1000 * step);
    ck_assert_str_eq(ht_ckpt_recipe(k), "train: { seed = 1; };\n");
    ck_assert_str_eq(ht_ckpt_loader_json(k), "{\"row\": 7}\n");
    ck_assert_str_eq(ht_ckpt_state_json(k), "{}\n");
    for (int r = 0; r < n_readers; r++) {
        struct ht_zero_slice *slices;
        int n;
        ck_assert_int_eq(ht_zero_plan(&slices, &n, NULL, c->list.n_matrix, c->list.n_total,
                                      CKPT_BUCKET, n_readers, r),
                         HT_OK);
        for (int a = 0; a < 3; a++)
            for (int i = 0; i < n; i++)
                check_range(c, k, a, slices[i].flat_start, slices[i].n, step);
        free(slices);
    }
    ht_ckpt_close(k);
}

enum ht_status ckpt_writer(struct ht_ckpt_writer **w, const struct ckpt_case *c, int keep_last,
                           bool background)
{
    const struct ht_zero_slice slice = { 0, c->list.n_total, 0 };
    const struct ht_ckpt_writer_options o = { .dir = c->dir,
                                              .tensors = &c->list,
                                              .slices = &slice,
                                              .n_slices = 1,
                                              .shard_size = c->list.n_total,
                                              .keep_last = keep_last,
                                              .background = background };
    return ht_ckpt_writer_create(w, NULL, &o);
}

enum ht_status ckpt_save(struct ht_ckpt_writer *w, const struct ckpt_case *c, int64_t step)
{
    static float arrays[3][8192]; // not from the heap: allocations may be made to fail here
    const struct ht_zero_slice slice = { 0, c->list.n_total, 0 };
    float *shard[3] = { arrays[0], arrays[1], arrays[2] };
    double stall_s;

    if (c->list.n_total > 8192) abort();
    fill(shard, &slice, 1, step);
    const struct ht_ckpt_source s = source_of(shard, step);
    const enum ht_status st = ht_ckpt_save(w, &s, &stall_s);
    memset(arrays, 0, sizeof arrays); // the snapshot has been taken
    return st;
}

const char *ckpt_path(const struct ckpt_case *c, int64_t step)
{
    static char path[512];
    char name[32];

    ht_ckpt_step_name(name, step);
    snprintf(path, sizeof path, "%s/%s", c->dir, name);
    return path;
}

int64_t ckpt_step_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? ht_ckpt_step_of_name(slash + 1) : -1;
}
