/* tests/data/loader_world.h: three datasets in a folder of one's own, for the loader's suites. */
#ifndef HT_TESTS_LOADER_WORLD_H
#define HT_TESTS_LOADER_WORLD_H

#include "data/loader.h"
#include "tests/data/data_test.h"

static char folder[PATH_MAX];

/* Three datasets: a folder of three shards, a file, and one much smaller than a row. */
static const struct doc_set sets[3] = { { 21, 400, 90, 70000 },
                                        { 22, 150, 200, 70000 },
                                        { 24, 4, 9, 70000 } };
static char paths[3][PATH_MAX];

static inline void setup(void)
{
    char name[PATH_MAX];

    make_folder(folder);
    must(ht_file_make_dirs(join(paths[0], folder, "web")));
    write_shard(join(name, folder, "web/b.h5"), &sets[0], 130, 131);
    write_shard(join(name, folder, "web/a.h5"), &sets[0], 0, 130);
    write_shard(join(name, folder, "web/c.h5"), &sets[0], 131, 400);
    must(ht_file_publish(join(name, folder, "web/d.h5.tmp-1"), "x", 1)); // not a shard yet
    write_shard(join(paths[1], folder, "books.h5"), &sets[1], 0, sets[1].n_docs);
    write_shard(join(paths[2], folder, "tiny.h5"), &sets[2], 0, sets[2].n_docs);
}

static inline void teardown(void)
{
    ht_file_remove_tree(folder);
}

static const struct ht_loader_dataset datasets[3] = { { paths[0], 0.6 },
                                                      { paths[1], 0.3 },
                                                      { paths[2], 0.1 } };

static inline struct ht_loader_options options(int64_t seq_len, int64_t rows_per_step,
                                               int64_t micro_rows)
{
    return (struct ht_loader_options){ .n_datasets = 3,
                                       .datasets = datasets,
                                       .seq_len = seq_len,
                                       .rows_per_step = rows_per_step,
                                       .micro_rows = micro_rows,
                                       .n_ranks = 1,
                                       .seed = 5,
                                       .shuffle = true };
}

#endif
