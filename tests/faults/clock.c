/* A wall clock that jumps with every look at it: a year ahead, then to before 1970. To be preloaded. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    static int looks;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(clock, now);
    if (clock == CLOCK_REALTIME) now->tv_sec = looks++ % 2 ? -now->tv_sec : now->tv_sec + 31536000;
    return result;
}
