/* tests/faults/failshim.c: LD_PRELOAD library that makes the n-th call of a kind fail once.
 *
 * Every thread of the process is watched; nothing happens until armed.
 */
#include "failshim.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_int armed_kind = -1, seen, nth_call;
static int fail_code;
static char fail_prefix[512];

failshim_arm_fn ht_failshim_arm;
failshim_disarm_fn ht_failshim_disarm;

void ht_failshim_arm(enum failshim_kind kind, int nth, int code, const char *prefix)
{
    snprintf(fail_prefix, sizeof fail_prefix, "%s", prefix);
    fail_code = code;
    atomic_store(&seen, 0);
    atomic_store(&nth_call, nth);
    atomic_store(&armed_kind, (int)kind);
}

int ht_failshim_disarm(void)
{
    atomic_store(&armed_kind, -1);
    return atomic_load(&seen);
}

static bool due(enum failshim_kind kind)
{
    return atomic_fetch_add(&seen, 1) + 1 == atomic_load(&nth_call) &&
           atomic_load(&armed_kind) == (int)kind;
}

static bool path_due(enum failshim_kind kind, const char *path)
{
    if (atomic_load(&armed_kind) != (int)kind) return false;
    return strncmp(path, fail_prefix, strlen(fail_prefix)) == 0 && due(kind);
}

static bool fd_due(enum failshim_kind kind, int fd)
{
    char link[64], path[512];

    if (atomic_load(&armed_kind) != (int)kind) return false;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return false;
    path[n] = '\0';
    return path_due(kind, path);
}

static int failed(void)
{
    errno = fail_code;
    return -1;
}

/* ---- files ---- */

int open(const char *path, int flags, ...)
{
    va_list ap;

    va_start(ap, flags);
    const mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    if (path_due(FAILSHIM_OPEN, path)) return failed();
    if (flags & O_CREAT && path_due(FAILSHIM_CREATE, path)) return failed();
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

ssize_t read(int fd, void *buf, size_t n)
{
    const bool hit = fd_due(FAILSHIM_READ, fd);
    if (hit && fail_code != FAILSHIM_SHORT) return failed();
    return syscall(SYS_read, fd, buf, hit ? (n + 1) / 2 : n);
}

ssize_t pread(int fd, void *buf, size_t n, off_t at)
{
    const bool hit = fd_due(FAILSHIM_READ, fd);
    if (hit && fail_code != FAILSHIM_SHORT) return failed();
    return syscall(SYS_pread64, fd, buf, hit ? (n + 1) / 2 : n, at);
}

ssize_t write(int fd, const void *buf, size_t n)
{
    const bool hit = fd_due(FAILSHIM_WRITE, fd);
    if (hit && fail_code != FAILSHIM_SHORT) return failed();
    return syscall(SYS_write, fd, buf, hit ? (n + 1) / 2 : n);
}

ssize_t pwrite(int fd, const void *buf, size_t n, off_t at)
{
    const bool hit = fd_due(FAILSHIM_WRITE, fd);
    if (hit && fail_code != FAILSHIM_SHORT) return failed();
    return syscall(SYS_pwrite64, fd, buf, hit ? (n + 1) / 2 : n, at);
}

int fsync(int fd)
{
    if (fd_due(FAILSHIM_FSYNC, fd)) return failed();
    return (int)syscall(SYS_fsync, fd);
}

int rename(const char *from, const char *to)
{
    if (path_due(FAILSHIM_RENAME, from)) return failed();
    return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags)
{
    if (path_due(FAILSHIM_RENAME, from)) return failed();
    return (int)syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
}

int mkdir(const char *path, mode_t mode)
{
    if (path_due(FAILSHIM_MKDIR, path)) return failed();
    return (int)syscall(SYS_mkdirat, AT_FDCWD, path, mode);
}

int unlink(const char *path)
{
    if (path_due(FAILSHIM_UNLINK, path)) return failed();
    return (int)syscall(SYS_unlinkat, AT_FDCWD, path, 0);
}

int remove(const char *path)
{
    if (path_due(FAILSHIM_UNLINK, path)) return failed();
    if (syscall(SYS_unlinkat, AT_FDCWD, path, 0) == 0) return 0;
    return errno == EISDIR ? (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR) : -1;
}

DIR *opendir(const char *path)
{
    DIR *(*real)(const char *);

    if (path_due(FAILSHIM_OPENDIR, path)) {
        errno = fail_code;
        return NULL;
    }
    void *p = dlsym(RTLD_NEXT, "opendir");
    memcpy(&real, &p, sizeof real);
    return real(path);
}

int statvfs(const char *path, struct statvfs *out)
{
    int (*real)(const char *, struct statvfs *);

    const bool hit = path_due(FAILSHIM_STATVFS, path);
    void *p = dlsym(RTLD_NEXT, "statvfs");
    memcpy(&real, &p, sizeof real);
    const int rc = real(path, out);
    if (hit) out->f_bavail = out->f_bfree = 0;
    return rc;
}

/* ---- memory: glibc's own entries, so that nothing here allocates ---- */

extern void *__libc_malloc(size_t n);
extern void *__libc_calloc(size_t n, size_t each);
extern void *__libc_realloc(void *p, size_t n);

static bool alloc_due(void)
{
    if (atomic_load(&armed_kind) != FAILSHIM_ALLOC || !due(FAILSHIM_ALLOC)) return false;
    errno = ENOMEM;
    return true;
}

void *malloc(size_t n)
{
    return alloc_due() ? NULL : __libc_malloc(n);
}

void *calloc(size_t n, size_t each)
{
    return alloc_due() ? NULL : __libc_calloc(n, each);
}

void *realloc(void *p, size_t n)
{
    return alloc_due() ? NULL : __libc_realloc(p, n);
}
