/* core/base/thread.c: libgomp's settings are environment variables, read when the library is loaded. */
#include "core/base/thread.h"

#include <limits.h>
#include <stdlib.h>
#include <unistd.h>

void ht_thread_limit_spinning(char **argv)
{
    if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    if (setenv("GOMP_SPINCOUNT", "20000", 0) != 0) return; // some ten microseconds
    // by its path: started as /proc/self/exe the process would be called "exe"
    char path[PATH_MAX];
    const ssize_t n = readlink("/proc/self/exe", path, sizeof path - 1);
    if (n > 0) {
        path[n] = '\0';
        execv(path, argv);
    }
    execv("/proc/self/exe", argv); // the file was replaced meanwhile
    // still here: no /proc; go on with the default
}
