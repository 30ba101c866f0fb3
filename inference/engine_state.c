/* inference/engine_state.c: a sequence's state in a file.
 *
 *   "HTSTATE1"  fingerprint (16)  n_tokens (i64)  state bytes (i64)  ids (n_tokens, i32)  state
 *   XXH3-128 of everything before it (16)
 * Little-endian. The state is that after a multiple of prefill_chunk tokens, so that what is
 * generated from it has the bits that it would have without the file.
 */
#include <stdlib.h>
#include <string.h>

#include "checkpoints/hash.h"
#include "core/base/file.h"
#include "core/model/packed.h"
#include "inference/engine_impl.h"

static const char magic[8] = "HTSTATE1";
enum { HEAD_BYTES = 8 + 16 + 8 + 8, HASH_BYTES = 16 };

/* Of the model, its weights' vectors and how prompts are cut: states of others mean nothing here.
 */
static enum ht_status fingerprint(const struct ht_engine *e, struct ht_hash *out)
{
    const struct ht_model *m = e->loaded.model;
    const struct ht_model_config *c = &m->cfg;
    const int64_t numbers[] = {
        c->vocab_size,     c->d_model,         c->n_layers,
        c->ssm_heads,      c->ssm_d_head,      c->d_state,
        c->n_groups,       c->d_conv,          c->n_heads,
        c->n_kv_heads,     c->d_head,          c->rope_dims,
        c->d_ff,           c->chunk,           (int64_t)m->dtype,
        m->packed != NULL, e->o.prefill_chunk, ht_loaded_weight_bytes(&e->loaded)
    };
    struct ht_hasher *h;

    HT_TRY(ht_hasher_create(&h));
    ht_hasher_update(h, numbers, sizeof numbers);
    ht_hasher_update(h, m->vector,
                     (size_t)(m->list.n_total - m->list.n_matrix) * sizeof *m->vector);
    *out = ht_hasher_digest(h);
    ht_hasher_free(h);
    return HT_OK;
}

/* The state after c->ids[0 .. n) at *place, from a snapshot as far as there is one. */
static enum ht_status compute(struct ht_engine *e, const struct ht_state_command *c, int64_t n,
                              struct ht_place *place)
{
    const struct ht_snapshot *s = e->cache ? ht_prefix_cache_find(e->cache, c->ids, n, n) : NULL;

    if (s)
        HT_TRY(ht_pool_import(e->pool, place, s->n_tokens, s->state));
    else
        HT_TRY(ht_pool_reset(e->pool, place));
    while (place->n_tokens < n)
        HT_TRY(ht_pool_prompt(e->pool, place, c->ids + place->n_tokens, e->o.prefill_chunk));
    return HT_OK;
}

static enum ht_status save(struct ht_engine *e, struct ht_state_command *c)
{
    const int64_t n = c->n / e->o.prefill_chunk * e->o.prefill_chunk;
    const int64_t state_bytes = ht_pool_export_bytes(e->pool, n);
    const size_t ids_bytes = (size_t)n * sizeof *c->ids;
    const size_t body = HEAD_BYTES + ids_bytes + (size_t)state_bytes;
    enum ht_status st = HT_OK;
    struct ht_place place;
    struct ht_hash hash;
    char *file = NULL;

    if (n == 0)
        return HT_FAIL(HT_ERR_ARG,
                       "%lld tokens to save the state of; states are kept at multiples of "
                       "prefill_chunk = %lld tokens",
                       (long long)c->n, (long long)e->o.prefill_chunk);
    if (n > e->o.max_context)
        return HT_FAIL(HT_ERR_ARG, "%lld tokens to save the state of; the context holds %lld",
                       (long long)n, (long long)e->o.max_context);
    if (!ht_scheduler_take_place(e, &place, e->token_bytes ? n : 0))
        return HT_FAIL(HT_ERR_MEMORY, "no free place for a state of %lld tokens; all are in use",
                       (long long)n);
    HT_TRY_GOTO(st, done, compute(e, c, n, &place));
    file = malloc(body + HASH_BYTES);
    if (!file) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for a state of %zu bytes", body);
        goto done;
    }
    HT_TRY_GOTO(st, done, fingerprint(e, &hash));
    memcpy(file, magic, 8);
    memcpy(file + 8, hash.b, 16);
    memcpy(file + 24, &n, 8);
    memcpy(file + 32, &state_bytes, 8);
    memcpy(file + HEAD_BYTES, c->ids, ids_bytes);
    HT_TRY_GOTO(st, done, ht_pool_export(e->pool, &place, file + HEAD_BYTES + ids_bytes));
    hash = ht_hash_of(file, body);
    memcpy(file + body, hash.b, HASH_BYTES);
    st = ht_file_publish(c->path, file, body + HASH_BYTES);
done:
    free(file);
    ht_scheduler_give_place(e, &place);
    return st;
}

static enum ht_status check_file(const struct ht_engine *e, const char *file, size_t n_bytes,
                                 const char *path, int64_t *n)
{
    struct ht_hash hash;
    int64_t state_bytes;

    if (n_bytes < HEAD_BYTES + HASH_BYTES || memcmp(file, magic, 8) != 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: not a saved state", path);
    hash = ht_hash_of(file, n_bytes - HASH_BYTES);
    if (memcmp(file + n_bytes - HASH_BYTES, hash.b, HASH_BYTES) != 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: damaged: its bytes do not have the hash at its end",
                       path);
    HT_TRY(fingerprint(e, &hash));
    if (memcmp(file + 8, hash.b, 16) != 0)
        return HT_FAIL(HT_ERR_FORMAT, "%s: the state of another model, or of another prefill_chunk",
                       path);
    memcpy(n, file + 24, 8);
    memcpy(&state_bytes, file + 32, 8);
    if (*n < 1 || *n > e->o.max_context)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %lld tokens; the context holds %lld", path,
                       (long long)*n, (long long)e->o.max_context);
    if (state_bytes != ht_pool_export_bytes(e->pool, *n) ||
        n_bytes != HEAD_BYTES + (size_t)*n * 4 + (size_t)state_bytes + HASH_BYTES)
        return HT_FAIL(HT_ERR_FORMAT, "%s: %zu bytes do not hold a state of %lld tokens", path,
                       n_bytes, (long long)*n);
    return HT_OK;
}

static enum ht_status restore(struct ht_engine *e, struct ht_state_command *c)
{
    const size_t most =
        HEAD_BYTES + HASH_BYTES +
        (size_t)(e->o.max_context * 4 + ht_pool_export_bytes(e->pool, e->o.max_context));
    enum ht_status st = HT_OK;
    char *file = NULL;
    size_t n_bytes;
    int64_t n = 0;

    if (!e->cache)
        return HT_FAIL(HT_ERR_UNSUPPORTED,
                       "a state is restored into the prefix cache, which this engine is without");
    HT_TRY(ht_file_read(&file, &n_bytes, c->path, most));
    HT_TRY_GOTO(st, done, check_file(e, file, n_bytes, c->path, &n));
    int32_t *ids = malloc((size_t)n * sizeof *ids); // the file's are not aligned
    if (!ids) {
        st = HT_FAIL(HT_ERR_MEMORY, "no memory for %lld tokens", (long long)n);
        goto done;
    }
    memcpy(ids, file + HEAD_BYTES, (size_t)n * sizeof *ids);
    const int64_t state_bytes = ht_pool_export_bytes(e->pool, n);
    void *state = ht_prefix_cache_add(e->cache, ids, n, state_bytes);
    if (state) memcpy(state, file + HEAD_BYTES + (size_t)n * 4, (size_t)state_bytes);
    if (!ht_prefix_cache_find(e->cache, ids, n, n))
        st = HT_FAIL(HT_ERR_MEMORY, "%s: %lld bytes do not fit into the prefix cache of %lld",
                     c->path, (long long)state_bytes, (long long)e->o.prefix_cache_bytes);
    free(ids);
    c->n = n;
done:
    free(file);
    return st;
}

enum ht_status ht_engine_run_command(struct ht_engine *e, struct ht_state_command *c)
{
    return c->is_save ? save(e, c) : restore(e, c);
}
