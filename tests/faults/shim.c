/* Library calls that go wrong, for LD_PRELOAD: the real command meets a real errno.
 *
 * FAULT_CALL    pwrite, preadv or fsync
 * FAULT_PATH    part of the path of the file that it must concern
 * FAULT_NUMBER  which such call goes wrong, counted from 1; 0 for none
 * FAULT_ERRNO   what it fails with; 0: half of it is done; -1: the process is killed
 * FAULT_DELAY   microseconds that every such call takes
 * FAULT_HIT     a file that is made when the fault strikes
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static long number;

static long setting(const char *name) {
    const char *text = getenv(name);
    return text ? atol(text) : 0;
}

/* -1: fail, 0: nothing, 1: half */
static int fate(const char *call, int fd) {
    const char *wanted = getenv("FAULT_CALL"), *part = getenv("FAULT_PATH");
    char link[64], path[4096];
    if (!wanted || !part || strcmp(wanted, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, part)) return 0;
    if (setting("FAULT_DELAY")) usleep(setting("FAULT_DELAY"));
    if (__sync_add_and_fetch(&number, 1) != setting("FAULT_NUMBER")) return 0;
    if (getenv("FAULT_HIT")) close(creat(getenv("FAULT_HIT"), 0600));
    if (setting("FAULT_ERRNO") < 0) kill(getpid(), SIGKILL);
    if (!setting("FAULT_ERRNO")) return 1;
    errno = setting("FAULT_ERRNO");
    return -1;
}

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "pwrite64");
    int found = fate("pwrite", fd);
    return found < 0 ? -1 : real(fd, data, found ? (count + 1) / 2 : count, offset);
}

static ssize_t read_some(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    static ssize_t (*real)(int, const struct iovec *, int, off64_t, int);
    if (!real) real = dlsym(RTLD_NEXT, "preadv64v2");
    int found = fate("preadv", fd);
    struct iovec half = {parts[0].iov_base, (parts[0].iov_len + 1) / 2};
    return found < 0 ? -1 : found ? real(fd, &half, 1, offset, flags) : real(fd, parts, count, offset, flags);
}

ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return read_some(fd, parts, count, offset, 0);
}

/* What CPython calls where the C library has it. */
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
    return read_some(fd, parts, count, offset, flags);
}

int fsync(int fd) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    return fate("fsync", fd) ? -1 : real(fd);
}
