/* tests/checkpoints/ckpt_case.h: small training states with known bits, saved by any number of
 * ranks. */
#ifndef HT_TESTS_CKPT_CASE_H
#define HT_TESTS_CKPT_CASE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "checkpoints/checkpoint.h"
#include "checkpoints/job.h"

#define CKPT_BUCKET 2048 // bytes: tensors are cut many times

struct ckpt_case {
    struct ht_tensor_list list; // 1-D, 2-D and 3-D tensors with gaps between them
    char dir[256];              // fresh, removed by free
};

void ckpt_case_make(struct ckpt_case *c);
void ckpt_case_free(struct ckpt_case *c);

/* The bits of one element: any pattern, not-a-number included. */
uint32_t ckpt_bits(int array, int64_t flat, int64_t step);

/* Every rank's write and rank 0's publish, in this process. replicated: each rank holds everything.
 */
enum ht_status ckpt_save_as(const struct ckpt_case *c, int world, bool replicated, int64_t step,
                            int keep_last, int64_t keep_every);

/* Reads what each of n_readers ranks would own and compares the bits; checks fail the test. */
void ckpt_check(const struct ckpt_case *c, const char *path, int n_readers, int64_t step);

/* One writer without communication, one source of that step. */
enum ht_status ckpt_writer(struct ht_ckpt_writer **w, const struct ckpt_case *c, int keep_last,
                           bool background);
enum ht_status ckpt_save(struct ht_ckpt_writer *w, const struct ckpt_case *c, int64_t step);

/* DIR/step-...; a static buffer. */
const char *ckpt_path(const struct ckpt_case *c, int64_t step);
int64_t ckpt_step_of(const char *path); // of a found path, -1 for ""

#endif
