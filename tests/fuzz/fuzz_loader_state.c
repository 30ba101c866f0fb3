/* tests/fuzz/fuzz_loader_state.c: the loader's state as JSON, and as a place in small data. What is
 * read prints and reads the same; a state that the loader accepts gives batches. */
#include "data/loader.h"
#include "tests/fuzz/small_shard.h"

static struct ht_loader *fresh(void)
{
    static char path[PATH_MAX + 16];
    struct ht_loader *l;

    if (!path[0]) {
        snprintf(path, sizeof path, "%s/small.h5", fuzz_folder());
        small_shard(path);
    }
    const struct ht_loader_dataset sets[2] = { { path, 2.0 }, { path, 1.0 } };
    FUZZ_HOLDS(ht_loader_open(&l, &(struct ht_loader_options){ .n_datasets = 2,
                                                               .datasets = sets,
                                                               .seq_len = 16,
                                                               .rows_per_step = 4,
                                                               .micro_rows = 2,
                                                               .n_ranks = 1,
                                                               .seed = 1,
                                                               .shuffle = true,
                                                               .window_rows = 32 }) == HT_OK);
    return l;
}

static void draw(const struct ht_loader_state *s)
{
    struct ht_loader *l = fresh();
    struct ht_loader_state now;
    const struct ht_batch *b;

    FUZZ_HOLDS(ht_loader_set_state(l, s) == HT_OK);
    ht_loader_get_state(l, &now);
    FUZZ_HOLDS(now.row == s->row);
    for (int i = 0; i < 50; i++) {
        FUZZ_HOLDS(ht_loader_next(l, &b, NULL) == HT_OK && b && b->n_tokens == 32);
        for (int64_t t = 0; t < b->n_tokens; t++)
            FUZZ_HOLDS(b->ids[t] >= 0 && b->ids[t] < SMALL_VOCAB && b->labels[t] < SMALL_VOCAB);
    }
    ht_loader_close(l);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static struct ht_loader *loader; // never begins, so that its state can be set again and again
    struct ht_loader_state s, again;
    char *text = fuzz_text(data, n), *printed = NULL;
    enum ht_status st = ht_loader_state_from_json(&s, text, "loader.json");

    if (!loader) loader = fresh();
    if (st == HT_OK) {
        if (s.seed >= 0) {
            FUZZ_HOLDS(ht_loader_state_to_json(&printed, &s) == HT_OK);
            FUZZ_HOLDS(ht_loader_state_from_json(&again, printed, "printed") == HT_OK);
            FUZZ_HOLDS(memcmp(&s, &again, sizeof s) == 0);
        }
        st = ht_loader_set_state(loader, &s);
        if (st == HT_OK && s.row < INT64_MAX / 2) draw(&s);
    }
    if (st != HT_OK) FUZZ_REFUSED(st);
    free(printed);
    free(text);
    return 0;
}
