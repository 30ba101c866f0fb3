/* core/base/log.c: formatting of log lines. */
#include "core/base/log.h"

#include <stdarg.h>
#include <time.h>

void ht_log_line(const struct ht_log *log, enum ht_log_level level, const char *format, ...)
{
    static const char *const names[] = { "debug", "info", "warning", "error" };
    char text[4096], prefix[96];
    struct tm tm;
    va_list ap;

    if (!log || level < log->level) return;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);

    const time_t now = time(NULL);
    localtime_r(&now, &tm);
    int n = (int)strftime(prefix, sizeof prefix, "%H:%M:%S ", &tm);
    if (log->n_ranks > 1) n += snprintf(prefix + n, sizeof prefix - (size_t)n, "[%d] ", log->rank);
    if (level != HT_LOG_INFO) snprintf(prefix + n, sizeof prefix - (size_t)n, "%s: ", names[level]);
    if (log->terminal) fprintf(log->terminal, "%s%s\n", prefix, text);
    if (log->file) {
        fprintf(log->file, "%s%s\n", prefix, text);
        fflush(log->file);
    }
}
