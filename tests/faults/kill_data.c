/* tests/faults/kill_data.c: a token shard for kill_resume.sh: documents of noisy counting.
 *
 *   kill_data OUT.h5
 */
#include <stdio.h>

#include "core/base/rng.h"
#include "data/shard.h"

enum { N_DOCS = 400, MAX_LENGTH = 120, VOCAB = 256 };

static enum ht_status write(struct ht_shard_writer *w)
{
    int32_t ids[MAX_LENGTH];

    for (uint64_t d = 0; d < N_DOCS; d++) {
        const int64_t n = 5 + (int64_t)(ht_rng_u64(1, 1, d) % (MAX_LENGTH - 5));
        for (int64_t i = 0; i < n; i++) {
            const uint64_t r = ht_rng_u64(2, d, (uint64_t)i);
            ids[i] = (int32_t)(r % 4 ? ((uint64_t)i * 3 + d) % VOCAB : (r >> 8) % VOCAB);
        }
        HT_TRY(ht_shard_writer_add(w, ids, n, n));
    }
    return ht_shard_writer_finish(w, NULL, NULL);
}

int main(int argc, char **argv)
{
    struct ht_shard_writer *w = NULL;

    if (argc != 2) {
        fputs("usage: kill_data OUT.h5\n", stderr);
        return 2;
    }
    enum ht_status st = ht_shard_writer_create(&w, argv[1], VOCAB, "");
    if (st == HT_OK) st = write(w);
    ht_shard_writer_free(w);
    if (st != HT_OK) fprintf(stderr, "kill_data: %s\n", ht_error_message());
    return ht_exit_code(st);
}
