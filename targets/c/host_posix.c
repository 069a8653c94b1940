/* host.h on a system with a C library and POSIX input and output. */
#define _POSIX_C_SOURCE 200112L

#include "host.h"

#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

size_t host_read(void *data, size_t size)
{
    char *at = data;
    size_t left = size;
    while (left > 0) {
        ssize_t got = read(STDIN_FILENO, at, left);
        if (got > 0) {
            at += got;
            left -= (size_t)got;
        } else if (got == 0 || errno != EINTR) {
            break;
        }
    }
    return size - left;
}

int host_write(const void *data, size_t size)
{
    const char *at = data;
    size_t left = size;
    while (left > 0) {
        ssize_t put = write(STDOUT_FILENO, at, left);
        if (put > 0) {
            at += put;
            left -= (size_t)put;
        } else if (put == 0 || errno != EINTR) {
            return -1;
        }
    }
    return 0;
}
