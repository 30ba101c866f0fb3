/* core/base/log.h: lines for people, with level, rank and time; the sink belongs to the program. */
#ifndef HT_BASE_LOG_H
#define HT_BASE_LOG_H

#include <stdio.h>

enum ht_log_level { HT_LOG_DEBUG, HT_LOG_INFO, HT_LOG_WARN, HT_LOG_ERROR };

struct ht_log {
    enum ht_log_level level; // lower ones are dropped
    int rank, n_ranks;       // "[1]" is printed before the text when n_ranks > 1
    FILE *terminal;          // usually stderr; NULL for none
    FILE *file;              // usually runs/NAME/train.log; NULL for none
};

/* log may be NULL: nothing happens. One line per call; a failing stream is ignored (a full pipe
 * must not stop a training run). */
void ht_log_line(const struct ht_log *log, enum ht_log_level level, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define HT_INFO(log, ...) ht_log_line((log), HT_LOG_INFO, __VA_ARGS__)
#define HT_WARN(log, ...) ht_log_line((log), HT_LOG_WARN, __VA_ARGS__)

#endif
