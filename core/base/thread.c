/* core/base/thread.c: libgomp's settings are environment variables, read when the library is loaded. */
#include "core/base/thread.h"

#include <stdlib.h>
#include <unistd.h>

void ht_thread_limit_spinning(char **argv)
{
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    if (setenv("GOMP_SPINCOUNT", "20000", 0) != 0) return; // some ten microseconds
    execv("/proc/self/exe", argv);
    // still here: no /proc; go on with the default
}
