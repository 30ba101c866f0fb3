/* tests/data/data_test.h: a folder of one's own and shards made from seeds, for the suites of
 * data/. */
#ifndef HT_TESTS_DATA_TEST_H
#define HT_TESTS_DATA_TEST_H

#include <check.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/base/file.h"
#include "core/base/rng.h"
#include "data/shard.h"

#define must(call) ck_assert_msg((call) == HT_OK, "%s: %s", #call, ht_error_message())

/* The call failed as promised, with a message that names what is wrong. */
static inline void expect(enum ht_status st, enum ht_status want, const char *text)
{
    ck_assert_msg(st == want, "status %d, not %d: %s", (int)st, (int)want, ht_error_message());
    ck_assert_msg(strstr(ht_error_message(), text) != NULL, "'%s' is not in: %s", text,
                  ht_error_message());
}

/* A fresh folder; ht_file_remove_tree() it. */
static inline char *make_folder(char out[PATH_MAX])
{
    const char *base = getenv("TMPDIR");
    snprintf(out, PATH_MAX, "%s/hybridtrain-test-XXXXXX", base ? base : "/tmp");
    ck_assert_ptr_nonnull(mkdtemp(out));
    return out;
}

static inline char *join(char out[PATH_MAX], const char *folder, const char *name)
{
    ck_assert_int_lt(snprintf(out, PATH_MAX, "%s/%s", folder, name), PATH_MAX);
    return out;
}

/* Documents as a function of a seed: length 0 to max_doc (every fifth or so empty), ids below
 * vocab. */
struct doc_set {
    uint64_t seed;
    int64_t n_docs, max_doc, vocab;
};

static inline int64_t doc_length(const struct doc_set *d, int64_t doc)
{
    if (ht_rng_u64(d->seed, 1, (uint64_t)doc) % 5 == 0) return 0;
    return (int64_t)(ht_rng_u64(d->seed, 2, (uint64_t)doc) % (uint64_t)(d->max_doc + 1));
}

static inline int32_t doc_token(const struct doc_set *d, int64_t doc, int64_t i)
{
    const uint64_t at = (uint64_t)doc << 32 | (uint64_t)i;
    return (int32_t)(ht_rng_u64(d->seed, 3, at) % (uint64_t)d->vocab);
}

/* Write documents first .. last-1 as one shard. */
static inline void write_shard(const char *path, const struct doc_set *d, int64_t first,
                               int64_t last)
{
    struct ht_shard_writer *w;
    int64_t n_docs, n_tokens, sum = 0;
    int32_t *ids = malloc(sizeof *ids * (size_t)(d->max_doc + 1));

    must(ht_shard_writer_create(&w, path, d->vocab, "00ff"));
    for (int64_t doc = first; doc < last; doc++) {
        const int64_t n = doc_length(d, doc);
        for (int64_t i = 0; i < n; i++) ids[i] = doc_token(d, doc, i);
        must(ht_shard_writer_add(w, ids, n, 3 * n));
        sum += n;
    }
    must(ht_shard_writer_finish(w, &n_docs, &n_tokens));
    ht_shard_writer_free(w);
    free(ids);
    ck_assert_int_eq(n_docs, last - first);
    ck_assert_int_eq(n_tokens, sum);
}

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

static inline int run_suite(Suite *s)
{
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}

#endif
