/* host.h by the system calls of Linux; the file that includes this has defined system_call, which takes a
 * number, a descriptor, bytes and how many.
 */
#ifndef QCOMPILE_HOST_LINUX_H
#define QCOMPILE_HOST_LINUX_H

#include "host.h"

#define SYS_READ 63
#define SYS_WRITE 64
#define STDIN 0
#define STDOUT 1
#define EINTR 4

size_t host_read(void *data, size_t size)
{
    char *at = data;
    size_t left = size;
    while (left > 0) {
        long got = system_call(SYS_READ, STDIN, at, left);
        if (got > 0) {
            at += got;
            left -= (size_t)got;
        } else if (got != -EINTR) {
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
        long put = system_call(SYS_WRITE, STDOUT, at, left);
        if (put > 0) {
            at += put;
            left -= (size_t)put;
        } else if (put != -EINTR) {
            return -1;
        }
    }
    return 0;
}

#endif
