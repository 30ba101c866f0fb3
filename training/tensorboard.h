/* training/tensorboard.h: TensorBoard event files, written without TensorFlow.
 *
 * A file is a row of TFRecords:  u64 length, u32 masked crc32c of it, bytes, u32 masked crc32c of
 * the bytes (little-endian; masked(c) = rotate_right(c, 15) + 0xa282ead8). Each record is a
 * protobuf Event:
 *
 *   Event   1 wall_time double   2 step int64   3 file_version "brain.Event:2"   5 Summary   7
 * SessionLog Summary 1 repeated Value { 1 tag, 2 simple_value float }      SessionLog { 1 status:
 * START = 1 }
 *
 * A record goes out in one write, so readers that follow the file never see half of one for long.
 */
#ifndef HT_TRAINING_TENSORBOARD_H
#define HT_TRAINING_TENSORBOARD_H

#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

enum { HT_TENSORBOARD_MAX_SCALARS = 64, HT_TENSORBOARD_MAX_TAG = 128 };

struct ht_tensorboard;

/* New file dir/events.out.tfevents.TIME.HOST.PID.0. resume_step > 0: tells TensorBoard to drop what
 * older files of the folder hold beyond that step. */
enum ht_status ht_tensorboard_open(struct ht_tensorboard **out, const char *dir,
                                   int64_t resume_step);

/* One event with n tag-value pairs (n and tag lengths bounded as above: HT_ERR_ARG). */
enum ht_status ht_tensorboard_scalars(struct ht_tensorboard *t, double wall_time_s, int64_t step,
                                      int n, const char *const *tags, const double *values);

const char *ht_tensorboard_path(const struct ht_tensorboard *t);
void ht_tensorboard_close(struct ht_tensorboard *t);

/* crc32c (Castagnoli) of n bytes, and TensorFlow's mask over it. */
uint32_t ht_crc32c(const void *data, size_t n);
uint32_t ht_crc32c_masked(const void *data, size_t n);

#endif
