/* training/signals.h: a request to stop, as a flag that the step loop reads.
 *
 * SIGUSR1 (Slurm's warning, forwarded by mpirun), SIGTERM and SIGINT ask for a checkpoint at the
 * next step border and exit code 75. A second SIGTERM or SIGINT leaves at once with 128 + number:
 * nothing half-written counts, as files appear by rename. mpirun itself gives 2 s between SIGTERM
 * and SIGKILL unless odls_base_sigkill_timeout says otherwise, so SIGUSR1 is the signal to use.
 * SIGPIPE is ignored: a log reader that goes away must not end a run.
 *
 * The one piece of process-wide state in the library: signals have no other address.
 */
#ifndef HT_TRAINING_SIGNALS_H
#define HT_TRAINING_SIGNALS_H

#include "core/base/status.h"

/* Once per process, before threads are created; again is harmless and forgets what was pending. */
enum ht_status ht_signals_install(void);

/* The first signal that asked to stop, or 0. Any thread. */
int ht_signals_pending(void);

/* Keep these signals from the calling thread (a writer or loader thread that must not see EINTR).
 */
void ht_signals_block_thread(void);

/* "SIGUSR1", "SIGTERM", "SIGINT", or "signal". */
const char *ht_signals_name(int signal_number);

#endif
