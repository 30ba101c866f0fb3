/* training/signals.h: a request to stop, as a flag that the step loop reads.
 *
 * SIGUSR1 (Slurm's warning, forwarded by mpirun), SIGTERM and SIGINT ask for a checkpoint at the
 * next step border and exit code 75; before the first step there is nothing to save, and an
 * evaluation is cut short. A second SIGTERM or SIGINT leaves at once with 128 + number: nothing
 * half-written counts, as files appear by rename. SIGUSR1 is the signal to send to mpirun, which
 * passes it on and exits with the ranks' code. Its answer to SIGTERM or SIGINT (Open MPI 4.1,
 * measured): T seconds later SIGTERM to the ranks, T seconds after that SIGKILL, exit code 1;
 * T = odls_base_sigkill_timeout, 1 s by default.
 * SIGPIPE is ignored: a log reader that goes away must not end a run.
 *
 * The one piece of process-wide state in the library: signals have no other address.
 */
#ifndef HT_TRAINING_SIGNALS_H
#define HT_TRAINING_SIGNALS_H

#include "core/base/status.h"

/* Once per process, before threads are created; again is harmless and forgets what was pending.
 * Signals that waited because of ht_signals_block_thread arrive now. */
enum ht_status ht_signals_install(void);

/* The first signal that asked to stop, or 0. Any thread. */
int ht_signals_pending(void);

/* Keep these signals from the calling thread: a writer or loader thread that must not see EINTR, or
 * a program's start, where they wait (also over exec) for the handlers instead of ending it. */
void ht_signals_block_thread(void);
void ht_signals_unblock_thread(void);

/* "SIGUSR1", "SIGTERM", "SIGINT", or "signal". */
const char *ht_signals_name(int signal_number);

#endif
