/* core/base/status.h: how every function that can fail says so.
 *
 * Library code never exits and never prints. It returns enum ht_status; the message for the person
 * at the terminal is kept for the calling thread and read with ht_error_message().
 */
#ifndef HT_BASE_STATUS_H
#define HT_BASE_STATUS_H

enum ht_status {
    HT_OK = 0,
    HT_ERR_ARG,         // a caller passed something the header forbids
    HT_ERR_RECIPE,      // a recipe or the command line is wrong
    HT_ERR_IO,          // the operating system refused (errno is in the message)
    HT_ERR_FORMAT,      // a file's content is not what its format promises
    HT_ERR_CHECKPOINT,  // checkpoints are there, but none is usable
    HT_ERR_MEMORY,      // memory or disk space is short
    HT_ERR_UNSUPPORTED, // valid, but not available in this build or on this machine
    HT_ERR_CUDA,        // CUDA, cuBLAS or NCCL said no
    HT_ERR_COMM,        // a peer rank is lost or a collective failed
    HT_ERR_NUMERIC,     // too many non-finite losses in a row
    HT_ERR_STOPPED,     // stopped on request
};

/* The only way to make an error: stores the message for this thread and returns the code. */
#define HT_FAIL(code, ...) ht_fail_at((code), __FILE__, __LINE__, __VA_ARGS__)

/* Return from the enclosing function on failure. */
#define HT_TRY(call)                                                                               \
    do {                                                                                           \
        const enum ht_status ht_try_st_ = (call);                                                  \
        if (ht_try_st_ != HT_OK) return ht_try_st_;                                                \
    } while (0)

/* Store the status and jump to the clean-up label on failure. */
#define HT_TRY_GOTO(st, label, call)                                                               \
    do {                                                                                           \
        (st) = (call);                                                                             \
        if ((st) != HT_OK) goto label;                                                             \
    } while (0)

enum ht_status ht_fail_at(enum ht_status code, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Append ", while ..." to this thread's message, keeping the code: upper layers add, never replace.
 */
enum ht_status ht_fail_while(enum ht_status code, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* The last message of this thread; "" if none. Valid until the thread's next failure. */
const char *ht_error_message(void);

/* Exit code of a program for a status (docs/recipes.md, exit codes): 0 to 7 or 75. */
int ht_exit_code(enum ht_status st);

#endif
