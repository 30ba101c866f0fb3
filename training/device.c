/* training/device.c: what a rank computes on, and how batches and state get there.
 *
 * On the CPU a batch is used where the loader has it, and state is written in place. On CUDA a
 * batch is copied into pinned memory and enqueued: two slots, so that the host prepares one while
 * the device reads the other.
 */
#include "training/device.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "training/run.h"

static enum ht_status refuse_cuda(const struct ht_comm *comm, const char *why)
{
    return HT_FAIL(
        HT_ERR_UNSUPPORTED,
        "parallel.device is \"cuda\", and rank %d has no GPU: %s. Without one: hybridtrain "
        "--plan shows what the recipe needs, parallel.device=cpu trains here, and "
        "recipes/quickstart.cfg is made for that",
        ht_comm_rank(comm), why);
}

/* Whether no other rank would take the same GPU: ranks of a host may see all of its GPUs, or each
 * its own. */
static enum ht_status has_its_own(bool *own, bool any, struct ht_comm *comm)
{
    const int rank = ht_comm_rank(comm);
    unsigned char mine[16] = { 0 }, other[16];

    *own = any;
    if (any) HT_TRY(ht_backend_cuda_uuid(mine, ht_comm_local_rank(comm)));
    for (int k = 0; k < ht_comm_size(comm); k++) {
        memcpy(other, mine, sizeof other);
        HT_TRY(ht_comm_broadcast(comm, other, sizeof other, k));
        if (k != rank && any && memcmp(other, mine, sizeof mine) == 0) *own = false;
    }
    return HT_OK;
}

enum ht_status ht_train_device(enum ht_backend_kind *kind, size_t *memory_bytes,
                               const struct ht_config *cfg, struct ht_comm *comm)
{
    const enum ht_device_choice choice = cfg->parallel.device;
    const int local = ht_comm_local_size(comm);
    char why[512] = "";
    int n = 0;
    int64_t least, most, enough;
    bool own;

    *kind = HT_BACKEND_CPU;
    *memory_bytes = 0;
    if (choice == HT_DEVICE_CPU) return HT_OK;
    if (ht_backend_count_cuda(&n, memory_bytes) != HT_OK) {
        snprintf(why, sizeof why, "%s", ht_error_message());
        n = 0;
    }
    least = most = n;
    HT_TRY(has_its_own(&own, n > 0, comm));
    enough = own || cfg->parallel.share_gpus;
    HT_TRY(ht_comm_min_i64(comm, &least, 1));
    HT_TRY(ht_comm_max_i64(comm, &most, 1));
    HT_TRY(ht_comm_min_i64(comm, &enough, 1));
    if (choice == HT_DEVICE_AUTO && most == 0) return HT_OK;
    if (n == 0 && choice == HT_DEVICE_CUDA) return refuse_cuda(comm, why);
    if (n == 0)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "rank %d has no GPU (%s), other ranks have one: set parallel.device",
                       ht_comm_rank(comm), why);
    if (least == 0) // the message comes from the rank that has none
        return HT_FAIL(HT_ERR_UNSUPPORTED, "some ranks have no GPU: set parallel.device");
    if (!enough && choice == HT_DEVICE_AUTO) return HT_OK;
    if (!enough)
        return HT_FAIL(
            HT_ERR_UNSUPPORTED,
            "%d ranks on this host and %d GPU(s): start at most one rank per GPU, or set "
            "parallel.device=cpu (several ranks on a GPU, for tests: "
            "parallel.share_gpus=true)",
            local, n);
    *kind = HT_BACKEND_CUDA;
    return HT_OK;
}

enum ht_status ht_run_create_backend(struct ht_run *r)
{
    const int local = ht_comm_local_size(r->comm);
    enum ht_backend_kind kind;
    size_t memory_bytes;

    HT_TRY(ht_train_device(&kind, &memory_bytes, r->cfg, r->comm));
    if (kind == HT_BACKEND_CPU && memory_bytes > 0)
        HT_INFO(r->log, "%d ranks on this host and fewer GPUs: training on the CPU", local);
    if (kind == HT_BACKEND_CUDA) {
        HT_TRY(ht_backend_create_cuda(&r->backend, ht_comm_local_rank(r->comm), 1 << 20));
    } else {
        // ranks of one host share its cores
        int threads = r->cfg->train.threads;
        if (threads == 0) {
            threads = (int)sysconf(_SC_NPROCESSORS_ONLN) / local;
            if (threads < 1) threads = 1;
        }
        HT_TRY(ht_backend_create_cpu(&r->backend, threads, 1 << 20));
    }
    return ht_comm_use_device(r->comm, &r->backend);
}

/* ---- buffers ---- */

static int64_t micro_batches(const struct ht_run *r)
{
    const struct ht_train_config *t = &r->cfg->train;
    return t->global_batch_tokens / (t->micro_batch * r->cfg->data.seq_len * ht_comm_size(r->comm));
}

size_t ht_run_sums_bytes(const struct ht_run *r)
{
    const int64_t n_ranks = ht_comm_size(r->comm), n_slices = ht_zero_n_slices(r->zero);

    return ht_arena_bytes((size_t)micro_batches(r) * 3 * sizeof(double)) +
           ht_arena_bytes((size_t)n_slices * sizeof(double)) +
           ht_arena_bytes((size_t)n_ranks * 4 * sizeof(double)) +
           ht_arena_bytes(4 * sizeof(double)) + ht_arena_bytes(sizeof(float));
}

static enum ht_status create_slot(struct ht_run *r, struct ht_run_slot *s)
{
    const int64_t n_tokens = r->cfg->train.micro_batch * r->cfg->data.seq_len;
    const size_t bytes = (size_t)(4 * n_tokens + 1) * sizeof(int32_t);
    void *p = NULL;

    HT_TRY(ht_backend_host_alloc(&p, &r->backend, "a micro-batch", bytes));
    s->host = p;
    HT_TRY(ht_backend_alloc(&p, &r->backend, "a micro-batch", bytes));
    s->device = p;
    return HT_OK;
}

enum ht_status ht_run_create_buffers(struct ht_run *r)
{
    const int64_t n_ranks = ht_comm_size(r->comm), n_slices = ht_zero_n_slices(r->zero);
    struct ht_run_sums *s = &r->sums;
    void *p = NULL;

    s->micro = ht_arena_get(&r->state, (size_t)micro_batches(r) * 3 * sizeof(double));
    s->squares = ht_arena_get(&r->state, (size_t)n_slices * sizeof(double));
    s->ranks = ht_arena_get(&r->state, (size_t)n_ranks * 4 * sizeof(double));
    s->total = ht_arena_get(&r->state, 4 * sizeof(double));
    s->clip = ht_arena_get(&r->state, sizeof(float));
    HT_TRY(ht_backend_host_alloc(&p, &r->backend, "the sums of a step", 4 * sizeof(double)));
    s->host = p;
    if (r->backend.kind == HT_BACKEND_CPU) return HT_OK;
    for (int i = 0; i < HT_RUN_SLOTS; i++) HT_TRY(create_slot(r, &r->slots[i]));
    return HT_OK;
}

void ht_run_free_buffers(struct ht_run *r)
{
    for (int i = 0; i < HT_RUN_SLOTS; i++) {
        ht_backend_host_free(&r->backend, r->slots[i].host);
        ht_backend_free_memory(&r->backend, r->slots[i].device);
        ht_backend_mark_free(&r->backend, &r->slots[i].copied);
    }
    ht_backend_host_free(&r->backend, r->sums.host);
    ht_backend_mark_free(&r->backend, &r->sums.reduce_start);
    ht_backend_mark_free(&r->backend, &r->sums.reduce_end);
    ht_backend_mark_free(&r->backend, &r->sums.there);
}

/* ---- batches ---- */

enum ht_status ht_run_put_batch(struct ht_run *r, struct ht_model_batch *out,
                                const struct ht_batch *batch)
{
    struct ht_run_slot *s = &r->slots[r->next_slot];
    const int64_t n = batch->n_tokens;
    const size_t bytes = (size_t)n * sizeof(int32_t);

    *out = (struct ht_model_batch){ .n_tokens = n,
                                    .ids = batch->ids,
                                    .labels = batch->labels,
                                    .pos = batch->pos,
                                    .seqs = batch->seqs };
    if (r->backend.kind == HT_BACKEND_CPU) return HT_OK;
    r->next_slot = (r->next_slot + 1) % HT_RUN_SLOTS;
    HT_TRY(ht_backend_mark_wait(&r->backend, &s->copied));
    memcpy(s->host, batch->ids, bytes);
    memcpy(s->host + n, batch->labels, bytes);
    memcpy(s->host + 2 * n, batch->pos, bytes);
    memcpy(s->host + 3 * n, batch->seqs.starts, (size_t)(batch->seqs.n_seqs + 1) * sizeof(int32_t));
    HT_TRY(ht_backend_upload(&r->backend, s->device, s->host,
                             3 * bytes + (size_t)(batch->seqs.n_seqs + 1) * sizeof(int32_t)));
    HT_TRY(ht_backend_mark_set(&r->backend, &s->copied));
    out->ids = s->device;
    out->labels = s->device + n;
    out->pos = s->device + 2 * n;
    out->seqs.starts = s->device + 3 * n;
    return HT_OK;
}

/* ---- state ---- */

enum { CHUNK = 1 << 22 }; // elements that go through host memory at a time

static enum ht_status fill_slice(struct ht_run *r, float *array, const struct ht_zero_slice *s,
                                 ht_state_source *source, void *user, float *host)
{
    if (!host) return source(user, s->flat_start, s->n, array + s->shard_start);
    for (int64_t i = 0; i < s->n; i += CHUNK) {
        const int64_t n = s->n - i < CHUNK ? s->n - i : CHUNK;
        HT_TRY(source(user, s->flat_start + i, n, host));
        HT_TRY(ht_backend_upload(&r->backend, array + s->shard_start + i, host,
                                 (size_t)n * sizeof *host));
    }
    return HT_OK;
}

enum ht_status ht_run_fill(struct ht_run *r, float *array, ht_state_source *source, void *user)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    enum ht_status st = HT_OK;
    float *host = NULL;

    if (r->backend.kind != HT_BACKEND_CPU) {
        host = malloc(CHUNK * sizeof *host);
        if (!host) return HT_FAIL(HT_ERR_MEMORY, "no memory for state on its way to the device");
    }
    for (int i = 0; i < ht_zero_n_slices(r->zero); i++)
        HT_TRY_GOTO(st, done, fill_slice(r, array, &slices[i], source, user, host));
done:
    free(host);
    return st;
}

/* Working copies of elements [first, first + n) from the masters at shard place `at`. */
static enum ht_status publish_piece(struct ht_run *r, int64_t first, int64_t at, int64_t n,
                                    enum ht_dtype dtype, float *host, void *narrow)
{
    char *to = ht_run_weight(r, first, at);
    const size_t width = ht_dtype_bytes(dtype);

    if (!host) {
        ht_convert(to, dtype, r->master + at, HT_DTYPE_F32, n);
        return HT_OK;
    }
    for (int64_t i = 0; i < n; i += CHUNK) {
        const int64_t k = n - i < CHUNK ? n - i : CHUNK;
        HT_TRY(
            ht_backend_download(&r->backend, host, r->master + at + i, (size_t)k * sizeof *host));
        ht_convert(narrow, dtype, host, HT_DTYPE_F32, k);
        HT_TRY(ht_backend_upload(&r->backend, to + (size_t)i * width, narrow, (size_t)k * width));
    }
    return HT_OK;
}

enum ht_status ht_run_publish_weights(struct ht_run *r)
{
    const struct ht_zero_slice *slices = ht_zero_slices(r->zero);
    const int64_t n_matrix = r->model->list.n_matrix;
    float *host = NULL, *narrow = NULL;
    enum ht_status st = HT_OK;

    if (r->backend.kind != HT_BACKEND_CPU) {
        host = malloc(2 * CHUNK * sizeof *host);
        if (!host)
            return HT_FAIL(HT_ERR_MEMORY, "no memory for weights on their way to the device");
        narrow = host + CHUNK;
    }
    for (int i = 0; i < ht_zero_n_slices(r->zero); i++) {
        const struct ht_zero_slice *s = &slices[i];
        const int64_t end = s->flat_start + s->n; // zero_stage 0: one slice with both parts
        const int64_t matrix_end = end < n_matrix ? end : n_matrix;
        const int64_t vector_start = s->flat_start > n_matrix ? s->flat_start : n_matrix;
        if (s->flat_start < matrix_end)
            HT_TRY_GOTO(st, done,
                        publish_piece(r, s->flat_start, s->shard_start, matrix_end - s->flat_start,
                                      r->model->dtype, host, narrow));
        if (vector_start < end)
            HT_TRY_GOTO(st, done,
                        publish_piece(r, vector_start,
                                      s->shard_start + (vector_start - s->flat_start),
                                      end - vector_start, HT_DTYPE_F32, host, narrow));
    }
    ht_model_weights_changed(r->model);
    st = ht_zero_gather_weights(r->zero, r->model->matrix, r->model->dtype, r->model->vector);
done:
    free(host);
    return st;
}
