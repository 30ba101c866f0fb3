/* tests/faults/failshim.h: make the n-th call of a kind fail once (failshim.c, loaded with
 * LD_PRELOAD).
 *
 * Found with dlsym: the suite works without the library only to say that it is missing.
 */
#ifndef HT_TESTS_FAILSHIM_H
#define HT_TESTS_FAILSHIM_H

enum failshim_kind {
    FAILSHIM_OPEN,   // open for writing or reading
    FAILSHIM_CREATE, // open with O_CREAT
    FAILSHIM_READ,   // read, pread
    FAILSHIM_WRITE,  // write, pwrite
    FAILSHIM_FSYNC,
    FAILSHIM_RENAME, // rename, renameat2
    FAILSHIM_MKDIR,
    FAILSHIM_UNLINK, // unlink, remove
    FAILSHIM_OPENDIR,
    FAILSHIM_STATVFS, // says that nothing is free, whatever the code
    FAILSHIM_ALLOC,   // malloc, calloc, realloc, strdup
    FAILSHIM_KINDS
};

#define FAILSHIM_SHORT (-1) // instead of an errno: do half of it

/* From now on the nth (from 1) call of that kind fails with code; files: only below prefix. */
typedef void failshim_arm_fn(enum failshim_kind kind, int nth, int code, const char *prefix);

/* Back to normal; the number of calls seen since arm. It has failed when that is at least nth. */
typedef int failshim_disarm_fn(void);

#endif
