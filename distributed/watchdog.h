/* distributed/watchdog.h: a thread that watches collectives on the device (internal to the folder).
 *
 * The thread that trains may be waiting for the device, which may be waiting for a peer that is
 * gone: somebody else has to look at the clock. When the oldest collective runs longer than the
 * time-out, or the library reports an error, the watchdog keeps one message that names rank,
 * collective and sequence number, and aborts the communicator, which lets the device and so the
 * waiting thread go on; that thread finds the failure at its next collective. If it does not within
 * `grace_s`, the message is printed and the process ends with HT_ERR_COMM's exit code.
 */
#ifndef HT_DISTRIBUTED_WATCHDOG_H
#define HT_DISTRIBUTED_WATCHDOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core/base/status.h"

struct ht_watchdog;

struct ht_watched { // a collective under way
    const char *what;
    int64_t seq, n_bytes;
};

/* What is watched. All but `abort` are called from the watchdog's thread and do not block. */
struct ht_watchdog_source {
    void *user;
    void (*begin)(void *user); // once, first
    // The oldest collective that has begun and is not done; false: none.
    bool (*running)(void *user, struct ht_watched *out);
    // An error that the library found by itself; false: none.
    bool (*error)(void *user, char *text, size_t n_text);
    // Who is missing in it, as far as this rank can tell.
    void (*peers)(void *user, const struct ht_watched *w, char *text, size_t n_text);
    void (*abort)(void *user); // from a thread of its own: it may hang
};

/* who: "rank 1 of 8 on node3". */
enum ht_status ht_watchdog_create(struct ht_watchdog **out, const struct ht_watchdog_source *s,
                                  const char *who, double timeout_s, double grace_s);
void ht_watchdog_set_timeout(struct ht_watchdog *w, double timeout_s);

/* The message of a failure, or NULL. Asking for it is what "found" means above. Any thread. */
const char *ht_watchdog_failure(struct ht_watchdog *w);

/* Ends the thread. After a failure what an abort under way uses is left alone. */
void ht_watchdog_free(struct ht_watchdog *w);

#endif
