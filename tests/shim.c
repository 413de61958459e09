/* Between a program and libc, for tests: reads as slow as a busy network disk's, and a wall clock
   that jumps. Built by tests/test_faults.py, put in front by LD_PRELOAD.

   SLOW_FOLDER: path; SLOW_US: microseconds that each open and read of a file under it takes longer.
   JUMP: seconds; the wall clock goes so far forth and back at every other look at it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static atomic_char slow[4096]; /* by descriptor */

static void wait_a_little(void) {
    const char *text = getenv("SLOW_US");
    if (text != NULL)
        usleep(atoi(text));
}

static int is_slow(const char *path) {
    const char *folder = getenv("SLOW_FOLDER");
    return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

static void note(int file, const char *path) {
    if (file >= 0 && file < 4096)
        slow[file] = is_slow(path);
    if (is_slow(path))
        wait_a_little();
}

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        static int (*real)(const char *, int, ...);                             \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        if (real == NULL)                                                       \
            real = dlsym(RTLD_NEXT, #name);                                     \
        int file = real(path, flags, mode);                                     \
        note(file, path);                                                       \
        return file;                                                            \
    }
OPEN(open)
OPEN(open64)

#define FOPEN(name)                                                             \
    FILE *name(const char *path, const char *mode) {                            \
        static FILE *(*real)(const char *, const char *);                       \
        if (real == NULL)                                                       \
            real = dlsym(RTLD_NEXT, #name);                                     \
        FILE *file = real(path, mode);                                          \
        if (file != NULL)                                                       \
            note(fileno(file), path);                                           \
        return file;                                                            \
    }
FOPEN(fopen)
FOPEN(fopen64)

size_t fread(void *to, size_t size, size_t count, FILE *file) {
    static size_t (*real)(void *, size_t, size_t, FILE *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "fread");
    if (fileno(file) >= 0 && fileno(file) < 4096 && slow[fileno(file)])
        wait_a_little();
    return real(to, size, count, file);
}

ssize_t read(int file, void *to, size_t size) {
    static ssize_t (*real)(int, void *, size_t);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "read");
    if (file >= 0 && file < 4096 && slow[file])
        wait_a_little();
    return real(file, to, size);
}

static time_t jump(void) {
    static atomic_uint looks;
    const char *text = getenv("JUMP");
    return text != NULL && looks++ % 2 ? atol(text) : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed && clock == CLOCK_REALTIME)
        now->tv_sec += jump();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    static int (*real)(struct timeval *, void *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "gettimeofday");
    int failed = real(now, zone);
    if (!failed)
        now->tv_sec += jump();
    return failed;
}

time_t time(time_t *to) {
    static time_t (*real)(time_t *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "time");
    time_t now = real(NULL) + jump();
    if (to != NULL)
        *to = now;
    return now;
}
