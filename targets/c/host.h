/* What the self-test and the runner ask of the machine they run on: bytes in and bytes out. */
#ifndef QCOMPILE_HOST_H
#define QCOMPILE_HOST_H

#include <stddef.h>

/* A bare machine's compiler may bring no C library: whoever links this gives these two. */
#if defined(__has_include)
#if !__has_include(<string.h>)
#define NO_STRING_H
#endif
#endif
#ifdef NO_STRING_H
void *memcpy(void *restrict to, const void *restrict from, size_t size);
void *memset(void *to, int value, size_t size);
#else
#include <string.h>
#endif

/* Reads up to `size` bytes from standard input; returns fewer only where the input ends. */
size_t host_read(void *data, size_t size);

/* Writes `size` bytes to standard output; returns 0, or -1 if they could not all be written. */
int host_write(const void *data, size_t size);

#endif
