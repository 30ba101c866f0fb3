/* core/base/status.c: the thread's error message. */
#include "core/base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[4096];

enum ht_status ht_fail_at(enum ht_status code, const char *file, int line, const char *format, ...)
{
    va_list ap;

    (void)file; // kept in the signature so that a debugger or a trace build can show the place
    (void)line;
    va_start(ap, format);
    vsnprintf(message, sizeof message, format, ap);
    va_end(ap);
    return code;
}

enum ht_status ht_fail_while(enum ht_status code, const char *format, ...)
{
    const size_t used = strlen(message);
    char tail[1024];
    va_list ap;

    va_start(ap, format);
    vsnprintf(tail, sizeof tail, format, ap);
    va_end(ap);
    snprintf(message + used, sizeof message - used, ", while %s", tail);
    return code;
}

const char *ht_error_message(void)
{
    return message;
}

int ht_exit_code(enum ht_status st)
{
    switch (st) {
    case HT_OK: return 0;
    case HT_ERR_ARG:
    case HT_ERR_RECIPE: return 2;
    case HT_ERR_FORMAT: return 3;
    case HT_ERR_CHECKPOINT: return 4;
    case HT_ERR_MEMORY: return 5;
    case HT_ERR_COMM: return 6;
    case HT_ERR_NUMERIC: return 7;
    case HT_ERR_STOPPED: return 75;
    case HT_ERR_IO:
    case HT_ERR_UNSUPPORTED:
    case HT_ERR_CUDA: return 1;
    }
    return 1;
}
