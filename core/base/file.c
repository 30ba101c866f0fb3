/* core/base/file.c: reading whole files, publishing by rename, small facts of the system. */
#include "core/base/file.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

enum ht_status ht_file_read(char **out, size_t *n_bytes, const char *path, size_t max_bytes)
{
    enum ht_status st = HT_OK;
    struct stat sb;
    char *data = NULL;
    size_t n = 0;

    *out = NULL;
    if (n_bytes) *n_bytes = 0;
    // without O_NONBLOCK a FIFO would be waited for instead of refused
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &sb) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
        goto done;
    }
    if (!S_ISREG(sb.st_mode)) {
        st = HT_FAIL(HT_ERR_IO, "%s: not a regular file", path);
        goto done;
    }
    if ((uint64_t)sb.st_size > max_bytes) {
        st = HT_FAIL(HT_ERR_FORMAT, "%s: %lld bytes; at most %zu are accepted", path,
                     (long long)sb.st_size, max_bytes);
        goto done;
    }
    data = malloc((size_t)sb.st_size + 1);
    if (!data) {
        st = HT_FAIL(HT_ERR_MEMORY, "%s: no memory for %lld bytes", path, (long long)sb.st_size);
        goto done;
    }
    while (n < (size_t)sb.st_size) {
        const ssize_t r = read(fd, data + n, (size_t)sb.st_size - n);
        if (r < 0 && errno == EINTR) continue;
        if (r < 0) {
            st = HT_FAIL(HT_ERR_IO, "%s: read at byte %zu: %s", path, n, strerror(errno));
            goto done;
        }
        if (r == 0) break; // the file shrank meanwhile
        n += (size_t)r;
    }
    data[n] = '\0';
    if (n_bytes) *n_bytes = n;
    *out = data;
    data = NULL;
done:
    free(data);
    close(fd);
    return st;
}

enum ht_status ht_file_sync(const char *path)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    enum ht_status st = HT_OK;

    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", path, strerror(errno));
    if (fsync(fd) != 0 && errno != EINVAL)
        st = HT_FAIL(HT_ERR_IO, "%s: fsync: %s", path, strerror(errno));
    close(fd);
    return st;
}

static enum ht_status sync_parent(const char *path)
{
    char dir[PATH_MAX];
    const char *slash = strrchr(path, '/');

    if (!slash) return ht_file_sync(".");
    const size_t n = (size_t)(slash - path);
    if (n >= sizeof dir) return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    memcpy(dir, path, n);
    dir[n] = '\0';
    return ht_file_sync(n ? dir : "/");
}

enum ht_status ht_file_publish(const char *path, const void *data, size_t n_bytes)
{
    char tmp[PATH_MAX];
    enum ht_status st = HT_OK;
    size_t n = 0;

    if (snprintf(tmp, sizeof tmp, "%s.tmp-%ld", path, (long)getpid()) >= (int)sizeof tmp)
        return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    int fd = open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return HT_FAIL(HT_ERR_IO, "%s: %s", tmp, strerror(errno));
    while (n < n_bytes) {
        const ssize_t w = write(fd, (const char *)data + n, n_bytes - n);
        if (w < 0 && errno == EINTR) continue;
        if (w < 0) {
            st = HT_FAIL(errno == ENOSPC || errno == EDQUOT ? HT_ERR_MEMORY : HT_ERR_IO,
                         "%s: write of %zu bytes: %s", tmp, n_bytes, strerror(errno));
            goto done;
        }
        n += (size_t)w;
    }
    if (fsync(fd) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: fsync: %s", tmp, strerror(errno));
        goto done;
    }
    const int closed = close(fd);
    fd = -1;
    if (closed != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: close: %s", tmp, strerror(errno));
        goto done;
    }
    if (rename(tmp, path) != 0) {
        st = HT_FAIL(HT_ERR_IO, "%s: rename to %s: %s", tmp, path, strerror(errno));
        goto done;
    }
    return sync_parent(path);
done:
    if (fd >= 0) close(fd);
    unlink(tmp);
    return st;
}

enum ht_status ht_file_make_dirs(const char *path)
{
    char buf[PATH_MAX];
    const size_t n = strlen(path);

    if (n == 0 || n >= sizeof buf) return HT_FAIL(HT_ERR_ARG, "'%s': not a usable path", path);
    memcpy(buf, path, n + 1);
    for (char *p = buf + 1;; p++) {
        if (*p != '/' && *p != '\0') continue;
        const char c = *p;
        *p = '\0';
        if (mkdir(buf, 0777) != 0 && errno != EEXIST)
            return HT_FAIL(HT_ERR_IO, "%s: mkdir: %s", buf, strerror(errno));
        *p = c;
        if (c == '\0') break;
    }
    if (!ht_file_is_dir(path)) return HT_FAIL(HT_ERR_IO, "%s: exists and is not a folder", path);
    return HT_OK;
}

static int remove_one(const char *path, const struct stat *sb, int type, struct FTW *ftw)
{
    (void)sb;
    (void)type;
    (void)ftw;
    return remove(path);
}

enum ht_status ht_file_remove_tree(const char *path)
{
    if (!ht_file_exists(path)) return HT_OK;
    if (nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS) != 0)
        return HT_FAIL(HT_ERR_IO, "%s: cannot remove: %s", path, strerror(errno));
    return HT_OK;
}

bool ht_file_exists(const char *path)
{
    struct stat sb;
    return lstat(path, &sb) == 0;
}

bool ht_file_is_dir(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0 && S_ISDIR(sb.st_mode);
}

enum ht_status ht_file_free_bytes(uint64_t *out, const char *path)
{
    char buf[PATH_MAX];
    struct statvfs vfs;

    *out = 0;
    if (strlen(path) >= sizeof buf) return HT_FAIL(HT_ERR_ARG, "%s: path is too long", path);
    strcpy(buf, *path ? path : ".");
    while (statvfs(buf, &vfs) != 0) { // climb to the nearest parent that exists
        char *slash = strrchr(buf, '/');
        if (errno != ENOENT) return HT_FAIL(HT_ERR_IO, "%s: statvfs: %s", buf, strerror(errno));
        if (!slash)
            strcpy(buf, ".");
        else if (slash == buf)
            buf[1] = '\0';
        else
            *slash = '\0';
    }
    *out = (uint64_t)vfs.f_bavail * vfs.f_frsize;
    return HT_OK;
}

double ht_time_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double ht_time_wall_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static uint64_t status_field_bytes(const char *field)
{
    char line[256];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/self/status", "r");

    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (strncmp(line, field, strlen(field)) == 0) {
            kib = strtoull(line + strlen(field), NULL, 10);
            break;
        }
    fclose(f);
    return (uint64_t)kib * 1024;
}

uint64_t ht_memory_resident_bytes(void)
{
    return status_field_bytes("VmRSS:");
}
uint64_t ht_memory_peak_bytes(void)
{
    return status_field_bytes("VmHWM:");
}
