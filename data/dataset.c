/* data/dataset.c: folders of shards. */
#include "data/dataset.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "core/base/file.h"

static int is_shard_name(const struct dirent *e)
{
    const size_t n = strlen(e->d_name);
    return e->d_name[0] != '.' && n > 3 && strcmp(e->d_name + n - 3, ".h5") == 0;
}

static int by_bytes(const struct dirent **a, const struct dirent **b)
{
    return strcmp((*a)->d_name, (*b)->d_name); // whatever the locale says
}

static enum ht_status open_folder(struct ht_dataset *d)
{
    enum ht_status st = HT_OK;
    struct dirent **names = NULL;
    char path[PATH_MAX];

    const int n = scandir(d->path, &names, is_shard_name, by_bytes);
    if (n < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", d->path, strerror(errno));
    if (n == 0) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: no *.h5 shard in this folder", d->path);
        goto done;
    }
    d->shards = calloc((size_t)n, sizeof *d->shards);
    if (!d->shards) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %d shards", d->path, n);
        goto done;
    }
    for (int i = 0; i < n; i++) {
        if (snprintf(path, sizeof path, "%s/%s", d->path, names[i]->d_name) >= (int)sizeof path) {
            st = HT_FAIL(HT_ERR_ARG, "%s/%s: path is too long", d->path, names[i]->d_name);
            goto done;
        }
        HT_TRY_GOTO(st, done, ht_shard_open(&d->shards[i], path));
        d->n_shards = i + 1;
    }
done:
    for (int i = 0; i < n; i++) free(names[i]);
    free(names);
    return st;
}

static enum ht_status open_single(struct ht_dataset *d)
{
    d->shards = calloc(1, sizeof *d->shards);
    if (!d->shards) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a shard", d->path);
    HT_TRY(ht_shard_open(&d->shards[0], d->path));
    d->n_shards = 1;
    return HT_OK;
}

static enum ht_status add_up(struct ht_dataset *d)
{
    const char *hash = ht_shard_tokenizer_hash(d->shards[0]);

    d->first_doc = calloc((size_t)d->n_shards + 1, sizeof *d->first_doc);
    if (!d->first_doc)
        return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %d shards", d->path, d->n_shards);
    for (int i = 0; i < d->n_shards; i++) {
        const struct ht_shard *s = d->shards[i];
        const uint64_t print = ht_shard_fingerprint(s);
        if (strcmp(ht_shard_tokenizer_hash(s), hash) != 0)
            return HT_FAIL(
                HT_ERR_FORMAT, "%s has tokenizer %s, %s has %s: tokenize both with the same",
                ht_shard_path(s), ht_shard_tokenizer_hash(s), ht_shard_path(d->shards[0]), hash);
        d->n_docs += ht_shard_n_docs(s);
        d->n_tokens += ht_shard_n_tokens(s);
        d->text_bytes += ht_shard_text_bytes(s);
        if (ht_shard_vocab_size(s) > d->vocab_size) d->vocab_size = ht_shard_vocab_size(s);
        d->fingerprint = XXH3_64bits_withSeed(&print, sizeof print, d->fingerprint);
        d->first_doc[i + 1] = d->n_docs;
    }
    return HT_OK;
}

enum ht_status ht_dataset_open(struct ht_dataset *d, const char *path)
{
    enum ht_status st = HT_OK;

    memset(d, 0, sizeof *d);
    d->path = strdup(path);
    if (!d->path) return HT_FAIL(HT_ERR_MEMORY, "%s: no memory for a dataset", path);
    HT_TRY_GOTO(st, failed, ht_file_is_dir(path) ? open_folder(d) : open_single(d));
    HT_TRY_GOTO(st, failed, add_up(d));
    return HT_OK;
failed:
    ht_dataset_close(d);
    return st;
}

void ht_dataset_close(struct ht_dataset *d)
{
    for (int i = 0; i < d->n_shards; i++) ht_shard_close(d->shards[i]);
    free(d->shards);
    free(d->first_doc);
    free(d->path);
    memset(d, 0, sizeof *d);
}

static int shard_of(const struct ht_dataset *d, int64_t doc)
{
    int low = 0, high = d->n_shards; // first_doc[low] <= doc < first_doc[high]

    while (high - low > 1) {
        const int middle = low + (high - low) / 2;
        if (d->first_doc[middle] <= doc)
            low = middle;
        else
            high = middle;
    }
    return low;
}

int64_t ht_dataset_doc_length(const struct ht_dataset *d, int64_t doc)
{
    const int i = shard_of(d, doc);
    return ht_shard_doc_length(d->shards[i], doc - d->first_doc[i]);
}

enum ht_status ht_dataset_read(const struct ht_dataset *d, int64_t doc, int64_t first, int64_t n,
                               int32_t *out)
{
    const int i = shard_of(d, doc);
    return ht_shard_read(d->shards[i], doc - d->first_doc[i], first, n, out);
}
